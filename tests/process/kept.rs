//! Listeners that the master keeps: nobody is lost when all workers die, leave and come.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cluster::{
    Error, ListenOptions, Master, MasterListener, SchedulingPolicy, Signal, Worker, WorkerProcess,
};

use crate::harness::{
    Log, answer_pings, cluster, in_background, open_fds, serve_id, talk, when_all_wait,
};
