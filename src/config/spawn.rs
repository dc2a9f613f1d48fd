//! The options of `fork_as`.

use std::ffi::OsString;

use crate::config::settings::Settings;

/// Settings and environment variables of a process, for
/// [`Master::fork_as`](crate::Master::fork_as).
///
/// Node has no counterpart.
///
/// [`Settings`] convert into options without variables, so `fork_as` also accepts plain settings.
///
/// Like [`Settings`], this type is not `Send`. Build the options on the master's thread.
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
    /// Node has no counterpart.
    ///
    /// See [`SpawnOptions`] for an example.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            env: Vec::new(),
        }
    }

    /// Sets an environment variable of the process. The value replaces an inherited or earlier
    /// value of the variable.
    ///
    /// Node: an entry of the argument of `cluster.fork()`.
    ///
    /// See [`SpawnOptions`] for an example.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets several environment variables, like [`env`](Self::env). If a name occurs more than
    /// once, its last value takes effect.
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
