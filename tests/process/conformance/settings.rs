//! Tests the settings and environment of workers.

use std::cell::Cell;
use std::ffi::OsString;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Sent, Settings};

use crate::harness::{Log, cluster, is_watched, watched};
use crate::scenarios;

scenarios! {
    fork_env
    setup_primary_argv
    setup_primary_emit
    setup_primary_multiple
}

fn fork_env() {
    let log = Log::default();
    cluster(
        |master| {
            #[allow(unsafe_code)]
            // SAFETY: this process has only one thread, so no other thread accesses the
            // environment.
            unsafe {
                std::env::set_var("OVERWRITE", "old");
            }
            let messages = log.clone();
            master.on_message(move |_, _, message| {
                messages.add(String::from_utf8_lossy(message.bytes()));
            });
            let exits = log.clone();
            master.on_exit(move |_, _, status| exits.add(status.to_string()));
            let env = [("PROP", "custom"), ("OVERWRITE", "new")];
            master.fork_with(env).unwrap();
            assert_eq!(std::env::var_os("PROP"), None);
            assert_eq!(std::env::var_os("OVERWRITE"), Some(OsString::from("old")));
        },
        |worker| {
            let values = ["PROP", "OVERWRITE"].map(|name| std::env::var(name).unwrap());
            assert_eq!(
                worker.send(values.join(" ").as_bytes()).unwrap(),
                Sent::Continue
            );
        },
    );
    assert_eq!(log.take(), ["custom new", "exit status: 0"]);
}

/// Checks that the default arguments of workers are the master's own arguments. A Rust process
/// cannot change its own arguments, so the test process starts the master with arguments.
fn setup_primary_argv() {
    const ARGS: [&str; 2] = ["one more", "argument"];
    if !is_watched() {
        assert!(watched().args(ARGS).status().unwrap().success());
        return;
    }
    let log = Log::default();
    cluster(
        |master| {
            let setups = log.clone();
            master.on_setup(move |_, settings| setups.add(format!("{:?}", settings.get_args())));
            master.setup_master(Settings::default());
            let settings = master.settings();
            let args = settings.get_args().unwrap();
            assert_eq!(args, std::env::args_os().skip(1).collect::<Vec<_>>());
            assert_eq!(args, ARGS);
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(log.take(), [format!("{:?}", Some(ARGS))]);
}

fn setup_primary_emit() {
    let log = Log::default();
    cluster(
        |master| {
            let setups = log.clone();
            master.on_setup(move |master, settings| {
                assert_eq!(*settings, master.settings());
                setups.add(format!("{:?}", settings.get_exec()));
                if setups.len() == 1 {
                    master.setup_master(Settings::default());
                    assert_eq!(setups.len(), 1, "called inside setup_master");
                }
            });
            master.setup_master(Settings::default().exec("new-exec"));
            assert_eq!(log.len(), 0, "called inside setup_master");
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(log.take(), ["Some(\"new-exec\")"; 2]);
}

fn setup_primary_multiple() {
    let log = Log::default();
    cluster(
        |master| {
            let expected = Rc::new(Cell::new(""));
            let (setups, set) = (log.clone(), Rc::clone(&expected));
            master.on_setup(move |master, settings| {
                let exec = Some(Path::new(set.get()));
                assert_eq!(settings.get_exec(), exec);
                assert_eq!(master.settings().get_exec(), exec);
                setups.add(set.get());
            });
            // Call `setup_master` three times, each time in another timer's callback.
            for (delay, exec) in (0..).zip(["exec-a", "exec-b", "exec-c"]) {
                let (setups, expected) = (log.clone(), Rc::clone(&expected));
                master.set_timeout(Duration::from_millis(delay), move |master| {
                    expected.set(exec);
                    let before = setups.len();
                    master.setup_master(Settings::default().exec(exec));
                    assert_eq!(setups.len(), before, "called inside setup_master");
                    assert_eq!(master.settings().get_exec(), Some(Path::new(exec)));
                });
            }
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(log.take(), ["exec-a", "exec-b", "exec-c"]);
}
