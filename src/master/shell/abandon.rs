//! Closes or abandons the master's descriptors. A master closes them when it is dropped. A worker
//! that executes no program abandons them, because it has only a copy of the master's memory.

use std::any::Any;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, RawFd};
use std::rc::Rc;

use super::MasterShell;
use super::listeners::MasterSocket;
use super::passing::Successor;
use crate::core::master::{HandOff, MasterCore};
use crate::master::shard_group::ShardGroup;
use crate::sys;
use crate::sys::queue::Queue;
use crate::sys::socket_file::SocketFile;

impl MasterShell {
    /// Closes all channels and pipes. The workers disconnect when their channels close.
    pub(crate) fn close(&self) {
        for worker_io in self.workers.take().into_values() {
            if let Some(channel) = worker_io.channel.take() {
                // `discard` also shuts the channel down. Otherwise, a child of the application that
                // has a copy of the descriptor would keep the channel open.
                channel.discard();
            }
            worker_io.notify_disconnecting();
            worker_io.process.take();
            worker_io.stdio.take();
        }
        self.successor.take();
    }

    /// Removes the master's values without dropping them, in a worker that executes no program.
    /// Returns the numbers of the descriptors that the caller must close, because no value will
    /// close them any longer.
    ///
    /// If the application may have another handle of a descriptor, the method replaces the
    /// descriptor with `inert` instead. If such a descriptor were closed, its number would soon
    /// belong to another descriptor, which the application's handle would then use or close.
    pub(super) fn abandon(&self, inert: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        self.poller.abandon(inert)?;
        let mut numbers = self.unreaped.abandon();
        self.abandon_workers(&mut numbers);
        self.abandon_sockets(inert, &mut numbers)?;
        let queues = self.queues.take();
        let ends = queues.values().flat_map(Queue::descriptors);
        numbers.extend(ends.map(|end| end.as_raw_fd()));
        self.never_drop(queues);
        let successor = self.successor.take();
        numbers.extend(successor.iter().map(Successor::number));
        self.never_drop(successor);
        self.abandon_core(&mut numbers);
        Ok(numbers)
    }

    fn abandon_workers(&self, numbers: &mut Vec<RawFd>) {
        let workers = self.workers.take();
        for worker_io in workers.values() {
            let (channel, process) = (worker_io.channel.take(), worker_io.process.take());
            let (stdio, notifier) = (worker_io.stdio.take(), worker_io.disconnect_notifier.take());
            let descriptors = channel.iter().flat_map(|channel| channel.descriptors());
            numbers.extend(descriptors.map(|fd| fd.as_raw_fd()));
            numbers.extend(process.iter().map(|process| process.as_raw_fd()));
            numbers.extend(stdio.values().map(AsRawFd::as_raw_fd));
            numbers.extend(notifier.iter().map(AsRawFd::as_raw_fd));
            self.never_drop((channel, process, stdio, notifier));
        }
        self.never_drop(workers);
    }

    fn abandon_sockets(&self, inert: BorrowedFd<'_>, numbers: &mut Vec<RawFd>) -> io::Result<()> {
        let sockets = self.sockets.take();
        let abandoned = sockets.values().try_for_each(|own: &MasterSocket| {
            let file = own.file.iter().map(SocketFile::directory);
            numbers.extend(file.map(|directory| directory.as_raw_fd()));
            for socket in &own.sockets {
                // Replace the socket if a `MasterListener` of the application has another reference
                // to it.
                if Rc::strong_count(socket) > 1 {
                    sys::fd::replace(socket.as_raw_fd(), inert)?;
                } else {
                    numbers.push(socket.as_raw_fd());
                }
            }
            numbers.extend(own.group.iter().map(ShardGroup::number));
            Ok(())
        });
        self.never_drop(sockets);
        abandoned
    }

    /// Removes the connections and messages that wait in the master, and the message that is being
    /// delivered. Adds the numbers of their descriptors to `numbers`.
    fn abandon_core(&self, numbers: &mut Vec<RawFd>) {
        let policy = self.core.borrow().policy();
        let core = self.core.replace(MasterCore::new(policy));
        let held = self.held.take();
        numbers.extend(held.values().map(|fd| fd.as_fd().as_raw_fd()));
        let waiting = core.waiting().filter_map(|hand_off| match hand_off {
            HandOff::New(connection) => Some(connection),
            HandOff::Held(_) => None,
        });
        numbers.extend(waiting.map(|fd| fd.as_fd().as_raw_fd()));
        let undelivered = core.message_fds().flatten();
        numbers.extend(undelivered.map(|fd| fd.as_fd().as_raw_fd()));
        let delivering = self.delivering_fds.borrow().upgrade();
        let delivering = delivering.map(|unclaimed| unclaimed.take());
        let descriptors = delivering.iter().flatten();
        numbers.extend(descriptors.map(|fd| fd.as_fd().as_raw_fd()));
        self.never_drop((core, held, delivering));
    }

    /// Stores a value so that it is never dropped.
    fn never_drop(&self, value: impl Any) {
        let value: Box<dyn Any> = Box::new(value);
        self.abandoned.borrow_mut().push(ManuallyDrop::new(value));
    }
}
