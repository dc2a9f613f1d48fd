//! Tests how the tool `cluster-serve` copes with files, paths and limits that change or are missing.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use libtest_mimic::{Failed, Trial};
use nix::libc::O_NONBLOCK;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::Backlog;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, mkfifo, pipe};
use tempfile::TempDir;

use crate::harness::{Group, NOBODY, SCENARIO, SETPRIV, is_alive, wait_until};
use crate::serve::{PROGRAM, ask, ask_all, command, line_after, stop};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("serve_goes_on_if_its_log_has_no_reader", log_without_reader),
        Trial::test(
            "serve_removes_no_other_socket_file_after_an_upgrade",
            foreign_socket_file,
        ),
        Trial::test("serve_replaces_the_socket_of_a_killed_master", stale_socket),
        Trial::test("serve_binds_lost_paths_again_in_an_upgrade", lost_paths),
        Trial::test("serve_fails_at_once_beside_a_full_backlog", full_backlog),
        Trial::test("serve_follows_a_switched_link", switched_link),
        Trial::test("serve_writes_its_pid_file_later", pid_file),
        Trial::test(
            "serve_replaces_only_a_regular_file_as_pid_file",
            special_pid_file,
        ),
        Trial::test("serve_writes_its_pid_file_through_no_link", planted_link),
        Trial::test("serve_runs_with_a_file_size_limit_of_zero", file_size_limit),
        Trial::test("serve_searches_a_default_path", default_path),
        Trial::test(
            "files_of_serve_are_writable_only_by_their_owner",
            umask_of_zero,
        ),
        Trial::test(
            "serve_reaps_children_that_it_has_inherited",
            inherited_child,
        ),
        SETPRIV.of(Trial::test(
            "serve_logs_why_a_program_cannot_be_signalled",
            refused_signal,
        )),
    ]
}

/// Returns a command with this binary as the program.
fn own_program(address: &str, options: &[&str]) -> Command {
    let mut command = command(1, address);
    command.args(options).arg("--");
    command.arg(std::env::current_exe().unwrap());
    command.env(SCENARIO, PROGRAM);
    command
}

fn log_without_reader() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("log");
    mkfifo(&log, Mode::from_bits_truncate(0o600))?;
    let reader = fs::File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(&log)?;
    let serve = Group::start(&mut own_program(
        "127.0.0.1:0",
        &["--log", log.to_str().unwrap()],
    ))?;
    let (mut reader, mut text) = (reader, String::new());
    wait_until("a ready process", || {
        // Ignore an error, which means that there is nothing to read yet.
        let _ = reader.read_to_string(&mut text);
        text.contains("] ready\n").then_some(())
    });
    drop(reader);
    kill(serve.pid(), Signal::SIGUSR1)?;
    stop(&serve)
}

/// Starts the tool on a Unix socket and with a status socket, in this directory.
fn start_on_sockets(directory: &TempDir) -> Result<Group, Failed> {
    let [socket, status] = sockets(directory);
    let options = ["--status", status.as_str()];
    let serve = Group::start(&mut own_program(&socket, &options))?;
    line_after(&serve, " ready");
    Ok(serve)
}

fn sockets(directory: &TempDir) -> [String; 2] {
    ["socket", "status"].map(|name| directory.path().join(name).to_str().unwrap().to_owned())
}

fn foreign_socket_file() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let serve = start_on_sockets(&directory)?;
    let others = sockets(&directory).map(|path| {
        fs::remove_file(&path).unwrap();
        UnixListener::bind(path).unwrap()
    });
    // The new master cannot bind the paths, so the old one stays.
    kill(serve.pid(), Signal::SIGUSR2)?;
    line_after(&serve, " the new master failed");
    stop(&serve)?;
    for path in sockets(&directory) {
        UnixStream::connect(path)?;
    }
    drop(others);
    Ok(())
}

fn stale_socket() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let killed = start_on_sockets(&directory)?;
    kill(killed.pid(), Signal::SIGKILL)?;
    killed.finish()?;
    // The socket is in use until the killed master's worker has exited.
    wait_until("the end of the worker", || {
        UnixStream::connect(&sockets(&directory)[0])
            .is_err()
            .then_some(())
    });
    let serve = start_on_sockets(&directory)?;
    let mut second = own_program(&sockets(&directory)[0], &[]);
    let second = second.output()?;
    assert_eq!(second.status.code(), Some(1), "a socket in use stays");
    UnixStream::connect(&sockets(&directory)[0])?;
    stop(&serve)
}

/// Starts the tool on a socket whose backlog is full, because its process does not accept.
fn full_backlog() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    nix::sys::socket::listen(&listener, Backlog::new(0)?)?;
    let _waiting = UnixStream::connect(&path)?;
    let mut serve = own_program(path.to_str().unwrap(), &[]);
    assert_eq!(serve.output()?.status.code(), Some(1));
    assert!(path.exists(), "a socket in use stays");
    Ok(())
}

