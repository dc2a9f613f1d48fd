//! Writes log lines without blocking the process.
//!
//! [`Lines`] decides which lines are kept and which are dropped, and makes no system calls.
//! [`State`] writes the lines to the target. While the target is full, the master's event loop
//! reports when the target is writable again.

mod lines;

use std::cell::RefCell;
use std::fmt::{self, Display, Write as _};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

use crate::runtime::token::Token;
use crate::sys::log::Target;
use crate::sys::owner::Owner;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::types::errno;
use crate::types::sorted_map::SortedMap;
use lines::Lines;

/// Writes log lines to a standard stream, a file, a pipe or a socket without blocking the process.
///
/// Node has no counterpart.
///
/// The master serves all workers and clients in one event loop, which stops while a callback runs.
/// `println!` and `eprintln!` are therefore unsuitable for a master's callbacks. Both block while
/// the log's reader does not keep up, and both panic if the reader is gone or the disk is full.
/// `LogWriter` never panics, and blocks only in the cases under *Limitations*:
///
/// - If the target is full, the line waits in memory. The writer writes it before the next line. If
///   the writer is [attached to a master](Self::attached_to), the master's event loop writes the
///   line as soon as the target is writable.
/// - If a write fails, for instance because a pipe has no reader, the line also waits, and the next
///   line triggers another attempt.
/// - At most 64 KiB wait. If a line does not fit, the writer drops this line and all later lines
///   until half of the space is free again. It then adds a notice in place of the dropped lines,
///   such as `cluster: 3 log lines dropped`.
/// - The writer returns no error and raises no signal. It changes no setting that the target shares
///   with other processes.
/// - A line is written when it is complete, or at [`flush`](Write::flush). When the last clone of
///   the writer is dropped, the writer makes a last attempt to write the waiting lines and the
///   incomplete line. The rest is lost.
///
/// In a pipe, lines of at most `PIPE_BUF` bytes (4096 on Linux) do not mix with lines of other
/// processes.
///
/// A worker can use a writer, too, without attaching it. A line that waits is then written before
/// the worker's next line.
///
/// A write to a regular file waits only for the disk. To rotate logs, open the new file with
/// `O_APPEND` and create a new writer.
///
/// A child that the application forks does not write the lines that wait in its parent.
///
/// # Limitations
///
/// The writer can block in the following cases, because it can only poll the target and then write:
///
/// - The target is a pipe or terminal, and the system is not Linux or `/proc` is not mounted.
/// - The pipe or terminal belongs to another user.
/// - The terminal was opened as `/dev/tty` or `/dev/tty0`.
///
/// In these cases, the write blocks if another process fills the pipe after the poll, or if the
/// terminal has less space than the line needs. On Linux 6.5 and newer, writes to unnamed pipes
/// never block.
///
/// # Examples
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// use cluster::LogWriter;
///
/// let log = LogWriter::stderr().attached_to(master);
/// master.on_exit(move |_, worker, status| {
///     log.line(format_args!("worker {} exited ({status})", worker.id()));
/// });
/// # }
/// ```
#[derive(Clone)]
pub struct LogWriter(Rc<RefCell<State>>);

impl LogWriter {
    /// Creates a writer to standard output.
    ///
    /// Node: `process.stdout`, which blocks if it is a pipe or a file.
    ///
    /// The writer duplicates the descriptor, so a later redirection of standard output does not
    /// affect the writer.
    ///
    /// ```
    /// cluster::LogWriter::stdout().line("hello");
    /// ```
    #[must_use]
    pub fn stdout() -> Self {
        Self::to(Target::stdout())
    }

    /// Creates a writer to standard error.
    ///
    /// Node: `process.stderr`.
    ///
    /// The writer duplicates the descriptor, so a later redirection of standard error does not
    /// affect the writer.
    ///
    /// ```
    /// cluster::LogWriter::stderr().line("hello");
    /// ```
    #[must_use]
    pub fn stderr() -> Self {
        Self::to(Target::stderr())
    }

    /// Creates a writer to a file, a pipe, a socket or another descriptor.
    ///
    /// Node has no counterpart.
    ///
    /// If the descriptor is not open for writing, no line is ever written. On a datagram socket,
    /// the writer sends each line as one datagram and drops lines that are too long for one.
    ///
    /// ```no_run
    /// # fn f() -> std::io::Result<()> {
    /// use std::fs::File;
    ///
    /// let file = File::options().append(true).create(true).open("server.log")?;
    /// let log = cluster::LogWriter::new(file);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(target: impl Into<OwnedFd>) -> Self {
        Self::to(Target::new(target.into()))
    }

    fn to(target: Target) -> Self {
        Self(Rc::new(RefCell::new(State {
            target,
            lines: Lines::default(),
            owner: Owner::current(),
            event_loop: None,
            awaited: Awaited::Nothing,
        })))
    }

    /// Writes `line` and a line feed.
    ///
    /// Node: `console.log`.
    ///
    /// The method does the same as `writeln!(&log, …)`, but returns no `Result` that the caller
    /// would have to ignore.
    ///
    /// ```
    /// let log = cluster::LogWriter::stderr();
    /// log.line(format_args!("{} workers", 4));
    /// ```
    pub fn line(&self, line: impl Display) {
        // Format the line before the borrow, because the formatter may write to this log.
        let mut text = String::new();
        let _ = write!(text, "{line}");
        text.push('\n');
        self.0.borrow_mut().append(text.as_bytes());
    }
}

