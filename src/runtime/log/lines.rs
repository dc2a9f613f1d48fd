//! Decides which log lines wait, which are written together, and which are dropped. The module
//! makes no system calls.

use crate::sys::log::WriteLimit;

/// The maximum number of bytes that wait to be written, including those of the incomplete line.
///
/// The value is the capacity of a pipe on Linux (pipe(7)). With a smaller value, lines would be
/// dropped even if the log's reader pauses only briefly. With a larger value, more memory would
/// stay allocated if the reader never continues. No benchmark chose the value.
const CAPACITY: usize = 64 << 10;

/// The lines that wait to be written, followed by the incomplete line.
///
/// After a line has been dropped, all later lines are dropped until half of the capacity is free. A
/// notice with the number of dropped lines is then added. Because no line was kept in between, the
/// notice stands exactly where the lines are missing. If a line is dropped because it is too long
/// for a datagram, the notice follows the lines that wait at that time.
#[derive(Debug, Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// The number of bytes at the start of `bytes` that may be written. The other bytes are the
    /// incomplete line.
    complete: usize,
    line: Line,
    /// The number of lines that were dropped since the last notice.
    dropped: u64,
}

/// Whether the pieces of the incomplete line are kept.
#[derive(Debug, Default, PartialEq, Eq)]
enum Line {
    #[default]
    Kept,
    /// The line has been counted as dropped. Its remaining pieces are ignored.
    Dropped,
}

impl Lines {
    pub(super) fn is_waiting(&self) -> bool {
        self.complete > 0
    }

    pub(super) fn has_space(&self, length: usize) -> bool {
        self.dropped == 0 && length <= CAPACITY - self.bytes.len()
    }

    /// Adds a line or a piece of one. Only the last byte of `piece` may be a line feed.
    pub(super) fn push(&mut self, piece: &[u8]) {
        let is_end = piece.ends_with(b"\n");
        if self.line == Line::Kept {
            if self.has_space(piece.len()) {
                self.bytes.extend_from_slice(piece);
            } else {
                self.bytes.truncate(self.complete);
                self.dropped = self.dropped.saturating_add(1);
                self.line = Line::Dropped;
            }
        }
        if is_end {
            self.line = Line::Kept;
            self.complete();
        }
        self.add_notice();
    }

    /// Allows the incomplete line to be written.
    pub(super) fn complete(&mut self) {
        self.complete = self.bytes.len();
    }

    /// Returns the bytes for the next write: one line, or as many whole lines as `limit` allows.
    /// If the first line does not fit, returns the part of it that does.
    pub(super) fn first(&self, limit: WriteLimit) -> &[u8] {
        let complete = &self.bytes[..self.complete];
        let end = |part: &[u8]| {
            part.iter()
                .rposition(|byte| *byte == b'\n')
                .map(|at| at + 1)
        };
        let length = match limit {
            WriteLimit::Line => complete.split_inclusive(|byte| *byte == b'\n').next(),
            WriteLimit::Bytes(most) => {
                let part = &complete[..most.min(complete.len())];
                Some(&part[..end(part).unwrap_or(part.len())])
            }
        };
        length.unwrap_or(complete)
    }

    /// Removes the first `length` bytes, which have been written or belong to a dropped line.
    pub(super) fn remove(&mut self, length: usize) {
        self.bytes.drain(..length);
        self.complete -= length;
        if self.bytes.is_empty() {
            // Release the memory, which is needed only while the target does not keep up.
            self.bytes = Vec::new();
        }
        self.add_notice();
    }

    /// Drops the first line, because the target can never accept it.
    pub(super) fn drop_first(&mut self) {
        self.dropped = self.dropped.saturating_add(1);
        self.remove(self.first(WriteLimit::Line).len());
    }

