//! Tests of sockets that were open before the master received them, and of retained sockets.

use super::*;

#[test]
fn adopted_listener_is_found_by_its_address_and_by_its_port_if_unspecified() {
    let mut core = Core::new(SchedulingPolicy::Sharded);
    let mut adopt = |text: &str| {
        let handle = core.next_handle();
        core.adopted(handle, ip(text), text.parse().ok());
        handle
    };
    let (all, both) = (adopt("0.0.0.0:80"), adopt("[::]:80"));
    let again = adopt("[::]:80");
    let one = adopt("127.0.0.1:81");
    let mut shared = |endpoint| {
        let worker = online(&mut core);
        let requested = request(&mut core, worker, endpoint);
        requested.into_iter().find_map(|action| match action {
            Action::Send {
                attachment: Attachment::Listener(handle),
                ..
            } => Some(handle),
            _ => None,
        })
    };
    assert_eq!(shared(port(80)), Some(all), "the first one");
    assert_eq!(shared(ip("0.0.0.0:80")), Some(all));
    assert_eq!(shared(ip("[::]:80")), Some(both));
    assert_eq!(shared(ip("127.0.0.1:81")), Some(one));
    assert_eq!(shared(port(81)), None);
    let worker = online(&mut core);
    request(&mut core, worker, port(80));
    let twice = request(&mut core, worker, ip("0.0.0.0:80"));
    let is_error = |action: &Action<u32>| {
        let Action::Send { frame, .. } = action else {
            return false;
        };
        matches!(frame, ToWorker::Reply { result, .. } if *result == Err(errno::EADDRINUSE))
    };
    assert!(twice.iter().any(is_error) && core.is_connected(worker));
    core.release(again);
    core.release(all);
    assert!(core.is_bound(all), "a worker has it");
    assert!(!core.is_bound(again));
}

#[test]
fn adopted_socket_is_requested_only_after_a_worker_or_the_application_requests_it() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let mut adopt = |endpoint: Endpoint, bound: &str| {
        let handle = core.next_handle();
        core.adopted(handle, endpoint, bound.parse().ok());
        handle
    };
    let fixed = adopt(ip("127.0.0.1:80"), "127.0.0.1:80");
    let any = adopt(ip("127.0.0.1:0"), "127.0.0.1:81");
    let unused = adopt(ip("127.0.0.1:82"), "127.0.0.1:82");
    let worker = online(&mut core);
    request(&mut core, worker, ip("127.0.0.1:80"));
    // The first request for port 0 receives the adopted socket. The second one must open another
    // socket.
    assert_eq!(core.retain(&ip("127.0.0.1:0")), Some(any));
    assert_eq!(core.retain(&ip("127.0.0.1:0")), None);
    let requested = [fixed, any, unused].map(|handle| core.is_requested(handle));
    assert_eq!(requested, [true, true, false]);
}

#[test]
fn adopted_udp_socket_is_shared_and_has_one_key() {
    let udp = Endpoint::new(Kind::Udp, BindAddress::Ip("0.0.0.0:53".parse().unwrap()));
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = core.next_handle();
    core.adopted(handle, udp.clone(), "0.0.0.0:53".parse().ok());
    let worker = online(&mut core);
    let attachment = Attachment::Listener(handle);
    let is_copy = |action: &Action<u32>| matches!(action, Action::Send { attachment: sent, .. } if *sent == attachment);
    assert!(request(&mut core, worker, udp).iter().any(is_copy));
    let binds = |action: &Action<u32>| matches!(action, Action::Bind { .. });
    assert!(request(&mut core, worker, port(53)).iter().any(binds));
}

#[test]
fn retain_all_retains_open_sockets_except_borrowed_descriptors() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    let own = listen(&mut core, worker, 1);
    let borrowed = Endpoint::new(Kind::Tcp, BindAddress::Fd(9));
    request(&mut core, worker, borrowed);
    core.bound(HandleId(own.0 + 1), Ok(None));
    assert_eq!(core.retain_all(), [own]);
    core.disconnect_all();
    core.channel_closed(worker);
    core.exited(worker, ExitStatusExt::from_raw(0));
    core.queue_closed(own, worker, Vec::new());
    assert!(core.is_bound(own), "retained");
    core.release(own);
    assert!(!core.is_bound(own));
}

#[test]
fn error_names_the_masters_own_socket_that_occupies_the_port() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = core.next_handle();
    core.adopted(handle, ip("[::]:80"), "[::]:80".parse().ok());
    let worker = online(&mut core);
    request(&mut core, worker, ip("0.0.0.0:80"));
    core.bound(HandleId(handle.0 + 1), Err(errno::EADDRINUSE));
    let errors =
        std::iter::from_fn(|| core.next_event()).filter_map(|emitted| match emitted.event {
            Event::Error(error) => Some(error.to_string()),
            _ => None,
        });
    let errors: Vec<_> = errors.collect();
    assert_eq!(errors.len(), 2, "at both levels: {errors:?}");
    let expected = "cannot listen on 0.0.0.0:80: ";
    assert!(errors[0].starts_with(expected), "{errors:?}");
    assert!(
        errors[0].ends_with("; this master already has [::]:80"),
        "{errors:?}"
    );
    assert_eq!(core.occupant_address(&ip("0.0.0.0:81")), None);
    let udp = Endpoint::new(Kind::Udp, BindAddress::Ip("0.0.0.0:80".parse().unwrap()));
    assert_eq!(core.occupant_address(&udp), None);
    let local = core.next_handle();
    core.adopted(local, ip("127.0.0.1:82"), "127.0.0.1:82".parse().ok());
    assert!(core.occupant_address(&ip("0.0.0.0:82")).is_some());
    assert_eq!(core.occupant_address(&ip("127.0.0.2:82")), None);
}
