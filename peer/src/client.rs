//! How every front door reaches a mesh: through the daemon that runs on this machine, else by an instance of its own.
//!
//! In: a configuration. Out: hosts, answers and streams; the same methods whichever way.
//! It never changes what a daemon does for others, and an instance of its own is no host: nobody sees it listed.
//! Bounds: [`JOIN_WAIT`] for the room.

use std::{sync::Arc, time::Duration};

use peerfleet_proto::{
    id::InstanceId,
    presence::Mode,
    request::{Outcome, Request, link::Route, transfer::PathNow},
    target::{HostFacts, HostFault, resolve_host},
    token::Token,
};
use tokio::sync::mpsc;

use crate::{
    config::Config,
    failure::{Failure, Result},
    machine::{self, Host, Machine, ModeChange, Role, Status},
    mesh::{AskFault, AskProgress, NotJoined, OpenFault, Report, Stream},
};

pub mod doctor;
mod door;
pub mod exec;
pub mod send;

pub use door::DoorClient;

/// How long a command waits for the room before it gives up: as long as a relay lets a join take.
pub const JOIN_WAIT: Duration = peerfleet_proto::limits::JOIN_DEADLINE;

/// Likewise to list hosts that are known from before the relay went away: it may be back in a moment, and know of more.
const KNOWN_WAIT: Duration = Duration::from_secs(1);

/// How long an attached job or a transfer is picked up again after its connection was lost, before it counts as lost.
pub const RECONNECT_DEADLINE: Duration = Duration::from_secs(60);

/// Pause between two tries to pick something up again.
pub const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// A way to the mesh.
#[derive(Clone)]
pub enum Client {
    /// Through the daemon on this machine.
    Door(DoorClient),
    /// By an instance of this process.
    Own(Arc<Machine>),
}

/// The hosts of the room, as far as this machine knows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Why there may be more: the room is not joined, and only hosts with a standing link are known.
    pub partly: Option<NotJoined>,
}

impl Known {
    /// What a person is told of that.
    pub fn warning(&self) -> Option<String> {
        let why = self.partly.as_ref()?;
        let hint = why.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
        Some(format!("only hosts with a direct link are known, as the room is not joined: {why}{hint}"))
    }
}

impl Client {
    /// Joins the room by an instance of this process.
    ///
    /// # Errors
    /// If the identity cannot be loaded or made.
    pub async fn join(config: &Config, token: Token) -> Result<Self> {
        let mut config = config.clone();
        // Whoever asks one thing is gone before a router has answered.
        config.paths.port_mapping = false;
        Self::join_to_look(&config, token).await
    }

    /// The same for who looks at the network around: the router is asked as well, and told at the end that it is over.
    ///
    /// # Errors
    /// If the identity cannot be loaded or made.
    pub async fn join_to_look(config: &Config, token: Token) -> Result<Self> {
        Ok(Self::Own(machine::start(config, token, Role::Caller).await?))
    }

    /// The daemon of the state folder, if one runs.
    ///
    /// # Errors
    /// If one runs but does not let us in.
    pub async fn daemon(config: &Config) -> Result<Option<DoorClient>> {
        match config.state.known_door()? {
            Some(path) => DoorClient::reach(path).await,
            None => Ok(None),
        }
    }

    /// Whether a daemon is behind it.
    pub fn is_daemon(&self) -> bool {
        matches!(self, Self::Door(_))
    }

    /// The hosts of the room, once its roster is known. Without the relay, those that a standing link leads to.
    ///
    /// # Errors
    /// If the room is not joined in time and no host is known, or the daemon cannot be asked.
    pub async fn hosts(&self) -> Result<Known> {
        let nobody = |hosts: &[Host]| hosts.iter().all(|host| host.here);
        let wait = if nobody(&self.hosts_now().await?) { JOIN_WAIT } else { KNOWN_WAIT };
        let joined = self.joined(wait).await?;
        let hosts = self.hosts_now().await?;
        match joined {
            Err(why) if nobody(&hosts) => {
                let status = self.status().await?;
                Err(Failure::unreachable(format!("cannot join room `{}` on {}", status.room, status.relay))
                    .hint(why.hint.clone().unwrap_or_else(|| {
                        "is the relay running and its address right? --relay or PEER_RELAY names another one".to_owned()
                    }))
                    .cause(why))
            }
            joined => Ok(Known { hosts, partly: joined.err() }),
        }
    }

