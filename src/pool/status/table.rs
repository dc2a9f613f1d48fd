//! The status as a table for people.

use std::fmt::{self, Write as _};

use super::{SlotStatus, Status, WorkerStatus};

/// One line of the table. The cells are in the order of `HEAD`, and a note follows them.
struct Row {
    cells: [String; 8],
    note: String,
}

const HEAD: [&str; 8] = [
    "slot", "worker", "pid", "gen", "state", "age", "received", "open",
];

impl Row {
    fn worker(slot: &str, worker: &WorkerStatus, note: String) -> Self {
        let cells = [
            slot.to_owned(),
            worker.worker.to_string(),
            worker.pid.to_string(),
            worker.generation.to_string(),
            worker.phase.name().to_owned(),
            format!("{:.0}s", worker.age.as_secs_f64()),
            worker.received.to_string(),
            worker.open.to_string(),
        ];
        Self { cells, note }
    }

    fn empty_slot(slot: &SlotStatus, note: String) -> Self {
        let (state, age) = match slot.restart_in {
            _ if slot.is_given_up => ("given up", String::new()),
            Some(pause) => ("waiting", format!("in {:.1}s", pause.as_secs_f64())),
            None => ("empty", String::new()),
        };
        let mut cells: [String; 8] = Default::default();
        cells[0] = slot.slot.to_string();
        state.clone_into(&mut cells[4]);
        cells[5] = age;
        Self { cells, note }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [slot, worker, pid, generation, state, age, received, open] = &self.cells;
        let line = format!(
            "{slot:>4} {worker:>7} {pid:>8} {generation:>4} {state:<13} {age:>8} {received:>9} \
             {open:>5}  {}",
            self.note
        );
        f.write_str(line.trim_end())
    }
}

/// Returns a note with the slot's restarts and last failure. The note is empty if the slot has had
/// no failure.
fn note(slot: &SlotStatus) -> String {
    let Some(failure) = &slot.last_failure else {
        return String::new();
    };
    let mut note = format!("{} restarts, last: {}", slot.restarts, failure.cause);
    if let Some(status) = failure.status {
        // Ignore the result, because writing to a `String` cannot fail.
        let _ = write!(note, " ({status})");
    }
    note
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (self.is_stopping, self.is_reloading, self.is_ready) {
            (true, _, _) => "stopping",
            (_, true, _) => "reloading",
            (_, _, true) => "ready",
            (_, _, false) => "not ready",
        };
        let state = match self.stop_in {
            Some(time) => format!("{state} in {:.1} s", time.as_secs_f64()),
            None => state.to_owned(),
        };
        let (ready, slots) = (self.ready_workers(), self.slots.len());
        writeln!(
            f,
            "{state}: generation {}, {ready} ready of {slots}, {} failures, up {:.0} s",
            self.generation,
            self.failures,
            self.age.as_secs_f64()
        )?;
        let head = Row {
            cells: HEAD.map(str::to_owned),
            note: String::new(),
        };
        writeln!(f, "{head}")?;
        for slot in &self.slots {
            let number = slot.slot.to_string();
            let row = match &slot.worker {
                Some(worker) => Row::worker(&number, worker, note(slot)),
                None => Row::empty_slot(slot, note(slot)),
            };
            writeln!(f, "{row}")?;
            if let Some(successor) = &slot.successor {
                writeln!(f, "{}", Row::worker("+", successor, String::new()))?;
            }
        }
        for worker in &self.disconnecting {
            writeln!(f, "{}", Row::worker("-", worker, String::new()))?;
        }
        Ok(())
    }
}
