//! Tests of workers that run `Settings::main` in a copy of the master and execute no program.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio as ChildStdio;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cluster::{
    Error, InspectPort, Interest, Master, Role, SchedulingPolicy, Settings, Signal, Stdio, Worker,
    WorkerProcess,
};
use nix::libc;
use nix::sys::signal::{SigHandler, signal};
use nix::unistd::{Gid, Uid};

use crate::harness::{
    Log, NOBODY, SIGNALS, cluster, in_background, is_watched, note_events, note_messages, of,
    scaled, serve_id, talk, watched, when_listening,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    copy_runs_from_fork_to_exit
    copies_serve_round_robin
    copies_serve_from_a_shared_listener
    copies_serve_from_shards
    copy_has_only_descriptors_that_the_application_opened
    copy_has_no_connection_that_waits_in_the_master
    stale_handles_in_a_copy_refer_to_no_new_descriptor
    master_with_threads_cannot_be_copied
    thread_started_by_the_inspect_port_closure_is_detected
    master_with_threads_cannot_be_copied_in_a_sandbox
    copy_cannot_affect_other_workers
    master_handle_is_inert_in_a_copy
    copy_starts_with_no_signal_blocked_handled_or_pending
    signal_to_a_copy_does_not_reach_the_master
    return_value_of_a_copy_is_its_exit_code
    copy_that_panics_exits_with_101
    copy_shares_memory_with_the_master
    buffered_output_is_printed_once
    copy_has_the_pipes_and_descriptors_of_stdio
    settings_change_from_closure_to_program_and_back
    copy_runs_as_the_user_of_the_settings: ROOT
    failed_step_in_a_copy_is_an_error_of_fork
    failed_user_change_in_a_copy_is_an_error_of_fork: ROOT
    exits_of_copies_are_reported_though_the_host_ignores_sigchld: EXIT_OF_REAPED_CHILDREN
    a_thousand_copies_leave_nothing_behind
    resource_usage_is_known_after_exit
    resource_usage_is_unknown_if_the_host_reaped_the_worker
}

/// Makes workers run `main` in a copy of the master, and then exit with status 0.
fn set_main(master: &Master, main: impl Fn(Worker) + 'static) {
    let main = move |worker| {
        main(worker);
        0
    };
    master.setup_master(Settings::default().main(main));
}

/// Runs a scenario whose workers execute no program.
fn cluster_without_exec(master: impl FnOnce(&Master)) {
    cluster(master, |_| unreachable!("the workers execute no program"));
}

fn copy_runs_from_fork_to_exit() {
    let log = Log::default();
    let entries = log.clone();
    let master_pid = std::process::id();
    cluster_without_exec(|master| {
        note_events(master, &log);
        note_messages(master, &log);
        let settings = Settings::default().cwd("/").inspect_port(9000);
        master.setup_master(settings.main(move |worker| {
            assert!(cluster::is_worker() && !cluster::is_master());
            assert_ne!(std::process::id(), master_pid);
            let again = cluster::init().map(drop).unwrap_err();
            assert!(matches!(again, Error::AlreadyInitialized), "{again}");
            for (name, _) in std::env::vars_os() {
                assert!(
                    !name.to_string_lossy().starts_with("CLUSTER_CH"),
                    "{name:?}"
                );
            }
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let greeting = format!(
                "{} {} {} {}",
                worker.id(),
                worker.inspect_port().unwrap(),
                std::env::current_dir().unwrap().display(),
                std::env::var("NAME").unwrap(),
            );
            let _ = worker.send(greeting.as_bytes()).unwrap();
            worker.on_message(|worker, message| {
                let text = String::from_utf8_lossy(message.bytes()).to_uppercase();
                let _ = worker.send(text.as_bytes()).unwrap();
            });
            assert!(listener.accept().unwrap().is_none());
            3
        }));
        for name in ["a", "b"] {
            let worker = master.fork_with([("NAME", name)]).unwrap();
            let _ = worker.send(b"to you").unwrap();
            worker.on_message(|_, worker, message| {
                if message.bytes() == b"TO YOU" {
                    worker.disconnect();
                }
            });
        }
        assert_eq!(std::env::var_os("NAME"), None);
    });
    let entries = entries.take();
    for (worker, port, name) in [(1, 9000, "a"), (2, 9001, "b")] {
        let greeting = format!("{worker} {port} / {name}");
        let expected = [
            "fork",
            "online",
            "listening",
            &greeting,
            "TO YOU",
            "disconnect Some(true)",
            "exit Some(true) exit status: 3",
        ];
        assert_eq!(of(worker, &entries), expected);
    }
    assert_eq!(entries.len(), 14, "{entries:?}");
}

