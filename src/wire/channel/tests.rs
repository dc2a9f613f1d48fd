use super::inbox::{LARGE_BODY, READ_SIZE};
use super::*;
use crate::sys::poll::ReadyList;
use crate::wire::frame::header::{HEADER, MAX_BATCH};
use crate::wire::frame::{ToMaster, ToWorker};
use proptest::prelude::*;
use std::fs::File;
use std::io::{Read as _, Write as _};

type MasterEnd = Channel<ToMaster, ToWorker>;
type WorkerEnd = Channel<ToWorker, ToMaster>;

fn pair() -> (MasterEnd, WorkerEnd) {
    pair_in(&Poller::new().unwrap())
}

fn pair_in(poller: &Poller) -> (MasterEnd, WorkerEnd) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    let master = Channel::new(a, poller, 1).unwrap();
    (master, Channel::new(b, poller, 2).unwrap())
}

/// Reads all frames that are in the socket.
fn drain(end: &mut WorkerEnd) -> Vec<(ToWorker, Vec<OwnedFd>)> {
    let mut frames = Vec::new();
    let mut scratch = Vec::new();
    while end.receive(&mut scratch).unwrap() == Received::Data {
        while let Some(arrival) = end.next().unwrap() {
            assert!(!arrival.lost_fds);
            let fds = arrival.fds.into_iter().map(NoLingerFd::into_owned_fd);
            frames.push((arrival.frame, fds.collect()));
        }
    }
    frames
}

/// Returns a message whose body is `number` in 8 bytes.
fn numbered(number: u64) -> ToWorker {
    ToWorker::Message(number.to_le_bytes().into())
}

/// Returns a descriptor and a stream that reads everything written to the descriptor.
fn marked() -> (UnixStream, OwnedFd) {
    let (reader, writer) = UnixStream::pair().unwrap();
    (reader, writer.into())
}

fn is_same(mut reader: UnixStream, fd: OwnedFd) -> bool {
    File::from(fd).write_all(b"x").unwrap();
    let mut byte = [0];
    reader.read_exact(&mut byte).is_ok()
}

#[test]
fn full_socket_is_not_written_until_the_poller_reports_capacity() {
    let (mut master, mut worker) = pair();
    let queued = |master: &MasterEnd| master.outbox.len();
    while queued(&master) == 0 {
        master.send(&[7; 3000], Vec::new(), None).unwrap();
    }
    let before = queued(&master);
    drain(&mut worker);
    master.flush().unwrap();
    assert_eq!(
        queued(&master),
        before,
        "before the poller reports capacity"
    );
    master.retry_write();
    master.flush().unwrap();
    assert_eq!(queued(&master), 0);
}

#[test]
fn descriptors_stay_with_their_frames() {
    let (mut master, mut worker) = pair();
    let mut readers = Vec::new();
    for number in 0..200 {
        let (reader, fd) = marked();
        readers.push(reader);
        master.queue(&numbered(number), Some(Rc::new(fd.into())));
        if number % 3 == 0 {
            master.queue(&ToWorker::Message(vec![7; 3000]), None);
        }
    }
    let mut frames = Vec::new();
    while frames.len() < 267 {
        master.retry_write();
        master.flush().unwrap();
        frames.extend(drain(&mut worker));
    }
    let mut readers = readers.into_iter();
    let mut numbers = 0..200;
    for (frame, fds) in frames {
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            assert_eq!(frame, ToWorker::Message(vec![7; 3000]));
            continue;
        };
        assert_eq!(Some(frame), numbers.next().map(numbered));
        assert!(is_same(readers.next().unwrap(), fd));
    }
    assert_eq!(numbers.next(), None);
}

#[test]
fn long_message_with_a_descriptor_arrives_whole() {
    let (mut master, mut worker) = pair();
    let (reader, fd) = marked();
    let text = vec![9; 800_000];
    let receipt = ReceiptId::next();
    let sent = master.send(&text, vec![fd], Some(receipt));
    sent.unwrap();
    master.flush().unwrap();
    assert_eq!(master.take_receipts(), [], "it is written in part");
    let mut frames = Vec::new();
    while frames.is_empty() {
        master.retry_write();
        master.flush().unwrap();
        frames.extend(drain(&mut worker));
    }
    let (frame, mut fds) = frames.remove(0);
    assert_eq!(frame, ToWorker::Message(text));
    assert!(is_same(reader, fds.remove(0)));
    assert!(master.is_flushed());
    assert_eq!(
        master.take_receipts(),
        [Receipt {
            id: receipt,
            is_written: true
        }]
    );
}

