//! Messages, and descriptors that travel with them.

use crate::scenarios;

scenarios! {}