/// Sends requests until both workers have answered, and asserts that no other worker answers.
fn ask_until_all_answer(address: SocketAddr, workers: [&str; 2]) {
    let mut missing = workers.to_vec();
    while !missing.is_empty() {
        let answer = talk(address, b"").unwrap();
        assert!(workers.contains(&answer.as_str()), "{answer}");
        missing.retain(|worker| *worker != answer);
    }
}

/// Serves with two workers, kills one of them, and checks that its replacement also answers.
fn serve(policy: SchedulingPolicy) {
    cluster_without_exec(|master| {
        master.set_scheduling_policy(policy).unwrap();
        set_main(master, |worker| serve_id(&worker, "127.0.0.1:0"));
        for _ in 0..2 {
            master.fork().unwrap();
        }
        when_listening(master, 2, |master, address| {
            let ask = move || ask_until_all_answer(address, ["1", "2"]);
            in_background(master, ask, move |master, ()| {
                master.workers()[0].process().kill(Signal::KILL);
                master.on_exit_once(move |master, _, _| {
                    let replacement = master.fork().unwrap();
                    replacement.on_listening(move |master, _, _| {
                        let ask = move || ask_until_all_answer(address, ["2", "3"]);
                        in_background(master, ask, |master, ()| master.disconnect());
                    });
                });
            });
        });
    });
}

fn copies_serve_round_robin() {
    serve(SchedulingPolicy::RoundRobin);
}

fn copies_serve_from_a_shared_listener() {
    serve(SchedulingPolicy::Shared);
}

fn copies_serve_from_shards() {
    serve(SchedulingPolicy::Sharded);
}

/// Returns this process's open descriptors with their link targets.
fn open_descriptors() -> BTreeMap<RawFd, PathBuf> {
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = numbers.map(|entry| entry.unwrap().file_name());
    let numbers: Vec<_> = numbers.collect();
    let open = numbers.into_iter().filter_map(|number| {
        let link = std::fs::read_link(Path::new("/proc/self/fd").join(&number)).ok()?;
        Some((number.to_str().unwrap().parse().unwrap(), link))
    });
    open.collect()
}

/// Returns the sorted kinds of the descriptors that were not open at the beginning. The kind is
/// "socket" for sockets, and the link target for other descriptors.
fn kinds_since(beginning: &BTreeMap<RawFd, PathBuf>) -> Vec<String> {
    let mut open = open_descriptors();
    open.retain(|number, link| beginning.get(number) != Some(link));
    let kind = |link: PathBuf| {
        let link = link.display().to_string();
        let kind = link.strip_prefix("socket:").map(|_| "socket".to_owned());
        kind.unwrap_or(link)
    };
    let mut kinds: Vec<_> = open.into_values().map(kind).collect();
    kinds.sort();
    kinds
}

/// Kinds of the descriptors for a worker's channel, disconnect token and poller.
const CHANNEL_AND_POLLER: [&str; 5] = [
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[timerfd]",
    "socket",
    "socket",
];

