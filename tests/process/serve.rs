//! Tests the tool `cluster-serve` with programs that do not use this crate.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, FromRawFd as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use crate::harness::{
    Group, PYTHON, SCENARIO, SYSTEMD, cluster_serve, is_alive, reserve_port, scaled, talk,
    wait_until,
};

/// The scenario that `cluster-serve` runs as its program. The program does not use this crate.
pub const PROGRAMS: &[crate::harness::Scenario] = &[crate::harness::Scenario {
    name: PROGRAM,
    play: program,
    need: None,
}];
pub const PROGRAM: &str = "program_of_serve";

pub fn trials() -> Vec<Trial> {
    vec![
        PYTHON.of(Trial::test("serve_shares_a_port", shares_a_port)),
        SYSTEMD.of(Trial::test(
            "serve_is_started_by_socket_activation",
            socket_activation,
        )),
        PYTHON.of(Trial::test("serve_listens_on_unix_sockets", unix_socket)),
        Trial::test("serve_replaces_a_dead_process", replaces_dead_process),
        Trial::test("serve_reloads_under_load_without_a_failure", reloads),
        Trial::test(
            "serve_names_a_program_that_it_cannot_execute",
            missing_program,
        ),
        Trial::test("serve_gives_up_on_a_failing_program", gives_up),
        Trial::test("serve_shows_its_status_on_a_terminal", terminal),
        Trial::test("serve_writes_plain_lines_without_a_terminal", plain),
    ]
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Answers each request with its process ID. Exits at SIGTERM, but not during a request.
fn program() {
    #[allow(unsafe_code)]
    // SAFETY: the descriptor is open because it was passed to this process, and no other value owns
    // it.
    let listener = unsafe {
        let mut passed = sd_notify::listen_fds().unwrap();
        TcpListener::from_raw_fd(passed.next().unwrap())
    };
    let end = SigSet::from(Signal::SIGTERM);
    end.thread_block().unwrap();
    serve_until(&end, &listener, |client| drop(answer(client)));
}

/// Calls `serve` with each client, and returns when a signal of `end` arrives between two clients.
/// The caller must have blocked these signals.
pub fn serve_until(end: &SigSet, listener: &TcpListener, mut serve: impl FnMut(TcpStream)) {
    listener.set_nonblocking(true).unwrap();
    let end = SignalFd::new(end).unwrap();
    loop {
        let fds = [listener.as_fd(), end.as_fd()];
        let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[1].any().unwrap() {
            return;
        }
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(false).unwrap();
                serve(client);
            }
            // Another process of the server has accepted the client.
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

fn answer(mut connection: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut buffer = [0; 1024];
        match connection.read(&mut buffer)? {
            0 => return Ok(()),
            length => request.extend(&buffer[..length]),
        }
    }
    let body = format!("{}\n", std::process::id());
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// A Python program that does not use this crate and blocks in `accept`.
pub const PYTHON_PROGRAM: &str = "
import http.server, os, socket
assert os.environ['LISTEN_PID'] == str(os.getpid())
assert os.environ['LISTEN_FDS'] == '1'
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'%d\\n' % os.getpid()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
listener = socket.socket(fileno=3)
server = http.server.HTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
server.socket.close()
server.socket = listener
while True:
    # Blocks in accept.
    server.process_request(*server.get_request())
";

/// A Python program for any address family. Python's HTTP server cannot print all addresses, so
/// this program uses the socket directly.
const PYTHON_PROGRAM_FOR_ANY_FAMILY: &str = "
import os, socket
listener = socket.socket(fileno=3)
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n%d' % os.getpid())
    connection.close()
";

/// Returns a command for the tool with this number of workers. The tool treats a worker as ready
/// after 50 ms.
pub fn command(workers: usize, address: &str) -> Command {
    let mut command = cluster_serve();
    command.args(["--listen", address, "--readiness", "50ms"]);
    command.args(["--workers", &workers.to_string()]);
    command
}

/// Starts the tool with this binary as the program.
fn start(workers: usize) -> (Group, SocketAddr) {
    let mut command = command(workers, "127.0.0.1:0");
    command.arg("--").arg(std::env::current_exe().unwrap());
    let serve = Group::start(command.env(SCENARIO, PROGRAM)).unwrap();
    let address = line_after(&serve, " listening on ").parse().unwrap();
    (serve, address)
}

/// Waits until a line contains `text`. Returns the rest of the line.
pub fn line_after(serve: &Group, text: &str) -> String {
    wait_until(text, || {
        let output = serve.output();
        let (lines, _) = output.rsplit_once('\n')?;
        let rest = lines.lines().find_map(|line| line.split_once(text));
        rest.map(|(_, rest)| rest.to_owned())
    })
}

pub fn stop(serve: &Group) -> Result<(), Failed> {
    kill(serve.pid(), Signal::SIGTERM)?;
    let status = serve.finish()?;
    (status.code() == Some(0))
        .then_some(())
        .ok_or_else(|| status.to_string().into())
}

/// Sends a request and returns the ID of the process that answers.
pub fn ask(address: SocketAddr) -> Option<u32> {
    pid_in(&talk(address, REQUEST).ok()?)
}

fn pid_in(answer: &str) -> Option<u32> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 OK")
        .then(|| body.trim_end().parse().ok())?
}

/// Sends requests until `count` processes have answered.
pub fn ask_all(address: SocketAddr, count: usize) -> BTreeSet<u32> {
    let mut pids = BTreeSet::new();
    wait_until("answers of all processes", || {
        pids.extend(ask(address));
        (pids.len() >= count).then_some(())
    });
    assert_eq!(pids.len(), count, "{pids:?}");
    pids
}

fn shares_a_port() -> Result<(), Failed> {
    let mut command = command(3, "127.0.0.1:0");
    let serve = Group::start(command.args(["python3", "-c", PYTHON_PROGRAM]))?;
    let address = line_after(&serve, " listening on ").parse()?;
    let pids = ask_all(address, 3);
    assert!(!pids.contains(&serve.pid().as_raw().unsigned_abs()));
    stop(&serve)?;
    let output = serve.output();
    assert!(
        !output.contains("exit status"),
        "a process has exited:\n{output}"
    );
    // The program logs each request to stderr, and the tool passes this output through.
    assert!(output.contains("\"GET / HTTP/1.1\" 200 -\n"), "{output}");
    TcpStream::connect(address).unwrap_err();
    Ok(())
}

/// Checks that the tool passes on the listener that systemd has passed to it.
fn socket_activation() -> Result<(), Failed> {
    let (_reserved, address) = reserve_port();
    let serve = cluster_serve();
    let mut command = Command::new("systemd-socket-activate");
    command.arg(format!("--listen={address}"));
    command.arg(format!("--setenv={SCENARIO}={PROGRAM}"));
    command.arg(serve.get_program()).args(serve.get_args());
    command.args(["--workers", "2"]);
    let serve = Group::start(command.arg(std::env::current_exe()?))?;
    line_after(&serve, &format!("Listening on {address} "));
    ask_all(address, 2);
    stop(&serve)
}

fn unix_socket() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.sock");
    let mut command = command(2, path.to_str().unwrap());
    command.args(["python3", "-c", PYTHON_PROGRAM_FOR_ANY_FAMILY]);
    let serve = Group::start(&mut command)?;
    line_after(&serve, " listening on ");
    let mut client = UnixStream::connect(&path)?;
    client.write_all(REQUEST)?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    assert!(pid_in(&answer).is_some(), "{answer}");
    stop(&serve)?;
    assert!(!path.exists());
    Ok(())
}

