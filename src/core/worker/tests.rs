use super::*;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind, Parking};
use crate::types::errno;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::poll_number::POLL_NUMBER_MAX;
use crate::wire::frame::{Bound, Unreceived};

type Core = WorkerCore<()>;

const HANDLE: HandleId = HandleId(1);
const PAUSE: ToMaster = ToMaster::Pause { handle: HANDLE };

/// Opens a listener with the master's `handle`, and sets a callback for it.
fn listener(core: &mut Core, handle: HandleId) -> ListenerId {
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::new(Kind::Tcp, BindAddress::Ip(address));
    let listener = core.listen(endpoint, BindFlags::default());
    let result = Ok(Bound {
        handle,
        policy: SchedulingPolicy::RoundRobin,
        address: Some(address),
    });
    let reply = ToWorker::Reply {
        request: listener.0,
        result,
    };
    core.frame(reply).unwrap();
    core.use_callback(listener);
    listener
}

fn sent(core: &mut Core) -> Vec<ToMaster> {
    let actions = std::iter::from_fn(|| core.next_action());
    let frames = actions.filter_map(|action| match action {
        Action::Send(frame) => Some(frame),
        Action::CloseListener(_)
        | Action::AttachSynFilter(_)
        | Action::CloseParked(_)
        | Action::SendLeaving
        | Action::CloseChannel
        | Action::MarkDisconnecting => None,
    });
    frames.collect()
}

/// Delivers all events, and then reports to the core that the listener's queue is empty. Returns
/// whether the listener was ready, so that its callback would have accepted connections.
fn accepts(core: &mut Core, listener: ListenerId) -> bool {
    let events: Vec<_> = std::iter::from_fn(|| core.next_event()).collect();
    core.found_empty(listener);
    let is_ready = |event: &Event<_>| matches!(event, Event::ListenerReady(id) if *id == listener);
    events.iter().any(is_ready)
}

fn idle(received: u64, open: u32) -> ToMaster {
    let handle = HANDLE;
    ToMaster::Idle {
        handle,
        received,
        open,
    }
}

#[test]
fn listener_numbers_start_again_and_skip_those_in_use() {
    let mut core = Core::new();
    let first = core.listen_privately(Kind::Tcp, Parking::default());
    core.last_listener = POLL_NUMBER_MAX - 1;
    let later = [Kind::Tcp, Kind::Udp].map(|kind| core.listen_privately(kind, Parking::default()));
    assert_eq!(first, ListenerId(1));
    assert_eq!(later, [ListenerId(POLL_NUMBER_MAX), ListenerId(2)]);
    assert!(core.is_datagram(later[1]) && !core.is_datagram(first));
}

#[test]
fn empty_queue_is_reported_once() {
    let mut core = Core::new();
    let listener = listener(&mut core, HANDLE);
    sent(&mut core);
    assert!(accepts(&mut core, listener));
    assert_eq!(sent(&mut core), [idle(0, 0)]);
    assert!(!accepts(&mut core, listener));
    assert_eq!(sent(&mut core), []);
    core.connection_opened(listener);
    core.connection_opened(listener);
    core.found_empty(listener);
    assert_eq!(sent(&mut core), [idle(2, 2)]);
}

#[test]
fn full_worker_is_paused_until_a_connection_closes() {
    let mut core = Core::new();
    let listener = listener(&mut core, HANDLE);
    core.set_connection_limit(listener, Some(1));
    assert!(accepts(&mut core, listener));
    sent(&mut core);
    core.connection_opened(listener);
    assert!(core.is_paused(listener));
    assert_eq!(sent(&mut core), [PAUSE]);
    core.found_empty(listener);
    core.set_connection_limit(listener, Some(0));
    assert_eq!(sent(&mut core), [], "the master knows");
    core.set_connection_limit(listener, Some(1));
    core.connection_closed(Some(listener));
    assert!(accepts(&mut core, listener));
    assert_eq!(sent(&mut core), [idle(1, 0)]);
}

