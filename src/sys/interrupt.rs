//! A blocking `accept` that messages, signals and timers interrupt.
//!
//! Linux queues processes that block in `accept` first in, first out, and wakes one for each
//! connection; whoever polls takes part in no queue. So a worker that has to hear its channel as well
//! blocks all the same, and the kernel signals each arrival: SIGURG, which is ignored where nobody
//! handles it, to this one thread. It stays blocked but for the call itself, so that the program's own
//! calls are not interrupted.
//!
//! A signal that comes when it is let through, but before `accept` sleeps, must not be lost. So
//! `accept` is called on a number that is reserved for it, the *slot*, which holds a copy of the
//! listener. The handler puts a *dead* descriptor there, which nobody can accept from: the call
//! fails, whether it has begun or not.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::Instant;

use crate::sys::owner::Owner;
use crate::sys::{check, empty_set, fd};

const SIGNAL: libc::c_int = libc::SIGURG;

/// The thread that the handler works for; 0 if none.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// The numbers that the handler works on.
static SLOT: AtomicI32 = AtomicI32::new(-1);
static DEAD: AtomicI32 = AtomicI32::new(-1);
/// The handler has run, and its owner does not know it yet.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The handler that ours replaced, as `sa_sigaction`, if it is a function.
static PREVIOUS: AtomicUsize = AtomicUsize::new(0);

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Only async-signal-safe calls, and errno as it was.
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: always callable.
    let errno_location = unsafe { libc::__errno_location() };
    // SAFETY: the location of errno is valid for the thread that runs this.
    let errno = unsafe { *errno_location };
    // On another thread the numbers might be closed, and given to somebody else, right now. And
    // nobody waits there.
    if OWNER.load(Ordering::SeqCst) == own_thread() {
        INTERRUPTED.store(true, Ordering::SeqCst);
        let (dead, slot) = (DEAD.load(Ordering::SeqCst), SLOT.load(Ordering::SeqCst));
        // It cannot fail: both are open. The manual's EBUSY is for a number that another thread
        // is about to open, and this one is never free.
        // SAFETY: the slot is this module's own.
        unsafe { libc::dup3(dead, slot, libc::O_CLOEXEC) };
    }
    let previous = PREVIOUS.load(Ordering::SeqCst);
    if previous != 0 {
        // SAFETY: `handle` stored the address of a handler that the system would have called. A
        // handler that takes only the number ignores the other two arguments.
        let previous = unsafe { std::mem::transmute::<usize, Handler>(previous) };
        previous(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno_location = errno };
}

/// The address of our handler, as the system stores it.
fn ours() -> libc::sighandler_t {
    handler as Handler as libc::sighandler_t
}

fn own_thread() -> libc::pid_t {
    // The C library has it as a function only since 2019.
    // SAFETY: always callable.
    let number = unsafe { libc::syscall(libc::SYS_gettid) };
    libc::pid_t::try_from(number).unwrap_or(-1)
}

/// Lets a thread block in `accept` and be interrupted. There is one in a process, on one thread:
/// the pointer in `timer` keeps it there.
pub(crate) struct Interrupt {
    slot: OwnedFd,
    dead: OwnedFd,
    signal: libc::sigset_t,
    was_blocked: bool,
    previous_action: libc::sigaction,
    sources: RefCell<Vec<RawFd>>,
    /// The listener whose copy was put into the slot.
    armed: Cell<Option<RawFd>>,
    timer: Cell<Option<libc::timer_t>>,
    /// What the timer is set to.
    deadline: Cell<Option<Instant>>,
    owner: Owner,
}

