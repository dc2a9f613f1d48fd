//! Interrupts threads that wait in a system call.
//!
//! The kernel tells in /proc/self/task/TID/syscall which call a thread waits in (proc(5)). A signal
//! interrupts the call. The signal is SIGURG, because it has no effect without a handler. Only
//! threads that wait for the given descriptor receive the signal, because some calls of other
//! threads would fail with EINTR, for example reads with a timeout (signal(7)).

use std::io;
use std::os::fd::RawFd;

use super::proc::numbers_in;
use crate::sys::signal::{chained_action, current_action, is_function, set_action};

const SIGNAL: libc::c_int = libc::SIGURG;

/// Interrupts each thread of this process that waits in a system call whose first argument is
/// `number`. Returns whether there may be another such thread, or whether the caller must check
/// that the interrupted ones have left their calls.
///
/// Returns `false` if the system does not tell what the threads wait for.
pub(in crate::sys) fn interrupt(number: RawFd) -> bool {
    let threads = match numbers_in("/proc/self/task") {
        Ok(threads) => threads,
        Err(error) => return error.kind() != io::ErrorKind::NotFound,
    };
    handle_signal();
    let mut may_wait = false;
    for thread in threads.filter_map(Result::ok) {
        // A thread that has exited has no file.
        let Ok(text) = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")) else {
            continue;
        };
        match Call::parse(&text) {
            Call::Running => may_wait = true,
            Call::Waiting { argument } if RawFd::try_from(argument) == Ok(number) => {
                may_wait = true;
                send_signal(thread);
            }
            Call::Waiting { .. } | Call::Other => {}
        }
    }
    may_wait
}

/// The content of /proc/PID/task/TID/syscall.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// The thread is running, or waits for a processor.
    Running,
    /// The thread waits in a system call with this first argument.
    Waiting { argument: u64 },
    /// The thread waits outside a system call.
    Other,
}

impl Call {
    fn parse(text: &str) -> Self {
        let mut words = text.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("running"), _) => Self::Running,
            (Some("-1"), _) => Self::Other,
            (_, Some(argument)) => {
                let digits = argument.strip_prefix("0x").unwrap_or(argument);
                match u64::from_str_radix(digits, 16) {
                    Ok(argument) => Self::Waiting { argument },
                    Err(_) => Self::Other,
                }
            }
            _ => Self::Other,
        }
    }
}

/// Installs a handler without effect, unless the signal already has a handler. Without a handler,
/// the kernel discards the signal. The handler stays installed, because another thread may be about
/// to receive the signal.
fn handle_signal() {
    extern "C" fn no_effect(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    if let Ok(previous) = current_action(SIGNAL) {
        if !is_function(&previous) {
            // SAFETY: the handler makes no calls.
            let _ = unsafe { set_action(SIGNAL, &chained_action(no_effect, &previous)) };
        }
    }
}

fn send_signal(thread: libc::pid_t) {
    let process = std::process::id();
    // Ignore the error, which means that the thread has exited.
    // SAFETY: tgkill accesses no memory of this process.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_is_parsed() {
        let accept = "288 0x3 0x7ffd 0x7ffc 0x80000 0x0 0x0 0x7ffd0 0x7f00\n";
        assert_eq!(Call::parse(accept), Call::Waiting { argument: 3 });
        assert_eq!(Call::parse("running\n"), Call::Running);
        assert_eq!(Call::parse("-1 0x7ffd0 0x7f00\n"), Call::Other);
        assert_eq!(Call::parse(""), Call::Other);
    }
}
