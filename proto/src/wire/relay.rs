//! Frames between a peer and the relay.
//!
//! ```text
//! Control         01 | postcard of PeerToRelay or RelayToPeer
//! Message         02 | slot u32 | tag u32 | sealed message
//! Datagram        03 | slot u32 | lane u8 | segment u16 | packets
//! Multicast       04 | tag u32 | count u16 | count × (slot u32 | len u16 | part) | shared
//! MulticastShare  05 | slot u32 | tag u32 | len u16 | part | shared
//! ```
//!
//! Numbers are big-endian. `slot` is the destination on the way to the relay and the source on the way from it: the
//! relay rewrites those four bytes and looks at nothing behind the header.

use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::{
    FrameKind, decode, encode,
    websocket::{self, MaskingKey},
};
use crate::{
    fault::Malformed,
    id::{InstanceId, PeerId, Slot},
    limits::{MAX_FRAME_BYTES, MAX_MULTICAST, MAX_MULTICAST_PART_BYTES},
};

/// Where the slot stands in a Message, Datagram or MulticastShare frame.
pub const SLOT_OFFSET: usize = 1;

/// Bytes before the payload of a Message.
pub const MESSAGE_HEADER_BYTES: usize = 9;

/// Bytes before the packets of a Datagram.
pub const DATAGRAM_HEADER_BYTES: usize = 8;

/// Bytes before the parts of a Multicast.
const MULTICAST_HEADER_BYTES: usize = 7;

/// Bytes before each part of a Multicast.
const MULTICAST_PART_HEADER_BYTES: usize = 6;

/// Bytes before the part of a MulticastShare.
const SHARE_HEADER_BYTES: usize = 11;

/// What a peer says to the relay itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerToRelay {
    /// Answer to the challenge: see [`crate::admission`].
    Join(Join),
    /// A new sealed presence, to be passed to the room.
    Presence(Vec<u8>),
}

/// What the relay itself says to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RelayToPeer {
    /// First frame of every connection.
    Challenge(Challenge),
    /// The proofs held: the peer is in the room.
    Welcome(Welcome),
    /// Who else is in the room: sent after Welcome, in as many frames as it takes.
    Roster {
        /// Some of the members.
        members: Vec<Member>,
        /// Whether these were the last ones.
        last: bool,
    },
    /// Somebody joined.
    Joined(Member),
    /// Somebody left; the slot is not used again in this room.
    Left(Slot),
    /// Somebody's presence changed.
    Presence {
        /// Whose.
        slot: Slot,
        /// The sealed presence.
        sealed: Vec<u8>,
    },
    /// A message did not reach its receiver.
    Refused(Refused),
    /// The relay is about to close this connection for good reason; the peer learns why before it happens.
    Closing(ClosingReason),
    /// The relay is shutting down: come back after a pause drawn from `0..=jitter_ms`.
    Drain {
        /// Upper bound of the pause, in milliseconds.
        jitter_ms: u32,
    },
}

/// The relay's half of admission, new for every connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// X25519 public key made for this connection.
    pub ephemeral: [u8; 32],
    /// Random bytes made for this connection.
    pub nonce: [u8; 32],
}

/// The joiner's half of admission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The room's admission public key; its BLAKE3 hash is the room's id.
    pub admission: [u8; 32],
    /// The joiner's identity.
    pub peer: PeerId,
    /// The joiner's instance.
    pub instance: InstanceId,
    /// Proof that the joiner holds the room's admission key.
    pub room_proof: [u8; 32],
    /// Proof that the joiner holds the identity's key.
    pub identity_proof: [u8; 32],
    /// The joiner's sealed presence, covered by both proofs.
    pub presence: Vec<u8>,
}

/// What a peer learns on joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The peer's own slot.
    pub slot: Slot,
    /// The address that the connection came from, as the relay sees it.
    pub observed: SocketAddr,
    /// Silence after which the relay reaps the connection, in milliseconds.
    pub idle_timeout_ms: u32,
    /// The UDP port on which a STUN responder answers, if one does. It is the relay's own and not always the one that was
    /// dialled: what ends TLS for a relay listens elsewhere.
    pub stun: Option<u16>,
    /// The UDP port on which another one answers, so that a NAT shows whether it maps each destination anew.
    pub stun_alternate: Option<u16>,
}