fn special_pid_file() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let fifo = directory.path().join("fifo");
    mkfifo(&fifo, Mode::from_bits_truncate(0o600))?;
    let link = directory.path().join("link");
    symlink(&fifo, &link)?;
    for path in [&fifo, &link] {
        let options = ["--pid-file", path.to_str().unwrap()];
        let output = own_program("127.0.0.1:0", &options).output()?;
        let error = String::from_utf8(output.stderr)?;
        assert!(error.contains("not a regular file"), "{error}");
        assert_ne!(output.status.code(), Some(0));
    }
    let text = directory.path().join("text");
    fs::write(&text, "precious")?;
    let options = ["--pid-file", text.to_str().unwrap()];
    let output = own_program("127.0.0.1:0", &options).output()?;
    let error = String::from_utf8(output.stderr)?;
    assert!(error.contains("does not contain a process id"), "{error}");
    assert_eq!(fs::read_to_string(&text)?, "precious");
    assert!(fs::symlink_metadata(&link)?.is_symlink());
    assert!(fs::metadata(&link)?.file_type().is_fifo());
    Ok(())
}

fn switched_link() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let current = directory.path().join("current");
    for release in ["one", "two"] {
        let path = directory.path().join(release);
        fs::create_dir(&path)?;
        let script = format!("#!/bin/sh\necho release {release}\nexec {}\n", own_path());
        fs::write(path.join("app"), script)?;
        fs::set_permissions(path.join("app"), fs::Permissions::from_mode(0o755))?;
    }
    symlink("one", &current)?;
    let mut command = command(1, "127.0.0.1:0");
    command.args(["--", "./app"]).env(SCENARIO, PROGRAM);
    let serve = Group::start(command.current_dir(&current).env("PWD", &current))?;
    line_after(&serve, "release one");
    line_after(&serve, " ready");
    let address = line_after(&serve, " listening on ").parse()?;
    let next = directory.path().join("next");
    symlink("two", &next)?;
    fs::rename(&next, &current)?;
    fs::remove_dir_all(directory.path().join("one"))?;
    kill(serve.pid(), Signal::SIGHUP)?;
    line_after(&serve, "release two");
    line_after(&serve, " generation 1 serves");
    ask_all(address, 1);
    stop(&serve)
}

fn own_path() -> String {
    std::env::current_exe()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

fn pid_file() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    // The file cannot replace a directory.
    let path = directory.path().join("pid");
    fs::create_dir(&path)?;
    let options = ["--pid-file", path.to_str().unwrap()];
    let serve = Group::start(&mut own_program("127.0.0.1:0", &options))?;
    line_after(&serve, " cannot write --pid-file ");
    fs::remove_dir(&path)?;
    let own = format!("{}\n", serve.pid());
    wait_until("the pid file", || {
        (fs::read_to_string(&path).ok()? == own).then_some(())
    });
    stop(&serve)?;
    assert!(!path.exists());
    Ok(())
}

/// Checks that the tool goes on although it cannot write its pid file. The kernel would end it by
/// SIGXFSZ.
fn file_size_limit() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let pid_file = directory.path().join("pid");
    let options = ["--pid-file", pid_file.to_str().unwrap()];
    let mut command = own_program("127.0.0.1:0", &options);
    #[allow(unsafe_code)]
    // SAFETY: setrlimit is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_FSIZE, 0, 0)?));
    }
    // The limit does not apply to pipes.
    let (log, writer) = pipe()?;
    let serve = Group::start_with(&mut command, writer.try_clone()?, writer)?;
    drop(command);
    let mut lines = BufReader::new(fs::File::from(log)).lines();
    let address =
        lines.find_map(|line| Some(line.ok()?.split_once(" listening on ")?.1.to_owned()));
    let address = address.ok_or("not listening")?.parse()?;
    let is_reported =
        |line: Result<String, _>| line.is_ok_and(|line| line.contains(" cannot write --pid-file "));
    assert!(lines.any(is_reported), "no error");
    wait_until("an answer", || ask(address));
    stop(&serve)?;
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

fn umask_of_zero() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let files = ["pid", "log"].map(|name| directory.path().join(name));
    let [pid_file, log] = files.each_ref().map(|path| path.to_str().unwrap());
    let mut command = own_program("127.0.0.1:0", &["--pid-file", pid_file, "--log", log]);
    #[allow(unsafe_code)]
    // SAFETY: umask is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            umask(Mode::empty());
            Ok(())
        });
    }
    let serve = Group::start(&mut command)?;
    for file in &files {
        let mode = wait_until("the file", || Some(fs::metadata(file).ok()?.permissions()));
        assert_eq!(mode.mode() & 0o777, 0o644, "{}", file.display());
    }
    stop(&serve)
}

