//! Tests that any callback may call any method. For each kind of callback, one process runs a
//! callback that calls the methods in a list, one after another.
//!
//! A callback is any code of the application that the crate runs: closures, iterators, conversions,
//! `as_fd`, and destructors.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::io::Write as _;
use std::net::{TcpStream, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions};
use cluster::{
    BindOptions, CallbackId, Error, ForkStep, InspectPort, Interest, Listener, LogWriter, Master,
    MasterListener, Role, SchedulingPolicy, SendOptions, Settings, Signal, SpawnOptions, UdpSocket,
    Worker, WorkerProcess,
};

use crate::harness::{cluster, with_env};

crate::scenarios! {
    every_callback_of_the_master_may_call_every_method
    every_callback_of_a_pool_may_call_every_method
    every_callback_of_a_worker_may_call_every_method
    inspect_port_closure_cannot_fork
}

const MS: Duration = Duration::from_millis(1);

/// Environment variable that names the callback that this process tests.
const CALLBACK: &str = "CALLBACK";

/// A closure that calls the methods in a list when it is first called.
type Calls = Rc<dyn Fn()>;

/// A value that runs its closure when it is dropped.
struct OnDrop(Calls);

impl Drop for OnDrop {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A source of a watch. Its `as_fd` calls the closure.
struct Source {
    stream: UnixStream,
    calls: Calls,
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (self.calls)();
        self.stream.as_fd()
    }
}

/// An environment variable's name or value. Its conversion calls the closure.
struct Late(Calls);

impl From<Late> for OsString {
    fn from(late: Late) -> Self {
        (late.0)();
        "LATE".into()
    }
}

/// Borrows the value. A `move` closure that calls this function owns the value, and therefore drops
/// it.
fn keep(_: &OnDrop) {}

fn end(worker: &WorkerProcess) {
    let _ = worker.disconnect();
}

/// Returns a readable stream and its peer. The stream remains readable at least until the peer is
/// dropped.
fn readable() -> (UnixStream, UnixStream) {
    let (here, mut there) = UnixStream::pair().unwrap();
    there.write_all(b"x").unwrap();
    (here, there)
}

/// The handles that a master's callback can use.
struct Cluster {
    master: Master,
    listener: RefCell<Option<MasterListener>>,
}

