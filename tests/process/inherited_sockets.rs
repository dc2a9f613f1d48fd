//! Tests which sockets a new master inherits from the old master in an upgrade, and how the new
//! master closes them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, READY, Readiness, SLOT, ignore_pool_signals};
use cluster::{ListenOptions, Master, Role, Worker, systemd};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::counting::Load;
use crate::harness::{
    Group, WATCHED, is_alive, is_watched, reserve, reserve_both_families, reserve_port, scaled,
    talk, wait_until, watched,
};

crate::scenarios! {
    port_that_the_new_release_does_not_use_closes_after_an_upgrade
    port_of_a_slow_worker_stays_open_after_an_upgrade
    port_of_an_online_worker_stays_open_until_the_worker_listens
    sockets_that_only_workers_opened_pass_to_the_new_master_rr
    sockets_that_only_workers_opened_pass_to_the_new_master_none
    sockets_that_only_workers_opened_pass_to_the_new_master_sharded
    private_socket_does_not_pass_to_the_new_master
    failed_upgrade_leaves_sockets_of_workers_to_the_workers
    stop_after_upgrades_resets_no_client_rr
    stop_after_upgrades_resets_no_client_none
    stop_after_a_failed_upgrade_resets_no_client
    stopping_master_drops_new_handshakes_after_upgrades_rr
    stopping_master_drops_new_handshakes_after_upgrades_none
    stopping_master_drops_new_handshakes_after_overlapping_upgrades
}

const MS: Duration = Duration::from_millis(1);

/// Environment variable with the path of the file that configures the service. Each line contains a
/// verb and, unless the verb is `exit`, `online` or `message`, an address:
///
/// - `pool`: the pool and the workers listen on the address.
/// - `listen`: only the workers listen on the address.
/// - `private`: each worker has its own listener on the address, with a port that the kernel chooses.
/// - `bind`: only the workers bind a datagram socket to the address.
/// - `unix`: only the workers listen on the address, which is an abstract name.
/// - `slow`: only the worker in slot 1 listens on the address, and only once the file `go` exists.
/// - `late`: only the workers listen on the address, and only once the file `go` exists.
/// - `online`: the pool treats workers as ready when they are online.
/// - `message`: the pool treats workers as ready when they have opened all sockets.
/// - `exit`: the workers exit at once.
const CONFIG: &str = "CONFIG";

/// Runs the service: a pool's master, or one of its workers.
pub fn service() {
    let passed = systemd::listen_fds().unwrap();
    let path = PathBuf::from(std::env::var_os(CONFIG).unwrap());
    let config = std::fs::read_to_string(&path).unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            println!("{} sockets were passed", passed.len());
            let options = PoolOptions::default().workers(2).quorum(Some(1)).jitter(0);
            let options = options.min_ready_time(20 * MS);
            // A new master whose workers exit must fail because of this time limit.
            let mut options = options
                .startup_timeout(scaled(2000 * MS))
                .max_failures(u32::MAX);
            for line in config.lines() {
                options = match line {
                    "online" => options.readiness(Readiness::Online),
                    "message" => options.readiness(Readiness::Message),
                    _ => options,
                };
            }
            let pool = Pool::new(&master, options);
            if let Err(error) = pool.adopt(&master, passed) {
                println!("{error}");
            }
            config
                .lines()
                .for_each(|line| configure_pool(&master, &pool, line));
            let own = std::process::id();
            pool.on_event(move |_, _, event| println!("{own}: {event}"));
            pool.on_default_signals(&master).unwrap();
            println!("master {own}");
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            let go = path.with_file_name("go");
            config
                .lines()
                .for_each(|line| configure_worker(&worker, line, &go));
            println!("worker of {} has opened its sockets", master_of_worker());
            if config.lines().any(|line| line == "message") {
                let _ = worker.send(READY).unwrap();
            }
            worker.run().unwrap();
        }
    }
}

fn configure_pool(master: &Master, pool: &Pool, line: &str) {
    match line.split_once(' ') {
        Some(("pool", path)) if path.starts_with('/') => {
            pool.listen(master, Path::new(path)).unwrap();
        }
        Some(("pool", address)) => {
            let address = pool.listen(master, address).unwrap();
            println!("pool listens on {address}");
        }
        _ => {}
    }
}

