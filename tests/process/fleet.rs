//! Tests two hosts behind HAProxy: the example `fleet` with its own HAProxy configuration.
//!
//! The hosts, the proxy and the clients run in separate network namespaces. A bridge connects the
//! namespaces. The test turns off HAProxy's retries and redispatching, so that HAProxy hides no
//! failure of a host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::harness::{Group, NETWORKS, example, scaled, wait_until};
use crate::sharded::Count;

pub fn trials() -> Vec<Trial> {
    let name = "hosts_are_reloaded_and_stopped_behind_haproxy_without_a_failure";
    vec![NETWORKS.of(Trial::test(name, hosts))]
}

const CONFIGURATION: &str = include_str!("../../examples/fleet/haproxy.cfg");

const PROXY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const CLIENTS: [Ipv4Addr; 3] = [
    Ipv4Addr::new(10, 0, 0, 101),
    Ipv4Addr::new(10, 0, 0, 102),
    Ipv4Addr::new(10, 0, 0, 103),
];
const HOSTS: [(&str, Ipv4Addr); 2] = [
    ("east", Ipv4Addr::new(10, 0, 0, 11)),
    ("west", Ipv4Addr::new(10, 0, 0, 12)),
];

/// Timeout of a client, which is longer than any answer takes.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Number of additional answers from a host after which the test assumes that the host receives its
/// share of requests.
const SHARE: u64 = 200;

fn hosts() -> Result<(), Failed> {
    let files = tempfile::tempdir()?;
    let release = files.path().join("release");
    std::fs::write(&release, "one")?;

    let proxy = Network::new();
    proxy.ip("link add bridge type bridge");
    proxy.ip(&format!("address add {PROXY}/24 dev bridge"));
    proxy.ip("link set bridge up");
    let client = Arc::new(proxy.join("client", &CLIENTS));
    let networks = HOSTS.map(|(name, address)| proxy.join(name, &[address]));
    let namespaces = [&proxy, &client, &networks[0], &networks[1]].map(Network::inode);

    let start = |host: usize| networks[host].inside(|| start_host(HOSTS[host], &release));
    let mut hosts = [start(0)?, start(1)?];
    let haproxy = proxy.inside(|| start_haproxy(files.path()))?;
    wait_until("HAProxy", || {
        client.inside(|| ask(CLIENTS[0]).ok().flatten().map(drop))
    });

    let posts = client.inside(|| [(); 40].map(|()| post(CLIENTS[0])));
    let failed: Vec<_> = posts.iter().filter(|p| !matches!(p, Ok(Some(_)))).collect();
    assert!(failed.is_empty(), "{} of 40: {failed:?}", failed.len());

    let load = Load::start(&client);
    (0..2).for_each(|host| load.wait_for(host));

    std::fs::write(&release, "two")?;
    for host in &hosts {
        kill(host.pid(), Signal::SIGHUP)?;
        host.line("generation 1 serves");
    }
    load.shared.is_reloaded.store(true, Ordering::SeqCst);
    (0..2).for_each(|host| load.wait_for(host));

    for (host, (name, _)) in HOSTS.iter().enumerate() {
        kill(hosts[host].pid(), Signal::SIGTERM)?;
        expect_success(&hosts[host])?;
        // Wait for HAProxy's own health check to report that the host is down.
        let is_down = format!("Server fleet/{name} is DOWN");
        let has_noticed = || haproxy.output().contains(&is_down).then_some(());
        wait_until(&is_down, has_noticed);
        load.wait_for(1 - host);
        hosts[host] = start(host)?;
        load.wait_for(host);
    }

    let (count, answers) = load.end();
    assert_eq!(count, Count::NO_FAILURE, "{answers:?}");
    let clients: BTreeSet<_> = answers
        .keys()
        .map(|answer| answer.client.as_str())
        .collect();
    let expected = CLIENTS.map(|address| address.to_string());
    assert!(clients.iter().eq(&expected), "{answers:?}");

    kill(haproxy.pid(), Signal::SIGUSR1)?;
    for host in &hosts {
        kill(host.pid(), Signal::SIGTERM)?;
    }
    for group in hosts.iter().chain([&haproxy]) {
        expect_success(group)?;
    }
    drop((proxy, client, networks));
    assert_no_process_in(&namespaces);
    Ok(())
}

