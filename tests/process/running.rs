//! Tests the event loop: timers, signals, watched descriptors, embedding, back-off and idleness.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cluster::{BindOptions, Interest, ListenOptions, Signal, Worker};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::{ptrace, wait::waitpid};
use nix::unistd::Pid;

use crate::harness::{
    Log, SIGNALS, cluster, in_background, serve_id, sleeps, talk, wait_for_state, wait_until,
    when_listening, with_env,
};

crate::scenarios! {
    timers_fire_in_order_and_can_be_cleared
    timer_with_the_longest_duration_is_accepted
    durations_of_any_length_are_accepted
    loop_backs_off_from_a_killed_worker_that_is_traced: TRACING
    signals_reach_callbacks_in_both_roles
    watched_descriptors_keep_the_loop_alive
    master_runs_in_the_loop_of_the_host
    worker_runs_in_the_loop_of_the_host
    blocking_worker_handles_timers_and_messages
    idle_processes_sleep
}

fn timers_fire_in_order_and_can_be_cleared() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let began = Instant::now();
            let at = |millis: u64| Duration::from_millis(millis);
            let (late, soon, ticks) = (log.clone(), log.clone(), log);
            // Set the timers in the order in which they fire, because the process may be
            // interrupted for longer than 10 ms between two calls.
            let cleared = Rc::new(Cell::new(None));
            let never = Rc::clone(&cleared);
            master.set_timeout(at(10), move |master| {
                soon.add("soon");
                master.clear_timer(never.get().unwrap());
            });
            let never = master.set_timeout(at(20), |_| panic!("the cleared timer fired"));
            cleared.set(Some(never));
            master.set_timeout(at(30), move |_| {
                assert!(began.elapsed() >= at(30));
                late.add("late");
            });
            let count = Cell::new(0);
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            own.set(Some(master.set_interval(at(50), move |master| {
                ticks.add("tick");
                count.set(count.get() + 1);
                if count.get() == 3 {
                    master.clear_timer(id.get().unwrap());
                }
            })));
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["soon", "late", "tick", "tick", "tick"]);
}

fn timer_with_the_longest_duration_is_accepted() {
    cluster(
        |master| {
            let never = master.set_timeout(Duration::MAX, |_| panic!("the timer fired"));
            master.on_exit(move |master, _, _| master.clear_timer(never));
            master.fork().unwrap();
        },
        |_| {},
    );
}

/// Three durations: zero, one whose end the clock can represent but never reaches, and one whose
/// end the clock cannot represent.
const DURATIONS: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_secs(u64::MAX / 4),
    Duration::MAX,
];

/// Passes each duration to every method that takes one, in the master and in a worker, with each
/// policy.
fn durations_of_any_length_are_accepted() {
    for policy in ["rr", "none", "sharded"] {
        with_policy(policy, || {
            let log = Log::default();
            let entries = log.clone();
            cluster(
                |master| {
                    for duration in DURATIONS {
                        let timeout = master.set_timeout(duration, |_| {});
                        let interval = master.set_interval(duration, |_| {});
                        master.unreference(timeout);
                        master.unreference(interval);
                    }
                    master.on_message(move |master, _, message| {
                        log.add(String::from_utf8_lossy(message.bytes()));
                        if log.len() == DURATIONS.len() {
                            let workers = master.workers();
                            for (worker, duration) in workers.iter().zip(DURATIONS) {
                                worker.disconnect_within(duration);
                            }
                            for duration in DURATIONS.into_iter().rev() {
                                master.disconnect_within(duration);
                            }
                        }
                    });
                    master.on_listening(|master, _, address| {
                        let address = address.to_string().parse().unwrap();
                        in_background(
                            master,
                            move || talk(address, b"").unwrap(),
                            |_, answer| assert_eq!(answer, ""),
                        );
                    });
                    for _ in DURATIONS {
                        master.fork().unwrap();
                    }
                    for duration in DURATIONS {
                        let options = ListenOptions::from("127.0.0.1:0").idle_timeout(duration);
                        drop(master.listen(options.first_data_timeout(duration)).unwrap());
                    }
                    for duration in DURATIONS {
                        // `setup_master` causes an event, so `dispatch` does not wait.
                        master.setup_master(cluster::Settings::default());
                        master.dispatch(Some(duration)).unwrap();
                    }
                },
                |worker| wait_in_every_way(&worker, DURATIONS[worker.id().get() as usize - 1]),
            );
            assert_eq!(entries.take(), ["served"; DURATIONS.len()]);
        });
    }
}

