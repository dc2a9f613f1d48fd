//! Numbers that fit into a key of the poller.

/// The highest number of a listener, a watch or a parked connection. On 32-bit systems, a key of the
/// poller has 29 bits for the number, because the kind of the descriptor takes three.
pub(crate) const POLL_NUMBER_MAX: u32 = u32::MAX >> 3;

/// Returns the first number after `last` that is not in use. After `POLL_NUMBER_MAX`, numbers start
/// again at 1.
pub(crate) fn next_poll_number(last: u32, is_used: impl Fn(u32) -> bool) -> u32 {
    let mut number = last;
    loop {
        number = number % POLL_NUMBER_MAX + 1;
        if !is_used(number) {
            return number;
        }
    }
}
