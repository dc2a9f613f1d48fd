//! The options of `send_with`, and the result of sending.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Error, Result};

/// The result of a successful `send`. The variants say whether the sender should pause.
///
/// Node: the Boolean result of `worker.send()`.
///
/// In both cases the message was accepted. Messages are written to the channel in the order of the
/// calls. A message is lost only if the channel closes first.
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
    /// The sender may send the next message immediately.
    Continue,
    /// The sender should pause until the last message's [`on_written`](SendOptions::on_written)
    /// callback is called. One more message of the same size would leave more than 64 KiB waiting
    /// in this process.
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

/// A callback that is called when a message has been written or can no longer be written.
pub(crate) type Written<R> = Box<dyn FnOnce(&R, Result<()>)>;

/// A message's descriptors and callback. The master passes them to
/// [`WorkerProcess::send_with`](crate::WorkerProcess::send_with), and a worker to
/// [`Worker::send_with`](crate::Worker::send_with).
///
/// The type parameter `R` is the sender's type, [`Master`](crate::Master) or
/// [`Worker`](crate::Worker).
///
/// Node: `sendHandle`, `options` and `callback` of `worker.send()`.
///
/// This type is not `Send`. Build the options on the thread of the master or worker that sends.
///
/// ```no_run
/// # fn f(master: &cluster::Master, worker: &cluster::WorkerProcess, file: std::fs::File,
/// # client: std::net::TcpStream) -> cluster::Result<()> {
/// use cluster::{LogWriter, SendOptions};
///
/// let log = LogWriter::stderr().attached_to(master);
/// let options = SendOptions::new()
///     .fd(client)
///     .keep_open(&file)
///     .on_written(move |_, outcome| log.line(format_args!("{outcome:?}")));
/// let _ = worker.send_with(b"serve this client, and append its request to the file", options)?;
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
    /// Node: no `options`.
    ///
    /// See [`SendOptions`] for an example.
    pub fn new() -> Self {
        Self {
            fds: Ok(Vec::new()),
            written: None,
        }
    }

    /// Adds a descriptor. This process closes the descriptor once it has been sent. A message can
    /// carry at most 16 descriptors.
    ///
    /// Node: `sendHandle`, without `keepOpen`.
    ///
    /// See [`SendOptions`] for an example.
    pub fn fd(mut self, fd: impl Into<OwnedFd>) -> Self {
        if let Ok(fds) = &mut self.fds {
            fds.push(fd.into());
        }
        self
    }

    /// Adds a copy of a descriptor. The original stays open in this process. A message can carry at
    /// most 16 descriptors.
    ///
    /// Node: `sendHandle`, with `keepOpen`.
    ///
    /// See [`SendOptions`] for an example.
    #[doc(alias = "keepOpen")]
    pub fn keep_open(mut self, fd: impl AsFd) -> Self {
        self.fds = self.fds.and_then(|mut fds| {
            fds.push(fd.as_fd().try_clone_to_owned()?);
            Ok(fds)
        });
        self
    }

    /// Sets a callback that is called when the message has been written or can no longer be
    /// written. The callback is not called if `send_with` itself fails, or if the sending `Master`
    /// or `Worker` is dropped first.
    ///
    /// A written message may still remain unread, because the receiver may exit first.
    ///
    /// Node: `callback`.
    ///
    /// See [`SendOptions`] for an example.
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
