//! Tests the examples as users start them.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guide::row_of;
use crate::harness::{Group, SYSTEMD, example, reserve_port, sleeps, talk, wait_until};

pub fn trials() -> Vec<Trial> {
    let for_each = |name: &str, test: fn(&str) -> Result<(), Failed>| {
        let trial = |policy| Trial::test(format!("{name}_{policy}"), move || test(policy));
        ["rr", "none", "sharded"].map(trial)
    };
    let mut trials = Vec::new();
    trials.extend(for_each("http_server_serves_and_stops", http_server));
    trials.extend(for_each(
        "http_server_has_the_descriptors_of_the_guide",
        descriptors,
    ));
    trials.extend(for_each(
        "http_server_replaces_a_dead_worker",
        replaces_dead_worker,
    ));
    trials.extend(for_each(
        "http_server_stops_under_load_without_a_failure",
        stops_under_load,
    ));
    trials.extend(for_each(
        "http_server_survives_killed_workers",
        killed_workers,
    ));
    trials.extend([
        Trial::test(
            "http_server_exits_if_its_address_is_in_use",
            exits_if_address_is_in_use,
        ),
        Trial::test(
            "http_server_replaces_workers_killed_during_start_up",
            kills_during_start_up,
        ),
        Trial::test("http_server_explains_its_options", explains_options),
        Trial::test("echo_events_echoes_and_counts", echo_events),
        Trial::test("embedded_hosts_a_master", embedded),
        Trial::test("request_counter_counts", request_counter),
        Trial::test("is_dead_reports_exited_workers", is_dead),
        Trial::test("sticky_clients_stay_with_their_worker", sticky),
        Trial::test("pool_serves_reloads_and_stops", pool),
        SYSTEMD.of(Trial::test(
            "pool_is_started_by_socket_activation",
            pool_by_socket,
        )),
        Trial::test("debug_lines_match_node", debug_lines),
    ]);
    trials.extend(PRINTS.iter().map(|prints| {
        let name = prints.command.replace(' ', "_");
        Trial::test(format!("{name}_prints"), || prints.check())
    }));
    trials
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

fn start_server(policy: &str, workers: &str) -> (Group, SocketAddr) {
    let mut command = example("http_server");
    command.args([
        "--addr",
        "127.0.0.1:0",
        "--workers",
        workers,
        "--policy",
        policy,
    ]);
    let server = Group::start(&mut command).unwrap();
    let address = server.line("listening on ").parse().unwrap();
    (server, address)
}

fn stop(server: &Group, signal: Signal) -> Result<(), Failed> {
    kill(server.pid(), signal)?;
    let status = server.finish()?;
    if status.code() == Some(0) {
        Ok(())
    } else {
        Err(status.to_string().into())
    }
}

fn http_server(policy: &str) -> Result<(), Failed> {
    let (server, address) = start_server(policy, "4");
    let pids = (1..=4).map(|id| server.line(&format!("worker {id} ")));
    let pids: Vec<_> = pids.collect();
    let master = server.pid().to_string();
    // A worker wakes the master before the worker sleeps, so check the master last.
    let all_sleep = || pids.iter().chain([&master]).all(sleeps);
    wait_until("idle processes", || all_sleep().then_some(()));
    let count_fds = || -> Vec<_> { pids.iter().map(|pid| open_fds_of(pid)).collect() };
    let without_connection = count_fds();
    let mut count = [0_u32; 5];
    for _ in 0..200 {
        // Connect only when all workers have closed their last connection and sleep, and the master
        // has processed their frames. A worker that is not idle would lose its turn, and the counts
        // below would differ.
        wait_until("idle processes", || {
            (count_fds() == without_connection && all_sleep()).then_some(())
        });
        let answer = talk(address, REQUEST)?;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nhello world\n"), "{answer}");
        let (_, rest) = answer.split_once("\r\nX-Worker: ").unwrap();
        count[rest.split_once('\r').unwrap().0.parse::<usize>()?] += 1;
    }
    if policy == "rr" {
        assert_eq!(count.iter().sum::<u32>(), 200);
        // A worker that has to wait 20 ms for a core loses its turn. On a busy machine, this can
        // happen many times. Other tests check the exact rotation.
        let shares = &count[1..];
        assert!(
            shares.iter().all(|share| (30..=70).contains(share)),
            "{count:?}"
        );
    }
    let nonsense = talk(address, b"\x00\x01\r\n\r\n")?;
    assert!(nonsense.starts_with("HTTP/1.1 400 "), "{nonsense}");
    stop(&server, Signal::SIGINT)?;
    TcpStream::connect(address).unwrap_err();
    Ok(())
}

/// Counts the descriptors of idle processes.
fn descriptors(policy: &str) -> Result<(), Failed> {
    let (server, _) = start_server(policy, "3");
    let workers: Vec<_> = (1..=3)
        .map(|id| server.line(&format!("worker {id} ")))
        .collect();
    let master = server.pid().to_string();
    let processes = || workers.iter().chain([&master]);
    wait_until("idle processes", || processes().all(sleeps).then_some(()));
    let stated = |process: &str| -> Result<usize, Failed> {
        let row = row_of("operating", "process", process)?;
        let (_, rest) = row.split_once("at most ").ok_or("a number")?;
        Ok(rest.split(' ').next().unwrap_or_default().parse()?)
    };
    let of_policy = match policy {
        "rr" => 2,
        "sharded" => 1,
        _ => 0,
    };
    let limit = stated("master")? + workers.len() * (3 + of_policy);
    let count = open_fds_of(&master);
    assert!((limit - 2..=limit).contains(&count), "{count} of {limit}");
    for worker in &workers {
        let (count, limit) = (open_fds_of(worker), stated("worker")?);
        assert!((limit - 2..=limit).contains(&count), "{count} of {limit}");
    }
    stop(&server, Signal::SIGTERM)
}

fn open_fds_of(pid: &str) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

fn replaces_dead_worker(policy: &str) -> Result<(), Failed> {
    let (server, address) = start_server(policy, "2");
    for new in 3..=6 {
        let worker = server.line(&format!("worker {} ", new - 2));
        let worker = worker.split(' ').next_back().unwrap().parse()?;
        kill(Pid::from_raw(worker), Signal::SIGKILL)?;
        server.line(&format!("worker {new} "));
        // The other worker answers until the rotation reaches the new worker. At most one request
        // may fail, namely one that the killed worker had received.
        assert!(await_answer(address, new) <= 1);
    }
    stop(&server, Signal::SIGTERM)
}

/// Sends requests until the given worker answers. Returns the number of requests without an answer.
///
/// Until then, the other workers answer. A request may fail, because a worker that was killed may
/// have received the request's connection shortly before the kill.
fn await_answer(address: SocketAddr, worker: usize) -> usize {
    let mut failed = 0;
    wait_until("an answer from the new worker", || {
        match talk(address, REQUEST) {
            Ok(answer) if answer.ends_with("hello world\n") => answer
                .contains(&format!("X-Worker: {worker}\r"))
                .then_some(()),
            _ => {
                failed += 1;
                None
            }
        }
    });
    failed
}

/// The outcome of one request.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Answered,
    /// The connection was refused, so no worker received it.
    Refused,
    /// The request failed in another way. The text is the reason.
    Failed(String),
}

