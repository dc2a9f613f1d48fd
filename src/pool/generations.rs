//! The settings of each worker generation.

use std::collections::BTreeMap;

/// The settings `S` of the generations in use, and of the next generation.
///
/// In `in_use`, the value `None` stands for the master's settings at the time of the fork.
#[derive(Debug)]
pub(super) struct Generations<S> {
    in_use: BTreeMap<u64, Option<S>>,
    /// The settings of the next generation, or `None` if the application has passed none.
    next: Option<S>,
}

impl<S: Clone> Generations<S> {
    /// Returns the generations of a new pool. The first generation has the master's settings.
    pub(super) fn new() -> Self {
        Self {
            in_use: BTreeMap::from([(0, None)]),
            next: None,
        }
    }

    /// Replaces the settings of the next generation.
    ///
    /// Returns the previous settings. The caller must drop them while no `RefCell` of the pool is
    /// borrowed, because values that their closures captured may call the pool when dropped.
    #[must_use]
    pub(super) fn replace_next(&mut self, next: Option<S>) -> Option<S> {
        std::mem::replace(&mut self.next, next)
    }

    /// Begins a generation. If `replace_next` has set no settings for it, the generation has the
    /// settings of `base`.
    ///
    /// Returns the settings of generations that are no longer in use. The caller must drop them
    /// while no `RefCell` of the pool is borrowed, for the reason given at `replace_next`.
    #[must_use]
    pub(super) fn begin(
        &mut self,
        generation: u64,
        base: u64,
        is_in_use: impl Fn(u64) -> bool,
    ) -> Vec<Option<S>> {
        let settings = self.next.take().or_else(|| self.settings(base));
        self.in_use.insert(generation, settings);
        let is_unused = |known: &u64| *known != generation && !is_in_use(*known);
        let unused: Vec<_> = self.in_use.keys().copied().filter(is_unused).collect();
        let settings = unused
            .iter()
            .filter_map(|unused| self.in_use.remove(unused));
        settings.collect()
    }

    /// Returns a generation's settings, or `None` for the master's settings.
    pub(super) fn settings(&self, generation: u64) -> Option<S> {
        self.in_use.get(&generation).cloned().flatten()
    }
}

#[cfg(test)]
impl<S> Generations<S> {
    pub(super) fn count(&self) -> usize {
        self.in_use.len()
    }
}
