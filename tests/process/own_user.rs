//! Tests of `Settings::uid` and `Settings::gid`, most of them in a master that may not change its
//! groups.

use std::cell::Cell;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use cluster::{Error, ForkStep, Master, SchedulingPolicy, Settings, Worker};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket,
    sockopt::ReusePort,
};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::harness::{
    Log, NOBODY, OWN_PROGRAM, cluster, fork_patiently, note_messages, try_patiently, with_env,
};
use crate::privileges::credentials;

crate::scenarios! {
    unprivileged_master_forks_workers_of_its_own_user: ROOT
    groups_that_cannot_be_dropped_refuse_another_identity: ROOT
    fork_in_a_user_namespace_accepts_its_own_user: USER_NAMESPACE
    master_with_no_new_privs_forks_workers_of_another_user: ROOT
    worker_of_another_user_cannot_join_a_sharded_port: ROOT
}

/// Makes this process run as `nobody` with these supplementary groups. `saved` becomes the saved
/// user id, to which the process may return.
fn become_nobody(groups: &[u32], saved: u32) {
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).unwrap();
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(group, group, group).unwrap();
    setresuid(user, user, Uid::from_raw(saved)).unwrap();
    // The change of user has cleared the dumpable flag. Without this flag, the process cannot read
    // its own entries in `/proc`.
    nix::sys::prctl::set_dumpable(true).unwrap();
}

/// Runs this scenario again in a child process for each case. Returns the case in a child process,
/// and `None` in the parent.
fn each_case(cases: &[&str]) -> Option<String> {
    const CASE: &str = "CASE";
    let case = std::env::var(CASE).ok();
    if case.is_none() {
        for case in cases {
            with_env(CASE, case, || unreachable!());
        }
    }
    case
}

fn send_credentials(worker: &Worker) {
    let all = credentials().join(", ");
    let _ = worker.send(all.as_bytes()).unwrap();
}

/// Calls `become_user`, forks a worker with these settings, and returns the worker's id and
/// credentials. If the fork fails, returns the step that failed.
fn outcome(become_user: impl FnOnce(), settings: Settings) -> String {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            become_user();
            note_messages(master, &log);
            if let Err(step) = fork(master, settings) {
                log.add(step);
            }
        },
        |worker| send_credentials(&worker),
    );
    entries.take().join("; ")
}

fn fork(master: &Master, settings: Settings) -> Result<(), &'static str> {
    let settings = settings.exec(OWN_PROGRAM);
    match try_patiently(|| master.fork_as(settings.clone())) {
        Ok(_) => Ok(()),
        Err(Error::Fork { step, reason, .. }) => {
            assert_eq!(reason.raw_os_error(), Some(libc::EPERM), "{reason}");
            assert_eq!(step, ForkStep::Groups);
            Err("cannot change its groups")
        }
        Err(other) => panic!("{other}"),
    }
}

const NO_CAPABILITIES: &str = "CapInh: 0000000000000000, CapPrm: 0000000000000000, \
     CapEff: 0000000000000000, CapAmb: 0000000000000000";

/// Returns the [`outcome`] for a worker that runs as `nobody` with these supplementary groups.
fn of_nobody(groups: &str) -> String {
    let user = "Uid: 65534 65534 65534 65534, Gid: 65534 65534 65534 65534";
    format!("1 {user}, Groups:{groups}, {NO_CAPABILITIES}")
}

fn unprivileged_master_forks_workers_of_its_own_user() {
    let Some(case) = each_case(&["no groups", "own group", "groups", "user", "group"]) else {
        return;
    };
    let settings = Settings::default();
    let (groups, settings): (&[u32], _) = match case.as_str() {
        "no groups" => (&[], settings.uid(NOBODY).gid(NOBODY)),
        "own group" => (&[NOBODY], settings.uid(NOBODY).gid(NOBODY)),
        "groups" => (&[1, 4], settings.uid(NOBODY).gid(NOBODY)),
        "user" => (&[], settings.uid(NOBODY)),
        _ => (&[], settings.gid(NOBODY)),
    };
    let numbers: String = groups.iter().map(|group| format!(" {group}")).collect();
    let become_user = || become_nobody(groups, NOBODY);
    assert_eq!(
        outcome(become_user, settings),
        of_nobody(&numbers),
        "{case}"
    );
}

