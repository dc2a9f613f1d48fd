//! Shows which workers exited voluntarily: three workers end in three ways, and the master kills a
//! fourth.
//!
//! Usage:     cargo run --example voluntary

mod usage;

use cluster::{LogWriter, Role, Signal};

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("voluntary.rs"), []);
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stdout().attached_to(&master);
            master.on_exit(move |_, worker, _| {
                let voluntary = worker.exited_after_disconnect();
                log.line(format_args!("{} exited: {voluntary:?}", worker.id()));
                if voluntary == Some(true) {
                    log.line("Oh, it was just voluntary – no need to worry");
                }
            });
            for _ in 0..3 {
                master.fork()?;
            }
            master.fork()?.kill(Signal::TERM);
            master.run()
        }
        Role::Worker(worker) => {
            match worker.id().get() {
                1 => worker.process().disconnect(),
                2 => drop(worker.disconnect()),
                3 => std::process::exit(1),
                _ => {}
            }
            worker.run()
        }
    }
}