/// Name of a method or a group of methods, and a function that calls them.
type Call<C> = (&'static str, fn(&C));

/// Methods that a callback in the master's process calls. Methods that end workers come last.
const MASTER_CALLS: &[Call<Cluster>] = &[
    ("fork", |c| drop(c.master.fork())),
    ("fork_with", |c| {
        drop(c.master.fork_with([("A", "1")]));
    }),
    ("fork_as", |c| {
        drop(
            c.master
                .fork_as(SpawnOptions::new(Settings::default().silent(true)).env("A", "1")),
        );
    }),
    ("setup_master", |c| {
        c.master
            .setup_master(Settings::default().inspect_port(9000));
    }),
    ("settings", |c| drop(c.master.settings())),
    ("set_scheduling_policy", |c| {
        let _ = c.master.set_scheduling_policy(SchedulingPolicy::RoundRobin);
    }),
    ("scheduling_policy", |c| {
        let _ = c.master.scheduling_policy();
    }),
    ("workers", |c| drop(c.master.workers())),
    ("worker", |c| drop(c.master.worker(1_u32))),
    ("listen", |c| {
        let listener = c.master.listen("127.0.0.1:0").unwrap();
        let _ = listener.address();
        let _ = listener.removes_file();
        let _ = listener.set_removes_file(false);
        let _ = listener.as_fd();
        let _ = listener.name();
        listener.set_foreign_copies(listener.has_foreign_copies());
        c.listener.replace(Some(listener));
        // Replace the handle, so that the previous handle's destructor also runs.
        let other = c.master.listen("127.0.0.1:0").unwrap();
        c.listener.replace(Some(other));
    }),
    ("retain_all", |c| drop(c.master.retain_all())),
    ("ledger", |c| {
        let _ = c.master.ledger();
    }),
    ("set_max_parked", |c| c.master.set_max_parked(1)),
    ("pass_parked, receive_parked", |c| {
        let (here, there) = UnixStream::pair().unwrap();
        c.master.pass_parked(here, MS).unwrap();
        c.master.receive_parked(there, |_| {}).unwrap();
    }),
    ("wrapper_script", |c| {
        let _ = c.master.wrapper_script();
    }),
    ("log", |c| {
        LogWriter::stderr().attached_to(&c.master).line("hello")
    }),
    ("loads", |c| drop(c.master.loads())),
    ("set_scheduler", |c| {
        c.master
            .set_scheduler(|_, workers| workers.last().map(|load| load.worker));
    }),
    ("callbacks", |c| {
        let m = &c.master;
        let mut ids = vec![
            m.on_fork(|_, _| {}),
            m.on_online(|_, _| {}),
            m.on_listening(|_, _, _| {}),
            m.on_message(|_, _, _| {}),
            m.on_disconnect(|_, _| {}),
            m.on_exit(|_, _, _| {}),
            m.on_error(|_, _, _| {}),
            m.on_setup(|_, _| {}),
            m.on_signal(Signal::USR2, |_, _| {}).unwrap(),
        ];
        for worker in m.workers() {
            ids.extend([
                worker.on_online(|_, _| {}),
                worker.on_listening(|_, _, _| {}),
                worker.on_message(|_, _, _| {}),
                worker.on_disconnect(|_, _| {}),
                worker.on_exit(|_, _, _| {}),
                worker.on_error(|_, _, _| {}),
            ]);
        }
        ids.extend([
            m.on_exit_once(|_, _, _| {}),
            m.on_all_disconnected(|_| {}),
            m.on_signal_once(Signal::USR2, |_, _| {}).unwrap(),
        ]);
        for id in ids {
            m.remove_callback(id);
        }
    }),
    ("timers", |c| {
        let m = &c.master;
        for timer in [m.set_timeout(MS, |_| {}), m.set_interval(MS, |_| {})] {
            m.unreference(timer);
            m.reference(timer);
            m.clear_timer(timer);
        }
        m.set_timeout(Duration::ZERO, |_| {});
    }),
    ("watch", |c| {
        let (here, there) = readable();
        let watch = c.master.watch(here, Interest::Both, |_, _| None).unwrap();
        c.master.unreference(watch);
        c.master.reference(watch);
        c.master.unwatch(watch);
        let both = Interest::Both;
        c.master.watch(there, both, |_, _| None).unwrap();
    }),
    ("run", |c| {
        assert!(matches!(c.master.run(), Err(Error::AlreadyRunning)));
    }),
    ("dispatch", |c| {
        let outcome = c.master.dispatch(Some(Duration::ZERO));
        assert!(matches!(outcome, Err(Error::AlreadyRunning)));
    }),
    ("time_left", |c| {
        let _ = c.master.time_left();
    }),
    ("as_fd", |c| {
        let _ = c.master.as_fd();
    }),
    ("debug", |c| drop(format!("{:?}", c.master))),
    ("send", |c| {
        for worker in c.master.workers() {
            let _ = worker.send(b"hello");
            let (here, _) = readable();
            let _ = worker.send_with_fds(b"hello", vec![here.into()]);
            let options = SendOptions::new().on_written(|_, _| {});
            let _ = worker.send_with(b"hello", options);
            let too_long = vec![0; 2 << 20];
            assert!(worker.send(&too_long).is_err());
        }
    }),
    ("queries about workers", |c| {
        for worker in c.master.workers() {
            let _ = (worker.id(), worker.state(), worker.is_connected());
            let _ = (worker.is_dead(), worker.exited_after_disconnect());
            let process = worker.process();
            let _ = (process.id(), process.exit_status(), process.usage());
            drop(process.take_stdio(1));
            process.unreference();
            process.reference();
            drop(format!("{worker:?}"));
        }
    }),
    ("end the workers", |c| {
        for (number, worker) in c.master.workers().into_iter().enumerate() {
            match number % 5 {
                0 => end(&worker),
                1 => {
                    let _ = worker.disconnect_within(MS);
                }
                2 => worker.kill(Signal::TERM),
                3 => worker.destroy(Signal::TERM),
                _ => {
                    worker.process().disconnect();
                    worker.process().kill(Signal::KILL);
                }
            }
        }
    }),
    ("disconnect", |c| c.master.disconnect()),
    ("disconnect_within", |c| {
        c.master.disconnect_within(Duration::from_secs(1));
    }),
];

/// Name of a kind of callback, and a function that registers such a callback.
type Register<C> = (&'static str, fn(&C, Calls));

const MASTER_CALLBACKS: &[Register<Rc<Cluster>>] = &[
    ("on_fork", |c, calls| {
        c.master.on_fork(move |_, _| calls());
    }),
    ("on_online", |c, calls| {
        c.master.on_online(move |_, _| calls());
    }),
    ("on_listening", |c, calls| {
        c.master.on_listening(move |_, _, _| calls());
    }),
    ("on_message", |c, calls| {
        c.master.on_message(move |_, _, _| calls());
    }),
    ("on_disconnect", |c, calls| {
        c.master.on_disconnect(move |_, _| calls());
        c.master.on_message(|_, worker, _| end(worker));
    }),
    ("on_exit", |c, calls| {
        c.master.on_exit(move |_, _, _| calls());
        c.master
            .on_message(|_, worker, _| worker.process().kill(Signal::KILL));
    }),
    ("on_error", |c, calls| {
        c.master.on_error(move |_, _, _| calls());
        c.master.on_message(|_, worker, _| {
            let _ = worker.send(&vec![0; 2 << 20]);
        });
    }),
    ("on_setup", |c, calls| {
        c.master.on_setup(move |_, _| calls());
    }),
    ("on_signal", |c, calls| {
        let callback = move |_: &Master, _| calls();
        c.master.on_signal(Signal::USR1, callback).unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGUSR1).unwrap();
    }),
    ("on_online of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_online(move |_, _| calls());
    }),
    ("on_listening of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_listening(move |_, _, _| calls());
    }),
    ("on_message of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_message(move |_, _, _| calls());
    }),
    ("on_disconnect of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_disconnect(move |_, _| calls());
        worker.on_message(|_, worker, _| end(worker));
    }),
    ("on_exit of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_exit(move |_, _, _| calls());
        worker.on_message(|_, worker, _| worker.process().kill(Signal::KILL));
    }),
    ("on_error of a worker", |c, calls| {
        let worker = c.master.fork().unwrap();
        worker.on_error(move |_, _, _| calls());
        let _ = worker.send(&vec![0; 2 << 20]);
    }),
    ("on_written", |c, calls| {
        let worker = c.master.fork().unwrap();
        let options = SendOptions::new().on_written(move |_, _| calls());
        let _ = worker.send_with(b"hello", options).unwrap();
    }),
    ("on_written of a message that is lost", |c, calls| {
        let worker = c.master.fork().unwrap();
        let options = SendOptions::new().on_written(move |_, _| calls());
        let much = vec![0; 1 << 20];
        let _ = worker.send_with(&much, options).unwrap();
        worker.process().kill(Signal::KILL);
    }),
    ("set_timeout", |c, calls| {
        c.master.set_timeout(MS, move |_| calls());
    }),
    ("set_interval", |c, calls| {
        let timer = c.master.set_interval(MS, move |_| calls());
        c.master.unreference(timer);
    }),
    ("watch", |c, calls| {
        let (here, there) = readable();
        let callback = move |_: &Master, _: &UnixStream| {
            let _ = &there;
            calls();
            None
        };
        c.master.watch(here, Interest::Readable, callback).unwrap();
    }),
    ("as_fd", |c, calls| {
        in_the_loop(c, move |c| {
            let stream = readable().0;
            let source = Source { stream, calls };
            let watch = c.master.watch(source, Interest::Both, |_, _| None);
            watch.unwrap();
        });
    }),
    ("as_fd when the interest changes", |c, calls| {
        let stream = readable().0;
        let is_late = Rc::new(Cell::new(false));
        let late = Rc::clone(&is_late);
        let calls: Calls = Rc::new(move || {
            if late.get() {
                calls();
            }
        });
        let source = Source { stream, calls };
        let mut interests = [Some(Interest::Readable), None].into_iter();
        let callback = move |_: &Master, _: &Source| {
            is_late.set(true);
            interests.next().unwrap()
        };
        c.master.watch(source, Interest::Both, callback).unwrap();
    }),
    ("drop of a source", |c, calls| {
        in_the_loop(c, move |c| {
            let (here, there) = readable();
            let source = Source {
                stream: here,
                calls: Rc::new(|| {}),
            };
            let source = Holder(source, OnDrop(calls));
            let watch = c.master.watch(source, Interest::Readable, |_, _| None);
            c.master.unwatch(watch.unwrap());
            drop(there);
        });
    }),
    ("disconnect", |c, calls| {
        c.master.on_message(move |master, _, _| {
            let calls = Rc::clone(&calls);
            master.on_all_disconnected_once(move |_| calls());
            master.disconnect();
        });
    }),
    ("disconnect_within", |c, calls| {
        c.master.on_message(move |master, _, _| {
            let calls = Rc::clone(&calls);
            master.on_all_disconnected_once(move |_| calls());
            master.disconnect_within(Duration::from_secs(1));
        });
    }),
    ("set_scheduler", |c, calls| {
        c.master.set_scheduler(move |_, workers| {
            calls();
            workers.first().map(|load| load.worker)
        });
    }),
    ("drop of a scheduler", |c, calls| {
        let on_drop = OnDrop(calls);
        c.master.set_scheduler(move |_, _| {
            let _ = &on_drop;
            None
        });
        in_the_loop(c, |c| c.master.set_scheduler(|_, _| None));
    }),
    ("inspect_port", |c, calls| {
        in_the_loop(c, move |c| {
            let port = InspectPort::new(move || {
                calls();
                9000
            });
            let _ = c.master.fork_as(Settings::default().inspect_port(port));
        });
    }),
    ("drop of settings", |c, calls| {
        let on_drop = OnDrop(calls);
        let main = move |_| {
            let _ = &on_drop;
            0
        };
        c.master.setup_master(Settings::default().main(main));
        in_the_loop(c, |c| {
            c.master
                .setup_master(Settings::default().main(play_the_worker));
        });
    }),
    ("iterator of variables", |c, calls| {
        in_the_loop(c, move |c| {
            let env = std::iter::once_with(|| {
                calls();
                ("A", "1")
            });
            drop(c.master.fork_with(env));
        });
    }),
    ("variable that is converted late", |c, calls| {
        in_the_loop(c, move |c| {
            drop(c.master.fork_with([(Late(calls), "1")]));
        });
    }),
    ("drop of a callback", |c, calls| {
        let on_drop = OnDrop(calls);
        let id = c.master.on_message(move |_, _, _| keep(&on_drop));
        in_the_loop(c, move |c| c.master.remove_callback(id));
    }),
    ("drop of a callback that is called once", |c, calls| {
        let on_drop = OnDrop(calls);
        c.master.on_online_once(move |_, _| keep(&on_drop));
    }),
    ("drop of a callback of a signal", |c, calls| {
        let on_drop = OnDrop(calls);
        let callback = move |_: &Master, _| keep(&on_drop);
        let id = c.master.on_signal(Signal::USR1, callback).unwrap();
        in_the_loop(c, move |c| c.master.remove_callback(id));
    }),
    ("drop of a timer", |c, calls| {
        let on_drop = OnDrop(calls);
        let timer = c.master.set_timeout(MS * 1000, move |_| keep(&on_drop));
        in_the_loop(c, move |c| c.master.clear_timer(timer));
    }),
    ("drop of a watch's callback", |c, calls| {
        let (here, there) = readable();
        let on_drop = OnDrop(calls);
        let callback = move |_: &Master, _: &UnixStream| {
            let _ = (&on_drop, &there);
            None
        };
        c.master.watch(here, Interest::Readable, callback).unwrap();
    }),
    (
        "drop of the callbacks of a worker that has exited",
        |c, calls| {
            let worker = c.master.fork().unwrap();
            let on_drop = OnDrop(calls);
            worker.on_message(move |_, worker, _| {
                let _ = &on_drop;
                worker.disconnect();
            });
        },
    ),
    ("drop of a receipt", |c, calls| {
        let worker = c.master.fork().unwrap();
        in_the_loop(c, move |_| {
            let on_drop = OnDrop(calls);
            let options = SendOptions::new().on_written(move |_, _| drop(on_drop));
            let _ = worker.send_with(&vec![0; 2 << 20], options);
        });
    }),
];

