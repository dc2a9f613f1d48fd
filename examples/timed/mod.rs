//! A connection with a deadline, so that no client occupies a blocking worker for long.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use cluster::Connection;

/// Maximum time for a client to send its requests and to receive the answers.
///
/// A client that sends half a request, or one byte a second, occupies its worker for this time.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection whose reads and writes fail once `TIMEOUT` has passed.
pub(crate) struct Timed {
    connection: Connection,
    end: Instant,
}

impl Timed {
    pub(crate) fn new(connection: Connection) -> Self {
        let end = Instant::now() + TIMEOUT;
        Self { connection, end }
    }

    pub(crate) fn into_inner(self) -> Connection {
        self.connection
    }

    fn time_left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.set_read_timeout(self.time_left()?)?;
        self.connection.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.set_write_timeout(self.time_left()?)?;
        self.connection.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.connection.flush()
    }
}
