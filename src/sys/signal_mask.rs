//! Sets of signals, and the signal mask of the calling thread.

use super::platform::MAX_SIGNAL;

/// A set of signal numbers.
#[derive(Clone, Copy)]
pub(crate) struct SignalSet(libc::sigset_t);

impl SignalSet {
    pub(super) fn empty() -> Self {
        // SAFETY: all zeroes is a valid `sigset_t`.
        let mut set = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is valid for writes of a `sigset_t`.
        unsafe { libc::sigemptyset(&raw mut set) };
        Self(set)
    }

    pub(super) fn all() -> Self {
        let mut set = Self::empty();
        // SAFETY: the pointer is valid for writes of a `sigset_t`.
        unsafe { libc::sigfillset(&raw mut set.0) };
        set
    }

    /// Returns the set of one signal, which must exist.
    pub(super) fn only(signal: libc::c_int) -> Self {
        let mut set = Self::empty();
        set.add(signal);
        set
    }

    /// Adds a signal, which must exist.
    pub(super) fn add(&mut self, signal: libc::c_int) {
        // SAFETY: the set is initialized. The call fails only for a signal that does not exist.
        unsafe { libc::sigaddset(&raw mut self.0, signal) };
    }

    /// Returns whether the set contains the signal. Async-signal-safe.
    pub(crate) fn contains(&self, signal: libc::c_int) -> bool {
        // SAFETY: the set is initialized.
        let result = unsafe { libc::sigismember(&raw const self.0, signal) };
        result == 1
    }

    pub(super) fn into_raw(self) -> libc::sigset_t {
        self.0
    }

    pub(super) fn as_ptr(&self) -> *const libc::sigset_t {
        &raw const self.0
    }

    /// Returns the signals that are pending for the process or the calling thread.
    pub(super) fn pending() -> Self {
        let mut set = Self::empty();
        // SAFETY: the pointer is valid for writes of a `sigset_t`.
        unsafe { libc::sigpending(&raw mut set.0) };
        set
    }

    /// Removes a pending signal of this set. Returns whether there was one. The signals must be
    /// blocked on the calling thread.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(super) fn take_pending(&self) -> bool {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the pointers are valid for reads of the set and the time, and the details of the
        // signal are not requested.
        let taken =
            unsafe { libc::sigtimedwait(self.as_ptr(), std::ptr::null_mut(), &raw const now) };
        taken > 0
    }

    /// Blocks the signals of this set on the calling thread. Returns the previous mask.
    pub(super) fn block(&self) -> Self {
        self.change_mask(libc::SIG_BLOCK)
    }

    /// Unblocks the signals of this set on the calling thread. Returns the previous mask.
    pub(super) fn unblock(&self) -> Self {
        self.change_mask(libc::SIG_UNBLOCK)
    }

    /// Makes this set the calling thread's mask. Returns the previous mask.
    pub(super) fn set_as_mask(&self) -> Self {
        self.change_mask(libc::SIG_SETMASK)
    }

    fn change_mask(&self, how: libc::c_int) -> Self {
        let mut previous = *self;
        // SAFETY: both sets are initialized. The call fails only if `how` is invalid.
        unsafe { libc::pthread_sigmask(how, self.as_ptr(), &raw mut previous.0) };
        previous
    }
}

impl Default for SignalSet {
    fn default() -> Self {
        Self::empty()
    }
}

impl std::fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = 1..=libc::c_int::from(MAX_SIGNAL);
        f.debug_set()
            .entries(all.filter(|signal| self.contains(*signal)))
            .finish()
    }
}
