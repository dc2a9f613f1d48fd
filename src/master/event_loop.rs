//! The loop of the master: timers, the application's own descriptors, and the delivery of events.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::core::event::{EmittedEvent, Event, ExitReport, Level};
use crate::error::{Error, Result, WatchError};
use crate::master::Master;
use crate::master::shell::{Processed, WorkerIo};
use crate::master::worker_process::WorkerProcess;
use crate::runtime::event_loop::{LoopId, Token, WatchId};
use crate::runtime::timers::TimerId;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{Interest, Ready, ReadyList};
use crate::types::message::Message;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::HandleId;
use crate::wire::receipts::Receipt;

/// How many events are delivered before the loop polls again. Without a limit, a callback for errors
/// that causes another error each time would keep the loop from everything else. A lower limit costs more
/// polls in a burst of events.
const EVENTS_PER_ITERATION: u32 = 1024;
/// How often the channel of an exited worker is read before its exit is reported. This is more often
/// than it takes to empty a socket, so the limit is reached only if children of the worker go on writing.
const FINAL_READS_MAX: u32 = 64;
/// How often to check for exits that nothing reports. A longer interval delays `exit` events; a shorter one
/// wakes an idle master more often.
const EXIT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often one worker's channel is read in one iteration, if each read fills the buffer. More reads
/// delay the other workers; fewer cost more polls while one worker sends much.
const READS_PER_ITERATION: u32 = 4;
/// How many frames of one worker are processed in one iteration. More frames delay the other workers; with
/// fewer, a busy worker needs more iterations.
const FRAMES_PER_ITERATION: u32 = 64;