#[test]
fn received_descriptors_close_on_exec() {
    let (mut master, mut worker) = pair();
    let (_reader, fd) = marked();
    master.queue(&numbered(1), Some(Rc::new(fd.into())));
    master.flush().unwrap();
    let (_, fds) = drain(&mut worker).remove(0);
    let path = format!("/proc/self/fdinfo/{}", {
        use std::os::fd::AsRawFd as _;
        fds[0].as_raw_fd()
    });
    let info = std::fs::read_to_string(path).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_ne!(flags & 0o2_000_000, 0, "O_CLOEXEC");
}

#[test]
fn peer_that_never_reads_costs_bounded_memory() {
    let (mut master, _worker) = pair();
    let message = vec![0; 64 << 10];
    let (mut slow, mut sent) = (0, 0);
    let refused = loop {
        match master.send(&message, Vec::new(), None) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        master.flush().unwrap();
        slow += usize::from(!master.has_capacity());
    };
    assert_eq!(refused, SendError::QueueFull);
    assert!(master.outbox.len() <= HARD_LIMIT);
    assert!(slow > 100 && slow < sent, "advice {slow} of {sent} times");
}

#[test]
fn messages_of_all_lengths_arrive_whole_in_any_pieces() {
    let (mut master, mut worker) = pair();
    let mut lengths: Vec<_> = [
        0,
        1,
        LARGE_BODY - 1,
        LARGE_BODY,
        LARGE_BODY + 1,
        EXTRA_READ,
        READ_SIZE,
        MAX_BODY,
    ]
    .into();
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..300 {
        let limit = 1 << rng.u32(0..18);
        lengths.push(rng.usize(0..limit));
    }
    let messages = lengths
        .iter()
        .enumerate()
        .map(|(n, length)| vec![n.to_le_bytes()[0]; *length]);
    let messages: Vec<_> = messages.collect();
    let mut unsent = messages.iter();
    let mut frames = Vec::new();
    while frames.len() < messages.len() {
        for message in unsent.by_ref().take(rng.usize(0..4)) {
            master.send(message, Vec::new(), None).unwrap();
        }
        master.retry_write();
        master.flush().unwrap();
        frames.extend(drain(&mut worker));
    }
    for (frame, message) in frames.into_iter().zip(messages) {
        assert!(frame.1.is_empty() && frame.0 == ToWorker::Message(message));
    }
    assert!(master.is_flushed());
}

#[test]
fn successive_large_messages_are_read_into_their_final_buffers() {
    let (mut master, mut worker) = pair();
    let mut scratch = Vec::new();
    // Sends a message. Returns each read's length in bytes, and whether the read filled its buffer.
    let mut read = |length: usize| {
        master.send(&vec![7; length], Vec::new(), None).unwrap();
        let mut reads = Vec::new();
        loop {
            let before = worker.inbox.size().bytes;
            assert_eq!(worker.receive(&mut scratch).unwrap(), Received::Data);
            reads.push((worker.inbox.size().bytes - before, worker.has_more()));
            if let Some(arrival) = worker.next().unwrap() {
                assert_eq!(arrival.frame, ToWorker::Message(vec![7; length]));
                assert!(arrival.is_last);
                return reads;
            }
        }
    };
    // After a large message, the first read of the next message is at most `EXTRA_READ` bytes,
    // because another large message is likely. The lengths of a message's reads add up to the
    // length of its header and body.
    let (long, short) = (READ_SIZE, 100);
    assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
    let (first, rest) = (EXTRA_READ, HEADER + long - EXTRA_READ);
    assert_eq!(read(long), [(first, true), (rest, false)]);
    assert_eq!(read(short), [(HEADER + short, false)]);
    assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
    let (middle, rest) = (6000, HEADER + 6000 - EXTRA_READ);
    assert_eq!(read(middle), [(first, true), (rest, false)], "two reads");
    assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
}