/// Forks while the master has descriptors of every kind, and checks which of them the copy has.
///
/// The master has workers with pipes, queues, listeners, a Unix path, a watched descriptor, `stdio`
/// descriptors and signal handlers. The master forks in the callback for a message that carries a
/// descriptor.
fn copy_has_only_descriptors_that_the_application_opened() {
    SIGNALS.store(true, Ordering::SeqCst);
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("socket");
    let file = home.path().join("file");
    std::fs::write(&file, "of the program").unwrap();
    let beginning = Rc::new(open_descriptors());
    cluster_without_exec(|master| {
        master.on_signal(Signal::USR1, |_, _| {}).unwrap();
        let (watched, retained) = UnixStream::pair().unwrap();
        let watched = Rc::new(watched);
        let number = watched.as_raw_fd();
        let watch = master.watch(watched, Interest::Readable, |_, _| None);
        let watch = watch.unwrap();
        let input = std::io::stdin();
        // Ignore an error, because some kinds of stdin cannot be watched.
        let input = master.watch(input, Interest::Readable, |_, _| None).ok();

        let of_workers = std::fs::File::open("/dev/null").unwrap();
        let inherited = [Stdio::inherit(), Stdio::inherit(), Stdio::inherit()];
        let further = [Stdio::fd(of_workers), Stdio::pipe()];
        let stdio = inherited.into_iter().chain(further);
        master.setup_master(Settings::default().stdio(stdio));
        set_main(master, move |worker| {
            let _tcp = worker.listen("127.0.0.1:0").unwrap();
            let _unix = worker.listen(path.as_path()).unwrap();
            let (one, _) = UnixStream::pair().unwrap();
            let fds = vec![OwnedFd::from(one)];
            let _ = worker.send_with_fds(b"listening", fds).unwrap();
            worker.run().unwrap();
        });
        let workers = [(); 2].map(|()| master.fork().unwrap());
        let of_the_program = std::fs::File::open(&file).unwrap();
        let before = open_descriptors();
        let retained_number = retained.as_raw_fd();
        let expected = file.display().to_string();
        let beginning = Rc::clone(&beginning);
        let check_descriptors = Settings::default().main(move |worker| {
            let mut own: Vec<_> = CHANNEL_AND_POLLER.map(str::to_owned).into();
            // Expect the two `stdio` descriptors, the end that the application retains, and the
            // signal socketpair.
            own.extend(["/dev/null", "socket"].map(str::to_owned));
            own.extend(["socket", "socket", "socket"].map(str::to_owned));
            // Expect the placeholder, which occupies the watched descriptor's number in the copy.
            own.push("socket".to_owned());
            own.push(expected.clone());
            own.sort();
            assert_eq!(kinds_since(&beginning), own);
            let now = open_descriptors();
            assert_eq!(now.get(&retained_number), before.get(&retained_number));
            assert_ne!(now.get(&number), before.get(&number));
            assert_eq!(now[&0], before[&0]);
            assert_eq!(now[&3], Path::new("/dev/null"));
            let mut text = *b"what it says..";
            // Read at an offset, because all copies share the file position.
            of_the_program.read_exact_at(&mut text, 0).unwrap();
            let _ = worker.send(&text).unwrap();
            0
        });
        let (mut listening, mut checked) = (0, 0);
        master.on_message(move |master, _, message| {
            if message.bytes() == b"listening" {
                listening += 1;
                if listening == 2 {
                    master.setup_master(check_descriptors.clone());
                    // Fork in the first callback that receives the message, while the message's
                    // descriptor is open. The copy must not have that descriptor.
                    master.fork().unwrap();
                }
                return;
            }
            assert_eq!(message.bytes(), b"of the program");
            checked += 1;
            if checked == 2 {
                master.unwatch(watch);
                if let Some(input) = input {
                    master.unwatch(input);
                }
                master.disconnect();
            }
        });
        let listening = Rc::new(Cell::new(0));
        for worker in workers {
            let listening = Rc::clone(&listening);
            worker.on_message(move |master, _, _| {
                listening.set(listening.get() + 1);
                if listening.get() == 2 {
                    // Fork again in the last callback that receives the message. This copy must not
                    // have the message's descriptor either.
                    master.fork().unwrap();
                }
            });
        }
        // Move `retained` into a callback, which keeps the descriptor open until the master is
        // dropped.
        master.on_setup(move |_, _| assert!(retained.as_raw_fd() == retained_number));
        master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    });
}

/// Forks inside the scheduler, while a connection waits for the scheduler's choice, and checks that
/// the copy does not have the connection.
fn copy_has_no_connection_that_waits_in_the_master() {
    let beginning = Rc::new(open_descriptors());
    let Role::Master(master) = cluster::init().unwrap() else {
        unreachable!("the workers execute no program");
    };
    let master = Rc::new(master);
    let asked = Rc::downgrade(&master);
    master.set_scheduler(move |_, workers| {
        let asked = asked.upgrade().unwrap();
        let beginning = Rc::clone(&beginning);
        set_main(&asked, move |_| {
            let found = kinds_since(&beginning);
            let sockets = found.iter().filter(|kind| *kind == "socket").count();
            let expected = "its channel and disconnect token, the client, and what keeps the \
                            number of the poller";
            assert_eq!(sockets, 4, "{expected}");
        });
        asked.fork().unwrap();
        workers.first().map(|load| load.worker)
    });
    set_main(&master, |worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        drop(listener.accept().unwrap().unwrap());
    });
    master.fork().unwrap();
    let client = Rc::new(Cell::new(None));
    let connected = Rc::clone(&client);
    when_listening(&master, 1, move |_, address| {
        connected.set(Some(TcpStream::connect(address).unwrap()));
    });
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    master.on_exit(move |_, _, status| {
        assert!(status.success(), "{status}");
        counted.set(counted.get() + 1);
    });
    master.run().unwrap();
    assert_eq!(ended.get(), 2);
    let read = client.take().unwrap().read(&mut [0]).unwrap();
    assert_eq!(read, 0, "no process holds the connection");
}

