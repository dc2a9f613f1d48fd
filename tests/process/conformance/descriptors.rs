//! Tests messages with descriptors of several kinds. The sender either keeps a descriptor open or
//! moves it.

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
    kept_descriptors_stay_open_and_moved_ones_are_closed
    one_message_carries_descriptors_of_several_kinds
    too_many_descriptors_are_an_error
}

/// Returns the target of the descriptor's link in `/proc/self/fd`, in the form in which `open_fds`
/// lists it.
fn link_of(fd: &impl AsFd) -> PathBuf {
    let number = fd.as_fd().as_raw_fd();
    std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap()
}

/// Two socket pairs. One end of each pair is sent. The sender keeps its copy of `kept` open, and
/// closes its copy of `moved`.
struct Ends {
    kept: UnixStream,
    kept_peer: UnixStream,
    moved: Option<UnixStream>,
    moved_link: PathBuf,
    moved_peer: UnixStream,
}

impl Ends {
    fn new() -> Self {
        let (kept, kept_peer) = UnixStream::pair().unwrap();
        let (moved, moved_peer) = UnixStream::pair().unwrap();
        Self {
            kept,
            kept_peer,
            moved_link: link_of(&moved),
            moved: Some(moved),
            moved_peer,
        }
    }

    fn options<R>(&mut self) -> SendOptions<R> {
        let options = SendOptions::new().keep_open(&self.kept);
        options.fd(self.moved.take().unwrap())
    }

    /// Checks which ends are still open after the receiver has processed the message without taking
    /// the descriptors.
    fn check(mut self) {
        assert!(open_fds().contains(&link_of(&self.kept)));
        assert!(
            !open_fds().contains(&self.moved_link),
            "still open in the sender"
        );
        // The receiver must have closed its copies. Then `moved` is closed everywhere, and only the
        // sender's copy of `kept` is open.
        assert_eq!(self.moved_peer.read(&mut [0]).unwrap(), 0);
        self.kept.write_all(b"open").unwrap();
        drop(self.kept);
        let mut received = String::new();
        self.kept_peer.read_to_string(&mut received).unwrap();
        assert_eq!(received, "open");
    }
}

fn kept_descriptors_stay_open_and_moved_ones_are_closed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let mut ends = Ends::new();
            let options = ends.options();
            let _ = worker.send_with(b"not taken", options).unwrap();
            let ends = Cell::new(Some(ends));
            worker.on_message(move |_, worker, _| {
                if let Some(ends) = ends.take() {
                    ends.check();
                    let _ = worker.send(b"your turn").unwrap();
                }
            });
        },
        |worker| {
            let ends = RefCell::new(Ends::new());
            worker.on_message(move |worker, message| {
                if message.bytes() != b"your turn" {
                    let _ = worker.send(b"seen").unwrap();
                    return;
                }
                let mut own = ends.replace(Ends::new());
                let options = own.options().on_written(move |worker: &Worker, outcome| {
                    outcome.unwrap();
                    own.check();
                    worker.disconnect();
                });
                let _ = worker.send_with(b"not taken", options).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 seen",
        "1 not taken",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Descriptors of several kinds, and the peers that show whether each descriptor works in the
/// receiver.
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
        // Close the sender's own receiving end, because the copy in the message must work without
        // it.
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

    /// Takes the descriptors in the order of `send` and uses each.
    fn receive(message: &Message) {
        let fds: [OwnedFd; 5] = message.take_fds().try_into().unwrap();
        assert!(message.take_fds().is_empty(), "taken by the first call");
        let [stream, listener, datagrams, file, pipe] = fds;
        TcpStream::from(stream).write_all(b"stream").unwrap();
        let (mut client, _) = TcpListener::from(listener).accept().unwrap();
        client.write_all(b"listener").unwrap();
        let mut datagram = [0; 9];
        UdpSocket::from(datagrams).recv(&mut datagram).unwrap();
        assert_eq!(&datagram, b"datagrams");
        File::from(file).write_all(b"file").unwrap();
        let mut received = String::new();
        File::from(pipe).read_to_string(&mut received).unwrap();
        assert_eq!(received, "pipe");
    }

    fn check(mut self) {
        let mut received = String::new();
        self.stream.read_to_string(&mut received).unwrap();
        self.client.read_to_string(&mut received).unwrap();
        self.file.rewind().unwrap();
        self.file.read_to_string(&mut received).unwrap();
        assert_eq!(received, "streamlistenerfile");
    }
}

fn one_message_carries_descriptors_of_several_kinds() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let (kinds, options) = Kinds::send();
            let _ = kinds.datagrams.send(b"datagrams").unwrap();
            let _ = worker.send_with(b"from the master", options).unwrap();
            let kinds = Cell::new(Some(kinds));
            worker.on_message(move |_, worker, message| match kinds.take() {
                Some(kinds) => kinds.check(),
                None => {
                    Kinds::receive(message);
                    let _ = worker.send(b"received").unwrap();
                }
            });
        },
        |worker| {
            let own = Cell::new(None);
            worker.on_message(move |worker, message| {
                if message.bytes() == b"from the master" {
                    Kinds::receive(message);
                    let _ = worker.send(b"received").unwrap();
                    let (kinds, options) = Kinds::send();
                    let _ = kinds.datagrams.send(b"datagrams").unwrap();
                    let _ = worker.send_with(b"from the worker", options).unwrap();
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
        "1 from the worker",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn too_many_descriptors_are_an_error() {
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
            let never = |_: &_, _| panic!("called although send_with failed");
            let options = copies(17, &file).on_written(never);
            is_refused(
                worker.send_with(b"", options),
                SendError::TooManyDescriptors,
            );
            assert_eq!(open_fds(), before);
            let _ = worker.send_with(b"16", copies(16, &file)).unwrap();
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
                let never = |_: &_, _| panic!("called although send_with failed");
                let options = copies(17, &file).on_written(never);
                is_refused(
                    worker.send_with(b"", options),
                    SendError::TooManyDescriptors,
                );
                assert_eq!(open_fds(), before);
                let _ = worker.send_with(b"16", copies(16, &file)).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "cannot send to worker 1: the message has more than 16 descriptors",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}
