//! Tests of connections that only workers of one user may receive.

use super::*;

const OTHER: User = User { uid: 1, gid: 0 };

/// Returns a dispatcher with two idle workers of different users: the worker 1 has the default user,
/// and the worker 2 has the user `OTHER`.
fn with_two_users() -> Dispatcher<u32> {
    let mut dispatcher = Dispatcher::new();
    for (worker, user) in [(1, User::default()), (2, OTHER)] {
        dispatcher.add(id(worker), user);
        dispatcher
            .idle_reported(id(worker), 0, 0, Time::ZERO)
            .unwrap();
    }
    dispatcher
}

#[test]
fn restricted_connection_goes_only_to_workers_of_its_user() {
    let mut dispatcher = with_two_users();
    for connection in 0..2 {
        dispatcher.push_resumed(connection, Some(OTHER));
    }
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 0)]);
    // The second connection waits for the worker 2, and delays no other connection.
    assert_eq!(dispatcher.capacity(), 1);
    dispatcher.push(2);
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 2)]);
    assert_eq!(dispatcher.capacity(), 0);
    let slow = Time::from_secs(1);
    dispatcher.idle_reported(id(1), 1, 0, slow).unwrap();
    assert_eq!((dispatcher.capacity(), dispatcher.has_waiting()), (1, true));
    assert_eq!(dispatch_all(&mut dispatcher), []);
    dispatcher.idle_reported(id(2), 1, 0, slow).unwrap();
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 1)]);
}

#[test]
fn connections_that_only_a_stopped_worker_may_receive_are_not_reclaimed() {
    let mut dispatcher = with_two_users();
    dispatcher.push_resumed(0, Some(OTHER));
    let first = dispatcher.dispatch_next(Time::ZERO).unwrap();
    assert_eq!(first.worker, id(2));
    // The worker 1 is idle and prompt, but may not receive the connection.
    assert_eq!(dispatcher.rebalance_deadline(), None);
    assert_eq!(dispatcher.reclaimable(Time::from_secs(1)), None);
    // With a connection that the worker 1 may receive, both are reclaimed once.
    dispatcher.idle_reported(id(2), 1, 0, Time::ZERO).unwrap();
    dispatcher.push(1);
    dispatcher.push(2);
    dispatcher.push_resumed(3, Some(OTHER));
    let now = Time::from_secs(1);
    dispatcher.window = 2;
    let mut in_queue = Vec::new();
    while let Some(next) = dispatcher.dispatch_next(now) {
        if next.worker == id(2) {
            in_queue.push(next.connection);
        }
    }
    let only_other = |connection: &u32| (*connection == 3).then_some(OTHER);
    dispatcher.idle_reported(id(1), 1, 0, now).unwrap();
    let now = now + STALL_TIMEOUT;
    while let Some((worker, count)) = dispatcher.reclaimable(now) {
        assert_eq!(worker, id(2));
        let count = count.min(in_queue.len());
        let back: Vec<_> = in_queue.drain(..count).collect();
        let undelivered = in_queue.is_empty().then_some(0);
        dispatcher.reclaimed(
            worker,
            back.into_iter()
                .map(|connection| restricted(connection, only_other))
                .collect(),
            undelivered,
        );
    }
    assert!(in_queue.is_empty());
    assert_eq!(dispatch_all(&mut dispatcher), [(1, 2), (2, 3)]);
    dispatcher.idle_reported(id(1), 2, 0, now).unwrap();
    assert_eq!(dispatcher.reclaimable(Time::from_secs(9)), None);
    assert_eq!(dispatcher.rebalance_deadline(), None);
}

#[test]
fn connections_that_an_idle_report_has_not_counted_go_to_another_user() {
    let mut dispatcher = with_two_users();
    dispatcher.window = 4;
    dispatcher.push_resumed(0, Some(OTHER));
    (1..=3).for_each(|connection| dispatcher.push(connection));
    let dispatched = dispatch_all(&mut dispatcher);
    let count = |worker| dispatched.iter().filter(|(own, _)| *own == worker).count() as u64;
    assert!(count(1) >= 2, "{dispatched:?}");
    // The worker 1 has sent this report before the other connections reached its queue.
    dispatcher.idle_reported(id(1), 1, 0, Time::ZERO).unwrap();
    dispatcher
        .idle_reported(id(2), count(2), 0, Time::ZERO)
        .unwrap();
    let later = Time::from_secs(1);
    assert!(dispatcher.reclaimable(later).is_some(), "{dispatched:?}");
}

