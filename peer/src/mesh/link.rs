//! Links: QUIC connections to other instances, each over one mapped address, on a thread of their own.
//!
//! In: whom to dial or let in, with the key it announced. Out: [`LinkEvent`]s and connections whose other side has
//! proved that key. Never dials or lets in without an announced key, and never looks at what streams carry.
//! Expected (offered, key not yet known: an early caller is held) -> open (key known) -> up (key proved) -> down.
//! Bounds: [`MAX_STREAMS`] incoming streams, [`WINDOW_BYTES`] in flight each way per link; an early caller waits as long
//! as QUIC's own handshake.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::path::search::SocketId;
use quinn::{
    AsyncTimer, AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, Runtime,
    ServerConfig, TransportConfig, VarInt,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::{Sleep, sleep_until, timeout},
};

use super::{
    congestion::PathAwareFactory,
    extra::ExtraSockets,
    mtu,
    routes::Remote,
    socket::{FromSocket, MappedSocket, Switch},
    tls::{AnnouncedKey, SERVER_NAME, TlsKey},
};

/// Incoming streams that may be open at once on one link; the other side waits to open more.
pub(super) const MAX_STREAMS: u32 = 256;

/// Silence after which a link is lost. Longer than a relay's restart and the longest pause before joining again with a
/// keep-alive before it, so that a relayed stream survives both.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Interval of keep-alives. 15 s: half of the 30 s after which NATs forget a flow; and since they are acknowledged, they spare
/// the path machine its longer checks, which come sooner only where a NAT is seen to forget sooner.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How much later the side that was dialled would send one: the other's, which comes first, spares it its own.
const LATER: Duration = Duration::from_secs(2);

/// Bytes that one stream may have in flight. Less than 2 × 1,024 × 1,452: beyond that, losses can leave more gaps than
/// QUIC keeps track of on one ordered stream, and it gives up the connection.
const STREAM_WINDOW_BYTES: u32 = 2_500_000;

/// Bytes that one link may have in flight each way: 1 Gbit/s at 128 ms, and what a link may cost in memory.
const WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Round trip assumed before one is measured: the first retransmission comes after 3 of these.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Bytes of kicks kept, which nobody reads: see [`kick`].
const KICK_BUFFER_BYTES: usize = 64;

/// Callers that may wait for an answer at once; more are ignored and try again by themselves.
const MAX_CALLERS: usize = 64;

/// Bytes kept of the first packets of one caller, and of all, before it is let in.
const CALLER_BYTES: u64 = 16 * 1024;

/// Time that links are given to say goodbye when the process leaves.
const GOODBYE: Duration = Duration::from_millis(500);

/// QUIC's application code of an end in good order.
pub(super) const CODE_DONE: VarInt = VarInt::from_u32(0);

/// QUIC's application code of a link that nobody used for a while: whatever was opened on it since was not looked at.
pub(super) const CODE_UNUSED: VarInt = VarInt::from_u32(2);

/// QUIC's application code where the key shown is not the key announced.
const CODE_WRONG_KEY: VarInt = VarInt::from_u32(1);

/// What happens to links.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// The other side proved its announced key.
    Up {
        /// The link's mapped address.
        mapped: SocketAddr,
        /// The connection.
        connection: Connection,
    },
    /// The connection ended, or never came to be.
    Down {
        /// The link's mapped address.
        mapped: SocketAddr,
        /// Which connection, if it was up.
        connection: Option<usize>,
        /// Why, in words.
        why: String,
    },
}

/// The thread that drives every link, and what may be asked of it.
pub(super) struct Links {
    endpoint: Endpoint,
    socket: Arc<MappedSocket>,
    extra: ExtraSockets,
    shared: Arc<Shared>,
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    ended: oneshot::Receiver<()>,
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").finish_non_exhaustive()
    }
}

struct Shared {
    tls: Arc<TlsKey>,
    gates: Mutex<HashMap<SocketAddr, Gate>>,
    events: mpsc::Sender<LinkEvent>,
}

/// Whether a caller under a mapped address is let in.
enum Gate {
    /// Its key is not known yet; the first caller is held.
    Expected(Option<Box<Incoming>>),
    /// Whoever shows this key is let in.
    Open(Arc<Remote>, AnnouncedKey),
}

/// Where links get their packets, and whom they tell.
pub(super) struct LinksConfig {
    /// This process's TLS key.
    pub(super) tls: Arc<TlsKey>,
    /// What lies between the links and the uplink.
    pub(super) switch: Arc<Switch>,
    /// Whether to open a UDP socket.
    pub(super) udp: bool,
    /// Notes for the path machine.
    pub(super) notes: mpsc::Sender<FromSocket>,
    /// What happens to links.
    pub(super) events: mpsc::Sender<LinkEvent>,
}

