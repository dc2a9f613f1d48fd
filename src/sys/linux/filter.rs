//! Packet filters on sockets. The filters are BPF programs, and socket options attach them
//! (socket(7)).
//!
//! The *SYN filter* keeps new connections out of a backlog. The *selection program* chooses the
//! socket of a reuseport group that receives a connection.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use super::uapi;
use crate::sys::{check, option};

/// Attaches the SYN filter to a TCP listener. The filter drops the packets that start new
/// connections, which have the flag SYN without ACK.
///
/// Handshakes in flight complete. New clients repeat their SYN after a second, and then find
/// another listener or a closed port. Without the filter, connections that arrive between the last
/// `accept` and `close` would be reset.
pub(crate) fn attach_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    attach(listener, libc::SO_ATTACH_FILTER, &mut syn_filter())
}

/// Detaches the SYN filter.
pub(crate) fn detach_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    // The kernel ignores the value of this option.
    option::set_int(listener.as_fd(), libc::SO_DETACH_FILTER, 0)
}

fn syn_filter() -> [libc::sock_filter; 5] {
    /// Offset of the flags in the TCP header. The filter's view of a packet begins with this
    /// header.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    [
        statement(uapi::BPF_LD | uapi::BPF_B | uapi::BPF_ABS, FLAGS, 0, 0),
        statement(uapi::BPF_ALU | uapi::BPF_AND | uapi::BPF_K, SYN | ACK, 0, 0),
        statement(uapi::BPF_JMP | uapi::BPF_JEQ | uapi::BPF_K, SYN, 0, 1),
        statement(uapi::BPF_RET | uapi::BPF_K, 0, 0, 0),
        statement(uapi::BPF_RET | uapi::BPF_K, u32::MAX, 0, 0),
    ]
}

/// Detaches the SYN filter that another process may have left on a listener. Keeps any other
/// filter, because it belongs to the application.
pub(crate) fn detach_foreign_syn_filter(listener: &OwnedFd) -> io::Result<()> {
    // The option of `getsockopt` that reads the filter has the same number as the option of
    // `setsockopt` that attaches one. The length of this option counts statements, not bytes.
    const SO_GET_FILTER: libc::c_int = libc::SO_ATTACH_FILTER;
    let own = syn_filter();
    let mut found = [statement(0, 0, 0, 0); 5];
    let mut count = libc::socklen_t::try_from(found.len()).unwrap_or(0);
    // SAFETY: the pointer is valid for writes of `count` statements. The kernel writes a whole
    // filter, or fails if there is not enough space.
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
        // The listener has another filter or none, or the kernel does not support reading filters.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Forbids attaching and detaching filters and selection programs through this socket. The kernel
/// never lifts this lock.
pub(crate) fn lock_filter(socket: &OwnedFd) -> io::Result<()> {
    option::set_int(socket.as_fd(), uapi::SO_LOCK_FILTER, 1)
}

/// Distributes new connections evenly among the sockets with these indexes in the listener's
/// reuseport group. The indexes must ascend. The kernel numbers the sockets in the order in which
/// they began to listen.
pub(crate) fn select_sockets(listener: &OwnedFd, indexes: &[usize]) -> io::Result<()> {
    let mut program = selection(indexes)?;
    attach(listener, libc::SO_ATTACH_REUSEPORT_CBPF, &mut program)
}

/// Returns the BPF program that selects one of these indexes at random. The indexes must ascend.
///
/// The program's length depends on the number of gaps between the indexes, not on the number of
/// indexes. The kernel translates the program to eBPF. Before Linux 6.8, the kernel by default
/// rejects a program whose translation takes more than 20,480 bytes (`net.core.optmem_max`). The
/// translation has at most 4 instructions of 8 bytes for each run of consecutive indexes.
fn selection(indexes: &[usize]) -> io::Result<Vec<libc::sock_filter>> {
    let number = |n: usize| u32::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    let random = uapi::SKF_AD_RANDOM as u32;
    let count = number(indexes.len())?;
    let mut program = vec![
        statement(uapi::BPF_LD | uapi::BPF_W | uapi::BPF_ABS, random, 0, 0),
        statement(uapi::BPF_ALU | uapi::BPF_MOD | uapi::BPF_K, count, 0, 0),
    ];
    let mut first = 0;
    for run in indexes.chunk_by(|one, next| one + 1 == *next) {
        let end = first + run.len();
        // Skip this run if the random number is at least `end`, because the number then belongs to
        // a later run.
        let is_later = uapi::BPF_JMP | uapi::BPF_JGE | uapi::BPF_K;
        program.push(statement(is_later, number(end)?, 2, 0));
        // `first` never exceeds the run's first index, because the indexes ascend.
        let shift = number(run[0].saturating_sub(first))?;
        let add = uapi::BPF_ALU | uapi::BPF_ADD | uapi::BPF_K;
        program.push(statement(add, shift, 0, 0));
        program.push(statement(uapi::BPF_RET | uapi::BPF_A, 0, 0, 0));
        first = end;
    }
    // The kernel requires a return at the end. The program never reaches this return, because the
    // random number is below `count`.
    program.push(statement(uapi::BPF_RET | uapi::BPF_K, 0, 0, 0));
    Ok(program)
}

fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = u16::try_from(code).unwrap_or(0);
    libc::sock_filter { code, jt, jf, k }
}

/// The number of 16-bit words between the fields of `sock_fprog`.
const PADDING: usize = size_of::<usize>() / 2 - 1;

