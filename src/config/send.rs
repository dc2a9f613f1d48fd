//! The options of `send_with`, and the result of sending.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Error, Result};

/// The result of a successful `send`: whether the sender may continue or should pause.
///
/// Node: the Boolean result of `worker.send()`. The message was accepted in both cases, and is written to
/// the channel in the order of the calls. It is dropped only if the channel closes first.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// use cluster::{SendOptions, Sent};
///
/// let options = SendOptions::new().on_written(|_, _| println!("send the next part"));
/// if worker.send_with(&[0; 32 * 1024], options)? == Sent::Pause {
///     println!("wait until this part is written");
/// }
/// # Ok(()) }
/// ```
#[must_use = "`Sent::Pause` asks to pause, because messages are piling up in this process"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Sent {
    /// More messages may follow at once.
    Continue,
    /// With one more message of the same size, more than 64 KiB would be waiting in this process. Pause
    /// until the [`on_written`](SendOptions::on_written) callback of the last message is called.
    Pause,
}

impl Sent {
    pub(crate) fn new(has_capacity: bool) -> Self {
        if has_capacity {
            Self::Continue
        } else {
            Self::Pause
        }
    }
}

/// A callback that is called when a message has been written, or cannot be written any more.
pub(crate) type Written<R> = Box<dyn FnOnce(&R, Result<()>)>;

/// The descriptors and the callback of a message, for [`WorkerProcess::send_with`](crate::WorkerProcess::send_with) in the
/// master and [`Worker::send_with`](crate::Worker::send_with) in a worker. `R` is
/// [`Master`](crate::Master) or [`Worker`](crate::Worker), whichever sends.
///
/// Node: `sendHandle`, `options` and `callback` of `worker.send()`.
///
/// This type is not `Send` if it has a callback. Build it on the thread of the master or the worker.
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
/// let _ = worker.send_with(b"serve this client, and log its request", options)?;
/// # Ok(()) }
/// ```
#[doc(alias = "sendHandle")]
#[must_use]
pub struct SendOptions<R> {
    fds: io::Result<Vec<OwnedFd>>,
    written: Option<Written<R>>,
}

impl<R> SendOptions<R> {
    /// Returns options without descriptors and without a callback.
    ///
    /// Node: no `options`. See [`SendOptions`] for an example.
    pub fn new() -> Self {
        Self {
            fds: Ok(Vec::new()),
            written: None,
        }
    }

    /// Adds a descriptor, which is closed in this process once it has been sent. A message has at most
    /// 16 descriptors.
    ///
    /// Node: `sendHandle`, without `keepOpen`. See [`SendOptions`] for an example.
    pub fn fd(mut self, fd: impl Into<OwnedFd>) -> Self {
        if let Ok(fds) = &mut self.fds {
            fds.push(fd.into());
        }
        self
    }

    /// Adds a copy of a descriptor, which stays open in this process. A message has at most 16
    /// descriptors.
    ///
    /// Node: `sendHandle`, with `keepOpen`. See [`SendOptions`] for an example.
    #[doc(alias = "keepOpen")]
    pub fn keep_open(mut self, fd: impl AsFd) -> Self {
        self.fds = self.fds.and_then(|mut fds| {
            fds.push(fd.as_fd().try_clone_to_owned()?);
            Ok(fds)
        });
        self
    }

    /// Sets the callback for the time when the message has been written to the channel, or cannot be
    /// written any more. It is not called if `send_with` itself fails, or if the `Master` or `Worker` is
    /// dropped first.
    ///
    /// Written does not mean read: the receiver may exit first.
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
        f.debug_struct("SendOptions")
            .field("fds", &self.fds)
            .finish_non_exhaustive()
    }
}
