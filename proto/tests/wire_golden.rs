//! The bytes of every frame and of every variant of every typed part: whoever changes a wire type meets these first.
//!
//! A variant without a line does not compile. A line may be added; one that is changed breaks peers in the field,
//! unless the version in [`peerfleet_proto::wire`] changes with it.

use std::{fmt::Debug, net::SocketAddr, time::Duration};

use bytes::Bytes;
use data_encoding::HEXLOWER;
use peerfleet_proto::{
    admission,
    id::{InstanceId, JobId, PeerId, RequestId, Slot, Ticket},
    limits::MAX_FRAME_BYTES,
    path::Reach,
    presence::{Epoch, Mode, Presence, PresenceOpener, PresenceSealer, Service},
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
        FrameKind, LINK_PROTOCOL, RELAY_PATH, RELAY_PROTOCOL, decode, encode,
        message::{Message, Numbering, StreamHead},
        relay::{
            self, Challenge, ClosingReason, Join, Member, PeerFrame, PeerToRelay, RefusalReason, Refused, RelayFrame,
            RelayToPeer, Welcome,
        },
    },
};
use serde::{Serialize, de::DeserializeOwned};
use x25519_dalek::{PublicKey, StaticSecret};

/// One line for each variant of one enum: a pattern, a value of it, its bytes.
macro_rules! golden {
    ($test:ident: $type:ty { $($pattern:pat => $value:expr, $($hex:literal)+;)* }) => {
        #[test]
        fn $test() {
            let _every_variant_has_a_line = |value: &$type| match value { $($pattern => (),)* };
            $(
                let value: $type = $value;
                assert!(matches!(value, $pattern));
                check(&value, concat!($($hex),+));
            )*
        }
    };
}

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T, hex: &str) {
    assert_eq!(HEXLOWER.encode(&encode(value)), hex, "{value:?}");
    let bytes = HEXLOWER.decode(hex.as_bytes()).expect("a line holds hex");
    assert_eq!(&decode::<T>(&bytes, MAX_FRAME_BYTES).expect("what is sent can be read"), value);
}

#[test]
fn versions_and_frame_numbers_stay() {
    assert_eq!((RELAY_PROTOCOL, RELAY_PATH, LINK_PROTOCOL), ("peerfleet.relay.v1", "/v1", &b"peerfleet/link/1"[..]));
    let known = |byte: &u8| FrameKind::try_from(*byte).is_ok();
    assert_eq!((0..=u8::MAX).filter(known).collect::<Vec<_>>(), vec![1, 2, 3, 4, 5]);
    for (kind, number) in [
        (FrameKind::Control, 1),
        (FrameKind::Message, 2),
        (FrameKind::Datagram, 3),
        (FrameKind::Multicast, 4),
        (FrameKind::MulticastShare, 5),
    ] {
        assert_eq!(FrameKind::try_from(number), Ok(kind));
    }
}

#[test]
fn a_message_is_its_slot_its_tag_and_what_is_sealed() {
    let frame = relay::message(Slot(0x0102_0304), 0x0506_0708, b"sealed");
    assert_eq!(HEXLOWER.encode(&frame), "0201020304050607087365616c6564");
    assert_eq!(PeerFrame::split(&frame), Ok(PeerFrame::Message { to: Slot(0x0102_0304), tag: 0x0506_0708 }));
    let read = RelayFrame::Message { from: Slot(0x0102_0304), sealed: Bytes::from_static(b"sealed") };
    assert_eq!(RelayFrame::read(&frame), Ok(read));
}

#[test]
fn a_datagram_is_its_slot_its_lane_and_packets_of_one_length() {
    let frame = relay::datagram(Slot(0x0102_0304), 1, 1200, b"packets");
    assert_eq!(HEXLOWER.encode(&frame), "03010203040104b07061636b657473");
    assert_eq!(PeerFrame::split(&frame), Ok(PeerFrame::Datagram { to: Slot(0x0102_0304) }));
    let packets = Bytes::from_static(b"packets");
    let read = relay::Datagram { slot: Slot(0x0102_0304), lane: 1, segment: 1200, packets };
    assert_eq!(RelayFrame::read(&frame), Ok(RelayFrame::Datagram(read)));
}

