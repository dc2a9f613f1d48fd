//! What processes have used, as the kernel accounts for it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::peers::has;

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

/// How often these processes have gone to sleep by themselves: each one's first thread, and the
/// processes of this crate have one.
pub fn sleeps(processes: &[Pid]) -> u64 {
    processes
        .iter()
        .map(|process| status(*process, "voluntary_ctxt_switches:"))
        .sum()
}

/// A number in a process's status.
fn status(process: Pid, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let mut values = status.lines().filter_map(|line| line.strip_prefix(field));
    let value = values.next().unwrap().trim();
    value.trim_end_matches(" kB").parse().unwrap()
}

/// How often these processes have been woken, or others had their turn.
pub fn switches(processes: &[Pid]) -> u64 {
    let others = |process: &Pid| status(*process, "nonvoluntary_ctxt_switches:");
    sleeps(processes) + processes.iter().map(others).sum::<u64>()
}

/// A sum over all that a process has mapped, in KiB.
pub fn mapped(process: Pid, field: &str) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let mut values = rollup.lines().filter_map(|line| line.strip_prefix(field));
    let value = values.next().unwrap().trim();
    value.strip_suffix(" kB").unwrap().parse().unwrap()
}

/// How long it takes until a process that somebody traces has gone back to what it was waiting for.
const SETTLING: Duration = Duration::from_millis(200);

/// The system calls that these processes begin meanwhile, by name.
pub fn calls(processes: &[Pid], meanwhile: impl FnOnce()) -> Result<BTreeMap<String, u64>, String> {
    has("strace", "-V")?;
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
        // "PID accept4(3, …"; what goes on has other signs in this place.
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

/// For this process and those that it starts from now on.
pub fn allow_many_descriptors() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}
