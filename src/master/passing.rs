//! Passing idle connections from one master to the next.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::master::Master;
use crate::sys;
use crate::sys::poll::Interest;
use crate::wire::parked_message::inbox::Inbox;

impl Master {
    /// Passes idle connections to another master, so that they stay open when this master and its
    /// workers exit.
    ///
    /// Node has no counterpart.
    ///
    /// The other master must have copies of this master's listening sockets
    /// ([`adopt`](Self::adopt)), and must call [`receive_parked`](Self::receive_parked) with the
    /// other end of the stream. [`Pool::upgrade`](crate::pool::Pool::upgrade) does both.
    ///
    /// From the call on, this master passes
    ///
    /// - the [parked](crate::Connection::park) connections, and those that wait for data
    ///   ([`ListenOptions::wait_for_data`](crate::ListenOptions::wait_for_data));
    /// - parked connections whose clients have sent a request that no worker has received;
    /// - connections that a worker parks later;
    /// - with the policies other than [`SchedulingPolicy::RoundRobin`], the idle connections that a
    ///   worker holds itself, when the worker disconnects or closes the listener.
    ///
    /// Workers keep the connections that they have, and still receive new ones. The call does not
    /// wait. While the other master does not read, this master keeps the connections.
    /// [`run`](Self::run) returns only when all connections have been passed. It also waits for the
    /// end of each master from which this one [receives](Self::receive_parked) connections, because
    /// it passes those connections on.
    ///
    /// If the other master closes its end, or when `timeout` has passed since the call, this master
    /// holds its connections again. If connections were waiting to be passed, it
    /// reports an error ([`on_error`](Self::on_error)). A second call replaces the stream of the
    /// first one.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the stream cannot be watched, and [`Error::ForeignProcess`] in a
    /// process that did not create the master. This master then holds its connections as before.
    ///
    /// [`SchedulingPolicy::RoundRobin`]: crate::SchedulingPolicy::RoundRobin
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, successor: std::os::unix::net::UnixStream) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// // The other master serves.
    /// let timeout = Duration::from_secs(10);
    /// master.pass_parked(successor, timeout)?;
    /// master.disconnect_within(timeout);
    /// # Ok(()) }
    /// ```
    pub fn pass_parked(&self, successor: UnixStream, timeout: Duration) -> Result<()> {
        self.event_loop.check_own()?;
        self.shell.pass_parked(successor, timeout)
    }

    /// Receives the idle connections that another master [passes](Self::pass_parked) to this one.
    /// When the other master closes its end of the stream, for instance because it exits, `on_end`
    /// is called.
    ///
    /// Node has no counterpart.
    ///
    /// Each connection belongs to the listener with the same socket, which this master must have
    /// [adopted](Self::adopt) before. The connections of all shards of a
    /// [sharded](crate::SchedulingPolicy::Sharded) listener belong to its first shard, because an
    /// upgrade passes only that socket. The number of a connection's requests
    /// ([`Connection::requests`](crate::Connection::requests)) continues.
    ///
    /// With [`SchedulingPolicy::RoundRobin`], this master holds the connection. With the other
    /// policies, it sends the connection to the listener's workers in turn, and holds it while no
    /// worker serves the listener. The other master may use another policy. Only workers with the
    /// user and group of the worker that [parked](crate::Connection::park) the connection receive
    /// it.
    ///
    /// [`Ledger::parked`] counts the connection. If this master does not have the listener, has no
    /// free descriptor, or has only workers of other users on the listener, the connection is
    /// closed, and [`Ledger::idle_closed`] counts it too. If the other master belongs to another
    /// release with other messages, all its connections are closed.
    ///
    /// The loop receives the connections. [`run`](Self::run) does not wait for them, unless this
    /// master passes its own connections to a third one.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the stream cannot be watched, and [`Error::ForeignProcess`] in a
    /// process that did not create the master. `on_end` is then never called.
    ///
    /// [`Ledger::parked`]: crate::Ledger::parked
    /// [`Ledger::idle_closed`]: crate::Ledger::idle_closed
    /// [`SchedulingPolicy::RoundRobin`]: crate::SchedulingPolicy::RoundRobin
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, predecessor: std::os::unix::net::UnixStream) -> cluster::Result<()> {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// master.receive_parked(predecessor, move |_| log.line("the old master has exited"))?;
    /// # Ok(()) }
    /// ```
    pub fn receive_parked(
        &self,
        predecessor: UnixStream,
        on_end: impl FnOnce(&Self) + 'static,
    ) -> Result<()> {
        let attempt = "receive connections from another master";
        sys::socket::enable_oob_inline(&predecessor).map_err(Error::io(attempt))?;
        let (mut inbox, mut on_end) = (Inbox::default(), Some(on_end));
        let on_readable = move |master: &Self, stream: &UnixStream| {
            if master.shell.receive_parked(stream, &mut inbox) {
                return Some(Interest::Readable);
            }
            master.shell.remove_predecessor();
            if let Some(on_end) = on_end.take() {
                on_end(master);
            }
            None
        };
        let watch = self.watch(predecessor, Interest::Readable, on_readable)?;
        self.unreference(watch);
        self.shell.add_predecessor();
        Ok(())
    }
}
