//! What reaches whom, over real sockets.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{PATIENCE, TestPeer, TestRelay, config, get, random, room, soon};
use peerfleet_proto::{
    id::{PeerId, Slot},
    limits::{MAX_FRAME_BYTES, MAX_PRESENCE_BYTES},
    wire::relay::{
        Datagram, PeerToRelay, RefusalReason, Refused, RelayFrame, RelayToPeer, datagram, message, multicast,
    },
};
use peerfleet_relay::{Config, Health};
use x25519_dalek::{PublicKey, StaticSecret};

#[tokio::test]
async fn message_reaches_the_slot_it_names_and_bears_the_slot_it_came_from() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, welcome_one, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, welcome_two, _) = TestPeer::join(relay.address, &keys).await;
    let (mut three, _, _) = TestPeer::join(relay.address, &keys).await;
    one.message(welcome_two.slot, 5, b"to two").await;
    assert_eq!(two.sealed().await, (welcome_one.slot, b"to two"[..].into()));
    two.message(welcome_one.slot, 6, b"to one").await;
    assert_eq!(one.sealed().await, (welcome_two.slot, b"to one"[..].into()));
    one.message(Slot(2), 7, b"to three").await;
    assert_eq!(three.sealed().await.1, &b"to three"[..], "nothing that was for others came before");
}

#[tokio::test]
async fn frames_of_every_size_arrive_whole_and_in_order() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, to, _) = TestPeer::join(relay.address, &keys).await;
    let sizes = [0, 1, 100, 116, 117, 1000, 1024, 4096, 60_000, 65_526, 65_527, MAX_FRAME_BYTES - 9];
    let sending = async {
        for round in 0..20_u8 {
            for size in sizes {
                one.message(to.slot, 0, &vec![round; size]).await;
            }
            // All of a round fit into the queue together, so nothing is refused.
            for size in sizes {
                two.sealed_len(round, size).await;
            }
        }
    };
    soon(sending).await;
}

#[tokio::test]
async fn datagram_keeps_its_lane_and_segment() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, from, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, to, _) = TestPeer::join(relay.address, &keys).await;
    one.send(datagram(to.slot, 1, 1200, &[9; 3000])).await;
    let expected = Datagram { slot: from.slot, lane: 1, segment: 1200, packets: vec![9; 3000].into() };
    assert_eq!(two.frame().await, Some(RelayFrame::Datagram(expected)));
}

#[tokio::test]
async fn each_recipient_of_a_multicast_gets_its_own_part_and_the_shared_one() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, from, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, to_two, _) = TestPeer::join(relay.address, &keys).await;
    let (mut three, to_three, _) = TestPeer::join(relay.address, &keys).await;
    let parts = [(to_two.slot, &b"2"[..]), (Slot(77), b"nobody"), (to_three.slot, b"3")];
    assert!(matches!(one.word().await, RelayToPeer::Joined(_)));
    assert!(matches!(one.word().await, RelayToPeer::Joined(_)));
    one.send(multicast(4, parts.into_iter(), b"all")).await;
    assert!(matches!(two.word().await, RelayToPeer::Joined(_)));
    for (peer, part) in [(&mut two, &b"2"[..]), (&mut three, b"3")] {
        let expected = RelayFrame::MulticastShare { from: from.slot, part: part.into(), shared: b"all"[..].into() };
        assert_eq!(peer.frame().await, Some(expected));
    }
    let refused = Refused { slot: Slot(77), tag: 4, reason: RefusalReason::Gone };
    assert_eq!(one.word().await, RelayToPeer::Refused(refused));
}

#[tokio::test]
async fn message_to_who_has_left_is_refused() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, gone, _) = TestPeer::join(relay.address, &keys).await;
    assert!(matches!(one.word().await, RelayToPeer::Joined(_)));
    one.message(gone.slot, 1, b"while it is here").await;
    two.sealed().await;
    drop(two);
    assert_eq!(one.word().await, RelayToPeer::Left(gone.slot));
    one.message(gone.slot, 2, b"too late").await;
    let refused = Refused { slot: gone.slot, tag: 2, reason: RefusalReason::Gone };
    assert_eq!(one.word().await, RelayToPeer::Refused(refused));
}

