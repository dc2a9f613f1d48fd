//! The listening socket of a status server, and its file.
//!
//! No worker can request this socket. A worker with a copy could make the socket block, and with it
//! the master.

use std::cell::RefCell;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cluster::Address;

use super::address::StatusAddress;

/// A listening socket. Dropping the value also removes the file in `file`.
#[derive(Debug)]
pub(in super::super) struct StatusSocket {
    listener: Rc<Listener>,
    /// The file that this process removes. `None` for a port, and while another master removes the
    /// file.
    file: RefCell<Option<SocketFile>>,
    /// Whether the old master that has passed this socket leaves the socket's file to this process.
    inherits_file: bool,
}

#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl StatusSocket {
    pub(super) fn bind(address: &StatusAddress) -> io::Result<Self> {
        let invalid = |reason| Err(io::Error::new(ErrorKind::InvalidInput, reason));
        match address {
            StatusAddress::Tcp(address) if address.ip().is_loopback() => {
                Self::new(Listener::Tcp(TcpListener::bind(address)?), None)
            }
            StatusAddress::Tcp(_) => invalid("not a loopback address"),
            StatusAddress::Unix(path) if path.as_os_str().as_bytes().starts_with(b"\0") => {
                invalid("an abstract socket has no mode")
            }
            StatusAddress::Unix(path) => {
                let listener = Listener::Unix(UnixListener::bind(path)?);
                let socket = Self::new(listener, Some(SocketFile::find(path)?))?;
                // Allow only this user and root to connect from now on. Until this call, the umask
                // decided which users could connect, so disconnect the clients that are waiting.
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                while socket.accept().is_ok() {}
                Ok(socket)
            }
        }
    }

    /// Returns the socket that an old master has passed. `inherits_file` says whether this process
    /// removes the socket's file after the takeover.
    pub(in super::super) fn passed(socket: OwnedFd, inherits_file: bool) -> io::Result<Self> {
        let tcp = TcpListener::from(socket.try_clone()?);
        let listener = match tcp.local_addr() {
            Ok(_) => Listener::Tcp(tcp),
            Err(_) => Listener::Unix(UnixListener::from(socket)),
        };
        let mut socket = Self::new(listener, None)?;
        socket.inherits_file = inherits_file;
        Ok(socket)
    }

    fn new(listener: Listener, file: Option<SocketFile>) -> io::Result<Self> {
        match &listener {
            Listener::Tcp(listener) => listener.set_nonblocking(true)?,
            Listener::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(Self {
            listener: Rc::new(listener),
            file: RefCell::new(file),
            inherits_file: false,
        })
    }

    pub(super) fn listener(&self) -> Rc<Listener> {
        Rc::clone(&self.listener)
    }

    /// Returns a copy of the socket for a new master.
    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    pub(super) fn address(&self) -> io::Result<Address> {
        match &*self.listener {
            Listener::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Listener::Unix(_) => path_of(&self.listener).map(Address::Unix),
        }
    }

    /// Returns whether a request for this address means this socket.
    pub(super) fn serves(&self, requested: &StatusAddress) -> bool {
        match (self.address(), requested) {
            (Ok(Address::Tcp(own)), StatusAddress::Tcp(address)) => {
                own.ip() == address.ip() && [0, own.port()].contains(&address.port())
            }
            (Ok(Address::Unix(own)), StatusAddress::Unix(path)) => own == *path,
            _ => false,
        }
    }

    /// Accepts a client. Returns a `UnixStream` even for a TCP client, because reading, writing and
    /// shutting down work by the descriptor alone.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let stream = match &*self.listener {
            Listener::Tcp(listener) => UnixStream::from(OwnedFd::from(listener.accept()?.0)),
            Listener::Unix(listener) => listener.accept()?.0,
        };
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Returns whether this process removes the socket's file, and no other file has replaced it.
    pub(super) fn removes_file(&self) -> bool {
        let file = self.file.borrow();
        file.as_ref().is_some_and(SocketFile::is_in_place)
    }

    /// Returns whether this process removes the socket's file, and the path does not lead to it.
    pub(super) fn has_lost_path(&self) -> bool {
        let file = self.file.borrow();
        file.as_ref().is_some_and(|file| !file.is_in_place())
    }

    /// Makes this process remove the socket's file, if the old master has left it to this process.
    pub(super) fn inherit_file(&self) {
        if self.inherits_file && self.file.borrow().is_none() {
            // Ignore an error, which usually means that the file has been removed. This process
            // then removes no file.
            let file = path_of(&self.listener).and_then(|path| SocketFile::find(&path));
            self.file.replace(file.ok());
        }
    }

    /// Leaves the socket's file to a new master.
    pub(super) fn release_file(&self) {
        self.file.take();
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Ignore an error, because the caller cannot handle it.
            let _ = file.remove();
        }
    }
}

fn path_of(listener: &Listener) -> io::Result<PathBuf> {
    let Listener::Unix(listener) = listener else {
        return Err(ErrorKind::Unsupported.into());
    };
    let address = listener.local_addr()?;
    let path = address.as_pathname().ok_or(ErrorKind::Unsupported)?;
    Ok(path.to_owned())
}

/// The file of a Unix socket.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// The id of the process that removes the file. A forked child has a copy of this value, but
    /// must not remove the file.
    owner: u32,
}

impl SocketFile {
    fn find(path: &Path) -> io::Result<Self> {
        // Make the path absolute, because the application may change its working directory.
        let path = std::path::absolute(path)?;
        let data = fs::symlink_metadata(&path)?;
        Ok(Self {
            path,
            device: data.dev(),
            inode: data.ino(),
            owner: std::process::id(),
        })
    }

    /// Returns whether the file is still in its place, and no other file has replaced it.
    fn is_in_place(&self) -> bool {
        let data = fs::symlink_metadata(&self.path);
        data.is_ok_and(|data| (data.dev(), data.ino()) == (self.device, self.inode))
    }

    /// Removes the file, unless another file has replaced it.
    fn remove(self) -> io::Result<()> {
        if self.owner == std::process::id() && self.is_in_place() {
            fs::remove_file(&self.path)?;
        }
        Ok(())
    }
}
