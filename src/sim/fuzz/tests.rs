//! Runs the fuzz targets with stored and random inputs.

use std::cell::RefCell;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::script::{
    DENIED, DISCARDED, DISPATCHED, EARLY_REPORTS, EXPIRED, FALSE_CLAIMS, IDLE_CLOSED, PARKED,
    RECEIVED, RECLAIMED, RECLAIMED_FROM_HONEST, RESUMED, Reached, SERVED,
};
use super::{frame, master_input, parked_message, script};
use crate::core::dispatch::MAX_WINDOW;
use crate::sim::kernel::check::MAX_LISTENERS;
use crate::types::protocol::VERSION;

/// Runs a fuzz target with its stored inputs.
fn replay(target: &str, run: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let corpus = std::fs::read_dir(corpora.join(target)).expect("a corpus");
    let inputs: Vec<_> = corpus.map(|input| input.expect("input").path()).collect();
    assert!(inputs.len() > 20, "only {} inputs", inputs.len());
    for input in inputs {
        println!("{}", input.display());
        run(&std::fs::read(input).expect("input"));
    }
}

#[test]
#[cfg_attr(miri, ignore = "reads files; slow")]
fn stored_inputs_survive_the_frame_target() {
    replay("frame", frame);
}

#[test]
#[cfg_attr(miri, ignore = "reads files; slow")]
fn stored_inputs_survive_the_parked_message_target() {
    replay("parked_message", parked_message);
}

#[test]
#[cfg_attr(miri, ignore = "reads files; slow")]
fn stored_inputs_survive_the_master_input_target() {
    replay("master_input", master_input);
}

/// The maximum length of a random input in bytes. The maximum number of scenes in a script is a
/// tenth of this number. The limit is smaller in Miri, because Miri runs the code about a thousand
/// times slower.
const MAX_INPUT: usize = if cfg!(miri) { 40 } else { 600 };

/// Generates sequences of frames. The headers have correct lengths and mostly plausible kinds, and
/// the bodies are arbitrary.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![0..13u8, 64..70u8, Just(127)];
    let body = proptest::collection::vec(prop_oneof![0..5u8, any::<u8>()], 0..40);
    let one = (kind, 0..3u8, 0..4u8, body).prop_map(|(kind, fds, batch, body)| {
        let length = u8::try_from(body.len()).unwrap_or(0);
        [&[length, 0, 0, 0, VERSION, kind, fds, batch], &body[..]].concat()
    });
    proptest::collection::vec(one, 0..8).prop_map(|frames| frames.concat())
}

/// Generates messages that pass parked connections. Most have a known version, and as many
/// connections as their header says.
fn parked_messages() -> impl Strategy<Value = Vec<u8>> {
    let version = prop_oneof![20 => Just(1), 1 => any::<u8>()];
    let count = prop_oneof![8 => 1..4u8, 2 => 60..=64u8, 1 => any::<u8>()];
    let one =
        (version, count, 0..6u32, any::<[u8; 8]>()).prop_map(|(version, count, lie, socket)| {
            let connections = u32::from(count).saturating_add_signed(if lie == 0 { -1 } else { 0 });
            let parked = (0..connections).flat_map(u32::to_be_bytes);
            [&[version, count], &socket[..], &socket[..]]
                .concat()
                .into_iter()
                .chain(parked)
        });
    proptest::collection::vec(one, 0..5)
        .prop_map(|messages| messages.into_iter().flatten().collect())
}

/// A strategy for a short part of a script. `Script::step` defines the meaning of the bytes.
type Scene = BoxedStrategy<Vec<u8>>;

fn many(scene: impl Strategy<Value = Vec<u8>> + 'static, max: usize) -> Scene {
    let scenes = proptest::collection::vec(scene, 0..max);
    scenes.prop_map(|scenes| scenes.concat()).boxed()
}

fn both(first: Scene, second: Scene) -> Scene {
    let pair = (first, second);
    pair.prop_map(|(first, second)| [first, second].concat())
        .boxed()
}

/// Generates endpoint numbers, mostly the few that both workers use.
fn endpoints() -> impl Strategy<Value = u8> {
    prop_oneof![6 => Just(0), 2 => 3..8u8, 1 => 0..32u8]
}

/// Generates mostly small handles, because handles start at 1 and few scripts have more than three.
fn handles() -> impl Strategy<Value = u8> {
    prop_oneof![8 => Just(1), 3 => 2..4u8, 1 => 0..32u8]
}

/// Generates numbers for `Script::connection`: mostly connections in the hostile worker's queues,
/// and small ids, because the master reuses the lowest ones.
fn connections() -> impl Strategy<Value = u8> {
    prop_oneof![8 => 0..3u8, 3 => 3..8u8, 12 => 200..216u8, 1 => 0..240u8]
}

/// Generates numbers of connections. Most are below 4, some are up to `MAX_WINDOW`, and a few are
/// above it.
fn numbers() -> impl Strategy<Value = u8> {
    let max = u8::try_from(MAX_WINDOW).expect("a small number");
    prop_oneof![12 => 0..4u8, 2 => 4..=max, 1 => Just(max + 1), 1 => 0..240u8]
}

