//! The options, from the command line and from the environment.

use std::env;
use std::ffi::{OsStr, OsString};
use std::mem;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use cluster::Signal;
use cluster::pool::{PoolOptions, Readiness, StatusAddress};
use lexopt::prelude::*;

use crate::log::Format;

pub(crate) const USAGE: &str = "\
Usage: cluster-serve [OPTIONS] [--] PROGRAM [ARGS...]

Runs a program as a pool of processes that share their listeners. The program takes the listeners by
systemd's protocol: LISTEN_FDS contains their number, and the first is descriptor 3.

  cluster-serve --listen 127.0.0.1:8000 -- gunicorn app:app

The pool:
  --listen ADDRESS     HOST:PORT, or a path with a slash for a Unix socket, whose file is replaced if
                       no process listens on it; may be repeated; not needed if systemd passes
                       listeners, which come first
  --workers NUMBER     number of processes [default: the number of cores]
  --readiness TIME     a process is ready when it has run for this time [default: 1s]
  --max-age TIME       a process that has run for this time is replaced [default: never]
  --max-memory SIZE    a process with more private memory is replaced [default: no limit]
  --max-failures NUMBER
                       failures of a slot within a minute, after which the slot stays empty; if no
                       process is left, the pool gives up [default: 8]

The processes:
  --env NAME=VALUE     sets a variable of their environment; may be repeated
  --directory PATH     their working directory
  --user USER          name or number; the group is the user's unless --group is given
  --group GROUP        name or number

Stopping:
  --stop-delay TIME    continues to serve for this time after TERM, while /health
                       answers 503 [default: 0s]
  --drain TIME         a process that has not exited this long after TERM is killed [default: 30s]

Operation:
  --pid-file PATH      contains the master's process id while the pool is ready, also after upgrades;
                       no other instance starts with the same file
  --status ADDRESS     serves /health, /metrics and /status on IP:PORT (loopback only) or on a Unix
                       socket (a path with a slash)
  --log PATH           appends the log to a file [default: standard error]
  --log-format FORMAT  plain, or json: one object a line, with time, level, pid and text
  --help, --version

A TIME is 500ms, 10s, 5m or 2h; a SIZE is 4096, 512K, 100M or 2G. Each option except --env can also be
set in the environment: CLUSTER_SERVE_STOP_DELAY=5s. CLUSTER_SERVE_LISTEN is a list, separated by
spaces. An empty variable counts as not set. The command line overrides the environment.

Signals: HUP replaces all processes, one after the other. USR2 upgrades cluster-serve itself. TTIN and
TTOU add and remove a process. USR1 opens the file of --log again. TERM and INT stop; a second one, at
least a second later, ends the delay and then the drain. QUIT stops at once. Processes are stopped by
SIGTERM; when one has exited, the processes that it has started get SIGTERM, too.

Exit codes: 0 after a stop; 1 if the pool could not start or gave up; 2 if an option is not valid.
";

/// The options with a value.
const NAMES: [&str; 16] = [
    "listen",
    "workers",
    "readiness",
    "max-age",
    "max-memory",
    "max-failures",
    "env",
    "directory",
    "user",
    "group",
    "stop-delay",
    "drain",
    "pid-file",
    "status",
    "log",
    "log-format",
];

const MILLISECONDS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
const BYTES: &[(&str, u64)] = &[("", 1), ("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)];

#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) listen: Vec<String>,
    pub(crate) pool: PoolOptions,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) user: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) status: Option<StatusAddress>,
    pub(crate) log: Option<PathBuf>,
    pub(crate) log_format: Format,
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
}

/// The action that the command line requests.
#[derive(Debug)]
pub(crate) enum Request {
    Serve(Box<Options>),
    Help,
    Version,
}

/// Reads the command line and the environment.
pub(crate) fn parse() -> Result<Request, String> {
    let mut args = lexopt::Parser::from_env();
    let mut options = Options::default();
    let mut given = Vec::new();
    options.program = loop {
        match args.next().map_err(|error| error.to_string())? {
            None => return Err("no program".to_owned()),
            Some(Short('h') | Long("help")) => return Ok(Request::Help),
            Some(Short('V') | Long("version")) => return Ok(Request::Version),
            Some(Value(program)) => break program,
            Some(arg) => {
                let name = match arg {
                    Long(name) => NAMES.into_iter().find(|known| *known == name),
                    Short(_) | Value(_) => None,
                };
                let name = name.ok_or_else(|| arg.unexpected().to_string())?;
                given.push((name, args.value().map_err(|error| error.to_string())?));
            }
        }
    };
    let rest = args.raw_args().map_err(|error| error.to_string())?;
    options.args = rest.collect();
    options.set_all(given)?;
    Ok(Request::Serve(Box::new(options)))
}

