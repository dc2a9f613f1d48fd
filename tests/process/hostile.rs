//! Tests with hostile workers, which write arbitrary bytes to their channel.
//!
//! The master must survive and not block. Its memory, its descriptors and its CPU time for a
//! hostile worker must stay within the limits in this module.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{
    Error, Interest, Master, SchedulingPolicy, SendError, Sent, Settings, Signal, WorkerProcess,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, recvmsg, sendmsg, setsockopt,
    shutdown, sockopt,
};

use crate::harness::{Log, cluster, in_background, scaled, serve_id, talk};

crate::scenarios! {
    garbled_frame_disconnects_the_worker
    oversized_frame_disconnects_the_worker
    program_that_ignores_its_channel_exits_without_an_error
    frames_in_the_wrong_state_disconnect_the_worker
    idle_report_without_a_queue_disconnects_the_worker_none
    idle_report_without_a_queue_disconnects_the_worker_sharded
    random_frames_are_tolerated_or_disconnect_the_worker
    flood_of_messages_does_not_delay_other_workers
    flood_of_longer_messages_does_not_delay_other_workers
    flood_of_empty_frames_does_not_delay_other_workers
    flood_of_listen_frames_does_not_delay_other_workers
    flood_of_binds_does_not_delay_other_workers
    flood_of_idle_and_pause_frames_does_not_delay_other_workers
    flood_of_listening_frames_disconnects_the_worker
    worker_that_returns_every_connection_does_not_delay_other_workers
    unfinished_frame_does_not_delay_other_workers
    unfinished_header_does_not_delay_other_workers
    unannounced_descriptors_disconnect_the_worker
    descriptors_before_any_frame_disconnect_the_worker
    descriptors_that_the_application_ignores_are_closed
    descriptors_that_block_in_close_do_not_block_the_master
    excess_descriptors_that_block_in_close_do_not_block_the_master
    out_of_band_descriptors_do_not_block_the_master
    connection_that_blocks_in_close_does_not_block_the_master
    worker_that_never_reads_uses_bounded_memory
    worker_that_requests_and_never_reads_is_disconnected
    worker_that_binds_and_never_reads_is_disconnected
    absurd_receive_count_disconnects_the_worker
    worker_that_receives_nothing_gets_at_most_its_window
    worker_that_receives_nothing_does_not_delay_other_workers
    worker_that_overstates_its_count_queues_at_most_64_connections
    worker_that_overstates_its_count_and_pauses_does_not_delay_other_workers
    worker_that_never_answers_clients_does_not_delay_other_workers
    worker_that_shuts_down_its_queue_does_not_delay_other_workers
    worker_that_closes_its_queue_does_not_delay_other_workers
    blocking_queue_does_not_block_the_master
    queue_with_a_socket_filter_does_not_confuse_the_master
    queue_that_adds_pidfds_leaks_none_in_the_master
    worker_that_stops_itself_does_not_delay_other_workers
    worker_that_closes_its_channel_is_disconnected
}

// Limits on the master's resources that a single worker may occupy.

/// Maximum memory for received bytes: one incomplete frame of up to 1 MiB, and the 64 KiB of one
/// read.
const BYTES_IN: usize = (1 << 20) + (64 << 10);
/// Maximum memory for bytes that wait for a worker that does not read (`UNREAD_MAX` in
/// `src/wire/channel`).
const BYTES_OUT: usize = 9 << 20;
/// Maximum number of received descriptors, including those whose frames are still incomplete.
pub const FDS_IN: usize = 144;
/// Maximum number of descriptors that wait with their frames for a worker that does not read.
const FDS_OUT: usize = 512;
/// Maximum number of connections that the master dispatches to a worker between two idle reports.
const WINDOW: usize = 16;
/// Maximum number of connections in a queue if the worker overstates how many it has received. The
/// queue's send buffer then limits the number (`SEND_BUFFER` in `src/sys/queue.rs`).
const QUEUED_MAX: usize = 64;
/// Length of a queue's message in bytes. Each message carries one connection.
const QUEUE_MESSAGE: usize = 16;
const LISTENERS: usize = 64;
/// Descriptors per listener: the listening socket and both ends of the queue.
const FDS_PER_LISTENER: usize = 3;
/// Descriptors per worker: the channel, the disconnect token and the process descriptor.
const FDS_PER_WORKER: usize = 3;

/// Tolerance for the memory that the measurement uses and the allocator retains.
const SLACK_BYTES: usize = 4 << 20;
const SLACK_FDS: usize = 8;
/// Maximum factor by which an attack may increase the master's median CPU time between a client's
/// arrival and its acceptance. The largest measured factor is 21, in the flood of Idle and Pause
/// frames, of which the master processes at most 64 per iteration. Without the limit of 64 frames,
/// the factor is 100.
const WORK_FACTOR_MAX: u32 = 50;
/// Lower bound for the median without an attack. The test replaces a smaller median with this
/// bound, because cache misses alone could increase a smaller median by more than
/// `WORK_FACTOR_MAX`.
const WORK_MIN: Duration = Duration::from_micros(20);
/// Maximum number of loop iterations from a client's arrival until the test sees that the master
/// has accepted the client. In the worst allowed case, the master accepts the client in the second
/// iteration, after that iteration has called the measuring watch. The watch then sees the
/// acceptance in the third iteration.
const ITERATIONS_MAX: u32 = 3;
/// Maximum number of messages from one worker between two calls of the measuring watch.
///
/// The value is twice the master's limit of 64 messages per iteration, because parts of two
/// iterations lie between two calls.
const MESSAGES_MAX: u32 = 2 * 64;
/// Maximum duration of one iteration. An iteration takes longer if `close` blocks on one of the
/// descriptors from `connection_that_blocks_in_close`.
const ITERATION_MAX: Duration = Duration::from_secs(5);
/// Maximum time until the exit of an attacker that the master or the test has to kill.
const PATIENCE: Duration = Duration::from_secs(60);

/// Number of clients that the well-behaved worker serves, one after another.
const CLIENTS: usize = 100;

/// Environment variable that is set only in the attacker's process. [`run_attackers`] stores the
/// attacker's index in it.
pub const ATTACKER: &str = "ATTACKER";
/// Environment variable that is set only in the process of the neighbour in [`measure_baseline`].
const NEIGHBOUR: &str = "NEIGHBOUR";

/// The version of the frame format.
const VERSION: u8 = 3;
const ONLINE: u8 = 1;
const LISTEN: u8 = 2;
const LISTENING: u8 = 3;
const IDLE: u8 = 4;
const PAUSE: u8 = 5;
pub const RELEASE: u8 = 6;
const DISCONNECT_REQUEST: u8 = 7;
pub const PARK: u8 = 8;
pub const PARK_AGAIN: u8 = 9;
pub const DETACH: u8 = 10;
const MESSAGE: u8 = 127;
const PREAMBLE: u8 = 64;
const REPLY: u8 = 65;
const LISTENER_CLOSED: u8 = 66;