#[tokio::test]
async fn newcomer_learns_everybody_and_everybody_learns_the_newcomer() {
    let relay = TestRelay::start(config());
    let keys = room();
    let mut peers = Vec::new();
    for count in 0..20_u8 {
        let presence = vec![count; MAX_PRESENCE_BYTES];
        let joined = TestPeer::join_as(relay.address, &keys, &StaticSecret::from(random()), presence.clone()).await;
        let (peer, welcome, others) = joined;
        assert_eq!(others.len(), usize::from(count));
        assert!(others.iter().zip(0..).all(|(other, number)| other.presence == vec![number; MAX_PRESENCE_BYTES]));
        for earlier in &mut peers {
            let RelayToPeer::Joined(member) = TestPeer::word(earlier).await else { panic!("told of the newcomer") };
            assert_eq!((member.slot, &member.presence), (welcome.slot, &presence));
        }
        peers.push(peer);
    }
}

#[tokio::test]
async fn newest_presence_is_told_and_newcomers_see_it() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut one, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, welcome, _) = TestPeer::join(relay.address, &keys).await;
    assert!(matches!(one.word().await, RelayToPeer::Joined(_)));
    for number in 0..50_u8 {
        two.say(&PeerToRelay::Presence(vec![number; 30])).await;
    }
    let mut told = 0;
    loop {
        let RelayToPeer::Presence { slot, sealed } = one.word().await else { panic!("told of a presence") };
        assert_eq!(slot, welcome.slot);
        told += 1;
        if sealed == [49; 30] {
            break;
        }
    }
    assert!(told < 10, "a burst of presences is told as few: {told}");
    let (_, _, others) = TestPeer::join(relay.address, &keys).await;
    assert_eq!(others[1].presence, [49; 30]);
}

#[tokio::test]
async fn room_of_the_same_name_with_another_token_is_another_room() {
    let relay = TestRelay::start(config());
    let (mut one, first, _) = TestPeer::join(relay.address, &room()).await;
    let (mut other, second, others) = TestPeer::join(relay.address, &room()).await;
    assert!(others.is_empty());
    assert_eq!(first.slot, second.slot, "slots are a room's own");
    other.message(Slot(1), 3, b"is anybody there?").await;
    let refused = Refused { slot: Slot(1), tag: 3, reason: RefusalReason::Gone };
    assert_eq!(other.word().await, RelayToPeer::Refused(refused));
    one.message(first.slot, 0, b"to myself").await;
    assert_eq!(one.sealed().await.1, &b"to myself"[..], "nothing came before it");
    assert_eq!(relay.handle.health().rooms, 2);
}

#[tokio::test]
async fn second_instance_of_an_identity_evicts_nobody() {
    let relay = TestRelay::start(config());
    let keys = room();
    let identity = StaticSecret::from(random());
    let (mut first, from, _) = TestPeer::join_as(relay.address, &keys, &identity, Vec::new()).await;
    let (mut second, to, others) = TestPeer::join_as(relay.address, &keys, &identity, Vec::new()).await;
    assert_eq!(others[0].peer, PeerId::from_bytes(PublicKey::from(&identity).to_bytes()));
    first.message(to.slot, 0, b"still here").await;
    assert_eq!(second.sealed().await, (from.slot, b"still here"[..].into()));
}

#[tokio::test]
async fn ipv6_is_served_beside_ipv4() {
    let bind = ["127.0.0.1:0", "[::1]:0"].map(|address| address.parse().unwrap()).to_vec();
    let relay = peerfleet_relay::Relay::bind(Config { bind, ..config() }).unwrap();
    let addresses = relay.local_addrs().to_vec();
    let running = tokio::spawn(relay.run());
    let keys = room();
    let (_one, by_ipv4, _) = TestPeer::join(addresses[0], &keys).await;
    let (_two, by_ipv6, others) = TestPeer::join(addresses[1], &keys).await;
    assert!(by_ipv4.observed.is_ipv4() && by_ipv6.observed.is_ipv6());
    assert_eq!(others.len(), 1);
    running.abort();
}

#[tokio::test]
async fn unspecified_ipv6_address_serves_ipv4_as_well_unless_ipv4_is_named_too() {
    let relay = TestRelay::start(Config { bind: vec!["[::]:0".parse().unwrap()], ..config() });
    let by_ipv4 = std::net::SocketAddr::from(([127, 0, 0, 1], relay.address.port()));
    let (_peer, welcome, _) = TestPeer::join(by_ipv4, &room()).await;
    assert_eq!(welcome.observed.ip(), by_ipv4.ip(), "told as the IPv4 address it is");
    drop(relay);
    // A port that was free a moment ago; should somebody else have it by now, another one will do.
    let side_by_side = (0..20).any(|_| {
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let bind = vec![([0, 0, 0, 0], port).into(), ([0_u16; 8], port).into()];
        peerfleet_relay::Relay::bind(Config { bind, ..config() }).is_ok()
    });
    assert!(side_by_side);
}

