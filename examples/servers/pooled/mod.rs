//! The pool that the servers share.

#[path = "../../usage/mod.rs"]
pub(crate) mod usage;

use std::error::Error;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{LogWriter, Master, Role, Worker};

pub(crate) type Result = std::result::Result<(), Box<dyn Error + Send + Sync>>;

/// Runs a pool that retains a listener. Its workers call `serve` with the address, which is the
/// command line's argument or `default`. `--help` prints the source's header.
#[allow(dead_code, reason = "each example calls one of the two functions")]
pub(crate) fn run(
    source: &str,
    default: &str,
    serve: impl FnOnce(&Worker, &str) -> Result,
) -> Result {
    let listen =
        |pool: &Pool, master: &Master, address: &str| pool.listen(master, address).map(drop);
    run_with(source, default, listen, serve)
}

/// Like `run`, but without a retained listener: the first worker binds a UDP socket.
#[allow(dead_code, reason = "each example calls one of the two functions")]
pub(crate) fn run_udp(
    source: &str,
    default: &str,
    serve: impl FnOnce(&Worker, &str) -> Result,
) -> Result {
    run_with(source, default, |_, _, _| Ok(()), serve)
}

fn run_with(
    source: &str,
    default: &str,
    listen: impl FnOnce(&Pool, &Master, &str) -> cluster::Result<()>,
    serve: impl FnOnce(&Worker, &str) -> Result,
) -> Result {
    let [address] = usage::arguments(source, [default]);
    match cluster::init()? {
        Role::Master(master) => {
            let pool = start(&master)?;
            listen(&pool, &master, &address)?;
            Ok(master.run()?)
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker)?;
            serve(&worker, &address)
        }
    }
}

/// Starts a pool that handles the default signals and logs its events.
fn start(master: &Master) -> cluster::Result<Pool> {
    // Use two workers on any machine and a short minimum ready time, because the tests reload each
    // server ten times. A real server keeps the defaults: a worker for each core, and 1 second.
    let options = PoolOptions::default().workers(2);
    let options = options.min_ready_time(Duration::from_millis(100));
    let pool = Pool::new(master, options);
    let log = LogWriter::stderr().attached_to(master);
    let lines = log.clone();
    master.on_online(move |_, worker| {
        let (id, process) = (worker.id(), worker.process().id());
        lines.line(format_args!("worker {id} is process {process}"));
    });
    let lines = log.clone();
    master.on_listening(move |_, worker, address| {
        lines.line(format_args!("worker {} listens on {address}", worker.id()));
    });
    pool.on_event(move |_, _, event| log.line(event));
    pool.on_default_signals(master)?;
    Ok(pool)
}
