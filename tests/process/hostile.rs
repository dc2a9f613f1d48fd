//! Workers that mean harm: they write to their channel by themselves. The master lives, is not
//! blocked, and spends no more on them than it promises.

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

use cluster::{Error, Interest, Master, SendError, Settings, Signal, WorkerProcess};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, recvmsg, sendmsg, setsockopt,
    shutdown, sockopt,
};

use crate::harness::{Log, cluster, in_background, serve_id, talk};

crate::scenarios! {
    a_garbled_frame_cuts_the_worker_off
    an_oversized_frame_cuts_the_worker_off
    a_program_that_is_no_worker_of_ours_comes_and_goes
    frames_in_a_wrong_state_cut_the_worker_off
    noise_is_an_error_or_nothing
    a_flood_of_messages_holds_up_nobody
    a_flood_of_longer_messages_holds_up_nobody
    a_flood_of_empty_frames_holds_up_nobody
    a_flood_of_listens_holds_up_nobody
    a_flood_of_binds_holds_up_nobody
    a_flood_of_ready_and_revoke_holds_up_nobody
    a_flood_of_listening_events_cuts_the_worker_off
    a_worker_that_gives_everything_back_holds_up_nobody
    a_frame_that_never_ends_holds_up_nobody
    a_header_that_never_ends_holds_up_nobody
    descriptors_with_frames_that_announce_none_cut_the_worker_off
    descriptors_before_any_frame_cut_the_worker_off
    descriptors_that_the_program_does_not_take_are_closed
    descriptors_whose_close_waits_do_not_block_the_master
    more_descriptors_at_once_than_agreed_do_not_block_the_master
    descriptors_out_of_band_do_not_block_the_master
    a_connection_whose_close_waits_does_not_block_the_master
    a_worker_that_never_reads_is_bounded
    a_worker_that_asks_and_never_reads_is_cut_off
    a_worker_that_binds_and_never_reads_is_cut_off
    absurd_counts_cut_the_worker_off
    a_worker_that_takes_nothing_holds_no_more_than_it_may
    a_worker_that_takes_nothing_holds_up_nobody
    a_worker_that_lies_about_what_it_took_piles_up_a_few_dozen
    a_worker_that_lies_and_gives_back_holds_up_nobody
    a_worker_that_takes_and_never_answers_holds_up_nobody
    a_worker_that_shuts_its_queue_holds_up_nobody
    a_worker_that_closes_its_queue_holds_up_nobody
    a_queue_that_waits_does_not_block_the_master
    a_queue_with_a_filter_does_not_confuse_the_master
    a_queue_that_makes_descriptors_leaves_none_in_the_master
    a_worker_that_stops_itself_holds_up_nobody
    a_worker_that_closes_its_channel_and_lives_on_is_disconnected
}

// What one worker may cost the master.

/// Bytes of a frame that is not complete, and what was read behind it.
const BYTES_IN: usize = (1 << 20) + (64 << 10);
/// Bytes that wait for a worker that does not read.
const BYTES_OUT: usize = 9 << 20;
/// Descriptors that arrived, with their frames or before.
const FDS_IN: usize = 144;
/// Descriptors that wait, with their frames, for a worker that does not read.
const FDS_OUT: usize = 512;
/// The most connections that a worker is given before it says that it is idle again.
const WINDOW: usize = 16;
/// How many lie in a queue at most, if its worker lies about having taken them.
const FEW_DOZEN: usize = 64;
const LISTENERS: usize = 64;
/// The socket, and both ends of the queue.
const FDS_OF_A_LISTENER: usize = 3;
/// Its channel and its process.
const FDS_OF_ITS_OWN: usize = 2;

/// What the measuring costs, and what an allocator keeps.
const SLACK_BYTES: usize = 4 << 20;
const SLACK_FDS: usize = 8;
/// How much more the master may do, in the median, between the arrival of a sibling's client and its
/// acceptance. Frames of which as many are heard at a time as have arrived make it a hundred times.
const BUSIER: u32 = 20;
/// At least so much as if it were the quiet work: caches make more of a difference to less.
const LEAST_WORK: Duration = Duration::from_micros(20);
/// In how many turns of its loop the master has accepted a client: it may have learnt of it only in
/// the second one.
const TURNS: u32 = 3;
/// How many messages of one worker the program hears at most between two looks at the others: twice
/// what the master hears in a turn, which may have begun between the two.
const MESSAGES: u32 = 2 * 64;
/// No turn of the master's takes as long as this; what blocks it does so for longer.
const LONGEST: Duration = Duration::from_secs(5);
/// After this an enemy that should have been cut off has not been.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many clients the sibling serves, one after the other.
const CLIENTS: usize = 100;

/// Marks the process that is to play the enemy, and says how.
const ENEMY: &str = "ENEMY";
/// Marks the well-behaved worker with which the enemy is compared.
const NEIGHBOUR: &str = "NEIGHBOUR";

const ONLINE: u8 = 1;
const LISTEN: u8 = 2;
const LISTENING: u8 = 3;
const READY: u8 = 4;
const REVOKE: u8 = 5;
const CLOSE: u8 = 6;
const LEAVING: u8 = 7;
const MESSAGE: u8 = 127;
const WELCOME: u8 = 64;
const REPLY: u8 = 65;
const END: u8 = 66;

/// The port that the honest worker listens on, as it asks for it.
const ITS_INDEX: u32 = 0;
/// Those that nobody else asks for.
const OWN_INDEX: u32 = 1;
const OTHER_INDEX: u32 = 2;

fn frame(kind: u8, fds: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_le_bytes();
    let mut frame = length.to_vec();
    // All of its descriptors leave with it, and no others.
    frame.extend([1, kind, fds, fds]);
    frame.extend(body);
    frame
}

/// A body of numbers.
fn numbers(parts: &[u32]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.to_le_bytes()).collect()
}

fn online() -> Vec<u8> {
    frame(ONLINE, 0, &[])
}

fn message(text: &[u8]) -> Vec<u8> {
    frame(MESSAGE, 0, text)
}

/// Asks for a free port of 127.0.0.1.
fn listen(index: u32) -> Vec<u8> {
    let mut body = numbers(&[index, index, 511]);
    body.extend([0, 0, 4, 0, 0, 127, 0, 0, 1]);
    frame(LISTEN, 0, &body)
}

fn ready(handle: u32, taken: u64) -> Vec<u8> {
    let body = [
        numbers(&[handle]),
        taken.to_le_bytes().to_vec(),
        numbers(&[0]),
    ]
    .concat();
    frame(READY, 0, &body)
}

