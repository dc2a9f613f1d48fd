//! The source of the workers' inspect ports.

use std::cell::Cell;
use std::rc::Rc;

/// The first port that a process without privileges can bind.
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// The source of the workers' [inspect ports](crate::Settings::inspect_port): a number or a
/// closure.
///
/// A number is the first worker's port. Each later worker receives the next number. The number
/// after 65535 is 1024. A closure is called at each fork and returns the port.
///
/// Node: the two forms of `settings.inspectPort`.
///
/// This type is not `Send`. Build the value on the master's thread.
///
/// ```
/// use cluster::{InspectPort, Settings};
///
/// let counted = Settings::default().inspect_port(9229);
/// let chosen = Settings::default().inspect_port(InspectPort::new(|| 9000 + rand() % 100));
/// # fn rand() -> u16 { 4 }
/// # assert_ne!(counted, chosen);
/// ```
#[derive(Clone)]
pub struct InspectPort(Rc<dyn Fn() -> u16>);

impl InspectPort {
    /// Creates a source that calls `port` at each fork.
    ///
    /// Node: a function as `settings.inspectPort`.
    ///
    /// See [`InspectPort`] for an example.
    pub fn new(port: impl Fn() -> u16 + 'static) -> Self {
        Self(Rc::new(port))
    }

    pub(crate) fn next(&self) -> u16 {
        (self.0)()
    }
}

impl From<u16> for InspectPort {
    fn from(first: u16) -> Self {
        let next = Cell::new(first);
        Self::new(move || {
            let port = next.get();
            next.set(port.checked_add(1).unwrap_or(FIRST_UNPRIVILEGED_PORT));
            port
        })
    }
}

impl std::fmt::Debug for InspectPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InspectPort").finish_non_exhaustive()
    }
}

/// Two sources are equal only if both are clones of one source.
impl PartialEq for InspectPort {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for InspectPort {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_gets_its_own_inspect_port() {
        let ports = InspectPort::from(65534);
        let ports: Vec<_> = std::iter::repeat_with(|| ports.next()).take(4).collect();
        assert_eq!(ports, [65534, 65535, 1024, 1025]);
    }
}
