//! A server that runs on each of several hosts behind HAProxy. Workers learn the client's address
//! by the PROXY protocol, and the master tells HAProxy whether its host takes requests.
//!
//! Usage:     cargo run --release --example fleet -- --name east --host 127.0.0.1
//! another:   cargo run --release --example fleet -- --name west --host 127.0.0.2
//! in front:  EAST=127.0.0.1 WEST=127.0.0.2 haproxy -f examples/fleet/haproxy.cfg
//! then:      curl http://127.0.0.1:8080/
//! reload:    kill -HUP, upgrade: kill -USR2, stop: kill -TERM
//! at once:   a second kill -TERM, at least one second after the first
//!
//! Options:   --workers 4   --release FILE   --drain-notice SECONDS

#[path = "../timed/mod.rs"]
mod timed;
#[path = "../usage/mod.rs"]
mod usage;

use std::cell::Cell;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolEvent, PoolOptions, SignalAction, ignore_pool_signals};
use cluster::{Connection, Interest, LogWriter, Master, Role, Signal, Worker, systemd};
use lexopt::prelude::*;
use proxy_header::{ParseConfig, ProxyHeader};
use timed::Timed;

/// The port for requests that HAProxy forwards. Protect it from other clients, because any client
/// that reaches it can claim any address.
const PORT: u16 = 8000;
/// The port for HAProxy's agent-check.
const AGENT_PORT: u16 = 8001;

struct Options {
    name: String,
    host: IpAddr,
    workers: usize,
    /// Each worker reads this file when it starts, so a reload brings its current contents.
    release: Option<PathBuf>,
    /// Seconds for which the master answers `drain` to HAProxy before it stops the pool.
    drain_notice: u64,
}

