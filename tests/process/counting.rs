//! Clients at full load, which count each way of failing apart.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::Linger};

use crate::harness::wait_until;

/// Far longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub answered: u64,
    pub refused: u64,
    pub reset: u64,
    pub timed_out: u64,
    /// An answer that is not the one expected; an empty one, too.
    pub wrong: u64,
    /// Whatever else can go wrong.
    pub failed: u64,
}

impl Counts {
    /// How many clients did not get what they came for.
    pub fn lost(&self) -> u64 {
        self.refused + self.reset + self.timed_out + self.wrong + self.failed
    }

    fn add(&mut self, outcome: std::io::Result<String>, is_right: fn(&str) -> bool) {
        let count = match outcome.map_err(|error| error.kind()) {
            Ok(answer) if is_right(&answer) => &mut self.answered,
            Ok(_) => &mut self.wrong,
            Err(ErrorKind::ConnectionRefused) => &mut self.refused,
            Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => &mut self.reset,
            Err(ErrorKind::TimedOut | ErrorKind::WouldBlock) => &mut self.timed_out,
            Err(_) => &mut self.failed,
        };
        *count += 1;
    }
}

/// Clients that come again and again.
pub struct Load {
    over: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Counts>>,
}

impl Load {
    pub fn start(address: SocketAddr, clients: usize, is_right: fn(&str) -> bool) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let client = |_| {
            let (over, answered) = (Arc::clone(&over), Arc::clone(&answered));
            std::thread::spawn(move || {
                let mut counts = Counts::default();
                while !over.load(Ordering::SeqCst) {
                    counts.add(ask(address), is_right);
                    answered.fetch_add(1, Ordering::SeqCst);
                }
                counts
            })
        };
        let threads = (0..clients).map(client).collect();
        Self {
            over,
            answered,
            threads,
        }
    }

    /// Waits until so many more requests have come to an end.
    pub fn go_on(&self, requests: u64) {
        let end = self.answered.load(Ordering::SeqCst) + requests;
        let is_over = || (self.answered.load(Ordering::SeqCst) >= end).then_some(());
        wait_until("requests", is_over);
    }

    pub fn end(self) -> Counts {
        self.over.store(true, Ordering::SeqCst);
        let mut sum = Counts::default();
        for thread in self.threads {
            let counts = thread.join().unwrap();
            sum.answered += counts.answered;
            sum.refused += counts.refused;
            sum.reset += counts.reset;
            sum.timed_out += counts.timed_out;
            sum.wrong += counts.wrong;
            sum.failed += counts.failed;
        }
        sum
    }
}

/// Ends with a reset, as soon as the answer is there: else the client's port would stay for a minute,
/// and there are not as many ports as requests in a minute.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &reset)?;
    read.map(|_| answer)
}
