//! Tests which file workers and new masters execute if the program's path leads to another file, or
//! to none.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{Role, Settings, Signal};
use nix::sys::signal::{Signal as Number, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::{Group, WATCHED, is_watched, loader, wait_until, watched};
use crate::pool::wait_for_exit;

crate::scenarios! {
    release_behind_a_switched_link_is_started
    program_found_by_its_name_is_started
    program_called_by_another_name_is_started
    upgrade_executes_the_script_that_passed_its_own_name
    set_user_id_program_ignores_the_script_in_its_name: ROOT
    set_user_id_program_ignores_the_link_by_which_it_was_called: ROOT
    replaced_program_is_started
    missing_program_is_started_when_it_is_back
    program_is_found_without_proc: MOUNT_NAMESPACE
    interpreter_of_a_script_is_started
    program_that_the_loader_runs_is_unknown: LOADER
    unlinked_program_is_unknown
}

const MS: Duration = Duration::from_millis(1);

/// Runs a pool with one worker. The master and the worker print which program they execute.
///
/// SIGUSR1 reloads with settings that have no path. The master changes its working directory to
/// `/`, where the relative paths of the scenarios do not exist.
fn server() {
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let pid = std::process::id();
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            println!("master {pid} {}", own.display());
            std::env::set_current_dir("/").unwrap();
            let options = PoolOptions::default().workers(1).jitter(0);
            let pool = Pool::new(&master, options.back_off(20 * MS).min_ready_time(20 * MS));
            pool.adopt(&master, passed).unwrap();
            pool.on_event(|_, _, event| println!("{event}"));
            pool.on_default_signals(&master).unwrap();
            let reload = master.on_signal(Signal::USR1, move |master, _| {
                pool.reload_with(master, Settings::default().args(["new"]));
            });
            reload.unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            println!("worker {pid} {}", own.display());
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.incoming().for_each(|client| drop(client.unwrap()));
        }
    }
}

/// Makes this program available under another path. The program is large, so it is copied only if a
/// hard link is impossible.
fn link_program(path: &Path) {
    let own = std::env::current_exe().unwrap();
    std::fs::hard_link(&own, path)
        .or_else(|_| std::fs::copy(&own, path).map(drop))
        .unwrap();
}

/// A directory with the releases `r1` and `r2`, and the symbolic link `current` to `r1`. Each
/// release contains the program `app`.
struct Releases(TempDir);

impl Releases {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for release in ["r1", "r2"] {
            let release = directory.path().join(release);
            std::fs::create_dir(&release).unwrap();
            link_program(&release.join("app"));
        }
        symlink("r1", directory.path().join("current")).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        // Resolve the path, because the temporary directory may be behind a symbolic link.
        self.0.path().canonicalize().unwrap().join(name)
    }

    /// Starts the server with a shell script that runs in this directory.
    fn start(&self, script: &str) -> Server {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script]).current_dir(self.0.path());
        shell.envs(
            watched()
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        Server(Group::start(&mut shell).unwrap())
    }

    /// Replaces the link `current` atomically: creates a new link and renames it to `current`, like
    /// `ln -s` and `mv -T`.
    fn switch(&self, release: &str) {
        symlink(release, self.path("next")).unwrap();
        std::fs::rename(self.path("next"), self.path("current")).unwrap();
    }
}

/// A process that runs [`server`], and the masters that succeed it.
struct Server(Group);

/// A line that [`server`] has printed about a process.
#[derive(Debug)]
struct Started {
    pid: Pid,
    program: PathBuf,
}

impl Server {
    /// Waits for the complete line that begins with `prefix` and follows `count` other such lines.
    /// Returns the rest of this line. Unlike [`Group::line`], does not panic if the first master
    /// has exited.
    fn line_after(&self, prefix: &str, count: usize) -> String {
        wait_until(&format!("{prefix:?} after {count}"), || {
            let output = self.0.output();
            let (complete, _) = output.rsplit_once('\n')?;
            let mut rest = complete
                .lines()
                .filter_map(|line| line.strip_prefix(prefix));
            rest.nth(count).map(str::to_owned)
        })
    }

