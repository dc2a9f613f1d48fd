//! Defines the macro that generates the methods for adding callbacks.

/// Defines two methods for each kind of event. The callback of the first method is called for every
/// event of this kind, and the callback of the second method only for the next one.
///
/// `$list` is an expression for the list that holds the callbacks of this kind of event. In the
/// expression, `$this` stands for `self`.
macro_rules! callback_methods {
    ($(
        $(#[$doc:meta])*
        $on:ident, $once:ident($($arg:ident: $type:ty),*) of |$this:ident| $list:expr;
    )*) => {$(
        $(#[$doc])*
        pub fn $on(&self, callback: impl FnMut($($type),*) + 'static) -> $crate::CallbackId {
            let $this = self;
            $list.add(std::rc::Rc::new(std::cell::RefCell::new(callback)))
        }

        #[doc = concat!(
            "Adds a callback like [`", stringify!($on), "`](Self::", stringify!($on), "), but for the \
             next event only."
        )]
        ///
        /// Node: `once`.
        #[doc(alias = "once")]
        pub fn $once(&self, callback: impl FnOnce($($type),*) + 'static) -> $crate::CallbackId {
            let $this = self;
            let mut callback = Some(callback);
            let once = move |$($arg: $type),*| {
                if let Some(callback) = callback.take() {
                    callback($($arg),*);
                }
            };
            $list.add_once(std::rc::Rc::new(std::cell::RefCell::new(once)))
        }
    )*};
}

pub(crate) use callback_methods;
