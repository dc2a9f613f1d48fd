//! From a long schedule that fails to a short one that fails in the same way, printed as a test.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::ending::Ending;
use super::{Call, Case, Step, What};
use crate::config::settings::SchedulingPolicy;
use crate::types::ledger::Ledger;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// Where the last panic was.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics are tried by the thousand here: only the last one is for people to read.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if QUIET.get() {
                let place = panic.location().map(ToString::to_string);
                PLACE.set(place.unwrap_or_default());
            } else {
                loud(panic);
            }
        }));
    });
}

/// Replays the case. Returns where the connections went, unless it fails.
pub(super) fn outcome(case: &Case) -> Option<Ledger> {
    install_hook();
    QUIET.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| case.replay()));
    QUIET.set(false);
    outcome.ok()
}

/// Returns where the case fails, if it does.
fn failure(case: &Case) -> Option<String> {
    outcome(case).is_none().then(|| PLACE.take())
}

/// Removes and simplifies steps as long as the case fails in the same place.
pub(super) fn shrink(case: &Case) -> Case {
    let Some(place) = failure(case) else {
        return case.clone();
    };
    let fails = |steps: &[Step]| {
        let steps = steps.to_vec();
        failure(&Case { steps, ..*case }).as_ref() == Some(&place)
    };
    let mut steps = case.steps.clone();
    loop {
        let before = steps.clone();
        remove_chunks(&mut steps, &fails);
        remove_workers(&mut steps, &fails);
        simplify(&mut steps, &fails);
        if steps == before {
            return Case { steps, ..*case };
        }
    }
}

/// Removes as many steps as possible: half of them, a quarter, and so on to single ones.
fn remove_chunks(steps: &mut Vec<Step>, fails: &impl Fn(&[Step]) -> bool) {
    let mut size = steps.len().next_power_of_two();
    while size > 0 {
        let mut at = steps.len().saturating_sub(size);
        loop {
            let mut shorter = steps.clone();
            shorter.drain(at..steps.len().min(at + size));
            if shorter.len() < steps.len() && fails(&shorter) {
                *steps = shorter;
            }
            if at == 0 {
                break;
            }
            at = at.min(steps.len()).saturating_sub(size);
        }
        size /= 2;
    }
}

/// Removes workers, so that others take their numbers.
fn remove_workers(steps: &mut Vec<Step>, fails: &impl Fn(&[Step]) -> bool) {
    for at in (0..steps.len()).rev() {
        let mut fewer = steps.clone();
        let (what, _, _) = fewer.remove(at);
        for (_, who, _) in &mut fewer {
            *who = who.saturating_sub(1);
        }
        if what == What::Call(Call::Fork) && fails(&fewer) {
            *steps = fewer;
        }
    }
}

/// Makes the numbers in the steps as small as possible.
fn simplify(steps: &mut [Step], fails: &impl Fn(&[Step]) -> bool) {
    for at in 0..steps.len() {
        let original = steps[at];
        for simpler in [What::Master, What::Worker] {
            if matches!(original.0, What::Program(_) | What::Call(_)) {
                steps[at].0 = simpler;
                if fails(steps) {
                    break;
                }
                steps[at] = original;
            }
        }
        let (what, who, n) = steps[at];
        for smaller in 0..who {
            steps[at].1 = smaller;
            if fails(steps) {
                break;
            }
            steps[at] = (what, who, n);
        }
        let who = steps[at].1;
        for smaller in (0..n.min(16)).chain([n / 16 * 8, n / 8 * 8]) {
            steps[at].2 = smaller;
            if fails(steps) {
                break;
            }
            steps[at] = (what, who, n);
        }
    }
}

/// The case as a test that can be copied into the program.
pub(super) fn as_test(case: &Case) -> String {
    let Case {
        policy,
        ending,
        steps,
    } = case;
    let steps: String = steps.iter().map(source).collect();
    format!(
        "#[test]\nfn a_schedule_that_failed() {{\n    let steps = [\n{steps}    ];\n    \
         replay(SchedulingPolicy::{policy:?}, Ending::{ending:?}, &steps);\n}}\n"
    )
}

fn source((what, who, n): &Step) -> String {
    let what = match what {
        What::Call(call) => format!("Call(Call::{call:?})"),
        What::InCallback(call) => format!("InCallback(Call::{call:?})"),
        What::Fail(failure) => format!("Fail(Failure::{failure:?})"),
        What::Program(deed) => format!("Program(Deed::{deed:?})"),
        What::Lie(lie) => format!("Lie(Lie::{lie:?})"),
        What::Connect
        | What::HangUp
        | What::Pass
        | What::Master
        | What::Worker
        | What::Kill
        | What::Stop
        | What::Continue
        | What::End
        | What::Cut => format!("{what:?}"),
    };
    format!("        (What::{what}, {who}, {n}),\n")
}

#[test]
fn what_does_not_matter_is_removed() {
    let step = |n: u8| (What::Master, n % 8, n);
    let mut steps: Vec<_> = (0..200).map(step).collect();
    let fails = |steps: &[Step]| {
        let first = steps.iter().position(|(_, _, n)| *n >= 20);
        let last = steps.iter().rposition(|(_, who, _)| *who >= 3);
        first.is_some() && last > first
    };
    remove_chunks(&mut steps, &fails);
    assert_eq!(steps.len(), 2);
    simplify(&mut steps, &fails);
    assert_eq!(steps[1], (What::Master, 3, 0));
    assert_eq!(steps[0].1, 0);
    let case = Case {
        policy: SchedulingPolicy::Shared,
        ending: Ending::Kill,
        steps,
    };
    assert!(as_test(&case).contains("(What::Master, 3, 0),"));
}
