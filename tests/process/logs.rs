//! Tests of `LogWriter` and of servers whose log cannot be written. Such a log must not block the
//! master.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cluster::LogWriter;
use libtest_mimic::{Failed, Trial};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::termios::{FlowArg, LocalFlags, SetArg, tcflow, tcgetattr, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, Uid, close, fork, mkfifo, pipe, setresuid, setsid, ttyname};

use crate::harness::{
    Group, NOBODY, cluster, example, in_background, reserve_port, talk, wait_until,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    log_is_written_by_the_loop_when_its_reader_catches_up
    waiting_log_wakes_nothing
    log_leaves_shared_descriptions_blocking
    log_of_another_users_pipe_does_not_wait: ROOT
    log_reports_dropped_lines_to_a_reader_that_returns
    forked_child_writes_no_lines_of_its_parent
    log_of_a_closed_descriptor_writes_to_no_later_one
    log_file_at_its_size_limit_raises_no_signal
    background_job_is_not_stopped_by_its_log
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for unwritable in UNWRITABLE {
        for server in SERVERS {
            let name = format!("{}_serves_with_{}_as_log", server.example, unwritable.name);
            trials.push(Trial::test(name, || server.serves(unwritable)));
        }
    }
    trials
}

/// A log to which nothing can be written.
struct Unwritable {
    name: &'static str,
    /// Opens the log. The second descriptor, if any, must stay open, because the log would
    /// otherwise fail with an error instead of blocking.
    open: fn() -> (OwnedFd, Option<OwnedFd>),
}

const UNWRITABLE: &[Unwritable] = &[
    Unwritable {
        name: "a_broken_pipe",
        open: || (pipe().unwrap().1, None),
    },
    Unwritable {
        name: "a_full_pipe",
        open: || {
            let (reader, writer) = pipe().unwrap();
            fill(&writer);
            (writer, Some(reader))
        },
    },
    Unwritable {
        name: "a_full_socket",
        open: || {
            let (log, reader) = UnixStream::pair().unwrap();
            fill(&log);
            (log.into(), Some(reader.into()))
        },
    },
    Unwritable {
        name: "a_full_disk",
        open: || {
            let full = File::options().write(true).open("/dev/full").unwrap();
            (full.into(), None)
        },
    },
    Unwritable {
        name: "a_closed_terminal",
        open: || (openpty(None, None).unwrap().slave, None),
    },
    Unwritable {
        name: "a_stopped_terminal",
        open: || {
            let terminal = openpty(None, None).unwrap();
            tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
            (terminal.slave, Some(terminal.master))
        },
    },
];

