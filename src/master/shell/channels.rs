//! The channels to the workers: writing frames, reading frames, and closing.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};

use super::{MasterShell, WorkerIo};
use crate::core::master::Attachment;
use crate::error::{Error, SendError};
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::types::errno::errno_of;
use crate::types::protocol::FrameError;
use crate::types::protocol::Violation;
use crate::types::signal::Signal;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Arrival;
use crate::wire::channel::{Channel, Received};
use crate::wire::driver::{AfterFlush, AfterSend, Unprocessed};
use crate::wire::frame::{ToMaster, ToWorker};
use crate::wire::receipts::{Receipt, ReceiptId};

/// Maximum number of frames that are processed when a channel closes. More frames are a violation
/// of the protocol, for which the master kills the worker.
///
/// A socket buffer of the usual size contains fewer frames. With a larger value, a hostile worker
/// could delay the master for longer.
const FINAL_FRAMES_MAX: u32 = 65_536;
/// Maximum number of descriptors that stay open with a closing channel's final messages until the
/// messages are delivered.
///
/// Together with the descriptors that arrived earlier than their frames (`MAX_EARLY_FDS`), the
/// channel of one exited worker keeps at most 256 descriptors open in the master.
const FINAL_FDS_MAX: usize = 128;

const NOT_A_CONNECTION: FrameError = FrameError::Violation(Violation::NotAConnection);

/// A limit on the descriptors that are accepted with messages.
#[derive(Clone, Copy, Debug)]
enum FdLimit {
    Unlimited,
    /// At most this number of additional descriptors is accepted.
    AtMost(usize),
    /// The limit has been exceeded, and the loss has been reported.
    Exceeded,
}

impl FdLimit {
    /// Closes the descriptors beyond the limit. Returns true only for the first loss, so that the
    /// caller reports a single error.
    fn apply(&mut self, fds: &mut Vec<NoLingerFd>) -> bool {
        match *self {
            Self::Unlimited => false,
            Self::AtMost(limit) => match limit.checked_sub(fds.len()) {
                Some(rest) => {
                    *self = Self::AtMost(rest);
                    false
                }
                None => {
                    fds.truncate(limit);
                    *self = Self::Exceeded;
                    true
                }
            },
            Self::Exceeded => {
                fds.clear();
                false
            }
        }
    }
}

/// The result of processing one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processed {
    /// No frame was processed: no complete one was available, or the next one was invalid.
    Nothing,
    /// A frame was processed, and the buffer contains more bytes.
    More,
    /// A frame was processed, and the buffer is now empty.
    Drained,
    /// A frame that is slow to handle was processed, so other workers must be served next.
    Yield,
}

