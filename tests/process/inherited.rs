//! Tests masters whose signals were ignored or blocked when they were started, and masters whose
//! terminal sends signals.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, SLOT, ignore_pool_signals};
use cluster::{Master, Role, Settings, Signal, Worker};
use libtest_mimic::{Failed, Trial};
use nix::libc;
use nix::pty::openpty;
use nix::sys::signal::{SigHandler, SigSet, Signal as Number, kill, raise, signal};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use nix::unistd::{getpid, setsid, ttyname};

use crate::harness::{
    Group, Log, SIGNALS, cluster, cluster_serve, example, note_messages, wait_until,
};
use crate::host::without_process_descriptors;

crate::scenarios! {
    workers_ignore_signals_that_were_ignored_at_the_start
    signals_blocked_at_the_start_are_received
    exits_are_noticed_though_sigchld_was_blocked_on_old_kernels
    worker_receives_a_signal_that_it_had_blocked
    terminal_signals_of_the_kernel_do_not_scale_the_pool
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("pool_under_nohup_does_not_reload_at_a_hang_up", || {
            let mut pool = example("pool");
            pool.arg("127.0.0.1:0");
            survives_a_hang_up(&pool, cluster::available_parallelism())
        }),
        Trial::test("serve_under_nohup_does_not_reload_at_a_hang_up", || {
            let mut serve = cluster_serve();
            serve.args(["--listen", "127.0.0.1:0", "--workers", "1"]);
            serve.args(["--readiness", "50ms", "sleep", "1000"]);
            survives_a_hang_up(&serve, 1)
        }),
        Trial::test(
            "serve_leaves_ignored_signals_ignored",
            serve_leaves_signals_ignored,
        ),
    ]
}

/// Environment variable with the part that a process plays in its scenario.
const PART: &str = "PART";

/// Returns a command that runs this scenario in another process, which plays `part`.
fn again(part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(PART, part);
    command
}

fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Plays a part in another process, and asserts its success.
fn play(part: &str) {
    let status = again(part).status().unwrap();
    assert!(status.success(), "{status}");
}

/// Plays a part in a process that ignores the signals [`IGNORED`] and SIGCHLD from the start, and
/// asserts its success.
fn play_with_ignored_signals(part: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP INT USR1 TSTP TTOU CHLD; exec \"$0\""]);
    command.arg(std::env::current_exe().unwrap());
    let status = command.env(PART, part).status().unwrap();
    assert!(status.success(), "{status}");
}

fn ignore(number: Number) {
    #[allow(unsafe_code)]
    // SAFETY: SIG_IGN installs no handler, so no code runs in a signal context.
    unsafe { signal(number, SigHandler::SigIgn) }.unwrap();
}

/// Returns the standard signals in a set, such as `SigIgn:`, of a `/proc/PID/status`.
pub fn signals(status: &str, set: &str) -> Vec<Number> {
    let value = status.lines().find_map(|line| line.strip_prefix(set));
    let bits = u64::from_str_radix(value.unwrap().trim(), 16).unwrap();
    let is_in = |number: &Number| bits & 1 << (*number as u32 - 1) != 0;
    Number::iterator().filter(is_in).collect()
}

/// The signals, besides SIGCHLD, that [`play_with_ignored_signals`] ignores.
const IGNORED: [Number; 5] = [
    Number::SIGHUP,
    Number::SIGINT,
    Number::SIGUSR1,
    Number::SIGTSTP,
    Number::SIGTTOU,
];

fn workers_ignore_signals_that_were_ignored_at_the_start() {
    match part().as_deref() {
        None => {
            play_with_ignored_signals("program");
            play_with_ignored_signals("main");
        }
        Some("program") => program_ignores_signals(),
        Some(_) => closure_ignores_signals(),
    }
}

fn program_ignores_signals() {
    SIGNALS.store(true, Ordering::SeqCst);
    let file = tempfile::NamedTempFile::new().unwrap();
    // Not a shell: BusyBox's ignores SIGQUIT, and its version 1.30 resets SIGHUP.
    let copy = Settings::default()
        .exec("/bin/cp")
        .args([Path::new("/proc/self/status"), file.path()]);
    cluster(
        |master| {
            // The application ignores this signal itself, after the start. The worker must not
            // inherit that.
            ignore(Number::SIGUSR2);
            for number in IGNORED {
                assert!(master.is_signal_ignored(Signal::try_from(number as i32).unwrap()));
            }
            assert!(!master.is_signal_ignored(Signal::USR2));
            master.on_signal(Signal::HUP, |_, _| {}).unwrap();
            master.setup_master(copy);
            master.fork().unwrap();
        },
        |_| unreachable!("the worker is cp"),
    );
    let status = std::fs::read_to_string(file.path()).unwrap();
    assert_eq!(signals(&status, "SigIgn:"), IGNORED);
    assert!(signals(&status, "SigBlk:").is_empty());
}

