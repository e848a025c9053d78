//! A bare tokio-tungstenite forwarder: two clients, each of whose messages goes to the other, and nothing else.
//!
//! No rooms, no admission, no queues, no sealing: what a relay would be if it did nothing but forward.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

/// A client's end.
pub type Client = WebSocketStream<TcpStream>;

/// Pairs connections as they come and forwards between them, printing its address first.
///
/// # Errors
/// Those of the sockets.
pub async fn serve() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    announce(listener.local_addr()?);
    loop {
        let one = accept(&listener).await?;
        let other = accept(&listener).await?;
        let (one_out, one_in) = one.split();
        let (other_out, other_in) = other.split();
        tokio::spawn(one_in.forward(other_out));
        tokio::spawn(other_in.forward(one_out));
    }
}

async fn accept(listener: &TcpListener) -> Result<WebSocketStream<TcpStream>> {
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok(tokio_tungstenite::accept_async(stream).await?)
}

/// Connects one client.
///
/// # Errors
/// Those of the socket.
pub async fn connect(forwarder: SocketAddr) -> Result<Client> {
    let stream = TcpStream::connect(forwarder).await?;
    stream.set_nodelay(true)?;
    let (client, _) = tokio_tungstenite::client_async(format!("ws://{forwarder}/"), stream).await?;
    Ok(client)
}

/// Takes `total` bytes and acknowledges them with one message.
///
/// # Errors
/// If the connection ends before.
pub async fn take(mut client: Client, total: u64) -> Result<()> {
    let mut left = total;
    while left > 0 {
        let message = client.next().await.context("the forwarder went away")??;
        left = left.saturating_sub(message.len() as u64);
    }
    client.send(Message::Binary(Bytes::from_static(b"k"))).await?;
    // Until the other side has read it and left.
    while client.next().await.is_some() {}
    Ok(())
}

/// Sends `total` bytes in messages of `size` and returns the time until they were acknowledged.
///
/// # Errors
/// If the connection ends before.
pub async fn send(mut client: Client, total: u64, size: usize) -> Result<Duration> {
    let message = Bytes::from(vec![0x5A; size]);
    let start = Instant::now();
    let mut left = total;
    while left > 0 {
        let len = left.min(size as u64);
        client.feed(Message::Binary(message.slice(..usize::try_from(len)?))).await?;
        left -= len;
    }
    client.flush().await?;
    match client.next().await {
        Some(Ok(Message::Binary(word))) if word == "k" => Ok(start.elapsed()),
        other => bail!("no acknowledgement but {other:?}"),
    }
}

/// Sends back whatever comes, until the other side leaves.
///
/// # Errors
/// Those of the socket.
pub async fn echo(mut client: Client) -> Result<()> {
    while let Some(Ok(message)) = client.next().await {
        if message.is_binary() {
            client.send(message).await?;
        }
    }
    Ok(())
}

/// One round trip of a small message through the forwarder to an echoing client.
///
/// # Errors
/// If the connection ends before.
pub async fn round_trip(client: &mut Client, message: &Bytes) -> Result<Duration> {
    let start = Instant::now();
    client.send(Message::Binary(message.clone())).await?;
    client.next().await.context("the forwarder went away")??;
    Ok(start.elapsed())
}

#[expect(clippy::print_stdout, reason = "the parent reads the address from here")]
fn announce(addr: SocketAddr) {
    println!("{addr}");
}