/// One connection in the room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The relay's number for the connection.
    pub slot: Slot,
    /// The proved identity.
    pub peer: PeerId,
    /// The instance.
    pub instance: InstanceId,
    /// The sealed presence.
    pub presence: Vec<u8>,
}

/// A message that was not delivered, told to its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The receiver that was named.
    pub slot: Slot,
    /// The sender's tag of the message.
    pub tag: u32,
    /// Why.
    pub reason: RefusalReason,
}

/// Why a message was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RefusalReason {
    /// Nobody has that slot in this room (any more).
    Gone,
    /// The receiver's message queue is full.
    QueueFull,
}

/// Why the relay closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum ClosingReason {
    /// A proof did not verify.
    #[error("the relay did not accept the proof of membership")]
    BadProof,
    /// Nothing was proved in time.
    #[error("joining took too long")]
    JoinTimeout,
    /// The room has its most peers.
    #[error("the room is full")]
    RoomFull,
    /// The address has its most connections.
    #[error("too many connections from this address")]
    AddressLimit,
    /// The relay has its most connections.
    #[error("the relay is full")]
    RelayFull,
    /// A frame did not read as one.
    #[error("the relay could not read a frame")]
    Malformed,
    /// A frame was not allowed in its state.
    #[error("a frame came out of turn")]
    OutOfTurn,
    /// Nothing was heard for the idle timeout.
    #[error("nothing was heard for too long")]
    Idle,
    /// Nothing could be written for the write timeout: the peer does not read.
    #[error("the peer read too slowly")]
    SlowReader,
    /// The relay shuts down.
    #[error("the relay is shutting down")]
    ShuttingDown,
}

/// A frame on its way to the relay, split but not interpreted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerFrame<'a> {
    /// The postcard of a [`PeerToRelay`].
    Control(&'a [u8]),
    /// A Message for this slot, under this tag.
    Message {
        /// Receiver.
        to: Slot,
        /// The sender's tag.
        tag: u32,
    },
    /// A Datagram for this slot.
    Datagram {
        /// Receiver.
        to: Slot,
    },
    /// A Multicast.
    Multicast(Multicast<'a>),
}

/// A multicast, split into the shares of its recipients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multicast<'a> {
    /// The sender's tag.
    pub tag: u32,
    count: u16,
    parts: &'a [u8],
    /// What every recipient gets.
    pub shared: &'a [u8],
}

impl<'a> PeerFrame<'a> {
    /// Splits a frame that came from a peer.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown kind, a truncated header, a multicast whose lengths contradict it, or a frame
    /// that only a relay sends.
    pub fn split(frame: &'a [u8]) -> Result<Self, Malformed> {
        if frame.len() > MAX_FRAME_BYTES {
            return Err(Malformed::TooLong { have: frame.len(), limit: MAX_FRAME_BYTES });
        }
        let kind = *frame.first().ok_or(Malformed::Truncated { have: 0, need: 1 })?;
        match FrameKind::try_from(kind)? {
            FrameKind::Control => Ok(Self::Control(&frame[1..])),
            FrameKind::Message => {
                need(frame, MESSAGE_HEADER_BYTES)?;
                Ok(Self::Message { to: slot_at(frame, SLOT_OFFSET)?, tag: u32_at(frame, 5)? })
            }
            FrameKind::Datagram => {
                need(frame, DATAGRAM_HEADER_BYTES)?;
                // Its receiver could not read it: the fault is the sender's.
                if u16_at(frame, 6)? == 0 {
                    return Err(Malformed::InconsistentLength);
                }
                Ok(Self::Datagram { to: slot_at(frame, SLOT_OFFSET)? })
            }
            FrameKind::Multicast => Ok(Self::Multicast(Multicast::split(frame)?)),
            FrameKind::MulticastShare => Err(Malformed::UnknownFrame(kind)),
        }
    }
}

