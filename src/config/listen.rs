//! The options of `listen` and `bind`.

use std::io;
use std::marker::PhantomData;
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream,
    ToSocketAddrs as _,
};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind, abstract_name, fmt_path};
use crate::types::errno;

/// The longest path that the application may pass, in bytes. The value is Linux's `PATH_MAX`. A
/// relative path becomes absolute before it is sent, so its length can double. The absolute path
/// must still fit into the 2-byte length of a frame's path.
const MAX_PATH: usize = 4096;

/// An address to listen on and its options, for [`Worker::listen`](crate::Worker::listen) and
/// [`Master::listen`](crate::Master::listen).
///
/// Node: the options of `server.listen()`.
///
/// The following values convert into options:
///
/// - A port such as `8000` stands for all IPv6 and IPv4 addresses of the machine.
/// - An address is a string such as `"127.0.0.1:8000"`, a pair such as `("::1", 8000)` or a
///   [`SocketAddr`]. A host name in an address is resolved.
/// - A [`Path`] stands for a Unix socket, whose connections are [`UnixStream`]s. Pass a `Path` and
///   not a string, because a string stands for an address. On Linux, a path that begins with a zero
///   byte is an abstract name, as in Node.
/// - An open listener is used directly. A master shares it with its workers, but a worker keeps it
///   for itself.
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
/// A generic function can serve both TCP and Unix connections:
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

/// The address of a UDP socket and its options, for [`Worker::bind`](crate::Worker::bind).
///
/// Node: the options of `dgram.createSocket()` and `socket.bind()`.
///
/// A port such as `53` converts into options for all IPv4 addresses of the machine. An address also
/// converts, for example `"[::]:53"`, `("::1", 53)` or a [`SocketAddr`]. A host name in an address
/// is resolved.
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

/// The data that [`ListenOptions`] and [`BindOptions`] have in common.
#[derive(Debug)]
pub(crate) struct BindRequest {
    pub(crate) kind: Kind,
    target: Target,
    pub(crate) flags: BindFlags,
    exclusive: bool,
    pub(crate) reuse_port: bool,
}

/// The address to bind, in the form in which the application passed it.
#[derive(Debug)]
enum Target {
    Port(u16),
    /// A port, or a host and a port, as one string.
    Name(String, Resolve),
    Host(String, u16, Resolve),
    Ip(SocketAddr),
    Path(PathBuf),
    Fd(RawFd),
    Socket(Option<OwnedFd>),
}

/// Resolves the name of a host. The port is `None` if it is part of the name.
///
/// Only a target with a name refers to [`resolve_name`]. A static program that passes no names then
/// does not contain the C library's resolver, which is 23 KiB of code with musl.
type Resolve = fn(&str, Option<u16>) -> io::Result<std::vec::IntoIter<SocketAddr>>;

