//! Replaces Linux's interruptible `accept` with a type that cannot be created. The worker polls
//! instead.

use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Instant;

#[derive(Debug)]
pub(crate) struct InterruptibleAccept(Infallible);

impl InterruptibleAccept {
    /// Fails, because this system has no interruptible `accept`.
    ///
    /// # Errors
    ///
    /// Always returns `Unsupported`.
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn add(&self, _source: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn add_connection(&self, _connection: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn discard(&self) -> bool {
        match self.0 {}
    }

    pub(crate) fn remove_connection(_number: RawFd) {}

    pub(crate) fn accept(
        &self,
        _listener: BorrowedFd<'_>,
        _deadline: Option<Instant>,
    ) -> io::Result<Option<OwnedFd>> {
        match self.0 {}
    }

    pub(crate) fn unblock_signal(&self) {
        match self.0 {}
    }

    pub(crate) fn release(&self, _listener: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }
}
