//! Tests of the dispatcher. This file has the tests of workers of one user.

mod users;

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

const NOW: Time = Time::ZERO;
const LATER: Time = Time::from_secs(1);

fn id(n: u32) -> WorkerId {
    WorkerId::new(n)
}

/// Returns a dispatcher with `count` idle workers. Their ids start at 1.
fn with_idle_workers(count: u32) -> Dispatcher<u32> {
    let mut dispatcher = Dispatcher::new();
    for n in 1..=count {
        dispatcher.add(id(n), User::default());
        dispatcher.idle_reported(id(n), 0, 0, NOW).unwrap();
    }
    dispatcher
}

fn unrestricted(connection: Sequenced<u32>) -> Undispatched<u32> {
    restricted(connection, |_| None)
}

/// Restricts a connection to the user that `user_of` returns for it.
fn restricted(
    connection: Sequenced<u32>,
    user_of: impl Fn(&u32) -> Option<User>,
) -> Undispatched<u32> {
    Undispatched {
        user: user_of(&connection.connection),
        connection,
    }
}

fn sequenced(sequence: u64, connection: u32) -> Sequenced<u32> {
    Sequenced {
        sequence,
        connection,
    }
}

/// Dispatches waiting connections until none waits or no worker has capacity. Returns the worker
/// and the connection of each dispatch.
fn dispatch_all(dispatcher: &mut Dispatcher<u32>) -> Vec<(u32, u32)> {
    let dispatched = std::iter::from_fn(|| dispatcher.dispatch_next(NOW));
    let dispatched = dispatched.map(|each| (each.worker.get(), each.connection.connection));
    dispatched.collect()
}

/// Lets an idle worker serve quickly until the window reaches its largest size.
fn grow_window(dispatcher: &mut Dispatcher<u32>, worker: u32) {
    let mut received = 0;
    for window in [1, 2, 4, 8] {
        (0..window).for_each(|c| dispatcher.push(c));
        assert_eq!(dispatch_all(dispatcher).len(), window as usize);
        received += u64::from(window);
        dispatcher
            .idle_reported(id(worker), received, 0, NOW)
            .unwrap();
    }
}

#[test]
fn paused_worker_gets_no_connection() {
    let mut dispatcher = Dispatcher::new();
    dispatcher.add(id(1), User::default());
    dispatcher.push(7);
    assert!(dispatcher.dispatch_next(NOW).is_none());
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    assert_eq!(
        dispatcher.capacity(),
        0,
        "a connection waits for the only idle worker"
    );
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 7)]);
}

#[test]
fn idle_workers_take_strict_turns() {
    let mut dispatcher = with_idle_workers(3);
    let mut received = [0; 3];
    for n in 0..300 {
        dispatcher.push(n);
        let worker = n % 3 + 1;
        assert_eq!(dispatch_all(&mut dispatcher), [(worker, n)]);
        let count = &mut received[worker as usize - 1];
        *count += 1;
        dispatcher
            .idle_reported(id(worker), *count, 0, NOW)
            .unwrap();
    }
}

#[test]
fn late_worker_gets_its_turn_back() {
    let mut dispatcher = Dispatcher::new();
    (1..=3).for_each(|n| dispatcher.add(id(n), User::default()));
    for n in [2, 3] {
        dispatcher.idle_reported(id(n), 0, 0, NOW).unwrap();
    }
    dispatcher.push(0);
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 0)]);
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    dispatcher.push(1);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 1)]);
}

/// Dispatches one connection to the first of two workers and then 12 to either worker. Returns the
/// worker of each of the 12. The time between two connections is `duration`. The first worker is
/// always idle again before the next connection arrives. The second worker is never idle again
/// after its first connection.
fn uneven_turns(duration: Time) -> Vec<u32> {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(0);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 0)]);
    dispatcher.idle_reported(id(1), 1, 0, NOW).unwrap();
    let mut now = NOW;
    let mut next = |n| {
        dispatcher.push(n);
        let dispatched = dispatcher.dispatch_next(now).unwrap();
        now += duration;
        let member = &dispatcher.members[&id(1)];
        if member.load() > 0 {
            let received = member.dispatched;
            dispatcher.idle_reported(id(1), received, 0, now).unwrap();
        }
        // Restore the largest window, because a busy worker must have capacity for more
        // connections. The reports of single connections would keep the window at 1.
        dispatcher.window = MAX_WINDOW;
        dispatched.worker.get()
    };
    (0..12).map(&mut next).collect()
}