fn request(address: SocketAddr) -> Outcome {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return Outcome::Refused;
    };
    let mut answer = String::new();
    let exchange = stream
        .write_all(REQUEST)
        .and_then(|()| stream.read_to_string(&mut answer));
    match exchange {
        Ok(_) if answer.ends_with("\r\n\r\nhello world\n") => Outcome::Answered,
        Ok(_) => Outcome::Failed(format!("short answer {answer:?}")),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

fn stops_under_load(policy: &str) -> Result<(), Failed> {
    let (server, address) = start_server(policy, "4");
    let answered = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let answered = Arc::clone(&answered);
            std::thread::spawn(move || {
                loop {
                    match request(address) {
                        Outcome::Answered => answered.fetch_add(1, Ordering::SeqCst),
                        Outcome::Refused => return Ok(()),
                        Outcome::Failed(reason) => return Err(reason),
                    };
                }
            })
        })
        .collect();
    let load = || (answered.load(Ordering::SeqCst) > 500).then_some(());
    wait_until("the load", load);
    stop(&server, Signal::SIGTERM)?;
    for client in clients {
        client.join().unwrap()?;
    }
    Ok(())
}

/// Kills workers under load, one after another. A blocking worker holds at most one connection,
/// so each kill may make at most one request fail.
fn killed_workers(policy: &str) -> Result<(), Failed> {
    const KILLS: usize = 20;
    let (server, address) = start_server(policy, "4");
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                let mut outcomes = Vec::new();
                while !is_over.load(Ordering::SeqCst) {
                    outcomes.push(request(address));
                }
                outcomes
            })
        })
        .collect();
    let mut failed = 0;
    for id in 1..=KILLS {
        let worker = server.line(&format!("worker {id} ")).parse()?;
        kill(Pid::from_raw(worker), Signal::SIGKILL)?;
        // Wait until the killed worker's replacement answers, so that some worker always listens.
        failed += await_answer(address, id + 4);
    }
    is_over.store(true, Ordering::SeqCst);
    let mut answered = 0;
    for outcome in clients
        .into_iter()
        .flat_map(|client| client.join().unwrap())
    {
        match outcome {
            Outcome::Answered => answered += 1,
            Outcome::Failed(_) => failed += 1,
            Outcome::Refused => return Err("refused".into()),
        }
    }
    assert!(
        failed <= KILLS,
        "{failed} requests failed, but only {KILLS} workers were killed"
    );
    assert!(
        answered > 100,
        "only {answered} requests are too little load"
    );
    stop(&server, Signal::SIGTERM)
}