impl Options {
    /// Sets the options from the command line, and from the environment those that are not on the
    /// command line.
    fn set_all(&mut self, given: Vec<(&'static str, OsString)>) -> Result<(), String> {
        self.pool = mem::take(&mut self.pool)
            .disconnect_signal(Some(Signal::TERM))
            // A process is ready when it has run for this time. There is no other way to learn
            // whether a program is ready.
            .readiness(Readiness::Alive(Duration::from_secs(1)))
            // Send SIGTERM to the old process as soon as its replacement is ready.
            .min_ready_time(Duration::ZERO);
        for name in NAMES.into_iter().filter(|name| *name != "env") {
            if given.iter().any(|(given, _)| *given == name) {
                continue;
            }
            let variable = format!("CLUSTER_SERVE_{}", name.replace('-', "_").to_uppercase());
            let Some(value) = env::var_os(&variable).filter(|value| !value.is_empty()) else {
                continue;
            };
            let values = match (name, value.to_str()) {
                ("listen", Some(list)) => list.split_whitespace().map(OsString::from).collect(),
                _ => vec![value],
            };
            for value in values {
                self.set(name, &value)
                    .map_err(|reason| invalid(&variable, &value, &reason))?;
            }
        }
        for (name, value) in given {
            self.set(name, &value)
                .map_err(|reason| invalid(&format!("--{name}"), &value, &reason))?;
        }
        Ok(())
    }

    /// Sets an option to a value, or returns what is wrong with the value.
    fn set(&mut self, name: &'static str, value: &OsStr) -> Result<(), String> {
        match name {
            "listen" => self.listen.push(as_utf8(value)?.to_owned()),
            "env" => self.env.push(parse_variable(value)?),
            "directory" => self.directory = Some(path(value)?),
            "user" => self.user = Some(as_utf8(value)?.to_owned()),
            "group" => self.group = Some(as_utf8(value)?.to_owned()),
            "pid-file" => self.pid_file = Some(path(value)?),
            "status" => self.status = Some(status_address(value)?),
            "log" => self.log = Some(path(value)?),
            "log-format" => self.log_format = as_utf8(value)?.parse()?,
            _ => self.pool = set_limit(mem::take(&mut self.pool), name, as_utf8(value)?)?,
        }
        Ok(())
    }
}

/// Sets a number, time or size of the pool.
fn set_limit(pool: PoolOptions, name: &str, value: &str) -> Result<PoolOptions, String> {
    let error = |error: std::num::ParseIntError| error.to_string();
    Ok(match name {
        "workers" => pool.workers(value.parse::<NonZeroU16>().map_err(error)?.get().into()),
        "readiness" => pool.readiness(Readiness::Alive(parse_time(value)?)),
        "max-age" => pool.max_age(Some(parse_time(value).and_then(nonzero)?)),
        "max-memory" => pool.max_memory(Some(
            parse_amount(value, BYTES)
                .filter(|size| *size > 0)
                .ok_or("not a size, such as 512K, 100M or 2G")?,
        )),
        "max-failures" => pool.max_failures(value.parse().map_err(error)?),
        "stop-delay" => pool.stop_delay(parse_time(value)?),
        "drain" => pool.drain_timeout(parse_time(value)?),
        _ => return Err("unknown option".to_owned()),
    })
}

fn invalid(option: &str, value: &OsStr, reason: &str) -> String {
    format!("{option}: invalid value {value:?}: {reason}")
}

fn as_utf8(value: &OsStr) -> Result<&str, String> {
    value.to_str().ok_or_else(|| "not valid UTF-8".to_owned())
}

fn path(value: &OsStr) -> Result<PathBuf, String> {
    match value.is_empty() {
        true => Err("must not be empty".to_owned()),
        false => Ok(value.into()),
    }
}

/// Returns an error for an age at which each new process would be replaced at once.
fn nonzero(time: Duration) -> Result<Duration, String> {
    match time.is_zero() {
        true => Err("must not be 0".to_owned()),
        false => Ok(time),
    }
}

fn parse_time(value: &str) -> Result<Duration, String> {
    let milliseconds = parse_amount(value, MILLISECONDS);
    let time = milliseconds.map(Duration::from_millis);
    time.ok_or_else(|| "not a time, such as 500ms, 10s, 5m or 2h".to_owned())
}

/// Parses a number with a unit, and multiplies it by the unit's factor. Returns `None` if the text
/// is not such a number or the product overflows.
fn parse_amount(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    units.iter().find_map(|(unit, factor)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(*factor)
    })
}

/// Splits `NAME=VALUE`.
fn parse_variable(value: &OsStr) -> Result<(OsString, OsString), String> {
    let bytes = value.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=');
    let at = at.filter(|at| *at > 0).ok_or("not NAME=VALUE")?;
    let part = |bytes| OsStr::from_bytes(bytes).to_owned();
    Ok((part(&bytes[..at]), part(&bytes[at + 1..])))
}

fn status_address(value: &OsStr) -> Result<StatusAddress, String> {
    if value.as_bytes().contains(&b'/') {
        return Ok(StatusAddress::Unix(value.into()));
    }
    let address = as_utf8(value)?.parse::<SocketAddr>();
    let address = address.map_err(|_| "neither IP:PORT nor a path with a slash")?;
    match address.ip().is_loopback() {
        true => Ok(StatusAddress::Tcp(address)),
        false => Err("not a loopback address".to_owned()),
    }
}
