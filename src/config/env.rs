//! The names of the crate's own environment variables. The name of a pool's variable is in `pool`.

/// The worker's process id, set by the master. Programs that the worker starts inherit all
/// variables in `TO_WORKER`, but the variables are valid only in the process with this id.
pub(crate) const WORKER_PID: &str = "CLUSTER_WORKER_PID";
/// The worker's id, set by the master.
pub(crate) const UNIQUE_ID: &str = "CLUSTER_UNIQUE_ID";
/// The descriptor number of the channel in the worker, set by the master.
pub(crate) const CHANNEL_FD: &str = "CLUSTER_CHANNEL_FD";
/// The worker's inspect port, set by the master if the worker has one.
pub(crate) const INSPECT_PORT: &str = "CLUSTER_INSPECT_PORT";
/// The variables that describe a worker. The master sets them for each worker.
pub(crate) const TO_WORKER: [&str; 4] = [WORKER_PID, UNIQUE_ID, CHANNEL_FD, INSPECT_PORT];
/// The mark that a wrapped master sets for the programs that it starts. A wrapped master is a
/// cluster program that a wrapper runs in a child process. The wrapper is a worker of another
/// master. The value is a hash of the wrapped master's command line. `init` fails if a program with
/// this command line is wrapped again, because each master would otherwise start another master.
pub(crate) const WRAPPED: &str = "CLUSTER_WRAPPED";
/// The switch for the master's log of events on standard error. The value `1` enables the log.
pub(crate) const DEBUG: &str = "CLUSTER_DEBUG";
/// The scheduling policy, set by the user.
pub(crate) const SCHED_POLICY: &str = "CLUSTER_SCHED_POLICY";