/// Index of the listener that the well-behaved worker also requests.
pub const SHARED_INDEX: u32 = 0;
/// Index of a listener that only the attacker requests.
const OWN_INDEX: u32 = 1;
const OTHER_INDEX: u32 = 2;

pub fn frame(kind: u8, fds: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_le_bytes();
    let mut frame = length.to_vec();
    // The header's last byte is the number of descriptors of all frames that are sent with one
    // call. This frame is sent alone, so the number is `fds` again.
    frame.extend([VERSION, kind, fds, fds]);
    frame.extend(body);
    frame
}

/// Encodes 32-bit numbers as a frame's body.
pub fn numbers(parts: &[u32]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.to_le_bytes()).collect()
}

pub fn online() -> Vec<u8> {
    frame(ONLINE, 0, &[])
}

pub fn message(text: &[u8]) -> Vec<u8> {
    frame(MESSAGE, 0, text)
}

/// Encodes a request to listen on a free port of 127.0.0.1.
fn listen(index: u32) -> Vec<u8> {
    let mut body = numbers(&[index, index, 511]);
    // No flags, and no timeouts.
    body.extend([0; 9]);
    body.extend([0, 4, 0, 0, 127, 0, 0, 1]);
    frame(LISTEN, 0, &body)
}

fn idle(handle: u32, received: u64) -> Vec<u8> {
    let body = [
        numbers(&[handle]),
        received.to_le_bytes().to_vec(),
        numbers(&[0]),
    ]
    .concat();
    frame(IDLE, 0, &body)
}

/// Encodes a frame whose body is a listener's handle.
pub fn handle_frame(kind: u8, handle: u32) -> Vec<u8> {
    frame(kind, 0, &numbers(&[handle]))
}

/// A worker that does not call `init`, and reads and writes its channel directly.
pub struct Attacker {
    pub channel: UnixStream,
    /// Descriptors that the attacker has received with frames and not yet used.
    fds: RefCell<VecDeque<OwnedFd>>,
}

impl Attacker {
    /// Returns the attacker in this process, after reading the preamble.
    ///
    /// Returns `None` if this process does not play the attacker.
    pub fn of_this_process() -> Option<Self> {
        std::env::var_os(ATTACKER)?;
        let number = std::env::var("CLUSTER_CHANNEL_FD").unwrap();
        #[allow(unsafe_code)]
        // SAFETY: the master passed this open descriptor to this process, and no other code owns
        // it.
        let channel = unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
        let attacker = Self {
            channel: channel.into(),
            fds: RefCell::default(),
        };
        let (kind, _) = attacker.receive_frame();
        assert_eq!(kind, PREAMBLE);
        // Close the disconnect token, which comes with the preamble.
        attacker.fds.borrow_mut().clear();
        Some(attacker)
    }

    /// Writes to the channel, or waits to be killed if the write fails.
    ///
    /// The master closes the channel when it disconnects a worker, and then kills the worker.
    pub fn send(&self, bytes: &[u8]) {
        if (&self.channel).write_all(bytes).is_err() {
            self.wait_to_be_killed();
        }
    }

    pub fn send_with_fds(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let slices = [IoSlice::new(bytes)];
        let channel = self.channel.as_raw_fd();
        let sent = sendmsg::<()>(channel, &slices, &rights, MsgFlags::MSG_NOSIGNAL, None);
        if sent.is_err() {
            self.wait_to_be_killed();
        }
    }

    /// Sends the message that makes the test start clients of the well-behaved worker.
    fn start_clients(&self) {
        self.send(&message(b"begin"));
    }

    /// Fills the buffer, and stores the descriptors that arrive with the bytes.
    fn read(&self, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let (bytes, fds) = receive(self.channel.as_raw_fd(), buffer).unwrap_or_default();
            if bytes == 0 {
                self.wait_to_be_killed();
            }
            self.fds.borrow_mut().extend(fds);
            buffer = &mut buffer[bytes..];
        }
    }

    /// Reads the next frame, and returns its kind and body.
    fn receive_frame(&self) -> (u8, Vec<u8>) {
        let mut header = [0; 8];
        self.read(&mut header);
        let [a, b, c, d, _, kind, _, _] = header;
        let mut body = vec![0; u32::from_le_bytes([a, b, c, d]) as usize];
        self.read(&mut body);
        (kind, body)
    }

    /// Requests a listener on a free port, and reports to the master that the worker is listening.
    pub fn listen(&self, index: u32) -> Listener<'_> {
        self.send(&listen(index));
        let body = loop {
            let (kind, body) = self.receive_frame();
            if kind == REPLY {
                break body;
            }
        };
        let handle = u32::from_le_bytes(body[8..12].try_into().unwrap());
        let port = u16::from_le_bytes(body[14..16].try_into().unwrap());
        self.send(&handle_frame(LISTENING, handle));
        let queue = self.fds.borrow_mut().pop_front().unwrap();
        let attacker = self;
        Listener {
            attacker,
            handle,
            port,
            queue,
        }
    }

    pub fn wait_to_be_killed(&self) -> ! {
        loop {
            nix::unistd::pause();
        }
    }

    fn flood(&self, one: &[u8]) -> ! {
        let many = one.repeat((64 << 10) / one.len() + 1);
        loop {
            self.send(&many);
        }
    }
}

/// Reads once, and returns the number of bytes and the descriptors that arrived with them.
fn receive(socket: RawFd, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; 64]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let received = recvmsg::<()>(socket, &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            #[allow(unsafe_code)]
            // SAFETY: `recvmsg` has just created these descriptors, so they are open and have no
            // other owner.
            fds.extend(
                numbers
                    .into_iter()
                    .map(|n| unsafe { OwnedFd::from_raw_fd(n) }),
            );
        }
    }
    Ok((received.bytes, fds))
}

/// The attacker's listener, with the queue that receives its connections.
pub struct Listener<'a> {
    attacker: &'a Attacker,
    pub handle: u32,
    pub port: u16,
    queue: OwnedFd,
}

