//! Tests a worker's initial state: directory, arguments, descriptors, user and inspect port.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::Command;
use std::rc::Rc;

use cluster::{InspectPort, Interest, Master, Role, Sent, Settings, Stdio, Worker};

use crate::harness::{
    Log, NOBODY, OWN_PROGRAM, cluster, fork_patiently, is_alive, is_root, note_events,
    note_messages, spin, wait_until,
};

crate::scenarios! {
    cwd
    relative_program_path_is_resolved_in_the_masters_directory
    fork_windows_hide
    setup_primary
    exec_args_precede_args
    fork_stdio
    stdio_can_be_null_a_file_or_inherited
    silent_workers_write_to_the_masters_pipes
    workers_run_with_the_configured_user_and_group
    changing_user_or_group_requires_root
    worker_of_another_user_exits_with_the_master
    inspect_port_increments_for_each_worker
    inspect_port_closure_runs_for_each_worker
}

/// Sends one message and closes the channel once the message has been written.
fn send_and_close(worker: &Worker, text: &str) {
    let _ = worker.send(text.as_bytes()).unwrap();
    worker.process().disconnect();
    worker.run().unwrap();
}

/// Asserts at each `exit` event that the worker was successful.
fn expect_success(master: &Master) {
    master.on_exit(|_, worker, status| assert!(status.success(), "{worker:?}: {status}"));
}

fn cwd() {
    let log = Log::default();
    let entries = log.clone();
    let expected = std::env::temp_dir().canonicalize().unwrap();
    let directory = expected.clone();
    cluster(
        |master| {
            assert_eq!(master.settings().get_cwd(), None);
            note_messages(master, &log);
            note_events(master, &log);
            let first = master.fork().unwrap();
            assert_eq!(master.settings().get_cwd(), None);
            first.on_exit(move |master, _, _| {
                master.setup_master(Settings::default().cwd(&directory));
                assert_eq!(master.settings().get_cwd(), Some(&*directory));
                master.fork().unwrap();
            });
        },
        |worker| {
            let directory = std::env::current_dir().unwrap();
            send_and_close(&worker, directory.to_str().unwrap());
        },
    );
    let own = std::env::current_dir().unwrap();
    assert_ne!(own, expected);
    let of_each = |id: u32, directory: &std::path::Path| {
        [
            format!("{id} fork"),
            format!("{id} online"),
            format!("{id} {}", directory.display()),
            format!("{id} disconnect Some(false)"),
            format!("{id} exit Some(false) exit status: 0"),
        ]
    };
    assert_eq!(
        entries.take(),
        [of_each(1, &own), of_each(2, &expected)].concat()
    );
}

fn relative_program_path_is_resolved_in_the_masters_directory() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let own = std::env::current_exe().unwrap();
            std::env::set_current_dir(own.parent().unwrap()).unwrap();
            let relative = std::path::Path::new(".").join(own.file_name().unwrap());
            master.setup_master(Settings::default().exec(relative).cwd("/"));
            note_messages(master, &log);
            expect_success(master);
            master.fork().unwrap();
        },
        |worker| {
            let directory = std::env::current_dir().unwrap();
            send_and_close(&worker, directory.to_str().unwrap());
        },
    );
    assert_eq!(entries.take(), ["1 /"]);
}

