//! Datagram frames are taken out of a WebSocket's bytes, and nothing else is touched.

use bytes::Bytes;
use peerfleet_proto::{
    id::Slot,
    limits::MAX_FRAME_BYTES,
    wire::{
        relay::{DATAGRAM_HEADER_BYTES, PeerFrame, RelayFrame, datagram, masked_datagram, message},
        websocket::{MAX_HEADER_BYTES, MaskingKey, Separator, Side, Taken, put_header},
    },
};
use proptest::prelude::*;

/// A frame as RFC 6455 §5.2 has it, whatever its bits say.
fn frame(first: u8, payload: &[u8], key: Option<MaskingKey>) -> Vec<u8> {
    let mut frame = Vec::new();
    put_header(&mut frame, payload.len(), key);
    frame[0] = first;
    let at = frame.len();
    frame.extend_from_slice(payload);
    if let Some(key) = key {
        key.apply(&mut frame[at..], 0);
    }
    frame
}

fn separator(side: Side) -> Separator {
    let mut separator = Separator::new(side);
    separator.take_datagrams();
    separator
}

/// Feeds a stream in pieces of these lengths, in turn.
fn feed(separator: &mut Separator, mut stream: &[u8], pieces: &[usize]) -> (Vec<u8>, Vec<Taken>) {
    let (mut library, mut taken) = (Vec::new(), Vec::new());
    for &piece in pieces.iter().cycle() {
        if stream.is_empty() {
            break;
        }
        let (now, later) = stream.split_at(piece.clamp(1, stream.len()));
        separator.feed(now, &mut library, &mut taken);
        stream = later;
    }
    (library, taken)
}

fn payloads(taken: Vec<Taken>) -> Vec<Bytes> {
    taken.into_iter().map(Taken::into_payload).collect()
}

const KEY: MaskingKey = MaskingKey([0xa1, 0x02, 0xf3, 0x44]);

/// What a stream is made of in the properties: the frame, and whether it is to be taken.
fn piece(side: Side) -> impl Strategy<Value = (Vec<u8>, Option<Bytes>)> {
    let key = (side == Side::Server).then_some(KEY);
    let packets = prop_oneof![0..40_usize, 100..140_usize, 65_400..65_600_usize];
    prop_oneof![
        packets.prop_map(move |len| {
            let payload = datagram(Slot(7), 1, 1200, &vec![0x5a; len]);
            (frame(0x82, &payload, key), Some(payload))
        }),
        (0..300_usize).prop_map(move |len| (frame(0x82, &message(Slot(3), 4, &vec![3; len]), key), None)),
        (0..125_usize, 9..11_u8).prop_map(move |(len, opcode)| (frame(0x80 | opcode, &vec![3; len], key), None)),
    ]
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Client), Just(Side::Server)]
}

proptest! {
    #[test]
    fn every_datagram_is_taken_and_every_other_byte_is_left_however_they_arrive(
        (side, parts) in side().prop_flat_map(|side| (Just(side), prop::collection::vec(piece(side), 0..12))),
        cuts in prop::collection::vec(1..5000_usize, 1..6),
    ) {
        let stream: Vec<u8> = parts.iter().flat_map(|(frame, _)| frame.clone()).collect();
        let (library, taken) = feed(&mut separator(side), &stream, &cuts);
        let left: Vec<u8> = parts.iter().filter(|(_, taken)| taken.is_none()).flat_map(|(frame, _)| frame.clone()).collect();
        prop_assert!(library == left);
        prop_assert_eq!(payloads(taken), parts.into_iter().filter_map(|(_, taken)| taken).collect::<Vec<_>>());
    }

    #[test]
    fn no_bytes_make_it_panic_or_hold_more_than_one_frame(
        side in side(),
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0x82), Just(0x7e), Just(0xfe), Just(3)], 0..400),
        cuts in prop::collection::vec(1..50_usize, 1..6),
    ) {
        let mut separator = separator(side);
        let (library, taken) = feed(&mut separator, &bytes, &cuts);
        let held: usize = taken.into_iter().map(|taken| taken.into_payload().len()).sum();
        prop_assert!(library.len() + held <= bytes.len());
        prop_assert!(separator.rest().is_none_or(|rest| rest.get_ref().capacity() <= MAX_FRAME_BYTES + MAX_HEADER_BYTES));
    }
}

