//! What goes with a message.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Error, Result};

/// Called when a message has been written, or cannot be any more.
pub(crate) type Written<R> = Box<dyn FnOnce(&R, Result<()>)>;

/// What goes with a message, for [`WorkerProcess::send_with`](crate::WorkerProcess::send_with) in the
/// master and [`Worker::send_with`](crate::Worker::send_with) in a worker; `R` is which of both.
///
/// Node: `sendHandle`, `options` and `callback` of `worker.send()`.
///
/// ```no_run
/// # fn f(worker: &cluster::WorkerProcess, log: std::fs::File, client: std::net::TcpStream)
/// # -> cluster::Result<()> {
/// use cluster::SendOptions;
///
/// let options = SendOptions::new()
///     .fd(client)
///     .keep_open(&log)
///     .on_written(|_, outcome| println!("{outcome:?}"));
/// worker.send_with(b"serve this client, and write down what it wants", options)?;
/// # Ok(()) }
/// ```
#[must_use]
pub struct SendOptions<R> {
    fds: io::Result<Vec<OwnedFd>>,
    written: Option<Written<R>>,
}

impl<R> SendOptions<R> {
    /// Returns options that say nothing: a message of bytes alone.
    ///
    /// Node: no `options`. See [`SendOptions`] for an example.
    pub fn new() -> Self {
        Self {
            fds: Ok(Vec::new()),
            written: None,
        }
    }

    /// Adds a descriptor, which is closed here once it is sent; 16 at most.
    ///
    /// Node: `sendHandle`, without `keepOpen`. See [`SendOptions`] for an example.
    pub fn fd(mut self, fd: impl Into<OwnedFd>) -> Self {
        if let Ok(fds) = &mut self.fds {
            fds.push(fd.into());
        }
        self
    }

    /// Adds a copy of a descriptor, which the program keeps open; 16 at most.
    ///
    /// Node: `sendHandle`, with `keepOpen`. See [`SendOptions`] for an example.
    pub fn keep_open(mut self, fd: impl AsFd) -> Self {
        self.fds = self.fds.and_then(|mut fds| {
            fds.push(fd.as_fd().try_clone_to_owned()?);
            Ok(fds)
        });
        self
    }

    /// Calls back when the message has been written to the channel, or with an error when it
    /// cannot be any more. Not if `send_with` itself fails, or the `Master` or `Worker` is
    /// dropped first. Written is not read: the other side may end before that.
    ///
    /// Node: `callback`. See [`SendOptions`] for an example.
    pub fn on_written(mut self, callback: impl FnOnce(&R, Result<()>) + 'static) -> Self {
        self.written = Some(Box::new(callback));
        self
    }

    pub(crate) fn into_parts(self) -> Result<(Vec<OwnedFd>, Option<Written<R>>)> {
        let fds = self.fds.map_err(Error::io("copy a descriptor"))?;
        Ok((fds, self.written))
    }
}

impl<R> Default for SendOptions<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R> std::fmt::Debug for SendOptions<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fields = ("fds", &self.fds);
        f.debug_struct("SendOptions")
            .field(fields.0, fields.1)
            .finish_non_exhaustive()
    }
}
