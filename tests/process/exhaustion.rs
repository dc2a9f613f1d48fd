//! Tests with exhausted system resources.
//!
//! The master must report which operation failed and must not spin. After the shortage, the master
//! must continue its work.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Interest, Master, Sent, Settings, Signal, Worker, WorkerProcess};
use nix::libc;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::TimeValLike as _;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

use crate::harness::{
    Log, answer, cluster, in_background, open_fds, serve_id, stop, talk, wait_until, when_listening,
};
use crate::refused::{Argument, refuse_call_if, refuse_calls};

crate::scenarios! {
    accepting_without_descriptors_waits_and_goes_on
    accepting_fails_for_some_listeners_and_goes_on_for_another
    fork_without_descriptors_leaks_nothing_and_names_the_failed_step
    refused_fork_names_the_failed_step
    fork_beyond_the_process_limit_is_an_error_until_there_is_capacity: ROOT
    descriptors_lost_on_the_way_to_the_master_are_reported
    connections_lost_on_the_way_to_a_worker_go_to_another
    descriptors_wait_for_a_stopped_worker
    descriptors_beyond_the_users_limit_wait: ROOT
}

/// Time for which a test keeps a resource exhausted.
const SHORTAGE: Duration = Duration::from_secs(1);
/// Maximum CPU time that the master may use during `SHORTAGE`. The limit is a tenth of that period.
const CPU_TIME_MAX: Duration = Duration::from_millis(100);

/// Returns a user id that no other test uses, so that each user's limits affect only one test.
pub fn unique_user() -> u32 {
    100_000 + std::process::id()
}

/// Returns this process's CPU time.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let both = [usage.user_time(), usage.system_time()];
    let micros = both.map(|time| time.num_microseconds());
    Duration::from_micros(micros.iter().sum::<i64>().unsigned_abs())
}

/// Waits for `SHORTAGE`, asserts that this process has used little CPU time, and then calls `then`.
fn after_shortage(master: &Master, then: impl FnOnce(&Master) + 'static) {
    let before = cpu_time();
    master.set_timeout(SHORTAGE, move |master| {
        let work = cpu_time() - before;
        println!("CPU time {work:?}");
        assert!(work < CPU_TIME_MAX, "spins: {work:?}");
        then(master);
    });
}

/// Limits this process to `more` additional descriptors, and returns a closure that restores the
/// limit.
pub fn leave_free(more: usize) -> impl Fn() + Copy {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // The kernel assigns the lowest free number. Open `more` files. The number of the next file is
    // then the limit to set, because exactly `more` numbers below it become free when these files
    // are closed on return.
    let mut free = Vec::new();
    while free.len() < more {
        free.push(std::fs::File::open("/dev/null").unwrap());
    }
    let next = std::fs::File::open("/dev/null").unwrap();
    let limit = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&next)).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap()
}

/// Reads all clients' answers on a thread, and then calls `then` with them in the master's loop.
pub fn read_all(
    master: &Master,
    clients: Vec<TcpStream>,
    then: impl FnOnce(&Master, Vec<String>) + 'static,
) {
    let read = |mut client: TcpStream| {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    let work = move || clients.into_iter().map(read).collect();
    in_background(master, work, then);
}

/// Connects 10 clients.
pub fn connect_some(address: SocketAddr) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect(address).unwrap();
    (0..10).map(connect).collect()
}

fn serve_with_callbacks(worker: &Worker) {
    answer(&worker.listen("127.0.0.1:0").unwrap(), "served");
    worker.run().unwrap();
}

fn accepting_without_descriptors_waits_and_goes_on() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let failures = Rc::new(Cell::new(0));
            let count = Rc::clone(&failures);
            master.on_error(move |_, worker, error| {
                assert!(
                    worker.is_none() && matches!(error, Error::Accept { .. }),
                    "{error}"
                );
                assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
                count.set(count.get() + 1);
            });
            when_listening(master, 1, move |master, address| {
                let clients = connect_some(address);
                read_all(master, clients, move |master, answers| {
                    log.add(format!("{answers:?}"));
                    master.disconnect();
                });
                let restore = leave_free(0);
                after_shortage(master, move |_| {
                    // The master retries every 100 ms during the shortage, so at most 11 attempts
                    // fail.
                    assert!((2..=11).contains(&failures.get()), "{}", failures.get());
                    restore();
                });
            });
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| serve_with_callbacks(&worker),
    );
    assert_eq!(entries.take(), [format!("{:?}", ["served"; 10])]);
}

