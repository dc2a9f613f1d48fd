//! UDP sockets that all workers share.

use crate::scenarios;

scenarios! {}
