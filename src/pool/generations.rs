//! The settings of each generation of workers.

use std::collections::BTreeMap;

/// The settings `S` of the generations that are in use, and of the next one.
///
/// `None` stands for the settings that the master has when it forks.
#[derive(Debug)]
pub(super) struct Generations<S> {
    known: BTreeMap<u64, Option<S>>,
    next: Option<S>,
}

impl<S: Clone> Generations<S> {
    /// Knows the first generation, which has the settings of the master.
    pub(super) fn new() -> Self {
        Self {
            known: BTreeMap::from([(0, None)]),
            next: None,
        }
    }

    /// Replaces the settings of the next generation. Returns the previous ones, whose closures may
    /// call the pool when they are dropped.
    #[must_use]
    pub(super) fn replace_next(&mut self, next: Option<S>) -> Option<S> {
        std::mem::replace(&mut self.next, next)
    }

    /// Begins a generation: without settings of its own it has those of `base`. Returns the settings
    /// of generations that are no longer in use, whose closures may call the pool when they are
    /// dropped.
    #[must_use]
    pub(super) fn begin(
        &mut self,
        generation: u64,
        base: u64,
        is_in_use: impl Fn(u64) -> bool,
    ) -> Vec<Option<S>> {
        let settings = self.next.take().or_else(|| self.of(base));
        self.known.insert(generation, settings);
        let is_unused = |known: &u64| *known != generation && !is_in_use(*known);
        let unused: Vec<_> = self.known.keys().copied().filter(is_unused).collect();
        let settings = unused.iter().filter_map(|unused| self.known.remove(unused));
        settings.collect()
    }

    pub(super) fn of(&self, generation: u64) -> Option<S> {
        self.known.get(&generation).cloned().flatten()
    }
}

#[cfg(test)]
impl<S> Generations<S> {
    pub(super) fn count(&self) -> usize {
        self.known.len()
    }
}
