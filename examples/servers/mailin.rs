//! Receives mail with `mailin`, a state machine for SMTP, which is a protocol of lines.
//!
//! Usage:     cargo run -p cluster-servers --example mailin
//! then:      curl smtp://127.0.0.1:2525 --mail-from a@b --mail-rcpt c@d -T Cargo.toml

mod pooled;

use pooled::usage;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use mailin::{Action, Handler, SessionBuilder};

struct Mailbox;
impl Handler for Mailbox {}

fn converse(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut session = SessionBuilder::new("localhost").build(stream.peer_addr()?.ip(), Mailbox);
    let (mut lines, mut line) = (BufReader::new(stream), Vec::new());
    let mut response = session.greeting();
    loop {
        let mut reply = Vec::new();
        if !matches!(response.action, Action::NoReply) {
            response.write_to(&mut reply)?;
        }
        stream.write_all(&reply)?;
        line.clear();
        if response.action == Action::Close || lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        response = session.process(&line);
    }
}

fn main() -> pooled::Result {
    let source = usage::header!("mailin.rs");
    pooled::run(source, "127.0.0.1:2525", |worker, address| {
        for connection in worker.listen(address)?.incoming() {
            let connection = connection?;
            let _ = converse(&connection);
        }
        Ok(())
    })
}