/// Returns the bytes of a step in which the hostile worker writes a frame. If `cut` is less than
/// the frame's length, the worker writes the frame in two pieces, which are separated at `cut`.
fn written(frame: &[u8], cut: u8) -> Vec<u8> {
    [&[0], frame, &[cut]].concat()
}

fn frame_of(kind: u8, handle: u8) -> u8 {
    handle * 8 + kind
}

/// Generates steps in which the hostile worker goes online, listens and reports that it is idle.
fn start() -> Scene {
    endpoints()
        .prop_map(|endpoint| vec![31, 0, 31, endpoint * 8, 31, 7])
        .boxed()
}

/// Generates a step in which the hostile worker receives a connection, writes a truthful frame or
/// shuts its queue down.
fn cooperation() -> Scene {
    any::<u8>().prop_map(|choice| vec![31, choice]).boxed()
}

/// Generates a step in which the hostile worker writes a frame that is probably untruthful.
fn lie() -> Scene {
    let idle = || (handles(), numbers());
    let frame = prop_oneof![
        1 => Just(vec![0]),
        3 => (numbers(), endpoints(), 0..3u8).prop_map(|(r, e, index)| vec![1, r, e, index]),
        1 => handles().prop_map(|handle| vec![frame_of(2, handle)]),
        3 => idle().prop_map(|(h, received)| vec![frame_of(3, h), received]),
        9 => idle().prop_map(|(h, beyond)| vec![frame_of(4, h), beyond]),
        1 => handles().prop_map(|handle| vec![frame_of(5, handle)]),
        3 => handles().prop_map(|handle| vec![frame_of(6, handle)]),
        1 => (4..31u8, 0..4u8).prop_map(|(length, fds)| vec![frame_of(7, length), fds]),
        3 => (handles(), 0..8u8).prop_map(|(handle, fd)| vec![15, handle, fd]),
        12 => connections().prop_map(|connection| vec![23, connection]),
        6 => connections().prop_map(|connection| vec![31, connection]),
        1 => Just(vec![255]),
    ];
    let cut = prop_oneof![3 => Just(255), 1 => 0..30u8];
    (frame, cut)
        .prop_map(|(frame, cut)| written(&frame, cut))
        .boxed()
}

/// Generates steps in which a new hostile worker requests more listeners than its limit.
fn greed() -> Scene {
    let one = |n: u16| {
        let [low, high] = n.to_le_bytes();
        written(&[1, 1, 0, 255, low, high, 0, 0, 0, 0, 0, 0], 255)
    };
    let max = u16::try_from(MAX_LISTENERS).expect("a small number");
    let all: Vec<_> = (0..max + 10).map(|n| n + 100).flat_map(one).collect();
    both(succession(), Just(all).boxed())
}

/// Generates steps in which the hostile worker exits and another one starts.
fn succession() -> Scene {
    let gone = prop_oneof![Just(vec![27, 28, 30, 15]), Just(vec![28, 27, 30, 15])];
    both(gone.boxed(), start())
}

/// Generates steps in which the well-behaved worker's application listens and serves.
fn service() -> Scene {
    let scene = (endpoints(), 4..8u8);
    scene
        .prop_map(|(endpoint, call)| vec![11, endpoint * 8, 21, 11, 4, 11, call, 21])
        .boxed()
}

/// Generates steps in which the well-behaved worker's application drops a listener and requests it
/// again. In half of the cases, the master's next attempt to reclaim the queue's connections fails.
fn reopening() -> Scene {
    let lack = prop_oneof![Just(vec![]), Just(vec![30, 28])];
    let closing = (16..24u8).prop_map(|at| vec![11, at * 8 + 7, 21]);
    both(both(lack.boxed(), closing.boxed()), service())
}

/// Generates steps in which a client resumes a connection, and the idle hostile worker sends
/// `ParkAgain` or `Detach` for the connection while it is still in the worker's queue.
fn early_report() -> Scene {
    (0..16u8, prop_oneof![Just(23), Just(31)])
        .prop_map(|(client, report)| {
            let frame = written(&[report, 200], 255);
            [&[31, 7, 16, client * 8 + 2], &frame[..]].concat()
        })
        .boxed()
}

/// Generates a step for the well-behaved worker, the clients, the master or the clock.
fn event() -> Scene {
    prop_oneof![
        4 => (0..4u8, 0..8u8).prop_map(|(at, call)| vec![11, at * 8 + call]),
        1 => (128..=255u8).prop_map(|change| vec![11, change]),
        4 => (0..4u8, numbers()).prop_map(|(at, count)| vec![22, at, count]),
        6 => (0..16u8, 0..5u8).prop_map(|(client, what)| vec![16, client * 8 + what]),
        3 => (0..16u8, 5..8u8).prop_map(|(client, what)| vec![16, client * 8 + what]),
        3 => Just(vec![21]),
        1 => Just(vec![17]),
        1 => Just(vec![19]),
        1 => Just(vec![25]),
        1 => (0..150u8).prop_map(|millis| vec![26, millis]),
    ]
    .boxed()
}

