//! Tests the files of the guide. The programs that read them must accept them, and the init scripts
//! must run a server.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Command, Output, Stdio};

use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::guide::page;
use crate::harness::{
    BUSYBOX, Group, HAPROXY, KUBECTL, NGINX, PID_NAMESPACE, STRACE, SYSTEMD_ANALYZE, example,
    reserve_port, talk, wait_until,
};

/// Returns the names and contents of files of the guide.
macro_rules! files {
    ($($name:literal)*) => {
        [$(($name, include_str!(concat!("../../src/guide/files/", $name)))),*]
    };
}

pub const FILES: [(&str, &str); 15] = files! {
    "app.service" "app.socket" "Dockerfile" "compose.yaml" "kubernetes.yaml"
    "app.openrc" "app.procd" "S50app" "haproxy.cfg" "haproxy-slots.cfg" "nginx.conf"
    "Config.in" "app.mk" "app_1.0.bb" "openwrt.mk"
};

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, run: fn() -> Result<(), Failed>| Trial::test(name, run);
    vec![
        SYSTEMD_ANALYZE.of(test("systemd_accepts_the_units", units)),
        STRACE.of(test("unit_allows_all_system_calls_of_a_pool", system_calls)),
        HAPROXY.of(test("haproxy_accepts_its_configurations", haproxy)),
        KUBECTL.of(test("kubectl_accepts_the_manifest", manifest)),
        test("supervisors_wait_longer_than_the_pool", grace_periods),
        test("container_starts_the_program_without_a_shell", dockerfile),
        test("shell_accepts_the_init_scripts", || syntax(&["sh"])),
        BUSYBOX.of(test("busybox_accepts_the_init_scripts", || {
            syntax(&["busybox", "ash"])
        })),
        PID_NAMESPACE.of(test(
            "pool_as_process_1_reloads_refuses_an_upgrade_and_stops",
            process_1,
        )),
        test("openrc_script_makes_only_known_calls", openrc),
        test("procd_script_makes_only_known_calls", procd),
        BUSYBOX.of(test(
            "init_script_starts_reloads_and_stops_a_server",
            init_script,
        )),
        NGINX.of(test("nginx_keeps_connections_to_a_pool_open", nginx)),
    ]
}

pub fn file(name: &str) -> &'static str {
    let found = FILES.iter().find(|(other, _)| *other == name);
    found.expect("a file of the guide").1
}

/// Returns `text` with `new` in place of `old`, which must occur exactly `count` times.
pub fn replace(text: &str, count: usize, old: &str, new: &str) -> String {
    assert_eq!(text.matches(old).count(), count, "{old:?} in {text}");
    text.replace(old, new)
}

fn output_of(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = String::from_utf8_lossy(&stdout) + String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}\n{text}");
    text.into_owned()
}

fn units() -> Result<(), Failed> {
    // Name a program that exists, because `systemd-analyze verify` looks for it.
    let service = replace(file("app.service"), 1, "=/usr/bin/app", "=/bin/true");
    let serve = replace(
        &serve_unit()?,
        1,
        "=/usr/local/bin/cluster-serve",
        "=/bin/true",
    );
    for service in [service, serve] {
        let directory = TempDir::new()?;
        let units = [
            ("app.service", service.as_str()),
            ("app.socket", file("app.socket")),
        ];
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no", "--recursive-errors=no"]);
        for (name, text) in units {
            let path = directory.path().join(name);
            fs::write(&path, text)?;
            verify.arg(path);
        }
        // Accept no output. For an unknown setting, the command prints a warning, but succeeds.
        assert_eq!(output_of(&mut verify), "");
    }
    Ok(())
}

/// Returns the unit `app.service` with the lines for `cluster-serve`.
fn serve_unit() -> Result<String, Failed> {
    let (_, block) = page("servers").split_once("```ini\n").ok_or("no lines")?;
    let (lines, _) = block.split_once("```").ok_or("no end")?;
    let lines = lines.replace("\\\n", "");
    let mut unit = file("app.service").to_owned();
    for line in lines.lines() {
        let (setting, _) = line.split_once('=').ok_or(line)?;
        let own = unit
            .lines()
            .find(|own| own.starts_with(&format!("{setting}=")));
        unit = match own.map(str::to_owned) {
            Some(own) => replace(&unit, 1, &own, line),
            None => replace(&unit, 1, "[Service]\n", &format!("[Service]\n{line}\n")),
        };
    }
    Ok(unit)
}

