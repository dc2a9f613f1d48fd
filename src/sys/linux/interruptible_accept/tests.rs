use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::AtomicU32;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, alarm, fork, getpid};

use super::*;
use crate::sys::signal;

const ALONE: &str = "CLUSTER_TEST_ALONE";

/// Runs a test in its own process, because handlers and their descriptors belong to the process. If
/// an interruption is lost, `accept` blocks forever. An alarm then ends the process, and the test
/// fails.
fn alone(name: &str, test: fn()) {
    if std::env::var_os(ALONE).is_some() {
        alarm::set(60);
        return test();
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::{name}"), "--exact", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let status = output.status;
    assert!(stdout.contains("1 passed"), "{status}\n{stdout}\n{stderr}");
}

/// A listener, and an interrupting source with its peer.
struct Fixture {
    interruptible: InterruptibleAccept,
    listener: TcpListener,
    source: UnixStream,
    peer: UnixStream,
}

impl Fixture {
    fn new() -> Self {
        let (source, peer) = UnixStream::pair().unwrap();
        source.set_nonblocking(true).unwrap();
        let interruptible = InterruptibleAccept::new().unwrap();
        interruptible.add(source.as_fd()).unwrap();
        Self {
            interruptible,
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            source,
            peer,
        }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        self.interruptible.accept(self.listener.as_fd(), None)
    }

    fn accept_until(&self, deadline: Instant) -> io::Result<Option<OwnedFd>> {
        self.interruptible
            .accept(self.listener.as_fd(), Some(deadline))
    }

    #[track_caller]
    fn assert_interrupted(&self) {
        assert!(self.accept().unwrap().is_none());
    }

    /// Asserts that the next call returns a connection without being interrupted.
    #[track_caller]
    fn assert_not_interrupted(&self) {
        let _client = TcpStream::connect(self.address()).unwrap();
        assert!(self.accept().unwrap().is_some());
    }

    fn drain(&self) -> usize {
        let mut all = 0;
        let mut sink = [0; 4096];
        while let Ok(bytes @ 1..) = (&self.source).read(&mut sink) {
            all += bytes;
        }
        all
    }
}

/// Calls `act` on another thread as soon as the calling thread sleeps.
fn once_this_thread_sleeps(act: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    let thread = own_thread();
    thread::spawn(move || {
        wait_until_asleep(getpid(), thread);
        act();
    })
}

fn wait_until_asleep(process: Pid, thread: libc::pid_t) {
    loop {
        let stat = format!("/proc/{process}/task/{thread}/stat");
        let stat = std::fs::read_to_string(stat).unwrap();
        if stat.rsplit_once(") ").unwrap().1.starts_with('S') {
            return;
        }
        thread::yield_now();
    }
}

fn is_blocked() -> bool {
    SigSet::thread_get_mask().unwrap().contains(Signal::SIGURG)
}

fn is_async(source: &UnixStream) -> bool {
    let flags = fcntl(source, FcntlArg::F_GETFL).unwrap();
    OFlag::from_bits_retain(flags).contains(OFlag::O_ASYNC)
}

#[test]
fn accept_returns_a_blocking_connection() {
    alone("accept_returns_a_blocking_connection", || {
        let fixture = Fixture::new();
        let address = fixture.address();
        let client = once_this_thread_sleeps(move || {
            let mut client = TcpStream::connect(address).unwrap();
            client.read_exact(&mut [0]).unwrap();
        });
        let connection = fixture.accept().unwrap().unwrap();
        let flags = fcntl(&connection, FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
        let flags = fcntl(&connection, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
        TcpStream::from(connection).write_all(b"a").unwrap();
        client.join().unwrap();
        assert!(is_blocked());
    });
}

#[test]
fn bytes_interrupt_accept() {
    alone("bytes_interrupt_accept", || {
        let fixture = Fixture::new();
        let mut peer = fixture.peer.try_clone().unwrap();
        let writer = once_this_thread_sleeps(move || peer.write_all(b"ab").unwrap());
        fixture.assert_interrupted();
        assert_eq!(fixture.drain(), 2);
        writer.join().unwrap();
        fixture.assert_not_interrupted();
    });
}

#[test]
fn bytes_that_arrived_before_the_call_interrupt_accept() {
    alone(
        "bytes_that_arrived_before_the_call_interrupt_accept",
        || {
            let fixture = Fixture::new();
            (&fixture.peer).write_all(b"a").unwrap();
            fixture.assert_interrupted();
            assert_eq!(fixture.drain(), 1);
            fixture.assert_not_interrupted();
        },
    );
}

/// Asserts that a signal shortly before `accept` sleeps is not lost. A timer fires at a random
/// moment around the call. If its signal were lost, `accept` would block until the alarm.
#[test]
fn no_timer_is_lost_at_the_start_of_accept() {
    let name = "no_timer_is_lost_at_the_start_of_accept";
    alone(name, || {
        let fixture = Fixture::new();
        for _ in 0..100_000 {
            let delay = Duration::from_nanos(fastrand::u64(0..10_000));
            assert!(
                fixture
                    .accept_until(Instant::now() + delay)
                    .unwrap()
                    .is_none()
            );
        }
    });
}

/// Asserts that a message that arrives just before `accept` goes to sleep is not lost. As soon as a
/// byte has been read, another thread writes the next one, at a random moment around the call. If
/// its signal were lost, `accept` would block until the alarm.
#[test]
fn no_message_is_lost_at_the_start_of_accept() {
    const ROUNDS: u32 = 10_000;
    static ROUND: AtomicU32 = AtomicU32::new(0);
    fn spin() {
        for _ in 0..fastrand::u32(0..200) {
            std::hint::spin_loop();
        }
    }
    let name = "no_message_is_lost_at_the_start_of_accept";
    alone(name, || {
        let fixture = Fixture::new();
        let mut peer = fixture.peer.try_clone().unwrap();
        let writer = thread::spawn(move || {
            for round in 1..=ROUNDS {
                while ROUND.load(Ordering::SeqCst) != round {
                    thread::yield_now();
                }
                spin();
                peer.write_all(b"a").unwrap();
            }
        });
        for round in 1..=ROUNDS {
            alarm::set(60);
            assert_eq!(fixture.drain(), 0);
            ROUND.store(round, Ordering::SeqCst);
            spin();
            while fixture.drain() == 0 {
                fixture.assert_interrupted();
            }
        }
        writer.join().unwrap();
    });
}

#[test]
fn hang_up_interrupts_accept() {
    alone("hang_up_interrupts_accept", || {
        let Fixture {
            interruptible,
            listener,
            source,
            peer,
        } = Fixture::new();
        let closer = once_this_thread_sleeps(move || drop(peer));
        assert!(
            interruptible
                .accept(listener.as_fd(), None)
                .unwrap()
                .is_none()
        );
        assert_eq!((&source).read(&mut [0]).unwrap(), 0);
        closer.join().unwrap();
    });
}

#[test]
fn space_to_write_interrupts_accept() {
    alone("space_to_write_interrupts_accept", || {
        let fixture = Fixture::new();
        let fill = || {
            let mut all = 0;
            while let Ok(bytes) = (&fixture.source).write(&[0; 4096]) {
                all += bytes;
            }
            all
        };
        let mut full = fill();
        for _ in 0..10 {
            let mut peer = fixture.peer.try_clone().unwrap();
            let reader = once_this_thread_sleeps(move || {
                peer.read_exact(&mut vec![0; full]).unwrap();
            });
            fixture.assert_interrupted();
            reader.join().unwrap();
            full = fill();
            assert!(full > 0);
        }
    });
}

#[test]
fn handled_signal_interrupts_accept() {
    alone("handled_signal_interrupts_accept", || {
        let fixture = Fixture::new();
        let pipe = signal::SignalPipe::new().unwrap();
        let _installed = signal::install(libc::SIGUSR1).unwrap();
        fixture.interruptible.add(pipe.as_fd()).unwrap();
        let killer = once_this_thread_sleeps(|| kill(getpid(), Signal::SIGUSR1).unwrap());
        fixture.assert_interrupted();
        assert_eq!(pipe.take(), [libc::SIGUSR1]);
        killer.join().unwrap();
        signal::raise(libc::SIGUSR1);
        fixture.assert_interrupted();
        assert_eq!(pipe.take(), [libc::SIGUSR1]);
        fixture.assert_not_interrupted();
    });
}

#[test]
fn deadline_interrupts_accept() {
    alone("deadline_interrupts_accept", || {
        let fixture = Fixture::new();
        let in_a_while = || Instant::now() + Duration::from_millis(50);
        let deadline = in_a_while();
        assert!(fixture.accept_until(deadline).unwrap().is_none());
        assert!(Instant::now() >= deadline);
        for passed in [deadline, deadline, Instant::now()] {
            assert!(fixture.accept_until(passed).unwrap().is_none());
        }
        let hour = Instant::now() + Duration::from_secs(3600);
        let _client = TcpStream::connect(fixture.address()).unwrap();
        // The previous deadline has passed, so the caller must check all sources first.
        assert!(fixture.accept_until(hour).unwrap().is_none());
        assert!(fixture.accept_until(hour).unwrap().is_some());
        let sooner = in_a_while();
        assert!(fixture.accept_until(sooner).unwrap().is_none());
        assert!(Instant::now() >= sooner);
        // A call without a deadline must disarm the timer. If the timer stayed armed, the previous
        // deadline would interrupt the last call.
        let _client = TcpStream::connect(fixture.address()).unwrap();
        let later = in_a_while();
        assert!(fixture.accept_until(later).unwrap().is_none());
        assert!(fixture.accept_until(later).unwrap().is_some());
        let address = fixture.address();
        let client = thread::spawn(move || {
            // Let the call wait, so that an armed timer would interrupt it.
            thread::sleep(Duration::from_millis(100));
            TcpStream::connect(address).unwrap();
        });
        assert!(fixture.accept().unwrap().is_some());
        client.join().unwrap();
    });
}

#[test]
fn calls_of_the_application_are_not_interrupted() {
    alone("calls_of_the_application_are_not_interrupted", || {
        let fixture = Fixture::new();
        let (mut here, _there) = UnixStream::pair().unwrap();
        let timeout = Some(Duration::from_millis(200));
        here.set_read_timeout(timeout).unwrap();
        let mut peer = fixture.peer.try_clone().unwrap();
        let writer = once_this_thread_sleeps(move || {
            for _ in 0..50 {
                peer.write_all(b"a").unwrap();
                // The pauses spread the arrivals over the call.
                thread::sleep(Duration::from_millis(1));
            }
        });
        let error = here.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        writer.join().unwrap();
        fixture.assert_interrupted();
        assert_eq!(fixture.drain(), 50);
    });
}

/// Asserts that filling the slot with another listener does not lose an interruption. The handler
/// runs between two calls with different listeners. A faulty second call would block, because its
/// listener replaces the stub.
#[test]
fn no_interruption_is_lost_when_the_listener_changes() {
    alone("no_interruption_is_lost_when_the_listener_changes", || {
        let fixture = Fixture::new();
        fixture.assert_not_interrupted();
        let mut signal = SigSet::empty();
        signal.add(Signal::SIGURG);
        signal.thread_unblock().unwrap();
        (&fixture.peer).write_all(b"a").unwrap();
        signal.thread_block().unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let accepted = fixture.interruptible.accept(other.as_fd(), None).unwrap();
        assert!(accepted.is_none());
    });
}

#[test]
fn application_may_block_or_unblock_the_signal() {
    let name = "application_may_block_or_unblock_the_signal";
    alone(name, || {
        let mut signal = SigSet::empty();
        signal.add(Signal::SIGURG);
        signal.thread_block().unwrap();
        let fixture = Fixture::new();
        (&fixture.peer).write_all(b"a").unwrap();
        fixture.assert_interrupted();
        fixture.assert_not_interrupted();
        drop(fixture);
        assert!(is_blocked());
        let fixture = Fixture::new();
        signal.thread_unblock().unwrap();
        (&fixture.peer).write_all(b"a").unwrap();
        fixture.assert_interrupted();
        fixture.assert_not_interrupted();
        assert!(!is_blocked());
    });
}

#[test]
fn released_and_dropped_listener_is_closed() {
    alone("released_and_dropped_listener_is_closed", || {
        let fixture = Fixture::new();
        fixture.assert_not_interrupted();
        let address = fixture.address();
        fixture
            .interruptible
            .release(fixture.listener.as_fd())
            .unwrap();
        drop(fixture.listener);
        let error = TcpStream::connect(address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    });
}

#[test]
fn accept_returns_errors() {
    alone("accept_returns_errors", || {
        let fixture = Fixture::new();
        fixture.listener.set_nonblocking(true).unwrap();
        let error = fixture.accept().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let no_socket = std::fs::File::open("/dev/null").unwrap();
        let error = fixture
            .interruptible
            .accept(no_socket.as_fd(), None)
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
        let error = fixture.interruptible.add(no_socket.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        let error = InterruptibleAccept::new().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    });
}

#[test]
fn handler_of_the_application_runs_and_is_restored() {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    extern "C" fn count(_signal: libc::c_int) {
        RUNS.fetch_add(1, Ordering::SeqCst);
    }
    alone("handler_of_the_application_runs_and_is_restored", || {
        let counting = SigHandler::Handler(count);
        let action = SigAction::new(counting, SaFlags::SA_NODEFER, SigSet::empty());
        // SAFETY: the handler only increments an atomic counter, which is async-signal-safe.
        unsafe { sigaction(Signal::SIGURG, &action) }.unwrap();
        let fixture = Fixture::new();
        (&fixture.peer).write_all(b"a").unwrap();
        fixture.assert_interrupted();
        assert_eq!(RUNS.load(Ordering::SeqCst), 1);
        drop(fixture);
        assert!(!is_handled());
        assert!(super::action().sa_flags & libc::SA_NODEFER != 0);
        signal::raise(SIGNAL);
        assert_eq!(RUNS.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn drop_restores_the_previous_state() {
    alone("drop_restores_the_previous_state", || {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        let fixture = Fixture::new();
        let soon = Instant::now() + Duration::from_millis(1);
        assert!(fixture.accept_until(soon).unwrap().is_none());
        assert!(is_blocked() && is_handled() && is_async(&fixture.source));
        // Close this source early, so that another descriptor reuses its number. A faulty `drop`
        // would clear `O_ASYNC` on that other descriptor.
        let (closed, _peer) = UnixStream::pair().unwrap();
        let number = closed.as_raw_fd();
        fixture.interruptible.add(closed.as_fd()).unwrap();
        drop(closed);
        let (here, _there) = UnixStream::pair().unwrap();
        assert_eq!(here.as_raw_fd(), number);
        crate::sys::fd::set_status_flag(number, libc::O_ASYNC, true).unwrap();
        let Fixture {
            interruptible,
            source,
            peer,
            listener,
        } = fixture;
        (&peer).write_all(b"unread").unwrap();
        drop(interruptible);
        assert!(!is_blocked() && !is_handled() && !is_async(&source));
        assert_eq!(async_io::owner(source.as_raw_fd()).unwrap(), 0);
        assert!(is_async(&here), "this descriptor was not added");
        drop((source, peer, listener, here, _there, _peer));
        assert_eq!(open(), before);
        Fixture::new().assert_not_interrupted();
    });
}

/// A child that is killed on drop.
struct Child(Pid);

impl Child {
    /// Runs `act` in a child, which is killed when this thread exits.
    fn fork(act: impl FnOnce()) -> Self {
        // SAFETY: no other thread of this process holds a lock that the child needs.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Self(child),
            ForkResult::Child => {
                set_pdeathsig(Signal::SIGKILL).unwrap();
                act();
                std::process::exit(0);
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

#[test]
fn processes_blocked_in_accept_take_strict_turns() {
    alone("processes_blocked_in_accept_take_strict_turns", || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let serve = || {
            let (source, _peer) = UnixStream::pair().unwrap();
            let interruptible = InterruptibleAccept::new().unwrap();
            interruptible.add(source.as_fd()).unwrap();
            loop {
                let connection = interruptible.accept(listener.as_fd(), None).unwrap();
                let mut connection = TcpStream::from(connection.unwrap());
                let number = getpid().as_raw().to_ne_bytes();
                connection.write_all(&number).unwrap();
            }
        };
        let workers: Vec<_> = (0..2).map(|_| Child::fork(serve)).collect();
        let mut turns = Vec::new();
        for _ in 0..500 {
            for worker in &workers {
                wait_until_asleep(worker.0, worker.0.as_raw());
            }
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut number = [0; 4];
            client.read_exact(&mut number).unwrap();
            turns.push(libc::pid_t::from_ne_bytes(number));
        }
        assert!(turns.windows(2).all(|two| two[0] != two[1]), "{turns:?}");
    });
}

#[test]
fn drop_in_a_forked_child_does_not_affect_the_parent() {
    alone("drop_in_a_forked_child_does_not_affect_the_parent", || {
        let mut fixture = Some(Fixture::new());
        let child = Child::fork(|| drop(fixture.take()));
        waitpid(child.0, None).unwrap();
        let fixture = fixture.unwrap();
        assert!(is_async(&fixture.source));
        (&fixture.peer).write_all(b"a").unwrap();
        fixture.assert_interrupted();
    });
}
