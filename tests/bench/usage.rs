//! What processes have used, as the kernel accounts for it.

use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// A process and all that descend from it.
pub fn family(root: Pid) -> Vec<Pid> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        for thread in threads {
            let children = thread.unwrap().path().join("children");
            let children = std::fs::read_to_string(children).unwrap();
            let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
            found.extend(pids.map(Pid::from_raw));
        }
        next += 1;
    }
    found
}

/// User and system time of these processes so far, with all their threads: of their CPU clocks,
/// which the scheduler keeps in nanoseconds (`/proc/PID/stat` has ticks of 10 ms).
pub fn cpu_time(processes: &[Pid]) -> Duration {
    let time = |process: &Pid| {
        let clock = clock_getcpuclockid(*process).unwrap();
        Duration::from(clock_gettime(clock).unwrap())
    };
    processes.iter().map(time).sum()
}

/// How often these processes have gone to sleep by themselves.
pub fn sleeps(processes: &[Pid]) -> u64 {
    processes
        .iter()
        .map(|process| status(*process, "voluntary_ctxt_switches:"))
        .sum()
}

/// A number in a process's status.
pub fn status(process: Pid, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mut values = status.lines().filter_map(|line| line.strip_prefix(field));
    let value = values.next().unwrap().trim();
    value.trim_end_matches(" kB").parse().unwrap()
}