fn configure_worker(worker: &Worker, line: &str, go: &Path) {
    let (verb, address) = line.split_once(' ').unwrap_or((line, ""));
    let slot = std::env::var(SLOT).unwrap();
    match verb {
        "exit" => std::process::exit(1),
        "bind" => {
            let socket = worker.bind(address).unwrap();
            socket.set_message_callback(|_, socket, _, from| {
                let _ = socket.send_to(master_of_worker().as_bytes(), from);
            });
        }
        "slow" if slot == "1" => {
            wait_until("the file", || go.exists().then_some(()));
            serve(worker, address);
        }
        "slow" | "online" | "message" => {}
        "private" => serve_with(worker, ListenOptions::from(address).exclusive(true)),
        "late" => {
            wait_until("the file", || go.exists().then_some(()));
            serve(worker, address);
        }
        "unix" => serve_path(worker, &format!("\0{address}")),
        _ if address.starts_with('/') => serve_path(worker, address),
        _ => serve(worker, address),
    }
}

fn serve_path(worker: &Worker, path: &str) {
    let listener = worker.listen(Path::new(path)).unwrap();
    listener.set_connection_callback(|_, mut connection| {
        let _ = connection.write_all(master_of_worker().as_bytes());
    });
}

fn serve(worker: &Worker, address: &str) {
    serve_with(worker, ListenOptions::from(address));
}

fn serve_with(worker: &Worker, options: ListenOptions) {
    let listener = worker.listen(options).unwrap();
    // A worker that is already disconnecting receives a listener without an address.
    if let Some(address) = listener.local_addr() {
        println!("listens on {address}");
    }
    listener.set_connection_callback(|_, mut connection| {
        let mut request = [0; 512];
        // A request that begins with `hold` keeps the worker busy until its client hangs up.
        if connection.read(&mut request).is_ok() && request.starts_with(b"hold") {
            let _ = connection.write_all(b"hold");
            let _ = connection.read(&mut request);
        }
        let _ = connection.write_all(master_of_worker().as_bytes());
    });
}

/// Returns the process id of the worker's master. Workers send this id as the answer to each
/// client.
fn master_of_worker() -> String {
    std::os::unix::process::parent_id().to_string()
}

/// The service of a scenario, in a process group of its own.
pub struct Service {
    pub group: Group,
    config: PathBuf,
}

impl Service {
    fn start(policy: &str, config: &str) -> Self {
        Self::start_with(policy, config, Vec::new())
    }

    /// Starts the service, passes the sockets to it like systemd, and waits until the first worker
    /// is ready. The names of the sockets are `a`, `b` and so on.
    pub fn start_with(policy: &str, config: &str, passed: Vec<OwnedFd>) -> Self {
        // Become a subreaper, so that a new master becomes this process's child when the old master
        // exits.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let path = std::env::temp_dir().join("config");
        std::fs::write(&path, config).unwrap();
        let (mut command, copies) = passing(&passed);
        command.env(CONFIG, &path);
        command.env("CLUSTER_SCHED_POLICY", policy);
        let service = Self {
            group: Group::start(&mut command).unwrap(),
            config: path,
        };
        drop((passed, copies));
        service.wait_for(": ready", 1);
        service
    }

    /// Returns the number of output lines that end with `end`.
    fn count(&self, end: &str) -> usize {
        let output = self.group.output();
        output.lines().filter(|line| line.ends_with(end)).count()
    }

    /// Waits until at least `count` lines of the output end with `end`. Panics if a process has
    /// panicked.
    fn wait_for(&self, end: &str, count: usize) {
        wait_until(end, || {
            let output = self.group.output();
            assert!(!output.contains("panicked"), "{output}");
            (self.count(end) >= count).then_some(())
        });
    }

    /// Returns the newest master's process id.
    pub fn master(&self) -> Pid {
        let output = self.group.output();
        let mut masters = output
            .lines()
            .filter_map(|line| line.strip_prefix("master "));
        Pid::from_raw(masters.next_back().unwrap().parse().unwrap())
    }

    /// Waits until both workers of the newest master have opened all their sockets.
    pub fn wait_for_both_workers(&self) {
        let line = format!("worker of {} has opened its sockets", self.master());
        self.wait_for(&line, 2);
    }

