//! What holds for all bytes: what is sent can be read, what is cut off cannot, and nothing that comes in panics.

use std::{fmt::Debug, net::SocketAddr, time::Duration};

use bytes::Bytes;
use peerfleet_proto::{
    fault::Malformed,
    id::{InstanceId, JobId, PeerId, RequestId, Slot, Ticket},
    limits::{MAX_FRAME_BYTES, MAX_HEAD_BYTES, MAX_MULTICAST, MAX_MULTICAST_PART_BYTES},
    path::Reach,
    presence::{Epoch, Mode, Presence, PresenceOpener, Service},
    request::{
        Failure, FailureKind, Outcome, Request,
        exec::{
            Attach, Attached, Captured, Command, EndState, ExecSpec, Follow, FromCaller, FromHost, JobEnd, JobReport,
            JobSignal, JobSummary,
        },
        link::{Candidate, CandidateKind, CandidateUpdate, LinkAnswer, LinkOffer, Mapping, Nat, Ports, Route},
        network::{
            CheckOutcome, CheckReport, Choice, Filtering, MappingProtocol, NetworkReport, PathReport, PortMapping,
            ResponderReport, SearchReport, TakenPath,
        },
        transfer::{
            FileInfo, OfferSpec, Offered, PathNow, PathWish, Progress, PullSpec, RangeReply, RangeRequest, ReceiveSpec,
        },
    },
    token::{RoomKeys, Token},
    wire::{
        FrameKind, decode, encode,
        message::{Message, Numbering},
        relay::{
            self, Challenge, ClosingReason, DATAGRAM_HEADER_BYTES, Join, MESSAGE_HEADER_BYTES, Member, PeerFrame,
            PeerToRelay, RefusalReason, Refused, RelayFrame, RelayToPeer, SLOT_OFFSET, Welcome,
        },
    },
};
use proptest::{collection::vec, option, prelude::*, sample::Index};
use serde::{Serialize, de::DeserializeOwned};

mod common;
use common::Hashes;

#[test]
fn a_datagram_that_its_receiver_could_not_read_is_the_senders_fault() {
    let frame = relay::datagram(Slot(1), 0, 0, &[1; 8]);
    assert_eq!(PeerFrame::split(&frame), Err(Malformed::InconsistentLength));
    assert_eq!(RelayFrame::read(&frame), Err(Malformed::InconsistentLength));
}