fn start_host((name, address): (&str, Ipv4Addr), release: &Path) -> std::io::Result<Group> {
    let mut command = example("fleet");
    command.args(["--name", name, "--host", &address.to_string()]);
    command.args(["--workers", "2", "--release"]).arg(release);
    let host = Group::start(&mut command)?;
    host.line("ready");
    Ok(host)
}

fn start_haproxy(files: &Path) -> std::io::Result<Group> {
    let mut text = CONFIGURATION.to_owned();
    for (default, strict) in [
        ("retries 3", "retries 0"),
        ("option redispatch", "no option redispatch"),
    ] {
        assert_eq!(text.matches(default).count(), 1, "{default}");
        text = text.replace(default, strict);
    }
    let path = files.join("haproxy.cfg");
    std::fs::write(&path, text)?;
    let mut command = Command::new("haproxy");
    for (name, address) in HOSTS {
        command.env(name.to_uppercase(), address.to_string());
    }
    Group::start(command.arg("-db").arg("-f").arg(path))
}

fn expect_success(group: &Group) -> Result<(), Failed> {
    let status = group.finish()?;
    let success = status.success().then_some(());
    success.ok_or_else(|| status.to_string().into())
}

/// A network namespace without a name. It exists while this descriptor is open or a process is
/// inside, so the kernel removes the namespace however the test ends.
struct Network(File);

impl Network {
    fn new() -> Self {
        let new = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        };
        let new = std::thread::spawn(new).join().unwrap();
        new.ip("link set lo up");
        new
    }

    /// Creates another namespace with these addresses and connects it to this namespace's bridge.
    fn join(&self, name: &str, addresses: &[Ipv4Addr]) -> Self {
        let other = Self::new();
        let (pid, fd) = (std::process::id(), other.0.as_raw_fd());
        let peer = format!("peer name eth0 netns /proc/{pid}/fd/{fd}");
        self.ip(&format!("link add {name} master bridge type veth {peer}"));
        self.ip(&format!("link set {name} up"));
        for address in addresses {
            other.ip(&format!("address add {address}/24 dev eth0"));
        }
        other.ip("link set eth0 up");
        other
    }

    fn ip(&self, arguments: &str) {
        let status = self.inside(|| Command::new("ip").args(arguments.split(' ')).status());
        assert!(status.unwrap().success(), "ip {arguments}");
    }

    /// Runs `work` on a thread inside the namespace. Processes that `work` starts are also inside.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter_and_work = || {
            self.enter();
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter_and_work).join().unwrap())
    }

    fn enter(&self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
    }

    fn inode(&self) -> u64 {
        self.0.metadata().unwrap().ino()
    }
}

/// Panics if a process is in one of these namespaces.
fn assert_no_process_in(namespaces: &[u64]) {
    let processes = std::fs::read_dir("/proc").unwrap();
    for process in processes.map(|process| process.unwrap().path()) {
        // Skip entries that are not processes, and processes that have exited.
        if let Ok(namespace) = std::fs::metadata(process.join("ns/net")) {
            let process = process.display();
            assert!(!namespaces.contains(&namespace.ino()), "{process} is left");
        }
    }
}

/// The content of an answer without the worker's ID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Answer {
    client: String,
    host: String,
    release: String,
}

#[derive(Default)]
struct Shared {
    has_ended: AtomicBool,
    is_reloaded: AtomicBool,
    /// The number of times that each answer was received.
    answers: Mutex<BTreeMap<Answer, u64>>,
}

