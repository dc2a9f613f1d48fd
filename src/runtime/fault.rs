//! Named points of the hand-over at which tests make a worker fail. Without debug assertions nothing
//! of this is in the program.
//!
//! `CLUSTER_FAULT=POINT:FAULT:N` makes a worker fail when POINT is passed for the N-th time; with
//! `:again` at the end, every N times. The names of the points are in the two shells, in the order of
//! the hand-over, and those of the faults are below. A point in the master concerns the worker that
//! it is dealing with.

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
    use std::time::Duration;

    use crate::sys::process::Pid;
    use crate::types::signal::Signal;
    use crate::wire::channel::Channel;

    struct Plan {
        point: String,
        fault: String,
        every: u32,
        again: bool,
        passed: Cell<u32>,
    }

    thread_local! {
        static PLAN: Option<Plan> = plan();
    }

    fn plan() -> Option<Plan> {
        let plan = std::env::var("CLUSTER_FAULT").ok()?;
        let mut parts = plan.split(':');
        Some(Plan {
            point: parts.next()?.to_owned(),
            fault: parts.next()?.to_owned(),
            every: parts.next()?.parse().ok()?,
            again: parts.next() == Some("again"),
            passed: Cell::new(0),
        })
    }

    /// Makes `worker` fail if this is the point. It is this process if it has its `own` end of the
    /// channel at hand. One that there is not, or that is to be spared, does not pass it.
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
            let is_time = plan.passed.get() % plan.every == 0;
            if is_time && (plan.again || plan.passed.get() == plan.every) {
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
                // It is killed for that, and says nothing sensible meanwhile.
                std::thread::sleep(Duration::from_secs(600));
            }
            _ => {}
        }
    }
}
