//! Starts workers and detached processes.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

use super::group::GroupState;
use super::{MasterShell, WorkerIo};
use crate::config::env::{CHANNEL_FD, INSPECT_PORT, UNIQUE_ID, WORKER_PID, WRAPPED};
use crate::config::inspect_port::InspectPort;
use crate::config::settings::Settings;
use crate::config::stdio::StdioKind;
use crate::master::{Launch, Master};
use crate::runtime::event_loop::EventLoop;
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::poll::{Interest, Registered};
use crate::sys::process::{Failure, ForkedProcess, Pid, Program};
use crate::sys::shared_number::SharedNumber;
use crate::systemd::{self, LISTEN_PID};
use crate::types::errno;
use crate::types::fork_step::ForkStep;
use crate::types::sorted_map::SortedMap;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::Channel;
use crate::wire::driver::ChannelDriver;
use crate::wire::fault;
use crate::wire::frame::preamble::preamble;
use crate::wire::frame::{ToMaster, ToWorker};
use crate::worker::worker_main::WorkerMain;

/// Returns a function that adds the failed step to a system error.
fn failed(step: ForkStep) -> impl FnOnce(io::Error) -> Failure {
    move |reason| (step, reason)
}

/// A guard that clears a flag when it is dropped, even after a panic.
struct Reset<'a>(&'a Cell<bool>);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// The inputs and resources that the master prepares before it starts a process.
pub(crate) struct NewProcess<'a> {
    id: WorkerId,
    settings: &'a Settings,
    launch: &'a Launch,
    /// The additional environment variables.
    extra: Vec<(OsString, OsString)>,
    inspect_port: Option<u16>,
    stdio: StdioEnds,
    channel: Channel<ToMaster, ToWorker>,
    /// The master's end of the worker's disconnect token.
    disconnect_notifier: UnixStream,
    in_service: Option<SharedNumber>,
    /// The worker's end of the channel. Its descriptor number is higher than those that `stdio`
    /// will have in the worker.
    worker_end: OwnedFd,
}

/// The master's ends of a worker's channel, disconnect token and shared number, and the worker's
/// end of the channel.
struct OpenedChannel {
    channel: Channel<ToMaster, ToWorker>,
    disconnect_notifier: UnixStream,
    in_service: Option<SharedNumber>,
    worker_end: OwnedFd,
}

impl MasterShell {
    /// Starts a worker or a detached process.
    ///
    /// If the kernel has no process descriptors, `watch_children` is called to make SIGCHLD wake up
    /// the loop. A worker that executes no program makes `event_loop` forget its watches.
    pub(crate) fn fork(
        &self,
        settings: &Settings,
        extra: Vec<(OsString, OsString)>,
        launch: &Launch,
        watch_children: impl FnOnce() -> io::Result<()>,
        event_loop: &EventLoop<Master>,
    ) -> Result<Rc<WorkerIo>, Failure> {
        self.unreaped.reap();
        // Call the application's closure before the worker gets its id: the closure may itself fork
        // a worker, which would otherwise get the same id.
        let inspect_port = settings.get_inspect_port();
        let inspect_port = inspect_port.map(|port| self.choose_port(port)).transpose();
        let inspect_port = inspect_port.map_err(failed(ForkStep::InspectPort))?;
        // Check for threads after the closure, because the closure may have started one.
        if settings.get_main().is_some() && sys::threads::has_other_threads() == Some(true) {
            let reason = "the master has other threads, whose locks the copy would hold forever";
            let error = io::Error::new(io::ErrorKind::Deadlock, reason);
            return Err((ForkStep::CopyMaster, error));
        }
        let id = self.core.borrow().next_worker_id();
        let used_up = || io::Error::other("all worker ids have been used");
        let id = id.ok_or_else(|| (ForkStep::Number, used_up()))?;
        let stdio = StdioEnds::new(settings).map_err(failed(ForkStep::Descriptors))?;
        let opened = self.open_channel(id, stdio.first_free);
        let opened = opened.map_err(failed(ForkStep::Channel))?;
        let mut new = NewProcess {
            id,
            settings,
            launch,
            extra,
            inspect_port,
            stdio,
            channel: opened.channel,
            disconnect_notifier: opened.disconnect_notifier,
            in_service: opened.in_service,
            worker_end: opened.worker_end,
        };
        let ForkedProcess { pid, process } = match settings.get_main() {
            Some(main) => (main.start)(self, &mut new, main, event_loop)?,
            None => self.start_program(&mut new)?,
        };
        let process = match process {
            Some(fd) => {
                let key = Token::Process(id.get()).key();
                self.poller.add(fd, key, Some(Interest::Readable)).map(Some)
            }
            None => watch_children().map(|()| None),
        };
        let process = process.map_err(|error| {
            // Discard the process, because the master would not notice its exit.
            pid.discard(None, &self.unreaped);
            (ForkStep::Watch, error)
        })?;
        Ok(self.add_process(new, pid, process))
    }