#[test]
fn idle_worker_yields_to_a_worker_with_fewer_connections_that_just_became_busy() {
    let even = [2, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 2];
    assert_eq!(uneven_turns(Time::ZERO), even);
    assert_eq!(
        uneven_turns(FAIRNESS_BUSY_SPAN),
        [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    );
}

#[test]
fn connection_left_unassigned_by_the_scheduler_waits_for_an_idle_worker() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.use_scheduler();
    let accept_and_choose = |dispatcher: &mut Dispatcher<u32>, worker| {
        dispatcher.window = MAX_WINDOW;
        dispatcher.push(0);
        let (sequence, _) = dispatcher.unscheduled().unwrap();
        dispatcher.choose(sequence, worker);
        dispatch_all(dispatcher)
            .iter()
            .map(|(worker, _)| *worker)
            .collect::<Vec<_>>()
    };
    for received in 1..=2 * FAIRNESS_LEAD {
        assert_eq!(accept_and_choose(&mut dispatcher, Some(id(2))), [2]);
        dispatcher.idle_reported(id(2), received, 0, NOW).unwrap();
    }
    assert_eq!(
        accept_and_choose(&mut dispatcher, Some(id(1))),
        [1],
        "the worker with the lower recent load is busy now"
    );
    assert_eq!(accept_and_choose(&mut dispatcher, None), [2]);
    assert_eq!(
        accept_and_choose(&mut dispatcher, None),
        [0; 0],
        "no worker is idle"
    );
    dispatcher.idle_reported(id(1), 1, 0, NOW).unwrap();
    assert_eq!(dispatch_all(&mut dispatcher).len(), 1);
}

#[test]
#[cfg_attr(miri, ignore = "dispatches 3,000 connections; slow")]
fn recent_load_forgets_old_connections() {
    let mut dispatcher = with_idle_workers(2);
    let mut received = 0;
    let mut serve = |dispatcher: &mut Dispatcher<u32>| {
        dispatcher.push(0);
        received += 1;
        assert_eq!(dispatch_all(dispatcher), [(2, 0)]);
        dispatcher.idle_reported(id(2), received, 0, NOW).unwrap();
    };
    dispatcher.pause(id(1)).unwrap();
    (0..3 * RECENT_LOAD_SPAN).for_each(|_| serve(&mut dispatcher));
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    dispatcher.push(0);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 0)]);
    assert_eq!(
        dispatcher.members[&id(1)].recent_load,
        2 * RECENT_LOAD_SPAN + 1
    );
}

#[test]
fn slow_worker_gets_one_connection_at_a_time() {
    let mut dispatcher = with_idle_workers(2);
    for received in 1..10 {
        (0..5).for_each(|c| dispatcher.push(c));
        assert_eq!(dispatch_all(&mut dispatcher).len(), 2, "one each");
        dispatcher.take_waiting();
        for worker in [1, 2] {
            dispatcher
                .idle_reported(id(worker), received, 0, LATER)
                .unwrap();
        }
    }
}

#[test]
fn window_grows_with_quick_workers_and_halves_after_a_slow_one() {
    let mut dispatcher = with_idle_workers(1);
    grow_window(&mut dispatcher, 1);
    assert_eq!(dispatcher.capacity(), u64::from(MAX_WINDOW));
    dispatcher.push(0);
    assert_eq!(dispatch_all(&mut dispatcher).len(), 1);
    dispatcher.idle_reported(id(1), 16, 0, LATER).unwrap();
    assert_eq!(dispatcher.capacity(), u64::from(MAX_WINDOW) / 2);
}

