//! The log: plain lines or JSON, on standard error or in a file.

use std::cell::RefCell;
use std::fmt::{self, Display, Write as _};
use std::fs::File;
use std::io::{self, IsTerminal, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use cluster::{LogWriter, Master};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    #[default]
    Plain,
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            _ => Err("neither plain nor json".to_owned()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Info,
    Warning,
    Error,
}

impl Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// Writes a line for each event, and on a terminal a status line below them.
pub(crate) struct Log {
    writer: RefCell<LogWriter>,
    format: Format,
    file: Option<PathBuf>,
    status: RefCell<String>,
}

impl Log {
    pub(crate) fn open(file: Option<&Path>, format: Format) -> Result<Self, String> {
        let writer = match file {
            Some(path) => open(path)?,
            None => LogWriter::stderr(),
        };
        Ok(Self {
            writer: RefCell::new(writer),
            format,
            file: file.map(Path::to_owned),
            status: RefCell::default(),
        })
    }

    /// Lets the master's loop write the lines for which the target has no space yet.
    pub(crate) fn attach(&self, master: &Master) {
        let writer = self.writer.borrow().clone();
        self.writer.replace(writer.attached_to(master));
    }

    /// Opens the file again, for example after logrotate(8) has renamed it. If that fails, the log
    /// stays in the renamed file.
    pub(crate) fn reopen(&self, master: &Master) {
        let Some(path) = &self.file else {
            return;
        };
        match open(path) {
            Ok(writer) => {
                self.writer.replace(writer.attached_to(master));
            }
            Err(error) => self.line(Level::Error, error),
        }
    }

    pub(crate) fn line(&self, level: Level, text: impl Display) {
        let line = match self.format {
            // Include the process id, because two masters write to the same log during an upgrade.
            Format::Plain => format!("{} [{}] {text}\n", now(), process::id()),
            Format::Json => object(level, &text.to_string()),
        };
        self.print(&line);
    }

    /// Reports why this process ends. The line also goes to standard error if the log is a file,
    /// because the user or the service manager looks there first.
    pub(crate) fn failure(&self, error: impl Display) {
        let log = LogWriter::stderr();
        match self.format {
            Format::Plain => log.line(format_args!("cluster-serve: {error}")),
            Format::Json => log.line(object(Level::Error, &error.to_string()).trim_end()),
        }
        if self.file.is_some() {
            self.line(Level::Error, error);
        }
    }

    /// Returns whether the log is plain and goes to a terminal. Only then does it have a status
    /// line.
    pub(crate) fn is_terminal(&self) -> bool {
        self.file.is_none() && self.format == Format::Plain && io::stderr().is_terminal()
    }

    pub(crate) fn show(&self, status: String) {
        if self.is_terminal() && *self.status.borrow() != status {
            self.status.replace(status);
            self.print("");
        }
    }

    /// Prints the line, and on a terminal the status below it. Leaves the cursor at the start of
    /// the status, so that output of the programs overwrites the status.
    fn print(&self, line: &str) {
        let text = match self.is_terminal() {
            true => format!("\r\x1b[K{line}{}\r", self.status.borrow()),
            false => line.to_owned(),
        };
        let mut writer = &*self.writer.borrow();
        let _ = writer.write_all(text.as_bytes());
        // Flush, because the status does not end with a line feed.
        let _ = writer.flush();
    }
}

fn open(path: &Path) -> Result<LogWriter, String> {
    let mut options = File::options();
    // Without O_NONBLOCK, opening a FIFO waits for a reader (fifo(7)).
    options
        .append(true)
        .create(true)
        .mode(0o644) // Only the owner may write, even with a umask of 0.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path);
    let file = file.map_err(|error| format!("cannot open --log {}: {error}", path.display()))?;
    Ok(LogWriter::new(file))
}

/// Returns a line with one JSON object (RFC 8259).
fn object(level: Level, text: &str) -> String {
    let (time, pid) = (now(), process::id());
    let mut line = format!(r#"{{"time":"{time}","level":"{level}","pid":{pid},"text":""#);
    for character in text.chars() {
        match character {
            '"' | '\\' => line.extend(['\\', character]),
            '\0'..' ' => _ = write!(line, "\\u{:04x}", u32::from(character)),
            _ => line.push(character),
        }
    }
    line.push_str("\"}\n");
    line
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default();
    date(since.as_secs(), since.subsec_millis())
}

/// Formats seconds and milliseconds since 1970 as a time in UTC (RFC 3339).
fn date(seconds: u64, milliseconds: u32) -> String {
    let (mut days, rest) = (seconds / 86400, seconds % 86400);
    let is_leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let day = days + 1;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn date_is_that_of_the_calendar() {
        // The expected times are those of `date --utc --date @SECONDS`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.007Z"),
            (951_782_399, "2000-02-28T23:59:59.007Z"),
            (951_782_400, "2000-02-29T00:00:00.007Z"),
            (951_868_800, "2000-03-01T00:00:00.007Z"),
            (1_735_689_599, "2024-12-31T23:59:59.007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.007Z"),
        ] {
            assert_eq!(date(seconds, 7), expected);
        }
    }

    #[test]
    fn object_escapes_what_json_does_not_allow() {
        let line = object(Level::Info, "a\"b\\c\nd\u{1}é");
        assert!(
            line.ends_with("\"text\":\"a\\\"b\\\\c\\u000ad\\u0001é\"}\n"),
            "{line}"
        );
    }
}