/// A frame that names a listener and says nothing else.
fn about(kind: u8, handle: u32) -> Vec<u8> {
    frame(kind, 0, &numbers(&[handle]))
}

/// A worker that has never called `init`, and has its channel for itself.
struct Enemy {
    channel: UnixStream,
    /// What came with the frames that have been heard.
    fds: RefCell<VecDeque<OwnedFd>>,
}

impl Enemy {
    /// `None` in all other processes.
    fn of_this_process() -> Option<Self> {
        std::env::var_os(ENEMY)?;
        let number = std::env::var("CLUSTER_CHANNEL_FD").unwrap();
        #[allow(unsafe_code)]
        // SAFETY: the master left it for this process, in which nobody else knows of it.
        let channel = unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
        let enemy = Self {
            channel: channel.into(),
            fds: RefCell::default(),
        };
        let (kind, _) = enemy.hear();
        assert_eq!(kind, WELCOME);
        Some(enemy)
    }

    /// The channel breaks when the master has had enough, and then the master kills.
    fn say(&self, bytes: &[u8]) {
        if (&self.channel).write_all(bytes).is_err() {
            self.wait_for_the_end();
        }
    }

    fn say_with(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let slices = [IoSlice::new(bytes)];
        let channel = self.channel.as_raw_fd();
        let sent = sendmsg::<()>(channel, &slices, &rights, MsgFlags::MSG_NOSIGNAL, None);
        if sent.is_err() {
            self.wait_for_the_end();
        }
    }

    /// From here on the clients of the honest worker come.
    fn begin(&self) {
        self.say(&message(b"begin"));
    }

    /// Fills the buffer, and keeps what comes with it.
    fn read(&self, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let (bytes, fds) = receive(self.channel.as_raw_fd(), buffer).unwrap_or_default();
            if bytes == 0 {
                self.wait_for_the_end();
            }
            self.fds.borrow_mut().extend(fds);
            buffer = &mut buffer[bytes..];
        }
    }

    /// The next frame: its kind and its body.
    fn hear(&self) -> (u8, Vec<u8>) {
        let mut header = [0; 8];
        self.read(&mut header);
        let [a, b, c, d, _, kind, _, _] = header;
        let mut body = vec![0; u32::from_le_bytes([a, b, c, d]) as usize];
        self.read(&mut body);
        (kind, body)
    }

    /// Comes to have a listener.
    fn listen(&self, index: u32) -> Listener<'_> {
        self.say(&listen(index));
        let body = loop {
            let (kind, body) = self.hear();
            if kind == REPLY {
                break body;
            }
        };
        let handle = u32::from_le_bytes(body[8..12].try_into().unwrap());
        let port = u16::from_le_bytes(body[14..16].try_into().unwrap());
        self.say(&about(LISTENING, handle));
        let queue = self.fds.borrow_mut().pop_front().unwrap();
        let enemy = self;
        Listener {
            enemy,
            handle,
            port,
            queue,
        }
    }

    fn wait_for_the_end(&self) -> ! {
        loop {
            nix::unistd::pause();
        }
    }

    fn flood(&self, one: &[u8]) -> ! {
        let many = one.repeat((64 << 10) / one.len() + 1);
        loop {
            self.say(&many);
        }
    }
}

/// Reads once; returns how many bytes, and what came with them.
fn receive(socket: RawFd, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; 64]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let received = recvmsg::<()>(socket, &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            #[allow(unsafe_code)]
            // SAFETY: the kernel has made them for this call.
            fds.extend(
                numbers
                    .into_iter()
                    .map(|n| unsafe { OwnedFd::from_raw_fd(n) }),
            );
        }
    }
    Ok((received.bytes, fds))
}

/// A listener that an enemy has, with the queue by which its connections come.
struct Listener<'a> {
    enemy: &'a Enemy,
    handle: u32,
    port: u16,
    queue: OwnedFd,
}