#[test]
fn send_advises_a_pause_when_a_second_long_message_would_wait() {
    let (mut master, mut worker) = pair();
    let send = |master: &mut MasterEnd, length| {
        master.send(&vec![0; length], Vec::new(), None).unwrap();
        master.flush().unwrap();
        (master.has_capacity(), master.is_flushed())
    };
    loop {
        match send(&mut master, HIGH_WATER) {
            (has_capacity, true) => assert!(has_capacity, "nothing is queued"),
            (has_capacity, false) => {
                break assert!(!has_capacity, "the next one would be queued, too");
            }
        }
    }
    while !master.is_flushed() {
        drain(&mut worker);
        master.retry_write();
        master.flush().unwrap();
    }
    while send(&mut master, 100).1 {}
    assert!(master.has_capacity(), "many short ones may be queued");
}

#[test]
fn poller_reports_capacity_until_there_is_nothing_to_write() {
    let poller = Poller::new().unwrap();
    let (mut master, mut worker) = pair_in(&poller);
    let is_reported = || {
        let mut ready = ReadyList::new();
        poller.wait(Some(Duration::ZERO), &mut ready).unwrap();
        ready.iter().any(|ready| ready.key == 1 && ready.writable)
    };
    assert!(!is_reported(), "nothing was queued");
    for _ in 0..2 {
        while master.is_flushed() {
            master.send(&[0; 3000], Vec::new(), None).unwrap();
            master.flush().unwrap();
        }
        assert!(!is_reported(), "the socket is full");
        drain(&mut worker);
        assert!(is_reported());
        master.retry_write();
        master.flush().unwrap();
        assert!(master.is_flushed() && is_reported(), "for the next frames");
    }
    master.flush().unwrap();
    assert!(!is_reported(), "nothing was queued since");
}

#[test]
fn full_socket_is_not_retried_for_each_message() {
    let (mut master, mut worker) = pair();
    let send = |master: &mut MasterEnd| {
        master.send(&[0; 100], Vec::new(), None).unwrap();
        master.flush().unwrap();
    };
    let fill = |master: &mut MasterEnd| {
        while master.is_flushed() {
            send(master);
        }
    };
    fill(&mut master);
    drain(&mut worker);
    send(&mut master);
    assert!(!master.is_flushed(), "before the poller reports capacity");
    master.retry_write();
    master.flush().unwrap();
    assert!(master.is_flushed());
    fill(&mut master);
    drain(&mut worker);
    for _ in 0..RETRY / 100 {
        send(&mut master);
    }
    assert!(master.is_flushed(), "written because enough was queued");
}

#[test]
fn message_over_a_limit_is_an_error() {
    let (mut master, _worker) = pair();
    let long = master.send(&vec![0; MAX_BODY + 1], Vec::new(), None);
    assert_eq!(long, Err(SendError::TooLong));
    let fds = (0..17).map(|_| marked().1).collect();
    let many = master.send(b"", fds, None);
    assert_eq!(many, Err(SendError::TooManyDescriptors));
}

#[test]
fn unannounced_descriptors_are_an_error() {
    let (mut master, worker) = pair();
    let junk = [0; 3];
    let (_keep, fd) = marked();
    let mut outcome = Ok(None);
    for _ in 0..4 {
        let fds = [fd.as_fd(); MAX_BATCH];
        // A header of zeroes has version 0, which is invalid. Send one byte per call, so that the
        // header stays incomplete and only the descriptors can cause the error.
        socket::send(&worker.socket, &junk[..1], &fds).unwrap();
        let mut scratch = Vec::new();
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Data);
        outcome = master.next();
        if outcome.is_err() {
            break;
        }
    }
    assert_eq!(outcome.unwrap_err(), FrameError::Descriptors);
}

#[test]
fn frames_written_before_end_of_file_are_read_first() {
    let (mut master, mut worker) = pair();
    worker.queue(&ToMaster::Message(b"goodbye".to_vec()), None);
    // The worker does not read this frame, so closing its end causes a reset instead of
    // end-of-file.
    master.queue(&ToWorker::Disconnect, None);
    master.flush().unwrap();
    worker.flush().unwrap();
    drop(worker);
    let mut scratch = Vec::new();
    assert_eq!(master.receive(&mut scratch).unwrap(), Received::Data);
    let frame = master.next().unwrap().unwrap().frame;
    assert_eq!(frame, ToMaster::Message(b"goodbye".to_vec()));
    assert_eq!(master.receive(&mut scratch).unwrap(), Received::EndOfFile);
    master.queue(&ToWorker::Disconnect, None);
    assert!(master.flush().is_ok(), "a closed peer is no error");
}