/// Returns the descriptor number of this process's listening socket on the given port.
fn listener_on(port: u16) -> u32 {
    use nix::sys::socket::{SockaddrIn, getsockname, getsockopt, sockopt};
    let is_listener = |number: &i32| {
        #[allow(unsafe_code)]
        // SAFETY: the borrowed descriptor is only queried. If no descriptor has this number,
        // `getsockopt` fails with EBADF.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
        let listens = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false);
        listens && getsockname::<SockaddrIn>(*number).is_ok_and(|own| own.port() == port)
    };
    let found = (0..256).find(is_listener).unwrap();
    u32::try_from(found).unwrap()
}

const ACCEPT_ERRORS: [i32; 3] = [libc::ENFILE, libc::ENOMEM, libc::ENOBUFS];

/// Makes `accept` fail on three of four listeners, each with a different error, and connects one
/// client to each of these three.
///
/// The master must report each error with the listener's address, and must still accept ten clients
/// of the fourth listener.
fn accepting_fails_for_some_listeners_and_goes_on_for_another() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let seen = Rc::new(RefCell::new(BTreeSet::new()));
            let failures = Rc::clone(&seen);
            master.on_error(move |_, worker, error| {
                assert!(worker.is_none(), "{error}");
                let Error::Accept { address, .. } = error else {
                    panic!("{error}");
                };
                let failure = (address.clone(), error.raw_os_error().unwrap());
                failures.borrow_mut().insert(failure);
            });
            let addresses = RefCell::new(Vec::<SocketAddr>::new());
            master.on_listening(move |master, _, address| {
                let mut addresses = addresses.borrow_mut();
                addresses.push(address.to_string().parse().unwrap());
                let [failing @ .., working] = &addresses[..] else {
                    return;
                };
                if failing.len() < ACCEPT_ERRORS.len() {
                    return;
                }
                let expected: BTreeSet<_> = failing.iter().zip(ACCEPT_ERRORS).collect();
                let expected = expected.iter().map(|(a, e)| (a.to_string(), *e)).collect();
                for (address, errno) in failing.iter().zip(ACCEPT_ERRORS) {
                    let listener = Argument {
                        index: 0,
                        mask: u32::MAX,
                        value: listener_on(address.port()),
                    };
                    refuse_call_if(libc::SYS_accept4, &listener, errno);
                }
                let waiting: Vec<_> = failing
                    .iter()
                    .map(|a| TcpStream::connect(a).unwrap())
                    .collect();
                let (seen, log, working) = (Rc::clone(&seen), log.clone(), *working);
                after_shortage(master, move |master| {
                    assert_eq!(*seen.borrow(), expected);
                    read_all(master, connect_some(working), move |master, answers| {
                        log.add(format!("{answers:?}"));
                        drop(waiting);
                        // Kill the worker. If it disconnected, the master would first accept the
                        // waiting clients, and `accept` fails.
                        master.workers()[0].process().kill(Signal::KILL);
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            for _ in 0..=ACCEPT_ERRORS.len() {
                answer(&worker.listen("127.0.0.1:0").unwrap(), "served");
            }
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [format!("{:?}", ["served"; 10])]);
}

/// Asserts that `fork` fails without an effect, and returns the failed step.
fn refused_fork(master: &Master, errno: i32) -> String {
    let before = (open_fds(), master.workers().len());
    let error = master.fork().unwrap_err();
    assert_eq!((open_fds(), master.workers().len()), before, "{error}");
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
    match error {
        Error::Fork { step, .. } => step.to_string(),
        other => panic!("{other}"),
    }
}

/// Repeats the fork, each time with one more available descriptor, until the fork succeeds. Each
/// failed fork must leave no descriptor open.
fn fork_without_descriptors_leaks_nothing_and_names_the_failed_step() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            let number = std::fs::File::open("/dev/null").unwrap();
            let next = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&number)).unwrap();
            drop(number);
            let mut attempts = BTreeSet::new();
            let mut more = 0;
            loop {
                setrlimit(Resource::RLIMIT_NOFILE, next + more, hard).unwrap();
                let fds = count_below(next + more);
                let outcome = master.fork();
                assert!(more < 16, "fork fails with any number of descriptors");
                if outcome.is_ok() {
                    break;
                }
                let Err(Error::Fork { step, reason, .. }) = outcome else {
                    panic!("{outcome:?}");
                };
                assert_eq!(reason.raw_os_error(), Some(libc::EMFILE), "{step}");
                assert_eq!(count_below(next + more), fds, "{step}");
                attempts.insert(step.to_string());
                more += 1;
            }
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            let expected = ["make a channel", "make a process"].map(str::to_owned);
            assert_eq!(attempts, BTreeSet::from(expected));
            // Kill this worker, because it has inherited the low limit, and check that another
            // worker exits normally.
            let first = master.workers().remove(0);
            first.process().kill(Signal::KILL);
            first.on_exit(move |master, _, _| {
                let log = log.clone();
                let second = master.fork().unwrap();
                second.on_exit(move |_, _, status| log.add(status.to_string()));
            });
        },
        |_| {},
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Returns the number of open descriptors below `limit`, without opening a descriptor.
fn count_below(limit: u64) -> usize {
    let is_open = |number: &i32| {
        #[allow(unsafe_code)]
        // SAFETY: `F_GETFD` only checks whether the descriptor is open, and fails with EBADF if it
        // is not.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).is_ok()
    };
    (0..i32::try_from(limit).unwrap()).filter(is_open).count()
}

/// Matches the operation of `epoll_ctl` that adds a descriptor.
const ADDING: Argument = Argument {
    index: 1,
    mask: u32::MAX,
    value: libc::EPOLL_CTL_ADD.unsigned_abs(),
};

/// Makes several steps of a fork fail, from the last step to the first, and checks the step that
/// the error names.
///
/// Seccomp filters accumulate. In the opposite order, the filter for the first step would make all
/// later forks fail at that step.
fn refused_fork_names_the_failed_step() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                let client = TcpStream::connect(address).unwrap();
                let read = move |master: &Master, mut client: &TcpStream| {
                    let mut answer = String::new();
                    client.read_to_string(&mut answer).unwrap();
                    log.add(answer);
                    master.disconnect();
                    None
                };
                master.watch(client, Interest::Readable, read).unwrap();
                refuse_calls(&[libc::SYS_clone3, libc::SYS_clone], libc::ENOMEM);
                #[cfg(target_arch = "x86_64")]
                refuse_calls(&[libc::SYS_fork], libc::ENOMEM);
                assert_eq!(refused_fork(master, libc::ENOMEM), "make a process");
                refuse_call_if(libc::SYS_epoll_ctl, &ADDING, libc::ENOSPC);
                assert_eq!(refused_fork(master, libc::ENOSPC), "make a channel");
                refuse_calls(&[libc::SYS_socketpair], libc::ENFILE);
                assert_eq!(refused_fork(master, libc::ENFILE), "make a channel");
            });
            master.fork().unwrap();
        },
        |worker| serve_with_callbacks(&worker),
    );
    assert_eq!(entries.take(), ["served"]);
}

