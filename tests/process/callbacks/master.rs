//! Tests that each callback in the master may call each method of the master.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Error, ForkStep, InspectPort, Interest, LogWriter, Master, Role, SchedulingPolicy, SendOptions,
    Settings, Signal, SpawnOptions, WorkerProcess,
};

use super::{
    Call, Calls, Cluster, Holder, MS, OnDrop, Register, Source, all_of, for_each, keep,
    play_the_worker, readable,
};

crate::scenarios! {
    every_callback_of_the_master_may_call_every_method
    inspect_port_closure_cannot_fork
}

/// An environment variable's name or value. Its conversion calls the closure.
struct Late(Calls);

impl From<Late> for OsString {
    fn from(late: Late) -> Self {
        (late.0)();
        "LATE".into()
    }
}

fn end(worker: &WorkerProcess) {
    let _ = worker.disconnect();
}

/// Methods that a callback in the master's process calls. Methods that end workers come last.
pub const MASTER_CALLS: &[Call<Cluster>] = &[
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