proptest! {
    #[test]
    fn words_to_the_relay_read_back(word in peer_to_relay()) {
        reads_back(&word)?;
    }

    #[test]
    fn words_of_the_relay_read_back(word in relay_to_peer()) {
        reads_back(&word)?;
    }

    #[test]
    fn messages_read_back(message in message()) {
        reads_back(&message)?;
    }

    #[test]
    fn requests_and_outcomes_read_back(request in request(), outcome in outcome()) {
        reads_back(&request)?;
        reads_back(&outcome)?;
    }

    #[test]
    fn frames_of_streams_read_back(
        frames in (from_host(), from_caller(), range_request(), range_reply(), progress()),
    ) {
        let (from_host, from_caller, range_request, range_reply, progress) = frames;
        reads_back(&from_host)?;
        reads_back(&from_caller)?;
        reads_back(&range_request)?;
        reads_back(&range_reply)?;
        reads_back(&progress)?;
    }

    #[test]
    fn presence_reads_back(presence in presence()) {
        reads_back(&presence)?;
    }

    #[test]
    fn a_typed_part_that_is_cut_off_anywhere_is_malformed(
        message in message(),
        to_relay in peer_to_relay(),
        to_peer in relay_to_peer(),
    ) {
        truncations_are_malformed(&message)?;
        truncations_are_malformed(&to_relay)?;
        truncations_are_malformed(&to_peer)?;
    }

    #[test]
    fn bytes_behind_a_typed_part_are_malformed(message in message(), extra in vec(any::<u8>(), 1..8)) {
        let bytes = [encode(&message), extra.clone()].concat();
        prop_assert_eq!(decode::<Message>(&bytes, usize::MAX), Err(Malformed::LeftOver(extra.len())));
    }

    #[test]
    fn a_typed_part_beyond_its_limit_is_malformed(message in message()) {
        let bytes = encode(&message);
        let limit = bytes.len() - 1;
        prop_assert_eq!(decode::<Message>(&bytes, limit), Err(Malformed::TooLong { have: bytes.len(), limit }));
    }

    #[test]
    fn a_message_reaches_its_receiver_as_it_was_sent(to in slot(), from in slot(), tag: u32, sealed in payload()) {
        let frame = relay::message(to, tag, &sealed);
        prop_assert_eq!(PeerFrame::split(&frame), Ok(PeerFrame::Message { to, tag }));
        let arrived = RelayFrame::Message { from, sealed: sealed.into() };
        prop_assert_eq!(RelayFrame::read(&forwarded(&frame, from)), Ok(arrived));
        headers_are_needed(&frame, MESSAGE_HEADER_BYTES)?;
    }

    #[test]
    fn packets_reach_their_receiver_as_they_were_sent(
        (to, from) in (slot(), slot()),
        lane: u8,
        segment in 1_u16..,
        packets in payload(),
    ) {
        let frame = relay::datagram(to, lane, segment, &packets);
        prop_assert_eq!(PeerFrame::split(&frame), Ok(PeerFrame::Datagram { to }));
        let arrived = relay::Datagram { slot: from, lane, segment, packets: packets.into() };
        prop_assert_eq!(RelayFrame::read(&forwarded(&frame, from)), Ok(RelayFrame::Datagram(arrived)));
        headers_are_needed(&frame, DATAGRAM_HEADER_BYTES)?;
    }

    #[test]
    fn each_recipient_of_a_multicast_gets_its_part_and_the_shared_one(
        from in slot(),
        tag: u32,
        parts in parts(),
        shared in payload(),
    ) {
        let frame = multicast(tag, &parts, &shared);
        let split = PeerFrame::split(&frame);
        let Ok(PeerFrame::Multicast(multicast)) = split else { return Err(TestCaseError::fail("not a multicast")) };
        prop_assert_eq!((multicast.tag, multicast.len(), multicast.shared), (tag, parts.len(), &shared[..]));
        prop_assert_eq!(multicast.is_empty(), parts.is_empty());
        prop_assert_eq!(multicast.parts().count(), parts.len());
        for ((slot, part), (to, sent)) in multicast.parts().zip(&parts) {
            prop_assert_eq!((slot, part), (*to, &sent[..]));
            let arrived = RelayFrame::MulticastShare {
                from,
                part: Bytes::copy_from_slice(part),
                shared: Bytes::copy_from_slice(&shared),
            };
            prop_assert_eq!(RelayFrame::read(&multicast.share(from, part)), Ok(arrived));
        }
    }

    #[test]
    fn the_size_of_a_multicast_is_known_beforehand(tag: u32, parts in parts(), shared in payload()) {
        let lengths = parts.iter().map(|(_, part)| part.len());
        prop_assert_eq!(relay::multicast_bytes(lengths, shared.len()), multicast(tag, &parts, &shared).len());
    }

    #[test]
    fn a_multicast_that_is_cut_off_within_its_parts_is_malformed(tag: u32, parts in parts(), shared in payload()) {
        let frame = multicast(tag, &parts, &shared);
        let needed = frame.len() - shared.len();
        for end in 0..needed {
            prop_assert!(PeerFrame::split(&frame[..end]).is_err(), "{} of {}", end, needed);
        }
        prop_assert!(PeerFrame::split(&frame[..needed]).is_ok());
    }

    #[test]
    fn a_share_that_is_cut_off_within_its_part_is_malformed(part in vec(any::<u8>(), 0..64), shared in payload()) {
        let frame = multicast(7, &[(Slot(1), part.clone())], &shared);
        let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(&frame) else { panic!("not a multicast") };
        let share = multicast.share(Slot(1), &part);
        for end in 0..share.len() - shared.len() {
            prop_assert!(RelayFrame::read(&share.slice(..end)).is_err());
        }
    }

    #[test]
    fn a_frame_of_any_bytes_is_read_or_malformed(bytes in vec(any::<u8>(), 0..512)) {
        read_as_everything(&bytes);
    }

    #[test]
    fn a_frame_of_a_known_kind_with_any_bytes_is_read_or_malformed(
        kind in 1_u8..=5,
        bytes in vec(any::<u8>(), 0..512),
    ) {
        read_as_everything(&[&[kind], &bytes[..]].concat());
    }

    #[test]
    fn a_perturbed_frame_is_read_or_malformed(frame in frame(), changes in vec(change(), 1..8)) {
        let mut bytes = frame.to_vec();
        for change in &changes {
            change.apply(&mut bytes);
        }
        read_as_everything(&bytes);
    }

    #[test]
    fn a_perturbed_typed_part_is_read_or_malformed(
        (message, outcome) in (message(), outcome()),
        changes in vec(change(), 1..8),
    ) {
        for mut bytes in [encode(&message), encode(&outcome)] {
            for change in &changes {
                change.apply(&mut bytes);
            }
            read_as_everything(&bytes);
        }
    }

    #[test]
    fn a_sealed_presence_of_any_bytes_is_a_fault(bytes in vec(any::<u8>(), 0..256)) {
        let keys = RoomKeys::derive(&Token::generate(&mut Hashes(1)), "dev");
        let opened = PresenceOpener::new(&keys).open(PeerId::from_bytes([1; 32]), InstanceId::from_bytes([2; 16]), &bytes);
        prop_assert!(opened.is_err());
    }

    #[test]
    fn a_token_of_any_text_is_read_or_refused(text in ".*", tail in "[a-z2-7]{0,64}") {
        for text in [text.clone(), format!("pft1-{tail}"), format!("pft1-{text}")] {
            if let Ok(token) = Token::parse(&text) {
                prop_assert_eq!(Token::parse(&token.reveal()), Ok(token));
            }
        }
    }
}

