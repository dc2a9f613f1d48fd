//! Tests sticky sessions behind HAProxy: the examples `sticky_ports` and `sticky_cookie`, with the
//! guide's configurations for HAProxy.
//!
//! All clients have the address of the proxy. HAProxy repeats no request, so that it hides no
//! failure of a worker.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use crate::deploying::{file, replace};
use crate::harness::{Group, HAPROXY, example, reserve, reserve_port, talk, wait_until};
use crate::sharded::Count;

pub fn trials() -> Vec<Trial> {
    let of = |name: &str, start: fn() -> io::Result<Service>| {
        let spreads = format!("{name}_spreads_sessions_and_moves_none");
        let reloads = format!("{name}_moves_no_session_in_a_reload");
        [
            HAPROXY.of(Trial::test(spreads, move || spread(&start()?))),
            HAPROXY.of(Trial::test(reloads, move || reload(&start()?))),
        ]
    };
    let mut trials = Vec::from(of("sticky_ports", Service::with_ports));
    trials.extend(of("sticky_cookie", Service::with_cookie));
    trials
}

const SLOTS: u16 = 4;
const CLIENTS: usize = 1000;
/// Number of threads that send the clients' requests.
const THREADS: usize = 8;

/// A pool behind HAProxy.
struct Service {
    pool: Group,
    proxy: Group,
    /// The address of HAProxy.
    front: SocketAddr,
    _ports: Vec<OwnedFd>,
    _configuration: TempDir,
}

impl Service {
    fn with_ports() -> io::Result<Self> {
        let (ports, first) = reserve_ports();
        let mut configuration = file("haproxy-slots.cfg").to_owned();
        for slot in 0..SLOTS {
            let shown = format!("127.0.0.1:{} ", 8000 + slot);
            let own = format!("127.0.0.1:{} ", first.port() + slot);
            configuration = replace(&configuration, 1, &shown, &own);
        }
        let mut command = example("sticky_ports");
        command.arg(first.ip().to_string());
        command.args([first.port(), SLOTS].map(|number| number.to_string()));
        Self::start(&mut command, &configuration, ports)
    }

    fn with_cookie() -> io::Result<Self> {
        let (port, address) = reserve_port();
        let configuration = file("haproxy.cfg");
        let own = format!("server one {address}");
        let configuration = replace(configuration, 1, "server one 192.0.2.11:8000", &own);
        let configuration = replace(&configuration, 1, "    server two 192.0.2.12:8000\n", "");
        // The example has no agent.
        let agent = " agent-check agent-port 8001 agent-inter 500ms";
        let configuration = replace(&configuration, 1, agent, "");
        let mut command = example("sticky_cookie");
        command.args([address.to_string(), SLOTS.to_string()]);
        Self::start(&mut command, &configuration, vec![port])
    }

    fn start(pool: &mut Command, configuration: &str, mut ports: Vec<OwnedFd>) -> io::Result<Self> {
        let pool = Group::start(pool)?;
        for slot in 0..SLOTS {
            pool.line(&format!("slot {slot}: worker"));
        }
        let (port, front) = reserve_port();
        ports.push(port);
        let configuration = replace(configuration, 1, "bind :80\n", &format!("bind {front}\n"));
        // The test may have fewer descriptors than a service.
        let configuration = replace(&configuration, 1, "maxconn 10000", "maxconn 1000");
        let strict = "mode http\n    retries 0\n";
        let configuration = replace(&configuration, 1, "mode http\n", strict);
        let directory = TempDir::new()?;
        let path = directory.path().join("haproxy.cfg");
        fs::write(&path, configuration)?;
        let proxy = Group::start(Command::new("haproxy").arg("-db").arg("-f").arg(path))?;
        wait_until("HAProxy", || {
            let output = proxy.output();
            assert!(!output.contains("[ALERT]"), "{output}");
            let answer = Client::default().ask(front).ok()?;
            answer.starts_with("HTTP/1.1 200 ").then_some(())
        });
        Ok(Self {
            pool,
            proxy,
            front,
            _ports: ports,
            _configuration: directory,
        })
    }

    fn stop(&self) -> Result<(), Failed> {
        for (group, signal) in [
            (&self.proxy, Signal::SIGUSR1),
            (&self.pool, Signal::SIGTERM),
        ] {
            kill(group.pid(), signal)?;
            let status = group.finish()?;
            assert!(status.success(), "{status}");
        }
        Ok(())
    }
}

/// Reserves a port for each slot, which follow each other, and returns the first address.
fn reserve_ports() -> (Vec<OwnedFd>, SocketAddr) {
    wait_until("free ports", || {
        let (port, first) = reserve_port();
        let others = (1..SLOTS).map(|slot| {
            let next = first.port().checked_add(slot)?;
            let reserved = reserve(SocketAddr::new(first.ip(), next));
            reserved.ok().map(|(port, _)| port)
        });
        let others: Option<Vec<_>> = others.collect();
        let ports = others?.into_iter().chain([port]);
        Some((ports.collect(), first))
    })
}

