//! Reads what a STUN responder answers: how it sees us, and which of our requests that belongs to.
//!
//! In: requests that wait, a datagram and where it came from. Out: an [`Answer`], or why the datagram counts for nothing. It
//! ends no request: who asked does, once the answer was of use.
//! Bounds: those of [`Message`] and [`Transactions`].

use std::{net::SocketAddr, time::Instant};

use super::{
    Ignored,
    candidate::{canonical, is_usable},
    transaction::{Transactions, Unasked},
};
use crate::stun::{Class, Message, TransactionId};

/// An answer to a request that waits, from the address that was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer {
    /// The request's.
    pub(super) transaction: TransactionId,
    /// When the request was sent.
    pub(super) asked_at: Instant,
    /// How the responder sees us.
    pub(super) seen: SocketAddr,
}

impl Answer {
    /// Reads a datagram.
    ///
    /// # Errors
    /// [`Ignored`], the first reason for which it counts for nothing.
    pub(super) fn read(
        waiting: &mut Transactions,
        from: SocketAddr,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Self, Ignored> {
        let answer = Message::parse(bytes).map_err(Ignored::Malformed)?;
        if !answer.is_binding() || answer.class() != Class::Success {
            return Err(Ignored::NotOurs);
        }
        let asked_at = waiting.find(answer.transaction(), from, now).map_err(|unasked| match unasked {
            Unasked::Unknown => Ignored::NotOurs,
            Unasked::WrongSource => Ignored::WrongSource,
        })?;
        if answer.unknown_required().is_some() {
            return Err(Ignored::UnknownAttribute);
        }
        let seen = answer.mapped_address().map(canonical).filter(|seen| is_usable(*seen)).ok_or(Ignored::NoAddress)?;
        Ok(Self { transaction: answer.transaction(), asked_at, seen })
    }
}
