//! Tests the names, permissions, files and connections of Unix sockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cluster::{ListenOptions, Listener, Master, Role, Signal, Worker, WorkerProcess};
use nix::sys::stat::{Mode, umask};

use crate::harness::{
    Log, cluster, expect_listen_error, for_both_policies, in_background, note_events,
    note_messages, with_env,
};

crate::scenarios! {
    eaccess
    listen_pipe_readable_writable
    each_permission_is_set_independently
    net_listen_relative_path
    connections_arrive_over_a_unix_path
    socket_file_is_removed_after_the_last_close
    socket_file_is_removed_after_master_disconnect
    socket_file_is_removed_when_the_only_worker_is_killed
    foreign_socket_file_is_not_removed
}

/// Returns a temporary directory that exists until the master is dropped.
fn directory(master: &Master) -> PathBuf {
    let directory = tempfile::tempdir().unwrap();
    // Use the canonical path, because the kernel reports the current directory in this form.
    let path = directory.path().canonicalize().unwrap();
    master.on_exit(move |_, _, _| assert!(directory.path().exists()));
    path
}

/// Forks a worker that listens on this path.
fn fork_for(master: &Master, path: &Path) -> WorkerProcess {
    master.fork_with([("SOCKET", path)]).unwrap()
}

/// Returns the path that `fork_for` has passed to this worker.
fn socket() -> PathBuf {
    std::env::var_os("SOCKET").unwrap().into()
}

/// Logs at each `exit` event whether the file exists.
fn note_file(master: &Master, path: &Path, log: &Log) {
    let (path, log) = (path.to_owned(), log.clone());
    master.on_exit(move |_, worker, _| {
        log.add(format!("{} file {}", worker.id(), path.exists()));
    });
}

fn listen(worker: &Worker) -> Listener<UnixStream> {
    worker.listen(socket()).unwrap()
}

/// Plays a process that listens on the path. A worker has started this process, but the process is
/// not a worker itself.
fn foreign_process(path: &Path) {
    assert!(!cluster::is_worker());
    assert!(matches!(cluster::init(), Ok(Role::Master(_))));
    let listener = UnixListener::bind(path).unwrap();
    println!("listening");
    drop(listener.accept().unwrap());
    // Run until end-of-file on standard input.
    assert_eq!(std::io::stdin().read(&mut [0]).unwrap(), 0);
}

fn eaccess() {
    const FOREIGN: &str = "FOREIGN";
    if std::env::var_os(FOREIGN).is_some() {
        return foreign_process(&socket());
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let path = directory(master).join("socket");
            let worker = fork_for(master, &path);
            worker.on_message(|_, worker, _| drop(worker.disconnect().clone()));
            note_file(master, &path, &log);
        },
        |worker| {
            let mut other = Command::new(std::env::current_exe().unwrap())
                .env(FOREIGN, "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let mut output = BufReader::new(other.stdout.take().unwrap());
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "listening\n");
            let error = expect_listen_error(&worker, socket(), nix::libc::EADDRINUSE);
            let text = error.to_string();
            assert!(text.contains(socket().to_str().unwrap()), "{text}");
            // Check that the file still exists, and that the other process still listens on it.
            drop(UnixStream::connect(socket()).unwrap());
            drop(other.stdin.take());
            assert!(other.wait().unwrap().success());
            let errno = error.raw_os_error().unwrap();
            let _ = worker.send(format!("error {errno}").as_bytes()).unwrap();
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork".to_owned(),
        "1 online".to_owned(),
        format!("1 error {}", nix::libc::EADDRINUSE),
        "1 disconnect Some(true)".to_owned(),
        "1 exit Some(true) exit status: 0".to_owned(),
        // The master must not remove another process's file.
        "1 file true".to_owned(),
    ];
    assert_eq!(entries.take(), expected);
}

/// Listens with these options and returns the file's permissions.
fn permissions(readable: bool, writable: bool, mask: u32) -> u32 {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            umask(Mode::from_bits(mask).unwrap());
            note_events(master, &log);
            let path = directory(master).join("socket");
            fork_for(master, &path);
            master.on_listening(move |_, _, address| {
                assert_eq!(address.path(), Some(&*path));
                assert!(matches!(address, cluster::Address::Unix(_)));
                assert_eq!(address.port(), None);
            });
            note_messages(master, &log);
        },
        |worker| {
            let options = ListenOptions::from(socket());
            let options = options.readable_all(readable).writable_all(writable);
            let listener = worker.listen(options).unwrap();
            let mode = std::fs::metadata(socket()).unwrap().permissions().mode();
            let _ = worker.send(mode.to_string().as_bytes()).unwrap();
            listener.close();
            worker.process().disconnect();
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    let mode = entries.remove(3);
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
    ];
    assert_eq!(entries, expected);
    let mode: u32 = mode.strip_prefix("1 ").unwrap().parse().unwrap();
    mode & 0o777
}

fn listen_pipe_readable_writable() {
    assert_eq!(permissions(true, true, 0o022), 0o777);
}

fn each_permission_is_set_independently() {
    const CASE: &str = "PERMISSIONS";
    let cases = [
        ("none", (false, false), 0o700),
        ("read", (true, false), 0o744),
        ("write", (false, true), 0o722),
    ];
    let own = std::env::var(CASE).ok();
    for (name, (readable, writable), mode) in cases {
        // The test process starts a child process for each case. In a child process, only the
        // child's case runs.
        if own.as_ref().is_none_or(|own| own == name) {
            with_env(CASE, name, || {
                assert_eq!(permissions(readable, writable, 0o077), mode);
            });
        }
    }
}