fn options() -> Result<Options, lexopt::Error> {
    let mut options = Options {
        name: "host".to_owned(),
        host: Ipv4Addr::LOCALHOST.into(),
        workers: cluster::available_parallelism(),
        release: None,
        drain_notice: 2,
    };
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Long("name") => options.name = args.value()?.string()?,
            Long("host") => options.host = args.value()?.parse()?,
            Long("workers") => options.workers = args.value()?.parse()?,
            Long("release") => options.release = Some(args.value()?.into()),
            Long("drain-notice") => options.drain_notice = args.value()?.parse()?,
            Short(_) | Long(_) | Value(_) => return Err(arg.unexpected()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = usage::or_exit(usage::header!("main.rs"), options());
    let passed = systemd::listen_fds()?;
    let role = cluster::init()?;
    match role {
        Role::Master(master) => {
            let pool = Pool::new(&master, PoolOptions::default().workers(options.workers));
            pool.adopt(&master, passed)?;
            pool.listen(&master, SocketAddr::new(options.host, PORT))?;
            pool.notify_systemd(&master)?;
            supervise(&master, &pool, &options)?;
            Ok(master.run()?)
        }
        Role::Worker(worker) => serve(&worker, &options),
    }
}

fn supervise(master: &Master, pool: &Pool, options: &Options) -> Result<(), Box<dyn Error>> {
    // The time of the first signal to stop.
    let draining_since = Rc::new(Cell::new(None::<Instant>));
    // No worker uses this listener. It belongs to the pool so that an upgrade passes it to the new
    // master.
    let address = SocketAddr::new(options.host, AGENT_PORT);
    pool.listen(master, address)?;
    let agent = master.listen(address)?.as_fd().try_clone_to_owned()?;
    let (mut agent, since) = (Some(TcpListener::from(agent)), Rc::clone(&draining_since));
    let upgraded = Rc::new(Cell::new(false));
    let was_upgraded = Rc::clone(&upgraded);
    let log = LogWriter::stderr().attached_to(master);
    pool.on_event(move |pool, master, event| {
        log.line(event);
        if *event == PoolEvent::Upgraded {
            was_upgraded.set(true);
        }
        // Do not answer before this event. In an upgrade, the old master answers for this host in
        // the meantime.
        if *event == PoolEvent::QuorumReached {
            let answers = agent
                .take()
                .map(|agent| answer_agent_check(master, pool, agent, &since));
            if let Some(Err(error)) = answers {
                log.line(format_args!("cannot answer the agent-check: {error}"));
            }
        }
    });
    let notice = Duration::from_secs(options.drain_notice);
    for signal in [Signal::TERM, Signal::INT] {
        let (pool, since) = (pool.clone(), Rc::clone(&draining_since));
        let upgraded = Rc::clone(&upgraded);
        master.on_signal(signal, move |master, _| {
            if let Some(since) = since.get() {
                // One Ctrl-C may arrive twice, so a second signal has an effect only after one
                // second. After an upgrade, it has no effect, because this master is already
                // stopping.
                if since.elapsed() >= Duration::from_secs(1) && !upgraded.get() {
                    pool.stop_at_once(master);
                }
                return;
            }
            since.set(Some(Instant::now()));
            // Stop the pool only after `notice`. By then HAProxy has received the answer `drain`
            // and sends no more requests, so none is lost when the port closes.
            let pool = pool.clone();
            let stop = master.set_timeout(notice, move |master| pool.stop(master));
            master.unreference(stop);
        })?;
    }
    if !master.is_signal_ignored(Signal::HUP) {
        pool.on_signal(master, Signal::HUP, SignalAction::Reload)?;
    }
    pool.on_signal(master, Signal::USR2, SignalAction::Upgrade)?;
    Ok(())
}

fn answer_agent_check(
    master: &Master,
    pool: &Pool,
    agent: TcpListener,
    draining_since: &Rc<Cell<Option<Instant>>>,
) -> cluster::Result<()> {
    let (pool, since) = (pool.clone(), Rc::clone(draining_since));
    let watch = master.watch(agent, Interest::Readable, move |_, agent| {
        // Stop answering. After an upgrade, the new master answers for this host. After a stop, no
        // process answers, and HAProxy keeps the last answer.
        if pool.is_stopping() {
            return None;
        }
        let answer: &[u8] = match (since.get().is_some(), pool.has_quorum()) {
            (true, _) => b"drain\n",
            (false, true) => b"ready up\n",
            (false, false) => b"down\n",
        };
        let accepted = agent.accept();
        // The write does not block, because a few bytes fit into a new socket's empty buffer.
        let _ = accepted.and_then(|(mut proxy, _)| proxy.write_all(answer));
        Some(Interest::Readable)
    })?;
    // The pool, not this watch, keeps the master running.
    master.unreference(watch);
    Ok(())
}

fn serve(worker: &Worker, options: &Options) -> Result<(), Box<dyn Error>> {
    ignore_pool_signals(worker)?;
    let release = options.release.as_ref().map(std::fs::read_to_string);
    let release = release.transpose()?.unwrap_or_else(|| "none".to_owned());
    let (name, id, release) = (&options.name, worker.id(), release.trim());
    let about = format!("host {name}, worker {id}, release {release}");
    let listener = worker.listen(SocketAddr::new(options.host, PORT))?;
    for connection in listener.incoming() {
        // Ignore an error, because a client that disconnects must not stop the worker.
        let _ = answer(connection?, &about);
    }
    Ok(())
}

fn answer(connection: Connection, about: &str) -> std::io::Result<()> {
    let mut connection = Timed::new(connection);
    let (mut buffer, mut length) = ([0; 8192], 0);
    let (status, body) = loop {
        let read = connection.read(&mut buffer[length..])?;
        length += read;
        match parse_client(&buffer[..length]) {
            Ok(Some(client)) => break ("200 OK", format!("client {client}, {about}\n")),
            Ok(None) if read > 0 => {}
            Ok(None) | Err(_) => break ("400 Bad Request", String::new()),
        }
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}");
    connection.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
    connection.into_inner().finish();
    Ok(())
}

/// Returns the address of the client, or `None` if the request is still incomplete. For a request
/// of HAProxy's own, the address is the text `none`.
fn parse_client(input: &[u8]) -> Result<Option<String>, Box<dyn Error>> {
    let (header, length) = match ProxyHeader::parse(input, ParseConfig::default()) {
        Err(proxy_header::Error::BufferTooShort) => return Ok(None),
        parsed => parsed?,
    };
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let request = httparse::Request::new(&mut headers).parse(&input[length..])?;
    let client = header.proxied_address();
    // The header has no address if HAProxy itself is the client.
    let client = client.map_or("none".to_owned(), |client| client.source.ip().to_string());
    Ok(request.is_complete().then_some(client))
}
