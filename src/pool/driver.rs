//! Drives the core: passes inputs to the core, carries out the core's actions and delivers the
//! pool's events.

use std::time::Duration;

use cluster::{
    CallbackId, Master, Settings, Signal, SpawnOptions, WorkerId, WorkerProcess, WorkerState,
};

use super::core::{Action, Core, Time};
use super::event::PoolEvent;
use super::failure::{FailureAction, FailureCause, WorkerFailure};
use super::memory::own_memory;
use super::options::Readiness;
use super::{HEARTBEAT, Notification, Pool, READY, SLOT};

impl Pool {
    pub(super) fn now(&self) -> Time {
        self.0.created_at.elapsed()
    }

    /// Registers the master's callbacks that report worker events to the core.
    pub(super) fn register_callbacks(&self, master: &Master) {
        let pool = self.clone();
        master.on_online(move |master, worker| {
            pool.readiness_proved(master, worker, Readiness::Online);
        });
        let pool = self.clone();
        master.on_listening(move |master, worker, _| {
            pool.readiness_proved(master, worker, Readiness::Listening);
            pool.close_unrequested(master);
        });
        let pool = self.clone();
        master.on_message(move |master, worker, message| {
            if message.bytes() == READY {
                pool.readiness_proved(master, worker, Readiness::Message);
            } else if message.bytes() == HEARTBEAT {
                let id = worker.id();
                pool.input(master, |core, now| core.heartbeat_received(id, now));
            }
        });
        let pool = self.clone();
        master.on_exit(move |master, worker, status| {
            let (id, usage) = (worker.id(), worker.process().usage());
            pool.input(master, |core, now| core.exited(id, status, usage, now));
        });
    }

    /// Reports to the core that the worker is ready, if `proof` is the sign of readiness that the
    /// options select.
    fn readiness_proved(&self, master: &Master, worker: &WorkerProcess, proof: Readiness) {
        let id = worker.id();
        if self.0.core.borrow().options().readiness == proof {
            self.input(master, |core, now| core.became_ready(id, now));
        }
    }

    /// Emits an event, which the loop delivers in its next iteration.
    pub(super) fn emit(&self, master: &Master, event: PoolEvent) {
        self.notify(Notification::Event(event));
        self.schedule(master, Duration::ZERO);
    }

    fn notify(&self, notification: Notification) {
        self.0.notifications.borrow_mut().push_back(notification);
    }

    /// Passes an input to the core and carries out the resulting actions.
    pub(super) fn input(&self, master: &Master, input: impl FnOnce(&mut Core, Time)) {
        let now = self.now();
        input(&mut self.0.core.borrow_mut(), now);
        self.act(master);
    }

    /// Carries out all pending actions of the core and schedules the next tick.
    fn act(&self, master: &Master) {
        loop {
            let action = self.0.core.borrow_mut().next_action();
            match action {
                Some(action) => self.carry_out(master, action),
                None => break,
            }
        }
        let mut core = self.0.core.borrow_mut();
        let deadline = core.next_deadline();
        // Without workers, the loop would end unless a timer is set. So set a timer even without a
        // deadline, until the pool has stopped and all of its processes have exited.
        let keeps_running = core.workers().is_empty() && !core.is_over();
        drop(core);
        let wait = if self.0.notifications.borrow().is_empty() {
            let wait = deadline.map(|deadline| deadline.saturating_sub(self.now()));
            wait.or(keeps_running.then_some(Duration::MAX))
        } else {
            Some(Duration::ZERO)
        };
        match wait {
            Some(wait) => self.schedule(master, wait),
            None => {
                if let Some(timer) = self.0.timer.take() {
                    master.clear_timer(timer);
                }
            }
        }
    }