    /// Adds a started process to the core and to the table.
    fn add_process(
        &self,
        new: NewProcess<'_>,
        pid: Pid,
        process: Option<Registered<OwnedFd>>,
    ) -> Rc<WorkerIo> {
        let id = new.id;
        let (channel, disconnect_notifier) = if new.settings.is_detached() {
            self.core.borrow_mut().detached(id);
            if process.is_none() {
                self.sigchld_only.borrow_mut().insert(id);
            }
            // Drop the channel, because the other end was closed when the program was executed.
            (None, None)
        } else {
            let own = sys::process::user::effective();
            let user = User {
                uid: new.settings.get_uid().unwrap_or(own.uid),
                gid: new.settings.get_gid().unwrap_or(own.gid),
            };
            self.core.borrow_mut().forked(id, user);
            (Some(new.channel), Some(new.disconnect_notifier))
        };
        let worker_io = Rc::new(WorkerIo {
            id,
            pid,
            channel: ChannelDriver::new(Some(id), channel),
            disconnect_notifier: RefCell::new(disconnect_notifier),
            in_service: new.in_service,
            process: RefCell::new(process),
            stdio: RefCell::new(new.stdio.master),
            usage: Cell::new(None),
            exit_report: Cell::new(None),
            group: Cell::new(match new.settings.leads_group() {
                true => GroupState::Running,
                false => GroupState::None,
            }),
        });
        self.workers.borrow_mut().insert(id, Rc::clone(&worker_io));
        worker_io
    }

    /// Creates a channel, a disconnect token and a shared number. The descriptor number of the
    /// worker's end is at least `lowest`.
    ///
    /// The channel contains the preamble, and with it the worker's end of the token and the file of
    /// the shared number.
    fn open_channel(&self, id: WorkerId, lowest: RawFd) -> io::Result<OpenedChannel> {
        let (master_end, worker_end) = UnixStream::pair()?;
        master_end.set_nonblocking(true)?;
        // Ignore the error, because a system without this option has no out-of-band data either.
        let _ = sys::socket::enable_oob_inline(&master_end);
        let (notifier, token) = UnixStream::pair()?;
        token.set_nonblocking(true)?;
        let (in_service, file) = SharedNumber::create().unzip();
        let file = file.as_ref().map(OwnedFd::as_fd);
        let fds: Vec<_> = [token.as_fd()].into_iter().chain(file).collect();
        // One call suffices, because an empty socket has space for the whole preamble.
        sys::socket::send(&master_end, &preamble(id), &fds)?;
        drop(token);
        let key = Token::Channel(id.get()).key();
        let channel = Channel::new(master_end, &self.poller, key)?;
        let worker_end = sys::fd::duplicate(worker_end.as_raw_fd(), lowest)?;
        Ok(OpenedChannel {
            channel,
            disconnect_notifier: notifier,
            in_service,
            worker_end,
        })
    }

