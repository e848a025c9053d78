//! The part of STUN (RFC 8489) that connectivity checks and address discovery need: binding requests and their answers.
//!
//! In: a datagram, or the parts of a message. Out: a view of its attributes, or the datagram to send.
//! It never allocates while reading, keeps no transactions (see [`crate::path`]), and knows neither the SHA-1 integrity of
//! older versions nor truncated integrity: nobody here sends them.
//! A message is read in two steps: [`Message::parse`] checks form and FINGERPRINT, [`Message::is_signed_by`] the sender.
//! Bounds: [`MAX_BYTES`] a message, [`MAX_USERNAME_BYTES`] a user name, both from RFC 8489.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Longest message that is read or written, in bytes: what RFC 8489 §6.1 allows over IPv4 when the path's MTU is unknown
/// (576 less the IP and UDP headers). A longer one is refused.
pub const MAX_BYTES: usize = 548;

/// Bytes of the header (RFC 8489 §5).
pub const HEADER_BYTES: usize = 20;

/// Longest USERNAME, in bytes (RFC 8489 §14.3: fewer than 509). A longer one is refused.
pub const MAX_USERNAME_BYTES: usize = 508;

const MAGIC_COOKIE: u32 = 0x2112_A442;
const BINDING: u16 = 0x001;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const INTEGRITY_BYTES: usize = 32;
const FINGERPRINT_BYTES: usize = 4;
/// Longest XOR-MAPPED-ADDRESS, in bytes: family and port, and an IPv6 address.
const MAPPED_ADDRESS_BYTES: usize = 20;
/// RFC 8489 §14.7: tells a FINGERPRINT from another protocol's own CRC-32.
const FINGERPRINT_XOR: u32 = 0x5354_554E;

/// Whether a datagram that starts with this byte can be STUN, and so is no QUIC packet (RFC 9443 §3).
pub fn is_stun(first: u8) -> bool {
    first < 4
}

/// Types of attributes, as the registry of RFC 8489 §18.3 has them.
mod attribute {
    pub(super) const MAPPED_ADDRESS: u16 = 0x0001;
    /// RFC 5780 §7.2.
    pub(super) const CHANGE_REQUEST: u16 = 0x0003;
    pub(super) const USERNAME: u16 = 0x0006;
    pub(super) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(super) const ERROR_CODE: u16 = 0x0009;
    pub(super) const UNKNOWN_ATTRIBUTES: u16 = 0x000A;
    pub(super) const MESSAGE_INTEGRITY_SHA256: u16 = 0x001C;
    pub(super) const XOR_MAPPED_ADDRESS: u16 = 0x0020;
    pub(super) const FINGERPRINT: u16 = 0x8028;
    /// Ours, from the range that others may skip: the number of a check, so that none counts twice.
    pub(super) const CHECK_NUMBER: u16 = 0xC0F1;
    /// Ours, from the same range: zeros that make a request as long as its answer.
    pub(super) const PADDING: u16 = 0xC0F2;
    /// Types from here on may be skipped by who does not know them.
    pub(super) const FIRST_OPTIONAL: u16 = 0x8000;
}

/// Why a datagram is not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunFault {
    /// Shorter than a header, or longer than [`MAX_BYTES`].
    #[error("{0} bytes are no STUN message")]
    Size(usize),
    /// The first bits or the magic cookie belong to something else.
    #[error("not STUN")]
    NotStun,
    /// The header's length is not that of the datagram.
    #[error("the header's length contradicts the datagram")]
    Length,
    /// An attribute ends beyond the message, has a size that its type does not allow, or follows the last one.
    #[error("attribute {0:#06x} does not fit")]
    Attribute(u16),
    /// The FINGERPRINT is that of other bytes.
    #[error("the fingerprint does not match")]
    Fingerprint,
}

/// What ties an answer to its request: 96 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(pub [u8; 12]);

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Wants an answer.
    Request,
    /// Wants none.
    Indication,
    /// The answer.
    Success,
    /// The answer is no.
    Error,
}

/// Whence an answer is wanted, other than from where the request went (CHANGE-REQUEST, RFC 5780 §7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangeRequest {
    /// From another address.
    pub ip: bool,
    /// From another port.
    pub port: bool,
}

/// The bits of CHANGE-REQUEST.
const CHANGE_IP: u32 = 0b100;
const CHANGE_PORT: u32 = 0b010;

/// A key of MESSAGE-INTEGRITY-SHA256. Debug never prints it.
#[derive(Clone)]
pub struct IntegrityKey(Hmac<Sha256>);