/// Checks that a copy does not reuse the numbers of descriptors that the crate has closed in the
/// copy.
///
/// The application still has handles with these descriptor numbers. If it uses or drops such a
/// handle, this must not affect a new descriptor.
fn stale_handles_in_a_copy_refer_to_no_new_descriptor() {
    use std::os::fd::{AsFd as _, BorrowedFd};

    /// A descriptor's number without ownership, as a library in another language would store it.
    struct Foreign(RawFd);

    impl std::os::fd::AsFd for Foreign {
        fn as_fd(&self) -> BorrowedFd<'_> {
            #[allow(unsafe_code)]
            // SAFETY: the workers' closure owns the descriptor and outlives the watch.
            unsafe {
                BorrowedFd::borrow_raw(self.0)
            }
        }
    }

    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("of a worker");
    cluster_without_exec(|master| {
        let (used, one) = UnixStream::pair().unwrap();
        let (dropped, another) = UnixStream::pair().unwrap();
        let used = Rc::new(used);
        let never = |_: &Master, _: &_| panic!("the descriptor became readable");
        let first = master.watch(Rc::clone(&used), Interest::Readable, never);
        let number = Foreign(dropped.as_raw_fd());
        let never = |_: &Master, _: &_| panic!("the descriptor became readable");
        let second = master.watch(number, Interest::Readable, never);
        let listener = Rc::new(master.listen("127.0.0.1:0").unwrap());
        let shared = Rc::clone(&listener);
        let dropped = RefCell::new(Some(dropped));
        set_main(master, move |worker| {
            // Open more files than the crate has closed descriptors, so that a free number would be
            // reused.
            let mut files: Vec<_> = (0..32)
                .map(|number| std::fs::File::create(path.with_extension(number.to_string())))
                .map(Result::unwrap)
                .collect();
            let numbers: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
            assert!(!numbers.contains(&used.as_raw_fd()));
            assert!(!numbers.contains(&shared.as_fd().as_raw_fd()));
            assert!((&*used).write_all(b"to a client").is_err());
            drop(dropped.take());
            for file in &mut files {
                file.write_all(b"of a worker").unwrap();
                assert_eq!(file.metadata().unwrap().len(), 11);
            }
            worker.disconnect();
        });
        let worker = master.fork().unwrap();
        worker.on_exit(move |master, _, status| {
            assert!(status.success(), "{status}");
            master.unwatch(first.as_ref().copied().unwrap());
            master.unwatch(second.as_ref().copied().unwrap());
            // This line only makes the closure own the values, so that they stay open until the
            // worker exits. A closed peer would make the watched descriptor readable.
            let _ = (&listener, &one, &another);
        });
    });
}

/// Asserts that `error` comes from a `fork` that cannot copy the master, because the master has
/// more than one thread.
fn expect_threads_found(error: Error) {
    match error {
        Error::Fork { step, reason, .. } => {
            assert_eq!(step.to_string(), "copy the master");
            assert_eq!(reason.kind(), std::io::ErrorKind::Deadlock);
        }
        error => panic!("{error}"),
    }
}

/// Asserts that `fork` fails while the master has a second thread, and succeeds after that thread
/// has exited.
///
/// A copy would have only one thread, and locks that the missing threads hold would never be
/// released.
fn expect_one_thread(master: &Master) {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || stopped.recv());
    expect_threads_found(master.fork().unwrap_err());
    assert!(master.workers().is_empty());
    let result = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::__WALL));
    assert_eq!(result, Err(nix::Error::ECHILD), "no zombie is left");
    drop(stop);
    thread.join().unwrap().unwrap_err();
    // Provoke a race: the kernel may still be releasing an exited thread when `fork` is called.
    // Such a thread must not make `fork` fail.
    for _ in 0..20 {
        std::thread::spawn(|| {}).join().unwrap();
        master.fork().unwrap();
    }
}

fn master_with_threads_cannot_be_copied() {
    cluster_without_exec(|master| {
        master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        set_main(master, |_| {});
        expect_one_thread(master);
    });
}

/// Checks that `fork` detects a thread even if it starts as late as possible: in the closure that
/// chooses the inspect port, which `fork` calls.
fn thread_started_by_the_inspect_port_closure_is_detected() {
    cluster_without_exec(|master| {
        set_main(master, |_| {});
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let stopped = Cell::new(Some(stopped));
        let port = InspectPort::new(move || {
            let stopped = stopped.take().unwrap();
            std::thread::spawn(move || stopped.recv());
            9000
        });
        master.setup_master(Settings::default().inspect_port(port));
        expect_threads_found(master.fork().unwrap_err());
        drop(stop);
    });
}

/// Checks that threads are also detected in a sandbox that rejects `unshare`, the usual way to
/// detect them.
fn master_with_threads_cannot_be_copied_in_a_sandbox() {
    cluster_without_exec(|master| {
        master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        set_main(master, |_| {});
        refuse_calls(&[libc::SYS_unshare], libc::EPERM);
        expect_one_thread(master);
    });
}

