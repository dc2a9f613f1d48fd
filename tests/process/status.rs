//! Checks the status server of a pool, the stop delay that its health check shows, and the numbers
//! of connections that workers hold.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::pool::{
    FailureAction, Pool, PoolEvent, PoolOptions, Readiness, StatusAddress, ignore_pool_signals,
};
use cluster::{Error, Master, Role, Settings, Worker};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};

use crate::counting::Load;
use crate::harness::{
    answer_pings, cluster, in_background, is_alive, is_watched, scaled, talk, wait_until, when,
    with_env,
};
use crate::pool::{ADDRESS, Server, pid, quick};

crate::scenarios! {
    status_is_served_over_http: CURL
    metrics_are_valid_for_prometheus: PROMTOOL
    workers_are_busy_or_idle_under_every_policy
    worker_of_another_program_is_neither_busy_nor_idle
    silent_clients_delay_no_answer_and_cost_no_wake_up
    hostile_requests_get_an_error
    slow_reader_receives_a_big_answer_and_delays_no_client
    reader_that_stops_is_disconnected_at_the_deadline
    health_check_fails_before_a_client_is_refused_rr
    health_check_fails_before_a_client_is_refused_none
    worker_is_replaced_during_the_stop_delay_and_a_second_signal_ends_it
    stop_is_reported_to_systemd_when_the_delay_begins
    status_sockets_pass_from_master_to_master
    health_check_that_begins_before_an_upgrade_succeeds
    old_master_exits_despite_silent_status_clients
    unprotected_status_addresses_are_refused
}

const MS: Duration = Duration::from_millis(1);

/// The value of `MAX_CLIENTS` in `src/pool/status/server.rs`.
const MAX_CLIENTS: usize = 16;

/// Runs a pool that serves its status on a port and on a Unix socket.
fn serve(options: PoolOptions) {
    let address = std::env::var(ADDRESS).unwrap();
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let pool = Pool::new(&master, options);
            pool.adopt(&master, passed).unwrap();
            pool.listen(&master, address.as_str()).unwrap();
            let port = (Ipv4Addr::LOCALHOST, 0);
            let status = pool.serve_status(&master, port).unwrap();
            let path = std::env::temp_dir().join("status.sock");
            pool.serve_status(&master, path.as_path()).unwrap();
            let own = std::process::id();
            println!("status {status}\nsocket {}\nmaster {own}", path.display());
            pool.on_event(move |_, _, event| println!("{own}: {event}"));
            pool.on_default_signals(&master).unwrap();
            pool.notify_systemd(&master).unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            answer_after_a_request(&worker, &address);
        }
    }
}

fn answer_after_a_request(worker: &Worker, address: &str) {
    answer_pings(worker);
    for connection in worker.listen(address).unwrap().incoming() {
        let mut connection = connection.unwrap();
        if connection.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
            let _ = connection.write_all(b"served");
            connection.finish();
        }
    }
}

/// Returns the address of the status server.
fn status_of(server: &Server) -> SocketAddr {
    server.group.line("status ").parse().unwrap()
}

/// Returns the path of the status server's Unix socket.
fn socket_of(server: &Server) -> PathBuf {
    server.group.line("socket ").into()
}

/// An HTTP answer.
#[derive(Debug)]
struct Answer {
    head: String,
    body: String,
}

impl Answer {
    /// Parses an answer, whose body must have the length that the head states.
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").expect(text);
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.expect(head).parse().unwrap();
        assert_eq!(body.len(), length, "{text}");
        Self {
            head: head.to_owned(),
            body: body.to_owned(),
        }
    }

    fn code(&self) -> u16 {
        let code = self.head.split(' ').nth(1);
        code.expect(&self.head).parse().unwrap()
    }
}

fn request(status: SocketAddr, text: &str) -> Answer {
    Answer::parse(&talk(status, text.as_bytes()).unwrap())
}

fn get(status: SocketAddr, path: &str) -> Answer {
    request(
        status,
        &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    )
}

fn health(status: SocketAddr) -> u16 {
    get(status, "/health").code()
}

fn get_unix(path: &Path, resource: &str) -> Answer {
    let mut client = UnixStream::connect(path).unwrap();
    let request = format!("GET {resource} HTTP/1.0\r\n\r\n");
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    Answer::parse(&answer)
}

