//! From the name of a relay to a WebSocket: address lookup, TCP, upgrade.
//!
//! In: a [`RelayUrl`] that the user gave. Out: an open WebSocket that speaks our sub-protocol, and the relay's
//! addresses. Never contacts anything that the URL does not name.
//! Bounds: [`CONNECT_DEADLINE`] for all of it; a further address is tried [`NEXT_ATTEMPT`] after the one before.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use peerfleet_proto::{
    limits::MAX_FRAME_BYTES,
    wire::{RELAY_PATH, RELAY_PROTOCOL},
};
use tokio::{
    net::{TcpStream, lookup_host},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self,
        client::IntoClientRequest,
        http::{HeaderValue, Uri, header::SEC_WEBSOCKET_PROTOCOL},
        protocol::WebSocketConfig,
    },
};

/// Time for lookup, connection and upgrade together, as long as the relay gives us to join.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Head start of one address before the next is tried beside it (RFC 8305 §5).
const NEXT_ATTEMPT: Duration = Duration::from_millis(250);

/// Bytes read from the socket at once: four batches of packets; the buffer is all that an idle connection holds.
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// Bytes gathered before the socket is written.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// Where a relay is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelayUrl {
    secure: bool,
    host: String,
    port: u16,
    base: String,
}

/// A text is not the address of a relay.
/// The text is not repeated: people put secrets into URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a relay's address: {why}; write it as ws://HOST:PORT or wss://HOST")]
pub struct InvalidRelayUrl {
    why: &'static str,
}

impl RelayUrl {
    /// The relay's host name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The relay's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the connection is to be wrapped into TLS.
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "wss" } else { "ws" };
        write!(f, "{scheme}://{}{}", self.authority(), self.base)
    }
}

impl FromStr for RelayUrl {
    type Err = InvalidRelayUrl;

    fn from_str(text: &str) -> Result<Self, InvalidRelayUrl> {
        let invalid = |why| InvalidRelayUrl { why };
        let uri: Uri = text.trim().parse().map_err(|_| invalid("it does not read as a URL"))?;
        let secure = match uri.scheme_str() {
            Some("ws") => false,
            Some("wss") => true,
            Some(_) => return Err(invalid("its scheme is neither ws nor wss")),
            None => return Err(invalid("it has no scheme")),
        };
        let authority = uri.authority().ok_or_else(|| invalid("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(invalid("it names a user"));
        }
        if uri.query().is_some() {
            return Err(invalid("it has a query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(invalid("it has no host"));
        }
        let port = match (authority.port_u16(), authority.as_str().rsplit_once(':')) {
            (Some(0), _) => return Err(invalid("port 0 cannot be dialled")),
            (Some(port), _) => port,
            (None, Some((_, rest))) if !rest.ends_with(']') => return Err(invalid("its port is not a number")),
            (None, _) => {
                if secure {
                    443
                } else {
                    80
                }
            }
        };
        let base = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { secure, host: host.to_owned(), port, base })
    }
}

/// Why there is no connection to the relay.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialFault {
    /// TLS is not built in yet.
    #[error("wss:// is not supported yet: use ws://, or put something that ends TLS in front of this machine")]
    Secure,
    /// The name has no address.
    #[error("the name `{host}` has no address: {cause}")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        cause: io::Error,
    },
    /// No address took the connection.
    #[error("{address} does not answer: {cause}")]
    Connect {
        /// The address tried last.
        address: SocketAddr,
        /// Why.
        cause: io::Error,
    },
    /// Something answered that is no relay of ours.
    #[error("it is no peerfleet relay of this version: {0}")]
    Upgrade(#[source] Box<tungstenite::Error>),
    /// It took too long.
    #[error("no answer within {} s", CONNECT_DEADLINE.as_secs())]
    Deadline,
}

/// An open WebSocket to a relay.
pub(super) struct Dialled {
    /// The WebSocket.
    pub(super) socket: WebSocketStream<TcpStream>,
    /// Every address that the relay's name has, the one connected to first.
    pub(super) addresses: Vec<SocketAddr>,
}

/// Connects to a relay.
///
/// # Errors
/// [`DialFault`], after [`CONNECT_DEADLINE`] at the latest.
pub(super) async fn dial(url: &RelayUrl) -> Result<Dialled, DialFault> {
    if url.secure {
        return Err(DialFault::Secure);
    }
    timeout(CONNECT_DEADLINE, dial_plain(url)).await.unwrap_or(Err(DialFault::Deadline))
}

async fn dial_plain(url: &RelayUrl) -> Result<Dialled, DialFault> {
    let mut addresses = lookup(url).await?;
    let (stream, address) = connect_any(&addresses).await?;
    addresses.retain(|other| *other != address);
    addresses.insert(0, address);
    // Frames are gathered by us before a flush: waiting for more would only delay them.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "small frames may be delayed");
    }
    let upgraded = client_async_with_config(upgrade_request(url)?, stream, Some(websocket_config())).await;
    let (socket, _response) = upgraded.map_err(|error| DialFault::Upgrade(Box::new(error)))?;
    Ok(Dialled { socket, addresses })
}

