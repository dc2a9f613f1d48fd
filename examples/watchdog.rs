//! A hardware watchdog that reboots the machine when too few workers can serve.
//!
//! The master feeds the watchdog while the pool has a quorum, and while the pool stops. A worker
//! that is stuck sends no heartbeat and is killed. If the pool cannot replace enough workers, the
//! quorum is lost, and the machine reboots when the watchdog's timeout has passed.
//!
//! Usage:     cargo run --release --example watchdog
//! stop:      kill -TERM, which also stops the watchdog
//!
//! Optional arguments: the device, an address, and the time in seconds after which a stuck worker
//! is killed, as in `-- /dev/watchdog0 0.0.0.0:80 20`. To try it on a machine that must not reboot,
//! name a regular file. The driver chooses the timeout, which must be longer than FEED_INTERVAL.

mod hello;
mod usage;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Duration;

use cluster::pool::{HEARTBEAT, Pool, PoolOptions, ignore_pool_signals};
use cluster::{ListenOptions, LogWriter, Role};

const FEED_INTERVAL: Duration = Duration::from_secs(1);
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let defaults = ["/dev/watchdog", "127.0.0.1:8000", "15"];
    let [device, address, seconds] = usage::arguments(usage::header!("watchdog.rs"), defaults);
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stderr().attached_to(&master);
            let timeout = Duration::from_secs(seconds.parse()?);
            let options = PoolOptions::default().heartbeat_timeout(Some(timeout));
            let pool = Pool::new(&master, options);
            let bound = pool.listen(&master, address.as_str())?;
            log.line(format_args!("listening on {bound}"));
            let events = log.clone();
            pool.on_event(move |_, _, event| events.line(event));
            pool.on_default_signals(&master)?;

            // From here on, the machine reboots unless the watchdog is fed.
            let opened = OpenOptions::new().write(true).open(&device);
            let mut watchdog = opened.map_err(|error| format!("cannot open {device}: {error}"))?;
            let mut fed = watchdog.try_clone()?;
            let feed = master.set_interval(FEED_INTERVAL, move |_| {
                if pool.has_quorum() || pool.is_stopping() {
                    if let Err(error) = fed.write_all(b"\0") {
                        log.line(format_args!("cannot feed {device}: {error}"));
                    }
                }
            });
            master.unreference(feed); // this timer does not keep the master running
            // If the pool gives up, this returns the error, and the watchdog stays armed.
            master.run()?;
            // Stops the watchdog (Documentation/watchdog/watchdog-api.rst of Linux).
            Ok(watchdog.write_all(b"V")?)
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker)?;
            let beat = worker.set_interval(HEARTBEAT_INTERVAL, |worker| {
                let _ = worker.send(HEARTBEAT);
            });
            worker.unreference(beat); // this timer does not keep the worker running
            let options = ListenOptions::from(address).wait_for_data(true);
            for connection in worker.listen(options)?.incoming() {
                // Ignore an error, because a client that disconnects must not stop the worker.
                let _ = hello::answer(connection?, "", "hello\n");
            }
            Ok(())
        }
    }
}
