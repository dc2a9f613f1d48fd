//! Tests the examples that are servers. The clients send more than the server reads, stay silent,
//! or send slowly.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};

use crate::harness::{Group, example, talk, wait_until};

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for server in SERVERS {
        let mut add = |claim: &str, test: fn(&Server) -> Result<(), Failed>| {
            let name = format!("{}_{claim}", server.example);
            trials.push(Trial::test(name, move || test(server)));
        };
        add(
            "answers_requests_with_large_bodies",
            Server::answers_large_bodies,
        );
        add(
            "serves_despite_silent_clients",
            Server::serves_despite_silent_clients,
        );
        add(
            "serves_despite_slow_clients",
            Server::serves_despite_slow_clients,
        );
    }
    trials.push(Trial::test(
        "embedded_status_port_answers_clients_that_send",
        embedded_status,
    ));
    trials.push(Trial::test(
        "echo_events_disconnects_only_idle_clients",
        echo_events,
    ));
    trials
}

/// An example whose workers block.
struct Server {
    example: &'static str,
    args: &'static [&'static str],
    workers: fn() -> usize,
    /// The start of an answer's last line.
    answer: &'static str,
}

const SERVERS: &[Server] = &[
    Server {
        example: "http_server",
        args: &["--addr", "127.0.0.1:0", "--workers", "2"],
        workers: || 2,
        answer: "hello world\n",
    },
    Server {
        example: "pool",
        args: &["127.0.0.1:0"],
        workers: cluster::available_parallelism,
        answer: "hello\n",
    },
    Server {
        example: "request_counter",
        args: &["127.0.0.1:0"],
        workers: cluster::available_parallelism,
        answer: "hello world\n",
    },
    // Use one worker. All clients of this test have the same address, so `sticky` would pass all of
    // them to one worker anyway.
    Server {
        example: "sticky",
        args: &["127.0.0.1:0", "1"],
        workers: || 1,
        answer: "worker 1\n",
    },
    Server {
        example: "embedded",
        args: &["--addr", "127.0.0.1:0", "--status", "127.0.0.1:0"],
        workers: || 2,
        answer: "hello from worker ",
    },
];

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
/// The start of a request with a body of 1 MiB.
const POST: &[u8] = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n";
/// A body of 1 MiB.
pub const BODY: &[u8] = &[b'x'; 1 << 20];
/// Number of clients that connect one after another.
pub const CLIENTS: usize = 40;
/// Pause between the bytes of a slow client. If an example limited only the time of each read, and
/// not of the whole request, this client could occupy a worker for minutes.
const PAUSE: Duration = Duration::from_millis(50);

/// Sends `head` and [`BODY`], and reads the answer. Returns an error if the server closes the
/// connection before it has read everything, because the kernel then resets the connection.
pub fn post(address: SocketAddr, head: &[u8]) -> io::Result<String> {
    let mut client = TcpStream::connect(address)?;
    client.write_all(head)?;
    client.write_all(BODY)?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Connects [`CLIENTS`] clients that [`post`], and asserts that `is_answer` holds for each answer.
#[track_caller]
pub fn post_all(address: SocketAddr, head: &[u8], is_answer: impl Fn(&str) -> bool) {
    let answers = (0..CLIENTS).map(|_| post(address, head));
    let failed: Vec<_> = answers
        .filter(|answer| !answer.as_deref().is_ok_and(&is_answer))
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {CLIENTS}: {:?}",
        failed.len(),
        failed[0]
    );
}

impl Server {
    fn start(&self) -> io::Result<(Group, SocketAddr)> {
        let server = Group::start(example(self.example).args(self.args))?;
        let address = wait_until("the address", || {
            let output = server.output();
            let (lines, _) = output.rsplit_once('\n')?;
            let (_, rest) = lines.split_once("listening on ")?;
            rest.lines().next().map(str::to_owned)
        });
        Ok((server, address.parse().unwrap()))
    }

    /// Returns whether the text is a complete answer.
    fn has_answered(&self, text: &str) -> bool {
        let last = text.split_inclusive('\n').next_back().unwrap_or_default();
        last.starts_with(self.answer) && last.ends_with('\n')
    }

    fn answers_large_bodies(&self) -> Result<(), Failed> {
        let (server, address) = self.start()?;
        post_all(address, POST, |text| self.has_answered(text));
        stop(&server)
    }

    /// Connects one client for each worker, and one more. In a server that does not wait for data,
    /// every worker is then occupied, and one client waits.
    fn occupy(&self, address: SocketAddr) -> io::Result<Vec<TcpStream>> {
        (0..=(self.workers)())
            .map(|_| TcpStream::connect(address))
            .collect()
    }

    fn serves_despite_silent_clients(&self) -> Result<(), Failed> {
        let (server, address) = self.start()?;
        let silent = self.occupy(address)?;
        let answer = talk(address, REQUEST)?;
        assert!(self.has_answered(&answer), "{answer:?}");
        drop(silent);
        stop(&server)
    }

    fn serves_despite_slow_clients(&self) -> Result<(), Failed> {
        let (server, address) = self.start()?;
        let slow = self.occupy(address)?;
        let is_over = AtomicBool::new(false);
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    // A write fails once the server has disconnected the client.
                    slow.iter().for_each(|mut client| drop(client.write(b"x")));
                    std::thread::sleep(PAUSE);
                }
            });
            let answer = talk(address, REQUEST);
            is_over.store(true, Ordering::SeqCst);
            answer
        })?;
        assert!(self.has_answered(&answer), "{answer:?}");
        drop(slow);
        stop(&server)
    }
}

/// Sends SIGTERM to a server, and waits for its exit. Accepts any exit status, because not all
/// examples handle the signal.
fn stop(server: &Group) -> Result<(), Failed> {
    kill(server.pid(), Signal::SIGTERM)?;
    server.end()?;
    Ok(())
}

fn embedded_status() -> Result<(), Failed> {
    let mut command = example("embedded");
    command.args(["--addr", "127.0.0.1:0", "--status", "127.0.0.1:0"]);
    let host = Group::start(&mut command)?;
    let status: SocketAddr = host.line("status on ").parse()?;
    for _ in 0..CLIENTS {
        let text = talk(status, REQUEST)?;
        assert!(text.starts_with("2 workers, Ledger "), "{text}");
    }
    stop(&host)
}

fn echo_events() -> Result<(), Failed> {
    let mut command = example("echo_events");
    let server = Group::start(command.args(["--addr", "127.0.0.1:0", "--workers", "2"]))?;
    let address: SocketAddr = server.line("listening on ").parse()?;
    let mut silent = TcpStream::connect(address)?;
    let silent = std::thread::spawn(move || silent.read(&mut [0]));
    // This client never reads, so the server soon cannot send, and stops reading.
    let mut stuck = TcpStream::connect(address)?;
    let stuck = std::thread::spawn(move || while stuck.write_all(BODY).is_ok() {});
    let mut active = TcpStream::connect(address)?;
    let mut echo = || {
        active
            .write_all(b"x")
            .and_then(|()| active.read_exact(&mut [0]))
    };
    wait_until("the end of the idle clients", || {
        echo().unwrap();
        (silent.is_finished() && stuck.is_finished()).then_some(())
    });
    assert_eq!(silent.join().unwrap()?, 0, "end-of-file");
    stuck.join().unwrap();
    echo()?;
    stop(&server)
}
