//! Checks what a pool does at limits of the system and at its own memory limit.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use cluster::Settings;
use cluster::pool::{Pool, PoolEvent, PoolOptions, Readiness};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::exhaustion::{become_user, leave_free, unique_user};
use crate::harness::{Log, cluster};

crate::scenarios! {
    slots_fill_after_a_shortage_of_descriptors
    slots_fill_after_a_shortage_of_processes: ROOT
    memory_shared_with_the_master_does_not_count_towards_the_limit
}

const MS: Duration = Duration::from_millis(1);

/// Starts a pool with two workers during a shortage, which ends after three forks have failed. The
/// pool's failure limit is zero, so the pool would give up if one of these failures counted.
///
/// `shortage` begins the shortage, and returns a closure that ends it.
fn fill_slots_after(shortage: fn() -> Box<dyn Fn()>) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let program = Settings::default().exec("/bin/sleep").args(["60"]);
            master.setup_master(program);
            let options = PoolOptions::default()
                .workers(2)
                .readiness(Readiness::Alive(10 * MS))
                .disconnect_signal(Some(cluster::Signal::TERM))
                .back_off(MS)
                .max_failures(0);
            let pool = Pool::new(master, options);
            let restore = shortage();
            let failures = Cell::new(0);
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::WorkerFailed(failure) => {
                    assert_eq!(failure.worker, None, "{failure}");
                    failures.set(failures.get() + 1);
                    if failures.get() == 3 {
                        restore();
                    }
                }
                PoolEvent::QuorumReached => {
                    log.add(format!("{} ready", pool.status(master).ready_workers()));
                    pool.stop(master);
                }
                PoolEvent::FailureLimitReached { .. } => log.add(event.to_string()),
                _ => {}
            });
        },
        |_| unreachable!("the workers run /bin/sleep"),
    );
    assert_eq!(entries.take(), ["2 ready"]);
}

fn slots_fill_after_a_shortage_of_descriptors() {
    fill_slots_after(|| Box::new(leave_free(0)));
}

fn slots_fill_after_a_shortage_of_processes() {
    fill_slots_after(|| {
        become_user(unique_user());
        let (soft, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, 1, hard).unwrap();
        Box::new(move || setrlimit(Resource::RLIMIT_NPROC, soft, hard).unwrap())
    });
}

/// Size in bytes of the memory that the master shares with its workers: twice the memory limit.
const SHARED: usize = 64 << 20;

/// Runs a worker in a copy of a master that uses more memory than a worker may use. The pool must
/// not replace the worker before the worker has written to this memory, and so has its own copy.
fn memory_shared_with_the_master_does_not_count_towards_the_limit() {
    let log = Log::default();
    let entries = log.clone();
    let shared = Rc::new(RefCell::new(vec![1u8; SHARED]));
    cluster(
        |master| {
            let copied = Rc::clone(&shared);
            master.setup_master(Settings::default().main(move |worker| {
                let grown = Rc::clone(&copied);
                worker.on_message(move |_, _| grown.borrow_mut().fill(2));
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.incoming().for_each(drop);
                0
            }));
            let limit = u64::try_from(SHARED / 2).unwrap();
            let options = PoolOptions::default()
                .workers(1)
                .min_ready_time(MS)
                .check_interval(MS)
                .max_memory(Some(limit));
            let pool = Pool::new(master, options);
            let first = log.clone();
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::Recycling { .. } => first.add("recycled"),
                PoolEvent::WorkerShutDown { .. } => pool.stop(master),
                _ => {}
            });
            // Let the pool check the worker about 100 times before the worker grows.
            master.set_timeout(100 * MS, move |master| {
                log.add("grows");
                let _ = master.workers()[0].send(b"grow").unwrap();
            });
        },
        |_| unreachable!("the workers execute no program"),
    );
    assert_eq!(entries.take(), ["grows", "recycled"]);
}