#[test]
fn connections_queued_behind_a_slow_request_go_to_an_idle_worker() {
    let mut dispatcher = with_idle_workers(1);
    grow_window(&mut dispatcher, 1);
    (0..5).for_each(|c| dispatcher.push(c));
    assert_eq!(dispatch_all(&mut dispatcher).len(), 5);
    assert_eq!(dispatcher.reclaimable(LATER), None, "no worker is idle");
    dispatcher.add(id(2), User::default());
    dispatcher.idle_reported(id(2), 0, 0, NOW).unwrap();
    assert_eq!(
        dispatcher.reclaimable(NOW),
        None,
        "the request may still be quick"
    );
    assert_eq!(dispatcher.rebalance_deadline(), Some(QUICK));
    assert_eq!(dispatcher.reclaimable(QUICK), Some((id(1), 4)));
    dispatcher.reclaimed(
        id(1),
        (17..21)
            .map(|n| sequenced(n, 0))
            .map(unrestricted)
            .collect(),
        None,
    );
    assert_eq!(
        dispatch_all(&mut dispatcher),
        [(2, 0); 4],
        "the slow worker gets nothing"
    );
    dispatcher.idle_reported(id(2), 4, 0, LATER).unwrap();
    dispatcher.reclaimed(id(1), Vec::new(), Some(0));
    assert_eq!(
        dispatcher.reclaimable(LATER),
        None,
        "the first connection is being served"
    );
}

#[test]
fn connections_of_a_stalled_worker_go_to_others() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(5);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 5)]);
    assert_eq!(dispatcher.reclaimable(NOW), None);
    assert_eq!(dispatcher.rebalance_deadline(), Some(STALL_TIMEOUT));
    assert_eq!(dispatcher.reclaimable(STALL_TIMEOUT), Some((id(1), 1)));
    dispatcher.reclaimed(id(1), vec![unrestricted(sequenced(1, 5))], None);
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 5)]);
    dispatcher.idle_reported(id(2), 1, 0, NOW).unwrap();
    for n in 6..9 {
        dispatcher.push(n);
        assert_eq!(
            dispatch_all(&mut dispatcher),
            [(2, n)],
            "the stalled worker is last"
        );
        dispatcher
            .idle_reported(id(2), u64::from(n) - 4, 0, NOW)
            .unwrap();
    }
    (0..2).for_each(|n| dispatcher.push(n));
    let dispatched = dispatch_all(&mut dispatcher);
    assert_eq!(dispatched, [(2, 0), (1, 1)], "no other worker is idle");
    dispatcher.idle_reported(id(1), 1, 0, NOW).unwrap();
    dispatcher.idle_reported(id(2), 5, 0, NOW).unwrap();
    (9..11).for_each(|n| dispatcher.push(n));
    assert_eq!(
        dispatch_all(&mut dispatcher),
        [(2, 9), (1, 10)],
        "the worker is prompt again"
    );
}

#[test]
fn pausing_worker_does_not_become_stalled() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(5);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 5)]);
    dispatcher.pause(id(1)).unwrap();
    dispatcher.reclaimed(id(1), vec![unrestricted(sequenced(1, 5))], Some(0));
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 5)]);
    dispatcher.idle_reported(id(2), 1, 0, NOW).unwrap();
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    dispatcher.push(6);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 6)], "prompt");
}

/// Dispatches a connection to worker 1 and reclaims it, so that worker 1 becomes stalled. Worker 2
/// receives the connection, and is idle again.
fn stall_first(dispatcher: &mut Dispatcher<u32>, now: Time) {
    dispatcher.push(0);
    let dispatched = dispatcher.dispatch_next(now).unwrap();
    assert_eq!(dispatched.worker, id(1));
    dispatcher.reclaimed(id(1), vec![unrestricted(dispatched.connection)], Some(0));
    serve_by(dispatcher, 2, now);
}

/// Dispatches the waiting connection, which must go to `worker`. The worker receives it, and is
/// idle again.
fn serve_by(dispatcher: &mut Dispatcher<u32>, worker: u32, now: Time) {
    let dispatched = dispatcher.dispatch_next(now).unwrap();
    assert_eq!(dispatched.worker, id(worker));
    let received = dispatcher.members[&id(worker)].dispatched;
    dispatcher
        .idle_reported(id(worker), received, 0, now)
        .unwrap();
}

#[test]
fn expiry_of_an_earlier_penalty_does_not_end_the_next_penalty() {
    let mut dispatcher = with_idle_workers(2);
    stall_first(&mut dispatcher, NOW);
    dispatcher.pause(id(2)).unwrap();
    dispatcher.push(1);
    serve_by(&mut dispatcher, 1, NOW);
    dispatcher.idle_reported(id(2), 1, 0, NOW).unwrap();
    dispatcher.push(2);
    serve_by(&mut dispatcher, 2, NOW);
    let later = PENALTY_MIN - Time::from_millis(1);
    stall_first(&mut dispatcher, later);
    dispatcher.push(3);
    serve_by(&mut dispatcher, 2, PENALTY_MIN);
    dispatcher.push(4);
    serve_by(&mut dispatcher, 1, later + PENALTY_MIN);
}

