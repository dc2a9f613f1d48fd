//! The status as a JSON object.

use std::fmt::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use cluster::{Usage, WorkerId};

use super::super::failure::{FailureCause, WorkerFailure};
use super::{Seconds, SlotStatus, Status, WorkerStatus};

pub(super) fn render(status: &Status) -> String {
    let mut out = String::new();
    status.write(&mut out);
    out
}

/// A value that can be written as JSON.
trait Json {
    fn write(&self, out: &mut String);
}

/// A JSON object that is being written, member by member.
struct Object<'a> {
    out: &'a mut String,
    is_empty: bool,
}

impl<'a> Object<'a> {
    fn begin(out: &'a mut String) -> Self {
        out.push('{');
        Self {
            out,
            is_empty: true,
        }
    }

    fn member(mut self, name: &str, value: &impl Json) -> Self {
        if !std::mem::take(&mut self.is_empty) {
            self.out.push(',');
        }
        name.write(self.out);
        self.out.push(':');
        value.write(self.out);
        self
    }

    fn end(self) {
        self.out.push('}');
    }
}

/// Implements `Json` for types whose `Display` output is valid JSON.
macro_rules! written_as_displayed {
    ($($type:ty),*) => {
        $(
            impl Json for $type {
                fn write(&self, out: &mut String) {
                    // Ignore the result, because writing to a `String` cannot fail.
                    let _ = write!(out, "{self}");
                }
            }
        )*
    };
}

written_as_displayed!(bool, i32, u32, u64, usize, Seconds, WorkerId);

impl Json for Duration {
    fn write(&self, out: &mut String) {
        Seconds(*self).write(out);
    }
}

impl Json for str {
    fn write(&self, out: &mut String) {
        out.push('"');
        for char in self.chars() {
            match char {
                '"' | '\\' => out.extend(['\\', char]),
                control if control.is_control() => {
                    // Ignore the result, because writing to a `String` cannot fail.
                    let _ = write!(out, "\\u{:04x}", u32::from(control));
                }
                char => out.push(char),
            }
        }
        out.push('"');
    }
}

impl<T: Json + ?Sized> Json for &T {
    fn write(&self, out: &mut String) {
        (**self).write(out);
    }
}

impl<T: Json> Json for Option<T> {
    fn write(&self, out: &mut String) {
        match self {
            Some(value) => value.write(out),
            None => out.push_str("null"),
        }
    }
}

impl<T: Json> Json for Vec<T> {
    fn write(&self, out: &mut String) {
        out.push('[');
        for (index, item) in self.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            item.write(out);
        }
        out.push(']');
    }
}

impl Json for Status {
    fn write(&self, out: &mut String) {
        Object::begin(out)
            .member("generation", &self.generation)
            .member("ready", &self.is_ready)
            .member("reloading", &self.is_reloading)
            .member("stopping", &self.is_stopping)
            .member("stop_in", &self.stop_in)
            .member("age", &self.age)
            .member("failures", &self.failures)
            .member("slots", &self.slots)
            .member("disconnecting", &self.disconnecting)
            .end();
    }
}

impl Json for SlotStatus {
    fn write(&self, out: &mut String) {
        Object::begin(out)
            .member("slot", &self.slot)
            .member("worker", &self.worker)
            .member("successor", &self.successor)
            .member("restarts", &self.restarts)
            .member("restart_in", &self.restart_in)
            .member("given_up", &self.is_given_up)
            .member("last_failure", &self.last_failure)
            .end();
    }
}

impl Json for WorkerStatus {
    fn write(&self, out: &mut String) {
        Object::begin(out)
            .member("worker", &self.worker)
            .member("pid", &self.pid)
            .member("generation", &self.generation)
            .member("state", &self.phase.name())
            .member("age", &self.age)
            .member("received", &self.received)
            .member("open", &self.open)
            .member("busy", &self.is_busy)
            .end();
    }
}

impl Json for WorkerFailure {
    fn write(&self, out: &mut String) {
        Object::begin(out)
            .member("pid", &self.pid)
            .member("generation", &self.generation)
            .member("cause", &self.cause)
            .member("error", &self.error.as_deref())
            .member("code", &self.status.and_then(|status| status.code()))
            .member("signal", &self.status.and_then(|status| status.signal()))
            .member("age", &self.age)
            .member("usage", &self.usage)
            .end();
    }
}

impl Json for FailureCause {
    fn write(&self, out: &mut String) {
        let name = match self {
            Self::ForkFailed => "fork_failed",
            Self::OutOfResources => "out_of_resources",
            Self::ExitedBeforeReady => "exited_before_ready",
            Self::StartupTimeout => "startup_timeout",
            Self::Exited => "exited",
            Self::HeartbeatTimeout => "heartbeat_timeout",
        };
        name.write(out);
    }
}

impl Json for Usage {
    fn write(&self, out: &mut String) {
        Object::begin(out)
            .member("user", &self.user_cpu_time)
            .member("system", &self.system_cpu_time)
            .member("max_rss", &self.max_rss)
            .end();
    }
}