impl IntegrityKey {
    /// The key of these bytes (a short-term credential's password, RFC 8489 §9.1.1).
    pub fn new(key: &[u8]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes a key of any length"))
    }
}

impl std::fmt::Debug for IntegrityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IntegrityKey(…)")
    }
}

/// A message that was read: well-formed, but by nobody in particular until [`Message::is_signed_by`] says so.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    bytes: &'a [u8],
    class: Class,
    method: u16,
    transaction: TransactionId,
    username: Option<&'a [u8]>,
    mapped: Option<SocketAddr>,
    check_number: Option<u64>,
    change_request: Option<ChangeRequest>,
    integrity_at: Option<usize>,
    unknown_required: Option<u16>,
    has_fingerprint: bool,
}

impl<'a> Message<'a> {
    /// Reads a datagram.
    ///
    /// # Errors
    /// [`StunFault`], the first rule that it breaks.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StunFault> {
        let mut message = Self::parse_header(bytes)?;
        let mut at = HEADER_BYTES;
        while at < bytes.len() {
            at = message.parse_attribute(at)?;
        }
        Ok(message)
    }

    /// What the message is for.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Whether its method is Binding, the only one used here.
    pub fn is_binding(&self) -> bool {
        self.method == BINDING
    }

    /// What ties an answer to its request.
    pub fn transaction(&self) -> TransactionId {
        self.transaction
    }

    /// USERNAME, as bytes.
    pub fn username(&self) -> Option<&'a [u8]> {
        self.username
    }

    /// XOR-MAPPED-ADDRESS: where the answering side saw the request come from.
    pub fn mapped_address(&self) -> Option<SocketAddr> {
        self.mapped
    }

    /// The number of a check.
    pub fn check_number(&self) -> Option<u64> {
        self.check_number
    }

    /// Whence the answer is wanted. Who has no other port to answer from does not understand it: it is
    /// [`Message::unknown_required`] as well.
    pub fn change_request(&self) -> Option<ChangeRequest> {
        self.change_request
    }

    /// The first attribute that must be understood and is not: such a request is refused, such an answer discarded
    /// (RFC 8489 §6.3.1, §6.3.3).
    pub fn unknown_required(&self) -> Option<u16> {
        self.unknown_required
    }

    /// Whether there was a FINGERPRINT; it matched, or the message would not have been read.
    pub fn has_fingerprint(&self) -> bool {
        self.has_fingerprint
    }

    /// Whether the holder of this key made the message, in constant time. Without MESSAGE-INTEGRITY-SHA256: no.
    pub fn is_signed_by(&self, key: &IntegrityKey) -> bool {
        let Some(at) = self.integrity_at else { return false };
        let value = at + ATTRIBUTE_HEADER_BYTES;
        let (signed, tag) = (&self.bytes[..at], &self.bytes[value..value + INTEGRITY_BYTES]);
        integrity(key, signed).verify_slice(tag).is_ok()
    }

    fn parse_header(bytes: &'a [u8]) -> Result<Self, StunFault> {
        if !(HEADER_BYTES..=MAX_BYTES).contains(&bytes.len()) {
            return Err(StunFault::Size(bytes.len()));
        }
        let kind = read_u16(bytes, 0);
        let cookie = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if kind & 0xC000 != 0 || cookie != MAGIC_COOKIE {
            return Err(StunFault::NotStun);
        }
        let length = usize::from(read_u16(bytes, 2));
        if length % 4 != 0 || length != bytes.len() - HEADER_BYTES {
            return Err(StunFault::Length);
        }
        let mut transaction = [0; 12];
        transaction.copy_from_slice(&bytes[8..HEADER_BYTES]);
        let (class, method) = split_kind(kind);
        Ok(Self {
            bytes,
            class,
            method,
            transaction: TransactionId(transaction),
            username: None,
            mapped: None,
            check_number: None,
            change_request: None,
            integrity_at: None,
            unknown_required: None,
            has_fingerprint: false,
        })
    }

    /// Reads the attribute at `at`; says where the next one begins.
    fn parse_attribute(&mut self, at: usize) -> Result<usize, StunFault> {
        // The header's length is a multiple of 4, and so is every step: 4 bytes are there.
        let kind = read_u16(self.bytes, at);
        let misfit = StunFault::Attribute(kind);
        let length = usize::from(read_u16(self.bytes, at + 2));
        let begin = at + ATTRIBUTE_HEADER_BYTES;
        let next = begin + length.next_multiple_of(4);
        if next > self.bytes.len() || self.has_fingerprint {
            return Err(misfit);
        }
        // Behind the integrity only FINGERPRINT counts (RFC 8489 §14.6): anybody could have added the rest.
        if self.integrity_at.is_none() || kind == attribute::FINGERPRINT {
            self.take_attribute(kind, at, &self.bytes[begin..begin + length]).ok_or(misfit)??;
        }
        Ok(next)
    }

    /// Keeps what an attribute says, the first of each type; `None` if its size is not one that the type allows.
    fn take_attribute(&mut self, kind: u16, at: usize, value: &'a [u8]) -> Option<Result<(), StunFault>> {
        match kind {
            attribute::USERNAME => {
                (value.len() <= MAX_USERNAME_BYTES).then_some(())?;
                self.username.get_or_insert(value);
            }
            attribute::XOR_MAPPED_ADDRESS => {
                let address = read_xor_address(value, &self.transaction)?;
                self.mapped.get_or_insert(address);
            }
            attribute::CHECK_NUMBER => {
                let number = u64::from_be_bytes(value.try_into().ok()?);
                self.check_number.get_or_insert(number);
            }
            attribute::CHANGE_REQUEST => {
                let bits = u32::from_be_bytes(value.try_into().ok()?);
                let wanted = ChangeRequest { ip: bits & CHANGE_IP != 0, port: bits & CHANGE_PORT != 0 };
                self.change_request.get_or_insert(wanted);
                self.unknown_required.get_or_insert(kind);
            }
            attribute::MESSAGE_INTEGRITY_SHA256 => {
                (value.len() == INTEGRITY_BYTES).then_some(())?;
                self.integrity_at = Some(at);
            }
            attribute::FINGERPRINT => {
                let stated = u32::from_be_bytes(value.try_into().ok()?);
                if stated != fingerprint(&self.bytes[..at]) {
                    return Some(Err(StunFault::Fingerprint));
                }
                self.has_fingerprint = true;
            }
            attribute::MAPPED_ADDRESS
            | attribute::MESSAGE_INTEGRITY
            | attribute::ERROR_CODE
            | attribute::UNKNOWN_ATTRIBUTES => {}
            unknown if unknown < attribute::FIRST_OPTIONAL => {
                self.unknown_required.get_or_insert(unknown);
            }
            _optional => {}
        }
        Some(Ok(()))
    }
}