/// A source of a watch with an additional destructor, which runs after the `Source` is dropped.
struct Holder(Source, #[allow(dead_code)] OnDrop);

impl AsFd for Holder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs the closure once in the event loop.
fn in_the_loop(cluster: &Rc<Cluster>, call: impl FnOnce(&Cluster) + 'static) {
    let weak = Rc::downgrade(cluster);
    let timer = cluster.master.set_timeout(MS, move |_| {
        if let Some(cluster) = weak.upgrade() {
            call(&cluster);
        }
    });
    cluster.master.reference(timer);
}

/// Returns the closure that a callback calls. The closure calls the methods in `calls`, but only
/// the first time.
fn all_of<C: 'static>(
    target: &Rc<C>,
    calls: &'static [Call<C>],
    has_run: &Rc<Cell<bool>>,
) -> Calls {
    let (weak, has_run) = (Rc::downgrade(target), Rc::clone(has_run));
    Rc::new(move || {
        // Set the flag first, because a method that is called below may call this closure
        // recursively.
        if has_run.replace(true) {
            return;
        }
        let Some(target) = weak.upgrade() else {
            return;
        };
        for (name, call) in calls {
            println!("  {name}");
            call(&target);
        }
    })
}

/// Calls `play` once for each callback, in a separate process.
fn for_each<C>(callbacks: &[Register<C>], play: impl Fn(&Register<C>)) {
    for callback in callbacks {
        if std::env::var_os(CALLBACK).is_none() {
            println!("{}", callback.0);
        }
        with_env_once(callback.0, || play(callback));
    }
}