    /// Adds a notice after the complete lines if lines have been dropped and half of the capacity
    /// is free.
    pub(super) fn add_notice(&mut self) {
        if self.dropped == 0 || self.bytes.len() > CAPACITY / 2 {
            return;
        }
        let lines = if self.dropped == 1 { "line" } else { "lines" };
        let notice = format!("cluster: {} log {lines} dropped\n", self.dropped);
        let at = self.complete;
        self.bytes.splice(at..at, notice.bytes());
        self.complete += notice.len();
        self.dropped = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(lines: &mut Lines, length: usize) -> String {
        let taken = String::from_utf8(lines.bytes[..length].to_vec()).unwrap();
        lines.remove(length);
        taken
    }

    fn whole(lines: &Lines, most: usize) -> &str {
        std::str::from_utf8(lines.first(WriteLimit::Bytes(most))).unwrap()
    }

    #[test]
    fn only_complete_lines_wait() {
        let mut lines = Lines::default();
        lines.push(b"half");
        assert!(!lines.is_waiting());
        lines.push(b" a line\n");
        lines.push(b"more");
        assert_eq!(whole(&lines, usize::MAX), "half a line\n");
        assert_eq!(take(&mut lines, 12), "half a line\n");
        assert!(!lines.is_waiting());
        lines.complete();
        assert_eq!(whole(&lines, usize::MAX), "more");
    }

    #[test]
    fn a_write_takes_whole_lines_if_one_fits() {
        let mut lines = Lines::default();
        for line in ["one\n", "two\n", "three\n"] {
            lines.push(line.as_bytes());
        }
        assert_eq!(lines.first(WriteLimit::Line), b"one\n");
        assert_eq!(whole(&lines, 9), "one\ntwo\n");
        assert_eq!(whole(&lines, 8), "one\ntwo\n");
        assert_eq!(whole(&lines, 3), "one");
        assert_eq!(take(&mut lines, 2), "on");
        assert_eq!(whole(&lines, 9), "e\ntwo\n");
    }

    #[test]
    fn dropped_lines_are_counted_where_they_are_missing() {
        let mut lines = Lines::default();
        let line = format!("{}\n", "x".repeat(CAPACITY / 4 - 1));
        for _ in 0..6 {
            lines.push(line.as_bytes());
        }
        lines.push(b"short, and dropped, too\n");
        assert_eq!(lines.bytes.len(), CAPACITY);
        take(&mut lines, CAPACITY / 4);
        lines.push(b"not yet half of the space\n");
        assert_eq!(lines.dropped, 4);
        take(&mut lines, CAPACITY / 4);
        lines.push(b"again\n");
        take(&mut lines, CAPACITY / 2);
        assert_eq!(whole(&lines, 99), "cluster: 4 log lines dropped\nagain\n");
    }

    #[test]
    fn a_line_beyond_the_capacity_is_dropped() {
        let mut lines = Lines::default();
        lines.push(b"before\n");
        for _ in 0..5 {
            lines.push(&[b'x'; CAPACITY / 3]);
        }
        lines.push(b"its end\n");
        lines.push(b"after\n");
        let expected = "before\ncluster: 1 log line dropped\nafter\n";
        assert_eq!(whole(&lines, CAPACITY), expected);
    }

    #[test]
    fn no_schedule_mixes_or_loses_lines_without_a_count() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let (mut lines, mut written, mut count) = (Lines::default(), Vec::new(), 0);
            for step in 0..2000_u32 {
                if random.u32(..10) < 7 {
                    let length = random.usize(..400);
                    let line = format!("{step} {}\n", "x".repeat(length));
                    let (one, other) = line.split_at(random.usize(..line.len()));
                    lines.push(one.as_bytes());
                    lines.push(other.as_bytes());
                    count += 1;
                } else {
                    let first = lines.first(WriteLimit::Bytes(random.usize(1..3000)));
                    let length = first.len().min(random.usize(..1500));
                    written.extend_from_slice(&first[..length]);
                    lines.remove(length);
                }
                assert!(lines.bytes.len() <= CAPACITY);
            }
            written.extend_from_slice(&lines.bytes);
            let text = String::from_utf8(written).unwrap();
            let (mut seen, mut last) = (lines.dropped, None);
            for line in text.lines() {
                let (number, rest) = line.split_once(' ').unwrap();
                if number == "cluster:" {
                    seen += rest.split_once(' ').unwrap().0.parse::<u64>().unwrap();
                    continue;
                }
                assert!(rest.bytes().all(|byte| byte == b'x'), "{line}");
                let number = number.parse::<u32>().unwrap();
                assert!(last < Some(number));
                last = Some(number);
                seen += 1;
            }
            assert_eq!(seen, count);
        }
    }
}
