//! Tests that workers and children of the host inherit only their own descriptors.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cluster::{Settings, Stdio};
use nix::libc;

use super::panic_on_errors;
use crate::harness::{Log, cluster, for_both_policies, note_messages};
use crate::refused::refuse_calls;

crate::scenarios! {
    workers_and_concurrent_children_share_no_descriptors
    worker_inherits_only_its_own_descriptors
    worker_inherits_only_its_own_descriptors_on_old_kernels
}

/// Returns the numbers of the open descriptors, except those of files in `/proc`.
fn fd_numbers() -> BTreeSet<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(Result::unwrap);
    // Leave out the descriptor that reads this directory.
    let others = entries
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| !to.starts_with("/proc")));
    let numbers = others.map(|entry| entry.file_name().to_string_lossy().parse().unwrap());
    numbers.collect()
}

/// Compares the descriptors of a worker before `init` with the expected ones, which are its channel
/// and all numbers below `standard`. Returns the additional and the missing ones.
fn unexpected_fds(standard: RawFd) -> Vec<RawFd> {
    let channel = std::env::var("CLUSTER_CHANNEL_FD").unwrap();
    let mut expected: BTreeSet<_> = (0..standard).collect();
    assert!(expected.insert(channel.parse().unwrap()));
    fd_numbers()
        .symmetric_difference(&expected)
        .copied()
        .collect()
}

/// Returns a list of the descriptors that a program has when the host executes it.
fn list_in_a_child() -> String {
    let output = Command::new("ls").arg("/proc/self/fd").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Starts a thread that executes programs repeatedly until `stop` is set, and asserts that all of
/// them have the same descriptors. The thread returns the number of programs.
fn execute_until(stop: &Arc<AtomicBool>) -> JoinHandle<u32> {
    let stop = Arc::clone(stop);
    let before = list_in_a_child();
    std::thread::spawn(move || {
        let mut times = 0;
        while !stop.load(Ordering::SeqCst) {
            assert_eq!(list_in_a_child(), before);
            times += 1;
        }
        times
    })
}

fn workers_and_concurrent_children_share_no_descriptors() {
    const WORKERS: u32 = 30;
    let unexpected_fds = cluster::is_worker().then(|| unexpected_fds(3));
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = cluster::is_master().then(|| [(); 4].map(|()| execute_until(&stop)));
    let times = Rc::new(Cell::new([0; 4]));
    let counted = Rc::clone(&times);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_messages(master, &log);
            master.on_exit(move |master, worker, status| {
                assert_eq!(status.code(), Some(0));
                match worker.id().get() {
                    1 => {}
                    id if id < WORKERS => drop(master.fork().unwrap()),
                    _ => {
                        stop.store(true, Ordering::SeqCst);
                        let threads = threads.take().unwrap();
                        counted.set(threads.map(|thread| thread.join().unwrap()));
                    }
                }
            });
            // Start with a worker that listens, so that the master has a channel, a listener and a
            // queue when it forks the other workers.
            let first = master.fork_with([("FIRST_OF_ALL", "1")]).unwrap();
            first.on_listening(|master, _, _| drop(master.fork().unwrap()));
            master.on_message(move |_, worker, _| {
                if worker.id().get() == WORKERS {
                    first.disconnect();
                }
            });
        },
        |worker| {
            let _ = worker
                .send(format!("{unexpected_fds:?}").as_bytes())
                .unwrap();
            if std::env::var_os("FIRST_OF_ALL").is_some() {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                assert!(listener.accept().unwrap().is_none());
            }
        },
    );
    let times = times.get();
    println!("programs executed meanwhile: {times:?}");
    assert!(times.iter().all(|times| *times > 0));
    let entries = entries.take();
    assert_eq!(entries.len(), WORKERS as usize);
    assert!(
        entries.iter().all(|entry| entry.ends_with(" Some([])")),
        "{entries:?}"
    );
}

/// Opens descriptors with low and high numbers, all without close-on-exec.
fn inheritable_descriptors() -> Vec<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::resource::{Resource, getrlimit};
    use std::os::fd::FromRawFd as _;

    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let last = RawFd::try_from(limit.min(60_000)).unwrap() - 1;
    let null = File::open("/dev/null").unwrap();
    let lows = (0..47).map(|number| 3 + number * 11);
    let numbers = lows.chain([last - 300, last - 1, last]);
    let copy = |number| {
        let copy = fcntl(&null, FcntlArg::F_DUPFD(number)).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: `fcntl` has just created the descriptor, so it is open and has no other owner.
        unsafe {
            OwnedFd::from_raw_fd(copy)
        }
    };
    numbers.map(copy).collect()
}

fn assert_no_unexpected_descriptors() {
    const STANDARD: &str = "STANDARD";
    let standard = std::env::var(STANDARD).map(|standard| standard.parse().unwrap());
    let unexpected_fds = standard.ok().map(unexpected_fds);
    let open = cluster::is_master().then(inheritable_descriptors);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(open.as_ref().unwrap().len(), 50);
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            let file = tempfile::tempfile().unwrap();
            let inherit = [(); 3].map(|()| Stdio::inherit());
            let more = [Stdio::null(), Stdio::pipe(), Stdio::fd(file)];
            let cases = [
                (3, Settings::default()),
                (3, Settings::default().silent(true)),
                (3, Settings::default().silent(false).stdio(inherit.clone())),
                (
                    6,
                    Settings::default().stdio(inherit.into_iter().chain(more)),
                ),
            ];
            for (standard, settings) in cases {
                master.setup_master(settings);
                master
                    .fork_with([(STANDARD, standard.to_string())])
                    .unwrap();
            }
        },
        |worker| {
            let _ = worker
                .send(format!("{unexpected_fds:?}").as_bytes())
                .unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    let expected = [1, 2, 3, 4].map(|worker| format!("{worker} Some([])"));
    assert_eq!(entries, expected);
    let open = open.unwrap();
    let numbers = fd_numbers();
    assert!(
        open.iter().all(|fd| numbers.contains(&fd.as_raw_fd())),
        "the host's descriptors stay open"
    );
}

fn worker_inherits_only_its_own_descriptors() {
    for_both_policies(assert_no_unexpected_descriptors);
}

fn worker_inherits_only_its_own_descriptors_on_old_kernels() {
    if cluster::is_master() {
        refuse_calls(&[libc::SYS_close_range, libc::SYS_clone3], libc::ENOSYS);
    }
    assert_no_unexpected_descriptors();
}
