//! What the program sends and receives.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use crate::sys::fd::CommonFd;

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
    fds: RefCell<Vec<CommonFd>>,
}

impl Message {
    pub(crate) fn new(bytes: Vec<u8>, fds: Vec<CommonFd>) -> Self {
        let fds = RefCell::new(fds);
        Self { bytes, fds }
    }

    pub(crate) fn has_fds(&self) -> bool {
        !self.fds.borrow().is_empty()
    }

    /// The descriptors that nobody has taken.
    pub(crate) fn untaken(&self) -> Vec<RawFd> {
        let fds = self.fds.borrow();
        fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect()
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
        self.fds.take().into_iter().map(CommonFd::claim).collect()
    }
}