impl Listener<'_> {
    /// Says that it has taken so many connections in all, and waits for the next.
    fn ready(&self, taken: u64) {
        self.enemy.say(&ready(self.handle, taken));
    }

    fn revoke(&self) {
        self.enemy.say(&about(REVOKE, self.handle));
    }

    /// Clients that come by themselves, and stay.
    fn clients(&self, count: usize) -> Vec<TcpStream> {
        let connect = |_| TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        (0..count).map(connect).collect()
    }

    /// Waits until something is in the queue.
    fn wait(&self) {
        let mut fds = [PollFd::new(self.queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
    }

    /// Takes one connection out, if there is one.
    fn take(&self) -> Option<OwnedFd> {
        let (_, fds) = receive(self.queue.as_raw_fd(), &mut [0; 8]).ok()?;
        fds.into_iter().next()
    }

    /// How many are in the queue.
    fn count(&self) -> usize {
        let mut bytes: nix::libc::c_int = 0;
        let queue = self.queue.as_raw_fd();
        #[allow(unsafe_code)]
        // SAFETY: the call writes one integer.
        let counted = unsafe { nix::libc::ioctl(queue, nix::libc::FIONREAD, &raw mut bytes) };
        assert_eq!(counted, 0);
        usize::try_from(bytes).unwrap() / size_of::<u64>()
    }

    /// Waits until the master has done all that it was asked before: it answers in turn.
    fn wait_for_the_master(&self) {
        let other = self.enemy.listen(OTHER_INDEX);
        self.enemy.say(&about(CLOSE, other.handle));
    }
}

/// What happens to an enemy in the end.
#[derive(Clone, Copy)]
enum End {
    /// The master ends it, and says why.
    CutOff(&'static str),
    /// The same, and what it has said before and was not heard is an offence, too.
    CutOffTwice(&'static str, &'static str),
    /// It has done nothing that is forbidden; the test ends it, after the clients.
    Tolerated,
    /// The same, but its final messages may be more than the master keeps: then that is reported once.
    ToleratedInPart(&'static str),
}

#[derive(Clone, Copy)]
struct Case {
    attack: fn(&Enemy),
    end: End,
    bytes: usize,
    fds: usize,
    /// The attack goes on as long as the clients come, and not only for a moment.
    goes_on: bool,
    /// What the master's program does when the attack begins.
    reply: fn(&Master, &WorkerProcess),
}

impl Case {
    fn new(attack: fn(&Enemy), end: End) -> Self {
        Self {
            attack,
            end,
            bytes: BYTES_IN,
            fds: FDS_OF_ITS_OWN,
            goes_on: false,
            reply: |_, _| {},
        }
    }

    fn tolerated(attack: fn(&Enemy)) -> Self {
        Self::new(attack, End::Tolerated)
    }

    fn flood(attack: fn(&Enemy)) -> Self {
        let goes_on = true;
        Self {
            goes_on,
            ..Self::tolerated(attack)
        }
    }
}

/// What the master had to do for the clients of the honest worker, whose id is 1.
///
/// How long they wait would say more about what else the machine does. What the master does for others
/// before it has accepted them does not depend on that.
#[derive(Default)]
struct Visits {
    /// The processor time from the arrival of each client until it was accepted.
    work: Vec<Duration>,
    /// And the turns of the loop.
    turns: Vec<u32>,
    /// How long it waited for its answer.
    waits: Vec<Duration>,
    longest_turn: Duration,
    /// The messages that came in one turn.
    most_messages: u32,
}

impl Visits {
    fn show(&mut self, when: &str) {
        let middle = |times: &mut Vec<Duration>| {
            times.sort();
            (times[times.len() / 2], times[times.len() * 99 / 100])
        };
        let (work, waits) = (middle(&mut self.work), middle(&mut self.waits));
        let turns = self.turns.iter().max();
        println!("{when}: work {work:?}, waits {waits:?} (median and 99%)");
        println!(
            "{when}: turns {turns:?}, longest {:?}, messages {}",
            self.longest_turn, self.most_messages
        );
    }
}

/// A client that is not yet answered.
struct Visitor {
    stream: TcpStream,
    came: Instant,
    turn: u32,
    work: Duration,
    /// How many connections had been accepted before.
    accepted: u64,
    is_accepted: bool,
}

/// Sends clients to the honest worker from inside the loop.
struct Visiting {
    address: SocketAddr,
    honest: u32,
    turn: u32,
    last_turn: Instant,
    /// When the worker was seen to wait for its next client.
    rested: Option<u32>,
    visitor: Option<Visitor>,
    /// Messages since the last turn.
    messages: Rc<Cell<u32>>,
    visits: Visits,
}

/// Sends clients, one after the other, and calls back when the last one has been answered.
fn visit(master: &Master, address: SocketAddr, then: impl FnOnce(&Master, Visits) + 'static) {
    let honest = master.workers()[0].process().id();
    let mut visiting = Visiting {
        address,
        honest,
        turn: 0,
        last_turn: Instant::now(),
        rested: None,
        visitor: None,
        messages: Rc::default(),
        visits: Visits::default(),
    };
    let messages = Rc::clone(&visiting.messages);
    let counting = master.on_message(move |_, _, _| messages.set(messages.get() + 1));
    let mut then = Some(then);
    // It can always be read, and so there is a call in each turn.
    let (ready, mut other) = UnixStream::pair().unwrap();
    other.write_all(b"x").unwrap();
    let turn = move |master: &Master, _: &UnixStream| {
        let _open = &other;
        visiting.turn(master);
        if visiting.visits.waits.len() < CLIENTS {
            return Some(Interest::Readable);
        }
        master.off(counting);
        then.take().unwrap()(master, std::mem::take(&mut visiting.visits));
        None
    };
    master.watch(ready, Interest::Readable, turn).unwrap();
}

impl Visiting {
    fn turn(&mut self, master: &Master) {
        self.turn += 1;
        let took = self.last_turn.elapsed();
        self.last_turn = Instant::now();
        self.visits.longest_turn = self.visits.longest_turn.max(took);
        let messages = self.messages.take();
        self.visits.most_messages = self.visits.most_messages.max(messages);
        let Some(visitor) = &mut self.visitor else {
            return self.begin(master);
        };
        if !visitor.is_accepted && master.ledger().accepted > visitor.accepted {
            visitor.is_accepted = true;
            self.visits.work.push(own_work() - visitor.work);
            self.visits.turns.push(self.turn - visitor.turn);
        }
        let mut answer = [0; 8];
        match visitor.stream.read(&mut answer) {
            Ok(0) => {
                self.visits.waits.push(visitor.came.elapsed());
                self.visitor = None;
                self.rested = None;
            }
            Ok(length) => assert_eq!(&answer[..length], b"1"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }

    /// Begins when the worker waits for its next client, and the master has had time to hear so.
    fn begin(&mut self, master: &Master) {
        let Some(rested) = self.rested else {
            self.rested = is_at_rest(self.honest).then_some(self.turn);
            return;
        };
        if self.turn < rested + 3 {
            return;
        }
        let (turn, accepted) = (self.turn, master.ledger().accepted);
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.visitor = Some(Visitor {
            stream,
            came: Instant::now(),
            turn,
            work: own_work(),
            accepted,
            is_accepted: false,
        });
    }
}

fn is_at_rest(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.contains(") S ")
}

/// How long this thread has had a processor.
fn own_work() -> Duration {
    let mut time = nix::libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    #[allow(unsafe_code)]
    // SAFETY: the call writes a time where it is told to.
    let told =
        unsafe { nix::libc::clock_gettime(nix::libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(told, 0);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

fn median(times: &[Duration]) -> Duration {
    times[times.len() / 2]
}

/// A line of /proc/self/status that is a size, in bytes.
fn size(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.unwrap().trim_start_matches(':').trim();
    let kib: usize = kib.strip_suffix(" kB").unwrap().parse().unwrap();
    kib << 10
}

/// How many descriptors are open, with the one by which they are counted.
fn count_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The most that the master has had of everything since it was made.
struct Peak {
    bytes: usize,
    fds: usize,
    most_fds: Rc<Cell<usize>>,
}

impl Peak {
    /// Descriptors are counted once in a millisecond as long as the master runs.
    fn from_now(master: &Master) -> Self {
        // The kernel begins anew with the highest size it has seen.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let fds = count_fds();
        let most_fds = Rc::new(Cell::new(fds));
        let most = Rc::clone(&most_fds);
        let count = move |_: &Master| most.set(most.get().max(count_fds()));
        master.unref(master.set_interval(Duration::from_millis(1), count));
        let bytes = size("VmRSS");
        Self {
            bytes,
            fds,
            most_fds,
        }
    }

    fn more_bytes(&self) -> usize {
        size("VmHWM").saturating_sub(self.bytes)
    }

    fn more_fds(&self) -> usize {
        self.most_fds.get() - self.fds
    }
}

/// Plays the attack beside an honest worker, which serves a client after the other before and
/// meanwhile.
fn beside_an_honest_worker(case: Case) {
    if let Some(enemy) = Enemy::of_this_process() {
        enemy.say(&online());
        (case.attack)(&enemy);
        enemy.wait_for_the_end();
    }
    let log = Log::default();
    let told = log.clone();
    cluster(
        |master| {
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                let log = log.clone();
                after_a_quiet_time(master, address, move |master, quiet| {
                    attack(master, address, quiet, case, &log);
                });
            });
        },
        |worker| {
            if std::env::var_os(NEIGHBOUR).is_some() {
                // The last one comes too late.
                worker.on_message(|worker, _| drop(worker.send(b"pong")));
                worker.send(b"ready").unwrap();
                worker.run().unwrap();
            } else {
                serve_id(&worker, "127.0.0.1:0");
            }
        },
    );
    let expected = match case.end {
        End::CutOff(why) => vec![why, "disconnect", "killed"],
        End::CutOffTwice(why, late) => vec![why, late, "disconnect", "killed"],
        End::Tolerated | End::ToleratedInPart(_) => vec!["disconnect", "killed"],
    };
    let mut events = told.take();
    if let End::ToleratedInPart(why) = case.end {
        if events.first().is_some_and(|event| event.starts_with(why)) {
            events.remove(0);
        }
    }
    assert_eq!(events, expected);
}

/// How the honest worker serves beside one that is as honest, and as busy with the master as one can
/// be that waits for answers.
fn after_a_quiet_time(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, Visits) + 'static,
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
        visit(master, address, finish);
    });
}

/// Whether this program is built with a sanitizer, of which the variable has the options. Memory
/// and speed are then those of the sanitizer.
fn is_instrumented() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_some()
}

/// How long a process has had a processor.
fn processor_time(pid: u32) -> Duration {
    let path = format!("/proc/{pid}/schedstat");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

fn attack(master: &Master, address: SocketAddr, mut quiet: Visits, case: Case, log: &Log) {
    let peak = Peak::from_now(master);
    let enemy = master.fork_with([(ENEMY, "1")]).unwrap();
    note_enemy(&enemy, log);
    let missing = Rc::new(Cell::new(2));
    let over = Rc::new(move |master: &Master| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            println!("bytes {} fds {}", peak.more_bytes(), peak.more_fds());
            let bounded = peak.more_bytes() <= case.bytes + SLACK_BYTES;
            assert!(bounded || is_instrumented(), "bytes");
            assert!(peak.more_fds() <= case.fds + SLACK_FDS, "descriptors");
            master.disconnect(|_| {});
        }
    });
    let exited = Rc::clone(&over);
    enemy.on_exit(move |master, _, _| exited(master));
    let served = move |master: &Master, enemy: &WorkerProcess, mut busy: Visits, worked| {
        quiet.show("quiet");
        busy.show("busy");
        assert!(busy.longest_turn < LONGEST, "blocked");
        assert!(busy.turns.iter().all(|turns| *turns <= TURNS), "left out");
        assert!(busy.most_messages <= MESSAGES, "speaks all the time");
        let most = BUSIER * median(&quiet.work).max(LEAST_WORK);
        assert!(median(&busy.work) < most || is_instrumented(), "held up");
        if matches!(case.end, End::Tolerated | End::ToleratedInPart(_)) {
            assert!(!enemy.is_dead());
            let went_on = processor_time(enemy.process().id()) > worked;
            assert!(went_on || !case.goes_on, "the flood has ended");
            enemy.process().kill(Signal::KILL);
        }
        master.unref(master.set_timeout(PATIENCE, |_| panic!("the enemy lives on")));
        over(master);
    };
    let mut served = Some(served);
    enemy.on_message(move |master, enemy, _| {
        let Some(mut served) = served.take() else {
            return;
        };
        (case.reply)(master, enemy);
        let worked = processor_time(enemy.process().id());
        let enemy = enemy.clone();
        visit(master, address, move |master, busy| {
            served(master, &enemy, busy, worked);
        });
    });
}

/// What the program is told about the enemy, except messages.
fn note_enemy(enemy: &WorkerProcess, log: &Log) {
    let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log.clone());
    let prefix = [
        format!("cut off from worker {}: ", enemy.id()),
        format!("lost the channel to worker {}: ", enemy.id()),
    ];
    enemy.on_error(move |_, _, error| {
        if let Error::Send { .. } = error {
            return; // It is what `send` has returned.
        }
        let text = error.to_string();
        let found = prefix.iter().find_map(|prefix| text.strip_prefix(prefix));
        at_error.add(found.unwrap_or(&text));
    });
    enemy.on_disconnect(move |_, _| at_end.add("disconnect"));
    enemy.on_exit(move |_, _, status| match status.signal() {
        Some(9) => at_exit.add("killed"),
        _ => at_exit.add(status.to_string()),
    });
}

