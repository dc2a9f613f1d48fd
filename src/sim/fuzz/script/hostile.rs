//! The hostile worker: the bytes and frames that it writes to the master, and its exit.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::Script;
use crate::sim::fuzz::{Input, descriptors};
use crate::sim::kernel::socket::{Queued, endpoint};
use crate::sim::kernel::{MasterInput, nth};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::BindFlags;
use crate::types::errno;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::protocol::MAX_BODY;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::{MAX_EARLY_FDS, READ_SIZE};
use crate::wire::frame::header::{BATCH_OFFSET, HEADER, MAX_BATCH};
use crate::wire::frame::{Bound, Frame, ToMaster, ToWorker};

/// The state of the hostile worker.
pub(super) struct Hostile {
    pub(super) id: WorkerId,
    is_online: bool,
    /// For each endpoint number, the number of times that `cooperate` has requested the endpoint.
    requested: BTreeMap<u32, u32>,
    listeners: BTreeSet<HandleId>,
    /// The connections that the worker has received and not closed, each with its listener.
    received: Vec<(HandleId, Queued)>,
}

impl Hostile {
    pub(super) fn new(id: WorkerId) -> Self {
        Self {
            id,
            is_online: false,
            requested: BTreeMap::new(),
            listeners: BTreeSet::new(),
            received: Vec::new(),
        }
    }
}

impl Script {
    pub(super) fn hostile_reads(&mut self) {
        while let Some(frame) = self.world.raw_reads(self.hostile.id) {
            if let ToWorker::Reply { result, .. } = frame {
                match result {
                    Ok(Bound { handle, .. }) => drop(self.hostile.listeners.insert(handle)),
                    Err(errno) => self.denied += usize::from(errno == errno::EMFILE),
                }
            }
        }
    }

    /// Writes bytes and `fds` descriptors from the hostile worker to the master, which processes
    /// them. `lost_fds` tells the master that the kernel has dropped more descriptors.
    pub(super) fn write(&mut self, bytes: &[u8], fds: usize, lost_fds: bool) {
        let id = self.hostile.id;
        let process = self.world.process(id);
        if !process.master_end || !process.worker_end {
            return;
        }
        let inbox = process.inbox.as_mut().expect("a raw worker");
        inbox.push_fds(descriptors(fds), lost_fds);
        inbox.push(bytes);
        while self.world.master_reads(id) {
            self.settle();
        }
        self.settle();
        let process = self.world.process(id);
        let size = process.inbox.as_ref().expect("a raw worker").size();
        assert!(size.bytes <= HEADER + MAX_BODY + READ_SIZE);
        assert!(!process.master_end || size.fds <= MAX_EARLY_FDS + MAX_BATCH);
    }

    /// Writes a well-formed frame from the hostile worker to the master, in one or two pieces.
    pub(super) fn write_frame(&mut self, input: &mut Input<'_>) {
        let frame = self.invent(input);
        let (fds, lost_fds) = match frame {
            ToMaster::Message(_) => {
                let choices = [(0, false), (1, false), (3, false), (1, true)];
                choices[usize::from(input.byte()) % 4]
            }
            ToMaster::Park { .. } => [(1, false), (0, true)][usize::from(input.byte()) % 8 / 7],
            ToMaster::Online
            | ToMaster::Listen { .. }
            | ToMaster::Listening { .. }
            | ToMaster::Idle { .. }
            | ToMaster::Release { .. }
            | ToMaster::DisconnectRequest
            | ToMaster::Pause { .. }
            | ToMaster::ParkAgain { .. }
            | ToMaster::Detach { .. } => (0, false),
        };
        let mut bytes = Vec::new();
        let announced = fds + usize::from(lost_fds);
        frame.encode(announced, &mut bytes);
        bytes[BATCH_OFFSET] = u8::try_from(announced).unwrap_or(0);
        let at = usize::from(input.byte()).min(bytes.len());
        let (first, second) = bytes.split_at(at);
        self.write(first, fds, lost_fds);
        self.write(second, 0, false);
    }

    fn invent(&self, input: &mut Input<'_>) -> ToMaster {
        let choice = input.byte();
        let handle = HandleId(u32::from(choice / 8));
        let received = self.world.count_received(handle, self.hostile.id);
        match choice % 8 {
            0 => ToMaster::Online,
            1 => ToMaster::Listen {
                request: input.number(),
                key: HandleKey {
                    endpoint: endpoint(input.number()),
                    index: input.number(),
                },
                flags: BindFlags::default(),
            },
            2 => ToMaster::Listening { handle },
            3 => ToMaster::Idle {
                handle,
                received: input.long(),
                open: input.number(),
            },
            // Add the input's number to the real count of received connections. The master accepts
            // any sum up to the number of dispatched connections, and would reject most arbitrary
            // numbers.
            4 => ToMaster::Idle {
                handle,
                received: received.saturating_add(input.long()),
                open: input.number(),
            },
            5 => ToMaster::Release { handle },
            6 => ToMaster::Pause { handle },
            _ if choice == 255 => ToMaster::DisconnectRequest,
            _ if choice == 15 => ToMaster::Park {
                handle: HandleId(input.number()),
                times_parked: 1,
            },
            _ if choice == 23 => ToMaster::ParkAgain {
                connection: self.connection(input.number()),
            },
            _ if choice == 31 => ToMaster::Detach {
                connection: self.connection(input.number()),
            },
            _ => ToMaster::Message(vec![0; choice.into()]),
        }
    }