impl Links {
    /// Starts the thread and opens the socket.
    ///
    /// # Errors
    /// Those of making a thread, a runtime or an endpoint.
    pub(super) async fn start(config: LinksConfig) -> io::Result<Self> {
        let (started, wait) = oneshot::channel();
        std::thread::Builder::new().name("links".into()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(error))),
            };
            let handle = runtime.handle().clone();
            runtime.block_on(async move {
                let (stop, stopped) = oneshot::channel();
                let (end, ended) = oneshot::channel();
                let links = open(config, handle, stop, ended);
                let serving = links.as_ref().ok().map(|links| (links.endpoint.clone(), Arc::clone(&links.shared)));
                if started.send(links).is_ok()
                    && let Some((endpoint, shared)) = serving
                {
                    serve(&endpoint, &shared, stopped).await;
                    drop(end);
                }
            });
        })?;
        wait.await.map_err(|_| io::Error::other("the thread of links ended at its start"))?
    }

    /// The port of the UDP socket, and whether it speaks IPv6 too; `None` if links travel by way of the relay only.
    pub(super) fn udp_port(&self) -> Option<(u16, bool)> {
        self.socket.udp_port()
    }

    /// Sends one STUN packet from the socket that links use, or from an extra one.
    pub(super) fn send_stun(&self, from: Option<SocketId>, to: SocketAddr, packet: &[u8]) {
        match from {
            Some(extra) => self.extra.send_stun(extra, to, packet),
            None => self.socket.send_stun(to, packet),
        }
    }

    /// The sockets beside the one that all links use.
    pub(super) fn extra(&mut self) -> &mut ExtraSockets {
        &mut self.extra
    }

    /// Dials the process that announced `key`.
    pub(super) fn dial(&self, remote: &Arc<Remote>, key: AnnouncedKey) {
        let (shared, endpoint, remote) = (Arc::clone(&self.shared), self.endpoint.clone(), Arc::clone(remote));
        self.runtime.spawn(async move {
            mtu::settle(&remote).await;
            let mapped = remote.mapped;
            let mut config = ClientConfig::new(shared.tls.client_to(&key));
            config.transport_config(transport(&remote, KEEP_ALIVE));
            match endpoint.connect_with(config, mapped, SERVER_NAME) {
                Ok(connecting) => shared.see_through(mapped, &key, connecting).await,
                Err(error) => shared.tell_down(mapped, None, error.to_string()).await,
            }
        });
    }

    /// A caller will come under this address, whose key will be known soon.
    pub(super) fn expect(&self, remote: &Remote) {
        self.shared.gates().insert(remote.mapped, Gate::Expected(None));
    }

    /// From now on, whoever shows `key` under this address is let in.
    pub(super) fn let_in(&self, remote: &Arc<Remote>, key: AnnouncedKey) {
        let gate = Gate::Open(Arc::clone(remote), key.clone());
        let before = self.shared.gates().insert(remote.mapped, gate);
        if let Some(Gate::Expected(Some(early))) = before {
            self.runtime.spawn(Arc::clone(&self.shared).accept(*early, Arc::clone(remote), key));
        }
    }

    /// Nobody is let in under this address any more.
    pub(super) fn forget(&self, remote: &Remote) {
        self.shared.gates().remove(&remote.mapped);
    }
}

/// The path of this link changed: it sends at once, instead of when its own timers say so, and what was lost on the path
/// before is found out by the answer.
pub(super) fn kick(connection: &Connection) {
    if let Err(error) = connection.send_datagram(Bytes::from_static(b"kick")) {
        tracing::debug!(%error, "a link was not told of its new path");
    }
}

impl Links {
    /// Ends every link, and waits until they said goodbye, or for a moment.
    pub(super) async fn close(mut self) {
        self.stop.take();
        // Nothing is ever sent: the thread drops its end when it is through.
        _ = (&mut self.ended).await;
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.stop.take();
    }
}

impl Shared {
    fn gates(&self) -> MutexGuard<'_, HashMap<SocketAddr, Gate>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Judges a caller by the mapped address it comes from.
    fn receive(self: &Arc<Self>, incoming: Incoming) {
        let mapped = incoming.remote_address();
        let mut gates = self.gates();
        match gates.get_mut(&mapped) {
            Some(Gate::Expected(held)) => *held = Some(Box::new(incoming)),
            Some(Gate::Open(remote, key)) => {
                tokio::spawn(Arc::clone(self).accept(incoming, Arc::clone(remote), key.clone()));
            }
            None => incoming.ignore(),
        }
    }

    async fn accept(self: Arc<Self>, incoming: Incoming, remote: Arc<Remote>, key: AnnouncedKey) {
        mtu::settle(&remote).await;
        let mut config = server_config(&self.tls, &key);
        config.transport_config(transport(&remote, KEEP_ALIVE + LATER));
        match incoming.accept_with(Arc::new(config)) {
            Ok(connecting) => self.see_through(remote.mapped, &key, connecting).await,
            Err(error) => self.tell_down(remote.mapped, None, error.to_string()).await,
        }
    }

