//! Tests that each callback in a worker may call each method of the worker.

use std::cell::{Cell, RefCell};
use std::net::{TcpStream, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    BindOptions, CallbackId, Error, Interest, Listener, SendOptions, Signal, UdpSocket, Worker,
};

use super::{CALLBACK, Call, Holder, MS, OnDrop, Register, Source, all_of, keep, readable};
use crate::harness::cluster;

crate::scenarios! {
    every_callback_of_a_worker_may_call_every_method
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