/// Runs `play` in a child process with the callback's name in the environment.
///
/// A process that tests another callback does nothing.
fn with_env_once(name: &str, play: impl FnOnce()) {
    match std::env::var_os(CALLBACK) {
        Some(own) if own == name => play(),
        Some(_) => {}
        None => with_env(CALLBACK, name, || {}),
    }
}

fn play_the_worker(worker: Worker) -> i32 {
    let _ = worker.send(b"hello");
    worker.on_message(|worker, _| {
        let _ = worker.send(b"hello again");
    });
    let Ok(listener) = worker.listen("127.0.0.1:0") else {
        return 0;
    };
    listener.set_connection_callback(|_, _| {});
    let _ = worker.run();
    0
}

/// Forks a worker that causes the events of a worker's life, and runs the master. Once the tested
/// callback has run, disconnects all workers.
fn run_until(cluster: &Cluster, has_run: &Rc<Cell<bool>>) {
    let master = &cluster.master;
    master.on_listening(|_, worker, address| {
        let address = address.to_string();
        std::thread::spawn(move || drop(TcpStream::connect(address)));
        let _ = worker.send(b"hello");
    });
    let _ = master.fork();
    let has_run = Rc::clone(has_run);
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.set_interval(MS, move |master| {
        if has_run.get() {
            // Repeat the call, because one call does not disconnect workers that are forked after
            // it.
            master.disconnect_within(Duration::from_secs(1));
            if master.workers().is_empty() {
                master.clear_timer(id.get().unwrap());
            }
        }
    })));
    master.run().unwrap();
}