#[test]
fn a_frame_beyond_the_limit_is_malformed_for_either_side() {
    let frame = relay::message(Slot(1), 1, &vec![0; MAX_FRAME_BYTES]);
    let too_long = Malformed::TooLong { have: MAX_FRAME_BYTES + MESSAGE_HEADER_BYTES, limit: MAX_FRAME_BYTES };
    assert_eq!(PeerFrame::split(&frame), Err(too_long));
    assert_eq!(RelayFrame::read(&frame), Err(too_long));
}

#[test]
fn a_multicast_beyond_its_limits_is_malformed() {
    let to_many = vec![(Slot(1), vec![]); MAX_MULTICAST + 1];
    let too_many = Malformed::TooLong { have: MAX_MULTICAST + 1, limit: MAX_MULTICAST };
    assert_eq!(PeerFrame::split(&multicast(1, &to_many, b"")), Err(too_many));

    let long_part = [(Slot(1), vec![0; MAX_MULTICAST_PART_BYTES + 1])];
    let too_long = Malformed::TooLong { have: MAX_MULTICAST_PART_BYTES + 1, limit: MAX_MULTICAST_PART_BYTES };
    assert_eq!(PeerFrame::split(&multicast(1, &long_part, b"")), Err(too_long));

    let most = vec![(Slot(1), vec![0; 64]); MAX_MULTICAST];
    assert!(PeerFrame::split(&multicast(1, &most, b"")).is_ok());
}

#[test]
fn each_side_refuses_frames_that_only_the_other_sends() {
    let whole = multicast(1, &[(Slot(1), vec![2])], b"shared");
    let Ok(PeerFrame::Multicast(split)) = PeerFrame::split(&whole) else { panic!("not a multicast") };
    let share = split.share(Slot(1), &[2]);
    assert_eq!(PeerFrame::split(&share), Err(Malformed::UnknownFrame(FrameKind::MulticastShare as u8)));
    assert_eq!(RelayFrame::read(&whole), Err(Malformed::UnknownFrame(FrameKind::Multicast as u8)));
}

#[test]
fn packets_of_no_length_are_malformed() {
    assert_eq!(RelayFrame::read(&relay::datagram(Slot(1), 0, 0, b"packets")), Err(Malformed::InconsistentLength));
}

#[test]
fn a_length_far_beyond_the_bytes_there_are_is_malformed() {
    for length in [u64::MAX, 1 << 40, u64::from(u32::MAX), 1 << 16] {
        let bytes = |start: &[u8]| [start, &encode(&length)].concat();
        let presence = decode::<PeerToRelay>(&bytes(&[1]), MAX_FRAME_BYTES);
        let roster = decode::<RelayToPeer>(&bytes(&[2]), MAX_FRAME_BYTES);
        let arguments = decode::<Request>(&bytes(&[3, 0]), MAX_HEAD_BYTES);
        assert_eq!(presence.err(), Some(Malformed::Undecodable));
        assert_eq!(roster.err(), Some(Malformed::Undecodable));
        assert_eq!(arguments.err(), Some(Malformed::Undecodable));
    }
}

fn reads_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) -> Result<(), TestCaseError> {
    let bytes = encode(value);
    let read = decode::<T>(&bytes, bytes.len());
    prop_assert_eq!(read.as_ref(), Ok(value));
    Ok(())
}

