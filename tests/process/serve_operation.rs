//! Tests how the tool `cluster-serve` is operated: upgrades, its pid file, its log, and its status.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{Group, PYTHON, SCENARIO, SYSTEMD, cluster_serve, reserve_port, wait_until};
use crate::serve::{PROGRAM, PYTHON_PROGRAM, ask, ask_all, command, line_after, stop, under_load};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("serve_upgrades_under_load_without_a_failure", upgrade),
        PYTHON.of(Trial::test(
            "serve_upgrades_around_a_program_that_blocks_in_accept",
            blocking_program,
        )),
        SYSTEMD.of(Trial::test(
            "serve_passes_the_listeners_of_systemd_to_its_new_master",
            upgrade_with_passed_listener,
        )),
        Trial::test("serve_keeps_another_masters_pid_file", foreign_pid_file),
        Trial::test(
            "serve_starts_no_second_instance_with_its_pid_file",
            second_instance,
        ),
        Trial::test(
            "serve_keeps_its_pid_file_if_an_upgrade_fails",
            failed_upgrade,
        ),
        Trial::test("serve_logs_json_objects", json),
        Trial::test("serve_opens_its_log_again_at_usr1", reopen),
        Trial::test("serve_ignores_usr1_without_a_log_file", usr1),
        Trial::test(
            "serve_serves_its_status_and_serves_on_before_a_stop",
            status,
        ),
    ]
}

/// Starts the tool with these options, and with this binary as the program.
fn start(options: &[&str]) -> (Group, SocketAddr) {
    let mut command = command(2, "127.0.0.1:0");
    command.args(options).arg("--");
    command.arg(std::env::current_exe().unwrap());
    let serve = Group::start(command.env(SCENARIO, PROGRAM)).unwrap();
    let address = line_after(&serve, " listening on ").parse().unwrap();
    (serve, address)
}

/// Waits until the file contains a process id other than `old`, and returns the id.
pub fn pid_in(path: &Path, old: Pid) -> Pid {
    wait_until("a new process id in the pid file", || {
        let text = fs::read_to_string(path).ok()?;
        let pid = text.strip_suffix('\n').expect("a whole line").parse();
        Some(Pid::from_raw(pid.unwrap())).filter(|pid| *pid != old)
    })
}

/// Stops the new master. The group's own process is the old master.
fn stop_new(serve: &Group, new: Pid) -> Result<(), Failed> {
    kill(new, Signal::SIGTERM)?;
    let status = serve.finish()?;
    assert_eq!(status.code(), Some(0), "{}", serve.output());
    Ok(())
}

fn upgrade() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let (serve, address) = start(&["--pid-file", path.to_str().unwrap()]);
    let before = ask_all(address, 2);
    let old = pid_in(&path, Pid::from_raw(0));
    assert_eq!(old, serve.pid());
    let mut new = old;
    under_load(address, || {
        kill(old, Signal::SIGUSR2).unwrap();
        new = pid_in(&path, old);
        line_after(&serve, " a new master has taken over");
        line_after(&serve, " worker 2 has exited");
        let after = ask_all(address, 2);
        assert!(after.is_disjoint(&before), "{after:?} of {before:?}");
    });
    // The old master has ended, and has left the file to the new one.
    line_after(&serve, " this master has taken over");
    assert_eq!(fs::read_to_string(&path)?, format!("{new}\n"));
    stop_new(&serve, new)?;
    assert!(!path.exists());
    assert!(!serve.output().contains("killed"), "{}", serve.output());
    // No temporary file is left either.
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

/// Checks that the listener stays in blocking mode. The program fails if `accept` returns without a
/// connection.
fn blocking_program() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let mut command = command(2, "127.0.0.1:0");
    command.arg("--pid-file").arg(&path);
    let serve = Group::start(command.args(["python3", "-c", PYTHON_PROGRAM]))?;
    let address = line_after(&serve, " listening on ").parse()?;
    ask_all(address, 2);
    let old = pid_in(&path, Pid::from_raw(0));
    kill(old, Signal::SIGUSR2)?;
    let new = pid_in(&path, old);
    line_after(&serve, " worker 2 has exited");
    ask_all(address, 2);
    stop_new(&serve, new)?;
    let output = serve.output();
    assert!(!output.contains("BlockingIOError"), "{output}");
    Ok(())
}

fn upgrade_with_passed_listener() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let (_reserved, address) = reserve_port();
    let serve = cluster_serve();
    let mut command = Command::new("systemd-socket-activate");
    command.arg(format!("--listen={address}"));
    command.arg(format!("--setenv={SCENARIO}={PROGRAM}"));
    command.arg(serve.get_program()).args(serve.get_args());
    // The program uses the first descriptor, which must be systemd's in both masters.
    command.args(["--workers", "1", "--readiness", "50ms"]);
    command
        .args(["--listen", "127.0.0.1:0", "--pid-file"])
        .arg(&path);
    let serve = Group::start(command.arg(std::env::current_exe()?))?;
    line_after(&serve, &format!("Listening on {address} "));
    let before = wait_until("an answer", || ask(address));
    let old = pid_in(&path, Pid::from_raw(0));
    kill(old, Signal::SIGUSR2)?;
    let new = pid_in(&path, old);
    line_after(&serve, " worker 1 has exited");
    assert_ne!(ask(address), Some(before));
    stop_new(&serve, new)
}

fn foreign_pid_file() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let (serve, _) = start(&["--pid-file", path.to_str().unwrap()]);
    pid_in(&path, Pid::from_raw(0));
    fs::write(&path, "1\n")?;
    stop(&serve)?;
    assert_eq!(fs::read_to_string(&path)?, "1\n");
    Ok(())
}