fn every_callback_of_the_master_may_call_every_method() {
    for_each(MASTER_CALLBACKS, |(name, register)| {
        match cluster::init().unwrap() {
            Role::Master(master) => {
                let listener = RefCell::default();
                let cluster = Rc::new(Cluster { master, listener });
                let has_run = Rc::new(Cell::new(false));
                register(&cluster, all_of(&cluster, MASTER_CALLS, &has_run));
                run_until(&cluster, &has_run);
                assert!(has_run.get(), "{name}");
            }
            Role::Worker(worker) => {
                let code = play_the_worker(worker);
                std::process::exit(code);
            }
        }
    });
}

/// The handles that a pool's callback can use.
struct Pooled {
    cluster: Rc<Cluster>,
    pool: Pool,
}

const POOL_CALLS: &[Call<Pooled>] = &[
    ("the master's", |p| {
        // Leave out the methods that end the pool's workers, because the pool's own methods are
        // called afterwards.
        let calls = MASTER_CALLS.iter();
        let ending = ["end the workers", "disconnect", "disconnect_within"];
        for (name, call) in calls.filter(|(name, _)| !ending.contains(name)) {
            println!("    {name}");
            call(&p.cluster);
        }
    }),
    ("callbacks", |p| {
        p.pool.on_event(|_, _, _| {});
        p.pool
            .set_failure_limit_callback(|_, _, _| cluster::pool::FailureAction::StopPool);
    }),
    ("listen", |p| {
        p.pool.listen(&p.cluster.master, "127.0.0.1:0").unwrap();
    }),
    ("queries", |p| {
        let _ = (p.pool.slots(), p.pool.is_stopping(), p.pool.has_quorum());
        let status = p.pool.status(&p.cluster.master);
        let _ = (
            status.ready_workers(),
            status.to_json(),
            status.to_prometheus(),
        );
        drop(format!("{:?}", p.pool));
    }),
    ("scale", |p| p.pool.scale(&p.cluster.master, 2)),
    ("reload", |p| p.pool.reload(&p.cluster.master)),
    ("reload_with", |p| {
        p.pool.reload_with(&p.cluster.master, Settings::default());
    }),
    ("cancel_reload", |p| p.pool.cancel_reload(&p.cluster.master)),
    ("retry", |p| p.pool.retry(&p.cluster.master)),
    ("notify_systemd", |p| {
        let _ = p.pool.notify_systemd(&p.cluster.master);
    }),
    ("on_default_signals", |p| {
        p.pool.on_default_signals(&p.cluster.master).unwrap();
    }),
    ("stop", |p| p.pool.stop(&p.cluster.master)),
    ("stop_at_once", |p| p.pool.stop_at_once(&p.cluster.master)),
];

const POOL_CALLBACKS: &[Register<Rc<Pooled>>] = &[
    ("on_event", |p, calls| {
        p.pool.on_event(move |_, _, _| calls());
    }),
    ("set_failure_limit_callback", |p, calls| {
        p.pool.set_failure_limit_callback(move |_, _, _| {
            calls();
            cluster::pool::FailureAction::StopPool
        });
        let master = &p.cluster.master;
        master.on_message(|_, worker, _| worker.process().kill(Signal::KILL));
    }),
    ("drop of the callback for giving up", |p, calls| {
        let on_drop = OnDrop(calls);
        p.pool.set_failure_limit_callback(move |_, _, _| {
            let _ = &on_drop;
            cluster::pool::FailureAction::StopPool
        });
        let weak = Rc::downgrade(p);
        p.cluster.master.set_timeout(MS, move |_| {
            let pooled = weak.upgrade().unwrap();
            pooled
                .pool
                .set_failure_limit_callback(|_, _, _| cluster::pool::FailureAction::StopPool);
        });
    }),
];

