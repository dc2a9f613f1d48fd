//! An `accept` that cannot be interrupted: it cannot be created, and the worker polls.

use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

#[derive(Debug)]
pub(crate) struct InterruptibleAccept(Infallible);

impl InterruptibleAccept {
    /// # Errors
    ///
    /// Always (`Unsupported`).
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn add(&self, _source: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn accept(
        &self,
        _listener: BorrowedFd<'_>,
        _deadline: Option<Instant>,
    ) -> io::Result<Option<OwnedFd>> {
        match self.0 {}
    }

    pub(crate) fn release(&self, _listener: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }
}