impl Interrupt {
    /// Begins to handle the signal, and blocks it on this thread.
    ///
    /// # Errors
    ///
    /// - there is one already, on whatever thread (`ResourceBusy`);
    /// - there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two integers.
        let dead = fd::adopt(check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?);
        let slot = dead.try_clone()?;
        let mut signal = empty_set();
        // SAFETY: the set is initialised.
        check(unsafe { libc::sigaddset(&raw mut signal, SIGNAL) })?;
        let order = Ordering::SeqCst;
        let claimed = OWNER.compare_exchange(0, own_thread(), order, order);
        if claimed.is_err() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        DEAD.store(dead.as_raw_fd(), Ordering::SeqCst);
        SLOT.store(slot.as_raw_fd(), Ordering::SeqCst);
        let mask = change_mask(libc::SIG_BLOCK, &signal);
        // SAFETY: the set is initialised.
        let was_blocked = unsafe { libc::sigismember(&raw const mask, SIGNAL) } == 1;
        Ok(Self {
            slot,
            dead,
            was_blocked,
            signal,
            previous_action: handle(),
            sources: RefCell::default(),
            armed: Cell::default(),
            timer: Cell::default(),
            deadline: Cell::default(),
            owner: Owner::current(),
        })
    }

    /// From now on, `accept` is interrupted when something comes by `source`, a socket; when its
    /// other side is gone; and when there is room again after a send that would have had to wait.
    /// What has come before has to be looked for.
    ///
    /// # Errors
    ///
    /// It is not a descriptor, or the system does not signal what comes by it (`Unsupported`).
    pub(crate) fn add(&self, source: BorrowedFd<'_>) -> io::Result<()> {
        let source = source.as_raw_fd();
        self.sources.borrow_mut().push(source);
        set_signal(source, SIGNAL)?;
        set_owner(source, own_thread())?;
        set_async(source, true)?;
        // What cannot do it says nothing.
        if flags_of(source)? & libc::O_ASYNC == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    /// Waits for a connection. It blocks, and is closed on exec. `None` means that there may be
    /// something to do, or that the deadline has come.
    ///
    /// Arrivals are signalled once. So before each call, and after the last one that returned
    /// `None`, all sources have to be read until they would block. After a send that would have
    /// had to wait, poll has to deny once that there is room: the kernel may have made it
    /// just before it noted that somebody wants to know.
    ///
    /// # Errors
    ///
    /// As of accept(2): among them `WouldBlock` if the listener does not block.
    pub(crate) fn accept(
        &self,
        listener: BorrowedFd<'_>,
        deadline: Option<Instant>,
    ) -> io::Result<Option<OwnedFd>> {
        if self.set_timer(deadline)? {
            return Ok(None);
        }
        let number = listener.as_raw_fd();
        if self.armed.get() != Some(number) {
            self.fill_slot(number)?;
            self.armed.set(Some(number));
        }
        // It may have come when the last call had its connection already; the slot then held
        // a dead descriptor until just now.
        if self.take_interruption() {
            return Ok(None);
        }
        match self.accept_at_slot() {
            Err(error) => {
                let interrupted = self.take_interruption();
                if interrupted || error.kind() == io::ErrorKind::Interrupted {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
            Ok(connection) => Ok(Some(connection)),
        }
    }

    /// Lets go of a listener that is to be closed.
    pub(crate) fn release(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        if self.armed.get() == Some(listener.as_raw_fd()) {
            self.fill_slot(self.dead.as_raw_fd())?;
            self.armed.set(None);
        }
        Ok(())
    }

    fn fill_slot(&self, number: RawFd) -> io::Result<()> {
        // SAFETY: the slot is this module's own.
        check(unsafe { libc::dup3(number, self.slot.as_raw_fd(), libc::O_CLOEXEC) })?;
        Ok(())
    }

    fn take_interruption(&self) -> bool {
        let interrupted = INTERRUPTED.swap(false, Ordering::SeqCst);
        if interrupted {
            self.armed.set(None);
        }
        interrupted
    }

    /// The one place where the signal is let through.
    fn accept_at_slot(&self) -> io::Result<OwnedFd> {
        let slot = self.slot.as_raw_fd();
        let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mask = change_mask(libc::SIG_UNBLOCK, &self.signal);
        // SAFETY: without room for an address none is written.
        let accepted = check(unsafe { libc::accept4(slot, address, size, libc::SOCK_CLOEXEC) });
        change_mask(libc::SIG_SETMASK, &mask);
        accepted.map(fd::adopt)
    }

    /// Makes the timer go off at the deadline. Returns whether it has come already.
    fn set_timer(&self, deadline: Option<Instant>) -> io::Result<bool> {
        let rest = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if rest.is_some_and(|rest| rest.is_zero()) {
            return Ok(true);
        }
        if self.deadline.get() == deadline {
            return Ok(false);
        }
        // SAFETY: all zeroes is a valid itimerspec: never.
        let mut time: libc::itimerspec = unsafe { std::mem::zeroed() };
        if let Some(rest) = rest {
            // Seconds have 32 bits on some systems, which is 68 years.
            time.it_value.tv_sec = rest.as_secs().try_into().unwrap_or(0x7fff_ffff);
            time.it_value.tv_nsec = rest.subsec_nanos() as _;
        }
        let timer = self.timer()?;
        // SAFETY: the timer exists, the time is initialised, and the old one is not asked for.
        check(unsafe { libc::timer_settime(timer, 0, &raw const time, std::ptr::null_mut()) })?;
        self.deadline.set(deadline);
        Ok(false)
    }

    fn timer(&self) -> io::Result<libc::timer_t> {
        if let Some(timer) = self.timer.get() {
            return Ok(timer);
        }
        // SAFETY: all zeroes is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = own_thread();
        let mut timer = std::ptr::null_mut();
        // SAFETY: the event is initialised, and the timer's number writable.
        check(unsafe {
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer)
        })?;
        self.timer.set(Some(timer));
        Ok(timer)
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("Interrupt");
        f.field("slot", &self.slot).field("sources", &self.sources);
        f.finish_non_exhaustive()
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // In a child that the application has forked, sources are the parent's, and timers are not
        // inherited.
        if self.owner.is_current() && OWNER.load(Ordering::SeqCst) == own_thread() {
            for &source in self.sources.borrow().iter() {
                // It may be closed, and its number somebody else's.
                if owner_of(source).is_ok_and(|owner| owner == own_thread()) {
                    let _ = set_async(source, false);
                    let _ = set_owner(source, 0);
                    let _ = set_signal(source, 0);
                }
            }
            if let Some(timer) = self.timer.get() {
                // SAFETY: it exists, and is not used again.
                unsafe { libc::timer_delete(timer) };
            }
        }
        SLOT.store(-1, Ordering::SeqCst);
        DEAD.store(-1, Ordering::SeqCst);
        INTERRUPTED.store(false, Ordering::SeqCst);
        // Whoever put a handler over ours keeps it, and may still call ours.
        if is_handled() {
            let (action, nowhere) = (&raw const self.previous_action, std::ptr::null_mut());
            // SAFETY: this is the action that was in force before ours.
            unsafe { libc::sigaction(SIGNAL, action, nowhere) };
        }
        if !self.was_blocked {
            change_mask(libc::SIG_UNBLOCK, &self.signal);
        }
        OWNER.store(0, Ordering::SeqCst);
    }
}

/// Changes this thread's mask, and returns what it was.
fn change_mask(how: libc::c_int, set: &libc::sigset_t) -> libc::sigset_t {
    let mut previous = *set;
    // It fails only if it does not know `how`.
    // SAFETY: both sets are initialised.
    unsafe { libc::pthread_sigmask(how, set, &raw mut previous) };
    previous
}

/// Puts our handler in place, and returns what was there. It fails only where there is no such
/// signal.
fn handle() -> libc::sigaction {
    let previous = current_action();
    let is_function =
        previous.sa_sigaction != libc::SIG_DFL && previous.sa_sigaction != libc::SIG_IGN;
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ours();
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    if is_function {
        // It runs inside ours, and as it is used to.
        PREVIOUS.store(previous.sa_sigaction, Ordering::SeqCst);
        action.sa_mask = previous.sa_mask;
        action.sa_flags |= previous.sa_flags & (libc::SA_RESTART | libc::SA_NODEFER);
    } else {
        // For other threads, which somebody may send the signal: `accept` fails either way.
        PREVIOUS.store(0, Ordering::SeqCst);
        action.sa_flags |= libc::SA_RESTART;
    }
    // SAFETY: the handler makes only async-signal-safe calls.
    unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) };
    previous
}