    /// Spawns a process that executes a program.
    fn start_program(&self, new: &mut NewProcess<'_>) -> Result<ForkedProcess, Failure> {
        let settings = new.settings;
        let number = new.worker_end.as_raw_fd();
        let env = environment(new, number).map_err(failed(ForkStep::Descriptors))?;
        let exec = settings.get_exec().ok_or_else(|| {
            let reason = "no path leads to this program: set `Settings::exec`";
            let error = io::Error::new(io::ErrorKind::NotFound, reason);
            (ForkStep::FindProgram, error)
        })?;
        let is_own = new.launch.own_program.as_deref() == Some(exec);
        let program = program(settings, exec, is_own, env);
        let mut program = program.map_err(failed(ForkStep::Prepare))?;
        program.stdio(std::mem::take(&mut new.stdio.worker));
        program.ignore(self.ignored_signals);
        if settings.is_detached() {
            program.detach();
        } else {
            program.pid_variable(WORKER_PID);
        }
        if !settings.passed_fds().is_empty() {
            program.pid_variable(LISTEN_PID);
        }
        program.spawn(number, &self.unreaped)
    }

    /// Returns the next inspect port.
    fn choose_port(&self, port: &InspectPort) -> io::Result<u16> {
        // Reject a nested call. If the closure forks a worker, the choice of that worker's port
        // would call the closure again, without end.
        if self.is_choosing_port.replace(true) {
            let reason = "the closure that chooses it forks a worker";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
        }
        let _choosing = Reset(&self.is_choosing_port);
        Ok(port.next())
    }
}

/// The type of [`start_main`].
pub(crate) type StartMain = fn(
    &MasterShell,
    &mut NewProcess<'_>,
    &WorkerMain,
    &EventLoop<Master>,
) -> Result<ForkedProcess, Failure>;

/// Forks a worker that runs a closure in a copy of the master's memory.
pub(crate) fn start_main(
    shell: &MasterShell,
    new: &mut NewProcess<'_>,
    main: &WorkerMain,
    event_loop: &EventLoop<Master>,
) -> Result<ForkedProcess, Failure> {
    let settings = new.settings;
    let invalid = || io::ErrorKind::InvalidInput;
    if !settings.passed_fds().is_empty() || settings.is_detached() {
        let reason = "listen_fds and detached are for programs that are executed";
        return Err((ForkStep::Prepare, io::Error::new(invalid(), reason)));
    }
    if !new.extra.iter().all(|(k, v)| sys::env::is_valid(k, v)) {
        return Err((ForkStep::Prepare, invalid().into()));
    }
    let mut child = Program::default();
    apply_cwd_and_ids(&mut child, settings).map_err(failed(ForkStep::Prepare))?;
    child.ignore(shell.ignored_signals);
    child.stdio(std::mem::take(&mut new.stdio.worker));
    // Flush standard output first, because the worker would otherwise print the buffered output
    // a second time.
    let _ = std::io::stdout().flush();
    let abandon = || {
        let inert = sys::fd::inert()?;
        let mut numbers = shell.abandon(inert.as_fd())?;
        // Replace these descriptors and do not close them, because the application may have
        // other handles of them. The handles would otherwise use or close whatever descriptor
        // receives the freed number.
        for number in event_loop.abandon_watches() {
            sys::fd::replace(number, inert.as_fd())?;
        }
        // Return these descriptors too, so that the child closes them. Their owners are in
        // stack frames to which the child does not return, so no destructor closes them.
        numbers.extend(new.channel.descriptors().iter().map(AsRawFd::as_raw_fd));
        numbers.push(new.disconnect_notifier.as_raw_fd());
        numbers.extend(new.stdio.master.values().map(AsRawFd::as_raw_fd));
        numbers.extend(settings.descriptors());
        Ok(numbers)
    };
    let number = new.worker_end.as_raw_fd();
    let begin = || {
        systemd::remove_variables();
        fault::point("begin", || Some(Pid::own()), Some(&new.channel));
        for (name, value) in &new.extra {
            sys::env::set(name, value);
        }
        let worker =
            (new.launch.become_worker)(new.id, new.inspect_port, number).map_err(|error| {
                io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(errno::EINVAL))
            })?;
        Ok(|| main.run(worker))
    };
    child.fork(number, &shell.unreaped, abandon, begin)
}

