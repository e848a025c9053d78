//! Messages that the relay forwards per second, beside a bare tokio-tungstenite forwarder.
//!
//! In: `relay_forward [RUNS] [BYTES] [PAIRS]`. Out: floor and ours of each run, taken in turn, their medians and ratio.
//! Floor and relay run in child processes (`--floor`, `--serve`); the load is this process, the same for both: pairs of
//! clients, one sending with a bounded number of messages under way, one counting.

#![expect(clippy::print_stdout, reason = "figures are what a bench is for")]

use std::{
    convert::Infallible,
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
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest},
};
use x25519_dalek::StaticSecret;

/// Messages of one pair that are under way at most: below the relay's message queue, so that nothing is refused.
const UNDER_WAY: usize = 512;

/// Time before counting begins.
const WARM_UP: Duration = Duration::from_millis(500);

/// Time of counting.
const COUNTED: Duration = Duration::from_secs(3);

type Client = WebSocketStream<TcpStream>;

struct Entropy;

impl rand_core::TryRng for Entropy {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(random()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(random()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        getrandom::fill(bytes).expect("the system has randomness");
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Entropy {}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system has randomness");
    bytes
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--floor") => return floor().await,
        Some("--serve") => return serve().await,
        Some(_) | None => {}
    }
    let number = |at: usize, default| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (runs, bytes, pairs) = (number(0, 5)?, number(1, 1024)?, number(2, 4)?);
    let (mut floors, mut ours) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        floors.push(measure("--floor", bytes, pairs).await?);
        ours.push(measure("--serve", bytes, pairs).await?);
        println!("run {run}: floor {:.0}/s, relay {:.0}/s", floors[run - 1], ours[run - 1]);
    }
    let (floor, ours) = (median(floors), median(ours));
    println!("{bytes} B messages, {pairs} pairs: floor {floor:.0}/s, relay {ours:.0}/s, ratio {:.2}", ours / floor);
    Ok(())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Pairs connections as they come and passes on what each one says to the other, untouched.
async fn floor() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    loop {
        let (one_out, one_in) = accept(&listener).await?.split();
        let (other_out, other_in) = accept(&listener).await?.split();
        tokio::spawn(one_in.forward(other_out));
        tokio::spawn(other_in.forward(one_out));
    }
}

async fn accept(listener: &TcpListener) -> Result<Client> {
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok(tokio_tungstenite::accept_async(stream).await?)
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
    let keys = RoomKeys::derive(&Token::generate(&mut Entropy), "bench");
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
                let (identity, instance) = (StaticSecret::from(random()), InstanceId::from_bytes(random()));
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