/// Calls `play` under the policy. Does nothing if this process was started for another policy.
fn with_policy(policy: &str, play: impl FnOnce()) {
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    match std::env::var(POLICY) {
        Ok(own) if own != policy => {}
        _ => with_env(POLICY, policy, play),
    }
}

/// Waits in every way that a worker offers.
fn wait_in_every_way(worker: &Worker, duration: Duration) {
    let timeout = worker.set_timeout(duration, |_| {});
    let interval = worker.set_interval(duration, |_| {});
    worker.unreference(timeout);
    worker.unreference(interval);
    let soon = worker.set_timeout(Duration::from_millis(1), |_| {});
    worker.dispatch(Some(duration)).unwrap();
    worker.clear_timer(soon);
    let options = BindOptions::from("127.0.0.1:0").exclusive(true);
    let socket = worker.bind(options).unwrap();
    socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
    assert!(socket.recv_from(&mut [0]).unwrap().is_some());
    // Each worker has its own address, so its client does not reach another worker.
    let address = format!("127.0.0.{}:0", worker.id());
    let listener = worker.listen(address.as_str()).unwrap();
    drop(socket);
    drop(listener.accept().unwrap().unwrap());
    let _ = worker.send(b"served").unwrap();
    drop(listener);
    worker.run().unwrap();
}

/// Checks that the loop backs off if a killed worker cannot be reaped. A tracer such as a debugger
/// keeps the worker a zombie until the tracer has detached or exited.
fn loop_backs_off_from_a_killed_worker_that_is_traced() {
    const TRACEE: &str = "TRACEE";
    if let Ok(tracee) = std::env::var(TRACEE) {
        let tracee = Pid::from_raw(tracee.parse().unwrap());
        ptrace::attach(tracee).unwrap();
        waitpid(tracee, None).unwrap();
        println!("traced");
        // Trace the worker until the master closes its end of the pipe.
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let exits = log.clone();
            let worker = master.fork().unwrap();
            worker.on_exit(move |_, _, status| exits.add(status.to_string()));
            let is_ready = Rc::new(Cell::new(false));
            let ready = Rc::clone(&is_ready);
            worker.on_message(move |_, _, _| ready.set(true));
            while !is_ready.get() {
                master.dispatch(None).unwrap();
            }
            let pid = worker.process().id();
            let mut tracer = std::process::Command::new(std::env::current_exe().unwrap());
            tracer.env(TRACEE, pid.to_string());
            tracer.stdin(std::process::Stdio::piped());
            let mut tracer = tracer.stdout(std::process::Stdio::piped()).spawn().unwrap();
            let stdout = tracer.stdout.as_mut().unwrap();
            stdout.read_exact(&mut [0; "traced".len()]).unwrap();
            worker.process().kill(Signal::KILL);
            wait_for_state(pid, ") Z ");
            let (time, began) = (Duration::from_secs(1), Instant::now());
            let mut iterations = 0;
            while began.elapsed() < time {
                master.dispatch(Some(time)).unwrap();
                iterations += 1;
            }
            // The back-off allows two iterations every 100 ms. The closed channel adds a few.
            let iterations_max = 10 + began.elapsed().as_millis() / 50;
            assert!(
                iterations <= iterations_max,
                "{iterations} iterations in {time:?}"
            );
            assert_eq!(log.len(), 0, "the worker has not been reaped");
            drop(tracer.stdin.take());
            assert!(tracer.wait().unwrap().success());
        },
        |worker| {
            allow_tracing();
            let _ = worker.send(b"ready").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["signal: 9 (SIGKILL)"]);
}

