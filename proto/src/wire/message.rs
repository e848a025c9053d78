//! What is inside a sealed message.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::encode;
use crate::{
    id::RequestId,
    presence::Epoch,
    request::{Outcome, Request},
};

/// What lets a host take an ask at most once with bounded memory, whatever the relay holds back: see [`crate::exchange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbering {
    /// Grows with every ask of this asker to this host, and stays the same when the ask is repeated.
    pub number: u64,
    /// The asker no longer waits for any ask below this number.
    pub settled: u64,
    /// The host's epoch when the ask was first sent: under none but this and the next does the host take it.
    pub born: Epoch,
}

/// The plaintext of one sealed message. Append-only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Please do this. Repeated under the same id until it is accepted or answered.
    Ask {
        /// Chosen by the asking side.
        id: RequestId,
        /// Where it stands among the asker's asks.
        numbering: Numbering,
        /// What to do.
        request: Request,
    },
    /// Please do what the shared part of this multicast says.
    AskShared {
        /// Chosen by the asking side, another one for each recipient.
        id: RequestId,
        /// Where it stands among the asker's asks.
        numbering: Numbering,
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
    /// How does a request stand that was accepted? Answered with `Accepted`, `Answer` or `Forgotten`.
    Poll {
        /// The request.
        id: RequestId,
        /// Its number.
        number: u64,
        /// The asker no longer waits for any ask below this number.
        settled: u64,
    },
    /// Nothing is known of the request here (any more), and it will not be taken.
    Forgotten {
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
        let (name, id) = match self {
            Self::Ask { id, .. } => ("Ask", id),
            Self::AskShared { id, .. } => ("AskShared", id),
            Self::Accepted { id } => ("Accepted", id),
            Self::Answer { id, .. } => ("Answer", id),
            Self::Busy { id } => ("Busy", id),
            Self::Poll { id, .. } => ("Poll", id),
            Self::Forgotten { id } => ("Forgotten", id),
        };
        f.debug_struct(name).field("id", id).finish_non_exhaustive()
    }
}

/// Encodes a [`Message::Ask`] whose request was encoded before: a request to many is encoded once.
pub fn encode_ask(id: RequestId, numbering: &Numbering, request: &[u8]) -> Vec<u8> {
    /// Index of [`Message::Ask`].
    const ASK: u32 = 0;
    let mut words = encode(&(ASK, id, numbering));
    words.extend(request);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_key() {
        let numbering = Numbering { number: 0, settled: 0, born: Epoch([9; 16]) };
        let id = RequestId::from_bytes([1; 16]);
        let message = Message::AskShared { id, numbering, key: [0xA7; 32], digest: [2; 32] };
        assert_eq!(format!("{message:?}"), format!("AskShared {{ id: {id:?}, .. }}"));
    }

    #[test]
    fn an_ask_in_two_parts_is_the_ask_in_one() {
        let (id, request) = (RequestId::from_bytes([7; 16]), Request::Jobs);
        let numbering = Numbering { number: 300, settled: 2, born: Epoch([9; 16]) };
        assert_eq!(encode_ask(id, &numbering, &encode(&request)), encode(&Message::Ask { id, numbering, request }));
    }
}