impl Listener<'_> {
    /// Reports that the worker is idle and has received `received` connections in total. The report
    /// requests the next connection.
    pub fn idle(&self, received: u64) {
        self.attacker.send(&idle(self.handle, received));
    }

    fn pause(&self) {
        self.attacker.send(&handle_frame(PAUSE, self.handle));
    }

    /// Connects `count` clients, which send nothing and remain connected until they are dropped.
    fn clients(&self, count: usize) -> Vec<TcpStream> {
        let connect = |_| TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        (0..count).map(connect).collect()
    }

    /// Waits until the queue contains a connection.
    pub fn wait(&self) {
        let mut fds = [PollFd::new(self.queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
    }

    /// Receives one connection from the queue. Returns `None` if the queue is empty.
    pub fn receive(&self) -> Option<OwnedFd> {
        let (_, fds) = receive(self.queue.as_raw_fd(), &mut [0; QUEUE_MESSAGE]).ok()?;
        fds.into_iter().next()
    }

    /// Returns the number of connections in the queue.
    fn queued(&self) -> usize {
        let mut bytes: nix::libc::c_int = 0;
        let queue = self.queue.as_raw_fd();
        #[allow(unsafe_code)]
        // SAFETY: FIONREAD writes one `c_int`, and `bytes` is valid for this write.
        let counted = unsafe { nix::libc::ioctl(queue, nix::libc::FIONREAD, &raw mut bytes) };
        assert_eq!(counted, 0);
        usize::try_from(bytes).unwrap() / QUEUE_MESSAGE
    }

    /// Waits until the master has processed all frames that the attacker has sent, by waiting for a
    /// later frame's reply.
    fn wait_for_the_master(&self) {
        let other = self.attacker.listen(OTHER_INDEX);
        self.attacker.send(&handle_frame(RELEASE, other.handle));
    }
}

/// Expected outcome of an attack.
#[derive(Clone, Copy)]
enum Outcome {
    /// The master disconnects and kills the attacker, and reports why.
    Disconnected(&'static str),
    /// Like `Disconnected`, but the master also reports an error about another frame, which was
    /// pending when the master disconnected the attacker.
    DisconnectedTwice(&'static str, &'static str),
    /// The attacker breaks no rule. The test kills it after the clients have been served.
    Tolerated,
    /// Like `Tolerated`, but the master may first report an error that begins with this text,
    /// because the attacker's final messages exceed a limit.
    ToleratedWithLoss(&'static str),
}

#[derive(Clone, Copy)]
struct Case {
    attack: fn(&Attacker),
    outcome: Outcome,
    /// Maximum additional memory of the master, without [`SLACK_BYTES`].
    bytes: usize,
    /// Maximum number of additional descriptors of the master, without [`SLACK_FDS`].
    fds: usize,
    /// Whether the attack continues until the test kills the attacker.
    is_continuous: bool,
    /// Callback in the master, called when the attacker's first message arrives.
    reply: fn(&Master, &WorkerProcess),
}

impl Case {
    fn new(attack: fn(&Attacker), outcome: Outcome) -> Self {
        Self {
            attack,
            outcome,
            bytes: BYTES_IN,
            fds: FDS_PER_WORKER,
            is_continuous: false,
            reply: |_, _| {},
        }
    }

    fn tolerated(attack: fn(&Attacker)) -> Self {
        Self::new(attack, Outcome::Tolerated)
    }

    fn flood(attack: fn(&Attacker)) -> Self {
        let is_continuous = true;
        Self {
            is_continuous,
            ..Self::tolerated(attack)
        }
    }
}

/// Measurements of the master's work for clients of the well-behaved worker, whose id is 1.
///
/// The test limits the work and not the clients' waiting times, because waiting times depend on
/// the machine's load.
#[derive(Default)]
struct Measurements {
    /// The master's CPU time between each client's arrival and its acceptance.
    work: Vec<Duration>,
    /// Number of loop iterations between each client's arrival and its acceptance.
    iterations: Vec<u32>,
    /// Time from each client's connection until the end of its answer.
    waits: Vec<Duration>,
    longest_iteration: Duration,
    /// Maximum number of messages between two calls of [`ClientDriver::on_iteration`].
    max_messages: u32,
}

impl Measurements {
    fn show(&mut self, when: &str) {
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
fn measure_clients(
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

fn median(times: &[Duration]) -> Duration {
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
struct Peak {
    bytes: usize,
    fds: usize,
    max_fds: Rc<Cell<usize>>,
}

impl Peak {
    /// Starts a measurement that counts the descriptors every millisecond while the master's loop
    /// runs.
    fn from_now(master: &Master) -> Self {
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

    fn more_bytes(&self) -> usize {
        size("VmHWM").saturating_sub(self.bytes)
    }

    fn more_fds(&self) -> usize {
        self.max_fds.get() - self.fds
    }
}

/// Runs the attack beside a well-behaved worker, which serves clients before and during the attack.
fn attack_beside_honest_worker(case: Case) {
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&online());
        (case.attack)(&attacker);
        attacker.wait_to_be_killed();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                let log = log.clone();
                measure_baseline(master, address, move |master, quiet| {
                    attack(master, address, quiet, case, &log);
                });
            });
        },
        |worker| {
            if std::env::var_os(NEIGHBOUR).is_some() {
                // Ignore an error, because the worker may already be disconnecting when it sends
                // its last reply.
                worker.on_message(|worker, _| drop(worker.send(b"pong")));
                let _ = worker.send(b"ready").unwrap();
                worker.run().unwrap();
            } else {
                serve_id(&worker, "127.0.0.1:0");
            }
        },
    );
    let expected = match case.outcome {
        Outcome::Disconnected(why) => vec![why, "disconnect", "killed"],
        Outcome::DisconnectedTwice(why, late) => vec![why, late, "disconnect", "killed"],
        Outcome::Tolerated | Outcome::ToleratedWithLoss(_) => vec!["disconnect", "killed"],
    };
    let mut events = entries.take();
    if let Outcome::ToleratedWithLoss(why) = case.outcome {
        if events.first().is_some_and(|event| event.starts_with(why)) {
            events.remove(0);
        }
    }
    assert_eq!(events, expected);
}

/// Measures the well-behaved worker beside a neighbour that breaks no rule.
///
/// The neighbour and the master exchange messages without a pause. Each sends a message as soon as
/// it has received one.
fn measure_baseline(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, Measurements) + 'static,
) {
    let neighbour = master.fork_with([(NEIGHBOUR, "1")]).unwrap();
    neighbour.on_message(|_, neighbour, _| {
        let _ = neighbour.send(b"ping");
    });
    let mut then = Some(then);
    neighbour.on_online(move |master, neighbour| {
        let (neighbour, then) = (neighbour.clone(), then.take().unwrap());
        let finish = move |_: &Master, quiet| {
            let mut rest = Some((then, quiet));
            neighbour.on_exit(move |master, _, _| {
                let (then, quiet) = rest.take().unwrap();
                then(master, quiet);
            });
            neighbour.disconnect();
        };
        measure_clients(master, address, finish);
    });
}

/// Returns whether the address sanitizer is in use, which changes memory use and speed.
/// `ASAN_OPTIONS` is set in these runs.
fn is_instrumented() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_some()
}

/// Returns a process's CPU time, or zero if the process has exited.
pub fn cpu_time(pid: u32) -> Duration {
    let path = format!("/proc/{pid}/schedstat");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

fn attack(master: &Master, address: SocketAddr, mut quiet: Measurements, case: Case, log: &Log) {
    let peak = Peak::from_now(master);
    let attacker = master.fork_with([(ATTACKER, "1")]).unwrap();
    note_attacker_events(&attacker, log);
    let missing = Rc::new(Cell::new(2));
    let finish = Rc::new(move |master: &Master| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            println!("bytes {} fds {}", peak.more_bytes(), peak.more_fds());
            let bounded = peak.more_bytes() <= case.bytes + SLACK_BYTES;
            assert!(bounded || is_instrumented(), "bytes");
            assert!(peak.more_fds() <= case.fds + SLACK_FDS, "descriptors");
            master.disconnect();
        }
    });
    let exited = Rc::clone(&finish);
    attacker.on_exit(move |master, _, _| exited(master));
    let served =
        move |master: &Master, attacker: &WorkerProcess, mut busy: Measurements, cpu_before| {
            quiet.show("quiet");
            busy.show("busy");
            assert!(busy.longest_iteration < scaled(ITERATION_MAX), "blocked");
            assert!(
                busy.iterations
                    .iter()
                    .all(|iterations| *iterations <= ITERATIONS_MAX),
                "accepted too late"
            );
            assert!(
                busy.max_messages <= MESSAGES_MAX,
                "too many messages in one iteration"
            );
            let most = WORK_FACTOR_MAX * median(&quiet.work).max(WORK_MIN);
            assert!(median(&busy.work) < most || is_instrumented(), "delayed");
            if matches!(
                case.outcome,
                Outcome::Tolerated | Outcome::ToleratedWithLoss(_)
            ) {
                assert!(!attacker.is_dead());
                let is_flooding = cpu_time(attacker.process().id()) > cpu_before;
                assert!(is_flooding || !case.is_continuous, "the flood has stopped");
                attacker.process().kill(Signal::KILL);
            }
            master.unreference(
                master.set_timeout(scaled(PATIENCE), |_| panic!("the attacker was not killed")),
            );
            finish(master);
        };
    let mut served = Some(served);
    attacker.on_message(move |master, attacker, _| {
        let Some(mut served) = served.take() else {
            return;
        };
        (case.reply)(master, attacker);
        let cpu_before = cpu_time(attacker.process().id());
        let attacker = attacker.clone();
        measure_clients(master, address, move |master, busy| {
            served(master, &attacker, busy, cpu_before);
        });
    });
}