/// Makes this process run as another user. The process can still read its own entries in `/proc`.
pub fn become_user(user: u32) {
    setgroups(&[]).unwrap();
    setgid(Gid::from_raw(user)).unwrap();
    setuid(Uid::from_raw(user)).unwrap();
    nix::sys::prctl::set_dumpable(true).unwrap();
}

fn fork_beyond_the_process_limit_is_an_error_until_there_is_capacity() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            become_user(unique_user());
            master.setup_master(Settings::default().exec("/bin/true").args(["x"]));
            let (soft, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
            setrlimit(Resource::RLIMIT_NPROC, 1, hard).unwrap();
            let attempt = refused_fork(master, libc::EAGAIN);
            assert_eq!(attempt, "make a process");
            setrlimit(Resource::RLIMIT_NPROC, soft, hard).unwrap();
            let worker = master.fork().unwrap();
            worker.on_exit(move |_, _, status| log.add(status.to_string()));
        },
        |_| unreachable!("the workers run /bin/true"),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Leaves the master two free descriptors while a message with four descriptors arrives.
///
/// The master must report the loss, and deliver the message with two descriptors.
fn descriptors_lost_on_the_way_to_the_master_are_reported() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| assert_eq!(worker.send(b"all").unwrap(), Sent::Continue));
            let errors = log.clone();
            worker.on_error(move |_, _, error| {
                assert!(matches!(error, Error::Exhausted { .. }), "{error}");
                assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
                errors.add("lost some");
            });
            let messages = log.clone();
            let restore: RefCell<Option<Box<dyn Fn()>>> = RefCell::default();
            worker.on_message(move |_, worker, message| {
                let text = String::from_utf8(message.bytes().to_vec()).unwrap();
                messages.add(format!("{text} {}", message.take_fds().len()));
                match text.as_str() {
                    "all" => {
                        *restore.borrow_mut() = Some(Box::new(leave_free(2)));
                        let _ = worker.send(b"some").unwrap();
                    }
                    "some" => {
                        restore.take().unwrap()();
                        let _ = worker.send(b"again").unwrap();
                    }
                    _ => {
                        worker.disconnect();
                    }
                }
            });
            let exits = log.clone();
            worker.on_exit(move |_, _, status| exits.add(status.to_string()));
        },
        |worker| {
            worker.on_message(|worker, message| {
                let _ = worker.send_with_fds(message.bytes(), copies(4)).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let mut seen = entries.take();
    // Sort the error and the message, because their order is not specified.
    seen[1..3].sort();
    let expected = ["all 4", "lost some", "some 2", "again 4", "exit status: 0"];
    assert_eq!(seen, expected);
}

/// Leaves the first worker without free descriptors for a while. The second worker must serve all
/// clients in the meantime, and both workers must serve afterwards.
fn connections_lost_on_the_way_to_a_worker_go_to_another() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, _, status| assert!(status.success()));
            let address = Rc::new(Cell::new(None));
            let own = Rc::clone(&address);
            when_listening(master, 2, move |master, at| {
                own.set(Some(at));
                let _ = master.workers()[0].send(b"use up descriptors").unwrap();
            });
            master.on_message(move |master, first, message| {
                let address = address.get().unwrap();
                match message.bytes() {
                    b"used up" => {
                        let (log, first) = (log.clone(), first.clone());
                        let work = move || answering_ids(address);
                        in_background(master, work, move |_, answers| {
                            log.add(format!("{answers:?}"));
                            let _ = first.send(b"free descriptors").unwrap();
                        });
                    }
                    _ => {
                        let log = log.clone();
                        // Repeat the requests, because it can take a while until the first worker
                        // receives connections again after the shortage.
                        let work = move || wait_until("both workers", || both(address));
                        in_background(master, work, move |master, ()| {
                            log.add("both workers");
                            master.disconnect();
                        });
                    }
                }
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let restore: RefCell<Option<Box<dyn Fn()>>> = RefCell::default();
            worker.on_message(move |worker, message| {
                if message.bytes() == b"use up descriptors" {
                    *restore.borrow_mut() = Some(Box::new(leave_free(0)));
                    let _ = worker.send(b"used up").unwrap();
                } else {
                    restore.take().unwrap()();
                    let _ = worker.send(b"freed").unwrap();
                }
            });
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    assert_eq!(entries.take(), [r#"{"2"}"#, "both workers"]);
}

/// Connects 20 clients one after another, and returns the ids of the workers that answered them.
fn answering_ids(address: SocketAddr) -> BTreeSet<String> {
    (0..20).map(|_| talk(address, b"").unwrap()).collect()
}

fn both(address: SocketAddr) -> Option<()> {
    (answering_ids(address).len() == 2).then_some(())
}

/// Copies this test binary to a directory where every user can execute it and `user` can remove it.
fn program_for(user: u32) -> (tempfile::TempDir, PathBuf) {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
    let all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), all.clone()).unwrap();
    std::fs::set_permissions(&path, all).unwrap();
    std::os::unix::fs::chown(directory.path(), Some(user), None).unwrap();
    (directory, path)
}

/// Environment variable with the number of messages that the worker expects.
const MESSAGES: &str = "MESSAGES";

/// Sends `messages` messages, each with `fds` descriptors and `length` bytes. Each byte is the
/// message's number.
fn send_many(reader: &WorkerProcess, messages: u8, fds: usize, length: usize) {
    for number in 0..messages {
        let text = vec![number; length];
        let _ = reader.send_with_fds(&text, copies(fds)).unwrap();
    }
}

fn copies(count: usize) -> Vec<OwnedFd> {
    let copy = |_| std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    (0..count).map(copy).collect()
}

/// Reads all messages, asserts that each has as many descriptors as the first, and then notifies
/// the master.
fn read_in_order(worker: &Worker) {
    let messages: u8 = std::env::var(MESSAGES).unwrap().parse().unwrap();
    let (mut next, mut all) = (0, None);
    worker.on_message(move |worker, message| {
        let fds = message.take_fds().len();
        assert_eq!(message.bytes()[0], next);
        assert_eq!(fds, *all.get_or_insert(fds));
        next += 1;
        if next == messages {
            let _ = worker.send(format!("all {fds}").as_bytes()).unwrap();
        }
    });
    worker.run().unwrap();
}

fn note_text(worker: &WorkerProcess, log: &Log) {
    let log = log.clone();
    worker.on_message(move |_, _, message| {
        log.add(String::from_utf8(message.bytes().to_vec()).unwrap());
    });
}

/// Stops a worker, so that the master's writes of descriptors to it fail with EAGAIN. When the
/// worker continues, the poller reports that the channel is writable, and the master must write the
/// rest.
fn descriptors_wait_for_a_stopped_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            let reader = master.fork_with([(MESSAGES, "100")]).unwrap();
            note_text(&reader, &log);
            reader.on_message(|_, reader, _| {
                reader.disconnect();
            });
            reader.on_online(move |master, reader| {
                stop(reader);
                send_many(reader, 100, 2, 8000);
                let reader = reader.clone();
                after_shortage(master, move |_| reader.process().kill(Signal::CONT));
            });
            reader.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| read_in_order(&worker),
    );
    assert_eq!(entries.take(), ["all 2"]);
}

