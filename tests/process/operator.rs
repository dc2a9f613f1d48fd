//! Checks what a pool does if its operator sends signals twice, in an unusual order, or to a master
//! that cannot act on them.

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use cluster::pool::{Pool, PoolEvent, ignore_pool_signals};
use cluster::{Error, Role};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{is_watched, wait_for_state, wait_until};
use crate::host::{is_process_1, output_of, start_as_process_1};
use crate::pool::{HOLD, Server, pid, quick, server, wait_for_exit};

crate::scenarios! {
    stop_signal_that_arrives_twice_spares_clients
    stop_signal_after_an_upgrade_spares_clients
    sigquit_after_an_upgrade_spares_the_new_master
    repeated_upgrade_signal_starts_one_new_master
    stop_signal_during_a_reload_ends_the_reload
    scaled_size_survives_an_upgrade
    process_1_refuses_an_upgrade: PID_NAMESPACE
    signals_that_arrive_together_are_all_handled
    worker_of_a_pool_ignores_the_signals_of_the_pool
}

/// A client that keeps a worker busy until [`BusyClient::finish`] is called.
struct BusyClient(TcpStream);

impl BusyClient {
    fn connect(server: &Server) -> Self {
        let mut client = TcpStream::connect(server.address).unwrap();
        client.write_all(HOLD).unwrap();
        client.read_exact(&mut [0; HOLD.len()]).unwrap();
        Self(client)
    }

    /// Sends the rest of the request, and asserts that the worker closes the connection normally.
    fn finish(mut self) {
        self.0.write_all(&[0; 512]).unwrap();
        let length = self.0.read(&mut [0]).expect("the worker was killed");
        assert_eq!(length, 0);
    }
}

/// Upgrades the server, and waits until the new master has taken over. Returns the old master,
/// which continues while a client keeps one of its workers busy.
fn upgrade(server: &Server) -> Pid {
    let old = server.master();
    server.signal(Signal::SIGUSR2);
    server.wait_for(&format!("{old}: a new master has taken over"), 1);
    assert_ne!(server.master(), old);
    old
}

fn stop_signal_that_arrives_twice_spares_clients() {
    if is_watched() {
        return server(quick());
    }
    for signals in [
        [Signal::SIGINT, Signal::SIGINT],
        [Signal::SIGTERM, Signal::SIGINT],
    ] {
        let server = Server::start("rr");
        let client = BusyClient::connect(&server);
        for signal in signals {
            server.signal(signal);
        }
        // The idle worker exits only after the master has handled the first signal.
        server.wait_for(" has exited", 1);
        client.finish();
        let master = server.master();
        server.finish(master, |server| assert_eq!(server.count(" was killed"), 0));
    }
}

fn stop_signal_after_an_upgrade_spares_clients() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let client = BusyClient::connect(&server);
    let old = upgrade(&server);
    // Normally, a stop signal kills the workers if it arrives more than one second after the start
    // of a stop. It must not if the pool stops because of an upgrade.
    std::thread::sleep(Duration::from_millis(1100));
    for signal in [Signal::SIGTERM, Signal::SIGTERM, Signal::SIGINT] {
        kill(old, signal).unwrap();
    }
    client.finish();
    wait_for_exit(old);
    server.stop_and_check(|server| assert_eq!(server.count(" was killed"), 0));
}

fn sigquit_after_an_upgrade_spares_the_new_master() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let client = BusyClient::connect(&server);
    let old = upgrade(&server);
    kill(old, Signal::SIGQUIT).unwrap();
    wait_for_exit(old);
    drop(client);
    BusyClient::connect(&server).finish();
    server.stop_and_check(|server| assert!(server.count(" was killed") >= 1));
}

fn repeated_upgrade_signal_starts_one_new_master() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let client = BusyClient::connect(&server);
    let old = server.master();
    kill(old, Signal::SIGUSR2).unwrap();
    wait_until("a new master", || (server.master() != old).then_some(()));
    kill(old, Signal::SIGUSR2).unwrap();
    server.wait_for(&format!("{old}: a new master has taken over"), 1);
    // These signals arrive while the old master drains, and must start no third master.
    for signal in [Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGTTIN] {
        kill(old, signal).unwrap();
    }
    client.finish();
    wait_for_exit(old);
    assert_eq!(server.masters().len(), 2, "{}", server.group.output());
    server.stop_and_check(|server| assert_eq!(server.count(" was killed"), 0));
}