/// The loop: timers, the application's own descriptors, and waiting.
impl Master {
    /// Calls back once, after the time `after`.
    ///
    /// Node: `setTimeout`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// master.set_timeout(Duration::from_secs(2), |_| println!("two seconds later"));
    /// # }
    /// ```
    #[doc(alias = "setTimeout")]
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.event_loop.set_timeout(after, callback)
    }

    /// Calls back repeatedly, each time after `every` has passed; at least 1 ms. If the application is
    /// late, calls are skipped.
    ///
    /// Node: `setInterval`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// master.set_interval(Duration::from_secs(1), |master| println!("{:?}", master.ledger()));
    /// # }
    /// ```
    #[doc(alias = "setInterval")]
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.event_loop.set_interval(every, callback)
    }

    /// Cancels a timer. Nothing happens if it has ended already.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// let timer = master.set_timeout(Duration::from_secs(2), |_| println!("too late"));
    /// master.on_listening(move |master, _, _| master.clear_timer(timer));
    /// # }
    /// ```
    #[doc(alias = "clearTimeout")]
    #[doc(alias = "clearInterval")]
    pub fn clear_timer(&self, timer: TimerId) {
        self.event_loop.clear_timer(timer);
    }

    /// Watches a descriptor of the application in the master's loop. See
    /// [`Worker::watch`](crate::Worker::watch), which is the same, for an example.
    ///
    /// Node has no counterpart; there, everything is in the loop.
    ///
    /// # Errors
    ///
    /// [`WatchError`] returns the source with an [`Error::Io`] if the descriptor is of a kind that cannot
    /// be waited for, such as a file. The operator `?` converts it into an [`Error`] and drops the
    /// source.
    pub fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&Self, &S) -> Option<Interest> + 'static,
    ) -> std::result::Result<WatchId, WatchError<S>> {
        self.event_loop.watch(source, interest, callback)
    }

    /// Ends a watch, and drops its source. Nothing happens if the watch has ended already.
    ///
    /// Node has no counterpart. See [`Worker::watch`](crate::Worker::watch) for an example.
    pub fn unwatch(&self, watch: WatchId) {
        self.event_loop.unwatch(watch);
    }

    /// Lets [`run`](Self::run) return although a timer or watch exists. Nothing happens if the timer or
    /// watch has ended already.
    ///
    /// Node: `timer.unref()` and `socket.unref()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// let report = master.set_interval(Duration::from_secs(1), |_| println!("still here"));
    /// master.unreference(report);
    /// master.fork()?;
    /// master.run() // returns when the worker has exited
    /// # }
    /// ```
    #[doc(alias = "unref")]
    pub fn unreference(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), false);
    }

    /// Undoes [`unreference`](Self::unreference), which has an example.
    ///
    /// Node: `timer.ref()` and `socket.ref()`.
    #[doc(alias = "ref")]
    pub fn reference(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), true);
    }

    /// Runs the loop until nothing is left to wait for: no worker, no timer, no watch, no event to
    /// deliver, and no message to write.
    ///
    /// Callbacks for signals, retained listeners, and what has been released with `unreference` do not
    /// count. A [detached](crate::Settings::detached) process counts only after
    /// [`Process::reference`](crate::Process::reference).
    ///
    /// Node: the process runs on after the main program, and exits when nothing is left to wait for.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`] if a callback calls it;
    /// - [`Error::Io`] if the system refuses to wait.
    ///
    /// See [`Master`] for an example.
    pub fn run(&self) -> Result<()> {
        drop(self.event_loop.enter()?);
        while self.has_work() {
            self.dispatch(None)?;
        }
        Ok(())
    }

    fn has_work(&self) -> bool {
        let workers = self.shell.core.borrow().has_workers();
        let busy = workers || self.has_notifications() || self.event_loop.has_work();
        busy || self.shell.is_writing()
    }

    /// Whether there is something to deliver to the application.
    fn has_notifications(&self) -> bool {
        let unscheduled = self.shell.core.borrow().has_unscheduled();
        let pending = &self.callbacks.all_disconnected_pending;
        unscheduled || self.shell.has_notifications() || !pending.borrow().is_empty()
    }

    /// Runs one iteration of the loop: waits until something happens or `timeout` has passed, handles it,
    /// and calls back. `None` waits without a limit; zero does not wait.
    ///
    /// This is for applications with a loop of their own. They wait until [`as_fd`](Self::as_fd) is
    /// readable, for at most [`time_left`](Self::time_left), and then call this with a timeout of zero.
    ///
    /// Node has no counterpart.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// master.dispatch(Some(Duration::ZERO))?;
    /// # Ok(()) }
    /// ```
    pub fn dispatch(&self, timeout: Option<Duration>) -> Result<()> {
        let event_loop = &self.event_loop;
        let _running = event_loop.enter()?;
        let due = self.shell.deadline();
        let limit = self.time_until(due);
        let mut ready = ReadyList::new();
        let ready = event_loop.wait(earlier(limit, timeout), &mut ready)?;
        let pending = self.shell.pending();
        // Without a limit, nothing is pending.
        if self.shell.tick(due) || limit.is_some() {
            self.settle();
        }
        for worker in pending {
            // One by one, so that the rest is processed later if a callback panics.
            if self.shell.remove_pending(worker) {
                if let Some(worker_io) = self.shell.worker_io(worker) {
                    let mut left = FRAMES_PER_ITERATION;
                    self.process_frames(&worker_io, &mut left);
                }
                self.settle();
            }
        }
        for (token, ready) in ready {
            // A callback may have returned in a child that it forked.
            event_loop.check_own()?;
            match token {
                Token::Channel(number) => self.channel_ready(WorkerId::new(number), ready),
                Token::Process(number) => self.process_ready(WorkerId::new(number)),
                Token::Listener(number) => self.shell.listener_ready(HandleId(number)),
                Token::Selector(number) => self.shell.selector_ready(HandleId(number)),
                Token::Watch(number) => event_loop.watch_ready(self, number),
                Token::Signals => self.signals_ready(),
            }
            self.settle();
        }
        for worker in self.take_possible_exits() {
            self.process_ready(worker);
            self.settle();
        }
        event_loop.fire_timers(self, || self.settle());
        Ok(())
    }

    /// Returns how long the application may wait before it calls [`dispatch`](Self::dispatch), even if
    /// [`as_fd`](Self::as_fd) is not readable: `None` for any time, zero if events are pending.
    ///
    /// Node has no counterpart. Every call of another method may change it, so call it last.
    ///
    /// ```no_run
    /// # fn wait(_: std::os::fd::BorrowedFd<'_>, _: Option<std::time::Duration>) {}
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::{os::fd::AsFd, time::Duration};
    ///
    /// loop {
    ///     wait(master.as_fd(), master.time_left());
    ///     master.dispatch(Some(Duration::ZERO))?;
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        self.time_until(self.shell.deadline())
    }

    /// As `time_left`, if the shell has something to do at `due`.
    fn time_until(&self, due: Option<Time>) -> Option<Duration> {
        if self.has_notifications() || self.reap.get() || self.shell.has_pending() {
            return Some(Duration::ZERO);
        }
        let check = self.has_unwatched_exits().then_some(EXIT_CHECK_INTERVAL);
        earlier(check, self.event_loop.time_left(due))
    }

    /// Whether a worker may exit without any report. It cannot where processes have descriptors.
    fn has_unwatched_exits(&self) -> bool {
        self.child_signal.borrow().is_some() && self.shell.has_unwatched_exits()
    }

    /// Returns the workers that may have exited, where processes have no descriptors: all of them after
    /// SIGCHLD, and from time to time those whose exit nothing reports.
    fn take_possible_exits(&self) -> Vec<WorkerId> {
        if self.reap.take() {
            return self.shell.unwatched();
        }
        let last_check = self.last_exit_check.get();
        if !self.has_unwatched_exits() || last_check.elapsed() < EXIT_CHECK_INTERVAL {
            return Vec::new();
        }
        self.last_exit_check.set(Instant::now());
        self.shell.unwatched_exits()
    }
}

