//! Carries out the decisions of [`MasterCore`] on real processes, channels and listeners. The shell
//! never calls the application.
//!
//! This file contains the shell's state, the core's actions, and retries. Each of the other files
//! handles one kind of object, such as channels or queues. Methods for the application belong in
//! `master`, and decisions in `core`.

mod abandon;
mod channels;
mod group;
mod listeners;
mod parked;
mod passing;
mod queues;
mod reap;
mod spawn;

pub(crate) use channels::Processed;
pub(crate) use listeners::RetainedListener;
pub(crate) use spawn::{StartMain, start_main};

use std::any::Any;
use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::{Rc, Weak};
use std::time::Instant;

use crate::core::master::event::ExitReport;
use crate::core::master::{Action, MasterCore};
use crate::error::Error;
use crate::runtime::backoff::Backoff;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::sys::process::{Pid, Unreaped, Usage};
use crate::sys::queue::Queue;
use crate::sys::shared_number::SharedNumber;
use crate::sys::signal_mask::SignalSet;
use crate::types::handle::HandleId;
use crate::types::ordered_set::OrderedSet;
use crate::types::policy::SchedulingPolicy;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::channel::Channel;
use crate::wire::driver::ChannelDriver;
use crate::wire::fault;
use crate::wire::frame::{ToMaster, ToWorker};
use crate::wire::message::UnclaimedFds;
use crate::wire::receipts::Receipt;
use group::GroupState;
use listeners::MasterSocket;
use parked::HeldConnections;
use passing::{Successor, ToPass};

pub(crate) type Core = MasterCore<NoLingerFd, Vec<NoLingerFd>>;

/// Number of waiting connections that are checked for a hang-up in each iteration of the loop.
///
/// A higher number makes an iteration slower while connections wait: with 8, an iteration takes 5
/// µs instead of 0.8 µs (`cargo bench -- scaling`). With a lower number, connections whose clients
/// have hung up stay in the master for longer.
const SWEEP: usize = 2;

/// A worker or detached process, and the descriptors that connect the master with it.
#[derive(Debug)]
pub(crate) struct WorkerIo {
    pub(crate) id: WorkerId,
    pub(crate) pid: Pid,
    /// The channel to the worker. For a detached process, the channel is closed from the start.
    channel: ChannelDriver<ToMaster, ToWorker>,
    /// The master's end of the worker's disconnect token. `None` after the worker was notified of
    /// its disconnect, and for a detached process.
    disconnect_notifier: RefCell<Option<UnixStream>>,
    /// One more than the number of connections that the worker's application holds. 0 until the
    /// worker has called `init`. `None` if the system does not support shared numbers.
    in_service: Option<SharedNumber>,
    /// The process descriptor. It is readable once the process has exited. `None` if the kernel has
    /// no process descriptors, or after the process has been reaped. While the process has exited
    /// but cannot be reaped, the descriptor is not watched.
    process: RefCell<Option<Registered<OwnedFd>>>,
    /// The master's ends of the worker's pipes, by the worker's descriptor number.
    pub(crate) stdio: RefCell<SortedMap<usize, UnixStream>>,
    /// The resources that the process used. `None` until the process has exited, or if the usage is
    /// unknown.
    pub(crate) usage: Cell<Option<Usage>>,
    /// The worker's exit. `None` until the master delivers the `exit` event.
    pub(crate) exit_report: Cell<Option<ExitReport>>,
    group: Cell<GroupState>,
}

impl WorkerIo {
    /// Returns the number of connections that the worker's application has open, if it is known.
    pub(crate) fn in_service(&self) -> Option<u64> {
        let value = self.in_service.as_ref()?.get();
        value.checked_sub(1).map(u64::from)
    }

    /// Returns whether the last read filled its buffer. In that case the channel may hold more
    /// data.
    pub(crate) fn has_more(&self) -> bool {
        self.channel.with(|channel| channel.has_more()) == Some(true)
    }
}