/// Checks that a silent worker and its master exit successfully. Node's test also passes an option
/// that hides windows, which Unix does not have.
///
/// As in Node's test, the master has its own process group. The driver, the process that starts the
/// scenarios, ensures this.
fn fork_windows_hide() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().silent(true));
            note_events(master, &log);
            let worker = master.fork().unwrap();
            assert!(worker.process().take_stdio(1).is_some(), "silent");
            worker.on_online(|_, worker| {
                assert_eq!(worker.send(b"shutdown").unwrap(), Sent::Continue)
            });
        },
        |worker| {
            worker.on_message(|worker, _| {
                worker.disconnect();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn setup_primary() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().args(["custom argument"]).silent(true));
            let setup = log.clone();
            master.on_setup_once(move |master, settings| {
                let expected = Settings::default()
                    .args(["custom argument"])
                    .silent(true)
                    .exec(std::env::current_exe().unwrap());
                assert_eq!(settings.get_args(), expected.get_args());
                assert_eq!(settings.get_silent(), expected.get_silent());
                assert_eq!(settings.get_exec(), expected.get_exec());
                assert_eq!(master.settings(), *settings);
                setup.add("setup");
            });
            let online = log.clone();
            master.on_online(move |_, _| online.add("online"));
            let argument = log.clone();
            master.on_message(move |_, worker, message| {
                argument.add(String::from_utf8_lossy(message.bytes()));
                worker.kill(cluster::Signal::KILL);
            });
            master.on_exit(move |_, worker, status| {
                assert_eq!(worker.exited_after_disconnect(), Some(true));
                log.add(status.to_string());
            });
            for _ in 0..2 {
                let worker = master.fork().unwrap();
                assert!(worker.process().take_stdio(1).is_some(), "silent");
            }
        },
        |worker| {
            let argument = std::env::args().nth(1).unwrap();
            let _ = worker.send(argument.as_bytes()).unwrap();
            // Block here, so that the worker cannot exit before the signal arrives.
            worker.on_disconnect(|_| std::thread::park());
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    assert_eq!(entries.first().map(String::as_str), Some("setup"));
    entries.sort();
    let [custom, online, killed] = ["custom argument", "online", "signal: 9 (SIGKILL)"];
    assert_eq!(
        entries,
        [custom, custom, online, online, "setup", killed, killed]
    );
}

fn exec_args_precede_args() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let settings = Settings::default().args(["c", "d"]).exec_args(["a", "b"]);
            master.setup_master(settings);
            note_messages(master, &log);
            expect_success(master);
            master.fork().unwrap();
        },
        |worker| {
            let args: Vec<_> = std::env::args().skip(1).collect();
            send_and_close(&worker, &args.join(" "));
        },
    );
    assert_eq!(entries.take(), ["1 a b c d"]);
}

/// Returns the pipe end that this worker has inherited as descriptor `number`.
fn pipe(number: RawFd) -> UnixStream {
    #[allow(unsafe_code)]
    // SAFETY: the descriptor is open because it was passed to this process, and no other value owns
    // it.
    let end = unsafe { OwnedFd::from_raw_fd(number) };
    end.into()
}

/// Reads the worker's pipe until end-of-file. Then logs everything as one entry that starts with
/// `number`.
fn note_output(master: &Master, stream: UnixStream, number: usize, log: &Log) {
    let log = log.clone();
    let mut all = Vec::new();
    let read = move |_: &Master, mut stream: &UnixStream| {
        let mut piece = [0; 64];
        let length = stream.read(&mut piece).unwrap();
        all.extend_from_slice(&piece[..length]);
        if length == 0 {
            log.add(format!("{number} {}", String::from_utf8_lossy(&all)));
        }
        (length > 0).then_some(Interest::Readable)
    };
    master.watch(stream, Interest::Readable, read).unwrap();
}

fn fork_stdio() {
    const PIPES: [RawFd; 2] = [3, 5];
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let own = Stdio::inherit;
            let stdio = [
                own(),
                own(),
                own(),
                Stdio::pipe(),
                Stdio::null(),
                Stdio::pipe(),
            ];
            master.setup_master(Settings::default().stdio(stdio));
            expect_success(master);
            let worker = master.fork().unwrap();
            let process = worker.process();
            for number in PIPES {
                let index = usize::try_from(number).unwrap();
                let mut stream = process.take_stdio(index).unwrap();
                write!(stream, "to {number}").unwrap();
                note_output(master, stream, index, &log);
                assert!(process.take_stdio(index).is_none(), "taken before");
            }
            assert!(
                [0, 1, 2, 4, 6]
                    .iter()
                    .all(|n| process.take_stdio(*n).is_none())
            );
        },
        |worker| {
            for number in PIPES {
                let mut stream = pipe(number);
                let mut text = [0; 4];
                stream.read_exact(&mut text).unwrap();
                assert_eq!(std::str::from_utf8(&text), Ok(&*format!("to {number}")));
                write!(stream, "from {number}").unwrap();
            }
            worker.process().disconnect();
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["3 from 3", "5 from 5"]);
}

fn link(number: u32) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
    link.into_os_string().into_string().unwrap()
}

