//! Between the core and the master: does what the one has decided by what the other can do.

use std::time::Duration;

use cluster::{Master, Settings, Signal, WorkerProcess};

use super::core::{Command, Core, Time};
use super::event::{Death, GiveUp, PoolEvent};
use super::options::Readiness;
use super::{BEAT, News, Pool, READY, SLOT};

impl Pool {
    pub(super) fn now(&self) -> Time {
        self.0.began.elapsed()
    }

    pub(super) fn attend(&self, master: &Master) {
        let pool = self.clone();
        master.on_online(move |master, worker| {
            pool.proves(master, worker, Readiness::Online);
        });
        let pool = self.clone();
        master.on_listening(move |master, worker, _| {
            pool.proves(master, worker, Readiness::Listening);
        });
        let pool = self.clone();
        master.on_message(move |master, worker, message| {
            if message.bytes() == READY {
                pool.proves(master, worker, Readiness::Told);
            } else if message.bytes() == BEAT {
                let id = worker.id();
                pool.input(master, |core, now| core.beats(id, now));
            }
        });
        let pool = self.clone();
        master.on_exit(move |master, worker, status| {
            let (id, usage) = (worker.id(), worker.process().usage());
            pool.input(master, |core, now| core.exited(id, status, usage, now));
        });
    }

    fn proves(&self, master: &Master, worker: &WorkerProcess, proof: Readiness) {
        let id = worker.id();
        if self.0.core.borrow().options().readiness == proof {
            self.input(master, |core, now| core.is_ready(id, now));
        }
    }

    pub(super) fn tell(&self, master: &Master, event: PoolEvent) {
        self.0.news.borrow_mut().push_back(News::Event(event));
        self.act(master);
    }

    pub(super) fn input(&self, master: &Master, input: impl FnOnce(&mut Core, Time)) {
        let now = self.now();
        input(&mut self.0.core.borrow_mut(), now);
        self.act(master);
    }

    /// Does what the core has decided, and sees that the loop comes back when it must.
    pub(super) fn act(&self, master: &Master) {
        loop {
            let command = self.0.core.borrow_mut().next_command();
            let Some(command) = command else {
                break;
            };
            match command {
                Command::Fork { slot, generation } => self.fork(master, slot, generation),
                Command::Begin { generation, base } => self.begin(generation, base),
                Command::Leave(worker) => {
                    let worker = master.worker(worker);
                    worker
                        .into_iter()
                        .for_each(|worker| self.tell_to_leave(&worker));
                }
                Command::LeaveAll => self.tell_all_to_leave(master),
                Command::Kill(process) => {
                    let successor = self.0.successors.borrow().get(&process).cloned();
                    let process = successor.or_else(|| master.worker(process));
                    process
                        .into_iter()
                        .for_each(|process| process.process().kill(Signal::KILL));
                }
                Command::HandOver => self.hand_over(),
                Command::CloseUpgrade => {
                    let watch = self.0.upgrade.take();
                    watch.into_iter().for_each(|watch| master.unwatch(watch));
                }
                Command::Dismiss(successor) => self.dismiss(successor),
                Command::Look => self.look(master),
                Command::Tell(event) => self.0.news.borrow_mut().push_back(News::Event(event)),
                Command::Ask(death) => self.0.news.borrow_mut().push_back(News::GiveUp(death)),
            }
        }
        let mut core = self.0.core.borrow_mut();
        let deadline = core.next_deadline();
        // Also with no worker at all, the pool is there until it is stopped.
        let last = core.members.is_empty() && !core.is_over();
        drop(core);
        let wait = if self.0.news.borrow().is_empty() {
            let wait = deadline.map(|deadline| deadline.saturating_sub(self.now()));
            wait.or(last.then_some(Duration::MAX))
        } else {
            Some(Duration::ZERO)
        };
        match wait {
            Some(wait) => self.wake(master, wait),
            None => {
                let timer = self.0.timer.take();
                timer
                    .into_iter()
                    .for_each(|timer| master.clear_timer(timer));
            }
        }
    }

    /// Turns to the pool after this time, and no more at an earlier one.
    pub(super) fn wake(&self, master: &Master, wait: Duration) {
        let pool = self.clone();
        let timer = master.set_timeout(wait, move |master| {
            pool.0.timer.set(None);
            pool.input(master, Core::tick);
            pool.deliver(master);
            pool.act(master);
        });
        let previous = self.0.timer.replace(Some(timer));
        previous
            .into_iter()
            .for_each(|timer| master.clear_timer(timer));
    }

