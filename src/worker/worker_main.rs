//! The closure that a worker runs if it executes no program.

use std::rc::Rc;

use crate::worker::Worker;

/// The closure of [`Settings::main`](crate::Settings::main).
#[derive(Clone)]
pub(crate) struct WorkerMain(Rc<dyn Fn(Worker) -> i32>);

impl WorkerMain {
    pub(crate) fn new(main: impl Fn(Worker) -> i32 + 'static) -> Self {
        Self(Rc::new(main))
    }

    /// Runs the closure and returns its exit code.
    pub(crate) fn run(&self, worker: Worker) -> i32 {
        (self.0)(worker)
    }
}

impl std::fmt::Debug for WorkerMain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerMain").finish_non_exhaustive()
    }
}

/// Compares by identity: two values are equal if one is a clone of the other.
impl PartialEq for WorkerMain {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for WorkerMain {}
