//! The master loads a large table once, and all workers share it: they are copies of the master
//! that execute no program.
//!
//! Usage:     cargo run --example preload

mod usage;

use cluster::{LogWriter, Role, Settings, Worker};

/// `load` finds the primes below this limit.
const LIMIT: usize = 10_000_000;

/// Returns, for each number below `LIMIT`, whether the number is prime. Takes a moment, and 10 MB
/// of memory.
fn load() -> Vec<bool> {
    let mut primes = vec![true; LIMIT];
    primes[..2].fill(false);
    for number in 2.. {
        if number * number >= LIMIT {
            break;
        }
        if primes[number] {
            for multiple in (number * number..LIMIT).step_by(number) {
                primes[multiple] = false;
            }
        }
    }
    primes
}

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("preload.rs"), []);
    // Workers start in the closure below and never call `main`, so this process is the master.
    let Role::Master(master) = cluster::init()? else {
        return Ok(());
    };
    let primes = load();
    let count = move |worker: Worker| {
        let millions = worker.id().get() as usize * 1_000_000;
        let count = primes[..millions].iter().filter(|is_prime| **is_prime);
        LogWriter::stdout().line(format_args!("{} primes below {millions}", count.count()));
        0
    };
    master.setup_master(Settings::default().main(count));
    for _ in 0..4 {
        master.fork()?;
    }
    master.run()
}
