//! The limits of the protocol between the master and its workers, and the ways to violate the
//! protocol.

/// The version of the frame format. A frame with any other version is an error.
pub(crate) const VERSION: u8 = 3;
/// The maximum length of a body, and therefore of a message, in bytes.
///
/// The value bounds the memory that the master allocates for a worker's message. If a header
/// announces a longer body, the reader fails before it allocates memory for the body. The public
/// API documents the value.
pub(crate) const MAX_BODY: usize = 1 << 20;
/// The maximum number of descriptors in one frame. The public API documents the value.
pub(crate) const MAX_FDS: usize = 16;

/// Describes why received bytes are not a valid frame.
///
/// See [`Violation`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// The frame has another version of the format. The value is that version. The two programs
    /// were probably built with different versions of this crate.
    Version(u8),
    /// The header announces a body that is longer than the limit. The value is the announced length
    /// in bytes.
    TooLong(u32),
    /// The frame has a kind that does not exist in its direction. The value is the kind.
    Kind(u8),
    /// The body is malformed for the frame's kind. The value is the kind.
    Body(u8),
    /// The number of descriptors exceeds a limit or does not match the frames.
    Descriptors,
    /// The frame is well formed, but the protocol does not allow it in the sender's state.
    Violation(Violation),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => {
                write!(
                    f,
                    "frame of version {version}, this program supports version {VERSION}"
                )
            }
            Self::TooLong(length) => {
                write!(f, "frame of {length} bytes, the limit is {MAX_BODY}")
            }
            Self::Kind(kind) => write!(f, "unknown kind of frame {kind}"),
            Self::Body(kind) => write!(f, "malformed frame of kind {kind}"),
            Self::Descriptors => write!(f, "invalid number of descriptors"),
            Self::Violation(violation) => violation.fmt(f),
        }
    }
}

impl std::error::Error for FrameError {}

/// A violation of the protocol by a well-formed frame, in
/// [`FrameError::Violation`].
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
    /// A worker reported that it is idle for a listener through which it receives no connections
    /// from the master.
    UnknownIdle,
    /// A worker reported that it received more connections than the master dispatched to it.
    UndispatchedConnection,
    /// A worker released a listener that it does not have.
    UnknownRelease,
    /// A worker paused a listener that does not exist, or whose connections the master does not
    /// dispatch.
    UnknownPause,
    /// A worker paused a listener that only other workers have.
    UnknownQueue,
    /// A worker parked a connection of a listener that it never had, or of a UDP socket.
    UnknownPark,
    /// A worker parked a descriptor that is not a connection.
    NotAConnection,
    /// A worker reported a connection that the master has not dispatched to it.
    UnknownConnection,
    /// A worker's channel closed with more unread frames than the master processes.
    TooManyFinalFrames,
    /// The master replied to a request that the worker did not send.
    UnexpectedReply,
    /// The master replied twice to one request.
    RepeatedReply,
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
            Self::UnknownIdle => "idle for a listener without a queue for the worker",
            Self::UndispatchedConnection => "more connections received than were dispatched",
            Self::UnknownRelease => "release of a listener that the worker does not have",
            Self::UnknownPause => "pause of a listener without queues",
            Self::UnknownQueue => "pause of a queue that the worker does not have",
            Self::UnknownPark => "parked connection of a listener that the worker never had",
            Self::NotAConnection => "parked descriptor that is no connection",
            Self::UnknownConnection => "report of a connection that the worker does not have",
            Self::TooManyFinalFrames => "more final frames than are processed",
            Self::UnexpectedReply => "reply without a request",
            Self::RepeatedReply => "second reply to one request",
        })
    }
}