#[test]
fn a_multicast_is_a_part_for_each_and_one_for_all() {
    let parts = [(Slot(1), &b"one"[..]), (Slot(2), b"two!")];
    let frame = relay::multicast(0x0506_0708, parts.into_iter(), b"shared");
    assert_eq!(HEXLOWER.encode(&frame), "040506070800020000000100036f6e6500000002000474776f21736861726564");
    let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(&frame) else { panic!("not a multicast") };
    assert_eq!((multicast.tag, multicast.len(), multicast.shared), (0x0506_0708, 2, &b"shared"[..]));
    assert_eq!(multicast.parts().collect::<Vec<_>>(), parts);

    let share = multicast.share(Slot(9), b"two!");
    assert_eq!(HEXLOWER.encode(&share), "050000000905060708000474776f21736861726564");
    let read = RelayFrame::MulticastShare {
        from: Slot(9),
        part: Bytes::from_static(b"two!"),
        shared: Bytes::from_static(b"shared"),
    };
    assert_eq!(RelayFrame::read(&share), Ok(read));
}

#[test]
fn a_control_frame_is_its_number_and_a_typed_word() {
    let frame = relay::control(&RelayToPeer::Left(Slot(300)));
    assert_eq!(HEXLOWER.encode(&frame), "0104ac02");
    assert_eq!(RelayFrame::read(&frame), Ok(RelayFrame::Control(RelayToPeer::Left(Slot(300)))));
    assert_eq!(PeerFrame::split(&frame), Ok(PeerFrame::Control(&frame[1..])));
}

golden! { words_to_the_relay: PeerToRelay {
    PeerToRelay::Join(_) => PeerToRelay::Join(join()),
        "000101010101010101010101010101010101010101010101010101010101010101111111111111111111111111111111"
        "111111111111111111111111111111111122222222222222222222222222222222030303030303030303030303030303"
        "030303030303030303030303030303030304040404040404040404040404040404040404040404040404040404040404"
        "0402aabb";
    PeerToRelay::Presence(_) => PeerToRelay::Presence(vec![0xAA, 0xBB]), "0102aabb";
}}

golden! { words_of_the_relay: RelayToPeer {
    RelayToPeer::Challenge(_) => RelayToPeer::Challenge(challenge()),
        "000101010101010101010101010101010101010101010101010101010101010101020202020202020202020202020202"
        "0202020202020202020202020202020202";
    RelayToPeer::Welcome(_) => RelayToPeer::Welcome(Welcome {
        slot: Slot(300),
        observed: ipv4(),
        idle_timeout_ms: 90_000,
        stun: Some(8080),
        stun_alternate: Some(8081),
    }), "01ac0200c0000201903f90bf0501903f01913f";
    RelayToPeer::Roster { .. } => RelayToPeer::Roster { members: vec![member()], last: true },
        "0201ac021111111111111111111111111111111111111111111111111111111111111111222222222222222222222222"
        "2222222202aabb01";
    RelayToPeer::Joined(_) => RelayToPeer::Joined(member()),
        "03ac02111111111111111111111111111111111111111111111111111111111111111122222222222222222222222222"
        "22222202aabb";
    RelayToPeer::Left(_) => RelayToPeer::Left(Slot(300)), "04ac02";
    RelayToPeer::Presence { .. } => RelayToPeer::Presence { slot: Slot(300), sealed: vec![0xAA] }, "05ac0201aa";
    RelayToPeer::Refused(_) => RelayToPeer::Refused(Refused {
        slot: Slot(300),
        tag: 0x0506_0708,
        reason: RefusalReason::QueueFull,
    }), "06ac02888e982801";
    RelayToPeer::Closing(_) => RelayToPeer::Closing(ClosingReason::RoomFull), "0702";
    RelayToPeer::Drain { .. } => RelayToPeer::Drain { jitter_ms: 5_000 }, "088827";
}}

