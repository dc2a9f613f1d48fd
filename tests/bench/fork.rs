//! Measures the time from `fork()` to `online`, compared with a plain fork and exec of the same
//! program.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

use cluster::{Role, Settings};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, dup2_stdout, execve, pipe};

use crate::ROUNDS;
use crate::harness::{Group, SCENARIO};
use crate::table::{Figure, Goal, Table};

/// The role of a master that forks.
pub const FORK: &str = "fork";
/// The role of a process that prints one byte.
pub const BYTE: &str = "byte";

/// Number of measured forks per round.
const TIMES: usize = 30;
/// Number of forks that precede the measured ones.
const WARM_UP: usize = 5;
/// Number of forks with exec for each fork without exec. With a smaller number, the benchmark would
/// take longer, because a fork without exec copies the page tables, and those of 1 GiB are large.
const COPY_EVERY: usize = 3;

pub fn measure(table: &mut Table) {
    let round = |_| [0, 1024].map(forks);
    let rounds: Vec<_> = (0..ROUNDS).map(round).collect();
    let figure = |value: &dyn Fn(&[[f64; 3]; 2]) -> f64| {
        Figure::from(rounds.iter().map(value).collect::<Vec<_>>())
    };
    let bare = figure(&|[little, _]| little[0]).in_unit("µs");
    let own = figure(&|[little, _]| little[1]).in_unit("µs");
    let large = figure(&|[_, large]| large[1]).in_unit("µs");
    let ratio = figure(&|[little, _]| little[1] / little[0]);
    table
        .row("fork to online", ratio, "× fork, exec, one byte")
        .goal(Goal::AtMost(1.3))
        .note(&format!("{own} vs. {bare}"));
    let ratio = figure(&|[little, large]| large[1] / little[1]);
    table
        .row("the same with 1 GiB resident", ratio, "× without")
        .goal(Goal::AtMost(2.0))
        .note(&large);
    let copy = figure(&|[little, _]| little[2]).in_unit("µs");
    let large = figure(&|[_, large]| large[2]).in_unit("µs");
    let ratio = figure(&|[little, _]| little[2] / little[0]);
    table
        .row("without exec", ratio, "× fork, exec, one byte")
        .goal(Goal::AtMost(0.5))
        .note(&format!("{copy}; with 1 GiB {large}"));
}

/// Returns three median times in microseconds, measured in a master with `mebibytes` MiB of
/// resident memory. The first is the time from a plain fork and exec to the program's first byte.
/// The second is the time from `fork()` to `online` for a worker with exec, and the third is the
/// same for a worker without exec.
fn forks(mebibytes: usize) -> [f64; 3] {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let command = command.env(SCENARIO, FORK).arg(mebibytes.to_string());
    let group = Group::start(command).unwrap();
    ["bare: ", "own: ", "copy: "].map(|prefix| group.line(prefix).parse().unwrap())
}

/// Runs the master that forks, and prints the three median times.
pub fn fork() {
    let Role::Master(master) = cluster::init().unwrap() else {
        return;
    };
    let mebibytes: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let resident = vec![1u8; mebibytes << 20];
    let online = Rc::new(Cell::new(None));
    let seen = Rc::clone(&online);
    master.on_online(move |_, _| seen.set(Some(Instant::now())));
    let fork = |settings: Settings| {
        master.setup_master(settings);
        let start = Instant::now();
        master.fork().unwrap();
        master.run().unwrap();
        (online.take().unwrap() - start).as_secs_f64() * 1e6
    };
    let (mut bare, mut own, mut copy) = (Vec::new(), Vec::new(), Vec::new());
    let program = std::env::current_exe().unwrap();
    for time in 0..WARM_UP + TIMES {
        let one_byte = fork_exec_byte();
        let executed = fork(Settings::default().exec(&program));
        if time >= WARM_UP {
            bare.push(one_byte);
            own.push(executed);
        }
        if time % COPY_EVERY == 0 {
            copy.push(fork(Settings::default().main(|_| 0)));
        }
    }
    drop(resident);
    println!("bare: {}", Figure::from(bare).median);
    println!("own: {}", Figure::from(own).median);
    println!("copy: {}", Figure::from(copy).median);
}

fn fork_exec_byte() -> f64 {
    let program = std::env::current_exe().unwrap();
    let program = CString::new(program.as_os_str().as_bytes()).unwrap();
    let env = CString::new(format!("{SCENARIO}={BYTE}")).unwrap();
    let start = Instant::now();
    let (read, write) = pipe().unwrap();
    #[allow(unsafe_code)]
    // SAFETY: this process has one thread, so no other thread holds a lock at the fork.
    let forked = unsafe { nix::unistd::fork() };
    let ForkResult::Parent { child } = forked.unwrap() else {
        dup2_stdout(write).unwrap();
        let _ = execve(&program, &[&program], &[&env as &CStr]);
        std::process::abort();
    };
    drop(write);
    File::from(read).read_exact(&mut [0]).unwrap();
    let passed = start.elapsed().as_secs_f64() * 1e6;
    waitpid(child, None).unwrap();
    passed
}
