//! Serves the same answer as the other measured servers, with the crate `prefork`. Usage:
//! prefork-server WORKERS

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use prefork::Prefork;

fn main() {
    let workers = std::env::args().nth(1).unwrap().parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("listening on {}", listener.local_addr().unwrap());
    let serve = |_, listener: TcpListener| {
        for connection in listener.incoming() {
            let _ = answer(connection.unwrap());
        }
    };
    let server = Prefork::from_resource(listener).with_num_processes(workers);
    server.with_init(serve).fork().unwrap();
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    let mut request = [0; 1024];
    let mut length = 0;
    while !request[..length].ends_with(b"\r\n\r\n") {
        match connection.read(&mut request[length..])? {
            0 => return Ok(()),
            more => length += more,
        }
    }
    connection.write_all(
        b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello world\n",
    )
}
