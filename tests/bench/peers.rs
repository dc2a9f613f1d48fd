//! Other servers that give the same answer.

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

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/peers")
}

/// The role of a process that becomes another program.
pub const PEER: &str = "peer";

/// Another program, which ends when this one does.
fn other(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(SCENARIO, PEER).arg(program);
    command
}

/// In the process that is to become it. Its workers would not notice if it were killed.
pub fn become_other() {
    set_pdeathsig(Signal::SIGTERM).unwrap();
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let mut command = Command::new(&args[0]);
    panic!("{}", command.args(&args[1..]).env_remove(SCENARIO).exec());
}

/// Whether there is such a program.
pub fn has(program: &str, version: &str) -> Result<(), String> {
    let asked = Command::new(program).arg(version).output();
    asked.map(drop).map_err(|_| format!("no {program}"))
}

/// A program of ours for Node.
pub fn node_program(name: &str, args: &[&str]) -> Result<Command, String> {
    has("node", "--version")?;
    let mut command = other("node");
    command.arg(folder().join(name)).args(args);
    Ok(command)
}

pub fn node(policy: &str, workers: usize) -> Result<Server, String> {
    let mut command = node_program("server.js", &[policy, &workers.to_string()])?;
    Ok(Server::run(&mut command))
}

pub fn prefork(workers: usize) -> Result<Server, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prefork");
    build(&folder().join("prefork/Cargo.toml"), &target, &[])?;
    let mut command = other(target.join("release/prefork-server"));
    Ok(Server::run(command.arg(workers.to_string())))
}

/// Compiles what the benchmark itself is not made of.
pub fn build(manifest: &Path, target: &Path, what: &[&str]) -> Result<(), String> {
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
        .args(what);
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

pub fn nginx(workers: usize) -> Result<Server, String> {
    has("nginx", "-v")?;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nginx");
    std::fs::create_dir_all(&directory).unwrap();
    let template = std::fs::read_to_string(folder().join("nginx.conf")).unwrap();
    let port = free_port();
    let text = template.replace("PORT", &port.to_string());
    let text = text.replace("WORKERS", &workers.to_string());
    std::fs::write(directory.join("nginx.conf"), text).unwrap();
    let mut command = other("nginx");
    command.arg("-p").arg(&directory).args(["-c", "nginx.conf"]);
    start(&mut command, port, workers)
}

pub fn gunicorn(workers: usize) -> Result<Server, String> {
    has("gunicorn", "--version")?;
    let port = free_port();
    let mut command = other("gunicorn");
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(folder());
    command.args(["--worker-class", "sync", "--workers", &workers.to_string()]);
    command.args(["--bind", &format!("127.0.0.1:{port}"), "app:app"]);
    start(&mut command, port, workers)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts a server that does not say when it serves.
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