#[test]
fn the_rest_of_a_frame_is_read_to_where_it_is_kept() {
    let packets = vec![9; 60_000];
    let wire = masked_datagram(Slot(1), 0, 1200, &packets, KEY);
    let mut separator = separator(Side::Server);
    let (library, taken) = feed(&mut separator, &wire[..100], &[100]);
    assert!(library.is_empty() && taken.is_empty());
    let (middle, last) = wire[100..].split_at(20_000);
    for (part, is_last) in [(middle, false), (last, true)] {
        bytes::BufMut::put_slice(separator.rest().expect("it is in the middle of a frame"), part);
        let whole = separator.settle();
        assert_eq!(whole.is_some(), is_last);
        if let Some(whole) = whole {
            assert_eq!(whole.into_payload(), datagram(Slot(1), 0, 1200, &packets));
        }
    }
    assert!(separator.rest().is_none());
}

#[test]
fn a_readdressed_frame_differs_in_its_slot_only() {
    for len in [0, 100, 117, 118, 200, 60_000, 65_600] {
        let packets = vec![7; len];
        let wire = masked_datagram(Slot(1), 1, 1200, &packets, KEY);
        let (_, taken) = feed(&mut separator(Side::Server), &wire, &[wire.len()]);
        let [taken] = <[Taken; 1]>::try_from(taken).expect("one frame is taken");
        assert!(matches!(PeerFrame::split(taken.payload()), Ok(PeerFrame::Datagram { to: Slot(1) })));
        let readdressed = taken.readdressed(Slot(0x0102_0304));
        assert_eq!(readdressed[..], frame(0x82, &datagram(Slot(0x0102_0304), 1, 1200, &packets), None));
        let (_, taken) = feed(&mut separator(Side::Client), &readdressed, &[1000]);
        let read = RelayFrame::read(&payloads(taken)[0]);
        assert!(matches!(read, Ok(RelayFrame::Datagram(arrived)) if arrived.packets == packets));
    }
}

#[test]
fn what_the_library_has_to_judge_is_left_to_it() {
    let payload = datagram(Slot(7), 1, 1200, &[5; 200]);
    let longest = datagram(Slot(7), 1, 1200, &vec![5; MAX_FRAME_BYTES]);
    let mut not_shortest = vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0, 208, 0, 0, 0, 0];
    not_shortest.extend_from_slice(&payload);
    for (what, stream) in [
        ("not masked", frame(0x82, &payload, None)),
        ("a first fragment", frame(0x02, &payload, Some(KEY))),
        ("a text", frame(0x81, &payload, Some(KEY))),
        ("with a reserved bit", frame(0xc2, &payload, Some(KEY))),
        ("too long", frame(0x82, &longest, Some(KEY))),
        ("too short to be one", frame(0x82, &payload[..DATAGRAM_HEADER_BYTES - 1], Some(KEY))),
        ("told in too many bytes", not_shortest),
        ("behind a close", [frame(0x88, &[], Some(KEY)), frame(0x82, &payload, Some(KEY))].concat()),
        ("within a message in fragments", [frame(0x02, b"a", Some(KEY)), frame(0x82, &payload, Some(KEY))].concat()),
    ] {
        let (library, taken) = feed(&mut separator(Side::Server), &stream, &[7]);
        assert!(library == stream && taken.is_empty(), "{what}");
    }
    let masked = frame(0x82, &payload, Some(KEY));
    let (library, taken) = feed(&mut separator(Side::Client), &masked, &[7]);
    assert!(library == masked && taken.is_empty(), "a masked frame from a server");
}

#[test]
fn datagrams_are_taken_again_after_the_last_fragment() {
    let payload = datagram(Slot(7), 1, 1200, &[5; 200]);
    let fragments =
        [frame(0x02, b"a", Some(KEY)), frame(0x89, b"ping", Some(KEY)), frame(0x80, b"b", Some(KEY))].concat();
    let stream = [fragments.clone(), frame(0x82, &payload, Some(KEY))].concat();
    let (library, taken) = feed(&mut separator(Side::Server), &stream, &[11]);
    assert!(library == fragments);
    assert_eq!(payloads(taken), [payload]);
}

#[test]
fn nothing_is_taken_before_it_is_wanted() {
    let payload = datagram(Slot(7), 1, 1200, &[5; 200]);
    let stream = frame(0x82, &payload, Some(KEY));
    let mut separator = Separator::new(Side::Server);
    let (library, taken) = feed(&mut separator, &stream, &[11]);
    assert!(library == stream && taken.is_empty());
    separator.take_datagrams();
    let (library, taken) = feed(&mut separator, &stream, &[11]);
    assert!(library.is_empty());
    assert_eq!(payloads(taken), [payload]);
}
