//! Versions, the one table of frame numbers, and bounded encoding.
//!
//! Typed parts are postcard: fields by position, variants by index. Enums are append-only; a removed variant stays.
//! Every decode checks the length first and takes bytes left over for a fault.

use serde::{Serialize, de::DeserializeOwned};

use crate::fault::Malformed;

pub(crate) mod bytes;
pub mod message;
pub mod relay;
pub mod websocket;

/// WebSocket sub-protocol of the relay's wire: the version is agreed in the upgrade, before the first frame.
pub const RELAY_PROTOCOL: &str = "peerfleet.relay.v1";

/// ALPN of links between peers.
pub const LINK_PROTOCOL: &[u8] = b"peerfleet/link/1";

/// Path of the relay's WebSocket.
pub const RELAY_PATH: &str = "/v1";

/// Frame numbers of the relay's wire; a removed number stays in the table, marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A typed control frame between a peer and the relay itself.
    Control = 0x01,
    /// One sealed message to one peer. Never lost in silence.
    Message = 0x02,
    /// QUIC packets to one peer. Droppable, oldest first.
    Datagram = 0x03,
    /// One sealed message to many peers, on its way to the relay.
    Multicast = 0x04,
    /// One recipient's share of a multicast, on its way from the relay.
    MulticastShare = 0x05,
}

impl TryFrom<u8> for FrameKind {
    type Error = Malformed;

    fn try_from(byte: u8) -> Result<Self, Malformed> {
        match byte {
            0x01 => Ok(Self::Control),
            0x02 => Ok(Self::Message),
            0x03 => Ok(Self::Datagram),
            0x04 => Ok(Self::Multicast),
            0x05 => Ok(Self::MulticastShare),
            unknown => Err(Malformed::UnknownFrame(unknown)),
        }
    }
}

/// Encodes a typed part.
///
/// # Panics
/// Never: encoding into memory fails only for types that postcard cannot represent, and ours have tests.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).expect("every wire type is representable")
}

/// Decodes a typed part of at most `limit` bytes that fills `bytes` exactly.
///
/// # Errors
/// [`Malformed`] if it is longer than `limit`, does not decode, or leaves bytes over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, Malformed> {
    if bytes.len() > limit {
        return Err(Malformed::TooLong { have: bytes.len(), limit });
    }
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|_| Malformed::Undecodable)?;
    if rest.is_empty() { Ok(value) } else { Err(Malformed::LeftOver(rest.len())) }
}
