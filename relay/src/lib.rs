//! The peerfleet relay: puts connections into rooms and forwards sealed frames between them.
//!
//! In: TCP connections that speak HTTP (`GET /health`, or a WebSocket upgrade), UDP packets that ask by STUN how they
//! look from outside. Out: each frame, to the peer it names, with the slot of who sent it.
//! Never reads what it forwards, keeps nothing when it ends, calls nobody, installs no global logger.
//! [`Relay::bind`] -> [`Relay::run`] -> [`Handle::shutdown`] -> everybody is told and has left, or the deadline has.
//! Bounds: everything in [`Config`].
//!
//! | to find | look in |
//! |---|---|
//! | options, environment, file, defaults | [`config`] |
//! | who may connect | [`limits`] |
//! | the first request of a connection | `http` |
//! | the life of a connection | `conn`, and `socket` beneath it |
//! | who is in a room and who gets what | [`room`], and `rooms` around it |
//! | what waits for a peer, and what happens when too much does | [`queue`] |
//! | what is counted | [`metrics`] |
//! | UDP | `stun`, and `alternate` for its second port |

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    task::{Id, JoinError, JoinSet},
};
use tracing::{debug, error, info, warn};

mod alternate;
pub mod cli;
pub mod config;
mod conn;
mod entropy;
mod http;
pub mod limits;
pub mod metrics;
pub mod queue;
pub mod room;
mod rooms;
mod socket;
mod stun;

pub use config::Config;

use alternate::{Alternates, Main};
use limits::{Census, Entry, Origin};
use metrics::{CloseReason, Metrics, Stats};
use peerfleet_proto::wire::relay::ClosingReason;
use rooms::{RoomLimits, Rooms};

/// Connections that the system holds ready for us to accept: a burst of peers after a restart.
const BACKLOG: i32 = 1024;

/// Attempts to find a port number that is free for TCP and UDP alike, when the system chooses.
const PORT_ATTEMPTS: usize = 16;

/// Pause after a failed accept: it fails for lack of file descriptors, and some connection has to end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a relay could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] config::Invalid),
    /// An address could not be listened on.
    #[error("cannot listen on {address} ({protocol}): {cause}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// TCP or UDP.
        protocol: &'static str,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// What `/health` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`, or `draining` while the relay shuts down.
    pub status: String,
    /// Version of the relay.
    pub version: String,
    /// Rooms with at least one peer.
    pub rooms: usize,
    /// Peers in all rooms.
    pub peers: usize,
    /// Bytes of messages and datagrams that wait for their receivers.
    pub queued_bytes: usize,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// The relay's clock: milliseconds since 1970 (UTC). Who asks can tell whether its own differs.
    pub time_ms: u64,
    /// All counters.
    #[serde(flatten)]
    pub stats: Stats,
}

/// What all connections share.
#[derive(Debug)]
struct Core {
    config: Config,
    rooms: Arc<Rooms>,
    metrics: Arc<Metrics>,
    started: Instant,
    /// Second STUN ports by main port.
    alternates: BTreeMap<u16, u16>,
    stop: watch::Sender<bool>,
}

impl Core {
    fn health(&self) -> Health {
        let status = if self.rooms.is_draining() { "draining" } else { "ok" };
        Health {
            status: status.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            rooms: self.rooms.count(),
            peers: self.rooms.peers(),
            queued_bytes: self.rooms.queued_bytes(),
            uptime_s: self.started.elapsed().as_secs(),
            time_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            stats: self.metrics.stats(),
        }
    }

    fn health_json(&self) -> String {
        serde_json::to_string(&self.health()).expect("a struct of texts and numbers is representable in JSON")
    }

    /// The second STUN port of who came in at this port.
    fn alternate(&self, port: u16) -> Option<u16> {
        self.alternates.get(&port).copied()
    }

    /// Returns when the relay is to stop.
    async fn stopped(&self) {
        // It cannot fail: the sender is in `self`.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }
}

/// A relay that listens. Runs in [`Relay::run`]; stops listening when dropped.
#[derive(Debug)]
pub struct Relay {
    core: Arc<Core>,
    listeners: Vec<TcpListener>,
    responders: Vec<UdpSocket>,
    addresses: Vec<SocketAddr>,
}

/// A way to look at a relay and to stop it, from anywhere.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Core>);

impl Handle {
    /// Begins the shutdown: peers are told, [`Relay::run`] returns when they are gone or the drain timeout is over.
    pub fn shutdown(&self) {
        self.0.stop.send_replace(true);
    }