    fn carry_out(&self, master: &Master, action: Action) {
        match action {
            Action::Fork { slot, generation } => self.fork(master, slot, generation),
            Action::BeginGeneration { generation, base } => self.begin_generation(generation, base),
            Action::Disconnect(worker) => {
                if let Some(worker) = master.worker(worker) {
                    self.disconnect(&worker);
                }
            }
            Action::DisconnectAll => self.disconnect_all(master),
            Action::Kill(process) => {
                let new_masters = self.0.new_masters.borrow();
                let new_master = new_masters.get(&process);
                let new_master = new_master.map(|new_master| new_master.process.clone());
                drop(new_masters);
                if let Some(process) = new_master.or_else(|| master.worker(process)) {
                    process.process().kill(Signal::KILL);
                }
            }
            Action::ReleaseSocketFiles => {
                self.release_socket_files();
                self.release_status(master);
            }
            Action::PassParked(new_master) => self.pass_parked(master, new_master),
            Action::EndPassing(new_master) => self.end_passing(new_master),
            Action::EndTakeover(new_master) => {
                let has_taken_over = self.end_takeover(new_master);
                let (mut core, now) = (self.0.core.borrow_mut(), self.now());
                match has_taken_over {
                    true => core.new_master_took_over(new_master, now),
                    false => core.new_master_is_late(new_master, now),
                }
            }
            Action::TerminateNewMaster(new_master) => self.terminate_new_master(new_master),
            Action::MeasureWorkers => self.measure_workers(master),
            Action::GiveUp(failure) => master.give_up(failure),
            Action::EmitEvent(event) => self.notify(Notification::Event(event)),
            Action::RequestDecision(failure) => {
                self.notify(Notification::FailureLimitReached(failure));
            }
        }
    }

    /// Sets the pool's timer and clears its previous timer.
    pub(super) fn schedule(&self, master: &Master, wait: Duration) {
        let pool = self.clone();
        let timer = master.set_timeout(wait, move |master| {
            pool.0.timer.set(None);
            pool.input(master, Core::tick);
            pool.deliver_notifications(master);
            pool.act(master);
        });
        if let Some(previous) = self.0.timer.replace(Some(timer)) {
            master.clear_timer(previous);
        }
    }

    /// Delivers the notifications that are pending at the time of the call. If a callback panics
    /// and the application catches the panic, the remaining notifications stay pending.
    fn deliver_notifications(&self, master: &Master) {
        let count = self.0.notifications.borrow().len();
        for _ in 0..count {
            let notification = self.0.notifications.borrow_mut().pop_front();
            match notification {
                Some(Notification::Event(event)) => self.deliver_event(master, &event),
                Some(Notification::FailureLimitReached(failure)) => {
                    let action = self.choose_failure_action(master, &failure);
                    self.input(master, |core, now| {
                        core.failure_action_chosen(failure, action, now);
                    });
                }
                None => return,
            }
        }
    }

    fn deliver_event(&self, master: &Master, event: &PoolEvent) {
        if *event == PoolEvent::QuorumReached {
            self.restart_takeover_timer(master);
        } else if *event == PoolEvent::QuorumLost {
            self.stop_takeover_timer(master);
        }
        self.close_unrequested(master);
        let callbacks = self.0.event_callbacks.borrow();
        let ids: Vec<CallbackId> = callbacks.iter().map(|(id, _)| *id).collect();
        drop(callbacks);
        for id in ids {
            let callbacks = self.0.event_callbacks.borrow();
            let callback = callbacks.iter().find(|(other, _)| *other == id);
            let callback = callback.map(|(_, callback)| callback.clone());
            drop(callbacks);
            // Call the callback only if no other callback has removed it. The callback is not
            // running already, because a callback cannot run the loop (`Error::AlreadyRunning`).
            let callback = callback.as_ref().map(|callback| callback.try_borrow_mut());
            if let Some(Ok(mut callback)) = callback {
                callback(self, master, event);
            }
        }
    }

    fn choose_failure_action(&self, master: &Master, failure: &WorkerFailure) -> FailureAction {
        let callback = self.0.failure_limit_callback.borrow().clone();
        let callback = callback
            .as_ref()
            .and_then(|callback| callback.try_borrow_mut().ok());
        match callback {
            Some(mut callback) => callback(self, master, failure),
            None if self.0.core.borrow().ready_workers() > 0 => FailureAction::GiveUp,
            None => FailureAction::StopPool,
        }
    }