    /// Upgrades the service once both workers have opened their sockets, and waits until the old
    /// master has exited.
    pub fn upgrade(&self) {
        self.wait_for_both_workers();
        let old = self.master();
        kill(old, Signal::SIGUSR2).unwrap();
        wait_until("the exit of the old master", || {
            let output = self.group.output();
            let has_failed = output.contains(&format!("{old}: the new master failed"));
            assert!(!has_failed, "{output}");
            (!is_alive(old.as_raw().unsigned_abs())).then_some(())
        });
        assert_ne!(self.master(), old);
    }

    /// Upgrades the service to a release whose workers exit at once, and waits until the old master
    /// has reaped the new one.
    fn fail_to_upgrade(&self) {
        let config = std::fs::read_to_string(&self.config).unwrap();
        std::fs::write(&self.config, "exit").unwrap();
        let old = self.master();
        kill(old, Signal::SIGUSR2).unwrap();
        self.wait_for("not ready in time", 1);
        let new = self.master().as_raw().unsigned_abs();
        wait_until("the end of the new master", || {
            (!Path::new(&format!("/proc/{new}")).exists()).then_some(())
        });
        std::fs::write(&self.config, config).unwrap();
    }

    /// Sends SIGTERM to `master`, and waits for the end of the service.
    pub fn stop(self, master: Pid) {
        kill(master, Signal::SIGTERM).unwrap();
        self.wait_for_end(master);
    }

    /// Waits until `master` and all other processes have exited. Asserts that `master` and the
    /// first master have exited with success.
    fn wait_for_end(self, master: Pid) {
        wait_until("the exit of the master", || {
            (!is_alive(master.as_raw().unsigned_abs())).then_some(())
        });
        // Wait for a later master here, because the group waits only for the first master.
        if master != self.group.pid() {
            let status = waitpid(master, None).unwrap();
            let output = self.group.output();
            assert_eq!(status, WaitStatus::Exited(master, 0), "{output}");
        }
        let status = self.group.end().unwrap();
        println!("{}", self.group.output());
        assert!(status.success());
        std::fs::remove_file(&self.config).unwrap();
    }
}

/// Returns a command that starts this scenario's service and passes descriptors to it. Also returns
/// copies of the descriptors, which must stay open until the command has started.
fn passing(passed: &[OwnedFd]) -> (Command, Vec<OwnedFd>) {
    let own = watched();
    if passed.is_empty() {
        return (own, Vec::new());
    }
    // Copy the descriptors to numbers from 20, because the shell moves them to 3, 4 and so on, and
    // must not overwrite one that it has yet to move.
    let high = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_DUPFD(20)).unwrap();
    let numbers: Vec<_> = passed.iter().map(high).collect();
    #[allow(unsafe_code)]
    // SAFETY: `fcntl` has just returned the descriptors, and no other code owns them.
    let copies = numbers
        .iter()
        .map(|number| unsafe { OwnedFd::from_raw_fd(*number) });
    let copies = copies.collect();
    let moves = numbers.iter().enumerate();
    let moves: Vec<_> = moves
        .map(|(at, number)| format!("{}<&{number} {number}<&-", at + 3))
        .collect();
    let names: Vec<_> = ('a'..).take(passed.len()).map(String::from).collect();
    let script = format!(
        "exec {}; export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}; exec \"$0\"",
        moves.join(" "),
        passed.len(),
        names.join(":")
    );
    // Some shells redirect only descriptors with one digit, but bash redirects any.
    let mut command = Command::new("bash");
    command.args(["-c", &script]).arg(own.get_program());
    command.env(WATCHED.0, WATCHED.1);
    (command, copies)
}

/// Asserts that a worker of `master` answers.
#[track_caller]
pub fn assert_served(address: SocketAddr, master: Pid) {
    assert_eq!(talk(address, b"x").unwrap(), master.to_string());
}

/// Connects a client with a timeout of one second. Returns the kind of the error, or `None` if the
/// client has connected.
fn connect_error(address: SocketAddr) -> Option<ErrorKind> {
    let client = TcpStream::connect_timeout(&address, scaled(1000 * MS));
    client.err().map(|error| error.kind())
}