fn copy_cannot_affect_other_workers() {
    cluster_without_exec(|master| {
        set_main(master, |worker| worker.run().unwrap());
        let others: Rc<RefCell<Vec<WorkerProcess>>> = Rc::default();
        let victim = master.fork().unwrap();
        others.borrow_mut().push(victim.clone());
        victim.on_message(|_, _, _| panic!("the victim received a message"));
        victim.on_online(move |master, victim| {
            let others = Rc::clone(&others);
            set_main(master, move |worker| {
                let others = others.borrow();
                let victim = &others[0];
                assert!(victim.send(b"from a copy").is_err());
                victim.disconnect();
                victim.kill(Signal::KILL);
                victim.process().kill(Signal::KILL);
                victim.process().disconnect();
                assert!(victim.process().take_stdio(1).is_none());
                worker.disconnect();
            });
            let copy = master.fork().unwrap();
            let victim = victim.clone();
            copy.on_exit(move |_, _, status| {
                assert!(status.success(), "{status}");
                assert!(!victim.is_dead());
                victim.disconnect();
            });
        });
        victim.on_exit(|_, victim, status| {
            assert!(status.success(), "{status}");
            assert_eq!(victim.exited_after_disconnect(), Some(true));
        });
    });
}

fn master_handle_is_inert_in_a_copy() {
    let Role::Master(master) = cluster::init().unwrap() else {
        unreachable!("the workers execute no program");
    };
    let master = Rc::new(master);
    let copied = Rc::downgrade(&master);
    set_main(&master, move |worker| {
        let copied = copied.upgrade().unwrap();
        let listener = worker.listen("127.0.0.1:0").unwrap();
        assert!(copied.workers().is_empty());
        assert!(copied.fork().is_err());
        assert!(copied.dispatch(Some(Duration::ZERO)).is_err());
        let input = UnixStream::pair().unwrap().0;
        assert!(
            copied
                .watch(input, Interest::Readable, |_, _| None)
                .is_err()
        );
        copied.disconnect();
        drop(listener);
        worker.disconnect().run().unwrap();
    });
    let statuses = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&statuses);
    master.on_exit(move |_, _, status| seen.borrow_mut().push(status.code()));
    for _ in 0..2 {
        master.fork().unwrap();
    }
    master.run().unwrap();
    assert_eq!(statuses.take(), [Some(0), Some(0)]);
}

/// Returns the set of signals in a field of `/proc/self/status`.
fn signals(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut sets = status.lines().filter_map(|line| line.strip_prefix(field));
    let set = u64::from_str_radix(sets.next().unwrap().trim(), 16).unwrap();
    // Ignore signals above 31. They are real-time signals, and the C library uses some of them.
    set & ((1 << 31) - 1)
}

fn bit(signal: nix::sys::signal::Signal) -> u64 {
    1 << (signal as u32 - 1)
}

fn copy_starts_with_no_signal_blocked_handled_or_pending() {
    use nix::sys::signal::{SigSet, SigmaskHow, Signal as Number, raise, sigprocmask};

    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_messages(master, &log);
        let mut blocked = SigSet::empty();
        blocked.add(Number::SIGUSR2);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: ignoring a signal installs no handler, so no code can run in signal context.
        unsafe { signal(Number::SIGHUP, SigHandler::SigIgn) }.unwrap();
        master.on_signal(Signal::USR1, |_, _| {}).unwrap();
        // Raise a signal that is still pending in the crate at the fork: the handler has recorded
        // it, but the loop does not run before the fork. The copy must not report it.
        raise(Number::SIGUSR1).unwrap();
        set_main(master, |worker| {
            // Like every Rust program, the copy ignores SIGPIPE, so that a client that disconnects
            // does not kill its server.
            assert_eq!(signals("SigIgn:"), bit(Number::SIGPIPE));
            assert_eq!(signals("SigBlk:"), 0);
            assert_eq!(signals("SigCgt:"), 0);
            let (mut here, there) = UnixStream::pair().unwrap();
            drop(there);
            assert!(here.write_all(b"!").is_err());
            for signal in [Signal::USR1, Signal::USR2] {
                let report = move |worker: &Worker, number: Signal| {
                    let _ = worker.send(format!("{number}").as_bytes()).unwrap();
                };
                worker.on_signal(signal, report).unwrap();
            }
            raise(Number::SIGUSR2).unwrap();
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            worker.disconnect().run().unwrap();
        });
        master.fork().unwrap();
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&blocked), None).unwrap();
    });
    let report = entries.take();
    assert_eq!(report.len(), 1, "{report:?}");
    assert!(
        report[0].contains("USR2") || report[0].contains("12"),
        "{report:?}"
    );
}