    /// The hosts that are known now.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn hosts_now(&self) -> Result<Vec<Host>> {
        let hosts = match self {
            Self::Door(door) => door.hosts().await?,
            Self::Own(machine) => machine.hosts(),
        };
        Ok(each_once(hosts))
    }

    /// The one host that `text` names. One to which a link stands directly needs no relay, and none is waited for.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub async fn host(&self, text: &str) -> Result<Host> {
        if let Some(host) = directly_linked(text, self.hosts_now().await?) {
            return Ok(host);
        }
        let Known { hosts, partly } = self.hosts().await?;
        let facts: Vec<HostFacts<'_>> = hosts.iter().map(facts).collect();
        match (resolve_host(text, &facts), partly) {
            (Ok(index), _) => Ok(hosts[index].clone()),
            (Err(HostFault::Unknown { .. }), Some(why)) => Err(not_linked(text, &why)),
            (Err(fault), _) => {
                let status = self.status().await?;
                Err(unknown_host(text, &hosts, &fault, &status))
            }
        }
    }

    /// The process that serves a host now: another one after its peer was restarted.
    pub async fn instance_of(&self, host: &Host) -> Option<InstanceId> {
        let hosts = self.hosts_now().await.ok()?;
        hosts.iter().find(|now| now.peer == host.peer).map(|now| now.instance)
    }

    /// How this machine stands.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn status(&self) -> Result<Status> {
        match self {
            Self::Door(door) => door.status().await,
            Self::Own(machine) => Ok(machine.status()),
        }
    }

    /// Waits for the room's roster; the inner result says why it is not known.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn joined(&self, timeout: Duration) -> Result<std::result::Result<(), NotJoined>> {
        match self {
            Self::Door(door) => door.joined(timeout).await,
            Self::Own(machine) => Ok(machine.joined(timeout).await),
        }
    }

    /// What is known of the network around this machine, and of its link to `about`; see [`crate::mesh::Mesh::report`].
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn report(
        &self,
        about: Option<InstanceId>,
        fresh: bool,
    ) -> Result<std::result::Result<Report, NotJoined>> {
        match self {
            Self::Door(door) => door.report(about, fresh).await,
            Self::Own(machine) => Ok(machine.report(about, fresh).await),
        }
    }

    /// Changes what this machine lets others do while it runs.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn set_mode(&self, mode: Mode) -> Result<ModeChange> {
        match self {
            Self::Door(door) => door.set_mode(mode).await,
            Self::Own(machine) => Ok(machine.set_mode(mode)),
        }
    }

    /// Asks many instances the same; each of them ends exactly once. Dropping the receiver gives up.
    pub fn ask_many(
        &self,
        to: &[InstanceId],
        request: &Request,
        deadline: Duration,
    ) -> mpsc::Receiver<(InstanceId, AskProgress)> {
        match self {
            Self::Door(door) => door.ask_many(to, request, deadline),
            Self::Own(machine) => machine.ask_many(to.to_vec(), request.clone(), deadline),
        }
    }

    /// Asks one instance.
    ///
    /// # Errors
    /// [`AskFault`] if that led to no outcome.
    pub async fn ask(
        &self,
        to: InstanceId,
        request: &Request,
        deadline: Duration,
    ) -> std::result::Result<Outcome, AskFault> {
        let mut progress = self.ask_many(&[to], request, deadline);
        while let Some((_, progress)) = progress.recv().await {
            if let AskProgress::Ended(ended) = progress {
                return ended;
            }
        }
        Err(AskFault::Lost)
    }

    /// Opens a stream headed by a request and reads the head's outcome.
    ///
    /// # Errors
    /// [`OpenFault`] if there is no link, or it is lost first.
    pub async fn open(
        &self,
        to: InstanceId,
        request: Request,
        route: Route,
    ) -> std::result::Result<(Outcome, Stream), OpenFault> {
        match self {
            Self::Door(door) => door.open(to, request, route).await,
            Self::Own(machine) => machine.open(to, request, route).await,
        }
    }

    /// Has this machine do something for its own user, whatever its mode.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn ask_here(&self, request: Request) -> Result<Outcome> {
        match self {
            Self::Door(door) => door.ask_here(request).await,
            Self::Own(machine) => Ok(machine.ask_here(request).await),
        }
    }

    /// Has this machine do something for its own user, with a stream behind it.
    ///
    /// # Errors
    /// [`OpenFault`] if it ended without an answer.
    pub async fn open_here(&self, request: Request) -> std::result::Result<(Outcome, Stream), OpenFault> {
        match self {
            Self::Door(door) => door.open_here(request).await,
            Self::Own(machine) => machine.open_here(request).await,
        }
    }

    /// Leaves the room, if this was an instance of its own.
    pub async fn close(&self) {
        if let Self::Own(machine) = self {
            machine.shutdown().await;
        }
    }
}

