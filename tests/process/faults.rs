//! Workers that do not keep to the protocol.

use std::os::unix::process::ExitStatusExt as _;

use cluster::Settings;

use crate::harness::{Log, cluster};

crate::scenarios! {
    a_garbled_frame_cuts_the_worker_off
    an_oversized_frame_cuts_the_worker_off
    a_frame_in_the_wrong_state_cuts_the_worker_off
    a_program_that_is_no_worker_of_ours_comes_and_goes
}

/// A shell writes `bytes` (in printf's notation) into its channel and then waits to be ended.
fn worker_that_writes(bytes: &str) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let script = format!("printf '{bytes}' >&$CLUSTER_CHANNEL_FD; exec sleep 600");
            let settings = Settings::default().exec("/bin/sh");
            master.setup_master(settings.args(["-c".to_owned(), script]));
            let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log);
            master.on_error(move |_, worker, error| {
                assert_eq!(worker.map(|worker| worker.id().get()), Some(1));
                at_error.add(error.to_string());
            });
            master.on_disconnect(move |_, _| at_end.add("disconnect"));
            master.on_exit(move |_, worker, status| {
                let flag = worker.exited_after_disconnect();
                at_exit.add(format!("{:?} {flag:?}", status.signal()));
            });
            master.fork().unwrap();
        },
        |_| unreachable!("the worker is a shell"),
    );
    entries.take()
}

fn expect_cut_off(bytes: &str, why: &str) {
    let seen = worker_that_writes(bytes);
    let error = format!("cut off from worker 1: {why}");
    assert_eq!(seen, [error.as_str(), "disconnect", "Some(9) Some(false)"]);
}

fn a_garbled_frame_cuts_the_worker_off() {
    expect_cut_off(
        "GET / HTTP/1.1",
        "frame of version 47, this program speaks 1",
    );
}

fn an_oversized_frame_cuts_the_worker_off() {
    let why = "frame of 2147483647 bytes, the limit is 1048576";
    expect_cut_off(r"\377\377\377\177\001\177\000\000", why);
}

fn a_frame_in_the_wrong_state_cuts_the_worker_off() {
    let online = r"\000\000\000\000\001\001\000\000";
    expect_cut_off(&format!("{online}{online}"), "was online already");
}

fn a_program_that_is_no_worker_of_ours_comes_and_goes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/true").args(["x"]));
            master.on_online(|_, _| panic!("it never says so"));
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(move |_, _, status| log.add(status.to_string()));
            master.fork().unwrap();
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}
