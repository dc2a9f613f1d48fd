//! Replaces Linux's packet filters with functions that succeed without effect, because sockets have
//! no filters here.
//!
//! As a result, new connections still arrive while the caller accepts the backlog. The kernel
//! chooses the socket of a group itself.

use std::io;
use std::os::fd::OwnedFd;

pub(crate) fn attach_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

pub(crate) fn detach_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

pub(crate) fn detach_foreign_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

pub(crate) fn lock_filter(_socket: &OwnedFd) -> io::Result<()> {
    Ok(())
}

pub(crate) fn select_sockets(_listener: &OwnedFd, _indexes: &[usize]) -> io::Result<()> {
    Ok(())
}