fn closure_ignores_signals() {
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_signal(Signal::HUP, |_, _| {}).unwrap();
            master.setup_master(Settings::default().main(|worker| {
                let status = std::fs::read_to_string("/proc/self/status").unwrap();
                let mut expected = IGNORED.to_vec();
                expected.push(Number::SIGPIPE);
                expected.sort();
                assert_eq!(signals(&status, "SigIgn:"), expected);
                let _ = worker.send(b"ignores them").unwrap();
                worker.disconnect().run().unwrap();
                0
            }));
            note_messages(master, &log);
            master.fork().unwrap();
        },
        |_| unreachable!("the worker runs a closure"),
    );
    assert_eq!(entries.take(), ["1 ignores them"]);
}

fn signals_blocked_at_the_start_are_received() {
    let numbers = [Number::SIGTERM, Number::SIGHUP, Number::SIGUSR2];
    if part().is_none() {
        let blocked: SigSet = numbers.into_iter().collect();
        blocked.thread_block().unwrap();
        return play("master");
    }
    let Role::Master(master) = cluster::init().unwrap() else {
        unreachable!("no worker is forked");
    };
    let before = SigSet::thread_get_mask().unwrap();
    for number in numbers {
        assert!(before.contains(number));
        let signal = Signal::try_from(number as i32).unwrap();
        // Without the timer, the loop would have no work and end at once.
        let timer = master.set_timeout(Duration::MAX, |_| {});
        let end = move |master: &Master, _| master.clear_timer(timer);
        master.on_signal(signal, end).unwrap();
        kill(getpid(), number).unwrap();
        master.run().unwrap();
    }
    drop(master);
    assert_eq!(SigSet::thread_get_mask().unwrap(), before);
}

fn exits_are_noticed_though_sigchld_was_blocked_on_old_kernels() {
    SigSet::from(Number::SIGCHLD).thread_block().unwrap();
    without_process_descriptors();
    cluster(
        |master| {
            master.fork().unwrap();
        },
        |worker| worker.disconnect().run().unwrap(),
    );
}

fn worker_receives_a_signal_that_it_had_blocked() {
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            SigSet::from(Number::SIGUSR1).thread_block().unwrap();
            let timer = worker.set_timeout(Duration::MAX, |_| {});
            let end = move |worker: &Worker, _| {
                worker.clear_timer(timer);
                worker.disconnect();
            };
            worker.on_signal(Signal::USR1, end).unwrap();
            raise(Number::SIGUSR1).unwrap();
            worker.run().unwrap();
        },
    );
}

/// Starts a pool of `workers` workers with SIGHUP ignored, as nohup(1) does, and sends SIGHUP to
/// all its processes. Asserts that the pool does not reload and that no worker is killed.
fn survives_a_hang_up(server: &Command, workers: usize) -> Result<(), Failed> {
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
    command.arg(server.get_program()).args(server.get_args());
    let pool = Group::start(&mut command)?;
    let ready = |count: usize| {
        wait_until("ready workers", || {
            (pool.output().matches("is ready").count() >= count).then_some(())
        });
    };
    ready(workers);
    let group = nix::unistd::Pid::from_raw(-pool.pid().as_raw());
    kill(group, Number::SIGHUP)?;
    // SIGTTIN starts one more worker. Pending signals are delivered in the order of their numbers.
    // If the pool did not ignore SIGHUP, it would therefore reload before it starts this worker.
    kill(pool.pid(), Number::SIGTTIN)?;
    ready(workers + 1);
    kill(pool.pid(), Number::SIGTERM)?;
    let status = pool.finish()?;
    assert!(status.success(), "{status}");
    let output = pool.output();
    for text in ["generation 1", "signal: 1"] {
        assert!(!output.contains(text), "{text}:\n{output}");
    }
    Ok(())
}

