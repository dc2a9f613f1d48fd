//! Serves HTTP with `tiny_http`, which accepts connections itself. It therefore needs the
//! scheduling policy `none` or `sharded`.
//!
//! Usage:     CLUSTER_SCHED_POLICY=none cargo run -p cluster-servers --example tiny_http
//! then:      curl http://127.0.0.1:8000/

mod pooled;

use pooled::usage;
use tiny_http::{Response, Server};

fn main() -> pooled::Result {
    let source = usage::header!("tiny_http.rs");
    pooled::run(source, "127.0.0.1:8000", |worker, address| {
        let listener = worker.listen(address)?.into_std()?;
        let server = Server::from_listener(listener, None)?;
        std::thread::spawn(move || {
            loop {
                // When the worker disconnects, `recv` returns the error of `accept` once, but
                // accepted connections still bring requests.
                if let Ok(request) = server.recv() {
                    let _ = request.respond(Response::from_string("hello\n"));
                }
            }
        });
        Ok(worker.run()?)
    })
}