#[test]
fn limit_above_the_open_connections_sends_no_pause() {
    let mut core = Core::new();
    let listener = listener(&mut core, HANDLE);
    accepts(&mut core, listener);
    sent(&mut core);
    core.connection_opened(listener);
    for (limit, is_full) in [
        (Some(8), false),
        (Some(1), true),
        (Some(1), true),
        (None, false),
    ] {
        core.set_connection_limit(listener, limit);
        assert_eq!(core.is_paused(listener), is_full, "{limit:?}");
    }
    assert_eq!(sent(&mut core), [PAUSE]);
}

#[test]
fn exhausted_descriptors_pause_all_queues_until_the_backoff_elapses() {
    let mut core = Core::new();
    let second_handle = HandleId(2);
    let first = listener(&mut core, HANDLE);
    let second = listener(&mut core, second_handle);
    for listener in [first, second] {
        accepts(&mut core, listener);
    }
    sent(&mut core);
    core.fds_exhausted();
    let second_pause = ToMaster::Pause {
        handle: second_handle,
    };
    assert_eq!(sent(&mut core), [PAUSE, second_pause]);
    assert!(!accepts(&mut core, first));
    assert_eq!(sent(&mut core), []);
    core.backoff_elapsed();
    assert!(accepts(&mut core, first));
    assert_eq!(sent(&mut core), [idle(0, 0)]);
}

#[test]
fn callbacks_leave_some_descriptors_to_the_application() {
    let mut core = Core::new();
    let listener = listener(&mut core, HANDLE);
    let blocking = core.listen_privately(Kind::Tcp, Parking::default());
    accepts(&mut core, listener);
    core.connection_opened(listener);
    core.connection_opened(listener);
    core.fds_scarce();
    assert!(core.is_paused(listener) && !core.is_paused(blocking));
    core.connection_closed(Some(listener));
    assert!(
        !core.is_paused(listener),
        "one connection may replace the closed one"
    );
    assert!(accepts(&mut core, listener));
    core.connection_opened(listener);
    core.fds_plentiful();
    assert!(accepts(&mut core, listener));
    core.connection_opened(listener);
    assert!(!core.is_paused(listener));
}

#[test]
fn listener_without_its_descriptor_is_released() {
    let mut core = Core::new();
    let path = BindAddress::Path("/path".into());
    let listener = core.listen(Endpoint::new(Kind::Unix, path), BindFlags::default());
    sent(&mut core);
    core.listener_fd_lost(listener.0, HANDLE).unwrap();
    assert_eq!(sent(&mut core), [ToMaster::Release { handle: HANDLE }]);
    let failed = ListenStatus::Failed(errno::EMFILE);
    assert_eq!(core.listen_status(listener), failed);
}

/// Returns the results to test for a master's reply: success and failure.
fn replies() -> [Result<Bound, i32>; 2] {
    let bound = Bound {
        handle: HANDLE,
        policy: SchedulingPolicy::RoundRobin,
        address: None,
    };
    [Ok(bound), Err(errno::EADDRINUSE)]
}

/// Requests a listener, calls `abandon`, and then processes the master's reply. Asserts that the
/// listener has ended.
fn abandoned(result: Result<Bound, i32>, abandon: impl Fn(&mut Core, ListenerId)) -> Core {
    let mut core = Core::new();
    let path = BindAddress::Path("/path".into());
    let listener = core.listen(Endpoint::new(Kind::Unix, path), BindFlags::default());
    abandon(&mut core, listener);
    let request = listener.0;
    core.frame(ToWorker::Reply { request, result }).unwrap();
    let status = core.listen_status(listener);
    assert_eq!(status, ListenStatus::Done(None), "`listen` must not wait");
    assert!(core.has_ended(listener));
    core
}

#[test]
fn dropped_listener_is_removed_by_the_masters_reply() {
    for result in replies() {
        let core = abandoned(result, Core::forget);
        assert!(core.listeners.is_empty());
    }
}