/// A shell writes `bytes` (in printf's notation) into its channel and then waits to be ended.
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

fn expect_cut_off(bytes: &str, why: &str) {
    let seen = worker_that_writes(bytes);
    let error = format!("cut off from worker 1: {why}");
    assert_eq!(seen, [error.as_str(), "disconnect", "Some(9) Some(false)"]);
}

fn a_garbled_frame_cuts_the_worker_off() {
    expect_cut_off(
        "GET / HTTP/1.1",
        "frame of version 47, this program speaks 1",
    );
}

fn an_oversized_frame_cuts_the_worker_off() {
    let why = "frame of 2147483647 bytes, the limit is 1048576";
    expect_cut_off(r"\377\377\377\177\001\177\000\000", why);
}

fn a_program_that_is_no_worker_of_ours_comes_and_goes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/true").args(["x"]));
            master.on_online(|_, _| panic!("it never says so"));
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(move |_, _, status| log.add(status.to_string()));
            master.fork().unwrap();
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Floods, while somebody reads the answers.
fn flood_and_read(enemy: &Enemy, next: impl Fn(u32) -> Vec<u8>) -> ! {
    let channel = enemy.channel.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut &channel, &mut std::io::sink()));
    let mut n = 0;
    loop {
        let many: Vec<_> = (n..n + 1000).flat_map(&next).collect();
        enemy.say(&many);
        n += 1000;
    }
}

fn a_flood_of_messages_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        enemy.begin();
        enemy.flood(&message(&[b'x'; 100]));
    }));
}

/// Each read is full, of fewer messages than are heard in a turn.
fn a_flood_of_longer_messages_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        enemy.begin();
        enemy.flood(&message(&[b'x'; 1032]));
    }));
}

/// None is shorter.
fn a_flood_of_empty_frames_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        enemy.begin();
        enemy.flood(&frame(LEAVING, 0, &[]));
    }));
}

