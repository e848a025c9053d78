//! Meshes of a test's own process, all in one room, that send back what they get.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use peerfleet_peer::{
    mesh::{BoxFuture, Caller, DialConfig, MeshConfig, PathConfig, Serve, Stream},
    random::{self, SystemRandom},
};
use peerfleet_proto::{
    id::RequestId,
    presence::{Epoch, Mode, Presence, Service},
    request::{Failure, FailureKind, Outcome, Request},
    token::{RoomKeys, Token},
};
use tokio::time::timeout;
use x25519_dalek::StaticSecret;

/// Longest that anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A host with an identity of its own, at the relay of that URL.
pub(crate) fn config(relay: &str) -> MeshConfig {
    static KEYS: OnceLock<Arc<RoomKeys>> = OnceLock::new();
    let derive = || Arc::new(RoomKeys::derive(&Token::generate(&mut SystemRandom), "tests"));
    MeshConfig {
        dial: DialConfig::default(),
        relay: relay.parse().unwrap(),
        keys: Arc::clone(KEYS.get_or_init(derive)),
        identity: StaticSecret::from(random::bytes::<32>()),
        presence: Presence {
            name: "host".into(),
            tags: vec![],
            os: "linux".into(),
            arch: "x86_64".into(),
            version: "0".into(),
            mode: Mode::Plan,
            services: vec![Service::Exec],
            epoch: Epoch([0; 16]),
        },
        udp: true,
        paths: PathConfig::default(),
    }
}

/// Answers pings, never a cancellation, and sends back what comes on streams.
pub(crate) struct Echo;

impl Serve for Echo {
    fn ask(&self, _caller: Caller, _id: RequestId, request: Request) -> BoxFuture<Outcome> {
        Box::pin(async move {
            if request == Request::Ping {
                return Outcome::Done;
            }
            if let Request::Cancel(_) = request {
                // As long as nobody is told to stop waiting.
                std::future::pending::<()>().await;
            }
            Outcome::Failed(Failure::new(FailureKind::Refused, "only pings are answered", "ping"))
        })
    }

    fn stream(&self, _caller: Caller, _request: Request, mut stream: Stream) -> BoxFuture<()> {
        Box::pin(async move {
            stream.send.write_frame(&Outcome::Done).await.unwrap();
            loop {
                match stream.recv.read_chunk(64 * 1024).await {
                    Ok(Some(chunk)) => {
                        if stream.send.write_chunk(chunk).await.is_err() {
                            return;
                        }
                    }
                    // The caller may be gone by now.
                    Ok(None) => return drop(stream.send.finish().await),
                    Err(_) => return,
                }
            }
        })
    }
}

fn pattern(from: usize, len: usize) -> Bytes {
    (from..from + len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// Sends `bytes` and reads them back; calls `at` with how many came back so far.
pub(crate) async fn echo(stream: Stream, bytes: usize, mut at: impl AsyncFnMut(usize)) {
    let Stream { mut send, mut recv } = stream;
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        while sent < bytes {
            let len = (bytes - sent).min(64 * 1024);
            send.write_chunk(pattern(sent, len)).await.unwrap();
            sent += len;
        }
        send.finish().await.unwrap();
        send
    });
    let mut got = 0;
    while let Some(chunk) = timeout(DEADLINE, recv.read_chunk(1 << 20)).await.unwrap().unwrap() {
        assert!(pattern(got, chunk.len()) == chunk, "a byte changed near {got}");
        got += chunk.len();
        at(got).await;
    }
    assert_eq!(got, bytes);
    sending.await.unwrap();
}
