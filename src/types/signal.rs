//! The signals by name.

use crate::sys::signal as number;

/// A signal, for [`kill`](crate::WorkerProcess::kill) and
/// [`on_signal`](crate::Master::on_signal).
///
/// Node: the strings such as `'SIGTERM'`, which is also how it prints. The default is `TERM`.
///
/// ```
/// use cluster::Signal;
///
/// assert_eq!(Signal::default(), Signal::TERM);
/// assert_eq!(Signal::HUP.to_string(), "SIGHUP");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signal(i32);

macro_rules! signals {
    ($($name:ident $text:literal $doc:literal)*) => {
        impl Signal {
            $(
                #[doc = concat!("`", $text, "`: ", $doc, " See [`Signal`] for an example.")]
                pub const $name: Self = Self(number::$name);
            )*

            /// Returns the system's number of the signal.
            ///
            /// ```
            /// assert_eq!(cluster::Signal::KILL.number(), 9);
            /// ```
            #[must_use]
            pub const fn number(self) -> i32 {
                self.0
            }
        }

        impl std::fmt::Display for Signal {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {
                    $(Self::$name => f.write_str($text),)*
                    Self(number) => write!(f, "signal {number}"),
                }
            }
        }
    };
}

signals! {
    HUP "SIGHUP" "the terminal is gone, or by custom: reload."
    INT "SIGINT" "interrupt from the keyboard."
    QUIT "SIGQUIT" "quit from the keyboard."
    KILL "SIGKILL" "ends a process at once; cannot be handled."
    USR1 "SIGUSR1" "free for the program."
    USR2 "SIGUSR2" "free for the program."
    ALRM "SIGALRM" "the alarm clock."
    TERM "SIGTERM" "please end."
    CONT "SIGCONT" "go on after a stop."
    STOP "SIGSTOP" "stops a process; cannot be handled."
    TTIN "SIGTTIN" "read by a background process; by custom: one worker more."
    TTOU "SIGTTOU" "write by a background process; by custom: one worker fewer."
    WINCH "SIGWINCH" "the terminal's size has changed."
}

impl Default for Signal {
    fn default() -> Self {
        Self::TERM
    }
}

impl Signal {
    pub(crate) const fn from_number(number: i32) -> Self {
        Self(number)
    }
}
