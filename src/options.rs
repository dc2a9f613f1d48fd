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

use crate::endpoint::{BindFlags, Endpoint, Kind, Place};

/// What to listen on, and how: the argument of [`Worker::listen`](crate::Worker::listen).
///
/// Node: the options of `server.listen()`. It is made from
///
/// - a port, `8000`: on all of the machine's addresses, IPv6 and IPv4;
/// - an address, `"127.0.0.1:8000"`, `("::1", 8000)` or a [`SocketAddr`]; a name is looked up;
/// - a [`Path`]: a Unix socket, whose connections are [`UnixStream`]s;
/// - a listener that the worker has already.
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
#[derive(Debug)]
#[must_use]
pub struct ListenOptions<S = TcpStream> {
    target: Target,
    pub(crate) flags: BindFlags,
    pub(crate) exclusive: bool,
    pub(crate) reuse_port: bool,
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
    target: Target,
    pub(crate) flags: BindFlags,
    pub(crate) exclusive: bool,
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
    Fd(Kind, RawFd),
    Socket(OwnedFd),
}

/// Where the options lead.
#[derive(Debug)]
pub(crate) enum Resolved {
    /// To the first of these that can be had.
    Bind(Vec<Endpoint>),
    /// To a socket that is there.
    Socket(OwnedFd),
}

impl Target {
    fn resolve(self, kind: Kind) -> io::Result<Resolved> {
        let endpoint = |place| Endpoint::new(kind, place);
        let addresses = |addresses: std::vec::IntoIter<SocketAddr>| {
            addresses.map(|ip| endpoint(Place::Ip(ip))).collect()
        };
        let port = |port| match kind {
            Kind::Udp => endpoint(Place::Ip((Ipv4Addr::UNSPECIFIED, port).into())),
            Kind::Tcp | Kind::Unix => endpoint(Place::Port(port)),
        };
        Ok(Resolved::Bind(match self {
            Self::Socket(socket) => return Ok(Resolved::Socket(socket)),
            Self::Port(number) => vec![port(number)],
            Self::Ip(address) => vec![endpoint(Place::Ip(address))],
            Self::Fd(kind, number) => vec![Endpoint::new(kind, Place::Fd(number))],
            Self::Path(path) => vec![endpoint(Place::Path(std::path::absolute(path)?))],
            Self::Host(host, port) => addresses((host.as_str(), port).to_socket_addrs()?),
            Self::Name(name) => match name.parse() {
                Ok(number) => vec![port(number)],
                Err(_) => addresses(name.to_socket_addrs()?),
            },
        }))
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Port(port) => write!(f, "*:{port}"),
            Self::Name(name) => f.write_str(name),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
            Self::Ip(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(kind, number) => Endpoint::new(*kind, Place::Fd(*number)).fmt(f),
            Self::Socket(_) => f.write_str("a socket of the worker's own"),
        }
    }
}

impl<S> ListenOptions<S> {
    fn new(target: Target) -> Self {
        Self {
            target,
            flags: BindFlags::default(),
            exclusive: false,
            reuse_port: false,
            streams: PhantomData,
        }
    }

    /// Sets how many connections may wait in the kernel's queue: 511 unless set, and never more
    /// than the system allows (on Linux `net.core.somaxconn`). The first worker that listens on an
    /// address decides for all.
    ///
    /// Node: `backlog`. See [`ListenOptions`] for an example.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.flags.backlog = connections;
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
        self.exclusive = exclusive;
        self
    }

    /// What the program wrote, for an error's text.
    pub(crate) fn describe(&self) -> String {
        self.target.to_string()
    }

    pub(crate) fn resolve(self) -> io::Result<Resolved> {
        let kind = match self.target {
            Target::Path(_) => Kind::Unix,
            Target::Port(_)
            | Target::Name(_)
            | Target::Host(..)
            | Target::Ip(_)
            | Target::Fd(..)
            | Target::Socket(_) => Kind::Tcp,
        };
        self.target.resolve(kind)
    }
}

impl ListenOptions<TcpStream> {
    /// Leaves IPv4 out where the address is `[::]`, which stands for both otherwise.
    ///
    /// Node: `ipv6Only`. The default is `false`. See [`ListenOptions`] for an example.
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.flags.ipv6_only = only;
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
        self.reuse_port = reuse;
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
        Self::new(Target::Fd(Kind::Tcp, number))
    }
}

impl ListenOptions<UnixStream> {
    /// Lets every user read from the socket, and not only who the umask lets.
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
        self.flags.readable_all = readable;
        self
    }

    /// Lets every user connect to the socket, which on Linux is to write to it.
    ///
    /// Node: `writableAll`. The default is `false`. See [`readable_all`](Self::readable_all) for an
    /// example.
    pub fn writable_all(mut self, writable: bool) -> Self {
        self.flags.writable_all = writable;
        self
    }

    /// Listens on a Unix socket that is open in the *master*, under this number. See
    /// [`ListenOptions::fd`] for TCP, which is the same.
    ///
    /// Node: `fd`.
    pub fn unix_fd(number: RawFd) -> Self {
        Self::new(Target::Fd(Kind::Unix, number))
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

impl From<PathBuf> for ListenOptions<UnixStream> {
    fn from(path: PathBuf) -> Self {
        Self::new(Target::Path(path))
    }
}

impl From<TcpListener> for ListenOptions<TcpStream> {
    fn from(listener: TcpListener) -> Self {
        Self::new(Target::Socket(listener.into()))
    }
}

impl From<UnixListener> for ListenOptions<UnixStream> {
    fn from(listener: UnixListener) -> Self {
        Self::new(Target::Socket(listener.into()))
    }
}

impl BindOptions {
    fn new(target: Target) -> Self {
        Self {
            target,
            flags: BindFlags::default(),
            exclusive: false,
            reuse_port: false,
        }
    }

    /// Leaves IPv4 out where the address is `[::]`, which stands for both otherwise.
    ///
    /// Node: `ipv6Only`. The default is `false`. See [`BindOptions`] for an example.
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.flags.ipv6_only = only;
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
        self.flags.reuse_addr = reuse;
        self
    }

    /// Binds with `SO_REUSEPORT`, so that several sockets may have one port and the kernel chooses
    /// among them. The worker binds by itself: the master knows nothing of it, and there is no
    /// `listening` event.
    ///
    /// Node: `reusePort`. The default is `false`. See
    /// [`ListenOptions::reuse_port`], which is the same for TCP, for an example.
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.reuse_port = reuse;
        self
    }

    /// Keeps the socket to this worker: it binds by itself, the master knows nothing of it, and
    /// there is no `listening` event.
    ///
    /// Node: `exclusive`. The default is `false`. See [`ListenOptions::exclusive`], which is the
    /// same for TCP, for an example.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Uses a bound UDP socket that is open in the *master*, under this number. The program keeps
    /// it: it stays open when all workers have left it.
    ///
    /// Node: `fd`. See [`ListenOptions::fd`], which is the same for TCP, for an example.
    pub fn fd(number: RawFd) -> Self {
        Self::new(Target::Fd(Kind::Udp, number))
    }

    /// What the program wrote, for an error's text.
    pub(crate) fn describe(&self) -> String {
        if let Target::Port(port) = self.target {
            return format!("0.0.0.0:{port}");
        }
        self.target.to_string()
    }

    pub(crate) fn resolve(self) -> io::Result<Resolved> {
        self.target.resolve(Kind::Udp)
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
