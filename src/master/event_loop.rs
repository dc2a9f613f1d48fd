//! The master's loop: timers, the application's descriptors, and the workers' channels and exits.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, WatchError};
use crate::master::Master;
use crate::master::shell::{Processed, WorkerIo};
use crate::runtime::event_loop::{LoopId, WatchId};
use crate::runtime::timers::TimerId;
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::poll::{Interest, Ready, ReadyList};
use crate::types::handle::HandleId;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;

/// Maximum number of reads from an exited worker's channel before the worker is reaped.
///
/// A full socket buffer usually needs fewer reads. The limit ends the reads if a process continues
/// to write: a child that the exited worker has left behind, or a worker of which the system does
/// not tell whether it has exited. Frames beyond the limit are not lost, because `close_channel`
/// processes them.
const FINAL_READS_MAX: u32 = 64;
/// Interval between two checks for exits that the system does not report.
///
/// A longer interval delays `exit` events; a shorter one wakes an idle master more often.
const EXIT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of reads from one worker's channel in one iteration. The loop reads again only if
/// the previous read has filled the buffer.
///
/// A higher limit delays the other workers. A lower limit costs more polls while one worker sends
/// many frames.
const READS_PER_ITERATION: u32 = 4;
/// Maximum number of one worker's frames that are processed before the loop serves other
/// descriptors. The remaining frames wait for the next iteration.
///
/// A higher limit delays the other workers. With a lower limit, a busy worker needs more
/// iterations.
const FRAMES_PER_ITERATION: u32 = 64;