    fn line(&self, prefix: &str) -> String {
        self.line_after(prefix, 0)
    }

    /// Returns the master or worker that started after `count` others of its kind.
    fn started(&self, kind: &str, count: usize) -> Started {
        let line = self.line_after(kind, count);
        let (pid, program) = line.split_once(' ').unwrap();
        Started {
            pid: Pid::from_raw(pid.parse().unwrap()),
            program: program.into(),
        }
    }

    fn master(&self, count: usize) -> Started {
        self.started("master ", count)
    }

    fn worker(&self, count: usize) -> Started {
        self.started("worker ", count)
    }

    /// Waits until the worker that started after `count` others is ready, kills it, and returns its
    /// replacement.
    fn replace(&self, count: usize) -> Started {
        self.line(&format!("slot 0: worker {} is ready", count + 1));
        kill(self.worker(count).pid, Number::SIGKILL).unwrap();
        self.worker(count + 1)
    }

    /// Stops the newest master, and waits until all processes have exited.
    fn stop(self, master: Pid) {
        kill(master, Number::SIGTERM).unwrap();
        wait_for_exit(master);
        assert!(self.0.finish().unwrap().success());
    }
}

/// Starts a server, switches the link to another release, and deletes the first release.
///
/// A reload, an upgrade and a replacement after a crash must all start the new release.
fn follow_the_link(script: &str) {
    // Adopt the new master when the old one exits.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let releases = Releases::new();
    let [old, new] = ["r1/app", "r2/app"].map(|program| releases.path(program));
    let server = releases.start(script);
    let master = server.master(0);
    assert_eq!(
        (&master.program, server.worker(0).program),
        (&old, old.clone()),
        "{script}"
    );
    server.line("ready");
    releases.switch("r2");
    kill(master.pid, Number::SIGHUP).unwrap();
    assert_eq!(server.worker(1).program, new, "{script}: reload");
    server.line("generation 1 serves");
    std::fs::remove_dir_all(releases.path("r1")).unwrap();
    assert_eq!(server.replace(1).program, new, "{script}: after a crash");
    server.line("slot 0: worker 3 is ready");
    kill(master.pid, Number::SIGUSR1).unwrap();
    assert_eq!(
        server.worker(3).program,
        new,
        "{script}: reload with settings"
    );
    server.line("generation 2 serves");
    kill(master.pid, Number::SIGUSR2).unwrap();
    let successor = server.master(1);
    assert_eq!(successor.program, new, "{script}: upgrade");
    server.line("this master has taken over");
    wait_for_exit(master.pid);
    assert_eq!(
        server.worker(4).program,
        new,
        "{script}: worker of the new master"
    );
    server.stop(successor.pid);
}

fn release_behind_a_switched_link_is_started() {
    if is_watched() {
        return server();
    }
    for script in [
        "exec current/app",
        "exec \"$PWD/current/app\"",
        "cd current && exec ./app",
        "cd r2 && exec ../current/../current/app",
    ] {
        follow_the_link(script);
    }
}

/// Starts the program by a search of `PATH`, also with relative directories.
fn program_found_by_its_name_is_started() {
    if is_watched() {
        return server();
    }
    for script in [
        "PATH=$PWD/current; exec app",
        "PATH=current; exec app",
        "cd current && PATH=:/bin && exec app",
    ] {
        follow_the_link(script);
    }
}

