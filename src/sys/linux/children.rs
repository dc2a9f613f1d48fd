//! Lists the children of this process.

/// Returns the process ids of the children of all threads. Returns `None` if `/proc` is not mounted,
/// belongs to another PID namespace, or does not list children (`CONFIG_PROC_CHILDREN`, see
/// proc_tid_children(5)).
///
/// The list may lack a child if another child is reaped at the same time.
pub(in crate::sys) fn list() -> Option<Vec<libc::pid_t>> {
    let own = std::fs::read_link("/proc/self").ok()?;
    if own.as_os_str() != std::process::id().to_string().as_str() {
        return None;
    }
    let mut children = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").ok()? {
        match std::fs::read_to_string(thread.ok()?.path().join("children")) {
            Ok(numbers) => {
                let numbers = numbers.split_ascii_whitespace();
                children.extend(numbers.filter_map(|number| number.parse::<libc::pid_t>().ok()));
            }
            // The thread has exited. The kernel has given its children to another thread.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(_) => return None,
        }
    }
    Some(children)
}
