//! Tests the options of the tool `cluster-serve`.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use libtest_mimic::{Failed, Trial};

use crate::harness::{Group, NOBODY, ROOT, cluster_serve};
use crate::serve::{command, line_after, stop};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("serve_names_an_option_with_a_bad_value", bad_values),
        Trial::test("serve_names_a_variable_with_a_bad_value", bad_variables),
        Trial::test("serve_names_what_it_cannot_use_before_a_fork", unusable),
        Trial::test("serve_reads_its_options_from_the_environment", variables),
        Trial::test(
            "serve_sets_the_environment_and_directory_of_its_programs",
            environment,
        ),
        ROOT.of(Trial::test("serve_runs_its_programs_as_a_user", user)),
        ROOT.of(Trial::test(
            "serve_gives_up_at_once_if_no_program_can_be_started",
            cannot_start,
        )),
        Trial::test("serve_kills_a_process_after_the_drain_time", drain),
        Trial::test("serve_replaces_a_process_at_its_age", || {
            is_recycled(&["--max-age", "200ms"], "(age)")
        }),
        Trial::test("serve_replaces_a_process_at_its_memory", || {
            is_recycled(&["--max-memory", "4K"], "(memory)")
        }),
        Trial::test("serve_gives_up_after_the_number_of_failures", failures),
    ]
}

/// A program that runs until SIGTERM.
const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Runs the command, which must fail with this code. Returns what it has printed.
#[track_caller]
fn failure(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {text}");
    text
}

fn bad_values() -> Result<(), Failed> {
    let cases: &[(&[&str], &str)] = &[
        (&[], "no program"),
        (&["true"], "nothing to listen on"),
        (&["--nonsense", "true"], "invalid option '--nonsense'"),
        (&["-x", "true"], "invalid option '-x'"),
        (&["--workers"], "'--workers'"),
        (&["--workers", "0"], "--workers: invalid value \"0\": "),
        (&["--workers", "65536"], "--workers: invalid value "),
        (&["--readiness", "x"], "--readiness: invalid value \"x\": "),
        (&["--drain", "10"], "--drain: invalid value \"10\": "),
        (&["--stop-delay", "1d"], "--stop-delay: invalid value "),
        (&["--max-age", ""], "--max-age: invalid value \"\": "),
        (&["--max-age", "0s"], "--max-age: invalid value \"0s\": "),
        (
            &["--max-memory", "0"],
            "--max-memory: invalid value \"0\": ",
        ),
        (
            &["--max-memory", "99999999999999G"],
            "--max-memory: invalid value \"99999999999999G\": ",
        ),
        (&["--max-failures", "-1"], "--max-failures: invalid value "),
        (&["--env", "A"], "--env: invalid value \"A\": "),
        (&["--env", "=a"], "--env: invalid value \"=a\": "),
        (
            &["--directory", ""],
            "--directory: invalid value \"\": must",
        ),
        (&["--pid-file", ""], "--pid-file: invalid value \"\": must"),
        (&["--log", ""], "--log: invalid value \"\": must"),
        (&["--status", "9100"], "--status: invalid value \"9100\": "),
        (&["--status", "192.0.2.1:9100"], "not a loopback address"),
        (&["--log-format", "xml"], "--log-format: invalid value "),
    ];
    for (args, expected) in cases {
        let mut command = cluster_serve();
        let is_value = args.len() == 2 && args[0] != "--nonsense" && args[0] != "-x";
        command.args(*args).args(is_value.then_some("true"));
        let text = failure(&mut command, 2);
        assert!(text.contains(expected), "{args:?}: {text}");
        assert!(text.ends_with("\nTry: cluster-serve --help\n"), "{text}");
    }
    Ok(())
}

fn bad_variables() -> Result<(), Failed> {
    for (name, value) in [
        ("WORKERS", "many"),
        ("MAX_MEMORY", "1T"),
        ("STATUS", "0.0.0.0:1"),
        ("LOG_FORMAT", "xml"),
    ] {
        let variable = format!("CLUSTER_SERVE_{name}");
        let mut command = cluster_serve();
        let text = failure(command.env(&variable, value).arg("true"), 2);
        let expected = format!("{variable}: invalid value {value:?}: ");
        assert!(text.contains(&expected), "{text}");
    }
    Ok(())
}

fn unusable() -> Result<(), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let taken = listener.local_addr()?.to_string();
    // Get the error's text from the C library, because C libraries use different texts.
    let in_use = std::io::Error::from(nix::Error::EADDRINUSE).to_string();
    for (option, value, reason) in [
        ("--user", "no-such-user", "no such user in /etc/passwd"),
        ("--user", "4294967295", "no such user in /etc/passwd"),
        ("--user", "+1", "no such user in /etc/passwd"),
        ("--user", "4000000", "its group is unknown; add --group"),
        ("--group", "no-such-group", "no such group in /etc/group"),
        ("--directory", "/no/such", "No such file or directory"),
        ("--directory", "/etc/passwd", "Not a directory"),
        ("--pid-file", "/no/such/pid", "No such file or directory"),
        ("--log", "/no/such/log", "No such file or directory"),
        ("--listen", taken.as_str(), in_use.as_str()),
        ("--status", taken.as_str(), in_use.as_str()),
    ] {
        // If a program were forked, it would print its process id.
        let mut command = command(1, "127.0.0.1:0");
        command.args([option, value, "sh", "-c", "echo forked $$ >&2"]);
        let text = failure(&mut command, 1);
        assert!(text.contains(value) && text.contains(reason), "{text}");
        assert!(!text.contains("forked"), "{text}");
    }
    Ok(())
}