fn program_called_by_another_name_is_started() {
    if is_watched() {
        return server();
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let releases = Releases::new();
    let old = releases.path("r1/app");
    let mut command = Command::new(releases.path("current/app"));
    let server =
        Server(Group::start(command.arg0("/bin/false").env(WATCHED.0, WATCHED.1)).unwrap());
    let master = server.master(0);
    assert_eq!(server.worker(0).program, old);
    server.line("ready");
    kill(master.pid, Number::SIGUSR2).unwrap();
    let successor = server.master(1);
    assert_eq!(successor.program, old);
    server.line("this master has taken over");
    server.stop(successor.pid);
}

/// Writes an executable script.
fn write_script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// Calls the script by a relative path. The master changes its directory, so it must have
/// determined the absolute path before.
fn upgrade_executes_the_script_that_passed_its_own_name() {
    if is_watched() {
        return server();
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let releases = Releases::new();
    let [script, old, new] = ["run.sh", "r1/app", "r2/app"].map(|name| releases.path(name));
    let text = |app: &Path| format!("#!/bin/bash\nexec -a \"$0\" {} \"$@\"\n", app.display());
    write_script(&script, &text(&old));
    let server = releases.start("exec ./run.sh");
    let master = server.master(0);
    assert_eq!((&master.program, &server.worker(0).program), (&old, &old));
    server.line("ready");
    write_script(&script, &text(&new));
    assert_eq!(
        server.replace(0).program,
        old,
        "workers execute the program"
    );
    server.line("slot 0: worker 2 is ready");
    kill(master.pid, Number::SIGUSR2).unwrap();
    let successor = server.master(1);
    assert_eq!(successor.program, new);
    server.line("this master has taken over");
    server.stop(successor.pid);
}

/// Executes a program whose set-user-ID bit changes its effective user. The user who calls it
/// chooses `argv[0]`, but must not choose a script that is executed as the other user.
fn set_user_id_program_ignores_the_script_in_its_name() {
    if is_watched() {
        let Role::Master(master) = cluster::init().unwrap() else {
            panic!("a worker");
        };
        let has_changed = nix::unistd::geteuid() != nix::unistd::getuid();
        // On a file system that is mounted with `nosuid`, the bit has no effect. Print `false`
        // then, so that the test passes.
        let script = master.wrapper_script().filter(|_| has_changed);
        return println!("{}", script.is_some());
    }
    let releases = Releases::new();
    let script = releases.path("script");
    write_script(&script, "#!/bin/sh\n");
    let app = set_user_id_copy(&releases);
    assert_eq!(output_of(Command::new(&app).arg0(&script)), "false\n");
}

/// Copies this program, and lets the copy run as another user.
fn set_user_id_copy(releases: &Releases) -> PathBuf {
    let app = releases.path("r1/copy");
    std::fs::copy(std::env::current_exe().unwrap(), &app).unwrap();
    std::os::unix::fs::chown(&app, Some(crate::exhaustion::unique_user()), None).unwrap();
    std::fs::set_permissions(&app, Permissions::from_mode(0o4755)).unwrap();
    // Let the other user access the directory of the copy.
    let directory = releases.path("");
    std::fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    app
}

/// The caller of a set-user-ID program may switch the link by which the program is called, but must
/// not use the link to choose a program that is executed as the other user.
fn set_user_id_program_ignores_the_link_by_which_it_was_called() {
    if is_watched() {
        let Role::Master(master) = cluster::init().unwrap() else {
            panic!("a worker");
        };
        let has_changed = nix::unistd::geteuid() != nix::unistd::getuid();
        master.setup_master(Settings::default());
        let settings = master.settings();
        let exec = settings.get_exec().unwrap();
        // On a file system that is mounted with `nosuid`, the bit has no effect. Print `false`
        // then, so that the test passes.
        return println!("{}", has_changed && exec.ends_with("link"));
    }
    let releases = Releases::new();
    let link = releases.path("link");
    std::os::unix::fs::symlink(set_user_id_copy(&releases), &link).unwrap();
    assert_eq!(output_of(&mut Command::new(&link)), "false\n");
}

fn replaced_program_is_started() {
    if is_watched() {
        return server();
    }
    let releases = Releases::new();
    let server = releases.start("cd r1 && exec ./app");
    let master = server.master(0);
    let app = releases.path("r1/app");
    server.line("ready");
    // Copy the program, because a rename does nothing if both paths lead to the same file.
    std::fs::copy(&app, releases.path("new")).unwrap();
    std::fs::rename(releases.path("new"), &app).unwrap();
    assert_eq!(server.replace(0).program, app);
    server.line("slot 0: worker 2 is ready");
    kill(master.pid, Number::SIGUSR1).unwrap();
    assert_eq!(server.worker(2).program, app);
    server.line("generation 1 serves");
    server.stop(master.pid);
}

fn missing_program_is_started_when_it_is_back() {
    if is_watched() {
        return server();
    }
    let releases = Releases::new();
    let server = releases.start("exec r1/app");
    let master = server.master(0);
    let [app, elsewhere] = ["r1/app", "r1/elsewhere"].map(|name| releases.path(name));
    server.line("ready");
    std::fs::rename(&app, &elsewhere).unwrap();
    kill(server.worker(0).pid, Number::SIGKILL).unwrap();
    let error = server.line("slot 0: worker could not be forked: ");
    assert!(error.contains("r1/app: cannot execute it: "), "{error}");
    // An upgrade fails too, and the pool continues.
    kill(master.pid, Number::SIGUSR2).unwrap();
    server.line("the new master failed: ");
    std::fs::rename(&elsewhere, &app).unwrap();
    assert_eq!(server.worker(1).program, app);
    server.stop(master.pid);
}

/// Runs the pool without `/proc`. The directory `r2` contains another program with the same name,
/// which prints nothing and must not be started.
fn program_is_found_without_proc() {
    if is_watched() {
        return server();
    }
    for script in [
        "cd r2 && PATH=../current && exec app",
        "cd r2 && exec ../current/app",
        "cd current && exec ./app",
    ] {
        let releases = Releases::new();
        let other = releases.path("r2/app");
        std::fs::remove_file(&other).unwrap();
        std::fs::copy("/bin/false", &other).unwrap();
        let server = releases.start(&format!(
            "exec unshare -m sh -c 'umount -l /proc; {script}'"
        ));
        let master = server.master(0);
        server.line("ready");
        server.replace(0);
        server.stop(master.pid);
    }
}

/// Runs a master that forks a worker of its own program, and then one that executes a shell. The
/// first worker prints its program and argument. The master prints exit statuses, and the error if
/// it cannot fork the first worker.
fn report_program() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.on_exit(|_, _, status| println!("{status}"));
            match master.fork() {
                Ok(_) => master.run().unwrap(),
                Err(error) => println!("{error}"),
            }
            let settings = Settings::default().exec("/bin/sh").args(["-c", "exit 3"]);
            master.fork_as(settings).unwrap();
            master.run().unwrap();
        }
        Role::Worker(_) => {
            let own = std::fs::read_link("/proc/self/exe").unwrap();
            println!("{} {:?}", own.display(), std::env::args_os().nth(1));
        }
    }
}

