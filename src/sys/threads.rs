//! Checks whether the process has more than one thread.

use std::time::{Duration, Instant};

use super::platform::threads;

/// How long the check is repeated while it finds several threads.
///
/// `pthread_join` returns before the kernel has removed the thread. The removal takes microseconds,
/// but on a busy machine the thread may have to wait for a processor first. With a longer time, a
/// process that really has several threads receives its error later. With a shorter time, a process
/// could receive the error although its other threads have been joined.
const REMOVAL_TIMEOUT: Duration = Duration::from_millis(100);

/// Returns whether the process has a thread besides the calling one. Returns `None` if the system
/// does not report this.
pub(crate) fn has_other_threads() -> Option<bool> {
    let begun = Instant::now();
    loop {
        let others = threads::has_others_now();
        if others != Some(true) || begun.elapsed() >= REMOVAL_TIMEOUT {
            return others;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
