//! Lists the children of this process.

/// Returns the process ids of the children of all threads. Returns `None` if `/proc` is not
/// mounted, belongs to another PID namespace, or does not list children (`CONFIG_PROC_CHILDREN`,
/// see proc_tid_children(5)).
///
/// The list may lack a child if another child is reaped, or a thread exits, at the same time.
pub(in crate::sys) fn list() -> Option<Vec<libc::pid_t>> {
    let own = std::fs::read_link("/proc/self").ok()?;
    if own.as_os_str() != std::process::id().to_string().as_str() {
        return None;
    }
    let mut children = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").ok()? {
        let directory = thread.ok()?.path();
        match std::fs::read_to_string(directory.join("children")) {
            Ok(numbers) => {
                let numbers = numbers.split_ascii_whitespace();
                children.extend(numbers.filter_map(|number| number.parse::<libc::pid_t>().ok()));
            }
            // The thread has exited, and the kernel has moved its children to another thread. A
            // kernel that does not list children returns the same error, ENOENT, so check whether
            // the thread's directory still exists.
            Err(_) if !directory.exists() => {}
            Err(_) => return None,
        }
    }
    Some(children)
}
