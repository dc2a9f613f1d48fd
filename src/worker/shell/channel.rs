//! The channel to the master: writing frames, reading frames, and waiting for them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::sockets::AcceptMode;
use super::{Socket, WorkerShell};
use crate::core::worker::{ListenStatus, ListenerId};
use crate::error::{Error, Result, SendError};
use crate::runtime::backoff::BACKOFF;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{is_writable, wait_readable, wait_readable_or_writable};
use crate::sys::process::Pid;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::FrameError;
use crate::wire::channel::inbox::Arrival;
use crate::wire::channel::{Channel, Received};
use crate::wire::driver::{AfterFlush, AfterSend, Unprocessed};
use crate::wire::fault;
use crate::wire::frame::ToWorker;
use crate::wire::receipts::ReceiptId;

// Writing frames.
impl WorkerShell {
    /// Sends or queues an application's message. Returns whether the application may continue
    /// without a pause.
    pub(crate) fn send(
        &self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<bool> {
        if !self.poller.is_own() {
            return Err(Error::ForeignProcess);
        }
        let failed = |reason: SendError| Error::Send {
            worker: None,
            reason,
        };
        match self.channel.send(message, fds, receipt).map_err(failed)? {
            AfterSend::Done { has_capacity } => Ok(has_capacity),
            AfterSend::FlushNeeded => {
                self.flush();
                Ok(self.channel.has_capacity())
            }
        }
    }

    /// Returns whether any queued frame can still be written.
    pub(crate) fn is_writing(&self) -> bool {
        self.channel.is_writing()
    }

    /// Writes as many bytes as the socket accepts, even if it was full at the last attempt.
    pub(crate) fn flush_channel(&self) {
        self.channel.with(Channel::retry_write);
        self.flush();
    }

    fn flush(&self) {
        loop {
            self.flush_once();
            // Send the connections for which the channel had no space before.
            if !self.core.borrow().has_leaving() || !self.send_leaving() {
                break;
            }
        }
        // The channel of a killed worker closes once the last of them is queued.
        self.act();
    }

    fn flush_once(&self) {
        self.fault("worker.before_write");
        let flush = self.channel.flush();
        self.fault("worker.after_write");
        let Some(flush) = flush else {
            return;
        };
        self.receipts.borrow_mut().extend(flush.receipts);
        match flush.next {
            AfterFlush::Nothing => {}
            AfterFlush::BackOff(error) => {
                self.back_off();
                self.errors.borrow_mut().extend(error);
            }
            AfterFlush::Close(reason) => {
                self.report(self.channel.broken(reason));
                // Shut the channel down, so that the next read finds end-of-file and closes the
                // channel.
                let receipts = self.channel.with(|channel| {
                    channel.shut_down();
                    channel.take_receipts()
                });
                let receipts = receipts.into_iter().flatten();
                self.receipts.borrow_mut().extend(receipts);
            }
        }
    }

    /// Runs a fault point, at which tests can make this worker fail.
    pub(crate) fn fault(&self, name: &str) {
        self.channel
            .with(|channel| fault::point(name, || Some(Pid::own()), Some(channel)));
    }
}

// Reading frames.
impl WorkerShell {
    /// Reads once from the channel and processes the frames.
    pub(crate) fn receive(&self) -> Received {
        let received = self.channel.receive(&mut self.scratch.borrow_mut());
        let received = received.unwrap_or_else(|reason| {
            self.report(self.channel.broken(reason));
            Received::EndOfFile
        });
        match received {
            Received::Data => {
                self.fault("worker.after_read");
                while self.process_frame() {}
                self.core.borrow_mut().frames_processed();
                self.act();
            }
            Received::EndOfFile => self.channel_closed(),
            Received::Nothing => {}
        }
        received
    }

    /// Processes one frame that has been read. Returns whether more frames may follow.
    fn process_frame(&self) -> bool {
        let processed = match self.channel.next() {
            Ok(None) => return false,
            Ok(Some(arrival)) => {
                let is_last = arrival.is_last;
                self.process(arrival).map(|()| is_last)
            }
            Err(error) => Err(error),
        };
        match processed {
            Ok(is_last) => {
                self.act();
                !is_last
            }
            Err(reason) => {
                let worker = None;
                self.report(Error::Frame { worker, reason });
                self.channel_closed();
                false
            }
        }
    }