/// Checks that a signal that a copy raises does not reach the master. After each signal, the copy
/// waits until a faulty master that also received the signal would have processed it.
fn signal_to_a_copy_does_not_reach_the_master() {
    use nix::sys::signal::{Signal as Number, raise};

    SIGNALS.store(true, Ordering::SeqCst);
    let received = Rc::new(Cell::new(0));
    let of_master = Rc::clone(&received);
    cluster_without_exec(|master| {
        let count = move |_: &Master, _| of_master.set(of_master.get() + 1);
        master.on_signal(Signal::USR1, count).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        set_main(master, move |worker| {
            let received = Rc::new(Cell::new(0));
            let of_worker = Rc::clone(&received);
            let count = move |_: &Worker, _| of_worker.set(of_worker.get() + 1);
            worker.on_signal(Signal::USR1, count).unwrap();
            for times in 1..=10 {
                raise(Number::SIGUSR1).unwrap();
                let _ = worker.send(b"raised").unwrap();
                (&there).read_exact(&mut [0]).unwrap();
                worker.dispatch(Some(Duration::ZERO)).unwrap();
                assert_eq!(received.get(), times);
            }
            worker.disconnect();
        });
        // Reply at the iteration's end, after the master has processed all events that became ready
        // with the message.
        let here = Rc::new(RefCell::new(here));
        master.on_message(move |master, _, _| {
            let here = Rc::clone(&here);
            let go_on = move |_: &Master| here.borrow_mut().write_all(b"!").unwrap();
            master.set_timeout(Duration::ZERO, go_on);
        });
        let worker = master.fork().unwrap();
        worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    });
    assert_eq!(received.get(), 0);
}

fn return_value_of_a_copy_is_its_exit_code() {
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_events(master, &log);
        master.setup_master(Settings::default().main(|_| 7));
        master.fork().unwrap();
        set_main(master, |_| std::process::exit(8));
        master.fork().unwrap();
        set_main(master, |_| {
            nix::sys::signal::raise(nix::sys::signal::SIGKILL).unwrap()
        });
        master.fork().unwrap();
    });
    let entries = entries.take();
    let codes = ["exit status: 7", "exit status: 8", "signal: 9 (SIGKILL)"];
    for (worker, code) in (1..).zip(codes) {
        let last = format!("exit Some(false) {code}");
        assert_eq!(of(worker, &entries).last(), Some(&last.as_str()));
    }
}

/// Checks that a panic in a worker does not run the guards in the master's stack frames, which the
/// copy inherits.
fn copy_that_panics_exits_with_101() {
    struct Guard(u32);

    impl Drop for Guard {
        fn drop(&mut self) {
            assert_eq!(
                std::process::id(),
                self.0,
                "the worker ran a guard of the master"
            );
        }
    }

    /// A panic payload that panics when it is dropped.
    struct Payload;

    impl Drop for Payload {
        fn drop(&mut self) {
            panic!("the payload is dropped");
        }
    }

    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster_without_exec(|master| {
        master.on_exit(move |_, _, status| {
            assert_eq!(status.code(), Some(101));
            counted.set(counted.get() + 1);
        });
        set_main(master, |_| panic!("expected"));
        let fork = |master: &Master| {
            let _guard = Guard(std::process::id());
            master.fork().unwrap();
        };
        fork(master);
        set_main(master, |_| std::panic::panic_any(Payload));
        master.set_timeout(Duration::ZERO, fork);
    });
    assert_eq!(ended.get(), 2);
}

/// Returns a process's private dirty memory, in KiB.
fn private_memory(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let mut values = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Dirty:"));
    let value = values.next().unwrap().trim_end_matches("kB");
    value.trim().parse().unwrap()
}

fn copy_shares_memory_with_the_master() {
    const LOADED: usize = 64 << 20;
    let log = Log::default();
    let entries = log.clone();
    cluster_without_exec(|master| {
        note_messages(master, &log);
        let loaded = vec![1u8; LOADED];
        set_main(master, move |worker| {
            let sum: usize = loaded.iter().map(|byte| usize::from(*byte)).sum();
            let own = private_memory(std::process::id()) < 8 << 10;
            let _ = worker.send(format!("{sum} {own}").as_bytes()).unwrap();
        });
        for _ in 0..3 {
            master.fork().unwrap();
        }
    });
    let expected = (1..=3).map(|worker| format!("{worker} {LOADED} true"));
    let mut report = entries.take();
    report.sort();
    assert_eq!(report, expected.collect::<Vec<_>>());
}

fn buffered_output_is_printed_once() {
    if !is_watched() {
        let output = watched().stdout(ChildStdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed, "master worker 1 1 worker 2 2 worker 3 3 ");
        return;
    }
    cluster_without_exec(|master| {
        print!("master ");
        set_main(master, |worker| print!("worker {} ", worker.id()));
        master.fork().unwrap();
        // Fork one worker after another, because all workers write to one pipe and their order must
        // be certain.
        master.on_exit(|master, worker, _| {
            print!("{} ", worker.id());
            if worker.id().get() < 3 {
                master.fork().unwrap();
            }
        });
    });
}

