//! The listeners that the processes of the program share.

use std::cell::RefCell;
use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use cluster::{Master, MasterListener, Settings};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::log::{Level, Log};

/// The variable by which a master tells the next one in an upgrade which listeners `--listen` has
/// opened. Its lines are the master's process id and the addresses. All other listeners that the next
/// master receives come from a service manager.
const OPENED: &str = "CLUSTER_SERVE_OPENED";

/// The time for which a port that is in use is tried again. The processes of a master that was killed
/// exit up to one second after it, and keep its ports until then.
const IN_USE_TIMEOUT: Duration = Duration::from_millis(1500);

/// The pause between two attempts to open a port that is in use.
const IN_USE_PAUSE: Duration = Duration::from_millis(100);

pub(crate) type NamedFds = Vec<(String, OwnedFd)>;

/// The listeners of all processes.
///
/// All processes share the mode of a listener, blocking or non-blocking (`O_NONBLOCK` in open(2)). If
/// a new release changes the mode and fails, the old processes would fail too, so the mode is
/// restored.
#[derive(Debug)]
pub(crate) struct Listeners {
    /// Keeps the listeners open, so that clients wait in the backlogs while no process runs.
    retained: RefCell<Vec<MasterListener>>,
    /// A copy of each descriptor that the processes receive.
    copies: RefCell<Vec<OwnedFd>>,
    /// The status flags of each copy before the latest reload or upgrade.
    flags: RefCell<Vec<OFlag>>,
}

impl Listeners {
    /// Opens the listeners. Returns them, and the descriptors that each process receives: first those
    /// that a service manager has passed to this process, then the listeners.
    pub(crate) fn open(
        master: &Master,
        addresses: &[String],
        log: &Log,
    ) -> Result<(Self, NamedFds), Box<dyn Error>> {
        let inherited = opened_by_old_master();
        let mut retained = Vec::new();
        for address in addresses {
            let listener = match address.contains('/') {
                true => {
                    let path = Path::new(address);
                    without_stale_socket(path, || master.listen(path))?
                }
                false => open_port(|| master.listen(address.as_str()))?,
            };
            log.line(
                Level::Info,
                format_args!("listening on {}", listener.address()),
            );
            retained.push(listener);
        }
        let mut fds = NamedFds::new();
        for listener in master.retain_all() {
            // A listener of the old master that this release does not use must not reach the
            // processes. The pool closes it.
            let is_old = inherited.contains(&listener.address().to_string());
            if !listener.is_requested() && !is_old {
                fds.push((listener.name(), listener.as_fd().try_clone_to_owned()?));
            }
        }
        let mut opened = vec![process::id().to_string()];
        for listener in &retained {
            let address = listener.address().to_string();
            let was_passed = listener.has_foreign_copies();
            fds.push(("listen".to_owned(), listener.as_fd().try_clone_to_owned()?));
            if !was_passed {
                // Only the processes of this service receive the copy.
                listener.set_foreign_copies(false);
            }
            if !was_passed || inherited.contains(&address) {
                opened.push(address);
            }
        }
        crate::set_variables(&[(OPENED.into(), opened.join("\n").into())]);
        let copies = fds.iter().map(|(_, fd)| fd.try_clone());
        let listeners = Self {
            retained: RefCell::new(retained),
            copies: RefCell::new(copies.collect::<io::Result<_>>()?),
            flags: RefCell::default(),
        };
        Ok((listeners, fds))
    }

    /// Records the modes of the listeners, with which the present release serves.
    pub(crate) fn record_modes(&self) {
        let copies = self.copies.borrow();
        let flags = copies.iter().map(flags_of).collect();
        self.flags.replace(flags);
    }

    /// Restores the recorded modes. Returns whether a mode had changed.
    pub(crate) fn restore_modes(&self) -> bool {
        let (copies, flags) = (self.copies.borrow(), self.flags.borrow());
        let mut has_changed = false;
        for (copy, flags) in copies.iter().zip(&*flags) {
            if flags_of(copy) != *flags {
                // The call cannot fail for a socket that is open.
                let _ = fcntl(copy, FcntlArg::F_SETFL(*flags));
                has_changed = true;
            }
        }
        has_changed
    }

    /// Closes this process's copies. From then on, the listeners are open only in processes that have
    /// not closed theirs, so no client waits for a process that will never accept it.
    pub(crate) fn close(&self, master: &Master) {
        if self.copies.take().is_empty() {
            return; // They are closed.
        }
        for listener in &*self.retained.borrow() {
            // Let the master close the listener without shutting it down, because a process may still
            // serve the backlog.
            listener.set_foreign_copies(true);
        }
        self.retained.take();
        // The settings contain further copies. No process is started any more.
        master.setup_master(Settings::default().listen_fds(NamedFds::new()));
    }
}

fn flags_of(fd: &OwnedFd) -> OFlag {
    // The call cannot fail for a socket that is open.
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap_or_default();
    OFlag::from_bits_truncate(flags)
}

/// Returns the addresses of the listeners that `--listen` of the old master has opened, if this
/// process is its new master.
fn opened_by_old_master() -> Vec<String> {
    let value = env::var(OPENED).unwrap_or_default();
    let mut lines = value.lines();
    match lines.next() == Some(parent_id().to_string().as_str()) {
        true => lines.map(str::to_owned).collect(),
        false => Vec::new(),
    }
}

fn is_in_use(error: &cluster::Error) -> bool {
    matches!(error, cluster::Error::Listen { reason, .. } | cluster::Error::Io { reason, .. }
        if reason.kind() == io::ErrorKind::AddrInUse)
}

/// Opens a port. If the port is in use, tries again for `IN_USE_TIMEOUT`.
fn open_port<T>(open: impl Fn() -> cluster::Result<T>) -> cluster::Result<T> {
    let end = Instant::now() + IN_USE_TIMEOUT;
    loop {
        match open() {
            Err(error) if is_in_use(&error) && Instant::now() < end => thread::sleep(IN_USE_PAUSE),
            opened => return opened,
        }
    }
}

/// Opens a Unix socket. If its path is in use, removes the file of a socket whose process no longer
/// exists, for example because it was killed, and tries once more.
pub(crate) fn without_stale_socket<T>(
    path: &Path,
    open: impl Fn() -> cluster::Result<T>,
) -> cluster::Result<T> {
    match open() {
        Err(error) if is_in_use(&error) && remove_stale_socket(path) => open(),
        opened => opened,
    }
}

/// Removes the file of a socket on which no process listens. Returns whether it was removed.
fn remove_stale_socket(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    // The kernel refuses the connection only if no process has the socket. A datagram socket cannot
    // connect to a listener, and therefore never waits for space in its backlog (unix(7)).
    let connect = || UnixDatagram::unbound()?.connect(path);
    let is_refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && connect().is_err_and(is_refused) && fs::remove_file(path).is_ok()
}