fn upgrade_request(url: &RelayUrl) -> Result<tungstenite::handshake::client::Request, DialFault> {
    let uri = format!("ws://{}{}{RELAY_PATH}", url.authority(), url.base);
    let mut request = uri.into_client_request().map_err(|error| DialFault::Upgrade(Box::new(error)))?;
    request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(RELAY_PROTOCOL));
    Ok(request)
}

fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(2 * WRITE_BUFFER_BYTES + MAX_FRAME_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES))
}

async fn lookup(url: &RelayUrl) -> Result<Vec<SocketAddr>, DialFault> {
    let fault = |cause| DialFault::Lookup { host: url.host.clone(), cause };
    if let Ok(ip) = url.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, url.port)]);
    }
    let found: Vec<SocketAddr> = lookup_host((url.host.as_str(), url.port)).await.map_err(fault)?.collect();
    if found.is_empty() {
        return Err(fault(io::ErrorKind::NotFound.into()));
    }
    Ok(by_turns(found))
}

/// IPv6 and IPv4 by turns, the family that the resolver prefers first (RFC 8305 §4).
fn by_turns(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let v6_first = found.first().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|address| address.is_ipv6() == v6_first);
    let mut mixed = Vec::with_capacity(first.len() + second.len());
    first.reverse();
    second.reverse();
    while !(first.is_empty() && second.is_empty()) {
        mixed.extend(first.pop());
        mixed.extend(second.pop());
    }
    mixed
}

/// The first of the addresses that takes a connection, each with a head start before the next.
async fn connect_any(addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), DialFault> {
    let mut attempts = JoinSet::new();
    let mut last_fault = DialFault::Deadline;
    for address in addresses.iter().copied() {
        attempts.spawn(async move { (address, TcpStream::connect(address).await) });
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok((address, Ok(stream))) => return Ok((stream, address)),
                Ok((address, Err(cause))) => last_fault = DialFault::Connect { address, cause },
                Err(_) => {}
            },
            () = sleep(NEXT_ATTEMPT) => {}
        }
    }
    while let Some(ended) = attempts.join_next().await {
        match ended {
            Ok((address, Ok(stream))) => return Ok((stream, address)),
            Ok((address, Err(cause))) => last_fault = DialFault::Connect { address, cause },
            Err(_) => {}
        }
    }
    Err(last_fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_url_reads_back_with_its_port_written_out() {
        for (text, written) in [
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080"),
            ("ws://relay.example.net", "ws://relay.example.net:80"),
            ("wss://relay.example.net/", "wss://relay.example.net:443"),
            ("ws://[::1]:9/fleet/", "ws://[::1]:9/fleet"),
        ] {
            let url: RelayUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), written);
            assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn rejects_what_does_not_name_a_relay() {
        for text in
            ["", "relay", "http://relay", "ws://", "ws://u:p@relay", "ws://relay?x", "ws://relay:0", "ws://relay:x"]
        {
            assert!(text.parse::<RelayUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn address_families_take_turns() {
        let v4 = |last| SocketAddr::from(([192, 0, 2, last], 1));
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        assert_eq!(by_turns(vec![v4(1), v4(2), v6]), vec![v4(1), v6, v4(2)]);
    }

    #[tokio::test]
    async fn a_dead_address_does_not_keep_from_a_live_one() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let live = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (_, address) = connect_any(&[closed, live.local_addr().unwrap()]).await.unwrap();
        assert_eq!(address, live.local_addr().unwrap());
    }

    #[tokio::test]
    async fn what_is_no_relay_is_named_as_such() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url: RelayUrl = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 404 Not Found\r\n\r\n").await.unwrap();
        });
        assert!(matches!(dial(&url).await, Err(DialFault::Upgrade(_))));
    }
}
