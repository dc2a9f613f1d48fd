//! Stores timers and finds those that are due. The module makes no system calls, because the time
//! is an argument.

use std::time::Duration;

use crate::types::ordered_set::{Key, OrderedSet, low_number};
use crate::types::time::Time;

/// The shortest interval, which is also Node's. A timer with an interval of zero would always be
/// due again at once, so the event loop would call only this timer.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);

/// Identifies a timer, so that [`Master::clear_timer`](crate::Master::clear_timer) can remove it.
/// See that method for an example.
///
/// Node: the result of `setTimeout` and `setInterval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerId {
    /// The number of timers that were created before this one. It never repeats: 64 bits are enough
    /// for one timer per nanosecond for 584 years.
    sequence: u64,
    /// The index of the timer. Indices are reused.
    slot: u32,
}

#[derive(Debug)]
struct Timer<T> {
    id: TimerId,
    due: Time,
    interval: Option<Duration>,
    /// Whether the timer keeps `run` from returning.
    referenced: bool,
    payload: T,
}

impl<T> Timer<T> {
    fn rank(&self) -> Rank {
        Rank {
            nanos: u64::try_from(self.due.as_nanos()).unwrap_or(u64::MAX),
            sequence: low_number(self.id.sequence.into()),
            slot: self.id.slot,
        }
    }
}

/// The sort key of a timer. Timers that are due in the same nanosecond are sorted by their creation,
/// and so are those that are due in more than 584 years.
#[derive(Clone, Copy, Debug)]
struct Rank {
    nanos: u64,
    /// The lowest 32 bits of the timer's sequence number. They decide the order only, so they may
    /// repeat: `slot` still distinguishes the timers.
    sequence: u32,
    slot: u32,
}

impl Key for Rank {
    fn pack(self) -> u128 {
        u128::from(self.nanos) << 64 | u128::from(self.sequence) << 32 | u128::from(self.slot)
    }

    fn unpack(packed: u128) -> Self {
        Self {
            nanos: u64::unpack(packed >> 64),
            sequence: low_number(packed >> 32),
            slot: low_number(packed),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Timers<T> {
    /// The sequence number of the next timer.
    next_sequence: u64,
    slots: Vec<Option<Timer<T>>>,
    /// The free slots.
    free: Vec<u32>,
    order: OrderedSet<Rank>,
    /// The number of referenced timers.
    referenced: usize,
}

impl<T: Clone> Timers<T> {
    pub(crate) fn new() -> Self {
        Self {
            next_sequence: 0,
            slots: Vec::new(),
            free: Vec::new(),
            order: OrderedSet::new(),
            referenced: 0,
        }
    }

    fn get_mut(&mut self, id: TimerId) -> Option<&mut Timer<T>> {
        let timer = self.slots.get_mut(id.slot as usize)?.as_mut();
        timer.filter(|timer| timer.id == id)
    }

    /// Returns the timer that is due first.
    fn first(&self) -> Option<&Timer<T>> {
        let slot = self.order.first()?.slot as usize;
        self.slots.get(slot)?.as_ref()
    }

    pub(crate) fn set(
        &mut self,
        now: Time,
        after: Duration,
        interval: Option<Duration>,
        payload: T,
    ) -> TimerId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            // A panic needs 4 billion timers at once. Each timer takes more than 100 bytes here, in
            // `order` and for its closure, so these timers would take more than 400 GB.
            u32::try_from(self.slots.len() - 1).expect("fewer than 4 billion timers")
        });
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let timer = Timer {
            id: TimerId { sequence, slot },
            due: now.saturating_add(after),
            interval: interval.map(|interval| interval.max(SHORTEST_INTERVAL)),
            referenced: true,
            payload,
        };
        let id = timer.id;
        self.order.insert(timer.rank());
        self.slots[slot as usize] = Some(timer);
        self.referenced += 1;
        id
    }

    /// Removes a timer and returns its payload. The caller must end its borrow of the timers before
    /// it drops the payload, because the payload's `Drop` may call the event loop.
    pub(crate) fn clear(&mut self, id: TimerId) -> Option<T> {
        self.get_mut(id)?;
        let timer = self.slots.get_mut(id.slot as usize)?.take()?;
        self.free.push(id.slot);
        self.order.remove(timer.rank());
        self.referenced -= usize::from(timer.referenced);
        Some(timer.payload)
    }

    /// Sets whether the timer keeps `run` from returning.
    pub(crate) fn set_referenced(&mut self, id: TimerId, referenced: bool) {
        if let Some(timer) = self.get_mut(id) {
            let was_referenced = std::mem::replace(&mut timer.referenced, referenced);
            self.referenced -= usize::from(was_referenced);
            self.referenced += usize::from(referenced);
        }
    }

