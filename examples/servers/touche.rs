//! Serves HTTP with `touche`, which takes an iterator of streams, and has its own threads.
//!
//! Usage:     cargo run -p cluster-servers --example touche
//! then:      curl http://127.0.0.1:8000/

mod pooled;

use cluster::ListenOptions;
use pooled::usage;
use touche::{Response, Server};

fn main() -> pooled::Result {
    let source = usage::header!("touche.rs");
    pooled::run(source, "127.0.0.1:8000", |worker, address| {
        let listener = worker.listen(ListenOptions::from(address).wait_for_data(true))?;
        let token = worker.disconnect_token();
        Server::builder()
            .from_connections(listener.streams().map_while(Result::ok))
            .serve(move |_request| {
                let is_last = token.is_disconnecting();
                let option = if is_last { "close" } else { "keep-alive" };
                Response::builder()
                    .header("connection", option)
                    .body("hello\n")
            })?;
        Ok(worker.run()?)
    })
}