fn stdio_can_be_null_a_file_or_inherited() {
    let log = Log::default();
    let entries = log.clone();
    let expected = Rc::new(RefCell::new(Vec::new()));
    let links = Rc::clone(&expected);
    let file = Rc::new(RefCell::new(None));
    let written = Rc::clone(&file);
    cluster(
        |master| {
            let mut file = tempfile::tempfile().unwrap();
            // Pass a copy to the settings, because they take ownership and the test needs `file` to
            // read what the workers have written.
            let copy = file.try_clone().unwrap();
            writeln!(file, "master").unwrap();
            let number = std::os::fd::AsRawFd::as_raw_fd(&file);
            let path = link(number.unsigned_abs());
            let of_each = format!("/dev/null {path} {} /dev/null", link(2));
            links.replace(vec![format!("1 {of_each}"), format!("2 {of_each}")]);
            let stdio = [
                Stdio::null(),
                Stdio::fd(copy),
                Stdio::inherit(),
                Stdio::null(),
            ];
            master.setup_master(Settings::default().stdio(stdio));
            note_messages(master, &log);
            expect_success(master);
            written.replace(Some(file));
            let first = master.fork().unwrap();
            first.on_exit(|master, _, _| {
                master.fork().unwrap();
                // Replace the settings' `stdio`, because the settings keep their copy of the file
                // open until then.
                master.setup_master(Settings::default().stdio([]));
            });
            master.on_exit(move |_, worker, _| {
                if worker.id().get() == 2 {
                    let mut file = written.take().unwrap();
                    file.rewind().unwrap();
                    let mut text = String::new();
                    file.read_to_string(&mut text).unwrap();
                    assert_eq!(text, "master\nworker 1\nworker 2\n");
                }
            });
        },
        |worker| {
            assert_eq!(std::io::stdin().read(&mut [0]).unwrap(), 0);
            println!("worker {}", worker.id());
            send_and_close(&worker, &[0, 1, 2, 3].map(link).join(" "));
        },
    );
    assert!(file.take().is_none(), "the file was checked");
    assert_eq!(entries.take(), expected.take());
}

fn silent_workers_write_to_the_masters_pipes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().silent(true));
            expect_success(master);
            let worker = master.fork().unwrap();
            let mut input = worker.process().take_stdio(0).unwrap();
            input.write_all(b"input").unwrap();
            drop(input);
            for number in [1, 2] {
                let output = worker.process().take_stdio(number).unwrap();
                note_output(master, output, number, &log);
            }
        },
        |worker| {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).unwrap();
            println!("standard output after {text}");
            eprintln!("error output");
            worker.process().disconnect();
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    let expected = ["1 standard output after input\n", "2 error output\n"];
    assert_eq!(entries, expected);
}

/// Asserts that `fork` fails with `EPERM` for these settings.
fn assert_fork_is_not_permitted(settings: Settings) {
    cluster(
        |master| {
            master.on_fork(|_, _| panic!("no worker was forked"));
            master.on_exit(|_, _, _| panic!("no worker was forked"));
            master.setup_master(settings);
            let error = master.fork().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM), "{error}");
            assert!(master.workers().is_empty());
        },
        |_| unreachable!("no worker was forked"),
    );
}

/// Returns the user IDs, group IDs and supplementary groups from `/proc/self/status`.
fn identity() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let is_identity = |line: &&str| {
        ["Uid:", "Gid:", "Groups:"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    let lines = status.lines().filter(is_identity).map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.join(" ")
    });
    lines.collect::<Vec<_>>().join(", ")
}

fn workers_run_with_the_configured_user_and_group() {
    let settings = || Settings::default().exec(OWN_PROGRAM);
    if !is_root() && !cluster::is_worker() {
        return assert_fork_is_not_permitted(settings().uid(NOBODY).gid(NOBODY));
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let group = 1;
            #[allow(unsafe_code)]
            // SAFETY: the pointer is valid for reads of one group ID.
            let result = unsafe { nix::libc::setgroups(1, &raw const group) };
            assert_eq!(result, 0);
            assert!(identity().ends_with("Groups: 1"), "{}", identity());
            note_messages(master, &log);
            expect_success(master);
            let cases = [
                settings().gid(NOBODY),
                settings().uid(NOBODY),
                settings().uid(NOBODY).gid(1),
            ];
            for case in cases {
                master.setup_master(case);
                fork_patiently(|| master.fork());
            }
        },
        |worker| send_and_close(&worker, &identity()),
    );
    let mut entries = entries.take();
    entries.sort();
    let ids = |id: u32| [id; 4].map(|id| id.to_string()).join(" ");
    let identity = |id, uid, gid| format!("{id} Uid: {}, Gid: {}, Groups:", ids(uid), ids(gid));
    // Each `setup_master` call keeps the settings that it does not replace.
    let expected = [
        identity(1, 0, NOBODY),
        identity(2, NOBODY, NOBODY),
        identity(3, NOBODY, 1),
    ];
    assert_eq!(entries, expected);
}

