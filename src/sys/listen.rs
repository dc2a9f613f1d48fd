//! Making sockets, accepting from them, and what a listener's backlog lets in.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::{check, retry};
use crate::types::endpoint::BindFlags;

fn length<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).unwrap_or(0)
}

/// A new socket that does not block and is closed on exec.
fn open(address: &SocketAddr, kind: libc::c_int) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    #[cfg(not(target_vendor = "apple"))]
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes three integers.
    let number = check(unsafe { libc::socket(family, kind, 0) })?;
    let socket = super::fd::adopt(number);
    if cfg!(target_vendor = "apple") {
        super::fd::close_on_exec(number)?;
        super::fd::set_nonblocking(socket.as_fd(), true)?;
    }
    Ok(socket)
}

pub(super) fn set_option(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option's value is an integer that lives through the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length(&value),
        )
    })?;
    Ok(())
}

fn option(socket: RawFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value = 0;
    let mut size = length(&value);
    // SAFETY: value and size are writable, and the size is that of the value.
    check(unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut size,
        )
    })?;
    Ok(value)
}

fn bind(socket: &OwnedFd, address: &SocketAddr, flags: &BindFlags) -> io::Result<()> {
    if address.is_ipv6() {
        // Both ways: what the system has as its default is not what the program said.
        let only = libc::c_int::from(flags.ipv6_only);
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, only)?;
    }
    bind_address(socket, address)
}

fn bind_address(socket: &OwnedFd, address: &SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(v4) => {
            // SAFETY: all zeroes is a valid sockaddr_in.
            let mut raw: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            raw.sin_family = family(libc::AF_INET);
            raw.sin_port = v4.port().to_be();
            raw.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            bind_raw(socket, &raw)
        }
        SocketAddr::V6(v6) => {
            // SAFETY: all zeroes is a valid sockaddr_in6.
            let mut raw: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
            raw.sin6_family = family(libc::AF_INET6);
            raw.sin6_port = v6.port().to_be();
            raw.sin6_addr.s6_addr = v6.ip().octets();
            raw.sin6_flowinfo = v6.flowinfo();
            raw.sin6_scope_id = v6.scope_id();
            bind_raw(socket, &raw)
        }
    }
}

fn family(number: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).unwrap_or(0)
}

/// `address` is one of the structures that bind takes.
fn bind_raw<T>(socket: &OwnedFd, address: &T) -> io::Result<()> {
    // SAFETY: the address lives through the call, and its length is given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(address).cast(),
            length(address),
        )
    })?;
    Ok(())
}

/// Whether a TCP listener shares its port with other sockets of the same user (`SO_REUSEPORT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortSharing {
    /// No other socket may listen on the port.
    Exclusive,
    /// The listener joins the group of sockets on the port, or is its first member.
    Join,
    /// The listener is the first member of a new group. If another socket listens on the port,
    /// listening fails, even if that one would share it.
    Found,
}

/// A TCP listener.
pub(crate) fn listen_tcp(
    address: &SocketAddr,
    flags: &BindFlags,
    sharing: PortSharing,
) -> io::Result<OwnedFd> {
    let socket = bind_tcp(address, flags, sharing)?;
    listen(&socket, flags.backlog)?;
    if sharing == PortSharing::Found {
        // Listening without the option is what excludes other groups. The kernel reads the option
        // of each listener when another one joins.
        share_port(&socket)?;
    }
    Ok(socket)
}

fn bind_tcp(address: &SocketAddr, flags: &BindFlags, sharing: PortSharing) -> io::Result<OwnedFd> {
    let socket = open(address, libc::SOCK_STREAM)?;
    // A port whose last connections are still dying down can be had again.
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    if sharing == PortSharing::Join {
        share_port(&socket)?;
    }
    bind(&socket, address, flags)?;
    Ok(socket)
}

fn share_port(socket: &OwnedFd) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)
}

