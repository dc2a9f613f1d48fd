//! How a worker listens, as the program says it.

use std::io;
use std::marker::PhantomData;
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream,
    ToSocketAddrs as _,
};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;

/// The system has no longer paths; with the directory before it, this one still fits a frame.
const MAX_PATH: usize = 4096;

/// What to listen on, and how: the argument of [`Worker::listen`](crate::Worker::listen) and
/// [`Master::listen`](crate::Master::listen).
///
/// Node: the options of `server.listen()`. It is made from
///
/// - a port, `8000`: on all of the machine's addresses, IPv6 and IPv4;
/// - an address, `"127.0.0.1:8000"`, `("::1", 8000)` or a [`SocketAddr`]; a name is looked up;
/// - a [`Path`] (a string would be an address): a Unix socket, whose connections are
///   [`UnixStream`]s;
/// - a listener that the program has already: a worker keeps it to itself, a master shares it.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// use std::path::Path;
/// use cluster::ListenOptions;
///
/// let http = worker.listen(ListenOptions::from(80).backlog(4096))?;
/// let v6 = worker.listen(ListenOptions::from("[::]:443").ipv6_only(true))?;
/// let local = worker.listen(Path::new("app.sock"))?;
/// # Ok(()) }
/// ```
///
/// A function for both kinds of connections:
///
/// ```no_run
/// use std::{io::{Read, Write}, os::fd::OwnedFd};
/// use cluster::Listener;
///
/// fn serve<S: From<OwnedFd> + Read + Write>(listener: &Listener<S>) -> cluster::Result<()> {
///     for connection in listener.incoming() {
///         let _ = connection?.write_all(b"hello\n");
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct ListenOptions<S = TcpStream> {
    pub(crate) bind_request: BindRequest,
    streams: PhantomData<fn() -> S>,
}

/// What to bind a UDP socket to, and how: the argument of
/// [`Worker::bind`](crate::Worker::bind).
///
/// Node: the options of `dgram.createSocket()` and `socket.bind()`. It is made from a port, `53`,
/// which is bound on all IPv4 addresses, or from an address, `"[::]:53"`, `("::1", 53)` or a
/// [`SocketAddr`]; a name is looked up.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// use cluster::BindOptions;
///
/// let dns = worker.bind(53)?;
/// let v6 = worker.bind(BindOptions::from("[::]:53").ipv6_only(true))?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct BindOptions {
    pub(crate) bind_request: BindRequest,
}

/// What both kinds of options come to.
#[derive(Debug)]
pub(crate) struct BindRequest {
    pub(crate) kind: Kind,
    target: Target,
    pub(crate) flags: BindFlags,
    exclusive: bool,
    pub(crate) reuse_port: bool,
}

/// What the program named.
#[derive(Debug)]
enum Target {
    Port(u16),
    /// A port, or a host and a port.
    Name(String),
    Host(String, u16),
    Ip(SocketAddr),
    Path(PathBuf),
    Fd(RawFd),
    Socket(Option<OwnedFd>),
}

impl BindRequest {
    fn new(kind: Kind, target: Target) -> Self {
        Self {
            kind,
            target,
            flags: BindFlags::default(),
            exclusive: false,
            reuse_port: false,
        }
    }

    /// Whether the worker binds by itself.
    pub(crate) fn is_alone(&self) -> bool {
        self.exclusive || self.reuse_port
    }

    /// What the master cannot have: it is for all workers, and what it is lent by number they are lent
    /// without its help.
    pub(crate) fn check_for_master(&self) -> io::Result<()> {
        let reason = match &self.target {
            _ if self.is_alone() => "exclusive and reuse_port are for workers",
            Target::Fd(_) => {
                "descriptors are lent by number to workers only: pass the listener itself"
            }
            Target::Port(_)
            | Target::Name(_)
            | Target::Host(..)
            | Target::Ip(_)
            | Target::Path(_)
            | Target::Socket(_) => return Ok(()),
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
    }

    /// A port without a host. For datagrams there is no socket for both families.
    fn port(&self, port: u16) -> Place {
        match self.kind {
            Kind::Udp => Place::Ip((Ipv4Addr::UNSPECIFIED, port).into()),
            Kind::Tcp | Kind::Unix => Place::Port(port),
        }
    }

    pub(crate) fn resolve(&self) -> io::Result<Vec<Endpoint>> {
        let all = |addresses: std::vec::IntoIter<SocketAddr>| addresses.map(Place::Ip).collect();
        let places: Vec<_> = match &self.target {
            Target::Port(number) => vec![self.port(*number)],
            Target::Ip(address) => vec![Place::Ip(*address)],
            Target::Fd(number) => vec![Place::Fd(*number)],
            Target::Path(path) if path.as_os_str().len() > MAX_PATH => {
                return Err(io::Error::from_raw_os_error(errno::ENAMETOOLONG));
            }
            Target::Path(path) => vec![Place::Path(std::path::absolute(path)?)],
            Target::Host(host, port) => all((host.as_str(), *port).to_socket_addrs()?),
            Target::Name(name) => match name.parse() {
                Ok(number) => vec![self.port(number)],
                Err(_) => all(name.to_socket_addrs()?),
            },
            Target::Socket(_) => Vec::new(),
        };
        let endpoints = places.into_iter();
        Ok(endpoints
            .map(|place| Endpoint::new(self.kind, place))
            .collect())
    }

    /// The socket, if it is there already.
    pub(crate) fn take_socket(&mut self) -> Option<OwnedFd> {
        match &mut self.target {
            Target::Socket(socket) => socket.take(),
            Target::Port(_)
            | Target::Name(_)
            | Target::Host(..)
            | Target::Ip(_)
            | Target::Path(_)
            | Target::Fd(_) => None,
        }
    }
}

/// What the program wrote, for an error's text.
impl std::fmt::Display for BindRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoint = |place| Endpoint::new(self.kind, place);
        match &self.target {
            Target::Port(port) => endpoint(self.port(*port)).fmt(f),
            Target::Ip(address) => address.fmt(f),
            Target::Fd(number) if self.is_alone() => write!(f, "descriptor {number}"),
            Target::Fd(number) => endpoint(Place::Fd(*number)).fmt(f),
            Target::Path(path) => path.display().fmt(f),
            Target::Name(name) => f.write_str(name),
            Target::Host(host, port) => write!(f, "{host}:{port}"),
            Target::Socket(_) => f.write_str("a socket of the program's own"),
        }
    }
}

