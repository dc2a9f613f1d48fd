//! Adds and removes timers, watched descriptors, callbacks and signals in both roles.

use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::{Interest, Master, Signal, Worker};
use nix::sys::signal::raise;

use crate::harness::{SIGNALS, cluster};
use crate::long_lived::{LongLived, run_orders};
use crate::measure::{Sample, Series};

crate::scenarios! {
    timers_watches_callbacks_and_signals_leave_memory_bounded
}

const LATER: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(1);

/// Defines a function that adds timers, watches, callbacks and signal callbacks. Some of them fire,
/// and the function removes the others.
///
/// This is a macro, because `Master` and `Worker` have the same methods but share no trait.
macro_rules! one_of_everything {
    ($name:ident, $role:ty, $on_message:expr, $on_error:expr) => {
        fn $name(role: &$role, number: u64) {
            let happened = Rc::new(Cell::new(0));
            let count = || {
                let happened = Rc::clone(&happened);
                move || happened.set(happened.get() + 1)
            };
            let once = count();
            role.set_timeout(Duration::ZERO, move |_| once());
            let timer = role.set_timeout(LATER, |_| unreachable!());
            role.unreference(timer);
            let interval = role.set_interval(LATER, |_| unreachable!());

            let (near, far) = UnixStream::pair().unwrap();
            let readable = count();
            let watch = move |_: &$role, _: &UnixStream| {
                readable();
                None
            };
            role.watch(near, Interest::Readable, watch).unwrap();
            drop(far);
            let (near, far) = UnixStream::pair().unwrap();
            let silent = role.watch(near, Interest::Readable, |_, _| unreachable!());

            let on_message = role.on_message($on_message);
            let on_error = role.on_error_once($on_error);
            let on_signal = role.on_signal(Signal::USR1, |_, _| unreachable!());
            let signal = count();
            role.on_signal_once(Signal::USR2, move |_, _| signal())
                .unwrap();
            raise(nix::sys::signal::SIGUSR2).unwrap();

            let mut all = 3;
            if number % 100 == 0 {
                let tick = count();
                let own = Rc::new(Cell::new(None));
                let id = Rc::clone(&own);
                own.set(Some(role.set_interval(SOON, move |role| {
                    tick();
                    role.clear_timer(id.get().unwrap());
                })));
                all += 1;
            }
            while happened.get() < all {
                role.dispatch(None).unwrap();
            }
            role.clear_timer(timer);
            role.clear_timer(interval);
            role.unwatch(silent.unwrap());
            drop(far);
            for id in [on_message, on_error, on_signal.unwrap()] {
                role.remove_callback(id);
            }
        }
    };
}

one_of_everything!(use_all_in_master, Master, |_, _, _| {}, |_, _, _| {});
one_of_everything!(use_all_in_worker, Worker, |_, _| {}, |_, _| {});

fn timers_watches_callbacks_and_signals_leave_memory_bounded() {
    cluster(play, |worker| {
        run_orders(&worker, |worker, count| {
            for number in 0..count {
                use_all_in_worker(worker, number);
            }
        });
    });
}

fn play(master: &Master) {
    SIGNALS.store(true, Ordering::SeqCst);
    let mut long_lived = LongLived::new(master.fork().unwrap(), "loop");
    let mut series = Series::new("loop, master");
    let repetitions = crate::work_per_round(2000);
    for _ in 0..crate::ROUNDS {
        long_lived.order(repetitions);
        for number in 0..repetitions {
            use_all_in_master(master, number);
        }
        long_lived.wait(master);
        long_lived.measure(master);
        series.add(Sample::now());
    }
    println!(
        "loop: {} repetitions in each role",
        repetitions * crate::ROUNDS
    );
    series.check();
    long_lived.check();
    master.disconnect();
}