/// The descriptor that is readable when [`dispatch`](Master::dispatch) has something to do.
impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event_loop.as_fd()
    }
}

/// Decisions and events.
impl Master {
    /// Carries out the core's decisions.
    fn act(&self) {
        self.shell.act();
        if self.shell.core.borrow().has_unscheduled() {
            self.schedule();
        }
    }

    /// Asks the application's scheduler for the workers of the accepted connections.
    fn schedule(&self) {
        loop {
            // Not borrowed during the call, because the closure may set another scheduler.
            let scheduler = self.scheduler.borrow().clone();
            let Some(scheduler) = scheduler else {
                return;
            };
            let core = self.shell.core.borrow();
            let Some((handle, place, connection)) = core.unscheduled() else {
                return;
            };
            let peer = sys::listen::peer_addr(connection.as_fd());
            let candidates = core.candidates(handle);
            drop(core);
            // The scheduler may re-enter the loop; skip it if it is already running.
            let chosen = scheduler.try_borrow_mut();
            let chosen = chosen.ok().and_then(|mut choose| choose(peer, &candidates));
            self.shell.core.borrow_mut().choose(handle, place, chosen);
            self.shell.act();
        }
    }

    /// Carries out the core's decisions and calls the application until nothing is left to do.
    fn settle(&self) {
        self.act();
        for _ in 0..EVENTS_PER_ITERATION {
            if self.event_loop.check_own().is_err() {
                break;
            }
            let pending = &self.callbacks.all_disconnected_pending;
            let next = pending.borrow_mut().pop_front();
            if let Some(id) = next {
                self.callbacks.all_disconnected.call(id, |f| f(self));
                self.act();
                continue;
            }
            self.deliver_receipts();
            let emit = self.shell.core.borrow_mut().next_event();
            let Some(emit) = emit else {
                break;
            };
            self.deliver(emit);
            self.act();
        }
    }

    /// Reports which messages have been written or lost. Receipts that arise meanwhile wait for the next
    /// call, because they could delay events for ever.
    fn deliver_receipts(&self) {
        for _ in 0..self.shell.count_receipts() {
            if let Some((worker, receipt)) = self.shell.next_receipt() {
                self.deliver_receipt(worker, receipt);
                self.shell.act();
            }
        }
    }

    fn deliver_receipt(&self, worker: WorkerId, receipt: Receipt) {
        let found = self.find(worker);
        let callback = found.and_then(|worker| worker.callbacks().receipts.take(receipt.id));
        if let Some(callback) = callback {
            callback(self, receipt.outcome(Some(worker)));
        }
    }

    fn deliver(&self, emit: EmittedEvent<Vec<NoLingerFd>>) {
        let worker = emit.worker.and_then(|id| self.find(id));
        match (emit.event, worker) {
            (Event::Setup, _) => {
                let settings = self.settings();
                self.callbacks.setup.each(|f| f(self, &settings));
            }
            (Event::Disconnected, _) => {
                let ids = self.callbacks.all_disconnected.ids();
                let pending = &self.callbacks.all_disconnected_pending;
                pending.borrow_mut().extend(ids);
            }
            (Event::Error(error), worker) => {
                self.deliver_error(emit.level, worker.as_ref(), &error)
            }
            (event, Some(worker)) => self.deliver_worker_event(emit.level, &worker, event),
            (_, None) => {}
        }
    }

    fn deliver_error(&self, level: Level, worker: Option<&WorkerProcess>, error: &Error) {
        let callbacks = match (level, worker) {
            (Level::Cluster, _) => &self.callbacks.workers,
            (Level::Worker, Some(worker)) => worker.callbacks(),
            (Level::Worker, None) => return,
        };
        callbacks.error.each(|f| f(self, worker, error));
    }