fn port_that_the_new_release_does_not_use_closes_after_an_upgrade() {
    if is_watched() {
        return service();
    }
    for policy in ["rr", "none", "sharded"] {
        let ports = [(); 3].map(|()| reserve_port());
        let [used, unused, by_workers] = ports.each_ref().map(|(_, address)| *address);
        let path = std::env::temp_dir().join("unused.sock");
        let config = format!(
            "pool {used}\npool {unused}\npool 127.0.0.1:0\nlisten {by_workers}\npool {}",
            path.display()
        );
        let service = Service::start(policy, &config);
        service.wait_for_both_workers();
        assert_served(unused, service.master());
        assert_served(by_workers, service.master());
        assert!(path.exists());
        std::fs::write(&service.config, format!("pool {used}")).unwrap();
        service.upgrade();
        for closed in [unused, by_workers] {
            wait_until("the close of the port", || {
                (connect_error(closed) == Some(ErrorKind::ConnectionRefused)).then_some(())
            });
        }
        wait_until("the removal of the file", || (!path.exists()).then_some(()));
        assert_served(used, service.master());
        let master = service.master();
        service.stop(master);
    }
}

fn private_socket_does_not_pass_to_the_new_master() {
    if is_watched() {
        return service();
    }
    // Two of the sockets are the pool's listener and the channel between the masters.
    for (verb, passed) in [("listen", 3), ("private", 2)] {
        let (_reserved, address) = reserve_port();
        let service = Service::start("rr", &format!("pool {address}\n{verb} 127.0.0.1:0"));
        service.upgrade();
        service.wait_for(&format!("{passed} sockets were passed"), 1);
        assert_served(address, service.master());
        let master = service.master();
        service.stop(master);
    }
}

/// Connects a client to a port that no worker of the new master has requested yet, and waits until
/// the client is in the backlog. Returns the thread that reads the answer.
fn client_in_backlog(address: SocketAddr) -> std::thread::JoinHandle<String> {
    let client = std::thread::spawn(move || talk(address, b"x").unwrap());
    wait_until("the client to be connected", || {
        assert!(!client.is_finished(), "the client was refused");
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // The client's entry: 127.0.0.1 and the port as the remote address, and ESTABLISHED.
        let remote = format!("0100007F:{:04X} 01", address.port());
        sockets.contains(&remote).then_some(())
    });
    client
}

fn port_of_a_slow_worker_stays_open_after_an_upgrade() {
    if is_watched() {
        return service();
    }
    for policy in ["rr", "none"] {
        let (first, slow) = (reserve_port(), reserve_port());
        let config = format!("slow {}\npool {}", slow.1, first.1);
        let go = std::env::temp_dir().join("go");
        std::fs::write(&go, "").unwrap();
        let service = Service::start(policy, &config);
        service.wait_for_both_workers();
        assert_served(slow.1, service.master());
        std::fs::remove_file(&go).unwrap();
        service.upgrade();
        let client = client_in_backlog(slow.1);
        std::fs::write(&go, "").unwrap();
        assert_eq!(client.join().unwrap(), service.master().to_string());
        std::fs::remove_file(&go).unwrap();
        let master = service.master();
        service.stop(master);
    }
}

/// Upgrades a service whose workers are ready before they listen. The new master must not close
/// their port when the old master has exited. Otherwise the kernel would reset the clients in the
/// backlog.
fn port_of_an_online_worker_stays_open_until_the_worker_listens() {
    if is_watched() {
        return service();
    }
    for policy in ["rr", "none"] {
        let (late, unused) = (reserve_port(), reserve_port());
        let go = std::env::temp_dir().join("go");
        std::fs::write(&go, "").unwrap();
        let config = format!("online\nlate {}", late.1);
        let service = Service::start(policy, &format!("{config}\nlisten {}", unused.1));
        service.wait_for_both_workers();
        std::fs::remove_file(&go).unwrap();
        std::fs::write(&service.config, config).unwrap();
        service.upgrade();
        let client = client_in_backlog(late.1);
        std::fs::write(&go, "").unwrap();
        assert_eq!(client.join().unwrap(), service.master().to_string());
        wait_until("the close of the other port", || {
            (connect_error(unused.1) == Some(ErrorKind::ConnectionRefused)).then_some(())
        });
        std::fs::remove_file(&go).unwrap();
        let master = service.master();
        service.stop(master);
    }
}

