//! The channel that the master left open for this process.

use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use super::fd::{NoLingerFd, close_on_exec};
use super::socket;

/// Returns whether this process is the socket's owner (`F_SETOWN` in fcntl(2)).
///
/// The owner stays the same when it executes another program, and when other processes inherit the
/// socket. Linux stores a reference to the process instead of its id. A process in another PID
/// namespace is therefore not the owner, even if its process id is the same.
pub(crate) fn is_owned(number: RawFd) -> bool {
    // SAFETY: F_GETOWN changes no memory and accepts any number.
    let owner = unsafe { libc::fcntl(number, libc::F_GETOWN) };
    u32::try_from(owner) == Ok(std::process::id())
}

/// Takes ownership of the channel that the master left open for this process, and removes the
/// preamble from it. Also returns the descriptors that came with the preamble. The caller has
/// already found the preamble with [`peek`](super::fd::peek), so this read does not wait.
///
/// # Errors
///
/// Returns EMFILE if no descriptor is free for the preamble's first descriptor. Also returns the
/// system's other errors.
pub(crate) fn adopt(number: RawFd, preamble: &mut [u8]) -> io::Result<AdoptedChannel> {
    // SAFETY: the descriptor is open, and its preamble shows that the master opened it for this
    // process. In a program that the master has executed, only `init` takes it, and `init` runs once.
    // In a child that executes no program, the master's `OwnedFd` with this number is never dropped,
    // because the function that holds it does not return there.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
    close_on_exec(number)?;
    stream.set_nonblocking(true)?;
    let received = socket::receive(stream.as_fd(), preamble)?;
    let mut fds = received.fds.into_iter().map(NoLingerFd::into_owned_fd);
    let token = fds.next();
    Ok(AdoptedChannel {
        stream,
        token: token.ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))?,
        shared_number: fds.next(),
    })
}

/// A worker's channel, and the descriptors that came with its preamble.
#[derive(Debug)]
pub(crate) struct AdoptedChannel {
    pub(crate) stream: UnixStream,
    /// The worker's end of its disconnect token.
    pub(crate) token: OwnedFd,
    /// The file for [`shared_number::Writer`](super::shared_number::Writer), if the master has sent
    /// one.
    pub(crate) shared_number: Option<OwnedFd>,
}