// Writing frames.
impl MasterShell {
    /// Queues an application's message and writes as many bytes as the socket accepts. Returns
    /// whether the application may continue without a pause.
    pub(crate) fn send(
        &self,
        worker: &WorkerIo,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<bool, SendError> {
        match worker.channel.send(message, fds, receipt)? {
            AfterSend::Done { has_capacity } => Ok(has_capacity),
            AfterSend::FlushNeeded => {
                self.unflushed.borrow_mut().push_back(worker.id);
                self.act();
                Ok(worker.channel.has_capacity())
            }
        }
    }

    /// Queues a frame with the descriptor that `attachment` names. If a reply's descriptor cannot
    /// be copied or created, the core decides what to send instead.
    pub(super) fn send_frame(&self, worker: WorkerId, frame: &ToWorker, attachment: Attachment) {
        let (handle, fd) = match attachment {
            Attachment::None => (None, Ok(None)),
            Attachment::Listener(handle) => (Some(handle), self.share(handle, 0).map(Some)),
            Attachment::Shard(handle, shard) => {
                (Some(handle), self.share_shard(handle, shard).map(Some))
            }
            Attachment::Queue(handle) => (Some(handle), self.open_queue(handle, worker).map(Some)),
        };
        let fd = match (fd, handle, frame) {
            (Ok(fd), _, _) => fd,
            (Err(error), Some(handle), ToWorker::Reply { request, .. }) => {
                let errno = errno_of(&error);
                let mut core = self.core_now();
                return core.share_failed(handle, worker, *request, errno);
            }
            (Err(_), _, _) => None,
        };
        if let Some(worker_io) = self.worker_io(worker) {
            worker_io.channel.queue(frame, fd);
            if *frame == ToWorker::Disconnect {
                worker_io.notify_disconnecting();
            }
        }
        self.unflushed.borrow_mut().push_back(worker);
    }

    pub(super) fn flush(&self) {
        let next = || self.unflushed.borrow_mut().pop_front();
        while let Some(worker) = next() {
            let flush = self
                .worker_io(worker)
                .and_then(|worker_io| worker_io.channel.flush());
            self.fault("master.after_write", worker);
            let Some(flush) = flush else {
                continue;
            };
            self.add_receipts(worker, flush.receipts);
            self.set_writing(worker, flush.is_writing);
            match flush.next {
                AfterFlush::Nothing => {}
                AfterFlush::BackOff(error) => self.back_off(worker, error),
                AfterFlush::Close(reason) => self.channel_failed(worker, reason),
            }
        }
    }

    /// Schedules another flush of the channel after the back-off delay, and reports `error`, if
    /// any.
    fn back_off(&self, worker: WorkerId, error: Option<Error>) {
        let mut retries = self.retries.borrow_mut();
        retries.channels.insert(worker);
        retries.backoff.start(self.start.elapsed());
        drop(retries);
        if let Some(error) = error {
            self.core.borrow_mut().error(Some(worker), error);
        }
    }

    fn set_writing(&self, worker: WorkerId, is_writing: bool) {
        let mut writing = self.writing.borrow_mut();
        if is_writing {
            writing.insert(worker);
        } else {
            writing.remove(worker);
        }
    }

    fn add_receipts(&self, worker: WorkerId, receipts: Vec<Receipt>) {
        let receipts = receipts.into_iter().map(|receipt| (worker, receipt));
        self.receipts.borrow_mut().extend(receipts);
    }

    pub(crate) fn count_receipts(&self) -> usize {
        self.receipts.borrow().len()
    }

    /// Removes and returns the next receipt that has not been delivered to the application.
    pub(crate) fn next_receipt(&self) -> Option<(WorkerId, Receipt)> {
        self.receipts.borrow_mut().pop_front()
    }

    /// Returns whether any queued frame can still be written.
    pub(crate) fn is_writing(&self) -> bool {
        !self.writing.borrow().is_empty() || !self.unflushed.borrow().is_empty()
    }

    /// Returns whether an event or a receipt waits for the application.
    pub(crate) fn has_notifications(&self) -> bool {
        self.core.borrow().has_events() || !self.receipts.borrow().is_empty()
    }

    /// Schedules a flush of a channel that the poller has reported as writable.
    pub(crate) fn channel_writable(&self, worker: WorkerId) {
        if let Some(worker_io) = self.worker_io(worker) {
            worker_io.channel.with(Channel::retry_write);
        }
        self.unflushed.borrow_mut().push_back(worker);
    }
}

// Reading frames.
impl MasterShell {
    /// Reads once from a worker's channel.
    fn receive(&self, worker: &WorkerIo) -> io::Result<Received> {
        worker.channel.receive(&mut self.scratch.borrow_mut())
    }

    /// Reads once from a worker's channel, and closes the channel at end-of-file or on an error.
    /// Returns whether there are bytes to process.
    pub(crate) fn read(&self, worker: &WorkerIo) -> bool {
        match self.receive(worker) {
            Ok(Received::Data) => return true,
            Ok(Received::Nothing) => {}
            Ok(Received::EndOfFile) => self.channel_closed(worker.id),
            Err(reason) => self.channel_failed(worker.id, reason),
        }
        false
    }

    /// Processes one frame that has been read.
    pub(crate) fn process_frame(&self, worker_io: &WorkerIo) -> Processed {
        self.process_frame_within(worker_io, &mut FdLimit::Unlimited)
    }

    fn process_frame_within(&self, worker_io: &WorkerIo, limit: &mut FdLimit) -> Processed {
        let worker = worker_io.id;
        let arrival = match worker_io.channel.next() {
            Ok(Some(arrival)) => arrival,
            Ok(None) => return Processed::Nothing,
            Err(error) => {
                self.core_now().violation(worker, error);
                return Processed::Nothing;
            }
        };
        let Arrival {
            frame,
            mut fds,
            lost_fds,
            is_last,
        } = arrival;
        // Do not apply the limit to a parked connection, because the master has its own limit for
        // the connections that it holds.
        let is_park = matches!(frame, ToMaster::Park { .. });
        let lost_fds = !is_park && limit.apply(&mut fds) || lost_fds;
        let processed = match (&frame, is_last) {
            (ToMaster::Listen { .. }, _) => Processed::Yield,
            (_, true) => Processed::Drained,
            (_, false) => Processed::More,
        };
        // Do not set the core's clock here, because no decision about a message depends on the
        // time. For other frames, the clock is set below.
        let mut core = self.core.borrow_mut();
        if lost_fds {
            core.error(Some(worker), Error::no_descriptors(Some(worker)));
        }
        match frame {
            ToMaster::Message(bytes) => core.message(worker, bytes, fds),
            ToMaster::Park {
                handle,
                times_parked,
            } if !fds.is_empty() => {
                self.fault("master.before_park", worker);
                core.set_time(self.start.elapsed());
                for connection in fds {
                    match sys::connection::is_connection(connection.as_fd()) {
                        true => {
                            self.check_surplus(&mut core);
                            core.park(worker, handle, connection, times_parked);
                        }
                        false => core.violation(worker, NOT_A_CONNECTION),
                    }
                }
                self.fault("master.after_park", worker);
            }
            frame @ (ToMaster::Online
            | ToMaster::Listen { .. }
            | ToMaster::Listening { .. }
            | ToMaster::Idle { .. }
            | ToMaster::Release { .. }
            | ToMaster::DisconnectRequest
            | ToMaster::Park { .. }
            | ToMaster::ParkAgain { .. }
            | ToMaster::Detach { .. }
            | ToMaster::Pause { .. }) => {
                self.fault("master.before_frame", worker);
                core.set_time(self.start.elapsed());
                core.frame(worker, frame);
                self.fault("master.after_frame", worker);
            }
        }
        processed
    }