#[test]
fn connection_queued_behind_a_slow_request_is_reclaimed_when_a_penalty_ends() {
    let mut dispatcher = with_idle_workers(2);
    stall_first(&mut dispatcher, NOW);
    dispatcher.pause(id(1)).unwrap();
    dispatcher.window = MAX_WINDOW;
    (1..3).for_each(|c| dispatcher.push(c));
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 1), (2, 2)]);
    assert_eq!(dispatcher.rebalance_deadline(), None, "no worker is idle");
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    assert_eq!(dispatcher.reclaimable(QUICK), None, "worker 1 is stalled");
    assert_eq!(dispatcher.rebalance_deadline(), Some(PENALTY_MIN));
    dispatcher.end_penalties(PENALTY_MIN);
    assert_eq!(dispatcher.reclaimable(PENALTY_MIN), Some((id(2), 1)));
}

#[test]
#[cfg_attr(miri, ignore = "simulates four seconds in steps of 1 ms; slow")]
fn stalled_worker_is_retried_after_penalties_that_double() {
    let mut dispatcher = with_idle_workers(2);
    let (mut received, mut times) = (0, Vec::new());
    for ms in 0..4000u32 {
        let now = Duration::from_millis(u64::from(ms));
        dispatcher.push(ms);
        while let Some(dispatched) = dispatcher.dispatch_next(now) {
            if dispatched.worker == id(1) {
                times.push(ms);
                dispatcher.reclaimed(id(1), vec![unrestricted(dispatched.connection)], None);
            } else {
                received += 1;
                dispatcher.idle_reported(id(2), received, 0, now).unwrap();
            }
        }
    }
    assert_eq!(times, [0, 40, 120, 280, 600, 1240, 2240, 3240]);
}

#[test]
fn stalled_idle_worker_comes_before_a_busy_one() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(0);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 0)]);
    dispatcher.reclaimed(id(1), vec![unrestricted(sequenced(1, 0))], None);
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 0)]);
    dispatcher.idle_reported(id(2), 1, 0, NOW).unwrap();
    (1..4).for_each(|n| dispatcher.push(n));
    assert_eq!(dispatch_all(&mut dispatcher)[..2], [(2, 1), (1, 2)]);
    dispatcher.take_waiting();
    dispatcher.reclaimed(id(1), vec![unrestricted(sequenced(3, 2))], None);
    dispatcher.take_waiting();
    assert!(
        dispatcher.capacity() > 0,
        "the stalled worker may respond again"
    );
}

#[test]
fn worker_with_an_empty_queue_has_nothing_to_reclaim() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(5);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 5)]);
    assert_eq!(dispatcher.reclaimed(id(1), Vec::new(), Some(0)), 1);
    assert_eq!(
        (
            dispatcher.reclaimable(LATER),
            dispatcher.rebalance_deadline()
        ),
        (None, None)
    );
    assert_eq!(dispatcher.in_flight(), 0);
    assert_eq!(
        dispatcher.idle_reported(id(1), 1, 0, LATER),
        Ok(0),
        "the report is not news"
    );
}

#[test]
fn connection_on_its_way_to_an_empty_queue_is_not_received() {
    let mut dispatcher = with_idle_workers(1);
    dispatcher.push(5);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 5)]);
    assert_eq!(dispatcher.reclaimed(id(1), Vec::new(), Some(1)), 0);
    assert_eq!(dispatcher.in_flight(), 1);
    assert_eq!(dispatcher.counted(id(1), 0), 1);
    assert_eq!(dispatcher.in_flight(), 0);
}

#[test]
fn reclaimed_connections_keep_their_sequence() {
    let mut dispatcher = with_idle_workers(1);
    grow_window(&mut dispatcher, 1);
    (0..3).for_each(|c| dispatcher.push(c));
    assert_eq!(dispatch_all(&mut dispatcher).len(), 3);
    dispatcher.push(3);
    dispatcher.pause(id(1)).unwrap();
    let reclaimed = vec![sequenced(18, 2), sequenced(17, 1)];
    let (load, received) =
        dispatcher.queue_closed(id(1), reclaimed.into_iter().map(unrestricted).collect(), 0);
    assert_eq!(received, 1);
    let load = load.unwrap();
    assert_eq!((load.dispatched, load.received, load.returned), (18, 16, 2));
    dispatcher.add(id(2), User::default());
    dispatcher.idle_reported(id(2), 0, 0, LATER).unwrap();
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 1), (2, 2), (2, 3)]);
    assert_eq!(dispatcher.in_flight(), 3);
}

