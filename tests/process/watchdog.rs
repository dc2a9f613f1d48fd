//! Tests the example that feeds a hardware watchdog. A regular file takes the place of the device.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::{Group, example, talk, wait_until};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test(
            "watchdog_is_fed_by_a_quorum_and_disarmed_by_a_stop",
            healthy,
        ),
        Trial::test(
            "watchdog_starves_when_stuck_workers_cannot_be_replaced",
            stuck,
        ),
    ]
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// A directory with a link to the example, and with a file that takes the place of the device.
struct Machine(TempDir);

impl Machine {
    fn new() -> Result<Self, Failed> {
        let machine = Self(TempDir::new()?);
        fs::write(machine.device(), "")?;
        symlink(example("watchdog").get_program(), machine.program())?;
        Ok(machine)
    }

    fn device(&self) -> PathBuf {
        self.0.path().join("device")
    }

    fn program(&self) -> PathBuf {
        self.0.path().join("program")
    }

    /// Starts the example, whose workers must send a heartbeat every 2 seconds.
    fn start(&self) -> std::io::Result<Group> {
        let mut command = Command::new(self.program());
        Group::start(command.arg(self.device()).args(["127.0.0.1:0", "2"]))
    }

    /// Returns everything that the master has written to the device.
    fn written(&self) -> Vec<u8> {
        fs::read(self.device()).unwrap()
    }
}

fn healthy() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let server = machine.start()?;
    let address = server.line("listening on ").parse()?;
    server.line("ready");
    wait_until("two feeds", || (machine.written().len() >= 2).then_some(()));
    assert!(talk(address, REQUEST)?.ends_with("\r\n\r\nhello\n"));
    kill(server.pid(), Signal::SIGTERM)?;
    assert!(server.finish()?.success());
    let written = machine.written();
    let (last, feeds) = written.split_last().ok_or("nothing written")?;
    assert_eq!(*last, b'V');
    assert!(feeds.iter().all(|byte| *byte == 0), "{feeds:?}");
    Ok(())
}

/// Checks that the master does not feed the device after the pool has lost its quorum, and does not
/// disarm the device when the pool gives up.
fn stuck() -> Result<(), Failed> {
    let machine = Machine::new()?;
    let server = machine.start()?;
    server.line("ready");
    wait_until("a feed", || (!machine.written().is_empty()).then_some(()));
    // The master follows the link for each new worker.
    fs::remove_file(machine.program())?;
    let master = server.pid();
    let workers = fs::read_to_string(format!("/proc/{master}/task/{master}/children"))?;
    for worker in workers.split_whitespace() {
        kill(Pid::from_raw(worker.parse()?), Signal::SIGSTOP)?;
    }
    server.line("not ready");
    let written = machine.written();
    // The master retries for about 13 s before it gives up. In this time, it would feed 12 times. A
    // pool that gives up is stopping until the loop ends, so a timer that is due then feeds once.
    assert_eq!(server.end()?.code(), Some(1), "{}", server.output());
    let last = machine.written();
    assert!(
        last.len() <= written.len() + 1,
        "{written:?}, then {last:?}"
    );
    assert!(last.iter().all(|byte| *byte == 0), "{last:?}");
    Ok(())
}