fn a_flood_of_listens_holds_up_nobody() {
    let case = Case::flood(|enemy| {
        enemy.begin();
        flood_and_read(enemy, listen);
    });
    let fds = FDS_OF_ITS_OWN + LISTENERS * FDS_OF_A_LISTENER;
    beside_an_honest_worker(Case { fds, ..case });
}

/// Each is closed again, and so it never has too many.
fn a_flood_of_binds_holds_up_nobody() {
    let case = Case::flood(|enemy| {
        // Nobody else listens any more, so that it knows the numbers beforehand.
        let first = enemy.listen(OWN_INDEX).handle;
        enemy.begin();
        flood_and_read(enemy, |n| {
            [listen(OTHER_INDEX), about(CLOSE, first + 1 + n)].concat()
        });
    });
    let fds = FDS_OF_TWO + FDS_OUT;
    beside_an_honest_worker(Case { fds, ..case });
}

/// A connection goes there and back all the time.
fn a_flood_of_ready_and_revoke_holds_up_nobody() {
    let case = Case::flood(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(1);
        enemy.begin();
        enemy.flood(&[ready(own.handle, 0), about(REVOKE, own.handle)].concat());
    });
    let fds = FDS_OF_ITS_OWN + FDS_OF_A_LISTENER + 1;
    beside_an_honest_worker(Case { fds, ..case });
}

fn a_flood_of_listening_events_cuts_the_worker_off() {
    let attack = |enemy: &Enemy| {
        let own = enemy.listen(OWN_INDEX);
        enemy.begin();
        enemy.flood(&about(LISTENING, own.handle));
    };
    let why = End::CutOff("was listening already");
    beside_an_honest_worker(Case::new(attack, why));
}

/// It has a part in the listener of the honest worker, where its turn comes again and again.
fn a_worker_that_gives_everything_back_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        let its = enemy.listen(ITS_INDEX);
        enemy.begin();
        enemy.flood(&[ready(its.handle, 0), about(REVOKE, its.handle)].concat());
    }));
}

/// It comes a byte at a time, and the last one never.
fn a_frame_that_never_ends_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        enemy.begin();
        let long = message(&[0; 1 << 20]);
        let (most, rest) = long.split_at(long.len() - (64 << 10));
        enemy.say(most);
        for byte in &rest[1..] {
            enemy.say(&[*byte]);
        }
    }));
}

fn a_header_that_never_ends_holds_up_nobody() {
    beside_an_honest_worker(Case::tolerated(|enemy| {
        enemy.begin();
        enemy.say(&online()[..4]);
    }));
}

/// As many as one call of the master's takes.
const ONE_CALL: [RawFd; 64] = [0; 64];

const UNANNOUNCED: End = End::CutOff("descriptors that no frame announced");

fn descriptors_with_frames_that_announce_none_cut_the_worker_off() {
    let attack = |enemy: &Enemy| {
        enemy.begin();
        loop {
            enemy.say_with(&message(b"x"), &ONE_CALL);
        }
    };
    let fds = FDS_OF_ITS_OWN + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    beside_an_honest_worker(Case { fds, ..case });
}

fn descriptors_before_any_frame_cut_the_worker_off() {
    let attack = |enemy: &Enemy| {
        enemy.begin();
        for byte in &message(b"")[..7] {
            enemy.say_with(&[*byte], &ONE_CALL);
        }
    };
    let fds = FDS_OF_ITS_OWN + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    beside_an_honest_worker(Case { fds, ..case });
}

fn descriptors_that_the_program_does_not_take_are_closed() {
    let case = Case::flood(|enemy| {
        enemy.begin();
        loop {
            enemy.say_with(&frame(MESSAGE, 16, b"x"), &ONE_CALL[..16]);
        }
    });
    let fds = FDS_OF_ITS_OWN + FDS_IN;
    let end = End::ToleratedInPart("no room for the channel to worker 3: ");
    beside_an_honest_worker(Case { fds, end, ..case });
}

/// Makes the last close of this socket, whoever it is that closes it, wait for a client that does
/// not read.
fn make_close_wait(mut socket: &TcpStream, time: Duration) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: i32::try_from(time.as_secs()).unwrap(),
    };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
}

