//! Two processes' links in one, over two relay queues and loopback UDP.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use peerfleet_proto::{
    id::{InstanceId, Slot},
    request::link::Route,
    wire::relay::Datagram,
};
use tokio::task::JoinHandle;

use super::{super::socket::RELAY_QUEUE_BYTES, *};
use crate::mesh::evidence::{Evidence, Finding};

/// Longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);

struct Side {
    switch: Arc<Switch>,
    links: Links,
    remote: Arc<Remote>,
    key: Arc<TlsKey>,
    events: mpsc::Receiver<LinkEvent>,
    notes: mpsc::Receiver<FromSocket>,
}

impl Side {
    async fn start(seed: u8, other: Slot) -> Self {
        let key = Arc::new(TlsKey::from_seed(&[seed; 32]));
        let switch = Arc::new(Switch::new());
        let (notes, received_notes) = mpsc::channel(256);
        let (tell, events) = mpsc::channel(16);
        let config = LinksConfig { tls: Arc::clone(&key), switch: Arc::clone(&switch), udp: true, notes, events: tell };
        let links = Links::start(config).await.unwrap();
        let remote = switch.routes.add(InstanceId::from_bytes([seed; 16]), Route::Auto, Some(other));
        Self { switch, links, remote, key, events, notes: received_notes }
    }

    fn announced(&self) -> AnnouncedKey {
        AnnouncedKey::read(self.key.spki()).unwrap()
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.links.udp_port().unwrap().0))
    }

    async fn event(&mut self) -> LinkEvent {
        timeout(DEADLINE, self.events.recv()).await.unwrap().unwrap()
    }

    async fn connection(&mut self) -> Connection {
        match self.event().await {
            LinkEvent::Up { connection, mapped } if mapped == self.remote.mapped => connection,
            other @ (LinkEvent::Up { .. } | LinkEvent::Down { .. }) => panic!("no connection: {other:?}"),
        }
    }

    async fn why_down(&mut self) -> String {
        match self.event().await {
            LinkEvent::Down { why, .. } => why,
            other @ LinkEvent::Up { .. } => panic!("a connection: {other:?}"),
        }
    }
}

struct Pair {
    client: Side,
    server: Side,
    relay: Arc<AtomicBool>,
    connections: Vec<Connection>,
    carriers: [JoinHandle<()>; 2],
}

impl Pair {
    async fn start() -> Self {
        let client = Side::start(1, Slot(2)).await;
        let server = Side::start(2, Slot(1)).await;
        let relay = Arc::new(AtomicBool::new(true));
        let carriers = [
            carry(&client.switch, &server.switch, Slot(1), &relay),
            carry(&server.switch, &client.switch, Slot(2), &relay),
        ];
        Self { client, server, relay, connections: Vec::new(), carriers }
    }

    fn go_direct(&self) {
        for (here, there) in [(&self.client, &self.server), (&self.server, &self.client)] {
            here.switch.routes.prove_source(&here.remote, there.address());
            here.remote.set_direct(Some(there.address()));
        }
        self.kick();
    }

    fn go_relayed(&self) {
        self.client.remote.set_direct(None);
        self.server.remote.set_direct(None);
        self.kick();
    }

    fn kick(&self) {
        self.connections.iter().for_each(kick);
    }

    async fn connect(&mut self) -> (Connection, Connection) {
        self.server.links.let_in(&self.server.remote, self.client.announced());
        self.client.links.dial(&self.client.remote, self.server.announced());
        let (client, server) = (self.client.connection().await, self.server.connection().await);
        self.connections = vec![client.clone(), server.clone()];
        (client, server)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.carriers.iter().for_each(JoinHandle::abort);
    }
}

/// A relay's half: takes frames from one side, and gives them to the other under the sender's slot.
fn carry(from: &Arc<Switch>, to: &Arc<Switch>, sender: Slot, alive: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (from, to, alive) = (Arc::clone(from), Arc::clone(to), Arc::clone(alive));
    tokio::spawn(async move {
        loop {
            let datagram = from.next_for_relay().await;
            if alive.load(Ordering::Relaxed) {
                to.relayed(Datagram { slot: sender, ..datagram });
            }
        }
    })
}

async fn send_all(connection: &Connection, bytes: &[u8]) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    (send, recv)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_crosses_a_relayed_link() {
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    let (mut send, _recv) = send_all(&client, b"by way of the relay").await;
    send.finish().unwrap();
    let (_, mut recv) = server.accept_bi().await.unwrap();
    assert_eq!(recv.read_to_end(100).await.unwrap(), b"by way of the relay");
    assert_eq!(pair.client.remote.bytes().0, 0);
    assert!(pair.client.remote.bytes().1 > 0);
}

