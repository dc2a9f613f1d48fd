//! Identifies what a ready descriptor belongs to. To wait for a new kind of descriptor, add a token
//! here.

/// Identifies the owner of a ready descriptor. The poller carries a token as an integer key. If the
/// owner has been removed since the poller reported the descriptor, the token has no effect, unless
/// a new owner has the same number. The new owner must then tolerate the wrong report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Channel(u32),
    Process(u32),
    Listener(u32),
    /// The socket that selects among a listener's shards.
    Selector(u32),
    Watch(u32),
    /// The target of a log that waits until the target is writable.
    Log(u32),
    /// A connection that this process holds while its client sends nothing.
    Parked(u32),
    Signals,
    /// The stream to the master that takes over.
    Successor,
}

impl Token {
    pub(crate) fn key(self) -> usize {
        let (tag, number) = match self {
            Self::Channel(number) => (0, number),
            Self::Process(number) => (1, number),
            Self::Listener(number) => (2, number),
            Self::Watch(number) => (3, number),
            Self::Signals => (4, 0),
            Self::Successor => (4, 1),
            Self::Selector(number) => (5, number),
            Self::Log(number) => (6, number),
            Self::Parked(number) => (7, number),
        };
        // The shift loses no bit, because every number is at most `WorkerId::MAX` or
        // `POLL_NUMBER_MAX`.
        (number as usize) << 3 | tag
    }

    pub(super) fn from_key(key: usize) -> Option<Self> {
        let number = u32::try_from(key >> 3).ok()?;
        match key & 7 {
            0 => Some(Self::Channel(number)),
            1 => Some(Self::Process(number)),
            2 => Some(Self::Listener(number)),
            3 => Some(Self::Watch(number)),
            4 if number == 0 => Some(Self::Signals),
            4 => Some(Self::Successor),
            5 => Some(Self::Selector(number)),
            6 => Some(Self::Log(number)),
            _ => Some(Self::Parked(number)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::poll_number::POLL_NUMBER_MAX;
    use crate::types::worker_id::WorkerId;

    #[test]
    fn token_survives_the_poller() {
        let all = [
            Token::Channel(WorkerId::MAX),
            Token::Process(2),
            Token::Listener(3),
            Token::Watch(POLL_NUMBER_MAX),
            Token::Signals,
            Token::Selector(POLL_NUMBER_MAX),
            Token::Log(POLL_NUMBER_MAX),
            Token::Successor,
        ];
        for token in all {
            assert_eq!(Token::from_key(token.key()), Some(token));
        }
    }
}
