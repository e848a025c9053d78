//! What this host learns of the network around it, by tasks in the background.
//!
//! In: what to find out. Out: [`Fact`]s, when they are known. Never keeps anybody waiting: whatever takes time, a router that
//! does not answer or a resolver that is slow, takes it in a task of its own.
//! Bounds: one task of each kind; starting it anew ends the one before. [`FACTS`] facts wait to be heard.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use peerfleet_proto::{
    path::{
        filtering::Filtering,
        mapping::Ports,
        nat64::{KNOWN_NAME, Prefix},
    },
    request::network::PortMapping,
};
use tokio::{net::lookup_host, sync::mpsc, task::JoinSet, time::sleep};

use super::{PathConfig, filtering::try_filter, interfaces::watch::Watch, port_mapping::Keeper, sampling::sample};

/// Facts that may wait; tasks wait beyond.
const FACTS: usize = 16;

/// Pause after no name of a STUN server resolved.
const RESOLVE_AGAIN: Duration = Duration::from_secs(30);

/// Something that was learnt.
#[derive(Debug)]
pub(super) enum Fact {
    /// An interface, an address or a default route changed.
    Interfaces,
    /// How the NAT picks ports.
    Ports(Ports),
    /// Which packets are let in to us.
    Filtering(Filtering),
    /// What asking the router for a port brought.
    Router(PortMapping),
    /// By which prefix the IPv4 internet is reached.
    Nat64(Prefix),
    /// Where the STUN servers are that the user named.
    Responders(Vec<SocketAddr>),
}

/// A fact, and since which change of place it has been true.
#[derive(Debug)]
pub(super) struct Told {
    /// What was learnt.
    pub(super) fact: Fact,
    round: u64,
}

/// Where a task's facts go.
#[derive(Debug, Clone)]
pub(super) struct Teller {
    told: mpsc::Sender<Told>,
    round: u64,
}

impl Teller {
    /// One whose facts come out at the other end.
    pub(super) fn new() -> (Self, mpsc::Receiver<Told>) {
        let (told, facts) = mpsc::channel(FACTS);
        (Self { told, round: 0 }, facts)
    }

    /// Tells a fact; `None` if nobody will ever hear it.
    pub(super) async fn tell(&self, fact: Fact) -> Option<()> {
        self.told.send(Told { fact, round: self.round }).await.ok()
    }
}

/// The tasks.
pub(super) struct Surroundings {
    config: PathConfig,
    tell: Teller,
    watching: JoinSet<()>,
    sampling: JoinSet<()>,
    filtering: JoinSet<()>,
    mapping: Option<Keeper>,
    nat64: JoinSet<()>,
    resolving: JoinSet<()>,
}

impl Surroundings {
    /// No tasks, and where their facts will come out.
    pub(super) fn new(config: PathConfig) -> (Self, mpsc::Receiver<Told>) {
        let (tell, facts) = Teller::new();
        let none = JoinSet::new;
        let tasks = Self {
            config,
            tell,
            watching: none(),
            sampling: none(),
            filtering: none(),
            mapping: None,
            nat64: none(),
            resolving: none(),
        };
        (tasks, facts)
    }

    /// This machine is elsewhere: what was learnt before and not heard yet is not true any more.
    pub(super) fn begin_anew(&mut self) {
        self.tell.round += 1;
    }

    /// The fact, unless it was learnt elsewhere. That something changed is true everywhere.
    pub(super) fn current(&self, told: Told) -> Option<Fact> {
        let is_current = told.round == self.tell.round || matches!(told.fact, Fact::Interfaces);
        is_current.then_some(told.fact)
    }

    /// What may be done to find direct paths.
    pub(super) fn config(&self) -> &PathConfig {
        &self.config
    }

