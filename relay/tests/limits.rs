//! Every bound, what happens at it, and that it is counted. Each reason of the two closed lists is brought about here:
//! a new reason does not compile until somebody says how it comes to be.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::wildcard_enum_match_arm, reason = "two functions share the variants between them")]

mod common;

use std::{net::SocketAddr, time::Duration};

use common::{Entropy, TestPeer, TestRelay, config, get, random, room, soon};
use futures_util::SinkExt;
use peerfleet_proto::{
    id::Slot,
    limits::{MAX_FRAME_BYTES, MAX_PRESENCE_BYTES},
    token::RoomKeys,
    wire::relay::{ClosingReason, PeerToRelay, RefusalReason, RelayFrame, RelayToPeer, Welcome, datagram, message},
};
use peerfleet_relay::{
    Config,
    limits::{LOBBY, Limits},
    metrics::{CloseReason, DropReason},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};
use x25519_dalek::StaticSecret;

/// What a test waits for when it waits for a limit.
const SHORT: Duration = Duration::from_millis(150);

/// The largest message and its cost in a queue do not fit in twice.
const LARGE: usize = 60_000;

fn tight() -> Config {
    let default = config();
    let one_frame = MAX_FRAME_BYTES + 1000;
    let queues = peerfleet_relay::queue::QueueLimits { messages: one_frame, datagrams: one_frame, ..default.queues };
    Config { queues, ..default }
}

/// Joins with a socket that takes little, and never reads again.
async fn join_and_read_no_more(address: SocketAddr, keys: &RoomKeys) -> (TestPeer, Welcome) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let ws = TestPeer::upgrade(socket.connect(address).await.unwrap()).await;
    let mut peer = TestPeer { ws, challenge: TestPeer::connect(address).await.challenge };
    let RelayToPeer::Challenge(challenge) = peer.word().await else { panic!("the relay speaks first") };
    peer.challenge = challenge;
    let join = peer.answer(keys, &StaticSecret::from(random()), Vec::new());
    peer.say(&PeerToRelay::Join(join)).await;
    let RelayToPeer::Welcome(welcome) = peer.word().await else { panic!("welcomed") };
    (peer, welcome)
}

/// Sends frames to who does not read, until the counter of this reason moves.
async fn flood(relay: &TestRelay, keys: &RoomKeys, frame: impl Fn(Slot) -> bytes::Bytes, until: DropReason) {
    let (deaf, to) = join_and_read_no_more(relay.address, keys).await;
    let (mut sender, _, _) = TestPeer::join(relay.address, keys).await;
    soon(async {
        while relay.handle.stats().dropped(until) == 0 {
            sender.send(frame(to.slot)).await;
        }
    })
    .await;
    drop(deaf);
}

/// Fills the queue of one who does not read, of messages and datagrams alike.
async fn fill(relay: &TestRelay, keys: &RoomKeys) -> TestPeer {
    let (deaf, to) = join_and_read_no_more(relay.address, keys).await;
    let (mut sender, _, _) = TestPeer::join(relay.address, keys).await;
    soon(async {
        while relay.handle.health().queued_bytes < LARGE {
            sender.send(message(to.slot, 0, &[0; LARGE])).await;
        }
    })
    .await;
    deaf
}