#[test]
fn links_offer_a_post_quantum_exchange_first() {
    let first = rustls::crypto::aws_lc_rs::default_provider().kx_groups[0].name();
    assert_eq!(first, rustls::NamedGroup::X25519MLKEM768);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_survives_every_change_of_path_and_a_dead_relay() {
    const BYTES: usize = 96 * 1024 * 1024;
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    let sending = tokio::spawn(async move {
        let (mut send, _recv) = client.open_bi().await.unwrap();
        let mut sent = 0;
        while sent < BYTES {
            send.write_chunk(pattern(sent, 64 * 1024)).await.unwrap();
            sent += 64 * 1024;
        }
        send.finish().unwrap();
        send.stopped().await.unwrap();
    });
    let (_, mut recv) = server.accept_bi().await.unwrap();
    let mut got = 0;
    let mut step = 0;
    while let Some(chunk) = timeout(DEADLINE, recv.read_chunk(1 << 20, true)).await.unwrap().unwrap() {
        assert!(pattern(got, chunk.bytes.len()) == chunk.bytes, "a byte changed near {got}");
        got += chunk.bytes.len();
        if got >= (step + 1) * BYTES / 8 {
            step += 1;
            match step {
                1 | 5 => pair.go_direct(),
                2 => pair.relay.store(false, Ordering::Relaxed),
                3 => pair.relay.store(true, Ordering::Relaxed),
                4 | 6 => pair.go_relayed(),
                _ => {}
            }
        }
    }
    assert_eq!(got, BYTES);
    sending.await.unwrap();
    let (direct, relayed) = pair.server.remote.bytes();
    assert!(direct > 0 && relayed > 0, "direct {direct}, relayed {relayed}");
}

fn pattern(from: usize, len: usize) -> Bytes {
    (from..from + len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_a_relay_that_is_gone_for_a_while() {
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    let (mut send, _recv) = send_all(&client, b"before ").await;
    let (_, mut recv) = server.accept_bi().await.unwrap();
    let mut text = [0; 7];
    recv.read_exact(&mut text).await.unwrap();
    pair.relay.store(false, Ordering::Relaxed);
    pair.client.switch.routes.set_slot(&pair.client.remote, None);
    send.write_all(b"after").await.unwrap();
    send.finish().unwrap();
    timeout(Duration::from_secs(3), recv.read_to_end(100)).await.unwrap_err();
    pair.relay.store(true, Ordering::Relaxed);
    pair.client.switch.routes.set_slot(&pair.client.remote, Some(Slot(2)));
    pair.kick();
    let rest = timeout(Duration::from_secs(1), recv.read_to_end(100)).await.unwrap().unwrap();
    assert_eq!(rest, b"after");
}

/// A connected pair whose client's uplink has enough to carry and carries nothing, and what fills it.
async fn held_back() -> (Pair, Connection, Connection, Bytes) {
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    let [carrier, _] = &mut pair.carriers;
    carrier.abort();
    assert!(carrier.await.unwrap_err().is_cancelled());
    let filler = Bytes::from(vec![0; RELAY_QUEUE_BYTES / 2 + 1]);
    pair.client.switch.to_relay.push(filler.clone());
    (pair, client, server, filler)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_the_relay_holds_back_goes_on_directly() {
    let (pair, client, server, filler) = held_back().await;
    let (mut send, _recv) = send_all(&client, b"first by nothing, then directly").await;
    send.finish().unwrap();
    pair.go_direct();
    let (_, mut recv) = timeout(DEADLINE, server.accept_bi()).await.unwrap().unwrap();
    assert_eq!(recv.read_to_end(100).await.unwrap(), b"first by nothing, then directly");
    while pair.client.switch.to_relay.pop().expect("what fills it") != filler {}
    assert_eq!(pair.client.switch.to_relay.pop(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_the_relay_held_back_goes_on_when_it_carries_again_and_nothing_was_dropped() {
    let (mut pair, client, server, filler) = held_back().await;
    let before = pair.client.switch.drops().to_relay;
    let (mut send, _recv) = send_all(&client, b"in a while").await;
    send.finish().unwrap();
    while pair.client.switch.to_relay.pop().expect("what fills it") != filler {}
    pair.carriers[0] = carry(&pair.client.switch, &pair.server.switch, Slot(1), &pair.relay);
    let (_, mut recv) = timeout(DEADLINE, server.accept_bi()).await.unwrap().unwrap();
    assert_eq!(recv.read_to_end(100).await.unwrap(), b"in a while");
    assert_eq!(pair.client.switch.drops().to_relay, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_caller_is_let_in_once_its_key_is_known() {
    let mut pair = Pair::start().await;
    pair.server.links.expect(&pair.server.remote);
    pair.client.links.dial(&pair.client.remote, pair.server.announced());
    while pair.server.remote.bytes().1 == 0 {
        tokio::task::yield_now().await;
    }
    pair.server.links.let_in(&pair.server.remote, pair.client.announced());
    pair.client.connection().await;
    pair.server.connection().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_an_unannounced_key_is_refused() {
    let mut pair = Pair::start().await;
    let stranger = TlsKey::from_seed(&[9; 32]);
    pair.server.links.let_in(&pair.server.remote, AnnouncedKey::read(stranger.spki()).unwrap());
    pair.client.links.dial(&pair.client.remote, pair.server.announced());
    pair.server.why_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callee_with_an_unannounced_key_is_refused() {
    let mut pair = Pair::start().await;
    let stranger = TlsKey::from_seed(&[9; 32]);
    pair.server.links.let_in(&pair.server.remote, pair.client.announced());
    pair.client.links.dial(&pair.client.remote, AnnouncedKey::read(stranger.spki()).unwrap());
    pair.client.why_down().await;
    pair.server.why_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_from_an_unproved_source_reach_no_link() {
    let pair = Pair::start().await;
    let stranger = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let before = pair.server.switch.drops().stray;
    timeout(DEADLINE, async {
        while pair.server.switch.drops().stray == before {
            stranger.send_to(&[0x40; 1200], pair.server.address()).await.unwrap();
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(pair.server.remote.bytes(), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_a_search_found_carries_its_link_both_ways() {
    const BYTES: usize = 8 * 1024 * 1024;
    let mut pair = Pair::start().await;
    let there = pair.server.address();
    let opened = pair.client.links.extra().open(3);
    assert_eq!(opened.len(), 3);
    pair.client.links.extra().keep(opened[1], &pair.client.remote, there);
    let kept = pair.client.remote.kept(there).unwrap();
    let here = SocketAddr::from(([127, 0, 0, 1], kept.port().unwrap().0));
    assert_ne!(here, pair.client.address());
    pair.server.switch.routes.prove_source(&pair.server.remote, here);
    pair.server.remote.set_direct(Some(here));
    pair.client.switch.routes.prove_source(&pair.client.remote, there);
    pair.client.remote.set_direct(Some(there));
    pair.relay.store(false, Ordering::Relaxed);
    let (client, server) = pair.connect().await;
    let receiving = tokio::spawn(async move {
        let (mut send, mut recv) = server.accept_bi().await.unwrap();
        let got = recv.read_to_end(BYTES).await.unwrap();
        send.write_all(&got).await.unwrap();
        send.finish().unwrap();
        send.stopped().await.unwrap();
    });
    let content = pattern(0, BYTES);
    let (mut send, mut recv) = client.open_bi().await.unwrap();
    let sending = tokio::spawn({
        let content = content.clone();
        async move {
            send.write_chunk(content).await.unwrap();
            send.finish().unwrap();
        }
    });
    let back = timeout(DEADLINE, recv.read_to_end(BYTES)).await.unwrap().unwrap();
    assert!(content == back);
    sending.await.unwrap();
    receiving.await.unwrap();
    assert_eq!(pair.client.remote.bytes().1, 0, "nothing went by way of the relay");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_socket_is_closed_when_its_link_lets_it_go_and_the_others_with_the_search() {
    let mut pair = Pair::start().await;
    let there = pair.server.address();
    let extra = pair.client.links.extra();
    let opened = extra.open(4);
    assert_eq!(extra.open(2).len(), 2, "those that are there suffice");
    extra.keep(opened[0], &pair.client.remote, there);
    extra.close();
    let kept = Arc::downgrade(&pair.client.remote.kept(there).unwrap());
    pair.client.links.send_stun(Some(opened[1]), there, &[0, 1, 0, 0]);
    pair.client.links.send_stun(Some(opened[0]), there, &[0, 1, 0, 0]);
    let FromSocket::Stun { via: None, from, .. } = timeout(DEADLINE, pair.server.notes.recv()).await.unwrap().unwrap()
    else {
        panic!("another note")
    };
    assert_eq!(from.port(), kept.upgrade().unwrap().port().unwrap().0, "a closed socket sends nothing");
    pair.client.remote.set_kept(None);
    timeout(DEADLINE, async {
        while kept.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_comes_to_an_extra_socket_says_to_which() {
    let mut pair = Pair::start().await;
    let opened = pair.client.links.extra().open(2);
    pair.client.links.send_stun(Some(opened[1]), pair.server.address(), &[0, 1, 0, 0]);
    let note = timeout(DEADLINE, pair.server.notes.recv()).await.unwrap().unwrap();
    let FromSocket::Stun { from, .. } = note else { panic!("another note: {note:?}") };
    pair.server.links.send_stun(None, from, &[1, 1, 0, 0]);
    let note = timeout(DEADLINE, pair.client.notes.recv()).await.unwrap().unwrap();
    let FromSocket::Stun { via, from, .. } = note else { panic!("another note: {note:?}") };
    assert_eq!((via, from), (Some(opened[1]), pair.server.address()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stun_packet_goes_to_the_path_machine() {
    let mut pair = Pair::start().await;
    let other = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    other.send_to(&[0x00, 0x01, 0x00, 0x00], pair.server.address()).await.unwrap();
    let note = timeout(DEADLINE, pair.server.notes.recv()).await.unwrap().unwrap();
    let FromSocket::Stun { via: None, from, packet } = note else { panic!("another note: {note:?}") };
    assert_eq!(from, other.local_addr().unwrap());
    assert_eq!(packet.as_ref(), [0x00, 0x01, 0x00, 0x00]);
}

/// Waits until QUIC has found that packets of this size arrive.
async fn finds_mtu(connection: &Connection, mtu: u16) {
    let found = async {
        while connection.stats().path.current_mtu < mtu {
            // A keep-alive is a while away, and QUIC looks on when it has something to send.
            kick(connection);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, found).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_path_that_may_take_large_packets_gets_them() {
    let mut pair = Pair::start().await;
    pair.client.remote.set_plausible_mtu(mtu::LARGEST_DIRECT);
    pair.server.remote.set_plausible_mtu(mtu::LARGEST_DIRECT);
    pair.go_direct();
    let (client, server) = pair.connect().await;
    finds_mtu(&client, mtu::LARGEST_DIRECT).await;
    finds_mtu(&server, mtu::LARGEST_DIRECT).await;
    for (side, connection) in [(&pair.client, &client), (&pair.server, &server)] {
        side.remote.note_mtu(connection.stats().path.current_mtu);
    }
    pair.go_relayed();
    let bytes = vec![7; 300_000];
    let (_send, _recv) = send_all(&client, &bytes).await;
    let (_, mut recv) = timeout(DEADLINE, server.accept_bi()).await.unwrap().unwrap();
    let mut copy = vec![0; bytes.len()];
    timeout(DEADLINE, recv.read_exact(&mut copy)).await.unwrap().unwrap();
    assert_eq!(copy, bytes, "the relay takes what the direct path took");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relayed_link_that_may_become_direct_keeps_to_the_usual_size() {
    let mut pair = Pair::start().await;
    for side in [&pair.client, &pair.server] {
        side.remote.set_plausible_mtu(mtu::LARGEST_DIRECT);
    }
    let (client, server) = pair.connect().await;
    finds_mtu(&client, mtu::USUAL - 40).await;
    finds_mtu(&server, mtu::USUAL - 40).await;
    assert!([&client, &server].iter().all(|connection| connection.stats().path.current_mtu <= mtu::USUAL));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hears_data_and_sends_none_has_evidence_of_that() {
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    let (begin, remote) = (Instant::now(), Arc::clone(&pair.server.remote));
    let mut evidence = Evidence::new(server.clone(), remote, begin);
    let (mut send, _recv) = send_all(&client, b"typed").await;
    let (_other_send, mut recv) = timeout(DEADLINE, server.accept_bi()).await.unwrap().unwrap();
    let mut later = begin;
    // What belongs to the handshake and the search for the packet size is sent by both at first.
    let heard = async {
        while evidence.read(later) != Some(Finding::Heard) {
            recv.read_exact(&mut [0; 5]).await.unwrap();
            send.write_all(b"typed").await.unwrap();
            later += Duration::from_secs(1);
        }
    };
    timeout(DEADLINE, heard).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_of_a_path_in_doubt_arrive_by_way_of_the_relay() {
    let mut pair = Pair::start().await;
    let (client, server) = pair.connect().await;
    // Nobody is there.
    let nowhere = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    pair.client.remote.set_direct(Some(nowhere.local_addr().unwrap()));
    pair.client.remote.set_doubted(true);
    let (_send, _recv) = send_all(&client, b"typed").await;
    let (_other_send, mut recv) = timeout(DEADLINE, server.accept_bi()).await.unwrap().unwrap();
    recv.read_exact(&mut [0; 5]).await.unwrap();
    nowhere.set_read_timeout(Some(DEADLINE)).unwrap();
    assert!(nowhere.recv(&mut [0; 2048]).is_ok(), "they are sent there as well");
    // Another path is taken without doubt.
    pair.client.remote.set_direct(None);
    assert!(!pair.client.remote.is_doubted());
}
