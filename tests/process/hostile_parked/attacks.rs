//! The descriptors and numbers that hostile workers park.

use std::fs::File;
use std::io::Write as _;
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::TimeVal;

use super::{IDLE, REQUEST};
use crate::hostile::attacker::{
    Attacker, DETACH, Listener, NO_HANDLE, PARK, PARK_AGAIN, RELEASE, frame, handle_frame, numbers,
};

/// `F_SETSIG` in fcntl(2), which the crate `libc` lacks for some targets.
const F_SETSIG: i32 = 10;

/// The master's reaction to an attack.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// The master disconnects and kills the worker, and reports why.
    Killed(&'static str),
    /// The worker breaks no rule. The test kills it.
    Ignored,
}
use Outcome::{Ignored, Killed};

#[derive(Clone, Copy)]
pub struct Attack {
    pub name: &'static str,
    /// Returns the descriptors that stay open until the attacker is killed.
    pub play: Play,
    pub outcome: Outcome,
}

const NOT_A_CONNECTION: Outcome = Killed("parked descriptor that is no connection");
const UNKNOWN: Outcome = Killed("report of a connection that the worker does not have");

pub type Play = fn(&Attacker, &Listener<'_>) -> Vec<OwnedFd>;

fn attack(name: &'static str, play: Play, outcome: Outcome) -> Attack {
    Attack {
        name,
        play,
        outcome,
    }
}

pub fn attacks() -> Vec<Attack> {
    let mut all = no_connections();
    all.extend(other_sockets());
    all.extend(dead_sockets());
    all.extend(foreign_sockets());
    all.extend(numbers_of_connections());
    all.extend(options());
    all
}

/// Parks descriptors that are not connections.
fn no_connections() -> Vec<Attack> {
    vec![
        attack(
            "pipe",
            |attacker, shared| {
                let (reader, writer) = nix::unistd::pipe().unwrap();
                park(attacker, shared, &reader);
                vec![writer]
            },
            NOT_A_CONNECTION,
        ),
        attack(
            "file",
            |attacker, shared| {
                park(attacker, shared, &File::open("/proc/self/exe").unwrap());
                vec![]
            },
            NOT_A_CONNECTION,
        ),
        attack(
            "listening socket",
            |attacker, shared| {
                park(attacker, shared, &TcpListener::bind("127.0.0.1:0").unwrap());
                vec![]
            },
            NOT_A_CONNECTION,
        ),
        attack(
            "UDP socket",
            |attacker, shared| {
                park(attacker, shared, &UdpSocket::bind("127.0.0.1:0").unwrap());
                vec![]
            },
            NOT_A_CONNECTION,
        ),
    ]
}

/// Parks sockets of other types, and several descriptors.
fn other_sockets() -> Vec<Attack> {
    vec![
        attack(
            "Unix datagram socket",
            |attacker, shared| {
                park(attacker, shared, &UnixDatagram::unbound().unwrap());
                vec![]
            },
            NOT_A_CONNECTION,
        ),
        attack(
            "sequenced packets",
            |attacker, shared| {
                let kind = SockType::SeqPacket;
                let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::empty());
                let (here, there) = pair.unwrap();
                park(attacker, shared, &here);
                vec![there]
            },
            NOT_A_CONNECTION,
        ),
        attack(
            "two descriptors",
            |attacker, shared| {
                let (here, there) = UnixStream::pair().unwrap();
                let fds = [here.as_raw_fd(), there.as_raw_fd()];
                attacker.send_with_fds(&frame(PARK, 2, &numbers(&[shared.handle, 1])), &fds);
                vec![]
            },
            Killed("invalid number of descriptors"),
        ),
    ]
}