/// Allows every process of the same user to trace this process, because Yama may allow only
/// ancestors.
fn allow_tracing() {
    #[allow(unsafe_code)]
    // SAFETY: PR_SET_PTRACER receives its arguments by value and accesses no memory. Without Yama,
    // the call fails, and nothing restricts tracing.
    unsafe {
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0)
    };
}

fn signals_reach_callbacks_in_both_roles() {
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
                let log = log.clone();
                let on_signal = move |master: &cluster::Master, signal: Signal| {
                    log.add(format!("master {signal}"));
                    let worker = &master.workers()[0];
                    worker.process().kill(signal);
                };
                master.on_signal(signal, on_signal).unwrap();
            }
            let raise = |signal: Signal| {
                let signal = nix::sys::signal::Signal::try_from(signal.number()).unwrap();
                nix::sys::signal::raise(signal).unwrap();
            };
            let worker = master.fork().unwrap();
            worker.on_message(move |_, worker, message| {
                let text = String::from_utf8_lossy(message.bytes()).into_owned();
                log.add(text.clone());
                match text.as_str() {
                    "ready" => raise(Signal::INT),
                    "worker SIGINT" => raise(Signal::TERM),
                    "worker SIGTERM" => raise(Signal::HUP),
                    _ => drop(worker.disconnect()),
                }
            });
        },
        |worker| {
            // Block in `accept` when the signals arrive, because callbacks must also run there.
            let listener = worker.listen("127.0.0.1:0").unwrap();
            for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
                let on_signal = |worker: &cluster::Worker, signal: Signal| {
                    let _ = worker.send(format!("worker {signal}").as_bytes()).unwrap();
                };
                worker.on_signal(signal, on_signal).unwrap();
            }
            let _ = worker.send(b"ready").unwrap();
            assert!(listener.accept().unwrap().is_none());
        },
    );
    let rounds = ["SIGINT", "SIGTERM", "SIGHUP"];
    let expected = rounds.map(|name| [format!("master {name}"), format!("worker {name}")]);
    assert_eq!(entries.take()[1..], expected.concat());
}

fn watched_descriptors_keep_the_loop_alive() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (here, mut there) = UnixStream::pair().unwrap();
            there.set_nonblocking(true).unwrap();
            let watch = |master: &cluster::Master, here: UnixStream, log: Log| {
                master
                    .watch(here, Interest::Both, move |_, mut here| {
                        // The descriptor is writable at once. After the peer's answer, the
                        // descriptor is readable, and the callback removes the watch.
                        log.add("ready");
                        if log.len() == 1 {
                            here.write_all(b"x").unwrap();
                            return Some(Interest::Readable);
                        }
                        here.read_exact(&mut [0]).unwrap();
                        None
                    })
                    .unwrap()
            };
            watch(master, here, log.clone());
            let (unused, _closed) = UnixStream::pair().unwrap();
            let other = watch(master, unused, Log::default());
            master.unwatch(other);
            master.unwatch(other);
            master.set_timeout(Duration::from_millis(5), move |_| {
                there.read_exact(&mut [0]).unwrap();
                there.write_all(b"y").unwrap();
            });
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["ready", "ready"]);
}

/// Waits until the descriptor is readable or the time has passed, like an application's own loop.
fn wait(fd: std::os::fd::BorrowedFd<'_>, time: Option<Duration>) {
    // Round the timeout up, because `poll` takes milliseconds and must not return before the timer
    // is due.
    let time = time.map(|time| time + Duration::from_micros(999));
    let time = time.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from);
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, time.unwrap_or(PollTimeout::MAX)).unwrap();
}

fn master_runs_in_the_loop_of_the_host() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (answers, exits) = (log.clone(), log);
            master.on_exit(move |_, _, _| exits.add("exit"));
            when_listening(master, 1, move |master, address| {
                in_background(
                    master,
                    move || talk(address, b""),
                    move |master, answer| {
                        answers.add(answer.unwrap());
                        master.set_timeout(Duration::from_millis(3), |master| {
                            master.disconnect();
                        });
                    },
                );
            });
            master.fork().unwrap();
            assert_eq!(
                master.time_left(),
                Some(Duration::ZERO),
                "an event is pending"
            );
            let mut iterations = 0;
            while !master.workers().is_empty() {
                wait(master.as_fd(), master.time_left());
                master.dispatch(Some(Duration::ZERO)).unwrap();
                iterations += 1;
            }
            assert!(
                iterations < 100,
                "{iterations} iterations: the loop does not sleep"
            );
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["1", "exit"]);
}

