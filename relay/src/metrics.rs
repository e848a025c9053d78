//! Every counter of the relay.
//!
//! In: one call per thing that happened. Out: [`Stats`], a copy of all counters.
//! Never holds a room's or a peer's id, an address or anything else that tells who: the counters are public at `/health`.
//! Counters only grow, from zero at start.
//! Bounds: the lists of reasons are closed, so the number of counters is fixed; a test reaches every reason.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use peerfleet_proto::wire::relay::ClosingReason;
use serde::{Deserialize, Serialize};

macro_rules! closed_list {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every reason, in the order of its declaration.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The reason as logs and `/health` write it.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.label())
            }
        }
    };
}

closed_list! {
    /// Why something that was to be delivered or answered was not.
    DropReason {
        /// A message whose receiver is not in the room (any more). Its sender is told.
        MessageGone = "message_gone",
        /// A message whose receiver's message queue is full. Its sender is told.
        MessageQueueFull = "message_queue_full",
        /// A message for which the room has no queue bytes left. Its sender is told.
        MessageRoomFull = "message_room_full",
        /// A message for which the relay has no queue bytes left. Its sender is told.
        MessageRelayFull = "message_relay_full",
        /// A datagram whose receiver is not in the room (any more).
        DatagramGone = "datagram_gone",
        /// The oldest datagram of a full queue, to make room for a newer one.
        DatagramQueueFull = "datagram_queue_full",
        /// A datagram for which the room has no queue bytes left.
        DatagramRoomFull = "datagram_room_full",
        /// A datagram for which the relay has no queue bytes left.
        DatagramRelayFull = "datagram_relay_full",
        /// A STUN request that is shorter than its answer would be.
        StunTooShort = "stun_too_short",
        /// A STUN request from an address that sends too many.
        StunTooMany = "stun_too_many",
        /// A UDP packet that is no STUN binding request.
        StunUnreadable = "stun_unreadable",
    }
}

closed_list! {
    /// Why a connection ended.
    CloseReason {
        /// The peer closed the WebSocket.
        Left = "left",
        /// The connection broke without a goodbye.
        Lost = "lost",
        /// An HTTP request was answered; nothing was to be upgraded.
        Answered = "answered",
        /// What came was no HTTP request, or one that the relay does not serve.
        BadRequest = "bad_request",
        /// No HTTP request came in time.
        RequestTimeout = "request_timeout",
        /// Turned away without an answer: the lobby for connections over a limit is full too.
        TurnedAway = "turned_away",
        /// A proof did not verify.
        BadProof = "bad_proof",
        /// Nothing was proved in time.
        JoinTimeout = "join_timeout",
        /// The room has its most peers.
        RoomFull = "room_full",
        /// The address has its most connections, or opens them too fast.
        AddressLimit = "address_limit",
        /// The relay has its most connections.
        RelayFull = "relay_full",
        /// A frame did not read as one.
        Malformed = "malformed",
        /// A frame was not allowed in its state.
        OutOfTurn = "out_of_turn",
        /// Nothing was heard for the idle timeout.
        Idle = "idle",
        /// Nothing could be written for the write timeout, or the control queue is full: the peer does not read.
        SlowReader = "slow_reader",
        /// The relay shuts down.
        ShuttingDown = "shutting_down",
    }
}

impl CloseReason {
    /// What the peer is told, if it is told anything.
    pub const fn told(self) -> Option<ClosingReason> {
        match self {
            Self::Left | Self::Lost | Self::Answered | Self::BadRequest | Self::RequestTimeout | Self::TurnedAway => {
                None
            }
            Self::BadProof => Some(ClosingReason::BadProof),
            Self::JoinTimeout => Some(ClosingReason::JoinTimeout),
            Self::RoomFull => Some(ClosingReason::RoomFull),
            Self::AddressLimit => Some(ClosingReason::AddressLimit),
            Self::RelayFull => Some(ClosingReason::RelayFull),
            Self::Malformed => Some(ClosingReason::Malformed),
            Self::OutOfTurn => Some(ClosingReason::OutOfTurn),
            Self::Idle => Some(ClosingReason::Idle),
            Self::SlowReader => Some(ClosingReason::SlowReader),
            Self::ShuttingDown => Some(ClosingReason::ShuttingDown),
        }
    }
}

