//! Tests of the host, which is the application whose process the master runs in.
//!
//! The crate must not affect the host's own children, signal handlers and descriptors.

mod children;
mod descriptors;
mod forked_children;
mod process_1;
mod signals;

use std::fs::File;
use std::io::BufReader;
use std::process::{Child, ChildStdout, Command};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cluster::Master;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as Number, sigaction};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid};

use crate::harness::{SIGNALS, Scenario};
use crate::refused::refuse_calls;

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    children::SCENARIOS,
    descriptors::SCENARIOS,
    forked_children::SCENARIOS,
    process_1::SCENARIOS,
    signals::SCENARIOS,
];

/// Makes the system calls that return process descriptors fail, to simulate an old kernel.
pub fn without_process_descriptors() {
    let calls = [libc::SYS_clone3, libc::SYS_pidfd_open];
    refuse_calls(&calls, libc::ENOSYS);
    SIGNALS.store(true, Ordering::SeqCst);
}

/// Starts a child of the host that exits with `code`.
fn child(code: i32) -> Child {
    let exit = format!("exit {code}");
    Command::new("sh").args(["-c", &exit]).spawn().unwrap()
}

/// Exits with the code in the environment variable `CODE`.
fn exit_with_requested_code() -> ! {
    std::process::exit(std::env::var("CODE").unwrap().parse().unwrap())
}

fn fork_to_end_with(master: &Master, code: i32) {
    master.fork_with([("CODE", code.to_string())]).unwrap();
}

fn panic_on_errors(master: &Master) {
    master.on_error(|_, _, error| panic!("{error}"));
}

/// Number of calls of the host's handlers, indexed by signal number.
static RUNS: [AtomicU32; 32] = [const { AtomicU32::new(0) }; 32];
/// Whether SIGUSR2 was unblocked during the last call of SIGUSR1's handler.
static INTERRUPTIBLE: AtomicBool = AtomicBool::new(false);

extern "C" fn count(number: libc::c_int) {
    RUNS[usize::try_from(number).unwrap_or(0)].fetch_add(1, Ordering::SeqCst);
    if let (Number::SIGUSR1, Ok(mask)) = (
        Number::try_from(number).unwrap_or(Number::SIGHUP),
        SigSet::thread_get_mask(),
    ) {
        INTERRUPTIBLE.store(!mask.contains(Number::SIGUSR2), Ordering::SeqCst);
    }
}

fn runs(number: Number) -> u32 {
    RUNS[number as usize].load(Ordering::SeqCst)
}

fn mask(numbers: &[Number]) -> SigSet {
    numbers.iter().copied().collect()
}

fn handle(number: Number, handler: SigHandler, flags: SaFlags, mask: SigSet) {
    let action = SigAction::new(handler, flags, mask);
    #[allow(unsafe_code)]
    // SAFETY: each handler is SIG_IGN, SIG_DFL or a function that makes only async-signal-safe
    // calls.
    unsafe { sigaction(number, &action) }.unwrap();
}

/// Returns a signal's disposition: the handler's address, the flags, and the signals in the mask.
fn disposition(number: Number) -> (usize, i32, Vec<i32>) {
    #[allow(unsafe_code)]
    // SAFETY: `sigaction` is a C struct for which all zeroes are a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    #[allow(unsafe_code)]
    // SAFETY: a null pointer installs no action, and `action` is valid for writes of one
    // `sigaction`.
    let read = unsafe { libc::sigaction(number as i32, std::ptr::null(), &raw mut action) };
    assert_eq!(read, 0);
    #[allow(unsafe_code)]
    // SAFETY: the kernel has initialized the set, which is valid for reads.
    let is_in =
        |number: &i32| unsafe { libc::sigismember(&raw const action.sa_mask, *number) } == 1;
    let mask = (1..=64).filter(is_in).collect();
    (action.sa_sigaction, action.sa_flags, mask)
}

fn run_to_completion(worker: &cluster::Worker) {
    worker.run().unwrap();
}

/// Environment variable that is set only for process 1 of a new PID namespace.
const PROCESS_1: &str = "FIRST";

/// Starts this scenario again as process 1 of a new PID namespace, with `how` as the value of
/// [`PROCESS_1`].
pub fn start_as_process_1(how: &str) -> Child {
    use nix::sched::{CloneFlags, setns, unshare};

    let namespace = File::open("/proc/self/ns/pid").unwrap();
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    let first = Command::new(std::env::current_exe().unwrap())
        .env(PROCESS_1, how)
        .stdout(std::process::Stdio::piped())
        .spawn();
    setns(namespace, CloneFlags::CLONE_NEWPID).unwrap();
    first.unwrap()
}

pub fn is_process_1() -> bool {
    std::env::var_os(PROCESS_1).is_some()
}

pub fn end_child(pid: Pid) {
    nix::sys::signal::kill(pid, Number::SIGKILL).unwrap();
    waitpid(pid, None).unwrap();
}

/// Returns the output of the process and its workers, which share a pipe.
pub fn output_of(process: &mut Child) -> BufReader<ChildStdout> {
    BufReader::new(process.stdout.take().unwrap())
}

pub fn fork_of_the_host() -> ForkResult {
    #[allow(unsafe_code)]
    // SAFETY: after `fork`, the child makes only async-signal-safe calls, or its parent had one
    // thread and so no lock is held.
    unsafe { nix::unistd::fork() }.unwrap()
}