/// Checks that clients do not fail while a process is replaced. The tool runs one process, so a
/// client that connects after the process's exit waits for the next process.
fn replaces_dead_process() -> Result<(), Failed> {
    let (serve, address) = start(1);
    let mut pid = ask(address).unwrap();
    for _ in 0..3 {
        kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
        wait_until("the exit of the process", || (!is_alive(pid)).then_some(()));
        let next = ask(address).expect("an answer");
        assert_ne!(next, pid);
        pid = next;
    }
    stop(&serve)?;
    let deaths = serve.output().matches("(signal: 9 (SIGKILL))\n").count();
    assert_eq!(deaths, 3, "{}", serve.output());
    Ok(())
}

/// The number of requests with each outcome.
#[derive(Debug, Default)]
pub struct Outcomes {
    answered: AtomicUsize,
    refused: AtomicUsize,
    reset: AtomicUsize,
    timeout: AtomicUsize,
    wrong: AtomicUsize,
}

impl Outcomes {
    pub fn request(&self, address: SocketAddr) {
        let outcome = match talk(address, REQUEST) {
            Ok(answer) if pid_in(&answer).is_some() => &self.answered,
            Ok(_) => &self.wrong,
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => &self.refused,
                ErrorKind::WouldBlock | ErrorKind::TimedOut => &self.timeout,
                _ => &self.reset,
            },
        };
        outcome.fetch_add(1, Ordering::SeqCst);
    }
}

