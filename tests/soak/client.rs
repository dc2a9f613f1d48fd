//! Clients of the soak test. They run in their own process, so that a measurement of the master
//! does not include their memory.

use std::cell::Cell;
use std::io::{BufRead as _, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::rc::Rc;

use cluster::{Interest, Master};
use nix::sys::socket::{setsockopt, sockopt::Linger};

use crate::long_lived::run_until;

const CLIENT: &str = "CLIENT";
/// Number of client threads. Half of the threads use TCP, and half use the Unix socket.
const THREADS: u64 = 4;

pub fn is_client() -> bool {
    std::env::var_os(CLIENT).is_some()
}

/// The master's handle for the process with the clients.
pub struct Clients {
    process: Child,
    orders: UnixStream,
    /// The result of the last command, or `None` until the result arrives.
    failures: Rc<Cell<Option<u64>>>,
}

impl Clients {
    pub fn new(master: &Master) -> Self {
        let (orders, theirs) = UnixStream::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let process = Command::new(std::env::current_exe().unwrap())
            .env(CLIENT, "1")
            .stdin(theirs.try_clone().unwrap())
            .stdout(theirs)
            .spawn()
            .unwrap();
        let failures = Rc::new(Cell::new(None));
        let result = Rc::clone(&failures);
        let answers = orders.try_clone().unwrap();
        let read = move |_: &Master, mut answers: &UnixStream| {
            let mut answer = [0; 8];
            answers.read_exact(&mut answer).ok()?;
            result.set(Some(u64::from_le_bytes(answer)));
            Some(Interest::Readable)
        };
        let watched = master.watch(answers, Interest::Readable, read);
        master.unreference(watched.unwrap());
        Self {
            process,
            orders,
            failures,
        }
    }

    /// Makes `times` connections, rounded down to a multiple of `THREADS`. Returns the number of
    /// connections that received no answer.
    pub fn connect(&mut self, master: &Master, to: (SocketAddr, &Path), times: u64) -> u64 {
        let (tcp, unix) = (to.0, to.1.display());
        writeln!(self.orders, "{tcp} {unix} {times}").unwrap();
        run_until(master, || self.failures.get().is_some());
        self.failures.take().unwrap()
    }

    pub fn end(mut self) {
        self.orders.shutdown(Shutdown::Write).unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

/// Executes the master's commands in the process with the clients.
pub fn run_orders() {
    // Make the kernel kill this process with the master, because a long command must not outlive
    // the master.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGKILL).unwrap();
    for order in std::io::stdin().lock().lines() {
        let order = order.unwrap();
        let [tcp, unix, times] = order.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{order}");
        };
        let tcp: SocketAddr = tcp.parse().unwrap();
        let times: u64 = times.parse().unwrap();
        let failures = std::thread::scope(|scope| {
            let one = |number| {
                scope.spawn(move || {
                    let (mine, all) = (0..times / THREADS, |failed: &bool| *failed);
                    match number % 2 {
                        0 => mine.map(|_| by_tcp(tcp).is_err()).filter(all).count(),
                        _ => mine.map(|_| by_unix(unix).is_err()).filter(all).count(),
                    }
                })
            };
            let threads: Vec<_> = (0..THREADS).map(one).collect();
            let counts = threads.into_iter().map(|thread| thread.join().unwrap());
            counts.sum::<usize>()
        });
        let answer = (failures as u64).to_le_bytes();
        std::io::stdout().write_all(&answer).unwrap();
        std::io::stdout().flush().unwrap();
    }
}

/// Connects by TCP and waits for the answer, and then resets the connection. After an orderly
/// close, the end that closed first would stay in TIME_WAIT for a minute. The test makes more
/// connections in a minute than there are ports.
fn by_tcp(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &reset)?;
    stream.read_exact(&mut [0])
}

fn by_unix(path: &str) -> std::io::Result<()> {
    UnixStream::connect(path)?.read_exact(&mut [0])
}
