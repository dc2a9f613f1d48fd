//! The well-behaved worker, and its application.

use super::Script;
use crate::core::worker::{ListenStatus, ListenerId};
use crate::sim::kernel::socket::endpoint;
use crate::sim::kernel::worker::application::requested_parking;

/// The maximum number of listeners of the well-behaved worker's application.
const MAX_HONEST_LISTENERS: usize = 4;

impl Script {
    pub(super) fn honest_reads(&mut self) -> bool {
        let has_read = self.world.worker_reads(self.honest);
        self.world.flush(self.honest);
        self.run_honest();
        has_read
    }

    /// Runs the well-behaved worker's library, and resumes the application that blocks in `accept`.
    /// Repeats both as long as `accept` returns.
    pub(super) fn run_honest(&mut self) {
        loop {
            self.world.run_worker(self.honest);
            if !self.world.try_blocking_accept(self.honest) {
                break;
            }
        }
    }

    /// Makes the well-behaved worker's application wait for events, unless it blocks in `accept`.
    /// Then makes the worker's poller report every watched listener, whether ready or not.
    fn poll_honest(&mut self) {
        let process = self.world.process(self.honest);
        if process.accepting.is_none() {
            process.core.waiting_for_events();
        }
        self.world.poll_listeners(self.honest);
        self.run_honest();
    }

    /// Makes the well-behaved worker's application use, open or close a listener, or close a
    /// connection.
    pub(super) fn run_honest_application(&mut self, choice: u8) {
        let process = self.world.process(self.honest);
        let count = process.listeners.len();
        match choice % 8 {
            0 if count < MAX_HONEST_LISTENERS => {
                let endpoint = endpoint((choice / 8).into());
                let parking = requested_parking(self.parking);
                self.world.listen_with(self.honest, endpoint, parking);
            }
            1 if choice >= 128 => self.world.finish_connection(self.honest, choice / 8),
            1 => drop(self.world.close_connection(self.honest, choice / 8)),
            2 => self.world.park_connection(self.honest, choice / 8),
            3 => self.poll_honest(),
            4..=7 if count > 0 => {
                let listener = process.listeners[usize::from(choice / 8) % count];
                match process.core.listen_status(listener) {
                    ListenStatus::Pending => {}
                    ListenStatus::Failed(_) => self.world.drop_listener(self.honest, listener),
                    ListenStatus::Done(_) => self.use_listener(listener, choice),
                }
            }
            _ => {}
        }
        self.run_honest();
    }

    fn use_listener(&mut self, listener: ListenerId, choice: u8) {
        let process = self.world.process(self.honest);
        let core = &mut process.core;
        if core.is_datagram(listener) {
            return;
        }
        if choice >= 192 {
            let limit = (choice & 32 == 0).then_some(0);
            core.set_connection_limit(listener, limit);
        } else if choice >= 128 {
            if process.accepting != Some(listener) {
                self.world.drop_listener(self.honest, listener);
            }
        } else if choice % 8 == 4 {
            core.listening(listener);
        } else if choice % 8 == 5 {
            core.use_callback(listener);
        } else if process.accepting.is_none() && !core.has_callback(listener) {
            process.accepting = Some(listener);
        }
    }

    /// Delivers frames between the master and the well-behaved worker until none is in flight.
    pub(super) fn exchange(&mut self) {
        loop {
            self.poll_honest();
            let has_received = self.world.master_receives(self.honest);
            self.settle();
            if !self.honest_reads() && !has_received {
                break;
            }
        }
    }
}