/// Logs the attacker's errors, disconnect and exit. Leaves out errors that `send` has already
/// returned, and prefixes that name the worker.
pub fn note_attacker_events(attacker: &WorkerProcess, log: &Log) {
    let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log.clone());
    let prefix = [
        format!("invalid frame from worker {}: ", attacker.id()),
        format!("lost the channel to worker {}: ", attacker.id()),
    ];
    attacker.on_error(move |_, _, error| {
        if let Error::Send { .. } = error {
            return; // `send` has already returned this error.
        }
        let text = error.to_string();
        let found = prefix.iter().find_map(|prefix| text.strip_prefix(prefix));
        at_error.add(found.unwrap_or(&text));
    });
    attacker.on_disconnect(move |_, _| at_end.add("disconnect"));
    attacker.on_exit(move |_, _, status| match status.signal() {
        Some(9) => at_exit.add("killed"),
        _ => at_exit.add(status.to_string()),
    });
}

/// Runs a shell as a worker, and returns the worker's events. The shell writes `bytes` to its
/// channel and waits to be killed.
///
/// `bytes` is in printf(1)'s notation.
fn worker_that_writes(bytes: &str) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let script = format!("printf '{bytes}' >&$CLUSTER_CHANNEL_FD; exec sleep 600");
            let settings = Settings::default().exec("/bin/sh");
            master.setup_master(settings.args(["-c".to_owned(), script]));
            let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log);
            master.on_error(move |_, worker, error| {
                assert_eq!(worker.map(|worker| worker.id().get()), Some(1));
                at_error.add(error.to_string());
            });
            master.on_disconnect(move |_, _| at_end.add("disconnect"));
            master.on_exit(move |_, worker, status| {
                let flag = worker.exited_after_disconnect();
                at_exit.add(format!("{:?} {flag:?}", status.signal()));
            });
            master.fork().unwrap();
        },
        |_| unreachable!("the worker is a shell"),
    );
    entries.take()
}

fn expect_disconnected(bytes: &str, why: &str) {
    let seen = worker_that_writes(bytes);
    let error = format!("invalid frame from worker 1: {why}");
    assert_eq!(seen, [error.as_str(), "disconnect", "Some(9) Some(false)"]);
}

fn idle_report_without_a_queue_disconnects_the_worker_none() {
    report_idle_without_a_queue(SchedulingPolicy::Shared);
}

fn idle_report_without_a_queue_disconnects_the_worker_sharded() {
    report_idle_without_a_queue(SchedulingPolicy::Sharded);
}

/// Lets the worker report that it is idle for a retained listener. The listener has no queue,
/// because workers accept from it themselves. A master that believed the report would block in
/// `accept` on this listener.
fn report_idle_without_a_queue(policy: SchedulingPolicy) {
    const FIRST_HANDLE: u32 = 1;
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&after_online([listen(0), idle(FIRST_HANDLE, 0)].concat()));
        attacker.wait_to_be_killed();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            let listener = master.listen("127.0.0.1:0").unwrap();
            let at_error = log.clone();
            master.on_error(move |_, _, error| at_error.add(error.to_string()));
            master.on_exit(move |_, worker, status| {
                // This line only makes the closure own the listener, so that the listener stays
                // open until the worker exits.
                let _ = &listener;
                let flag = worker.exited_after_disconnect();
                log.add(format!("{:?} {flag:?}", status.signal()));
            });
            master.fork_with([(ATTACKER, "1")]).unwrap();
        },
        |_| unreachable!("the worker is the attacker"),
    );
    let error = "invalid frame from worker 1: idle for a listener without a queue for the worker";
    assert_eq!(entries.take(), [error, "Some(9) Some(false)"]);
}

fn garbled_frame_disconnects_the_worker() {
    expect_disconnected(
        "GET / HTTP/1.1",
        "frame of version 47, this program supports version 3",
    );
}

fn oversized_frame_disconnects_the_worker() {
    let why = "frame of 2147483647 bytes, the limit is 1048576";
    expect_disconnected(r"\377\377\377\177\003\177\000\000", why);
}

fn program_that_ignores_its_channel_exits_without_an_error() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/true").args(["x"]));
            master.on_online(|_, _| panic!("the program never calls `init`"));
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(move |_, _, status| log.add(status.to_string()));
            master.fork().unwrap();
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Floods the master with frames, while a thread discards the replies.
fn flood_and_read(attacker: &Attacker, next: impl Fn(u32) -> Vec<u8>) -> ! {
    let channel = attacker.channel.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut &channel, &mut std::io::sink()));
    let mut n = 0;
    loop {
        let many: Vec<_> = (n..n + 1000).flat_map(&next).collect();
        attacker.send(&many);
        n += 1000;
    }
}

fn flood_of_messages_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&message(&[b'x'; 100]));
    }));
}

/// Floods the master with longer messages. A read returns fewer of them than the master processes
/// in an iteration (`FRAMES_PER_ITERATION`).
fn flood_of_longer_messages_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&message(&[b'x'; 1032]));
    }));
}

/// Floods with the shortest possible frames.
fn flood_of_empty_frames_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        attacker.flood(&frame(DISCONNECT_REQUEST, 0, &[]));
    }));
}

