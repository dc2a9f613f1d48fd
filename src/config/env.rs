//! The names of the environment variables that the crate reads and sets.

/// The worker's process id, set by the master. The other variables are valid only in the process
/// with this id, because programs that the worker starts inherit them.
pub(crate) const WORKER_PID: &str = "CLUSTER_WORKER_PID";
/// The worker's id, set by the master.
pub(crate) const UNIQUE_ID: &str = "CLUSTER_UNIQUE_ID";
/// The number of the channel's descriptor in the worker, set by the master.
pub(crate) const CHANNEL_FD: &str = "CLUSTER_CHANNEL_FD";
/// The worker's inspect port, set by the master if the worker has one.
pub(crate) const INSPECT_PORT: &str = "CLUSTER_INSPECT_PORT";
/// The variables that a master sets for its workers.
pub(crate) const TO_WORKER: [&str; 4] = [WORKER_PID, UNIQUE_ID, CHANNEL_FD, INSPECT_PORT];
/// A mark that a wrapped master sets for the programs it starts. If a worker's program runs in the
/// child of a forking wrapper, it becomes a wrapped master. `init` fails in a marked program behind
/// another wrapper, because masters would otherwise start masters without end.
pub(crate) const WRAPPED: &str = "CLUSTER_WRAPPED";
/// The switch for the master's log of events on standard error. The value `1` enables the log.
pub(crate) const DEBUG: &str = "CLUSTER_DEBUG";
/// The scheduling policy, set by the user.
pub(crate) const SCHED_POLICY: &str = "CLUSTER_SCHED_POLICY";
