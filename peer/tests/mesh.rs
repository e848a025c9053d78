//! Meshes of one process in one room of a real relay, over real sockets.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use peerfleet_peer::mesh::{AskFault, AskProgress, Mesh, MeshConfig, Roster, Stream, UplinkState};
use peerfleet_proto::{
    id::{InstanceId, JobId, RequestId},
    presence::{Mode, Presence},
    request::{FailureKind, Outcome, Request, link::Route, transfer::PathNow},
};
use peerfleet_relay::{Config, Relay};
use tokio::{task::JoinHandle, time::timeout};
use x25519_dalek::StaticSecret;

mod common;

use common::{DEADLINE, Echo, echo};

#[tokio::test(flavor = "multi_thread")]
async fn an_ask_is_answered_by_whom_it_was_meant_for() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let answer = one.ask(other.me().instance, Request::Ping, DEADLINE).await;
    assert_eq!(answer, Ok(Outcome::Done));
    let Ok(Outcome::Failed(failure)) = one.ask(other.me().instance, Request::Jobs, DEADLINE).await else {
        panic!("no failure")
    };
    assert_eq!(failure.kind, FailureKind::Refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn links_are_made_ready_for_who_waits_for_an_answer() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let has_socket = async || other.report(None, false).await.unwrap().network.udp;
    assert!(!has_socket().await);
    let (asking, to) = (one.clone(), other.me().instance);
    let slow = Request::Cancel(JobId::from(RequestId::from_bytes([1; 16])));
    let asked = tokio::spawn(async move { asking.ask(to, slow, DEADLINE).await });
    let ready = async {
        while !has_socket().await {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, ready).await.unwrap();
    asked.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_can_ask_itself() {
    let relay = TestRelay::start();
    let mesh = relay.mesh(1);
    assert_eq!(mesh.ask(mesh.me().instance, Request::Ping, DEADLINE).await, Ok(Outcome::Done));
    echo(open(&mesh, &mesh.clone(), Route::Auto).await, 1 << 20, async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_not_in_the_room_is_unreachable() {
    let relay = TestRelay::start();
    let mesh = relay.mesh(1);
    mesh.joined(DEADLINE).await.unwrap();
    let nobody = InstanceId::from_bytes([9; 16]);
    let fault = mesh.ask(nobody, Request::Ping, Duration::from_secs(1)).await;
    assert_eq!(fault, Err(AskFault::Unreachable));
    assert!(mesh.open(nobody, Request::Ping, Route::Auto).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_to_be_relayed_stays_relayed() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    assert!(one.wait_direct(other.me().instance, DEADLINE).await);
    let stream = open(&one, &other, Route::RelayedOnly).await;
    echo(stream, 8 << 20, async |_| {}).await;
    let view = one.path(other.me().instance, Route::RelayedOnly);
    assert_eq!(view.now, Some(PathNow::Relayed));
    assert_eq!(view.direct_bytes, 0);
    assert!(view.relayed_bytes > 8 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_path_is_found_and_carries_the_stream() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    assert!(one.wait_direct(other.me().instance, DEADLINE).await);
    let stream = open(&one, &other, Route::Auto).await;
    echo(stream, 64 << 20, async |_| {}).await;
    let view = one.path(other.me().instance, Route::Auto);
    assert_eq!(view.now, Some(PathNow::Direct));
    assert!(view.direct_bytes > 60 << 20, "{view:?}");
    assert!(view.rtt.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_udp_a_link_is_relayed() {
    let relay = TestRelay::start();
    let (one, other) = (relay.mesh(1), relay.mesh_with(2, false));
    knows(&one, 1).await;
    let stream = open(&one, &other, Route::Auto).await;
    echo(stream, 1 << 20, async |_| {}).await;
    assert_eq!(one.path(other.me().instance, Route::Auto).now, Some(PathNow::Relayed));
}

#[tokio::test(flavor = "multi_thread")]
async fn offers_of_a_link_that_cross_lead_to_one_link() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let (there, back) = tokio::join!(open(&one, &other, Route::Auto), open(&other, &one, Route::Auto));
    tokio::join!(echo(there, 1 << 20, async |_| {}), echo(back, 1 << 20, async |_| {}));
    assert!(one.wait_direct(other.me().instance, DEADLINE).await);
    assert!(other.wait_direct(one.me().instance, DEADLINE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_stream_feels_nothing_of_a_relay_that_dies() {
    let mut relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    assert!(one.wait_direct(other.me().instance, DEADLINE).await);
    assert!(other.wait_direct(one.me().instance, DEADLINE).await);
    let stream = open(&one, &other, Route::Auto).await;
    let mut killed = false;
    echo(stream, 64 << 20, async |got| {
        if got > 16 << 20 && !killed {
            killed = true;
            relay.kill().await;
        }
    })
    .await;
    let roster = roster(&one, |roster| roster.uplink == UplinkState::Joining).await;
    assert_eq!(roster.peers.iter().map(|peer| peer.present).collect::<Vec<_>>(), [false]);
    let answer = one.ask(other.me().instance, Request::Ping, DEADLINE).await;
    assert_eq!(answer, Ok(Outcome::Done));
    let stream = open(&one, &other, Route::Auto).await;
    echo(stream, 1 << 20, async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relayed_stream_survives_restarts_of_the_relay_without_losing_a_byte() {
    let mut relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let stream = open(&one, &other, Route::RelayedOnly).await;
    let mut restarts = 0;
    echo(stream, 48 << 20, async |got| {
        if restarts < 2 && got > (restarts + 1) * (16 << 20) {
            restarts += 1;
            relay.restart().await;
        }
    })
    .await;
    assert_eq!(restarts, 2);
    knows(&one, 1).await;
    assert_eq!(one.ask(other.me().instance, Request::Ping, DEADLINE).await, Ok(Outcome::Done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_began_relayed_moves_to_the_direct_path() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let stream = open(&one, &other, Route::Auto).await;
    echo(stream, 96 << 20, async |_| {}).await;
    assert_eq!(one.path(other.me().instance, Route::Auto).now, Some(PathNow::Direct));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_is_gone_from_the_roster_with_its_links() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let mut stream = open(&one, &other, Route::RelayedOnly).await;
    other.shutdown().await;
    roster(&one, |roster| roster.peers.is_empty()).await;
    assert!(timeout(DEADLINE, stream.recv.read_chunk(1)).await.unwrap().is_err());
    assert_eq!(one.path(other.me().instance, Route::RelayedOnly).now, None);
    assert_eq!(other.ask(one.me().instance, Request::Ping, DEADLINE).await, Err(AskFault::Unreachable));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_mesh_leaves_the_room() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    drop(other);
    roster(&one, |roster| roster.peers.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_mode_is_told_to_the_room() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    other.set_mode(Mode::Bypass);
    roster(&one, |roster| roster.peers.iter().any(|peer| peer.presence.mode == Mode::Bypass)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_of_one_identity_evict_nobody() {
    let relay = TestRelay::start();
    let (one, other, again) = (relay.mesh(1), relay.mesh(2), relay.mesh(2));
    for mesh in [&one, &other, &again] {
        knows(mesh, 2).await;
    }
    for to in [&other, &again] {
        assert_eq!(one.ask(to.me().instance, Request::Ping, DEADLINE).await, Ok(Outcome::Done));
    }
    echo(open(&other, &again, Route::Auto).await, 1 << 20, async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_is_told_from_a_finished_one() {
    let relay = TestRelay::start();
    let (one, other) = pair(&relay).await;
    let mut stream = open(&one, &other, Route::Auto).await;
    stream.send.write_chunk(Bytes::from_static(b"half")).await.unwrap();
    assert_eq!(stream.recv.read_chunk(10).await.unwrap().as_deref(), Some(&b"half"[..]));
    drop(stream.send);
    let rest = timeout(DEADLINE, stream.recv.read_chunk(10)).await.unwrap();
    assert!(rest.is_err(), "the echo took a dropped stream for a finished one");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_are_asked_at_once_and_each_ends_once() {
    let relay = TestRelay::start();
    let asker = relay.mesh(1);
    let hosts: Vec<_> = (2..202).map(|seed| relay.mesh(seed)).collect();
    knows(&asker, hosts.len()).await;
    for _round in ["cold", "warm"] {
        let to: Vec<_> = hosts.iter().map(|host| host.me().instance).collect();
        let mut waiting = to.clone();
        let mut progress = asker.ask_many(to, Request::Ping, DEADLINE);
        while let Some((instance, word)) = timeout(DEADLINE, progress.recv()).await.unwrap() {
            if let AskProgress::Ended(result) = word {
                assert_eq!(result, Ok(Outcome::Done));
                let before = waiting.len();
                waiting.retain(|other| *other != instance);
                assert_eq!(waiting.len(), before - 1, "ended twice");
            }
        }
        assert!(waiting.is_empty(), "{waiting:?} never ended");
    }
}

#[tokio::test]
async fn whoever_cannot_join_is_told_why() {
    let mut relay = TestRelay::start();
    relay.kill().await;
    let refused = relay.mesh(1).joined(Duration::from_secs(1)).await.unwrap_err();
    assert!(refused.cause.contains("refused"), "{refused}");
}

struct TestRelay {
    address: SocketAddr,
    running: JoinHandle<()>,
}

impl TestRelay {
    fn start() -> Self {
        Self::on(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn on(address: SocketAddr) -> Self {
        let relay = Relay::bind(Config { bind: vec![address], ..Config::default() }).unwrap();
        let address = relay.local_addrs()[0];
        Self { address, running: tokio::spawn(relay.run()) }
    }

    /// Ends without a word to anybody.
    async fn kill(&mut self) {
        self.running.abort();
        // An error says that it was aborted.
        _ = (&mut self.running).await;
    }

    async fn restart(&mut self) {
        self.kill().await;
        // Tasks that were aborted let go of the sockets a moment later.
        let free = async {
            while std::net::UdpSocket::bind(self.address).is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, free).await.unwrap();
        *self = Self::on(self.address);
    }

    fn mesh(&self, seed: u8) -> Mesh {
        self.mesh_with(seed, true)
    }

    fn mesh_with(&self, seed: u8, udp: bool) -> Mesh {
        let config = common::config(&format!("ws://{}", self.address));
        let presence = Presence { name: format!("host-{seed}"), ..config.presence };
        let config = MeshConfig { identity: StaticSecret::from([seed; 32]), presence, udp, ..config };
        Mesh::start(config, Arc::new(Echo))
    }
}

/// Waits until the roster is as wanted.
async fn roster(mesh: &Mesh, wanted: impl FnMut(&Arc<Roster>) -> bool) -> Arc<Roster> {
    timeout(DEADLINE, mesh.roster().wait_for(wanted)).await.expect("the roster in time").unwrap().clone()
}

async fn knows(mesh: &Mesh, others: usize) {
    roster(mesh, |roster| {
        roster.uplink == UplinkState::Joined && roster.peers.iter().filter(|peer| peer.present).count() == others
    })
    .await;
}

async fn pair(relay: &TestRelay) -> (Mesh, Mesh) {
    let (one, other) = (relay.mesh(1), relay.mesh(2));
    knows(&one, 1).await;
    knows(&other, 1).await;
    (one, other)
}

async fn open(mesh: &Mesh, to: &Mesh, route: Route) -> Stream {
    let opening = mesh.open(to.me().instance, Request::Ping, route);
    let (outcome, stream) = timeout(DEADLINE, opening).await.unwrap().unwrap();
    assert_eq!(outcome, Outcome::Done);
    stream
}
