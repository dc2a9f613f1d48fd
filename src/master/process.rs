//! The process of a worker, as the master sees it.

use std::os::unix::net::UnixStream;
use std::process::ExitStatus;

use crate::master::worker_process::WorkerProcess;
use crate::sys::process::Usage;
use crate::types::signal::Signal;

/// The process of a worker, as the system knows it.
///
/// Node: `worker.process`, a `ChildProcess`. See [`WorkerProcess::process`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct Process<'a>(&'a WorkerProcess);

impl<'a> Process<'a> {
    pub(super) fn new(worker: &'a WorkerProcess) -> Self {
        Self(worker)
    }
}

impl Process<'_> {
    /// Returns the process id. The system gives it to no other process before the worker's `exit` event.
    ///
    /// Node: `worker.process.pid`. See [`WorkerProcess::process`] for an example.
    #[doc(alias = "pid")]
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.worker_io().pid.number()
    }

    /// Sends `signal` at once, without disconnecting the worker first. The exit is not treated as
    /// voluntary.
    ///
    /// Node: `worker.process.kill(signal)`. Nothing happens if the process has exited.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().kill(cluster::Signal::KILL);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.0.update(|core| core.signal(self.0.id(), signal));
    }

    /// Closes the channel without a request to disconnect: the worker exits at once, and the exit is not
    /// treated as voluntary.
    ///
    /// Node: `worker.process.disconnect()`. Connections in flight to the worker go to other workers.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().disconnect();
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.0.update(|core| core.close_channel(self.0.id()));
    }

    /// Takes the master's end of the pipe that is the worker's descriptor `number`: 0 for standard input,
    /// 1 for standard output, 2 for standard error, or a higher number. It is `None` if the descriptor is
    /// not a pipe, or if the end has been taken already.
    ///
    /// [`Settings::silent`](crate::Settings::silent) and [`Settings::stdio`](crate::Settings::stdio)
    /// make the pipes. Each is a socket, as in Node: it can be read and written, and
    /// [`watch`](crate::Master::watch)ed. It blocks, like any new stream. A worker whose pipe is full waits
    /// until the master reads. An end that has not been taken is closed after the worker's `exit` event.
    ///
    /// Node: `worker.process.stdin`, `stdout`, `stderr` and `stdio[number]`.
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

    /// Lets [`Master::run`](crate::Master::run) return although this worker exists. The worker runs until
    /// the master's process exits.
    ///
    /// Node: `worker.process.unref()`, together with that of its channel. A
    /// [detached](crate::Settings::detached) process is unreferenced from the beginning.
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

    /// Makes [`Master::run`](crate::Master::run) wait for the process: undoes
    /// [`unreference`](Self::unreference), which has an example.
    ///
    /// Node: `worker.process.ref()`.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.0.update(|core| core.reference(self.0.id(), true));
    }

    /// Returns how the process exited, or `None` as long as it has not.
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

    /// Returns the resources that the process used during its life. It is `None` until the process has
    /// exited, and if other code in the master waited for it.
    ///
    /// Node has no counterpart; a process can get its own by `process.resourceUsage()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, _| {
    ///     if let Some(usage) = worker.process().usage() {
    ///         let time = usage.user_cpu_time + usage.system_cpu_time;
    ///         println!("worker {}: {time:?}, {} KiB", worker.id(), usage.max_rss >> 10);
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.0.worker_io().usage.get()
    }
}
