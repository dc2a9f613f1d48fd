//! Defines the steps of a schedule, their probabilities and their effects.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use fastrand::Rng;

use super::Schedule;
use super::preemption::Runner;
use crate::sim::kernel::process::Detached;
use crate::sim::kernel::worker::application::{WorkerCall, requested_endpoint};
use crate::sim::kernel::{Call, Failure, World, nth};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::BindFlags;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::protocol::FrameError;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

/// An action that a worker takes without the knowledge of its library, as a broken or hostile
/// worker does. Variants without a description write the frame of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forgery {
    /// Writes bytes that are not a frame.
    Garbled,
    Online,
    Listen,
    Listening,
    Idle,
    /// Receives a connection and closes it.
    ReceiveAndClose,
    Release,
    Pause,
    DisconnectRequest,
    /// Parks a connection that the worker has opened itself.
    Park,
    ParkAgain,
    Detach,
    Message,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepKind {
    /// Connects a client to a listener.
    Connect,
    /// Connects a client that sends no request yet.
    ConnectSilently,
    /// Makes a client send a request.
    Request,
    /// Makes a client hang up.
    HangUp,
    /// Makes the master's poller report a held connection whether it is ready or not, as if the
    /// event belonged to an earlier connection with the same number.
    ReportHeld,
    /// Advances the clock by `choice` milliseconds.
    Pass,
    /// Advances the clock by one second.
    PassSecond,
    /// Makes the master carry out an action, write a frame, deliver an event, or handle an input.
    Master,
    /// Calls the master from its application if the master has no action to carry out and no frame
    /// to write. Otherwise does the same as `Master`.
    Call(Call),
    /// Calls the master from its application's next callback.
    CallInCallback(Call),
    /// Makes the next operation of this kind fail.
    Fail(Failure),
    /// Makes a worker carry out an action, write a frame, deliver an event, or read a frame.
    Worker,
    /// Calls a worker's library from its application.
    WorkerCall(WorkerCall),
    /// Kills a worker with SIGKILL, without the knowledge of the master.
    Kill,
    /// Suspends a worker, as SIGSTOP does.
    Stop,
    /// Continues a suspended worker, as SIGCONT does.
    Continue,
    /// Preempts a process for its next `choice` steps. Unlike in other steps, `process` is not
    /// reduced modulo the number of workers: if no worker has this index, the master is preempted.
    Preempt,
    /// Closes a worker's descriptor of the channel without the knowledge of its library.
    CutChannel,
    Forge(Forgery),
    /// Makes a detached process exit.
    EndDetached,
}

/// A step of a schedule. `process` and `choice` select among the existing items, modulo the number
/// of items, so that every list of steps is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) kind: StepKind,
    /// The number that selects the process.
    pub(super) process: u8,
    /// The number that selects the listener, connection, duration or similar.
    pub(super) choice: u8,
}

pub(super) const fn step(kind: StepKind, process: u8, choice: u8) -> Step {
    Step {
        kind,
        process,
        choice,
    }
}

/// The kinds of trouble that a schedule contains. Some schedules contain none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trouble {
    /// Whether workers forge frames. Half of the schedules contain no forged frames, because some
    /// checks are skipped after a worker has forged a frame.
    forgeries: bool,
    /// Whether workers are killed or suspended, clients hang up, and operations fail.
    faults: bool,
    /// Whether the master's application makes calls other than `Fork`, and the workers'
    /// applications disconnect.
    calls: bool,
    /// Whether the applications frequently change their connection limits.
    limits: bool,
    /// Whether processes are preempted.
    preemption: bool,
}

impl Trouble {
    pub(super) fn random(rng: &mut Rng) -> Self {
        Self {
            forgeries: rng.bool(),
            faults: rng.u8(0..4) > 0,
            calls: rng.u8(0..4) > 0,
            limits: rng.u8(0..8) == 0,
            preemption: rng.bool(),
        }
    }
}

// The probability of each step.
impl Step {
    pub(super) fn random(rng: &mut Rng, trouble: Trouble) -> Self {
        let kind = match rng.u8(0..=255) {
            0..=1 => StepKind::Call(Call::Fork),
            2..=15 => StepKind::Connect,
            16 => StepKind::ConnectSilently,
            17..=19 => StepKind::Request,
            20 if rng.u8(0..4) == 0 => StepKind::PassSecond,
            20..=22 => StepKind::Pass,
            23..=25 if trouble.calls => random_call(rng),
            26..=28 if trouble.faults => random_fault(rng),
            29 if trouble.forgeries => StepKind::Forge(random_forgery(rng)),
            30..=31 if trouble.preemption => StepKind::Preempt,
            30..=79 => StepKind::WorkerCall(random_worker_call(rng, trouble)),
            80..=159 => StepKind::Worker,
            _ => StepKind::Master,
        };
        let choice = if kind == StepKind::Pass {
            rng.u8(0..20)
        } else {
            rng.u8(..)
        };
        step(kind, rng.u8(0..8), choice)
    }
}