#[derive(Debug)]
pub(crate) struct MasterShell {
    pub(crate) core: RefCell<Core>,
    poller: Poller,
    start: Instant,
    /// The signals that were ignored when the master was created. Workers ignore them too.
    pub(crate) ignored_signals: SignalSet,
    workers: RefCell<SortedMap<WorkerId, Rc<WorkerIo>>>,
    unreaped: Unreaped,
    sockets: RefCell<SortedMap<HandleId, MasterSocket>>,
    /// The queues from which workers receive their connections.
    queues: RefCell<SortedMap<(HandleId, WorkerId), Queue>>,
    held: RefCell<HeldConnections>,
    /// The master that takes over from this one, while connections can be passed to it.
    successor: RefCell<Option<Successor>>,
    /// The number of masters that may pass connections to this one.
    predecessors: Cell<usize>,
    /// The workers whose channels must be flushed. A worker may occur more than once.
    unflushed: RefCell<VecDeque<WorkerId>>,
    retries: RefCell<Retries>,
    /// The receipts that have not been delivered to the application.
    receipts: RefCell<VecDeque<(WorkerId, Receipt)>>,
    /// The workers with unprocessed frames in memory. Frames stay unprocessed if the worker has
    /// reached `FRAMES_PER_ITERATION`, or if the last processed frame was slow to handle
    /// (`Processed::Yield`).
    pending: RefCell<OrderedSet<WorkerId>>,
    /// The workers whose channels have queued frames that can still be written.
    writing: RefCell<OrderedSet<WorkerId>>,
    /// The processes without a channel and without a process descriptor. Only SIGCHLD reports their
    /// exits.
    sigchld_only: RefCell<OrderedSet<WorkerId>>,
    /// The master's values in a worker that executes no program. The values are never dropped,
    /// because dropping them could affect the master. The values stay reachable, so that a leak
    /// checker reports only real leaks.
    abandoned: RefCell<Vec<ManuallyDrop<Box<dyn Any>>>>,
    /// Whether the application's closure that chooses the inspect port is running.
    is_choosing_port: Cell<bool>,
    /// The descriptors of the message that is being delivered to the application.
    pub(crate) delivering_fds: RefCell<Weak<UnclaimedFds>>,
    /// The buffer into which all channels read.
    scratch: RefCell<Vec<u8>>,
}

/// The steps that are tried again after the back-off delay, all at the same time.
#[derive(Debug, Default)]
struct Retries {
    /// The channels that must be flushed.
    channels: OrderedSet<WorkerId>,
    /// The queues that must be closed and may still contain connections.
    queues: Vec<(HandleId, WorkerId)>,
    /// The workers whose process descriptors must be watched again. Either watching has failed, or
    /// the worker has exited and must not be reaped yet: another process, such as a debugger, traces
    /// it, or its group is draining. The descriptor of such a worker stays readable, so it is not
    /// watched until the retry.
    processes: Vec<WorkerId>,
    backoff: Backoff,
}

impl MasterShell {
    /// Returns the shell of a new master. `start` is the origin of [`Time`].
    pub(crate) fn new(policy: SchedulingPolicy, poller: Poller, start: Instant) -> Self {
        let mut core = MasterCore::new(policy);
        // Leave the other half of the descriptors to the application and to connections on their
        // way to workers.
        let limit = usize::try_from(sys::fd::limit()).unwrap_or(usize::MAX);
        core.set_parked_limit(limit / 2);
        Self {
            core: RefCell::new(core),
            poller,
            start,
            ignored_signals: sys::signal::ignored(),
            workers: RefCell::default(),
            unreaped: Unreaped::default(),
            sockets: RefCell::default(),
            queues: RefCell::default(),
            held: RefCell::default(),
            successor: RefCell::default(),
            predecessors: Cell::new(0),
            unflushed: RefCell::default(),
            retries: RefCell::default(),
            receipts: RefCell::default(),
            pending: RefCell::default(),
            writing: RefCell::default(),
            sigchld_only: RefCell::default(),
            abandoned: RefCell::default(),
            is_choosing_port: Cell::new(false),
            delivering_fds: RefCell::default(),
            scratch: RefCell::default(),
        }
    }

