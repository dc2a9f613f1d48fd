//! Shrinks a failing schedule to a short one that fails at the same assertion, and prints the short
//! schedule as a test.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::step::StepKind;
use super::{Call, Case, Ending, Step, step};
use crate::types::ledger::Ledger;
use crate::types::policy::SchedulingPolicy;

thread_local! {
    /// Whether the panic hook records the location of a panic instead of printing the panic.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// The source location of the last panic while `QUIET` was set.
    static LOCATION: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Installs a panic hook that does not print panics during replays, because shrinking causes
/// thousands of them.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if QUIET.get() {
                let location = panic.location().map(ToString::to_string);
                LOCATION.set(location.unwrap_or_default());
            } else {
                print(panic);
            }
        }));
    });
}

/// Replays the case without printing a panic. Returns the ledger, or `None` if the replay panics.
pub(super) fn outcome(case: &Case) -> Option<Ledger> {
    install_hook();
    QUIET.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| case.replay()));
    QUIET.set(false);
    outcome.ok()
}

/// Returns the source location at which the case fails, or `None` if it does not fail.
fn failure(case: &Case) -> Option<String> {
    outcome(case).is_none().then(|| LOCATION.take())
}

/// Removes and simplifies steps while the case still fails at the same location.
pub(super) fn shrink(case: &Case) -> Case {
    let Some(location) = failure(case) else {
        return case.clone();
    };
    let fails = |steps: &[Step]| {
        let steps = steps.to_vec();
        failure(&Case { steps, ..*case }).as_ref() == Some(&location)
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

/// Removes chunks of steps as long as the remaining steps still fail. The chunks' size decreases
/// from the whole list to single steps.
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

/// Tries to remove each fork. The workers that are forked later then have lower numbers, so the
/// function decreases `process` by one in every step, which is right for most steps. Keeps the
/// result only if it still fails.
fn remove_workers(steps: &mut Vec<Step>, fails: &impl Fn(&[Step]) -> bool) {
    for at in (0..steps.len()).rev() {
        let mut fewer = steps.clone();
        let removed = fewer.remove(at);
        for step in &mut fewer {
            step.process = step.process.saturating_sub(1);
        }
        if removed.kind == StepKind::Call(Call::Fork) && fails(&fewer) {
            *steps = fewer;
        }
    }
}

/// Replaces calls with steps of the master or a worker, and decreases the numbers in the steps, as
/// long as the steps still fail.
fn simplify(steps: &mut [Step], fails: &impl Fn(&[Step]) -> bool) {
    let try_step = |steps: &mut [Step], at: usize, simpler: Step| {
        let original = std::mem::replace(&mut steps[at], simpler);
        let still_fails = fails(steps);
        if !still_fails {
            steps[at] = original;
        }
        still_fails
    };
    for at in 0..steps.len() {
        if matches!(steps[at].kind, StepKind::WorkerCall(_) | StepKind::Call(_)) {
            for kind in [StepKind::Master, StepKind::Worker] {
                let simpler = Step { kind, ..steps[at] };
                if try_step(steps, at, simpler) {
                    break;
                }
            }
        }
        for process in 0..steps[at].process {
            let simpler = Step {
                process,
                ..steps[at]
            };
            if try_step(steps, at, simpler) {
                break;
            }
        }
        let choice = steps[at].choice;
        for choice in (0..choice.min(16)).chain([choice / 16 * 8, choice / 8 * 8]) {
            let simpler = Step {
                choice,
                ..steps[at]
            };
            if try_step(steps, at, simpler) {
                break;
            }
        }
    }
}

/// Returns the case as the source code of a test.
pub(super) fn as_test(case: &Case) -> String {
    let (policy, ending) = (case.policy, case.ending);
    let steps: String = case.steps.iter().map(source).collect();
    format!(
        "#[test]\nfn a_schedule_that_failed() {{\n    let steps = [\n{steps}    ];\n    \
         replay(SchedulingPolicy::{policy:?}, Ending::{ending:?}, &steps);\n}}\n"
    )
}

fn source(step: &Step) -> String {
    let mut kind = format!("{:?}", step.kind);
    if let Some((outer, inner)) = kind.split_once('(') {
        let name = match outer {
            "CallInCallback" => "Call",
            "Fail" => "Failure",
            "Forge" => "Forgery",
            name => name,
        };
        kind = format!("{outer}({name}::{inner}");
    }
    let (process, choice) = (step.process, step.choice);
    format!("        step(StepKind::{kind}, {process}, {choice}),\n")
}

#[test]
fn shrinking_drops_irrelevant_steps() {
    let master = |process, choice| step(StepKind::Master, process, choice);
    let mut steps: Vec<_> = (0..200).map(|n| master(n % 8, n)).collect();
    let fails = |steps: &[Step]| {
        let first = steps.iter().position(|step| step.choice >= 20);
        let last = steps.iter().rposition(|step| step.process >= 3);
        first.is_some() && last > first
    };
    remove_chunks(&mut steps, &fails);
    assert_eq!(steps.len(), 2);
    simplify(&mut steps, &fails);
    assert_eq!(steps[1], master(3, 0));
    assert_eq!(steps[0].process, 0);
    let case = Case {
        policy: SchedulingPolicy::Shared,
        ending: Ending::Kill,
        steps,
    };
    assert!(as_test(&case).contains("step(StepKind::Master, 3, 0),"));
    let call = step(StepKind::CallInCallback(Call::Fork), 1, 2);
    assert!(source(&call).contains("step(StepKind::CallInCallback(Call::Fork), 1, 2),"));
}
