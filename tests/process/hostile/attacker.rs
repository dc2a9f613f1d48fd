//! A worker that does not call `init`, and reads and writes the frames of its channel itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Length of a queue's message in bytes. Each message carries one connection.
const QUEUE_MESSAGE: usize = 16;

/// Environment variable that is set only in the attacker's process. [`run_attackers`] stores the
/// attacker's index in it.
pub const ATTACKER: &str = "ATTACKER";

/// The version of the frame format.
pub const VERSION: u8 = 3;
pub const ONLINE: u8 = 1;
pub const LISTEN: u8 = 2;
pub const LISTENING: u8 = 3;
pub const IDLE: u8 = 4;
pub const PAUSE: u8 = 5;
pub const RELEASE: u8 = 6;
pub const DISCONNECT_REQUEST: u8 = 7;
pub const PARK: u8 = 8;
pub const PARK_AGAIN: u8 = 9;
pub const DETACH: u8 = 10;
pub const MESSAGE: u8 = 127;
const PREAMBLE: u8 = 64;
pub const REPLY: u8 = 65;
pub const LISTENER_CLOSED: u8 = 66;

/// Index of the listener that the well-behaved worker also requests.
pub const SHARED_INDEX: u32 = 0;
/// Index of a listener that only the attacker requests.
pub const OWN_INDEX: u32 = 1;
pub const OTHER_INDEX: u32 = 2;
/// Handle that no listener has.
pub const NO_HANDLE: u32 = 77;

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
pub fn listen(index: u32) -> Vec<u8> {
    let mut body = numbers(&[index, index, 511]);
    // No flags, and no timeouts.
    body.extend([0; 9]);
    body.extend([0, 4, 0, 0, 127, 0, 0, 1]);
    frame(LISTEN, 0, &body)
}

pub fn idle(handle: u32, received: u64) -> Vec<u8> {
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
    pub fn start_clients(&self) {
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

    /// Closes the descriptors that have arrived with frames.
    pub fn discard_descriptors(&self) {
        self.fds.borrow_mut().clear();
    }

    /// Returns the body of the next reply.
    pub fn receive_reply(&self) -> Vec<u8> {
        loop {
            let (kind, body) = self.receive_frame();
            if kind == REPLY {
                return body;
            }
        }
    }

    /// Requests a listener on a free port, and reports to the master that the worker is listening.
    pub fn listen(&self, index: u32) -> Listener<'_> {
        self.send(&listen(index));
        let body = self.receive_reply();
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

    pub fn flood(&self, one: &[u8]) -> ! {
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
    pub attacker: &'a Attacker,
    pub handle: u32,
    pub port: u16,
    pub queue: OwnedFd,
}

impl Listener<'_> {
    /// Reports that the worker is idle and has received `received` connections in total. The report
    /// requests the next connection.
    pub fn idle(&self, received: u64) {
        self.attacker.send(&idle(self.handle, received));
    }

    pub fn pause(&self) {
        self.attacker.send(&handle_frame(PAUSE, self.handle));
    }

    /// Connects `count` clients, which send nothing and remain connected until they are dropped.
    pub fn clients(&self, count: usize) -> Vec<TcpStream> {
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
    pub fn queued(&self) -> usize {
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
    pub fn wait_for_the_master(&self) {
        let other = self.attacker.listen(OTHER_INDEX);
        self.attacker.send(&handle_frame(RELEASE, other.handle));
    }
}
