//! Descriptors that go with a message: of every kind, kept open here or given away.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cluster::{Message, SendError, SendOptions, Worker};

use super::receipts::is_refused;
use crate::harness::{Log, cluster, note_events, note_messages, open_fds};

crate::scenarios! {
    what_is_kept_open_stays_open_and_what_is_given_away_is_closed
    descriptors_of_every_kind_in_one_message
    more_descriptors_than_allowed_are_an_error
}

/// What the descriptor is, as it appears in `open_fds`.
fn what_is(fd: &impl AsFd) -> PathBuf {
    let number = fd.as_fd().as_raw_fd();
    std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap()
}

/// Whoever sends two ends, and the other ends of them.
struct Ends {
    kept: UnixStream,
    kept_peer: UnixStream,
    given: Option<UnixStream>,
    given_name: PathBuf,
    given_peer: UnixStream,
}

impl Ends {
    fn new() -> Self {
        let (kept, kept_peer) = UnixStream::pair().unwrap();
        let (given, given_peer) = UnixStream::pair().unwrap();
        Self {
            kept,
            kept_peer,
            given_name: what_is(&given),
            given: Some(given),
            given_peer,
        }
    }

    fn options<R>(&mut self) -> SendOptions<R> {
        let options = SendOptions::new().keep_open(&self.kept);
        options.fd(self.given.take().unwrap())
    }

    /// When it is sent, and nobody has taken anything.
    fn check(mut self) {
        assert!(open_fds().contains(&what_is(&self.kept)));
        assert!(!open_fds().contains(&self.given_name), "not closed here");
        // The other side has closed both: this one's end is the only one left, or none is.
        assert_eq!(self.given_peer.read(&mut [0]).unwrap(), 0);
        self.kept.write_all(b"still").unwrap();
        drop(self.kept);
        let mut heard = String::new();
        self.kept_peer.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "still");
    }
}

fn what_is_kept_open_stays_open_and_what_is_given_away_is_closed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let mut ends = Ends::new();
            let options = ends.options();
            worker.send_with(b"nobody takes these", options).unwrap();
            let ends = Cell::new(Some(ends));
            worker.on_message(move |_, worker, _| {
                if let Some(ends) = ends.take() {
                    ends.check();
                    worker.send(b"now you").unwrap();
                }
            });
        },
        |worker| {
            let ends = RefCell::new(Ends::new());
            worker.on_message(move |worker, message| {
                if message.bytes() != b"now you" {
                    worker.send(b"seen").unwrap();
                    return;
                }
                let mut own = ends.replace(Ends::new());
                let options = own.options().on_written(move |worker: &Worker, outcome| {
                    outcome.unwrap();
                    own.check();
                    worker.disconnect();
                });
                worker.send_with(b"nobody takes these", options).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 seen",
        "1 nobody takes these",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// One descriptor of each kind, and what is needed to see that each works where it arrives.
struct Kinds {
    stream: TcpStream,
    client: TcpStream,
    datagrams: UdpSocket,
    file: File,
}

impl Kinds {
    fn send<R>() -> (Self, SendOptions<R>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        datagrams.connect(receiver.local_addr().unwrap()).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (pipe, writer) = nix::unistd::pipe().unwrap();
        File::from(writer).write_all(b"pipe").unwrap();
        let options = SendOptions::new()
            .fd(accepted)
            .fd(listener)
            .keep_open(&receiver)
            .keep_open(&file)
            .fd(pipe);
        // What arrives works also when this one is gone.
        drop(receiver);
        let client = TcpStream::connect(address).unwrap();
        let kinds = Self {
            stream,
            client,
            datagrams,
            file,
        };
        (kinds, options)
    }

    /// In the same order.
    fn receive(message: &Message) {
        let fds: [OwnedFd; 5] = message.take_fds().try_into().unwrap();
        assert!(message.take_fds().is_empty(), "the first to ask gets them");
        let [stream, listener, datagrams, file, pipe] = fds;
        TcpStream::from(stream).write_all(b"stream").unwrap();
        let (mut client, _) = TcpListener::from(listener).accept().unwrap();
        client.write_all(b"listener").unwrap();
        let mut datagram = [0; 9];
        UdpSocket::from(datagrams).recv(&mut datagram).unwrap();
        assert_eq!(&datagram, b"datagrams");
        File::from(file).write_all(b"file").unwrap();
        let mut heard = String::new();
        File::from(pipe).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "pipe");
    }

    fn check(mut self) {
        let mut heard = String::new();
        self.stream.read_to_string(&mut heard).unwrap();
        self.client.read_to_string(&mut heard).unwrap();
        self.file.rewind().unwrap();
        self.file.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "streamlistenerfile");
    }
}

fn descriptors_of_every_kind_in_one_message() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let (kinds, options) = Kinds::send();
            kinds.datagrams.send(b"datagrams").unwrap();
            worker.send_with(b"for you", options).unwrap();
            let kinds = Cell::new(Some(kinds));
            worker.on_message(move |_, worker, message| match kinds.take() {
                Some(kinds) => kinds.check(),
                None => {
                    Kinds::receive(message);
                    worker.send(b"received").unwrap();
                }
            });
        },
        |worker| {
            let own = Cell::new(None);
            worker.on_message(move |worker, message| {
                if message.bytes() == b"for you" {
                    Kinds::receive(message);
                    worker.send(b"received").unwrap();
                    let (kinds, options) = Kinds::send();
                    kinds.datagrams.send(b"datagrams").unwrap();
                    worker.send_with(b"and for you", options).unwrap();
                    own.set(Some(kinds));
                } else {
                    own.take().unwrap().check();
                    worker.disconnect();
                }
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 received",
        "1 and for you",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn more_descriptors_than_allowed_are_an_error() {
    let log = Log::default();
    let entries = log.clone();
    fn copies<R>(count: usize, file: &File) -> SendOptions<R> {
        let options = SendOptions::new();
        (0..count).fold(options, |options, _| options.keep_open(file))
    }
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let file = tempfile::tempfile().unwrap();
            let before = open_fds();
            let never = |_: &_, _| panic!("send_with has failed");
            let options = copies(17, &file).on_written(never);
            is_refused(
                worker.send_with(b"", options),
                SendError::TooManyDescriptors,
            );
            assert_eq!(open_fds(), before);
            worker.send_with(b"16", copies(16, &file)).unwrap();
            worker.on_message(move |_, worker, message| {
                assert_eq!(message.take_fds().len(), 16);
                worker.disconnect();
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                let mut fds = message.take_fds();
                assert_eq!(fds.len(), 16);
                let before = open_fds();
                let file = fds.pop().unwrap().into();
                let never = |_: &_, _| panic!("send_with has failed");
                let options = copies(17, &file).on_written(never);
                is_refused(
                    worker.send_with(b"", options),
                    SendError::TooManyDescriptors,
                );
                assert_eq!(open_fds(), before);
                worker.send_with(b"16", copies(16, &file)).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "cannot send to worker 1: more than 16 descriptors",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}