fn copy_has_the_pipes_and_descriptors_of_stdio() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("log");
    let log = std::fs::File::create(&path).unwrap();
    cluster_without_exec(|master| {
        let stdio = [
            Stdio::null(),
            Stdio::pipe(),
            Stdio::inherit(),
            Stdio::fd(log),
            Stdio::pipe(),
        ];
        master.setup_master(Settings::default().stdio(stdio));
        let expected = path.clone();
        set_main(master, move |worker| {
            let open = open_descriptors();
            assert_eq!(open[&0], Path::new("/dev/null"));
            assert_eq!(open[&3], expected);
            let logs = open.values().filter(|link| **link == expected);
            assert_eq!(logs.count(), 1, "the master's own descriptor is closed");
            println!("worker {}", worker.id());
            for number in [3, 4] {
                let mut file = std::fs::File::create(format!("/proc/self/fd/{number}"));
                if let Ok(file) = &mut file {
                    file.write_all(b"by number").unwrap();
                }
            }
        });
        let worker = master.fork().unwrap();
        let mut output = worker.process().take_stdio(1).unwrap();
        assert!(worker.process().take_stdio(4).is_some());
        assert!(worker.process().take_stdio(3).is_none());
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(text, "worker 1\n");
        worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        master.setup_master(Settings::default().stdio([]));
    });
    assert_eq!(std::fs::read_to_string(path).unwrap(), "by number");
}

fn settings_change_from_closure_to_program_and_back() {
    let codes = Rc::new(RefCell::new(BTreeMap::new()));
    let found = Rc::clone(&codes);
    let own = std::env::current_exe().unwrap();
    cluster(
        |master| {
            master.on_exit(move |_, worker, status| {
                let id = worker.id().get();
                codes.borrow_mut().insert(id, status.code());
            });
            master.setup_master(Settings::default().main(|_| 1));
            master.fork().unwrap();
            master.setup_master(Settings::default().cwd("/"));
            assert!(master.settings().has_main());
            master.fork().unwrap();
            master.setup_master(Settings::default().exec(own));
            assert!(!master.settings().has_main());
            master.fork().unwrap();
            master.setup_master(Settings::default().main(|_| 2));
            master.fork().unwrap();
        },
        |_| std::process::exit(5),
    );
    let expected = [(1, Some(1)), (2, Some(1)), (3, Some(5)), (4, Some(2))];
    assert_eq!(found.take(), BTreeMap::from(expected));
}

fn copy_runs_as_the_user_of_the_settings() {
    cluster_without_exec(|master| {
        master.setup_master(Settings::default().uid(NOBODY).gid(NOBODY));
        set_main(master, |worker| {
            assert_eq!(
                (Uid::current(), Uid::effective()),
                (NOBODY.into(), NOBODY.into())
            );
            assert_eq!(
                (Gid::current(), Gid::effective()),
                (NOBODY.into(), NOBODY.into())
            );
            assert_eq!(nix::unistd::getgroups().unwrap(), []);
            assert!(nix::unistd::setuid(Uid::from_raw(0)).is_err());
            worker.listen("127.0.0.1:0").unwrap();
        });
        let worker = master.fork().unwrap();
        worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    });
}

#[track_caller]
fn assert_fails(master: &Master, expected: &str, errno: Option<i32>) {
    match master.fork().unwrap_err() {
        Error::Fork { step, reason, .. } => {
            let found = (step.to_string(), reason.raw_os_error());
            assert_eq!(found, (expected.to_owned(), errno));
        }
        error => panic!("{error}"),
    }
    assert!(master.workers().is_empty());
    let result = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::__WALL));
    assert_eq!(result, Err(nix::Error::ECHILD), "no zombie is left");
}

fn failed_step_in_a_copy_is_an_error_of_fork() {
    cluster_without_exec(|master| {
        master.on_fork(|_, _| panic!("a worker was forked"));
        set_main(master, |_| unreachable!("fork has failed"));
        for (name, value) in [("", "empty"), ("A=B", "C"), ("A", "B\0C"), ("A\0B", "C")] {
            let error = master.fork_with([(name, value)]).unwrap_err();
            assert!(matches!(error, Error::Fork { .. }), "{error}");
        }
        master.setup_master(Settings::default().cwd("/nowhere/at/all"));
        assert_fails(master, "enter its directory", Some(libc::ENOENT));
        master.setup_master(Settings::default().cwd("/"));
        // Seccomp filters accumulate. Reject the last step first, because each new filter then
        // makes an earlier step fail.
        refuse_calls(
            &[libc::SYS_timerfd_create, libc::SYS_eventfd2],
            libc::EMFILE,
        );
        assert_fails(master, "make it a worker", Some(libc::EMFILE));
        refuse_calls(&[libc::SYS_socket], libc::ENFILE);
        assert_fails(master, "prepare its descriptors", Some(libc::ENFILE));
    });
}