/// Runs `operation` while clients send requests. Asserts that no request fails.
pub fn under_load(address: SocketAddr, operation: impl FnOnce()) {
    let (outcomes, is_over) = (Arc::<Outcomes>::default(), Arc::<AtomicBool>::default());
    let client = || {
        let (outcomes, is_over) = (Arc::clone(&outcomes), Arc::clone(&is_over));
        std::thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                outcomes.request(address);
            }
        })
    };
    let clients: Vec<_> = std::iter::repeat_with(client).take(8).collect();
    // On a busy machine, the operation may end before a client gets a core.
    let many_are_answered = || (outcomes.answered.load(Ordering::SeqCst) > 100).then_some(());
    operation();
    wait_until("answers", many_are_answered);
    is_over.store(true, Ordering::SeqCst);
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
    let Outcomes {
        answered: _,
        refused,
        reset,
        timeout,
        wrong,
    } = &*outcomes;
    let failed = [refused, reset, timeout, wrong].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(failed, [0; 4], "{outcomes:?}");
}

fn reloads() -> Result<(), Failed> {
    const WORKERS: usize = 3;
    let (serve, address) = start(WORKERS);
    let mut seen = ask_all(address, WORKERS);
    under_load(address, || {
        for generation in 1..=3 {
            kill(serve.pid(), Signal::SIGHUP).unwrap();
            line_after(&serve, &format!(" generation {generation} serves"));
            let answering = ask_all(address, WORKERS);
            assert!(answering.is_disjoint(&seen), "{answering:?} of {seen:?}");
            seen.extend(answering);
        }
    });
    stop(&serve)?;
    assert!(!serve.output().contains("killed"), "{}", serve.output());
    Ok(())
}

fn missing_program() -> Result<(), Failed> {
    for program in ["no-such-program", "./no-such-program", "/dev/null", "/"] {
        let output = command(1, "127.0.0.1:0").arg(program).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text, format!("cluster-serve: cannot execute {program}\n"));
    }
    Ok(())
}

fn gives_up() -> Result<(), Failed> {
    let serve = Group::start(command(2, "127.0.0.1:0").args(["sh", "-c", "exit 7"]))?;
    assert_eq!(serve.end()?.code(), Some(1));
    let reason = line_after(&serve, "serve: gave up: ");
    assert!(reason.ends_with("(exit status: 7)"), "{reason}");
    Ok(())
}

