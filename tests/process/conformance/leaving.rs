//! How workers leave, and what is known of it.

use crate::scenarios;

scenarios! {}
