//! Two hosts behind HAProxy, as a user runs them: the example `fleet`, with the configuration beside it.
//! Each host is a network namespace, and so are the proxy and the clients; a bridge joins them. HAProxy
//! hides nothing: it does not try again, and not elsewhere.

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

use crate::harness::{Group, NETWORKS, example, wait_until};
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

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// So many answers prove that a host has its share again.
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
    let namespaces = [&proxy, &client, &networks[0], &networks[1]].map(Network::number);

    let start = |host: usize| networks[host].inside(|| start_host(HOSTS[host], &release));
    let mut hosts = [start(0)?, start(1)?];
    let haproxy = proxy.inside(|| start_haproxy(files.path()))?;
    wait_until("HAProxy", || {
        client.inside(|| ask(CLIENTS[0]).ok().flatten().map(drop))
    });

    let load = Load::begin(&client);
    (0..2).for_each(|host| load.wait_for(host));

    std::fs::write(&release, "two")?;
    for host in &hosts {
        kill(host.pid(), Signal::SIGHUP)?;
        host.line("generation 1 serves");
    }
    load.facts.is_reloaded.store(true, Ordering::SeqCst);
    (0..2).for_each(|host| load.wait_for(host));

    for (host, (name, _)) in HOSTS.iter().enumerate() {
        kill(hosts[host].pid(), Signal::SIGTERM)?;
        succeeds(&hosts[host])?;
        // HAProxy has found out by itself that nobody is there, too.
        let gone = format!("Server fleet/{name} is DOWN");
        let is_gone = || haproxy.output().contains(&gone).then_some(());
        wait_until(&gone, is_gone);
        load.wait_for(1 - host);
        hosts[host] = start(host)?;
        load.wait_for(host);
    }

    let (count, heard) = load.end();
    assert_eq!(count, Count::NO_FAILURE, "{heard:?}");
    let clients: BTreeSet<_> = heard.keys().map(|answer| answer.client.as_str()).collect();
    let expected = CLIENTS.map(|address| address.to_string());
    assert!(clients.iter().eq(&expected), "{heard:?}");

    kill(haproxy.pid(), Signal::SIGUSR1)?;
    for host in &hosts {
        kill(host.pid(), Signal::SIGTERM)?;
    }
    for group in hosts.iter().chain([&haproxy]) {
        succeeds(group)?;
    }
    drop((proxy, client, networks));
    assert_nobody_in(&namespaces);
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
    for (hides, shows) in [
        ("retries 3", "retries 0"),
        ("option redispatch", "no option redispatch"),
    ] {
        assert_eq!(text.matches(hides).count(), 1, "{hides}");
        text = text.replace(hides, shows);
    }
    let path = files.join("haproxy.cfg");
    std::fs::write(&path, text)?;
    let mut command = Command::new("haproxy");
    for (name, address) in HOSTS {
        command.env(name.to_uppercase(), address.to_string());
    }
    Group::start(command.arg("-db").arg("-f").arg(path))
}

fn succeeds(group: &Group) -> Result<(), Failed> {
    let status = group.finish()?;
    let success = status.success().then_some(());
    success.ok_or_else(|| status.to_string().into())
}

/// A network namespace. Nothing but this and who lives in it keeps it: it has no name, and is gone
/// however the test ends.
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

    /// Makes another one that has a cable to the bridge of this one, and these addresses.
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

    fn ip(&self, words: &str) {
        let status = self.inside(|| Command::new("ip").args(words.split(' ')).status());
        assert!(status.unwrap().success(), "ip {words}");
    }

    /// Works on a thread that is there, and so is who is started by it.
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

    fn number(&self) -> u64 {
        self.0.metadata().unwrap().ino()
    }
}

/// No process is in one of these namespaces.
fn assert_nobody_in(namespaces: &[u64]) {
    let processes = std::fs::read_dir("/proc").unwrap();
    for process in processes.map(|process| process.unwrap().path()) {
        // It may be no process, or none any more.
        if let Ok(namespace) = std::fs::metadata(process.join("ns/net")) {
            let process = process.display();
            assert!(!namespaces.contains(&namespace.ino()), "{process} is left");
        }
    }
}

/// What an answer says, save for the worker.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Answer {
    client: String,
    host: String,
    release: String,
}

#[derive(Default)]
struct Facts {
    is_over: AtomicBool,
    is_reloaded: AtomicBool,
    /// How often each answer has come.
    heard: Mutex<BTreeMap<Answer, u64>>,
}

/// Clients of all addresses, on threads, one after the other on each, until they are to stop.
struct Load {
    facts: Arc<Facts>,
    threads: Vec<JoinHandle<Count>>,
}

impl Load {
    fn begin(client: &Arc<Network>) -> Self {
        let facts = Arc::<Facts>::default();
        let sources = CLIENTS.into_iter().cycle().take(4 * CLIENTS.len());
        let threads = sources.map(|source| {
            let (client, facts) = (Arc::clone(client), Arc::clone(&facts));
            std::thread::spawn(move || {
                client.enter();
                Self::run(source, &facts)
            })
        });
        let threads = threads.collect();
        Self { facts, threads }
    }

    fn run(source: Ipv4Addr, facts: &Facts) -> Count {
        let mut count = Count::default();
        while !facts.is_over.load(Ordering::SeqCst) {
            let is_reloaded = facts.is_reloaded.load(Ordering::SeqCst);
            match ask(source) {
                Ok(Some(answer))
                    if answer.client == source.to_string()
                        && (answer.release == "two" || !is_reloaded) =>
                {
                    *facts.heard.lock().unwrap().entry(answer).or_default() += 1;
                }
                Ok(_) => count.wrong += 1,
                Err(error) => count.fail(&error),
            }
        }
        count
    }

    fn answers_of(&self, host: usize) -> u64 {
        let heard = self.facts.heard.lock().unwrap();
        let of_host = heard
            .iter()
            .filter(|(answer, _)| answer.host == HOSTS[host].0);
        of_host.map(|(_, count)| count).sum()
    }

    /// Waits until a host has answered its share from now on.
    fn wait_for(&self, host: usize) {
        let before = self.answers_of(host);
        wait_until("answers of a host", || {
            (self.answers_of(host) >= before + SHARE).then_some(())
        });
    }

    fn end(mut self) -> (Count, BTreeMap<Answer, u64>) {
        self.facts.is_over.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads).into_iter();
        let count = Count::sum(threads.map(|thread| thread.join().unwrap()));
        (count, self.facts.heard.lock().unwrap().clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.facts.is_over.store(true, Ordering::SeqCst);
    }
}

/// Asks HAProxy, from one of the client's addresses. `None` is another answer than that of a host.
fn ask(source: Ipv4Addr) -> std::io::Result<Option<Answer>> {
    let stream = SockType::Stream;
    let socket = socket(AddressFamily::Inet, stream, SockFlag::SOCK_CLOEXEC, None)?;
    let seconds = PATIENCE.as_secs().try_into().unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
    bind(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(source, 0)),
    )?;
    connect(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(PROXY, 8080)),
    )?;
    let mut client = TcpStream::from(socket);
    client.write_all(b"GET / HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    client.read_to_string(&mut text)?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let body = head.starts_with("HTTP/1.1 200 ").then_some(body)?;
    let mut facts = body.strip_suffix('\n')?.split(", ");
    let mut fact = |name: &str| Some(facts.next()?.strip_prefix(name)?.trim().to_owned());
    let (client, host) = (fact("client ")?, fact("host ")?);
    fact("worker ")?;
    let release = fact("release ")?;
    Some(Answer {
        client,
        host,
        release,
    })
}
