//! What can be wrong with input, by whose fault it is: each variant is one rule that was broken.

/// Bytes that do not read as what they should be; nobody's intent can be told from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer bytes than the fixed part needs.
    #[error("truncated: {have} bytes where at least {need} are needed")]
    Truncated {
        /// Bytes that there were.
        have: usize,
        /// Bytes that the fixed part needs.
        need: usize,
    },
    /// More bytes than the limit of this kind of frame.
    #[error("{have} bytes where at most {limit} are allowed")]
    TooLong {
        /// Bytes that there were.
        have: usize,
        /// The limit, from [`crate::limits`].
        limit: usize,
    },
    /// A frame number that the table does not have.
    #[error("unknown frame kind {0:#04x}")]
    UnknownFrame(u8),
    /// The typed part did not decode.
    #[error("the typed part does not decode")]
    Undecodable,
    /// Bytes were left over behind the typed part.
    #[error("{0} bytes left over behind the typed part")]
    LeftOver(usize),
    /// A count or length inside contradicts the bytes that there are.
    #[error("a length inside contradicts the frame")]
    InconsistentLength,
}

/// Well-formed input that breaks the protocol: the other side is broken or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misbehaved {
    /// A proof or seal did not verify.
    #[error("a proof did not verify")]
    Forged,
    /// A public key that leads to a predictable shared secret (RFC 7748 §6.1), or is not in its one canonical form.
    #[error("a weak public key")]
    WeakKey,
    /// A frame that is not allowed in this state.
    #[error("a frame out of turn")]
    OutOfTurn,
    /// More of something than was agreed.
    #[error("more than was agreed")]
    OverLimit,
}
