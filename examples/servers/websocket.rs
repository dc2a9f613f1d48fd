//! Serves WebSockets with `tungstenite`, with a thread for each session.
//!
//! Usage:     cargo run -p cluster-servers --example websocket
//! then:      websocat ws://127.0.0.1:8000/

mod pooled;

use pooled::usage;
use std::io::ErrorKind::WouldBlock;
use std::net::TcpStream;
use std::time::Duration;

use cluster::{DisconnectToken, ListenOptions};
use tungstenite::Error;
use tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

/// Sends each message back to the client, until the client or the worker ends the session.
fn echo(stream: TcpStream, token: &DisconnectToken) -> pooled::Result {
    // An idle session checks the token once a second.
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut session = tungstenite::accept(stream)?;
    loop {
        match session.read() {
            Ok(message) if session.can_write() && (message.is_text() || message.is_binary()) => {
                session.send(message)?;
            }
            Ok(_) => {}
            Err(Error::Io(error)) if session.can_write() && error.kind() == WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if session.can_write() && token.is_disconnecting() {
            // The client answers with its own close frame. After it, `read` returns an error, which
            // ends the loop.
            let (code, reason) = (CloseCode::Restart, "".into());
            session.close(Some(CloseFrame { code, reason }))?;
        }
    }
}

fn main() -> pooled::Result {
    let source = usage::header!("websocket.rs");
    pooled::run(source, "127.0.0.1:8000", |worker, address| {
        let options = ListenOptions::from(address).wait_for_data(true);
        for connection in worker.listen(options)?.incoming() {
            let (stream, guard) = connection?.into_parts();
            let token = worker.disconnect_token();
            std::thread::spawn(move || {
                let _guard = guard;
                let _ = echo(stream, &token);
            });
        }
        Ok(worker.run()?)
    })
}