fn net_listen_relative_path() {
    /// The maximum length of a socket path in bytes, including its final NUL (see unix(7)).
    const LIMIT: usize = 108;
    const BELOW: &str = "below";
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let directory = directory(master);
            std::env::set_current_dir(&directory).unwrap();
            std::fs::create_dir(BELOW).unwrap();
            let name = "x".repeat(101 - "./below/".len());
            let path = directory.join(BELOW).join(&name);
            assert!(path.as_os_str().len() >= LIMIT, "{}", path.display());
            let expected = path.clone();
            master.on_listening(move |_, _, address| {
                assert_eq!(address.path(), Some(&*expected));
            });
            fork_for(master, name.as_ref());
            note_file(master, &path, &log);
        },
        |worker| {
            std::env::set_current_dir(BELOW).unwrap();
            let listener = listen(&worker);
            assert!(socket().is_relative() && socket().exists());
            listener.set_connection_callback(|_, _| {});
            drop(UnixStream::connect(socket()).unwrap());
            worker.process().disconnect();
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
        "1 file false",
    ];
    assert_eq!(entries.take(), expected);
}

/// Sends `text` and returns the answer.
fn echo(path: &Path, text: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn connections_arrive_over_a_unix_path() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory(master).join("socket");
                let mut listening = 0;
                let client = path.clone();
                note_messages(master, &log);
                let answers = log.clone();
                master.on_listening(move |master, _, _| {
                    listening += 1;
                    if listening < 2 {
                        return;
                    }
                    let (path, answers) = (client.clone(), answers.clone());
                    in_background(
                        master,
                        move || ["a", "b", "c", "d"].map(|text| echo(&path, text)),
                        move |master, texts| {
                            answers.add(texts.concat());
                            master.disconnect();
                        },
                    );
                });
                (0..2).for_each(|_| drop(fork_for(master, &path)));
                master.on_exit(move |_, _, status| log.add(status.to_string()));
            },
            |worker| {
                for connection in listen(&worker).incoming() {
                    let mut connection = connection.unwrap();
                    let mut text = String::new();
                    connection.read_to_string(&mut text).unwrap();
                    connection.write_all(text.as_bytes()).unwrap();
                    // The clients have not bound their sockets, so their addresses are unnamed.
                    assert!(connection.peer_addr().unwrap().is_unnamed());
                }
            },
        );
        assert_eq!(entries.take(), ["abcd", "exit status: 0", "exit status: 0"]);
    });
}

/// Checks that the socket file is removed only when the second of two workers has closed its
/// listener.
fn socket_file_is_removed_after_the_last_close() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory(master).join("socket");
                let (first, second) = (fork_for(master, &path), fork_for(master, &path));
                let mut listening = 0;
                let to_close = first.clone();
                master.on_listening(move |_, _, _| {
                    listening += 1;
                    if listening == 2 {
                        let _ = to_close.send(b"close").unwrap();
                    }
                });
                note_messages(master, &log);
                let present = path.clone();
                first.on_message(move |_, _, _| {
                    assert!(present.exists(), "the second worker still listens");
                    drop(UnixStream::connect(&present).unwrap());
                    let _ = second.send(b"close").unwrap();
                });
                let noted = log.clone();
                master.on_message(move |master, worker, _| {
                    if worker.id().get() == 2 {
                        noted.add(format!("file {}", path.exists()));
                        master.disconnect();
                    }
                });
                master.on_exit(move |_, _, status| log.add(status.to_string()));
            },
            |worker| {
                let listener = listen(&worker);
                listener.set_connection_callback(|_, _| {});
                worker.on_message(move |worker, _| {
                    listener.close();
                    let _ = worker.send(b"closed").unwrap();
                });
                worker.run().unwrap();
            },
        );
        let expected = [
            "1 closed",
            "2 closed",
            "file false",
            "exit status: 0",
            "exit status: 0",
        ];
        assert_eq!(entries.take(), expected);
    });
}

fn socket_file_is_removed_after_master_disconnect() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory(master).join("socket");
                let mut listening = 0;
                (0..2).for_each(|_| drop(fork_for(master, &path)));
                master.on_listening(move |master, _, _| {
                    listening += 1;
                    if listening == 2 {
                        assert!(path.exists());
                        let (path, log) = (path.clone(), log.clone());
                        master.on_all_disconnected_once(move |_| {
                            log.add(format!("file {}", path.exists()))
                        });
                        master.disconnect();
                    }
                });
                master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            },
            |worker| {
                assert!(listen(&worker).accept().unwrap().is_none());
            },
        );
        assert_eq!(entries.take(), ["file false"]);
    });
}

fn socket_file_is_removed_when_the_only_worker_is_killed() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory(master).join("socket");
                note_events(master, &log);
                fork_for(master, &path);
                note_file(master, &path, &log);
                master.on_listening(move |_, worker, _| {
                    assert!(path.exists());
                    worker.process().kill(Signal::KILL);
                });
            },
            |worker| {
                assert!(listen(&worker).accept().unwrap().is_none());
            },
        );
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "1 disconnect Some(false)",
            "1 exit Some(false) signal: 9 (SIGKILL)",
            "1 file false",
        ];
        assert_eq!(entries.take(), expected);
    });
}

fn foreign_socket_file_is_not_removed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let directory = directory(master);
            let path = directory.join("socket");
            note_events(master, &log);
            fork_for(master, &path);
            note_file(master, &path, &log);
            master.on_listening(move |_, worker, _| {
                // Keep the worker's socket file under another name, so that the new file cannot
                // have the same inode.
                std::fs::rename(&path, directory.join("away")).unwrap();
                drop(UnixListener::bind(&path).unwrap());
                worker.disconnect();
            });
        },
        |worker| {
            assert!(listen(&worker).accept().unwrap().is_none());
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
        "1 file true",
    ];
    assert_eq!(entries.take(), expected);
}