fn descriptors_whose_close_waits_do_not_block_the_master() {
    beside_an_honest_worker(Case::tolerated(|enemy| {
        let (client, _peer) = waiting();
        enemy.begin();
        let fds = [client.as_raw_fd()];
        enemy.say_with(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        enemy.wait_for_the_end();
    }));
}

/// A connection whose end waits, and its peer, which reads nothing.
fn waiting() -> (TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    make_close_wait(&client, 4 * LONGEST);
    (client, server.accept().unwrap().0)
}

/// The kernel closes what there is no room for while the master reads.
fn more_descriptors_at_once_than_agreed_do_not_block_the_master() {
    let attack = |enemy: &Enemy| {
        let (client, _peer) = waiting();
        enemy.begin();
        // An answer says that this has been heard: nothing of a piece with too much is.
        enemy.listen(OWN_INDEX);
        let null = File::open("/dev/null").unwrap();
        let mut fds = [null.as_raw_fd(); 250];
        fds[249] = client.as_raw_fd();
        enemy.say_with(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        enemy.wait_for_the_end();
    };
    let why = End::CutOff("descriptors that no frame announced");
    let case = Case::new(attack, why);
    beside_an_honest_worker(Case { fds: 256, ..case });
}

/// The kernel leaves out what was sent out of band, and closes what came with it, while the master
/// reads.
fn descriptors_out_of_band_do_not_block_the_master() {
    let attack = |enemy: &Enemy| {
        let (client, _peer) = waiting();
        enemy.begin();
        let fds = [client.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_OOB;
        let byte = [IoSlice::new(b"o")];
        let sent = sendmsg::<()>(enemy.channel.as_raw_fd(), &byte, &rights, flags, None);
        if sent.is_err() {
            // There is no such thing on this system.
            enemy.say(b"o");
        }
        drop(client);
        enemy.say(&message(b"x"));
        enemy.wait_for_the_end();
    };
    let why = End::CutOff("frame of version 0, this program speaks 1");
    beside_an_honest_worker(Case::new(attack, why));
}

/// The master has a copy of the connection, which it closes when the worker has been given it; that may
/// be when the worker has closed it.
fn a_connection_whose_close_waits_does_not_block_the_master() {
    const LINGER: Duration = Duration::from_secs(10);
    let log = Log::default();
    let told = log.clone();
    cluster(
        |master| {
            let last = Cell::new(Instant::now());
            let longest = Rc::new(Cell::new(Duration::ZERO));
            let most = Rc::clone(&longest);
            let beat = move |_: &Master| {
                let since = last.replace(Instant::now()).elapsed();
                most.set(most.get().max(since));
            };
            master.unref(master.set_interval(Duration::from_millis(10), beat));
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
            make_close_wait(&connection, LINGER);
            drop(connection);
            worker.set_timeout(Duration::ZERO, |worker| {
                assert!(worker.send(b"waiting").unwrap())
            });
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(told.take(), ["exit status: 0"]);
}

/// Until the program is told that there is no more room.
fn send_until_refused(_: &Master, enemy: &WorkerProcess) {
    let refused = loop {
        if let Err(error) = enemy.send(&[0; 64 << 10]) {
            break error;
        }
    };
    let Error::Send { worker, reason } = refused else {
        panic!("{refused}");
    };
    assert_eq!((worker, reason), (Some(enemy.id()), SendError::QueueFull));
}

fn a_worker_that_never_reads_is_bounded() {
    let case = Case::tolerated(Enemy::begin);
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    beside_an_honest_worker(Case {
        bytes,
        reply,
        ..case
    });
}

fn a_worker_that_asks_and_never_reads_is_cut_off() {
    let attack = |enemy: &Enemy| {
        enemy.begin();
        for n in 0.. {
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(listen).collect();
            enemy.say(&many);
        }
    };
    // A worker that does not read is not yet one that breaks the protocol. The program has said so
    // much already that not many answers find room.
    let case = Case::new(attack, End::CutOff("out of memory"));
    let fds = FDS_OF_ITS_OWN + LISTENERS * FDS_OF_A_LISTENER + FDS_OUT;
    let bytes = BYTES_IN + BYTES_OUT;
    let reply = send_until_refused;
    beside_an_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

/// Each is closed again, and so it never has too many; but the answers wait, with what belongs to them.
fn a_worker_that_binds_and_never_reads_is_cut_off() {
    let attack = |enemy: &Enemy| {
        let first = enemy.listen(OWN_INDEX).handle;
        enemy.begin();
        for n in 0.. {
            let one = |n| [listen(OTHER_INDEX), about(CLOSE, first + 1 + n)].concat();
            let many: Vec<_> = (n * 1000..(n + 1) * 1000).flat_map(one).collect();
            enemy.say(&many);
        }
    };
    // Nothing is bound any more then, and so there is nothing to close.
    let end = End::CutOffTwice("out of memory", "closed a listener it has not");
    let case = Case::new(attack, end);
    let (bytes, fds) = (BYTES_IN + BYTES_OUT, FDS_OF_TWO + FDS_OUT);
    let reply = send_until_refused;
    beside_an_honest_worker(Case {
        bytes,
        fds,
        reply,
        ..case
    });
}

fn absurd_counts_cut_the_worker_off() {
    let attack = |enemy: &Enemy| {
        let own = enemy.listen(OWN_INDEX);
        enemy.begin();
        own.ready(1 << 40);
    };
    let why = End::CutOff("took a connection it was never given");
    beside_an_honest_worker(Case::new(attack, why));
}

/// With an own listener, and another one by which it waits for the master.
const FDS_OF_TWO: usize = FDS_OF_ITS_OWN + 2 * FDS_OF_A_LISTENER;

fn a_worker_that_takes_nothing_holds_no_more_than_it_may() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        for _ in 0..10 {
            own.ready(0);
            own.wait_for_the_master();
            assert_eq!(own.count(), 1);
        }
        assert!(own.take().is_some());
        own.ready(1);
        own.wait_for_the_master();
        assert!((1..=2).contains(&own.count()), "{}", own.count());
        enemy.begin();
        enemy.wait_for_the_end();
    });
    let fds = FDS_OF_TWO;
    beside_an_honest_worker(Case { fds, ..case });
}

fn a_worker_that_takes_nothing_holds_up_nobody() {
    let case = Case::tolerated(|enemy| {
        let its = enemy.listen(ITS_INDEX);
        its.ready(0);
        enemy.begin();
        enemy.wait_for_the_end();
    });
    beside_an_honest_worker(case);
}

/// Says again and again that it has taken what is in its queue. Returns how many are in it then.
fn lie(own: &Listener<'_>) -> usize {
    for _ in 0..50 {
        own.ready(own.count() as u64);
        own.wait_for_the_master();
    }
    own.count()
}

fn a_worker_that_lies_about_what_it_took_piles_up_a_few_dozen() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(3 * FEW_DOZEN);
        let piled_up = lie(&own);
        assert!((WINDOW + 1..=FEW_DOZEN).contains(&piled_up), "{piled_up}");
        enemy.begin();
        loop {
            lie(&own);
        }
    });
    // What there is no room for in the queue is in the master.
    let fds = FDS_OF_TWO + WINDOW;
    beside_an_honest_worker(Case { fds, ..case });
}

/// What it says that it took comes back.
fn a_worker_that_lies_and_gives_back_holds_up_nobody() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(3 * FEW_DOZEN);
        for _ in 0..3 {
            assert!(lie(&own) > 0);
            own.revoke();
            own.wait_for_the_master();
            assert_eq!(own.count(), 0);
            own.ready(0);
            own.wait();
        }
        enemy.begin();
        enemy.wait_for_the_end();
    });
    let fds = FDS_OF_TWO + FEW_DOZEN + WINDOW;
    beside_an_honest_worker(Case { fds, ..case });
}

fn a_worker_that_takes_and_never_answers_holds_up_nobody() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(3 * WINDOW);
        enemy.begin();
        own.ready(0);
        let mut taken = Vec::new();
        loop {
            own.wait();
            taken.extend(std::iter::from_fn(|| own.take()));
            own.ready(taken.len() as u64);
        }
    });
    let fds = FDS_OF_ITS_OWN + FDS_OF_A_LISTENER + WINDOW;
    beside_an_honest_worker(Case { fds, ..case });
}

/// Nothing can be given to it, and it asks for more and more.
fn a_worker_that_shuts_its_queue_holds_up_nobody() {
    beside_an_honest_worker(Case::flood(|enemy| {
        let its = enemy.listen(ITS_INDEX);
        shutdown(its.queue.as_raw_fd(), Shutdown::Both).unwrap();
        enemy.begin();
        enemy.flood(&ready(its.handle, 0));
    }));
}

fn a_worker_that_closes_its_queue_holds_up_nobody() {
    beside_an_honest_worker(Case::tolerated(|enemy| {
        let its = enemy.listen(ITS_INDEX);
        its.ready(0);
        drop(its.queue);
        enemy.begin();
        enemy.wait_for_the_end();
    }));
}