#[test]
fn worker_with_a_full_queue_gets_nothing_until_it_is_idle() {
    let mut dispatcher = with_idle_workers(2);
    dispatcher.push(5);
    let Dispatched {
        worker, connection, ..
    } = dispatcher.dispatch_next(NOW).unwrap();
    let failure = DispatchFailure::QueueUnusable;
    dispatcher.not_dispatched(worker, Some(unrestricted(connection)), failure);
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 5)]);
    assert_eq!(dispatcher.capacity(), 0);
    dispatcher.idle_reported(id(1), 0, 0, NOW).unwrap();
    assert_eq!(dispatcher.capacity(), 1);
}

#[test]
fn impossible_reports_are_errors() {
    let mut dispatcher = with_idle_workers(1);
    assert!(dispatcher.idle_reported(id(1), 1, 0, NOW).is_err());
    assert!(dispatcher.idle_reported(id(2), 0, 0, NOW).is_err());
    assert!(dispatcher.pause(id(2)).is_err());
}

#[test]
fn ended_worker_gets_no_connection() {
    let mut dispatcher = with_idle_workers(1);
    dispatcher.end(id(1));
    assert_eq!(dispatcher.capacity(), 0);
    dispatcher.push(1);
    assert!(dispatcher.dispatch_next(NOW).is_none());
    assert_eq!(
        dispatcher.idle_reported(id(1), 0, 0, NOW),
        Ok(0),
        "a late report is no error"
    );
    assert!(dispatcher.dispatch_next(NOW).is_none());
}

proptest! {
    /// Checks after each event of a random sequence that the dispatcher's sums match the simulated
    /// queues, and that no queue exceeds the largest window.
    #[test]
    fn sums_match_the_queues(steps in proptest::collection::vec((0..6u8, 1..4u32, 0..30u64), 0..200)) {
        let mut dispatcher = with_idle_workers(3);
        let mut queues = [const { VecDeque::new() }; 4];
        let mut received = [0; 4];
        let (mut accepted, mut now) = (0, NOW);
        for (step, worker, n) in steps {
            let (worker, index) = (id(worker), worker as usize);
            match step {
                0 | 1 => {
                    dispatcher.push(0);
                    accepted += 1;
                }
                2 | 3 if !queues[index].is_empty() => {
                    queues[index].pop_front();
                    received[index] += 1;
                }
                2..=4 if queues[index].is_empty() => {
                    dispatcher.idle_reported(worker, received[index], 0, now).unwrap();
                }
                5 => now += Time::from_millis(n),
                _ => {
                    dispatcher.counted(worker, queues[index].len() as u64);
                }
            }
            while let Some(dispatched) = dispatcher.dispatch_next(now) {
                queues[dispatched.worker.get() as usize].push_back(dispatched.connection);
            }
            while let Some((victim, count)) = dispatcher.reclaimable(now) {
                let queue = &mut queues[victim.get() as usize];
                let reclaimed: Vec<_> = queue.drain(..count.min(queue.len())).collect();
                let is_empty = reclaimed.len() < count;
                dispatcher.reclaimed(victim, reclaimed.into_iter().map(unrestricted).collect(), is_empty.then_some(0));
                while let Some(dispatched) = dispatcher.dispatch_next(now) {
                    queues[dispatched.worker.get() as usize].push_back(dispatched.connection);
                }
            }
            prop_assert!(queues.iter().all(|queue| queue.len() <= MAX_WINDOW as usize));
            for n in 1..4 {
                dispatcher.counted(id(n), queues[n as usize].len() as u64);
            }
            let queued: usize = queues.iter().map(VecDeque::len).sum();
            prop_assert_eq!(dispatcher.in_flight(), (dispatcher.waiting.len() + queued) as u64);
            prop_assert_eq!(accepted, dispatcher.in_flight() + received.iter().sum::<u64>());
        }
    }
}