/// Runs `curl`, and returns what it prints, with the code of the answer in the last line.
fn curl(arguments: &[&str]) -> String {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "20"]);
    command
        .args(["--write-out", "\n%{http_code}"])
        .args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn status_is_served_over_http() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let status = status_of(&server);
    let url = |path: &str| format!("http://{status}{path}");
    assert_eq!(curl(&[&url("/health")]), "ready\n\n200");
    assert!(curl(&[&url("/status")]).starts_with("ready: generation 0, 2 ready of 2, "));
    let json = curl(&[&url("/status.json")]);
    let json: serde_json::Value = serde_json::from_str(json.strip_suffix("200").unwrap()).unwrap();
    assert_eq!(
        (&json["ready"], &json["stop_in"]),
        (&true.into(), &serde_json::Value::Null)
    );
    assert!(curl(&[&url("/metrics")]).contains("\ncluster_pool_ready 1\n"));
    let head = curl(&["--head", &url("/status")]);
    assert!(
        head.contains("\r\nContent-Type: text/plain; charset=utf-8\r\n"),
        "{head}"
    );
    assert!(head.ends_with("\r\n\r\n\n200"), "{head}");
    assert!(curl(&[&url("/nowhere")]).ends_with("\n404"));
    assert!(curl(&["--data", "text", &url("/health")]).ends_with("\n405"));
    let large = format!("Cookie: {:x<9000}", "");
    assert!(curl(&["--header", &large, &url("/health")]).ends_with("\n431"));

    let path = socket_of(&server);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let path = path.to_str().unwrap().to_owned();
    let unix = curl(&["--unix-socket", &path, "http://localhost/health"]);
    assert_eq!(unix, "ready\n\n200");
    server.stop();
    assert!(!Path::new(&path).exists());
}

fn metrics_are_valid_for_prometheus() {
    if is_watched() {
        return serve(quick());
    }
    for policy in ["rr", "none", "sharded"] {
        let server = Server::start(policy);
        let metrics = get(status_of(&server), "/metrics").body;
        let mut promtool = Command::new("promtool");
        promtool.args(["check", "metrics"]).stdin(Stdio::piped());
        let mut promtool = promtool.spawn().unwrap();
        let mut input = promtool.stdin.take().unwrap();
        input.write_all(metrics.as_bytes()).unwrap();
        drop(input);
        assert!(promtool.wait().unwrap().success(), "{metrics}");
        let busy = metrics
            .lines()
            .filter(|line| line.starts_with("cluster_worker_busy{"));
        assert_eq!(busy.count(), 2, "{metrics}");
        server.stop();
    }
}

fn workers_are_busy_or_idle_under_every_policy() {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_some() {
        return hold_one_connection();
    }
    for policy in ["rr", "none", "sharded"] {
        with_env(POLICY, policy, hold_one_connection);
    }
}

/// Checks that exactly one of two workers is busy while a client holds a connection.
fn hold_one_connection() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick());
            let address = pool.listen(master, "127.0.0.1:0").unwrap();
            let address = address.socket_addr().unwrap();
            when_held(master, pool, [0, 0], move |master, pool| {
                let client = TcpStream::connect(address).unwrap();
                when_held(master, pool, [0, 1], move |master, pool| {
                    drop(client);
                    when_held(master, pool, [0, 0], |master, pool| pool.stop(master));
                });
            });
        },
        |worker| answer_after_a_request(&worker, "127.0.0.1:0"),
    );
}

/// Calls `then` when the workers hold these numbers of connections, in any order.
fn when_held(
    master: &Master,
    pool: Pool,
    expected: [u64; 2],
    then: impl FnOnce(&Master, Pool) + 'static,
) {
    let observed = pool.clone();
    let is_reached = move |master: &Master| {
        let slots = observed.status(master).slots;
        let workers = slots.iter().filter_map(|slot| slot.worker.as_ref());
        let mut held: Vec<_> = workers
            .filter_map(|worker| Some((worker.open, worker.is_busy?)))
            .collect();
        held.sort_unstable();
        held == expected.map(|open| (open, open > 0))
    };
    when(master, is_reached, move |master| then(master, pool));
}

fn worker_of_another_program_is_neither_busy_nor_idle() {
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/sleep").args(["60"]));
            let options = quick().workers(1).readiness(Readiness::Alive(MS));
            let pool = Pool::new(
                master,
                options.disconnect_signal(Some(cluster::Signal::TERM)),
            );
            pool.on_event(|pool, master, event| {
                if *event == PoolEvent::QuorumReached {
                    let worker = pool.status(master).slots[0].worker.clone().unwrap();
                    assert_eq!((worker.open, worker.is_busy), (0, None));
                    let metrics = pool.status(master).to_prometheus();
                    assert!(!metrics.contains("cluster_worker_busy{"), "{metrics}");
                    pool.stop(master);
                }
            });
        },
        |_| unreachable!(),
    );
}

