//! Protocol violations by well-formed frames.

/// A violation of the protocol by a well-formed frame, in
/// [`FrameError::Violation`](crate::FrameError::Violation).
///
/// Node has no counterpart.
///
/// ```
/// use cluster::{FrameError, Violation};
///
/// let error = FrameError::Violation(Violation::RepeatedOnline);
/// assert_eq!(error.to_string(), "second report that the worker is online");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Violation {
    /// A worker sent another frame before it reported that it is online.
    NotOnline,
    /// A worker reported twice that it is online.
    RepeatedOnline,
    /// A worker requested a listener with an index that it already uses for the same address.
    RepeatedListen,
    /// A worker reported that it listens on a listener that it does not have.
    UnknownListening,
    /// A worker reported twice that it listens on the same listener.
    RepeatedListening,
    /// A worker reported that it is idle for a listener that it does not have.
    UnknownIdle,
    /// A worker reported more connections than the master dispatched to it.
    UndispatchedConnection,
    /// A worker released a listener that it does not have.
    UnknownRelease,
    /// A worker paused a listener that it does not have.
    UnknownPause,
    /// A worker paused a listener through which it receives no connections.
    UnknownQueue,
    /// A worker's channel closed with more unread frames than the master processes.
    TooManyFinalFrames,
    /// The master replied to a request that the worker did not send.
    UnexpectedReply,
    /// The master replied twice to one request.
    RepeatedReply,
    /// The payload of a message is missing.
    MissingPayload,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotOnline => "frame sent before the worker was online",
            Self::RepeatedOnline => "second report that the worker is online",
            Self::RepeatedListen => "second request for a listener with the same index",
            Self::UnknownListening => {
                "report of listening on a listener that the worker does not have"
            }
            Self::RepeatedListening => "second report that the worker is listening",
            Self::UnknownIdle => "idle for a listener that the worker does not have",
            Self::UndispatchedConnection => "more connections received than were dispatched",
            Self::UnknownRelease => "release of a listener that the worker does not have",
            Self::UnknownPause => "pause of a listener that the worker does not have",
            Self::UnknownQueue => "pause of a queue that the worker does not have",
            Self::TooManyFinalFrames => "more final frames than are processed",
            Self::UnexpectedReply => "reply without a request",
            Self::RepeatedReply => "second reply to one request",
            Self::MissingPayload => "message without its payload",
        })
    }
}