/// Both sides read at one end: whether this waits is for all who have it.
fn a_queue_that_waits_does_not_block_the_master() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        fcntl(&own.queue, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        enemy.begin();
        own.revoke();
        enemy.wait_for_the_end();
    });
    beside_an_honest_worker(case);
}

/// Sets an option of a queue for all who read from it, if the system lets this worker.
fn set_option<T>(own: &Listener<'_>, option: nix::libc::c_int, value: &T) {
    let size = nix::libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let (queue, value) = (own.queue.as_raw_fd(), std::ptr::from_ref(value).cast());
    #[allow(unsafe_code)]
    // SAFETY: the value lives through the call, and has this size.
    let set = unsafe { nix::libc::setsockopt(queue, nix::libc::SOL_SOCKET, option, value, size) };
    println!("option {option}: {set}");
}

/// Connections go there and back.
fn give_back_again_and_again(own: &Listener<'_>) -> ! {
    for _ in 0..100 {
        own.ready(0);
        own.wait();
        own.revoke();
        own.wait_for_the_master();
        assert_eq!(own.count(), 0);
    }
    own.enemy.begin();
    own.enemy.wait_for_the_end();
}

/// It cuts each message down to its first byte.
fn a_queue_with_a_filter_does_not_confuse_the_master() {
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(WINDOW);
        let mut filter = nix::libc::sock_filter {
            code: 6, // Returns the length that is left.
            jt: 0,
            jf: 0,
            k: 1,
        };
        let program = nix::libc::sock_fprog {
            len: 1,
            filter: &raw mut filter,
        };
        set_option(&own, nix::libc::SO_ATTACH_FILTER, &program);
        give_back_again_and_again(&own);
    });
    let fds = FDS_OF_TWO + WINDOW;
    beside_an_honest_worker(Case { fds, ..case });
}

/// The kernel adds one of the sender's process to each message.
fn a_queue_that_makes_descriptors_leaves_none_in_the_master() {
    const SO_PASSPIDFD: nix::libc::c_int = 76;
    let case = Case::tolerated(|enemy| {
        let own = enemy.listen(OWN_INDEX);
        let _clients = own.clients(1);
        set_option(&own, SO_PASSPIDFD, &1i32);
        give_back_again_and_again(&own);
    });
    let fds = FDS_OF_TWO + 1;
    beside_an_honest_worker(Case { fds, ..case });
}

fn a_worker_that_stops_itself_holds_up_nobody() {
    beside_an_honest_worker(Case::tolerated(|enemy| {
        let its = enemy.listen(ITS_INDEX);
        its.ready(0);
        enemy.begin();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
    }));
}

fn a_worker_that_closes_its_channel_and_lives_on_is_disconnected() {
    beside_an_honest_worker(Case::tolerated(|enemy| {
        enemy.begin();
        nix::unistd::close(enemy.channel.as_raw_fd()).unwrap();
        enemy.wait_for_the_end();
    }));
}

/// Sends what is in the case, and is cut off for that.
struct Wrong {
    frames: fn(&Enemy) -> Vec<u8>,
    why: &'static str,
}

/// The listener of the honest worker, which is the first one.
const ITS_HANDLE: u32 = 1;
/// One that nobody has.
const NO_HANDLE: u32 = 77;

/// A part in the listener of the honest worker.
fn joined(enemy: &Enemy, frames: Vec<u8>) -> Vec<u8> {
    enemy.say(&online());
    assert_eq!(enemy.listen(ITS_INDEX).handle, ITS_HANDLE);
    frames
}

fn after_online(frames: Vec<u8>) -> Vec<u8> {
    [online(), frames].concat()
}

fn wrongs() -> Vec<Wrong> {
    let wrong = |frames, why| Wrong { frames, why };
    let early = "spoke before it was online";
    let mut all = vec![
        wrong(|_| listen(1), early),
        wrong(|_| about(LISTENING, ITS_HANDLE), early),
        wrong(|_| ready(ITS_HANDLE, 0), early),
        wrong(|_| about(CLOSE, ITS_HANDLE), early),
        wrong(|_| frame(LEAVING, 0, &[]), early),
        wrong(|_| about(REVOKE, ITS_HANDLE), early),
        wrong(|_| message(b"x"), early),
        wrong(|_| after_online(online()), "was online already"),
    ];
    all.extend(wrongs_without_a_listener());
    all.extend(wrongs_with_a_listener());
    all.extend(wrong_forms());
    all
}

/// For one that nobody has, and for one that somebody else has.
fn wrongs_without_a_listener() -> Vec<Wrong> {
    let wrong = |frames, why| Wrong { frames, why };
    let (ready_why, listening_why) = (
        "ready for a listener it has not",
        "listening on what it has not",
    );
    let close_why = "closed a listener it has not";
    vec![
        wrong(|_| after_online(about(LISTENING, NO_HANDLE)), listening_why),
        wrong(
            |_| after_online(about(LISTENING, ITS_HANDLE)),
            listening_why,
        ),
        wrong(|_| after_online(ready(NO_HANDLE, 0)), ready_why),
        wrong(|_| after_online(ready(ITS_HANDLE, 0)), ready_why),
        wrong(|_| after_online(about(CLOSE, NO_HANDLE)), close_why),
        wrong(|_| after_online(about(CLOSE, ITS_HANDLE)), close_why),
        wrong(
            |_| after_online(about(REVOKE, NO_HANDLE)),
            "revoked from a listener it has not",
        ),
        wrong(
            |_| after_online(about(REVOKE, ITS_HANDLE)),
            "revoked what it never had",
        ),
    ]
}

fn wrongs_with_a_listener() -> Vec<Wrong> {
    let wrong = |frames, why| Wrong { frames, why };
    vec![
        wrong(
            |enemy| joined(enemy, listen(ITS_INDEX)),
            "listens twice with one index",
        ),
        wrong(
            |enemy| joined(enemy, ready(ITS_HANDLE, 1)),
            "took a connection it was never given",
        ),
        wrong(
            |enemy| joined(enemy, ready(ITS_HANDLE, u64::MAX)),
            "took a connection it was never given",
        ),
        wrong(
            |enemy| {
                joined(
                    enemy,
                    [about(CLOSE, ITS_HANDLE), ready(ITS_HANDLE, 0)].concat(),
                )
            },
            "ready for a listener it has not",
        ),
        wrong(
            |enemy| joined(enemy, about(CLOSE, ITS_HANDLE).repeat(2)),
            "closed a listener it has not",
        ),
        wrong(
            |enemy| {
                let frames = [about(CLOSE, ITS_HANDLE), about(REVOKE, ITS_HANDLE)];
                joined(enemy, frames.concat())
            },
            "revoked what it never had",
        ),
    ]
}