    fn process(&self, arrival: Arrival<ToWorker>) -> std::result::Result<(), FrameError> {
        let Arrival {
            frame,
            fds,
            lost_fds,
            is_last: _,
        } = arrival;
        let mut core = self.core.borrow_mut();
        if lost_fds {
            self.report(Error::no_descriptors(None));
            self.back_off();
            if let ToWorker::Reply {
                request,
                result: Ok(bound),
            } = &frame
            {
                return core.listener_fd_lost(*request, bound.handle);
            }
        }
        match frame {
            ToWorker::Message(bytes) => core.message(bytes, fds),
            ToWorker::MoveParked {
                handle,
                times_parked,
            } if !fds.is_empty() => {
                drop(core);
                for connection in fds {
                    self.hold_moved(handle, connection.into_owned_fd(), times_parked);
                }
            }
            ToWorker::Reply { ref result, .. } => {
                // With every policy except round robin, the reply's listener blocks, unless another
                // process has made it non-blocking or it is a borrowed descriptor.
                // `accept_blocking` detects these cases. For a UDP socket, the mode has no effect.
                let mode = match result {
                    Ok(bound) if bound.policy != SchedulingPolicy::RoundRobin => {
                        AcceptMode::Blocking
                    }
                    Ok(_) | Err(_) => AcceptMode::NonBlocking,
                };
                let listener = core.frame(frame)?;
                drop(core);
                let fd = fds.into_iter().next().map(NoLingerFd::into_owned_fd);
                if let (Some(listener), Some(fd)) = (listener, fd) {
                    self.add_shared(listener, fd, mode);
                }
            }
            ToWorker::ListenerClosed { .. } | ToWorker::Disconnect => {
                drop(core);
                self.check_before_leaving();
                self.core.borrow_mut().frame(frame)?;
            }
            ToWorker::MoveParked { .. } => {
                core.frame(frame)?;
            }
        }
        Ok(())
    }

    /// Closes this end of the channel and notifies the core.
    fn channel_closed(&self) {
        let receipts = self.channel.close(Unprocessed::Leave);
        self.receipts.borrow_mut().extend(receipts);
        self.core.borrow_mut().channel_closed();
        self.act();
    }
}

// Waiting for the master.
impl WorkerShell {
    /// Sets whether the poller reports the channel when it is readable. `accept` waits for the
    /// channel separately, and passes `false` so that the channel alone does not make the poller
    /// ready.
    pub(crate) fn watch_channel(&self, watch: bool) -> Result<()> {
        let watched = self.channel.with(|channel| channel.watch_readable(watch));
        let watched = watched.unwrap_or(Ok(()));
        watched.map_err(Error::io("wait for the channel"))
    }

    /// Waits for the channel, the poller, and a listener's socket if there is one. Reads from the
    /// channel if it is readable. Returns whether the poller is ready.
    pub(crate) fn wait(
        &self,
        poller: BorrowedFd<'_>,
        socket: Option<&Socket>,
        timeout: Option<Duration>,
    ) -> Result<bool> {
        let waited = self.channel.with(|channel| match socket {
            None => wait_readable([channel.as_fd(), poller], timeout),
            Some(socket) => {
                let [channel, poller, _] =
                    wait_readable([channel.as_fd(), poller, socket.as_fd()], timeout)?;
                Ok([channel, poller])
            }
        });
        let waited = waited.unwrap_or(Ok([false; 2]));
        let [channel, poller] = waited.map_err(Error::io("wait for a connection"))?;
        if channel {
            self.receive();
        }
        Ok(poller)
    }

    /// Waits until the master has replied to a bind request. No events are delivered in the
    /// meantime. The outer error means that waiting failed; the inner error is the master's reply.
    pub(crate) fn wait_for_reply(
        &self,
        listener: ListenerId,
    ) -> Result<io::Result<Option<SocketAddr>>> {
        loop {
            self.act();
            match self.core.borrow().listen_status(listener) {
                ListenStatus::Done(address) => return Ok(Ok(address)),
                ListenStatus::Failed(errno) => return Ok(Err(io::Error::from_raw_os_error(errno))),
                ListenStatus::Pending => {}
            }
            self.wait_for_channel()?;
        }
    }

    /// Waits until the channel is readable, or writable if frames are queued. If the system lacks
    /// the resources to write them, waits for at most `BACKOFF` instead. Then writes the queued
    /// frames and reads once.
    fn wait_for_channel(&self) -> Result<()> {
        let waited = self.channel.with(|channel| {
            if channel.is_flushed() {
                wait_readable([channel.as_fd()], None).map(drop)
            } else if channel.is_exhausted() {
                wait_readable([channel.as_fd()], Some(BACKOFF)).map(drop)
            } else {
                wait_readable_or_writable(channel.as_fd())
            }
        });
        let waited = waited.unwrap_or(Ok(()));
        waited.map_err(Error::io("wait for the master"))?;
        self.flush_channel();
        self.receive();
        Ok(())
    }

    /// Writes to the channel or reads from it if it is ready. Returns whether the channel was
    /// ready. The caller must repeat the call until it returns false, because a channel that is
    /// ready before `accept_blocking` does not interrupt it.
    pub(crate) fn service_channel(&self) -> Result<bool> {
        let writable = self.channel.with(|channel| {
            // Do not check for space while the system lacks resources, because `tick` retries the
            // write after the back-off delay.
            let can_wait = channel.is_writing() && !channel.is_exhausted();
            can_wait.then(|| is_writable(channel.as_fd()))
        });
        let writable = writable.flatten().unwrap_or(Ok(false));
        if writable.map_err(Error::io("wait for the channel"))? {
            self.flush_channel();
            return Ok(true);
        }
        Ok(self.receive() != Received::Nothing)
    }
}
