//! The master loads something large once, and all workers have it: they are copies of the master, and
//! nothing is executed.
//!
//! Type:      cargo run --example preload
#![allow(clippy::print_stdout)]

use cluster::{Role, Settings, Worker};

/// How many primes are looked for.
const LIMIT: usize = 10_000_000;

/// What takes a moment, and ten megabytes: for each number, whether it is a prime.
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
    // A worker begins with the closure, and does not come here.
    let Role::Master(master) = cluster::init()? else {
        return Ok(());
    };
    let primes = load();
    let count = move |worker: Worker| {
        let millions = worker.id().get() as usize * 1_000_000;
        let count = primes[..millions].iter().filter(|is_prime| **is_prime);
        println!("{} primes below {millions}", count.count());
        0
    };
    master.setup_master(Settings::default().main(count));
    for _ in 0..4 {
        master.fork()?;
    }
    master.run()
}
