//! How connections are distributed to the workers.

use std::str::FromStr;

/// How connections are distributed to the workers.
///
/// Node: `cluster.SCHED_RR` and `cluster.SCHED_NONE`. The default is round robin. The application
/// chooses with [`Master::set_scheduling_policy`](crate::Master::set_scheduling_policy), and its user
/// with the environment variable `CLUSTER_SCHED_POLICY`. The variable's values `rr`, `none` and
/// `sharded` are those that [`FromStr`] reads.
///
/// ```
/// use cluster::SchedulingPolicy;
///
/// assert_eq!("none".parse(), Ok(SchedulingPolicy::Shared));
/// assert_eq!(SchedulingPolicy::default().to_string(), "rr");
/// ```
#[doc(alias = "schedulingPolicy")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SchedulingPolicy {
    /// The master accepts connections and dispatches each one to a worker. Idle workers take turns.
    ///
    /// Node: `SCHED_RR`.
    #[doc(alias = "SCHED_RR")]
    #[default]
    RoundRobin,
    /// The master binds, and the workers accept from the shared listener themselves.
    ///
    /// Node: `SCHED_NONE`.
    #[doc(alias = "SCHED_NONE")]
    Shared,
    /// Each worker has its own listener on the same port (`SO_REUSEPORT`), and the kernel selects one
    /// at random. The master keeps a copy of each listener, so that the replacement of an exited worker
    /// gets the connections that were waiting for that worker.
    ///
    /// Listeners other than TCP ports are shared. Outside Linux, all listeners are.
    ///
    /// Node has no counterpart in a cluster; `reusePort` in a server is the same without a master.
    #[doc(alias = "reusePort")]
    Sharded,
}

impl std::fmt::Display for SchedulingPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "rr",
            Self::Shared => "none",
            Self::Sharded => "sharded",
        })
    }
}

/// The error of parsing a [`SchedulingPolicy`] from a name other than `rr`, `none` and `sharded`.
///
/// Its text contains the name and the valid names. See [`SchedulingPolicy`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPolicy(String);

impl std::fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "unknown scheduling policy {:?}: valid are \"rr\", \"none\" and \"sharded\"",
            self.0
        )
    }
}

impl std::error::Error for UnknownPolicy {}

impl FromStr for SchedulingPolicy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        match name {
            "rr" => Ok(Self::RoundRobin),
            "none" => Ok(Self::Shared),
            "sharded" => Ok(Self::Sharded),
            _ => Err(UnknownPolicy(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_names_round_trip() {
        for policy in [
            SchedulingPolicy::RoundRobin,
            SchedulingPolicy::Shared,
            SchedulingPolicy::Sharded,
        ] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        let error = "RR".parse::<SchedulingPolicy>().unwrap_err().to_string();
        assert!(error.contains("\"RR\"") && error.contains("\"rr\"") && error.contains("\"none\""));
    }
}
