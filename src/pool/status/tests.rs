use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::super::failure::FailureCause;
use super::*;

fn worker_id(number: u32) -> WorkerId {
    crate::worker_id(number)
}

fn worker(id: u32, phase: WorkerPhase) -> WorkerStatus {
    WorkerStatus {
        worker: worker_id(id),
        pid: 4000 + id,
        generation: u64::from(id / 10),
        phase,
        age: Duration::from_millis(61_234),
        received: 1200,
        open: 3,
        is_busy: (phase != WorkerPhase::Starting).then_some(phase == WorkerPhase::Ready),
    }
}

fn failure(slot: usize) -> WorkerFailure {
    WorkerFailure {
        slot,
        worker: Some(worker_id(2)),
        pid: Some(4002),
        generation: 1,
        cause: FailureCause::Exited,
        error: None,
        status: Some(ExitStatus::from_raw(9)),
        age: Duration::from_millis(1500),
        usage: None,
    }
}

fn slot(slot: usize) -> SlotStatus {
    SlotStatus {
        slot,
        worker: None,
        successor: None,
        restarts: 0,
        restart_in: None,
        is_given_up: false,
        last_failure: None,
    }
}

pub(super) fn status() -> Status {
    Status {
        generation: 1,
        is_ready: true,
        is_reloading: true,
        is_stopping: false,
        is_upgraded: false,
        stop_in: None,
        age: Duration::from_micros(3_600_000_400),
        failures: 7,
        slots: vec![
            SlotStatus {
                worker: Some(worker(11, WorkerPhase::Ready)),
                successor: Some(worker(21, WorkerPhase::Starting)),
                restarts: 2,
                last_failure: Some(failure(0)),
                ..slot(0)
            },
            SlotStatus {
                restarts: 4,
                restart_in: Some(Duration::from_millis(3250)),
                last_failure: Some(WorkerFailure {
                    worker: None,
                    pid: None,
                    cause: FailureCause::ForkFailed,
                    error: Some("cannot execute \"a\\b\"\n\u{85}é".to_owned()),
                    status: None,
                    age: Duration::ZERO,
                    ..failure(1)
                }),
                ..slot(1)
            },
            SlotStatus {
                is_given_up: true,
                last_failure: Some(WorkerFailure {
                    cause: FailureCause::ExitedBeforeReady,
                    status: Some(ExitStatus::from_raw(3 << 8)),
                    ..failure(2)
                }),
                ..slot(2)
            },
            slot(3),
        ],
        disconnecting: vec![worker(12, WorkerPhase::Disconnecting)],
    }
}

#[test]
fn status_is_rendered_as_json() {
    let expected = include_str!("golden/status.json");
    assert_eq!(status().to_json() + "\n", expected);
    let empty = Status {
        slots: Vec::new(),
        disconnecting: Vec::new(),
        ..status()
    };
    assert_eq!(
        empty.to_json(),
        "{\"generation\":1,\"ready\":true,\"reloading\":true,\"stopping\":false,\
         \"stop_in\":null,\"age\":3600.000,\"failures\":7,\"slots\":[],\"disconnecting\":[]}"
    );
}

#[test]
fn causes_of_failures_have_names_in_json() {
    for (cause, name) in [
        (FailureCause::ForkFailed, "fork_failed"),
        (FailureCause::OutOfResources, "out_of_resources"),
        (FailureCause::ExitedBeforeReady, "exited_before_ready"),
        (FailureCause::StartupTimeout, "startup_timeout"),
        (FailureCause::Exited, "exited"),
        (FailureCause::HeartbeatTimeout, "heartbeat_timeout"),
    ] {
        let last_failure = Some(WorkerFailure {
            cause,
            ..failure(0)
        });
        let slots = vec![SlotStatus {
            last_failure,
            ..slot(0)
        }];
        let json = Status { slots, ..status() }.to_json();
        assert!(json.contains(&format!("\"cause\":\"{name}\"")), "{json}");
    }
}

#[test]
fn status_is_rendered_for_prometheus() {
    let expected = include_str!("golden/status.prometheus");
    assert_eq!(status().to_prometheus(), expected);
}

#[test]
fn status_is_printed_as_a_table() {
    let expected = include_str!("golden/status.txt");
    assert_eq!(status().to_string(), expected);
}

#[test]
fn guide_shows_the_table_of_a_status() {
    let guide = include_str!("../../guide/operating.md");
    let block = format!("```text\n{}```\n", status());
    assert!(guide.contains(&block), "{block}");
}

#[test]
fn remaining_stop_delay_is_rendered_in_all_formats() {
    let stopping = Status {
        is_ready: false,
        is_stopping: true,
        stop_in: Some(Duration::from_millis(9_750)),
        ..status()
    };
    let table = stopping.to_string();
    assert!(
        table.starts_with("stopping in 9.8 s: generation 1, "),
        "{table}"
    );
    let json = stopping.to_json();
    assert!(
        json.contains("\"stopping\":true,\"stop_in\":9.750,"),
        "{json}"
    );
    let metrics = stopping.to_prometheus();
    assert!(metrics.contains("\ncluster_pool_stopping 1\n"), "{metrics}");
}
