//! Measures a process's memory, descriptors and children, and checks whether they grow.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};

/// Maximum growth of resident memory since the warm-up, in KiB. Most of the growth comes from the
/// program's file, because the kernel also maps the neighbours of a page that is touched for the
/// first time.
const RESIDENT: i64 = 1024;
/// Maximum growth of anonymous memory, in KiB. Some growth is allowed, because the allocator cannot
/// release heap pages in which a few bytes are in use. `IN_USE` is the stricter limit.
const ANONYMOUS: i64 = 128;
/// Maximum growth of the heap in use, in bytes. Some growth is allowed, because queues keep the
/// largest capacity that any round has needed.
const IN_USE: i64 = 64 * 1024;
/// Maximum growth of the number of allocations. Some growth is allowed, because a collection may
/// allocate its first block, or use one more node for the same contents. A leak for each worker,
/// connection, message or listener exceeds this limit, because each round has more than 10 of them.
const BLOCKS: i64 = 10;
/// Deadline of a round in seconds: a constant part, and a part that is multiplied by
/// `work_factor()`.
const ROUND_DEADLINE: (u64, u64) = (60, 5);

static BYTES: AtomicI64 = AtomicI64::new(0);
static ALLOCATIONS: AtomicI64 = AtomicI64::new(0);

/// An allocator that counts the heap in use, because the system's allocator does not report it.
pub struct CountingHeap;

fn count(bytes: usize, blocks: i64, sign: i64) {
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    BYTES.fetch_add(sign * bytes, Ordering::Relaxed);
    ALLOCATIONS.fetch_add(sign * blocks, Ordering::Relaxed);
}

// SAFETY: every call is forwarded to the system's allocator, which fulfils the contract.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1, 1);
        // SAFETY: the caller upholds the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(layout.size(), 1, -1);
        // SAFETY: the caller upholds the same contract, and the system's allocator has allocated
        // the block.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), 0, -1);
        count(size, 0, 1);
        // SAFETY: the caller upholds the same contract, and the system's allocator has allocated
        // the block.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// The heap that a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heap {
    pub bytes: i64,
    pub blocks: i64,
}

impl Heap {
    /// The length of the value as bytes.
    pub const LENGTH: usize = 16;

    pub fn now() -> Self {
        Self {
            bytes: BYTES.load(Ordering::Relaxed),
            blocks: ALLOCATIONS.load(Ordering::Relaxed),
        }
    }

    pub fn growth_since(self, earlier: Self) -> Self {
        Self {
            bytes: self.bytes - earlier.bytes,
            blocks: self.blocks - earlier.blocks,
        }
    }

    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let number = i128::from(self.bytes) << 64 | i128::from(self.blocks);
        number.to_le_bytes()
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let number = i128::from_le_bytes(bytes.try_into().unwrap());
        let low = |number: i128| i64::try_from(number & i128::from(i64::MAX)).unwrap();
        Self {
            bytes: low(number >> 64),
            blocks: low(number),
        }
    }
}

/// A measurement of one process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Resident memory in KiB, from the page tables. The counter `VmRSS` would lag by some hundred
    /// KiB.
    resident: i64,
    anonymous: i64,
    in_use: i64,
    blocks: i64,
    descriptors: i64,
    /// Number of children, including zombies.
    children: i64,
}

impl Sample {
    pub fn now() -> Self {
        trim();
        let heap = Heap::now();
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        Self {
            resident: pages(&rollup, "Rss:"),
            anonymous: pages(&rollup, "Anonymous:"),
            in_use: heap.bytes,
            blocks: heap.blocks,
            descriptors: as_number(crate::harness::open_fds().len()),
            children: children(),
        }
    }

    pub fn to_text(self) -> String {
        let Self {
            resident,
            anonymous,
            in_use,
            blocks,
            descriptors,
            children,
        } = self;
        format!("{resident} {anonymous} {in_use} {blocks} {descriptors} {children}")
    }

    pub fn from_text(text: &str) -> Self {
        let mut numbers = text.split(' ').map(|number| number.parse().unwrap());
        let mut next = || numbers.next().unwrap();
        Self {
            resident: next(),
            anonymous: next(),
            in_use: next(),
            blocks: next(),
            descriptors: next(),
            children: next(),
        }
    }
}

