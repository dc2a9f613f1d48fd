//! Simulates how the master writes to a worker, reads from it, and sends a signal to it.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use crate::core::master::Attachment;
use crate::error::Error;
use crate::sim::kernel::process::{Detached, Parcel, ProcessState};
use crate::sim::kernel::socket::{Client, Connection, Fate, Location, Queue};
use crate::sim::kernel::{BACKOFF, Failure, KNOWN, MasterInput, World};
use crate::types::errno;
use crate::types::handle::HandleId;
use crate::types::signal::Signal;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Arrival;
use crate::wire::frame::{ToMaster, ToWorker};

impl World {
    pub(super) fn send(&mut self, worker: WorkerId, frame: ToWorker, attachment: Attachment) {
        if let (
            ToWorker::Reply { request, .. },
            Attachment::Listener(handle) | Attachment::Queue(handle),
        ) = (&frame, attachment)
        {
            assert!(!self.port(handle).is_unbound());
            if self.failing.remove(&Failure::Share) {
                self.unshared.insert((handle, worker));
                let (request, error) = (*request, errno::EMFILE);
                return self.report(|core| core.share_failed(handle, worker, request, error));
            }
        }
        if let Attachment::Queue(handle) = attachment {
            self.unshared.remove(&(handle, worker));
            let previous = self.queues.insert((handle, worker), Queue::default());
            assert!(previous.is_none(), "a second queue for one worker");
        }
        let process = self.process(worker);
        assert!(process.master_end, "send on a closed channel");
        process.counters.answers += 1;
        process.down.queue(frame, attachment);
        self.unflushed.insert(worker);
    }

    /// Writes one frame to a worker. If the frame carries a descriptor and `failing` contains
    /// `Send`, nothing is written. If `failing` contains `Receive`, the descriptor is lost.
    pub(crate) fn master_writes(&mut self, worker: WorkerId) {
        let now = self.now;
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if !process.master_end || process.master_backoff > now {
            return;
        }
        if !process.worker_end || process.is_shut {
            return process.down.close_writer();
        }
        let carries = |parcel: &Parcel<_>| !matches!(parcel.attachment, Attachment::None);
        let first = process.down.outbox.front();
        if first.is_some_and(carries) && self.failing.remove(&Failure::Send) {
            process.master_backoff = now + BACKOFF;
            // 109 is ETOOMANYREFS on most targets: too many descriptors are in flight.
            let reason = io::Error::from_raw_os_error(109);
            let worker = Some(worker);
            return self.report(|core| core.error(worker, Error::Exhausted { worker, reason }));
        }
        let failing = &mut self.failing;
        let written = process.down.write(|parcel| {
            if carries(parcel) && failing.remove(&Failure::Receive) {
                parcel.attachment = Attachment::None;
                parcel.lost_fd = true;
            }
        });
        if written {
            self.unflushed.insert(worker);
        }
    }

    /// Requests that the master write to a worker, if frames are queued and the channel has space.
    pub(crate) fn flush(&mut self, worker: WorkerId) {
        if self.process(worker).down.can_write() {
            self.unflushed.insert(worker);
        }
    }

    /// Reads and processes one frame from a worker. Returns whether there was a frame.
    pub(crate) fn master_reads(&mut self, worker: WorkerId) -> bool {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if !process.master_end {
            return false;
        }
        let arrival = match &mut process.inbox {
            Some(inbox) => inbox.next().transpose(),
            None => process.up.wire.pop_front().map(|parcel| {
                process.to_park.extend(parcel.connection);
                parcel.frame.map(|frame| Arrival {
                    frame,
                    fds: Vec::new(),
                    lost_fds: false,
                    is_last: process.up.wire.is_empty(),
                })
            }),
        };
        match arrival {
            None => return false,
            Some(Ok(arrival)) => self.process_frame(worker, arrival),
            Some(Err(error)) => {
                self.report(|core| core.violation(worker, error));
                assert!(!self.master.is_connected(worker));
            }
        }
        true
    }

    /// Reads one frame from a worker, or the end of its channel. Returns whether there was a frame.
    pub(crate) fn master_receives(&mut self, worker: WorkerId) -> bool {
        let has_read = self.master_reads(worker);
        let process = &self.processes[&worker];
        let is_over = !process.worker_end || process.is_shut;
        if !has_read && process.master_end && is_over {
            self.handle(MasterInput::End(worker));
        }
        has_read
    }

