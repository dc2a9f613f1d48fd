//! Serves HTTP with handlers for `rouille` on the server `tiny_http`, because the server of
//! `rouille` takes no listener. `tiny_http` needs the scheduling policy `none` or `sharded`.
//!
//! Usage:     CLUSTER_SCHED_POLICY=none cargo run -p cluster-servers --example rouille
//! then:      curl http://127.0.0.1:8000/

mod pooled;

use pooled::usage;
use std::io;

use rouille::{Request, Response, router};
use tiny_http::Header;

fn handle(request: &Request) -> Response {
    router!(request, (GET) ["/"] => { Response::text("hello\n") }, _ => Response::empty_404())
}

/// Calls the handler. Reads the whole body first, and does not support upgrades.
fn respond(mut request: tiny_http::Request) -> io::Result<()> {
    let mut body = Vec::new();
    request.as_reader().read_to_end(&mut body)?;
    let headers = request.headers().iter();
    let headers = headers.map(|own| (own.field.to_string(), own.value.to_string()));
    let headers = headers.collect();
    let (method, url) = (request.method().as_str(), request.url());
    let from = *request.remote_addr().ok_or(io::ErrorKind::NotConnected)?;
    let response = handle(&Request::fake_http_from(from, method, url, headers, body));
    let (data, length) = response.data.into_reader_and_size();
    let headers = response.headers.iter();
    let headers = headers.flat_map(|(name, value)| Header::from_bytes(&**name, &**value));
    let (status, headers) = (response.status_code.into(), headers.collect());
    let response = tiny_http::Response::new(status, headers, data, length, None);
    request.respond(response)
}

fn main() -> pooled::Result {
    let source = usage::header!("rouille.rs");
    pooled::run(source, "127.0.0.1:8000", |worker, address| {
        let listener = worker.listen(address)?.into_std()?;
        let server = tiny_http::Server::from_listener(listener, None)?;
        // See the example `tiny_http` for the error of `recv`.
        std::thread::spawn(move || {
            loop {
                let _ = server.recv().and_then(respond);
            }
        });
        Ok(worker.run()?)
    })
}