    fn deliver_worker_event(
        &self,
        level: Level,
        worker: &WorkerProcess,
        event: Event<Vec<NoLingerFd>>,
    ) {
        let callbacks = match level {
            Level::Worker => worker.callbacks(),
            Level::Cluster => &self.callbacks.workers,
        };
        match event {
            Event::Fork => self.callbacks.fork.each(|f| f(self, worker)),
            Event::Online => {
                if level == Level::Cluster {
                    self.log(format_args!("Worker {} online", worker.process().id()));
                }
                callbacks.online.each(|f| f(self, worker));
            }
            Event::Listening(address) => {
                callbacks.listening.each(|f| f(self, worker, &address));
            }
            Event::Message { bytes, fds } => {
                let message = Message::new(bytes, fds);
                if let Some(untaken) = message.unclaimed_fds() {
                    *self.shell.delivering_fds.borrow_mut() = std::rc::Rc::downgrade(untaken);
                }
                callbacks.message.each(|f| f(self, worker, &message));
                let own = &worker.callbacks().message;
                own.each(|f| f(self, worker, &message));
            }
            Event::Disconnect => callbacks.disconnect.each(|f| f(self, worker)),
            Event::Exit(exit_report) => {
                worker.set_exit_report(exit_report);
                callbacks.exit.each(|f| f(self, worker, exit_report.status));
                if level == Level::Cluster {
                    self.forget(worker);
                }
            }
            Event::DetachedExit(status) => {
                let exited_after_disconnect = false;
                worker.set_exit_report(ExitReport {
                    status,
                    exited_after_disconnect,
                });
                callbacks.exit.each(|f| f(self, worker, status));
                self.forget(worker);
            }
            Event::Error(_) | Event::Setup | Event::Disconnected => {}
        }
    }

    /// Removes a process whose last event has been delivered.
    fn forget(&self, process: &WorkerProcess) {
        self.shell.forget(process.id());
        self.worker_callbacks.borrow_mut().remove(&process.id());
        // Break reference cycles: a callback may own a handle of this process.
        process.callbacks().clear();
    }

    /// Writes a line to standard error, if `CLUSTER_DEBUG` is `1`.
    fn log(&self, event: std::fmt::Arguments<'_>) {
        if self.logs_events {
            use std::io::Write as _;

            // In one call, because workers may write there at the same time.
            let line = format!("{},Master {event}\n", std::process::id());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

/// Channels and processes.
impl Master {
    fn channel_ready(&self, worker: WorkerId, ready: &Ready) {
        if ready.writable {
            self.shell.channel_writable(worker);
        }
        // Frames that have arrived are processed before more is read; otherwise they would pile up.
        if ready.readable && !self.shell.is_pending(worker) {
            if let Some(worker_io) = self.shell.worker_io(worker) {
                self.read(&worker_io);
            }
        }
    }

    /// Reads from a channel and processes the frames. The caller settles what follows from the last one.
    fn read(&self, worker: &WorkerIo) {
        let mut left = FRAMES_PER_ITERATION;
        for _ in 0..READS_PER_ITERATION {
            if !self.shell.read(worker)
                || !self.process_frames(worker, &mut left)
                || !worker.has_more()
            {
                return;
            }
            self.settle();
        }
    }

    /// Handles the exit of a worker, after the frames that it wrote before.
    fn process_ready(&self, worker: WorkerId) {
        let Some(worker_io) = self.shell.worker_io(worker) else {
            return;
        };
        for _ in 0..FINAL_READS_MAX {
            while self.shell.process_frame(&worker_io) != Processed::Nothing {
                self.settle();
            }
            if !self.shell.read(&worker_io) {
                break;
            }
        }
        self.shell.try_reap(worker);
    }

    /// Processes frames that have arrived, at most `left`. The caller settles what follows from the last
    /// one. Returns whether no frame is left.
    fn process_frames(&self, worker: &WorkerIo, left: &mut u32) -> bool {
        let mut is_noted = false;
        while *left > 0 {
            *left -= 1;
            match self.shell.process_frame(worker) {
                Processed::Nothing | Processed::Drained => {
                    if is_noted {
                        self.shell.remove_pending(worker.id);
                    }
                    return true;
                }
                Processed::More => {
                    // If a callback panics, the rest is processed in the next iteration.
                    if !is_noted {
                        self.shell.add_pending(worker.id);
                        is_noted = true;
                    }
                    self.settle();
                }
                Processed::Yield => break,
            }
        }
        self.shell.add_pending(worker.id);
        false
    }

    fn signals_ready(&self) {
        for signal in self.event_loop.take_signals() {
            if signal.number() == sys::signal::CHLD {
                self.reap.set(true);
            }
            self.event_loop.call_signal(self, signal);
            self.settle();
        }
    }
}