    /// What `/health` would tell now.
    pub fn health(&self) -> Health {
        self.0.health()
    }

    /// All counters.
    pub fn stats(&self) -> Stats {
        self.0.metrics.stats()
    }
}

impl Relay {
    /// Listens on all addresses of the configuration, over TCP and, for STUN, over UDP on the same port and a second one.
    ///
    /// # Errors
    /// [`RelayError`] for a configuration without sense or an address that cannot be had.
    pub fn bind(config: Config) -> Result<Self, RelayError> {
        config.check()?;
        let (mut listeners, mut responders, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
        let mut mains = Vec::new();
        for wanted in &config.bind {
            // [::] alone serves IPv4 as well; beside an IPv4 address on the same port it must leave that to the other.
            let only_v6 = config.bind.iter().any(|other| other.is_ipv4() && other.port() == wanted.port());
            let (listener, responder, address) = listen(*wanted, only_v6, config.stun)?;
            listeners.push(listener);
            if let Some(responder) = responder {
                responders.push(responder);
                mains.push(Main { address, is_any_port: wanted.port() == 0, only_v6 });
            }
            addresses.push(address);
        }
        let Alternates { sockets, ports: alternates } = alternate::bind(&mains, config.stun_alternate_port)?;
        responders.extend(sockets);
        let limits = RoomLimits {
            peers: config.peers_per_room,
            queues: config.queues,
            room_bytes: config.room_bytes,
            relay_bytes: config.relay_bytes,
        };
        let core = Core {
            config,
            rooms: Arc::new(Rooms::new(limits)),
            metrics: Arc::new(Metrics::new()),
            started: Instant::now(),
            alternates,
            stop: watch::Sender::new(false),
        };
        Ok(Self { core: Arc::new(core), listeners, responders, addresses })
    }

    /// The addresses it listens on, in the order of the configuration.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// A way to look at it and to stop it.
    pub fn handle(&self) -> Handle {
        Handle(self.core.clone())
    }

    /// Serves until [`Handle::shutdown`], and then until everybody has left or the drain timeout is over.
    pub async fn run(self) {
        let Self { core, listeners, responders, addresses } = self;
        let mut stun = JoinSet::new();
        for responder in alternate::paired(responders, &core.alternates) {
            stun.spawn(stun::respond(responder, core.metrics.clone()));
        }
        info!(addresses = ?addresses, stun = core.config.stun, second_stun_ports = ?core.alternates, "relay listens");
        let mut lobby = Guests::new(core.clone());
        let mut turn = 0;
        loop {
            tokio::select! {
                () = core.stopped() => break,
                Some(ended) = lobby.tasks.join_next_with_id() => lobby.ended(ended),
                accepted = accept(&listeners, &mut turn) => match accepted {
                    Ok((stream, remote)) => lobby.welcome(stream, remote),
                    Err(cause) if is_of_one_connection(&cause) => debug!(%cause, "a connection ended before it began"),
                    Err(cause) => {
                        warn!(%cause, "cannot accept connections");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        lobby.drain(&listeners).await;
        info!("relay has stopped");
    }
}

/// The tasks of all connections, and what each of them counts for.
struct Guests {
    core: Arc<Core>,
    tasks: JoinSet<()>,
    census: Census,
    entries: HashMap<Id, (Origin, Entry)>,
}

impl Guests {
    fn new(core: Arc<Core>) -> Self {
        let census = Census::new(core.config.limits, Instant::now());
        Self { core, tasks: JoinSet::new(), census, entries: HashMap::new() }
    }

    fn welcome(&mut self, stream: TcpStream, remote: SocketAddr) {
        self.core.metrics.accepted();
        let origin = Origin::of(remote);
        let entry = self.census.arrived(origin, Instant::now());
        let refused = match entry {
            Entry::Admitted => None,
            Entry::Lobby(reason) => Some(reason),
            Entry::TurnedAway => {
                self.core.metrics.closed(CloseReason::TurnedAway);
                info!(reason = %CloseReason::TurnedAway, %remote, "connection cut");
                return;
            }
        };
        self.spawn(stream, remote, origin, entry, refused);
    }

    fn spawn(
        &mut self,
        stream: TcpStream,
        remote: SocketAddr,
        origin: Origin,
        entry: Entry,
        refused: Option<ClosingReason>,
    ) {
        let task = self.tasks.spawn(conn::serve(self.core.clone(), stream, remote, refused));
        self.entries.insert(task.id(), (origin, entry));
    }

    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(fault) if fault.is_panic() => {
                error!(%fault, "a connection's task panicked; this is a bug");
                self.core.metrics.closed(CloseReason::Lost);
                fault.id()
            }
            Err(ended_by_us) => {
                self.core.metrics.closed(CloseReason::ShuttingDown);
                ended_by_us.id()
            }
        };
        if let Some((origin, entry)) = self.entries.remove(&id) {
            self.census.left(origin, entry);
        }
    }

    /// Tells everybody, and waits for them to go. Who connects meanwhile hears that the relay is draining.
    async fn drain(mut self, listeners: &[TcpListener]) {
        let config = &self.core.config;
        info!(peers = self.core.rooms.peers(), timeout = ?config.drain_timeout, "relay is draining");
        let jitter_ms = config.drain_jitter.as_millis().try_into().unwrap_or(u32::MAX);
        let deadline = tokio::time::sleep(config.drain_timeout);
        self.core.rooms.drain(jitter_ms);
        tokio::pin!(deadline);
        let mut turn = 0;
        while !self.tasks.is_empty() {
            tokio::select! {
                () = &mut deadline => break,
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                Ok((stream, remote)) = accept(listeners, &mut turn) => {
                    let origin = Origin::of(remote);
                    let entry = match self.census.arrived(origin, Instant::now()) {
                        Entry::TurnedAway => continue,
                        entry @ (Entry::Admitted | Entry::Lobby(_)) => entry,
                    };
                    self.spawn(stream, remote, origin, entry, Some(ClosingReason::ShuttingDown));
                }
            }
        }
        self.tasks.abort_all();
        while let Some(ended) = self.tasks.join_next_with_id().await {
            self.ended(ended);
        }
    }
}

/// The next connection of any listener; each gets its turn to be asked first.
async fn accept(listeners: &[TcpListener], turn: &mut usize) -> std::io::Result<(TcpStream, SocketAddr)> {
    *turn = turn.wrapping_add(1);
    let first = *turn % listeners.len();
    let (late, early) = listeners.split_at(first);
    std::future::poll_fn(|cx| {
        for listener in early.iter().chain(late) {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    })
    .await
}

/// Whether an accept failed because of the connection it would have been, not for want of something in the system.
fn is_of_one_connection(cause: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&cause.kind())
}

type Listening = (TcpListener, Option<UdpSocket>, SocketAddr);

/// Listens on one address. If the system chooses the port, it is one that TCP and UDP both have free.
fn listen(wanted: SocketAddr, only_v6: bool, stun: bool) -> Result<Listening, RelayError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let fault = |protocol| move |cause| RelayError::Bind { address: wanted, protocol, cause };
        let (listener, address) = listen_tcp(wanted, only_v6).map_err(fault("TCP"))?;
        if !stun {
            return Ok((listener, None, address));
        }
        match listen_udp(address, only_v6) {
            Ok(responder) => return Ok((listener, Some(responder), address)),
            Err(_) if wanted.port() == 0 && attempt < PORT_ATTEMPTS => {}
            Err(cause) => return Err(RelayError::Bind { address, protocol: "UDP", cause }),
        }
    }
}

fn listen_tcp(wanted: SocketAddr, only_v6: bool) -> std::io::Result<(TcpListener, SocketAddr)> {
    let socket = open(wanted, only_v6, socket2::Type::STREAM)?;
    socket.set_reuse_address(true)?;
    socket.bind(&wanted.into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn listen_udp(wanted: SocketAddr, only_v6: bool) -> std::io::Result<UdpSocket> {
    let socket = open(wanted, only_v6, socket2::Type::DGRAM)?;
    socket.bind(&wanted.into())?;
    UdpSocket::from_std(socket.into())
}

fn open(wanted: SocketAddr, only_v6: bool, kind: socket2::Type) -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(wanted), kind, None)?;
    // Set in either case, because systems differ in what they do unasked.
    if wanted.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