    /// Finds out by which prefix a host without IPv4 reaches the IPv4 internet (RFC 7050).
    pub(super) fn find_nat64(&mut self) {
        self.nat64 = JoinSet::new();
        let tell = self.tell.clone();
        self.nat64.spawn(async move {
            let found = lookup_host((KNOWN_NAME, 0)).await.into_iter().flatten();
            let prefix = found.filter_map(|address| match address.ip() {
                IpAddr::V6(ip) => Prefix::discovered(ip),
                IpAddr::V4(_) => None,
            });
            // A resolver that makes up no addresses may still stand beside a NAT64 that has the usual prefix.
            let prefix = prefix.into_iter().next().unwrap_or(Prefix::WELL_KNOWN);
            // Whoever wanted to know may be gone.
            _ = tell.tell(Fact::Nat64(prefix)).await;
        });
    }

    /// Finds out where the STUN servers are that the user named, if any; goes on until it knows.
    pub(super) fn resolve(&mut self) {
        self.resolving = JoinSet::new();
        if self.config.stun.is_empty() {
            return;
        }
        let (tell, servers) = (self.tell.clone(), self.config.stun.clone());
        self.resolving.spawn(async move {
            loop {
                let mut all = Vec::new();
                for server in &servers {
                    match lookup_host((server.host(), server.port())).await {
                        Ok(found) => all.extend(found),
                        Err(error) => tracing::debug!(%server, %error, "a STUN server's name does not resolve"),
                    }
                }
                if !all.is_empty() {
                    _ = tell.tell(Fact::Responders(all)).await;
                    return;
                }
                sleep(RESOLVE_AGAIN).await;
            }
        });
    }

    /// Asks the router to forward this port to us, if the user lets us; gives how that stands now. One that was asked before,
    /// perhaps another router, is told that it is over.
    pub(super) fn map_port(&mut self, port: u16) -> PortMapping {
        // The task of the one before goes on until it has given its mapping back.
        self.mapping = None;
        if !self.config.port_mapping {
            return PortMapping::Off;
        }
        self.mapping = NonZeroU16::new(port).map(|port| Keeper::start(port, self.tell.clone()));
        PortMapping::Asking
    }

    /// Gives back what others keep for us; takes at most [`super::port_mapping::RELEASE`].
    pub(super) async fn leave(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            mapping.release().await;
        }
    }

    /// Tells of every change of interfaces from now on, as long as the system does.
    pub(super) fn watch(&mut self) {
        let mut watch = match Watch::open() {
            Ok(watch) => watch,
            Err(error) => {
                tracing::debug!(%error, "the system does not tell of interfaces: they are looked at from time to time");
                return;
            }
        };
        let tell = self.tell.clone();
        self.watching.spawn(async move {
            loop {
                match watch.changed().await {
                    Ok(()) => {
                        if tell.tell(Fact::Interfaces).await.is_none() {
                            return;
                        }
                    }
                    Err(error) => return tracing::warn!(%error, "the system tells of interfaces no more"),
                }
            }
        });
    }

    /// Whether the system tells of changes by itself.
    pub(super) fn is_watching(&mut self) -> bool {
        while self.watching.try_join_next().is_some() {}
        !self.watching.is_empty()
    }

    /// Finds out how the NAT picks ports.
    pub(super) fn sample(&mut self, responder: SocketAddr) {
        self.sampling = JoinSet::new();
        let tell = self.tell.clone();
        self.sampling.spawn(async move {
            match sample(responder).await {
                // Whoever wanted to know may be gone.
                Ok(ports) => _ = tell.tell(Fact::Ports(ports)).await,
                Err(error) => tracing::debug!(%error, "no sockets to learn how the NAT picks ports"),
            }
        });
    }

    /// Finds out which packets are let in, by a responder that answers on another port too.
    pub(super) fn try_filter(&mut self, responder: SocketAddr, other_port: u16) {
        self.filtering = JoinSet::new();
        let tell = self.tell.clone();
        self.filtering.spawn(async move {
            let told = try_filter(responder, other_port).await.unwrap_or_else(|error| {
                tracing::debug!(%error, "no socket to learn which packets are let in");
                Filtering::Unknown
            });
            // Whoever wanted to know may be gone.
            _ = tell.tell(Fact::Filtering(told)).await;
        });
    }
}