fn flood_of_listen_frames_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        attacker.start_clients();
        flood_and_read(attacker, listen);
    });
    let fds = FDS_PER_WORKER + LISTENERS * FDS_PER_LISTENER;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Opens and releases listeners repeatedly, and therefore never exceeds the limit on listeners.
fn flood_of_binds_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        // Calculate the handles of later listeners: the master assigns handles in sequence, and no
        // other worker opens listeners now.
        let first = attacker.listen(OWN_INDEX).handle;
        attacker.start_clients();
        flood_and_read(attacker, |n| {
            [listen(OTHER_INDEX), handle_frame(RELEASE, first + 1 + n)].concat()
        });
    });
    let fds = FDS_WITH_TWO_LISTENERS + FDS_OUT;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Makes the master dispatch and reclaim one connection repeatedly.
fn flood_of_idle_and_pause_frames_does_not_delay_other_workers() {
    let case = Case::flood(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(1);
        attacker.start_clients();
        attacker.flood(&[idle(own.handle, 0), handle_frame(PAUSE, own.handle)].concat());
    });
    let fds = FDS_PER_WORKER + FDS_PER_LISTENER + 1;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn flood_of_listening_frames_disconnects_the_worker() {
    let attack = |attacker: &Attacker| {
        let own = attacker.listen(OWN_INDEX);
        attacker.start_clients();
        attacker.flood(&handle_frame(LISTENING, own.handle));
    };
    let why = Outcome::Disconnected("second report that the worker is listening");
    attack_beside_honest_worker(Case::new(attack, why));
}

/// Shares the well-behaved worker's listener, and returns each connection that the master
/// dispatches to the attacker.
fn worker_that_returns_every_connection_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        attacker.start_clients();
        attacker.flood(&[idle(shared.handle, 0), handle_frame(PAUSE, shared.handle)].concat());
    }));
}

/// Sends a frame that lacks one byte. The last 64 KiB are sent one byte at a time.
fn unfinished_frame_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        attacker.start_clients();
        let long = message(&[0; 1 << 20]);
        let (most, rest) = long.split_at(long.len() - (64 << 10));
        attacker.send(most);
        for byte in &rest[1..] {
            attacker.send(&[*byte]);
        }
    }));
}

fn unfinished_header_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        attacker.start_clients();
        attacker.send(&online()[..4]);
    }));
}

/// Descriptors to send with one message: the most that a well-behaved peer sends with one call.
const ONE_CALL: [RawFd; 64] = [0; 64];

const UNANNOUNCED: Outcome = Outcome::Disconnected("invalid number of descriptors");

fn unannounced_descriptors_disconnect_the_worker() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        loop {
            attacker.send_with_fds(&message(b"x"), &ONE_CALL);
        }
    };
    let fds = FDS_PER_WORKER + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    attack_beside_honest_worker(Case { fds, ..case });
}

fn descriptors_before_any_frame_disconnect_the_worker() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        for byte in &message(b"")[..7] {
            attacker.send_with_fds(&[*byte], &ONE_CALL);
        }
    };
    let fds = FDS_PER_WORKER + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    attack_beside_honest_worker(Case { fds, ..case });
}

fn descriptors_that_the_application_ignores_are_closed() {
    let case = Case::flood(|attacker| {
        attacker.start_clients();
        loop {
            attacker.send_with_fds(&frame(MESSAGE, 16, b"x"), &ONE_CALL[..16]);
        }
    });
    let fds = FDS_PER_WORKER + FDS_IN;
    let outcome = Outcome::ToleratedWithLoss("no resources for the channel to worker 3: ");
    attack_beside_honest_worker(Case {
        fds,
        outcome,
        ..case
    });
}

/// Makes the last `close` of the socket block for `time`, no matter which process calls it. The
/// kernel waits for unsent data, and the peer does not read.
fn make_close_block(mut socket: &TcpStream, time: Duration) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: i32::try_from(time.as_secs()).unwrap(),
    };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
}

fn descriptors_that_block_in_close_do_not_block_the_master() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        let fds = [client.as_raw_fd()];
        attacker.send_with_fds(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        attacker.wait_to_be_killed();
    }));
}

/// Returns a connection whose last `close` blocks, and its peer, which does not read.
fn connection_that_blocks_in_close() -> (TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    make_close_block(&client, 4 * scaled(ITERATION_MAX));
    (client, server.accept().unwrap().0)
}

/// Sends more descriptors than a well-behaved peer sends with one call. If the master's buffer were
/// too small for them, the kernel would close the excess descriptors while the master reads, and
/// this `close` would block the master.
fn excess_descriptors_that_block_in_close_do_not_block_the_master() {
    let attack = |attacker: &Attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        // Wait for a reply, which shows that the master has processed the start message. Otherwise
        // one read could return this message together with the descriptors, and the master ignores
        // all bytes of a read that has too many descriptors.
        attacker.listen(OWN_INDEX);
        let null = File::open("/dev/null").unwrap();
        let mut fds = [null.as_raw_fd(); 250];
        fds[249] = client.as_raw_fd();
        attacker.send_with_fds(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        attacker.wait_to_be_killed();
    };
    let why = Outcome::Disconnected("invalid number of descriptors");
    let case = Case::new(attack, why);
    attack_beside_honest_worker(Case { fds: 256, ..case });
}

/// Sends a descriptor with out-of-band data. Without SO_OOBINLINE, the kernel would skip the data
/// and close the descriptor while the master reads, and this `close` would block the master.
fn out_of_band_descriptors_do_not_block_the_master() {
    let attack = |attacker: &Attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        let fds = [client.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_OOB;
        let byte = [IoSlice::new(b"o")];
        let sent = sendmsg::<()>(attacker.channel.as_raw_fd(), &byte, &rights, flags, None);
        if sent.is_err() {
            // Send a normal byte instead, because this system does not support out-of-band data on
            // Unix sockets.
            attacker.send(b"o");
        }
        drop(client);
        attacker.send(&message(b"x"));
        attacker.wait_to_be_killed();
    };
    let why = Outcome::Disconnected("frame of version 0, this program supports version 3");
    attack_beside_honest_worker(Case::new(attack, why));
}

