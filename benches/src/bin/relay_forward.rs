//! Messages that the relay forwards per second, beside a bare tokio-tungstenite forwarder.
//!
//! In: `relay_forward [RUNS] [BYTES] [PAIRS]`. Out: floor and ours, taken in turn, their medians and ratio.
//! Floor and relay run in child processes (`--floor`, `--serve`); the load is this process, the same for both: pairs of
//! clients, one sending with a bounded number of messages under way, one counting.

#![expect(clippy::print_stdout, reason = "figures are what a bench is for")]

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use peerfleet_benches::{
    floor::forwarder::{self, Client},
    report,
};
use peerfleet_peer::random::{self, SystemRandom};
use peerfleet_proto::{
    admission,
    id::{InstanceId, Slot},
    token::{RoomKeys, Token},
    wire::{
        RELAY_PATH, RELAY_PROTOCOL,
        relay::{PeerToRelay, RelayFrame, RelayToPeer, Welcome, control, message},
    },
};
use peerfleet_relay::{Config, Relay};
use tokio::{net::TcpStream, sync::Semaphore, task::JoinSet};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};
use x25519_dalek::StaticSecret;

/// Messages of one pair that are under way at most: below the relay's message queue, so that nothing is refused.
const UNDER_WAY: usize = 512;

/// Time before counting begins.
const WARM_UP: Duration = Duration::from_millis(500);

/// Time of counting.
const COUNTED: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--floor") => return forwarder::serve().await,
        Some("--serve") => return serve().await,
        Some(_) | None => {}
    }
    let number = |at: usize, default| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (runs, bytes, pairs) = (number(0, 5)?, number(1, 1024)?, number(2, 4)?);
    let (mut floors, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        floors.push(measure("--floor", bytes, pairs).await?);
        ours.push(measure("--serve", bytes, pairs).await?);
    }
    report(&format!("messages of {bytes} B forwarded, {pairs} pairs"), "/s", &floors, &ours, "≥ 0.6");
    Ok(())
}

async fn serve() -> Result<()> {
    let relay = Relay::bind(Config { bind: vec!["127.0.0.1:0".parse()?], ..Config::default() })?;
    println!("{}", relay.local_addrs()[0]);
    relay.run().await;
    Ok(())
}

/// Messages per second through one kind of server, in a process of its own.
async fn measure(kind: &str, bytes: usize, pairs: usize) -> Result<f64> {
    let mut child = Command::new(std::env::current_exe()?).arg(kind).stdout(Stdio::piped()).spawn()?;
    let rate = load(&mut child, kind == "--serve", bytes, pairs).await;
    child.kill()?;
    child.wait()?;
    rate
}

async fn load(child: &mut Child, joins: bool, bytes: usize, pairs: usize) -> Result<f64> {
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
    let address: SocketAddr = line.trim().parse()?;
    let keys = RoomKeys::derive(&Token::generate(&mut SystemRandom), "bench");
    let counted = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..pairs {
        let (sender, _) = connect(address, joins.then_some(&keys)).await?;
        let (receiver, to) = connect(address, joins.then_some(&keys)).await?;
        let frame = message(to, 0, &vec![7; bytes]);
        let free = Arc::new(Semaphore::new(UNDER_WAY));
        tasks.spawn(count(receiver, free.clone(), counted.clone()));
        tasks.spawn(send(sender, frame, free));
    }
    tokio::time::sleep(WARM_UP).await;
    let (start, before) = (Instant::now(), counted.load(Relaxed));
    tokio::time::sleep(COUNTED).await;
    let rate = (counted.load(Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    match tasks.try_join_next() {
        Some(ended) => bail!("a client did not stay: {ended:?}"),
        None => Ok(rate),
    }
}

/// Connects, and joins if there are keys to join with. Answers with the slot, or with none in particular.
async fn connect(address: SocketAddr, keys: Option<&RoomKeys>) -> Result<(Client, Slot)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut request = format!("ws://relay{RELAY_PATH}").into_client_request()?;
    if keys.is_some() {
        request.headers_mut().insert("sec-websocket-protocol", RELAY_PROTOCOL.parse()?);
    }
    let (mut client, _) = tokio_tungstenite::client_async(request, stream).await?;
    let Some(keys) = keys else { return Ok((client, Slot(0))) };
    loop {
        let Message::Binary(frame) = client.next().await.context("the relay went away")?? else { continue };
        match RelayFrame::read(&frame)? {
            RelayFrame::Control(RelayToPeer::Challenge(challenge)) => {
                let (identity, instance) =
                    (StaticSecret::from(random::bytes()), InstanceId::from_bytes(random::bytes()));
                let join = admission::join(&challenge, keys, &identity, instance, vec![7; 100])?;
                client.send(Message::Binary(control(&PeerToRelay::Join(join)))).await?;
            }
            RelayFrame::Control(RelayToPeer::Welcome(Welcome { slot, .. })) => return Ok((client, slot)),
            other @ (RelayFrame::Control(_)
            | RelayFrame::Message { .. }
            | RelayFrame::MulticastShare { .. }
            | RelayFrame::Datagram(_)) => bail!("no welcome but {other:?}"),
        }
    }
}

async fn send(mut client: Client, frame: Bytes, free: Arc<Semaphore>) -> Result<()> {
    loop {
        if free.available_permits() == 0 {
            client.flush().await?;
        }
        free.acquire().await?.forget();
        client.feed(Message::Binary(frame.clone())).await?;
    }
}

async fn count(mut client: Client, free: Arc<Semaphore>, counted: Arc<AtomicU64>) -> Result<()> {
    loop {
        let message = client.next().await.context("the server went away")??;
        // The first byte of a Message frame; what the relay itself says is not counted.
        if message.is_binary() && message.into_data().first() == Some(&2) {
            counted.fetch_add(1, Relaxed);
            free.add_permits(1);
        }
    }
}
