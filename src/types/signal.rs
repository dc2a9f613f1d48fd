//! Signals and their names.
//!
//! The numbers are constants of `libc`, because they differ between systems and processors. Only
//! this module and `errno` may name `libc` outside `sys`: a constant is plain data, and `types`
//! depends on no other module, so it cannot take the constants from `sys`.

/// A signal, for [`kill`](crate::WorkerProcess::kill) and [`on_signal`](crate::Master::on_signal).
///
/// Node: strings such as `'SIGTERM'`.
///
/// The default is `TERM`. A signal that has a constant here prints as its name in Node. Any other
/// signal prints as its number, for instance `signal 13`.
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
    ($($name:ident $number:ident $doc:literal)*) => {
        impl Signal {
            $(
                #[doc = concat!("`", stringify!($number), "`: ", $doc, " See [`Signal`] for an example.")]
                pub const $name: Self = Self(libc::$number);
            )*

            /// Returns the signal's number on this system.
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
                    $(Self::$name => f.write_str(stringify!($number)),)*
                    Self(number) => write!(f, "signal {number}"),
                }
            }
        }
    };
}

signals! {
    HUP SIGHUP "hang-up of the terminal; by convention, reload."
    INT SIGINT "interrupt from the keyboard."
    QUIT SIGQUIT "quit from the keyboard."
    KILL SIGKILL "kills a process at once; cannot be handled."
    USR1 SIGUSR1 "reserved for the application."
    USR2 SIGUSR2 "reserved for the application."
    ALRM SIGALRM "expiry of the alarm timer."
    TERM SIGTERM "request to terminate."
    CONT SIGCONT "continues a stopped process."
    STOP SIGSTOP "stops a process; cannot be handled."
    TTIN SIGTTIN "read from the terminal by a background process; by convention, one more worker."
    TTOU SIGTTOU "write to the terminal by a background process; by convention, one worker fewer."
    WINCH SIGWINCH "change of the terminal's size."
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

    /// The highest signal number that a conversion accepts. On Linux and Android, this is the
    /// kernel's SIGRTMAX on all architectures except MIPS, which has 128 signals. Elsewhere, this
    /// is the last standard signal, because the numbers of real-time signals are not constant.
    const MAX: i32 = if cfg!(any(target_os = "linux", target_os = "android")) {
        64
    } else {
        31
    };
}

/// Converts a signal number of the system: 1 to 64 on Linux and Android, and 1 to 31 elsewhere.
///
/// ```
/// use cluster::Signal;
///
/// assert_eq!(Signal::try_from(15), Ok(Signal::TERM));
/// assert!(Signal::try_from(0).is_err());
/// ```
impl TryFrom<i32> for Signal {
    type Error = InvalidSignal;

    fn try_from(number: i32) -> Result<Self, InvalidSignal> {
        if (1..=Self::MAX).contains(&number) {
            Ok(Self(number))
        } else {
            Err(InvalidSignal(number))
        }
    }
}

/// The error for a number that is not a signal number. The field holds the number.
///
/// ```
/// use cluster::{InvalidSignal, Signal};
///
/// let error = Signal::try_from(1000).unwrap_err();
/// assert_eq!(error, InvalidSignal(1000));
/// assert_eq!(error.to_string(), "1000 is not the number of a signal");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidSignal(pub i32);

impl std::fmt::Display for InvalidSignal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is not the number of a signal", self.0)
    }
}

impl std::error::Error for InvalidSignal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_of_signals_are_converted() {
        for number in [1, 15, 31, Signal::MAX] {
            assert_eq!(Signal::try_from(number).map(Signal::number), Ok(number));
        }
        for number in [i32::MIN, -1, 0, Signal::MAX + 1, i32::MAX] {
            assert_eq!(Signal::try_from(number), Err(InvalidSignal(number)));
        }
    }
}