impl From<ClosingReason> for CloseReason {
    fn from(reason: ClosingReason) -> Self {
        match reason {
            ClosingReason::BadProof => Self::BadProof,
            ClosingReason::JoinTimeout => Self::JoinTimeout,
            ClosingReason::RoomFull => Self::RoomFull,
            ClosingReason::AddressLimit => Self::AddressLimit,
            ClosingReason::RelayFull => Self::RelayFull,
            ClosingReason::Malformed => Self::Malformed,
            ClosingReason::OutOfTurn => Self::OutOfTurn,
            ClosingReason::Idle => Self::Idle,
            ClosingReason::SlowReader => Self::SlowReader,
            ClosingReason::ShuttingDown => Self::ShuttingDown,
        }
    }
}

/// The counters themselves; every method may be called from any thread.
#[derive(Debug)]
pub(crate) struct Metrics {
    accepted: AtomicU64,
    joined: AtomicU64,
    messages: AtomicU64,
    shares: AtomicU64,
    datagrams: AtomicU64,
    bytes: AtomicU64,
    stun_answered: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
    closed: [AtomicU64; CloseReason::ALL.len()],
}

/// What was put into a receiver's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forwarded {
    /// A message to one receiver.
    Message,
    /// One receiver's share of a multicast.
    Share,
    /// A datagram.
    Datagram,
}

/// A copy of all counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// TCP connections accepted.
    pub accepted: u64,
    /// Connections that proved their membership and joined a room.
    pub joined: u64,
    /// Messages forwarded.
    pub messages: u64,
    /// Shares of multicasts forwarded.
    pub shares: u64,
    /// Datagrams forwarded.
    pub datagrams: u64,
    /// Bytes of all frames forwarded.
    pub bytes: u64,
    /// STUN requests answered.
    pub stun_answered: u64,
    /// What was not delivered or answered, by [`DropReason`].
    pub dropped: BTreeMap<String, u64>,
    /// Connections that ended, by [`CloseReason`].
    pub closed: BTreeMap<String, u64>,
}

impl Stats {
    /// How often something was dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason.label()).copied().unwrap_or(0)
    }

    /// How many connections ended for this reason.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed.get(reason.label()).copied().unwrap_or(0)
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            accepted: AtomicU64::new(0),
            joined: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            shares: AtomicU64::new(0),
            datagrams: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            stun_answered: AtomicU64::new(0),
            dropped: std::array::from_fn(|_| AtomicU64::new(0)),
            closed: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    pub(crate) fn accepted(&self) {
        self.accepted.fetch_add(1, Relaxed);
    }

    pub(crate) fn joined(&self) {
        self.joined.fetch_add(1, Relaxed);
    }

    pub(crate) fn stun_answered(&self) {
        self.stun_answered.fetch_add(1, Relaxed);
    }

    pub(crate) fn forwarded(&self, what: Forwarded, bytes: usize) {
        let counter = match what {
            Forwarded::Message => &self.messages,
            Forwarded::Share => &self.shares,
            Forwarded::Datagram => &self.datagrams,
        };
        counter.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn dropped(&self, reason: DropReason, count: u64) {
        self.dropped[reason as usize].fetch_add(count, Relaxed);
    }

    pub(crate) fn closed(&self, reason: CloseReason) {
        self.closed[reason as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn stats(&self) -> Stats {
        let dropped = DropReason::ALL.iter().map(|reason| (reason.label(), &self.dropped[*reason as usize]));
        let closed = CloseReason::ALL.iter().map(|reason| (reason.label(), &self.closed[*reason as usize]));
        Stats {
            accepted: self.accepted.load(Relaxed),
            joined: self.joined.load(Relaxed),
            messages: self.messages.load(Relaxed),
            shares: self.shares.load(Relaxed),
            datagrams: self.datagrams.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            stun_answered: self.stun_answered.load(Relaxed),
            dropped: dropped.map(|(label, count)| (label.to_owned(), count.load(Relaxed))).collect(),
            closed: closed.map(|(label, count)| (label.to_owned(), count.load(Relaxed))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_of_its_own() {
        let metrics = Metrics::new();
        for (count, reason) in (1..).zip(DropReason::ALL) {
            metrics.dropped(*reason, count);
        }
        for reason in CloseReason::ALL {
            metrics.closed(*reason);
        }
        let stats = metrics.stats();
        for (count, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(stats.dropped(*reason), count);
        }
        assert!(CloseReason::ALL.iter().all(|reason| stats.closed(*reason) == 1));
    }

    #[test]
    fn what_a_peer_is_told_is_what_is_counted() {
        for reason in CloseReason::ALL {
            if let Some(told) = reason.told() {
                assert_eq!(CloseReason::from(told), *reason);
            }
        }
    }
}
