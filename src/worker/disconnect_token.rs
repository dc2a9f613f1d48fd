//! The disconnect token, which shows from any thread whether the worker is disconnecting.
//!
//! A token is one end of a socketpair. The master shuts its end down when it requests the
//! disconnect, so the token does not depend on the frames that this worker has not read. The worker
//! shuts its own end down when it begins to disconnect for another reason. In both cases, the token
//! stays readable from then on.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::sys::poll::wait_readable;
use crate::worker::Worker;

/// Shows whether the worker is disconnecting, on any thread and at any time.
///
/// Node has no counterpart. The Web has `AbortSignal`.
///
/// [`Worker::disconnect_token`] returns the token. All clones show the same state. The descriptor
/// of [`AsFd`] becomes readable when the worker begins to disconnect, and stays readable. A thread
/// can poll this descriptor together with its connection, but must not read from it.
///
/// A token reports a disconnect under the same conditions as [`Worker::is_disconnecting`]. It may
/// outlive the worker. In a child that the application forked, it shows whether the parent is
/// disconnecting.
///
/// ```no_run
/// # fn f(token: &cluster::DisconnectToken, stream: &std::net::TcpStream) -> nix::Result<bool> {
/// use std::os::fd::AsFd;
/// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
///
/// // Wait for the next request, but stop waiting when the worker disconnects.
/// let mut fds = [stream.as_fd(), token.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
/// poll(&mut fds, PollTimeout::NONE)?;
/// let has_request = fds[0].any() == Some(true);
/// # Ok(has_request) }
/// ```
#[derive(Clone, Debug)]
pub struct DisconnectToken(Arc<State>);

#[derive(Debug)]
struct State {
    socket: UnixStream,
    /// Whether the socket has been found readable. Once this is `true`, it never changes again.
    is_disconnecting: AtomicBool,
}

impl DisconnectToken {
    pub(crate) fn new(socket: UnixStream) -> Self {
        let is_disconnecting = AtomicBool::new(false);
        Self(Arc::new(State {
            socket,
            is_disconnecting,
        }))
    }

    /// Returns whether the worker is disconnecting.
    ///
    /// Node: `AbortSignal.aborted`.
    ///
    /// See [`Worker::is_disconnecting`] for the conditions and the cost.
    ///
    /// ```no_run
    /// # fn f(token: cluster::DisconnectToken) {
    /// std::thread::spawn(move || {
    ///     while !token.is_disconnecting() {
    ///         // Answer one request.
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn is_disconnecting(&self) -> bool {
        let State {
            socket,
            is_disconnecting,
        } = &*self.0;
        // `Relaxed` suffices, because the flag only saves the system call.
        if is_disconnecting.load(Ordering::Relaxed) {
            return true;
        }
        let polled = wait_readable([socket.as_fd()], Some(Duration::ZERO));
        let is_readable = matches!(polled, Ok([true]));
        if is_readable {
            is_disconnecting.store(true, Ordering::Relaxed);
        }
        is_readable
    }

    /// Makes this token and its clones readable. Other processes with a copy share the effect.
    pub(crate) fn mark(&self) {
        self.0.is_disconnecting.store(true, Ordering::Relaxed);
        // Ignore the error, because the shutdown fails only if the master has closed its end, and
        // the token is then readable.
        let _ = self.0.socket.shutdown(Shutdown::Read);
    }
}

impl AsFd for DisconnectToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl Worker {
    /// Returns whether the worker is disconnecting: the master has requested it, the worker has
    /// called [`disconnect`](Self::disconnect) or [`kill`](Self::kill), or the channel to the
    /// master is closing or closed.
    ///
    /// Node has no counterpart.
    ///
    /// The result is true from the moment of the master's request, even if the worker holds a
    /// [`Connection`](crate::Connection) and has not called `accept`, `run` or `dispatch` since. It
    /// never changes back. A server calls this method before each answer, and tells the client to
    /// open a new connection.
    ///
    /// While the result is false, a call costs one poll(2), about 0.2 µs. Afterwards it costs no
    /// system call. Threads, and servers that keep no reference to the worker, use
    /// [`disconnect_token`](Self::disconnect_token).
    ///
    /// ```no_run
    /// # fn read_request(_: &mut cluster::Connection) -> std::io::Result<bool> { Ok(false) }
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::io::Write;
    ///
    /// // An HTTP server with connections that stay open between requests.
    /// for connection in worker.listen(8000)?.incoming() {
    ///     let mut connection = connection?;
    ///     while let Ok(true) = read_request(&mut connection) {
    ///         let is_last = worker.is_disconnecting();
    ///         let option = if is_last { "close" } else { "keep-alive" };
    ///         let head = format!("HTTP/1.1 200 OK\r\nConnection: {option}\r\n");
    ///         let answer = head + "Content-Length: 3\r\n\r\nhi\n";
    ///         if connection.write_all(answer.as_bytes()).is_err() || is_last {
    ///             break;
    ///         }
    ///     }
    ///     connection.finish();
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_disconnecting(&self) -> bool {
        self.inner.shell.disconnect_token.is_disconnecting()
    }

    /// Returns a token that shows whether the worker is disconnecting, for other threads and for
    /// poll(2).
    ///
    /// Node has no counterpart.
    ///
    /// See [`DisconnectToken`] for an example.
    #[must_use]
    pub fn disconnect_token(&self) -> DisconnectToken {
        self.inner.shell.disconnect_token.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn is_send_and_sync<T: Send + Sync>() {}
    const _: () = is_send_and_sync::<DisconnectToken>();

    /// Polls the descriptor and not the flag.
    fn is_readable(token: &DisconnectToken) -> bool {
        wait_readable([token.as_fd()], Some(Duration::ZERO)).unwrap() == [true]
    }

    #[test]
    fn token_is_readable_after_the_master_shuts_its_end_down() {
        let (master, worker) = UnixStream::pair().unwrap();
        let _copy = master.try_clone().unwrap();
        let token = DisconnectToken::new(worker);
        let clone = token.clone();
        assert!(!token.is_disconnecting() && !is_readable(&token));
        master.shutdown(Shutdown::Both).unwrap();
        assert!(token.is_disconnecting() && is_readable(&token));
        assert!(clone.is_disconnecting() && is_readable(&clone));
    }

    #[test]
    fn token_is_readable_after_the_worker_marks_it() {
        let (_master, worker) = UnixStream::pair().unwrap();
        let token = DisconnectToken::new(worker);
        let clone = token.clone();
        token.mark();
        assert!(clone.is_disconnecting() && is_readable(&clone));
        token.mark();
        assert!(is_readable(&clone));
    }
}
