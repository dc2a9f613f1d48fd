//! Starts other servers, which send the same answer as the servers in `server.rs`.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::harness::{Group, SCENARIO, wait_until};
use crate::server::{GET, Server};
use crate::usage::family;

fn peers_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/peers")
}

/// The role of a process that executes another program.
pub const PEER: &str = "peer";

/// Returns a command that runs another program. The program is terminated when this process exits.
fn peer_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(SCENARIO, PEER).arg(program);
    command
}

/// Executes another program in a process that the benchmark has started. The kernel sends the
/// program SIGTERM when the benchmark exits. SIGKILL would leave the program's workers running,
/// because they would not notice that their master was killed.
pub fn exec_peer() {
    set_pdeathsig(Signal::SIGTERM).unwrap();
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let mut command = Command::new(&args[0]);
    panic!("{}", command.args(&args[1..]).env_remove(SCENARIO).exec());
}

/// Returns an error if `program` is not installed. With the argument `version`, the program prints
/// its version and exits.
pub fn check_installed(program: &str, version: &str) -> Result<(), String> {
    let output = Command::new(program).arg(version).output();
    output.map(drop).map_err(|_| format!("no {program}"))
}

/// Returns a command for one of the Node programs in `peers`.
pub fn node_program(name: &str, args: &[&str]) -> Result<Command, String> {
    check_installed("node", "--version")?;
    let mut command = peer_command("node");
    command.arg(peers_dir().join(name)).args(args);
    Ok(command)
}

pub fn node(policy: &str, workers: usize) -> Result<Server, String> {
    let mut command = node_program("server.js", &[policy, &workers.to_string()])?;
    Ok(Server::run(&mut command))
}

/// Starts Node's `http` server, which keeps idle connections open, and whose master replaces its
/// workers at SIGHUP.
pub fn node_http(workers: usize) -> Result<Server, String> {
    let mut command = node_program("http.js", &[&workers.to_string()])?;
    Ok(Server::run(&mut command))
}

pub fn prefork(workers: usize) -> Result<Server, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prefork");
    build(&peers_dir().join("prefork/Cargo.toml"), &target, &[])?;
    let mut command = peer_command(target.join("release/prefork-server"));
    Ok(Server::run(command.arg(workers.to_string())))
}

/// Compiles the package with this manifest in release mode. `args` are additional arguments of
/// `cargo build`.
pub fn build(manifest: &Path, target: &Path, args: &[&str]) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--quiet",
        "--release",
        "--locked",
        "--manifest-path",
    ]);
    command
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .args(args);
    let built = command.output().map_err(|error| error.to_string())?;
    let errors = String::from_utf8_lossy(&built.stderr);
    let last = || {
        format!(
            "cannot be compiled: {}",
            errors.lines().last().unwrap_or_default()
        )
    };
    built.status.success().then_some(()).ok_or_else(last)
}

/// Starts nginx, which closes a connection that is idle for longer than `keep_alive`.
pub fn nginx(workers: usize, keep_alive: &str) -> Result<Server, String> {
    check_installed("nginx", "-v")?;
    let port = free_port();
    let values = [
        ("PORT", port.to_string()),
        ("WORKERS", workers.to_string()),
        ("KEEP_ALIVE", keep_alive.to_owned()),
    ];
    let directory = configure("nginx.conf", &values);
    let mut command = peer_command("nginx");
    command.arg("-p").arg(&directory).args(["-c", "nginx.conf"]);
    start(&mut command, port, workers)
}

/// Starts HAProxy as a master with one worker.
pub fn haproxy() -> Result<Server, String> {
    check_installed("haproxy", "-v")?;
    let port = free_port();
    let directory = configure("haproxy.cfg", &[("PORT", port.to_string())]);
    let mut command = peer_command("haproxy");
    command
        .args(["-W", "-f", "haproxy.cfg"])
        .current_dir(&directory);
    start(&mut command, port, 1)
}

/// Copies a configuration file from `peers` to its own directory. Replaces each name with its
/// value. Returns the directory.
fn configure(file: &str, values: &[(&str, String)]) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file);
    std::fs::create_dir_all(&directory).unwrap();
    let mut text = std::fs::read_to_string(peers_dir().join(file)).unwrap();
    for (name, value) in values {
        text = text.replace(name, value);
    }
    std::fs::write(directory.join(file), text).unwrap();
    directory
}

/// Starts gunicorn with single-threaded workers, which close each connection after one request.
pub fn gunicorn(workers: usize) -> Result<Server, String> {
    start_gunicorn(workers, &["--worker-class", "sync"])
}

/// Starts gunicorn with threads, which keep idle connections open for an hour.
pub fn gunicorn_threads(workers: usize) -> Result<Server, String> {
    let threads = ["--worker-class", "gthread", "--threads", "4"];
    start_gunicorn(workers, &[&threads[..], &["--keep-alive", "3600"]].concat())
}

fn start_gunicorn(workers: usize, options: &[&str]) -> Result<Server, String> {
    check_installed("gunicorn", "--version")?;
    let port = free_port();
    let mut command = peer_command("gunicorn");
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(peers_dir());
    command
        .args(["--workers", &workers.to_string()])
        .args(options);
    command.args(["--bind", &format!("127.0.0.1:{port}"), "app:app"]);
    start(&mut command, port, workers)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts a server that does not report when it is ready, and waits until it answers and all its
/// workers exist.
fn start(command: &mut Command, port: u16, workers: usize) -> Result<Server, String> {
    let address = ([127, 0, 0, 1], port).into();
    let group = Group::start(command).map_err(|error| error.to_string())?;
    let server = Server { group, address };
    wait_until("a server", || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.write_all(GET).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let ready = answer.ends_with("\r\n\r\nhello world\n");
        (ready && family(server.group.pid()).len() > workers).then_some(())
    });
    Ok(server)
}