/// Returns the lines that a terminal would show. Interprets carriage return, newline and the
/// sequence that erases the rest of a line.
fn render(output: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let (mut column, mut rest) = (0, output);
    while let Some(next) = rest.chars().next() {
        let line = lines.last_mut().unwrap();
        if let Some(after) = rest.strip_prefix("\x1b[K") {
            line.truncate(column);
            rest = after;
            continue;
        }
        assert!(next != '\x1b', "{rest:?}");
        match next {
            '\r' => column = 0,
            '\n' => {
                lines.push(String::new());
                column = 0;
            }
            _ => {
                let end = (column + 1).min(line.len());
                line.replace_range(column..end, &next.to_string());
                column += 1;
            }
        }
        rest = &rest[next.len_utf8()..];
    }
    lines
}

fn terminal() -> Result<(), Failed> {
    let pty = nix::pty::openpty(None, None)?;
    let name = nix::unistd::ttyname(&pty.slave)?;
    let serve = command(2, "127.0.0.1:0");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 2> \"$0\""]).arg(name);
    command.arg(serve.get_program()).args(serve.get_args());
    command.arg(std::env::current_exe()?).env(SCENARIO, PROGRAM);
    let serve = Group::start(&mut command)?;
    let (mut shown, mut terminal) = (Vec::new(), File::from(pty.master));
    // Reads until the last line contains the text and is not `other`, and the cursor is at its start.
    // Returns the last line.
    let mut read_until = |text: &str, other: &str| loop {
        let so_far = String::from_utf8_lossy(&shown).into_owned();
        let lines = render(&so_far);
        let last = lines.last().unwrap();
        if last.contains(text) && last != other && so_far.ends_with('\r') {
            return last.clone();
        }
        let mut fds = [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(scaled(Duration::from_secs(60))).unwrap();
        match poll(&mut fds, timeout) {
            // `wait-timeout`, which the harness uses, handles SIGCHLD in this process.
            Err(Errno::EINTR) => continue,
            ready => assert_eq!(ready, Ok(1), "{text:?} of {lines:?}"),
        }
        let mut buffer = [0; 4096];
        let length = terminal.read(&mut buffer).unwrap();
        shown.extend(&buffer[..length]);
    };
    read_until("2 of 2 ready  gen 0  restarts 0  up ", "");
    kill(serve.pid(), Signal::SIGTTIN)?;
    read_until("3 of 3 ready  gen 0  restarts 0  up ", "");
    kill(serve.pid(), Signal::SIGTTOU)?;
    read_until("2 of 2 ready  gen 0  restarts 0  up ", "");
    kill(serve.pid(), Signal::SIGHUP)?;
    let unchanged = "2 of 2 ready  gen 1  restarts 0  up ";
    let first = read_until(unchanged, "");
    // The uptime must be updated even when nothing else changes.
    read_until(unchanged, &first);
    stop(&serve)?;
    assert_eq!(serve.output(), "", "output outside the terminal");
    // Only this process still has the terminal's slave side open. Close that side, so that reading
    // ends.
    drop(pty.slave);
    let mut rest = Vec::new();
    let end = terminal.read_to_end(&mut rest).unwrap_err();
    assert_eq!(end.raw_os_error(), Some(libc::EIO));
    shown.extend(rest);
    let shown = String::from_utf8(shown)?;
    let lines = render(&shown);
    let (last, events) = lines.split_last().unwrap();
    assert_eq!(last, "", "the status is erased: {lines:#?}");
    assert!(
        events
            .iter()
            .any(|line| line.ends_with(" slot 2: worker 3 is ready"))
    );
    events.iter().for_each(|line| assert_is_event(line));
    Ok(())
}

/// Checks that the line begins with a time.
#[track_caller]
fn assert_is_event(line: &str) {
    let (time, _) = line.split_once(' ').unwrap();
    assert!(time.len() == 24 && time.ends_with('Z'), "{line:?}");
}

fn plain() -> Result<(), Failed> {
    let (serve, address) = start(2);
    line_after(&serve, " ready");
    ask_all(address, 2);
    stop(&serve)?;
    let output = serve.output();
    assert!(!output.contains(['\x1b', '\r']), "{output:?}");
    output.lines().for_each(assert_is_event);
    Ok(())
}