/// A TCP listener that joins the group of sockets on its port, and selects the first of them for
/// all connections.
pub(crate) fn listen_to_select(address: &SocketAddr, flags: &BindFlags) -> io::Result<OwnedFd> {
    let socket = bind_tcp(address, flags, PortSharing::Join)?;
    // The kernel attaches a program to a group only through a socket that listens. Until then it may
    // choose this one: the client sends its SYN again after a second, and is served.
    attach_syn_filter(&socket)?;
    listen(&socket, flags.backlog)?;
    steer(&socket, &[0])?;
    detach_syn_filter(&socket)?;
    Ok(socket)
}

/// Makes a TCP listener that was shut down listen again.
pub(crate) fn listen_again(socket: &OwnedFd, address: &SocketAddr, backlog: u32) -> io::Result<()> {
    disconnect(socket)?;
    match bind_address(socket, address) {
        // A port that the kernel had chosen was lost; any other one is still bound, which is EINVAL.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        bound => bound?,
    }
    listen(socket, backlog)
}

/// Forgets that a socket was shut down. Shutting down a socket that is closed already marks it, and
/// connections that it accepts later would inherit the mark.
fn disconnect(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sockaddr.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = family(libc::AF_UNSPEC);
    // SAFETY: the address lives through the call, and its length is given.
    check(unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length(&nowhere)) })?;
    Ok(())
}