/// Sends a datagram, and returns the answer.
pub fn ask_udp(address: SocketAddr) -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(scaled(20_000 * MS))).unwrap();
    socket.send(b"x").unwrap();
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer).unwrap();
    String::from_utf8(answer[..length].to_vec()).unwrap()
}

/// Returns the IPv4 addresses on which workers have listened, except those with a known port. The
/// workers of all masters share one port that the kernel has chosen, so the result should have one
/// element.
fn chosen_addresses(service: &Service, known: [u16; 2]) -> Vec<SocketAddr> {
    let output = service.group.output();
    let lines = output
        .lines()
        .filter_map(|line| line.strip_prefix("listens on "));
    let addresses = lines.map(|line| line.parse::<SocketAddr>().unwrap());
    let mut addresses: Vec<_> = addresses
        .filter(|own| own.is_ipv4() && !known.contains(&own.port()))
        .collect();
    addresses.dedup();
    addresses
}

fn sockets_that_only_workers_opened_pass_to_the_new_master(policy: &str) {
    if is_watched() {
        return service();
    }
    let v6 = reserve("[::1]:0".parse().unwrap());
    let tcp = reserve_port();
    let (_reserved, port) = reserve_both_families();
    let all = SocketAddr::from(([127, 0, 0, 1], port));
    let udp = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let path = std::env::temp_dir().join("workers.sock");
    let mut config = format!(
        "message\nlisten {}\nlisten {}\nlisten 127.0.0.1:0\nbind {udp}\nlisten {}",
        tcp.1,
        all.port(),
        path.display()
    );
    if let Ok((_, v6)) = &v6 {
        config.push_str(&format!("\nlisten {v6}"));
    }
    let service = Service::start(policy, &config);
    for _ in 0..3 {
        service.upgrade();
        let master = service.master();
        assert_served(tcp.1, master);
        assert_served(all, master);
        let chosen = chosen_addresses(&service, [tcp.1.port(), all.port()]);
        let [chosen] = chosen[..] else {
            panic!("not one port: {chosen:?}");
        };
        assert_served(chosen, master);
        assert_eq!(ask_udp(udp), master.to_string());
        let mut answer = String::new();
        let mut client = UnixStream::connect(&path).unwrap();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, master.to_string());
        if let Ok((_, v6)) = &v6 {
            assert_served(*v6, master);
        }
    }
    let master = service.master();
    service.stop(master);
    assert!(!path.exists());
    assert_eq!(connect_error(tcp.1), Some(ErrorKind::ConnectionRefused));
}

fn sockets_that_only_workers_opened_pass_to_the_new_master_rr() {
    sockets_that_only_workers_opened_pass_to_the_new_master("rr");
}

fn sockets_that_only_workers_opened_pass_to_the_new_master_none() {
    sockets_that_only_workers_opened_pass_to_the_new_master("none");
}

fn sockets_that_only_workers_opened_pass_to_the_new_master_sharded() {
    sockets_that_only_workers_opened_pass_to_the_new_master("sharded");
}

/// Checks that, even after a failed upgrade, a listener that only workers opened closes when the
/// last of these workers exits.
fn failed_upgrade_leaves_sockets_of_workers_to_the_workers() {
    if is_watched() {
        return service();
    }
    let (port, path) = (reserve_port(), std::env::temp_dir().join("workers.sock"));
    let config = format!("listen {}\nlisten {}", port.1, path.display());
    let service = Service::start("rr", &config);
    service.wait_for_both_workers();
    let master = service.master();
    service.fail_to_upgrade();
    assert_served(port.1, master);
    // Reload to a release that does not use the sockets.
    std::fs::write(&service.config, "listen 127.0.0.1:0").unwrap();
    kill(master, Signal::SIGHUP).unwrap();
    service.wait_for(" serves", 1);
    wait_until("the close of the port", || {
        (connect_error(port.1) == Some(ErrorKind::ConnectionRefused)).then_some(())
    });
    wait_until("the removal of the file", || (!path.exists()).then_some(()));
    service.stop(master);
}

/// Stops the service under load, and asserts that each client is served or refused: none is reset,
/// waits in vain, or receives an empty answer.
fn stop_under_load(service: Service, master: Pid, address: SocketAddr) {
    let load = Load::start(address, 8, |answer| !answer.is_empty());
    load.wait_for_requests(100);
    service.stop(master);
    let counts = load.end();
    println!("{counts:?}");
    assert_eq!(counts.lost(), counts.refused, "{counts:?}");
}