/// Tests a connection whose last `close` blocks. The worker closes its copy first.
///
/// The master closes its own copy once the worker has reported that it has received the connection.
/// This `close` is the last one, and must not block the master.
fn connection_that_blocks_in_close_does_not_block_the_master() {
    const LINGER: Duration = Duration::from_secs(10);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let last = Cell::new(Instant::now());
            let longest = Rc::new(Cell::new(Duration::ZERO));
            let most = Rc::clone(&longest);
            let heartbeat = move |_: &Master| {
                let since = last.replace(Instant::now()).elapsed();
                most.set(most.get().max(since));
            };
            master.unreference(master.set_interval(Duration::from_millis(10), heartbeat));
            let worker = master.fork().unwrap();
            worker.on_listening(|_, worker, address| {
                let address: SocketAddr = address.to_string().parse().unwrap();
                let client = RefCell::new(Some(TcpStream::connect(address).unwrap()));
                worker.on_message(move |_, worker, _| {
                    client.take();
                    worker.disconnect();
                });
            });
            worker.on_exit(move |_, _, status| {
                log.add(status.to_string());
                println!("{:?}", longest.get());
                assert!(longest.get() < LINGER / 2, "blocked {:?}", longest.get());
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let connection = listener.accept().unwrap().unwrap();
            make_close_block(&connection, LINGER);
            drop(connection);
            worker.set_timeout(Duration::ZERO, |worker| {
                assert_eq!(worker.send(b"waiting").unwrap(), Sent::Continue)
            });
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Sends messages until `send` reports that the queue is full.
fn send_until_refused(_: &Master, attacker: &WorkerProcess) {
    let refused = loop {
        if let Err(error) = attacker.send(&[0; 64 << 10]) {
            break error;
        }
    };
    let Error::Send { worker, reason, .. } = refused else {
        panic!("{refused}");
    };
    assert_eq!(
        (worker, reason),
        (Some(attacker.id()), SendError::QueueFull)
    );
}

fn worker_that_never_reads_uses_bounded_memory() {
    let case = Case::tolerated(Attacker::start_clients);
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        reply,
        ..case
    });
}

fn worker_that_requests_and_never_reads_is_disconnected() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        for n in 0.. {
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(listen).collect();
            attacker.send(&many);
        }
    };
    // Expect "out of memory": the master has no space for more replies, and a worker that does not
    // read them breaks no rule of the protocol. The application has already filled most of the
    // outgoing queue, so few replies fit.
    let case = Case::new(attack, Outcome::Disconnected("out of memory"));
    let fds = FDS_PER_WORKER + LISTENERS * FDS_PER_LISTENER + FDS_OUT;
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

/// Opens and releases listeners without reading the replies.
///
/// The attacker never exceeds the limit on listeners, but the replies and their descriptors
/// accumulate in the master.
fn worker_that_binds_and_never_reads_is_disconnected() {
    let attack = |attacker: &Attacker| {
        let first = attacker.listen(OWN_INDEX).handle;
        attacker.start_clients();
        for n in 0.. {
            let one = |n| [listen(OTHER_INDEX), handle_frame(RELEASE, first + 1 + n)].concat();
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(one).collect();
            attacker.send(&many);
        }
    };
    // Once the outgoing queue is full, later requests open no listener. The next frame then
    // releases a listener that does not exist.
    let outcome = Outcome::DisconnectedTwice(
        "out of memory",
        "release of a listener that the worker does not have",
    );
    let case = Case::new(attack, outcome);
    let (bytes, fds) = (BYTES_IN + BYTES_OUT, FDS_WITH_TWO_LISTENERS + FDS_OUT);
    let reply = send_until_refused;
    attack_beside_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

fn absurd_receive_count_disconnects_the_worker() {
    let attack = |attacker: &Attacker| {
        let own = attacker.listen(OWN_INDEX);
        attacker.start_clients();
        own.idle(1 << 40);
    };
    let why = Outcome::Disconnected("more connections received than were dispatched");
    attack_beside_honest_worker(Case::new(attack, why));
}

/// Descriptors for a worker with its own listener and a second one for `wait_for_the_master`.
const FDS_WITH_TWO_LISTENERS: usize = FDS_PER_WORKER + 2 * FDS_PER_LISTENER;

fn worker_that_receives_nothing_gets_at_most_its_window() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        for _ in 0..10 {
            own.idle(0);
            own.wait_for_the_master();
            assert_eq!(own.queued(), 1);
        }
        assert!(own.receive().is_some());
        own.idle(1);
        own.wait_for_the_master();
        assert!((1..=2).contains(&own.queued()), "{}", own.queued());
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    let fds = FDS_WITH_TWO_LISTENERS;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn worker_that_receives_nothing_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    attack_beside_honest_worker(case);
}

/// Reports queued connections as received, repeatedly. Returns how many connections are then in the
/// queue.
fn overstate(own: &Listener<'_>) -> usize {
    for _ in 0..50 {
        own.idle(own.queued() as u64);
        own.wait_for_the_master();
    }
    own.queued()
}

fn worker_that_overstates_its_count_queues_at_most_64_connections() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * QUEUED_MAX);
        let queued = overstate(&own);
        assert!((WINDOW + 1..=QUEUED_MAX).contains(&queued), "{queued}");
        attacker.start_clients();
        loop {
            overstate(&own);
        }
    });
    // The master holds up to one window of connections that do not fit in the queue.
    let fds = FDS_WITH_TWO_LISTENERS + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Checks that the master reclaims queued connections even if the attacker has reported them as
/// received.
fn worker_that_overstates_its_count_and_pauses_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * QUEUED_MAX);
        for _ in 0..3 {
            assert!(overstate(&own) > 0);
            own.pause();
            own.wait_for_the_master();
            assert_eq!(own.queued(), 0);
            own.idle(0);
            own.wait();
        }
        attacker.start_clients();
        attacker.wait_to_be_killed();
    });
    let fds = FDS_WITH_TWO_LISTENERS + QUEUED_MAX + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn worker_that_never_answers_clients_does_not_delay_other_workers() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        attacker.start_clients();
        own.idle(0);
        let mut received = Vec::new();
        loop {
            own.wait();
            received.extend(std::iter::from_fn(|| own.receive()));
            own.idle(received.len() as u64);
        }
    });
    let fds = FDS_PER_WORKER + FDS_PER_LISTENER + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Requests connections repeatedly, although the master cannot dispatch any to the attacker.
fn worker_that_shuts_down_its_queue_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::flood(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shutdown(shared.queue.as_raw_fd(), Shutdown::Both).unwrap();
        attacker.start_clients();
        attacker.flood(&idle(shared.handle, 0));
    }));
}

fn worker_that_closes_its_queue_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        drop(shared.queue);
        attacker.start_clients();
        attacker.wait_to_be_killed();
    }));
}

/// Makes the queue's receiving end blocking. The master also reads from this end to reclaim
/// connections, and shares its file status flags.
fn blocking_queue_does_not_block_the_master() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        fcntl(&own.queue, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        attacker.start_clients();
        own.pause();
        attacker.wait_to_be_killed();
    });
    attack_beside_honest_worker(case);
}

/// Sets a socket option on a queue's receiving end, which the master shares. Ignores an error,
/// because not every system permits the option.
fn set_option<T>(own: &Listener<'_>, option: nix::libc::c_int, value: &T) {
    let size = nix::libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let (queue, value) = (own.queue.as_raw_fd(), std::ptr::from_ref(value).cast());
    #[allow(unsafe_code)]
    // SAFETY: `value` points to a `T` that is valid for reads of `size` bytes during the call.
    let set = unsafe { nix::libc::setsockopt(queue, nix::libc::SOL_SOCKET, option, value, size) };
    println!("option {option}: {set}");
}

