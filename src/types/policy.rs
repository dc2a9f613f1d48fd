//! The policy by which connections are distributed to the workers.

use std::str::FromStr;

/// The policy by which connections are distributed to the workers.
///
/// Node: `cluster.SCHED_RR` and `cluster.SCHED_NONE`.
///
/// The default is round robin. The user selects another policy with the environment variable
/// `CLUSTER_SCHED_POLICY`, whose value is `rr`, `none` or `sharded`. The application selects one
/// with [`Master::set_scheduling_policy`](crate::Master::set_scheduling_policy), which takes
/// precedence. [`FromStr`] parses the values of the variable.
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
    /// The master binds the listener, and all workers accept connections from it.
    ///
    /// Node: `SCHED_NONE`.
    #[doc(alias = "SCHED_NONE")]
    Shared,
    /// Each worker has its own listener on the same port (`SO_REUSEPORT`), and the kernel selects a
    /// listener at random for each connection. The master keeps a copy of each listener. If a
    /// worker exits, its replacement therefore receives the connections that were waiting in the
    /// worker's listener.
    ///
    /// Only TCP listeners that the master itself opens on Linux are sharded. All other listeners
    /// are shared.
    ///
    /// Node has no counterpart in a cluster, but its servers have the option `reusePort`.
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

/// The error returned when a [`SchedulingPolicy`] is parsed from an unknown name.
///
/// The error's text contains the invalid name and the valid names.
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