fn silent_clients_delay_no_answer_and_cost_no_wake_up() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let status = status_of(&server);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let master = server.master();
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{master}/fd"))
            .unwrap()
            .count()
    };
    let before = descriptors();
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.extend((0..50).map(|_| TcpStream::connect(status).unwrap()));
        assert_eq!(health(status), 200);
    }
    assert_eq!(clients.len(), 1000);
    // Wait, because the server answers a new client before it closes the oldest connection.
    wait_until("the eviction of the oldest clients", || {
        (descriptors() <= before + MAX_CLIENTS).then_some(())
    });
    let wake_ups_before = wake_ups(pid(master));
    for client in &mut clients {
        client
            .set_read_timeout(Some(scaled(Duration::from_secs(20))))
            .unwrap();
        assert_eq!(
            client.read(&mut [0]).unwrap(),
            0,
            "the server closes the connection"
        );
    }
    wait_until("the end of all clients", || {
        (descriptors() == before).then_some(())
    });
    let count = wake_ups(pid(master)) - wake_ups_before;
    assert!(count <= MAX_CLIENTS as u64 + 4, "{count} wake-ups");
    assert_eq!(health(status), 200);
    server.stop();
}

/// Returns the number of times that the process's main thread has blocked.
fn wake_ups(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let count = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

fn hostile_requests_get_an_error() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let status = status_of(&server);
    for (text, code) in [
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), 404),
        (
            "POST /health HTTP/1.0\r\nContent-Length: 9\r\n\r\nsome text".to_owned(),
            405,
        ),
        ("\u{16}\u{3}\u{1}\0\n\n".to_owned(), 400),
        (format!("GET /{:x<9000} HTTP/1.0\r\n\r\n", ""), 431),
        ("x".repeat(60_000), 431),
    ] {
        assert_eq!(request(status, &text).code(), code, "{text:.60}");
    }
    let pipelined = "GET /status HTTP/1.1\r\n\r\n".to_owned() + &"\0garbage".repeat(5000);
    assert_eq!(request(status, &pipelined).code(), 200);

    let mut slow = TcpStream::connect(status).unwrap();
    slow.set_nodelay(true).unwrap();
    for byte in b"GET /health HTTP/1.0\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        assert_eq!(health(status), 200);
    }
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert_eq!(Answer::parse(&answer).code(), 200);

    let mut half_closed = TcpStream::connect(status).unwrap();
    half_closed.write_all(b"GET /hea").unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    assert_eq!(half_closed.read(&mut [0]).unwrap(), 0);

    let mut endless = TcpStream::connect(status).unwrap();
    let chunk = [b'x'; 1 << 16];
    wait_until("the end of a client that sends forever", || {
        endless.write_all(&chunk).err()
    });
    assert_eq!(health(status), 200);
    server.stop();
}

/// Runs a pool with a status that is larger than a Unix socket's buffer. Calls `clients` on a
/// thread with the path of the status socket.
fn with_a_big_status(clients: fn(&Path)) {
    const SLOTS: usize = 1200;
    let path = std::env::temp_dir().join("status.sock");
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/nowhere"));
            let pool = Pool::new(master, quick().workers(SLOTS).max_failures(0));
            pool.set_failure_limit_callback(|_, _, _| FailureAction::GiveUp);
            pool.serve_status(master, path.as_path()).unwrap();
            let given_up = Cell::new(0);
            pool.on_event(move |pool, master, event| {
                if matches!(event, PoolEvent::FailureLimitReached { .. }) {
                    given_up.set(given_up.get() + 1);
                    if given_up.get() == SLOTS {
                        let (path, pool) = (path.clone(), pool.clone());
                        let stop = move |master: &Master, ()| pool.stop(master);
                        in_background(master, move || clients(&path), stop);
                    }
                }
            });
        },
        |_| unreachable!(),
    );
}

/// Requests the status, and reads the first bytes of the answer.
fn begin_to_read(path: &Path) -> (UnixStream, Vec<u8>) {
    let mut client = UnixStream::connect(path).unwrap();
    client
        .write_all(b"GET /status.json HTTP/1.0\r\n\r\n")
        .unwrap();
    let mut begin = vec![0; 200];
    client.read_exact(&mut begin).unwrap();
    (client, begin)
}

