//! Reads about other processes from `/proc` (proc(5)).

use std::fs::DirEntry;
use std::io;
use std::path::Path;

use crate::sys::process::{GroupSearch, Pid};

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
    for thread in numbers_in("/proc/self/task").ok()? {
        let directory = format!("/proc/self/task/{}", thread.ok()?);
        match std::fs::read_to_string(format!("{directory}/children")) {
            Ok(numbers) => {
                let numbers = numbers.split_ascii_whitespace();
                children.extend(numbers.filter_map(|number| number.parse::<libc::pid_t>().ok()));
            }
            // The thread has exited, and the kernel has moved its children to another thread. A
            // kernel that does not list children returns the same error, ENOENT, so check whether
            // the thread's directory still exists.
            Err(_) if !Path::new(&directory).exists() => {}
            Err(_) => return None,
        }
    }
    Some(children)
}

/// Returns the numbers that name entries of a directory, for example the ids of the processes in
/// `/proc`.
pub(in crate::sys) fn numbers_in(
    directory: &str,
) -> io::Result<impl Iterator<Item = io::Result<libc::pid_t>>> {
    let number = |entry: io::Result<DirEntry>| match entry {
        Ok(entry) => entry.file_name().to_str()?.parse().ok().map(Ok),
        Err(error) => Some(Err(error)),
    };
    Ok(std::fs::read_dir(directory)?.filter_map(number))
}

/// Searches for a process of a process group that has not exited, besides the group's leader.
///
/// Without a match, the call makes one system call for each process of the system.
pub(in crate::sys) fn find_group_member(leader: libc::pid_t) -> GroupSearch {
    // Process 1 always exists, so if it is not visible, others may be hidden too (`hidepid`).
    if !is_of_this_namespace() || !Path::new("/proc/1").exists() {
        return GroupSearch::Impossible;
    }
    let Ok(processes) = numbers_in("/proc") else {
        return GroupSearch::Failed;
    };
    for process in processes {
        let Ok(process) = process else {
            return GroupSearch::Failed;
        };
        if process != leader && is_running_member(process, leader) {
            return GroupSearch::Found(Pid::from_raw(process));
        }
    }
    GroupSearch::Empty
}

/// Returns whether a process belongs to the group of `leader` and is not known to have exited.
pub(in crate::sys) fn is_running_member(process: libc::pid_t, leader: libc::pid_t) -> bool {
    // SAFETY: getpgid accesses no memory of this process.
    if unsafe { libc::getpgid(process) } != leader {
        return false;
    }
    match std::fs::read(format!("/proc/{process}/stat")) {
        Ok(stat) => !has_exited(&stat),
        Err(error) => {
            let gone = [libc::ENOENT, libc::ESRCH].map(Some);
            !gone.contains(&error.raw_os_error())
        }
    }
}

/// Returns whether the process with this line in `/proc/PID/stat` has exited.
fn has_exited(stat: &[u8]) -> bool {
    // The second field is the name of the program in parentheses. It may contain any byte, also a
    // part of a character.
    let end = stat.windows(2).rposition(|two| two == b") ");
    let fields = stat.get(end.unwrap_or(0)..).unwrap_or_default();
    let fields = String::from_utf8_lossy(fields);
    let mut fields = fields.split_ascii_whitespace().skip(1);
    let (state, threads) = (fields.next(), fields.nth(16));
    // If only the first thread has exited, the state is `Z`, but other threads are left.
    let is_last_thread = threads.is_some_and(|threads| matches!(threads, "0" | "1"));
    matches!(state, Some("Z" | "X")) && is_last_thread
}

/// Returns whether `/proc` is mounted, and shows the process ids of this process's namespace.
fn is_of_this_namespace() -> bool {
    let own = std::fs::read_link("/proc/self");
    own.is_ok_and(|own| own.as_os_str() == std::process::id().to_string().as_str())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn process_has_exited_when_its_last_thread_has_exited() {
        let stat = |state, threads| {
            let fields = format!("1 7 7 0 -1 4194304 9 0 0 0 1 2 0 0 20 0 {threads} 0 5 0 0\n");
            let name: &[u8] = b"42 (a) b (c\xc3) ";
            [name, format!("{state} {fields}").as_bytes()].concat()
        };
        for (state, threads, is_exited) in [
            ("S", 1, false),
            ("R", 3, false),
            ("Z", 1, true),
            ("Z", 2, false),
            ("X", 0, true),
        ] {
            let stat = stat(state, threads);
            assert_eq!(has_exited(&stat), is_exited, "{state} {threads}");
        }
        assert!(!has_exited(b""));
        assert!(!has_exited(b"42 (x) Z 1"));
    }

    #[test]
    fn group_is_empty_when_its_last_member_has_exited() {
        // The leader is a shell that exits, and stays a zombie until the end of the test.
        let mut leader = Command::new("sh");
        leader.args(["-c", "sleep 600 >/dev/null & echo $!"]);
        let leader = leader.process_group(0).stdout(Stdio::piped());
        let mut leader = leader.spawn().unwrap();
        let mut member = String::new();
        let output = leader.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut member).unwrap();
        let member = Pid::from_raw(member.trim().parse().unwrap());
        let group = Pid::from_raw(leader.id().try_into().unwrap());
        assert_eq!(group.find_group_member(None), GroupSearch::Found(member));
        assert_eq!(
            group.find_group_member(Some(member)),
            GroupSearch::Found(member)
        );
        member.signal(None, libc::SIGKILL).unwrap();
        // The member may run until the kernel has killed it.
        while group.find_group_member(Some(member)) != GroupSearch::Empty {
            std::thread::yield_now();
        }
        leader.wait().unwrap();
    }
}
