//! Reads about other processes from `/proc` (proc(5)).

use std::path::Path;

/// Returns the process ids of the children of all threads. Returns `None` if `/proc` is not
/// mounted, belongs to another PID namespace, or does not list children (`CONFIG_PROC_CHILDREN`,
/// see proc_tid_children(5)).
///
/// The list may lack a child if another child is reaped, or a thread exits, at the same time.
pub(in crate::sys) fn children() -> Option<Vec<libc::pid_t>> {
    if !is_of_this_namespace() {
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

/// Returns whether a process group has a member that has not exited, besides its leader. Returns
/// `None` if `/proc` is not mounted or belongs to another PID namespace.
///
/// The call reads one file for each process of the system. Members that `/proc` hides from this
/// process (`hidepid` in proc(5)) are not found.
pub(in crate::sys) fn has_group_members(leader: libc::pid_t) -> Option<bool> {
    if !is_of_this_namespace() {
        return None;
    }
    let is_member = |directory: &Path| {
        let name = directory.file_name()?.to_str()?;
        let number: libc::pid_t = name.parse().ok()?;
        if number == leader {
            return None;
        }
        let stat = std::fs::read_to_string(directory.join("stat")).ok()?;
        is_running_member(&stat, leader)
    };
    let mut entries = std::fs::read_dir("/proc").ok()?.flatten();
    Some(entries.any(|entry| is_member(&entry.path()) == Some(true)))
}

/// Returns whether the process with this line in `/proc/PID/stat` belongs to the group of `leader`
/// and has not exited. Returns `None` if the line is not valid.
fn is_running_member(stat: &str, leader: libc::pid_t) -> Option<bool> {
    // The second field is the name of the program in parentheses, which may contain any character.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let (state, group, threads) = (fields.next()?, fields.nth(1)?, fields.nth(14)?);
    // If only the first thread has exited, the state is `Z`, but other threads are left.
    let has_exited = matches!(state, "Z" | "X") && threads.parse::<u32>().ok()? <= 1;
    Some(group.parse() == Ok(leader) && !has_exited)
}

/// Returns whether `/proc` is mounted, and shows the process ids of this process's namespace.
fn is_of_this_namespace() -> bool {
    let own = std::fs::read_link("/proc/self");
    own.is_ok_and(|own| own.as_os_str() == std::process::id().to_string().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_is_running_until_all_its_threads_have_exited() {
        let stat = |state, group, threads| {
            format!(
                "42 (a) b (c)) {state} 1 {group} 7 0 -1 4194304 9 0 0 0 1 2 0 0 20 0 {threads} 0 \
                 5 0 0\n"
            )
        };
        for (state, group, threads, is_member) in [
            ("S", 7, 1, true),
            ("R", 7, 3, true),
            ("S", 8, 1, false),
            ("Z", 7, 1, false),
            ("Z", 7, 2, true),
            ("X", 7, 0, false),
        ] {
            let stat = stat(state, group, threads);
            assert_eq!(is_running_member(&stat, 7), Some(is_member), "{stat}");
        }
        assert_eq!(is_running_member("", 7), None);
        assert_eq!(is_running_member("42 (x) S 1", 7), None);
    }

    #[test]
    fn own_line_is_read() {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        // SAFETY: getpgrp accesses no memory of this process.
        let group = unsafe { libc::getpgrp() };
        assert_eq!(is_running_member(&stat, group), Some(true));
    }
}