fn exits_if_address_is_in_use() -> Result<(), Failed> {
    let other = TcpListener::bind("127.0.0.1:0")?;
    let address = other.local_addr()?.to_string();
    let mut command = example("http_server");
    let server = Group::start(command.args(["--addr", &address, "--workers", "2"]))?;
    server.line(&format!("cannot listen on {address}: "));
    assert_eq!(server.end()?.code(), Some(1));
    let output = server.output();
    let attempts = output.matches("cannot listen").count();
    assert!(attempts <= 2, "too many attempts:\n{output}");
    Ok(())
}

/// Checks that workers are also replaced if they are killed before they listen.
fn kills_during_start_up() -> Result<(), Failed> {
    let (_reserved, address) = reserve_port();
    let mut command = example("http_server");
    let addr = address.to_string();
    let server = Group::start(command.args(["--addr", &addr, "--workers", "2"]))?;
    for id in 1..=10 {
        let worker = server.line(&format!("worker {id} ")).parse()?;
        kill(Pid::from_raw(worker), Signal::SIGKILL)?;
    }
    wait_until("an answer", || {
        talk(address, REQUEST)
            .ok()
            .filter(|a| a.ends_with("world\n"))
    });
    stop(&server, Signal::SIGTERM)
}

fn explains_options() -> Result<(), Failed> {
    for (args, expected) in [
        (["--policy", "random"], "\"rr\", \"none\" and \"sharded\""),
        (["--nonsense", "x"], "--nonsense"),
    ] {
        let output = example("http_server").args(args).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2));
        assert!(text.contains(expected), "{text}");
    }
    Ok(())
}

fn echo_events() -> Result<(), Failed> {
    let mut command = example("echo_events");
    let server = Group::start(command.args(["--addr", "127.0.0.1:0", "--workers", "2"]))?;
    let address: SocketAddr = server.line("listening on ").parse()?;
    let mut clients: Vec<_> = (0..50)
        .map(|_| TcpStream::connect(address))
        .collect::<Result<_, _>>()?;
    for client in &mut clients {
        client.write_all(b"hello")?;
    }
    for client in &mut clients {
        let mut text = [0; 5];
        client.read_exact(&mut text)?;
        assert_eq!(&text, b"hello");
    }
    server.line("requests = 50");
    // Send more than the socket buffers hold. The client writes on a second thread, because the
    // server stops reading until the client reads.
    let client = &mut clients[0];
    let mut writer = client.try_clone()?;
    let sender = std::thread::spawn(move || {
        writer.write_all(&vec![b'x'; 5_000_000])?;
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut echoed = Vec::new();
    client.read_to_end(&mut echoed)?;
    sender.join().unwrap()?;
    assert!(echoed.len() == 5_000_000 && echoed.iter().all(|byte| *byte == b'x'));
    // The server must exit although clients are still connected.
    stop(&server, Signal::SIGTERM)
}

fn embedded() -> Result<(), Failed> {
    let mut command = example("embedded");
    command.args(["--addr", "127.0.0.1:0", "--status", "127.0.0.1:0"]);
    let host = Group::start(&mut command)?;
    let status: SocketAddr = host.line("status on ").parse()?;
    let first = host.line("worker 1 listening on ");
    assert_eq!(first, host.line("worker 2 listening on "));
    // Retry, because a worker joins the rotation only when it waits for a connection.
    let mut answers = BTreeSet::new();
    wait_until("answers from both workers", || {
        answers.insert(talk(first.parse().unwrap(), b"").unwrap());
        (answers.len() == 2).then_some(())
    });
    let expected = ["hello from worker 1\n", "hello from worker 2\n"];
    assert!(answers.iter().eq(expected), "{answers:?}");
    let text = talk(status, b"")?;
    assert!(text.starts_with("2 workers, Ledger { accepted: "), "{text}");
    stop(&host, Signal::SIGTERM)
}

fn request_counter() -> Result<(), Failed> {
    let server = Group::start(example("request_counter").arg("127.0.0.1:0"))?;
    let address = server.line("listening on ").parse()?;
    for _ in 0..3 {
        assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello world\n"));
    }
    server.line("requests = 3");
    kill(server.pid(), Signal::SIGTERM)?;
    assert_eq!(server.end()?.signal(), Some(15), "SIGTERM is not handled");
    Ok(())
}

fn is_dead() -> Result<(), Failed> {
    // Reserve the port, so that no other process gets it if the last worker exits before the next
    // worker listens.
    let (_reserved, address) = reserve_port();
    let server = Group::start(example("is_dead").arg(address.to_string()))?;
    let mut pids = BTreeSet::new();
    for _ in 0..cluster::available_parallelism() {
        // Each worker answers only once, and the next worker may not listen yet, so retry.
        let answer = wait_until("an answer", || {
            let answer = talk(address, REQUEST).ok();
            answer.filter(|answer| !answer.is_empty())
        });
        let (_, pid) = answer.rsplit_once("current process\n ").unwrap();
        assert!(pids.insert(pid.to_owned()), "{pid:?} twice");
    }
    assert_eq!(server.finish()?.code(), Some(0));
    let output = server.output();
    for dead in ["true", "false"] {
        let lines = output.matches(&format!("worker is dead: {dead}\n")).count();
        assert_eq!(lines, pids.len(), "{output}");
    }
    Ok(())
}

/// Connects clients from 127.0.0.2 to 127.0.0.201, and returns the worker that answered each of
/// them.
fn sticky_owners(address: SocketAddr) -> Vec<String> {
    let owner = |client| {
        let mut stream = connect_from(Ipv4Addr::new(127, 0, 0, client), address).unwrap();
        stream.write_all(REQUEST).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, worker) = answer.rsplit_once("\r\n\r\nworker ").unwrap();
        worker.trim_end().to_owned()
    };
    (2..=201).map(owner).collect()
}

fn connect_from(own: Ipv4Addr, address: SocketAddr) -> nix::Result<TcpStream> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    let cloexec = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, cloexec, None)?;
    let own = SocketAddr::from((own, 0));
    bind(socket.as_raw_fd(), &SockaddrStorage::from(own))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket.into())
}