async fn drop_for(reason: DropReason) {
    let keys = room();
    let to_deaf_message = |to| message(to, 0, &[0; LARGE]);
    let to_deaf_datagram = |to| datagram(to, 0, 1200, &[0; LARGE]);
    let small_room = Config { room_bytes: MAX_FRAME_BYTES + 1000, ..config() };
    let small_relay = Config { relay_bytes: MAX_FRAME_BYTES + 1000, ..config() };
    let relay = match reason {
        DropReason::MessageQueueFull | DropReason::DatagramQueueFull => TestRelay::start(tight()),
        DropReason::MessageRoomFull | DropReason::DatagramRoomFull => TestRelay::start(small_room),
        DropReason::MessageRelayFull | DropReason::DatagramRelayFull => TestRelay::start(small_relay),
        DropReason::MessageGone
        | DropReason::DatagramGone
        | DropReason::StunTooShort
        | DropReason::StunTooMany
        | DropReason::StunUnreadable => TestRelay::start(config()),
    };
    match reason {
        DropReason::MessageGone => {
            TestPeer::join(relay.address, &keys).await.0.message(Slot(9), 0, b"").await;
        }
        DropReason::DatagramGone => {
            TestPeer::join(relay.address, &keys).await.0.send(datagram(Slot(9), 0, 1200, b"")).await;
        }
        DropReason::MessageQueueFull => flood(&relay, &keys, to_deaf_message, reason).await,
        DropReason::DatagramQueueFull => flood(&relay, &keys, to_deaf_datagram, reason).await,
        DropReason::MessageRoomFull | DropReason::MessageRelayFull => {
            flood(&relay, &keys, to_deaf_message, reason).await;
        }
        DropReason::DatagramRoomFull | DropReason::DatagramRelayFull => {
            let _full = fill(&relay, &keys).await;
            flood(&relay, &keys, to_deaf_datagram, reason).await;
        }
        DropReason::StunTooShort => ask_stun(relay.address, &binding_request(0), 1).await,
        DropReason::StunTooMany => ask_stun(relay.address, &binding_request(40), 2000).await,
        DropReason::StunUnreadable => ask_stun(relay.address, b"hello", 1).await,
    }
    relay.until(|stats| stats.dropped(reason) > 0).await;
}

#[tokio::test]
async fn every_drop_reason_is_counted_when_it_happens() {
    for reason in DropReason::ALL {
        drop_for(*reason).await;
    }
}

/// A binding request with an attribute of so many bytes that nobody has to understand (RFC 8489 §14).
fn binding_request(padding: u16) -> Vec<u8> {
    let mut request = vec![0, 1, 0, 0, 0x21, 0x12, 0xA4, 0x42];
    request.extend(random::<12>());
    if padding > 0 {
        request.extend([0x80, 0x22]);
        request.extend(padding.to_be_bytes());
        request.extend(vec![b'x'; padding.into()]);
    }
    let len = u16::try_from(request.len() - 20).unwrap();
    request[2..4].copy_from_slice(&len.to_be_bytes());
    request
}

async fn ask_stun(address: SocketAddr, packet: &[u8], times: usize) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for _ in 0..times {
        socket.send_to(packet, address).await.unwrap();
    }
}

#[tokio::test]
async fn stun_answers_on_the_same_port_with_the_address_of_who_asks() {
    let relay = TestRelay::start(config());
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(relay.address).await.unwrap();
    let request = binding_request(40);
    socket.send(&request).await.unwrap();
    let mut response = [0; 200];
    let len = soon(socket.recv(&mut response)).await.unwrap();
    assert!(len <= request.len());
    assert_eq!(response[8..20], request[8..20], "the transaction is the same");
    // XOR-MAPPED-ADDRESS of IPv4 is the first attribute: port at 26, xored with the cookie's first half.
    let port = u16::from_be_bytes([response[26], response[27]]) ^ 0x2112;
    assert_eq!(port, socket.local_addr().unwrap().port());
    relay.until(|stats| stats.stun_answered == 1).await;
}

/// The port that a responder sees this socket under.
async fn seen_by(responder: SocketAddr, socket: &UdpSocket) -> u16 {
    socket.send_to(&binding_request(40), responder).await.unwrap();
    let mut response = [0; 200];
    let (len, from) = soon(socket.recv_from(&mut response)).await.unwrap();
    assert_eq!((from, len), (responder, 40));
    u16::from_be_bytes([response[26], response[27]]) ^ 0x2112
}

#[tokio::test]
async fn stun_answers_on_the_second_port_that_the_welcome_names() {
    let relay = TestRelay::start(config());
    let (_peer, welcome, _) = TestPeer::join(relay.address, &room()).await;
    let second = SocketAddr::new(relay.address.ip(), welcome.stun_alternate.unwrap());
    assert_ne!(second, relay.address);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = socket.local_addr().unwrap().port();
    assert_eq!((seen_by(relay.address, &socket).await, seen_by(second, &socket).await), (port, port));
    relay.until(|stats| stats.stun_answered == 2).await;
    ask_stun(second, &binding_request(0), 1).await;
    relay.until(|stats| stats.dropped(DropReason::StunTooShort) == 1).await;
}