fn random_call(rng: &mut Rng) -> StepKind {
    let call = match rng.u8(0..46) {
        0..=11 => Call::Fork,
        12..=19 => Call::Send,
        20..=21 => Call::Disconnect,
        22..=23 => Call::DisconnectWithin,
        24..=25 => Call::Kill,
        26 => Call::Signal,
        27 => Call::CloseChannel,
        28 => Call::DisconnectAll,
        29 => Call::DisconnectAllWithin,
        30..=32 => Call::Retain,
        33..=34 => Call::Adopt,
        35..=37 => Call::Release,
        38 => Call::LimitParked,
        39 if rng.u8(0..4) == 0 => Call::UseScheduler,
        40 => Call::Detach,
        41 => Call::Ref,
        42 => Call::Unref,
        43 => Call::PassParked,
        44 => Call::EndSuccessor,
        _ => return StepKind::CallInCallback(Call::Fork),
    };
    if rng.bool() {
        StepKind::CallInCallback(call)
    } else {
        StepKind::Call(call)
    }
}

fn random_fault(rng: &mut Rng) -> StepKind {
    match rng.u8(0..64) {
        0..=3 => StepKind::Kill,
        4..=7 => StepKind::Stop,
        8..=23 => StepKind::Continue,
        24 => StepKind::CutChannel,
        25..=30 => StepKind::Fail(Failure::Accept),
        31..=34 => StepKind::Fail(Failure::Bind),
        35..=37 => StepKind::Fail(Failure::Share),
        38..=41 => StepKind::Fail(Failure::Send),
        42..=43 => StepKind::Fail(Failure::Receive),
        44..=45 => StepKind::Fail(Failure::Reclaim),
        46..=47 => StepKind::EndDetached,
        48..=49 => StepKind::ReportHeld,
        50..=51 => StepKind::Fail(Failure::Hold),
        52 => StepKind::Fail(Failure::Park),
        _ => StepKind::HangUp,
    }
}

fn random_worker_call(rng: &mut Rng, trouble: Trouble) -> WorkerCall {
    if trouble.limits && rng.bool() {
        return if rng.u8(0..8) == 0 {
            WorkerCall::UseCallback
        } else {
            WorkerCall::LimitConnections
        };
    }
    match rng.u8(0..=127) {
        0..=9 => WorkerCall::Listen,
        10..=11 => WorkerCall::ListenPrivately,
        12..=50 => WorkerCall::Accept,
        51..=55 => WorkerCall::UseCallback,
        56..=60 => WorkerCall::FinishListen,
        61..=74 => WorkerCall::CloseConnection,
        75..=88 => WorkerCall::Finish,
        89..=109 => WorkerCall::Park,
        110 => WorkerCall::DropListener,
        111..=112 => WorkerCall::LimitConnections,
        113 => WorkerCall::ChangeFds,
        114..=117 => WorkerCall::Wait,
        118 => WorkerCall::Send,
        119 if trouble.calls => WorkerCall::Disconnect,
        120 if trouble.faults && rng.bool() => {
            let ends = [WorkerCall::Kill, WorkerCall::CloseChannel, WorkerCall::Exit];
            ends[rng.usize(0..ends.len())]
        }
        _ => WorkerCall::Accept,
    }
}

fn random_forgery(rng: &mut Rng) -> Forgery {
    let forgeries = [
        Forgery::Garbled,
        Forgery::Online,
        Forgery::Listen,
        Forgery::Listening,
        Forgery::Idle,
        Forgery::Idle,
        Forgery::ReceiveAndClose,
        Forgery::Release,
        Forgery::Pause,
        Forgery::DisconnectRequest,
        Forgery::Park,
        Forgery::ParkAgain,
        Forgery::ParkAgain,
        Forgery::Detach,
        Forgery::Message,
    ];
    forgeries[rng.usize(0..forgeries.len())]
}