/// Makes the allocator release unused memory. After long messages, this can be some megabytes.
fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no preconditions.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

fn as_number(length: usize) -> i64 {
    i64::try_from(length).unwrap()
}

fn pages(rollup: &str, name: &str) -> i64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name));
    let size = line.unwrap().trim().strip_suffix(" kB").unwrap();
    size.parse().unwrap()
}

fn children() -> i64 {
    let list = std::fs::read_to_string("/proc/thread-self/children").unwrap();
    as_number(list.split_whitespace().count())
}

const COLUMN: usize = 26;
type Value = fn(&Sample) -> i64;
const COLUMNS: [(&str, Value); 6] = [
    ("resident, KiB", |sample| sample.resident),
    ("anonymous, KiB", |sample| sample.anonymous),
    ("heap, bytes", |sample| sample.in_use),
    ("heap, blocks", |sample| sample.blocks),
    ("descriptors", |sample| sample.descriptors),
    ("children", |sample| sample.children),
];

/// Returns the head of the table. Each column contains the value after the warm-up, the last value,
/// and the growth per round.
pub fn head() -> String {
    let titles = COLUMNS.map(|(title, _)| format!("{title:<COLUMN$}"));
    format!("{:COLUMN$}{}\n", "", titles.concat())
}

/// The samples of one process, one for each round.
pub struct Series {
    of: String,
    samples: Vec<Sample>,
}

impl Series {
    pub fn new(of: &str) -> Self {
        let rounds = usize::try_from(crate::ROUNDS).unwrap();
        set_round_alarm();
        Self {
            of: of.to_owned(),
            samples: Vec::with_capacity(rounds),
        }
    }

    /// Adds a sample at the end of a round, and restarts the round's alarm.
    pub fn add(&mut self, sample: Sample) {
        set_round_alarm();
        self.samples.push(sample);
    }

    /// Prints a line of the table, and panics if the process has grown.
    pub fn check(&self) {
        let (first, last) = (self.samples[0], *self.samples.last().unwrap());
        print!("{:<COLUMN$}", self.of);
        for (_, value) in COLUMNS {
            let (first, last, slope) = (value(&first), value(&last), self.slope(value));
            print!("{:<COLUMN$}", format!("{first} -> {last} {slope:+.1}"));
        }
        println!();
        for sample in &self.samples {
            assert_eq!(sample.descriptors, first.descriptors, "{:?}", self.samples);
            assert_eq!(sample.children, first.children, "{:?}", self.samples);
        }
        self.assert_level(RESIDENT, |sample| sample.resident);
        self.assert_level(ANONYMOUS, |sample| sample.anonymous);
        self.assert_level(IN_USE, |sample| sample.in_use);
        self.assert_level(BLOCKS, |sample| sample.blocks);
    }

    /// Asserts that neither the growth until the last value nor the trend of all values exceeds
    /// `slack`.
    fn assert_level(&self, slack: i64, value: impl Fn(&Sample) -> i64) {
        let growth = value(self.samples.last().unwrap()) - value(&self.samples[0]);
        assert!(growth <= slack, "grew by {growth}: {:?}", self.samples);
        #[allow(clippy::cast_precision_loss)]
        let (trend, slack) = (self.slope(value) * self.samples.len() as f64, slack as f64);
        assert!(trend <= slack, "trend of {trend}: {:?}", self.samples);
    }

    /// Returns the growth per round, by least squares.
    #[allow(clippy::cast_precision_loss)]
    fn slope(&self, value: impl Fn(&Sample) -> i64) -> f64 {
        let values = || self.samples.iter().map(|sample| value(sample) as f64);
        let count = self.samples.len() as f64;
        let middle = (count - 1.0) / 2.0;
        let mean = values().sum::<f64>() / count;
        let positions = || (0..self.samples.len()).map(|position| position as f64 - middle);
        let products = positions().zip(values()).map(|(x, y)| x * (y - mean));
        products.sum::<f64>() / positions().map(|x| x * x).sum::<f64>()
    }
}

/// Sets an alarm that kills this process if the next round does not finish.
pub fn set_round_alarm() {
    let seconds = ROUND_DEADLINE.0 + ROUND_DEADLINE.1 * crate::work_factor();
    nix::unistd::alarm::set(u32::try_from(seconds).unwrap());
}