/// Returns the environment of a new process, without the variables that contain its process id.
/// `number` is the number of its channel's descriptor.
fn environment(
    new: &mut NewProcess<'_>,
    number: RawFd,
) -> io::Result<SortedMap<OsString, OsString>> {
    let passed = new.settings.passed_fds();
    let mut env = systemd::inherited_environment();
    env.extend(std::mem::take(&mut new.extra));
    if let Some(command) = new.launch.wrapped {
        env.insert(WRAPPED.into(), command.to_string().into());
    }
    if !passed.is_empty() {
        systemd::set_listen_variables(&mut env, passed)?;
    }
    if !new.settings.is_detached() {
        env.insert(UNIQUE_ID.into(), new.id.to_string().into());
        env.insert(CHANNEL_FD.into(), number.to_string().into());
        env.remove(&OsString::from(WORKER_PID));
    }
    if let Some(port) = new.inspect_port {
        env.insert(INSPECT_PORT.into(), port.to_string().into());
    }
    Ok(env)
}

/// Returns the program of a worker, without the worker's descriptors. If the worker executes the
/// master's own program, its `argv[0]` is the same as the master's.
fn program(
    settings: &Settings,
    exec: &Path,
    is_own: bool,
    env: SortedMap<OsString, OsString>,
) -> io::Result<Program> {
    let mut exec = exec.to_owned();
    let own_name = std::env::args_os().next().filter(|_| is_own);
    let name = own_name.unwrap_or_else(|| exec.clone().into());
    if settings.get_cwd().is_some() {
        // Make the path absolute, because it is relative to the master's directory and not to the
        // worker's.
        exec = std::path::absolute(exec)?;
    }
    let mut args = vec![name];
    args.extend_from_slice(settings.get_exec_args().unwrap_or_default());
    args.extend_from_slice(settings.get_args().unwrap_or_default());
    let mut program = Program::new(exec.into(), args, env)?;
    apply_cwd_and_ids(&mut program, settings)?;
    Ok(program)
}

/// Sets a worker's directory, user and group, and its session or process group.
fn apply_cwd_and_ids(program: &mut Program, settings: &Settings) -> io::Result<()> {
    if let Some(cwd) = settings.get_cwd() {
        program.cwd(cwd.to_owned().into())?;
    }
    program.identity(settings.get_uid(), settings.get_gid());
    if settings.leads_session() {
        program.setsid();
    } else if settings.leads_group() {
        program.setpgid();
    }
    Ok(())
}

/// The descriptors with which a worker starts: standard input, output and error, and the additional
/// ones from number 3.
#[derive(Default)]
struct StdioEnds {
    /// The worker's descriptors, by number. `None` if the worker inherits the descriptor unchanged,
    /// open or closed.
    worker: Vec<Option<OwnedFd>>,
    /// The master's ends of the pipes, by the worker's descriptor number.
    master: SortedMap<usize, UnixStream>,
    /// The lowest number above those of all descriptors in `worker`. It is at least 3.
    first_free: RawFd,
}

impl StdioEnds {
    fn new(settings: &Settings) -> io::Result<Self> {
        let kinds = settings.effective_stdio()?;
        // Duplicate every descriptor to a number above the target numbers, so that moving one
        // descriptor cannot overwrite another.
        let lowest = RawFd::try_from(kinds.len()).unwrap_or(RawFd::MAX);
        let mut stdio = Self {
            first_free: lowest.max(3),
            ..Self::default()
        };
        for (number, kind) in kinds.into_iter().enumerate() {
            // Holds a new descriptor until it is duplicated.
            let new: OwnedFd;
            let descriptor = match &kind.0 {
                StdioKind::Inherit if number <= 2 => {
                    stdio.worker.push(None);
                    continue;
                }
                StdioKind::Inherit => RawFd::try_from(number).unwrap_or(RawFd::MAX),
                StdioKind::Null => {
                    let mut options = std::fs::File::options();
                    new = options.read(true).write(true).open("/dev/null")?.into();
                    new.as_raw_fd()
                }
                StdioKind::Pipe => {
                    let (master_end, worker_end) = UnixStream::pair()?;
                    stdio.master.insert(number, master_end);
                    new = worker_end.into();
                    new.as_raw_fd()
                }
                StdioKind::Fd(fd) => fd.as_raw_fd(),
            };
            let duplicate = sys::fd::duplicate(descriptor, lowest)?;
            stdio.worker.push(Some(duplicate));
        }
        Ok(stdio)
    }
}
