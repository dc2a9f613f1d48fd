//! Tests that each callback of a pool may call each method of the pool and of the master.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions};
use cluster::{Error, Role, Settings, Signal};

use super::master::MASTER_CALLS;
use super::{Call, Cluster, MS, OnDrop, Register, all_of, for_each, play_the_worker};

crate::scenarios! {
    every_callback_of_a_pool_may_call_every_method
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