/// The room's token, from where the configuration has it.
///
/// # Errors
/// If there is none, it cannot be read, or it is none.
pub fn token(config: &Config) -> Result<Token> {
    let Some(text) = config.token_text()? else {
        return Err(Failure::fixable("there is no token, and no peer runs on this machine")
            .cause("the room's token is needed to join its room")
            .hint("start here with `peer up`, or paste the line that it printed on the first machine; PEER_TOKEN, --token-file and --token carry a token"));
    };
    let origin = config.token.as_ref().map(|token| token.origin.to_string()).unwrap_or_default();
    Token::parse(text.expose()).map_err(|fault| {
        Failure::fixable("cannot use the room's token")
            .cause(format!("{fault} (from {origin})"))
            .hint("copy it again, or make a new one with `peer token new`")
    })
}

/// What target expressions and host names are matched against.
pub fn facts(host: &Host) -> HostFacts<'_> {
    let presence = &host.presence;
    HostFacts { peer: host.peer, name: &presence.name, tags: &presence.tags, os: &presence.os, arch: &presence.arch }
}

/// The one host of that name, if packets to it travel directly now.
fn directly_linked(text: &str, mut hosts: Vec<Host>) -> Option<Host> {
    let index = resolve_host(text, &hosts.iter().map(facts).collect::<Vec<_>>()).ok()?;
    let host = hosts.swap_remove(index);
    (host.link.now == Some(PathNow::Direct)).then_some(host)
}

/// Of several processes of one identity (a peer that was just restarted), the one that is present, else the last.
fn each_once(hosts: Vec<Host>) -> Vec<Host> {
    let mut kept: Vec<Host> = Vec::with_capacity(hosts.len());
    for host in hosts {
        match kept.iter_mut().find(|other| other.peer == host.peer) {
            Some(other) if (host.here, host.present) >= (other.here, other.present) => *other = host,
            Some(_) => {}
            None => kept.push(host),
        }
    }
    kept
}

/// Whether there is such a host is not known without the relay.
fn not_linked(text: &str, why: &NotJoined) -> Failure {
    Failure::unreachable(format!("cannot reach `{text}`"))
        .cause(format!("no direct link to a host of that name stands, and the room is not joined: {why}"))
        .hint(
            why.hint.clone().unwrap_or_else(|| "`peer status` tells how the connection to the relay stands".to_owned()),
        )
}

fn unknown_host(text: &str, hosts: &[Host], fault: &HostFault, status: &Status) -> Failure {
    let named = |indices: &[usize]| {
        let names: Vec<String> = indices
            .iter()
            .map(|index| format!("`{}` ({})", hosts[*index].name(), hosts[*index].peer.short()))
            .collect();
        names.join(", ")
    };
    match fault {
        HostFault::Unknown { near } => {
            let hint = "`peer ls` lists them; if the machine should be here, compare `peer status` on both: room ids must be equal";
            let meant = if near.is_empty() { String::new() } else { format!("did you mean {}? ", named(near)) };
            Failure::unreachable(format!("cannot reach `{text}`"))
                .cause(format!(
                    "no peer of that name or id is in room `{}` on {} ({})",
                    status.room,
                    status.relay,
                    how_many(hosts.len())
                ))
                .hint(format!("{meant}{hint}"))
        }
        HostFault::Ambiguous(indices) => Failure::fixable(format!("`{text}` is more than one host"))
            .cause(format!("these match: {}", named(indices)))
            .hint("name one by more characters of its id, as `peer ls` shows it"),
    }
}

fn how_many(peers: usize) -> String {
    match peers {
        0 => "nobody is".to_owned(),
        1 => "1 peer is".to_owned(),
        many => format!("{many} peers are"),
    }
}
