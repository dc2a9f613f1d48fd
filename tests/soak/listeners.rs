//! Opens and closes listeners and sockets in two workers, both shared ones and each worker's own.

use std::cell::Cell;
use std::net::TcpStream;
use std::path::Path;
use std::rc::Rc;

use cluster::{BindOptions, ListenOptions, Master, Settings, Worker};

use crate::harness::{answer, cluster, read_answer};
use crate::long_lived::{LongLived, run_orders};
use crate::measure::{Sample, Series};

crate::scenarios! {
    listeners_with_round_robin_leave_memory_bounded
    shared_listeners_leave_memory_bounded
}

fn listeners_with_round_robin_leave_memory_bounded() {
    cluster(|master| play(master, "opened by master"), serve);
}

fn shared_listeners_leave_memory_bounded() {
    let play = |master: &Master| {
        crate::harness::share_listeners(master);
        play(master, "opened and shared");
    };
    cluster(play, serve);
}

fn serve(worker: Worker) {
    let opened = Cell::new(0);
    run_orders(&worker, |worker, count| {
        for _ in 0..count {
            open_and_close(worker, opened.get());
            opened.set(opened.get() + 1);
        }
    });
}

fn open_and_close(worker: &Worker, number: u64) {
    match number % 8 {
        0 => drop(worker.listen(0).unwrap()),
        1 => drop(worker.listen("127.0.0.1:0").unwrap()),
        // Alternate between the path `unix`, which is opened repeatedly, and a path that this
        // worker opens only once.
        2 if number % 16 == 2 => drop(worker.listen(Path::new("unix")).unwrap()),
        2 => drop(worker.listen(Path::new(&format!("unix{number}"))).unwrap()),
        3 => drop(worker.bind(BindOptions::from("127.0.0.1:0")).unwrap()),
        4 => drop(
            worker
                .listen(ListenOptions::from(0).exclusive(true))
                .unwrap(),
        ),
        5 => {
            let options = BindOptions::from("127.0.0.1:0").exclusive(true);
            drop(worker.bind(options).unwrap());
        }
        6 => drop([(); 3].map(|()| worker.listen(0).unwrap())),
        // Binding this address fails, because no interface has it. It is reserved for documentation
        // (RFC 5737).
        _ => drop(worker.listen("192.0.2.1:0").unwrap_err()),
    }
    if number % 200 == 10 {
        use_one(worker);
    }
}

/// Connects to a listener before closing it. The close then takes another code path, because
/// clients may be in flight.
fn use_one(worker: &Worker) {
    let listener = worker.listen::<TcpStream>("127.0.0.1:0").unwrap();
    answer(&listener, "here");
    assert_eq!(read_answer(worker, listener.local_addr().unwrap()), "here");
    listener.close();
}

fn play(master: &Master, name: &str) {
    let directory = tempfile::tempdir().unwrap();
    master.setup_master(Settings::default().cwd(directory.path()));
    master.on_error(|_, _, error| panic!("{error}"));
    let listening = Rc::new(Cell::new(0_u64));
    let count = Rc::clone(&listening);
    master.on_listening(move |_, _, _| count.set(count.get() + 1));
    let mut workers = [(); 2].map(|()| LongLived::new(master.fork().unwrap(), name));
    let mut series = Series::new(&format!("{name}, master"));
    for _ in 0..crate::ROUNDS {
        for worker in &workers {
            worker.order(crate::work_per_round(500));
        }
        for worker in &workers {
            worker.wait(master);
        }
        // Run until no timer is left, because a listener that has had connections is closed only
        // after a short delay.
        while master.time_left().is_some() {
            master.dispatch(None).unwrap();
        }
        let files = directory.path().read_dir().unwrap();
        assert_eq!(files.count(), 0);
        for worker in &mut workers {
            worker.measure(master);
        }
        series.add(Sample::now());
    }
    println!("{name}: {} times listening", listening.get());
    series.check();
    for worker in &workers {
        worker.check();
    }
    master.disconnect();
}