/// Writes until the log is full, and then restores the file status flags, so that the next write
/// would block.
fn fill(log: impl AsFd) {
    let log = log.as_fd().try_clone_to_owned().unwrap();
    let flags = OFlag::from_bits_retain(fcntl(&log, FcntlArg::F_GETFL).unwrap());
    fcntl(&log, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    let mut file = File::from(log);
    for size in [4096, 1] {
        let error = loop {
            if let Err(error) = file.write(&vec![b'x'; size]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
    fcntl(&file, FcntlArg::F_SETFL(flags)).unwrap();
}

/// An example server, which logs to its standard output and standard error.
struct Server {
    example: &'static str,
    args: fn(&mut Command, SocketAddr),
    /// Whether the example reloads at SIGHUP.
    reloads: bool,
}

const SERVERS: &[Server] = &[
    Server {
        example: "pool",
        args: |command, address| _ = command.arg(address.to_string()),
        reloads: true,
    },
    Server {
        example: "http_server",
        args: |command, address| {
            let address = address.to_string();
            command.args(["--workers", "2", "--addr", &address]);
        },
        reloads: false,
    },
    Server {
        example: "request_counter",
        args: |command, address| _ = command.arg(address.to_string()),
        reloads: false,
    },
];

impl Server {
    /// Checks that the server works although its log cannot be written. The server must answer
    /// clients, stop at SIGTERM, and, if the example supports it, replace a killed worker and
    /// reload.
    fn serves(&self, unwritable: &Unwritable) -> Result<(), Failed> {
        let (_reserved, address) = reserve_port();
        let mut command = example(self.example);
        (self.args)(&mut command, address);
        command.env("CLUSTER_DEBUG", "1");
        let (log, held) = (unwritable.open)();
        let server = Group::start_with(&mut command, log.try_clone()?, log)?;
        let answered = || {
            let answer = talk(address, REQUEST).ok();
            answer.filter(|answer| answer.starts_with("HTTP/1.1 200 OK\r\n"))
        };
        wait_until("an answer", answered);
        let before = workers(server.pid());
        if self.example != "request_counter" {
            let killed = *before.first().ok_or("no worker")?;
            kill(Pid::from_raw(killed), Signal::SIGKILL)?;
            wait_until("a replacement", || {
                let now = workers(server.pid());
                (now.len() == before.len() && !now.contains(&killed)).then_some(())
            });
        }
        if self.reloads {
            let before = workers(server.pid());
            kill(server.pid(), Signal::SIGHUP)?;
            wait_until("a reload", || {
                let now = workers(server.pid());
                (now.len() == before.len() && now.is_disjoint(&before)).then_some(())
            });
        }
        wait_until("an answer", answered);
        kill(server.pid(), Signal::SIGTERM)?;
        let status = server.end()?;
        drop(held);
        let expected = if self.example == "request_counter" {
            "signal: 15 (SIGTERM)"
        } else {
            "exit status: 0"
        };
        assert_eq!(status.to_string(), expected);
        Ok(())
    }
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Returns the process IDs of a master's children.
fn workers(master: Pid) -> BTreeSet<i32> {
    let path = format!("/proc/{master}/task/{master}/children");
    let numbers = std::fs::read_to_string(path).unwrap_or_default();
    let numbers = numbers.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
}

fn is_nonblocking(fd: impl AsFd) -> bool {
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap();
    OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
}

/// Reads until a line ends with `end`, and returns the text. Panics at end-of-file.
fn read_until(mut source: impl std::io::Read, end: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = source.read(&mut buffer).unwrap();
        assert!(length > 0, "the end");
        text.extend_from_slice(&buffer[..length]);
        let text = String::from_utf8_lossy(&text);
        // Trim the end of the line, which is a newline, or on a terminal a carriage return and a
        // newline.
        if text.trim_end().ends_with(end) {
            return text.into_owned();
        }
    }
}

/// Reads all lines of a log that no running loop writes. Flushes the log each time the reader is
/// empty, until a flush brings nothing more.
fn read_all(reader: &OwnedFd, log: &LogWriter) -> String {
    let flags = OFlag::from_bits_retain(fcntl(reader, FcntlArg::F_GETFL).unwrap());
    fcntl(reader, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    let mut reader = File::from(reader.try_clone().unwrap());
    let mut text = String::new();
    loop {
        let before = text.len();
        let error = reader.read_to_string(&mut text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        if text.len() == before {
            return text;
        }
        (&*log).flush().unwrap();
    }
}

fn log_is_written_by_the_loop_when_its_reader_catches_up() {
    cluster(
        |master| {
            let terminal = openpty(None, None).unwrap();
            tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
            let (socket, socket_reader) = UnixStream::pair().unwrap();
            fill(&socket);
            let (reader, writer) = pipe().unwrap();
            fill(&writer);
            for log in [writer, terminal.slave.try_clone().unwrap(), socket.into()] {
                let log = LogWriter::new(log).attached_to(master);
                log.line("first");
                log.line("last");
                // Keep the log open while the other thread reads. The process exits before the
                // timer fires.
                master.set_timeout(Duration::from_secs(60), move |_| drop(log));
            }
            let read = move || {
                tcflow(&terminal.slave, FlowArg::TCOON).unwrap();
                let terminal = File::from(terminal.master);
                read_until(File::from(reader), "first\nlast")
                    + &read_until(terminal, "first\r\nlast")
                    + &read_until(socket_reader, "first\nlast")
            };
            // Exit here, because the timers would keep the master running.
            in_background(master, read, |_, _| std::process::exit(0));
        },
        |_| {},
    );
}

fn waiting_log_wakes_nothing() {
    cluster(
        |master| {
            let (reader, full) = pipe().unwrap();
            fill(&full);
            let (_, broken) = pipe().unwrap();
            let disk = File::options().write(true).open("/dev/full").unwrap();
            let logs = [full, broken, disk.into()];
            let logs = logs.map(|log| LogWriter::new(log).attached_to(master));
            for log in &logs {
                log.line("waits");
            }
            for _ in 0..3 {
                master.dispatch(Some(Duration::ZERO)).unwrap();
            }
            assert_eq!(master.time_left(), None);
            let mut wait = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut wait, PollTimeout::from(50_u8)), Ok(0));
            // `run` must return although lines wait.
            master.run().unwrap();
            drop(reader);
            master.dispatch(Some(Duration::ZERO)).unwrap();
            assert_eq!(poll(&mut wait, PollTimeout::from(50_u8)), Ok(0));
        },
        |_| {},
    );
}

fn log_leaves_shared_descriptions_blocking() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    let fifo = File::options().read(true).write(true).open(path).unwrap();
    let (socket, peer) = UnixStream::pair().unwrap();
    let (reader, writer) = pipe().unwrap();
    let terminal = openpty(None, None).unwrap();
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    for log in [fifo.into(), socket.into(), writer, terminal.slave] {
        let writer = LogWriter::new(log.try_clone().unwrap());
        for _ in 0..5000 {
            writer.line("x".repeat(99));
        }
        assert!(!is_nonblocking(&log));
        drop(writer);
        assert!(!is_nonblocking(&log));
    }
    drop((peer, reader, terminal.master));
}

/// Checks that a log does not block on a full pipe, with and without `pwritev2`. The log cannot
/// reopen the pipes by their path, because root created them and the process has changed its user.
fn log_of_another_users_pipe_does_not_wait() {
    let pipes = [pipe().unwrap(), pipe().unwrap()];
    let nobody = Uid::from_raw(NOBODY);
    setresuid(nobody, nobody, nobody).unwrap();
    for (number, (reader, writer)) in pipes.into_iter().enumerate() {
        if number == 1 {
            refuse_calls(&[libc::SYS_pwritev2], libc::ENOSYS);
        }
        let own = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let denied = File::options().write(true).open(own).unwrap_err();
        assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
        let log = LogWriter::new(writer.try_clone().unwrap());
        for line in 0..5000 {
            log.line(format_args!("{line:0>99}"));
        }
        assert!(!is_nonblocking(&writer));
        let mut text = read_all(&reader, &log);
        log.line("last");
        text += &read_all(&reader, &log);
        assert!(text.ends_with("log lines dropped\nlast\n"), "{text}");
    }
}

fn log_reports_dropped_lines_to_a_reader_that_returns() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    let open = |path: &Path| {
        let mut options = File::options();
        let flags = libc::O_NONBLOCK;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
        options.read(true).open(path).unwrap()
    };
    let reader = open(&path);
    let writer = File::options().write(true).open(&path).unwrap();
    // Test a log that has written to the first reader, and a log that has not written yet.
    let before = LogWriter::new(writer.try_clone().unwrap());
    before.line("before");
    read_until(&reader, "before");
    drop(reader);
    for log in [before, LogWriter::new(writer)] {
        for line in 0..1000 {
            log.line(format_args!("{line:0>99}"));
        }
        let reader = open(&path);
        log.line("after");
        let text = read_all(&reader.into(), &log);
        let lines: Vec<_> = text.lines().collect();
        let kept = lines.len() - 2;
        for (number, line) in lines[..kept].iter().enumerate() {
            assert_eq!(*line, format!("{number:0>99}"));
        }
        let dropped = format!("cluster: {} log lines dropped", 1000 - kept);
        assert_eq!(lines[kept..], [&dropped, "after"]);
        assert!(kept >= 600, "{kept}");
    }
}

fn forked_child_writes_no_lines_of_its_parent() {
    let (reader, writer) = pipe().unwrap();
    fill(&writer);
    let log = LogWriter::new(writer);
    log.line("parent");
    #[allow(unsafe_code)]
    // SAFETY: this process has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            log.line("child");
            drop(log);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).unwrap();
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    log.line("more");
    let text = read_all(&reader, &log);
    let text = text.trim_start_matches('x');
    assert_eq!(text, "parent\nmore\n");
}

fn log_of_a_closed_descriptor_writes_to_no_later_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    close(2).unwrap();
    let log = LogWriter::stderr();
    log.line("lost");
    let file = File::create(&path).unwrap();
    assert_eq!(file.as_raw_fd(), 2);
    log.line("lost");
    drop(log);
    assert_eq!(std::fs::read_to_string(path).unwrap(), "");
}