fn truncations_are_malformed<T: Serialize + DeserializeOwned + PartialEq + Debug>(
    value: &T,
) -> Result<(), TestCaseError> {
    let bytes = encode(value);
    for end in 0..bytes.len() {
        prop_assert_eq!(decode::<T>(&bytes[..end], bytes.len()), Err(Malformed::Undecodable), "cut at {}", end);
    }
    Ok(())
}

fn headers_are_needed(frame: &Bytes, header: usize) -> Result<(), TestCaseError> {
    for end in 0..header {
        prop_assert!(PeerFrame::split(&frame[..end]).is_err());
        prop_assert!(RelayFrame::read(&frame.slice(..end)).is_err());
    }
    prop_assert!(PeerFrame::split(&frame[..header]).is_ok());
    Ok(())
}

/// What the relay does to a frame that it hands on: only the slot changes.
fn forwarded(frame: &Bytes, from: Slot) -> Bytes {
    let mut bytes = frame.to_vec();
    bytes[SLOT_OFFSET..SLOT_OFFSET + 4].copy_from_slice(&from.0.to_be_bytes());
    bytes.into()
}

/// Reads bytes as each thing that they could be taken for, and as what those contain.
fn read_as_everything(bytes: &[u8]) {
    match PeerFrame::split(bytes) {
        Ok(PeerFrame::Control(word)) => _ = decode::<PeerToRelay>(word, MAX_FRAME_BYTES),
        Ok(PeerFrame::Multicast(multicast)) => {
            assert_eq!(multicast.parts().count(), multicast.len());
            for (slot, part) in multicast.parts() {
                assert!(RelayFrame::read(&multicast.share(slot, part)).is_ok());
            }
        }
        Ok(PeerFrame::Message { .. } | PeerFrame::Datagram { .. }) | Err(_) => {}
    }
    _ = RelayFrame::read(&Bytes::copy_from_slice(bytes));
    _ = decode::<PeerToRelay>(bytes, MAX_FRAME_BYTES);
    _ = decode::<RelayToPeer>(bytes, MAX_FRAME_BYTES);
    _ = decode::<Message>(bytes, MAX_FRAME_BYTES);
    _ = decode::<Request>(bytes, MAX_HEAD_BYTES);
    _ = decode::<Outcome>(bytes, MAX_HEAD_BYTES);
    _ = decode::<FromHost>(bytes, MAX_HEAD_BYTES);
    _ = decode::<FromCaller>(bytes, MAX_HEAD_BYTES);
    _ = decode::<RangeRequest>(bytes, MAX_HEAD_BYTES);
    _ = decode::<RangeReply>(bytes, MAX_HEAD_BYTES);
    _ = decode::<Progress>(bytes, MAX_HEAD_BYTES);
    _ = decode::<Presence>(bytes, MAX_HEAD_BYTES);
}

fn multicast(tag: u32, parts: &[(Slot, Vec<u8>)], shared: &[u8]) -> Bytes {
    relay::multicast(tag, parts.iter().map(|(slot, part)| (*slot, &part[..])), shared)
}

/// What a broken or hostile middle may do to bytes.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    Insert(Index, u8),
    Remove(Index),
    Cut(Index),
    Swap(Index, Index),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let last = bytes.len();
        if last == 0 {
            return;
        }
        match self {
            Self::Flip(at, bits) => bytes[at.index(last)] ^= bits,
            Self::Insert(at, byte) => bytes.insert(at.index(last), *byte),
            Self::Remove(at) => drop(bytes.remove(at.index(last))),
            Self::Cut(at) => bytes.truncate(at.index(last)),
            Self::Swap(one, other) => bytes.swap(one.index(last), other.index(last)),
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<Index>(), 1_u8..).prop_map(|(at, bits)| Change::Flip(at, bits)),
        1 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Insert(at, byte)),
        1 => any::<Index>().prop_map(Change::Remove),
        1 => any::<Index>().prop_map(Change::Cut),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(one, other)| Change::Swap(one, other)),
    ]
}

fn frame() -> impl Strategy<Value = Bytes> {
    let share = |(parts, shared): (Vec<(Slot, Vec<u8>)>, Vec<u8>)| {
        let frame = multicast(7, &parts, &shared);
        let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(&frame) else { panic!("not a multicast") };
        multicast.parts().next().map_or_else(Bytes::new, |(slot, part)| multicast.share(slot, part))
    };
    prop_oneof![
        peer_to_relay().prop_map(|word| relay::control(&word)),
        relay_to_peer().prop_map(|word| relay::control(&word)),
        (slot(), any::<u32>(), payload()).prop_map(|(to, tag, sealed)| relay::message(to, tag, &sealed)),
        (slot(), any::<u8>(), any::<u16>(), payload())
            .prop_map(|(to, lane, segment, packets)| relay::datagram(to, lane, segment, &packets)),
        (any::<u32>(), parts(), payload()).prop_map(|(tag, parts, shared)| multicast(tag, &parts, &shared)),
        (parts(), payload()).prop_map(share),
    ]
}

