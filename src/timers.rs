//! What is to happen later. Pure: the time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The time since the loop began.
pub(crate) type Time = Duration;

/// The shortest interval: with none at all a loop would do nothing else.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);

/// Names a timer, for [`Master::clear_timer`](crate::Master::clear_timer), which has an example.
///
/// Node: what `setTimeout` and `setInterval` return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerId(u64);

#[derive(Debug)]
struct Timer<T> {
    due: Time,
    interval: Option<Duration>,
    /// `None` while it is being called.
    payload: Option<T>,
}

#[derive(Debug)]
pub(crate) struct Timers<T> {
    last: u64,
    timers: BTreeMap<TimerId, Timer<T>>,
    order: BTreeSet<(Time, TimerId)>,
}

impl<T> Timers<T> {
    pub(crate) fn new() -> Self {
        Self {
            last: 0,
            timers: BTreeMap::new(),
            order: BTreeSet::new(),
        }
    }

    pub(crate) fn set(
        &mut self,
        now: Time,
        after: Duration,
        interval: Option<Duration>,
        payload: T,
    ) -> TimerId {
        self.last += 1;
        let id = TimerId(self.last);
        let due = now.saturating_add(after);
        let timer = Timer {
            due,
            interval: interval.map(|interval| interval.max(SHORTEST_INTERVAL)),
            payload: Some(payload),
        };
        self.timers.insert(id, timer);
        self.order.insert((due, id));
        id
    }

    pub(crate) fn clear(&mut self, id: TimerId) {
        if let Some(timer) = self.timers.remove(&id) {
            self.order.remove(&(timer.due, id));
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    pub(crate) fn deadline(&self) -> Option<Time> {
        self.order.first().map(|(due, _)| *due)
    }

    /// Takes out what is due first. It goes back with `put_back`.
    pub(crate) fn take_due(&mut self, now: Time) -> Option<(TimerId, T)> {
        let &(due, id) = self.order.first().filter(|(due, _)| *due <= now)?;
        self.order.remove(&(due, id));
        let payload = self.timers.get_mut(&id)?.payload.take()?;
        Some((id, payload))
    }

    /// Arms an interval again, unless it was cleared meanwhile; ends anything else. An interval
    /// that has fallen behind does not catch up.
    pub(crate) fn put_back(&mut self, now: Time, id: TimerId, payload: T) {
        let Some(timer) = self.timers.get_mut(&id) else {
            return;
        };
        match timer.interval {
            None => {
                self.timers.remove(&id);
            }
            Some(interval) => {
                let next = timer.due.saturating_add(interval);
                timer.due = if next > now { next } else { now + interval };
                timer.payload = Some(payload);
                self.order.insert((timer.due, id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Time {
        Duration::from_millis(millis)
    }

    fn fire(timers: &mut Timers<&'static str>, now: Time) -> Vec<&'static str> {
        let mut fired = Vec::new();
        while let Some((id, name)) = timers.take_due(now) {
            fired.push(name);
            timers.put_back(now, id, name);
        }
        fired
    }

    #[test]
    fn in_order_of_time_then_of_setting() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(5), None, "late");
        timers.set(ms(0), ms(3), None, "a");
        timers.set(ms(0), ms(3), None, "b");
        assert_eq!(timers.deadline(), Some(ms(3)));
        assert_eq!(fire(&mut timers, ms(2)), [""; 0]);
        assert_eq!(fire(&mut timers, ms(9)), ["a", "b", "late"]);
        assert!(timers.is_empty());
    }

    #[test]
    fn an_interval_keeps_its_rhythm_and_does_not_catch_up() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(10), Some(ms(10)), "tick");
        assert_eq!(fire(&mut timers, ms(12)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(20)));
        assert_eq!(fire(&mut timers, ms(55)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(65)));
    }

    #[test]
    fn cleared_inside_its_own_callback() {
        let mut timers = Timers::new();
        let id = timers.set(ms(0), ms(1), Some(ms(0)), "tick");
        let (same, payload) = timers.take_due(ms(1)).unwrap();
        assert_eq!(same, id);
        timers.clear(id);
        timers.put_back(ms(1), id, payload);
        assert!(timers.is_empty());
        assert_eq!(timers.deadline(), None);
    }

    #[test]
    fn an_interval_of_zero_is_a_millisecond() {
        let mut timers = Timers::new();
        timers.set(ms(0), ms(0), Some(ms(0)), "tick");
        assert_eq!(fire(&mut timers, ms(0)), ["tick"]);
        assert_eq!(timers.deadline(), Some(ms(1)));
    }
}
