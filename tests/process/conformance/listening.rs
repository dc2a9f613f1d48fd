//! What workers listen on.

use crate::scenarios;

scenarios! {}