fn slow_reader_receives_a_big_answer_and_delays_no_client() {
    with_a_big_status(|path| {
        let (mut client, mut answer) = begin_to_read(path);
        for _ in 0..50 {
            assert_eq!(get_unix(path, "/health").code(), 503);
            let mut more = [0; 2048];
            client.read_exact(&mut more).unwrap();
            answer.extend(more);
        }
        client.read_to_end(&mut answer).unwrap();
        let answer = Answer::parse(std::str::from_utf8(&answer).unwrap());
        assert!(answer.body.len() > 250_000, "{}", answer.body.len());
        let json: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(json["slots"].as_array().unwrap().len(), 1200);
    });
}

fn reader_that_stops_is_disconnected_at_the_deadline() {
    with_a_big_status(|path| {
        let begin = Instant::now();
        let (mut client, mut answer) = begin_to_read(path);
        // Wait for the end without reading more.
        let mut fds = [PollFd::new(client.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::from(20_000_u16)).unwrap();
        assert!(fds[0].revents().unwrap().contains(PollFlags::POLLHUP));
        assert!(begin.elapsed() >= Duration::from_secs(5));
        // Ignore an error of this read. It returns only what the kernel had buffered.
        let _ = client.read_to_end(&mut answer);
        assert!(answer.len() < 250_000, "{}", answer.len());
    });
}

fn health_check_fails_before_a_client_is_refused_rr() {
    health_check_fails_before_a_client_is_refused("rr");
}

fn health_check_fails_before_a_client_is_refused_none() {
    health_check_fails_before_a_client_is_refused("none");
}

/// Acts as a load balancer that stops sending clients once the health check has failed. Checks that
/// none of its clients is lost.
fn health_check_fails_before_a_client_is_refused(policy: &str) {
    // The load balancer must notice the stop, and its last clients must be served, within this time.
    let delay = scaled(Duration::from_secs(2));
    if is_watched() {
        return serve(quick().stop_delay(delay));
    }
    let server = Server::start(policy);
    let status = status_of(&server);
    let load = Load::start(server.address, 8, |answer| answer == "served");
    load.wait_for_requests(200);
    assert_eq!(health(status), 200);
    let stop = Instant::now();
    server.signal(Signal::SIGTERM);
    wait_until("a failed health check", || {
        (health(status) == 503).then_some(())
    });
    assert_eq!(get(status, "/health").body, "stopping\n");
    let text = get(status, "/status").body;
    assert!(text.starts_with("stopping in "), "{text}");
    let json: serde_json::Value = serde_json::from_str(&get(status, "/status.json").body).unwrap();
    assert!(json["stop_in"].as_f64().unwrap() > 0.0, "{json}");
    assert_eq!(server.count("is disconnecting"), 0);
    load.wait_for_requests(200);
    let counts = load.end();
    println!("{counts:?}");
    assert_eq!(counts.lost(), 0, "{counts:?}");
    assert!(stop.elapsed() < delay, "the load has ended too late");
    // Send no second signal, because it would end the delay.
    let master = server.master();
    server.finish(master, |server| {
        assert!(stop.elapsed() >= delay);
        assert_eq!(server.count("is disconnecting"), 2);
    });
}

fn worker_is_replaced_during_the_stop_delay_and_a_second_signal_ends_it() {
    if is_watched() {
        return serve(quick().stop_delay(Duration::from_secs(600)));
    }
    let server = Server::start("rr");
    server.signal(Signal::SIGTERM);
    server.wait_for(": not ready", 1);
    kill(server.workers()[0], Signal::SIGKILL).unwrap();
    server.wait_for("is ready", 3);
    assert_eq!(talk(server.address, b"x").unwrap(), "served");
    // The pool must ignore these signals, because a stop has begun.
    server.signal(Signal::SIGHUP);
    server.signal(Signal::SIGUSR2);
    wait_until("the end of the delay", || {
        server.signal(Signal::SIGINT);
        // Send few signals, because the pool ignores those in the first second.
        std::thread::sleep(50 * MS);
        (server.count("is disconnecting") == 2).then_some(())
    });
    let master = server.master();
    server.finish(master, |server| {
        let output = server.group.output();
        assert!(
            !output.contains("reloading") && server.masters().len() == 1,
            "{output}"
        );
        assert_eq!(server.count("was killed"), 0, "{output}");
    });
}

fn stop_is_reported_to_systemd_when_the_delay_begins() {
    if is_watched() {
        return serve(quick().stop_delay(Duration::from_secs(1)));
    }
    let path = std::env::temp_dir().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(scaled(Duration::from_secs(20))))
        .unwrap();
    let server = Server::start_with("rr", &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let wait_for = |begin: &str| loop {
        let mut buffer = [0; 1024];
        let length = manager.recv(&mut buffer).unwrap();
        if buffer[..length].starts_with(begin.as_bytes()) {
            return;
        }
    };
    wait_for("READY=1");
    server.signal(Signal::SIGTERM);
    wait_for("STOPPING=1");
    assert_eq!(health(status_of(&server)), 503);
    assert_eq!(server.count("is disconnecting"), 0);
    std::fs::remove_file(path).unwrap();
    let master = server.master();
    server.finish(master, |_| {});
}

fn status_sockets_pass_from_master_to_master() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let (status, path) = (status_of(&server), socket_of(&server));
    let check = || {
        assert_eq!(get(status, "/health").code(), 200);
        assert_eq!(get_unix(&path, "/health").code(), 200);
    };
    for round in 1..=3 {
        let old = server.master();
        server.signal(Signal::SIGUSR2);
        wait_until("an upgrade", || {
            check();
            (!is_alive(pid(old))).then_some(())
        });
        assert_eq!(server.masters().len(), 1 + round);
        let json = get_unix(&path, "/status.json").body;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let worker = json["slots"][0]["worker"]["pid"].as_i64().unwrap();
        let workers = server.workers();
        assert!(
            workers.iter().any(|own| i64::from(own.as_raw()) == worker),
            "{json}"
        );
    }
    assert_eq!(server.group.line("status "), status.to_string());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    server.stop();
    assert!(!path.exists());
}