/// A UDP socket.
pub(crate) fn bind_udp(
    address: &SocketAddr,
    flags: &BindFlags,
    reuse_port: bool,
) -> io::Result<OwnedFd> {
    let socket = open(address, libc::SOCK_DGRAM)?;
    if flags.reuse_addr {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    if reuse_port {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    bind(&socket, address, flags)?;
    Ok(socket)
}

/// Makes a bound socket listen, or changes how many connections may wait to be accepted.
pub(crate) fn listen(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    let backlog = libc::c_int::try_from(backlog).unwrap_or(libc::c_int::MAX);
    // SAFETY: listen takes two integers.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(())
}

/// What a descriptor that the program names is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketKind {
    /// TCP or a Unix stream socket; otherwise a socket for datagrams.
    pub(crate) is_stream: bool,
    pub(crate) is_unix: bool,
    pub(crate) listens: bool,
}

/// # Errors
///
/// The number is not an open descriptor, or not a socket for streams or datagrams.
pub(crate) fn kind_of(number: RawFd) -> io::Result<SocketKind> {
    let is_stream = match option(number, libc::SO_TYPE)? {
        libc::SOCK_STREAM => true,
        libc::SOCK_DGRAM => false,
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    // SAFETY: all zeroes is a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut size = length(&address);
    // SAFETY: address and size are writable, and the size is that of the address.
    check(unsafe { libc::getsockname(number, (&raw mut address).cast(), &raw mut size) })?;
    Ok(SocketKind {
        is_stream,
        is_unix: address.ss_family == family(libc::AF_UNIX),
        listens: option(number, libc::SO_ACCEPTCONN)? != 0,
    })
}

/// The address of a TCP or UDP socket; none for any other.
pub(crate) fn local_addr(socket: &OwnedFd) -> Option<SocketAddr> {
    // The structure is the same for TCP and UDP.
    TcpListener::from(socket.try_clone().ok()?)
        .local_addr()
        .ok()
}

/// The address of the other side of a TCP connection; none for any other.
pub(crate) fn peer_addr(connection: BorrowedFd<'_>) -> Option<SocketAddr> {
    let connection = TcpStream::from(connection.try_clone_to_owned().ok()?);
    connection.peer_addr().ok()
}

/// How many connections wait to be accepted; `None` where the system does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn count_queued(listener: &OwnedFd) -> Option<u64> {
    // SAFETY: all zeroes is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = length(&info);
    // SAFETY: value and size are writable, and the size is that of the value.
    check(unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    })
    .ok()?;
    // For a listener, its queue stands here.
    Some(info.tcpi_unacked.into())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn count_queued(_listener: &OwnedFd) -> Option<u64> {
    None
}

/// Accepts a connection; it blocks, and is closed on exec.
pub(crate) fn accept(listener: &impl AsFd) -> io::Result<OwnedFd> {
    let number = listener.as_fd().as_raw_fd();
    let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
    #[cfg(not(target_vendor = "apple"))]
    let accepted = {
        // SAFETY: without room for an address none is written.
        retry(|| check(unsafe { libc::accept4(number, address, size, libc::SOCK_CLOEXEC) }))
    };
    #[cfg(target_vendor = "apple")]
    // SAFETY: without room for an address none is written.
    let accepted = retry(|| check(unsafe { libc::accept(number, address, size) }));
    let socket = super::fd::adopt(accepted?);
    if !cfg!(target_os = "linux") {
        // Elsewhere it takes after the listener.
        super::fd::close_on_exec(socket.as_raw_fd())?;
        super::fd::set_nonblocking(socket.as_fd(), false)?;
    }
    Ok(socket)
}

/// Accepts from a listener whose other owners may clear `O_NONBLOCK`, which belongs to all copies of
/// a descriptor. Waits only if the flag is cleared, and the connection taken, after the check.
pub(crate) fn accept_if_ready(listener: &impl AsFd) -> io::Result<OwnedFd> {
    let [ready] = super::poll::wait_readable([listener.as_fd()], Some(Duration::ZERO))?;
    match ready {
        true => accept(listener),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Whether this machine has no addresses of the family that was asked for.
pub(crate) fn lacks_family(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Whether `accept` failed because somebody has shut the listener down.
pub(crate) fn is_shut(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Whether `accept` failed because of the one connection that it would have returned: the next one
/// may be well. The list is that of accept(2).
pub(crate) fn lost_before_accept(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}

/// Makes a listener listen no longer, whoever has it. Whoever is in the backlog of a Unix socket stays
/// there; that of a TCP port is lost. It cannot be undone.
pub(crate) fn shut_for_good(listener: &OwnedFd) {
    // SAFETY: shutdown takes two integers. Where it does nothing for listeners, that is fine.
    unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RD) };
}

/// Lets no new connection into the backlog of a TCP listener, while handshakes under way complete: a
/// packet filter on the listener drops what asks for a new connection (SYN without ACK). Clients ask again after
/// a second and then find the port closed, or somebody else's. Without it, whoever comes between
/// the last `accept` and `close` would be connected and then reset.
#[cfg(target_os = "linux")]
pub(crate) fn attach_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    attach(listener, libc::SO_ATTACH_FILTER, &mut syn_filter())
}

#[cfg(target_os = "linux")]
fn syn_filter() -> [libc::sock_filter; 5] {
    /// Offset of the flags in the TCP header, where the filter's view of a packet begins.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    [
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, FLAGS, 0, 0),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, SYN | ACK, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, SYN, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
    ]
}

/// Detaches the SYN filter that another master left on a listener. Any other filter is the
/// application's, and stays.
#[cfg(target_os = "linux")]
pub(crate) fn detach_foreign_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    // The option of socket(7) that reads a filter has the number of the one that attaches it, and
    // counts statements.
    const SO_GET_FILTER: libc::c_int = libc::SO_ATTACH_FILTER;
    let own = syn_filter();
    let mut found = [statement(0, 0, 0, 0); 5];
    let mut count = libc::socklen_t::try_from(found.len()).unwrap_or(0);
    // SAFETY: as many statements are writable as `count` says. The kernel writes all of a filter, or
    // fails if there is not enough space.
    let read = check(unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            found.as_mut_ptr().cast(),
            &raw mut count,
        )
    });
    let parts = |s: &libc::sock_filter| (s.code, s.jt, s.jf, s.k);
    let is_own = own.iter().map(parts).eq(found.iter().map(parts));
    match read {
        Ok(_) if is_own => detach_syn_filter(listener),
        // Another filter, or none, or the kernel does not read filters.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Makes the kernel refuse, for ever, to attach or to detach a filter or a selection program through
/// this socket.
#[cfg(target_os = "linux")]
pub(crate) fn lock_filter(socket: &OwnedFd) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)
}

