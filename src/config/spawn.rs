//! The argument of `fork_as`.

use std::ffi::OsString;

use crate::config::settings::Settings;

/// The argument of [`Master::fork_as`](crate::Master::fork_as): settings, and variables of the
/// environment.
///
/// Node has no counterpart. A value can also be made from [`Settings`] by [`From`], so that `fork_as`
/// takes settings alone.
///
/// This type is not `Send`, as [`Settings`] is not. Build it on the thread of the master.
///
/// ```no_run
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use cluster::{Settings, SpawnOptions};
///
/// let settings = Settings::default().exec("./cache");
/// master.fork_as(SpawnOptions::new(settings).env("SIZE", "64M").env("RUST_BACKTRACE", "1"))?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct SpawnOptions {
    pub(crate) settings: Settings,
    pub(crate) env: Vec<(OsString, OsString)>,
}

impl SpawnOptions {
    /// Returns options with these settings and no additional variables.
    ///
    /// Node has no counterpart. See [`SpawnOptions`] for an example.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            env: Vec::new(),
        }
    }

    /// Adds a variable to the environment of the process, or replaces one.
    ///
    /// Node: an entry of the argument of `cluster.fork()`. See [`SpawnOptions`] for an example.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Adds several variables, as [`env`](Self::env) adds one. The last value of a name counts.
    ///
    /// Node: the argument of `cluster.fork()`.
    ///
    /// ```
    /// use cluster::{Settings, SpawnOptions};
    ///
    /// let options = SpawnOptions::new(Settings::default()).envs([("A", "1"), ("B", "2")]);
    /// # let _ = options;
    /// ```
    pub fn envs<K: Into<OsString>, V: Into<OsString>>(
        mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let variables = variables.into_iter();
        self.env
            .extend(variables.map(|(k, v)| (k.into(), v.into())));
        self
    }
}

impl From<Settings> for SpawnOptions {
    fn from(settings: Settings) -> Self {
        Self::new(settings)
    }
}
