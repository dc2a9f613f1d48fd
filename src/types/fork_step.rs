//! The steps of starting a worker.

/// The step of starting a worker that failed, in [`Error::Fork`](crate::Error::Fork).
///
/// Node has no counterpart. It prints as a verb phrase, for instance "execute it" or "change its user".
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// use cluster::{Error, ForkStep};
///
/// if let Err(Error::Fork { step: ForkStep::Execute, program, .. }) = master.fork() {
///     eprintln!("cannot execute {}", program.display());
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForkStep {
    /// The master has other threads, which forbids [`Settings::main`](crate::Settings::main).
    CopyMaster,
    /// The channel between the master and the worker.
    Channel,
    /// The closure of [`InspectPort`](crate::InspectPort) forked a worker.
    InspectPort,
    /// All numbers of workers have been used.
    Number,
    /// The arguments, the environment, or settings that exclude each other.
    Prepare,
    /// The descriptors of [`Settings::stdio`](crate::Settings::stdio) and
    /// [`Settings::listen_fds`](crate::Settings::listen_fds).
    Descriptors,
    /// The system could not make a process.
    MakeProcess,
    /// The worker did not start in time, or the master could not wait for it.
    WaitForStart,
    /// The master cannot watch the process for its exit.
    Watch,
    /// The program cannot be executed.
    Execute,
    /// The signal dispositions, or the request to be killed when the master exits.
    Signals,
    /// The directory of [`Settings::cwd`](crate::Settings::cwd).
    Directory,
    /// The groups of [`Settings::gid`](crate::Settings::gid).
    Groups,
    /// The user of [`Settings::uid`](crate::Settings::uid).
    User,
    /// The capabilities, which a worker of another user does not keep.
    Capabilities,
    /// The copy of the master could not become a worker ([`Settings::main`](crate::Settings::main)).
    BecomeWorker,
    /// The session of [`Settings::setsid`](crate::Settings::setsid).
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
            Self::Execute => "execute it",
            Self::Signals => "prepare its signals",
            Self::Directory => "enter its directory",
            Self::Groups => "change its groups",
            Self::User => "change its user",
            Self::Capabilities => "give up its capabilities",
            Self::BecomeWorker => "make it a worker",
            Self::Session => "begin its session",
        })
    }
}
