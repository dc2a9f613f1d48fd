//! Tests workers that do not use this crate and consist of several processes: a shell and the
//! server that it has started.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::FromRawFd as _;
use std::process::Command;

use cluster::Settings;
use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getpgid, getpgrp, getppid, getsid};

use crate::harness::{
    Group, ROOT, SCENARIO, Scenario, cluster, cluster_serve, is_alive, wait_until,
};
use crate::serve::serve_until;

crate::scenarios! {
    worker_with_passed_descriptors_leads_a_process_group
    group_of_a_worker_ends_before_its_exit_event
}

/// The scenarios that `cluster-serve` runs as its program. They do not use this crate.
pub const PROGRAMS: &[Scenario] = &[
    Scenario {
        name: "server_that_drains",
        play: || serve(Some(Signal::SIGTERM)),
        need: None,
    },
    Scenario {
        name: "server_that_ignores_signals",
        play: || serve(None),
        need: None,
    },
];

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("server_behind_a_shell_drains_at_a_reload", || {
            drains_at_reload(cluster_serve(), BEHIND_A_SHELL)
        }),
        ROOT.of(Trial::test(
            "server_behind_a_shell_drains_at_a_reload_without_proc",
            || drains_at_reload(cluster_serve_without_proc(), BEHIND_A_SHELL),
        )),
        Trial::test("server_without_the_channel_drains_at_a_reload", || {
            drains_at_reload(cluster_serve(), WITHOUT_THE_CHANNEL)
        }),
        Trial::test(
            "daemon_of_a_server_delays_no_reload",
            reloads_beside_a_daemon,
        ),
        Trial::test(
            "server_behind_a_shell_is_killed_at_the_deadline",
            killed_at_the_deadline,
        ),
        Trial::test(
            "server_behind_a_shell_is_killed_by_an_immediate_stop",
            killed_at_once,
        ),
        Trial::test(
            "server_behind_a_shell_is_killed_when_the_shell_fails",
            killed_after_the_shell,
        ),
    ]
}

/// Answers each client with the id of this process, after the client has written. Exits at the
/// signal `end`, but first answers a client that it has accepted. Ignores all other signals.
fn serve(end: Option<Signal>) {
    #[allow(unsafe_code)]
    // SAFETY: the descriptor was passed to this process, and no other value owns it.
    let listener = unsafe { TcpListener::from_raw_fd(3) };
    SigSet::all().thread_block().unwrap();
    serve_until(&end.into_iter().collect(), &listener, |mut client| {
        let _ = client.read(&mut [0; 64]);
        let _ = write!(client, "{}", std::process::id());
    });
}

/// Script of a shell that waits for the program. A shell may replace itself with its last command.
/// `true` is last, so that the shell remains.
const BEHIND_A_SHELL: &str = "\"$0\"; true";
/// The same, but the program inherits only its listener, like a child of Python's `subprocess`.
const WITHOUT_THE_CHANNEL: &str = "eval \"\\\"\\$0\\\" $CLUSTER_CHANNEL_FD>&-\"; true";
/// Script of a shell that starts a daemon, and then replaces itself with the program.
const BESIDE_A_DAEMON: &str = "setsid sleep 1000 & echo daemon $!; exec \"$0\"";

/// Starts `cluster-serve` with a program that runs behind a shell.
fn start(program: &str, options: &[&str]) -> (Group, SocketAddr) {
    start_script(cluster_serve(), BEHIND_A_SHELL, program, options)
}

/// Returns a command that runs the tool without `/proc`.
fn cluster_serve_without_proc() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg("mount -t tmpfs tmpfs /proc && exec \"$0\" \"$@\"");
    command.arg(cluster_serve().get_program());
    command
}

/// Starts `cluster-serve` with a shell that runs the script. The script starts the program `$0`.
fn start_script(
    mut command: Command,
    script: &str,
    program: &str,
    options: &[&str],
) -> (Group, SocketAddr) {
    command.args(["--listen", "127.0.0.1:0", "--readiness", "50ms"]);
    command.args(["--workers", "1"]).args(options);
    // Some shells redirect only descriptors with one digit, but bash redirects any.
    command.args(["--", "bash", "-c", script]);
    command.arg(std::env::current_exe().unwrap());
    let serve = Group::start(command.env(SCENARIO, program)).unwrap();
    let address = wait_until("the address", || {
        let output = serve.output();
        let (_, rest) = output.split_once(" listening on ")?;
        rest.split_once('\n').map(|(address, _)| address.to_owned())
    });
    (serve, address.parse().unwrap())
}

/// Connects a client. Its server waits until [`ask`] sends the request.
fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).unwrap()
}

/// Sends a request, and returns the id of the process that answers it.
fn ask(mut client: TcpStream) -> u32 {
    client.write_all(b"?").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer.parse().unwrap()
}

fn wait_for_output(serve: &Group, text: &str) {
    wait_until(text, || serve.output().contains(text).then_some(()));
}

fn wait_for_end(pid: u32) {
    wait_until("the end of a server", || (!is_alive(pid)).then_some(()));
}

/// Returns the parent of `pid`: the shell that started it, unless the shell has exited.
fn parent(pid: u32) -> Pid {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let parent = fields.split(' ').nth(1).unwrap();
    Pid::from_raw(parent.parse().unwrap())
}

fn assert_refused(address: SocketAddr) {
    let error = TcpStream::connect(address).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Returns the number of the sockets that a process has.
fn sockets(pid: u32) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:"));
    sockets.count()
}

