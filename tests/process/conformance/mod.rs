//! The scenarios of Node's own test suite, retold with real processes. Each is named after its
//! file there, and `tests/CONFORMANCE.md` says what became of every one.

mod callbacks;
mod calls;
mod datagrams;
mod descriptors;
mod events;
mod further;
mod further_leaving;
mod leaving;
mod listening;
mod messages;
mod receipts;
mod settings;

use crate::harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    let scenarios = [
        callbacks::SCENARIOS,
        calls::SCENARIOS,
        datagrams::SCENARIOS,
        descriptors::SCENARIOS,
        events::SCENARIOS,
        further::SCENARIOS,
        further_leaving::SCENARIOS,
        leaving::SCENARIOS,
        listening::SCENARIOS,
        messages::SCENARIOS,
        receipts::SCENARIOS,
        settings::SCENARIOS,
    ];
    scenarios.into_iter().flatten()
}
