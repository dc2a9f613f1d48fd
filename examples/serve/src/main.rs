//! Runs any program that takes its listeners from `LISTEN_FDS` as a pool of processes.
//!
//! `cluster-serve --help` lists the options. `options` reads them, `accounts` finds users and
//! groups, `listeners` opens the listeners, `log` writes the log, and `pid_file` keeps the process id
//! of the master in a file.

mod accounts;
mod listeners;
mod log;
mod options;
mod pid_file;

use std::cell::Cell;
use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{FailureCause, Pool, PoolEvent, Status, StatusAddress};
use cluster::systemd::{self, ListenFd};
use cluster::{LogWriter, Master, Role, SchedulingPolicy, Settings, Signal};

use crate::listeners::{Listeners, without_stale_socket};
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
    let (listeners, fds) = Listeners::open(&master, &options.listen, log)?;
    let listeners = Rc::new(listeners);
    master.setup_master(settings.listen_fds(fds));
    if let Some(address) = options.status {
        let serve = || pool.serve_status(&master, address.clone());
        let address = if let StatusAddress::Unix(path) = &address {
            without_stale_socket(path, serve)?
        } else {
            serve()?
        };
        log.line(Level::Info, format_args!("serving the status on {address}"));
    }
    let pid_file = Rc::new(PidFile::new(options.pid_file)?);
    on_events(&pool, log, &pid_file, &listeners);
    let errors = Rc::clone(log);
    master.on_error(move |_, worker, error| match worker {
        Some(worker) => {
            errors.line(
                Level::Error,
                format_args!("worker {}: {error}", worker.id()),
            );
        }
        None => errors.line(Level::Error, error),
    });
    for signal in [Signal::HUP, Signal::USR2] {
        // The pool does not handle a signal that was ignored at the start either.
        if !master.is_signal_ignored(signal) {
            let (pool, listeners) = (pool.clone(), Rc::clone(&listeners));
            master.on_signal(signal, move |master, _| {
                if !pool.status(master).is_reloading {
                    listeners.record_modes();
                }
            })?;
        }
    }
    pool.on_default_signals(&master)?;
    // Handle the signal, because a file size limit (RLIMIT_FSIZE) would otherwise end this process
    // when it writes the pid file. With a handler, the write fails with EFBIG.
    master.on_signal(Signal::try_from(libc::SIGXFSZ)?, |_, _| ())?;
    // Children may exist that this process has not started: a script that executes this program may
    // have started some, and a subreaper receives orphans.
    master.reap_orphans();
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
    // The working directory stays the old release if a link in its path is switched to a new one.
    let found = absolute(found);
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

/// The directories that are searched if `PATH` is not set (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Finds the program in `PATH`, because `execve` does not search `PATH`. A name with a slash is
/// already a path.
fn find(program: &Path) -> Option<PathBuf> {
    let has_slash = program.as_os_str().as_encoded_bytes().contains(&b'/');
    let path = match has_slash {
        true => OsString::new(),
        false => env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
    };
    let is_program = |path: &PathBuf| {
        let data = path.metadata();
        data.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let mut candidates = env::split_paths(&path).map(|directory| directory.join(program));
    candidates.find(is_program)
}

/// Makes a path absolute. If the variable `PWD` names the working directory, uses its value as a
/// shell does, so that symbolic links in it stay unresolved.
fn absolute(path: PathBuf) -> PathBuf {
    let is_current = |directory: &PathBuf| {
        let id = |directory: &Path| fs::metadata(directory).map(|data| (data.dev(), data.ino()));
        let (logical, physical) = (id(directory), id(Path::new(".")));
        directory.is_absolute() && logical.is_ok_and(|own| physical.is_ok_and(|other| own == other))
    };
    let logical = env::var_os("PWD").map(PathBuf::from).filter(is_current);
    let directory = logical.map_or_else(env::current_dir, Ok);
    // Without a working directory, only an absolute path works.
    directory.map_or_else(|_| path.clone(), |directory| directory.join(&path))
}

/// Logs the pool's events, and keeps the pid file and the listeners. Gives up at once if a fork fails
/// before any program has become ready.
fn on_events(pool: &Pool, log: &Rc<Log>, pid_file: &Rc<PidFile>, listeners: &Rc<Listeners>) {
    let (log, pid_file) = (Rc::clone(log), Rc::clone(pid_file));
    let listeners = Rc::clone(listeners);
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
        if matches!(event, PoolEvent::Reloaded { .. }) {
            listeners.record_modes();
        }
        let has_failed = matches!(
            event,
            PoolEvent::ReloadFailed { .. } | PoolEvent::UpgradeFailed { .. }
        );
        if has_failed && listeners.restore_modes() {
            let text = "the new release had changed the mode of a listener (O_NONBLOCK)";
            log.line(Level::Warning, text);
        }
        if pool.is_stopping() && pool.status(master).stop_in.is_none() {
            listeners.close(master);
        }
        if *event == PoolEvent::QuorumReached {
            if let Err(error) = pid_file.write() {
                log.line(Level::Error, error);
                write_later(pool, master, &pid_file);
            }
        }
    });
}

/// Tries to write the pid file again, until this succeeds or the pool is not ready any more.
fn write_later(pool: &Pool, master: &Master, pid_file: &Rc<PidFile>) {
    let (pool, pid_file) = (pool.clone(), Rc::clone(pid_file));
    let timer = master.set_timeout(Duration::from_secs(1), move |master| {
        if pool.has_quorum() && pid_file.write().is_err() {
            write_later(&pool, master, &pid_file);
        }
    });
    master.unreference(timer);
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
