//! What a pool is doing at this moment, for people and for machines.

use std::fmt::Write as _;
use std::time::Duration;

use cluster::WorkerId;

use super::event::{Cause, Death};

/// What a pool is doing at this moment.
///
/// Node has no counterpart. It comes from [`Pool::status`](super::Pool::status), which has an example.
/// Printed, it is a table for people. Nothing is counted for it that would not be counted without.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The generation that serves; half-way through a reload, the one before.
    pub generation: u64,
    /// As many workers are ready as make the pool ready.
    pub is_ready: bool,
    /// A reload is under way.
    pub is_reloading: bool,
    /// The pool has been told to stop.
    pub is_stopping: bool,
    /// How long the pool has been there.
    pub age: Duration,
    /// How many workers have died that were not told to leave.
    pub deaths: u64,
    /// The slots, by number.
    pub slots: Vec<SlotStatus>,
    /// The workers that have been told to leave and are still there.
    pub leaving: Vec<WorkerStatus>,
}

/// A slot, and who is in it.
///
/// Node has no counterpart. See [`Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotStatus {
    /// Its number, from 0.
    pub slot: usize,
    /// Who serves, or boots to do so.
    pub worker: Option<WorkerStatus>,
    /// Who boots or proves itself to replace that one.
    pub successor: Option<WorkerStatus>,
    /// How often it was filled again after a death.
    pub restarts: u64,
    /// When it is filled again, from now, if it waits for that.
    pub restart_in: Option<Duration>,
    /// It has lost too many workers, and stays empty.
    pub is_given_up: bool,
    /// How its last worker ended that was not told to leave.
    pub last_death: Option<Death>,
}

/// A worker of a pool.
///
/// Node has no counterpart. See [`Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// Which worker.
    pub worker: WorkerId,
    /// Its process.
    pub pid: u32,
    /// Its generation.
    pub generation: u64,
    /// What it is doing.
    pub phase: WorkerPhase,
    /// How long ago it was forked.
    pub age: Duration,
    /// Connections that its program has received from the master; 0 where workers accept for
    /// themselves.
    pub taken: u64,
    /// Of these, the ones that its program still has.
    pub open: u64,
}

/// What a worker of a pool is doing.
///
/// Node has no counterpart. See [`WorkerStatus::phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerPhase {
    /// It is not ready yet.
    Booting,
    /// It is ready.
    Ready,
    /// It was told to leave.
    Leaving,
}

impl WorkerPhase {
    fn name(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Leaving => "leaving",
        }
    }
}

