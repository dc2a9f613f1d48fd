//! The HTTP server of the examples: answers requests, and parks the connection between requests.

#[path = "../timed/mod.rs"]
mod timed;

use std::io::{self, Read, Write};

use cluster::Connection;
use timed::Timed;

/// The request line and the headers of a request.
enum Head {
    /// The client has not sent the whole head.
    Incomplete,
    Malformed,
    Complete {
        length: usize,
        /// Whether the client may send another request on the connection.
        keeps_alive: bool,
    },
}

fn parse(bytes: &[u8]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => {
            let ends = |header: &httparse::Header<'_>| match header.name {
                name if name.eq_ignore_ascii_case("connection") => {
                    let mut options = header.value.split(|byte| *byte == b',');
                    options.any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
                }
                // A request with either header may have a body. This server does not read bodies,
                // so it cannot find the request that follows a body.
                name => {
                    name.eq_ignore_ascii_case("content-length")
                        || name.eq_ignore_ascii_case("transfer-encoding")
                }
            };
            // Close the connection after any method except GET. The answer to HEAD, for example,
            // has no body, but this server sends one.
            let is_get = request.version == Some(1) && request.method == Some("GET");
            let keeps_alive = is_get && !request.headers.iter().any(ends);
            Head::Complete {
                length,
                keeps_alive,
            }
        }
        Ok(httparse::Status::Partial) => Head::Incomplete,
        Err(_) => Head::Malformed,
    }
}

/// Answers each request that the client has sent, with `body` as the answer's body and `headers` as
/// additional header lines. Answers a malformed request with status 400. Afterwards, parks the
/// connection if the client may send another request, and otherwise closes it.
pub(crate) fn answer(connection: Connection, headers: &str, body: &str) -> io::Result<()> {
    let can_park = connection.can_park();
    let mut connection = Timed::new(connection);
    let mut buffer = [0; 8192];
    let mut filled = 0;
    loop {
        match parse(&buffer[..filled]) {
            Head::Incomplete => {
                let read = connection.read(&mut buffer[filled..])?;
                filled += read;
                if read == 0 && filled == 0 {
                    return Ok(());
                }
                if read == 0 {
                    return refuse(connection);
                }
            }
            Head::Malformed => return refuse(connection),
            Head::Complete {
                length,
                keeps_alive,
            } => {
                let keeps_alive = keeps_alive && can_park;
                let line = match keeps_alive {
                    true => "",
                    false => "Connection: close\r\n",
                };
                write(&mut connection, "200 OK", &format!("{headers}{line}"), body)?;
                if !keeps_alive {
                    connection.into_inner().finish();
                    return Ok(());
                }
                buffer.copy_within(length..filled, 0);
                filled -= length;
                if filled == 0 {
                    connection.into_inner().park();
                    return Ok(());
                }
            }
        }
    }
}

/// Answers a request that is malformed or too long.
fn refuse(mut connection: Timed) -> io::Result<()> {
    write(
        &mut connection,
        "400 Bad Request",
        "Connection: close\r\n",
        "",
    )?;
    connection.into_inner().finish();
    Ok(())
}

fn write(connection: &mut Timed, status: &str, headers: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}");
    connection.write_all(format!("{head}\r\n{body}").as_bytes())
}
