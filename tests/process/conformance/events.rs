//! What is told, when, how often and in which order.

use crate::scenarios;

scenarios! {}