/// Soft limit `RLIMIT_NOFILE` in the master. It limits the user's descriptors in flight and the
/// master's open descriptors.
const USER_FDS_MAX: u64 = 64;

/// Exceeds the user's limit on descriptors in flight (see `RLIMIT_NOFILE` in unix(7)). Descriptors
/// that a stopped worker has not received count towards this limit.
///
/// The channel to the stopped worker must back off, and continue once the worker reads. The channel
/// to the other worker must also wait, and must lose nothing.
fn descriptors_beyond_the_users_limit_wait() {
    let program = cluster::is_master().then(|| program_for(unique_user()));
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (_, path) = program.as_ref().unwrap();
            master.setup_master(Settings::default().exec(path));
            become_user(unique_user());
            let reader = master.fork_with([(MESSAGES, "12")]).unwrap();
            let other = master.fork_with([(MESSAGES, "1")]).unwrap();
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, USER_FDS_MAX, hard).unwrap();
            for worker in [&reader, &other] {
                note_text(worker, &log);
                let errors = log.clone();
                worker.on_error(move |_, worker, error| {
                    assert!(matches!(error, Error::Exhausted { .. }), "{error}");
                    assert_eq!(error.raw_os_error(), Some(libc::ETOOMANYREFS), "{error}");
                    errors.add(format!("{} backs off", worker.id()));
                });
            }
            reader.on_online(move |master, reader| {
                stop(reader);
                send_many(reader, 12, 8, 1);
                send_many(&other, 1, 8, 1);
                let reader = reader.clone();
                after_shortage(master, move |_| reader.process().kill(Signal::CONT));
            });
            let mut missing = 2;
            master.on_message(move |master, _, _| {
                missing -= 1;
                if missing == 0 {
                    master.disconnect();
                }
            });
            master.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| read_in_order(&worker),
    );
    let mut seen = entries.take();
    seen.sort();
    // On a busy machine, the master may try again, and report the shortage again, before the reader
    // continues.
    seen.dedup();
    assert_eq!(seen, ["1 backs off", "2 backs off", "all 8"]);
}