fn every_callback_of_a_pool_may_call_every_method() {
    for_each(POOL_CALLBACKS, |(name, register)| {
        match cluster::init().unwrap() {
            Role::Master(master) => {
                let options = PoolOptions::default()
                    .workers(1)
                    .max_failures(1)
                    .failure_window(Duration::from_secs(60))
                    .back_off(MS)
                    .min_ready_time(MS);
                let pool = Pool::new(&master, options);
                let listener = RefCell::default();
                let cluster = Rc::new(Cluster { master, listener });
                let pooled = Rc::new(Pooled { cluster, pool });
                let has_run = Rc::new(Cell::new(false));
                register(&pooled, all_of(&pooled, POOL_CALLS, &has_run));
                let ran = Rc::clone(&has_run);
                let master = &pooled.cluster.master;
                let own = Rc::new(Cell::new(None));
                let id = Rc::clone(&own);
                own.set(Some(master.set_interval(MS, move |master| {
                    if ran.get() {
                        master.disconnect_within(Duration::from_secs(1));
                        if master.workers().is_empty() {
                            master.clear_timer(id.get().unwrap());
                        }
                    }
                })));
                // The calls may kill workers until the pool gives up.
                let outcome = master.run();
                let has_ended = matches!(outcome, Ok(()) | Err(Error::GaveUp { .. }));
                assert!(has_ended && has_run.get(), "{name}: {outcome:?}");
            }
            Role::Worker(worker) => {
                let code = play_the_worker(worker);
                std::process::exit(code);
            }
        }
    });
}

/// The handles that a worker's callback can use.
struct Own {
    worker: Worker,
    listener: Listener,
    udp: UdpSocket,
    connections: RefCell<Vec<cluster::Connection>>,
}

