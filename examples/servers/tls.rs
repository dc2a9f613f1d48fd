//! Serves HTTPS with `rustls` and `touche`.
//!
//! Usage:     cargo run -p cluster-servers --example tls
//! then:      curl --cacert examples/servers/localhost.pem https://localhost:8443/

mod pooled;

use pooled::usage;
use std::sync::Arc;

use cluster::ListenOptions;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use touche::{Response, Server};

/// A certificate and its private key. The private key is published with this example, so use it only
/// for tests.
const PEM: &[u8] = include_bytes!("localhost.pem");

fn main() -> pooled::Result {
    let source = usage::header!("tls.rs");
    pooled::run(source, "127.0.0.1:8443", |worker, address| {
        let chain = CertificateDer::pem_slice_iter(PEM).collect::<Result<_, _>>()?;
        let config = ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(chain, PrivateKeyDer::from_pem_slice(PEM)?)?;
        let config = Arc::new(config);
        let listener = worker.listen(ListenOptions::from(address).wait_for_data(true))?;
        // A thread of the server does the handshake when it first reads.
        let tls = listener.streams().map_while(|stream| {
            let session = ServerConnection::new(Arc::clone(&config)).ok()?;
            Some(StreamOwned::new(session, stream.ok()?))
        });
        Server::builder().from_connections(tls).serve(|_request| {
            Response::builder()
                .header("connection", "close")
                .body("hello\n")
        })?;
        Ok(worker.run()?)
    })
}