// Timers, watches, and waiting.
impl Master {
    /// Calls `callback` once, when the time `after` has passed.
    ///
    /// Node: `setTimeout`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// master.set_timeout(Duration::from_secs(2), |master| master.disconnect());
    /// # }
    /// ```
    #[doc(alias = "setTimeout")]
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.event_loop.set_timeout(after, callback)
    }

    /// Calls `callback` each time the interval `every` has passed. An interval below 1 ms is treated as
    /// 1 ms.
    ///
    /// Node: `setInterval`.
    ///
    /// If the loop is so late that several calls are due, `callback` is called only once for them.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    /// use cluster::systemd;
    ///
    /// master.set_interval(Duration::from_secs(5), |_| drop(systemd::notify("WATCHDOG=1")));
    /// # }
    /// ```
    #[doc(alias = "setInterval")]
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.event_loop.set_interval(every, callback)
    }

    /// Cancels a timer.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    ///
    /// Nothing happens if the timer has already ended.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// let timer = master.set_timeout(Duration::from_secs(2), |master| master.disconnect());
    /// master.on_listening(move |master, _, _| master.clear_timer(timer));
    /// # }
    /// ```
    #[doc(alias = "clearTimeout")]
    #[doc(alias = "clearInterval")]
    pub fn clear_timer(&self, timer: TimerId) {
        self.event_loop.clear_timer(timer);
    }

    /// Watches one of the application's descriptors in the master's loop. `callback` is called
    /// whenever `source` is ready for `interest`.
    ///
    /// Node has no counterpart: in Node, every descriptor is in the loop.
    ///
    /// This method works like [`Worker::watch`](crate::Worker::watch). See that method for an
    /// example.
    ///
    /// # Errors
    ///
    /// Returns a [`WatchError`] if the descriptor is of a kind that cannot be waited for, such as a
    /// regular file. The error contains the source and an [`Error::Io`]. The operator `?` converts
    /// it into an [`Error`] and drops the source.
    pub fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&Self, &S) -> Option<Interest> + 'static,
    ) -> std::result::Result<WatchId, WatchError<S>> {
        self.event_loop.watch(source, interest, callback)
    }

    /// Ends a watch and drops its source.
    ///
    /// Node has no counterpart.
    ///
    /// Nothing happens if the watch has already ended.
    pub fn unwatch(&self, watch: WatchId) {
        self.event_loop.unwatch(watch);
    }

    /// Lets [`run`](Self::run) return although this timer or watch exists.
    ///
    /// Node: `timer.unref()` and `socket.unref()`.
    ///
    /// Nothing happens if the timer or watch has already ended.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// let report = master.set_interval(Duration::from_secs(1), move |_| log.line("still here"));
    /// master.unreference(report);
    /// master.fork()?;
    /// master.run() // returns when the worker has exited
    /// # }
    /// ```
    #[doc(alias = "unref")]
    pub fn unreference(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), false);
    }

    /// Undoes [`unreference`](Self::unreference).
    ///
    /// Node: `timer.ref()` and `socket.ref()`.
    ///
    /// See [`unreference`](Self::unreference) for an example of its effect.
    #[doc(alias = "ref")]
    pub fn reference(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), true);
    }

    /// Runs the loop until nothing is left to wait for: no worker, no timer, no watch, no event to
    /// deliver, no message to write, and no connection to [pass](Self::pass_parked).
    ///
    /// Node: the process continues to run after the main program, and exits when nothing is left to
    /// wait for.
    ///
    /// The loop does not wait for signals, for retained listeners, or for anything released with
    /// `unreference`. The loop waits for a [detached](crate::Settings::detached) process only after
    /// [`Process::reference`](crate::Process::reference).
    ///
    /// # Errors
    ///
    /// Returns:
    ///
    /// - [`Error::AlreadyRunning`] if a callback calls this method;
    /// - [`Error::ForeignProcess`] in a process that did not create this value, such as a forked
    ///   child;
    /// - [`Error::GaveUp`] if nothing is left to wait for after a call of
    ///   [`give_up`](Self::give_up), for instance by a [`Pool`](crate::pool::Pool);
    /// - [`Error::Io`] if waiting fails.
    ///
    /// See [`Master`] for an example.
    pub fn run(&self) -> Result<()> {
        drop(self.event_loop.enter()?);
        while self.has_work() {
            self.dispatch(None)?;
        }
        self.outcome()
    }

    /// Makes [`run`](Self::run) or [`dispatch`](Self::dispatch) return [`Error::GaveUp`] once
    /// nothing is left to wait for. The loop continues until then.
    ///
    /// Node: `process.exitCode = 1`.
    ///
    /// A supervisor calls this method when it stops because its workers fail. The application can
    /// then exit with an error, so that a service manager does not mistake the exit for a normal
    /// stop. A [`Pool`](crate::pool::Pool) calls this method itself. After several calls, the error
    /// contains the first reason. The error is returned once.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.on_exit(|master, worker, status| {
    ///     if worker.exited_after_disconnect() != Some(true) {
    ///         master.give_up(format!("worker {} exited ({status})", worker.id()));
    ///         master.disconnect();
    ///     }
    /// });
    /// master.fork()?;
    /// master.run() // an error if the worker exits by itself
    /// # }
    /// ```
    #[doc(alias = "exitCode")]
    pub fn give_up(&self, reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) {
        let reason = reason.into();
        let mut gave_up = self.gave_up.borrow_mut();
        if gave_up.is_none() {
            *gave_up = Some(reason);
        }
    }

    /// Returns `Error::GaveUp` if `give_up` was called and nothing is left to wait for.
    fn outcome(&self) -> Result<()> {
        if self.gave_up.borrow().is_none() || self.has_work() {
            return Ok(());
        }
        let reason = self.gave_up.take();
        reason.map_or(Ok(()), |reason| Err(Error::GaveUp { reason }))
    }

    fn has_work(&self) -> bool {
        let workers = self.shell.core.borrow().keeps_loop_alive();
        let busy = workers || self.has_notifications() || self.event_loop.has_work();
        busy || self.shell.is_writing() || self.shell.is_passing()
    }

    /// Returns whether an event, a receipt or a scheduling decision waits for the application.
    fn has_notifications(&self) -> bool {
        let unscheduled = self.shell.core.borrow().has_unscheduled();
        let pending = &self.callbacks.all_disconnected_pending;
        unscheduled || self.shell.has_notifications() || !pending.borrow().is_empty()
    }

    /// Runs one iteration of the loop. The call waits until something happens or `timeout` has
    /// passed, and then calls the callbacks.
    ///
    /// Node has no counterpart.
    ///
    /// With a timeout of `None`, the call waits without a limit; with a timeout of zero, it does
    /// not wait.
    ///
    /// Use this method in an application that runs its own event loop. The application waits until
    /// [`as_fd`](Self::as_fd) is readable, for at most [`time_left`](Self::time_left), and then
    /// calls `dispatch` with a timeout of zero.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`run`](Self::run).
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
        // Settle if `tick` may have caused actions or events. Also settle if `limit` is set,
        // because pending notifications set it to zero before the wait.
        if self.shell.tick(due) || limit.is_some() {
            self.settle();
        }
        for &worker in &pending {
            // Remove the workers one by one, so that the remaining ones stay pending if a callback
            // panics.
            if self.shell.remove_pending(worker) {
                if let Some(worker_io) = self.shell.worker_io(worker) {
                    let mut left = FRAMES_PER_ITERATION;
                    self.process_frames(&worker_io, &mut left);
                }
                self.settle();
            }
        }
        for (token, ready) in ready {
            // A callback may have forked a child and returned in it. Such a child must not continue
            // the loop.
            event_loop.check_own()?;
            match token {
                Token::Channel(number) => {
                    self.channel_ready(WorkerId::new(number), ready, &pending);
                }
                Token::Process(number) => self.process_ready(WorkerId::new(number)),
                Token::Listener(number) => self.shell.listener_ready(HandleId(number)),
                Token::Selector(number) => self.shell.selector_ready(HandleId(number)),
                Token::Log(number) => self.log_ready(number),
                Token::Parked(number) => self.shell.held_ready(number),
                Token::Watch(number) => event_loop.watch_ready(self, number),
                Token::Signals => self.signals_ready(),
                Token::Successor => self.shell.successor_ready(),
            }
            self.settle();
        }
        for worker in self.take_possible_exits() {
            self.process_ready(worker);
            self.settle();
        }
        event_loop.fire_timers(self, || self.settle());
        self.outcome()
    }

    /// Returns how long the application may wait before it calls [`dispatch`](Self::dispatch) if
    /// [`as_fd`](Self::as_fd) does not become readable earlier.
    ///
    /// Node has no counterpart.
    ///
    /// `None` means that the application may wait without a limit. Zero means that events are
    /// pending or timers are due. Call this method last before you wait, because every other method
    /// may change the result.
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

    /// Returns how long the loop may wait, or `None` if it may wait without a limit. `due` is the
    /// shell's own deadline.
    fn time_until(&self, due: Option<Time>) -> Option<Duration> {
        if self.has_notifications() || self.reap.get() || self.shell.has_pending() {
            return Some(Duration::ZERO);
        }
        let check = self.shell.may_miss_exits().then_some(EXIT_CHECK_INTERVAL);
        earlier(check, self.event_loop.time_left(due))
    }

    /// Returns the workers that may have exited and have no process descriptor to report the exit.
    /// After SIGCHLD, the list contains all workers without process descriptors. Otherwise, once
    /// per `EXIT_CHECK_INTERVAL`, the list contains the workers whose exit the system does not
    /// report.
    fn take_possible_exits(&self) -> Vec<WorkerId> {
        if self.reap.take() {
            return self.shell.without_pidfd();
        }
        let last_check = self.last_exit_check.get();
        if !self.shell.may_miss_exits() || last_check.elapsed() < EXIT_CHECK_INTERVAL {
            return Vec::new();
        }
        self.last_exit_check.set(Instant::now());
        self.shell.sigchld_only()
    }
}