impl<S> ListenOptions<S> {
    fn of_kind(kind: Kind, target: Target) -> Self {
        Self {
            bind_request: BindRequest::new(kind, target),
            streams: PhantomData,
        }
    }

    /// Sets how many connections may wait in the kernel's queue: 511 unless set, and never more
    /// than the system allows (on Linux `net.core.somaxconn`). The first worker that listens on an
    /// address decides for all.
    ///
    /// Node: `backlog`. See [`ListenOptions`] for an example.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.bind_request.flags.backlog = connections;
        self
    }

    /// Keeps the listener to this worker: it binds by itself, the master knows nothing of it, and
    /// there is no `listening` event. Another worker's `listen` on the same address fails.
    ///
    /// Node: `exclusive`. The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let port = 9000 + u16::try_from(worker.id().get()).unwrap_or(0);
    /// let own = worker.listen(cluster::ListenOptions::from(port).exclusive(true))?;
    /// # Ok(()) }
    /// ```
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.bind_request.exclusive = exclusive;
        self
    }
}

impl ListenOptions<TcpStream> {
    fn new(target: Target) -> Self {
        Self::of_kind(Kind::Tcp, target)
    }

    /// Leaves IPv4 out where the address is `[::]`, which stands for both otherwise.
    ///
    /// Node: `ipv6Only`. The default is `false`. See [`ListenOptions`] for an example.
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.bind_request.flags.ipv6_only = only;
        self
    }

    /// Binds with `SO_REUSEPORT`, so that several sockets may have one port and the kernel chooses
    /// among them. The worker binds by itself: the master knows nothing of it, and there is no
    /// `listening` event.
    ///
    /// Node: `reusePort`. The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let own = worker.listen(cluster::ListenOptions::from(8000).reuse_port(true))?;
    /// # Ok(()) }
    /// ```
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.bind_request.reuse_port = reuse;
        self
    }

    /// Listens on a TCP socket that is open in the *master*, under this number. The master keeps
    /// it: it stays open when all workers have left it. It must not block, and is made so. With
    /// [`exclusive`](Self::exclusive) the number is one of the worker's own.
    ///
    /// Node: `fd`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// // What a supervisor such as systemd has opened for the master.
    /// let listener = worker.listen(cluster::ListenOptions::fd(3))?;
    /// # Ok(()) }
    /// ```
    pub fn fd(number: RawFd) -> Self {
        Self::new(Target::Fd(number))
    }
}

impl ListenOptions<UnixStream> {
    fn new(target: Target) -> Self {
        Self::of_kind(Kind::Unix, target)
    }

    /// Lets every user read from the socket, and not only who the umask lets. Linux before
    /// 6.6 needs `/proc` for it, where the mode is changed of the very file that was made.
    ///
    /// Node: `readableAll`. The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::path::Path;
    /// use cluster::ListenOptions;
    ///
    /// let options = ListenOptions::from(Path::new("app.sock"));
    /// worker.listen(options.readable_all(true).writable_all(true))?;
    /// # Ok(()) }
    /// ```
    pub fn readable_all(mut self, readable: bool) -> Self {
        self.bind_request.flags.readable_all = readable;
        self
    }

    /// Lets every user connect to the socket, which on Linux is to write to it.
    ///
    /// Node: `writableAll`. The default is `false`. See [`readable_all`](Self::readable_all) for an
    /// example.
    pub fn writable_all(mut self, writable: bool) -> Self {
        self.bind_request.flags.writable_all = writable;
        self
    }

