//! Bare quinn: one process sends bytes from memory, another takes and forgets them.
//!
//! Same cipher suites, key exchange and windows as our links, GSO on, each endpoint on a current-thread runtime, which
//! is quinn at its best; no file, no hash, no relay beside it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use quinn::{
    ClientConfig, Connection, Endpoint, ServerConfig, TransportConfig, VarInt,
    congestion::{ControllerFactory, CubicConfig},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

/// Streams side by side, as a transfer uses them.
const STREAMS: u64 = 4;

/// Bytes that are handed to a stream at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// Receives `bytes` from one client and then acknowledges, printing its address first.
///
/// # Errors
/// Those of the connection.
pub async fn serve(certificate: Vec<u8>, key: Vec<u8>) -> Result<()> {
    let certificate = vec![CertificateDer::from(certificate)];
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    let mut config = ServerConfig::with_single_cert(certificate, key)?;
    config.transport_config(transport(Arc::<CubicConfig>::default()));
    let endpoint = Endpoint::server(config, "127.0.0.1:0".parse()?)?;
    announce(endpoint.local_addr()?);
    while let Some(incoming) = endpoint.accept().await {
        let connection = incoming.await?;
        tokio::spawn(async move {
            while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                tokio::spawn(async move {
                    while let Ok(Some(_)) = recv.read_chunk(usize::MAX, false).await {}
                    // The client waits for this: it is the proof that all bytes arrived.
                    let _ = send.write_all(b"k").await;
                    let _ = send.finish();
                });
            }
        });
    }
    Ok(())
}

/// Sends `total` bytes and returns the time from the first to the last acknowledgement.
///
/// # Errors
/// Those of the connection.
pub async fn send(server: SocketAddr, certificate: Vec<u8>, total: u64) -> Result<Duration> {
    let (endpoint, server_name) = (client(certificate, Arc::<CubicConfig>::default())?, "localhost");
    let start = std::time::Instant::now();
    let connection = endpoint.connect(server, server_name)?.await?;
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        let connection = connection.clone();
        streams.spawn(async move { send_stream(&connection, total / STREAMS).await });
    }
    while let Some(sent) = streams.join_next().await {
        sent??;
    }
    Ok(start.elapsed())
}

/// What arrived of all that was sent for a while, and what did not.
#[derive(Debug, Clone, Copy)]
pub struct Poured {
    /// Megabits a second that arrived.
    pub megabits: f64,
    /// Hundredths of the packets that were lost.
    pub lost_percent: f64,
}

/// Sends for so long as fast as this congestion control allows.
///
/// # Errors
/// Those of the connection.
pub async fn pour(
    server: SocketAddr,
    certificate: Vec<u8>,
    time: Duration,
    congestion: Arc<dyn ControllerFactory + Send + Sync>,
) -> Result<Poured> {
    let endpoint = client(certificate, congestion)?;
    let connection = endpoint.connect(server, "localhost")?.await?;
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        let connection = connection.clone();
        streams.spawn(async move { send_stream(&connection, u64::MAX).await });
    }
    tokio::time::sleep(time).await;
    if let Some(ended) = streams.try_join_next() {
        ended??;
    }
    let stats = connection.stats();
    connection.close(VarInt::from_u32(0), b"");
    endpoint.wait_idle().await;
    let arrived = stats.udp_tx.bytes.saturating_sub(stats.path.lost_bytes);
    Ok(Poured {
        megabits: arrived as f64 * 8e-6 / time.as_secs_f64(),
        lost_percent: stats.path.lost_packets as f64 * 100.0 / stats.path.sent_packets.max(1) as f64,
    })
}

fn client(certificate: Vec<u8>, congestion: Arc<dyn ControllerFactory + Send + Sync>) -> Result<Endpoint> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(certificate))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(transport(congestion));
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse()?)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

async fn send_stream(connection: &Connection, total: u64) -> Result<()> {
    let chunk = Bytes::from(vec![0x5A; CHUNK_BYTES]);
    let (mut send, mut recv) = connection.open_bi().await?;
    let mut left = total;
    while left > 0 {
        let len = left.min(CHUNK_BYTES as u64);
        send.write_chunk(chunk.slice(..usize::try_from(len)?)).await?;
        left -= len;
    }
    send.finish()?;
    let acknowledged = recv.read_to_end(8).await.context("the receiver went away")?;
    if acknowledged != b"k" {
        bail!("the receiver did not acknowledge");
    }
    Ok(())
}

fn transport(congestion: Arc<dyn ControllerFactory + Send + Sync>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.stream_receive_window(VarInt::from_u32(2_500_000));
    config.receive_window(VarInt::from_u32(32 * 1024 * 1024));
    config.send_window(32 * 1024 * 1024);
    config.congestion_controller_factory(congestion);
    Arc::new(config)
}

#[expect(clippy::print_stdout, reason = "the parent reads the address from here")]
fn announce(addr: SocketAddr) {
    println!("{addr}");
}
