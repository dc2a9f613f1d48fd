//! Delivery of events to the application's callbacks.

use crate::core::master::event::{EmittedEvent, Event, ExitReport, Level};
use crate::error::Error;
use crate::master::Master;
use crate::master::worker_process::WorkerProcess;
use crate::sys::fd::NoLingerFd;
use crate::types::worker_id::WorkerId;
use crate::wire::message::Message;
use crate::wire::receipts::Receipt;

/// Maximum number of events per call of `settle`. The remaining events wait for a later call.
///
/// Without a limit, an `error` callback that causes another error each time would block the loop
/// forever. A lower limit costs more polls in a burst of events.
const EVENTS_PER_ITERATION: u32 = 1024;

impl Master {
    /// Carries out the core's decisions, and calls the application's scheduler if connections wait
    /// for it.
    pub(super) fn act(&self) {
        self.shell.act();
        if self.shell.core.borrow().has_unscheduled() {
            self.schedule();
        }
    }

    /// Lets the application's scheduler choose a worker for each accepted connection that waits for
    /// this choice.
    fn schedule(&self) {
        loop {
            // Clone the reference, because the scheduler may replace itself with another one during
            // the call.
            let scheduler = self.scheduler.borrow().clone();
            let Some(scheduler) = scheduler else {
                return;
            };
            let core = self.shell.core.borrow();
            let Some((handle, sequence, connection)) = core.unscheduled() else {
                return;
            };
            let peer = self.shell.peer_addr(connection);
            let mut candidates = core.candidates(handle, sequence);
            self.shell.add_in_service(&mut candidates);
            drop(core);
            // If the scheduler is already running, it cannot be called again. The connection then
            // goes to the next worker by round robin.
            let chosen = scheduler.try_borrow_mut();
            let chosen = chosen.ok().and_then(|mut choose| choose(peer, &candidates));
            self.shell
                .core
                .borrow_mut()
                .choose(handle, sequence, chosen);
            self.shell.act();
        }
    }

    /// Carries out the core's decisions and delivers events until none is left, or until
    /// `EVENTS_PER_ITERATION` events have been delivered.
    pub(super) fn settle(&self) {
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

    /// Reports the messages that have been written or lost. Receipts that arise in the meantime
    /// wait for the next call, because they could otherwise delay events forever.
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

    /// Removes a process after its last event has been delivered.
    fn forget(&self, process: &WorkerProcess) {
        self.shell.forget(process.id());
        self.worker_callbacks.borrow_mut().remove(&process.id());
        // Clear the callbacks to break reference cycles, because a callback may own a handle of
        // this process.
        process.callbacks().clear();
    }
}
