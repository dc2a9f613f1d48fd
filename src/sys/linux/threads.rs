//! Detects other threads of the process.

/// Returns whether the process has a thread besides the calling one at this moment. Returns `None`
/// if neither the system call nor /proc answers this.
///
/// unshare(2) with `CLONE_THREAD` fails in a process with several threads, and otherwise does
/// nothing. If the call fails, the count in /proc decides, because the call can also fail for other
/// reasons. A sandbox may forbid the call, or an emulator may have its own thread. Before Linux
/// 4.3, the call also fails while another process reads this process's entry in /proc.
pub(in crate::sys) fn has_others_now() -> Option<bool> {
    // SAFETY: with this flag, unshare changes nothing.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } == 0 {
        return Some(false);
    }
    let refused = std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL);
    let status = std::fs::read_to_string("/proc/self/stat").ok();
    let count = status.as_deref().and_then(parse_thread_count);
    count.map(|count| count > 1).or(refused.then_some(true))
}

/// Returns the number of threads from the text of /proc/PID/stat. The number is field 20, if the
/// process id is field 1.
fn parse_thread_count(stat: &str) -> Option<u32> {
    // Skip field 2, a name in parentheses, because the name may contain any character.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(17)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::threads::has_other_threads;

    #[test]
    fn thread_count_is_parsed_after_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 95 0 0 0 0 0 0 0 20 0 3 0 1 2 3\n";
        assert_eq!(parse_thread_count(stat), Some(3));
        assert_eq!(parse_thread_count("7 (a) S 1"), None);
        assert_eq!(parse_thread_count(""), None);
    }

    #[test]
    fn other_threads_are_detected() {
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(has_other_threads(), Some(true)));
        });
    }
}
