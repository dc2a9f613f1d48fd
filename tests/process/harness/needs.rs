//! Requirements of scenarios that some machines do not meet.

use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;
use nix::sched::{CloneFlags, unshare};

/// Requirement of a scenario. On a machine that does not meet the requirement, the scenario is
/// ignored.
pub struct Need {
    name: &'static str,
    is_met: fn() -> bool,
}

pub const ROOT: Need = Need {
    name: "root",
    is_met: is_root,
};
pub const SETPRIV: Need = Need {
    name: "root and setpriv",
    is_met: || {
        // BusyBox has a program with this name that knows fewer options.
        let version = Command::new("setpriv").arg("--version").output();
        is_root() && version.is_ok_and(|run| run.status.success())
    },
};
pub const FILE_CAPABILITIES: Need = Need {
    name: "root, setcap, and files with capabilities",
    is_met: || {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut setcap = Command::new("setcap");
        setcap.arg("cap_net_bind_service=+ep").arg(file.path());
        is_root()
            && setcap.output().is_ok_and(|set| set.status.success())
            && files_can_grant_privileges()
    },
};
pub const SET_USER_ID: Need = Need {
    name: "root, and set-user-ID bits that take effect",
    is_met: || is_root() && files_can_grant_privileges(),
};
pub const USER_NAMESPACE: Need = Need {
    name: "unshare and user namespaces",
    is_met: || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "true"]);
        unshare.output().is_ok_and(|run| run.status.success())
    },
};
pub const TIME_NAMESPACE: Need = Need {
    name: "unshare and time namespaces",
    is_met: || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--time", "--monotonic", "1", "true"]);
        unshare.output().is_ok_and(|run| run.status.success())
    },
};
pub const MOUNT_NAMESPACE: Need = Need {
    name: "unshare and mount namespaces",
    is_met: || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "true"]);
        unshare.output().is_ok_and(|run| run.status.success())
    },
};
pub const PID_NAMESPACE: Need = Need {
    name: "PID namespace",
    is_met: has_pid_namespaces,
};

/// A dynamic loader that a test can start with this program as its argument.
pub const LOADER: Need = Need {
    name: "a dynamically linked test program",
    is_met: || loader().is_some(),
};

pub const SYSTEMD: Need = Need {
    name: "systemd-socket-activate and systemd-notify",
    is_met: || {
        let tools = ["systemd-socket-activate", "systemd-notify"];
        let runs = |tool| Command::new(tool).arg("--version").output().is_ok();
        tools.into_iter().all(runs)
    },
};
pub const PYTHON: Need = Need {
    name: "python3",
    is_met: || Command::new("python3").arg("--version").output().is_ok(),
};

pub const CURL: Need = Need {
    name: "curl",
    is_met: || Command::new("curl").arg("--version").output().is_ok(),
};
pub const PROMTOOL: Need = Need {
    name: "promtool",
    is_met: || Command::new("promtool").arg("--version").output().is_ok(),
};

pub const NETWORKS: Need = Need {
    name: "root, ip and haproxy",
    is_met: || is_root() && has_networks() && Command::new("haproxy").arg("-v").output().is_ok(),
};

pub const SYSTEMD_ANALYZE: Need = Need {
    name: "systemd-analyze",
    is_met: || runs("systemd-analyze", "--version"),
};
pub const STRACE: Need = Need {
    name: "systemd-analyze and strace",
    is_met: || {
        let trace = Command::new("strace")
            .args(["-qq", "-o", "/dev/null", "true"])
            .output();
        runs("systemd-analyze", "--version") && trace.is_ok_and(|run| run.status.success())
    },
};
pub const HAPROXY: Need = Need {
    name: "haproxy",
    is_met: || runs("haproxy", "-v"),
};
pub const NGINX: Need = Need {
    name: "nginx",
    is_met: || runs("nginx", "-v"),
};
pub const BUSYBOX: Need = Need {
    name: "busybox",
    is_met: || runs("busybox", "--help"),
};
/// The program nice(1), which some builds of BusyBox lack.
pub const NICE: Need = Need {
    name: "nice",
    is_met: || runs("nice", "true"),
};
pub const KUBECTL: Need = Need {
    name: "kubectl",
    is_met: || runs("kubectl", "--help"),
};

pub const ROOT_AND_FAULT_POINTS: Need = Need {
    name: "root and debug assertions",
    is_met: || is_root() && cfg!(debug_assertions),
};

/// Kernel that allows a process to trace another process of the same user.
pub const TRACING: Need = Need {
    name: "ptrace",
    is_met: || {
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let scope = scope.map_or(0, |scope| scope.trim().parse::<u32>().unwrap());
        scope < 2 || (is_root() && scope < 3)
    },
};

/// A build with fault points, which make the library fail on request.
pub const FAULT_POINTS: Need = Need {
    name: "debug assertions",
    is_met: || cfg!(debug_assertions),
};
/// Kernel that lets the master read a child's exit status even if another thread, a signal handler
/// or the kernel itself has already reaped the child.
pub const EXIT_OF_REAPED_CHILDREN: Need = Need {
    name: "Linux 6.15",
    is_met: reports_exit_of_reaped_children,
};

/// The package's sources at the path where they were when this program was built.
pub const SOURCES: Need = Need {
    name: "the sources",
    is_met: || Path::new(env!("CARGO_MANIFEST_DIR")).exists(),
};

/// A kernel that has IPv6, which may be disabled.
pub const IPV6: Need = Need {
    name: "IPv6",
    is_met: || TcpListener::bind("[::1]:0").is_ok(),
};

impl Need {
    pub fn of(&self, test: Trial) -> Trial {
        test.with_kind(format!("needs {}", self.name))
            .with_ignored_flag(!(self.is_met)())
    }
}

fn runs(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).output().is_ok()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns the path of this process's dynamic loader, or `None` if the program is statically
/// linked.
pub fn loader() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let files = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    files.map(PathBuf::from).find(|file| {
        let name = file.file_name().unwrap_or_default();
        name.as_encoded_bytes().starts_with(b"ld-")
    })
}

/// Returns whether executing a file in the temporary directory can grant privileges to its user.
fn files_can_grant_privileges() -> bool {
    use nix::sys::statvfs::{FsFlags, statvfs};

    let temporary = statvfs(&std::env::temp_dir());
    let no_new_privileges = nix::sys::prctl::get_no_new_privs();
    temporary.is_ok_and(|fs| !fs.flags().contains(FsFlags::ST_NOSUID))
        && no_new_privileges == Ok(false)
}

fn has_pid_namespaces() -> bool {
    let mut command = Command::new("true");
    let enter = || unshare(CloneFlags::CLONE_NEWPID).map_err(std::io::Error::from);
    #[allow(unsafe_code)]
    // SAFETY: the closure makes one system call and does not allocate, so it is safe between `fork`
    // and `execve`.
    unsafe {
        command.pre_exec(enter)
    };
    command.status().is_ok_and(|status| status.success())
}

/// Returns whether this process may create network namespaces and veth pairs.
fn has_networks() -> bool {
    let probe = || {
        let ip = || {
            Command::new("ip")
                .args(["link", "add", "type", "veth"])
                .output()
        };
        unshare(CloneFlags::CLONE_NEWNET).is_ok() && ip().is_ok_and(|made| made.status.success())
    };
    std::thread::spawn(probe).join().is_ok_and(|may| may)
}

fn reports_exit_of_reaped_children() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}