fn peer_to_relay() -> impl Strategy<Value = PeerToRelay> {
    let join = (any::<[[u8; 32]; 3]>(), peer(), instance(), payload()).prop_map(
        |([admission, room_proof, identity_proof], peer, instance, presence)| Join {
            admission,
            peer,
            instance,
            room_proof,
            identity_proof,
            presence,
        },
    );
    prop_oneof![join.prop_map(PeerToRelay::Join), payload().prop_map(PeerToRelay::Presence)]
}

fn relay_to_peer() -> impl Strategy<Value = RelayToPeer> {
    let challenge = any::<[[u8; 32]; 2]>().prop_map(|[ephemeral, nonce]| Challenge { ephemeral, nonce });
    let welcome = (slot(), address(), any::<u32>(), any::<Option<u16>>(), any::<Option<u16>>()).prop_map(
        |(slot, observed, idle_timeout_ms, stun, stun_alternate)| Welcome {
            slot,
            observed,
            idle_timeout_ms,
            stun,
            stun_alternate,
        },
    );
    let refused = (slot(), any::<u32>(), one_of(&[RefusalReason::Gone, RefusalReason::QueueFull]))
        .prop_map(|(slot, tag, reason)| Refused { slot, tag, reason });
    prop_oneof![
        challenge.prop_map(RelayToPeer::Challenge),
        welcome.prop_map(RelayToPeer::Welcome),
        (vec(member(), 0..4), any::<bool>()).prop_map(|(members, last)| RelayToPeer::Roster { members, last }),
        member().prop_map(RelayToPeer::Joined),
        slot().prop_map(RelayToPeer::Left),
        (slot(), payload()).prop_map(|(slot, sealed)| RelayToPeer::Presence { slot, sealed }),
        refused.prop_map(RelayToPeer::Refused),
        closing_reason().prop_map(RelayToPeer::Closing),
        any::<u32>().prop_map(|jitter_ms| RelayToPeer::Drain { jitter_ms }),
    ]
}

fn closing_reason() -> impl Strategy<Value = ClosingReason> {
    one_of(&[
        ClosingReason::BadProof,
        ClosingReason::JoinTimeout,
        ClosingReason::RoomFull,
        ClosingReason::AddressLimit,
        ClosingReason::RelayFull,
        ClosingReason::Malformed,
        ClosingReason::OutOfTurn,
        ClosingReason::Idle,
        ClosingReason::SlowReader,
        ClosingReason::ShuttingDown,
    ])
}

fn member() -> impl Strategy<Value = Member> {
    (slot(), peer(), instance(), payload()).prop_map(|(slot, peer, instance, presence)| Member {
        slot,
        peer,
        instance,
        presence,
    })
}

fn numbering() -> impl Strategy<Value = Numbering> {
    any::<([u64; 2], [u8; 16])>().prop_map(|([number, settled], born)| Numbering { number, settled, born: Epoch(born) })
}

