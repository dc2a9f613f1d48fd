//! How a later value of [`Settings`] changes an earlier one, and how a setting without a value gets
//! its default.

use std::path::Path;

use crate::config::settings::Settings;

/// The choice that a [`Settings`] value makes for one setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Choice<T> {
    /// No choice, so `update` keeps the previous choice.
    #[default]
    Unmentioned,
    /// The default, which replaces any earlier choice.
    Default,
    Value(T),
}

impl<T> Choice<T> {
    pub(super) fn get(&self) -> Option<&T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Unmentioned | Self::Default => None,
        }
    }

    /// Replaces this choice if `later` mentions the setting.
    fn update(&mut self, later: Self) {
        match later {
            Self::Unmentioned => {}
            Self::Default | Self::Value(_) => *self = later,
        }
    }

    fn fill(&mut self, default: impl FnOnce() -> T) {
        if self.get().is_none() {
            *self = Self::Value(default());
        }
    }

    /// Removes the mark that `unset` has left. `complete` calls this method for the settings that
    /// may stay without a value.
    fn settle(&mut self) {
        if matches!(self, Self::Default) {
            *self = Self::Unmentioned;
        }
    }
}

/// The name of a setting, for [`Settings::unset`].
///
/// Node has no counterpart.
///
/// See [`Settings::unset`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Setting {
    /// [`Settings::exec`]. The default is the master's own program.
    Exec,
    /// [`Settings::exec_args`]. The default is no arguments.
    ExecArgs,
    /// [`Settings::args`]. The default is the master's own arguments.
    Args,
    /// [`Settings::cwd`]. The default is the master's working directory.
    Cwd,
    /// [`Settings::silent`]. The default is `false`.
    Silent,
    /// [`Settings::stdio`]. By default, `silent` decides.
    Stdio,
    /// [`Settings::listen_fds`]. The default is no descriptors.
    ListenFds,
    /// [`Settings::detached`]. The default is `false`.
    Detached,
    /// [`Settings::setsid`]. The default is `true` for a detached process and `false` for a worker.
    Setsid,
    /// [`Settings::uid`]. The default is the master's user.
    Uid,
    /// [`Settings::gid`]. The default is the master's groups.
    Gid,
    /// [`Settings::inspect_port`]. The default is no port.
    InspectPort,
    /// [`Settings::main`]. By default, workers execute a program.
    Main,
}

impl Settings {
    /// Restores the default of a setting.
    ///
    /// Node has no counterpart.
    ///
    /// If the result is passed to [`Master::setup_master`](crate::Master::setup_master), the
    /// default replaces the setting's earlier value. A later call of the setting's own method
    /// overrides `unset`.
    ///
    /// ```
    /// use cluster::{Setting, Settings};
    ///
    /// let settings = Settings::default().cwd("/srv").silent(true);
    /// let settings = settings.unset(Setting::Cwd);
    /// assert_eq!(settings.get_cwd(), None);
    /// assert_eq!(settings.get_silent(), Some(true));
    /// ```
    #[must_use]
    pub fn unset(mut self, setting: Setting) -> Self {
        match setting {
            Setting::Exec => self.exec = Choice::Default,
            Setting::ExecArgs => self.exec_args = Choice::Default,
            Setting::Args => self.args = Choice::Default,
            Setting::Cwd => self.cwd = Choice::Default,
            Setting::Silent => self.silent = Choice::Default,
            Setting::Stdio => self.stdio = Choice::Default,
            Setting::ListenFds => self.listen_fds = Choice::Default,
            Setting::Detached => self.detached = Choice::Default,
            Setting::Setsid => self.setsid = Choice::Default,
            Setting::Uid => self.uid = Choice::Default,
            Setting::Gid => self.gid = Choice::Default,
            Setting::InspectPort => self.inspect_port = Choice::Default,
            Setting::Main => self.main = Choice::Default,
        }
        self
    }

    /// Fills in defaults where a setting must have a value, and removes the marks of `unset`.
    /// `own_program` is the default of `exec`. If it is `None`, `exec` may stay without a value.
    pub(crate) fn complete(mut self, own_program: Option<&Path>) -> Self {
        match own_program {
            Some(path) => self.exec.fill(|| path.to_owned()),
            None => self.exec.settle(),
        }
        self.args.fill(|| std::env::args_os().skip(1).collect());
        self.exec_args.fill(Vec::new);
        self.silent.fill(|| false);
        self.cwd.settle();
        self.stdio.settle();
        self.listen_fds.settle();
        self.detached.settle();
        self.setsid.settle();
        self.uid.settle();
        self.gid.settle();
        self.inspect_port.settle();
        self.main.settle();
        self
    }