/// A binding message being written. Attributes stand in the order of the calls; [`Draft::sign`] comes last, then one of
/// the two `finish` calls.
#[derive(Debug)]
pub struct Draft {
    bytes: Vec<u8>,
    transaction: TransactionId,
}

impl Draft {
    /// A binding message without attributes.
    pub fn new(class: Class, transaction: TransactionId) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&join_kind(class, BINDING).to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&MAGIC_COOKIE.to_be_bytes());
        bytes.extend_from_slice(&transaction.0);
        Self { bytes, transaction }
    }

    /// Adds USERNAME.
    ///
    /// # Panics
    /// If it is longer than [`MAX_USERNAME_BYTES`]: a name is made by us, never taken from input.
    #[must_use]
    pub fn username(mut self, name: &[u8]) -> Self {
        assert!(name.len() <= MAX_USERNAME_BYTES, "a user name of {} bytes", name.len());
        self.add(attribute::USERNAME, name);
        self
    }

    /// Adds XOR-MAPPED-ADDRESS.
    #[must_use]
    pub fn mapped_address(mut self, address: SocketAddr) -> Self {
        let mask = address_mask(&self.transaction);
        let mut value = vec![0, if address.is_ipv4() { 1 } else { 2 }];
        value.extend_from_slice(&(address.port() ^ cookie_port()).to_be_bytes());
        match address.ip() {
            IpAddr::V4(ip) => value.extend(ip.octets().iter().zip(mask).map(|(byte, mask)| byte ^ mask)),
            IpAddr::V6(ip) => value.extend(ip.octets().iter().zip(mask).map(|(byte, mask)| byte ^ mask)),
        }
        self.add(attribute::XOR_MAPPED_ADDRESS, &value);
        self
    }

    /// Adds as many bytes as an answer's XOR-MAPPED-ADDRESS may take: responders that would answer with more bytes than
    /// came do not answer.
    #[must_use]
    pub fn padding(mut self) -> Self {
        self.add(attribute::PADDING, &[0; MAPPED_ADDRESS_BYTES]);
        self
    }

    /// Adds CHANGE-REQUEST: the answer is wanted from another port of the same address.
    #[must_use]
    pub fn change_port(mut self) -> Self {
        self.add(attribute::CHANGE_REQUEST, &CHANGE_PORT.to_be_bytes());
        self
    }

    /// Adds the number of a check.
    #[must_use]
    pub fn check_number(mut self, number: u64) -> Self {
        self.add(attribute::CHECK_NUMBER, &number.to_be_bytes());
        self
    }

    /// Adds MESSAGE-INTEGRITY-SHA256 over everything so far.
    #[must_use]
    pub fn sign(mut self, key: &IntegrityKey) -> Self {
        let tag = integrity(key, &self.bytes).finalize().into_bytes();
        self.add(attribute::MESSAGE_INTEGRITY_SHA256, &tag);
        self
    }

    /// The datagram, closed with FINGERPRINT.
    pub fn finish(mut self) -> Vec<u8> {
        let sum = fingerprint(&self.bytes);
        self.add(attribute::FINGERPRINT, &sum.to_be_bytes());
        self.bytes
    }

    /// The datagram, without FINGERPRINT.
    pub fn finish_bare(self) -> Vec<u8> {
        self.bytes
    }

    fn add(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len()).expect("attributes are far below 64 KiB");
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let total = length_field(self.bytes.len());
        self.bytes[2..4].copy_from_slice(&total);
    }
}