/// Clients on all addresses, with four threads for each address. Each thread sends one request
/// after another until the load ends.
struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Count>>,
}

impl Load {
    fn start(client: &Arc<Network>) -> Self {
        let shared = Arc::<Shared>::default();
        let sources = CLIENTS.into_iter().cycle().take(4 * CLIENTS.len());
        let threads = sources.map(|source| {
            let (client, shared) = (Arc::clone(client), Arc::clone(&shared));
            std::thread::spawn(move || {
                client.enter();
                Self::run(source, &shared)
            })
        });
        let threads = threads.collect();
        Self { shared, threads }
    }

    fn run(source: Ipv4Addr, shared: &Shared) -> Count {
        let mut count = Count::default();
        while !shared.has_ended.load(Ordering::SeqCst) {
            let is_reloaded = shared.is_reloaded.load(Ordering::SeqCst);
            match ask(source) {
                Ok(Some(answer))
                    if answer.client == source.to_string()
                        && (answer.release == "two" || !is_reloaded) =>
                {
                    *shared.answers.lock().unwrap().entry(answer).or_default() += 1;
                }
                Ok(_) => count.wrong += 1,
                Err(error) => count.fail(&error),
            }
        }
        count
    }

    fn answers_of(&self, host: usize) -> u64 {
        let answers = self.shared.answers.lock().unwrap();
        let of_host = answers
            .iter()
            .filter(|(answer, _)| answer.host == HOSTS[host].0);
        of_host.map(|(_, count)| count).sum()
    }

    /// Waits until a host has answered `SHARE` more requests.
    fn wait_for(&self, host: usize) {
        let before = self.answers_of(host);
        wait_until("answers of a host", || {
            (self.answers_of(host) >= before + SHARE).then_some(())
        });
    }

    fn end(mut self) -> (Count, BTreeMap<Answer, u64>) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads).into_iter();
        let count = Count::sum(threads.map(|thread| thread.join().unwrap()));
        (count, self.shared.answers.lock().unwrap().clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
    }
}

/// Sends a request to HAProxy from one of the clients' addresses. Returns `None` if the answer is
/// not from a host, for example if HAProxy itself reports an error.
fn ask(source: Ipv4Addr) -> std::io::Result<Option<Answer>> {
    let mut client = connect_to_proxy(source)?;
    client.write_all(b"GET / HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n")?;
    read_answer(client)
}

/// Sends a request with a body of 1 MiB, which the hosts do not read, and reads the answer.
fn post(source: Ipv4Addr) -> std::io::Result<Option<Answer>> {
    let mut client = connect_to_proxy(source)?;
    let head = "POST / HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\nContent-Length: 1048576";
    client.write_all(format!("{head}\r\n\r\n").as_bytes())?;
    client.write_all(&[b'x'; 1 << 20])?;
    read_answer(client)
}

/// Connects to HAProxy from `source`.
fn connect_to_proxy(source: Ipv4Addr) -> std::io::Result<TcpStream> {
    let stream = SockType::Stream;
    let socket = socket(AddressFamily::Inet, stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = scaled(CLIENT_TIMEOUT).as_secs().try_into().unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
    bind(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(source, 0)),
    )?;
    connect(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(PROXY, 8080)),
    )?;
    Ok(socket.into())
}

/// Reads to end-of-file. Returns `None` if the answer is not from a host.
fn read_answer(mut client: TcpStream) -> std::io::Result<Option<Answer>> {
    let mut text = String::new();
    client.read_to_string(&mut text)?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let body = head.starts_with("HTTP/1.1 200 ").then_some(body)?;
    let mut fields = body.strip_suffix('\n')?.split(", ");
    let mut field = |name: &str| Some(fields.next()?.strip_prefix(name)?.trim().to_owned());
    let (client, host) = (field("client ")?, field("host ")?);
    field("worker ")?;
    let release = field("release ")?;
    Some(Answer {
        client,
        host,
        release,
    })
}
