//! What workers are made of.

use crate::scenarios;

scenarios! {}
