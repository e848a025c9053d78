//! A relay on a port of the system's choice, and peers that speak its wire by hand.

#![allow(dead_code, unreachable_pub, reason = "each test program is a crate of its own and uses its part of this")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    convert::Infallible,
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use peerfleet_proto::{
    admission,
    id::{InstanceId, Slot},
    token::{RoomKeys, Token},
    wire::{
        RELAY_PATH, RELAY_PROTOCOL,
        relay::{
            Challenge, ClosingReason, Join, Member, PeerToRelay, RelayFrame, RelayToPeer, Welcome, control, message,
        },
    },
};
use peerfleet_relay::{Config, Handle, Relay, metrics::Stats};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest, protocol::WebSocketConfig},
};
use x25519_dalek::StaticSecret;

/// Longest time that anything in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The operating system's randomness.
pub struct Entropy;

impl rand_core::TryRng for Entropy {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(random()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(random()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        getrandom::fill(bytes).unwrap();
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Entropy {}

pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// Waits, but not for ever.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it happens soon")
}

/// Keys of a room that nobody else has.
pub fn room() -> RoomKeys {
    RoomKeys::derive(&Token::generate(&mut Entropy), "test")
}

pub fn config() -> Config {
    Config { bind: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }
}

/// A relay that runs until dropped.
pub struct TestRelay {
    pub address: SocketAddr,
    pub handle: Handle,
    pub running: JoinHandle<()>,
}

impl TestRelay {
    pub fn start(config: Config) -> Self {
        let relay = Relay::bind(config).unwrap();
        let (address, handle) = (relay.local_addrs()[0], relay.handle());
        Self { address, handle, running: tokio::spawn(relay.run()) }
    }

    /// Waits until the counters are as they should be.
    pub async fn until(&self, holds: impl Fn(&Stats) -> bool) {
        let start = Instant::now();
        while !holds(&self.handle.stats()) {
            assert!(start.elapsed() < PATIENCE, "counters: {:?}", self.handle.stats());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for TestRelay {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// What a plain HTTP request is answered with, as a whole.
pub async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n").as_bytes()).await.unwrap();
    let mut response = String::new();
    soon(stream.read_to_string(&mut response)).await.unwrap();
    response
}

/// A connection to a relay, before or after joining.
pub struct TestPeer {
    pub ws: WebSocketStream<TcpStream>,
    pub challenge: Challenge,
}

impl TestPeer {
    /// Upgrades a connection that stands, and reads no further.
    pub async fn upgrade(stream: TcpStream) -> WebSocketStream<TcpStream> {
        stream.set_nodelay(true).unwrap();
        let mut request = format!("ws://relay{RELAY_PATH}").into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", RELAY_PROTOCOL.parse().unwrap());
        let config = WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(0);
        let upgraded = tokio_tungstenite::client_async_with_config(request, stream, Some(config));
        soon(upgraded).await.unwrap().0
    }

    /// Connects and reads the challenge.
    pub async fn connect(address: SocketAddr) -> Self {
        let ws = Self::upgrade(TcpStream::connect(address).await.unwrap()).await;
        let mut peer = Self { ws, challenge: Challenge { ephemeral: [0; 32], nonce: [0; 32] } };
        let RelayToPeer::Challenge(challenge) = peer.word().await else { panic!("the relay speaks first") };
        peer.challenge = challenge;
        peer
    }

    /// Connects and joins as a new identity.
    pub async fn join(address: SocketAddr, keys: &RoomKeys) -> (Self, Welcome, Vec<Member>) {
        Self::join_as(address, keys, &StaticSecret::from(random()), vec![7; 100]).await
    }

    pub async fn join_as(
        address: SocketAddr,
        keys: &RoomKeys,
        identity: &StaticSecret,
        presence: Vec<u8>,
    ) -> (Self, Welcome, Vec<Member>) {
        let mut peer = Self::connect(address).await;
        let join = peer.answer(keys, identity, presence);
        peer.say(&PeerToRelay::Join(join)).await;
        let RelayToPeer::Welcome(welcome) = peer.word().await else { panic!("welcomed") };
        let mut all = Vec::new();
        loop {
            let RelayToPeer::Roster { members, last } = peer.word().await else { panic!("the roster comes first") };
            all.extend(members);
            if last {
                return (peer, welcome, all);
            }
        }
    }

    /// The answer to this connection's challenge.
    pub fn answer(&self, keys: &RoomKeys, identity: &StaticSecret, presence: Vec<u8>) -> Join {
        let instance = InstanceId::from_bytes(random());
        admission::join(&self.challenge, keys, identity, instance, presence).unwrap()
    }

    pub async fn send(&mut self, frame: Bytes) {
        soon(self.ws.send(Message::Binary(frame))).await.unwrap();
    }

    pub async fn say(&mut self, word: &PeerToRelay) {
        self.send(control(word)).await;
    }

    /// The next frame; `None` when the connection is closed or broken.
    pub async fn frame(&mut self) -> Option<RelayFrame> {
        loop {
            match soon(self.ws.next()).await {
                Some(Ok(Message::Binary(frame))) => return Some(RelayFrame::read(&frame).unwrap()),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next frame, which is a word of the relay itself.
    pub async fn word(&mut self) -> RelayToPeer {
        match self.frame().await {
            Some(RelayFrame::Control(word)) => word,
            other => panic!("a word of the relay: {other:?}"),
        }
    }

    /// Why the relay closes; everything before that is passed over.
    pub async fn closing(&mut self) -> ClosingReason {
        loop {
            let frame = self.frame().await.expect("a reason before the end");
            if let RelayFrame::Control(RelayToPeer::Closing(reason)) = frame {
                return reason;
            }
        }
    }

    /// The next message and who sent it; words of the relay are passed over.
    pub async fn sealed(&mut self) -> (Slot, Bytes) {
        loop {
            if let RelayFrame::Message { from, sealed } = self.frame().await.expect("a message before the end") {
                return (from, sealed);
            }
        }
    }

    pub async fn message(&mut self, to: Slot, tag: u32, sealed: &[u8]) {
        self.send(message(to, tag, sealed)).await;
    }
}
