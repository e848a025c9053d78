//! Bare quinn: one process sends bytes from memory, another takes and forgets them.
//!
//! Same cipher suites, key exchange and windows as our links, GSO on, each endpoint on a current-thread runtime, which
//! is quinn at its best; no file, no hash, no relay beside it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use quinn::{ClientConfig, Endpoint, ServerConfig, TransportConfig, VarInt};
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
    config.transport_config(transport());
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
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(certificate))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(transport());
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse()?)?;
    endpoint.set_default_client_config(config);
    let start = std::time::Instant::now();
    let connection = endpoint.connect(server, "localhost")?.await?;
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

async fn send_stream(connection: &quinn::Connection, total: u64) -> Result<()> {
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

fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.stream_receive_window(VarInt::from_u32(2_500_000));
    config.receive_window(VarInt::from_u32(32 * 1024 * 1024));
    config.send_window(32 * 1024 * 1024);
    Arc::new(config)
}

#[expect(clippy::print_stdout, reason = "the parent reads the address from here")]
fn announce(addr: SocketAddr) {
    println!("{addr}");
}