fn variables() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("serve.sock");
    let mut command = cluster_serve();
    command.env(
        "CLUSTER_SERVE_LISTEN",
        format!("127.0.0.1:0 {}", path.display()),
    );
    command.env("CLUSTER_SERVE_READINESS", "50ms");
    // Empty variables count as not set.
    for name in [
        "DRAIN",
        "STATUS",
        "LOG",
        "USER",
        "PID_FILE",
        "DIRECTORY",
        "LOG_FORMAT",
    ] {
        command.env(format!("CLUSTER_SERVE_{name}"), "");
    }
    command.envs([("CLUSTER_SCHED_POLICY", ""), ("WATCHDOG_USEC", "")]);
    // The command line overrides this variable.
    command.env("CLUSTER_SERVE_WORKERS", "0");
    command.args(["--workers", "1", "--"]);
    command.args(["sh", "-c", "echo fds $LISTEN_FDS; exec sleep 1000"]);
    let serve = Group::start(&mut command)?;
    assert_eq!(serve.line("fds "), "2");
    line_after(&serve, "worker 1 is ready");
    assert!(path.exists());
    stop(&serve)
}

fn environment() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().canonicalize()?;
    let mut command = command(1, "127.0.0.1:0");
    command.args(["--env", "A=one", "--env", "B=two=2", "--directory"]);
    command.arg(&path);
    command.args(["sh", "-c", "echo \"has $A $B $(pwd)\"; exec sleep 1000"]);
    let serve = Group::start(&mut command)?;
    assert_eq!(serve.line("has "), format!("one two=2 {}", path.display()));
    stop(&serve)
}

/// Runs `id` in a program with these options, and returns the user, the group and the supplementary
/// groups that it prints.
fn ids(options: &[&str]) -> Result<String, Failed> {
    let mut command = command(1, "127.0.0.1:0");
    command.args(options);
    command.args([
        "sh",
        "-c",
        "echo ids $(id -u) $(id -g) $(id -G); exec sleep 1000",
    ]);
    let serve = Group::start(&mut command)?;
    let ids = serve.line("ids ");
    stop(&serve)?;
    Ok(ids)
}

fn user() -> Result<(), Failed> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    let daemon = passwd.lines().find(|line| line.starts_with("daemon:"));
    let fields: Vec<_> = daemon.ok_or("no user daemon")?.split(':').collect();
    let (uid, gid) = (fields[2], fields[3]);
    assert_ne!(uid, "0");
    let expected = format!("{uid} {gid} {gid}");
    assert_eq!(ids(&["--user", "daemon"])?, expected);
    assert_eq!(ids(&["--user", uid])?, expected);
    let own = format!("{NOBODY}");
    let expected = format!("{uid} {own} {own}");
    assert_eq!(ids(&["--user", "daemon", "--group", &own])?, expected);
    assert_eq!(
        ids(&["--user", &own, "--group", "daemon"])?,
        format!("{own} {gid} {gid}")
    );
    Ok(())
}

/// Checks that the pool gives up soon, instead of trying nine times with pauses, if its workers'
/// user may not execute the program.
fn cannot_start() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700))?;
    let program = directory.path().join("program");
    fs::write(&program, "#!/bin/sh\n")?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    let mut command = command(1, "127.0.0.1:0");
    let serve = Group::start(command.args(["--user", "nobody"]).arg(program))?;
    assert_eq!(serve.end()?.code(), Some(1));
    let output = serve.output();
    let reason = line_after(&serve, "cluster-serve: gave up: ");
    assert!(reason.contains("Permission denied"), "{output}");
    // The pool may try a second time before it delivers the event of the first failure.
    let attempts = output
        .matches("] slot 0: worker could not be forked")
        .count();
    assert!(attempts <= 2, "{output}");
    Ok(())
}

fn drain() -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    command.args(["--drain", "50ms", "sh", "-c"]);
    command.arg("trap '' TERM; while :; do sleep 1000; done");
    let serve = Group::start(&mut command)?;
    line_after(&serve, "worker 1 is ready");
    stop(&serve)?;
    line_after(&serve, "worker 1 was killed");
    Ok(())
}

fn is_recycled(options: &[&str], limit: &str) -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    let serve = Group::start(command.args(options).args(SLEEP))?;
    line_after(&serve, &format!("worker 1 is being replaced {limit}"));
    line_after(&serve, "worker 1 has exited");
    stop(&serve)
}

fn failures() -> Result<(), Failed> {
    let mut command = command(1, "127.0.0.1:0");
    command.args(["--max-failures", "1", "sh", "-c", "echo ran; exit 7"]);
    let serve = Group::start(&mut command)?;
    assert_eq!(serve.end()?.code(), Some(1));
    let output = serve.output();
    assert_eq!(output.matches("ran\n").count(), 2, "{output}");
    Ok(())
}