const WORKER_CALLS: &[Call<Own>] = &[
    ("queries", |o| {
        let w = &o.worker;
        let _ = (w.id(), w.inspect_port(), w.is_connected(), w.is_dead());
        let _ = (w.exited_after_disconnect(), w.process().id(), w.time_left());
        let _ = (
            w.is_disconnecting(),
            w.disconnect_token().is_disconnecting(),
        );
        let _ = (
            w.as_fd(),
            o.listener.local_addr().unwrap(),
            o.udp.local_addr().unwrap(),
        );
        drop(format!("{w:?} {:?} {:?}", o.listener, o.udp));
    }),
    ("listen", |o| {
        let other = o.worker.listen("127.0.0.1:0");
        drop(other);
        let served = o.worker.listen("127.0.0.1:0");
        if let Ok(served) = served {
            served.set_connection_callback(|_, _| {});
            served.set_drop_callback(|_, _| {});
            served.remove_drop_callback();
            served.remove_connection_callback();
            served.set_connection_callback(|_, _| {});
            served.set_max_connections(Some(1));
            served.unreference();
            served.reference();
            served.close();
        }
    }),
    ("bind", |o| {
        if let Ok(udp) = o.worker.bind("127.0.0.1:0") {
            udp.set_message_callback(|_, _, _, _| {});
            udp.remove_message_callback();
            udp.set_message_callback(|_, _, _, _| {});
            udp.unreference();
            udp.reference();
            udp.close();
        }
        if let Ok(alone) = o
            .worker
            .bind(BindOptions::from("127.0.0.1:0").exclusive(true))
        {
            drop(alone);
        }
    }),
    ("adopt", |o| {
        let stream = UnixStream::pair().unwrap().0;
        drop(o.worker.adopt(stream));
        drop(o.worker.adopt(UnixStream::pair().unwrap().0).into_stream());
        o.worker.adopt(UnixStream::pair().unwrap().0).finish();
    }),
    ("connections", |o| {
        for connection in o.connections.take() {
            let _ = (connection.requests(), connection.can_park());
            connection.park();
        }
        drop(o.worker.adopt(UnixStream::pair().unwrap().0).into_parts());
        o.worker.adopt(UnixStream::pair().unwrap().0).park();
    }),
    ("send", |o| {
        let _ = o.worker.send(b"hello");
        let fd: OwnedFd = UnixStream::pair().unwrap().0.into();
        let _ = o.worker.send_with_fds(b"hello", vec![fd]);
        let options = SendOptions::new().on_written(|_, _| {});
        let _ = o.worker.send_with(b"hello", options);
        assert!(o.worker.send(&vec![0; 2 << 20]).is_err());
    }),
    ("callbacks", |o| {
        let w = &o.worker;
        let ids: [CallbackId; 7] = [
            w.on_message(|_, _| {}),
            w.on_disconnect(|_| {}),
            w.on_disconnecting(|_| {}),
            w.on_error(|_, _| {}),
            w.on_signal(Signal::USR2, |_, _| {}).unwrap(),
            w.on_error_once(|_, _| {}),
            w.on_signal_once(Signal::USR2, |_, _| {}).unwrap(),
        ];
        for id in ids {
            w.remove_callback(id);
        }
    }),
    ("timers", |o| {
        let w = &o.worker;
        for timer in [w.set_timeout(MS, |_| {}), w.set_interval(MS, |_| {})] {
            w.unreference(timer);
            w.reference(timer);
            w.clear_timer(timer);
        }
    }),
    ("watch", |o| {
        let (here, there) = readable();
        let watch = o.worker.watch(here, Interest::Both, |_, _| None).unwrap();
        o.worker.unreference(watch);
        o.worker.reference(watch);
        o.worker.unwatch(watch);
        let both = Interest::Both;
        o.worker.watch(there, both, |_, _| None).unwrap();
    }),
    ("loops", |o| {
        let is_running = |outcome: Result<(), Error>| {
            assert!(matches!(outcome, Err(Error::AlreadyRunning)), "{outcome:?}");
        };
        is_running(o.worker.run());
        is_running(o.worker.dispatch(Some(Duration::ZERO)));
        is_running(o.listener.accept().map(drop));
        is_running(o.listener.incoming().next().unwrap().map(drop));
        is_running(o.udp.recv_from(&mut [0]).map(drop));
    }),
    ("datagrams", |o| {
        let _ = o.udp.send_to(b"x", o.udp.local_addr().unwrap());
        drop(o.udp.try_clone());
        o.udp.set_message_callback(|_, _, _, _| {});
        o.udp.unreference();
        o.udp.reference();
    }),
    ("listener", |o| {
        o.listener.set_max_connections(Some(1));
        o.listener.set_max_connections(None);
        o.listener.unreference();
        o.listener.reference();
        o.listener.set_drop_callback(|_, _| {});
        o.listener.set_connection_callback(|_, _| {});
    }),
    ("reference", |o| {
        o.worker.process().unreference();
        o.worker.process().reference();
    }),
    ("close", |o| {
        o.listener.close();
        o.udp.close();
    }),
    ("disconnect", |o| {
        let _ = o.worker.disconnect();
    }),
    ("kill", |o| {
        o.worker.kill();
        o.worker.destroy();
    }),
    ("close the channel", |o| o.worker.process().disconnect()),
];