fn pool() -> Result<(), Failed> {
    let server = Group::start(example("pool").arg("127.0.0.1:0"))?;
    let address = server.line("listening on ").parse()?;
    server.line("ready");
    assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello\n"));
    kill(server.pid(), Signal::SIGHUP)?;
    server.line("generation 1 serves");
    assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello\n"));
    stop(&server, Signal::SIGTERM)?;
    TcpStream::connect(address).unwrap_err();
    Ok(())
}

fn pool_by_socket() -> Result<(), Failed> {
    let (_reserved, address) = reserve_port();
    let mut command = Command::new("systemd-socket-activate");
    command.arg(format!("--listen={address}"));
    let temporary = std::env::temp_dir();
    command.arg(format!("--setenv=TMPDIR={}", temporary.display()));
    let program = example("pool");
    command.arg(program.get_program()).args(program.get_args());
    let server = Group::start(command.arg(address.to_string()))?;
    // Wait until systemd-socket-activate listens. The first connection then starts the example.
    server.line("Listening on ");
    assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello\n"));
    server.line("ready");
    kill(server.pid(), Signal::SIGHUP)?;
    server.line("generation 1 serves");
    assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello\n"));
    stop(&server, Signal::SIGTERM)
}

fn sticky() -> Result<(), Failed> {
    const WORKERS: usize = 5;
    let mut command = example("sticky");
    let server = Group::start(command.args(["127.0.0.1:0", &WORKERS.to_string()]))?;
    let listening = (1..=WORKERS).map(|id| server.line(&format!("worker {id} ")));
    let listening: Vec<_> = listening.collect();
    let (worker, address) = listening[2].split_once(" listening on ").unwrap();
    let address = address.parse()?;
    let before = sticky_owners(address);
    for _ in 0..3 {
        assert_eq!(sticky_owners(address), before);
    }
    kill(Pid::from_raw(worker.parse()?), Signal::SIGKILL)?;
    server.line("worker 3 exited ");
    let after = sticky_owners(address);
    let both = before.iter().zip(&after);
    let (orphaned, rest): (Vec<_>, Vec<_>) = both.partition(|(before, _)| *before == "3");
    assert!(rest.iter().all(|(before, after)| before == after));
    let heirs: BTreeSet<_> = orphaned.iter().map(|(_, after)| *after).collect();
    assert_eq!(
        heirs.len(),
        WORKERS - 1,
        "each worker takes over some clients: {orphaned:?}"
    );
    let share = before.len() / WORKERS;
    let plausible = share / 2..share * 2;
    assert!(
        plausible.contains(&orphaned.len()),
        "{} moved",
        orphaned.len()
    );
    kill(server.pid(), Signal::SIGTERM)?;
    assert_eq!(server.end()?.signal(), Some(15), "SIGTERM is not handled");
    Ok(())
}