#[test]
fn listen_returns_if_the_reply_arrives_after_the_disconnect() {
    for result in replies() {
        abandoned(result, |core, _| {
            core.frame(ToWorker::Disconnect).map(drop).unwrap()
        });
    }
}

#[test]
fn disconnecting_worker_ignores_its_connection_limit() {
    let mut core = Core::new();
    let listener = listener(&mut core, HANDLE);
    accepts(&mut core, listener);
    core.set_connection_limit(listener, Some(0));
    assert!(!accepts(&mut core, listener));
    core.frame(ToWorker::Disconnect).unwrap();
    assert!(accepts(&mut core, listener));
    let (handle, unreceived) = (HANDLE, Unreceived::AreServed);
    core.frame(ToWorker::ListenerClosed { handle, unreceived })
        .unwrap();
    assert!(accepts(&mut core, listener), "for the last connections");
    assert!(!core.has_ended(listener));
    core.close(listener);
    assert!(core.has_ended(listener));
}

/// Delivers all events and actions. Returns whether the worker notified the application that it is
/// disconnecting.
fn begins_to_disconnect(core: &mut Core) -> bool {
    let actions: Vec<_> = std::iter::from_fn(|| core.next_action()).collect();
    let events: Vec<_> = std::iter::from_fn(|| core.next_event()).collect();
    let marks = actions.iter().filter(|a| **a == Action::MarkDisconnecting);
    let notices = events.iter().filter(|e| matches!(e, Event::Disconnecting));
    let counts = (marks.count(), notices.count());
    assert!(matches!(counts, (0, 0) | (1, 1)), "{counts:?}");
    counts == (1, 1)
}

#[test]
fn first_step_of_a_disconnect_notifies_the_application_once() {
    let disconnect_received = |core: &mut Core| {
        core.frame(ToWorker::Disconnect).unwrap();
    };
    let steps: [fn(&mut Core); 5] = [
        Core::disconnect,
        Core::kill,
        Core::close_channel,
        Core::channel_closed,
        disconnect_received,
    ];
    for first in steps {
        let mut core = Core::new();
        assert!(!begins_to_disconnect(&mut core));
        first(&mut core);
        assert!(begins_to_disconnect(&mut core));
        for later in steps {
            later(&mut core);
            assert!(!begins_to_disconnect(&mut core));
        }
    }
}

#[test]
fn park_that_finds_the_queue_empty_replaces_the_next_attempt_unless_the_queue_drains() {
    let mut core = Core::new();
    let id = listener(&mut core, HANDLE);
    accepts(&mut core, id);
    sent(&mut core);
    core.connection_opened(id);
    core.connection_closed(Some(id));
    core.found_empty_at_park(id);
    assert_eq!(sent(&mut core), [idle(1, 0)]);
    assert!(!core.take_empty_at_park(ListenerId(POLL_NUMBER_MAX)));
    core.found_empty_at_park(id);
    assert!(core.take_empty_at_park(id));
    assert!(!core.take_empty_at_park(id), "only once");
    core.found_empty_at_park(id);
    let (handle, unreceived) = (HANDLE, Unreceived::AreServed);
    let closed = ToWorker::ListenerClosed { handle, unreceived };
    core.frame(closed).unwrap();
    assert!(!core.take_empty_at_park(id), "draining");
}

#[test]
fn application_that_waits_after_a_park_ends_the_pause() {
    let mut core = Core::new();
    let id = listener(&mut core, HANDLE);
    core.set_connection_limit(id, Some(1));
    accepts(&mut core, id);
    core.connection_opened(id);
    sent(&mut core);
    core.connection_closed(Some(id));
    core.found_empty_at_park(id);
    assert_eq!(sent(&mut core), [], "the application does not wait yet");
    assert!(core.take_empty_at_park(id));
    assert_eq!(sent(&mut core), [idle(1, 0)]);
}