impl Status {
    /// Returns how many workers are ready.
    ///
    /// Node has no counterpart. See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn ready_workers(&self) -> usize {
        let is_ready = |worker: &&WorkerStatus| worker.phase == WorkerPhase::Ready;
        self.workers().filter(is_ready).count()
    }

    /// All workers: slot by slot, and then those that leave.
    fn workers(&self) -> impl Iterator<Item = &WorkerStatus> {
        let of_slots = self.slots.iter();
        let of_slots = of_slots.flat_map(|slot| slot.worker.iter().chain(&slot.successor));
        of_slots.chain(&self.leaving)
    }

    /// Renders it as JSON: one object, times in seconds.
    ///
    /// Node has no counterpart. See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = String::new();
        let slots = self.slots.iter().map(SlotStatus::to_json);
        let leaving = self.leaving.iter().map(WorkerStatus::to_json);
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "{{\"generation\":{},\"ready\":{},\"reloading\":{},\"stopping\":{},\"age\":{},\
             \"deaths\":{},\"slots\":{},\"leaving\":{}}}",
            self.generation,
            self.is_ready,
            self.is_reloading,
            self.is_stopping,
            seconds(self.age),
            self.deaths,
            list(slots),
            list(leaving),
        );
        out
    }

    /// Renders it as lines of Prometheus' text format; their names begin with `cluster_`.
    ///
    /// Node has no counterpart. See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
            let _ = writeln!(out, "# HELP cluster_{name} {help}");
            let _ = writeln!(out, "# TYPE cluster_{name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "cluster_{name}{labels} {value}");
            }
        };
        let one = |value: String| vec![(String::new(), value)];
        let flag = |value: bool| one(u8::from(value).to_string());
        let by_slot = |value: fn(&SlotStatus) -> String| -> Vec<(String, String)> {
            let slots = self.slots.iter();
            slots
                .map(|slot| (format!("{{slot=\"{}\"}}", slot.slot), value(slot)))
                .collect()
        };
        let by_worker = |value: fn(&WorkerStatus) -> String| -> Vec<(String, String)> {
            let labels =
                |w: &WorkerStatus| format!("{{worker=\"{}\",pid=\"{}\"}}", w.worker, w.pid);
            self.workers().map(|w| (labels(w), value(w))).collect()
        };
        let states = |state: WorkerPhase| {
            let workers = self.workers().filter(|worker| worker.phase == state);
            let labels = format!("{{state=\"{}\"}}", state.name());
            (labels, workers.count().to_string())
        };
        let phases = [
            WorkerPhase::Booting,
            WorkerPhase::Ready,
            WorkerPhase::Leaving,
        ];
        metric(
            "pool_ready",
            "gauge",
            "Whether enough workers are ready.",
            flag(self.is_ready),
        );
        metric(
            "pool_reloading",
            "gauge",
            "Whether a reload is under way.",
            flag(self.is_reloading),
        );
        metric(
            "pool_generation",
            "gauge",
            "The generation that serves.",
            one(self.generation.to_string()),
        );
        metric(
            "pool_slots",
            "gauge",
            "Slots.",
            one(self.slots.len().to_string()),
        );
        metric(
            "pool_workers",
            "gauge",
            "Workers by what they do.",
            phases.map(states).into(),
        );
        metric(
            "pool_deaths_total",
            "counter",
            "Workers that died without being told to leave.",
            one(self.deaths.to_string()),
        );
        metric(
            "slot_restarts_total",
            "counter",
            "How often a slot was filled again.",
            by_slot(|slot| slot.restarts.to_string()),
        );
        metric(
            "slot_given_up",
            "gauge",
            "Whether a slot stays empty.",
            by_slot(|slot| u8::from(slot.is_given_up).to_string()),
        );
        metric(
            "worker_age_seconds",
            "gauge",
            "The time since the fork.",
            by_worker(|worker| seconds(worker.age)),
        );
        metric(
            "worker_connections_total",
            "counter",
            "Connections received from the master.",
            by_worker(|worker| worker.taken.to_string()),
        );
        metric(
            "worker_connections_open",
            "gauge",
            "Connections that are open.",
            by_worker(|worker| worker.open.to_string()),
        );
        out
    }
}

impl SlotStatus {
    fn to_json(&self) -> String {
        let worker = |worker: &Option<WorkerStatus>| {
            let json = worker.as_ref().map(WorkerStatus::to_json);
            json.unwrap_or_else(null)
        };
        let restart_in = self.restart_in.map_or_else(null, seconds);
        let last_death = self.last_death.as_ref().map_or_else(null, death_to_json);
        format!(
            "{{\"slot\":{},\"worker\":{},\"successor\":{},\"restarts\":{},\"restart_in\":{restart_in},\
             \"given_up\":{},\"last_death\":{last_death}}}",
            self.slot,
            worker(&self.worker),
            worker(&self.successor),
            self.restarts,
            self.is_given_up,
        )
    }
}

impl WorkerStatus {
    fn to_json(&self) -> String {
        format!(
            "{{\"worker\":{},\"pid\":{},\"generation\":{},\"state\":\"{}\",\"age\":{},\
             \"taken\":{},\"open\":{}}}",
            self.worker,
            self.pid,
            self.generation,
            self.phase.name(),
            seconds(self.age),
            self.taken,
            self.open,
        )
    }
}