#[test]
fn scheduled_connections_of_a_user_leave_the_capacity_of_other_users() {
    let mut dispatcher = with_two_users();
    dispatcher.use_scheduler();
    for connection in 0..40 {
        dispatcher.push_resumed(connection, Some(OTHER));
        let (sequence, _) = dispatcher.unscheduled().unwrap();
        let worker = (connection % 2 == 0).then_some(id(2));
        dispatcher.choose(sequence, worker);
    }
    assert_eq!(dispatcher.capacity(), u64::from(MAX_WINDOW));
    dispatch_all(&mut dispatcher);
    assert_eq!(dispatcher.capacity(), u64::from(MAX_WINDOW));
    dispatcher.push(40);
    assert_eq!(dispatcher.capacity(), u64::from(MAX_WINDOW) - 1);
}

#[test]
fn scheduler_may_choose_only_workers_of_the_user() {
    let mut dispatcher = with_two_users();
    dispatcher.use_scheduler();
    dispatcher.push_resumed(7, Some(OTHER));
    let (sequence, _) = dispatcher.unscheduled().unwrap();
    let candidates: Vec<_> = dispatcher
        .candidates(sequence)
        .map(|load| load.worker)
        .collect();
    assert_eq!(candidates, [id(2)]);
    dispatcher.choose(sequence, Some(id(1)));
    assert_eq!(dispatch_all(&mut dispatcher), [(2, 7)]);
    dispatcher.push_resumed(8, Some(OTHER));
    dispatcher.end(id(2));
    assert_eq!(dispatcher.unscheduled(), None);
    dispatcher.push_resumed(9, Some(User::default()));
    assert_eq!(dispatcher.unscheduled(), Some((3, &9)));
}

proptest! {
    /// Drives workers of two users with random connections and reports.
    #[test]
    fn workers_of_one_user_delay_no_connection_of_another(
        steps in proptest::collection::vec((0..4_u8, 0..4_u32, any::<bool>()), 0..300),
    ) {
        let mut dispatcher = Dispatcher::new();
        let user = |number: u32| User { uid: number % 2, gid: 0 };
        let mut queues: [VecDeque<Sequenced<u32>>; 4] = Default::default();
        let mut received = [0; 4];
        (0..4).for_each(|worker| dispatcher.add(id(worker + 1), user(worker)));
        let mut now = Time::ZERO;
        // A connection with the number 2 is unrestricted, and the others belong to a user.
        let user_of = |connection: &u32| (*connection < 2).then(|| user(*connection));
        for (kind, n, flag) in steps {
            let (worker, at) = (id(n + 1), n as usize);
            match kind {
                0 => {
                    let connection = n % 3;
                    dispatcher.push_resumed(connection, user_of(&connection));
                }
                1 => {
                    received[at] += u64::from(queues[at].pop_front().is_some());
                    if queues[at].is_empty() {
                        dispatcher.idle_reported(worker, received[at], 0, now).unwrap();
                    }
                }
                2 if flag => now += Time::from_millis(u64::from(n) * 7),
                _ => {
                    dispatcher.end_penalties(now);
                    if let Some((worker, count)) = dispatcher.reclaimable(now) {
                        let queue = &mut queues[worker.get() as usize - 1];
                        let behind = queue.len().min(count);
                        let back: Vec<_> = queue.drain(..behind).collect();
                        let undelivered = queue.is_empty().then_some(0);
                        dispatcher.reclaimed(worker, back.into_iter().map(|connection| restricted(connection, user_of)).collect(), undelivered);
                    }
                }
            }
            while let Some(next) = dispatcher.dispatch_next(now) {
                let index = next.worker.get() - 1;
                let only = user_of(&next.connection.connection);
                prop_assert!(only.is_none_or(|only| only == user(index)));
                queues[index as usize].push_back(next.connection);
            }
            // A waiting connection has no idle worker of its user.
            for waiting in dispatcher.waiting() {
                let only = user_of(waiting);
                let is_idle = dispatcher.idle.iter().any(|rank| {
                    let own = user(rank.worker.get() - 1);
                    only.is_none_or(|only| only == own)
                });
                prop_assert!(!is_idle, "{waiting} waits in vain");
            }
            // Restricted connections that wait use no capacity.
            let capacity = dispatcher.idle.len() as u64 * u64::from(dispatcher.window);
            prop_assert_eq!(dispatcher.capacity(), capacity);
        }
    }
}