    /// Records that a worker has frames to process in the next iteration.
    pub(crate) fn add_pending(&self, worker: WorkerId) {
        self.pending.borrow_mut().insert(worker);
    }

    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.borrow().is_empty()
    }

    /// Returns the workers that currently have pending frames.
    pub(crate) fn pending(&self) -> Vec<WorkerId> {
        let pending = self.pending.borrow();
        // Check for an empty set first, because each iteration of the loop calls this method and
        // the set is usually empty.
        if pending.is_empty() {
            return Vec::new();
        }
        pending.iter().collect()
    }

    /// Undoes `add_pending`. Returns whether the worker had pending frames.
    pub(crate) fn remove_pending(&self, worker: WorkerId) -> bool {
        self.pending.borrow_mut().remove(worker)
    }
}

impl WorkerIo {
    /// Makes the worker's disconnect token readable.
    pub(super) fn notify_disconnecting(&self) {
        if let Some(notifier) = self.disconnect_notifier.take() {
            // Shut the socket down instead of only closing it, because a child of the application
            // may have a copy of the descriptor, which would keep the socket open. Unlike a write,
            // the shutdown never waits, whatever the worker does with its end. Ignore the error,
            // because the shutdown fails only if the worker has closed its end.
            let _ = notifier.shutdown(Shutdown::Both);
        }
    }
}

// Closing channels.
impl MasterShell {
    /// Closes a channel after processing the frames that the worker has already written. The
    /// channel is shut down first, so that the worker can write no more frames. The resulting
    /// events are delivered later, because the caller may be the application.
    pub(super) fn close_channel(&self, worker: WorkerId) {
        if let Some(worker_io) = self.worker_io(worker) {
            self.process_final_frames(&worker_io);
        }
        self.channel_closed(worker);
    }

    fn process_final_frames(&self, worker: &WorkerIo) {
        worker.channel.with(Channel::shut_down);
        let (mut left, mut limit) = (FINAL_FRAMES_MAX, FdLimit::AtMost(FINAL_FDS_MAX));
        loop {
            // Process the frames in memory before each read. The last frame may be incomplete; the
            // next read may complete it.
            while left > 0 && self.process_frame_within(worker, &mut limit) != Processed::Nothing {
                left -= 1;
            }
            if left == 0 {
                let reason = FrameError::Violation(Violation::TooManyFinalFrames);
                self.core_now().violation(worker.id, reason);
            }
            let is_connected = self.core.borrow().is_connected(worker.id);
            if !is_connected || !matches!(self.receive(worker), Ok(Received::Data)) {
                break;
            }
        }
    }

    fn channel_failed(&self, worker: WorkerId, reason: io::Error) {
        // If too many replies wait in the master, the channel itself returns `OutOfMemory`, without
        // an error number. A worker that never reads its replies may ignore end-of-file too, so
        // kill it.
        let is_violation =
            reason.kind() == io::ErrorKind::OutOfMemory && reason.raw_os_error().is_none();
        let mut core = self.core_now();
        if is_violation {
            core.signal(worker, Signal::KILL);
        }
        let peer = Some(worker);
        core.error(
            peer,
            Error::Channel {
                worker: peer,
                reason,
            },
        );
        // The core requests `close_channel`, which first processes the frames that the worker has
        // written.
        core.close_channel(worker);
    }

    fn channel_closed(&self, worker: WorkerId) {
        self.drop_channel(worker);
        self.core_now().channel_closed(worker);
    }

    /// Closes a channel without processing the frames that the worker has written.
    pub(super) fn drop_channel(&self, worker: WorkerId) {
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        worker_io.notify_disconnecting();
        let receipts = worker_io.channel.close(Unprocessed::Discard);
        self.add_receipts(worker, receipts);
        self.set_writing(worker, false);
        self.recheck_draining_group(&worker_io);
        let is_reaped = self.core.borrow().exit_status(worker).is_some();
        if worker_io.process.borrow().is_none() && !is_reaped {
            self.sigchld_only.borrow_mut().insert(worker);
        }
    }
}
