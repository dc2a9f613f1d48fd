//! Stores lists of closures. A list may change while its closures are called.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Identifies a callback, so that [`Master::remove_callback`](crate::Master::remove_callback) can
/// remove it. See that method for an example.
///
/// Node: the listener function that `removeListener` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallbackId(u64);

impl CallbackId {
    /// Returns an id that no other callback of this thread has. A library that has its own lists of
    /// callbacks can use such ids.
    ///
    /// Node has no counterpart.
    ///
    /// ```
    /// use cluster::CallbackId;
    ///
    /// assert_ne!(CallbackId::unique(), CallbackId::unique());
    /// ```
    #[must_use]
    pub fn unique() -> Self {
        thread_local! {
            static LAST: Cell<u64> = const { Cell::new(0) };
        }
        LAST.set(LAST.get() + 1);
        Self(LAST.get())
    }
}

/// A closure that can be called while the list that contains it changes.
pub(crate) type Shared<F> = Rc<RefCell<F>>;

struct Entry<F: ?Sized> {
    id: CallbackId,
    once: bool,
    callback: Shared<F>,
}

/// The callbacks of one event, in the order in which they were added.
pub(crate) struct Callbacks<F: ?Sized>(RefCell<Vec<Entry<F>>>);

impl<F: ?Sized> Callbacks<F> {
    pub(crate) fn add(&self, callback: Shared<F>) -> CallbackId {
        self.push(callback, false)
    }

    /// Adds a callback that is removed immediately before its first call.
    pub(crate) fn add_once(&self, callback: Shared<F>) -> CallbackId {
        self.push(callback, true)
    }

    fn push(&self, callback: Shared<F>, once: bool) -> CallbackId {
        let id = CallbackId::unique();
        self.0.borrow_mut().push(Entry { id, once, callback });
        id
    }

    pub(crate) fn remove(&self, id: CallbackId) {
        let mut entries = self.0.borrow_mut();
        let index = entries.binary_search_by_key(&id.0, |entry| entry.id.0);
        let removed = index.ok().map(|index| entries.remove(index));
        // Drop the closure only after the borrow has ended, because the `Drop` of a captured value
        // may change this list.
        drop(entries);
        drop(removed);
    }

    pub(crate) fn clear(&self) {
        drop(self.0.take());
    }

    /// Returns the ids of the current callbacks in the order of their calls.
    pub(crate) fn ids(&self) -> Vec<CallbackId> {
        self.0.borrow().iter().map(|entry| entry.id).collect()
    }

    /// Returns the first callback whose id is at least `first` and at most `last`. Removes it from
    /// the list if it was added for the next event only.
    // Not inlined, because each call of `each` would contain a copy.
    #[inline(never)]
    fn take_next(&self, first: u64, last: u64) -> Option<(CallbackId, Shared<F>)> {
        let mut entries = self.0.borrow_mut();
        // The list is sorted, because ids ascend.
        let index = entries.partition_point(|entry| entry.id.0 < first);
        let entry = entries.get(index).filter(|entry| entry.id.0 <= last)?;
        let next = (entry.id, Rc::clone(&entry.callback));
        if entry.once {
            entries.remove(index);
        }
        Some(next)
    }

    /// Calls the closure `id`. Does nothing if the closure was removed or is already running.
    pub(crate) fn call(&self, CallbackId(id): CallbackId, call: impl FnOnce(&mut F)) {
        if let Some((_, callback)) = self.take_next(id, id) {
            if let Ok(mut callback) = callback.try_borrow_mut() {
                call(&mut callback);
            }
        }
    }

    /// Calls all closures in order. Closures that are added or removed in the meantime are not
    /// called.
    ///
    /// Skips a closure that is already running, because an `FnMut` closure cannot be called again
    /// before it has returned.
    pub(crate) fn each(&self, mut call: impl FnMut(&mut F)) {
        let last = self.0.borrow().last().map_or(0, |entry| entry.id.0);
        let mut first = 0;
        while let Some((id, callback)) = self.take_next(first, last) {
            first = id.0 + 1;
            if let Ok(mut callback) = callback.try_borrow_mut() {
                call(&mut callback);
            }
        }
    }
}

impl<F: ?Sized> Default for Callbacks<F> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<F: ?Sized> std::fmt::Debug for Callbacks<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} callbacks", self.0.borrow().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = Rc<RefCell<Vec<&'static str>>>;
    type List = Rc<Callbacks<dyn FnMut(&Log)>>;

    fn add(list: &List, f: impl FnMut(&Log) + 'static) -> CallbackId {
        list.add(Rc::new(RefCell::new(f)))
    }

    #[test]
    fn callbacks_may_be_removed_and_added_inside_callbacks() {
        let (list, log) = (List::default(), Log::default());
        let second = Rc::new(Cell::new(None));
        let (inner, victim) = (Rc::clone(&list), Rc::clone(&second));
        add(&list, move |log| {
            log.borrow_mut().push("first");
            if let Some(id) = victim.take() {
                inner.remove(id);
                add(&inner, |log| log.borrow_mut().push("third"));
            }
        });
        second.set(Some(add(&list, |log| log.borrow_mut().push("second"))));
        list.each(|f| f(&log));
        assert_eq!(
            log.take(),
            ["first"],
            "one was removed before its call, one added after the first call"
        );
        list.each(|f| f(&log));
        assert_eq!(log.take(), ["first", "third"]);
        list.clear(); // Break the reference cycle.
    }

    #[test]
    fn once_callback_is_called_once_even_by_itself() {
        let (list, log) = (List::default(), Log::default());
        let inner = Rc::clone(&list);
        list.add_once(Rc::new(RefCell::new(move |log: &Log| {
            log.borrow_mut().push("once");
            inner.each(|f| f(log));
        })));
        add(&list, |log| log.borrow_mut().push("always"));
        list.each(|f| f(&log));
        assert_eq!(log.take(), ["once", "always", "always"]);
        list.each(|f| f(&log));
        assert_eq!(log.take(), ["always"]);
        list.clear(); // Break the reference cycle.
    }

    #[test]
    fn callback_does_not_enter_itself() {
        let (list, log) = (List::default(), Log::default());
        let inner = Rc::clone(&list);
        add(&list, move |log| {
            log.borrow_mut().push("outer");
            inner.each(|f| f(log));
        });
        list.each(|f| f(&log));
        assert_eq!(log.take(), ["outer"]);
        list.clear(); // Break the reference cycle.
    }
}