fn debug_lines() -> Result<(), Failed> {
    let program = Group::start(example("worker_id").env("CLUSTER_DEBUG", "1"))?;
    assert_eq!(program.finish()?.code(), Some(0));
    let (master, output) = (program.pid(), program.output());
    let lines = output
        .lines()
        .filter_map(|line| line.strip_suffix(" online"));
    let lines = lines.map(|line| line.strip_prefix(&format!("{master},Master Worker ")));
    let pids: BTreeSet<u32> = lines.map(|pid| pid.unwrap().parse().unwrap()).collect();
    assert_eq!(pids.len(), 2, "{output}");
    Ok(())
}

/// An example that exits by itself, and the lines that it prints, in any order. `N` stands for any
/// number.
struct Prints {
    command: &'static str,
    lines: &'static [&'static str],
}

const PRINTS: &[Prints] = &[
    Prints {
        command: "worker_id",
        lines: &["I am master", "I am worker #1", "I am worker #2"],
    },
    Prints {
        command: "echo",
        lines: &["hi there"],
    },
    Prints {
        command: "broadcast",
        lines: &[
            "worker 1: and something for you alone",
            "worker 1: big announcement to all workers",
            "worker 2: big announcement to all workers",
            "worker 3: big announcement to all workers",
        ],
    },
    Prints {
        command: "worker_events",
        lines: &[
            "1: has disconnected",
            "1: success!",
            "1: yay, it responded after it was forked",
            "2: exited with error code: 3",
            "2: has disconnected",
            "2: yay, it responded after it was forked",
            "3: has disconnected",
            "3: was killed by signal: Some(6)",
            "3: yay, it responded after it was forked",
            "4: has disconnected",
            "4: is now connected to 127.0.0.1:N",
            "4: success!",
            "4: yay, it responded after it was forked",
        ],
    },
    Prints {
        command: "restart",
        lines: &[
            "worker N exited (exit status: 1). restarting...",
            "worker N exited (exit status: 2). restarting...",
            "worker N exited (exit status: 3). restarting...",
            "worker N exited (exit status: 4). restarting...",
            "worker N exited (exit status: 5). enough.",
        ],
    },
    Prints {
        command: "fork_timeouts",
        lines: &[
            "worker 1 listens on 127.0.0.1:N",
            "worker 2: something must be wrong with the connection ...",
            "worker 3: something must be wrong with the connection ...",
        ],
    },
    Prints {
        command: "shutdown",
        lines: &[
            "its time is over",
            "the worker has ended: signal: 9 (SIGKILL)",
        ],
    },
    Prints {
        command: "shutdown polite",
        lines: &["the worker has ended: exit status: 0"],
    },
    Prints {
        command: "voluntary",
        lines: &[
            "1 exited: Some(false)",
            "2 exited: Some(true)",
            "3 exited: Some(false)",
            "4 exited: Some(true)",
            "Oh, it was just voluntary – no need to worry",
            "Oh, it was just voluntary – no need to worry",
        ],
    },
    Prints {
        command: "setup_master",
        lines: &[
            "worker 1 prints: I use https",
            "worker 2 prints: I use http",
        ],
    },
    Prints {
        command: "preload",
        lines: &[
            "78498 primes below 1000000",
            "148933 primes below 2000000",
            "216816 primes below 3000000",
            "283146 primes below 4000000",
        ],
    },
];

impl Prints {
    fn check(&self) -> Result<(), Failed> {
        let mut words = self.command.split(' ');
        let mut command = example(words.next().unwrap());
        let program = Group::start(command.args(words))?;
        assert_eq!(program.finish()?.code(), Some(0));
        let output = program.output();
        let mut lines: Vec<_> = output.lines().collect();
        for expected in self.lines {
            let found = lines.iter().position(|line| is_like(line, expected));
            let found = found.ok_or_else(|| format!("no line {expected:?}:\n{output}"))?;
            lines.remove(found);
        }
        assert!(lines.is_empty(), "unexpected lines {lines:?}");
        Ok(())
    }
}

fn is_like(line: &str, expected: &str) -> bool {
    let Some((before, after)) = expected.split_once('N') else {
        return line == expected;
    };
    let number = line
        .strip_prefix(before)
        .and_then(|line| line.strip_suffix(after));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}