golden! { reasons_to_refuse_a_message: RefusalReason {
    RefusalReason::Gone => RefusalReason::Gone, "00";
    RefusalReason::QueueFull => RefusalReason::QueueFull, "01";
}}

golden! { reasons_to_close_a_connection: ClosingReason {
    ClosingReason::BadProof => ClosingReason::BadProof, "00";
    ClosingReason::JoinTimeout => ClosingReason::JoinTimeout, "01";
    ClosingReason::RoomFull => ClosingReason::RoomFull, "02";
    ClosingReason::AddressLimit => ClosingReason::AddressLimit, "03";
    ClosingReason::RelayFull => ClosingReason::RelayFull, "04";
    ClosingReason::Malformed => ClosingReason::Malformed, "05";
    ClosingReason::OutOfTurn => ClosingReason::OutOfTurn, "06";
    ClosingReason::Idle => ClosingReason::Idle, "07";
    ClosingReason::SlowReader => ClosingReason::SlowReader, "08";
    ClosingReason::ShuttingDown => ClosingReason::ShuttingDown, "09";
}}

golden! { what_is_inside_a_sealed_message: Message {
    Message::Ask { .. } => Message::Ask { id: request_id(), numbering: numbering(), request: Request::Ping },
        "0033333333333333333333333333333333ac02070909090909090909090909090909090902";
    Message::AskShared { .. } => Message::AskShared {
        id: request_id(),
        numbering: numbering(),
        key: [4; 32],
        digest: [5; 32],
    },
        "0133333333333333333333333333333333ac020709090909090909090909090909090909"
        "04040404040404040404040404040404040404040404040404040404040404040505050505050505050505050505050505050505050505050505050505050505";
    Message::Accepted { .. } => Message::Accepted { id: request_id() }, "0233333333333333333333333333333333";
    Message::Answer { .. } => Message::Answer { id: request_id(), outcome: Outcome::Done },
        "033333333333333333333333333333333301";
    Message::Busy { .. } => Message::Busy { id: request_id() }, "0433333333333333333333333333333333";
    Message::Poll { .. } => Message::Poll { id: request_id(), number: 300, settled: 7 },
        "0533333333333333333333333333333333ac0207";
    Message::Forgotten { .. } => Message::Forgotten { id: request_id() }, "0633333333333333333333333333333333";
}}

golden! { heads_of_streams: StreamHead {
    StreamHead::Open(_) => StreamHead::Open(Request::Ping), "0002";
    StreamHead::Ask { .. } => StreamHead::Ask { id: request_id(), request: Request::Ping },
        "013333333333333333333333333333333302";
}}

