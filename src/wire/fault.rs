//! Injects faults. Tests use this module to make a worker fail at a named point of a hand-off. The
//! code is compiled only with debug assertions.
//!
//! `CLUSTER_FAULT=POINT:FAULT:N` makes a worker fail at the N-th pass of the fault point POINT.
//! With `:again` at the end, a worker fails at every N-th pass. The shells of the master and the
//! worker define the names of the fault points, and `fail` defines the names of the faults. A fault
//! point in the master affects the worker that the master is handling.

#[cfg(debug_assertions)]
pub(crate) use armed::point;
#[cfg(not(debug_assertions))]
pub(crate) use unarmed::point;

#[cfg(not(debug_assertions))]
mod unarmed {
    use crate::sys::process::Pid;
    use crate::wire::channel::Channel;

    #[inline(always)]
    pub(crate) fn point<I, O>(
        _name: &str,
        _worker: impl FnOnce() -> Option<Pid>,
        _own: Option<&Channel<I, O>>,
    ) {
    }
}

#[cfg(debug_assertions)]
mod armed {
    use std::cell::Cell;
    use std::num::NonZeroU32;
    use std::time::Duration;

    use crate::sys::process::Pid;
    use crate::types::signal::Signal;
    use crate::wire::channel::Channel;

    struct Plan {
        point: String,
        fault: String,
        /// The number of the pass at which the worker fails, counted from 1.
        pass: NonZeroU32,
        repeats: bool,
        passed: Cell<u32>,
    }

    thread_local! {
        static PLAN: Option<Plan> = plan();
    }

    fn plan() -> Option<Plan> {
        parse(&std::env::var("CLUSTER_FAULT").ok()?)
    }

    /// Returns the plan that the text describes, or `None` if the text is invalid.
    fn parse(plan: &str) -> Option<Plan> {
        let mut parts = plan.split(':');
        Some(Plan {
            point: parts.next()?.to_owned(),
            fault: parts.next()?.to_owned(),
            pass: parts.next()?.parse().ok()?,
            repeats: parts.next() == Some("again"),
            passed: Cell::new(0),
        })
    }

    /// Passes the fault point `name`, and makes the worker fail if `CLUSTER_FAULT` says so.
    ///
    /// `worker` returns the process that fails. If `worker` returns `None`, the pass does not
    /// count. `own` is this process's end of the channel, or `None` in the master.
    pub(crate) fn point<I, O>(
        name: &str,
        worker: impl FnOnce() -> Option<Pid>,
        own: Option<&Channel<I, O>>,
    ) {
        PLAN.with(|plan| {
            let Some(plan) = plan.as_ref().filter(|plan| plan.point == name) else {
                return;
            };
            let Some(worker) = worker() else {
                return;
            };
            plan.passed.set(plan.passed.get() + 1);
            let is_due = plan.passed.get() % plan.pass == 0;
            if is_due && (plan.repeats || plan.passed.get() == plan.pass.get()) {
                fail(&plan.fault, worker, own);
            }
        });
    }

    fn fail<I, O>(fault: &str, worker: Pid, own: Option<&Channel<I, O>>) {
        match (fault, own) {
            ("kill", _) => drop(worker.signal(None, Signal::KILL.number())),
            ("stop", _) => drop(worker.signal(None, Signal::STOP.number())),
            ("exit", Some(_)) => std::process::exit(3),
            ("close", Some(channel)) => channel.shut_socket(),
            ("garble", Some(channel)) => {
                channel.write_raw(b"no frame at all");
                // Send no valid frame until the master kills the worker because of these bytes.
                std::thread::sleep(Duration::from_secs(600));
            }
            _ => {}
        }
    }

    #[cfg(test)]
    mod tests {
        use super::parse;

        #[test]
        fn passes_are_counted_from_1() {
            assert!(parse("worker.after_receive:kill:1").is_some());
            assert!(parse("worker.after_receive:kill:0").is_none());
            assert!(parse("worker.after_receive:kill:0:again").is_none());
        }
    }
}
