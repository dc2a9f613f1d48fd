//! The closure that a worker runs if it executes no program.

use std::rc::Rc;

use crate::master::shell::{StartMain, start_main};
use crate::worker::Worker;

/// The closure of [`Settings::main`](crate::Settings::main).
#[derive(Clone)]
pub(crate) struct WorkerMain {
    main: Rc<dyn Fn(Worker) -> i32>,
    /// Starts a worker that runs the closure. The linker removes this function from programs that
    /// set no such closure, because nothing else refers to it.
    pub(crate) start: StartMain,
}

impl WorkerMain {
    pub(crate) fn new(main: impl Fn(Worker) -> i32 + 'static) -> Self {
        Self {
            main: Rc::new(main),
            start: start_main,
        }
    }

    /// Runs the closure and returns its exit code.
    pub(crate) fn run(&self, worker: Worker) -> i32 {
        (self.main)(worker)
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
        Rc::ptr_eq(&self.main, &other.main)
    }
}

impl Eq for WorkerMain {}