/// A `sock_fprog` whose padding is initialized. The kernel copies the padding too, and memory
/// checkers object to uninitialized bytes.
#[repr(C)]
struct FilterProgram {
    length: u16,
    padding: [u16; PADDING],
    filter: *mut libc::sock_filter,
}

const _: () = assert!(size_of::<FilterProgram>() == size_of::<libc::sock_fprog>());

fn attach(
    socket: &OwnedFd,
    name: libc::c_int,
    program: &mut [libc::sock_filter],
) -> io::Result<()> {
    let argument = FilterProgram {
        length: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        padding: [0; PADDING],
        filter: program.as_mut_ptr(),
    };
    option::set(socket.as_fd(), libc::SOL_SOCKET, name, &argument)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::time::Duration;

    use crate::sys::listen::{PortSharing, accept, listen_tcp, local_addr};
    use crate::types::endpoint::BindFlags;

    #[test]
    fn syn_filter_drops_new_connections_and_keeps_the_backlog() {
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
                "the SYN is dropped, not refused"
            );
            accept(&listener).unwrap();
            detach_syn_filter(&listener).unwrap();
            connect().unwrap();
        }
    }

    /// Simulates the kernel's run of a selection program for one random number.
    fn run(program: &[libc::sock_filter], random: u32) -> usize {
        let (mut at, mut value) = (0, 0);
        loop {
            let one = &program[at];
            at += 1;
            let code = u32::from(one.code);
            if code == uapi::BPF_LD | uapi::BPF_W | uapi::BPF_ABS {
                value = random;
            } else if code == uapi::BPF_ALU | uapi::BPF_MOD | uapi::BPF_K {
                value %= one.k;
            } else if code == uapi::BPF_ALU | uapi::BPF_ADD | uapi::BPF_K {
                value += one.k;
            } else if code == uapi::BPF_JMP | uapi::BPF_JGE | uapi::BPF_K {
                at += usize::from(if value >= one.k { one.jt } else { one.jf });
            } else if code == uapi::BPF_RET | uapi::BPF_A {
                return value as usize;
            } else {
                panic!("unexpected instruction {code:#x}");
            }
        }
    }

    #[test]
    fn selection_draws_each_index_equally_often() {
        for indexes in [&[0][..], &[1], &[0, 2, 3, 4], &[1, 2, 5, 7, 8, 9, 1000]] {
            let program = selection(indexes).unwrap();
            let mut drawn: Vec<_> = (0..u32::try_from(indexes.len() * 3).unwrap())
                .map(|random| run(&program, random))
                .collect();
            drawn.sort_unstable();
            let expected: Vec<_> = indexes.iter().flat_map(|one| [*one; 3]).collect();
            assert_eq!(drawn, expected);
        }
    }

    /// Estimates the number of bytes that a kernel before 6.8 counts for the translated program.
    /// The estimate is too high rather than too low.
    fn translated_size(program: &[libc::sock_filter]) -> usize {
        // The bytes of `struct bpf_prog` and of each program's prologue.
        const FIXED: usize = 256;
        // Each run of consecutive indexes takes three statements in the program: a jump, an
        // addition and a return. Translated, the first two take one instruction each, and the
        // return takes at most two. Calculate with five per run, to leave a margin.
        FIXED + program.len() * 5 / 3 * 8
    }

    #[test]
    fn selection_of_a_thousand_shards_fits_into_the_optmem_max_of_old_kernels() {
        const OPTMEM_MAX: usize = 20_480;
        let all: Vec<_> = [0].into_iter().chain(2..10_000).collect();
        assert!(translated_size(&selection(&all).unwrap()) < 512);
        // Leave out every second index, because this produces the most gaps.
        let gaps: Vec<_> = (0..1000).step_by(2).collect();
        assert!(translated_size(&selection(&gaps).unwrap()) <= OPTMEM_MAX);
    }

    /// Asserts that a real kernel accepts the longest program that `selection` makes for 1,000
    /// shards. The test sets the limit of old kernels in its thread's own network namespace.
    #[test]
    #[ignore = "needs Linux 6.8, for a limit per network namespace, and root"]
    fn kernel_accepts_the_selection_of_a_thousand_shards_with_the_optmem_max_of_old_kernels() {
        let run = || {
            // SAFETY: unshare accesses no memory of this process, and affects only this thread.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).unwrap();
            std::fs::write("/proc/sys/net/core/optmem_max", "20480").unwrap();
            let address = "0.0.0.0:0".parse().unwrap();
            let flags = BindFlags::default();
            let listener = listen_tcp(&address, &flags, PortSharing::Join).unwrap();
            let gaps: Vec<_> = (0..1000).step_by(2).collect();
            select_sockets(&listener, &gaps).unwrap();
            // Check that the limit applies in this namespace, because the test would otherwise
            // prove nothing. A program with two statements for each shard exceeds the limit.
            let ret = uapi::BPF_RET | uapi::BPF_K;
            let is = uapi::BPF_JMP | uapi::BPF_JEQ | uapi::BPF_K;
            let each = (0..1000).flat_map(|n| [statement(is, n, 0, 1), statement(ret, n, 0, 0)]);
            let mut long: Vec<_> = each.chain([statement(ret, 0, 0, 0)]).collect();
            let error = attach(&listener, libc::SO_ATTACH_REUSEPORT_CBPF, &mut long).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        };
        std::thread::spawn(run).join().unwrap();
    }
}