fn resolve_name(name: &str, port: Option<u16>) -> io::Result<std::vec::IntoIter<SocketAddr>> {
    match port {
        Some(port) => (name, port).to_socket_addrs(),
        None => name.to_socket_addrs(),
    }
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

    /// Returns whether the worker binds the socket itself, without the master.
    pub(crate) fn is_private(&self) -> bool {
        self.exclusive || self.reuse_port
    }

    /// Checks that the options are valid in a master. The master opens listeners for all workers,
    /// so options for a single worker are invalid. A descriptor number is also invalid, because
    /// only workers refer to the master's descriptors by number.
    ///
    /// # Errors
    ///
    /// Returns an error if only a worker may make the request.
    pub(crate) fn check_for_master(&self) -> io::Result<()> {
        let reason = match &self.target {
            _ if self.is_private() => "exclusive and reuse_port are for workers",
            Target::Fd(_) => {
                "only workers can name a descriptor by its number: pass the listener itself"
            }
            Target::Port(_)
            | Target::Name(..)
            | Target::Host(..)
            | Target::Ip(_)
            | Target::Path(_)
            | Target::Socket(_) => return Ok(()),
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
    }

    /// Returns the address for a port without a host. A UDP port stands for IPv4 addresses only.
    fn port(&self, port: u16) -> BindAddress {
        match self.kind {
            Kind::Udp => BindAddress::Ip((Ipv4Addr::UNSPECIFIED, port).into()),
            Kind::Tcp | Kind::Unix => BindAddress::Port(port),
        }
    }

    pub(crate) fn resolve(&self) -> io::Result<Vec<Endpoint>> {
        let all =
            |addresses: std::vec::IntoIter<SocketAddr>| addresses.map(BindAddress::Ip).collect();
        let places: Vec<_> = match &self.target {
            Target::Port(number) => vec![self.port(*number)],
            Target::Ip(address) => vec![BindAddress::Ip(*address)],
            Target::Fd(number) => vec![BindAddress::Fd(*number)],
            Target::Path(path) if path.as_os_str().len() > MAX_PATH => {
                return Err(io::Error::from_raw_os_error(errno::ENAMETOOLONG));
            }
            Target::Path(path) if abstract_name(path.as_os_str()).is_some() => {
                vec![BindAddress::Path(path.into())]
            }
            Target::Path(path) => vec![BindAddress::Path(std::path::absolute(path)?.into())],
            Target::Host(host, port, resolve) => all(resolve(host, Some(*port))?),
            Target::Name(name, resolve) => match name.parse() {
                Ok(number) => vec![self.port(number)],
                Err(_) => all(resolve(name, None)?),
            },
            Target::Socket(_) => Vec::new(),
        };
        let endpoints = places.into_iter();
        Ok(endpoints
            .map(|address| Endpoint::new(self.kind, address))
            .collect())
    }

    /// Takes the open socket out of the request. Returns `None` if the application passed no open
    /// socket, or if the socket has already been taken.
    pub(crate) fn take_socket(&mut self) -> Option<OwnedFd> {
        match &mut self.target {
            Target::Socket(socket) => socket.take(),
            Target::Port(_)
            | Target::Name(..)
            | Target::Host(..)
            | Target::Ip(_)
            | Target::Path(_)
            | Target::Fd(_) => None,
        }
    }
}

/// Prints the requested address, for error messages.
impl std::fmt::Display for BindRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoint = |address| Endpoint::new(self.kind, address);
        match &self.target {
            Target::Port(port) => endpoint(self.port(*port)).fmt(f),
            Target::Ip(address) => address.fmt(f),
            Target::Fd(number) if self.is_private() => write!(f, "descriptor {number}"),
            Target::Fd(number) => endpoint(BindAddress::Fd(*number)).fmt(f),
            Target::Path(path) => fmt_path(path.as_os_str(), f),
            Target::Name(name, _) => f.write_str(name),
            Target::Host(host, port, _) => write!(f, "{host}:{port}"),
            Target::Socket(_) => f.write_str("a socket of the application"),
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

    /// Sets how many connections may wait in the kernel's backlog. The default is 511. The system
    /// may impose a lower limit, such as `net.core.somaxconn` on Linux. If several workers listen
    /// on an address, the first worker's options apply to all of them. If the listener is sharded,
    /// each worker's own value applies to the socket that is opened for that worker.
    ///
    /// Node: `backlog`.
    ///
    /// See [`ListenOptions`] for an example.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.bind_request.flags.backlog = connections;
        self
    }

    /// Sets how long the client of a [parked](crate::Connection::park) connection may send nothing
    /// before the connection is closed. The default is 60 seconds. The time is rounded up to whole
    /// seconds. A connection may stay open for up to one second longer, because all connections
    /// that expire in the same second are closed together.
    ///
    /// Node: `server.keepAliveTimeout`.
    ///
    /// With [`wait_for_data`](Self::wait_for_data), the time also limits how long a new client may
    /// send nothing, unless [`first_data_timeout`](Self::first_data_timeout) is set. If several
    /// workers listen on an address, the time that was set last applies to the connections that the
    /// master holds. A worker that holds connections itself uses its own time.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// let options = cluster::ListenOptions::from(8000);
    /// let listener = worker.listen(options.idle_timeout(Duration::from_secs(10)))?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "keepAliveTimeout")]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.bind_request.flags.parking.idle_seconds = Some(whole_seconds(timeout));
        self
    }

    /// Sets how long a new client may send nothing, if the listener
    /// [waits for data](Self::wait_for_data). The default is
    /// [`idle_timeout`](Self::idle_timeout). The time is rounded in the same way.
    ///
    /// Node: `server.headersTimeout`, which also limits how long the client sends.
    ///
    /// A new client has a reason to send at once, so the time can be shorter than the one between
    /// two requests. If several workers listen on an address, the time that was set last applies
    /// to the connections that the master or the kernel holds. A worker that holds connections
    /// itself uses its own time.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// let options = cluster::ListenOptions::from(8000).wait_for_data(true);
    /// let listener = worker.listen(options.first_data_timeout(Duration::from_secs(5)))?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "headersTimeout")]
    pub fn first_data_timeout(mut self, timeout: Duration) -> Self {
        self.bind_request.flags.parking.first_data_seconds = Some(whole_seconds(timeout));
        self
    }

    /// Sets whether a new connection goes to a worker only when its client has sent something. The
    /// default is `false`, because in some protocols the server sends first.
    ///
    /// Node has no counterpart.
    ///
    /// With `true`, clients that connect and send nothing occupy no worker. The process that accepts
    /// the connection holds it as if it were [parked](crate::Connection::park), and closes it after
    /// [`first_data_timeout`](Self::first_data_timeout). With round robin, this process is the
    /// master, which accepts even while no worker is idle, up to
    /// [`Master::set_max_parked`](crate::Master::set_max_parked). With the other policies, and for
    /// private listeners, the worker accepts and holds the connection. It then also serves the
    /// connection, even if another worker is idle when the data arrives.
    ///
    /// On Linux, the kernel first holds the connections of shared and private TCP listeners
    /// (`TCP_DEFER_ACCEPT` in tcp(7)) for about `first_data_timeout`, at a lower cost than a worker.
    /// A client can therefore be silent for up to twice this time: first in the kernel, then in the
    /// worker. If such a listener closes, the kernel resets the connections that it holds when their
    /// clients send something. The kernel does not do this for shards and for listeners that a
    /// process outside the cluster may also use.
    ///
    /// If several workers, or a worker and the master, listen on an address, the value that was set
    /// last applies to the connections that the master or the kernel holds. A worker that holds
    /// connections itself uses its own value, so with the sharded policy, and for Unix sockets without
    /// round robin, the workers must set the option.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let listener = worker.listen(cluster::ListenOptions::from(8000).wait_for_data(true))?;
    /// # Ok(()) }
    /// ```
    pub fn wait_for_data(mut self, wait: bool) -> Self {
        self.bind_request.flags.parking.wait_for_data = Some(wait);
        self
    }

    /// Sets whether this worker has the listener for itself. An exclusive listener is bound without
    /// the master and causes no `listening` event. Another worker's `listen` on the same address
    /// fails.
    ///
    /// Node: `exclusive`.
    ///
    /// The default is `false`.
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