    /// Listens on a Unix socket that is open in the *master*, under this number. See
    /// [`ListenOptions::fd`], which is the same for TCP, for an example.
    ///
    /// Node: `fd`.
    pub fn unix_fd(number: RawFd) -> Self {
        Self::new(Target::Fd(number))
    }
}

/// Port 0, that is, any free port, on all of the machine's addresses.
impl Default for ListenOptions<TcpStream> {
    fn default() -> Self {
        Self::new(Target::Port(0))
    }
}

impl From<&Path> for ListenOptions<UnixStream> {
    fn from(path: &Path) -> Self {
        Self::new(Target::Path(path.to_owned()))
    }
}

impl From<&PathBuf> for ListenOptions<UnixStream> {
    fn from(path: &PathBuf) -> Self {
        Self::new(Target::Path(path.clone()))
    }
}

impl From<PathBuf> for ListenOptions<UnixStream> {
    fn from(path: PathBuf) -> Self {
        Self::new(Target::Path(path))
    }
}

impl From<TcpListener> for ListenOptions<TcpStream> {
    fn from(listener: TcpListener) -> Self {
        Self::new(Target::Socket(Some(listener.into())))
    }
}

impl From<UnixListener> for ListenOptions<UnixStream> {
    fn from(listener: UnixListener) -> Self {
        Self::new(Target::Socket(Some(listener.into())))
    }
}

impl BindOptions {
    fn new(target: Target) -> Self {
        let bind_request = BindRequest::new(Kind::Udp, target);
        Self { bind_request }
    }

    /// Leaves IPv4 out where the address is `[::]`, which stands for both otherwise.
    ///
    /// Node: `ipv6Only`. The default is `false`. See [`BindOptions`] for an example.
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.bind_request.flags.ipv6_only = only;
        self
    }

    /// Lets another socket with this option have the same address. The last one bound gets the
    /// datagrams.
    ///
    /// Node: `reuseAddr`. The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use cluster::BindOptions;
    ///
    /// let group = worker.bind(BindOptions::from(5353).reuse_addr(true))?;
    /// # Ok(()) }
    /// ```
    pub fn reuse_addr(mut self, reuse: bool) -> Self {
        self.bind_request.flags.reuse_addr = reuse;
        self
    }

    /// Binds with `SO_REUSEPORT`, so that several sockets may have one port and the kernel chooses
    /// among them. The worker binds by itself: the master knows nothing of it, and there is no
    /// `listening` event.
    ///
    /// Node: `reusePort`. The default is `false`. See
    /// [`ListenOptions::reuse_port`], which is the same for TCP, for an example.
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.bind_request.reuse_port = reuse;
        self
    }

    /// Keeps the socket to this worker: it binds by itself, the master knows nothing of it, and
    /// there is no `listening` event.
    ///
    /// Node: `exclusive`. The default is `false`. See [`ListenOptions::exclusive`], which is the
    /// same for TCP, for an example.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.bind_request.exclusive = exclusive;
        self
    }

    /// Uses a bound UDP socket that is open in the *master*, under this number. The program keeps
    /// it: it stays open when all workers have left it.
    ///
    /// Node: `fd`. See [`ListenOptions::fd`], which is the same for TCP, for an example.
    pub fn fd(number: RawFd) -> Self {
        Self::new(Target::Fd(number))
    }
}

/// Port 0, that is, any free port, on all IPv4 addresses.
impl Default for BindOptions {
    fn default() -> Self {
        Self::new(Target::Port(0))
    }
}

/// The ways to write an address, the same for TCP and UDP.
macro_rules! from_addresses {
    ($options:ty) => {
        impl From<u16> for $options {
            fn from(port: u16) -> Self {
                Self::new(Target::Port(port))
            }
        }

        impl From<&str> for $options {
            fn from(address: &str) -> Self {
                Self::new(Target::Name(address.to_owned()))
            }
        }

        impl From<&String> for $options {
            fn from(address: &String) -> Self {
                Self::new(Target::Name(address.clone()))
            }
        }

        impl From<String> for $options {
            fn from(address: String) -> Self {
                Self::new(Target::Name(address))
            }
        }

        impl From<(&str, u16)> for $options {
            fn from((host, port): (&str, u16)) -> Self {
                Self::new(Target::Host(host.to_owned(), port))
            }
        }

        from_addresses!($options: SocketAddr, SocketAddrV4, SocketAddrV6);
        from_addresses!($options: (IpAddr, u16), (Ipv4Addr, u16), (Ipv6Addr, u16));
    };
    ($options:ty: $($address:ty),*) => {$(
        impl From<$address> for $options {
            fn from(address: $address) -> Self {
                Self::new(Target::Ip(address.into()))
            }
        }
    )*};
}

from_addresses!(ListenOptions<TcpStream>);
from_addresses!(BindOptions);
