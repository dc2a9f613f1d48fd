//! Answers DNS queries over UDP with `simple-dns`.
//!
//! Usage:     cargo run -p cluster-servers --example dns
//! then:      dig @127.0.0.1 -p 5300 localhost

mod pooled;

use pooled::usage;
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Packet, PacketFlag, ResourceRecord};

fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let query = Packet::parse(query).ok()?;
    if query.has_flags(PacketFlag::RESPONSE) {
        return None;
    }
    let mut reply = query.into_reply();
    let name = reply.questions.first()?.qname.clone();
    let address = RData::A(A {
        address: 0x7f00_0001,
    });
    reply
        .answers
        .push(ResourceRecord::new(name, CLASS::IN, 60, address));
    reply.build_bytes_vec().ok()
}

fn main() -> pooled::Result {
    let source = usage::header!("dns.rs");
    pooled::run_udp(source, "127.0.0.1:5300", |worker, address| {
        let socket = worker.bind(address)?;
        let mut query = [0; 512];
        while let Some((length, client)) = socket.recv_from(&mut query)? {
            if let Some(reply) = answer(&query[..length]) {
                let _ = socket.send_to(&reply, client);
            }
        }
        Ok(())
    })
}
