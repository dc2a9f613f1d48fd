//! The reports of a child to its parent, until the child has started.
//!
//! The child writes each report with one call, so each report arrives in one piece. The report
//! stream is closed on exec. If the child executes a program, the end of the stream means that the
//! child has started, or has exited without a report.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::program::{Failure, START_TIMEOUT_MS};
use crate::sys::poll::wait_readable;
use crate::sys::socket;
use crate::types::fork_step::ForkStep;

/// A step of a child that can fail before the child has started. A report of a failure begins with
/// the discriminant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(in crate::sys) enum Step {
    Execute,
    Signals,
    Descriptors,
    Directory,
    Groups,
    User,
    Capabilities,
    BecomeWorker,
    Session,
}

impl Step {
    const ALL: [Self; 9] = [
        Self::Execute,
        Self::Signals,
        Self::Descriptors,
        Self::Directory,
        Self::Groups,
        Self::User,
        Self::Capabilities,
        Self::BecomeWorker,
        Self::Session,
    ];

    fn public(self) -> ForkStep {
        match self {
            Self::Execute => ForkStep::Execute,
            Self::Signals => ForkStep::Signals,
            Self::Descriptors => ForkStep::Descriptors,
            Self::Directory => ForkStep::Directory,
            Self::Groups => ForkStep::Groups,
            Self::User => ForkStep::User,
            Self::Capabilities => ForkStep::Capabilities,
            Self::BecomeWorker => ForkStep::BecomeWorker,
            Self::Session => ForkStep::Session,
        }
    }
}

/// A report in the form in which the child writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// A step has failed with an error number, and the child exits.
    Failed(Step, i32),
    /// A child that executes no program has started, and no step can fail any longer.
    Started,
    /// The descriptor that comes with this report is the stream of all later reports.
    Moved,
}

/// The length of a report in bytes. The first byte is the kind of report or the failed step. The
/// other four are an error number.
const LENGTH: usize = 5;
/// The first byte of the report `Started`. No step has this discriminant.
const STARTED: u8 = u8::MAX;
/// The first byte of the report `Moved`. No step has this discriminant.
const MOVED: u8 = u8::MAX - 1;

impl Report {
    /// Encodes the report. Async-signal-safe.
    pub(super) fn encode(self) -> [u8; LENGTH] {
        let (kind, errno) = match self {
            Self::Failed(step, errno) => (step as u8, errno),
            Self::Started => (STARTED, 0),
            Self::Moved => (MOVED, 0),
        };
        let [a, b, c, d] = errno.to_ne_bytes();
        [kind, a, b, c, d]
    }

    fn decode([kind, errno @ ..]: [u8; LENGTH]) -> Self {
        match kind {
            STARTED => Self::Started,
            MOVED => Self::Moved,
            step => {
                let step = Step::ALL.get(usize::from(step)).unwrap_or(&Step::Execute);
                Self::Failed(*step, i32::from_ne_bytes(errno))
            }
        }
    }
}

/// The result of one read from the report stream.
enum Reading {
    /// No report has arrived since the last read.
    Pending,
    /// The child has executed its program, or has exited.
    Closed,
    /// The child, which executes no program, has started.
    Started,
    /// Later reports come from this stream.
    Moved(UnixStream),
    Failed(Failure),
}

/// Waits until a child has started, failed to start or exited, but no longer than `limit`. Returns
/// `Ok` for a child that exited without a report.
///
/// # Errors
///
/// Returns the failure that the child reports, or `ForkStep::WaitForStart` if the limit has passed
/// or the wait itself fails.
pub(super) fn wait_for_start(
    mut reports: UnixStream,
    process: Option<&OwnedFd>,
    limit: Option<Duration>,
) -> Result<(), Failure> {
    let waiting = |error| (ForkStep::WaitForStart, error);
    let begun = Instant::now();
    loop {
        let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        let has_exited = match process {
            // Also wait for the process, because the stream may stay open after the child's exit. A
            // child that another thread of this process forked may have a copy of the stream's
            // other end.
            Some(process) => wait_readable([reports.as_fd(), process.as_fd()], left)
                .map(|[_, has_exited]| has_exited),
            None => wait_readable([reports.as_fd()], left).map(|_| false),
        };
        let has_exited = has_exited.map_err(waiting)?;
        match read(&reports).map_err(waiting)? {
            Reading::Closed | Reading::Started => return Ok(()),
            Reading::Failed(failure) => return Err(failure),
            Reading::Moved(stream) => reports = stream,
            // Return no error, because the worker's exit reports the reason.
            Reading::Pending if has_exited => return Ok(()),
            Reading::Pending if left == Some(Duration::ZERO) => {
                let reason =
                    format!("it had not started after {START_TIMEOUT_MS} ms, and was killed");
                return Err(waiting(io::Error::new(io::ErrorKind::TimedOut, reason)));
            }
            Reading::Pending => {}
        }
    }
}

/// Returns the failure that a child has reported, if any.
pub(super) fn read_failure(reports: &UnixStream) -> Option<Failure> {
    match read(reports) {
        Ok(Reading::Failed(failure)) => Some(failure),
        Ok(Reading::Pending | Reading::Closed | Reading::Started | Reading::Moved(_)) | Err(_) => {
            None
        }
    }
}

/// Reads one report without waiting. Returns `Pending` if there is none.
fn read(reports: &UnixStream) -> io::Result<Reading> {
    let mut report = [0; LENGTH];
    let mut piece = match socket::receive(reports.as_fd(), &mut report) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Reading::Pending),
        received => received?,
    };
    if piece.bytes < report.len() {
        return Ok(Reading::Closed);
    }
    match Report::decode(report) {
        Report::Started => Ok(Reading::Started),
        Report::Moved => match piece.fds.pop() {
            Some(stream) => Ok(Reading::Moved(stream.into_owned_fd().into())),
            None => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        },
        Report::Failed(step, errno) => {
            let error = io::Error::from_raw_os_error(errno);
            Ok(Reading::Failed((step.public(), error)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_PROCESS: Option<&OwnedFd> = None;

    #[test]
    fn reports_survive_encoding() {
        let failures = Step::ALL.map(|step| Report::Failed(step, libc::ENOENT));
        for report in failures.into_iter().chain([Report::Started, Report::Moved]) {
            assert_eq!(Report::decode(report.encode()), report);
        }
    }

    #[test]
    fn start_is_reported_by_the_end_of_the_stream() {
        let (reports, child) = UnixStream::pair().unwrap();
        drop(child);
        wait_for_start(reports, NO_PROCESS, None).unwrap();
    }

    #[test]
    fn wait_for_start_ends_at_the_limit() {
        let (reports, _child) = UnixStream::pair().unwrap();
        let limit = Some(Duration::from_millis(2));
        let (step, error) = wait_for_start(reports, NO_PROCESS, limit).unwrap_err();
        assert_eq!(step, ForkStep::WaitForStart);
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn reports_are_followed_to_the_stream_that_the_child_sends() {
        let (reports, first) = UnixStream::pair().unwrap();
        let (parents, own) = UnixStream::pair().unwrap();
        socket::send_one(&first, &Report::Moved.encode(), parents.as_fd()).unwrap();
        drop(parents);
        let failed = Report::Failed(Step::Directory, libc::ENOENT);
        socket::send(&own, &failed.encode(), &[]).unwrap();
        let (step, error) = wait_for_start(reports, NO_PROCESS, None).unwrap_err();
        assert_eq!(step, ForkStep::Directory);
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        // Keep the first stream open until here, as another process with a copy would.
        // `wait_for_start` would block if it waited for the end of the first stream.
        drop(first);
    }
}