#[tokio::test]
async fn health_counts_rooms_and_peers_and_tells_no_id() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (_one, _, _) = TestPeer::join(relay.address, &keys).await;
    let (_two, _, members) = TestPeer::join(relay.address, &keys).await;
    let response = get(relay.address, "/health").await;
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    let health: Health = serde_json::from_str(body).unwrap();
    assert_eq!((health.status.as_str(), health.rooms, health.peers), ("ok", 1, 2));
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
    for secret in [keys.room().to_string(), members[0].peer.to_string(), "127.0.0.1".to_owned()] {
        assert!(!body.contains(&secret), "{body}");
    }
}

#[tokio::test]
async fn empty_room_is_forgotten() {
    let relay = TestRelay::start(config());
    let (one, _, _) = TestPeer::join(relay.address, &room()).await;
    drop(one);
    relay.until(|stats| stats.closed.values().sum::<u64>() == 1).await;
    let health = relay.handle.health();
    assert_eq!((health.rooms, health.peers, health.queued_bytes), (0, 0, 0));
}

#[tokio::test]
async fn drain_tells_everybody_delivers_what_waits_and_ends() {
    let drain_jitter = Duration::from_millis(1234);
    let mut relay = TestRelay::start(Config { drain_jitter, drain_timeout: PATIENCE, ..config() });
    let keys = room();
    let (mut one, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut two, to, _) = TestPeer::join(relay.address, &keys).await;
    let waiting = TestPeer::connect(relay.address).await;
    for _ in 0..10 {
        one.message(to.slot, 0, &[1; 10_000]).await;
    }
    relay.until(|stats| stats.messages == 10).await;
    relay.handle.shutdown();
    assert!(matches!(one.word().await, RelayToPeer::Joined(_)));
    assert_eq!(one.word().await, RelayToPeer::Drain { jitter_ms: 1234 });
    // `one` has not closed yet, so the relay is still there for whoever asks.
    let health = get(relay.address, "/health").await;
    assert!(health.starts_with("HTTP/1.1 503 ") && health.contains("\"draining\""), "{health}");
    let (mut messages, mut drained) = (0, false);
    while let Some(frame) = two.frame().await {
        messages += usize::from(matches!(frame, RelayFrame::Message { .. }));
        drained |= matches!(frame, RelayFrame::Control(RelayToPeer::Drain { .. }));
    }
    assert!(drained && messages == 10, "{messages} of 10 messages");
    drop((one, two, waiting));
    soon(&mut relay.running).await.unwrap();
    assert!(tokio::net::TcpStream::connect(relay.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn drain_ends_by_its_deadline_even_if_nobody_goes() {
    let mut relay = TestRelay::start(Config { drain_timeout: Duration::from_millis(50), ..config() });
    let keys = room();
    let (_one, _, _) = TestPeer::join(relay.address, &keys).await;
    relay.handle.shutdown();
    soon(&mut relay.running).await.unwrap();
}

#[tokio::test]
async fn busy_sender_does_not_hold_up_others() {
    let relay = TestRelay::start(config());
    let keys = room();
    let (mut flood, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut sink, to, _) = TestPeer::join(relay.address, &keys).await;
    let flooding = tokio::spawn(async move {
        loop {
            flood.send(message(to.slot, 0, &[0; 1000])).await;
        }
    });
    let draining = tokio::spawn(async move { while sink.frame().await.is_some() {} });
    let (mut asker, me, _) = TestPeer::join(relay.address, &room()).await;
    for _ in 0..100 {
        asker.message(me.slot, 0, b"round").await;
        asker.sealed().await;
    }
    flooding.abort();
    draining.abort();
}

impl TestPeer {
    async fn sealed_len(&mut self, byte: u8, len: usize) {
        let (_, sealed) = self.sealed().await;
        assert!(sealed.len() == len && sealed.iter().all(|each| *each == byte), "{len} bytes of {byte}");
    }
}