/// Requests 100 connections, one after another. Pauses after each, so that the master reclaims
/// the connection. Then starts the clients and waits to be killed.
fn pause_repeatedly(own: &Listener<'_>) -> ! {
    for _ in 0..100 {
        own.idle(0);
        own.wait();
        own.pause();
        own.wait_for_the_master();
        assert_eq!(own.queued(), 0);
    }
    own.attacker.start_clients();
    own.attacker.wait_to_be_killed();
}

/// Attaches a socket filter that truncates each message to one byte. The master also reads from
/// this queue, to reclaim connections.
fn queue_with_a_socket_filter_does_not_confuse_the_master() {
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(WINDOW);
        let mut filter = nix::libc::sock_filter {
            code: 6, // BPF_RET returns the number of bytes to keep.
            jt: 0,
            jf: 0,
            k: 1,
        };
        let program = nix::libc::sock_fprog {
            len: 1,
            filter: &raw mut filter,
        };
        set_option(&own, nix::libc::SO_ATTACH_FILTER, &program);
        pause_repeatedly(&own);
    });
    let fds = FDS_WITH_TWO_LISTENERS + WINDOW;
    attack_beside_honest_worker(Case { fds, ..case });
}

/// Makes the kernel add the sender's pidfd to each message (`SO_PASSPIDFD`). The master also
/// receives the pidfds when it reclaims connections, and must close them.
fn queue_that_adds_pidfds_leaks_none_in_the_master() {
    const SO_PASSPIDFD: nix::libc::c_int = 76;
    let case = Case::tolerated(|attacker| {
        let own = attacker.listen(OWN_INDEX);
        let _clients = own.clients(1);
        set_option(&own, SO_PASSPIDFD, &1i32);
        pause_repeatedly(&own);
    });
    let fds = FDS_WITH_TWO_LISTENERS + 1;
    attack_beside_honest_worker(Case { fds, ..case });
}

fn worker_that_stops_itself_does_not_delay_other_workers() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let shared = attacker.listen(SHARED_INDEX);
        shared.idle(0);
        attacker.start_clients();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    }));
}

fn worker_that_closes_its_channel_is_disconnected() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        attacker.start_clients();
        nix::unistd::close(attacker.channel.as_raw_fd()).unwrap();
        attacker.wait_to_be_killed();
    }));
}

/// Frames that make the master disconnect the worker, and the error that the master reports.
struct Violation {
    frames: fn(&Attacker) -> Vec<u8>,
    why: &'static str,
}

/// Handle of the well-behaved worker's listener, which is the first handle that the master assigns.
const SHARED_HANDLE: u32 = 1;
/// Handle that no listener has.
pub const NO_HANDLE: u32 = 77;

/// Shares the well-behaved worker's listener, and returns `frames` for the caller to send.
fn after_joining(attacker: &Attacker, frames: Vec<u8>) -> Vec<u8> {
    attacker.send(&online());
    assert_eq!(attacker.listen(SHARED_INDEX).handle, SHARED_HANDLE);
    frames
}

fn after_online(frames: Vec<u8>) -> Vec<u8> {
    [online(), frames].concat()
}

fn violations() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    let early = "frame sent before the worker was online";
    let mut all = vec![
        violation(|_| listen(1), early),
        violation(|_| handle_frame(LISTENING, SHARED_HANDLE), early),
        violation(|_| idle(SHARED_HANDLE, 0), early),
        violation(|_| handle_frame(RELEASE, SHARED_HANDLE), early),
        violation(|_| frame(DISCONNECT_REQUEST, 0, &[]), early),
        violation(|_| handle_frame(PAUSE, SHARED_HANDLE), early),
        violation(|_| message(b"x"), early),
        violation(
            |_| after_online(online()),
            "second report that the worker is online",
        ),
    ];
    all.extend(violations_without_a_listener());
    all.extend(violations_with_a_listener());
    all.extend(malformed_frames());
    all
}

/// Returns frames about a listener that does not exist, or that only another worker has.
fn violations_without_a_listener() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    let (ready_why, listening_why) = (
        "idle for a listener without a queue for the worker",
        "report of listening on a listener that the worker does not have",
    );
    let release_why = "release of a listener that the worker does not have";
    vec![
        violation(
            |_| after_online(handle_frame(LISTENING, NO_HANDLE)),
            listening_why,
        ),
        violation(
            |_| after_online(handle_frame(LISTENING, SHARED_HANDLE)),
            listening_why,
        ),
        violation(|_| after_online(idle(NO_HANDLE, 0)), ready_why),
        violation(|_| after_online(idle(SHARED_HANDLE, 0)), ready_why),
        violation(
            |_| after_online(handle_frame(RELEASE, NO_HANDLE)),
            release_why,
        ),
        violation(
            |_| after_online(handle_frame(RELEASE, SHARED_HANDLE)),
            release_why,
        ),
        violation(
            |attacker| {
                attacker.send(&online());
                let (here, _there) = UnixStream::pair().unwrap();
                park(attacker, SHARED_HANDLE, here.as_raw_fd())
            },
            "parked connection of a listener that the worker never had",
        ),
        violation(
            |_| after_online(handle_frame(PAUSE, NO_HANDLE)),
            "pause of a listener without queues",
        ),
        violation(
            |_| after_online(handle_frame(PAUSE, SHARED_HANDLE)),
            "pause of a queue that the worker does not have",
        ),
    ]
}

fn violations_with_a_listener() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    vec![
        violation(
            |attacker| after_joining(attacker, listen(SHARED_INDEX)),
            "second request for a listener with the same index",
        ),
        violation(
            |attacker| after_joining(attacker, idle(SHARED_HANDLE, 1)),
            "more connections received than were dispatched",
        ),
        violation(
            |attacker| after_joining(attacker, idle(SHARED_HANDLE, u64::MAX)),
            "more connections received than were dispatched",
        ),
        violation(
            |attacker| {
                after_joining(
                    attacker,
                    [handle_frame(RELEASE, SHARED_HANDLE), idle(SHARED_HANDLE, 0)].concat(),
                )
            },
            "idle for a listener without a queue for the worker",
        ),
        violation(
            |attacker| after_joining(attacker, handle_frame(RELEASE, SHARED_HANDLE).repeat(2)),
            "release of a listener that the worker does not have",
        ),
        violation(
            |attacker| {
                let frames = [
                    handle_frame(RELEASE, SHARED_HANDLE),
                    handle_frame(PAUSE, SHARED_HANDLE),
                ];
                after_joining(attacker, frames.concat())
            },
            "pause of a queue that the worker does not have",
        ),
        violation(
            |attacker| {
                let join = after_joining(attacker, Vec::new());
                attacker.send(&join);
                let (reader, _writer) = nix::unistd::pipe().unwrap();
                park(attacker, SHARED_HANDLE, reader.as_raw_fd())
            },
            "parked descriptor that is no connection",
        ),
        violation(
            |attacker| {
                let join = after_joining(attacker, Vec::new());
                attacker.send(&join);
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                park(attacker, SHARED_HANDLE, listener.as_raw_fd())
            },
            "parked descriptor that is no connection",
        ),
        violation(
            |attacker| after_joining(attacker, frame(PARK, 0, &numbers(&[SHARED_HANDLE, 1]))),
            "invalid number of descriptors",
        ),
        violation(
            |attacker| after_joining(attacker, frame(PARK_AGAIN, 0, &numbers(&[0]))),
            "report of a connection that the worker does not have",
        ),
        violation(
            |attacker| after_joining(attacker, frame(DETACH, 0, &numbers(&[u32::MAX]))),
            "report of a connection that the worker does not have",
        ),
    ]
}