fn stop_signal_during_a_reload_ends_the_reload() {
    if is_watched() {
        return server(quick().min_ready_time(Duration::from_secs(1000)));
    }
    let server = Server::start("rr");
    let client = BusyClient::connect(&server);
    // The first reload cannot end, because the minimum ready time is 1,000 seconds. The second
    // reload waits for the first one.
    server.signal(Signal::SIGHUP);
    server.wait_for("worker 3 is ready", 1);
    server.signal(Signal::SIGHUP);
    server.signal(Signal::SIGTERM);
    server.wait_for(" has exited", 2);
    client.finish();
    let master = server.master();
    server.finish(master, |server| assert_eq!(server.count(" was killed"), 0));
}

fn scaled_size_survives_an_upgrade() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    server.signal(Signal::SIGTTIN);
    server.wait_for("slot 2: worker 3 is ready", 1);
    // In the second upgrade, the master passes on a size that it has itself received.
    for _ in 0..2 {
        let old = upgrade(&server);
        let new = server.master();
        server.wait_for(&format!("{new}: slot 2: worker 3 is ready"), 1);
        wait_for_exit(old);
    }
    // Scale down to the configured size. The size of the next new master must then come from its
    // own options.
    server.signal(Signal::SIGTTOU);
    // Expect one line about this master's worker 3, and one about that of each old master.
    server.wait_for("slot 2: worker 3 has exited", 1 + 2);
    let old = upgrade(&server);
    wait_for_exit(old);
    server.wait_for(": ready", 4);
    assert_eq!(server.workers().len(), 2);
    server.stop();
}

/// Checks that process 1 of a PID namespace refuses an upgrade by signal and by call, and continues
/// to serve.
fn process_1_refuses_an_upgrade() {
    if is_process_1() {
        return run_process_1();
    }
    let mut first = start_as_process_1("1");
    let mut lines = output_of(&mut first).lines();
    let mut wait_for = |text: &str| {
        let mut lines = lines.by_ref().map(Result::unwrap);
        let line = lines.find(|line| line.contains(text));
        line.unwrap_or_else(|| panic!("process 1 has exited without {text:?}"))
    };
    let process = Pid::from_raw(i32::try_from(first.id()).unwrap());
    wait_for("ready");
    kill(process, Signal::SIGUSR2).unwrap();
    let line = wait_for("new master");
    assert!(
        line.starts_with("the new master failed: process 1"),
        "{line}"
    );
    kill(process, Signal::SIGHUP).unwrap();
    wait_for("generation 1 serves");
    kill(process, Signal::SIGTERM).unwrap();
    assert!(first.wait().unwrap().success());
}

fn run_process_1() {
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let pool = Pool::new(&master, quick());
            pool.adopt(&master, passed).unwrap();
            pool.on_event(|pool, master, event| {
                if *event == PoolEvent::QuorumReached && std::process::id() == 1 {
                    let refused = pool.upgrade(master);
                    assert!(matches!(refused, Err(Error::InitProcess)), "{refused:?}");
                }
                println!("{event}");
            });
            pool.on_default_signals(&master).unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            worker
                .listen("127.0.0.1:0")
                .unwrap()
                .incoming()
                .for_each(drop);
        }
    }
}

/// Sends several signals while the master is stopped, so that the kernel delivers them together.
fn signals_that_arrive_together_are_all_handled() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let master = server.master();
    kill(master, Signal::SIGSTOP).unwrap();
    wait_for_state(pid(master), ") T ");
    for signal in [
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGUSR2,
        Signal::SIGCHLD,
    ] {
        kill(master, signal).unwrap();
    }
    kill(master, Signal::SIGCONT).unwrap();
    // The signals are handled in the order of their numbers.
    server.finish(master, |server| {
        for outcome in [
            "reloading to generation 1",
            "the new master failed: the pool is stopping",
        ] {
            assert_eq!(server.count(&format!("{master}: {outcome}")), 1);
        }
    });
}

/// Sends the pool's signals to both workers, and then keeps both busy with a client each.
fn worker_of_a_pool_ignores_the_signals_of_the_pool() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let workers = server.workers();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
        Signal::SIGUSR2,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
    ] {
        for worker in &workers {
            kill(*worker, signal).unwrap();
        }
        let clients = [(); 2].map(|()| BusyClient::connect(&server));
        assert_eq!(server.workers(), workers, "{signal}");
        clients.into_iter().for_each(BusyClient::finish);
    }
    server.stop();
}