fn stop_after_upgrades_resets_no_client(policy: &str) {
    if is_watched() {
        return service();
    }
    // Whether a client could be reset depends on timing, so repeat the test.
    for upgrades in [1, 1, 1, 3] {
        let (_reserved, address) = reserve_port();
        let service = Service::start(policy, &format!("pool {address}"));
        for _ in 0..upgrades {
            service.upgrade();
        }
        service.wait_for_both_workers();
        let master = service.master();
        stop_under_load(service, master, address);
    }
}

fn stop_after_upgrades_resets_no_client_rr() {
    stop_after_upgrades_resets_no_client("rr");
}

fn stop_after_upgrades_resets_no_client_none() {
    stop_after_upgrades_resets_no_client("none");
}

fn stop_after_a_failed_upgrade_resets_no_client() {
    if is_watched() {
        return service();
    }
    // Whether a client could be reset depends on timing, so repeat the test.
    for _ in 0..3 {
        let (_reserved, address) = reserve_port();
        let service = Service::start("rr", &format!("pool {address}"));
        service.fail_to_upgrade();
        let master = service.group.pid();
        stop_under_load(service, master, address);
    }
}

/// Connects a client that keeps a worker busy until the client hangs up.
fn hold(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"hold").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    client
}

/// Stops the service while both workers are busy and one more client waits. Asserts that the
/// handshakes of later clients are dropped, not refused, and that the waiting client is served.
fn assert_drops_handshakes_when_it_stops(service: Service, address: SocketAddr) {
    let master = service.master();
    service.wait_for_both_workers();
    let busy = [hold(address), hold(address)];
    let mut waiting = TcpStream::connect(address).unwrap();
    kill(master, Signal::SIGTERM).unwrap();
    // Clients that connect before the master handles the signal still join the backlog, so connect
    // repeatedly.
    wait_until("a client whose handshake is dropped", || {
        let error = connect_error(address);
        assert_ne!(error, Some(ErrorKind::ConnectionRefused));
        (error == Some(ErrorKind::TimedOut)).then_some(())
    });
    drop(busy);
    waiting.write_all(b"x").unwrap();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, master.to_string());
    service.wait_for_end(master);
    assert_eq!(connect_error(address), Some(ErrorKind::ConnectionRefused));
}

fn stopping_master_drops_new_handshakes_after_upgrades(policy: &str) {
    if is_watched() {
        return service();
    }
    for (how, upgrades) in [("pool", 1), ("pool", 2), ("listen", 2)] {
        let (_reserved, address) = reserve_port();
        let service = Service::start(policy, &format!("{how} {address}"));
        (0..upgrades).for_each(|_| service.upgrade());
        assert_drops_handshakes_when_it_stops(service, address);
    }
}

fn stopping_master_drops_new_handshakes_after_upgrades_rr() {
    stopping_master_drops_new_handshakes_after_upgrades("rr");
}

fn stopping_master_drops_new_handshakes_after_upgrades_none() {
    stopping_master_drops_new_handshakes_after_upgrades("none");
}

/// Upgrades twice while the first master still serves a client.
fn stopping_master_drops_new_handshakes_after_overlapping_upgrades() {
    if is_watched() {
        return service();
    }
    let (_reserved, address) = reserve_port();
    let service = Service::start("rr", &format!("pool {address}"));
    service.wait_for_both_workers();
    let first = service.master();
    let busy = hold(address);
    for upgrade in 1..=2 {
        kill(service.master(), Signal::SIGUSR2).unwrap();
        service.wait_for("this master has taken over", upgrade);
    }
    let exit_of = |master: Pid| {
        wait_until("the exit of an old master", || {
            (!is_alive(master.as_raw().unsigned_abs())).then_some(())
        });
    };
    let output = service.group.output();
    let masters: Vec<_> = output
        .lines()
        .filter_map(|line| line.strip_prefix("master "))
        .collect();
    // The second master waits for the first one, whose parked connections it passes on.
    drop(busy);
    exit_of(first);
    exit_of(Pid::from_raw(masters[1].parse().unwrap()));
    assert_drops_handshakes_when_it_stops(service, address);
}