golden! { requests: Request {
    Request::Link(_) => Request::Link(LinkOffer {
        route: Route::Auto,
        tls_key: vec![1, 2, 3],
        check_share: [6; 32],
        candidates: candidates(),
        nat: Nat { mapping: Mapping::Dependent, ports: Ports::Block { first: 1024, last: 2047 } },
    }),
        "0000030102030606060606060606060606060606060606060606060606060606060606060606020000c0000201903f01"
        "0120010db8000000000000000000000001bb0302038008ff0f";
    Request::Candidates(_) => Request::Candidates(CandidateUpdate {
        candidates: candidates(),
        nat: Nat { mapping: Mapping::Dependent, ports: Ports::Sequential { last: 300, step: -1 } },
    }),
        "01020000c0000201903f010120010db8000000000000000000000001bb030202ac0201";
    Request::Ping => Request::Ping, "02";
    Request::Exec(_) => Request::Exec(ExecSpec {
        command: Command::Argv(vec![b"ls".to_vec(), b"-l".to_vec()]),
        cwd: Some(b"/tmp".to_vec()),
        env: vec![(b"LANG".to_vec(), b"C".to_vec())],
        timeout: Some(Duration::from_millis(30_500)),
        stdin: true,
        follow: Follow::Collected,
    }), "030002026c73022d6c01042f746d7001044c414e470143011e80cab5ee010101";
    Request::Attach(_) => Request::Attach(Attach {
        job: job_id(),
        stdout_from: 300,
        stderr_from: 0,
        follow: true,
        owner: false,
    }), "0444444444444444444444444444444444ac02000100";
    Request::Jobs => Request::Jobs, "05";
    Request::Cancel(_) => Request::Cancel(job_id()), "0644444444444444444444444444444444";
    Request::Offer(_) => Request::Offer(OfferSpec { path: b"/a".to_vec(), receiver: peer() }),
        "07022f611111111111111111111111111111111111111111111111111111111111111111";
    Request::Receive(_) => Request::Receive(ReceiveSpec {
        ticket: ticket(),
        file: file(),
        source: peer(),
        source_instance: instance(),
        destination: b"/b".to_vec(),
        path: PathWish::Direct,
    }),
        "085555555555555555555555555555555501618080808004a40301ff93ebdc0311111111111111111111111111111111"
        "1111111111111111111111111111111122222222222222222222222222222222022f6201";
    Request::Pull(_) => Request::Pull(PullSpec { ticket: ticket() }), "0955555555555555555555555555555555";
    Request::Network => Request::Network, "0a";
}}

golden! { outcomes: Outcome {
    Outcome::Link(_) => Outcome::Link(LinkAnswer {
        tls_key: vec![1, 2, 3],
        check_share: [6; 32],
        candidates: vec![],
        nat: Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving },
    }), "00030102030606060606060606060606060606060606060606060606060606060606060606000101";
    Outcome::Done => Outcome::Done, "01";
    Outcome::Job(_) => Outcome::Job(JobReport {
        job: job_id(),
        end: Some(JobEnd { state: EndState::Exited(-1), duration: Duration::from_millis(1_500) }),
        stdout: Captured { bytes: b"out".to_vec(), total: 300 },
        stderr: Captured::default(),
    }), "02444444444444444444444444444444440100010180cab5ee01036f7574ac020000";
    Outcome::Attached(_) => Outcome::Attached(Attached { stdin_taken: 1, stdout_from: 300, stderr_from: 2 }),
        "0301ac0202";
    Outcome::Jobs(_) => Outcome::Jobs(vec![JobSummary {
        job: job_id(),
        caller: peer(),
        command: "ls -l".into(),
        started_unix_ms: 1_800_000_000_000,
        end: None,
        stdout_bytes: 300,
        stderr_bytes: 1,
    }]),
        "040144444444444444444444444444444444111111111111111111111111111111111111111111111111111111111111"
        "1111056c73202d6c80a0f1c2b13400ac0201";
    Outcome::Offered(_) => Outcome::Offered(Offered { ticket: ticket(), file: file() }),
        "055555555555555555555555555555555501618080808004a40301ff93ebdc03";
    Outcome::Pulling => Outcome::Pulling, "06";
    Outcome::Receiving => Outcome::Receiving, "07";
    Outcome::Failed(_) => Outcome::Failed(failure()), "0804026e6f02646f";
    Outcome::Network(_) => Outcome::Network(Box::new(network())),
        "09010100020000c0000201903f010120010db8000000000000000000000001bb030100c0000201903f0100c000020190"
        "3f010080b6dc0501010080b6dc05010102010001000109000100c0000201903f00010605ac02010080b6dc05060100c0"
        "000201903f0080b6dc050800000102";
}}