/// Undoes `attach_syn_filter`.
#[cfg(target_os = "linux")]
pub(crate) fn detach_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    let unused: libc::c_int = 0;
    let size = libc::socklen_t::try_from(size_of_val(&unused)).unwrap_or(0);
    // SAFETY: the option ignores its value.
    check(unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            size,
        )
    })?;
    Ok(())
}

/// Has newcomers distributed evenly among some of the listeners with one address: those with these
/// numbers, as the kernel counts them, in the order in which they began to listen. A program, attached
/// to all of them, draws lots.
#[cfg(target_os = "linux")]
pub(crate) fn steer(listener: &OwnedFd, chosen: &[usize]) -> io::Result<()> {
    let mut program = selection(chosen)?;
    attach(listener, libc::SO_ATTACH_REUSEPORT_CBPF, &mut program)
}

/// The program that draws one of these numbers, which ascend.
///
/// Its length depends on the number of gaps between them, not on how many they are. Before Linux 6.8,
/// the kernel refuses one of more than 20,480 bytes (`net.core.optmem_max`) after its translation, which
/// makes at most 5 instructions of 8 bytes for a run of consecutive numbers.
#[cfg(target_os = "linux")]
fn selection(chosen: &[usize]) -> io::Result<Vec<libc::sock_filter>> {
    let number = |n: usize| u32::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    let random = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;
    let count = number(chosen.len())?;
    let mut program = vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, random, 0, 0),
        statement(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count, 0, 0),
    ];
    let mut drawn = 0;
    for run in chosen.chunk_by(|one, next| one + 1 == *next) {
        let next = drawn + run.len();
        // What was drawn is below `next` from here on, or belongs to a later run.
        let is_later = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
        program.push(statement(is_later, number(next)?, 2, 0));
        // `drawn` never exceeds the first number of the run: the numbers ascend.
        let shift = number(run[0].saturating_sub(drawn))?;
        program.push(statement(
            libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K,
            shift,
            0,
            0,
        ));
        program.push(statement(libc::BPF_RET | libc::BPF_A, 0, 0, 0));
        drawn = next;
    }
    // Not reached: what is drawn is below `count`.
    program.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0));
    Ok(program)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn steer(_listener: &OwnedFd, _chosen: &[usize]) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "linux")]
fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = u16::try_from(code).unwrap_or(0);
    libc::sock_filter { code, jt, jf, k }
}

/// Gives a socket a program for its packets.
#[cfg(target_os = "linux")]
fn attach(
    listener: &OwnedFd,
    option: libc::c_int,
    program: &mut [libc::sock_filter],
) -> io::Result<()> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the option takes a sock_fprog, which points to a live program of the given length.
    check(unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const filter).cast(),
            length(&filter),
        )
    })?;
    Ok(())
}

/// Elsewhere the backlog is emptied with the door open.
#[cfg(not(target_os = "linux"))]
pub(crate) fn attach_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

/// Undoes `attach_syn_filter`.
#[cfg(not(target_os = "linux"))]
pub(crate) fn detach_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

/// There is no such filter elsewhere.
#[cfg(not(target_os = "linux"))]
pub(crate) fn detach_foreign_syn_filter(_listener: &OwnedFd) -> io::Result<()> {
    Ok(())
}