/// Checks that a pool that serves, reloads and stops makes only system calls of the set that the
/// unit allows.
fn system_calls() -> Result<(), Failed> {
    const SET: &str = "@system-service";
    assert!(file("app.service").contains(&format!("\nSystemCallFilter={SET}\n")));
    for policy in ["rr", "none", "sharded"] {
        let directory = TempDir::new()?;
        let trace = directory.path().join("trace");
        let (_reserved, address) = reserve_port();
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o"]).arg(&trace);
        command.args(["/bin/sh", "-c", "echo \"process $$\"; exec \"$@\"", "sh"]);
        command.arg(example("pool").get_program());
        command.env("CLUSTER_SCHED_POLICY", policy);
        let pool = Group::start(command.arg(address.to_string()))?;
        let master = Pid::from_raw(pool.line("process ").parse()?);
        pool.line("ready");
        wait_until_served(address);
        kill(master, Signal::SIGHUP)?;
        pool.line("generation 1 serves");
        wait_until_served(address);
        kill(master, Signal::SIGTERM)?;
        assert!(pool.finish()?.success());
        let allowed = system_call_set(SET);
        let trace = fs::read_to_string(trace)?;
        // A line is a process id and a call, such as `7 close(3) = 0`.
        let calls = trace.lines().filter_map(|line| {
            let (call, _) = line.split_once(' ')?.1.trim_start().split_once('(')?;
            call.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_')
                .then_some(call)
        });
        let calls: BTreeSet<_> = calls.map(str::to_owned).collect();
        assert!(
            calls.contains("execve") && calls.contains("recvmsg"),
            "{calls:?}"
        );
        let others: Vec<_> = calls.difference(&allowed).collect();
        assert!(others.is_empty(), "{policy}: {others:?}");
    }
    Ok(())
}

/// Returns the system calls of one of systemd's sets, which may contain other sets.
fn system_call_set(set: &str) -> BTreeSet<String> {
    let list = output_of(Command::new("systemd-analyze").args(["syscall-filter", set]));
    let entries = list.lines().map(str::trim);
    let entries = entries.filter(|entry| !entry.is_empty() && !entry.starts_with('#'));
    let mut calls = BTreeSet::new();
    for entry in entries.filter(|entry| *entry != set) {
        match entry.starts_with('@') {
            true => calls.extend(system_call_set(entry)),
            false => drop(calls.insert(entry.to_owned())),
        }
    }
    calls
}

fn haproxy() -> Result<(), Failed> {
    for name in ["haproxy.cfg", "haproxy-slots.cfg"] {
        let directory = TempDir::new()?;
        let path = directory.path().join(name);
        fs::write(&path, file(name))?;
        let said = output_of(Command::new("haproxy").arg("-c").arg("-f").arg(path));
        assert!(!said.contains("WARNING"), "{said}");
    }
    Ok(())
}

fn manifest() -> Result<(), Failed> {
    let directory = TempDir::new()?;
    let path = |name| directory.path().join(name);
    fs::write(path("kubernetes.yaml"), file("kubernetes.yaml"))?;
    fs::write(path("kustomization.yaml"), "resources: [kubernetes.yaml]\n")?;
    let parsed = output_of(
        Command::new("kubectl")
            .arg("kustomize")
            .arg(directory.path()),
    );
    assert!(parsed.contains("kind: Deployment") && parsed.contains("kind: Service"));
    Ok(())
}

/// Checks that each supervisor waits longer for the pool's exit than the sum in the manifest's
/// comment.
fn grace_periods() -> Result<(), Failed> {
    let pool = 10
        + cluster::pool::PoolOptions::default()
            .get_drain_timeout()
            .as_secs();
    assert!(file("kubernetes.yaml").contains("stop_delay (10 s) + drain_timeout (30 s)"));
    for (name, before, after) in [
        ("kubernetes.yaml", "terminationGracePeriodSeconds: ", "\n"),
        ("app.service", "TimeoutStopSec=", "\n"),
        ("compose.yaml", "stop_grace_period: ", "s\n"),
        ("app.openrc", "retry=\"SIGTERM/", "/"),
        ("app.procd", "term_timeout ", "\n"),
        ("S50app", "STOP_SECONDS=", "\n"),
    ] {
        let value = file(name)
            .split_once(before)
            .and_then(|(_, rest)| rest.split_once(after));
        let seconds: u64 = value.ok_or(name)?.0.parse()?;
        assert!(seconds > pool, "{name}: {seconds} s");
    }
    Ok(())
}

