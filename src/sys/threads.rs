//! Whether the process has more than one thread.

use std::time::{Duration, Instant};

/// How long a thread that has ended may still be counted: `pthread_join` returns before the kernel has
/// removed the thread. That takes microseconds; on a busy machine, the thread may have to wait for a
/// processor first. A longer time only delays the error of a process that really has several threads.
const ENDING: Duration = Duration::from_millis(100);

/// Whether there is a thread besides the calling one. `None` where the system does not say.
pub(crate) fn has_other_threads() -> Option<bool> {
    let begun = Instant::now();
    loop {
        let others = count_now();
        if others != Some(true) || begun.elapsed() >= ENDING {
            return others;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// By unshare(2), which refuses `CLONE_THREAD` in a process with several threads, and does nothing
/// otherwise. A sandbox may refuse the call altogether, an emulator may have a thread of its own, and
/// before Linux 4.3 a process that is just being looked at in /proc is refused, too: then /proc decides.
#[cfg(target_os = "linux")]
fn count_now() -> Option<bool> {
    // SAFETY: with this flag, unshare changes nothing.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } == 0 {
        return Some(false);
    }
    let refused = std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL);
    let status = std::fs::read_to_string("/proc/self/stat").ok();
    let count = status.as_deref().and_then(count_in);
    count.map(|count| count > 1).or(refused.then_some(true))
}

#[cfg(not(target_os = "linux"))]
fn count_now() -> Option<bool> {
    None
}

/// The number of threads in the text of /proc/PID/stat: field 20, counted from the process id.
#[cfg(target_os = "linux")]
fn count_in(stat: &str) -> Option<u32> {
    // The second field is a name in parentheses, which may contain any character.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(17)?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn number_of_threads_is_found_behind_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 95 0 0 0 0 0 0 0 20 0 3 0 1 2 3\n";
        assert_eq!(count_in(stat), Some(3));
        assert_eq!(count_in("7 (a) S 1"), None);
        assert_eq!(count_in(""), None);
    }

    #[test]
    fn tests_run_on_a_thread_of_their_own() {
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(has_other_threads(), Some(true)));
        });
    }
}