/// Parks the worker's channel, and sockets without a peer.
fn dead_sockets() -> Vec<Attack> {
    vec![
        attack(
            "own channel",
            |attacker, shared| {
                park(attacker, shared, &attacker.channel);
                vec![]
            },
            Ignored,
        ),
        attack(
            "unconnected TCP socket",
            |attacker, shared| {
                let kind = SockType::Stream;
                park(
                    attacker,
                    shared,
                    &socket(AddressFamily::Inet, kind, SockFlag::empty(), None).unwrap(),
                );
                vec![]
            },
            Ignored,
        ),
        attack(
            "unconnected Unix socket",
            |attacker, shared| {
                let kind = SockType::Stream;
                park(
                    attacker,
                    shared,
                    &socket(AddressFamily::Unix, kind, SockFlag::empty(), None).unwrap(),
                );
                vec![]
            },
            Ignored,
        ),
        attack(
            "closed peer",
            |attacker, shared| {
                park(attacker, shared, &tcp_pair().0);
                vec![]
            },
            Ignored,
        ),
        attack(
            "reset peer",
            |attacker, shared| {
                let (here, there) = tcp_pair();
                set_linger(&there, 0);
                drop(there);
                park(attacker, shared, &here);
                vec![]
            },
            Ignored,
        ),
        attack(
            "shut down",
            |attacker, shared| {
                let (here, there) = tcp_pair();
                here.shutdown(Shutdown::Both).unwrap();
                park(attacker, shared, &here);
                vec![there.into()]
            },
            Ignored,
        ),
    ]
}

/// Parks connections that the master did not dispatch to the worker.
fn foreign_sockets() -> Vec<Attack> {
    vec![
        attack(
            "Unix socket",
            |attacker, shared| {
                let (here, there) = UnixStream::pair().unwrap();
                park(attacker, shared, &here);
                vec![there.into()]
            },
            Ignored,
        ),
        attack(
            "Unix socket with a request",
            |attacker, shared| {
                let (here, mut there) = UnixStream::pair().unwrap();
                park(attacker, shared, &here);
                there.write_all(&[REQUEST]).unwrap();
                read_line(&there);
                vec![there.into()]
            },
            Ignored,
        ),
        attack(
            "unknown listener",
            |attacker, _| {
                let (here, there) = tcp_pair();
                park_as(attacker, NO_HANDLE, &here);
                vec![there.into()]
            },
            Ignored,
        ),
        attack(
            "released listener",
            |attacker, shared| {
                attacker.send(&handle_frame(RELEASE, shared.handle));
                let (here, there) = tcp_pair();
                park(attacker, shared, &here);
                vec![there.into()]
            },
            Ignored,
        ),
        attack(
            "twice",
            |attacker, shared| {
                let (here, there) = tcp_pair();
                for _ in 0..5 {
                    park(attacker, shared, &here);
                }
                vec![there.into()]
            },
            Ignored,
        ),
        attack(
            "socket of a client",
            |attacker, shared| {
                let client = TcpStream::connect(("127.0.0.1", shared.port)).unwrap();
                // The worker that receives the connection waits no longer for a request.
                client.shutdown(Shutdown::Write).unwrap();
                park(attacker, shared, &client);
                vec![]
            },
            Ignored,
        ),
    ]
}

/// Parks or detaches connections that the attacker does not have, by number. The first connection
/// is held by another worker, and the second one is idle.
fn numbers_of_connections() -> Vec<Attack> {
    let attack = |name, play| attack(name, play, UNKNOWN);
    fn report(attacker: &Attacker, kind: u8, number: u32) -> Vec<OwnedFd> {
        attacker.send(&frame(kind, 0, &numbers(&[number])));
        vec![]
    }
    vec![
        attack("park of another worker's connection", |attacker, _| {
            report(attacker, PARK_AGAIN, 0)
        }),
        attack("park of an idle connection", |attacker, _| {
            report(attacker, PARK_AGAIN, 1)
        }),
        attack("park of no connection", |attacker, _| {
            report(attacker, PARK_AGAIN, 1000)
        }),
        attack("park of an impossible number", |attacker, _| {
            report(attacker, PARK_AGAIN, u32::MAX)
        }),
        attack("detach of another worker's connection", |attacker, _| {
            report(attacker, DETACH, 0)
        }),
        attack("detach of an idle connection", |attacker, _| {
            report(attacker, DETACH, 1)
        }),
        attack("detach of an impossible number", |attacker, _| {
            report(attacker, DETACH, u32::MAX)
        }),
        attack("park after parking", |attacker, shared| {
            let (here, there) = tcp_pair();
            park(attacker, shared, &here);
            report(attacker, PARK_AGAIN, u32::try_from(IDLE).unwrap());
            vec![there.into()]
        }),
    ]
}