/// A padded binding request with a CHANGE-REQUEST of these bits.
fn change_request(bits: u8) -> Vec<u8> {
    let mut request = binding_request(40);
    request.splice(20..20, [0, 3, 0, 4, 0, 0, 0, bits]);
    let len = u16::try_from(request.len() - 20).unwrap();
    request[2..4].copy_from_slice(&len.to_be_bytes());
    request
}

#[tokio::test]
async fn who_asks_for_the_other_port_is_answered_from_it_and_nobody_else_is() {
    let relay = TestRelay::start(config());
    let (_peer, welcome, _) = TestPeer::join(relay.address, &room()).await;
    let second = SocketAddr::new(relay.address.ip(), welcome.stun_alternate.unwrap());
    let (asking, bystander) =
        (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let mut response = [0; 200];
    for (asked, answers) in [(relay.address, second), (second, relay.address)] {
        let request = change_request(0b010);
        asking.send_to(&request, asked).await.unwrap();
        let (len, from) = soon(asking.recv_from(&mut response)).await.unwrap();
        assert_eq!((from, &response[..2]), (answers, &[1, 1][..]), "a success from the other port");
        assert!(len <= request.len());
        // XOR-MAPPED-ADDRESS, as in any answer.
        let port = u16::from_be_bytes([response[26], response[27]]) ^ 0x2112;
        assert_eq!(port, asking.local_addr().unwrap().port());
    }
    // One answer for each request, and all of them to who asked.
    relay.until(|stats| stats.stun_answered == 2).await;
    assert!(asking.try_recv(&mut response).is_err() && bystander.try_recv(&mut response).is_err());
}

#[tokio::test]
async fn who_asks_for_another_address_is_refused_from_where_it_asked() {
    let relay = TestRelay::start(config());
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for bits in [0b100, 0b110] {
        let request = change_request(bits);
        socket.send_to(&request, relay.address).await.unwrap();
        let mut response = [0; 200];
        let (len, from) = soon(socket.recv_from(&mut response)).await.unwrap();
        assert_eq!((from, &response[..2]), (relay.address, &[1, 0x11][..]), "an error");
        assert!(len <= request.len());
    }
}

#[tokio::test]
async fn requests_for_the_other_port_count_against_the_same_pace() {
    let relay = TestRelay::start(config());
    ask_stun(relay.address, &change_request(0b010), 2000).await;
    relay.until(|stats| stats.dropped(DropReason::StunTooMany) > 0).await;
}

#[tokio::test]
async fn no_second_port_is_named_where_stun_is_not_answered() {
    let relay = TestRelay::start(Config { stun: false, ..config() });
    let (_peer, welcome, _) = TestPeer::join(relay.address, &room()).await;
    assert_eq!((welcome.stun, welcome.stun_alternate), (None, None));
}

#[tokio::test]
async fn sender_is_told_which_message_a_full_queue_refused() {
    let relay = TestRelay::start(tight());
    let keys = room();
    let (_deaf, to) = join_and_read_no_more(relay.address, &keys).await;
    let (mut sender, _, _) = TestPeer::join(relay.address, &keys).await;
    let refused = soon(async {
        for tag in 0.. {
            sender.message(to.slot, tag, &[0; LARGE]).await;
            if relay.handle.stats().dropped(DropReason::MessageQueueFull) > 0 {
                break;
            }
        }
        sender.word().await
    });
    let RelayToPeer::Refused(refused) = refused.await else { panic!("refused") };
    assert_eq!((refused.slot, refused.reason), (to.slot, RefusalReason::QueueFull));
    assert!(refused.tag > 0, "the first still found room");
}

#[tokio::test]
async fn messages_overtake_datagrams_that_wait() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut deaf, to) = join_and_read_no_more(relay.address, &keys).await;
    let (mut sender, _, _) = TestPeer::join(relay.address, &keys).await;
    soon(async {
        while relay.handle.stats().dropped(DropReason::DatagramQueueFull) == 0 {
            sender.send(datagram(to.slot, 0, 1200, &[0; LARGE])).await;
        }
    })
    .await;
    let sent = relay.handle.stats();
    sender.message(to.slot, 0, b"urgent").await;
    relay.until(|stats| stats.messages == 1).await;
    let mut before = 0;
    loop {
        match deaf.frame().await.unwrap() {
            RelayFrame::Message { .. } => break,
            RelayFrame::Datagram(_) => before += 1,
            RelayFrame::Control(_) | RelayFrame::MulticastShare { .. } => {}
        }
    }
    let kept = sent.datagrams - sent.dropped(DropReason::DatagramQueueFull);
    assert!(before < kept, "{before} of {kept} datagrams came before the message");
}

