//! Tests which sockets a master can use when systemd passes them.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};

use cluster::{Error, SchedulingPolicy, Settings};

use crate::harness::{Log, cluster, is_watched};
use crate::inherited_sockets::{Service, ask_udp, assert_served, service};

crate::scenarios! {
    abstract_listener_is_served_by_its_name_rr
    abstract_listener_is_served_by_its_name_none
    passed_descriptor_of_another_kind_is_an_error_and_the_others_are_served
    error_names_the_passed_listener_that_occupies_the_port
    policy_without_effect_on_passed_listeners_is_reported_once
}

fn ask_unix(address: &UnixAddr) -> String {
    let mut answer = String::new();
    let mut client = UnixStream::connect_addr(address).unwrap();
    client.read_to_string(&mut answer).unwrap();
    answer
}

fn abstract_listener_is_served_by_its_name(policy: &str) {
    if is_watched() {
        return service();
    }
    let names = ["passed", "opened"].map(|name| format!("cluster-{name}-{}", std::process::id()));
    let [passed, opened] = names
        .each_ref()
        .map(|name| UnixAddr::from_abstract_name(name).unwrap());
    let listener = UnixListener::bind_addr(&passed).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (address, datagrams) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
    let config = format!(
        "pool {address}\nbind {datagrams}\nunix {}\nunix {}",
        names[0], names[1]
    );
    let sockets = vec![listener.into(), tcp.into(), udp.into()];
    let service = Service::start_with(policy, &config, sockets);
    for _ in 0..3 {
        service.wait_for_both_workers();
        let master = service.master().to_string();
        assert_served(address, service.master());
        assert_eq!(ask_udp(datagrams), master);
        assert_eq!(
            [ask_unix(&passed), ask_unix(&opened)],
            [master.clone(), master]
        );
        service.upgrade();
    }
    let master = service.master();
    service.stop(master);
    for address in [passed, opened] {
        let error = UnixStream::connect_addr(&address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}

fn abstract_listener_is_served_by_its_name_rr() {
    abstract_listener_is_served_by_its_name("rr");
}

fn abstract_listener_is_served_by_its_name_none() {
    abstract_listener_is_served_by_its_name("none");
}

/// Returns descriptors that a master cannot share, each with its description in the error.
fn unusable() -> Vec<(&'static str, OwnedFd)> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket, socketpair};
    let no_flags = SockFlag::empty();
    let netlink = SockProtocol::NetlinkRoute;
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        no_flags,
        netlink,
    );
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, no_flags);
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let mut all = vec![
        ("neither an IP nor a Unix socket", netlink.unwrap()),
        ("neither a stream nor a datagram socket", pair.unwrap().0),
        ("a TCP socket that does not listen", client.into()),
        (
            "a Unix stream socket that does not listen",
            UnixStream::pair().unwrap().0.into(),
        ),
        (
            "a Unix datagram socket",
            UnixDatagram::unbound().unwrap().into(),
        ),
        (
            "neither a stream nor a datagram socket",
            File::open("/dev/null").unwrap().into(),
        ),
        (
            "neither a stream nor a datagram socket",
            nix::unistd::pipe().unwrap().0,
        ),
    ];
    // Some kernels have no vsock.
    let vsock = socket(AddressFamily::Vsock, SockType::Stream, no_flags, None);
    all.extend(
        vsock
            .ok()
            .map(|vsock| ("neither an IP nor a Unix socket", vsock)),
    );
    all
}

fn passed_descriptor_of_another_kind_is_an_error_and_the_others_are_served() {
    if is_watched() {
        return service();
    }
    for (found, fd) in unusable() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let passed = vec![fd, tcp.into()];
        let service = Service::start_with("rr", &format!("pool {address}"), passed);
        let expected = format!(
            "descriptor 3 (\"a\") is {found}, \
             expected a TCP listener, a Unix listener or a UDP socket"
        );
        let output = service.group.output();
        assert!(output.lines().any(|line| line == expected), "{output}");
        assert_served(address, service.master());
        let master = service.master();
        service.stop(master);
    }
}

fn error_names_the_passed_listener_that_occupies_the_port() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let Ok(passed) = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) else {
                return log.add("no IPv6");
            };
            let port = passed.local_addr().unwrap().port();
            let listener = master.listen(passed).unwrap();
            for host in ["0.0.0.0", "127.0.0.1", "localhost"] {
                let error = master.listen((host, port)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE));
                // Get the error's text from the C library, because C libraries use different texts.
                let reason = std::io::Error::from_raw_os_error(nix::libc::EADDRINUSE);
                let expected = format!(
                    "cannot listen on {host}:{port}: {reason}; \
                     this master already has [::]:{port}"
                );
                assert_eq!(error.to_string(), expected);
            }
            let at_error = log.clone();
            master.on_error(move |_, worker, error| {
                assert_eq!(worker.unwrap().id().get(), 1);
                let error = error.to_string();
                let expected = format!("; this master already has [::]:{port}");
                assert!(error.ends_with(&expected), "{error}");
                at_error.add("named");
            });
            master.on_exit(move |_, _, status| {
                assert!(status.success());
                let _retained_until_now = &listener;
            });
            master.fork_with([("PORT", port.to_string())]).unwrap();
        },
        |worker| {
            let address = format!("0.0.0.0:{}", std::env::var("PORT").unwrap());
            let error = worker.listen(address).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE));
        },
    );
    assert_eq!(entries.take().len(), 1);
}

fn policy_without_effect_on_passed_listeners_is_reported_once() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master
                .set_scheduling_policy(SchedulingPolicy::RoundRobin)
                .unwrap();
            master.on_error(move |_, worker, error| {
                assert!(worker.is_none());
                assert!(matches!(error, Error::PolicyIgnored { .. }), "{error}");
                log.add(error.to_string());
            });
            let program = || Settings::default().exec("/bin/true");
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let listener = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            master
                .fork_as(program().listen_fds([("udp", udp)]))
                .unwrap();
            let detached = program().detached(true).listen_fds([("web", listener())]);
            let detached = master.fork_as(detached).unwrap();
            detached.process().reference();
            for _ in 0..2 {
                let settings = program().listen_fds([("web", listener())]);
                master.fork_as(settings).unwrap();
            }
        },
        |_| unreachable!("the workers execute another program"),
    );
    let expected = "the scheduling policy rr has no effect on listeners of listen_fds: \
                    the workers accept for themselves";
    assert_eq!(entries.take(), [expected]);
}
