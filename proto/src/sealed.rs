//! Sealed messages between two instances: their layout, and the keys of established sessions.
//!
//! ```text
//! initiation  01 | sender index u32 | Noise message 1
//! response    02 | receiver index u32 | sender index u32 | Noise message 2
//! transport   03 | receiver index u32 | counter u64 | ciphertext
//! ```
//!
//! [`noise`] makes the keys, [`SealKey`] and [`OpenKey`] use them, [`replay`] remembers counters, and [`crate::exchange`] decides
//! when sessions are begun and replaced. Everything before a ciphertext is its additional data.
//! Bounds: [`SOFT_LIMIT`] messages or [`SOFT_AGE`], then a new session is begun; [`HARD_LIMIT`] messages, then nothing more is sealed.

use std::time::Duration;

use aes_gcm::aead::{Aead, AeadInOut, Payload};

use self::{
    noise::{Key, TAG_BYTES, cipher, nonce},
    replay::ReplayWindow,
};
use crate::fault::{Malformed, Misbehaved};

pub mod noise;
pub mod replay;

/// Messages under one key after which a new session is begun. Far below what AES-GCM bears (2^32 messages with counters
/// by NIST SP 800-38D §8.3), so that a stolen key opens little.
pub const SOFT_LIMIT: u64 = 1 << 20;

/// Age of a session after which a new one is begun.
pub const SOFT_AGE: Duration = Duration::from_secs(3600);

/// Messages under one key after which none is sealed any more (NIST SP 800-38D §8.3).
pub const HARD_LIMIT: u64 = 1 << 32;

/// Bytes that a transport message has around its plaintext.
pub const TRANSPORT_OVERHEAD: usize = TRANSPORT_HEADER_BYTES + TAG_BYTES;

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const TRANSPORT: u8 = 3;

const INITIATION_HEADER_BYTES: usize = 5;
const RESPONSE_HEADER_BYTES: usize = 9;
const TRANSPORT_HEADER_BYTES: usize = 13;

/// A sealed message, split but not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed<'a> {
    /// Begins a session.
    Initiation {
        /// The index by which the initiator wants to be answered.
        sender: u32,
        /// Noise message 1.
        noise: &'a [u8],
    },
    /// Establishes a session.
    Response {
        /// The initiator's index.
        receiver: u32,
        /// The index by which the responder wants to be addressed.
        sender: u32,
        /// Noise message 2.
        noise: &'a [u8],
    },
    /// A message of an established session.
    Transport {
        /// The receiver's index.
        receiver: u32,
        /// The message's counter.
        counter: u64,
        /// The header again, which is additional data.
        header: &'a [u8],
        /// The sealed plaintext.
        ciphertext: &'a [u8],
    },
}

impl<'a> Sealed<'a> {
    /// Splits a sealed message.
    ///
    /// # Errors
    /// [`Malformed`] if its kind is unknown or its header is cut off.
    pub fn split(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let truncated = |need| Malformed::Truncated { have: bytes.len(), need };
        let u32_at = |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk).map(|chunk| u32::from_be_bytes(*chunk));
        match bytes.first() {
            Some(&INITIATION) => {
                let noise = bytes.get(INITIATION_HEADER_BYTES..).ok_or(truncated(INITIATION_HEADER_BYTES))?;
                Ok(Self::Initiation { sender: u32_at(1).ok_or(truncated(INITIATION_HEADER_BYTES))?, noise })
            }
            Some(&RESPONSE) => {
                let truncated = truncated(RESPONSE_HEADER_BYTES);
                let noise = bytes.get(RESPONSE_HEADER_BYTES..).ok_or(truncated)?;
                let (receiver, sender) = (u32_at(1).ok_or(truncated)?, u32_at(5).ok_or(truncated)?);
                Ok(Self::Response { receiver, sender, noise })
            }
            Some(&TRANSPORT) => {
                let truncated = truncated(TRANSPORT_HEADER_BYTES);
                let (header, ciphertext) = bytes.split_at_checked(TRANSPORT_HEADER_BYTES).ok_or(truncated)?;
                let counter = header[5..].first_chunk().map(|chunk| u64::from_be_bytes(*chunk)).ok_or(truncated)?;
                Ok(Self::Transport { receiver: u32_at(1).ok_or(truncated)?, counter, header, ciphertext })
            }
            Some(&unknown) => Err(Malformed::UnknownFrame(unknown)),
            None => Err(truncated(1)),
        }
    }
}

/// Lays out an initiation.
pub fn initiation(sender: u32, noise: &[u8]) -> Vec<u8> {
    [&[INITIATION][..], &sender.to_be_bytes(), noise].concat()
}

/// Lays out a response.
pub fn response(receiver: u32, sender: u32, noise: &[u8]) -> Vec<u8> {
    [&[RESPONSE][..], &receiver.to_be_bytes(), &sender.to_be_bytes(), noise].concat()
}

/// Seals one direction of a session. Keeps the bare key: expanding it costs 0.2 µs a message, a kept cipher 600 bytes of
/// every session that could not be wiped.
pub struct SealKey {
    key: Key,
    receiver: u32,
    counter: u64,
}

impl SealKey {
    /// A key whose messages go to the other side's index.
    pub fn new(key: &Key, receiver: u32) -> Self {
        Self { key: key.clone(), receiver, counter: 0 }
    }

    /// Seals the next message; `None` behind [`HARD_LIMIT`].
    pub fn seal(&mut self, plain: &[u8]) -> Option<Vec<u8>> {
        if self.counter >= HARD_LIMIT {
            return None;
        }
        let mut message = Vec::with_capacity(TRANSPORT_OVERHEAD + plain.len());
        message.push(TRANSPORT);
        message.extend(self.receiver.to_be_bytes());
        message.extend(self.counter.to_be_bytes());
        message.extend(plain);
        let (header, body) = message.split_at_mut(TRANSPORT_HEADER_BYTES);
        let tag = cipher(&self.key).encrypt_inout_detached(&nonce(self.counter).into(), header, body.into());
        message.extend(tag.expect("a message is far below the cipher's bound"));
        self.counter += 1;
        Some(message)
    }

    /// Whether it is time for a new session.
    pub fn is_worn(&self) -> bool {
        self.counter >= SOFT_LIMIT
    }

    /// Goes on as if so many messages had been sealed, so that limits can be tested.
    #[doc(hidden)]
    pub fn skip_to(&mut self, counter: u64) {
        self.counter = self.counter.max(counter);
    }
}

/// Opens one direction of a session. Keeps the bare key, as [`SealKey`] does.
pub struct OpenKey {
    key: Key,
    window: ReplayWindow,
}

impl OpenKey {
    /// A key that has opened nothing yet.
    pub fn new(key: &Key) -> Self {
        Self { key: key.clone(), window: ReplayWindow::default() }
    }

    /// Opens a message, each counter once.
    ///
    /// # Errors
    /// [`Misbehaved::Forged`] if it does not verify or was opened before.
    pub fn open(&mut self, counter: u64, header: &[u8], ciphertext: &[u8]) -> Result<Vec<u8>, Misbehaved> {
        if counter >= HARD_LIMIT || !self.window.may_be_new(counter) {
            return Err(Misbehaved::Forged);
        }
        let payload = Payload { msg: ciphertext, aad: header };
        let plain = cipher(&self.key).decrypt(&nonce(counter).into(), payload).map_err(|_| Misbehaved::Forged)?;
        self.window.take(counter);
        Ok(plain)
    }
}