fn changing_user_or_group_requires_root() {
    let roots = |settings: &str| match settings {
        "uid" => Settings::default().uid(0),
        _ => Settings::default().gid(0),
    };
    const PLAY: &str = "WITHOUT_ROOT";
    if let Ok(which) = std::env::var(PLAY) {
        return assert_fork_is_not_permitted(roots(&which));
    }
    for which in ["uid", "gid"] {
        let mut command = Command::new(OWN_PROGRAM);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let status = command.env(PLAY, which).status().unwrap();
        assert!(status.success(), "{which}: {status}");
    }
}

/// Checks that a worker of another user exits when its master is killed. The master is a child of
/// this process, and the worker runs in an endless loop.
fn worker_of_another_user_exits_with_the_master() {
    const PLAY: &str = "IS_KILLED";
    let settings = Settings::default().exec(OWN_PROGRAM);
    let settings = settings.uid(NOBODY).gid(NOBODY);
    if !is_root() && !cluster::is_worker() {
        return assert_fork_is_not_permitted(settings);
    }
    if std::env::var_os(PLAY).is_none() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut master = Command::new(std::env::current_exe().unwrap())
            .env(PLAY, "1")
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        let mut pid = [0; 4];
        ours.read_exact(&mut pid).unwrap();
        let pid = u32::from_ne_bytes(pid);
        assert!(is_alive(pid));
        master.kill().unwrap();
        assert_eq!(master.wait().unwrap().signal(), Some(nix::libc::SIGKILL));
        wait_until("the worker's exit", || (!is_alive(pid)).then_some(()));
        return;
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.setup_master(settings);
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            assert!(identity().contains("Uid: 65534 65534 65534 65534"));
            let mut output = std::io::stdout();
            output
                .write_all(&worker.process().id().to_ne_bytes())
                .unwrap();
            output.flush().unwrap();
            loop {
                spin();
            }
        }
    }
}

/// Sends the worker's inspect port to the master.
fn send_inspect_port(worker: &Worker) {
    send_and_close(worker, &format!("{:?}", worker.inspect_port()));
}

/// Forks one worker without settings, three with `settings`, and one with `last`. Returns the
/// workers' inspect ports.
fn inspect_ports(
    settings: impl FnOnce() -> Settings,
    last: impl FnOnce() -> Settings,
) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            expect_success(master);
            master.fork().unwrap();
            master.setup_master(settings());
            (0..3).for_each(|_| drop(master.fork().unwrap()));
            master.setup_master(last());
            master.fork().unwrap();
        },
        |worker| send_inspect_port(&worker),
    );
    let mut entries = entries.take();
    entries.sort();
    entries
}

fn inspect_port_increments_for_each_worker() {
    let ports = inspect_ports(
        || Settings::default().inspect_port(65534),
        || Settings::default().inspect_port(9229),
    );
    let expected = [
        "1 None",
        "2 Some(65534)",
        "3 Some(65535)",
        "4 Some(1024)",
        "5 Some(9229)",
    ];
    assert_eq!(ports, expected);
}

fn inspect_port_closure_runs_for_each_worker() {
    let calls = Rc::new(Cell::new(0));
    let count = Rc::clone(&calls);
    let next_port = move || {
        count.set(count.get() + 1);
        9000 + 10 * count.get()
    };
    let ports = inspect_ports(
        || Settings::default().inspect_port(InspectPort::new(next_port)),
        // The empty settings do not replace the closure, so the fifth worker's port also comes from
        // the closure.
        Settings::default,
    );
    let expected = [
        "1 None",
        "2 Some(9010)",
        "3 Some(9020)",
        "4 Some(9030)",
        "5 Some(9040)",
    ];
    assert_eq!(ports, expected);
    assert_eq!(calls.get(), 4, "once for each worker");
}
