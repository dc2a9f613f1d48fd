//! Acts on the master besides the workers: as its application, the clients, the system and the
//! clock.

use std::io;

use super::Script;
use crate::error::Error;
use crate::sim::kernel::socket::Port;
use crate::sim::kernel::{Call, Failure, Master, MasterInput};
use crate::types::handle::HandleId;
use crate::types::time::Time;

impl Script {
    pub(super) fn call(&mut self, choice: u8) {
        let (hostile, honest) = (Some(self.hostile.id), Some(self.honest));
        let flag = choice & 32 != 0;
        let world = &mut self.world;
        match choice % 32 {
            0..=3 => world.call(Call::Disconnect, hostile, 0),
            4..=5 => world.call(Call::Kill, hostile, 0),
            6 => world.call(Call::Signal, hostile, 0),
            7..=10 => world.call(Call::CloseChannel, hostile, 0),
            11 if flag => world.call(Call::Ref, hostile, 0),
            11 => world.call(Call::Unref, hostile, 0),
            12..=14 => {
                // 32 is EPIPE: the peer has closed its end of the channel.
                let (worker, reason) = (hostile, io::Error::from_raw_os_error(32));
                world.report(|core| core.error(worker, Error::Channel { worker, reason }));
            }
            15..=16 => self.replace_hostile(),
            17 if flag && choice >= 128 => world.call(Call::UseScheduler, None, 0),
            17 if flag => world.call(Call::LimitParked, None, choice / 64),
            17 => world.report(Master::setup),
            18..=21 => self.sweep(choice / 64),
            22..=24 => {
                self.honest_is_dismissed = true;
                match choice % 32 {
                    22 => world.call(Call::Disconnect, honest, 0),
                    23 => world.disconnect_all(),
                    _ => world.call(Call::CloseChannel, honest, 0),
                }
            }
            25 => drop(world.failing.insert(Failure::Bind)),
            26 => drop(world.failing.insert(Failure::Accept)),
            27 => drop(world.failing.insert(Failure::Send)),
            28 => drop(world.failing.insert(Failure::Reclaim)),
            29 if flag => drop(world.failing.insert(Failure::Hold)),
            29 => drop(world.failing.insert(Failure::Share)),
            30 if flag => drop(world.failing.insert(Failure::Park)),
            30 => drop(world.failing.insert(Failure::Receive)),
            _ => {
                world.report_queue_lengths();
                self.settle();
                self.world.check_received();
            }
        }
    }

    /// Makes a quarter of the clients that wait in the master hang up.
    fn sweep(&mut self, quarter: u8) {
        self.world.sweep(usize::MAX, |client, fate| {
            fate.left || client % 4 == quarter.into()
        });
    }

    pub(super) fn connect(&mut self, choice: u8, count: u8) {
        for _ in 0..count {
            self.world.connect(choice);
        }
        self.poll();
    }

    /// Makes a client send a request, connect silently or hang up, or advances the clock by 100
    /// seconds.
    pub(super) fn client_event(&mut self, choice: u8) {
        let n = choice / 8;
        match choice % 8 {
            0..=1 => self.world.send_request(n),
            2..=4 => self.world.send_on_held(n),
            5 => self.world.connect_silently(n),
            6 => self.world.hang_up(n),
            // Exceed the default idle timeout, which is 60 seconds.
            _ => return self.pass_time(Time::from_secs(100)),
        }
        self.poll();
    }

    /// Makes the master's poller report ready listeners until no listener is ready.
    pub(super) fn poll(&mut self) {
        let is_ready = |(_, port): &(&HandleId, &Port)| port.is_ready();
        while let Some((handle, _)) = self.world.ports.iter().find(is_ready) {
            self.world.handle(MasterInput::Readable(*handle));
            self.settle();
        }
        loop {
            let reported = self.world.reported_held().next();
            let Some(id) = reported else {
                return;
            };
            self.world.handle(MasterInput::Held(id));
            self.settle();
        }
    }

    pub(super) fn pass(&mut self, millis: u8) {
        self.pass_time(Time::from_millis(millis.into()));
    }

    fn pass_time(&mut self, time: Time) {
        self.world.pass(time);
        self.run_honest();
        self.world.flush(self.honest);
        self.world.flush(self.hostile.id);
        // The events of one iteration may make something due at once, such as the sweep of a
        // listener that begins to drain. The next iteration must then be enough.
        for _ in 0..2 {
            self.world.handle(MasterInput::Time);
            self.settle();
        }
        let deadline = self.world.master.deadline();
        let is_later = |deadline| deadline > self.world.now();
        assert!(deadline.is_none_or(is_later), "the loop spins");
    }
}