golden! { outcomes_of_checks: CheckOutcome {
    CheckOutcome::NotTried => CheckOutcome::NotTried, "00";
    CheckOutcome::NoRoute => CheckOutcome::NoRoute, "01";
    CheckOutcome::Planned => CheckOutcome::Planned, "02";
    CheckOutcome::Waiting => CheckOutcome::Waiting, "03";
    CheckOutcome::Silent => CheckOutcome::Silent, "04";
    CheckOutcome::Forged => CheckOutcome::Forged, "05";
    CheckOutcome::Answered => CheckOutcome::Answered, "06";
    CheckOutcome::Lost => CheckOutcome::Lost, "07";
    CheckOutcome::Distrusted => CheckOutcome::Distrusted, "08";
}}

golden! { reasons_of_a_choice: Choice {
    Choice::Only => Choice::Only, "00";
    Choice::Nearer(_) => Choice::Nearer(reached()), "0100c0000201903f";
    Choice::Faster(_) => Choice::Faster(reached()), "0200c0000201903f";
    Choice::Ipv6(_) => Choice::Ipv6(reached()), "0300c0000201903f";
    Choice::Kind(_) => Choice::Kind(reached()), "0400c0000201903f";
    Choice::Kept(_) => Choice::Kept(reached()), "0500c0000201903f";
}}

golden! { ways_to_filter: Filtering {
    Filtering::Unknown => Filtering::Unknown, "00";
    Filtering::EndpointIndependent => Filtering::EndpointIndependent, "01";
    Filtering::AddressDependent => Filtering::AddressDependent, "02";
    Filtering::AddressAndPortDependent => Filtering::AddressAndPortDependent, "03";
    Filtering::PortIndependent => Filtering::PortIndependent, "04";
}}

golden! { port_mappings: PortMapping {
    PortMapping::NoAnswer => PortMapping::NoAnswer, "00";
    PortMapping::Refused { .. } => PortMapping::Refused { protocol: MappingProtocol::Upnp }, "0102";
    PortMapping::Open { .. } => PortMapping::Open {
        protocol: MappingProtocol::NatPmp, addr: reached(), life: Duration::from_secs(3600),
    }, "020100c0000201903f901c00";
    PortMapping::Nested { .. } => PortMapping::Nested { protocol: MappingProtocol::Pcp, addr: reached() },
        "030000c0000201903f";
    PortMapping::Asking => PortMapping::Asking, "04";
    PortMapping::NotNeeded => PortMapping::NotNeeded, "05";
    PortMapping::NoRouter => PortMapping::NoRouter, "06";
    PortMapping::Off => PortMapping::Off, "07";
}}

golden! { protocols_of_port_mappings: MappingProtocol {
    MappingProtocol::Pcp => MappingProtocol::Pcp, "00";
    MappingProtocol::NatPmp => MappingProtocol::NatPmp, "01";
    MappingProtocol::Upnp => MappingProtocol::Upnp, "02";
}}

golden! { standings_of_a_search: SearchReport {
    SearchReport::NoUse => SearchReport::NoUse, "00";
    SearchReport::Waiting => SearchReport::Waiting, "01";
    SearchReport::Running => SearchReport::Running, "02";
    SearchReport::GivenUp => SearchReport::GivenUp, "03";
}}

golden! { how_near: Reach {
    Reach::Loopback => Reach::Loopback, "00";
    Reach::Lan => Reach::Lan, "01";
    Reach::Wide => Reach::Wide, "02";
}}

fn reached() -> SocketAddr {
    candidates()[0].addr
}

fn network() -> NetworkReport {
    let (addr, rtt) = (reached(), Duration::from_millis(12));
    let responder = ResponderReport { addr, seen: Some(addr), rtt: Some(rtt), unanswered: 1 };
    let check = CheckReport {
        addr,
        kind: CandidateKind::Host,
        reach: Reach::Lan,
        sent: 6,
        answered: 5,
        heard: 300,
        rtt: Some(rtt),
        outcome: CheckOutcome::Answered,
    };
    NetworkReport {
        udp: true,
        routes_v4: true,
        routes_v6: false,
        candidates: candidates(),
        responders: vec![responder],
        relay_rtt: Some(rtt),
        nat: Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving },
        filtering: Filtering::AddressDependent,
        hairpin: Some(false),
        port_mapping: Some(PortMapping::NoAnswer),
        path: Some(PathReport {
            age: Duration::from_secs(9),
            checks: vec![check],
            taken: Some(TakenPath { addr, rtt, age: Duration::from_secs(8), why: Choice::Only }),
            search: Some(SearchReport::Running),
        }),
    }
}