/// Checks that a child that a shell has started before it executes the tool does not remain a zombie.
fn inherited_child() -> Result<(), Failed> {
    let tool = command(1, "127.0.0.1:0");
    let mut command = Command::new("sh");
    command.args(["-c", "sleep 600 & echo child $!; exec \"$0\" \"$@\""]);
    command.arg(tool.get_program()).args(tool.get_args());
    let serve = Group::start(command.args(["--", "sleep", "600"]))?;
    let child = line_after(&serve, "child ");
    line_after(&serve, " ready");
    kill(Pid::from_raw(child.parse()?), Signal::SIGKILL)?;
    wait_until("the end of the child", || {
        (!Path::new("/proc").join(&child).exists()).then_some(())
    });
    stop(&serve)
}

/// Checks that the log says why a program does not exit: the tool may change the program's user, but
/// has no CAP_KILL.
fn refused_signal() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let end = directory.path().join("end");
    let tool = command(1, "127.0.0.1:0");
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=-kill", "--bounding-set=-kill"]);
    command.arg(tool.get_program()).args(tool.get_args());
    command.args(["--user", &NOBODY.to_string(), "--directory", "/"]);
    command.args(["--", "sh", "-c", "until [ -e \"$0\" ]; do sleep 0.01; done"]);
    let serve = Group::start(command.arg(&end))?;
    line_after(&serve, " ready");
    kill(serve.pid(), Signal::SIGTERM)?;
    line_after(
        &serve,
        " worker 1: cannot send a signal to a worker: Operation not permitted",
    );
    fs::write(end, "")?;
    let status = serve.finish()?;
    (status.code() == Some(0))
        .then_some(())
        .ok_or_else(|| status.to_string().into())
}

fn default_path() -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    let serve = Group::start(command.args(["--", "sleep", "600"]).env_remove("PATH"))?;
    line_after(&serve, " ready");
    assert!(Path::new("/bin/sleep").exists());
    stop(&serve)
}

/// Checks that an upgrade binds the paths of sockets again if their files were removed, or if a
/// symbolic link to their directory was switched, and that no master leaves its own file behind.
fn lost_paths() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let [first, second, link] = ["1", "2", "link"].map(|name| directory.path().join(name));
    fs::create_dir(&first)?;
    fs::create_dir(&second)?;
    symlink(&first, &link)?;
    let [socket, status] = ["socket", "status"].map(|name| link.join(name));
    let options = ["--status", status.to_str().unwrap()];
    let serve = Group::start(&mut own_program(socket.to_str().unwrap(), &options))?;
    line_after(&serve, " ready");
    let mut master = serve.pid();
    let mut upgrade = |count: usize| -> Result<Pid, Failed> {
        kill(master, Signal::SIGUSR2)?;
        let lines = wait_until("the new master", || {
            let output = serve.output();
            let lines = output.lines();
            let lines = lines.filter(|line| line.ends_with("] this master has taken over"));
            let lines: Vec<_> = lines.map(str::to_owned).collect();
            (lines.len() == count).then_some(lines)
        });
        let (_, rest) = lines[count - 1].split_once('[').unwrap();
        let (new, _) = rest.split_once(']').unwrap();
        wait_until("the exit of the old master", || {
            (!is_alive(master.as_raw().unsigned_abs())).then_some(())
        });
        master = Pid::from_raw(new.parse()?);
        UnixStream::connect(&socket)?;
        UnixStream::connect(&status)?;
        Ok(master)
    };
    fs::remove_file(&link)?;
    symlink(&second, &link)?;
    upgrade(1)?;
    assert!(!first.join("socket").exists(), "the old master's file");
    fs::remove_file(&socket)?;
    fs::remove_file(&status)?;
    let last = upgrade(2)?;
    kill(last, Signal::SIGTERM)?;
    serve.finish()?;
    assert_eq!(fs::read_dir(&second)?.count(), 0, "the last master's files");
    Ok(())
}

/// Checks that another user cannot make the master write to a file of its choice. The user knows the
/// process id of the master, and may own the pid file's directory.
fn planted_link() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let [victim, pid_file] = ["victim", "pid"].map(|name| directory.path().join(name));
    fs::write(&victim, "precious")?;
    let serve = own_program("127.0.0.1:0", &["--pid-file", pid_file.to_str().unwrap()]);
    // The shell plants the links, and then becomes the master.
    let script = "ln -s \"$1\" \"$2.$$\" && ln -s \"$1\" \"$2.$$.0\" && shift 2 && exec \"$@\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh"])
        .args([&victim, &pid_file]);
    command.arg(serve.get_program()).args(serve.get_args());
    command.env(SCENARIO, PROGRAM);
    let serve = Group::start(&mut command)?;
    line_after(&serve, "ready");
    let id = wait_until("the pid file", || fs::read_to_string(&pid_file).ok());
    assert_eq!(id.trim_end(), serve.pid().to_string());
    assert!(!pid_file.is_symlink());
    assert_eq!(fs::read_to_string(&victim)?, "precious");
    stop(&serve)
}