fn current_action() -> libc::sigaction {
    // SAFETY: all zeroes is a valid sigaction.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only reads the old one.
    unsafe { libc::sigaction(SIGNAL, std::ptr::null(), &raw mut current) };
    current
}

fn is_handled() -> bool {
    current_action().sa_sigaction == ours()
}

/// What fcntl(2) has, and `libc` has not. The same on all architectures of Linux that Rust has.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;
const F_OWNER_TID: libc::c_int = 0;

#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    number: libc::pid_t,
}

/// Chooses the signal of a source; 0 for the default.
fn set_signal(source: RawFd, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: F_SETSIG takes an integer.
    check(unsafe { libc::fcntl(source, F_SETSIG, signal) })?;
    Ok(())
}

/// Chooses the thread that is signalled; 0 for nobody.
fn set_owner(source: RawFd, thread: libc::pid_t) -> io::Result<()> {
    let owner = OwnerEx {
        kind: F_OWNER_TID,
        number: thread,
    };
    // SAFETY: the structure lives through the call.
    check(unsafe { libc::fcntl(source, F_SETOWN_EX, &raw const owner) })?;
    Ok(())
}

fn owner_of(source: RawFd) -> io::Result<libc::pid_t> {
    let mut owner = OwnerEx { kind: 0, number: 0 };
    // SAFETY: the structure is writable.
    check(unsafe { libc::fcntl(source, F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner.number)
}

fn flags_of(source: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: F_GETFL only reads the flags.
    check(unsafe { libc::fcntl(source, libc::F_GETFL) })
}

fn set_async(source: RawFd, signals: bool) -> io::Result<()> {
    let flags = flags_of(source)?;
    let wanted = if signals {
        flags | libc::O_ASYNC
    } else {
        flags & !libc::O_ASYNC
    };
    // SAFETY: F_SETFL changes no memory.
    check(unsafe { libc::fcntl(source, libc::F_SETFL, wanted) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
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

    /// Runs a test in a process of its own: handlers, and the numbers that they work on, are the
    /// process's. A wake-up that is lost ends it.
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
        let said = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        let ended = output.status;
        assert!(said.contains("1 passed"), "{ended}\n{said}\n{complaint}");
    }

    /// A listener, and a source with its other side.
    struct Set {
        interrupt: Interrupt,
        listener: TcpListener,
        source: UnixStream,
        other_side: UnixStream,
    }

    impl Set {
        fn new() -> Self {
            let (source, other_side) = UnixStream::pair().unwrap();
            source.set_nonblocking(true).unwrap();
            let interrupt = Interrupt::new().unwrap();
            interrupt.add(source.as_fd()).unwrap();
            Self {
                interrupt,
                listener: TcpListener::bind("127.0.0.1:0").unwrap(),
                source,
                other_side,
            }
        }

        fn address(&self) -> SocketAddr {
            self.listener.local_addr().unwrap()
        }

        fn accept(&self) -> io::Result<Option<OwnedFd>> {
            self.interrupt.accept(self.listener.as_fd(), None)
        }

        fn accept_until(&self, deadline: Instant) -> io::Result<Option<OwnedFd>> {
            self.interrupt.accept(self.listener.as_fd(), Some(deadline))
        }

        #[track_caller]
        fn assert_interrupted(&self) {
            assert!(self.accept().unwrap().is_none());
        }

        /// Nothing interrupts the next call, and connections come.
        #[track_caller]
        fn assert_at_rest(&self) {
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

    /// Does something as soon as the calling thread sleeps.
    fn when_this_thread_sleeps(act: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
        let thread = own_thread();
        thread::spawn(move || {
            until_it_sleeps(getpid(), thread);
            act();
        })
    }

    fn until_it_sleeps(process: Pid, thread: libc::pid_t) {
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
    fn a_connection_comes() {
        alone("a_connection_comes", || {
            let set = Set::new();
            let address = set.address();
            let client = when_this_thread_sleeps(move || {
                let mut client = TcpStream::connect(address).unwrap();
                client.read_exact(&mut [0]).unwrap();
            });
            let connection = set.accept().unwrap().unwrap();
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
    fn bytes_interrupt() {
        alone("bytes_interrupt", || {
            let set = Set::new();
            let mut other_side = set.other_side.try_clone().unwrap();
            let writer = when_this_thread_sleeps(move || other_side.write_all(b"ab").unwrap());
            set.assert_interrupted();
            assert_eq!(set.drain(), 2);
            writer.join().unwrap();
            set.assert_at_rest();
        });
    }

    #[test]
    fn bytes_that_came_before_the_call_interrupt_it() {
        alone("bytes_that_came_before_the_call_interrupt_it", || {
            let set = Set::new();
            (&set.other_side).write_all(b"a").unwrap();
            set.assert_interrupted();
            assert_eq!(set.drain(), 1);
            set.assert_at_rest();
        });
    }

    /// The one thing this module is for. The kernel's timer goes off at a random moment around the
    /// call.
    #[test]
    fn no_wake_up_is_lost_however_close_to_the_call_it_comes() {
        let name = "no_wake_up_is_lost_however_close_to_the_call_it_comes";
        alone(name, || {
            let set = Set::new();
            for _ in 0..100_000 {
                let soon = Duration::from_nanos(fastrand::u64(0..10_000));
                assert!(set.accept_until(Instant::now() + soon).unwrap().is_none());
            }
        });
    }

    /// A thread writes a byte at a random moment around the call, each time after the last one was
    /// read.
    #[test]
    fn no_message_is_lost_however_close_to_the_call_it_comes() {
        const ROUNDS: u32 = 10_000;
        static ROUND: AtomicU32 = AtomicU32::new(0);
        fn spin() {
            for _ in 0..fastrand::u32(0..200) {
                std::hint::spin_loop();
            }
        }
        let name = "no_message_is_lost_however_close_to_the_call_it_comes";
        alone(name, || {
            let set = Set::new();
            let mut other_side = set.other_side.try_clone().unwrap();
            let writer = thread::spawn(move || {
                for round in 1..=ROUNDS {
                    while ROUND.load(Ordering::SeqCst) != round {
                        thread::yield_now();
                    }
                    spin();
                    other_side.write_all(b"a").unwrap();
                }
            });
            for round in 1..=ROUNDS {
                alarm::set(60);
                assert_eq!(set.drain(), 0);
                ROUND.store(round, Ordering::SeqCst);
                spin();
                while set.drain() == 0 {
                    set.assert_interrupted();
                }
            }
            writer.join().unwrap();
        });
    }

    #[test]
    fn the_end_of_the_other_side_interrupts() {
        alone("the_end_of_the_other_side_interrupts", || {
            let Set {
                interrupt,
                listener,
                source,
                other_side,
            } = Set::new();
            let closer = when_this_thread_sleeps(move || drop(other_side));
            assert!(interrupt.accept(listener.as_fd(), None).unwrap().is_none());
            assert_eq!((&source).read(&mut [0]).unwrap(), 0);
            closer.join().unwrap();
        });
    }

    #[test]
    fn room_to_write_interrupts() {
        alone("room_to_write_interrupts", || {
            let set = Set::new();
            let fill = || {
                let mut all = 0;
                while let Ok(bytes) = (&set.source).write(&[0; 4096]) {
                    all += bytes;
                }
                all
            };
            let mut full = fill();
            for _ in 0..10 {
                let mut other_side = set.other_side.try_clone().unwrap();
                let reader = when_this_thread_sleeps(move || {
                    other_side.read_exact(&mut vec![0; full]).unwrap();
                });
                set.assert_interrupted();
                reader.join().unwrap();
                full = fill();
                assert!(full > 0);
            }
        });
    }

    #[test]
    fn a_signal_interrupts() {
        alone("a_signal_interrupts", || {
            let set = Set::new();
            let pipe = signal::SignalPipe::new().unwrap();
            let _installed = signal::install(signal::USR1).unwrap();
            set.interrupt.add(pipe.as_fd()).unwrap();
            let killer = when_this_thread_sleeps(|| kill(getpid(), Signal::SIGUSR1).unwrap());
            set.assert_interrupted();
            assert_eq!(pipe.take(), [signal::USR1]);
            killer.join().unwrap();
            signal::raise(signal::USR1);
            set.assert_interrupted();
            assert_eq!(pipe.take(), [signal::USR1]);
            set.assert_at_rest();
        });
    }

    #[test]
    fn a_deadline_interrupts() {
        alone("a_deadline_interrupts", || {
            let set = Set::new();
            let in_a_while = || Instant::now() + Duration::from_millis(50);
            let deadline = in_a_while();
            assert!(set.accept_until(deadline).unwrap().is_none());
            assert!(Instant::now() >= deadline);
            for passed in [deadline, deadline, Instant::now()] {
                assert!(set.accept_until(passed).unwrap().is_none());
            }
            let hour = Instant::now() + Duration::from_secs(3600);
            let _client = TcpStream::connect(set.address()).unwrap();
            assert!(set.accept_until(hour).unwrap().is_some());
            let sooner = in_a_while();
            assert!(set.accept_until(sooner).unwrap().is_none());
            assert!(Instant::now() >= sooner);
            // One that is taken back does nothing.
            let _client = TcpStream::connect(set.address()).unwrap();
            assert!(set.accept_until(in_a_while()).unwrap().is_some());
            let address = set.address();
            let client = thread::spawn(move || {
                thread::sleep(Duration::from_millis(100));
                TcpStream::connect(address).unwrap();
            });
            assert!(set.accept().unwrap().is_some());
            client.join().unwrap();
        });
    }

    #[test]
    fn calls_of_the_program_are_not_interrupted() {
        alone("calls_of_the_program_are_not_interrupted", || {
            let set = Set::new();
            let (mut here, _there) = UnixStream::pair().unwrap();
            let timeout = Some(Duration::from_millis(200));
            here.set_read_timeout(timeout).unwrap();
            let mut other_side = set.other_side.try_clone().unwrap();
            let writer = when_this_thread_sleeps(move || {
                for _ in 0..50 {
                    other_side.write_all(b"a").unwrap();
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let error = here.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            writer.join().unwrap();
            set.assert_interrupted();
            assert_eq!(set.drain(), 50);
        });
    }

    /// The handler ran when a call had its connection already, and the next one is about another
    /// listener.
    #[test]
    fn no_wake_up_is_lost_when_the_listener_changes() {
        alone("no_wake_up_is_lost_when_the_listener_changes", || {
            let set = Set::new();
            set.assert_at_rest();
            let mut signal = SigSet::empty();
            signal.add(Signal::SIGURG);
            signal.thread_unblock().unwrap();
            (&set.other_side).write_all(b"a").unwrap();
            signal.thread_block().unwrap();
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            let accepted = set.interrupt.accept(other.as_fd(), None).unwrap();
            assert!(accepted.is_none());
        });
    }

    #[test]
    fn a_program_may_let_the_signal_through_or_have_it_blocked() {
        let name = "a_program_may_let_the_signal_through_or_have_it_blocked";
        alone(name, || {
            let mut signal = SigSet::empty();
            signal.add(Signal::SIGURG);
            signal.thread_block().unwrap();
            let set = Set::new();
            (&set.other_side).write_all(b"a").unwrap();
            set.assert_interrupted();
            set.assert_at_rest();
            drop(set);
            assert!(is_blocked());
            let set = Set::new();
            signal.thread_unblock().unwrap();
            (&set.other_side).write_all(b"a").unwrap();
            set.assert_interrupted();
            set.assert_at_rest();
            assert!(!is_blocked());
        });
    }

    #[test]
    fn a_listener_that_is_released_and_dropped_is_closed() {
        alone("a_listener_that_is_released_and_dropped_is_closed", || {
            let set = Set::new();
            set.assert_at_rest();
            let address = set.address();
            set.interrupt.release(set.listener.as_fd()).unwrap();
            drop(set.listener);
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn failures_of_accept_are_told() {
        alone("failures_of_accept_are_told", || {
            let set = Set::new();
            set.listener.set_nonblocking(true).unwrap();
            let error = set.accept().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            let no_socket = std::fs::File::open("/dev/null").unwrap();
            let error = set.interrupt.accept(no_socket.as_fd(), None).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
            let error = set.interrupt.add(no_socket.as_fd()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            let error = Interrupt::new().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        });
    }

    #[test]
    fn the_programs_handler_runs_and_comes_back() {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        extern "C" fn count(_signal: libc::c_int) {
            RUNS.fetch_add(1, Ordering::SeqCst);
        }
        alone("the_programs_handler_runs_and_comes_back", || {
            let counting = SigHandler::Handler(count);
            let action = SigAction::new(counting, SaFlags::SA_NODEFER, SigSet::empty());
            // SAFETY: the handler only counts.
            unsafe { sigaction(Signal::SIGURG, &action) }.unwrap();
            let set = Set::new();
            (&set.other_side).write_all(b"a").unwrap();
            set.assert_interrupted();
            assert_eq!(RUNS.load(Ordering::SeqCst), 1);
            drop(set);
            assert!(!is_handled());
            assert!(current_action().sa_flags & libc::SA_NODEFER != 0);
            signal::raise(SIGNAL);
            assert_eq!(RUNS.load(Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn all_is_as_it_was_when_it_is_dropped() {
        alone("all_is_as_it_was_when_it_is_dropped", || {
            let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
            let before = open();
            let set = Set::new();
            let soon = Instant::now() + Duration::from_millis(1);
            assert!(set.accept_until(soon).unwrap().is_none());
            assert!(is_blocked() && is_handled() && is_async(&set.source));
            // This one is gone before, and its number is somebody else's.
            let (gone, _other_side) = UnixStream::pair().unwrap();
            let number = gone.as_raw_fd();
            set.interrupt.add(gone.as_fd()).unwrap();
            drop(gone);
            let (here, _there) = UnixStream::pair().unwrap();
            assert_eq!(here.as_raw_fd(), number);
            set_async(number, true).unwrap();
            let Set {
                interrupt,
                source,
                other_side,
                listener,
            } = set;
            (&other_side).write_all(b"unread").unwrap();
            drop(interrupt);
            assert!(!is_blocked() && !is_handled() && !is_async(&source));
            assert_eq!(owner_of(source.as_raw_fd()).unwrap(), 0);
            assert!(is_async(&here), "not ours");
            drop((source, other_side, listener, here, _there, _other_side));
            assert_eq!(open(), before);
            Set::new().assert_at_rest();
        });
    }

    /// Kills a child at the end.
    struct Child(Pid);

    impl Child {
        /// Does something in a child, which is killed with this thread.
        fn fork(act: impl FnOnce()) -> Self {
            // SAFETY: the other threads of this process hold no locks that the child needs.
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
    fn processes_that_wait_for_one_listener_take_strict_turns() {
        alone(
            "processes_that_wait_for_one_listener_take_strict_turns",
            || {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let serve = || {
                    let (source, _other_side) = UnixStream::pair().unwrap();
                    let interrupt = Interrupt::new().unwrap();
                    interrupt.add(source.as_fd()).unwrap();
                    loop {
                        let connection = interrupt.accept(listener.as_fd(), None).unwrap();
                        let mut connection = TcpStream::from(connection.unwrap());
                        let number = getpid().as_raw().to_ne_bytes();
                        connection.write_all(&number).unwrap();
                    }
                };
                let workers: Vec<_> = (0..2).map(|_| Child::fork(serve)).collect();
                let mut turns = Vec::new();
                for _ in 0..500 {
                    for worker in &workers {
                        until_it_sleeps(worker.0, worker.0.as_raw());
                    }
                    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    let mut number = [0; 4];
                    client.read_exact(&mut number).unwrap();
                    turns.push(libc::pid_t::from_ne_bytes(number));
                }
                assert!(turns.windows(2).all(|two| two[0] != two[1]), "{turns:?}");
            },
        );
    }

    #[test]
    fn a_forked_child_leaves_it_to_its_parent() {
        alone("a_forked_child_leaves_it_to_its_parent", || {
            let mut set = Some(Set::new());
            let child = Child::fork(|| drop(set.take()));
            waitpid(child.0, None).unwrap();
            let set = set.unwrap();
            assert!(is_async(&set.source));
            (&set.other_side).write_all(b"a").unwrap();
            set.assert_interrupted();
        });
    }
}