impl<'a> Multicast<'a> {
    fn split(frame: &'a [u8]) -> Result<Self, Malformed> {
        need(frame, MULTICAST_HEADER_BYTES)?;
        let tag = u32_at(frame, 1)?;
        let count = u16_at(frame, 5)?;
        if usize::from(count) > MAX_MULTICAST {
            return Err(Malformed::TooLong { have: count.into(), limit: MAX_MULTICAST });
        }
        let mut at = MULTICAST_HEADER_BYTES;
        for _ in 0..count {
            let len = usize::from(u16_at(frame, at + 4)?);
            if len > MAX_MULTICAST_PART_BYTES {
                return Err(Malformed::TooLong { have: len, limit: MAX_MULTICAST_PART_BYTES });
            }
            at += MULTICAST_PART_HEADER_BYTES + len;
        }
        if at > frame.len() {
            return Err(Malformed::InconsistentLength);
        }
        Ok(Self { tag, count, parts: &frame[MULTICAST_HEADER_BYTES..at], shared: &frame[at..] })
    }

    /// How many recipients there are.
    pub fn len(&self) -> usize {
        self.count.into()
    }

    /// Whether there is no recipient.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Each recipient's slot and part, in order.
    pub fn parts(&self) -> impl Iterator<Item = (Slot, &'a [u8])> + use<'a> {
        let mut rest = self.parts;
        std::iter::from_fn(move || {
            let slot = slot_at(rest, 0).ok()?;
            let len = usize::from(u16_at(rest, 4).ok()?);
            let (part, behind) = rest.get(MULTICAST_PART_HEADER_BYTES..)?.split_at_checked(len)?;
            rest = behind;
            Some((slot, part))
        })
    }

    /// The frame that one recipient gets.
    pub fn share(&self, from: Slot, part: &[u8]) -> Bytes {
        let mut frame = BytesMut::with_capacity(SHARE_HEADER_BYTES + part.len() + self.shared.len());
        frame.put_u8(FrameKind::MulticastShare as u8);
        frame.put_u32(from.0);
        frame.put_u32(self.tag);
        put_part(&mut frame, part);
        frame.put_slice(self.shared);
        frame.freeze()
    }
}

/// A frame that came from the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayFrame {
    /// The relay itself speaks.
    Control(RelayToPeer),
    /// A sealed message.
    Message {
        /// Sender.
        from: Slot,
        /// The sealed message.
        sealed: Bytes,
    },
    /// A share of a multicast.
    MulticastShare {
        /// Sender.
        from: Slot,
        /// This recipient's sealed part.
        part: Bytes,
        /// The part that all recipients share.
        shared: Bytes,
    },
    /// QUIC packets.
    Datagram(Datagram),
}

/// QUIC packets by way of the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Sender, or receiver on the way to the relay.
    pub slot: Slot,
    /// Which of the two instances' links: see [`crate::request::link::Route`].
    pub lane: u8,
    /// Bytes of each packet but the last, which may be shorter; never 0.
    pub segment: u16,
    /// The packets, one behind the other.
    pub packets: Bytes,
}

impl RelayFrame {
    /// Reads a frame that came from the relay.
    ///
    /// # Errors
    /// [`Malformed`] for a frame that is too long, an unknown kind, a truncated header, an undecodable control frame,
    /// packets of no length, or a frame that only peers send.
    pub fn read(frame: &Bytes) -> Result<Self, Malformed> {
        if frame.len() > MAX_FRAME_BYTES {
            return Err(Malformed::TooLong { have: frame.len(), limit: MAX_FRAME_BYTES });
        }
        let kind = *frame.first().ok_or(Malformed::Truncated { have: 0, need: 1 })?;
        match FrameKind::try_from(kind)? {
            FrameKind::Control => Ok(Self::Control(decode(&frame[1..], MAX_FRAME_BYTES)?)),
            FrameKind::Message => {
                need(frame, MESSAGE_HEADER_BYTES)?;
                Ok(Self::Message { from: slot_at(frame, SLOT_OFFSET)?, sealed: frame.slice(MESSAGE_HEADER_BYTES..) })
            }
            FrameKind::MulticastShare => {
                let from = slot_at(frame, SLOT_OFFSET)?;
                let end = SHARE_HEADER_BYTES + usize::from(u16_at(frame, 9)?);
                need(frame, end)?;
                Ok(Self::MulticastShare {
                    from,
                    part: frame.slice(SHARE_HEADER_BYTES..end),
                    shared: frame.slice(end..),
                })
            }
            FrameKind::Datagram => {
                need(frame, DATAGRAM_HEADER_BYTES)?;
                let segment = u16_at(frame, 6)?;
                if segment == 0 {
                    return Err(Malformed::InconsistentLength);
                }
                Ok(Self::Datagram(Datagram {
                    slot: slot_at(frame, SLOT_OFFSET)?,
                    lane: frame[5],
                    segment,
                    packets: frame.slice(DATAGRAM_HEADER_BYTES..),
                }))
            }
            FrameKind::Multicast => Err(Malformed::UnknownFrame(kind)),
        }
    }
}