/// Nothing can be attached elsewhere.
#[cfg(not(target_os = "linux"))]
pub(crate) fn lock_filter(_socket: &OwnedFd) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn a_shut_door_keeps_newcomers_out_and_whoever_is_in() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let address = address.parse().unwrap();
            let listener =
                listen_tcp(&address, &BindFlags::default(), PortSharing::Exclusive).unwrap();
            let address = local_addr(&listener).unwrap();
            let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(50));
            let _early = connect().unwrap();
            attach_syn_filter(&listener).unwrap();
            let error = connect().unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::TimedOut,
                "not refused: ignored"
            );
            accept(&listener).unwrap();
            detach_syn_filter(&listener).unwrap();
            connect().unwrap();
        }
    }

    /// Runs a selection program for one random number, as the kernel does.
    fn run(program: &[libc::sock_filter], random: u32) -> usize {
        let (mut at, mut value) = (0, 0);
        loop {
            let one = &program[at];
            at += 1;
            let code = u32::from(one.code);
            if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                value = random;
            } else if code == libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K {
                value %= one.k;
            } else if code == libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K {
                value += one.k;
            } else if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K {
                at += usize::from(if value >= one.k { one.jt } else { one.jf });
            } else if code == libc::BPF_RET | libc::BPF_A {
                return value as usize;
            } else {
                panic!("not reached, or not known: {code:#x}");
            }
        }
    }

    #[test]
    fn selection_draws_each_number_equally_often() {
        for chosen in [&[0][..], &[1], &[0, 2, 3, 4], &[1, 2, 5, 7, 8, 9, 1000]] {
            let program = selection(chosen).unwrap();
            let mut drawn: Vec<_> = (0..u32::try_from(chosen.len() * 3).unwrap())
                .map(|random| run(&program, random))
                .collect();
            drawn.sort_unstable();
            let expected: Vec<_> = chosen.iter().flat_map(|one| [*one; 3]).collect();
            assert_eq!(drawn, expected);
        }
    }

    /// The kernel before 6.8 counts the translated program, with this many bytes.
    fn translated_size(program: &[libc::sock_filter]) -> usize {
        // struct bpf_prog, and what begins each program.
        const FIXED: usize = 256;
        // A jump or a sum is one instruction, a return of what was computed one or two.
        FIXED + program.len() * 5 / 3 * 8
    }

    #[test]
    fn selection_of_a_thousand_shards_fits_into_the_optmem_max_of_old_kernels() {
        const OPTMEM_MAX: usize = 20_480;
        let all: Vec<_> = [0].into_iter().chain(2..10_000).collect();
        assert!(translated_size(&selection(&all).unwrap()) < 512);
        // Each second one has left.
        let gaps: Vec<_> = (0..1000).step_by(2).collect();
        assert!(translated_size(&selection(&gaps).unwrap()) <= OPTMEM_MAX);
    }

    /// In a network of this thread's own, with the limit of old kernels.
    #[test]
    #[ignore = "needs Linux 6.8, for a limit of each network's own, and root"]
    fn kernel_takes_the_selection_of_a_thousand_shards_with_the_optmem_max_of_old_kernels() {
        let play = || {
            // SAFETY: it takes an integer, and concerns this thread alone.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).unwrap();
            std::fs::write("/proc/sys/net/core/optmem_max", "20480").unwrap();
            let address = "0.0.0.0:0".parse().unwrap();
            let flags = BindFlags::default();
            let listener = listen_tcp(&address, &flags, PortSharing::Join).unwrap();
            let gaps: Vec<_> = (0..1000).step_by(2).collect();
            steer(&listener, &gaps).unwrap();
            // The limit is there: two statements for each shard are too many.
            let ret = libc::BPF_RET | libc::BPF_K;
            let is = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
            let each = (0..1000).flat_map(|n| [statement(is, n, 0, 1), statement(ret, n, 0, 0)]);
            let mut long: Vec<_> = each.chain([statement(ret, 0, 0, 0)]).collect();
            let error = attach(&listener, libc::SO_ATTACH_REUSEPORT_CBPF, &mut long).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        };
        std::thread::spawn(play).join().unwrap();
    }
}
