//! Clients of each protocol, and a load of several clients.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use simple_dns::{CLASS, Name, Packet, Question, TYPE};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error, Message};

/// The number of clients at a time.
pub(crate) const CLIENTS: u64 = 6;
/// How long a client waits for its answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Makes one request, and returns whether the answer is right.
pub(crate) type Client = fn(SocketAddr) -> io::Result<bool>;

/// Counts of requests with right answers, and of failures by kind.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) answered: u64,
    pub(crate) refused: u64,
    /// The connection ended before the answer did.
    pub(crate) reset: u64,
    pub(crate) timed_out: u64,
    pub(crate) wrong: u64,
}

impl Counts {
    fn add(&mut self, outcome: &io::Result<bool>) {
        let count = match outcome {
            Ok(true) => &mut self.answered,
            Ok(false) => &mut self.wrong,
            Err(error) => self.failure(error),
        };
        *count += 1;
    }

    /// Returns the count of an error's kind.
    fn failure(&mut self, error: &io::Error) -> &mut u64 {
        use io::ErrorKind::{
            BrokenPipe, ConnectionRefused, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock,
        };
        let kind = error.kind();
        if kind == ConnectionRefused {
            return &mut self.refused;
        }
        if [WouldBlock, TimedOut].contains(&kind) {
            return &mut self.timed_out;
        }
        let is_reset = [ConnectionReset, BrokenPipe, UnexpectedEof].contains(&kind);
        assert!(is_reset, "a client failed: {error}");
        &mut self.reset
    }

    pub(crate) fn failures(&self) -> [u64; 4] {
        [self.refused, self.reset, self.timed_out, self.wrong]
    }
}

/// A load of several threads, each of which makes one request after another.
pub(crate) struct Load {
    ended: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Counts>>,
}

impl Load {
    pub(crate) fn begin(address: SocketAddr, client: Client) -> Self {
        let (ended, answered) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let threads = (0..CLIENTS).map(|_| {
            let (ended, answered) = (Arc::clone(&ended), Arc::clone(&answered));
            std::thread::spawn(move || Self::run(address, client, &ended, &answered))
        });
        let threads = threads.collect();
        Self {
            ended,
            answered,
            threads,
        }
    }

    fn run(
        address: SocketAddr,
        client: Client,
        ended: &AtomicBool,
        answered: &AtomicU64,
    ) -> Counts {
        let mut counts = Counts::default();
        while !ended.load(Ordering::SeqCst) {
            let outcome = client(address);
            counts.add(&outcome);
            if matches!(outcome, Ok(true)) {
                answered.fetch_add(1, Ordering::SeqCst);
            }
        }
        counts
    }

    /// Waits until `count` more requests are answered.
    pub(crate) fn wait_for_answers(&self, count: u64) {
        let (begin, end) = (Instant::now(), self.answered.load(Ordering::SeqCst) + count);
        while self.answered.load(Ordering::SeqCst) < end {
            assert!(begin.elapsed() < 3 * TIMEOUT, "no answers");
            // Check again, because many threads count the answers, and none reports them.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the load after the requests in flight.
    pub(crate) fn end(self) -> Counts {
        self.ended.store(true, Ordering::SeqCst);
        let mut sum = Counts::default();
        for thread in self.threads {
            let own = thread.join().unwrap();
            sum.answered += own.answered;
            sum.refused += own.refused;
            sum.reset += own.reset;
            sum.timed_out += own.timed_out;
            sum.wrong += own.wrong;
        }
        sum
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// Requests one page. Reads to the end of the body, and does not wait for the end of the
/// connection.
fn get(mut stream: impl Read + Write) -> io::Result<bool> {
    const BODY: &[u8] = b"hello\n";
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let mut body = [0; BODY.len()];
    stream.read_exact(&mut body)?;
    let is_right = head.starts_with("http/1.1 200 ") && head.contains("content-length: 6\r\n");
    Ok(is_right && body == BODY)
}

pub(crate) fn http(address: SocketAddr) -> io::Result<bool> {
    get(BufReaderWriter(BufReader::new(connect(address)?)))
}

/// Reads with a buffer, and writes without one.
struct BufReaderWriter(BufReader<TcpStream>);

impl Read for BufReaderWriter {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for BufReaderWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.get_mut().flush()
    }
}

static TRUSTING: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
    let certificate = CertificateDer::from_pem_slice(include_bytes!("../../localhost.pem"));
    let mut roots = RootCertStore::empty();
    roots.add(certificate.unwrap()).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots);
    Arc::new(config.with_no_client_auth())
});