/// HMAC over a message up to its integrity attribute, with the header's length as if it ended behind that attribute
/// (RFC 8489 §14.6).
fn integrity(key: &IntegrityKey, signed: &[u8]) -> Hmac<Sha256> {
    let mut mac = key.0.clone();
    mac.update(&signed[..2]);
    mac.update(&length_field(signed.len() + ATTRIBUTE_HEADER_BYTES + INTEGRITY_BYTES));
    mac.update(&signed[4..]);
    mac
}

/// FINGERPRINT of a message up to that attribute, with the header's length as if it ended behind it (RFC 8489 §14.7).
fn fingerprint(covered: &[u8]) -> u32 {
    let length = length_field(covered.len() + ATTRIBUTE_HEADER_BYTES + FINGERPRINT_BYTES);
    let state = [&covered[..2], &length, &covered[4..]].into_iter().fold(u32::MAX, crc32);
    !state ^ FINGERPRINT_XOR
}

fn length_field(total: usize) -> [u8; 2] {
    u16::try_from(total - HEADER_BYTES).expect("messages are far below 64 KiB").to_be_bytes()
}

/// One step of CRC-32 (ITU-T V.42, reflected).
fn crc32(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |state, byte| (state >> 8) ^ CRC_TABLE[usize::from(state as u8 ^ byte)])
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut entry = index as u32;
        let mut bit = 0;
        while bit < 8 {
            entry = if entry & 1 == 1 { (entry >> 1) ^ 0xEDB8_8320 } else { entry >> 1 };
            bit += 1;
        }
        table[index] = entry;
        index += 1;
    }
    table
};

/// What an address is hidden with, from meddling NATs: the cookie, then the transaction (RFC 8489 §14.2).
fn address_mask(transaction: &TransactionId) -> [u8; 16] {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
    mask[4..].copy_from_slice(&transaction.0);
    mask
}

fn cookie_port() -> u16 {
    (MAGIC_COOKIE >> 16) as u16
}

fn read_xor_address(value: &[u8], transaction: &TransactionId) -> Option<SocketAddr> {
    let [_, family, port_high, port_low, address @ ..] = value else { return None };
    let port = u16::from_be_bytes([*port_high, *port_low]) ^ cookie_port();
    let mask = address_mask(transaction);
    let ip = match family {
        1 => {
            let bytes: [u8; 4] = address.try_into().ok()?;
            IpAddr::V4(Ipv4Addr::from(std::array::from_fn(|at| bytes[at] ^ mask[at])))
        }
        2 => {
            let bytes: [u8; 16] = address.try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(std::array::from_fn(|at| bytes[at] ^ mask[at])))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// The class's two bits stand between the method's twelve (RFC 8489 §5, figure 3).
fn split_kind(kind: u16) -> (Class, u16) {
    let class = match (kind & 0x0100 != 0, kind & 0x0010 != 0) {
        (false, false) => Class::Request,
        (false, true) => Class::Indication,
        (true, false) => Class::Success,
        (true, true) => Class::Error,
    };
    let method = (kind & 0x000F) | ((kind & 0x00E0) >> 1) | ((kind & 0x3E00) >> 2);
    (class, method)
}

fn join_kind(class: Class, method: u16) -> u16 {
    let class = match class {
        Class::Request => 0x0000,
        Class::Indication => 0x0010,
        Class::Success => 0x0100,
        Class::Error => 0x0110,
    };
    (method & 0x000F) | ((method & 0x0070) << 1) | ((method & 0x0F80) << 2) | class
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
