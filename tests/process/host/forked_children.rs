//! Tests that children of the host that execute no program do not disturb the master.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cluster::{Role, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, pause};

use super::{
    end_child, exit_with_requested_code, fork_of_the_host, fork_to_end_with, panic_on_errors,
    run_to_completion, without_process_descriptors,
};
use crate::harness::{Log, cluster, in_background, note_events, of, scaled, wait_until};

crate::scenarios! {
    forked_child_of_the_host_delays_no_fork
    forked_child_of_the_host_delays_no_fork_on_old_kernels
    forked_child_of_the_host_keeps_no_worker_alive
    forked_child_of_the_host_keeps_no_worker_of_a_dropped_master_alive
    dropping_the_master_in_a_child_does_not_affect_the_parent
}

/// Forks a child of the host that does not call `execve` and keeps all descriptors that were open
/// at the fork.
fn forked_child() -> Pid {
    match fork_of_the_host() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => loop {
            pause();
        },
    }
}

/// Repeats the test without process descriptors. The master then waits without a time limit for the
/// end of a stream, which shows that a worker's program has started. The host's children may hold
/// this stream open.
fn forked_child_of_the_host_delays_no_fork_on_old_kernels() {
    if cluster::is_master() {
        without_process_descriptors();
    }
    forked_child_of_the_host_delays_no_fork();
}

/// Forks children of the host while the master forks workers. These children inherit the master's
/// descriptors, but `fork` must not wait until they exit.
fn forked_child_of_the_host_delays_no_fork() {
    const CHILDREN: usize = 100;
    let stop = Arc::new(AtomicBool::new(false));
    // The threads start to fork children at the master's first fork. The master forks workers until
    // both threads have forked their children.
    let (begin, forking_threads) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU32::new(2)),
    );
    let make_children = |stop: Arc<AtomicBool>| {
        let (begin, forking_threads) = (Arc::clone(&begin), Arc::clone(&forking_threads));
        std::thread::spawn(move || {
            let mut children = Vec::new();
            while !begin.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            while children.len() < CHILDREN && !stop.load(Ordering::SeqCst) {
                children.push(forked_child());
            }
            forking_threads.fetch_sub(1, Ordering::SeqCst);
            // Keep the children alive for up to 20 s. The master must set `stop` before that time.
            // If `fork` waited for these children, the master would set it too late.
            let end = Instant::now() + scaled(Duration::from_secs(20));
            while !stop.load(Ordering::SeqCst) && Instant::now() < end {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            let in_time = stop.load(Ordering::SeqCst);
            children.into_iter().for_each(end_child);
            in_time
        })
    };
    let threads = cluster::is_master().then(|| [(); 2].map(|()| make_children(Arc::clone(&stop))));
    cluster(
        |master| {
            panic_on_errors(master);
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            begin.store(true, Ordering::SeqCst);
            while forking_threads.load(Ordering::SeqCst) > 0 {
                fork_to_end_with(master, 0);
            }
            stop.store(true, Ordering::SeqCst);
        },
        |_| exit_with_requested_code(),
    );
    let in_time = threads.unwrap().map(|thread| {
        thread.thread().unpark();
        thread.join().unwrap()
    });
    assert_eq!(in_time, [true, true]);
}

/// Forks a child of the host that has copies of the master's ends of all channels. The workers must
/// exit although these copies stay open.
fn forked_child_of_the_host_keeps_no_worker_alive() {
    let log = Log::default();
    let entries = log.clone();
    let child = Rc::new(Cell::new(None));
    let made = Rc::clone(&child);
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            let workers = [(); 3].map(|()| master.fork().unwrap());
            let mut online = 0;
            master.on_online(move |_, _| {
                online += 1;
                if online == 3 {
                    made.set(Some(forked_child()));
                    workers[0].disconnect();
                    workers[1].process().disconnect();
                    workers[2].process().kill(Signal::KILL);
                }
            });
        },
        |worker| run_to_completion(&worker),
    );
    end_child(child.get().unwrap());
    let entries = entries.take();
    let last = |worker| of(worker, &entries).last().copied();
    assert_eq!(last(1), Some("exit Some(true) exit status: 0"));
    assert_eq!(last(2), Some("exit Some(false) exit status: 0"));
    assert_eq!(last(3), Some("exit Some(false) signal: 9 (SIGKILL)"));
}

fn forked_child_of_the_host_keeps_no_worker_of_a_dropped_master_alive() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork().unwrap();
            let online = Rc::new(Cell::new(false));
            let set = Rc::clone(&online);
            worker.on_online(move |_, _| set.set(true));
            while !online.get() {
                master.dispatch(None).unwrap();
            }
            let child = forked_child();
            drop(master);
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            let end = wait_until("the exit of the worker", || {
                let end = waitpid(pid, Some(flags)).unwrap();
                (end != WaitStatus::StillAlive).then_some(end)
            });
            assert_eq!(end, WaitStatus::Exited(pid, 0));
            end_child(child);
        }
        Role::Worker(worker) => run_to_completion(&worker),
    }
}

/// Forks a child that drops its copy of the master, as a child that returns from `main` does. The
/// parent's worker and the path of its Unix socket must remain.
fn dropping_the_master_in_a_child_does_not_affect_the_parent() {
    let path = std::env::temp_dir().join(format!("cluster-test-{}", std::process::id()));
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork_with([("SOCKET", &path)]).unwrap();
            let listening = Rc::new(Cell::new(false));
            let seen = Rc::clone(&listening);
            worker.on_listening(move |_, _, _| seen.set(true));
            while !listening.get() {
                master.dispatch(None).unwrap();
            }
            match fork_of_the_host() {
                ForkResult::Child => {
                    drop(master);
                    std::process::exit(0);
                }
                ForkResult::Parent { child } => {
                    assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
                }
            }
            let address = path.clone();
            let ask = move || {
                let mut answer = String::new();
                let mut client = UnixStream::connect(address).unwrap();
                client.read_to_string(&mut answer).unwrap();
                answer
            };
            in_background(&master, ask, |master, answer| {
                assert_eq!(answer, "served");
                master.disconnect();
            });
            master.run().unwrap();
            drop(master);
            assert!(!path.exists());
        }
        Role::Worker(worker) => {
            let path = PathBuf::from(std::env::var_os("SOCKET").unwrap());
            let listener = worker.listen(path.as_path()).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
        }
    }
}