/// Brings one connection to end for this reason; `None` if that needs no peer that is told.
async fn close_for(reason: CloseReason) {
    let default = config();
    let limits = default.limits;
    let config = match reason {
        CloseReason::RequestTimeout | CloseReason::JoinTimeout => Config { join_timeout: SHORT, ..default },
        CloseReason::Idle => Config { idle_timeout: SHORT, ..default },
        CloseReason::SlowReader => Config { write_timeout: SHORT, ..default },
        CloseReason::RoomFull => Config { peers_per_room: 1, ..default },
        CloseReason::AddressLimit => Config { limits: Limits { per_address: 1, ..limits }, ..default },
        CloseReason::RelayFull | CloseReason::TurnedAway => {
            Config { limits: Limits { connections: 1, ..limits }, ..default }
        }
        CloseReason::Left
        | CloseReason::Lost
        | CloseReason::Answered
        | CloseReason::BadRequest
        | CloseReason::BadProof
        | CloseReason::Malformed
        | CloseReason::OutOfTurn
        | CloseReason::ShuttingDown => default,
    };
    let relay = TestRelay::start(config);
    if reason.told().is_some() {
        tell(reason, &relay).await;
    } else {
        end(reason, &relay).await;
    }
    relay.until(|stats| stats.closed(reason) > 0).await;
}

/// Those that the peer is not told of.
async fn end(reason: CloseReason, relay: &TestRelay) {
    let keys = room();
    match reason {
        CloseReason::Left => TestPeer::join(relay.address, &keys).await.0.ws.close(None).await.unwrap(),
        CloseReason::Lost => drop(TestPeer::join(relay.address, &keys).await),
        CloseReason::Answered => drop(get(relay.address, "/health").await),
        CloseReason::BadRequest => {
            let response = get(relay.address, "/secrets").await;
            assert!(response.starts_with("HTTP/1.1 404 ") && response.contains("/health"), "{response}");
        }
        CloseReason::RequestTimeout => {
            let mut silent = TcpStream::connect(relay.address).await.unwrap();
            assert_eq!(soon(silent.read(&mut [0; 1])).await.unwrap(), 0);
        }
        CloseReason::TurnedAway => {
            let _only = TestPeer::join(relay.address, &keys).await;
            let mut waiting = Vec::new();
            for _ in 0..=LOBBY {
                waiting.push(TcpStream::connect(relay.address).await.unwrap());
            }
            relay.until(|stats| stats.closed(reason) > 0).await;
        }
        told => panic!("a peer is told of {told}"),
    }
}