golden! { kinds_of_failure: FailureKind {
    FailureKind::Refused => FailureKind::Refused, "00";
    FailureKind::NotFound => FailureKind::NotFound, "01";
    FailureKind::Invalid => FailureKind::Invalid, "02";
    FailureKind::Busy => FailureKind::Busy, "03";
    FailureKind::Os => FailureKind::Os, "04";
    FailureKind::Corrupt => FailureKind::Corrupt, "05";
    FailureKind::Unreachable => FailureKind::Unreachable, "06";
    FailureKind::Internal => FailureKind::Internal, "07";
}}

golden! { commands: Command {
    Command::Argv(_) => Command::Argv(vec![b"true".to_vec()]), "00010474727565";
    Command::Shell(_) => Command::Shell(b"a | b".to_vec()), "010561207c2062";
}}

golden! { ways_to_follow: Follow {
    Follow::Attached => Follow::Attached, "00";
    Follow::Collected => Follow::Collected, "01";
    Follow::Detached => Follow::Detached, "02";
}}

golden! { end_states: EndState {
    EndState::Exited(_) => EndState::Exited(255), "00fe03";
    EndState::Signalled(_) => EndState::Signalled(9), "0112";
    EndState::TimedOut => EndState::TimedOut, "02";
    EndState::Cancelled => EndState::Cancelled, "03";
    EndState::SpawnFailed(_) => EndState::SpawnFailed(failure()), "0404026e6f02646f";
    EndState::Lost => EndState::Lost, "05";
}}

golden! { frames_of_a_host_on_an_attached_stream: FromHost {
    FromHost::Stdout(_) => FromHost::Stdout(b"out".to_vec()), "00036f7574";
    FromHost::Stderr(_) => FromHost::Stderr(b"err".to_vec()), "0103657272";
    FromHost::StdinTaken(_) => FromHost::StdinTaken(300), "02ac02";
    FromHost::StdinClosed => FromHost::StdinClosed, "03";
    FromHost::End(_) => FromHost::End(JobEnd { state: EndState::TimedOut, duration: Duration::from_nanos(1) }),
        "04020001";
    FromHost::Pause => FromHost::Pause, "05";
}}

golden! { frames_of_a_caller_on_an_attached_stream: FromCaller {
    FromCaller::Stdin(_) => FromCaller::Stdin(b"in".to_vec()), "0002696e";
    FromCaller::StdinEnd => FromCaller::StdinEnd, "01";
    FromCaller::Taken { .. } => FromCaller::Taken { stdout: 300, stderr: 1 }, "02ac0201";
    FromCaller::Signal(_) => FromCaller::Signal(JobSignal::Terminate), "0301";
}}

golden! { signals: JobSignal {
    JobSignal::Interrupt => JobSignal::Interrupt, "00";
    JobSignal::Terminate => JobSignal::Terminate, "01";
    JobSignal::BrokenPipe => JobSignal::BrokenPipe, "02";
}}

golden! { routes: Route {
    Route::Auto => Route::Auto, "00";
    Route::RelayedOnly => Route::RelayedOnly, "01";
}}

golden! { kinds_of_candidate: CandidateKind {
    CandidateKind::Host => CandidateKind::Host, "00";
    CandidateKind::ServerReflexive => CandidateKind::ServerReflexive, "01";
    CandidateKind::PeerReflexive => CandidateKind::PeerReflexive, "02";
    CandidateKind::Mapped => CandidateKind::Mapped, "03";
}}