    /// Waits for the handshake, looks at the key shown once more, and follows the connection to its end.
    async fn see_through(&self, mapped: SocketAddr, key: &AnnouncedKey, connecting: quinn::Connecting) {
        let connection = match connecting.await {
            Ok(connection) => connection,
            Err(error) => return self.tell_down(mapped, None, error.to_string()).await,
        };
        if !key.was_shown_on(&connection) {
            connection.close(CODE_WRONG_KEY, b"not the announced key");
            return self.tell_down(mapped, None, "the other side showed a key that it had not announced".into()).await;
        }
        let id = connection.stable_id();
        let closed = connection.clone();
        self.tell(LinkEvent::Up { mapped, connection }).await;
        let why = closed.closed().await;
        self.tell_down(mapped, Some(id), why.to_string()).await;
    }

    async fn tell_down(&self, mapped: SocketAddr, connection: Option<usize>, why: String) {
        self.tell(LinkEvent::Down { mapped, connection, why }).await;
    }

    async fn tell(&self, event: LinkEvent) {
        if self.events.send(event).await.is_err() {
            tracing::trace!("nobody follows the links any more");
        }
    }
}

fn open(
    config: LinksConfig,
    runtime: Handle,
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
) -> io::Result<Links> {
    let socket = Arc::new(MappedSocket::open(config.switch, config.udp, config.notes.clone()));
    let extra = ExtraSockets::new(runtime.clone(), Arc::clone(&socket), config.notes);
    let mut endpoint_config = EndpointConfig::default();
    // STUN on the same socket is told from QUIC by the bit that greasing would blur.
    endpoint_config.grease_quic_bit(false);
    endpoint_config.max_udp_payload_size(mtu::LARGEST_RELAYED).expect("within QUIC's bounds (RFC 9000 §18.2)");
    // Every caller is judged by its own configuration; this one lets in nobody but ourselves.
    let own = AnnouncedKey::read(config.tls.spki()).expect("our own key is an Ed25519 key");
    let endpoint = Endpoint::new_with_abstract_socket(
        endpoint_config,
        Some(server_config(&config.tls, &own)),
        Arc::clone(&socket) as Arc<dyn AsyncUdpSocket>,
        Arc::new(OnThread(runtime.clone())),
    )?;
    let shared = Arc::new(Shared { tls: config.tls, gates: Mutex::default(), events: config.events });
    Ok(Links { endpoint, socket, extra, shared, runtime, stop: Some(stop), ended })
}

async fn serve(endpoint: &Endpoint, shared: &Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
    loop {
        tokio::select! {
            // Nothing is ever sent: dropping the other end says stop.
            _ = &mut stopped => break,
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => shared.receive(incoming),
                None => break,
            },
        }
    }
    endpoint.close(CODE_DONE, b"left");
    shared.gates().clear();
    if timeout(GOODBYE, endpoint.wait_idle()).await.is_err() {
        tracing::trace!("some links were not told goodbye");
    }
}

fn server_config(tls: &TlsKey, key: &AnnouncedKey) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(tls.server_for(key));
    config
        .migration(false)
        .max_incoming(MAX_CALLERS)
        .incoming_buffer_size(CALLER_BYTES)
        .incoming_buffer_size_total(CALLER_BYTES * MAX_CALLERS as u64);
    config
}

fn transport(remote: &Remote, keep_alive: Duration) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE_TIMEOUT).expect("50 s fit a QUIC varint")))
        .keep_alive_interval(Some(keep_alive))
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(WINDOW_BYTES.into())
        .send_window(WINDOW_BYTES.into())
        .datagram_receive_buffer_size(Some(KICK_BUFFER_BYTES))
        .datagram_send_buffer_size(KICK_BUFFER_BYTES)
        .initial_rtt(INITIAL_RTT)
        .initial_mtu(mtu::INITIAL)
        .mtu_discovery_config(Some(mtu::discovery(remote)))
        .congestion_controller_factory(Arc::new(PathAwareFactory::new(
            Arc::clone(&remote.path_changes),
            Arc::clone(&remote.delivered),
        )));
    Arc::new(config)
}

/// Lets QUIC run on the links' own thread, whoever calls it from where.
#[derive(Debug)]
struct OnThread(Handle);

impl Runtime for OnThread {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _entered = self.0.enter();
        Box::pin(Timer(Box::pin(sleep_until(at.into()))))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, _socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "links have one socket, made at their start"))
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

#[derive(Debug)]
struct Timer(Pin<Box<Sleep>>);

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.0.as_mut().reset(at.into());
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Future::poll(self.0.as_mut(), cx)
    }
}

#[cfg(test)]
mod tests;