/// The frame of a typed word between a peer and the relay itself.
pub fn control<T: Serialize>(word: &T) -> Bytes {
    let mut frame = vec![FrameKind::Control as u8];
    frame.extend(encode(word));
    frame.into()
}

/// The frame of one sealed message to one peer.
pub fn message(to: Slot, tag: u32, sealed: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(MESSAGE_HEADER_BYTES + sealed.len());
    frame.put_u8(FrameKind::Message as u8);
    frame.put_u32(to.0);
    frame.put_u32(tag);
    frame.put_slice(sealed);
    frame.freeze()
}

/// The frame of one sealed message to many peers. The caller keeps to [`MAX_MULTICAST`] parts of at most
/// [`MAX_MULTICAST_PART_BYTES`] each, and to [`MAX_FRAME_BYTES`] in all: see [`multicast_bytes`].
pub fn multicast<'a>(tag: u32, parts: impl ExactSizeIterator<Item = (Slot, &'a [u8])>, shared: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(FrameKind::Multicast as u8);
    frame.put_u32(tag);
    frame.put_u16(u16::try_from(parts.len()).expect("a multicast has at most MAX_MULTICAST parts"));
    for (slot, part) in parts {
        frame.put_u32(slot.0);
        put_part(&mut frame, part);
    }
    frame.put_slice(shared);
    frame.freeze()
}

/// Bytes of the frame of a multicast: the longest parts to the most recipients would not fit in one.
pub fn multicast_bytes(parts: impl Iterator<Item = usize>, shared: usize) -> usize {
    MULTICAST_HEADER_BYTES + shared + parts.map(|part| MULTICAST_PART_HEADER_BYTES + part).sum::<usize>()
}

/// The frame of QUIC packets to one peer: `packets` are one behind the other, each of `segment` bytes but the last.
pub fn datagram(to: Slot, lane: u8, segment: u16, packets: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(DATAGRAM_HEADER_BYTES + packets.len());
    put_datagram_head(&mut frame, to, lane, segment);
    frame.put_slice(packets);
    frame.freeze()
}

/// The same, ready for the wire of a client: the header of WebSocket before it, and masked with that key.
pub fn masked_datagram(to: Slot, lane: u8, segment: u16, packets: &[u8], key: MaskingKey) -> Bytes {
    let mut head = [0; DATAGRAM_HEADER_BYTES];
    put_datagram_head(&mut head.as_mut_slice(), to, lane, segment);
    websocket::masked([&head, packets], key).freeze()
}

fn put_datagram_head(frame: &mut impl BufMut, to: Slot, lane: u8, segment: u16) {
    frame.put_u8(FrameKind::Datagram as u8);
    frame.put_u32(to.0);
    frame.put_u8(lane);
    frame.put_u16(segment);
}

fn put_part(frame: &mut BytesMut, part: &[u8]) {
    frame.put_u16(u16::try_from(part.len()).expect("a part is at most MAX_MULTICAST_PART_BYTES"));
    frame.put_slice(part);
}

fn need(frame: &[u8], need: usize) -> Result<(), Malformed> {
    if frame.len() < need { Err(Malformed::Truncated { have: frame.len(), need }) } else { Ok(()) }
}

fn slot_at(frame: &[u8], at: usize) -> Result<Slot, Malformed> {
    u32_at(frame, at).map(Slot)
}

fn u32_at(frame: &[u8], at: usize) -> Result<u32, Malformed> {
    let bytes = frame.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Malformed::Truncated { have: frame.len(), need: at + 4 })
}

fn u16_at(frame: &[u8], at: usize) -> Result<u16, Malformed> {
    let bytes = frame.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map(|bytes| u16::from_be_bytes(*bytes)).ok_or(Malformed::Truncated { have: frame.len(), need: at + 2 })
}