#[test]
fn receipt_reports_a_lost_message() {
    let (mut master, worker) = pair();
    let receipts = [ReceiptId::next(), ReceiptId::next()];
    for receipt in receipts {
        let sent = master.send(&[0; 500_000], Vec::new(), Some(receipt));
        sent.unwrap();
    }
    drop(worker);
    master.flush().unwrap();
    assert_eq!(
        master.take_receipts(),
        receipts.map(|id| Receipt {
            id,
            is_written: false
        })
    );
}

#[test]
fn frames_queued_before_close_are_written() {
    let (mut master, mut worker) = pair();
    worker.queue(&ToMaster::DisconnectRequest, None);
    worker.close();
    worker.flush().unwrap();
    assert!(worker.is_flushed());
    worker.queue(&ToMaster::Online, None);
    assert!(!worker.is_flushed(), "the later frame is lost");
    let mut scratch = Vec::new();
    assert_eq!(master.receive(&mut scratch).unwrap(), Received::Data);
    assert_eq!(
        master.next().unwrap().unwrap().frame,
        ToMaster::DisconnectRequest
    );
    assert_eq!(master.receive(&mut scratch).unwrap(), Received::EndOfFile);
}

#[test]
fn peer_cannot_write_after_shut_down() {
    let (mut master, mut worker) = pair();
    worker.queue(&ToMaster::DisconnectRequest, None);
    worker.flush().unwrap();
    assert!(worker.is_flushed());
    master.shut_down();
    worker.queue(&ToMaster::Online, None);
    worker.flush().unwrap();
    assert!(
        !worker.is_flushed(),
        "the worker knows that the frame is lost"
    );
    let mut scratch = Vec::new();
    assert_eq!(master.receive(&mut scratch).unwrap(), Received::Data);
    assert_eq!(
        master.next().unwrap().unwrap().frame,
        ToMaster::DisconnectRequest
    );
}

proptest! {
    /// Simulates system calls that write only a part of their batch, and a kernel that drops the
    /// last descriptors of some batches.
    #[test]
    fn lost_descriptors_are_attributed_to_their_frames(
        counts in proptest::collection::vec(0..=MAX_FDS, 1..40),
        writes in proptest::collection::vec((1..400usize, 0..4usize), 1..40),
    ) {
        let null = Rc::new(NoLingerFd::from(OwnedFd::from(File::open("/dev/null").unwrap())));
        let mut outbox = Outbox::default();
        for (n, count) in counts.iter().enumerate() {
            let mut bytes = Vec::new();
            let body = vec![u8::try_from(n).unwrap(); 30];
            ToMaster::Message(body).encode(*count, &mut bytes);
            outbox.push([&bytes[..]], std::iter::repeat_n(Rc::clone(&null), *count));
        }
        let mut inbox = Inbox::default();
        let (mut lost, mut received, mut frames) = (0, 0, 0);
        for (limit, drops) in writes.iter().cycle() {
            let Batch { bytes, fds } = outbox.next_batch();
            let arriving = fds.len().saturating_sub(*drops);
            let copies = fds[..arriving].iter().map(|fd| fd.try_clone_to_owned().unwrap());
            inbox.push_fds(copies.map(NoLingerFd::from).collect(), arriving < fds.len());
            lost += fds.len() - arriving;
            let written = bytes.len().min(*limit);
            inbox.push(&bytes[..written]);
            outbox.advance(written);
            while let Some(arrival) = inbox.next::<ToMaster>().unwrap() {
                let announced = counts[frames];
                prop_assert_eq!(arrival.lost_fds, arrival.fds.len() < announced);
                received += arrival.fds.len();
                frames += 1;
            }
            if outbox.is_empty() {
                break;
            }
        }
        prop_assert_eq!(frames, counts.len());
        prop_assert_eq!(received + lost, counts.iter().sum::<usize>());
        prop_assert!(inbox.fds().next().is_none());
    }

}