/// Checks that a second instance does not start with the first one's pid file, also after an upgrade,
/// and that it starts when the first one has been killed.
fn second_instance() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let options = ["--pid-file", path.to_str().unwrap()];
    let (first, _) = start(&options);
    let refused = |owner: Pid| {
        let (second, _) = start(&options);
        let status = second.finish().unwrap();
        assert_eq!(status.code(), Some(1), "{}", second.output());
        line_after(&second, &format!(": process {owner} uses it"));
        assert_eq!(pid_in(&path, Pid::from_raw(0)), owner);
    };
    let old = pid_in(&path, Pid::from_raw(0));
    refused(old);
    kill(old, Signal::SIGUSR2)?;
    let new = pid_in(&path, old);
    refused(new);
    line_after(&first, " this master has taken over");
    refused(new);
    kill(new, Signal::SIGKILL)?;
    first.finish()?;
    let (third, _) = start(&options);
    assert_eq!(pid_in(&path, new), third.pid());
    stop(&third)
}

fn failed_upgrade() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.pid");
    let program = directory.path().join("program");
    fs::write(&program, "#!/bin/sh\nexec sleep 1000\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut command = command(1, "127.0.0.1:0");
    command.arg("--pid-file").arg(&path).arg(&program);
    let serve = Group::start(&mut command)?;
    let own = pid_in(&path, Pid::from_raw(0));
    fs::remove_file(&program)?;
    kill(own, Signal::SIGUSR2)?;
    line_after(&serve, " the new master failed: exit status: 1");
    assert_eq!(fs::read_to_string(&path)?, format!("{own}\n"));
    stop(&serve)
}

/// Parses a line of the log, and returns its level and text.
fn parse(line: &str) -> (String, String) {
    let object: Value = serde_json::from_str(line).expect(line);
    let text = |key: &str| object[key].as_str().expect(line).to_owned();
    assert!(object["pid"].is_u64(), "{line}");
    let time = text("time");
    assert!(time.len() == 24 && time.ends_with('Z'), "{line}");
    assert_eq!(
        object.as_object().map(serde_json::Map::len),
        Some(4),
        "{line}"
    );
    (text("level"), text("text"))
}

fn json() -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    command.args(["--log-format", "json", "sleep", "1000"]);
    let serve = Group::start(&mut command)?;
    line_after(&serve, "worker 1 is ready");
    stop(&serve)?;
    let output = serve.output();
    let lines: Vec<_> = output.lines().map(parse).collect();
    let (level, text) = &lines[0];
    assert_eq!(level, "info");
    assert!(text.starts_with("listening on 127.0.0.1:"), "{text}");
    // Check that the error with which the tool exits is also a JSON object.
    let mut command = cluster_serve();
    command.args([
        "--listen",
        "127.0.0.1:0",
        "--log-format",
        "json",
        "a\"b\\c\n",
    ]);
    let output = String::from_utf8(command.output()?.stderr)?;
    let (level, text) = parse(output.strip_suffix('\n').ok_or("no line")?);
    assert_eq!((&*level, &*text), ("error", "cannot execute a\"b\\c\n"));
    Ok(())
}

fn reopen() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let (log, rotated) = (
        directory.path().join("serve.log"),
        directory.path().join("serve.log.1"),
    );
    let has = |path: &Path, text: &str| {
        let content = fs::read_to_string(path).unwrap_or_default();
        content.contains(text).then_some(())
    };
    let mut command = command(1, "127.0.0.1:0");
    command.arg("--log").arg(&log).args(["sleep", "1000"]);
    let serve = Group::start(&mut command)?;
    wait_until("readiness", || has(&log, "worker 1 is ready"));
    fs::rename(&log, &rotated)?;
    kill(serve.pid(), Signal::SIGUSR1)?;
    wait_until("a new log", || log.exists().then_some(()));
    kill(serve.pid(), Signal::SIGHUP)?;
    wait_until("a reload", || has(&log, "generation 1 serves"));
    stop(&serve)?;
    assert!(has(&rotated, "reloading").is_none());
    assert_eq!(serve.output(), "", "the log is in the file only");
    Ok(())
}

fn usr1() -> Result<(), Failed> {
    let (serve, address) = start(&[]);
    line_after(&serve, " ready");
    kill(serve.pid(), Signal::SIGUSR1)?;
    ask_all(address, 2);
    stop(&serve)
}

/// Requests `path` from the status server on a Unix socket, and returns the first line of the
/// answer and its body.
fn get(socket: &Path, path: &str) -> Option<(String, String)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.lines().next()?.to_owned(), body.to_owned()))
}

fn status() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("status.sock");
    let (serve, address) = start(&["--stop-delay", "1h", "--status", socket.to_str().unwrap()]);
    line_after(&serve, " serving the status on ");
    let code = |expected: &str| {
        wait_until(expected, || {
            let (line, _) = get(&socket, "/health")?;
            line.contains(expected).then_some(())
        });
    };
    code(" 200 ");
    let (_, metrics) = get(&socket, "/metrics").ok_or("no metrics")?;
    assert!(metrics.contains("\n# TYPE cluster_"), "{metrics}");
    kill(serve.pid(), Signal::SIGTERM)?;
    code(" 503 ");
    ask_all(address, 2);
    kill(serve.pid(), Signal::SIGQUIT)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    assert!(!socket.exists());
    Ok(())
}