    /// Returns the core, with its clock set to the current time.
    pub(crate) fn core_now(&self) -> RefMut<'_, Core> {
        let mut core = self.core.borrow_mut();
        core.set_time(self.start.elapsed());
        core
    }

    /// Checks that this process created the master.
    ///
    /// # Errors
    ///
    /// Returns [`Error::ForeignProcess`] in another process, for instance in a forked child.
    pub(crate) fn check_own(&self) -> crate::error::Result<()> {
        if self.poller.is_own() {
            Ok(())
        } else {
            Err(Error::ForeignProcess)
        }
    }

    pub(crate) fn worker_io(&self, worker: WorkerId) -> Option<Rc<WorkerIo>> {
        self.workers.borrow().get(&worker).map(Rc::clone)
    }

    /// Removes a process from the table after its last event has been delivered, and closes its
    /// pipes.
    pub(crate) fn forget(&self, worker: WorkerId) {
        self.sigchld_only.borrow_mut().remove(worker);
        if let Some(worker_io) = self.workers.borrow_mut().remove(&worker) {
            worker_io.stdio.take();
        }
    }

    /// Reports an error that concerns no worker.
    fn report_io(&self, attempt: &'static str, reason: std::io::Error) {
        let error = Error::Io { attempt, reason };
        self.core.borrow_mut().error(None, error);
    }

    /// Runs a fault point, at which tests can make `worker` fail. Nothing happens if `worker` is
    /// the master's first worker, so that tests always have a worker that serves.
    fn fault(&self, name: &str, worker: WorkerId) {
        let foreign: Option<&Channel<ToMaster, ToWorker>> = None;
        let pid = || {
            let worker_io = self.worker_io(worker)?;
            (worker_io.id.get() > 1).then_some(worker_io.pid)
        };
        fault::point(name, pid, foreign);
    }

    /// Returns the time by which `tick` must be called.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let retry = self.retries.borrow().backoff.deadline();
        let due = earlier(self.core.borrow().deadline(), retry);
        earlier(due, self.passing_deadline())
    }

    /// Carries out the retries that are due, advances the core's clock, and checks some of the
    /// waiting connections for a hang-up. Returns whether there may be new actions or events.
    ///
    /// `due` is the result of `deadline`. The core must not have changed since that call.
    pub(crate) fn tick(&self, due: Option<Time>) -> bool {
        // Return early, because usually no deadline is set and no connection waits.
        if due.is_none() && !self.core.borrow().has_waiting() {
            return false;
        }
        let now = self.start.elapsed();
        if self.retries.borrow().backoff.is_due(now) {
            self.retry();
        }
        self.tick_passing(now);
        let mut core = self.core.borrow_mut();
        core.set_time(now);
        if due.is_some_and(|due| due <= now) {
            for id in core.closing_at(now) {
                self.check_client(&mut core, id);
            }
            core.tick(now);
        }
        if core.has_waiting() {
            core.sweep(SWEEP, |connection| self.is_gone(connection));
        }
        true
    }

    fn retry(&self) {
        let retries = self.retries.take();
        self.unflushed.borrow_mut().extend(retries.channels.iter());
        for (handle, worker) in retries.queues {
            self.close_queue(handle, worker);
        }
        for worker in retries.processes {
            self.watch_exit(worker);
        }
    }

    /// Carries out all actions and flushes the channels. The method calls no callbacks.
    pub(crate) fn act(&self) {
        if self.core.borrow().has_actions() || !self.unflushed.borrow().is_empty() {
            self.carry_out_actions();
        }
    }

    /// Carries out the actions and flushes the channels. The method is separate from `act` and not
    /// inlined, so that `act` stays small. `act` is called several times for each message and
    /// usually finds nothing to do.
    #[inline(never)]
    fn carry_out_actions(&self) {
        // Carry nothing out in a forked child, because all actions concern the process that created
        // the master.
        while self.poller.is_own() {
            let action = self.core.borrow_mut().next_action();
            match action {
                Some(action) => self.carry_out(action),
                None if self.unflushed.borrow().is_empty() && !self.pass_next() => break,
                None => self.flush(),
            }
        }
    }

    fn carry_out(&self, action: Action<NoLingerFd>) {
        match action {
            Action::Send {
                worker,
                frame,
                attachment,
            } => self.send_frame(worker, &frame, attachment),
            Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            } => self.dispatch(handle, worker, connection, has_waited),
            Action::Hold { id, connection } => self.hold(id, connection),
            Action::AwaitData { id } => self.await_data(id),
            Action::Pass {
                id,
                handle,
                history,
                connection,
            } => self.pass(
                ToPass {
                    id,
                    handle,
                    history,
                },
                connection,
            ),
            Action::CloseHeld { id } => self.close_held(id),
            Action::MoveParked {
                handle,
                worker,
                connection,
                history,
            } => self.move_parked(handle, worker, connection, history),
            Action::Reclaim {
                handle,
                worker,
                at_most,
            } => self.reclaim(handle, worker, at_most),
            Action::CountQueued { handle, worker } => self.count(handle, worker),
            Action::CloseQueue { handle, worker } => self.close_queue(handle, worker),
            Action::Bind {
                handle,
                endpoint,
                flags,
                policy,
            } => self.bind_for_worker(handle, &endpoint, &flags, policy),
            Action::BindShard {
                handle,
                flags,
                worker,
                request,
            } => self.bind_shard_for_worker(handle, &flags, worker, request),
            Action::SelectShards { handle, shards } => self.select_shards(handle, &shards),
            Action::Unblock { handle, shard } => self.unblock(handle, shard),
            Action::Watch { handle } => self.set_interest(handle, Some(Interest::Readable)),
            Action::Unwatch { handle } => self.set_interest(handle, None),
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            Action::DeferAccept { handle, seconds } => self.defer_accept(handle, seconds),
            Action::RemoveFile { handle } => self.remove_file(handle),
            Action::AttachSynFilter { handle } => self.attach_syn_filter(handle),
            Action::DetachSynFilter { handle } => self.detach_syn_filter(handle),
            Action::WatchHangUp { handle } => self.watch_hang_up(handle),
            Action::StopListening { handle } => self.stop_listening(handle),
            Action::Unbind { handle } => self.unbind(handle),
            Action::CloseChannel { worker } => self.close_channel(worker),
            Action::DiscardChannel { worker } => self.drop_channel(worker),
            Action::Signal { worker, signal } => self.signal(worker, signal),
        }
    }

    fn signal(&self, worker: WorkerId, signal: Signal) {
        if let Some(worker_io) = self.worker_io(worker) {
            let process = worker_io.process.borrow();
            let process = process.as_ref().map(|process| process.as_fd());
            match worker_io.pid.signal(process, signal.number()) {
                // Without CAP_KILL, the kernel refuses signals to another user's process (kill(2)).
                // Nothing else would tell the application why its worker does not end.
                Err(reason) if reason.kind() == std::io::ErrorKind::PermissionDenied => {
                    let attempt = "send a signal to a worker";
                    let error = Error::Io { attempt, reason };
                    self.core.borrow_mut().error(Some(worker), error);
                }
                // If the process has exited, its process descriptor or SIGCHLD reports the exit.
                Err(_) | Ok(()) => {}
            }
            self.leader_signalled(&worker_io, signal);
        }
    }
}