/// Sets options that could make the master wait or spin.
fn options() -> Vec<Attack> {
    let attack = |name, play| attack(name, play, Ignored);
    vec![
        attack("non-blocking", |attacker, shared| {
            exchange(attacker, shared, |here| set_flag(here, OFlag::O_NONBLOCK))
        }),
        attack("linger 0", |attacker, shared| {
            exchange(attacker, shared, |here| set_linger(here, 0))
        }),
        attack("linger for long", |attacker, shared| {
            exchange(attacker, shared, |here| set_linger(here, 1000))
        }),
        attack("signals to the master", |attacker, shared| {
            exchange(attacker, shared, |here| {
                // By default, SIGURG is ignored.
                call_fcntl(here, F_SETSIG, nix::libc::SIGURG);
                let master = nix::unistd::getppid().as_raw();
                call_fcntl(here, nix::libc::F_SETOWN, master);
                set_flag(here, OFlag::O_ASYNC);
            })
        }),
        attack("timeouts", |attacker, shared| {
            exchange(attacker, shared, |here| {
                let short = TimeVal::new(0, 1);
                setsockopt(here, sockopt::ReceiveTimeout, &short).unwrap();
                setsockopt(here, sockopt::SendTimeout, &short).unwrap();
            })
        }),
        attack("low-water mark", |attacker, shared| {
            let (here, mut there) = tcp_pair();
            set_option(&here, nix::libc::SO_RCVLOWAT, 1000);
            park(attacker, shared, &here);
            there.write_all(&[REQUEST]).unwrap();
            vec![there.into()]
        }),
        attack("error queue", |attacker, shared| {
            let (mut here, there) = tcp_pair();
            let flags =
                nix::libc::SOF_TIMESTAMPING_TX_SOFTWARE | nix::libc::SOF_TIMESTAMPING_SOFTWARE;
            set_option(&here, nix::libc::SO_TIMESTAMPING, flags.try_into().unwrap());
            here.write_all(b"x").unwrap();
            park(attacker, shared, &here);
            vec![there.into()]
        }),
        attack("urgent data", |attacker, shared| {
            let (here, there) = tcp_pair();
            send(there.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
            park(attacker, shared, &here);
            vec![there.into()]
        }),
    ]
}

/// Parks a connection after `set`, and sends a request, which another worker answers.
fn exchange(attacker: &Attacker, shared: &Listener<'_>, set: fn(&TcpStream)) -> Vec<OwnedFd> {
    let (here, mut there) = tcp_pair();
    set(&here);
    park(attacker, shared, &here);
    there.write_all(&[REQUEST]).unwrap();
    read_line(&there);
    vec![there.into(), here.into()]
}

pub fn park(attacker: &Attacker, shared: &Listener<'_>, fd: &impl AsFd) {
    park_as(attacker, shared.handle, fd);
}

fn park_as(attacker: &Attacker, handle: u32, fd: &impl AsFd) {
    let fd = fd.as_fd().as_raw_fd();
    attacker.send_with_fds(&frame(PARK, 1, &numbers(&[handle, 1])), &[fd]);
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener.accept().unwrap().0, client)
}

fn read_line(mut stream: impl std::io::Read) {
    let mut byte = [0];
    while byte != [b'\n'] {
        stream.read_exact(&mut byte).unwrap();
    }
}

fn call_fcntl(fd: &impl AsFd, command: i32, argument: i32) {
    let fd = fd.as_fd().as_raw_fd();
    #[allow(unsafe_code)]
    // SAFETY: the commands that callers pass change no memory.
    let result = unsafe { nix::libc::fcntl(fd, command, argument) };
    assert_eq!(result, 0);
}

fn set_flag(fd: &impl AsFd, flag: OFlag) {
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap();
    let flags = OFlag::from_bits_retain(flags) | flag;
    fcntl(fd, FcntlArg::F_SETFL(flags)).unwrap();
}

fn set_linger(fd: &impl AsFd, seconds: i32) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: seconds,
    };
    setsockopt(fd, sockopt::Linger, &linger).unwrap();
}

fn set_option(fd: &impl AsFd, name: i32, value: i32) {
    #[allow(unsafe_code)]
    // SAFETY: the pointer is valid for reads of one `c_int`, which is the length that is passed.
    let set = unsafe {
        nix::libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            nix::libc::SOL_SOCKET,
            name,
            (&raw const value).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
}
