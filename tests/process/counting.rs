//! Provides clients that send requests without a pause and count each kind of failure separately.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::Linger};

use crate::harness::{scaled, wait_until};

/// Timeout of a client, which is far longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// The number of requests with each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub answered: u64,
    pub refused: u64,
    pub reset: u64,
    pub timed_out: u64,
    /// Number of answers that differ from the expected answer, including empty answers.
    pub wrong: u64,
    /// Number of requests that failed for any other reason.
    pub failed: u64,
}

impl Counts {
    /// Returns the number of requests without a correct answer.
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

/// Clients, each of which sends one request after another.
pub struct Load {
    stop: Arc<AtomicBool>,
    ended: Arc<AtomicU32>,
    threads: Vec<JoinHandle<Counts>>,
}

impl Load {
    pub fn start(address: SocketAddr, clients: usize, is_right: fn(&str) -> bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicU32::new(0));
        let client = |_| {
            let (stop, ended) = (Arc::clone(&stop), Arc::clone(&ended));
            std::thread::spawn(move || {
                let mut counts = Counts::default();
                while !stop.load(Ordering::SeqCst) {
                    counts.add(ask(address), is_right);
                    ended.fetch_add(1, Ordering::SeqCst);
                }
                counts
            })
        };
        let threads = (0..clients).map(client).collect();
        Self {
            stop,
            ended,
            threads,
        }
    }

    /// Waits until `requests` more requests have ended.
    pub fn wait_for_requests(&self, requests: u32) {
        let end = self.ended.load(Ordering::SeqCst) + requests;
        let have_ended = || (self.ended.load(Ordering::SeqCst) >= end).then_some(());
        wait_until("ended requests", have_ended);
    }

    pub fn end(self) -> Counts {
        self.stop.store(true, Ordering::SeqCst);
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

/// Sends a request and returns the answer. Resets the connection afterwards. After an orderly
/// close, the end that closed first would stay in TIME_WAIT for a minute, and thousands of such
/// connections would accumulate.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, scaled(PATIENCE))?;
    stream.set_read_timeout(Some(scaled(PATIENCE)))?;
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