fn worker_runs_in_the_loop_of_the_host() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                in_background(
                    master,
                    move || talk(address, b""),
                    move |master, answer| {
                        log.add(answer.unwrap());
                        master.disconnect();
                    },
                );
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, mut connection| {
                connection.write_all(b"embedded").unwrap();
            });
            while worker.is_connected() {
                wait(worker.as_fd(), worker.time_left());
                worker.dispatch(Some(Duration::ZERO)).unwrap();
            }
        },
    );
    assert_eq!(entries.take(), ["embedded"]);
}

fn blocking_worker_handles_timers_and_messages() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_message(move |_, worker, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                match log.len() {
                    2 => drop(worker.send(b"ping").unwrap()),
                    3 => drop(worker.disconnect()),
                    _ => {}
                }
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                assert_eq!(message.bytes(), b"ping");
                let _ = worker.send(b"pong").unwrap();
            });
            worker.set_timeout(Duration::from_millis(1), |worker| {
                let _ = worker.send(b"one").unwrap();
            });
            worker.set_timeout(Duration::from_millis(2), |worker| {
                let _ = worker.send(b"two").unwrap();
            });
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(entries.take(), ["one", "two", "pong"]);
}

/// Returns the number of a process's context switches. Each wake-up adds at least one switch.
fn context_switches(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value.unwrap().trim().parse::<u64>().unwrap()
    };
    assert_eq!(field("Threads:"), 1);
    field("voluntary_ctxt_switches:") + field("nonvoluntary_ctxt_switches:")
}

/// Checks that idle processes have no context switches for two seconds. The observed cluster is a
/// child of this process.
fn idle_processes_sleep() {
    const IS_OBSERVED: &str = "IDLE";
    if std::env::var_os(IS_OBSERVED).is_none() {
        for policy in ["rr", "none", "sharded"] {
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command
                .env(IS_OBSERVED, "1")
                .env("CLUSTER_SCHED_POLICY", policy);
            let mut master = command
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdout = master.stdout.take().unwrap();
            let mut text = [0; 256];
            let length = stdout.read(&mut text).unwrap();
            let line = std::str::from_utf8(&text[..length]).unwrap();
            let pids = line
                .split_whitespace()
                .map(|pid| pid.parse::<u32>().unwrap());
            let pids: Vec<_> = pids.chain([master.id()]).collect();
            assert_eq!(pids.len(), 4, "{line}");
            // Wait until all processes are idle and observe them for two seconds afterwards.
            let mut before = Vec::new();
            wait_until("idle processes", || {
                let last = std::mem::replace(
                    &mut before,
                    pids.iter().map(|p| context_switches(*p)).collect(),
                );
                std::thread::sleep(Duration::from_millis(100));
                // A process that waits for a core switches no contexts either.
                let all_sleep = pids.iter().all(sleeps);
                (all_sleep && last == before).then_some(())
            });
            std::thread::sleep(Duration::from_secs(2));
            let after: Vec<_> = pids.iter().map(|pid| context_switches(*pid)).collect();
            assert_eq!(after, before, "a process woke up while idle");
            master.kill().unwrap();
            master.wait().unwrap();
        }
        return;
    }
    match cluster::init().unwrap() {
        cluster::Role::Master(master) => {
            when_listening(&master, 3, |master, _| {
                let pids = master
                    .workers()
                    .into_iter()
                    .map(|worker| worker.process().id());
                let pids: Vec<_> = pids.map(|pid| pid.to_string()).collect();
                println!("{}", pids.join(" "));
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
            master.run().unwrap();
        }
        cluster::Role::Worker(worker) => {
            if worker.id().get() == 3 {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_connection_callback(|_, _| {});
                return worker.run().unwrap();
            }
            serve_id(&worker, "127.0.0.1:0");
        }
    }
}