/// Sends a frame that parks `fd` for the listener. Returns no frames for the caller to send.
fn park(attacker: &Attacker, handle: u32, fd: RawFd) -> Vec<u8> {
    attacker.send_with_fds(&frame(PARK, 1, &numbers(&[handle, 1])), &[fd]);
    Vec::new()
}

fn malformed_frames() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    vec![
        violation(|_| frame(0, 0, &[]), "unknown kind of frame 0"),
        violation(|_| frame(20, 0, &[0; 4]), "unknown kind of frame 20"),
        violation(|_| frame(255, 0, &[]), "unknown kind of frame 255"),
        violation(
            |_| frame(REPLY, 0, &numbers(&[1, 98])),
            "unknown kind of frame 65",
        ),
        violation(
            |_| frame(LISTENER_CLOSED, 0, &[0; 5]),
            "unknown kind of frame 66",
        ),
        violation(|_| frame(ONLINE, 0, b"x"), "malformed frame of kind 1"),
        violation(|_| frame(RELEASE, 0, b"abc"), "malformed frame of kind 6"),
        violation(|_| frame(IDLE, 0, &[0; 20]), "malformed frame of kind 4"),
        violation(|_| frame(IDLE, 0, &[0; 8]), "malformed frame of kind 4"),
        violation(|_| frame(PAUSE, 0, &[0; 12]), "malformed frame of kind 5"),
        violation(|_| frame(LISTEN, 0, &[0; 12]), "malformed frame of kind 2"),
        violation(|_| frame(MESSAGE, 17, &[]), "invalid number of descriptors"),
        violation(
            |_| after_online(frame(MESSAGE, 1, &[])),
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 0, 1],
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 2, 1],
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 1, 65],
            "invalid number of descriptors",
        ),
        violation(
            |attacker| {
                attacker.send_with_fds(&after_online(frame(MESSAGE, 2, &[])), &[0]);
                Vec::new()
            },
            "invalid number of descriptors",
        ),
        violation(
            |attacker| {
                attacker.send_with_fds(&frame(ONLINE, 1, &[]), &[0]);
                Vec::new()
            },
            "invalid number of descriptors",
        ),
    ]
}

/// Runs `count` attackers one after another, and checks after each that the well-behaved worker
/// still answers. `play` receives the attacker's index.
fn run_attackers(count: usize, play: fn(&Attacker, usize), log: &Log) {
    if let Some(attacker) = Attacker::of_this_process() {
        let which = std::env::var(ATTACKER).unwrap();
        play(&attacker, which.parse().unwrap());
        std::process::exit(0);
    }
    cluster(
        |master| {
            let log = log.clone();
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                next_attacker(master, address, 0, count, &log);
            });
            honest.on_error(|_, _, error| panic!("{error}"));
            honest.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn next_attacker(master: &Master, address: SocketAddr, which: usize, count: usize, log: &Log) {
    if which == count {
        return master.disconnect();
    }
    let attacker = master.fork_with([(ATTACKER, which.to_string())]).unwrap();
    note_attacker_events(&attacker, log);
    let log = log.clone();
    let late = master.set_timeout(scaled(PATIENCE), move |_| {
        panic!("attacker {which} was not killed")
    });
    attacker.on_exit(move |master, _, _| {
        master.clear_timer(late);
        let log = log.clone();
        let work = move || assert_eq!(talk(address, b"").unwrap(), "1");
        in_background(master, work, move |master, ()| {
            next_attacker(master, address, which + 1, count, &log);
        });
    });
}

fn frames_in_the_wrong_state_disconnect_the_worker() {
    let log = Log::default();
    let play = |attacker: &Attacker, which: usize| {
        attacker.send(&(violations()[which].frames)(attacker));
        attacker.wait_to_be_killed();
    };
    run_attackers(violations().len(), play, &log);
    let seen = log.take();
    let expected: Vec<_> = violations()
        .iter()
        .flat_map(|violation| [violation.why, "disconnect", "killed"])
        .collect();
    assert_eq!(seen, expected);
}

/// Environment variable with the number of seeds. For each seed, one worker sends random frames.
const SEEDS: &str = "CLUSTER_TEST_SEEDS";

fn seeds() -> usize {
    std::env::var(SEEDS).map_or(20, |seeds| seeds.parse().unwrap())
}

/// Returns random bytes, which usually begin with a protocol frame.
fn noise(random: &mut fastrand::Rng) -> Vec<u8> {
    let bytes = |random: &mut fastrand::Rng, most: usize| -> Vec<u8> {
        (0..random.usize(..most)).map(|_| random.u8(..)).collect()
    };
    let small = random.u32(..4);
    match random.u8(..16) {
        0 => bytes(random, 5000),
        1..3 => {
            let (kind, body) = (random.u8(..12), bytes(random, 30));
            frame(kind, 0, &body)
        }
        3 => listen(small),
        4 => handle_frame(LISTENING, small),
        5 | 6 => idle(small, random.u64(..3)),
        7 => handle_frame(RELEASE, small),
        8 => handle_frame(PAUSE, small),
        9 => frame(DISCONNECT_REQUEST, 0, &[]),
        10 => {
            let mut changed = [listen(small), idle(small, 0)].concat();
            let at = random.usize(..changed.len());
            changed[at] = random.u8(..);
            changed
        }
        _ => message(&bytes(random, 3000)),
    }
}

/// Checks that a worker that sends random frames exits normally, or is disconnected for an invalid
/// frame.
///
/// `CLUSTER_TEST_SEEDS` is the number of seeds, and `SEED` is the first seed.
fn random_frames_are_tolerated_or_disconnect_the_worker() {
    let log = Log::default();
    let play = |attacker: &Attacker, which: usize| {
        let first: u64 = std::env::var("SEED").map_or_else(|_| 0, |seed| seed.parse().unwrap());
        let mut random = fastrand::Rng::with_seed(first + which as u64);
        attacker.send(&online());
        for _ in 0..200 {
            attacker.send(&noise(&mut random));
        }
    };
    run_attackers(seeds(), play, &log);
    let mut seen = log.take().into_iter();
    for which in 0..seeds() {
        let mut next = || seen.next().unwrap();
        let mut event = next();
        let has_error = event != "disconnect";
        if has_error {
            event = next();
        }
        assert_eq!(event, "disconnect", "{which}");
        let status = next();
        let possible = status == "exit status: 0" || has_error && status == "killed";
        assert!(possible, "{which}: {status}");
    }
    assert_eq!(seen.next(), None);
}
