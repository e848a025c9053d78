//! Datagram frames past the WebSocket library, in both directions.
//!
//! The relay's wire is WebSocket (RFC 6455), spoken by a library that checks, joins and answers. Bulk data needs nothing of
//! that: it is whole, unfragmented binary frames, and each pass over them that a general reader takes (clearing its
//! buffer, copying in, copying out, masking apart) costs as much as encrypting them does. So those frames are put and taken
//! here, byte by byte as the standard has them, and everything else goes through the library.
//!
//! In: what was read from the connection, for [`Separator`]; frames to be written, for [`Outbox`]. Out: Datagram frames,
//! and the stream of bytes as it is without them; slices to be written.
//! Never takes what the library would have to judge: fragments, control frames, frames that are longer than
//! [`MAX_FRAME_BYTES`], of the wrong masking, or not told in the shortest way. The library sees all of these.
//! Bounds: one frame being taken, of at most [`MAX_FRAME_BYTES`]; an outbox is as full as its owner lets it be.

use bytes::{BufMut, BytesMut};

use super::{FrameKind, relay::DATAGRAM_HEADER_BYTES};
use crate::limits::MAX_FRAME_BYTES;

mod outbox;
mod separator;

pub use outbox::Outbox;
pub use separator::{Separator, Taken};

/// Longest header of a frame: two bytes, eight of length, four of masking key (RFC 6455 §5.2).
pub const MAX_HEADER_BYTES: usize = 14;

/// First byte of a whole binary frame: the bit for the last fragment, and the opcode (RFC 6455 §5.2).
const FINAL_BINARY: u8 = 0x82;

/// Set in the second byte of a frame that is masked.
const MASKED: u8 = 0x80;

/// Bytes that are copied and masked in one go: they stay in the processor's nearest cache between the two.
const PIECE_BYTES: usize = 4096;

/// Which end of the connection reads: what it is sent is masked if it is the server (RFC 6455 §5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// A peer.
    Client,
    /// The relay.
    Server,
}

/// What a client's frame is masked with: four bytes that nobody can foretell (RFC 6455 §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskingKey(pub [u8; 4]);

impl MaskingKey {
    /// Masks bytes, or unmasks them, which is the same; `at` is where in the frame's payload they begin.
    pub fn apply(self, bytes: &mut [u8], at: usize) {
        let mut key = self.0;
        key.rotate_left(at % 4);
        let wide = u64::from_ne_bytes([key[0], key[1], key[2], key[3], key[0], key[1], key[2], key[3]]);
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
        }
        for (byte, key) in rest.iter_mut().zip(key.into_iter().cycle()) {
            *byte ^= key;
        }
    }
}

/// Writes the header of a whole binary frame of this payload, as short as it may be.
pub fn put_header(frame: &mut impl BufMut, len: usize, key: Option<MaskingKey>) {
    let masked = if key.is_some() { MASKED } else { 0 };
    frame.put_u8(FINAL_BINARY);
    match (u8::try_from(len), u16::try_from(len)) {
        (Ok(len), _) if len < 126 => frame.put_u8(masked | len),
        (_, Ok(len)) => {
            frame.put_u8(masked | 126);
            frame.put_u16(len);
        }
        _ => {
            frame.put_u8(masked | 127);
            frame.put_u64(len as u64);
        }
    }
    if let Some(key) = key {
        frame.put_slice(&key.0);
    }
}

/// A client's frame, ready for the wire, whose payload is these parts one behind the other.
pub(super) fn masked(parts: [&[u8]; 2], key: MaskingKey) -> BytesMut {
    let len = parts.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(MAX_HEADER_BYTES + len);
    put_header(&mut frame, len, Some(key));
    let payload = frame.len();
    for piece in parts.into_iter().flat_map(|part| part.chunks(PIECE_BYTES)) {
        let from = frame.len();
        frame.put_slice(piece);
        key.apply(&mut frame[from..], from - payload);
    }
    frame
}

/// What a frame's first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    /// How many bytes it takes to say more, from the frame's start.
    Needs(usize),
    /// It is the library's: length of header and payload.
    Library { header: usize, payload: u64 },
    /// It is a Datagram frame: length of header and payload, and what masks it.
    Datagram { header: usize, payload: usize, key: Option<MaskingKey> },
}

/// Reads a frame's first bytes, as the reader of that side.
fn read_head(bytes: &[u8], side: Side) -> Head {
    let [first, second, rest @ ..] = bytes else { return Head::Needs(2) };
    let (is_masked, short) = (second & MASKED != 0, second & !MASKED);
    let extended = match short {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let header = 2 + extended + if is_masked { 4 } else { 0 };
    if bytes.len() < header {
        return Head::Needs(header);
    }
    let (told, rest) = rest.split_at(extended);
    let len = if extended == 0 { short.into() } else { told.iter().fold(0, |len, byte| len << 8 | u64::from(*byte)) };
    let key = rest.first_chunk().filter(|_| is_masked).copied().map(MaskingKey);
    let is_shortest = match extended {
        0 => true,
        2 => len > 125,
        _ => len > u16::MAX.into(),
    };
    let library = Head::Library { header, payload: len };
    let is_plain = *first == FINAL_BINARY && is_shortest && is_masked == (side == Side::Server);
    let bounds = DATAGRAM_HEADER_BYTES..=MAX_FRAME_BYTES;
    let Some(payload) = usize::try_from(len).ok().filter(|len| is_plain && bounds.contains(len)) else {
        return library;
    };
    let Some(mut kind) = bytes.get(header).copied() else { return Head::Needs(header + 1) };
    kind ^= key.map_or(0, |key| key.0[0]);
    if kind == FrameKind::Datagram as u8 { Head::Datagram { header, payload, key } } else { library }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_the_shortest_of_its_length() {
        for (len, header) in [
            (0, &[0x82, 0][..]),
            (125, &[0x82, 125]),
            (126, &[0x82, 126, 0, 126]),
            (65_535, &[0x82, 126, 0xff, 0xff]),
            (65_536, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let mut written = Vec::new();
            put_header(&mut written, len, None);
            assert_eq!(written, header);
        }
    }

    /// RFC 6455 §5.7: a masked text message `Hello`, here as the binary one that differs in its first byte.
    #[test]
    fn a_masked_frame_is_the_one_of_the_standard() {
        let frame = masked([b"Hel", b"lo"], MaskingKey([0x37, 0xfa, 0x21, 0x3d]));
        assert_eq!(frame[..], [0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58]);
    }

    #[test]
    fn masking_in_pieces_is_masking_in_one() {
        let key = MaskingKey([1, 2, 3, 4]);
        let mut whole: Vec<u8> = (0..100).collect();
        let mut pieces = whole.clone();
        key.apply(&mut whole, 0);
        for (from, to) in [(0, 3), (3, 20), (20, 29), (29, 100)] {
            key.apply(&mut pieces[from..to], from);
        }
        assert_eq!(pieces, whole);
        key.apply(&mut whole, 0);
        assert!(whole.into_iter().eq(0..100));
    }
}
