//! The names of the environment variables that the crate reads and sets.

/// Carries the worker's process id from the master to the worker. The variables are meant for this
/// process only: programs that the worker starts inherit them, but have another process id.
pub(crate) const WORKER_PID: &str = "CLUSTER_WORKER_PID";
/// Carries the worker's id from the master to the worker.
pub(crate) const UNIQUE_ID: &str = "CLUSTER_UNIQUE_ID";
/// Carries the number of the channel's descriptor from the master to the worker.
pub(crate) const CHANNEL_FD: &str = "CLUSTER_CHANNEL_FD";
/// Carries the inspect port, if there is one, from the master to the worker.
pub(crate) const INSPECT_PORT: &str = "CLUSTER_INSPECT_PORT";
/// The variables that a master sets for each worker.
pub(crate) const TO_WORKER: [&str; 4] = [WORKER_PID, UNIQUE_ID, CHANNEL_FD, INSPECT_PORT];
/// Marks the programs that a wrapped master starts. A wrapped master is one that a forking wrapper
/// separates from its own master.
pub(crate) const WRAPPED: &str = "CLUSTER_WRAPPED";
/// Makes the master log events to standard error if the value is `1`.
pub(crate) const DEBUG: &str = "CLUSTER_DEBUG";
/// Selects the scheduling policy.
pub(crate) const SCHED_POLICY: &str = "CLUSTER_SCHED_POLICY";
