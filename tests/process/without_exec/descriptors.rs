//! Tests the descriptors of a copy of the master, its old handles, and that copies leave none open.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cluster::{Interest, Master, Role, Settings, Signal, Stdio};

use super::{cluster_without_exec, open_descriptors, set_main};
use crate::harness::{SIGNALS, scaled, when_listening};

crate::scenarios! {
    copy_has_only_descriptors_that_the_application_opened
    copy_has_no_connection_that_waits_in_the_master
    stale_handles_in_a_copy_refer_to_no_new_descriptor
    copy_has_the_pipes_and_descriptors_of_stdio
    a_thousand_copies_leave_nothing_behind
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
