//! Counts the connections that the application serves on threads.
//!
//! The worker's core counts connections on the worker's thread. A guard that is dropped on any
//! thread increments an atomic number, and wakes the worker's loop through the signal pipe. The
//! loop then reports the closed connections to the core. The guard takes no lock, so it cannot wait
//! for another thread, even in a child that was forked at any moment.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crate::core::worker::ListenerId;
use crate::sys;
use crate::types::sorted_map::SortedMap;
use crate::worker::{Inner, Worker};

/// Keeps a connection counted whose stream is served on another thread.
///
/// Node has no counterpart: in Node, a worker serves its connections on one thread.
///
/// [`Connection::into_parts`](crate::Connection::into_parts) returns the guard beside the stream.
/// Until the guard is dropped, on any thread, the worker counts the connection:
///
/// - [`run`](Worker::run) and [`dispatch`](Worker::dispatch) keep a disconnecting worker's channel
///   open,
/// - [`set_max_connections`](crate::Listener::set_max_connections) includes it, and
/// - the master's [`loads`](crate::Master::loads), which a scheduler receives, include it.
///
/// Drop the guard after the stream, so that the client receives end-of-file first. The worker
/// notices the drop while it waits in `accept`, `recv_from`, `run` or `dispatch`; the drop ends
/// that wait. A drop has no effect after the worker has been dropped, and in a child that the
/// application forked.
#[derive(Debug)]
#[must_use = "the connection is no longer counted once the guard is dropped"]
pub struct ConnectionGuard {
    /// The number of dropped guards of the same listener that the worker has not noticed.
    dropped: Arc<AtomicUsize>,
    /// Whether the worker has been woken and has not counted since. Cannot be upgraded once the
    /// worker has been dropped.
    is_woken: Weak<AtomicBool>,
}

impl ConnectionGuard {
    /// Returns a guard for a connection of `listener` that the worker already counts.
    pub(super) fn new(worker: Option<Rc<Inner>>, listener: Option<ListenerId>) -> Self {
        match worker.filter(|worker| worker.event_loop.check_own().is_ok()) {
            Some(worker) => {
                // Ignore an error, which usually means that no descriptor is free. The loop then
                // notices the drop when it wakes for another reason, and the next guard tries
                // again.
                let _ = worker.event_loop.open_signal_pipe();
                worker.dropped_guards.guard(listener)
            }
            None => Self {
                dropped: Arc::default(),
                is_woken: Weak::new(),
            },
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let Some(is_woken) = self.is_woken.upgrade() else {
            return;
        };
        self.dropped.fetch_add(1, Ordering::Relaxed);
        // Count before the swap. If the worker has already been woken, its own swap comes later and
        // makes this count visible to it.
        if !is_woken.swap(true, Ordering::AcqRel) {
            sys::signal::wake();
        }
    }
}

/// The dropped guards that the worker has not noticed.
#[derive(Debug, Default)]
pub(super) struct DroppedGuards {
    counts: RefCell<SortedMap<Option<ListenerId>, Arc<AtomicUsize>>>,
    is_woken: Arc<AtomicBool>,
}

impl DroppedGuards {
    fn guard(&self, listener: Option<ListenerId>) -> ConnectionGuard {
        let mut counts = self.counts.borrow_mut();
        let dropped = counts.get_or_insert_with(listener, Arc::default);
        ConnectionGuard {
            dropped: Arc::clone(dropped),
            is_woken: Arc::downgrade(&self.is_woken),
        }
    }

    /// Returns the listener of each guard that was dropped since the last call. A guard that is
    /// dropped later wakes the loop, so the caller must have emptied the signal pipe before.
    fn take(&self) -> Vec<Option<ListenerId>> {
        let mut listeners = Vec::new();
        if !self.is_woken.swap(false, Ordering::AcqRel) {
            return listeners;
        }
        self.counts.borrow_mut().retain(|listener, dropped| {
            let (count, has_guards) = match Arc::get_mut(dropped) {
                Some(count) => (*count.get_mut(), false),
                None => (dropped.swap(0, Ordering::Relaxed), true),
            };
            listeners.extend(std::iter::repeat_n(*listener, count));
            has_guards
        });
        listeners
    }
}

impl Worker {
    /// Reports the dropped guards to the core.
    pub(super) fn count_dropped_guards(&self) {
        for listener in self.inner.dropped_guards.take() {
            self.inner.shell.connection_closed(listener);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn is_send_and_sync<T: Send + Sync>() {}
    const _: () = is_send_and_sync::<ConnectionGuard>();

    #[test]
    fn guards_dropped_on_threads_are_counted_once_for_their_listeners() {
        let dropped = DroppedGuards::default();
        let listeners = [None, Some(ListenerId(1)), Some(ListenerId(2))];
        let drops = listeners.map(|listener| {
            let guards: Vec<_> = (0..8).map(|_| dropped.guard(listener)).collect();
            std::thread::spawn(move || drop(guards))
        });
        let mut taken = Vec::new();
        while taken.len() < 24 {
            taken.extend(dropped.take());
            std::thread::yield_now();
        }
        for thread in drops {
            thread.join().unwrap();
        }
        assert_eq!(dropped.take(), []);
        taken.sort_unstable();
        let expected: Vec<_> = listeners
            .iter()
            .flat_map(|listener| [*listener; 8])
            .collect();
        assert_eq!(taken, expected);
    }

    #[test]
    fn listener_without_guards_takes_no_memory() {
        let dropped = DroppedGuards::default();
        let kept = dropped.guard(Some(ListenerId(1)));
        for number in 2..100 {
            drop(dropped.guard(Some(ListenerId(number))));
            assert_eq!(dropped.take(), [Some(ListenerId(number))]);
        }
        assert_eq!(dropped.counts.borrow().len(), 1);
        drop(kept);
    }

    #[test]
    fn guard_outlives_its_worker() {
        let dropped = DroppedGuards::default();
        let guard = dropped.guard(None);
        drop(dropped);
        drop(guard);
    }
}