fn serve_leaves_signals_ignored() -> Result<(), Failed> {
    let serve = cluster_serve();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP TTIN TTOU; exec \"$@\"", "sh"]);
    command.arg(serve.get_program());
    command.args(["--listen", "127.0.0.1:0", "--workers", "1"]);
    command.args(["--readiness", "50ms", "sleep", "1000"]);
    let serve = Group::start(&mut command)?;
    wait_until("a ready worker", || {
        serve.output().contains("is ready").then_some(())
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", serve.pid()))?;
    let ignored = signals(&status, "SigIgn:");
    for number in [Number::SIGHUP, Number::SIGTTIN, Number::SIGTTOU] {
        assert!(ignored.contains(&number), "{number}: {ignored:?}");
    }
    kill(serve.pid(), Number::SIGTERM)?;
    assert!(serve.finish()?.success());
    Ok(())
}

fn terminal_signals_of_the_kernel_do_not_scale_the_pool() {
    match part().as_deref() {
        None => {
            let terminal = openpty(None, None).unwrap();
            let spawn = |slave: OwnedFd| again("leader").stderr(Stdio::from(slave)).spawn();
            let mut leader = spawn(terminal.slave).unwrap();
            let mut output = Vec::new();
            // The read ends with an error once all processes of the session have exited.
            let _ = File::from(terminal.master).read_to_end(&mut output);
            let status = leader.wait().unwrap();
            let output = String::from_utf8_lossy(&output);
            assert!(status.success(), "{status}: {output}");
        }
        // Lead a session. With `TOSTOP`, its terminal sends signals not only to background jobs
        // that read, but also to those that write.
        Some("leader") => {
            setsid().unwrap();
            let terminal = File::open(ttyname(std::io::stderr()).unwrap()).unwrap();
            let mut settings = tcgetattr(&terminal).unwrap();
            settings.local_flags.insert(LocalFlags::TOSTOP);
            tcsetattr(&terminal, SetArg::TCSANOW, &settings).unwrap();
            let status = again("job").process_group(0).status().unwrap();
            assert!(status.success(), "{status}");
        }
        Some(_) => match cluster::init().unwrap() {
            Role::Master(master) => be_a_background_job(&master),
            Role::Worker(worker) => {
                ignore_pool_signals(&worker).unwrap();
                if std::env::var(SLOT).unwrap() == "0" {
                    read_in_the_background();
                }
                for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                    drop(connection);
                }
            }
        },
    }
}

/// Reads from the terminal, and thereby makes the kernel send SIGTTIN to all processes of the job.
/// At the signal, the crate's handler makes this process ignore it. The kernel then repeats the
/// read, which fails.
fn read_in_the_background() {
    let mut terminal = File::open("/dev/tty").unwrap();
    let error = terminal.read(&mut [0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

fn be_a_background_job(master: &Master) {
    let pool = Pool::new(master, PoolOptions::default().workers(1));
    pool.on_default_signals(master).unwrap();
    let mut ready = 0;
    pool.on_event(move |pool, master, event| {
        if !event.to_string().contains("is ready") {
            return;
        }
        ready += 1;
        match ready {
            // The first worker has read from the terminal. Start the second worker only now: it
            // does not ignore SIGTTIN at first, so the kernel might have stopped it.
            1 => after_pending_signals(pool, master, 1, |pool, master| pool.scale(master, 2)),
            // Write to the terminal. The kernel sends SIGTTOU to all processes of the job.
            2 => {
                std::io::stderr()
                    .write_all(b"from the background\n")
                    .unwrap();
                after_pending_signals(pool, master, 2, |_, _| {
                    // SIGTTIN from a process, as an operator sends it, must still add a worker.
                    kill(getpid(), Number::SIGTTIN).unwrap();
                });
            }
            _ => pool.stop(master),
        }
    });
    master.run().unwrap();
    assert_eq!(pool.slots(), 3);
}

/// Lets the loop handle the signals that are pending now, asserts that the pool still has `slots`
/// slots, and calls `next`.
fn after_pending_signals(
    pool: &Pool,
    master: &Master,
    slots: usize,
    next: impl FnOnce(&Pool, &Master) + 'static,
) {
    let pool = pool.clone();
    master.set_timeout(Duration::from_millis(1), move |master| {
        let pool = pool.clone();
        // An iteration of the loop handles signals before it calls timers. The second timer belongs
        // to a later iteration, so all signals that were pending are handled before it.
        master.set_timeout(Duration::from_millis(1), move |master| {
            assert_eq!(pool.slots(), slots);
            next(&pool, master);
        });
    });
}
