//! The HTTP server of the small examples: reads a request and sends an answer.

use std::io::{self, Read, Write};
use std::time::Duration;

use cluster::Connection;

/// The longest time for which a silent client blocks its worker.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers one request with `body`, or a malformed request with status 400. Closes the connection.
pub(crate) fn answer(mut connection: Connection, body: &str) -> io::Result<()> {
    connection.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut request = [0; 4096];
    let mut length = 0;
    loop {
        let read = connection.read(&mut request[length..])?;
        length += read;
        let mut headers = [httparse::EMPTY_HEADER; 32];
        match httparse::Request::new(&mut headers).parse(&request[..length]) {
            Ok(done) if done.is_complete() => break,
            Ok(_) if read > 0 => {}
            Ok(_) | Err(_) => return connection.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        }
    }
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close");
    connection.write_all(format!("{head}\r\n\r\n{body}").as_bytes())
}
