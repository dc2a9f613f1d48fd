//! Runs any program that takes its listeners from `LISTEN_FDS` as a pool of processes.
//!
//! `cluster-serve --help` lists the options. `options` reads them, `accounts` finds users and
//! groups, `log` writes the log, and `pid_file` keeps the process id of the master in a file.

mod accounts;
mod log;
mod options;
mod pid_file;

use std::cell::Cell;
use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{FailureCause, Pool, PoolEvent, Status};
use cluster::systemd::{self, ListenFd};
use cluster::{LogWriter, Master, MasterListener, Role, SchedulingPolicy, Settings, Signal};

use crate::log::{Level, Log};
use crate::options::{Options, Request, USAGE};
use crate::pid_file::PidFile;

/// The exit code for options that are not valid.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    let options = match options::parse() {
        Ok(Request::Serve(options)) => options,
        Ok(Request::Help) => {
            LogWriter::stdout().line(USAGE.trim_end());
            return ExitCode::SUCCESS;
        }
        Ok(Request::Version) => {
            LogWriter::stdout().line(concat!("cluster-serve ", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        Err(error) => return usage_error(&error),
    };
    let passed = match systemd::listen_fds() {
        Ok(passed) if passed.is_empty() && options.listen.is_empty() => {
            return usage_error("nothing to listen on: give --listen");
        }
        passed => passed,
    };
    let log = match Log::open(options.log.as_deref(), options.log_format) {
        Ok(log) => Rc::new(log),
        Err(error) => {
            LogWriter::stderr().line(format_args!("cluster-serve: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = passed.map_err(Into::into);
    match outcome.and_then(|passed| serve(*options, passed, &log)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.failure(&*error);
            ExitCode::FAILURE
        }
    }
}

fn usage_error(error: &str) -> ExitCode {
    LogWriter::stderr().line(format_args!(
        "cluster-serve: {error}\nTry: cluster-serve --help"
    ));
    ExitCode::from(USAGE_ERROR)
}

/// Runs the pool until it stops.
fn serve(options: Options, passed: Vec<ListenFd>, log: &Rc<Log>) -> Result<(), Box<dyn Error>> {
    let Role::Master(master) = cluster::init()? else {
        return Err("this process is a worker of another master".into());
    };
    log.attach(&master);
    set_variables(&options.env);
    let settings = settings(&options)?;
    if let Some(policy) = env::var_os("CLUSTER_SCHED_POLICY").filter(|policy| policy != "none") {
        let policy = policy.to_string_lossy();
        log.line(
            Level::Warning,
            format_args!("CLUSTER_SCHED_POLICY={policy} has no effect: programs accept themselves"),
        );
    }
    // With this policy the listeners block, as programs expect, and the master does not accept.
    master.set_scheduling_policy(SchedulingPolicy::Shared)?;
    let pool = Pool::new(&master, options.pool);
    pool.adopt(&master, passed)?;
    // Keep these listeners open, so that clients wait in the backlogs while no process runs.
    let (listeners, fds) = listen(&master, &options.listen, log)?;
    master.setup_master(settings.listen_fds(fds));
    if let Some(address) = options.status {
        let address = pool.serve_status(&master, address)?;
        log.line(Level::Info, format_args!("serving the status on {address}"));
    }
    let pid_file = Rc::new(PidFile::new(options.pid_file)?);
    on_events(&pool, log, &pid_file);
    pool.on_default_signals(&master)?;
    let reopened = Rc::clone(log);
    master.on_signal(Signal::USR1, move |master, _| reopened.reopen(master))?;
    pool.notify_systemd(&master)?;
    if log.is_terminal() {
        let shown = Rc::clone(log);
        let show = move |master: &Master| shown.show(describe(&pool.status(master)));
        master.unreference(master.set_interval(Duration::from_secs(1), show));
    }
    let outcome = master.run();
    log.show(String::new());
    pid_file.remove();
    drop(listeners);
    Ok(outcome?)
}

/// Sets environment variables of this process, which its workers inherit.
fn set_variables(variables: &[(OsString, OsString)]) {
    for (name, value) in variables {
        #[allow(unsafe_code)]
        // SAFETY: this process has a single thread, so no other thread reads the environment.
        unsafe {
            env::set_var(name, value);
        }
    }
}

/// Returns the settings of the workers, without their listeners. Checks everything that can be
/// checked before a worker is forked.
fn settings(options: &Options) -> Result<Settings, String> {
    let program = Path::new(&options.program);
    let found = find(program).ok_or_else(|| format!("cannot execute {}", program.display()))?;
    let mut settings = Settings::default().exec(found).args(options.args.clone());
    if let Some(directory) = &options.directory {
        // Inspect `DIRECTORY/.`, because this fails if this process may not enter the directory.
        fs::metadata(directory.join(".")).map_err(|error| {
            format!("cannot enter --directory {}: {error}", directory.display())
        })?;
        settings = settings.cwd(directory);
    }
    let ids = accounts::find(options.user.as_deref(), options.group.as_deref())?;
    if let Some(uid) = ids.uid {
        settings = settings.uid(uid);
    }
    if let Some(gid) = ids.gid {
        settings = settings.gid(gid);
    }
    Ok(settings)
}

/// Finds the program in `PATH`, because `execve` does not search `PATH`. A name with a slash is
/// already a path.
fn find(program: &Path) -> Option<PathBuf> {
    let has_slash = program.as_os_str().as_encoded_bytes().contains(&b'/');
    let path = env::var_os("PATH").filter(|_| !has_slash);
    let is_program = |path: &PathBuf| {
        let data = path.metadata();
        data.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let path = path.unwrap_or_default();
    let mut candidates = env::split_paths(&path).map(|directory| directory.join(program));
    candidates.find(is_program)
}

type NamedFds = Vec<(String, OwnedFd)>;

/// Opens the listeners. Returns them, and the descriptors that each program receives: first those
/// that were passed to this process, then the listeners.
fn listen(
    master: &Master,
    addresses: &[String],
    log: &Log,
) -> Result<(Vec<MasterListener>, NamedFds), Box<dyn Error>> {
    let mut opened = Vec::new();
    for address in addresses {
        let listener = match address.contains('/') {
            true => master.listen(Path::new(address))?,
            false => master.listen(address.as_str())?,
        };
        log.line(
            Level::Info,
            format_args!("listening on {}", listener.address()),
        );
        opened.push(listener);
    }
    let passed = master.retain_all().into_iter();
    let passed = passed.filter(|listener| !listener.is_requested());
    let mut fds = NamedFds::new();
    for listener in passed {
        fds.push((listener.name(), listener.as_fd().try_clone_to_owned()?));
    }
    for listener in &opened {
        fds.push(("listen".to_owned(), listener.as_fd().try_clone_to_owned()?));
    }
    Ok((opened, fds))
}

/// Logs the pool's events and keeps the pid file. Gives up at once if a fork fails before any
/// program has become ready.
fn on_events(pool: &Pool, log: &Rc<Log>, pid_file: &Rc<PidFile>) {
    let (log, pid_file) = (Rc::clone(log), Rc::clone(pid_file));
    let has_started = Cell::new(false);
    pool.on_event(move |pool, master, event| {
        log.line(level(event), event);
        log.show(describe(&pool.status(master)));
        if matches!(event, PoolEvent::WorkerReady { .. }) {
            has_started.set(true);
        }
        if let PoolEvent::WorkerFailed(failure) = event {
            // The first start has failed, so the user or the file is probably wrong, and another
            // attempt would fail too.
            if failure.cause == FailureCause::ForkFailed && !has_started.get() {
                master.give_up(failure.clone());
                pool.stop_at_once(master);
            }
        }
        if *event == PoolEvent::Upgraded {
            pid_file.release();
        }
        if *event == PoolEvent::QuorumReached {
            if let Err(error) = pid_file.write() {
                log.line(Level::Error, error);
            }
        }
    });
}

fn level(event: &PoolEvent) -> Level {
    let is_error = matches!(
        event,
        PoolEvent::WorkerFailed(_)
            | PoolEvent::RecyclingFailed(_)
            | PoolEvent::ReloadFailed { .. }
            | PoolEvent::UpgradeFailed { .. }
            | PoolEvent::FailureLimitReached { .. }
            | PoolEvent::NotificationFailed { .. }
    );
    let is_warning = matches!(
        event,
        PoolEvent::RecyclingPostponed { .. } | PoolEvent::WorkerShutDown { killed: true, .. }
    );
    match (is_error, is_warning) {
        (true, _) => Level::Error,
        (false, true) => Level::Warning,
        (false, false) => Level::Info,
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