fn output_of(command: &mut Command) -> String {
    let output = command.env(WATCHED.0, WATCHED.1).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn interpreter_of_a_script_is_started() {
    if is_watched() {
        return report_program();
    }
    let releases = Releases::new();
    let [app, script] = ["r1/app", "script"].map(|name| releases.path(name));
    write_script(&script, &format!("#!{}\n", app.display()));
    let expected = format!(
        "{} Some({script:?})\nexit status: 0\nexit status: 3\n",
        app.display()
    );
    assert_eq!(output_of(&mut Command::new(&script)), expected);
}

const UNKNOWN: &str = "cannot find it: no path leads to this program: set `Settings::exec`\n";

fn program_that_the_loader_runs_is_unknown() {
    if is_watched() {
        return report_program();
    }
    let mut command = Command::new(loader().unwrap());
    let output = output_of(command.arg(std::env::current_exe().unwrap()));
    assert!(
        output.ends_with(&format!("{UNKNOWN}exit status: 3\n")),
        "{output}"
    );
}

/// Executes a program that deletes its own file before `init`.
fn unlinked_program_is_unknown() {
    if is_watched() {
        if let Some(path) = std::env::args_os().nth(1) {
            std::fs::remove_file(path).unwrap();
        }
        return report_program();
    }
    let releases = Releases::new();
    let app = releases.path("r1/app");
    let output = output_of(Command::new(&app).arg(&app));
    assert!(
        output.ends_with(&format!("{UNKNOWN}exit status: 3\n")),
        "{output}"
    );
}
