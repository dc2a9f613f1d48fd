//! The process of a worker, seen from the master.

use std::os::unix::net::UnixStream;
use std::process::ExitStatus;

use crate::master::worker_process::WorkerProcess;
use crate::sys::process::Usage;
use crate::types::signal::Signal;

/// The process of a worker: its id, signals, channel, pipes, exit status and resource usage.
///
/// Node: `worker.process`, a `ChildProcess`.
///
/// See [`WorkerProcess::process`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct Process<'a>(&'a WorkerProcess);

impl<'a> Process<'a> {
    pub(super) fn new(worker: &'a WorkerProcess) -> Self {
        Self(worker)
    }
}

impl Process<'_> {
    /// Returns the process id. The system does not give the id to another process until the master,
    /// or other code in the master's process, has waited for the exited worker.
    ///
    /// Node: `worker.process.pid`.
    ///
    /// See [`WorkerProcess::process`] for an example.
    #[doc(alias = "pid")]
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.worker_io().pid.number()
    }

    /// Sends `signal` at once, without disconnecting the worker first.
    ///
    /// Node: `worker.process.kill(signal)`.
    ///
    /// The signal does not count as a disconnect request
    /// ([`exited_after_disconnect`](WorkerProcess::exited_after_disconnect)). Nothing happens if
    /// the process has already exited.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().kill(cluster::Signal::KILL);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.0.update(|core| core.signal(self.0.id(), signal));
    }

    /// Closes the channel without a disconnect request. In a worker that has not received such a
    /// request before, `run` and `accept` then return at once, even if connections are open.
    ///
    /// Node: `worker.process.disconnect()`.
    ///
    /// The call does not count as a disconnect request
    /// ([`exited_after_disconnect`](WorkerProcess::exited_after_disconnect)). Connections in flight
    /// to the worker go to other workers.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().disconnect();
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.0.update(|core| core.close_channel(self.0.id()));
    }

    /// Takes the master's end of the pipe that is the worker's descriptor `number`. Descriptor 0 is
    /// standard input, 1 is standard output, and 2 is standard error.
    ///
    /// Node: `worker.process.stdin`, `stdout`, `stderr` and `stdio[number]`.
    ///
    /// Returns `None` if the descriptor is not a pipe, or if the end has already been taken.
    ///
    /// [`Settings::silent`](crate::Settings::silent) and
    /// [`Settings::stdio`](crate::Settings::stdio) create the pipes. As in Node, each pipe is a
    /// socket, so the end can be read, written and [`watch`](crate::Master::watch)ed. Like any new
    /// stream, the end blocks. A worker whose pipe is full waits until the master reads. After the
    /// worker's `exit` event, the master closes the ends that were not taken.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::io::Read;
    /// use cluster::{Interest, Settings};
    ///
    /// master.setup_master(Settings::default().silent(true));
    /// if let Some(output) = master.fork()?.process().take_stdio(1) {
    ///     master.watch(output, Interest::Readable, |_, mut output| {
    ///         let mut bytes = [0; 4096];
    ///         let length = output.read(&mut bytes).ok().filter(|length| *length > 0)?;
    ///         print!("{}", String::from_utf8_lossy(&bytes[..length]));
    ///         Some(Interest::Readable)
    ///     })?;
    /// }
    /// # Ok(()) }
    /// ```
    #[doc(alias = "stdout")]
    #[must_use]
    pub fn take_stdio(&self, number: usize) -> Option<UnixStream> {
        self.0.worker_io().stdio.borrow_mut().remove(&number)
    }

    /// Lets [`Master::run`](crate::Master::run) return although this worker exists. The worker
    /// continues to run until the master is dropped or the master's process exits.
    ///
    /// Node: `worker.process.unref()` and `worker.process.channel.unref()`.
    ///
    /// A [detached](crate::Settings::detached) process is initially unreferenced.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.fork()?.process().unreference();
    /// # Ok(()) }
    /// ```
    #[doc(alias = "unref")]
    pub fn unreference(&self) {
        self.0.update(|core| core.reference(self.0.id(), false));
    }

    /// Makes [`Master::run`](crate::Master::run) wait for the process, which undoes
    /// [`unreference`](Self::unreference).
    ///
    /// Node: `worker.process.ref()`.
    ///
    /// See [`unreference`](Self::unreference) for an example of its effect.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.0.update(|core| core.reference(self.0.id(), true));
    }

    /// Returns the process's exit status, or `None` until the process has exited.
    ///
    /// Node: `worker.process.exitCode` and `worker.process.signalCode`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, status| {
    ///     assert_eq!(worker.process().exit_status(), Some(status));
    /// });
    /// # }
    /// ```
    #[doc(alias = "exitCode")]
    #[doc(alias = "signalCode")]
    #[must_use]
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.0.exit_status()
    }

    /// Returns the resources that the process used.
    ///
    /// Node has no counterpart: in Node, a process can read only its own usage, with
    /// `process.resourceUsage()`.
    ///
    /// Returns `None` until the process has exited. Also returns `None` if other code in the master
    /// waited for the process.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// master.on_exit(move |_, worker, _| {
    ///     if let Some(usage) = worker.process().usage() {
    ///         let time = usage.user_cpu_time + usage.system_cpu_time;
    ///         log.line(format_args!("{}: {time:?}, {} KiB", worker.id(), usage.max_rss >> 10));
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.0.worker_io().usage.get()
    }
}
