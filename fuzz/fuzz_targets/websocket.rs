//! What is read from a WebSocket, in any pieces: no input panics, every byte is taken or left, and the pieces do not matter.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peerfleet_proto::wire::websocket::{Separator, Side, Taken};

/// Feeds it in pieces, of which those with an odd length are read right into the frame where there is one.
fn feed(separator: &mut Separator, mut bytes: &[u8], piece: usize) -> (Vec<u8>, Vec<Taken>) {
    let (mut library, mut taken) = (Vec::new(), Vec::new());
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(piece.clamp(1, bytes.len()));
        match separator.rest().filter(|_| piece % 2 == 1) {
            Some(rest) => {
                let count = bytes::BufMut::remaining_mut(rest).min(now.len());
                bytes::BufMut::put_slice(rest, &now[..count]);
                taken.extend(separator.settle());
                bytes = &bytes[count..];
            }
            None => {
                separator.feed(now, &mut library, &mut taken);
                bytes = later;
            }
        }
    }
    (library, taken)
}

fuzz_target!(|data: (bool, u8, &[u8])| {
    let (is_server, piece, bytes) = data;
    let read = |piece: usize| {
        let mut separator = Separator::new(if is_server { Side::Server } else { Side::Client });
        separator.take_datagrams();
        let (library, taken) = feed(&mut separator, bytes, piece);
        (library, taken.into_iter().map(Taken::into_payload).collect::<Vec<_>>())
    };
    let whole = read(bytes.len().max(1));
    assert!(whole.0.len() + whole.1.iter().map(|frame| frame.len()).sum::<usize>() <= bytes.len());
    assert_eq!(read(piece.into()), whole);
});
