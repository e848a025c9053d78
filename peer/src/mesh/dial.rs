//! From the name of a relay to a WebSocket: address lookup, TCP, proxy, TLS, upgrade.
//!
//! In: a [`RelayUrl`] and a [`DialConfig`] that the user gave. Out: an open WebSocket that speaks our sub-protocol, and
//! the relay's addresses. Never contacts anything that neither of the two names, and never says a proxy's credentials
//! to anybody but that proxy.
//! Lookup -> TCP -> [TLS to the proxy ->] [CONNECT ->] [TLS to the relay ->] upgrade.
//! Bounds: [`DIAL_DEADLINE`] for all of it, whichever step it is spent on; those of the steps are in their modules.

use std::{future::pending, net::SocketAddr, time::Duration};

use peerfleet_proto::limits::MAX_FRAME_BYTES;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::{WebSocketStream, client_async_with_config, tungstenite::protocol::WebSocketConfig};

use super::carrier::Carrier;

mod addresses;
mod fault;
mod proxy;
mod tls;
mod transport;
mod upgrade;
mod url;

pub use proxy::{InvalidProxy, Proxy, ProxyChoice};
pub use tls::{Authorities, InvalidAuthorities};
pub use url::{InvalidRelayUrl, RelayUrl};

pub(super) use fault::DialFault;
use fault::{Party, Step};
pub(super) use transport::Transport;

/// Time for all steps together. Below the ten seconds that a command waits for its room, so that it can still say which
/// step they were spent on; three tries of a lost SYN (1, 2 and 4 s, RFC 6298 §2) fit in.
const DIAL_DEADLINE: Duration = Duration::from_secs(9);

/// How much longer than the way through a proxy the lookup of the relay's own name may take. Behind a proxy many names
/// have no address here, and some networks never say so; the addresses are wanted for direct paths alone.
const LOOKUP_GRACE: Duration = Duration::from_millis(250);

/// Bytes that the WebSocket library reads at once: it clears as many before each read. It grows to what a message takes.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// What a relay is dialled with besides its URL.
#[derive(Debug, Clone, Default)]
pub struct DialConfig {
    /// The proxy to go through, if any.
    pub proxy: Option<Proxy>,
    /// Whom to trust besides the system's certificate authorities.
    pub authorities: Authorities,
}

/// An open WebSocket to a relay.
pub(super) type RelaySocket = WebSocketStream<Carrier>;

/// A connection to a relay.
pub(super) struct Dialled {
    /// The WebSocket.
    pub(super) socket: RelaySocket,
    /// Every address that the relay's name has, the one connected to first; behind a proxy maybe none.
    pub(super) addresses: Vec<SocketAddr>,
}

/// Connects to a relay.
///
/// # Errors
/// [`DialFault`], after [`DIAL_DEADLINE`] at the latest.
pub(super) async fn dial(url: &RelayUrl, config: &DialConfig) -> Result<Dialled, DialFault> {
    Attempt { url, config, deadline: Instant::now() + DIAL_DEADLINE }.dial().await
}

/// A connection to a relay, wrapped into TLS if its URL says so, on which nothing was asked yet, and the relay's addresses,
/// the one connected to first.
///
/// # Errors
/// [`DialFault`], after [`DIAL_DEADLINE`] at the latest.
pub(super) async fn connect(url: &RelayUrl, config: &DialConfig) -> Result<(Transport, Vec<SocketAddr>), DialFault> {
    Attempt { url, config, deadline: Instant::now() + DIAL_DEADLINE }.reach().await
}

/// One try to connect.
struct Attempt<'a> {
    url: &'a RelayUrl,
    config: &'a DialConfig,
    deadline: Instant,
}