#[derive(Debug)]
struct Answer {
    slot: usize,
    worker: u32,
}

/// A client with its cookies.
#[derive(Debug, Default)]
struct Client {
    cookies: BTreeMap<String, String>,
    /// The slot of the first answer.
    slot: Option<usize>,
}

impl Client {
    /// Sends a request on a new connection, and returns the answer.
    fn ask(&mut self, front: SocketAddr) -> io::Result<String> {
        let cookies = self.cookies.iter();
        let cookies: Vec<_> = cookies
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let mut request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".to_owned();
        if !cookies.is_empty() {
            request += &format!("Cookie: {}\r\n", cookies.join("; "));
        }
        talk(front, (request + "\r\n").as_bytes())
    }

    /// Takes the cookies from an answer. Returns `None` if the answer is not a worker's, for example
    /// because HAProxy reports an error.
    fn parse(&mut self, answer: &str) -> Option<Answer> {
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let headers = head.strip_prefix("HTTP/1.1 200 ")?.lines();
        for (name, value) in headers.filter_map(|header| header.split_once(": ")) {
            if name.eq_ignore_ascii_case("set-cookie") {
                let (pair, _) = value.split_once(';').unwrap_or((value, ""));
                let (name, value) = pair.split_once('=')?;
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
        }
        let (slot, worker) = body.strip_prefix("slot ")?.split_once(", worker ")?;
        Some(Answer {
            slot: slot.parse().ok()?,
            worker: worker.trim_end().parse().ok()?,
        })
    }

    /// Sends a request. Counts an answer from another slot than that of the first answer as wrong.
    fn visit(&mut self, front: SocketAddr, count: &mut Count) -> Option<Answer> {
        let text = match self.ask(front) {
            Ok(text) => text,
            Err(error) => {
                count.fail(&error);
                return None;
            }
        };
        let answer = self.parse(&text);
        let answer = answer.filter(|answer| *self.slot.get_or_insert(answer.slot) == answer.slot);
        if answer.is_none() {
            count.wrong += 1;
            println!("client of slot {:?}: {text}", self.slot);
        }
        answer
    }
}

/// Lets each client send one request, and returns the answers.
fn visit_all(clients: &mut [Client], front: SocketAddr) -> Vec<Answer> {
    let visit = |clients: &mut [Client]| {
        let mut count = Count::default();
        let answers = clients
            .iter_mut()
            .filter_map(|client| client.visit(front, &mut count));
        (answers.collect::<Vec<_>>(), count)
    };
    let results: Vec<_> = thread::scope(|scope| {
        let parts = clients.chunks_mut(CLIENTS / THREADS);
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || visit(part))).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    });
    let (answers, counts): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    assert_eq!(Count::sum(counts), Count::NO_FAILURE);
    answers.into_iter().flatten().collect()
}

fn new_clients() -> Vec<Client> {
    (0..CLIENTS).map(|_| Client::default()).collect()
}

fn spread(service: &Service) -> Result<(), Failed> {
    let mut clients = new_clients();
    let mut sessions = [0_usize; SLOTS as usize];
    for answer in visit_all(&mut clients, service.front) {
        sessions[answer.slot] += 1;
    }
    let mean = CLIENTS / sessions.len();
    let even = mean * 9 / 10..=mean * 11 / 10;
    assert!(
        sessions.iter().all(|count| even.contains(count)),
        "{sessions:?}"
    );
    for _ in 0..2 {
        visit_all(&mut clients, service.front);
    }
    service.stop()
}

/// Lets the clients send requests, one after the other, until the load ends.
fn visit_until(ended: &AtomicBool, clients: &mut [Client], front: SocketAddr) -> Count {
    let mut count = Count::default();
    while !ended.load(Ordering::SeqCst) {
        for client in &mut *clients {
            client.visit(front, &mut count);
        }
    }
    count
}

fn reload(service: &Service) -> Result<(), Failed> {
    const RELOADS: u32 = 2;
    let mut clients = new_clients();
    let front = service.front;
    visit_all(&mut clients, front);
    let ended = &AtomicBool::new(false);
    thread::scope(|scope| {
        let parts = clients.chunks_mut(CLIENTS / THREADS);
        let visit = |part| scope.spawn(move || visit_until(ended, part, front));
        let threads: Vec<_> = parts.map(visit).collect();
        let _end = EndOnDrop(ended);
        for generation in 1..=RELOADS {
            kill(service.pool.pid(), Signal::SIGHUP).unwrap();
            service
                .pool
                .line(&format!("generation {generation} serves"));
        }
        ended.store(true, Ordering::SeqCst);
        let counts = threads.into_iter().map(|thread| thread.join().unwrap());
        assert_eq!(Count::sum(counts), Count::NO_FAILURE);
    });
    let answers = visit_all(&mut clients, front);
    let replaced = RELOADS * u32::from(SLOTS);
    let old = answers.iter().find(|answer| answer.worker <= replaced);
    assert!(old.is_none(), "{old:?}");
    service.stop()
}

/// Ends the load when it is dropped, so that a panic of the test ends its threads, too.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
