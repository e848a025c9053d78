//! Moving one file: the source offers it to one receiver, the receiver pulls ranges, the caller watches.

use serde::{Deserialize, Serialize};

use super::{Failure, link::Route};
use crate::id::{InstanceId, PeerId, Ticket};

/// Offer a file to one receiver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferSpec {
    /// The file on the source.
    pub path: Vec<u8>,
    /// The only identity that may pull it.
    pub receiver: PeerId,
}

/// A file on offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// Shown by the receiver when it pulls.
    pub ticket: Ticket,
    /// What is offered.
    pub file: FileInfo,
}

/// What there is to know of a file before its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Last part of the path.
    pub name: Vec<u8>,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits, `0o7777` at most.
    pub mode: u32,
    /// Seconds of the modification time since the Unix epoch.
    pub mtime_s: i64,
    /// Nanoseconds of the modification time.
    pub mtime_ns: u32,
}

/// Receive an offered file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveSpec {
    /// The right to pull.
    pub ticket: Ticket,
    /// What was offered.
    pub file: FileInfo,
    /// The source's identity.
    pub source: PeerId,
    /// The source's instance.
    pub source_instance: InstanceId,
    /// Where the file goes: a folder that exists, or the final name.
    pub destination: Vec<u8>,
    /// How the bytes may travel.
    pub path: PathWish,
}

/// How a transfer's bytes may travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathWish {
    /// Directly where possible, else by way of the relay.
    Auto,
    /// Directly or not at all.
    Direct,
    /// By way of the relay.
    Relayed,
}

impl PathWish {
    /// The link that carries such a transfer.
    pub fn route(self) -> Route {
        match self {
            Self::Auto | Self::Direct => Route::Auto,
            Self::Relayed => Route::RelayedOnly,
        }
    }
}

/// One stream of a receiver that pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullSpec {
    /// The right to pull.
    pub ticket: Ticket,
}

/// What the receiver says on a pulling stream, each behind a u32 length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RangeRequest {
    /// Send range number `.0`, of [`crate::limits::RANGE_BYTES`] bytes (the last may be shorter).
    Range(u64),
    /// Send the SHA-256 of the whole file.
    Sha256,
}

/// What the source says on a pulling stream, each behind a u32 length; a range's bytes follow its head unframed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RangeReply {
    /// The bytes of a range follow.
    Range {
        /// The number of the range.
        index: u64,
        /// Bytes that follow.
        len: u32,
        /// Their BLAKE3 hash.
        blake3: [u8; 32],
    },
    /// The SHA-256 of the whole file.
    Sha256([u8; 32]),
    /// The source cannot go on: the file changed, or could not be read.
    Failed(Failure),
    /// The source still reads the file for its hash: this many bytes so far. A sign of life, sent every few seconds.
    Hashing(u64),
}

/// What the receiver tells the caller who watches, each behind a u32 length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// So far.
    Moved {
        /// Bytes verified, those of an earlier try included.
        bytes: u64,
        /// Bytes in all.
        total: u64,
        /// Bytes that this try began with.
        resumed: u64,
        /// The path now.
        path: PathNow,
    },
    /// All bytes arrived; the whole is being verified.
    Verifying,
    /// The file stands under its final name.
    Done {
        /// Bytes in all.
        bytes: u64,
        /// Bytes that this try began with.
        resumed: u64,
        /// SHA-256 of the whole.
        sha256: [u8; 32],
        /// The path that carried most bytes of this try.
        path: PathNow,
        /// The final name.
        destination: Vec<u8>,
    },
    /// It ended without the file.
    Failed(Failure),
}

/// How a link's packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathNow {
    /// UDP from host to host.
    Direct,
    /// By way of the relay.
    Relayed,
}
