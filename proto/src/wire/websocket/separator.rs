//! Takes Datagram frames out of what is read from a WebSocket, and leaves everything else as it is.

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::Limit};

use super::{Head, MAX_HEADER_BYTES, MaskingKey, Side, put_header, read_head};
use crate::{id::Slot, wire::relay::SLOT_OFFSET};

/// Longest header of a frame that the server sends: it masks nothing.
const MAX_SERVER_HEADER_BYTES: usize = MAX_HEADER_BYTES - 4;

/// In a frame's first byte: whether it is the last of its message, and its opcode (RFC 6455 §5.2).
const FINAL: u8 = 0x80;
const OPCODE: u8 = 0x0f;
/// Opcode of the last frame: what comes behind it is the library's to judge (RFC 6455 §5.5.1).
const CLOSE: u8 = 8;
/// Highest opcode of a frame with data; 0 continues a message, 1 is text, 2 binary.
const LAST_DATA: u8 = 2;

/// Reads one direction of a connection. Calls: as long as [`Self::rest`] is some, read into it and call
/// [`Self::settle`]; else read anywhere and [`Self::feed`] it.
#[derive(Debug)]
pub struct Separator {
    side: Side,
    takes: bool,
    /// A message whose last fragment has not come: nothing but control frames may come between its frames.
    is_fragmented: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before or within a frame's first bytes, which are kept until they say whose it is.
    Head { kept: [u8; MAX_HEADER_BYTES + 1], len: usize, need: usize },
    /// Within a frame of the library's: bytes that are left of it.
    Library(u64),
    /// Within a frame that is being taken.
    Taking { frame: Limit<BytesMut>, key: Option<MaskingKey> },
}

/// A Datagram frame that was taken, unmasked.
#[derive(Debug)]
pub struct Taken {
    /// Room for a header of the server's, as long as it can be, then the payload.
    frame: BytesMut,
}

/// A frame's first two bytes say how many there are before its payload.
const AT_START: State = State::Head { kept: [0; MAX_HEADER_BYTES + 1], len: 0, need: 2 };

impl Separator {
    /// A reader at the beginning of a connection, which takes nothing yet.
    pub fn new(side: Side) -> Self {
        Self { side, takes: false, is_fragmented: false, state: AT_START }
    }

    /// From the next frame on, Datagram frames are taken.
    pub fn take_datagrams(&mut self) {
        self.takes = true;
    }

    /// Where the rest of the frame that is being taken is to be read, so that it is not copied; no more fits than
    /// belongs to it.
    pub fn rest(&mut self) -> Option<&mut Limit<BytesMut>> {
        match &mut self.state {
            State::Taking { frame, .. } => Some(frame),
            State::Head { .. } | State::Library(_) => None,
        }
    }

    /// Something was read into [`Self::rest`]: gives the frame if it is whole now.
    pub fn settle(&mut self) -> Option<Taken> {
        let State::Taking { frame, .. } = &self.state else { return None };
        if frame.has_remaining_mut() {
            return None;
        }
        let State::Taking { frame, key } = std::mem::replace(&mut self.state, AT_START) else { return None };
        let mut frame = frame.into_inner();
        if let Some(key) = key {
            key.apply(&mut frame[MAX_SERVER_HEADER_BYTES..], 0);
        }
        Some(Taken { frame })
    }

    /// Sorts bytes that were read: what is the library's goes to `library`, in order, and a frame that was completed to
    /// `taken`.
    pub fn feed(&mut self, mut bytes: &[u8], library: &mut Vec<u8>, taken: &mut impl Extend<Taken>) {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Head { kept, len, need } => {
                    let count = (*need - *len).min(bytes.len());
                    kept[*len..][..count].copy_from_slice(&bytes[..count]);
                    bytes.advance(count);
                    *len += count;
                    if len == need {
                        let (kept, len) = (*kept, *len);
                        self.judge(&kept[..len], library);
                    }
                }
                State::Library(left) => {
                    let count = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    library.extend_from_slice(&bytes[..count]);
                    bytes.advance(count);
                    *left -= count as u64;
                    if *left == 0 {
                        self.state = AT_START;
                    }
                }
                State::Taking { frame, .. } => {
                    let count = frame.remaining_mut().min(bytes.len());
                    frame.put_slice(&bytes[..count]);
                    bytes.advance(count);
                    taken.extend(self.settle());
                }
            }
        }
    }

    /// Decides whose frame it is, or how many bytes more that takes.
    fn judge(&mut self, head: &[u8], library: &mut Vec<u8>) {
        self.state = match read_head(head, self.side) {
            Head::Needs(more) => {
                let mut kept = [0; MAX_HEADER_BYTES + 1];
                kept[..head.len()].copy_from_slice(head);
                State::Head { kept, len: head.len(), need: more }
            }
            Head::Datagram { header, payload, key } if self.takes && !self.is_fragmented => {
                let mut frame = BytesMut::with_capacity(MAX_SERVER_HEADER_BYTES + payload);
                frame.put_bytes(0, MAX_SERVER_HEADER_BYTES);
                let mut frame = frame.limit(payload);
                frame.put_slice(&head[header..]);
                State::Taking { frame, key }
            }
            Head::Datagram { header, payload, .. } => self.pass(head, header, payload as u64, library),
            Head::Library { header, payload } => self.pass(head, header, payload, library),
        };
    }

    fn pass(&mut self, head: &[u8], header: usize, payload: u64, library: &mut Vec<u8>) -> State {
        match head[0] & OPCODE {
            ..=LAST_DATA => self.is_fragmented = head[0] & FINAL == 0,
            CLOSE => self.takes = false,
            _ => {}
        }
        library.extend_from_slice(head);
        match payload - (head.len() - header) as u64 {
            0 => AT_START,
            left => State::Library(left),
        }
    }
}

impl Taken {
    /// The frame's payload: what [`super::super::relay`] describes.
    pub fn payload(&self) -> &[u8] {
        &self.frame[MAX_SERVER_HEADER_BYTES..]
    }

    /// The same, to be kept.
    pub fn into_payload(mut self) -> Bytes {
        self.frame.advance(MAX_SERVER_HEADER_BYTES);
        self.frame.freeze()
    }

    /// The same frame as it goes to its receiver, ready for the wire: the source's slot stands for the destination's. It is
    /// written where the header was, and nothing is copied.
    pub fn readdressed(mut self, from: Slot) -> Bytes {
        let slot = MAX_SERVER_HEADER_BYTES + SLOT_OFFSET;
        self.frame[slot..slot + 4].copy_from_slice(&from.0.to_be_bytes());
        let mut header = [0; MAX_SERVER_HEADER_BYTES];
        let mut rest = header.as_mut_slice();
        put_header(&mut rest, self.payload().len(), None);
        let unused = rest.len();
        let len = MAX_SERVER_HEADER_BYTES - unused;
        self.frame[unused..MAX_SERVER_HEADER_BYTES].copy_from_slice(&header[..len]);
        self.frame.advance(unused);
        self.frame.freeze()
    }
}