/// Not frames at all.
fn wrong_forms() -> Vec<Wrong> {
    let wrong = |frames, why| Wrong { frames, why };
    vec![
        wrong(|_| frame(0, 0, &[]), "unknown kind of frame 0"),
        wrong(|_| frame(8, 0, &[0; 4]), "unknown kind of frame 8"),
        wrong(|_| frame(255, 0, &[]), "unknown kind of frame 255"),
        wrong(
            |_| frame(REPLY, 0, &numbers(&[1, 98])),
            "unknown kind of frame 65",
        ),
        wrong(|_| frame(END, 0, &[0; 5]), "unknown kind of frame 66"),
        wrong(|_| frame(ONLINE, 0, b"x"), "malformed frame of kind 1"),
        wrong(|_| frame(CLOSE, 0, b"abc"), "malformed frame of kind 6"),
        wrong(|_| frame(READY, 0, &[0; 20]), "malformed frame of kind 4"),
        wrong(|_| frame(READY, 0, &[0; 8]), "malformed frame of kind 4"),
        wrong(|_| frame(REVOKE, 0, &[0; 12]), "malformed frame of kind 5"),
        wrong(|_| frame(LISTEN, 0, &[0; 12]), "malformed frame of kind 2"),
        wrong(
            |_| frame(MESSAGE, 17, &[]),
            "descriptors that no frame announced",
        ),
        wrong(
            |_| after_online(frame(MESSAGE, 1, &[])),
            "descriptors that no frame announced",
        ),
        wrong(
            |_| vec![0, 0, 0, 0, 1, MESSAGE, 0, 1],
            "descriptors that no frame announced",
        ),
        wrong(
            |_| vec![0, 0, 0, 0, 1, MESSAGE, 2, 1],
            "descriptors that no frame announced",
        ),
        wrong(
            |_| vec![0, 0, 0, 0, 1, MESSAGE, 1, 65],
            "descriptors that no frame announced",
        ),
        wrong(
            |enemy| {
                enemy.say_with(&after_online(frame(MESSAGE, 2, &[])), &[0]);
                Vec::new()
            },
            "descriptors that no frame announced",
        ),
        wrong(
            |enemy| {
                enemy.say_with(&frame(ONLINE, 1, &[]), &[0]);
                Vec::new()
            },
            "descriptors that no frame announced",
        ),
    ]
}

/// One enemy after the other; the honest worker answers after each.
fn one_after_the_other(count: usize, play: fn(&Enemy, usize), log: &Log) {
    if let Some(enemy) = Enemy::of_this_process() {
        let which = std::env::var(ENEMY).unwrap();
        play(&enemy, which.parse().unwrap());
        std::process::exit(0);
    }
    cluster(
        |master| {
            let log = log.clone();
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                next_enemy(master, address, 0, count, &log);
            });
            honest.on_error(|_, _, error| panic!("{error}"));
            honest.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn next_enemy(master: &Master, address: SocketAddr, which: usize, count: usize, log: &Log) {
    if which == count {
        return master.disconnect(|_| {});
    }
    let enemy = master.fork_with([(ENEMY, which.to_string())]).unwrap();
    note_enemy(&enemy, log);
    let log = log.clone();
    let late = master.set_timeout(PATIENCE, move |_| panic!("enemy {which} lives on"));
    enemy.on_exit(move |master, _, _| {
        master.clear_timer(late);
        let log = log.clone();
        let work = move || assert_eq!(talk(address, b"").unwrap(), "1");
        in_background(master, work, move |master, ()| {
            next_enemy(master, address, which + 1, count, &log);
        });
    });
}

fn frames_in_a_wrong_state_cut_the_worker_off() {
    let log = Log::default();
    let play = |enemy: &Enemy, which: usize| {
        enemy.say(&(wrongs()[which].frames)(enemy));
        enemy.wait_for_the_end();
    };
    one_after_the_other(wrongs().len(), play, &log);
    let seen = log.take();
    let expected: Vec<_> = wrongs()
        .iter()
        .flat_map(|wrong| [wrong.why, "disconnect", "killed"])
        .collect();
    assert_eq!(seen, expected);
}

/// How many seeds are tried; each is a worker of its own.
const SEEDS: &str = "CLUSTER_TEST_SEEDS";

fn seeds() -> usize {
    std::env::var(SEEDS).map_or(20, |seeds| seeds.parse().unwrap())
}

/// What begins as frames of the protocol, and does not go on so.
fn noise(random: &mut fastrand::Rng) -> Vec<u8> {
    let bytes = |random: &mut fastrand::Rng, most: usize| -> Vec<u8> {
        (0..random.usize(..most)).map(|_| random.u8(..)).collect()
    };
    let small = random.u32(..4);
    match random.u8(..16) {
        0 => bytes(random, 5000),
        1..3 => {
            let (kind, body) = (random.u8(..10), bytes(random, 30));
            frame(kind, 0, &body)
        }
        3 => listen(small),
        4 => about(LISTENING, small),
        5 | 6 => ready(small, random.u64(..3)),
        7 => about(CLOSE, small),
        8 => about(REVOKE, small),
        9 => frame(LEAVING, 0, &[]),
        10 => {
            let mut changed = [listen(small), ready(small, 0)].concat();
            let at = random.usize(..changed.len());
            changed[at] = random.u8(..);
            changed
        }
        _ => message(&bytes(random, 3000)),
    }
}

/// A worker that makes noise ends as its program wants, or is cut off for what is no frame. In
/// `CLUSTER_TEST_SEEDS` is how many are tried, and the first seed may be given as SEED.
fn noise_is_an_error_or_nothing() {
    let log = Log::default();
    let play = |enemy: &Enemy, which: usize| {
        let first: u64 = std::env::var("SEED").map_or_else(|_| 0, |seed| seed.parse().unwrap());
        let mut random = fastrand::Rng::with_seed(first + which as u64);
        enemy.say(&online());
        for _ in 0..200 {
            enemy.say(&noise(&mut random));
        }
    };
    one_after_the_other(seeds(), play, &log);
    let mut seen = log.take().into_iter();
    for which in 0..seeds() {
        let mut next = || seen.next().unwrap();
        let mut event = next();
        let cut_off = event != "disconnect";
        if cut_off {
            event = next();
        }
        assert_eq!(event, "disconnect", "{which}");
        let status = next();
        let possible = status == "exit status: 0" || cut_off && status == "killed";
        assert!(possible, "{which}: {status}");
    }
    assert_eq!(seen.next(), None);
}
