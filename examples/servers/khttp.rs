//! Serves HTTP with `khttp`, which handles one stream at a time.
//!
//! Usage:     cargo run -p cluster-servers --example khttp
//! then:      curl http://127.0.0.1:8000/

mod pooled;

use cluster::ListenOptions;
use khttp::{Headers, Method, Server};
use pooled::usage;

fn main() -> pooled::Result {
    let source = usage::header!("khttp.rs");
    pooled::run(source, "127.0.0.1:8000", |worker, address| {
        let mut app = Server::builder(address)?;
        // The worker serves one client at a time, so no client may keep its connection.
        app.route(Method::Get, "/", |_, response| {
            response.ok(Headers::close(), "hello\n")
        });
        let app = app.build();
        let options = ListenOptions::from(address).wait_for_data(true);
        for connection in worker.listen(options)?.incoming() {
            let connection = connection?;
            let _ = app.handle(&connection);
        }
        Ok(())
    })
}