    /// Replaces the settings that `later` mentions. The other settings keep their values.
    pub(crate) fn update(&mut self, later: Self) {
        // A later `exec` cancels an earlier `main`. If `later` has its own `main`, the last line of
        // this function sets it.
        if later.exec.get().is_some() {
            self.main = Choice::Unmentioned;
        }
        self.exec.update(later.exec);
        self.exec_args.update(later.exec_args);
        self.args.update(later.args);
        self.cwd.update(later.cwd);
        self.silent.update(later.silent);
        self.stdio.update(later.stdio);
        self.listen_fds.update(later.listen_fds);
        self.detached.update(later.detached);
        self.setsid.update(later.setsid);
        self.uid.update(later.uid);
        self.gid.update(later.gid);
        self.inspect_port.update(later.inspect_port);
        self.main.update(later.main);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::config::stdio::Stdio;

    #[test]
    fn later_of_exec_and_main_takes_effect() {
        let mut settings = Settings::default();
        settings.update(Settings::default().main(|_| 0));
        settings.update(Settings::default().cwd("/"));
        assert!(settings.has_main());
        settings.update(Settings::default().exec("a"));
        assert!(!settings.has_main());
        settings.update(Settings::default().exec("b").main(|_| 0));
        assert!(settings.has_main());
        settings.update(Settings::default().main(|_| 0).exec("c"));
        assert!(!settings.has_main());
    }

    #[test]
    fn updates_accumulate() {
        let mut settings = Settings::default();
        settings.update(Settings::default().exec("a").args(["1"]));
        settings.update(Settings::default());
        settings.update(Settings::default().exec("b").exec_args(["0"]).cwd("/"));
        settings.update(Settings::default().silent(true).uid(1).gid(2));
        let all = Settings::default().exec("b").args(["1"]).exec_args(["0"]);
        assert_eq!(settings, all.cwd("/").silent(true).uid(1).gid(2));
    }

    const ALL: [Setting; 13] = [
        Setting::Exec,
        Setting::ExecArgs,
        Setting::Args,
        Setting::Cwd,
        Setting::Silent,
        Setting::Stdio,
        Setting::ListenFds,
        Setting::Detached,
        Setting::Setsid,
        Setting::Uid,
        Setting::Gid,
        Setting::InspectPort,
        Setting::Main,
    ];

    /// Returns whether each setting has a value, in the order of `ALL`.
    fn are_set(settings: &Settings) -> [bool; 13] {
        [
            settings.get_exec().is_some(),
            settings.get_exec_args().is_some(),
            settings.get_args().is_some(),
            settings.get_cwd().is_some(),
            settings.get_silent().is_some(),
            settings.get_stdio().is_some(),
            settings.get_listen_fds().is_some(),
            settings.get_detached().is_some(),
            settings.get_setsid().is_some(),
            settings.get_uid().is_some(),
            settings.get_gid().is_some(),
            settings.get_inspect_port().is_some(),
            settings.has_main(),
        ]
    }

    fn every_setting() -> Settings {
        let settings = Settings::default().exec("a").exec_args(["b"]).args(["c"]);
        let settings = settings.cwd("/").silent(true).stdio([Stdio::null()]);
        let no_fds: [(&str, OwnedFd); 0] = [];
        let settings = settings.listen_fds(no_fds).detached(true).setsid(true);
        settings.uid(1).gid(2).inspect_port(3).main(|_| 0)
    }

    #[test]
    fn unset_removes_one_value_and_leaves_the_others() {
        assert_eq!(are_set(&every_setting()), [true; 13]);
        for (index, setting) in ALL.into_iter().enumerate() {
            let mut expected = [true; 13];
            expected[index] = false;
            assert_eq!(
                are_set(&every_setting().unset(setting)),
                expected,
                "{setting:?}"
            );
            let mut updated = every_setting();
            updated.update(Settings::default().unset(setting));
            assert_eq!(are_set(&updated), expected, "{setting:?} by update");
        }
    }

    #[test]
    fn setting_after_unset_has_the_new_value() {
        let mut settings = Settings::default().cwd("/");
        settings.update(Settings::default().unset(Setting::Cwd).cwd("/srv"));
        assert_eq!(settings.get_cwd(), Some(Path::new("/srv")));
    }

    #[test]
    fn unset_settings_get_their_defaults_on_completion() {
        let settings = every_setting();
        let unset = ALL
            .into_iter()
            .fold(settings, Settings::unset)
            .complete(None);
        let fresh = Settings::default().complete(None);
        assert_eq!(unset, fresh);
        assert_eq!(unset.get_silent(), Some(false));
    }
}
