//! What is inside a sealed message.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    id::RequestId,
    request::{Outcome, Request},
};

/// The plaintext of one sealed message. Append-only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Please do this. Repeated under the same id until it is accepted or answered.
    Ask {
        /// Chosen by the asking side.
        id: RequestId,
        /// Earlier ids that the asking side has its answers of and has sent only once: they may be forgotten.
        settled: Vec<RequestId>,
        /// What to do.
        request: Request,
    },
    /// Please do what the shared part of this multicast says.
    AskShared {
        /// Chosen by the asking side, another one for each recipient.
        id: RequestId,
        /// AES-256-GCM key of the shared part, used for it alone.
        key: [u8; 32],
        /// BLAKE3 hash of the sealed shared part: the relay cannot pair this share with another.
        digest: [u8; 32],
    },
    /// The request arrived and is being worked on: no need to repeat it soon.
    Accepted {
        /// The request.
        id: RequestId,
    },
    /// The request's outcome.
    Answer {
        /// The request.
        id: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
    /// Too much is going on here to take the request; nothing was done.
    Busy {
        /// The request.
        id: RequestId,
    },
}

/// The first frame of every stream of a link. Append-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamHead {
    /// The stream goes on as the request's service does; the outcome is the first frame back.
    Open(Request),
    /// A request that would travel as a message, were the relay there; the outcome is all that comes back.
    Ask {
        /// Chosen by the asking side.
        id: RequestId,
        /// What to do.
        request: Request,
    },
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ask { id, request, .. } => {
                f.debug_struct("Ask").field("id", id).field("request", request).finish_non_exhaustive()
            }
            Self::AskShared { id, .. } => f.debug_struct("AskShared").field("id", id).finish_non_exhaustive(),
            Self::Accepted { id } => f.debug_struct("Accepted").field("id", id).finish(),
            Self::Answer { id, outcome } => f.debug_struct("Answer").field("id", id).field("outcome", outcome).finish(),
            Self::Busy { id } => f.debug_struct("Busy").field("id", id).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_key() {
        let message = Message::AskShared { id: RequestId::from_bytes([1; 16]), key: [0xA7; 32], digest: [2; 32] };
        assert!(!format!("{message:?}").contains("167"));
    }
}
