//! Tests what happens to the listeners of the tool `cluster-serve` when the program or the configuration
//! changes, and when instances overlap.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use libtest_mimic::{Failed, Trial};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Group, PYTHON, SCENARIO, cluster_serve, reserve_port, wait_until};
use crate::serve::{PROGRAM, PYTHON_PROGRAM, ask, ask_all, command, line_after, stop};
use crate::serve_operation::pid_in;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test(
            "serve_closes_a_port_that_an_upgrade_has_removed",
            removed_port,
        ),
        PYTHON.of(Trial::test(
            "serve_restores_the_mode_of_a_listener_if_a_reload_fails",
            changed_mode,
        )),
        PYTHON.of(Trial::test(
            "serve_refuses_new_clients_while_the_last_request_ends",
            stop_during_a_request,
        )),
        Trial::test("serve_waits_for_the_port_of_a_killed_master", port_in_use),
    ]
}

fn is_refused(address: SocketAddr) -> Option<()> {
    let refused = TcpStream::connect(address).err()?.kind() == ErrorKind::ConnectionRefused;
    refused.then_some(())
}

/// Checks an upgrade with another port, and another one back to the first port. The program uses the
/// first descriptor that it receives.
fn removed_port() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let [script, port, pid_file] = ["serve", "port", "pid"].map(|name| directory.path().join(name));
    let [(_first_port, first), (_second_port, second)] = [reserve_port(), reserve_port()];
    let tool = cluster_serve();
    let call = std::iter::once(tool.get_program()).chain(tool.get_args());
    let call: Vec<_> = call.map(|part| part.to_str().unwrap()).collect();
    let text = format!(
        "#!/bin/bash\nexec -a \"$0\" {} --listen $(cat {}) --pid-file {} --workers 1 \
         --readiness 50ms -- {}\n",
        call.join(" "),
        port.display(),
        pid_file.display(),
        std::env::current_exe()?.display()
    );
    fs::write(&script, text)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode)?;
    fs::write(&port, first.to_string())?;
    let mut command = Command::new("bash");
    let serve = Group::start(command.arg(&script).env(SCENARIO, PROGRAM))?;
    let mut current = pid_in(&pid_file, Pid::from_raw(0));
    ask_all(first, 1);
    for [old, new] in [[first, second], [second, first]] {
        fs::write(&port, new.to_string())?;
        kill(current, Signal::SIGUSR2)?;
        current = pid_in(&pid_file, current);
        wait_until("the old port to close", || is_refused(old));
        ask_all(new, 1);
    }
    kill(current, Signal::SIGTERM)?;
    serve.finish()?;
    Ok(())
}

/// Checks that processes that block in `accept` outlive a new release that makes the listener
/// non-blocking and fails.
fn changed_mode() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("program.py");
    fs::write(&program, PYTHON_PROGRAM)?;
    let mut command = cluster_serve();
    command.args(["--listen", "127.0.0.1:0", "--workers", "2"]);
    // The new process must exit before it counts as ready.
    command.args(["--readiness", "60s", "python3"]);
    let serve = Group::start(command.arg(&program))?;
    let address = line_after(&serve, " listening on ").parse()?;
    let before = ask_all(address, 2);
    fs::write(
        &program,
        "import socket\nsocket.socket(fileno=3).setblocking(False)\nexit(1)\n",
    )?;
    kill(serve.pid(), Signal::SIGHUP)?;
    line_after(&serve, "generation 1 failed after 0 replaced");
    line_after(&serve, "had changed the mode of a listener");
    for _ in 0..20 {
        let process = ask(address).unwrap();
        assert!(before.contains(&process), "{}", serve.output());
    }
    stop(&serve)
}

/// Closes its listener at SIGTERM, and finishes its request.
const CLOSING_PROGRAM: &str = "
import signal, socket, sys
listener = socket.socket(fileno=3)
signal.signal(signal.SIGTERM, lambda *_: listener.close())
while True:
    try:
        connection, _ = listener.accept()
    except OSError:
        sys.exit()
    while request := connection.recv(1):
        connection.sendall(request)
    connection.close()
";

fn stop_during_a_request() -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    let serve = Group::start(command.args(["python3", "-c", CLOSING_PROGRAM]))?;
    let address: SocketAddr = line_after(&serve, " listening on ").parse()?;
    line_after(&serve, " ready");
    let mut client = TcpStream::connect(address)?;
    let mut talk = |byte: u8| {
        client.write_all(&[byte]).unwrap();
        let mut answer = [0];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [byte]);
    };
    talk(1);
    kill(serve.pid(), Signal::SIGTERM)?;
    wait_until("a refused client", || is_refused(address));
    talk(2);
    drop(client);
    let status = serve.finish()?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

/// Checks a start while another process still has the port. The test closes the port when the tool
/// sleeps between two attempts.
fn port_in_use() -> Result<(), Failed> {
    let other = TcpListener::bind("127.0.0.1:0")?;
    let address = other.local_addr()?.to_string();
    let serve = Group::start(command(1, &address).args(["sleep", "600"]))?;
    let call = Path::new("/proc")
        .join(serve.pid().to_string())
        .join("syscall");
    let sleeps = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep].map(|number| number.to_string());
    wait_until("a pause of the tool", || {
        let line = fs::read_to_string(&call).ok()?;
        let number = line.split_whitespace().next()?;
        sleeps.iter().any(|sleep| sleep == number).then_some(())
    });
    drop(other);
    line_after(&serve, " ready");
    stop(&serve)
}