impl Write for &LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().append(bytes);
        Ok(bytes.len())
    }

    /// Writes all waiting lines and the incomplete line, as far as the target accepts them.
    fn flush(&mut self) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        state.begin();
        state.lines.complete();
        state.write();
        Ok(())
    }

    /// Formats the text and writes it. Replaces the default method, which panics if a formatter
    /// returns an error.
    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        let mut formatted = String::new();
        let _ = formatted.write_fmt(text);
        self.write_all(formatted.as_bytes())
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self).flush()
    }

    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        (&*self).write_fmt(text)
    }
}

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogWriter").finish_non_exhaustive()
    }
}

struct State {
    target: Target,
    lines: Lines,
    owner: Owner,
    /// The poller of the master's event loop, and this log's key in it. `None` if the writer is not
    /// attached to a master.
    event_loop: Option<(Poller, usize)>,
    awaited: Awaited,
}

/// The event after which the event loop writes the waiting lines.
enum Awaited {
    /// No event. The application's next line triggers the next write.
    Nothing,
    /// The target is full. The poller reports when the target is writable.
    Writable(Registered<Rc<File>>),
    /// The poller has reported that the target is writable, but the target accepted nothing. The
    /// master calls `try_again` after a delay.
    BackOff,
}

/// The result of writing the waiting lines.
enum Written {
    All,
    /// The target is full. The value says whether the target accepted some bytes before.
    Partly(bool),
    /// A write failed for another reason, so the poller cannot report when an attempt may succeed.
    Failed,
}

impl State {
    fn append(&mut self, text: &[u8]) {
        self.begin();
        // Whether this call has already found that the target does not accept all lines. One
        // attempt is enough, because an attempt for each line would only cost system calls.
        let mut is_tried = false;
        for piece in text.split_inclusive(|byte| *byte == b'\n') {
            if !self.lines.has_space(piece.len()) && !is_tried {
                is_tried = !matches!(self.write(), Written::All);
            }
            self.lines.push(piece);
        }
        if self.lines.is_waiting() && !is_tried {
            self.write();
        }
    }

    /// Prepares for writing. In a forked child, discards the parent's lines and event loop.
    fn begin(&mut self) {
        if !self.owner.is_current() {
            self.owner = Owner::current();
            self.lines = Lines::default();
            self.event_loop = None;
            self.awaited = Awaited::Nothing;
        }
    }

    /// Writes the waiting lines. If the target is full, makes the event loop wait until the target
    /// is writable.
    fn write(&mut self) -> Written {
        let written = self.write_lines();
        let is_full = matches!(written, Written::Partly(_));
        match &self.awaited {
            Awaited::BackOff => {}
            Awaited::Writable(_) | Awaited::Nothing if !is_full => self.awaited = Awaited::Nothing,
            Awaited::Writable(registered) if self.target.is(registered) => {}
            // Register the target, because it is not registered yet or has been reopened and has a
            // new descriptor.
            Awaited::Writable(_) | Awaited::Nothing => self.awaited = self.when_writable(),
        }
        written
    }

    fn write_lines(&mut self) -> Written {
        let mut has_progress = false;
        while self.lines.is_waiting() {
            let chunk = self.lines.first(self.target.write_limit());
            let error = match self.target.write(chunk) {
                Ok(length @ 1..) => {
                    self.lines.remove(length);
                    has_progress = true;
                    continue;
                }
                Ok(0) => return Written::Failed,
                Err(error) => error,
            };
            if error.kind() == io::ErrorKind::WouldBlock {
                return Written::Partly(has_progress);
            }
            if error.raw_os_error() != Some(errno::EMSGSIZE) {
                return Written::Failed;
            }
            // Drop the line, because it is too long for a datagram. No later attempt could send it,
            // and it would block all later lines.
            self.lines.drop_first();
        }
        Written::All
    }