    /// Returns the id `number`. If `number` is 200 or more, returns instead the id of a connection
    /// in one of the hostile worker's queues, if there is one.
    fn connection(&self, number: u32) -> ConnectionId {
        let queues = self.world.queues.iter();
        let own = queues.filter(|((_, worker), _)| *worker == self.hostile.id);
        let queued = own.flat_map(|(_, queue)| &queue.connections);
        let held = queued.filter_map(|queued| queued.resumed);
        let own = match number {
            200.. => nth(held, number.to_le_bytes()[0]),
            _ => None,
        };
        own.map_or(ConnectionId(number), |resumed| resumed.connection)
    }

    /// Makes the hostile worker park, close or keep each connection that it has received, as a
    /// well-behaved worker does. The client's number decides.
    pub(super) fn dispose_of_received(&mut self) {
        for (handle, queued) in std::mem::take(&mut self.hostile.received) {
            let Queued {
                connection,
                resumed,
                ..
            } = queued;
            let frame = match (connection.client % 4, resumed) {
                (0, None) => continue,
                (0, Some(resumed)) => ToMaster::Detach {
                    connection: resumed.connection,
                },
                (1, _) => {
                    self.hostile.received.push((
                        handle,
                        Queued {
                            sequence: queued.sequence,
                            connection,
                            resumed,
                        },
                    ));
                    continue;
                }
                (_, Some(resumed)) => ToMaster::ParkAgain {
                    connection: resumed.connection,
                },
                (_, None) => {
                    let process = self.world.process(self.hostile.id);
                    process.to_park.push_back(connection);
                    ToMaster::Park {
                        handle,
                        times_parked: 1,
                    }
                }
            };
            let fds = usize::from(matches!(frame, ToMaster::Park { .. }));
            let mut bytes = Vec::new();
            frame.encode(fds, &mut bytes);
            bytes[BATCH_OFFSET] = u8::try_from(fds).unwrap_or(0);
            self.write(&bytes, fds, false);
        }
    }

    /// Makes the hostile worker behave well, except that it may shut its own queue down.
    pub(super) fn cooperate(&mut self, choice: u8) {
        let (id, kind, more) = (self.hostile.id, choice % 8, u32::from(choice / 8));
        let count = self.hostile.listeners.len().max(1);
        let mut listeners = self.hostile.listeners.iter();
        let listener = listeners.nth(more as usize % count).copied();
        let frame = match (kind, listener) {
            _ if !std::mem::replace(&mut self.hostile.is_online, true) => ToMaster::Online,
            (0, _) | (_, None) => {
                let requested = self.hostile.requested.entry(more).or_default();
                let index = *requested;
                *requested += 1;
                let endpoint = endpoint(more);
                ToMaster::Listen {
                    request: 1,
                    key: HandleKey { endpoint, index },
                    flags: BindFlags::default(),
                }
            }
            (1, Some(handle)) => {
                self.receive(handle);
                return;
            }
            (4, Some(handle)) => ToMaster::Pause { handle },
            (5, Some(handle)) if more % 4 == 3 => {
                self.hostile.listeners.remove(&handle);
                ToMaster::Release { handle }
            }
            (5, Some(handle)) if more % 4 == 2 => {
                if let Some(queue) = self.world.queues.get_mut(&(handle, id)) {
                    queue.is_shut = true;
                }
                return;
            }
            (2 | 3, Some(handle)) => {
                self.receive(handle);
                self.dispose_of_received();
                self.idle(handle)
            }
            (_, Some(handle)) => {
                while self.receive(handle) {}
                self.dispose_of_received();
                self.idle(handle)
            }
        };
        let mut bytes = Vec::new();
        frame.encode(0, &mut bytes);
        self.write(&bytes, 0, false);
    }

    fn receive(&mut self, handle: HandleId) -> bool {
        let id = self.hostile.id;
        if !self.world.processes[&id].is_alive() {
            return false;
        }
        let queued = self.world.receive_secretly(handle, id);
        let is_any = queued.is_some();
        let queued = queued.map(|queued| (handle, queued));
        self.hostile.received.extend(queued);
        is_any
    }

    /// Returns a truthful `Idle` frame.
    fn idle(&self, handle: HandleId) -> ToMaster {
        ToMaster::Idle {
            handle,
            received: self.world.count_received(handle, self.hostile.id),
            open: 0,
        }
    }

    pub(super) fn close_hostile_channel(&mut self) {
        let id = self.hostile.id;
        if self.world.process(id).master_end {
            self.world.process(id).close_end();
            self.world.handle(MasterInput::End(id));
        }
    }

    pub(super) fn exit_hostile(&mut self) {
        let id = self.hostile.id;
        if self.world.process(id).is_alive() {
            self.hostile.received.clear();
            self.world.exit(id, ExitStatus::from_raw(9));
            self.world.handle(MasterInput::Exit(id));
        }
    }

    /// Forks another hostile worker if the current one has exited and its channel is closed.
    pub(super) fn replace_hostile(&mut self) {
        let process = &self.world.processes[&self.hostile.id];
        if !process.master_end && !process.is_alive() {
            self.hostile = Hostile::new(self.world.fork_raw());
        }
    }
}