fn message() -> impl Strategy<Value = Message> {
    let id = || any::<[u8; 16]>().prop_map(RequestId::from_bytes);
    prop_oneof![
        (id(), numbering(), request()).prop_map(|(id, numbering, request)| Message::Ask { id, numbering, request }),
        (id(), numbering(), any::<[[u8; 32]; 2]>()).prop_map(|(id, numbering, [key, digest])| Message::AskShared {
            id,
            numbering,
            key,
            digest
        }),
        (id(), any::<[u64; 2]>()).prop_map(|(id, [number, settled])| Message::Poll { id, number, settled }),
        id().prop_map(|id| Message::Forgotten { id }),
        id().prop_map(|id| Message::Accepted { id }),
        (id(), outcome()).prop_map(|(id, outcome)| Message::Answer { id, outcome }),
        id().prop_map(|id| Message::Busy { id }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let offer = (route(), payload(), any::<[u8; 32]>(), candidates(), nat()).prop_map(
        |(route, tls_key, check_share, candidates, nat)| LinkOffer { route, tls_key, check_share, candidates, nat },
    );
    let attach = (job(), any::<[u64; 2]>(), any::<[bool; 2]>()).prop_map(
        |(job, [stdout_from, stderr_from], [follow, owner])| Attach { job, stdout_from, stderr_from, follow, owner },
    );
    let receive = (ticket(), file(), peer(), instance(), payload(), path_wish()).prop_map(
        |(ticket, file, source, source_instance, destination, path)| ReceiveSpec {
            ticket,
            file,
            source,
            source_instance,
            destination,
            path,
        },
    );
    prop_oneof![
        offer.prop_map(Request::Link),
        (candidates(), nat()).prop_map(|(candidates, nat)| Request::Candidates(CandidateUpdate { candidates, nat })),
        Just(Request::Ping),
        exec_spec().prop_map(Request::Exec),
        attach.prop_map(Request::Attach),
        Just(Request::Jobs),
        job().prop_map(Request::Cancel),
        (payload(), peer()).prop_map(|(path, receiver)| Request::Offer(OfferSpec { path, receiver })),
        receive.prop_map(Request::Receive),
        ticket().prop_map(|ticket| Request::Pull(PullSpec { ticket })),
        Just(Request::Network),
    ]
}

fn exec_spec() -> impl Strategy<Value = ExecSpec> {
    let command = prop_oneof![vec(payload(), 0..4).prop_map(Command::Argv), payload().prop_map(Command::Shell)];
    let follow = one_of(&[Follow::Attached, Follow::Collected, Follow::Detached]);
    let env = vec((payload(), payload()), 0..3);
    (command, option::of(payload()), env, option::of(duration()), any::<bool>(), follow)
        .prop_map(|(command, cwd, env, timeout, stdin, follow)| ExecSpec { command, cwd, env, timeout, stdin, follow })
}

fn outcome() -> impl Strategy<Value = Outcome> {
    let answer = (payload(), any::<[u8; 32]>(), candidates(), nat())
        .prop_map(|(tls_key, check_share, candidates, nat)| LinkAnswer { tls_key, check_share, candidates, nat });
    let report = (job(), option::of(job_end()), captured(), captured())
        .prop_map(|(job, end, stdout, stderr)| JobReport { job, end, stdout, stderr });
    let attached = any::<[u64; 3]>().prop_map(|[stdin_taken, stdout_from, stderr_from]| Attached {
        stdin_taken,
        stdout_from,
        stderr_from,
    });
    prop_oneof![
        answer.prop_map(Outcome::Link),
        Just(Outcome::Done),
        report.prop_map(Outcome::Job),
        attached.prop_map(Outcome::Attached),
        vec(job_summary(), 0..3).prop_map(Outcome::Jobs),
        (ticket(), file()).prop_map(|(ticket, file)| Outcome::Offered(Offered { ticket, file })),
        Just(Outcome::Pulling),
        Just(Outcome::Receiving),
        failure().prop_map(Outcome::Failed),
        network_report().prop_map(|report| Outcome::Network(Box::new(report))),
    ]
}

fn network_report() -> impl Strategy<Value = NetworkReport> {
    let responder = (address(), option::of(address()), option::of(duration()), any::<u32>())
        .prop_map(|(addr, seen, rtt, unanswered)| ResponderReport { addr, seen, rtt, unanswered });
    let filtering = one_of(&[
        Filtering::Unknown,
        Filtering::EndpointIndependent,
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
        Filtering::PortIndependent,
    ]);
    let protocol = || one_of(&[MappingProtocol::Pcp, MappingProtocol::NatPmp, MappingProtocol::Upnp]);
    let port_mapping = prop_oneof![
        one_of(&[
            PortMapping::NoAnswer,
            PortMapping::Asking,
            PortMapping::NotNeeded,
            PortMapping::NoRouter,
            PortMapping::Off,
        ]),
        protocol().prop_map(|protocol| PortMapping::Refused { protocol }),
        (protocol(), address()).prop_map(|(protocol, addr)| PortMapping::Nested { protocol, addr }),
        (protocol(), address(), duration()).prop_map(|(protocol, addr, life)| PortMapping::Open {
            protocol,
            addr,
            life
        }),
    ];
    let ours = (any::<[bool; 3]>(), candidates(), vec(responder, 0..3), option::of(duration()));
    let nat = (filtering, option::of(any::<bool>()), option::of(port_mapping), option::of(path_report()));
    (ours, nat).prop_map(|((has, candidates, responders, relay_rtt), (filtering, hairpin, port_mapping, path))| {
        let [udp, routes_v4, routes_v6] = has;
        let nat = Nat::default();
        NetworkReport {
            udp,
            routes_v4,
            routes_v6,
            candidates,
            responders,
            relay_rtt,
            nat,
            filtering,
            hairpin,
            port_mapping,
            path,
        }
    })
}

fn path_report() -> impl Strategy<Value = PathReport> {
    let why = prop_oneof![
        Just(Choice::Only),
        address().prop_map(Choice::Nearer),
        address().prop_map(Choice::Faster),
        address().prop_map(Choice::Ipv6),
        address().prop_map(Choice::Kind),
        address().prop_map(Choice::Kept),
    ];
    let taken =
        (address(), duration(), duration(), why).prop_map(|(addr, rtt, age, why)| TakenPath { addr, rtt, age, why });
    let search = one_of(&[SearchReport::NoUse, SearchReport::Waiting, SearchReport::Running, SearchReport::GivenUp]);
    (duration(), vec(check_report(), 0..3), option::of(taken), option::of(search))
        .prop_map(|(age, checks, taken, search)| PathReport { age, checks, taken, search })
}

fn check_report() -> impl Strategy<Value = CheckReport> {
    let outcome = one_of(&[
        CheckOutcome::NotTried,
        CheckOutcome::NoRoute,
        CheckOutcome::Planned,
        CheckOutcome::Waiting,
        CheckOutcome::Silent,
        CheckOutcome::Forged,
        CheckOutcome::Answered,
        CheckOutcome::Lost,
        CheckOutcome::Distrusted,
    ]);
    let reach = one_of(&[Reach::Loopback, Reach::Lan, Reach::Wide]);
    let kind = one_of(&[CandidateKind::Host, CandidateKind::ServerReflexive, CandidateKind::PeerReflexive]);
    (address(), kind, reach, any::<[u32; 3]>(), option::of(duration()), outcome).prop_map(
        |(addr, kind, reach, [sent, answered, heard], rtt, outcome)| CheckReport {
            addr,
            kind,
            reach,
            sent,
            answered,
            heard,
            rtt,
            outcome,
        },
    )
}

fn captured() -> impl Strategy<Value = Captured> {
    (payload(), any::<u64>()).prop_map(|(bytes, total)| Captured { bytes, total })
}

fn job_summary() -> impl Strategy<Value = JobSummary> {
    (job(), peer(), any::<String>(), option::of(job_end()), any::<[u64; 3]>()).prop_map(
        |(job, caller, command, end, [started_unix_ms, stdout_bytes, stderr_bytes])| JobSummary {
            job,
            caller,
            command,
            started_unix_ms,
            end,
            stdout_bytes,
            stderr_bytes,
        },
    )
}

fn job_end() -> impl Strategy<Value = JobEnd> {
    let state = prop_oneof![
        any::<i32>().prop_map(EndState::Exited),
        any::<i32>().prop_map(EndState::Signalled),
        Just(EndState::TimedOut),
        Just(EndState::Cancelled),
        failure().prop_map(EndState::SpawnFailed),
        Just(EndState::Lost),
    ];
    (state, duration()).prop_map(|(state, duration)| JobEnd { state, duration })
}

fn from_host() -> impl Strategy<Value = FromHost> {
    prop_oneof![
        payload().prop_map(FromHost::Stdout),
        payload().prop_map(FromHost::Stderr),
        any::<u64>().prop_map(FromHost::StdinTaken),
        Just(FromHost::StdinClosed),
        job_end().prop_map(FromHost::End),
        Just(FromHost::Pause),
    ]
}

fn from_caller() -> impl Strategy<Value = FromCaller> {
    prop_oneof![
        payload().prop_map(FromCaller::Stdin),
        Just(FromCaller::StdinEnd),
        any::<[u64; 2]>().prop_map(|[stdout, stderr]| FromCaller::Taken { stdout, stderr }),
        one_of(&[JobSignal::Interrupt, JobSignal::Terminate, JobSignal::BrokenPipe]).prop_map(FromCaller::Signal),
    ]
}

fn range_request() -> impl Strategy<Value = RangeRequest> {
    prop_oneof![any::<u64>().prop_map(RangeRequest::Range), Just(RangeRequest::Sha256)]
}

fn range_reply() -> impl Strategy<Value = RangeReply> {
    prop_oneof![
        (any::<u64>(), any::<u32>(), any::<[u8; 32]>()).prop_map(|(index, len, blake3)| RangeReply::Range {
            index,
            len,
            blake3
        }),
        any::<[u8; 32]>().prop_map(RangeReply::Sha256),
        failure().prop_map(RangeReply::Failed),
    ]
}

fn progress() -> impl Strategy<Value = Progress> {
    prop_oneof![
        (any::<[u64; 3]>(), path_now()).prop_map(|([bytes, total, resumed], path)| Progress::Moved {
            bytes,
            total,
            resumed,
            path
        }),
        Just(Progress::Verifying),
        (any::<[u64; 2]>(), any::<[u8; 32]>(), path_now(), payload()).prop_map(
            |([bytes, resumed], sha256, path, destination)| Progress::Done {
                bytes,
                resumed,
                sha256,
                path,
                destination
            },
        ),
        failure().prop_map(Progress::Failed),
    ]
}

fn presence() -> impl Strategy<Value = Presence> {
    let text = any::<String>;
    let mode = one_of(&[Mode::Disabled, Mode::Plan, Mode::Edit, Mode::Bypass]);
    let services = vec(one_of(&[Service::Exec, Service::Transfer]), 0..3);
    let epoch = any::<[u8; 16]>().prop_map(Epoch);
    (text(), vec(text(), 0..4), text(), text(), text(), mode, services, epoch).prop_map(
        |(name, tags, os, arch, version, mode, services, epoch)| Presence {
            name,
            tags,
            os,
            arch,
            version,
            mode,
            services,
            epoch,
        },
    )
}

fn failure() -> impl Strategy<Value = Failure> {
    let kind = one_of(&[
        FailureKind::Refused,
        FailureKind::NotFound,
        FailureKind::Invalid,
        FailureKind::Busy,
        FailureKind::Os,
        FailureKind::Corrupt,
        FailureKind::Unreachable,
        FailureKind::Internal,
    ]);
    (kind, any::<String>(), any::<String>()).prop_map(|(kind, what, hint)| Failure { kind, what, hint })
}

fn file() -> impl Strategy<Value = FileInfo> {
    (payload(), any::<u64>(), any::<u32>(), any::<i64>(), any::<u32>())
        .prop_map(|(name, size, mode, mtime_s, mtime_ns)| FileInfo { name, size, mode, mtime_s, mtime_ns })
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let kind = one_of(&[
        CandidateKind::Host,
        CandidateKind::ServerReflexive,
        CandidateKind::PeerReflexive,
        CandidateKind::Mapped,
    ]);
    vec((kind, address()).prop_map(|(kind, addr)| Candidate { kind, addr }), 0..4)
}

fn nat() -> impl Strategy<Value = Nat> {
    let mapping = one_of(&[Mapping::Unknown, Mapping::EndpointIndependent, Mapping::Dependent]);
    let ports = prop_oneof![
        one_of(&[Ports::Unknown, Ports::Preserving, Ports::Random]),
        any::<(u16, i16)>().prop_map(|(last, step)| Ports::Sequential { last, step }),
        any::<[u16; 2]>().prop_map(|[first, last]| Ports::Block { first, last }),
    ];
    (mapping, ports).prop_map(|(mapping, ports)| Nat { mapping, ports })
}

/// Without flow label and scope, which mean nothing to another host and do not travel.
fn address() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from),
        (any::<[u16; 8]>(), any::<u16>()).prop_map(SocketAddr::from),
    ]
}

