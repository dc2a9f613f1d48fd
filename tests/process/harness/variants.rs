//! Runs a scenario again with other environment variables or scheduling policies.

use std::process::Command;

/// Starts this program again as a child with one additional environment variable, and runs `play`
/// in that child. The child's workers inherit the variable.
///
/// The child runs the same scenario and calls this function again. That call finds the variable
/// set, and runs `play`. Use this function for behaviour that is decided before `main` begins.
pub fn with_env(name: &str, value: &str, play: impl FnOnce()) {
    if std::env::var_os(name).is_some_and(|own| own == value) {
        return play();
    }
    let own = std::env::current_exe().expect("own path");
    let status = Command::new(own).env(name, value).status().expect("child");
    assert!(status.success(), "with {name}={value}: {status}");
}

/// Runs `play` with the default scheduling policy and with the policy `none`. The second run is in
/// a child process, because a process has one cluster.
pub fn for_both_policies(play: impl Fn()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_none() {
        play();
    }
    with_env(POLICY, "none", play);
}

/// Runs `play` with each scheduling policy. All runs but the first are in child processes.
pub fn for_all_policies(play: impl Fn()) {
    if std::env::var_os("CLUSTER_SCHED_POLICY").is_none() {
        play();
    }
    for_policies_without_dispatch(play);
}

/// Runs `play` with the policies `none` and `sharded`, each in a child process.
pub fn for_policies_without_dispatch(play: impl Fn()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    if std::env::var_os(POLICY).is_some() {
        return play();
    }
    for policy in ["none", "sharded"] {
        with_env(POLICY, policy, &play);
    }
}