/// Checks a master that may not change its groups, and a worker that gives up an identity: user 0,
/// to which the master may return, or the master's own user. The worker must not keep groups of an
/// identity that it gives up, so the fork fails if the master has groups.
fn groups_that_cannot_be_dropped_refuse_another_identity() {
    let Some(case) = each_case(&["groups", "no groups", "another user"]) else {
        return;
    };
    let nobody = Settings::default().uid(NOBODY).gid(NOBODY);
    let (groups, saved, settings, expected): (&[u32], _, _, _) = match case.as_str() {
        "groups" => (&[1], 0, nobody, "cannot change its groups".to_owned()),
        "no groups" => (&[], 0, nobody, of_nobody("")),
        _ => (
            &[1],
            NOBODY,
            Settings::default().uid(1),
            "cannot change its groups".to_owned(),
        ),
    };
    let become_user = || become_nobody(groups, saved);
    assert_eq!(outcome(become_user, settings), expected, "{case}");
}

/// Runs in a user namespace whose processes may not change their groups (`setgroups` in
/// user_namespaces(7)).
fn fork_in_a_user_namespace_accepts_its_own_user() {
    const INSIDE: &str = "INSIDE";
    if std::env::var_os(INSIDE).is_none() {
        let status = Command::new("unshare")
            .args(["--user", "--map-root-user"])
            .arg(std::env::current_exe().unwrap())
            .env(INSIDE, "")
            .status()
            .unwrap();
        return assert!(status.success(), "{status}");
    }
    assert_eq!(
        std::fs::read_to_string("/proc/self/setgroups").unwrap(),
        "deny\n"
    );
    let credentials = outcome(|| {}, Settings::default().uid(0).gid(0));
    assert!(
        credentials.starts_with("1 Uid: 0 0 0 0, Gid: 0 0 0 0, "),
        "{credentials}"
    );
}

fn master_with_no_new_privs_forks_workers_of_another_user() {
    let forbid = || {
        setgroups(&[]).unwrap();
        nix::sys::prctl::set_no_new_privs().unwrap();
    };
    let nobody = Settings::default().uid(NOBODY).gid(NOBODY);
    assert_eq!(outcome(forbid, nobody), of_nobody(""));
}

/// Binds a socket with SO_REUSEPORT to the address of other sockets.
fn join(address: SocketAddr) -> nix::Result<()> {
    let family = AddressFamily::Inet;
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, ReusePort, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))
}

/// Checks that only a process of the master's user can join the port of a sharded listener.
fn worker_of_another_user_cannot_join_a_sharded_port() {
    const PORT: &str = "SHARDED_PORT";
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            let policy = SchedulingPolicy::Sharded;
            master.set_scheduling_policy(policy).unwrap();
            let listener = master.listen("127.0.0.1:0").unwrap();
            let address: SocketAddr = listener.address().to_string().parse().unwrap();
            assert_eq!(join(address), Ok(()));
            let nobody = Settings::default()
                .exec(OWN_PROGRAM)
                .uid(NOBODY)
                .gid(NOBODY);
            master.setup_master(nobody);
            fork_patiently(|| master.fork_with([(PORT, address.to_string())]));
            // Keep the port open until the worker has exited.
            let listener = Cell::new(Some(listener));
            master.on_exit(move |_, _, _| drop(listener.take()));
        },
        |worker| {
            let address = std::env::var(PORT).unwrap().parse().unwrap();
            let joined = format!("{:?}", join(address));
            let _ = worker.send(joined.as_bytes()).unwrap();
        },
    );
    assert_eq!(entries.take(), ["1 Err(EADDRINUSE)"]);
}