golden! { wishes_for_a_path: PathWish {
    PathWish::Auto => PathWish::Auto, "00";
    PathWish::Direct => PathWish::Direct, "01";
    PathWish::Relayed => PathWish::Relayed, "02";
}}

golden! { paths: PathNow {
    PathNow::Direct => PathNow::Direct, "00";
    PathNow::Relayed => PathNow::Relayed, "01";
}}

golden! { frames_of_a_receiver_on_a_pulling_stream: RangeRequest {
    RangeRequest::Range(_) => RangeRequest::Range(300), "00ac02";
    RangeRequest::Sha256 => RangeRequest::Sha256, "01";
}}

golden! { frames_of_a_source_on_a_pulling_stream: RangeReply {
    RangeReply::Range { .. } => RangeReply::Range { index: 300, len: 1_048_576, blake3: [7; 32] },
        "00ac028080400707070707070707070707070707070707070707070707070707070707070707";
    RangeReply::Sha256(_) => RangeReply::Sha256([8; 32]),
        "010808080808080808080808080808080808080808080808080808080808080808";
    RangeReply::Failed(_) => RangeReply::Failed(failure()), "0204026e6f02646f";
    RangeReply::Hashing(_) => RangeReply::Hashing(300), "03ac02";
}}

golden! { frames_of_progress: Progress {
    Progress::Moved { .. } => Progress::Moved { bytes: 300, total: 400, resumed: 100, path: PathNow::Relayed },
        "00ac0290036401";
    Progress::Verifying => Progress::Verifying, "01";
    Progress::Done { .. } => Progress::Done {
        bytes: 400,
        resumed: 100,
        sha256: [8; 32],
        path: PathNow::Direct,
        destination: b"/b".to_vec(),
    }, "02900364080808080808080808080808080808080808080808080808080808080808080800022f62";
    Progress::Failed(_) => Progress::Failed(failure()), "0304026e6f02646f";
}}

golden! { modes: Mode {
    Mode::Disabled => Mode::Disabled, "00";
    Mode::Plan => Mode::Plan, "01";
    Mode::Edit => Mode::Edit, "02";
    Mode::Bypass => Mode::Bypass, "03";
}}

golden! { services: Service {
    Service::Exec => Service::Exec, "00";
    Service::Transfer => Service::Transfer, "01";
}}

#[test]
fn a_presence_before_it_is_sealed() {
    check(
        &presence(),
        "057765622d310201610162056c696e7578067838365f363405302e312e300202000109090909090909090909090909090909",
    );
}

#[test]
fn a_sealed_presence() {
    let keys = RoomKeys::derive(&generated_token(), "dev");
    let sealed = PresenceSealer::new(&keys, peer(), instance()).seal(&presence());
    assert_eq!(
        HEXLOWER.encode(&sealed),
        concat!(
            "0000000000000001728d12cda649d06162ac72582435720e77db259bfe49d5ab62ad8dc2e48233bb5170cc9e652b7f6f",
            "74b3a2adc46ab3bf8d3c2b952c068d78aae6a9960b7987287a5b"
        )
    );
    assert_eq!(PresenceOpener::new(&keys).open(peer(), instance(), &sealed), Ok(presence()));
}