/// Checks that the Dockerfile starts the program only in the exec form, a JSON array.
fn dockerfile() -> Result<(), Failed> {
    let lines = file("Dockerfile").lines();
    let started = lines.filter_map(|line| {
        line.strip_prefix("ENTRYPOINT ")
            .or(line.split_once(" CMD ").map(|(_, command)| command))
    });
    let mut count = 0;
    for command in started {
        let words: Vec<String> = serde_json::from_str(command)?;
        assert_eq!(words[0], "/usr/bin/app");
        count += 1;
    }
    assert_eq!(count, 2);
    Ok(())
}

fn syntax(shell: &[&str]) -> Result<(), Failed> {
    for name in ["app.openrc", "app.procd", "S50app"] {
        let directory = TempDir::new()?;
        let path = directory.path().join(name);
        fs::write(&path, file(name))?;
        output_of(Command::new(shell[0]).args(&shell[1..]).arg("-n").arg(path));
    }
    Ok(())
}

/// Sources a script in a shell whose only programs are `commands`, and calls the script's
/// `functions`. Returns the calls of the commands, one per line.
fn calls(name: &str, commands: &[&str], functions: &[&str]) -> String {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("script"), file(name)).unwrap();
    fs::write(
        path("record"),
        "#!/bin/sh\necho \"${0##*/} $*\" >>\"$CALLS\"\n",
    )
    .unwrap();
    fs::set_permissions(path("record"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(path("bin")).unwrap();
    for command in commands {
        symlink(path("record"), path("bin").join(command)).unwrap();
    }
    let mut shell = Command::new("/bin/sh");
    shell.args(["-euc", ". \"$0\"; for function; do $function; done"]);
    shell.arg(path("script")).args(functions);
    shell.env("PATH", path("bin")).env("CALLS", path("calls"));
    output_of(shell.env("RC_SVCNAME", "app"));
    fs::read_to_string(path("calls")).unwrap()
}

fn openrc() -> Result<(), Failed> {
    let commands = [
        "need",
        "after",
        "checkpath",
        "ebegin",
        "eend",
        "supervise-daemon",
    ];
    let calls = calls("app.openrc", &commands, &["depend", "start_pre", "reload"]);
    assert!(calls.contains("need net\n"), "{calls}");
    assert!(
        calls.ends_with("supervise-daemon app --signal HUP\neend 0\n"),
        "{calls}"
    );
    Ok(())
}

/// The parameters of `procd_set_param` that the script may use, as in OpenWrt's `procd.sh`.
const PROCD_PARAMETERS: [&str; 9] = [
    "command",
    "respawn",
    "limits",
    "user",
    "group",
    "stdout",
    "stderr",
    "no_new_privs",
    "term_timeout",
];

fn procd() -> Result<(), Failed> {
    let commands = [
        "procd_open_instance",
        "procd_set_param",
        "procd_close_instance",
        "procd_send_signal",
    ];
    let calls = calls("app.procd", &commands, &["start_service", "reload_service"]);
    for call in calls.lines() {
        let mut words = call.split(' ');
        if words.next() == Some("procd_set_param") {
            let parameter = words.next().unwrap_or_default();
            assert!(PROCD_PARAMETERS.contains(&parameter), "{call}");
        }
    }
    assert!(
        calls.contains("procd_set_param command /usr/bin/app\n"),
        "{calls}"
    );
    assert!(calls.ends_with("procd_send_signal app * HUP\n"), "{calls}");
    Ok(())
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

fn wait_until_served(address: SocketAddr) {
    wait_until("an answer", || {
        let answer = talk(address, REQUEST).ok()?;
        answer.ends_with("hello\n").then_some(())
    });
}

/// Runs the example `pool` with the script `S50app`, which finds no programs except BusyBox's.
fn init_script() -> Result<(), Failed> {
    let directory = TempDir::new()?;
    let path = |name: &str| directory.path().join(name);
    let (_reserved, address) = reserve_port();
    let name = "server-with-a-long-name";
    let program = path(name);
    symlink(example("pool").get_program(), &program)?;
    let program = program.to_str().ok_or("a path in UTF-8")?;
    let mut script = file("S50app").to_owned();
    for (old, new) in [
        ("=/usr/bin/app\n", format!("=\"{program} {address}\"\n")),
        ("NAME=app\n", format!("NAME={name}\n")),
        ("=/run/app.pid\n", format!("={}\n", path("pid").display())),
        (
            "=/var/log/app.log\n",
            format!("={}\n", path("log").display()),
        ),
    ] {
        script = replace(&script, 1, old, &new);
    }
    fs::write(path("script"), script)?;
    fs::create_dir(path("bin"))?;
    output_of(
        Command::new("busybox")
            .args(["--install", "-s"])
            .arg(path("bin")),
    );
    let run = |action: &str| {
        let mut command = Command::new(path("bin").join("ash"));
        command.arg(path("script")).arg(action);
        command.env("PATH", path("bin")).stderr(Stdio::null());
        command.status().unwrap()
    };

    assert!(run("start").success());
    wait_until_served(address);
    let written = fs::read_to_string(path("pid"))?;
    let pid = Pid::from_raw(written.trim().parse()?);
    // The kernel has reparented the server to this process. Reap it as init does, because the
    // script treats a zombie as a running server.
    let server = std::thread::spawn(move || waitpid(pid, None));
    assert!(run("start").success());
    assert_eq!(fs::read_to_string(path("pid"))?, written, "a second server");
    assert!(run("reload").success());
    let log = || fs::read_to_string(path("log")).unwrap();
    wait_until("a reload", || {
        log().contains("generation 1 serves").then_some(())
    });
    wait_until_served(address);
    assert!(run("stop").success());
    assert!(!path("pid").exists());
    assert_eq!(
        server.join().unwrap(),
        Ok(WaitStatus::Exited(pid, 0)),
        "{}",
        log()
    );
    assert!(!log().contains("was killed"), "{}", log());
    assert!(run("stop").success());
    assert!(!run("reload").success());
    Ok(())
}

/// Runs the example `pool` as process 1 of a PID namespace, as in a container.
fn process_1() -> Result<(), Failed> {
    let own = fs::File::open("/proc/self/ns/pid")?;
    // This thread stays in its namespace. Only children that it starts now are in the new one.
    unshare(CloneFlags::CLONE_NEWPID)?;
    let pool = Group::start(example("pool").arg("127.0.0.1:0"));
    setns(own, CloneFlags::CLONE_NEWPID)?;
    let pool = pool?;
    let address = pool.line("listening on ").parse()?;
    pool.line("ready");
    wait_until_served(address);
    kill(pool.pid(), Signal::SIGHUP)?;
    pool.line("generation 1 serves");
    kill(pool.pid(), Signal::SIGUSR2)?;
    pool.line("the new master failed: ");
    wait_until_served(address);
    kill(pool.pid(), Signal::SIGTERM)?;
    let status = pool.finish()?;
    assert!(status.success(), "{status}");
    Ok(())
}

/// Checks that nginx, with the guide's configuration, sends all requests through one connection,
/// which the pool's master holds between the requests.
fn nginx() -> Result<(), Failed> {
    let directory = TempDir::new()?;
    let (_reserved, front) = reserve_port();
    let (_reserved, back) = reserve_port();
    let pool = Group::start(example("pool").arg(back.to_string()))?;
    for slot in 0..cluster::available_parallelism() {
        pool.line(&format!("slot {slot}: worker"));
    }
    let site = replace(
        file("nginx.conf"),
        1,
        "listen 80;",
        &format!("listen {front};"),
    );
    let site = replace(&site, 1, "server 127.0.0.1:8000", &format!("server {back}"));
    fs::write(directory.path().join("site.conf"), site)?;
    let temporary = ["client_body", "proxy", "fastcgi", "scgi", "uwsgi"]
        .map(|module| format!("{module}_temp_path {module};\n"))
        .concat();
    let main = format!(
        "daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log stderr;\nevents {{}}\n\
         http {{\naccess_log off;\n{temporary}include site.conf;\n}}\n"
    );
    fs::write(directory.path().join("nginx.conf"), main)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(directory.path());
    let proxy = Group::start(command.args(["-e", "stderr", "-c", "nginx.conf"]))?;

    let sockets = || -> BTreeSet<_> {
        let fds = fs::read_dir(format!("/proc/{}/fd", pool.pid())).unwrap();
        fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .collect()
    };
    let before = sockets();
    let mut connections = BTreeSet::new();
    for _ in 0..20 {
        wait_until_served(front);
        connections.extend(sockets().difference(&before).cloned());
    }
    assert_eq!(connections.len(), 1, "{connections:?}");
    for (group, signal) in [(&proxy, Signal::SIGQUIT), (&pool, Signal::SIGTERM)] {
        kill(group.pid(), signal)?;
        let status = group.finish()?;
        assert!(status.success(), "{status}");
    }
    Ok(())
}