    /// Returns whether a timer keeps `run` from returning.
    pub(crate) fn has_referenced(&self) -> bool {
        self.referenced > 0
    }

    pub(crate) fn deadline(&self) -> Option<Time> {
        self.first().map(|timer| timer.due)
    }

    /// Returns the payload of the first timer that is due, or `None` if no timer is due.
    ///
    /// Removes the timer if it is a timeout, and schedules it again if it is an interval. If the
    /// event loop is late, an interval skips the calls that it missed.
    pub(crate) fn next_due(&mut self, now: Time) -> Option<T> {
        let id = self.first().filter(|timer| timer.due <= now)?.id;
        let timer = self.get_mut(id)?;
        let Some(interval) = timer.interval else {
            return self.clear(id);
        };
        let old = timer.rank();
        let next = timer.due.saturating_add(interval);
        timer.due = if next > now {
            next
        } else {
            now.saturating_add(interval)
        };
        let (new, payload) = (timer.rank(), timer.payload.clone());
        self.order.replace(Some(old), Some(new));
        Some(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Time {
        Duration::from_millis(millis)
    }

    fn fire(timers: &mut Timers<&'static str>, now: Time) -> Vec<&'static str> {
        std::iter::from_fn(|| timers.next_due(now)).collect()
    }

    #[test]
    fn timers_fire_in_order_of_time_then_of_creation() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(5), None, "late");
        timers.set(ms(0), ms(3), None, "a");
        timers.set(ms(0), ms(3), None, "b");
        assert_eq!(timers.deadline(), Some(ms(3)));
        assert_eq!(fire(&mut timers, ms(2)), [""; 0]);
        assert_eq!(fire(&mut timers, ms(9)), ["a", "b", "late"]);
        assert!(!timers.has_referenced());
    }

    #[test]
    fn interval_keeps_its_rhythm_until_it_misses_a_call() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(10), Some(ms(10)), "tick");
        assert_eq!(fire(&mut timers, ms(12)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(20)));
        assert_eq!(fire(&mut timers, ms(55)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(65)));
    }

    #[test]
    fn interval_can_be_cleared_by_its_own_callback() {
        let mut timers = Timers::new();
        let id = timers.set(ms(0), ms(1), Some(ms(0)), "tick");
        assert_eq!(timers.next_due(ms(1)), Some("tick"));
        assert_eq!(timers.clear(id), Some("tick"));
        assert!(!timers.has_referenced());
        assert_eq!(timers.deadline(), None);
    }

    #[test]
    fn old_id_does_not_clear_the_next_timer_in_its_slot() {
        let mut timers = Timers::new();
        let old = timers.set(ms(0), ms(1), None, "old");
        timers.clear(old);
        timers.next_sequence = 1 << 32;
        let new = timers.set(ms(0), ms(1), None, "new");
        assert_eq!((new.slot, timers.clear(old)), (old.slot, None));
        assert_eq!(fire(&mut timers, ms(1)), ["new"]);
    }

    #[test]
    fn unreferenced_timer_fires() {
        let mut timers = Timers::new();
        let id = timers.set(ms(0), ms(1), None, "once");
        assert!(timers.has_referenced());
        timers.set_referenced(id, false);
        assert!(!timers.has_referenced());
        assert_eq!(fire(&mut timers, ms(1)), ["once"]);
    }

    #[test]
    fn referenced_timers_are_counted() {
        let mut timers = Timers::new();
        let once = timers.set(ms(0), ms(1), None, "once");
        let tick = timers.set(ms(0), ms(1), Some(ms(1)), "tick");
        for referenced in [false, false, true, true, false] {
            timers.set_referenced(tick, referenced);
        }
        assert_eq!(fire(&mut timers, ms(1)), ["once", "tick"]);
        assert!(!timers.has_referenced(), "the interval is not referenced");
        timers.set_referenced(once, true);
        assert!(!timers.has_referenced(), "the timeout has fired");
        timers.set_referenced(tick, true);
        assert!(timers.has_referenced());
        timers.clear(tick);
        assert!(!timers.has_referenced());
    }

    #[test]
    fn times_do_not_overflow() {
        let long = Duration::MAX;
        let mut timers = Timers::new();
        timers.set(ms(5), long, None, "never");
        timers.set(ms(5), long, Some(long), "never again");
        timers.set(ms(5), ms(0), Some(long), "now, then never");
        assert_eq!(fire(&mut timers, ms(5)), ["now, then never"]);
        assert_eq!(timers.deadline(), Some(long));
        assert_eq!(timers.next_due(long), Some("never"));
    }

    #[test]
    fn interval_of_zero_is_a_millisecond() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(0), Some(ms(0)), "tick");
        assert_eq!(fire(&mut timers, ms(0)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(1)));
    }
}
