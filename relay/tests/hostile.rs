//! What an attacker can try, against the real binary: its memory stays bounded, other rooms feel nothing, and its log
//! says why it cut.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use common::{PATIENCE, TestPeer, random, room, soon};
use peerfleet_proto::{
    id::PeerId,
    limits::MAX_FRAME_BYTES,
    wire::relay::{ClosingReason, PeerToRelay, datagram, message},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
};
use x25519_dalek::{PublicKey, StaticSecret};

/// Longest round trip that a bystander may see while somebody else attacks. On a quiet machine it is under 1 ms; this
/// leaves room for test machines that run much else, and is far below every timeout that would hide a stall.
const UNDISTURBED: Duration = Duration::from_secs(2);

const MIB: usize = 1024 * 1024;

/// The relay as its users run it.
struct Binary {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<Vec<serde_json::Value>>>,
}

impl Binary {
    async fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_relay"))
            .args(["--bind", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .env_clear()
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = soon(lines.next_line()).await.unwrap().expect("a line when it listens");
        let listens: serde_json::Value = serde_json::from_str(&first).unwrap();
        let address = listens["addresses"].as_str().unwrap().trim_matches(['[', ']']).parse().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                kept.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
        });
        Self { child, address, log }
    }

    /// Waits until the log names this reason for a cut.
    async fn logs(&self, reason: &str) -> serde_json::Value {
        let start = Instant::now();
        loop {
            let found = self.log.lock().unwrap().iter().find(|line| line["reason"] == reason).cloned();
            if let Some(line) = found {
                assert_eq!(line["message"], "connection cut");
                assert!(line["remote"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
                return line;
            }
            assert!(start.elapsed() < PATIENCE, "{reason} is not in {:?}", self.log.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Most memory that was ever resident, in bytes, if the system tells.
    fn peak(&self) -> Option<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
    }

    /// What it took of the processors so far; nothing where the system does not tell.
    fn processor_time(&self) -> Duration {
        let stat = self.child.id().and_then(|id| std::fs::read_to_string(format!("/proc/{id}/stat")).ok());
        let ticks = stat.and_then(|stat| {
            let after_name = stat.rsplit_once(')')?.1;
            let mut fields = after_name.split_whitespace().skip(11);
            Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
        });
        Duration::from_millis(ticks.unwrap_or(0) * 10)
    }

    fn assert_peak_below(&self, bytes: usize) {
        if let Some(peak) = self.peak() {
            assert!(peak < bytes, "{} MiB were resident, {} allowed", peak / MIB, bytes / MIB);
        }
    }
}

/// Two peers of another room that talk all the time.
struct Bystanders {
    stop: Arc<AtomicBool>,
    talking: JoinHandle<(usize, Duration)>,
}

impl Bystanders {
    async fn start(relay: &Binary) -> Self {
        let keys = room();
        let (mut one, _, _) = TestPeer::join(relay.address, &keys).await;
        let (mut two, to, _) = TestPeer::join(relay.address, &keys).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let talking = tokio::spawn(async move {
            let (mut rounds, mut longest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) || rounds < 10 {
                let start = Instant::now();
                one.message(to.slot, 0, b"hello").await;
                let (from, _) = two.sealed().await;
                two.message(from, 0, b"hello yourself").await;
                one.sealed().await;
                longest = longest.max(start.elapsed());
                rounds += 1;
            }
            (rounds, longest)
        });
        Self { stop, talking }
    }

    async fn felt_nothing(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (rounds, longest) = soon(self.talking).await.unwrap();
        assert!(longest < UNDISTURBED, "a round trip of {rounds} took {longest:?}");
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// Waits for the relay to close, whatever it says before.
async fn closed(stream: &mut TcpStream) {
    let mut scrap = vec![0; 4096];
    soon(async { while matches!(stream.read(&mut scrap).await, Ok(1..)) {} }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_are_cut_in_every_state() {
    let relay = Binary::start(&[]).await;
    let bystanders = Bystanders::start(&relay).await;
    // Instead of a request.
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    let _ = stream.write_all(&noise(MIB)).await;
    closed(&mut stream).await;
    relay.logs("bad_request").await;
    // Instead of WebSocket frames, before and after joining. A first byte with a reserved bit can be no frame.
    for joined in [false, true] {
        let peer = if joined {
            TestPeer::join(relay.address, &room()).await.0
        } else {
            TestPeer::connect(relay.address).await
        };
        let mut stream = peer.ws.into_inner();
        let mut bytes = noise(MIB);
        bytes[0] |= 0x70;
        let _ = stream.write_all(&bytes).await;
        closed(&mut stream).await;
    }
    // Inside of WebSocket frames.
    let (mut member, _, _) = TestPeer::join(relay.address, &room()).await;
    member.send([&[0x7f][..], &noise(MAX_FRAME_BYTES - 1)].concat().into()).await;
    assert_eq!(member.closing().await, ClosingReason::Malformed);
    let line = relay.logs("malformed").await;
    assert!(line["room"].as_str().is_some_and(|room| room.len() <= 10), "{line}");
    bystanders.felt_nothing().await;
    relay.assert_peak_below(32 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_loris_is_cut_by_its_deadline_at_each_stage() {
    let relay = Binary::start(&["--join-timeout", "400ms"]).await;
    let bystanders = Bystanders::start(&relay).await;
    let mut dripping = Vec::new();
    for number in 0..200 {
        let join = message(peerfleet_proto::id::Slot(0), 0, &[0; 2000]);
        let mut stream = if number % 2 == 0 {
            TcpStream::connect(relay.address).await.unwrap()
        } else {
            TestPeer::connect(relay.address).await.ws.into_inner()
        };
        dripping.push(tokio::spawn(async move {
            let bytes: Vec<u8> = if number % 2 == 0 {
                b"GET /v1 HTTP/1.1\r\nHost: relay\r\nX-Patience: ".iter().copied().chain([b'x'; 4000]).collect()
            } else {
                [&[0x82, 0xfe, 0x07, 0xd9, 0, 0, 0, 0][..], &join].concat()
            };
            for byte in bytes {
                if stream.write_all(&[byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            panic!("it was never cut");
        }));
    }
    for drip in dripping {
        soon(drip).await.unwrap();
    }
    relay.logs("request_timeout").await;
    relay.logs("join_timeout").await;
    bystanders.felt_nothing().await;
    relay.assert_peak_below(32 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn length_prefix_of_two_gibibytes_is_refused_before_anything_is_allocated() {
    let relay = Binary::start(&[]).await;
    let bystanders = Bystanders::start(&relay).await;
    let mut held = Vec::new();
    for number in 0..100 {
        let peer = if number % 2 == 0 {
            TestPeer::connect(relay.address).await
        } else {
            TestPeer::join(relay.address, &room()).await.0
        };
        let mut stream = peer.ws.into_inner();
        stream.write_all(&[0x82, 0xff, 0, 0, 0, 0, 0x80, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]).await.unwrap();
        closed(&mut stream).await;
        held.push(stream);
    }
    relay.logs("malformed").await;
    bystanders.felt_nothing().await;
    relay.assert_peak_below(32 * MIB);
}

/// One connection whose fragments never end in a message, and one that sends nothing but pings and reads no pong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_fragments_and_pings_are_cut_and_hold_no_memory() {
    let relay = Binary::start(&["--idle-timeout", "1s", "--write-timeout", "1s"]).await;
    let bystanders = Bystanders::start(&relay).await;
    let mut attacks = Vec::new();
    let empty_fragment: &[u8] = &[0x00, 0x80, 0, 0, 0, 0];
    let ping: &[u8] = &[0x89, 0x84, 0, 0, 0, 0, 1, 2, 3, 4];
    for frame in [empty_fragment, ping] {
        let mut stream = TestPeer::join(relay.address, &room()).await.0.ws.into_inner();
        let burst = frame.repeat(10_000);
        attacks.push(tokio::spawn(async move {
            // An unfinished binary message, for the fragments to go on with; for pings it changes nothing.
            let _ = stream.write_all(&[0x02, 0x80, 0, 0, 0, 0]).await;
            while stream.write_all(&burst).await.is_ok() {}
        }));
    }
    for attack in attacks {
        soon(attack).await.unwrap();
    }
    relay.logs("idle").await;
    relay.logs("slow_reader").await;
    bystanders.felt_nothing().await;
    relay.assert_peak_below(32 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_whose_fragments_say_nothing_costs_no_processor_until_its_deadline() {
    let relay = Binary::start(&["--join-timeout", "2s"]).await;
    let stream = TcpStream::connect(relay.address).await.unwrap();
    let mut stranger = TestPeer::upgrade(stream).await.into_inner();
    stranger.write_all(&[0x02, 0x80, 0, 0, 0, 0]).await.unwrap();
    // More than is read in one turn.
    stranger.write_all(&[0x00, 0x80, 0, 0, 0, 0].repeat(50_000)).await.unwrap();
    relay.logs("join_timeout").await;
    assert!(relay.processor_time() < Duration::from_secs(1), "{:?}", relay.processor_time());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_frames_to_a_peer_that_reads_nothing_hold_bounded_memory_and_end_it() {
    let relay = Binary::start(&["--write-timeout", "1s"]).await;
    let bystanders = Bystanders::start(&relay).await;
    let keys = room();
    let (deaf, to, _) = TestPeer::join(relay.address, &keys).await;
    let (mut sender, _, _) = TestPeer::join(relay.address, &keys).await;
    let (mut friend, to_friend, _) = TestPeer::join(relay.address, &keys).await;
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < Duration::from_secs(2) {
        for _ in 0..50 {
            sender.send(message(to.slot, 0, &[1; 60_000])).await;
            sender.send(datagram(to.slot, 0, 1200, &[2; 60_000])).await;
            sent += 120_000;
        }
        // Somebody else in the same room feels nothing either.
        sender.message(to_friend.slot, 0, b"and you?").await;
        friend.sealed().await;
        // The refusals have to be read, else the sender is the slow reader.
        while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, sender.frame()).await {}
    }
    assert!(sent > 16 * MIB, "{sent} bytes are no flood");
    relay.logs("slow_reader").await;
    bystanders.felt_nothing().await;
    relay.assert_peak_below(32 * MIB);
    drop(deaf);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captured_join_is_refused_when_replayed() {
    let relay = Binary::start(&[]).await;
    let keys = room();
    let mut first = TestPeer::connect(relay.address).await;
    let captured = PeerToRelay::Join(first.answer(&keys, &StaticSecret::from(random()), Vec::new()));
    first.say(&captured).await;
    first.word().await;
    let mut second = TestPeer::connect(relay.address).await;
    second.say(&captured).await;
    assert_eq!(second.closing().await, ClosingReason::BadProof);
    relay.logs("bad_proof").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_joins_without_the_token_or_as_somebody_else() {
    let relay = Binary::start(&[]).await;
    let (keys, victim) = (room(), StaticSecret::from(random()));
    let mut stranger = TestPeer::connect(relay.address).await;
    let mut join = stranger.answer(&room(), &StaticSecret::from(random()), Vec::new());
    join.admission = *keys.admission_public();
    stranger.say(&PeerToRelay::Join(join)).await;
    assert_eq!(stranger.closing().await, ClosingReason::BadProof);
    let mut impostor = TestPeer::connect(relay.address).await;
    let mut join = impostor.answer(&keys, &StaticSecret::from(random()), Vec::new());
    join.peer = PeerId::from_bytes(PublicKey::from(&victim).to_bytes());
    impostor.say(&PeerToRelay::Join(join)).await;
    assert_eq!(impostor.closing().await, ClosingReason::BadProof);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_never_names_a_room_in_full() {
    let relay = Binary::start(&["--log-level", "trace"]).await;
    let keys = room();
    let (mut peer, _, _) = TestPeer::join(relay.address, &keys).await;
    peer.send(b"\xff"[..].into()).await;
    peer.closing().await;
    relay.logs("malformed").await;
    let full = keys.room().to_string();
    let log = relay.log.lock().unwrap();
    assert!(log.iter().any(|line| line["room"].as_str().is_some_and(|room| !room.is_empty())));
    assert!(log.iter().all(|line| !line.to_string().contains(&full)));
}
