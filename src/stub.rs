//! stub
use std::time::Duration;
/// a
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// a
    pub user: Duration,
    /// a
    pub system: Duration,
    /// a
    pub max_resident: u64,
}
/// a
#[derive(Debug)]
pub struct MasterListener(crate::Address);
impl MasterListener {
    /// a
    #[must_use]
    pub fn address(&self) -> crate::Address {
        self.0.clone()
    }
}
impl crate::Master {
    /// a
    ///
    /// # Errors
    /// a
    pub fn listen<S>(
        &self,
        _: impl Into<crate::ListenOptions<S>>,
    ) -> crate::Result<MasterListener> {
        Err(crate::Error::AlreadyInitialized)
    }
}
impl crate::Process<'_> {
    /// a
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        None
    }
}
