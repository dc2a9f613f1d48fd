//! The status in the text format of Prometheus.

use std::fmt::{Display, Write as _};

use super::{Seconds, SlotStatus, Status, WorkerPhase, WorkerStatus};

pub(super) fn render(status: &Status) -> String {
    let mut metrics = Metrics(String::new());
    pool_metrics(&mut metrics, status);
    slot_metrics(&mut metrics, &status.slots);
    worker_metrics(&mut metrics, status);
    metrics.0
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// The text of all metrics.
struct Metrics(String);

impl Metrics {
    /// Writes a metric's `HELP` and `TYPE` lines. Returns a writer for the metric's samples.
    fn metric<'a>(&'a mut self, kind: Kind, name: &'a str, help: &str) -> Samples<'a> {
        let out = &mut self.0;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Ignore the results, because writing to a `String` cannot fail.
        let _ = writeln!(out, "# HELP cluster_{name} {help}");
        let _ = writeln!(out, "# TYPE cluster_{name} {kind}");
        Samples { out, name }
    }
}

/// A writer for one metric's samples.
struct Samples<'a> {
    out: &'a mut String,
    name: &'a str,
}

impl Samples<'_> {
    /// Writes a sample. The label values need no escaping, because all of them are numbers or phase
    /// names.
    fn sample(&mut self, labels: &[(&str, &dyn Display)], value: impl Display) {
        // Ignore the results, because writing to a `String` cannot fail.
        let _ = write!(self.out, "cluster_{}", self.name);
        for (index, (label, value)) in labels.iter().enumerate() {
            self.out.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.out, "{label}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.out.push('}');
        }
        let _ = writeln!(self.out, " {value}");
    }
}

fn pool_metrics(metrics: &mut Metrics, status: &Status) {
    metrics
        .metric(
            Kind::Gauge,
            "pool_ready",
            "Whether the pool has a quorum and is not stopping.",
        )
        .sample(&[], u8::from(status.is_ready));
    metrics
        .metric(
            Kind::Gauge,
            "pool_reloading",
            "Whether a reload is in progress.",
        )
        .sample(&[], u8::from(status.is_reloading));
    metrics
        .metric(
            Kind::Gauge,
            "pool_stopping",
            "Whether the pool is stopping.",
        )
        .sample(&[], u8::from(status.is_stopping));
    metrics
        .metric(
            Kind::Gauge,
            "pool_generation",
            "The generation of the last complete reload.",
        )
        .sample(&[], status.generation);
    metrics
        .metric(Kind::Gauge, "pool_slots", "Slots.")
        .sample(&[], status.slots.len());
    let mut workers = metrics.metric(Kind::Gauge, "pool_workers", "Workers by state.");
    for phase in WorkerPhase::ALL {
        workers.sample(&[("state", &phase.name())], status.count(phase));
    }
    metrics
        .metric(
            Kind::Counter,
            "pool_failures_total",
            "Failed workers and failed forks, except replacements in a reload or recycling.",
        )
        .sample(&[], status.failures);
}

fn slot_metrics(metrics: &mut Metrics, slots: &[SlotStatus]) {
    let mut restarts = metrics.metric(
        Kind::Counter,
        "slot_restarts_total",
        "Attempts to fork a worker after a failure.",
    );
    for slot in slots {
        restarts.sample(&[("slot", &slot.slot)], slot.restarts);
    }
    let mut given_up = metrics.metric(
        Kind::Gauge,
        "slot_given_up",
        "Whether a slot stays empty after too many failures.",
    );
    for slot in slots {
        given_up.sample(&[("slot", &slot.slot)], u8::from(slot.is_given_up));
    }
}

fn worker_metrics(metrics: &mut Metrics, status: &Status) {
    let mut by_worker = |kind: Kind, name: &str, help: &str, value: fn(&WorkerStatus) -> String| {
        let mut samples = metrics.metric(kind, name, help);
        for worker in status.workers() {
            let labels: [(&str, &dyn Display); 2] =
                [("worker", &worker.worker), ("pid", &worker.pid)];
            samples.sample(&labels, value(worker));
        }
    };
    by_worker(
        Kind::Gauge,
        "worker_age_seconds",
        "The time since the fork.",
        |worker| Seconds(worker.age).to_string(),
    );
    by_worker(
        Kind::Counter,
        "worker_connections_total",
        "Connections received from the master.",
        |worker| worker.received.to_string(),
    );
    by_worker(
        Kind::Gauge,
        "worker_connections_open",
        "Connections that the worker holds.",
        |worker| worker.open.to_string(),
    );
    let mut busy = metrics.metric(
        Kind::Gauge,
        "worker_busy",
        "Whether the worker holds a connection.",
    );
    for worker in status.workers() {
        // A missing sample means that the state is unknown.
        if let Some(is_busy) = worker.is_busy {
            let labels: [(&str, &dyn Display); 2] =
                [("worker", &worker.worker), ("pid", &worker.pid)];
            busy.sample(&labels, u8::from(is_busy));
        }
    }
}
