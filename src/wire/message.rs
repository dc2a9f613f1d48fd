//! The messages that the application sends and receives.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::sys::fd::NoLingerFd;

/// A received message: bytes, and the descriptors that arrived with them.
///
/// Node: the arguments `message` and `handle` of the `message` event.
///
/// The application defines the meaning of the bytes. Descriptors that no callback takes are closed
/// when the message is dropped.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) {
/// worker.on_message(|_, message| {
///     let text = String::from_utf8_lossy(message.bytes());
///     let descriptors = message.take_fds();
///     assert_eq!(text, format!("here are {}", descriptors.len()));
/// });
/// # }
/// ```
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
    /// The descriptors of the message. `None` if the message arrived without any.
    fds: Option<Rc<UnclaimedFds>>,
}

/// The descriptors that no callback has taken. The master's shell shares them, because a callback
/// may fork a worker while the message is being delivered, and the child must close them.
pub(crate) type UnclaimedFds = RefCell<Vec<NoLingerFd>>;

impl Message {
    pub(crate) fn new(bytes: Vec<u8>, fds: Vec<NoLingerFd>) -> Self {
        let fds = (!fds.is_empty()).then(|| Rc::new(RefCell::new(fds)));
        Self { bytes, fds }
    }

    pub(crate) fn unclaimed_fds(&self) -> Option<&Rc<UnclaimedFds>> {
        self.fds.as_ref()
    }

    /// Returns the message's bytes, at most 1 MiB.
    ///
    /// Node: `message`.
    ///
    /// See [`Message`] for an example.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the message's descriptors, at most 16. All callbacks of an event share the message, so
    /// only the first call returns descriptors.
    ///
    /// Node: `handle`.
    ///
    /// See [`Message`] for an example.
    #[must_use]
    pub fn take_fds(&self) -> Vec<OwnedFd> {
        let fds = self.fds.iter().flat_map(|fds| fds.take());
        fds.map(NoLingerFd::into_owned_fd).collect()
    }
}