    fn process_frame(&mut self, worker: WorkerId, arrival: Arrival<ToMaster>) {
        let Arrival {
            frame,
            fds,
            lost_fds,
            ..
        } = arrival;
        if lost_fds {
            let worker = Some(worker);
            self.report(|core| core.error(worker, Error::no_descriptors(worker)));
        }
        self.process(worker).counters.frames += 1;
        if let ToMaster::Idle {
            handle, received, ..
        } = frame
        {
            self.check_claim(handle, worker, received);
        }
        match frame {
            ToMaster::Message(bytes) => self.report(|core| core.message(worker, bytes, fds)),
            ToMaster::Park {
                handle,
                times_parked,
            } => {
                let is_lost = self.processes[&worker].is_raw() && fds.is_empty();
                self.read_parked(worker, handle, times_parked, is_lost);
            }
            frame @ (ToMaster::Online
            | ToMaster::Listen { .. }
            | ToMaster::Listening { .. }
            | ToMaster::Idle { .. }
            | ToMaster::Release { .. }
            | ToMaster::DisconnectRequest
            | ToMaster::Pause { .. }
            | ToMaster::ParkAgain { .. }
            | ToMaster::Detach { .. }) => {
                self.note_report(worker, &frame);
                self.report(|core| core.frame(worker, frame));
            }
        }
    }

    /// Reads a connection that a worker parks. If the connection `is_lost`, or `failing` contains
    /// `Park`, the master has no free descriptor number for it.
    fn read_parked(
        &mut self,
        worker: WorkerId,
        handle: HandleId,
        times_parked: u32,
        is_lost: bool,
    ) {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let connection = process.to_park.pop_front();
        if self.failing.remove(&Failure::Park) || is_lost {
            let error = Error::no_descriptors(Some(worker));
            self.report(|core| core.error(Some(worker), error));
            let frame = ToMaster::Park {
                handle,
                times_parked,
            };
            return self.report(|core| core.frame(worker, frame));
        }
        assert!(connection.is_some() || process.is_liar, "parks nothing");
        let connection = connection.unwrap_or_else(|| self.own_connection());
        let user = self.process(worker).user;
        let fate = &mut self.fates[connection.client as usize];
        fate.is_in_worker = false;
        fate.had_by = Some(user);
        self.check_surplus();
        self.report(|core| core.park(worker, handle, connection, times_parked));
    }

    /// Returns a connection to a client that is a worker itself. The client has sent something.
    fn own_connection(&mut self) -> Client {
        let client = u32::try_from(self.fates.len()).expect("few clients");
        self.served += 1;
        self.fates.push(Fate {
            served: true,
            has_sent: true,
            is_pending: client % 2 == 0,
            left: client % 8 == 7,
            ..Fate::default()
        });
        Connection::new(client, &self.closed)
    }

    /// Records a worker's report about a connection that the master holds, before the master
    /// processes the report.
    fn note_report(&mut self, worker: WorkerId, frame: &ToMaster) {
        let (ToMaster::Detach { connection } | ToMaster::ParkAgain { connection }) = frame else {
            return;
        };
        let queues = self.queues.iter();
        let own = queues.filter(|((_, of), _)| *of == worker);
        let mut queued = own.flat_map(|(_, queue)| &queue.connections);
        let is_early = queued.any(|queued| {
            let id = queued.resumed.map(|resumed| resumed.connection);
            id == Some(*connection)
        });
        self.early_reports += u64::from(is_early);
        let held = self.held.get_mut(connection);
        let held = held.filter(|held| held.location == Location::Worker(worker));
        if let (ToMaster::Detach { .. }, Some(held)) = (frame, held) {
            held.location = Location::Detached;
        }
    }

    pub(crate) fn master_reads_end(&mut self, worker: WorkerId) {
        self.process(worker).close_master_end();
        self.report(|core| core.channel_closed(worker));
    }

    /// Closes a worker's channel, as the shell does. The master first processes the frames that the
    /// worker has written, until it has read all of them or has disconnected the worker.
    pub(super) fn close_channel(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        process.is_shut = true;
        process.down.close_writer();
        while self.master_reads(worker) && self.master.is_connected(worker) {}
        self.master_reads_end(worker);
    }

    pub(super) fn signal(&mut self, worker: WorkerId, signal: Signal) {
        let status = ExitStatus::from_raw(signal.number());
        if let Some(detached) = self.detached.get(&worker) {
            let may_signal = self.signalled.contains(&worker);
            assert!(may_signal, "a signal that the application did not send");
            match detached {
                Detached::Running | Detached::Zombie(_) => self.end_detached(worker, status),
                Detached::Reaped(_) | Detached::Gone => panic!("signal to a reaped pid"),
            }
            return;
        }
        let process = self.process(worker);
        assert!(!process.is_reaped(), "signal to a reaped pid");
        match &mut process.state {
            // A raw worker ignores signals, because the driver decides when it exits.
            _ if process.inbox.is_some() => {}
            ProcessState::Stopped { pending } if signal != Signal::KILL => *pending = Some(signal),
            ProcessState::Running | ProcessState::Stopped { .. } => self.exit(worker, status),
            ProcessState::Zombie(_) | ProcessState::Reaped(_) => {}
        }
    }
}
