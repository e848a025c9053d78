//! Resident memory of the relay per idle joined peer, the peers' sockets being in another process.
//!
//! In: `relay_memory [PEERS] [PEERS_PER_ROOM]`. Out: what the relay's memory grew by when they joined, per peer.
//! The relay runs in a child process (`--serve`), with limits that let everybody in from one address.

#![expect(clippy::print_stdout, reason = "figures are what a bench is for")]

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use peerfleet_benches::{report_absolute, resident};
use peerfleet_peer::random::{self, SystemRandom};
use peerfleet_proto::{
    admission,
    id::InstanceId,
    token::{RoomKeys, Token},
    wire::{
        RELAY_PATH, RELAY_PROTOCOL,
        relay::{PeerToRelay, RelayFrame, RelayToPeer, control},
    },
};
use peerfleet_relay::{Config, Relay, limits::Limits};
use tokio::{net::TcpStream, sync::watch, task::JoinSet};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest, protocol::WebSocketConfig},
};
use x25519_dalek::StaticSecret;

/// Sealed presence of a well-tagged host, in bytes.
const PRESENCE_BYTES: usize = 400;

/// Peers of a usual room; a larger one is promised less, since each peer's presence is told to more.
const ROOM: usize = 10;

/// Joins that are under way at a time.
const AT_A_TIME: usize = 32;

/// Time for buffers of joining to be given back, before memory is read.
const SETTLE: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--serve") {
        return serve().await;
    }
    let number = |at: usize, default| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (peers, per_room): (usize, usize) = (number(0, 2000)?, number(1, 10)?);
    let mut child = Command::new(std::env::current_exe()?).arg("--serve").stdout(Stdio::piped()).spawn()?;
    let measured = measure(&mut child, peers, per_room).await;
    child.kill()?;
    child.wait()?;
    measured
}

async fn serve() -> Result<()> {
    let default = Config::default();
    let limits = Limits { per_address: usize::MAX, per_address_rate: u32::MAX, ..default.limits };
    let relay = Relay::bind(Config { bind: vec!["127.0.0.1:0".parse()?], limits, ..default })?;
    println!("{}", relay.local_addrs()[0]);
    relay.run().await;
    Ok(())
}

async fn measure(child: &mut Child, peers: usize, per_room: usize) -> Result<()> {
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
    let address: SocketAddr = line.trim().parse()?;
    let before = resident(child.id())?.0;
    let (joined, mut count) = watch::channel(0);
    let mut crowd = JoinSet::new();
    let mut keys = Vec::new();
    for number in 0..peers {
        if number % per_room == 0 {
            keys.push(std::sync::Arc::new(RoomKeys::derive(&Token::generate(&mut SystemRandom), "bench")));
        }
        let (keys, joined) = (keys[number / per_room].clone(), joined.clone());
        count.wait_for(|count| *count + AT_A_TIME > number).await?;
        crowd.spawn(async move { idle(address, &keys, &joined).await });
    }
    count.wait_for(|count| *count == peers).await?;
    tokio::time::sleep(SETTLE).await;
    let after = resident(child.id())?.0;
    let each = (after.saturating_sub(before)) as f64 / peers as f64 / 1024.0;
    let bound = if per_room > ROOM { "≤ 16" } else { "≤ 12" };
    report_absolute(&format!("relay memory per idle peer, {peers} in rooms of {per_room}"), "KiB", each, bound);
    if let Some(ended) = crowd.try_join_next() {
        bail!("a peer did not stay: {ended:?}");
    }
    Ok(())
}

/// Joins, and then reads whatever comes.
async fn idle(address: SocketAddr, keys: &RoomKeys, joined: &watch::Sender<usize>) -> Result<()> {
    let stream = TcpStream::connect(address).await?;
    let mut request = format!("ws://relay{RELAY_PATH}").into_client_request()?;
    request.headers_mut().insert("sec-websocket-protocol", RELAY_PROTOCOL.parse()?);
    let config = WebSocketConfig::default().read_buffer_size(4096);
    let (mut ws, _) = tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await?;
    loop {
        match word(&mut ws).await? {
            Some(RelayToPeer::Challenge(challenge)) => {
                let (identity, instance) =
                    (StaticSecret::from(random::bytes()), InstanceId::from_bytes(random::bytes()));
                let join = admission::join(&challenge, keys, &identity, instance, vec![7; PRESENCE_BYTES])?;
                ws.send(Message::Binary(control(&PeerToRelay::Join(join)))).await?;
            }
            Some(RelayToPeer::Roster { last: true, .. }) => joined.send_modify(|count| *count += 1),
            Some(RelayToPeer::Closing(reason)) => bail!("the relay closes: {reason}"),
            Some(_) | None => {}
        }
    }
}

async fn word(ws: &mut WebSocketStream<TcpStream>) -> Result<Option<RelayToPeer>> {
    let message = ws.next().await.context("the relay went away")??;
    let Message::Binary(frame) = message else { return Ok(None) };
    match RelayFrame::read(&frame)? {
        RelayFrame::Control(word) => Ok(Some(word)),
        RelayFrame::Message { .. } | RelayFrame::MulticastShare { .. } | RelayFrame::Datagram(_) => Ok(None),
    }
}