    /// Tells what there is to tell now. If a callback panics and the program goes on, the rest is told
    /// later.
    fn deliver(&self, master: &Master) {
        let count = self.0.news.borrow().len();
        for _ in 0..count {
            let news = self.0.news.borrow_mut().pop_front();
            match news {
                Some(News::Event(event)) => {
                    if let PoolEvent::Quorum(is_ready) = event {
                        self.prove(master, is_ready);
                    }
                    let callbacks = self.0.on_event.borrow().clone();
                    for callback in callbacks {
                        // One that turns the loop may be led here again.
                        if let Ok(mut callback) = callback.try_borrow_mut() {
                            callback(self, master, &event);
                        }
                    }
                }
                Some(News::GiveUp(death)) => {
                    let decision = self.ask(master, &death);
                    let slot = death.slot;
                    self.input(master, |core, now| core.decide(slot, decision, now));
                }
                None => return,
            }
        }
    }

    fn ask(&self, master: &Master, death: &Death) -> GiveUp {
        let callback = self.0.on_give_up.borrow().clone();
        let callback = callback
            .as_ref()
            .and_then(|callback| callback.try_borrow_mut().ok());
        match callback {
            Some(mut callback) => callback(self, master, death),
            None if self.0.core.borrow().ready_workers() > 0 => GiveUp::Hold,
            None => GiveUp::Stop,
        }
    }

    fn fork(&self, master: &Master, slot: usize, generation: u64) {
        let env = [(SLOT, slot.to_string())];
        let settings = self.0.generations.borrow().of(generation);
        let is_detached = match &settings {
            Some(settings) => settings.detached,
            None => master.settings().detached,
        };
        let forked = match settings {
            // The cluster's callbacks are not called for its exit, so a stop would wait for ever.
            _ if is_detached == Some(true) => Err("a detached process is not a worker".to_owned()),
            Some(settings) => master.fork_as(settings, env).map_err(|e| e.to_string()),
            None => master.fork_with(env).map_err(|e| e.to_string()),
        };
        let now = self.now();
        let mut core = self.0.core.borrow_mut();
        match forked {
            Ok(worker) => core.forked(slot, generation, worker.id(), worker.process().id(), now),
            Err(error) => core.not_forked(slot, generation, error, now),
        }
    }

    fn begin(&self, generation: u64, base: u64) {
        let core = self.0.core.borrow();
        let mut generations = self.0.generations.borrow_mut();
        let unused = generations.begin(generation, base, |known| core.uses(known));
        drop((core, generations));
        drop(unused);
    }

    pub(super) fn replace_next_settings(&self, next: Option<Settings>) {
        let unused = self.0.generations.borrow_mut().replace_next(next);
        drop(unused);
    }

    fn tell_to_leave(&self, worker: &WorkerProcess) {
        let signal = self.0.core.borrow().options().leave_signal;
        match signal {
            Some(signal) => worker.process().kill(signal),
            None => {
                worker.disconnect();
            }
        }
    }

    fn tell_all_to_leave(&self, master: &Master) {
        // Who waits is served before the listeners close; or by the successor, who has them, too.
        if !self.0.core.borrow().has_successor() {
            drop(self.0.listeners.take());
        }
        let workers: Vec<_> = self.0.core.borrow().members.keys().copied().collect();
        for worker in workers
            .into_iter()
            .filter_map(|worker| master.worker(worker))
        {
            self.tell_to_leave(&worker);
        }
    }

    fn look(&self, master: &Master) {
        let loads = master.loads().workers;
        let mut core = self.0.core.borrow_mut();
        let members = core.members.iter();
        let members: Vec<_> = members
            .map(|(worker, member)| (*worker, member.pid))
            .collect();
        let memory_counts = core.options().max_memory.is_some();
        let now = self.now();
        for (worker, pid) in members {
            let load = loads.iter().find(|load| load.worker == worker);
            let memory = memory_counts.then(|| resident_memory(pid)).flatten();
            core.measured(worker, load.map(|load| load.taken), memory, now);
        }
    }
}

/// How many bytes of memory a process has resident; `None` where the system does not tell.
fn resident_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
