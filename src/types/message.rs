//! What the program sends and receives.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::sys::fd::NoLingerFd;

/// A message as it arrived: bytes, and the descriptors that came with it.
///
/// Node: the arguments `message` and `handle` of the `message` event. What the bytes mean is the
/// program's choice. Descriptors that nobody takes are closed with the message.
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
    /// `None` if none has come with it.
    fds: Option<Rc<UntakenFds>>,
}

/// The descriptors that nobody has taken: also for whoever forks while the program is being told.
pub(crate) type UntakenFds = RefCell<Vec<NoLingerFd>>;

impl Message {
    pub(crate) fn new(bytes: Vec<u8>, fds: Vec<NoLingerFd>) -> Self {
        let fds = (!fds.is_empty()).then(|| Rc::new(RefCell::new(fds)));
        Self { bytes, fds }
    }

    pub(crate) fn untaken(&self) -> Option<&Rc<UntakenFds>> {
        self.fds.as_ref()
    }

    /// Returns the bytes as they were sent, at most 1 MiB.
    ///
    /// Node: `message`. See [`Message`] for an example.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the descriptors, at most 16; all callbacks of one event see the same message, and
    /// the first to ask gets them.
    ///
    /// Node: `handle`. See [`Message`] for an example.
    #[must_use]
    pub fn take_fds(&self) -> Vec<OwnedFd> {
        let fds = self.fds.iter().flat_map(|fds| fds.take());
        fds.map(NoLingerFd::into_owned_fd).collect()
    }
}