    fn when_writable(&self) -> Awaited {
        let Some(((poller, key), file)) = self.event_loop.as_ref().zip(self.target.file()) else {
            return Awaited::Nothing;
        };
        // If the poller returns an error, the application's next line triggers the next write.
        match poller.add(Rc::clone(file), *key, Some(Interest::Writable)) {
            Ok(registered) => Awaited::Writable(registered),
            Err(_) => Awaited::Nothing,
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.owner.is_current() {
            self.lines.complete();
            self.write_lines();
        }
    }
}

/// The logs that are attached to one master.
#[derive(Default)]
pub(crate) struct AttachedLogs(RefCell<SortedMap<u32, Weak<RefCell<State>>>>);

impl AttachedLogs {
    pub(crate) fn add(&self, log: &LogWriter, poller: &Poller) {
        let mut logs = self.0.borrow_mut();
        logs.retain(|_, log| log.strong_count() > 0);
        let free = (0..).zip(logs.keys()).find(|(free, used)| free != *used);
        let number = match free {
            Some((free, _)) => free,
            None => u32::try_from(logs.len()).unwrap_or(u32::MAX),
        };
        logs.insert(number, Rc::downgrade(&log.0));
        let mut state = log.0.borrow_mut();
        state.begin();
        state.event_loop = Some((poller.clone(), Token::Log(number).key()));
        state.write();
    }

    /// Writes the waiting lines of a log whose target the poller has reported as writable.
    ///
    /// Returns the log if its target still accepts nothing. The caller then calls
    /// [`try_again`](Self::try_again) after a delay.
    pub(crate) fn ready(&self, number: u32) -> Option<LogWriter> {
        let log = self.0.borrow().get(&number)?.upgrade()?;
        let mut state = log.borrow_mut();
        let Awaited::Writable(_) = state.awaited else {
            return None;
        };
        if let Written::Partly(false) = state.write() {
            state.awaited = Awaited::BackOff;
            drop(state);
            return Some(LogWriter(log));
        }
        None
    }

    pub(crate) fn try_again(log: &LogWriter) {
        let mut state = log.0.borrow_mut();
        state.awaited = Awaited::Nothing;
        state.write();
    }

    /// Detaches all logs from the master. Their waiting lines are then written only when the
    /// application writes more lines, or flushes or drops the writer.
    pub(crate) fn detach(&self) {
        let logs = self.0.take();
        for log in logs.into_values().filter_map(|log| log.upgrade()) {
            let mut state = log.borrow_mut();
            state.awaited = Awaited::Nothing;
            state.event_loop = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::pipe;
    use std::io::Read as _;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn a_reader_that_catches_up_gets_what_waits_and_the_count() {
        let (reader, writer) = pipe().unwrap();
        let log = LogWriter::new(writer);
        for number in 0..5000 {
            log.line(format_args!("{number:0>99}"));
        }
        let mut reader = File::from(reader);
        let mut text = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        // Each new line first writes the waiting lines. The reader must then get all kept lines,
        // the notice, and these two lines, in this order.
        for last in ["last\n", "very last\n"] {
            let length = reader.read(&mut buffer).unwrap();
            text.extend_from_slice(&buffer[..length]);
            let _ = write!(&log, "{last}");
        }
        drop(log);
        reader.read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let (kept, end) = lines.split_at(lines.len() - 3);
        for (number, line) in kept.iter().enumerate() {
            assert_eq!(*line, format!("{number:0>99}"));
        }
        let dropped = 5000 - kept.len();
        assert!(kept.len() * 100 > 100_000, "{}", kept.len());
        assert_eq!(end[0], format!("cluster: {dropped} log lines dropped"));
        assert_eq!(end[1..], ["last", "very last"]);
    }

    #[test]
    fn each_line_is_a_datagram_and_a_line_too_long_for_one_is_dropped() {
        let (here, there) = UnixDatagram::pair().unwrap();
        let log = LogWriter::new(here);
        let size = nix::sys::socket::sockopt::SndBuf;
        nix::sys::socket::setsockopt(&there, size, &2048).unwrap();
        let _ = write!(&log, "one\ntwo\n");
        let limited = LogWriter::new(there.try_clone().unwrap());
        limited.line("x".repeat(60_000));
        limited.line("three");
        let mut buffer = [0; 100];
        let mut next = |socket: &UnixDatagram| {
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(next(&there), "one\n");
        assert_eq!(next(&there), "two\n");
        let file = log.0.borrow().target.file().map(Rc::clone).unwrap();
        let here = UnixDatagram::from(OwnedFd::from(file.try_clone().unwrap()));
        assert_eq!(next(&here), "cluster: 1 log line dropped\n");
        assert_eq!(next(&here), "three\n");
    }

    #[test]
    fn a_formatter_that_fails_or_logs_does_not_panic() {
        struct Failing<'a>(&'a LogWriter);
        impl Display for Failing<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.line("nested");
                f.write_str("begun")?;
                Err(fmt::Error)
            }
        }
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let log = LogWriter::new(writer);
        log.line(Failing(&log));
        let _ = writeln!(&log, "{}", Failing(&log));
        drop(log);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "nested\nbegun\nnested\nbegun");
    }

    #[test]
    fn a_descriptor_that_is_not_open_for_writing_takes_nothing() {
        let log = LogWriter::new(File::open("/dev/null").unwrap());
        log.line("lost");
        assert!(matches!(log.0.borrow().target, Target::Closed));
        let (reader, _writer) = pipe().unwrap();
        LogWriter::new(reader).line("lost");
    }
}