const WORKER_CALLBACKS: &[Register<Rc<Own>>] = &[
    ("on_message", |o, calls| {
        o.worker.on_message(move |_, _| calls());
    }),
    ("on_disconnect", |o, calls| {
        o.worker.on_disconnect(move |_| calls());
        o.worker.disconnect();
    }),
    ("on_disconnecting", |o, calls| {
        o.worker.on_disconnecting(move |_| calls());
        o.worker.disconnect();
    }),
    ("on_signal", |o, calls| {
        let callback = move |_: &Worker, _| calls();
        o.worker.on_signal(Signal::USR1, callback).unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGUSR1).unwrap();
    }),
    ("on_connection", |o, calls| {
        o.listener.set_connection_callback(move |_, connection| {
            calls();
            drop(connection);
        });
        connect(o);
    }),
    ("on_drop", |o, calls| {
        o.listener.set_max_connections(Some(0));
        o.listener.set_connection_callback(|_, _| {});
        o.listener.set_drop_callback(move |_, connection| {
            calls();
            drop(connection);
        });
        connect(o);
    }),
    ("on_message of a socket", |o, calls| {
        o.udp.set_message_callback(move |_, _, _, _| calls());
        let client = StdUdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"x", o.udp.local_addr().unwrap()).unwrap();
    }),
    ("on_written", |o, calls| {
        let options = SendOptions::new().on_written(move |_, _| calls());
        let _ = o.worker.send_with(b"hello", options).unwrap();
    }),
    ("set_timeout", |o, calls| {
        o.worker.set_timeout(MS, move |_| calls());
    }),
    ("set_interval", |o, calls| {
        let timer = o.worker.set_interval(MS, move |_| calls());
        o.worker.unreference(timer);
    }),
    ("watch", |o, calls| {
        let (here, there) = readable();
        let callback = move |_: &Worker, _: &UnixStream| {
            let _ = &there;
            calls();
            None
        };
        o.worker.watch(here, Interest::Readable, callback).unwrap();
    }),
    ("as_fd", |o, calls| {
        o.worker.set_timeout(MS, move |worker| {
            let stream = readable().0;
            let source = Source { stream, calls };
            worker.watch(source, Interest::Both, |_, _| None).unwrap();
        });
    }),
    ("drop of a source", |o, calls| {
        o.worker.set_timeout(MS, move |worker| {
            let source = Source {
                stream: readable().0,
                calls: Rc::new(|| {}),
            };
            let source = Holder(source, OnDrop(calls));
            let watch = worker.watch(source, Interest::Readable, |_, _| None);
            worker.unwatch(watch.unwrap());
        });
    }),
    ("drop of a callback", |o, calls| {
        let on_drop = OnDrop(calls);
        let id = o.worker.on_message(move |_, _| keep(&on_drop));
        o.worker
            .set_timeout(MS, move |worker| worker.remove_callback(id));
    }),
    ("drop of a timer", |o, calls| {
        let on_drop = OnDrop(calls);
        let timer = o.worker.set_timeout(MS * 1000, move |_| keep(&on_drop));
        o.worker
            .set_timeout(MS, move |worker| worker.clear_timer(timer));
    }),
    ("drop of a callback of a listener", |o, calls| {
        let on_drop = OnDrop(calls);
        o.listener
            .set_connection_callback(move |_, _| keep(&on_drop));
        let own = Rc::downgrade(o);
        o.worker.set_timeout(MS, move |_| {
            let own = own.upgrade().unwrap();
            own.listener.set_connection_callback(|_, _| {});
        });
    }),
    ("drop of a callback of a socket", |o, calls| {
        let on_drop = OnDrop(calls);
        o.udp.set_message_callback(move |_, _, _, _| keep(&on_drop));
        let own = Rc::downgrade(o);
        o.worker
            .set_timeout(MS, move |_| own.upgrade().unwrap().udp.close());
    }),
    ("drop of a receipt", |o, calls| {
        o.worker.set_timeout(MS, move |worker| {
            let on_drop = OnDrop(calls);
            let options = SendOptions::new().on_written(move |_, _| drop(on_drop));
            let sent = worker.send_with(&vec![0; 2 << 20], options);
            assert!(sent.is_err());
        });
    }),
];

/// Connects a client to the worker's listener from another thread.
fn connect(own: &Own) {
    let address = own.listener.local_addr().unwrap();
    std::thread::spawn(move || drop(TcpStream::connect(address)));
}

/// Tests each kind of callback in its own worker.
fn every_callback_of_a_worker_may_call_every_method() {
    cluster(
        |master| {
            for (name, _) in WORKER_CALLBACKS {
                let worker = master.fork_with([(CALLBACK, *name)]).unwrap();
                worker.on_exit(move |_, _, status| {
                    assert!(status.success(), "{name}: {status}");
                });
                worker.on_listening(|_, worker, _| {
                    let _ = worker.send(b"hello");
                });
            }
        },
        |worker| {
            let name = std::env::var(CALLBACK).unwrap();
            let known = WORKER_CALLBACKS.iter().find(|(known, _)| *known == name);
            let (_, register) = known.unwrap();
            println!("{name}");
            // Listen on a different address in each worker, so that its client does not reach
            // another worker.
            let address = format!("127.0.0.{}:0", worker.id());
            let listener = worker.listen(address.as_str()).unwrap();
            let udp = worker.bind(BindOptions::from("127.0.0.1:0").exclusive(true));
            let own = Rc::new(Own {
                worker,
                listener,
                udp: udp.unwrap(),
                connections: RefCell::default(),
            });
            let has_run = Rc::new(Cell::new(false));
            register(&own, all_of(&own, WORKER_CALLS, &has_run));
            own.worker.run().unwrap();
            assert!(has_run.get(), "{name}");
        },
    );
}

/// Checks that `fork` fails inside the closure that chooses the inspect port. If `fork` succeeded
/// there, it would call the closure for the new worker, and recurse forever.
fn inspect_port_closure_cannot_fork() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let master = Rc::new(master);
            let weak = Rc::downgrade(&master);
            let refused = Rc::new(Cell::new(0));
            let count = Rc::clone(&refused);
            let port = InspectPort::new(move || {
                let error = weak.upgrade().unwrap().fork().unwrap_err();
                let Error::Fork { step, .. } = &error else {
                    panic!("{error}");
                };
                assert_eq!(*step, ForkStep::InspectPort);
                count.set(count.get() + 1);
                9000
            });
            master.setup_master(Settings::default().inspect_port(port));
            for forks in 1..=2 {
                master.fork().unwrap();
                assert_eq!(refused.get(), forks);
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => assert_eq!(worker.inspect_port(), Some(9000)),
    }
}