fn failed_user_change_in_a_copy_is_an_error_of_fork() {
    cluster_without_exec(|master| {
        master.on_fork(|_, _| panic!("a worker was forked"));
        set_main(master, |_| unreachable!("fork has failed"));
        master.setup_master(Settings::default().uid(NOBODY).gid(NOBODY));
        refuse_calls(&[libc::SYS_setresuid], libc::EACCES);
        assert_fails(master, "change its user", Some(libc::EACCES));
        refuse_calls(&[libc::SYS_setgroups], libc::EDOM);
        assert_fails(master, "change its groups", Some(libc::EDOM));
    });
}

fn exits_of_copies_are_reported_though_the_host_ignores_sigchld() {
    #[allow(unsafe_code)]
    // SAFETY: ignoring a signal installs no handler, so no code can run in signal context.
    unsafe { signal(nix::sys::signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster_without_exec(|master| {
        master.on_error(|_, _, error| panic!("{error}"));
        master.on_exit(move |_, _, status| {
            assert_eq!(status.code(), Some(9));
            counted.set(counted.get() + 1);
        });
        master.setup_master(Settings::default().main(|_| 9));
        for _ in 0..20 {
            master.fork().unwrap();
        }
    });
    assert_eq!(ended.get(), 20);
}

/// Returns this process's anonymous memory, in KiB.
fn anonymous_memory() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let mut values = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Anonymous:"));
    let value = values.next().unwrap().trim_end_matches("kB");
    value.trim().parse().unwrap()
}

fn a_thousand_copies_leave_nothing_behind() {
    const ALL: u32 = 1000;
    const BEFORE: u32 = 100;
    let most = Instant::now() + scaled(Duration::from_secs(3));
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster_without_exec(|master| {
        set_main(master, |worker| worker.run().unwrap());
        master.on_online(|_, worker| worker.process().kill(Signal::KILL));
        let mut before = None;
        master.on_exit(move |master, _, _| {
            counted.set(counted.get() + 1);
            let has_time = Instant::now() < most && counted.get() < ALL;
            if counted.get() < 2 * BEFORE || has_time {
                // Measure for the first time only after `BEFORE` workers, so that memory that the
                // master allocates once does not appear as growth.
                if counted.get() == BEFORE {
                    before = Some((open_descriptors().len(), anonymous_memory()));
                }
                master.fork().unwrap();
                return;
            }
            let (descriptors, memory) = before.unwrap();
            // Both counts include the descriptors for one worker, which has just exited.
            assert_eq!(open_descriptors().len(), descriptors);
            let now = anonymous_memory();
            assert!(now <= memory + 128, "{memory} KiB, now {now}");
        });
        master.fork().unwrap();
    });
    println!("{} workers", ended.get());
}

/// Spins until this process has used `time` more CPU time.
fn use_cpu_time(time: Duration) {
    let clock = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID;
    let own = || Duration::from(nix::time::clock_gettime(clock).unwrap());
    let begun = own();
    while own() < begun + time {
        std::hint::spin_loop();
    }
}

/// Checks the resource usage of a worker that executes a program and of a worker that does not.
fn resource_usage_is_known_after_exit() {
    const TIME: Duration = Duration::from_millis(50);
    const MEMORY: usize = 64 << 20;
    fn work() {
        use_cpu_time(TIME);
        let memory = vec![1u8; MEMORY];
        assert_eq!(memory.iter().filter(|byte| **byte == 1).count(), MEMORY);
    }
    let ended = Rc::new(Cell::new(0));
    let counted = Rc::clone(&ended);
    cluster(
        |master| {
            master.on_online(|_, worker| assert_eq!(worker.process().usage(), None));
            master.on_exit(move |_, worker, status| {
                assert!(status.success(), "{status}");
                let usage = worker.process().usage().unwrap();
                let time = usage.user_cpu_time + usage.system_cpu_time;
                assert!((TIME..TIME * 40).contains(&time), "{usage:?}");
                assert!(usage.user_cpu_time > Duration::ZERO, "{usage:?}");
                let memory = MEMORY as u64;
                assert!((memory..memory * 4).contains(&usage.max_rss), "{usage:?}");
                counted.set(counted.get() + 1);
            });
            master.fork().unwrap();
            set_main(master, |_| work());
            master.fork().unwrap();
        },
        |_| work(),
    );
    assert_eq!(ended.get(), 2);
}

fn resource_usage_is_unknown_if_the_host_reaped_the_worker() {
    cluster_without_exec(|master| {
        set_main(master, |worker| worker.run().unwrap());
        let worker = master.fork().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
        worker.on_online(move |_, worker| {
            worker.process().kill(Signal::KILL);
            nix::sys::wait::waitpid(pid, None).unwrap();
        });
        worker.on_exit(|_, worker, _| assert_eq!(worker.process().usage(), None));
    });
}
