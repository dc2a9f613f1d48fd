//! Sticky sessions by a cookie that names a slot of the pool. A worker that reads the cookie of
//! another slot sends the connection to the master, which sends it to the worker of that slot. The
//! example `sticky_ports` lets a proxy choose the worker instead, which costs less.
//!
//! Usage:     cargo run --release --example sticky_cookie
//! then:      curl --cookie jar --cookie-jar jar http://127.0.0.1:8000/ (again and again)
//! reload:    kill -HUP, upgrade: kill -USR2, stop: kill -TERM
//!
//! Optional arguments: another address and number of slots, as in `-- 127.0.0.1:8001 2`

mod hello;
mod usage;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::error::Error;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolOptions, SLOT, Status, WorkerPhase, ignore_pool_signals};
use cluster::{ListenOptions, LogWriter, Role, SendOptions, Worker, WorkerId, systemd};
use lexopt::ValueExt as _;

/// Returns the slot in the cookie of the connection's next request, or `None` if there is no such
/// cookie. The request stays in the socket, and the worker that answers reads it from there.
fn slot_in_cookie(stream: &TcpStream) -> io::Result<Option<usize>> {
    let end = Instant::now() + Duration::from_secs(5);
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = [0; 8192];
    loop {
        let length = stream.peek(&mut buffer)?;
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        let parsed = request.parse(&buffer[..length]);
        let is_incomplete = parsed.is_ok_and(|status| status.is_partial());
        if length == 0 || length == buffer.len() || !is_incomplete {
            let headers = request.headers.iter();
            let cookies = headers.filter(|header| header.name.eq_ignore_ascii_case("cookie"));
            let mut pairs = cookies.flat_map(|header| header.value.split(|byte| *byte == b';'));
            return Ok(pairs.find_map(|pair| {
                let value = pair.trim_ascii().strip_prefix(b"SLOT=")?;
                std::str::from_utf8(value).ok()?.parse().ok()
            }));
        }
        if Instant::now() > end {
            return Err(ErrorKind::TimedOut.into());
        }
        // `peek` does not wait for the rest, because it returns what has arrived.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The master's reply to a worker: another worker has the connection.
const PASSED: &[u8] = b"passed";
/// The master's reply to a worker: the slot has no ready worker, so the session moves to this one.
const KEPT: &[u8] = b"kept";

/// Returns the worker of a slot, or `None` if the slot has no worker that is ready.
fn ready_worker(status: &Status, slot: usize) -> Option<WorkerId> {
    let worker = status.slots.get(slot)?.worker.as_ref()?;
    (worker.phase == WorkerPhase::Ready).then_some(worker.worker)
}

fn main() -> Result<(), Box<dyn Error>> {
    let source = usage::header!("sticky_cookie.rs");
    let [address, slots] = usage::arguments(source, ["127.0.0.1:8000", "4"]);
    let slots: usize = usage::or_exit(source, OsString::from(slots).parse());
    let passed = systemd::listen_fds()?;
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stderr().attached_to(&master);
            let pool = Pool::new(&master, PoolOptions::default().workers(slots));
            pool.adopt(&master, passed)?;
            let bound = pool.listen(&master, address.as_str())?;
            log.line(format_args!("listening on {bound}"));
            pool.on_event(move |_, _, event| log.line(event));
            pool.on_default_signals(&master)?;
            master.on_message(move |master, sender, message| {
                let Ok(slot) = String::from_utf8_lossy(message.bytes()).parse() else {
                    return;
                };
                let owner = ready_worker(&pool.status(master), slot);
                let owner = owner.and_then(|owner| master.worker(owner));
                let is_passed =
                    owner.is_some_and(|owner| owner.send_with_fds(b"", message.take_fds()).is_ok());
                let _ = sender.send(if is_passed { PASSED } else { KEPT });
            });
            Ok(master.run()?)
        }
        Role::Worker(worker) => serve(&worker, &address, slots),
    }
}

fn serve(worker: &Worker, address: &str, slots: usize) -> Result<(), Box<dyn Error>> {
    ignore_pool_signals(worker)?;
    let slot: usize = std::env::var(SLOT)?.parse()?;
    let body = format!("slot {slot}, worker {}\n", worker.id());
    let cookie = format!("Set-Cookie: SLOT={slot}; Path=/; HttpOnly\r\n");
    // Ignore an error, because a client that disconnects must not stop the worker.
    let answer = move |connection| drop(hello::answer(connection, &cookie, &body));
    let sent = Rc::new(RefCell::new(VecDeque::new()));
    let (answer_passed, replies) = (answer.clone(), Rc::clone(&sent));
    worker.on_message(move |worker, message| {
        for fd in message.take_fds() {
            answer_passed(worker.adopt(fd.into()));
        }
        if [PASSED, KEPT].contains(&message.bytes()) {
            let connection = replies.borrow_mut().pop_front();
            let kept = connection.filter(|_| message.bytes() == KEPT);
            kept.into_iter().for_each(&answer_passed);
        }
    });
    // The slots of new sessions, in rotation. The worker does not keep all new sessions that it
    // reads, because a busy worker would have fewer than others.
    let mut rotation = (0..slots).cycle().skip(slot);
    let options = ListenOptions::from(address).wait_for_data(true);
    for connection in worker.listen(options)?.incoming() {
        let connection = connection?;
        let Ok(owner) = slot_in_cookie(&connection) else {
            continue;
        };
        let owner = owner.or_else(|| rotation.next()).unwrap_or(slot);
        if owner == slot {
            answer(connection);
            continue;
        }
        // Keep the connection until the master replies. A worker that disconnects waits for
        // its connections, and so for the reply.
        let options = SendOptions::new().keep_open(&connection);
        let message = owner.to_string();
        if worker.send_with(message.as_bytes(), options).is_ok() {
            sent.borrow_mut().push_back(connection);
        }
    }
    Ok(worker.run()?)
}