    fn fork(&self, master: &Master, slot: usize, generation: u64) {
        let env = [(SLOT, slot.to_string())];
        let settings = self.0.generations.borrow().settings(generation);
        let is_detached = match &settings {
            Some(settings) => settings.get_detached(),
            None => master.settings().get_detached(),
        };
        let failed = |cause, error| {
            let mut core = self.0.core.borrow_mut();
            core.fork_failed(slot, generation, cause, error, self.now());
        };
        if is_detached == Some(true) {
            // Reject a detached process, because the pool's `Master::on_exit` callback would not be
            // called for it. A pool that is stopping would wait forever for the exit.
            let error = "a detached process is not a worker".to_owned();
            return failed(FailureCause::ForkFailed, error);
        }
        let forked = match settings {
            Some(settings) => master.fork_as(SpawnOptions::new(settings).envs(env)),
            None => master.fork_with(env),
        };
        match forked {
            Ok(worker) => {
                let (id, pid) = (worker.id(), worker.process().id());
                let mut core = self.0.core.borrow_mut();
                core.forked(slot, generation, id, pid, self.now());
            }
            Err(error) => failed(FailureCause::of_fork_error(&error), error.to_string()),
        }
    }

    fn begin_generation(&self, generation: u64, base: u64) {
        let core = self.0.core.borrow();
        let mut generations = self.0.generations.borrow_mut();
        let unused = generations.begin(generation, base, |known| core.uses(known));
        drop((core, generations));
        drop(unused);
    }

    pub(super) fn replace_next_settings(&self, next: Option<Settings>) {
        let previous = self.0.generations.borrow_mut().replace_next(next);
        drop(previous);
    }

    fn disconnect(&self, worker: &WorkerProcess) {
        match self.signal_for(worker) {
            Some(signal) => worker.process().kill(signal),
            None => {
                worker.disconnect();
            }
        }
    }

    /// Returns the signal that makes the worker disconnect, or `None` if the worker uses this crate
    /// and therefore reads a disconnect request. A program that does not use it may have closed the
    /// channel.
    fn signal_for(&self, worker: &WorkerProcess) -> Option<Signal> {
        let signal = self.0.core.borrow().options().disconnect_signal;
        let reads = matches!(worker.state(), WorkerState::Online | WorkerState::Listening);
        signal.filter(|_| !reads)
    }

    fn disconnect_all(&self, master: &Master) {
        // Close the pool's listeners, so that the workers serve all connections in the backlogs
        // before their own listeners close. After an upgrade, keep the listeners open, because the
        // new master shares them and serves the backlogs.
        if !self.0.core.borrow().is_upgraded() {
            drop(self.0.listeners.take());
        }
        let core = self.0.core.borrow();
        let workers: Vec<_> = core.workers().keys().copied().collect();
        drop(core);
        let workers = workers.into_iter().filter_map(|id| master.worker(id));
        let signalled = |worker: &WorkerProcess| self.signal_for(worker).is_some();
        let (others, own): (Vec<_>, Vec<_>) = workers.partition(signalled);
        others.iter().for_each(|worker| self.disconnect(worker));
        let own: Vec<_> = own.iter().map(WorkerProcess::id).collect();
        master.disconnect_workers(&own);
    }

    fn measure_workers(&self, master: &Master) {
        let loads = master.loads().workers;
        let mut core = self.0.core.borrow_mut();
        let workers = core.workers().iter();
        let workers: Vec<(WorkerId, u32)> = workers.map(|(id, worker)| (*id, worker.pid)).collect();
        let max_memory = core.options().max_memory;
        let now = self.now();
        for (id, pid) in workers {
            let load = loads.iter().find(|load| load.worker == id);
            let memory = max_memory.and_then(|max| own_memory(pid, max));
            core.measured(id, load.map(|load| load.received), memory, now);
        }
    }
}