fn drains_at_reload(command: Command, script: &str) -> Result<(), Failed> {
    let (serve, address) = start_script(command, script, "server_that_drains", &[]);
    let old = ask(connect(address));
    // The listener, and perhaps the channel.
    let before = sockets(old);
    let client = connect(address);
    wait_until("the server to accept the client", || {
        (sockets(old) > before).then_some(())
    });
    kill(serve.pid(), Signal::SIGHUP)?;
    wait_for_output(&serve, "worker 2 is ready");
    wait_until("the end of the shell", || {
        (!is_child_of_a_shell(old)).then_some(())
    });
    assert_eq!(ask(client), old);
    wait_for_output(&serve, "generation 1 serves");
    wait_for_end(old);
    let new = ask(connect(address));
    assert_ne!(new, old);
    kill(serve.pid(), Signal::SIGTERM)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    wait_for_end(new);
    assert_refused(address);
    assert!(!serve.output().contains("killed"), "{}", serve.output());
    Ok(())
}

/// Returns whether the parent of `pid` is a shell. An orphan has another parent.
fn is_child_of_a_shell(pid: u32) -> bool {
    let parent = parent(pid).as_raw();
    let name = std::fs::read_to_string(format!("/proc/{parent}/comm")).unwrap_or_default();
    name.trim_end() == "bash"
}

/// Daemons that the scenario's servers have started. They have left the process group that the
/// scenario kills.
struct Daemons<'a>(&'a Group);

impl Daemons<'_> {
    fn ids(&self) -> Vec<Pid> {
        let output = self.0.output();
        let lines = output.lines();
        let ids = lines.filter_map(|line| line.strip_prefix("daemon ")?.parse().ok());
        ids.map(Pid::from_raw).collect()
    }

    /// Waits until `count` daemons have left their process groups.
    fn wait(&self, count: usize) {
        wait_until("a daemon", || {
            let ids = self.ids();
            let are_ready = ids.iter().all(|id| getsid(Some(*id)) == Ok(*id));
            (ids.len() == count && are_ready).then_some(())
        });
    }
}

impl Drop for Daemons<'_> {
    fn drop(&mut self) {
        for id in self.ids() {
            if kill(id, Signal::SIGKILL).is_ok() {
                wait_for_end(id.as_raw().unsigned_abs());
            }
        }
    }
}

/// Checks that a daemon that has left the process group delays no reload and no stop, although it
/// has a copy of the channel.
fn reloads_beside_a_daemon() -> Result<(), Failed> {
    let (serve, address) =
        start_script(cluster_serve(), BESIDE_A_DAEMON, "server_that_drains", &[]);
    let daemons = Daemons(&serve);
    let old = ask(connect(address));
    daemons.wait(1);
    kill(serve.pid(), Signal::SIGHUP)?;
    wait_for_output(&serve, "generation 1 serves");
    wait_for_output(&serve, "worker 1 has exited");
    assert!(!is_alive(old));
    daemons.wait(2);
    ask(connect(address));
    kill(serve.pid(), Signal::SIGTERM)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    assert!(!serve.output().contains("killed"), "{}", serve.output());
    Ok(())
}

fn killed_at_the_deadline() -> Result<(), Failed> {
    let (serve, address) = start("server_that_ignores_signals", &["--drain", "300ms"]);
    let pid = ask(connect(address));
    kill(serve.pid(), Signal::SIGTERM)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    wait_for_end(pid);
    assert_refused(address);
    Ok(())
}

fn killed_at_once() -> Result<(), Failed> {
    let (serve, address) = start("server_that_ignores_signals", &[]);
    let pid = ask(connect(address));
    kill(serve.pid(), Signal::SIGQUIT)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    wait_for_end(pid);
    assert_refused(address);
    Ok(())
}

fn killed_after_the_shell() -> Result<(), Failed> {
    let (serve, address) = start("server_that_ignores_signals", &[]);
    let old = ask(connect(address));
    kill(parent(old), Signal::SIGKILL)?;
    wait_for_output(&serve, "worker 2 is ready");
    wait_for_end(old);
    assert_ne!(ask(connect(address)), old);
    kill(serve.pid(), Signal::SIGQUIT)?;
    assert_eq!(serve.finish()?.code(), Some(0));
    Ok(())
}

fn worker_with_passed_descriptors_leads_a_process_group() {
    cluster(
        |master| {
            let null = std::fs::File::open("/dev/null").unwrap();
            let sleep = Settings::default().exec("/bin/sleep").args(["1000"]);
            let worker = master.fork_as(sleep.listen_fds([("null", null)])).unwrap();
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            assert_eq!(getpgid(Some(pid)).unwrap(), pid);
            worker.process().kill(cluster::Signal::KILL);
            master.fork().unwrap();
        },
        |worker| {
            // A worker that uses the crate stays in the master's group.
            assert_eq!(getpgrp(), getpgid(Some(getppid())).unwrap());
            worker.disconnect().run().unwrap();
        },
    );
}

/// Checks a worker that is a shell, and exits at SIGTERM before the process that it has started.
fn group_of_a_worker_ends_before_its_exit_event() {
    let file = std::env::temp_dir().join("member");
    cluster(
        |master| {
            let null = std::fs::File::open("/dev/null").unwrap();
            let shell = Settings::default().exec("/bin/sh");
            let script = "sleep 1000 & echo $! > \"$0.new\"; mv \"$0.new\" \"$0\"; wait";
            let shell = shell.args(["-c", script, file.to_str().unwrap()]);
            let worker = master.fork_as(shell.listen_fds([("null", null)])).unwrap();
            let member = wait_until("the member", || std::fs::read_to_string(&file).ok());
            let member = member.trim().parse().unwrap();
            worker.process().kill(cluster::Signal::TERM);
            worker.on_exit(move |_, _, _| wait_for_end(member));
        },
        |_| unreachable!("the worker is a shell"),
    );
    std::fs::remove_file(file).unwrap();
}
