//! Measures the work that the master does for clients, and its memory and descriptors.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Interest, Master};

/// Number of clients that the well-behaved worker serves, one after another.
const CLIENTS: usize = 100;

/// Measurements of the master's work for clients of the well-behaved worker, whose id is 1.
///
/// The test limits the work and not the clients' waiting times, because waiting times depend on
/// the machine's load.
#[derive(Default)]
pub struct Measurements {
    /// The master's CPU time between each client's arrival and its acceptance.
    pub work: Vec<Duration>,
    /// Number of loop iterations between each client's arrival and its acceptance.
    pub iterations: Vec<u32>,
    /// Time from each client's connection until the end of its answer.
    pub waits: Vec<Duration>,
    pub longest_iteration: Duration,
    /// Maximum number of messages between two calls of [`ClientDriver::on_iteration`].
    pub max_messages: u32,
}

impl Measurements {
    pub fn show(&mut self, when: &str) {
        let middle = |times: &mut Vec<Duration>| {
            times.sort();
            (times[times.len() / 2], times[times.len() * 99 / 100])
        };
        let (work, waits) = (middle(&mut self.work), middle(&mut self.waits));
        let iterations = self.iterations.iter().max();
        println!("{when}: work {work:?}, waits {waits:?} (median and p99)");
        println!(
            "{when}: iterations {iterations:?}, longest {:?}, messages {}",
            self.longest_iteration, self.max_messages
        );
    }
}

/// A client that still waits for its answer.
struct PendingClient {
    stream: TcpStream,
    connected_at: Instant,
    iteration: u32,
    work: Duration,
    /// Number of connections that the master had accepted before this client connected.
    accepted: u64,
    is_accepted: bool,
}

/// Connects clients to the well-behaved worker from inside the master's loop, and measures the
/// master's work for each client.
struct ClientDriver {
    address: SocketAddr,
    /// Process ID of the well-behaved worker.
    honest: u32,
    iteration: u32,
    last_iteration: Instant,
    /// Iteration in which the worker was first seen asleep and therefore waiting for its next
    /// client. `None` until then.
    idle_since: Option<u32>,
    client: Option<PendingClient>,
    /// Number of messages since the previous call of `on_iteration`.
    messages: Rc<Cell<u32>>,
    measurements: Measurements,
}

/// Connects clients one after another, and calls `then` once the last client has its answer.
pub fn measure_clients(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, Measurements) + 'static,
) {
    let honest = master.workers()[0].process().id();
    let mut driver = ClientDriver {
        address,
        honest,
        iteration: 0,
        last_iteration: Instant::now(),
        idle_since: None,
        client: None,
        messages: Rc::default(),
        measurements: Measurements::default(),
    };
    let messages = Rc::clone(&driver.messages);
    let counting = master.on_message(move |_, _, _| messages.set(messages.get() + 1));
    let mut then = Some(then);
    // Watch a descriptor that is always readable, so that every loop iteration calls the watch.
    let (ready, mut other) = UnixStream::pair().unwrap();
    other.write_all(b"x").unwrap();
    let on_iteration = move |master: &Master, _: &UnixStream| {
        let _open = &other;
        driver.on_iteration(master);
        if driver.measurements.waits.len() < CLIENTS {
            return Some(Interest::Readable);
        }
        master.remove_callback(counting);
        then.take().unwrap()(master, std::mem::take(&mut driver.measurements));
        None
    };
    master
        .watch(ready, Interest::Readable, on_iteration)
        .unwrap();
}

impl ClientDriver {
    fn on_iteration(&mut self, master: &Master) {
        self.iteration += 1;
        let took = self.last_iteration.elapsed();
        self.last_iteration = Instant::now();
        self.measurements.longest_iteration = self.measurements.longest_iteration.max(took);
        let messages = self.messages.take();
        self.measurements.max_messages = self.measurements.max_messages.max(messages);
        let Some(client) = &mut self.client else {
            return self.begin(master);
        };
        if !client.is_accepted && master.ledger().accepted > client.accepted {
            client.is_accepted = true;
            self.measurements.work.push(thread_cpu_time() - client.work);
            self.measurements
                .iterations
                .push(self.iteration - client.iteration);
        }
        let mut answer = [0; 8];
        match client.stream.read(&mut answer) {
            Ok(0) => {
                self.measurements.waits.push(client.connected_at.elapsed());
                self.client = None;
                self.idle_since = None;
            }
            Ok(length) => assert_eq!(&answer[..length], b"1"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }

    /// Connects the next client once the worker waits for it and the master has had time to process
    /// the worker's idle frame.
    fn begin(&mut self, master: &Master) {
        let Some(idle_since) = self.idle_since else {
            self.idle_since = is_asleep(self.honest).then_some(self.iteration);
            return;
        };
        if self.iteration < idle_since + 3 {
            return;
        }
        let (iteration, accepted) = (self.iteration, master.ledger().accepted);
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.client = Some(PendingClient {
            stream,
            connected_at: Instant::now(),
            iteration,
            work: thread_cpu_time(),
            accepted,
            is_accepted: false,
        });
    }
}

fn is_asleep(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.contains(") S ")
}

/// Returns this thread's CPU time.
pub fn thread_cpu_time() -> Duration {
    let mut time = nix::libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    #[allow(unsafe_code)]
    // SAFETY: the pointer is valid for writes of one `timespec`.
    let result =
        unsafe { nix::libc::clock_gettime(nix::libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

pub fn median(times: &[Duration]) -> Duration {
    times[times.len() / 2]
}

/// Returns the size with this name in `/proc/self/status`, in bytes.
fn size(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.unwrap().trim_start_matches(':').trim();
    let kib: usize = kib.strip_suffix(" kB").unwrap().parse().unwrap();
    kib << 10
}

/// Returns the number of open descriptors. The number includes the descriptor that lists the
/// directory.
pub fn count_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The master's peak use of memory and descriptors since [`Peak::from_now`].
pub struct Peak {
    bytes: usize,
    fds: usize,
    max_fds: Rc<Cell<usize>>,
}

impl Peak {
    /// Starts a measurement that counts the descriptors every millisecond while the master's loop
    /// runs.
    pub fn from_now(master: &Master) -> Self {
        // Writing 5 resets the peak resident set size (see proc_pid_clear_refs(5)).
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let fds = count_fds();
        let max_fds = Rc::new(Cell::new(fds));
        let most = Rc::clone(&max_fds);
        let count = move |_: &Master| most.set(most.get().max(count_fds()));
        master.unreference(master.set_interval(Duration::from_millis(1), count));
        let bytes = size("VmRSS");
        Self {
            bytes,
            fds,
            max_fds,
        }
    }

    pub fn more_bytes(&self) -> usize {
        size("VmHWM").saturating_sub(self.bytes)
    }

    pub fn more_fds(&self) -> usize {
        self.max_fds.get() - self.fds
    }
}

/// Returns a process's CPU time, or zero if the process has exited.
pub fn cpu_time(pid: u32) -> Duration {
    let path = format!("/proc/{pid}/schedstat");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}