/// Makes a new handshake for each request: sessions of one worker are not known to another.
pub(crate) fn https(address: SocketAddr) -> io::Result<bool> {
    let name = ServerName::try_from("localhost").unwrap();
    let session = ClientConnection::new(Arc::clone(&TRUSTING), name).unwrap();
    get(StreamOwned::new(session, connect(address)?))
}

/// Opens a session, and sends messages until the session has carried ten or the server ends it with
/// a close frame. The client then connects again, so nothing is lost.
pub(crate) fn websocket(address: SocketAddr) -> io::Result<bool> {
    let connected = tungstenite::client(format!("ws://{address}/"), connect(address)?);
    let (mut session, _) = match connected {
        Ok(connected) => connected,
        Err(tungstenite::HandshakeError::Failure(error)) => return Err(io_error(error)),
        Err(error) => panic!("{error}"),
    };
    for number in 0..10 {
        let sent = Message::text(format!("message {number}"));
        match session.send(sent.clone()).and_then(|()| session.read()) {
            Ok(Message::Close(Some(frame))) if frame.code == CloseCode::Restart => break,
            Ok(answer) if answer == sent => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(io_error(error)),
        }
    }
    let _ = session.close(None);
    loop {
        match session.read() {
            Ok(_) => {}
            Err(Error::ConnectionClosed) => return Ok(true),
            Err(error) => return Err(io_error(error)),
        }
    }
}

/// Treats an end without a close frame as a reset.
fn io_error(error: Error) -> io::Error {
    if let Error::Io(error) = error {
        return error;
    }
    assert!(matches!(error, Error::Protocol(_)), "{error}");
    io::Error::new(io::ErrorKind::UnexpectedEof, error)
}

/// Delivers one mail.
pub(crate) fn smtp(address: SocketAddr) -> io::Result<bool> {
    let stream = connect(address)?;
    let mut lines = BufReader::new(&stream);
    let steps = [
        ("", "220"),
        ("EHLO localhost\r\n", "250"),
        ("MAIL FROM:<a@localhost>\r\n", "250"),
        ("RCPT TO:<b@localhost>\r\n", "250"),
        ("DATA\r\n", "354"),
        ("Subject: hello\r\n\r\nhello\r\n.\r\n", "250"),
        ("QUIT\r\n", "221"),
    ];
    for (command, code) in steps {
        (&stream).write_all(command.as_bytes())?;
        let mut line = String::new();
        // The last line of a reply has a space after its code.
        while line.as_bytes().get(3) != Some(&b' ') {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        if !line.starts_with(code) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(crate) fn dns(address: SocketAddr) -> io::Result<bool> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(address)?;
    // A datagram that a killed worker has read is lost, so do not wait long for its answer.
    socket.set_read_timeout(Some(TIMEOUT / 4))?;
    let mut query = Packet::new_query(7);
    let name = Name::new_unchecked("localhost");
    let question = Question::new(name, TYPE::A.into(), CLASS::IN.into(), false);
    query.questions.push(question);
    socket.send(&query.build_bytes_vec().unwrap())?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    Ok(Packet::parse(&answer[..length])
        .is_ok_and(|answer| answer.id() == 7 && answer.answers.len() == 1))
}
