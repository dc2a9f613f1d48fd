//! Serves HTTP with `tiny_http`, on a listener from systemd or `cluster-serve`. Uses nothing of this
//! crate. SIGTERM ends it at once.
//!
//! Usage:     cargo build -p cluster-servers --example activated
//!            cluster-serve --listen 127.0.0.1:8000 -- target/debug/examples/activated
//! then:      curl http://127.0.0.1:8000/

#![allow(unsafe_code)]

use std::error::Error;
use std::net::TcpListener;
use std::os::fd::FromRawFd as _;

use tiny_http::{Response, Server};

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    std::env::var("LISTEN_FDS").map_err(|error| format!("LISTEN_FDS: {error}"))?;
    // SAFETY: the process that has set the variable has opened descriptor 3 for this process, and no
    // other value owns the descriptor.
    let listener = unsafe { TcpListener::from_raw_fd(3) };
    let server = Server::from_listener(listener, None)?;
    for request in server.incoming_requests() {
        let _ = request.respond(Response::from_string("hello\n"));
    }
    Ok(())
}