// The effect of each step.
impl Schedule {
    pub(super) fn step(&mut self, step: Step) {
        let (process, choice) = (step.process, step.choice);
        let world = &mut self.world;
        let living = world.living(process);
        let runner = if let StepKind::Master | StepKind::Call(_) = step.kind {
            Some(Runner::Master)
        } else if let StepKind::WorkerCall(_) = step.kind {
            living.map(Runner::Worker)
        } else if step.kind == StepKind::Worker {
            world.busy(process).map(Runner::Worker)
        } else {
            None
        };
        if let Some(time) = self.preemption.step_preempted(runner) {
            return world.pass(time);
        }
        match step.kind {
            StepKind::Connect => world.connect(choice),
            StepKind::ConnectSilently => world.connect_silently(choice),
            StepKind::Request if choice % 4 == 0 => world.send_request(choice / 4),
            StepKind::Request => world.send_on_held(choice),
            StepKind::HangUp => world.hang_up(choice),
            StepKind::ReportHeld if world.master_is_idle() => {
                let held = nth(world.held.keys().copied(), choice);
                held.into_iter().for_each(|id| world.held_ready(id));
            }
            StepKind::ReportHeld => {}
            StepKind::PassSecond => world.pass(Time::from_secs(1)),
            StepKind::Pass => world.pass(Time::from_millis(choice.into())),
            StepKind::Master => self.master_step(choice),
            StepKind::Call(call) if world.master_is_idle() => {
                let detached = world.detached.iter();
                let detached = detached.filter(|(_, state)| **state != Detached::Gone);
                let detached = detached.map(|(id, _)| *id);
                let all: Vec<_> = world.master.worker_ids().chain(detached).collect();
                world.call(call, nth(all.into_iter(), process), choice);
            }
            StepKind::Call(_) => self.master_step(choice),
            StepKind::CallInCallback(call) => self.callback = Some((call, choice)),
            StepKind::Fail(failure) => drop(world.failing.insert(failure)),
            StepKind::Worker => each(world.busy(process), |id| world.worker_step(id, choice)),
            StepKind::EndDetached => {
                let running = world.detached.iter().filter(|(_, d)| d.is_running());
                let status = ExitStatus::from_raw(i32::from(choice) << 8);
                let chosen = nth(running.map(|(id, _)| *id), process);
                each(chosen, |id| world.end_detached(id, status));
            }
            StepKind::WorkerCall(call) => each(living, |id| world.call_worker(id, call, choice)),
            StepKind::Kill => each(living, |id| world.exit(id, ExitStatus::from_raw(9))),
            StepKind::Stop => each(living, |id| world.stop(id)),
            StepKind::Continue => each(living, |id| world.resume(id)),
            StepKind::Preempt => {
                let nth = world.processes.keys().nth(process.into());
                let runner = nth.copied().map_or(Runner::Master, Runner::Worker);
                self.preemption.begin(runner, choice);
            }
            StepKind::CutChannel => each(living, |id| world.process(id).close_end()),
            StepKind::Forge(forgery) => each(living, |id| world.forge_frame(id, forgery, choice)),
        }
        self.world.check();
    }
}

fn each(worker: Option<WorkerId>, act: impl FnMut(WorkerId)) {
    worker.into_iter().for_each(act);
}

impl World {
    /// Makes a worker take an action without the knowledge of its library. By chance, the forged
    /// action may be one that the library could take itself.
    fn forge_frame(&mut self, worker: WorkerId, forgery: Forgery, n: u8) {
        let number = u64::from(n / 8);
        let handle = HandleId(self.last_port.saturating_sub(u32::from(n % 8) % 4));
        let connection = ConnectionId(u32::from(n % 8));
        let frame = match forgery {
            Forgery::Garbled => Err(FrameError::Kind(u8::MAX)),
            Forgery::Online => Ok(ToMaster::Online),
            Forgery::Listen => {
                let key = HandleKey {
                    endpoint: requested_endpoint(n),
                    index: u32::from(n / 64),
                };
                Ok(ToMaster::Listen {
                    request: u32::from(n % 4),
                    key,
                    flags: BindFlags::default(),
                })
            }
            Forgery::Listening => Ok(ToMaster::Listening { handle }),
            Forgery::Idle => Ok(ToMaster::Idle {
                handle,
                received: number % 4,
                open: u32::from(n),
            }),
            Forgery::ReceiveAndClose => {
                self.process(worker).is_liar = true;
                drop(self.receive_secretly(handle, worker));
                return;
            }
            Forgery::Release => Ok(ToMaster::Release { handle }),
            Forgery::Pause => Ok(ToMaster::Pause { handle }),
            Forgery::DisconnectRequest => Ok(ToMaster::DisconnectRequest),
            Forgery::Park => Ok(ToMaster::Park {
                handle,
                times_parked: 1,
            }),
            Forgery::ParkAgain => Ok(ToMaster::ParkAgain { connection }),
            Forgery::Detach => Ok(ToMaster::Detach { connection }),
            Forgery::Message => Ok(ToMaster::Message(vec![n; 4])),
        };
        self.forge(worker, frame);
    }
}
