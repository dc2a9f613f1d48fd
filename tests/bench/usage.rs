//! Reads the resource usage of processes from the kernel's accounting, and counts their system
//! calls with `strace`.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::peers::check_installed;

/// Returns a process and all its descendants. Ignores descendants that exit in the meantime.
pub fn family(root: Pid) -> Vec<Pid> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        for thread in threads.into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(thread.path().join("children"));
            let children = children.unwrap_or_default();
            let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
            found.extend(pids.map(Pid::from_raw));
        }
        next += 1;
    }
    found
}

/// Returns the user and system time that all threads of these processes have used. Reads the CPU
/// clocks, which count nanoseconds, because `/proc/PID/stat` has ticks of 10 ms.
pub fn cpu_time(processes: &[Pid]) -> Duration {
    let time = |process: &Pid| {
        let clock = clock_getcpuclockid(*process).unwrap();
        Duration::from(clock_gettime(clock).unwrap())
    };
    processes.iter().map(time).sum()
}

/// Returns the voluntary context switches of these processes. Counts only the main thread of each
/// process. A process of this crate has no other thread, unlike a process of Node.
pub fn sleeps(processes: &[Pid]) -> u64 {
    processes
        .iter()
        .map(|process| status(*process, "voluntary_ctxt_switches:"))
        .sum()
}

/// Returns the number in a field of `/proc/PID/status`.
fn status(process: Pid, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mut values = status.lines().filter_map(|line| line.strip_prefix(field));
    let value = values.next().unwrap().trim();
    value.trim_end_matches(" kB").parse().unwrap()
}

/// Returns the voluntary and involuntary context switches of these processes.
pub fn switches(processes: &[Pid]) -> u64 {
    let others = |process: &Pid| status(*process, "nonvoluntary_ctxt_switches:");
    sleeps(processes) + processes.iter().map(others).sum::<u64>()
}

/// Returns the sum of a field over all mappings of a process, in KiB.
pub fn mapped(process: Pid, field: &str) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let mut values = rollup.lines().filter_map(|line| line.strip_prefix(field));
    let value = values.next().unwrap().trim();
    value.strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Delay between attaching the tracer and counting. Attaching interrupts the system call in which a
/// process waits, and the trace of the resumed call must not be counted.
const SETTLING: Duration = Duration::from_millis(200);

/// Counts, by name, the system calls that these processes start while `meanwhile` runs.
pub fn calls(processes: &[Pid], meanwhile: impl FnOnce()) -> Result<BTreeMap<String, u64>, String> {
    check_installed("strace", "-V")?;
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-s0", "-o"]).arg(file.path());
    command.args(processes.iter().map(|process| format!("-p{process}")));
    let mut strace = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(strace.stderr.take().unwrap()).lines();
    for _ in processes {
        let line = lines.next().unwrap().unwrap();
        if !line.ends_with(" attached") {
            let _ = strace.wait();
            return Err(line);
        }
    }
    std::thread::sleep(SETTLING);
    let before = std::fs::metadata(file.path()).unwrap().len();
    meanwhile();
    let pid = Pid::from_raw(i32::try_from(strace.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    lines.for_each(drop);
    strace.wait().unwrap();
    let trace = std::fs::read(file.path()).unwrap();
    let trace = String::from_utf8_lossy(&trace[usize::try_from(before).unwrap()..]);
    let mut calls = BTreeMap::new();
    for line in trace.lines() {
        // A new call has the form "PID accept4(3, …". A resumed call has the form "PID <... accept4
        // resumed>…".
        let name = line
            .split_once(' ')
            .and_then(|(_, call)| call.trim_start().split_once('('));
        let name = name.filter(|(name, _)| !name.contains(' '));
        if let Some((name, _)) = name {
            *calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(calls)
}

/// Raises the descriptor limit of this process and of the processes that it starts afterwards.
pub fn allow_many_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