/// Generates a call by the master's application. The application makes the call immediately or in
/// its next callback. The call rarely disconnects the well-behaved worker, because fewer checks
/// apply afterwards.
fn call() -> Scene {
    let choice = prop_oneof![20 => 0..22u8, 1 => 22..25u8, 15 => 25..32u8];
    let choice = (choice, 0..8u8).prop_map(|(choice, more)| choice + more * 32);
    let when = prop_oneof![1 => Just(29), 3 => Just(30)];
    (when, choice)
        .prop_map(|(when, choice)| vec![when, choice])
        .boxed()
}

fn junk() -> Scene {
    let bytes = proptest::collection::vec(any::<u8>(), 0..20);
    let scene = (bytes, any::<u8>());
    scene
        .prop_map(|(bytes, fds)| {
            let length = u8::try_from(bytes.len()).expect("few");
            [&[10, length, fds], &bytes[..]].concat()
        })
        .boxed()
}

/// Generates scripts that are likely to reach the cases in `ENOUGH`. In most scripts, both workers
/// listen, connections arrive and close, and the hostile worker writes untruthful frames.
fn scripts() -> impl Strategy<Value = Vec<u8>> {
    // Each of these numbers is the first byte of a script. 3 selects the policy `Shared`, and the
    // others select round robin. The numbers from 80 on also select how the master treats the
    // connections of the well-behaved worker's listeners (see `requested_parking`).
    let parking = prop_oneof![Just(80), Just(120), Just(160), Just(200), Just(240)];
    let policy = prop_oneof![
        3 => Just(vec![0]),
        2 => parking.prop_map(|parking| vec![parking]),
        1 => Just(vec![3]),
    ];
    let beginning = prop_oneof![
        4 => both(service(), start()),
        1 => both(start(), service()),
        1 => many(event(), 4),
    ];
    let middle = prop_oneof![
        300 => event(),
        200 => cooperation(),
        20 => lie(),
        20 => call(),
        20 => service(),
        5 => reopening(),
        10 => early_report(),
        20 => succession(),
        4 => junk(),
        1 => greed(),
    ];
    let opened = both(policy.boxed(), beginning.boxed());
    both(opened, many(middle, MAX_INPUT / 10))
}

/// The minimum number of times that each case must occur in `SCRIPTS` scripts together. Each case
/// usually occurs about ten times as often, so that random variation causes no failure.
const ENOUGH: [(&str, usize); 13] = [
    (SERVED, 3000),
    (DISPATCHED, 150),
    (RECEIVED, 80),
    (RECLAIMED, 70),
    (RECLAIMED_FROM_HONEST, 8),
    (FALSE_CLAIMS, 25),
    (DENIED, 60),
    (DISCARDED, 50),
    (PARKED, 300),
    (RESUMED, 100),
    (EXPIRED, 2),
    (IDLE_CLOSED, 50),
    (EARLY_REPORTS, 5),
];
/// The minimum number of scripts for which the test checks `ENOUGH`.
const SCRIPTS: u32 = 1024;

#[test]
#[cfg_attr(miri, ignore = "plays long scripts; slow")]
fn any_script_survives_the_master_input_target() {
    let config = ProptestConfig::default();
    let config = ProptestConfig {
        // Run four times as many scripts as proptest's default, because `ENOUGH` requires several
        // occurrences of cases that few scripts reach.
        cases: config.cases.saturating_mul(4),
        failure_persistence: None,
        ..config
    };
    let cases = config.cases;
    let total = RefCell::new(Reached::new());
    let run = |script: Vec<u8>| {
        for (what, times) in script::run(&script) {
            *total.borrow_mut().entry(what).or_default() += times;
        }
        Ok(())
    };
    let outcome = TestRunner::new(config).run(&scripts(), run);
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let total = total.take();
    println!("{total:#?}");
    if cases >= SCRIPTS {
        for (what, enough) in ENOUGH {
            assert!(
                total.get(what).is_some_and(|times| *times >= enough),
                "{what}: {total:?}"
            );
        }
    }
}

proptest! {
    #[test]
    fn any_frames_survive_the_frame_target(cuts: [u8; 6], frames in frames()) {
        let control = [cuts[0], cuts[1], 4, cuts[2], cuts[3], cuts[4], cuts[5]];
        frame(&[&control, &frames[..]].concat());
    }

    #[test]
    fn any_messages_survive_the_parked_message_target(
        reads in proptest::collection::vec((1..80u8, prop_oneof![3 => 0..3u8, 1 => 0..90u8]), 0..15),
        messages in parked_messages(),
    ) {
        let count = u8::try_from(reads.len()).unwrap_or(0);
        let reads: Vec<_> = reads.into_iter().flat_map(|(bytes, fds)| [bytes, fds]).collect();
        parked_message(&[&[count], &reads[..], &messages].concat());
    }

    #[test]
    fn any_bytes_survive_the_master_input_target(
        input in proptest::collection::vec(any::<u8>(), 0..MAX_INPUT)
    ) {
        master_input(&input);
    }
}
