//! The kinds of a worker's standard descriptors.

use std::os::fd::OwnedFd;
use std::rc::Rc;

/// The kind of one of a worker's descriptors, for [`Settings::stdio`](crate::Settings::stdio).
///
/// Node: an entry of `settings.stdio`.
///
/// This type is not `Send`. Build it on the thread of the master.
///
/// ```
/// use cluster::{Settings, Stdio};
///
/// # fn f() -> std::io::Result<()> {
/// let log = std::fs::File::create("worker.log")?;
/// let stdio = [Stdio::null(), Stdio::fd(log), Stdio::inherit(), Stdio::pipe()];
/// let settings = Settings::default().stdio(stdio);
/// # let _ = settings;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Stdio(pub(crate) StdioKind);

#[derive(Clone, Debug)]
pub(crate) enum StdioKind {
    Inherit,
    Null,
    Pipe,
    Fd(Rc<OwnedFd>),
}

impl Stdio {
    /// The master's descriptor of the same number.
    ///
    /// Node: `'inherit'`. See [`Stdio`] for an example.
    #[must_use]
    pub fn inherit() -> Self {
        Self(StdioKind::Inherit)
    }

    /// `/dev/null`.
    ///
    /// Node: `'ignore'`. See [`Stdio`] for an example.
    #[doc(alias = "ignore")]
    #[must_use]
    pub fn null() -> Self {
        Self(StdioKind::Null)
    }

    /// One end of a stream whose other end the master has, for
    /// [`Process::take_stdio`](crate::Process::take_stdio). Both ends can be read and written.
    ///
    /// The stream is a socket. The worker cannot open it by a name such as `/dev/stdout`.
    ///
    /// Node: `'pipe'`. See [`Stdio`] for an example.
    #[must_use]
    pub fn pipe() -> Self {
        Self(StdioKind::Pipe)
    }

    /// A descriptor of the master. Each worker gets a copy.
    ///
    /// Node: a number, or a stream. See [`Stdio`] for an example.
    #[must_use]
    pub fn fd(descriptor: impl Into<OwnedFd>) -> Self {
        Self(StdioKind::Fd(Rc::new(descriptor.into())))
    }
}

/// Two descriptors of [`Stdio::fd`] are equal if one value is a clone of the other.
impl PartialEq for Stdio {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (StdioKind::Fd(a), StdioKind::Fd(b)) => Rc::ptr_eq(a, b),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

impl Eq for Stdio {}