fn duration() -> impl Strategy<Value = Duration> {
    (any::<u64>(), 0_u32..1_000_000_000).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos))
}

fn parts() -> impl Strategy<Value = Vec<(Slot, Vec<u8>)>> {
    vec((slot(), vec(any::<u8>(), 0..24)), 0..6)
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..48)
}

fn slot() -> impl Strategy<Value = Slot> {
    any::<u32>().prop_map(Slot)
}

fn peer() -> impl Strategy<Value = PeerId> {
    any::<[u8; 32]>().prop_map(PeerId::from_bytes)
}

fn instance() -> impl Strategy<Value = InstanceId> {
    any::<[u8; 16]>().prop_map(InstanceId::from_bytes)
}

fn job() -> impl Strategy<Value = JobId> {
    any::<[u8; 16]>().prop_map(JobId::from_bytes)
}

fn ticket() -> impl Strategy<Value = Ticket> {
    any::<[u8; 16]>().prop_map(Ticket::from_bytes)
}

fn route() -> impl Strategy<Value = Route> {
    one_of(&[Route::Auto, Route::RelayedOnly])
}

fn path_wish() -> impl Strategy<Value = PathWish> {
    one_of(&[PathWish::Auto, PathWish::Direct, PathWish::Relayed])
}

fn path_now() -> impl Strategy<Value = PathNow> {
    one_of(&[PathNow::Direct, PathNow::Relayed])
}

fn one_of<T: Copy + Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = T> {
    proptest::sample::select(values)
}