fn health_check_that_begins_before_an_upgrade_succeeds() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let (old, status) = (server.master(), status_of(&server));
    let (begin, end) = "GET /health HTTP/1.0\r\n\r\n".split_at(10);
    let mut probe = TcpStream::connect(status).unwrap();
    probe.write_all(begin.as_bytes()).unwrap();
    // The old master has accepted the first client when it answers the second one.
    assert_eq!(health(status), 200);
    server.signal(Signal::SIGUSR2);
    // Without its status client, the old master would now exit.
    server.wait_for("has exited", 2);
    assert_eq!(get(status, "/health").body, "ready\n");
    probe.write_all(end.as_bytes()).unwrap();
    let mut answer = String::new();
    probe.read_to_string(&mut answer).unwrap();
    let answer = Answer::parse(&answer);
    assert_eq!((answer.code(), answer.body.as_str()), (200, "upgraded\n"));
    drop(probe);
    wait_until("the end of the old master", || {
        (!is_alive(pid(old))).then_some(())
    });
    server.stop();
}

fn old_master_exits_despite_silent_status_clients() {
    if is_watched() {
        return serve(quick());
    }
    let server = Server::start("rr");
    let (old, status) = (server.master(), status_of(&server));
    let mut silent = TcpStream::connect(status).unwrap();
    assert_eq!(health(status), 200);
    server.signal(Signal::SIGUSR2);
    // The old master closes the connection at its deadline, and exits.
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    wait_until("the end of the old master", || {
        (!is_alive(pid(old))).then_some(())
    });
    assert_eq!(get(status, "/health").body, "ready\n");
    server.stop();
}

fn unprotected_status_addresses_are_refused() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(0));
            let fails = |address: StatusAddress, expected: std::io::ErrorKind| {
                let text = address.to_string();
                let error = pool.serve_status(master, address).unwrap_err();
                assert!(error.to_string().contains(&text), "{error}");
                let Error::Io { reason, .. } = error else {
                    panic!("{error}");
                };
                assert_eq!(reason.kind(), expected);
            };
            let invalid = std::io::ErrorKind::InvalidInput;
            fails((Ipv4Addr::UNSPECIFIED, 0).into(), invalid);
            fails(([10, 1, 2, 3], 9100).into(), invalid);
            fails(Path::new("\0name").into(), invalid);
            let path = std::env::temp_dir().join("used");
            std::fs::write(&path, "").unwrap();
            fails(path.as_path().into(), std::io::ErrorKind::AddrInUse);
            std::fs::remove_file(path).unwrap();
            let used = pool.serve_status(master, (Ipv4Addr::LOCALHOST, 0)).unwrap();
            let used = used.socket_addr().unwrap();
            fails(used.into(), std::io::ErrorKind::AddrInUse);
            pool.stop(master);
        },
        |_| unreachable!(),
    );
}
