//! The steps of starting a worker.

/// The step at which starting a worker failed, in [`Error::Fork`](crate::Error::Fork).
///
/// Node has no counterpart.
///
/// A step prints as a verb phrase, for instance "execute it" or "change its user".
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// use cluster::{Error, ForkStep};
///
/// if let Err(Error::Fork { step: ForkStep::Execute, program, .. }) = master.fork() {
///     master.give_up(format!("cannot execute {}", program.display()));
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForkStep {
    /// Copying the master for [`Settings::main`](crate::Settings::main). This step fails while the
    /// master has more than one thread.
    CopyMaster,
    /// Creating the channel between the master and the worker.
    Channel,
    /// Calling the closure of [`InspectPort`](crate::InspectPort). This step fails if the closure
    /// forks a worker.
    InspectPort,
    /// Assigning a worker id, which fails once all ids have been used.
    Number,
    /// Checking the arguments, the environment and the settings. For example, this step fails if
    /// two settings exclude each other.
    Prepare,
    /// Preparing the descriptors of [`Settings::stdio`](crate::Settings::stdio) and
    /// [`Settings::listen_fds`](crate::Settings::listen_fds).
    Descriptors,
    /// Creating the process.
    MakeProcess,
    /// Waiting for the worker to start, which fails if the worker does not start in time.
    WaitForStart,
    /// Watching the process for its exit.
    Watch,
    /// Finding the path of the master's own program, which is the default of
    /// [`Settings::exec`](crate::Settings::exec).
    FindProgram,
    /// Executing the program.
    Execute,
    /// Resetting the signal dispositions, or requesting a signal that kills the worker when the
    /// master exits.
    Signals,
    /// Entering the directory of [`Settings::cwd`](crate::Settings::cwd).
    Directory,
    /// Dropping the supplementary groups, or changing the group to
    /// [`Settings::gid`](crate::Settings::gid).
    Groups,
    /// Changing the user to [`Settings::uid`](crate::Settings::uid).
    User,
    /// Giving up the capabilities. A worker with [`Settings::uid`](crate::Settings::uid) keeps none
    /// unless its user is root.
    Capabilities,
    /// Turning the copy of the master into a worker, for [`Settings::main`](crate::Settings::main).
    BecomeWorker,
    /// Starting the session of [`Settings::setsid`](crate::Settings::setsid), or the process group
    /// of a worker with [`Settings::listen_fds`](crate::Settings::listen_fds).
    Session,
}

impl std::fmt::Display for ForkStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CopyMaster => "copy the master",
            Self::Channel => "make a channel",
            Self::InspectPort => "choose its inspect port",
            Self::Number => "assign its id",
            Self::Prepare => "prepare it",
            Self::Descriptors => "prepare its descriptors",
            Self::MakeProcess => "make a process",
            Self::WaitForStart => "wait until it starts",
            Self::Watch => "watch it",
            Self::FindProgram => "find it",
            Self::Execute => "execute it",
            Self::Signals => "prepare its signals",
            Self::Directory => "enter its directory",
            Self::Groups => "change its groups",
            Self::User => "change its user",
            Self::Capabilities => "give up its capabilities",
            Self::BecomeWorker => "make it a worker",
            Self::Session => "begin its session or process group",
        })
    }
}
