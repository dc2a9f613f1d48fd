//! Serves clients, answers pings, connects to servers, and counts returned connections.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use cluster::{Listener, Master, Worker};

use super::waiting::wait_until;
use super::{DEADLINE, scaled};

/// Returns the number of connections that went back to the master because a worker had not received
/// them.
///
/// A worker that does not receive its connection within 20 ms, for instance because it has to wait
/// for a core, loses its turn in the rotation. Tests therefore check the exact rotation only if
/// this number has not grown.
pub fn count_returned(master: &Master) -> u64 {
    master
        .loads()
        .workers
        .iter()
        .map(|load| load.returned)
        .sum()
}

pub fn answer_pings(worker: &Worker) {
    worker.on_message(|worker, _| {
        let _ = worker.send(b"pong").unwrap();
    });
}

/// Answers each connection with the worker's id, until the listener is closed.
pub fn serve_id(worker: &Worker, address: &str) {
    for connection in worker.listen(address).unwrap().incoming() {
        let id = worker.id().to_string();
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

/// Serves connections and reads one byte before each answer, which is the worker's id. A client
/// that sends nothing therefore keeps its worker busy.
pub fn serve_after_one_byte(worker: &Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        if connection.read_exact(&mut [0]).is_ok() {
            let id = worker.id().to_string();
            let _ = connection.write_all(id.as_bytes());
        }
    }
}

/// Sets a callback of the listener that answers each connection with `text`.
pub fn answer(listener: &Listener, text: impl ToString) {
    let text = text.to_string();
    listener.set_connection_callback(move |_, mut connection| {
        connection.write_all(text.as_bytes()).unwrap();
    });
}

/// Connects a client to `address`, runs the worker's loop until the client has an answer, and
/// returns the answer.
pub fn read_answer(worker: &Worker, address: SocketAddr) -> String {
    let client = std::thread::spawn(move || talk(address, b"").unwrap());
    wait_until("an answer", || {
        worker.dispatch(Some(Duration::from_millis(1))).unwrap();
        client.is_finished().then_some(())
    });
    client.join().unwrap()
}

/// Runs the worker's loop, and then waits for a signal that kills the process.
///
/// Use this function for workers that the master kills. Such a worker never returns from `main`, so
/// its exit status always names the signal.
pub fn run_until_killed(worker: &Worker) -> ! {
    worker.run().unwrap();
    loop {
        nix::unistd::pause();
    }
}

/// Connects to `address`, sends `request`, and reads until the end of the stream.
pub fn talk(address: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(scaled(DEADLINE) / 2))?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