fn log_file_at_its_size_limit_raises_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let open = || {
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .unwrap()
    };
    let log = LogWriter::new(open());
    log.line("one");
    let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, 6, hard).unwrap();
    for _ in 0..3 {
        log.line("two");
    }
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    open().write_all(b"\n").unwrap();
    log.line("three");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, "one\ntw\no\ntwo\ntwo\nthree\n");
}

/// Environment variable that selects a process's role in
/// `background_job_is_not_stopped_by_its_log`.
const PART: &str = "PART";

fn background_job_is_not_stopped_by_its_log() {
    let again = |part: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(PART, part);
        command
    };
    match std::env::var(PART).as_deref() {
        // Run as the leader of a session. `TOSTOP` makes its terminal stop background jobs that
        // write.
        Ok("leader") => {
            setsid().unwrap();
            let terminal = File::open(ttyname(std::io::stderr()).unwrap()).unwrap();
            let mut settings = tcgetattr(&terminal).unwrap();
            settings.local_flags.insert(LocalFlags::TOSTOP);
            tcsetattr(&terminal, SetArg::TCSANOW, &settings).unwrap();
            let mut job = again("job").process_group(0).spawn().unwrap();
            let pid = Pid::from_raw(i32::try_from(job.id()).unwrap());
            let id = Id::Pid(pid);
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
            let ended = waitid(id, flags).unwrap();
            let _ = job.kill();
            job.wait().unwrap();
            assert_eq!(ended, WaitStatus::Exited(pid, 0));
        }
        Ok(_) => LogWriter::stderr().line("from the background"),
        Err(_) => {
            let terminal = openpty(None, None).unwrap();
            // Only the leader and the job have the terminal, so the read fails if they exit without
            // writing the line.
            let spawn = |slave: OwnedFd| again("leader").stderr(Stdio::from(slave)).spawn();
            let mut leader = spawn(terminal.slave).unwrap();
            read_until(File::from(terminal.master), "from the background");
            let status = leader.wait().unwrap();
            assert!(status.success(), "{status} {:?}", status.signal());
        }
    }
}