fn death_to_json(death: &Death) -> String {
    use std::os::unix::process::ExitStatusExt as _;

    let number = |number: Option<i32>| number.map_or_else(null, |number| number.to_string());
    let code = number(death.status.and_then(|status| status.code()));
    let signal = number(death.status.and_then(|status| status.signal()));
    let pid = death.worker.map_or_else(null, |(_, pid)| pid.to_string());
    let usage = death.usage.as_ref().map_or_else(null, |usage| {
        format!(
            "{{\"user\":{},\"system\":{},\"max_rss\":{}}}",
            seconds(usage.user_cpu_time),
            seconds(usage.system_cpu_time),
            usage.max_rss
        )
    });
    let error = death.error.as_deref().map_or_else(null, quoted);
    let cause = match death.cause {
        Cause::NotForked => "not_forked",
        Cause::NeverReady => "never_ready",
        Cause::BootDeadline => "boot_deadline",
        Cause::Died => "died",
        Cause::Hung => "hung",
    };
    format!(
        "{{\"pid\":{pid},\"generation\":{},\"cause\":\"{cause}\",\"error\":{error},\"code\":{code},\
         \"signal\":{signal},\"age\":{},\"usage\":{usage}}}",
        death.generation,
        seconds(death.age),
    )
}

fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|char| match char {
        '"' | '\\' => format!("\\{char}"),
        control if control.is_control() => format!("\\u{:04x}", u32::from(control)),
        char => char.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

fn null() -> String {
    "null".to_owned()
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    format!("[{}]", items.join(","))
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match (self.is_stopping, self.is_reloading, self.is_ready) {
            (true, _, _) => "stopping",
            (_, true, _) => "reloading",
            (_, _, true) => "ready",
            (_, _, false) => "not ready",
        };
        let (ready, slots) = (self.ready_workers(), self.slots.len());
        writeln!(
            f,
            "{state}: generation {}, {ready} ready of {slots}, {} deaths, up {:.0} s",
            self.generation,
            self.deaths,
            self.age.as_secs_f64()
        )?;
        let head = [
            "slot", "worker", "pid", "gen", "state", "age", "taken", "open",
        ];
        let line = |f: &mut std::fmt::Formatter<'_>, cells: [&str; 8], note: &str| {
            let [slot, worker, pid, generation, state, age, taken, open] = cells;
            let line = format!(
                "{slot:>4} {worker:>7} {pid:>8} {generation:>4} {state:<9} {age:>8} {taken:>9} \
                 {open:>5}  {note}"
            );
            writeln!(f, "{}", line.trim_end())
        };
        line(f, head, "")?;
        let worker_line =
            |f: &mut std::fmt::Formatter<'_>, slot: &str, w: &WorkerStatus, note: &str| {
                let age = format!("{:.0}s", w.age.as_secs_f64());
                let numbers = [
                    w.worker.to_string(),
                    w.pid.to_string(),
                    w.generation.to_string(),
                ];
                let [worker, pid, generation] = &numbers;
                let (taken, open) = (w.taken.to_string(), w.open.to_string());
                let cells = [
                    slot,
                    worker,
                    pid,
                    generation,
                    w.phase.name(),
                    &age,
                    &taken,
                    &open,
                ];
                line(f, cells, note)
            };
        for slot in &self.slots {
            let number = slot.slot.to_string();
            let mut note = String::new();
            if let Some(death) = &slot.last_death {
                let _ = write!(note, "{} restarts, last: {}", slot.restarts, death.cause);
                if let Some(status) = death.status {
                    let _ = write!(note, " ({status})");
                }
            }
            match (&slot.worker, slot.restart_in) {
                (Some(worker), _) => worker_line(f, &number, worker, &note)?,
                (None, _) if slot.is_given_up => {
                    line(f, [&number, "", "", "", "given up", "", "", ""], &note)?;
                }
                (None, Some(pause)) => {
                    let pause = format!("in {:.1}s", pause.as_secs_f64());
                    line(f, [&number, "", "", "", "waits", &pause, "", ""], &note)?;
                }
                (None, None) => line(f, [&number, "", "", "", "empty", "", "", ""], &note)?,
            }
            if let Some(successor) = &slot.successor {
                worker_line(f, "+", successor, "")?;
            }
        }
        for worker in &self.leaving {
            worker_line(f, "-", worker, "")?;
        }
        Ok(())
    }
}
