//! The process of a worker, seen from the worker itself.

use crate::worker::Worker;

/// This worker's own process: its id, and its channel to the master.
///
/// Node: `process`.
///
/// See [`Worker::process`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct OwnProcess<'a>(&'a Worker);

impl<'a> OwnProcess<'a> {
    pub(super) fn new(worker: &'a Worker) -> Self {
        Self(worker)
    }
}

impl OwnProcess<'_> {
    /// Returns the process id.
    ///
    /// Node: `process.pid`.
    ///
    /// See [`Worker::process`] for an example.
    #[doc(alias = "pid")]
    #[must_use]
    pub fn id(&self) -> u32 {
        std::process::id()
    }

    /// Closes the channel without a disconnect request, once all sent messages have been written.
    ///
    /// Node: `process.disconnect()`.
    ///
    /// Unless the worker is already disconnecting, [`run`](Worker::run) and
    /// [`Listener::accept`](crate::Listener::accept) then return even if connections are open. The
    /// call does not count as a disconnect request
    /// ([`Worker::exited_after_disconnect`]). For an orderly exit, use [`Worker::disconnect`].
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.process().disconnect();
    /// worker.run()
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.0.inner.shell.core.borrow_mut().close_channel();
        self.0.inner.shell.act();
    }

    /// Lets [`run`](Worker::run) return although the channel is open. `run` then returns when
    /// nothing else is left to wait for and all sent messages have been written.
    ///
    /// Node: `process.channel.unref()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let _ = worker.send(b"done")?;
    /// worker.process().unreference();
    /// worker.run()
    /// # }
    /// ```
    #[doc(alias = "unref")]
    pub fn unreference(&self) {
        self.set_referenced(false);
    }

    /// Undoes [`unreference`](Self::unreference).
    ///
    /// Node: `process.channel.ref()`.
    ///
    /// See [`unreference`](Self::unreference) for an example of its effect.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.set_referenced(true);
    }

    fn set_referenced(&self, referenced: bool) {
        let mut core = self.0.inner.shell.core.borrow_mut();
        core.reference(None, referenced);
    }
}