impl Attempt<'_> {
    async fn dial(&self) -> Result<Dialled, DialFault> {
        let (stream, addresses) = self.reach().await?;
        let relay = Party::Relay(self.url.authority());
        let request = upgrade::request(self.url);
        let upgrading = client_async_with_config(request, Carrier::new(stream), Some(websocket_config()));
        let upgraded = self.within(Step::Upgrade, &relay, upgrading).await?;
        let (socket, _response) = upgraded.map_err(|error| upgrade::fault(self.url, error))?;
        Ok(Dialled { socket, addresses })
    }

    /// All that comes before the first word to the relay.
    async fn reach(&self) -> Result<(Transport, Vec<SocketAddr>), DialFault> {
        let (stream, addresses) = match &self.config.proxy {
            Some(proxy) => self.through(proxy).await?,
            None => self.directly().await?,
        };
        let relay = Party::Relay(self.url.authority());
        let stream = if self.url.is_secure() { self.wrap(stream, self.url.host(), relay).await? } else { stream };
        Ok((stream, addresses))
    }

    async fn directly(&self) -> Result<(Transport, Vec<SocketAddr>), DialFault> {
        let relay = Party::Relay(self.url.authority());
        let mut found = self.lookup(self.url.host(), self.url.port(), &relay).await?;
        let (stream, address) = self.connect(&found, relay).await?;
        found.retain(|other| *other != address);
        found.insert(0, address);
        Ok((stream, found))
    }

    /// A tunnel to the relay through a proxy; the relay's own addresses, as far as they can be had in the same time.
    async fn through(&self, proxy: &Proxy) -> Result<(Transport, Vec<SocketAddr>), DialFault> {
        let lookup = addresses::lookup(self.url.host(), self.url.port());
        tokio::pin!(lookup);
        let tunnel = self.tunnel(proxy);
        tokio::pin!(tunnel);
        let mut found = None;
        let stream = loop {
            tokio::select! {
                stream = &mut tunnel => break stream?,
                ended = async { if found.is_none() { (&mut lookup).await } else { pending().await } } => {
                    found = Some(ended.unwrap_or_default());
                }
            }
        };
        let addresses = match found {
            Some(addresses) => addresses,
            None => timeout(LOOKUP_GRACE, lookup).await.ok().and_then(Result::ok).unwrap_or_default(),
        };
        Ok((stream, addresses))
    }

    async fn tunnel(&self, proxy: &Proxy) -> Result<Transport, DialFault> {
        let party = Party::Proxy(proxy.to_string());
        let found = self.lookup(proxy.host(), proxy.port(), &party).await?;
        let (stream, _) = self.connect(&found, party.clone()).await?;
        let mut stream = if proxy.is_secure() { self.wrap(stream, proxy.host(), party.clone()).await? } else { stream };
        let target = self.url.authority();
        let asked = self.within(Step::Tunnel, &party, proxy::tunnel(&mut stream, proxy, &target)).await?;
        asked.map_err(|fault| DialFault::Proxy { proxy: proxy.to_string(), target, fault })?;
        Ok(stream)
    }

    async fn lookup(&self, host: &str, port: u16, party: &Party) -> Result<Vec<SocketAddr>, DialFault> {
        let found = self.within(Step::Lookup, party, addresses::lookup(host, port)).await?;
        found.map_err(|cause| DialFault::Lookup { host: host.to_owned(), cause })
    }

    async fn connect(&self, found: &[SocketAddr], party: Party) -> Result<(Transport, SocketAddr), DialFault> {
        let connected = self.within(Step::Connect, &party, addresses::connect_any(found)).await?;
        let (stream, address) = connected.map_err(|attempts| DialFault::Connect { party, attempts })?;
        // Frames are gathered by us before a flush: waiting for more would only delay them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "small frames may be delayed");
        }
        Ok((Transport::Plain(stream), address))
    }

    async fn wrap(&self, stream: Transport, host: &str, party: Party) -> Result<Transport, DialFault> {
        let wrapped = self.within(Step::Tls, &party, tls::wrap(stream, host, &self.config.authorities)).await?;
        wrapped.map_err(|fault| DialFault::Tls { party, fault })
    }

    async fn within<T>(&self, step: Step, party: &Party, work: impl Future<Output = T>) -> Result<T, DialFault> {
        timeout_at(self.deadline, work).await.map_err(|_| DialFault::Deadline { party: party.clone(), step })
    }
}

fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_FRAME_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES))
}
