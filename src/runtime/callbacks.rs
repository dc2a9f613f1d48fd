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
        // Drop the closures only after the borrow has ended, because the `Drop` of a captured value
        // may change this list.
        let removed: Vec<_> = {
            let mut list = self.0.borrow_mut();
            let (removed, others) = list.drain(..).partition(|entry| entry.id == id);
            *list = others;
            removed
        };
        drop(removed);
    }

    pub(crate) fn clear(&self) {
        drop(self.0.take());
    }

    /// Returns the ids of the current callbacks in the order of their calls.
    pub(crate) fn ids(&self) -> Vec<CallbackId> {
        self.0.borrow().iter().map(|entry| entry.id).collect()
    }

    /// Calls the closure `id`. Does nothing if the closure was removed or is already running.
    pub(crate) fn call(&self, id: CallbackId, call: impl FnOnce(&mut F)) {
        let entries = self.0.borrow();
        let Ok(at) = entries.binary_search_by_key(&id.0, |entry| entry.id.0) else {
            return;
        };
        let (once, callback) = (entries[at].once, Rc::clone(&entries[at].callback));
        drop(entries);
        if once {
            self.remove(id);
        }
        if let Ok(mut callback) = callback.try_borrow_mut() {
            call(&mut callback);
        }
    }

    /// Calls all closures in order. Closures that are added or removed in the meantime are not
    /// called.
    ///
    /// Skips a closure that is already running, because an `FnMut` closure cannot be called again
    /// before it has returned.
    pub(crate) fn each(&self, mut call: impl FnMut(&mut F)) {
        let Some(last) = self.0.borrow().last().map(|entry| entry.id) else {
            return;
        };
        let mut next = 0;
        loop {
            let entries = self.0.borrow();
            // The list is sorted, because ids ascend.
            let at = entries.partition_point(|entry| entry.id.0 < next);
            let Some(entry) = entries.get(at).filter(|entry| entry.id.0 <= last.0) else {
                return;
            };
            let id = entry.id;
            drop(entries);
            next = id.0 + 1;
            self.call(id, &mut call);
            if id == last {
                return;
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
