//! Runs several processes of any program that takes its listeners from `LISTEN_FDS`. Replaces
//! processes that exit. A reload starts a new version of the program without losing a client.
//!
//! Usage:     cargo run --release --example serve -- --listen 127.0.0.1:8000 -- gunicorn app
//! reload:    kill -HUP, scale: kill -TTIN and -TTOU, stop: Ctrl-C
//! and read:  cargo run --release --example serve -- --help

use std::cell::RefCell;
use std::error::Error;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolOptions, Readiness, SignalAction, Status};
use cluster::{LogWriter, Master, Role, SchedulingPolicy, Settings, Signal, systemd};
use lexopt::prelude::*;

const USAGE: &str = "\
Usage: serve [OPTIONS] [--] PROGRAM [ARGS...]

Runs several processes of a program that takes its listeners from LISTEN_FDS.

  --listen ADDRESS    HOST:PORT, or a path with a slash for a Unix socket; may be repeated;
                      not needed if serve itself was passed listeners, which come first
  --workers NUMBER    number of processes [default: the number of cores]
  --readiness TIME    a process is ready when it has run for this time [default: 1s]
  --drain TIME        a process that has not exited this long after SIGTERM is killed [default: 30s]
  --max-age TIME      a process that has run for this time is replaced [default: never]
  --max-memory SIZE   a process with more private memory is replaced [default: no limit]

A TIME is 500ms, 10s, 5m or 2h; a SIZE is 4096, 512K, 100M or 2G. A process is stopped by SIGTERM. When
it has exited, the processes that it has started, such as a server behind a shell, get SIGTERM, too.

HUP replaces all processes, one after the other; each one ends when its replacement is ready. TTIN and
TTOU add and remove a process. TERM and INT stop; a second one, at least a second later, stops at once.
QUIT stops at once.
The exit code is 0 after a stop, 1 after failures and 2 if the options are invalid.
";

const MILLISECONDS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
const BYTES: &[(&str, u64)] = &[("", 1), ("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)];

#[derive(Default)]
struct Options {
    listen: Vec<String>,
    pool: PoolOptions,
    program: OsString,
    args: Vec<OsString>,
}

fn options() -> Result<Options, lexopt::Error> {
    let mut options = Options::default();
    let mut pool = PoolOptions::default()
        .disconnect_signal(Some(Signal::TERM))
        // A process is ready when it has run for this time. `serve` has no other way to learn
        // whether a program is ready.
        .readiness(Readiness::Alive(Duration::from_secs(1)))
        // Send SIGTERM to the old process as soon as its replacement is ready.
        .min_ready_time(Duration::ZERO);
    let mut args = lexopt::Parser::from_env();
    let time = |args: &mut lexopt::Parser| amount(args, MILLISECONDS).map(Duration::from_millis);
    while let Some(arg) = args.next()? {
        match arg {
            Long("listen") => options.listen.push(args.value()?.string()?),
            Long("workers") => pool = pool.workers(args.value()?.parse::<NonZeroUsize>()?.get()),
            Long("readiness") => pool = pool.readiness(Readiness::Alive(time(&mut args)?)),
            Long("drain") => pool = pool.drain_timeout(time(&mut args)?),
            Long("max-age") => pool = pool.max_age(Some(time(&mut args)?)),
            Long("max-memory") => pool = pool.max_memory(Some(amount(&mut args, BYTES)?)),
            Short('h') | Long("help") => {
                LogWriter::stdout().line(USAGE.trim_end());
                std::process::exit(0);
            }
            Value(program) => {
                options.program = program;
                options.args = args.raw_args()?.collect();
                options.pool = pool;
                return Ok(options);
            }
            Short(_) | Long(_) => return Err(arg.unexpected()),
        }
    }
    Err("no program".into())
}

fn amount(args: &mut lexopt::Parser, units: &[(&str, u64)]) -> Result<u64, lexopt::Error> {
    args.value()?.parse_with(|text| {
        let mut amounts = units.iter().filter_map(|(unit, factor)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            number.checked_mul(*factor)
        });
        amounts.next().ok_or("expected a number with its unit")
    })
}

/// Finds the program in `PATH`, because `execve` does not search `PATH`.
fn find(program: &Path) -> Option<PathBuf> {
    let has_slash = program.as_os_str().as_encoded_bytes().contains(&b'/');
    let path = std::env::var_os("PATH").filter(|_| !has_slash);
    let is_program = |path: &PathBuf| {
        let data = path.metadata();
        data.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let path = path.unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
    candidates.find(is_program)
}

/// Prints a line for each event, and on a terminal a status line below them.
struct Screen {
    output: LogWriter,
    began: Instant,
    is_terminal: bool,
    status: RefCell<String>,
}

impl Screen {
    fn log(&self, text: impl Display) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.print(&format!("{seconds:9.3} {text}\n"));
    }

    fn show(&self, status: String) {
        if self.is_terminal && *self.status.borrow() != status {
            self.status.replace(status);
            self.print("");
        }
    }

    /// Prints the line, and on a terminal the status below it. Leaves the cursor at the start of
    /// the status, so that output of the programs overwrites the status.
    fn print(&self, line: &str) {
        let text = match self.is_terminal {
            true => format!("\r\x1b[K{line}{}\r", self.status.borrow()),
            false => line.to_owned(),
        };
        let mut output = &self.output;
        let _ = output.write_all(text.as_bytes());
        // Flush, because the status does not end with a line feed.
        let _ = output.flush();
    }
}

fn describe(status: &Status) -> String {
    let restarts: u64 = status.slots.iter().map(|slot| slot.restarts).sum();
    let seconds = status.age.as_secs();
    let up = match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{seconds}s"),
        (0, minutes) => format!("{minutes}m"),
        (hours, minutes) => format!("{hours}h{minutes:02}m"),
    };
    let (ready, slots, generation) = (
        status.ready_workers(),
        status.slots.len(),
        status.generation,
    );
    format!("{ready} of {slots} ready  gen {generation}  restarts {restarts}  up {up}")
}

