//! The HTTP server of the small examples: reads a request and sends an answer.

#[path = "../timed/mod.rs"]
mod timed;

use std::io::{self, Read, Write};

use cluster::Connection;
use timed::Timed;

/// Answers one request with `body`, or a malformed request with status 400. Closes the connection.
pub(crate) fn answer(connection: Connection, body: &str) -> io::Result<()> {
    let mut connection = Timed::new(connection);
    let mut request = [0; 4096];
    let mut length = 0;
    let is_valid = loop {
        let read = connection.read(&mut request[length..])?;
        length += read;
        let mut headers = [httparse::EMPTY_HEADER; 32];
        match httparse::Request::new(&mut headers).parse(&request[..length]) {
            Ok(done) if done.is_complete() => break true,
            Ok(_) if read > 0 => {}
            Ok(_) | Err(_) => break false,
        }
    };
    let (status, body) = match is_valid {
        true => ("200 OK", body),
        false => ("400 Bad Request", ""),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close");
    connection.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
    connection.finish();
    Ok(())
}
