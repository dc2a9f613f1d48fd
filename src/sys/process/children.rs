//! Lists the children of this process that have exited.

use super::pid::{ChildState, Pid};
use crate::sys::{check, platform, retry};

/// Returns the children that have exited and have not been reaped, except those for which `is_own`
/// returns `true`. If the system does not list the children of a process, returns at most one.
pub(crate) fn exited_children(is_own: impl Fn(Pid) -> bool) -> Vec<Pid> {
    let Some(children) = platform::proc::children() else {
        let first = first_exited_child().filter(|child| !is_own(*child));
        return first.into_iter().collect();
    };
    let no_process: Option<&std::os::fd::OwnedFd> = None;
    let children = children.into_iter().map(Pid::from_raw);
    children
        .filter(|child| !is_own(*child) && child.child_state(no_process) == ChildState::Exited)
        .collect()
}

fn first_exited_child() -> Option<Pid> {
    // SAFETY: all zeroes is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    let waited = retry(|| {
        // SAFETY: the pointer is valid for writes.
        check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) })
    });
    waited.ok()?;
    // SAFETY: the call has filled in the structure for a child, or left it zero.
    let number = unsafe { info.si_pid() };
    (number != 0).then(|| Pid::from_raw(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exited_children_are_found_and_stay_waitable() {
        // Skip the test if the system does not list children, because the search then finds at most
        // one of the two.
        if platform::proc::children().is_none() {
            return;
        }
        let mut children: Vec<_> = ["exit 1", "exit 2"]
            .map(|exit| {
                std::process::Command::new("sh")
                    .args(["-c", exit])
                    .spawn()
                    .unwrap()
            })
            .into();
        let pids: Vec<_> = children
            .iter()
            .map(|child| Pid::from_raw(child.id().try_into().unwrap()))
            .collect();
        let is_other = |pid: Pid| !pids.contains(&pid);
        let mut found = Vec::new();
        while found.len() < 2 {
            found = exited_children(is_other);
        }
        found.sort_by_key(|pid| pid.number());
        assert_eq!(found, pids);
        for (child, code) in children.iter_mut().zip(1..) {
            assert_eq!(child.wait().unwrap().code(), Some(code));
        }
        assert_eq!(exited_children(is_other), []);
    }
}