#[test]
fn the_keys_of_a_room() {
    let generated = RoomKeys::derive(&generated_token(), "dev");
    let chosen = RoomKeys::derive(&Token::parse("correct horse battery staple").unwrap(), "dev");
    for (keys, hex) in [
        (
            generated,
            [
                "13d9b0a17dd1779a66aa219c1b6ed782cd8ed566d1cd178fa6e28a43849a7680",
                "c94384743274e44951f61095f55e0f957f2e941281485228c6532fd5343aea57",
                "177ce0b507f25d69815e7390491aeb61722e93fa28aafbd6f82051a275d0aa8a",
                "0fb384b54f139da8ecde2c6da4172e18756c1809403b912be14047933e05c8c5",
            ],
        ),
        (
            chosen,
            [
                "6054fa898f0a002d7c7f8ae3961a87167d77b89a3a6c0f1c29696b00860500e1",
                "fcb6cf7f83064e3efdf9348cb857a26b2dac343de034933016ff8319bed92f0c",
                "02e386525f8b273da604187744646daf81692088554a231f63d8129767a49141",
                "39402b79f279c484abf12c015f503443548c8cb77bf7e215acfd65dda70e8dd0",
            ],
        ),
    ] {
        let room = keys.room();
        let derived = [room.as_bytes(), keys.admission_public(), keys.presence(), keys.psk()];
        assert_eq!(derived.map(|key| HEXLOWER.encode(key)), hex);
    }
}

#[test]
fn the_proofs_of_a_join() {
    let keys = RoomKeys::derive(&generated_token(), "dev");
    let ephemeral = PublicKey::from(&StaticSecret::from([3; 32])).to_bytes();
    let challenge = Challenge { ephemeral, nonce: [2; 32] };
    let join = admission::join(&challenge, &keys, &StaticSecret::from([7; 32]), instance(), vec![0xAA]).unwrap();
    assert_eq!(HEXLOWER.encode(&join.room_proof), "af9593ef7b1cc6bffbf62972e2f101a53e8f10064dcd85e2081b5305e549b7a1");
    assert_eq!(
        HEXLOWER.encode(&join.identity_proof),
        "831bb64d1923e103486fe97cbbec1a38d6a844e7d301207167c84f308f376334"
    );
}

fn generated_token() -> Token {
    Token::parse(TOKEN).expect("a generated token")
}

const TOKEN: &str = "pft1-rcw2ffil3spofwgizszn4i77ierupgdbafjecmassleezga6lwx5r6aqby";

fn challenge() -> Challenge {
    Challenge { ephemeral: [1; 32], nonce: [2; 32] }
}

fn join() -> Join {
    Join {
        admission: [1; 32],
        peer: peer(),
        instance: instance(),
        room_proof: [3; 32],
        identity_proof: [4; 32],
        presence: vec![0xAA, 0xBB],
    }
}

fn member() -> Member {
    Member { slot: Slot(300), peer: peer(), instance: instance(), presence: vec![0xAA, 0xBB] }
}

fn presence() -> Presence {
    Presence {
        name: "web-1".into(),
        tags: vec!["a".into(), "b".into()],
        os: "linux".into(),
        arch: "x86_64".into(),
        version: "0.1.0".into(),
        mode: Mode::Edit,
        services: vec![Service::Exec, Service::Transfer],
        epoch: Epoch([9; 16]),
    }
}

fn file() -> FileInfo {
    FileInfo { name: b"a".to_vec(), size: 1 << 30, mode: 0o644, mtime_s: -1, mtime_ns: 999_999_999 }
}

fn failure() -> Failure {
    Failure::new(FailureKind::Os, "no", "do")
}

fn candidates() -> Vec<Candidate> {
    let ipv6 = SocketAddr::from(([0x2001, 0xDB8, 0, 0, 0, 0, 0, 1], 443));
    vec![
        Candidate { kind: CandidateKind::Host, addr: ipv4() },
        Candidate { kind: CandidateKind::ServerReflexive, addr: ipv6 },
    ]
}

fn ipv4() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], 8080))
}

fn peer() -> PeerId {
    PeerId::from_bytes([0x11; 32])
}

fn instance() -> InstanceId {
    InstanceId::from_bytes([0x22; 16])
}

fn numbering() -> Numbering {
    Numbering { number: 300, settled: 7, born: Epoch([9; 16]) }
}

fn request_id() -> RequestId {
    RequestId::from_bytes([0x33; 16])
}

fn job_id() -> JobId {
    JobId::from_bytes([0x44; 16])
}

fn ticket() -> Ticket {
    Ticket::from_bytes([0x55; 16])
}