/// Those that the peer is told of, before it is closed upon.
async fn tell(reason: CloseReason, relay: &TestRelay) {
    let keys = room();
    let told = match reason {
        CloseReason::BadProof => {
            let mut peer = TestPeer::connect(relay.address).await;
            let mut join = peer.answer(&keys, &StaticSecret::from(random()), Vec::new());
            join.room_proof[0] ^= 1;
            peer.say(&PeerToRelay::Join(join)).await;
            peer.closing().await
        }
        CloseReason::JoinTimeout => TestPeer::connect(relay.address).await.closing().await,
        CloseReason::RoomFull => {
            let _only = TestPeer::join(relay.address, &keys).await;
            let mut second = TestPeer::connect(relay.address).await;
            let join = second.answer(&keys, &StaticSecret::from(random()), Vec::new());
            second.say(&PeerToRelay::Join(join)).await;
            second.closing().await
        }
        CloseReason::AddressLimit | CloseReason::RelayFull => {
            let _only = TestPeer::join(relay.address, &keys).await;
            let health = get(relay.address, "/health").await;
            assert!(health.starts_with("HTTP/1.1 200 "), "a full relay still tells how it is: {health}");
            let ws = TestPeer::upgrade(TcpStream::connect(relay.address).await.unwrap()).await;
            next_closing(ws).await
        }
        CloseReason::Malformed => {
            let mut peer = TestPeer::join(relay.address, &keys).await.0;
            peer.send(b"\xffnonsense"[..].into()).await;
            peer.closing().await
        }
        CloseReason::OutOfTurn => {
            let mut peer = TestPeer::connect(relay.address).await;
            peer.message(Slot(0), 0, b"not yet").await;
            peer.closing().await
        }
        CloseReason::Idle => TestPeer::join(relay.address, &keys).await.0.closing().await,
        CloseReason::SlowReader => {
            flood(relay, &keys, |to| message(to, 0, &[0; LARGE]), DropReason::MessageGone).await;
            return;
        }
        CloseReason::ShuttingDown => {
            let mut peer = TestPeer::join(relay.address, &keys).await.0;
            relay.handle.shutdown();
            peer.closing().await
        }
        untold => panic!("no peer is told of {untold}"),
    };
    assert_eq!(CloseReason::from(told), reason);
}

async fn next_closing(ws: WebSocketStream<TcpStream>) -> ClosingReason {
    let challenge = peerfleet_proto::admission::Admission::new(&mut Entropy).1;
    TestPeer { ws, challenge }.closing().await
}

#[tokio::test]
async fn every_close_reason_is_counted_when_it_happens_and_the_peer_is_told() {
    for reason in CloseReason::ALL {
        close_for(*reason).await;
    }
}

#[tokio::test]
async fn ping_keeps_a_silent_peer_alive() {
    let relay = TestRelay::start(Config { idle_timeout: SHORT, ..config() });
    let (mut peer, welcome, _) = TestPeer::join(relay.address, &room()).await;
    assert_eq!(u128::from(welcome.idle_timeout_ms), SHORT.as_millis());
    let start = tokio::time::Instant::now();
    while start.elapsed() < SHORT * 3 {
        soon(peer.ws.send(Message::Ping(Vec::new().into()))).await.unwrap();
        tokio::time::sleep(SHORT / 4).await;
    }
    peer.message(welcome.slot, 0, b"still here").await;
    assert_eq!(peer.sealed().await.1, &b"still here"[..]);
}

#[tokio::test]
async fn presence_over_its_limit_is_malformed_before_and_after_joining() {
    let relay = TestRelay::start(config());
    let mut peer = TestPeer::connect(relay.address).await;
    let join = peer.answer(&room(), &StaticSecret::from(random()), vec![0; MAX_PRESENCE_BYTES + 1]);
    peer.say(&PeerToRelay::Join(join)).await;
    assert_eq!(peer.closing().await, ClosingReason::Malformed);
    let (mut member, _, _) = TestPeer::join(relay.address, &room()).await;
    member.say(&PeerToRelay::Presence(vec![0; MAX_PRESENCE_BYTES + 1])).await;
    assert_eq!(member.closing().await, ClosingReason::Malformed);
}

#[tokio::test]
async fn address_that_connects_too_fast_is_told_to_wait() {
    let default = config();
    let relay = TestRelay::start(Config { limits: Limits { per_address_rate: 1, ..default.limits }, ..default });
    let first = TestPeer::connect(relay.address).await;
    let mut reason = None;
    for _ in 0..3 {
        let ws = TestPeer::upgrade(TcpStream::connect(relay.address).await.unwrap()).await;
        let mut peer = TestPeer { ws, challenge: first.challenge };
        if let RelayToPeer::Closing(closing) = peer.word().await {
            reason = Some(closing);
        }
    }
    assert_eq!(reason, Some(ClosingReason::AddressLimit));
}

#[tokio::test]
async fn what_is_not_http_is_refused_in_words() {
    let relay = TestRelay::start(config());
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc").await.unwrap();
    let mut response = String::new();
    soon(stream.read_to_string(&mut response)).await.unwrap();
    assert!(response.starts_with("HTTP/1.1 400 Bad Request"), "{response}");
}
