//! What workers are made of, and who gets the connections.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

/// Carries the worker's id from master to worker; consumed by `init`.
pub(crate) const UNIQUE_ID: &str = "CLUSTER_UNIQUE_ID";
/// Carries the number of the channel's descriptor from master to worker; consumed by `init`.
pub(crate) const CHANNEL_FD: &str = "CLUSTER_CHANNEL_FD";
/// Chooses the scheduling policy from outside.
pub(crate) const SCHED_POLICY: &str = "CLUSTER_SCHED_POLICY";

/// Who accepts connections.
///
/// Node: `cluster.SCHED_RR` and `cluster.SCHED_NONE`. The default is round robin. The program
/// chooses with [`Master::set_scheduling_policy`](crate::Master::set_scheduling_policy), its user
/// with the environment variable `CLUSTER_SCHED_POLICY`, whose values `rr` and `none` are what
/// [`FromStr`] reads.
///
/// ```
/// use cluster::SchedulingPolicy;
///
/// assert_eq!("none".parse(), Ok(SchedulingPolicy::Shared));
/// assert_eq!(SchedulingPolicy::default().to_string(), "rr");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SchedulingPolicy {
    /// The master accepts and hands each connection to the next worker that can take one.
    ///
    /// Node: `SCHED_RR`.
    #[default]
    RoundRobin,
    /// The master binds, and the workers accept from the shared listener themselves.
    ///
    /// Node: `SCHED_NONE`.
    Shared,
}

impl std::fmt::Display for SchedulingPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "rr",
            Self::Shared => "none",
        })
    }
}

/// A name of a scheduling policy that is neither `rr` nor `none`.
///
/// It says what was read and what is valid; see [`SchedulingPolicy`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPolicy(String);

impl std::fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "unknown scheduling policy {:?}: valid are \"rr\" and \"none\"",
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
            _ => Err(UnknownPolicy(name.to_owned())),
        }
    }
}

/// What [`Master::fork`](crate::Master::fork) starts.
///
/// Node: `cluster.settings`. A value of this type is also the argument of
/// [`Master::setup_master`](crate::Master::setup_master), where a field left `None` keeps what was
/// set before.
///
/// ```
/// use cluster::Settings;
///
/// let https = Settings::default().exec("./worker").args(["--use", "https"]);
/// assert_eq!(https.exec.as_deref(), Some("./worker".as_ref()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The program of the workers: a path, absolute or relative to the master's directory, without
    /// a search in `PATH`. The default is the master's own program.
    ///
    /// Node: `settings.exec`.
    pub exec: Option<PathBuf>,
    /// The arguments after the program's name. The default is the master's own arguments.
    ///
    /// Node: `settings.args`.
    pub args: Option<Vec<OsString>>,
}

impl Settings {
    /// Sets [`exec`](Self::exec), the program of the workers.
    ///
    /// Node: `settings.exec`. See [`Settings`] for an example.
    #[must_use]
    pub fn exec(mut self, program: impl Into<PathBuf>) -> Self {
        self.exec = Some(program.into());
        self
    }

    /// Sets [`args`](Self::args), the arguments of the workers.
    ///
    /// Node: `settings.args`. See [`Settings`] for an example.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args = Some(args.into_iter().map(Into::into).collect());
        self
    }

    /// Takes over what `later` sets and keeps the rest.
    pub(crate) fn update(&mut self, later: Self) {
        self.exec = later.exec.or(self.exec.take());
        self.args = later.args.or(self.args.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_accumulate() {
        let mut settings = Settings::default();
        settings.update(Settings::default().exec("a").args(["1"]));
        settings.update(Settings::default());
        settings.update(Settings::default().exec("b"));
        assert_eq!(settings, Settings::default().exec("b").args(["1"]));
    }

    #[test]
    fn policy_names() {
        for policy in [SchedulingPolicy::RoundRobin, SchedulingPolicy::Shared] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        let error = "RR".parse::<SchedulingPolicy>().unwrap_err().to_string();
        assert!(error.contains("\"RR\"") && error.contains("\"rr\"") && error.contains("\"none\""));
    }
}