fn serve() -> Result<(), Box<dyn Error>> {
    let passed = systemd::listen_fds()?;
    let options = options()?;
    if passed.is_empty() && options.listen.is_empty() {
        return Err(lexopt::Error::from("nothing to listen on").into());
    }
    let program = Path::new(&options.program);
    let found = find(program).ok_or_else(|| format!("cannot execute {}", program.display()))?;
    let Role::Master(master) = cluster::init()? else {
        return Err("this process is a worker of another master".into());
    };
    let screen = Rc::new(Screen {
        output: LogWriter::stderr().attached_to(&master),
        began: Instant::now(),
        is_terminal: io::stderr().is_terminal(),
        status: RefCell::default(),
    });

    let selected = std::env::var_os("CLUSTER_SCHED_POLICY");
    if let Some(policy) = selected.filter(|policy| policy != "none") {
        let policy = policy.to_string_lossy();
        screen.log(format_args!(
            "CLUSTER_SCHED_POLICY={policy} has no effect: programs accept themselves"
        ));
    }
    // With this policy the listeners block, as programs expect, and the master does not accept.
    master.set_scheduling_policy(SchedulingPolicy::Shared)?;
    let mut fds: Vec<(String, OwnedFd)> = Vec::new();
    for fd in passed {
        fds.push((fd.name().unwrap_or("passed").to_owned(), fd.into()));
    }
    // Keep these listeners open, so that clients wait in the backlogs while no process runs.
    let mut retained = Vec::new();
    for address in &options.listen {
        let listener = match address.contains('/') {
            true => master.listen(Path::new(address))?,
            false => master.listen(address.as_str())?,
        };
        screen.log(format_args!("listening on {}", listener.address()));
        fds.push(("listen".to_owned(), listener.as_fd().try_clone_to_owned()?));
        retained.push(listener);
    }
    let settings = Settings::default().exec(found).args(options.args);
    master.setup_master(settings.listen_fds(fds));

    let pool = Pool::new(&master, options.pool);
    let shown = Rc::clone(&screen);
    pool.on_event(move |pool, master, event| {
        shown.log(event);
        shown.show(describe(&pool.status(master)));
    });
    // No signal upgrades `serve` itself. Its new master could not take over, because `serve` does
    // not call `Pool::adopt`.
    for (signal, action) in [
        (Signal::HUP, SignalAction::Reload),
        (Signal::TTIN, SignalAction::Grow),
        (Signal::TTOU, SignalAction::Shrink),
        (Signal::TERM, SignalAction::Stop),
        (Signal::INT, SignalAction::Stop),
        (Signal::QUIT, SignalAction::StopAtOnce),
    ] {
        // Leave these signals ignored, as `Pool::on_default_signals` does. Under nohup(1), SIGHUP
        // is ignored, because it means only that the terminal has closed. A shell can ignore
        // SIGTTIN and SIGTTOU, because the kernel sends them to a background job that uses its
        // terminal.
        let may_stay_ignored = [Signal::HUP, Signal::TTIN, Signal::TTOU].contains(&signal);
        if !may_stay_ignored || !master.is_signal_ignored(signal) {
            pool.on_signal(&master, signal, action)?;
        }
    }
    pool.notify_systemd(&master)?;
    if screen.is_terminal {
        let shown = Rc::clone(&screen);
        let show = move |master: &Master| shown.show(describe(&pool.status(master)));
        master.unreference(master.set_interval(Duration::from_secs(1), show));
    }
    let outcome = master.run();
    screen.show(String::new());
    Ok(outcome?)
}

fn main() -> ExitCode {
    let Err(error) = serve() else {
        return ExitCode::SUCCESS;
    };
    let log = LogWriter::stderr();
    log.line(format_args!("serve: {error}"));
    if !error.is::<lexopt::Error>() {
        return ExitCode::FAILURE;
    }
    log.line(format_args!("\n{}", USAGE.trim_end()));
    ExitCode::from(2)
}