/// Gives access to a descriptor that becomes readable when a process, a socket or a signal needs a
/// call of [`dispatch`](Master::dispatch). Timers and pending events do not make the descriptor
/// readable. See [`time_left`](Master::time_left) for them.
impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event_loop.as_fd()
    }
}

// Reading channels, and handling exits and signals.
impl Master {
    /// Writes to and reads from a ready channel. `pending` contains the workers whose pending
    /// frames this iteration has processed.
    fn channel_ready(&self, worker: WorkerId, ready: &Ready, pending: &[WorkerId]) {
        if ready.writable {
            self.shell.channel_writable(worker);
        }
        // Read from a worker in `pending` only in a later iteration, because it has used its share
        // of this iteration. Frames may also still be pending, and further frames would accumulate
        // in memory.
        if ready.readable && !pending.contains(&worker) {
            if let Some(worker_io) = self.shell.worker_io(worker) {
                self.read(&worker_io);
            }
        }
    }

    /// Reads from a channel and processes the frames. The caller must call `settle` for the last
    /// frame.
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

    /// Processes the frames that are left in the channel of a worker that may have exited, and then
    /// reaps the worker's process if the process has exited.
    fn process_ready(&self, worker: WorkerId) {
        let Some(worker_io) = self.shell.worker_io(worker) else {
            return;
        };
        // After SIGCHLD, most workers without a process descriptor are still running. Their frames
        // wait for `read`, which limits the number of frames in an iteration.
        let final_reads = match self.shell.is_running(&worker_io) {
            true => 0,
            false => FINAL_READS_MAX,
        };
        for _ in 0..final_reads {
            while self.shell.process_frame(&worker_io) != Processed::Nothing {
                self.settle();
            }
            if !self.shell.read(&worker_io) {
                break;
            }
        }
        self.shell.try_reap(worker);
    }

    /// Processes at most `left` of the frames that have been read, and reduces `left`. Returns
    /// `false` if frames may remain, and notes the worker as pending in that case. The caller must
    /// call `settle` for the last frame.
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
                    // Note the worker as pending first, so that its remaining frames are processed
                    // in the next iteration if a callback panics.
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
                self.check_orphans();
            }
            self.event_loop.call_signal(self, signal);
            self.settle();
        }
    }
}
