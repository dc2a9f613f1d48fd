//! soon
crate::scenarios! {}