/// Returns the time in seconds, rounded up.
fn whole_seconds(time: Duration) -> u32 {
    let seconds = time
        .as_secs()
        .saturating_add(u64::from(time.subsec_nanos() > 0));
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

impl ListenOptions<TcpStream> {
    fn new(target: Target) -> Self {
        Self::of_kind(Kind::Tcp, target)
    }

    /// Sets whether the address `[::]` excludes IPv4. By default, `[::]` stands for IPv6 and IPv4.
    ///
    /// Node: `ipv6Only`.
    ///
    /// The default is `false`. See [`ListenOptions`] for an example.
    #[doc(alias = "ipv6Only")]
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.bind_request.flags.ipv6_only = only;
        self
    }

    /// Sets whether to bind with `SO_REUSEPORT`, so that several sockets may have the same port and
    /// the kernel selects one of them. With this option the worker binds without the master, and no
    /// `listening` event occurs.
    ///
    /// Node: `reusePort`.
    ///
    /// The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let own = worker.listen(cluster::ListenOptions::from(8000).reuse_port(true))?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "reusePort")]
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.bind_request.reuse_port = reuse;
        self
    }

    /// Returns options for the TCP socket that has this descriptor number in the *master*. The
    /// socket becomes non-blocking and stays open in the master after all workers have closed their
    /// copies. With [`exclusive`](Self::exclusive) or [`reuse_port`](Self::reuse_port), the number
    /// refers to a descriptor of the worker.
    ///
    /// Node: `fd`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// // A supervisor such as systemd opened descriptor 3 for the master.
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

    /// Sets whether every user may read the socket file, regardless of the umask. This option needs
    /// `/proc` on Linux before 6.6, because older kernels have no fchmodat2(2).
    ///
    /// Node: `readableAll`.
    ///
    /// The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::path::Path;
    /// use cluster::ListenOptions;
    ///
    /// let options = ListenOptions::from(Path::new("app.sock"));
    /// let listener = worker.listen(options.readable_all(true).writable_all(true))?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "readableAll")]
    pub fn readable_all(mut self, readable: bool) -> Self {
        self.bind_request.flags.readable_all = readable;
        self
    }

    /// Sets whether every user may write to the socket file. On Linux, a client needs this
    /// permission to connect.
    ///
    /// Node: `writableAll`.
    ///
    /// The default is `false`. See [`readable_all`](Self::readable_all) for an example.
    #[doc(alias = "writableAll")]
    pub fn writable_all(mut self, writable: bool) -> Self {
        self.bind_request.flags.writable_all = writable;
        self
    }

    /// Returns options for the Unix socket that has this descriptor number in the *master*. See
    /// [`ListenOptions::fd`] for an example with TCP.
    ///
    /// Node: `fd`.
    pub fn unix_fd(number: RawFd) -> Self {
        Self::new(Target::Fd(number))
    }
}

/// The default is any free port (port 0) on all IPv6 and IPv4 addresses of the machine.
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

    /// Sets whether the address `[::]` excludes IPv4. By default, `[::]` stands for IPv6 and IPv4.
    ///
    /// Node: `ipv6Only`.
    ///
    /// The default is `false`. See [`BindOptions`] for an example.
    #[doc(alias = "ipv6Only")]
    pub fn ipv6_only(mut self, only: bool) -> Self {
        self.bind_request.flags.ipv6_only = only;
        self
    }

    /// Sets whether several sockets with this option may have the same address. The socket that was
    /// bound last receives the datagrams.
    ///
    /// Node: `reuseAddr`.
    ///
    /// The default is `false`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use cluster::BindOptions;
    ///
    /// let group = worker.bind(BindOptions::from(5353).reuse_addr(true))?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "reuseAddr")]
    pub fn reuse_addr(mut self, reuse: bool) -> Self {
        self.bind_request.flags.reuse_addr = reuse;
        self
    }

    /// Sets whether to bind with `SO_REUSEPORT`, so that several sockets may have the same port and
    /// the kernel selects one of them. With this option the worker binds without the master, and no
    /// `listening` event occurs.
    ///
    /// Node: `reusePort`.
    ///
    /// The default is `false`. See [`ListenOptions::reuse_port`] for an example with TCP.
    #[doc(alias = "reusePort")]
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.bind_request.reuse_port = reuse;
        self
    }

    /// Sets whether this worker has the socket for itself. An exclusive socket is bound without the
    /// master and causes no `listening` event.
    ///
    /// Node: `exclusive`.
    ///
    /// The default is `false`. See [`ListenOptions::exclusive`] for an example with TCP.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.bind_request.exclusive = exclusive;
        self
    }

    /// Returns options for the bound UDP socket that has this descriptor number in the *master*.
    /// The socket stays open in the master after all workers have closed their copies.
    ///
    /// Node: `fd`.
    ///
    /// See [`ListenOptions::fd`] for an example with TCP.
    pub fn fd(number: RawFd) -> Self {
        Self::new(Target::Fd(number))
    }
}

/// The default is any free port (port 0) on all IPv4 addresses of the machine.
impl Default for BindOptions {
    fn default() -> Self {
        Self::new(Target::Port(0))
    }
}

/// Implements the conversions from addresses, for TCP or UDP.
macro_rules! from_addresses {
    ($options:ty) => {
        impl From<u16> for $options {
            fn from(port: u16) -> Self {
                Self::new(Target::Port(port))
            }
        }

        impl From<&str> for $options {
            fn from(address: &str) -> Self {
                Self::new(Target::Name(address.to_owned(), resolve_name))
            }
        }

        impl From<&String> for $options {
            fn from(address: &String) -> Self {
                Self::new(Target::Name(address.clone(), resolve_name))
            }
        }

        impl From<String> for $options {
            fn from(address: String) -> Self {
                Self::new(Target::Name(address, resolve_name))
            }
        }

        impl From<(&str, u16)> for $options {
            fn from((host, port): (&str, u16)) -> Self {
                Self::new(Target::Host(host.to_owned(), port, resolve_name))
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
