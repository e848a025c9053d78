//! What this host knows of its own place: interfaces, the NAT in front of it, whether it slept.
//!
//! In: looks at the system's table, [`Fact`]s, what responders see. Out: candidates and the [`Nat`] that others are told, new
//! rounds of checks when the place is another one.
//! Never looks twice for one burst of changes: it waits for [`SETTLE`] first.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Reflexive, ReflexiveEvent,
        filtering::Filtering,
        mapping::{Mapping, Nat, Ports},
        nat64::reachable,
    },
    request::{
        link::{Candidate, CandidateKind},
        network::PortMapping,
    },
};

use super::{PathEvent, Paths};
use crate::mesh::{
    interfaces::{host_candidates, interfaces, is_ipv6_only, networks},
    surroundings::{Fact, Told},
    wake::{Vigil, world_time},
};

/// How often the interfaces are looked at where the system does not tell of changes: reading its table takes about a
/// millisecond, and a laptop that wakes in another network waits no longer than this.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often they are looked at where it does; only in case it forgot.
const LOOK_SELDOM: Duration = Duration::from_secs(60);

/// Time from the first word of a change to the look: an address comes with its routes, and half a dozen words.
const SETTLE: Duration = Duration::from_millis(100);

/// How often it is asked whether the machine slept, while there are agents.
const VIGIL_EVERY: Duration = Duration::from_secs(1);

/// How often it is asked while there are none: waking a processor for it costs more than a late answer.
const VIGIL_SELDOM: Duration = Duration::from_secs(5);

/// Time in the room after which this machine's place is watched though there are no links: who asks one thing and goes does
/// not need it.
const WATCH_AFTER: Duration = Duration::from_secs(5);

/// Time between two samplings of one NAT's ports: what it does does not change while the interfaces stay.
const SAMPLE_EVERY: Duration = Duration::from_secs(600);

/// Whether this machine's place is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watching {
    /// No: it is in no room.
    Off,
    /// From then on.
    From(Instant),
    /// Yes.
    On,
}

/// What is known of the NAT, beside what the others are told.
#[derive(Debug, Default)]
pub(super) struct Sampled {
    ports: Ports,
    at: Option<Instant>,
    filtering: Filtering,
    trial: Trial,
    /// What asking the router brought, once there is a socket.
    pub(super) router: Option<PortMapping>,
}

/// How finding out what is let in stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Trial {
    /// It begins when a responder of two ports has answered.
    #[default]
    Wanted,
    Running,
    Done,
}

impl Sampled {
    /// Which packets are let in, and whether that is being found out.
    pub(super) fn filtering(&self) -> (Filtering, bool) {
        (self.filtering, self.trial == Trial::Running)
    }

    /// The address at which the router forwards to us.
    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        match self.router? {
            PortMapping::Open { addr, .. } => Some(addr),
            PortMapping::NoAnswer
            | PortMapping::Refused { .. }
            | PortMapping::Nested { .. }
            | PortMapping::Asking
            | PortMapping::NotNeeded
            | PortMapping::NoRouter
            | PortMapping::Off => None,
        }
    }
}

impl Paths {
    /// Where the relay answers STUN, and on which port once more; nowhere if it does not.
    pub(in crate::mesh) fn set_responders(&mut self, relay: Vec<SocketAddr>, alternate: Option<u16>, now: Instant) {
        let beside = |port| relay.iter().map(move |addr| SocketAddr::new(addr.ip(), port)).collect();
        self.witnesses = alternate.map(beside).unwrap_or_default();
        self.relay = relay;
        if self.socket.is_some() {
            self.ask_responders(now);
        }
    }

    pub(super) fn ask_responders(&mut self, now: Instant) {
        let all: Vec<_> = self.relay.iter().chain(&self.named).copied().collect();
        self.reflexive.set_responders(&all, now);
        self.reflexive.set_witnesses(&self.witnesses, now);
    }

    /// Something was learnt in the background.
    pub(in crate::mesh) fn handle_told(&mut self, told: Told, now: Instant) {
        if let Some(fact) = self.surroundings.current(told) {
            self.handle_fact(fact, now);
        }
    }

    fn handle_fact(&mut self, fact: Fact, now: Instant) {
        match fact {
            Fact::Interfaces => self.look_at = self.look_at.min(now + SETTLE),
            Fact::Ports(ports) => {
                self.sampled.ports = ports;
                self.judge(now);
            }
            Fact::Responders(named) => {
                self.named = named;
                self.ask_responders(now);
            }
            Fact::Nat64(prefix) => {
                self.nat64 = Some(prefix);
                for (mapped, link) in &self.links {
                    let reachable = reachable(&link.theirs, self.nat64);
                    self.agents.tell(mapped, now, |agent| agent.set_remote(reachable, now));
                }
            }
            Fact::Filtering(filtering) => {
                tracing::debug!(?filtering, "which packets are let in to us");
                self.sampled.trial = Trial::Done;
                // What was found out in this place stays true when the relay is gone for a while.
                if filtering != Filtering::Unknown {
                    self.sampled.filtering = filtering;
                }
            }
            Fact::Router(router) => {
                let before = self.sampled.mapped();
                self.sampled.router = Some(router);
                self.untold |= self.sampled.mapped() != before;
            }
        }
    }

    /// What can be reached of what the other side names.
    pub(super) fn reachable(&self, theirs: &[Candidate]) -> Vec<Candidate> {
        reachable(theirs, self.nat64)
    }

    /// Begins to find out what the system does not know, in the background.
    pub(super) fn explore(&mut self) {
        let Some((port, _)) = self.socket else { return };
        self.sampled.router = Some(self.surroundings.map_port(port));
        self.surroundings.resolve();
        if is_ipv6_only(&self.interfaces) {
            self.surroundings.find_nat64();
        }
    }

    /// Gives back what others keep for us.
    pub(in crate::mesh) async fn leave(&mut self) {
        self.surroundings.leave().await;
    }

    /// What is known of the NAT in front of us; the others are told.
    fn set_nat(&mut self, nat: Nat) {
        if self.nat != nat {
            tracing::debug!(?nat, hairpin = ?self.hairpin.outcome(), "what the NAT in front of us does");
            self.nat = nat;
            self.untold = true;
        }
    }

    /// Looks after interfaces and sleep from soon on: the connection to the relay is to be made anew when they change.
    pub(in crate::mesh) fn watch_soon(&mut self, now: Instant) {
        if self.watching == Watching::Off {
            self.watching = Watching::From(now + WATCH_AFTER);
        }
    }

    /// Looks after interfaces and sleep: there is something to lose now.
    pub(super) fn keep_watch(&mut self, now: Instant) {
        if !self.surroundings.is_watching() {
            self.surroundings.watch();
        }
        if self.watching != Watching::On && self.socket.is_none() {
            self.interfaces = interfaces();
        }
        self.watching = Watching::On;
        self.vigil = Vigil::new(now, world_time());
        self.vigil_at = now + self.vigil_interval();
        // It may have changed while nobody looked.
        self.look_at = now;
    }

    fn vigil_interval(&self) -> Duration {
        if self.agents.is_empty() { VIGIL_SELDOM } else { VIGIL_EVERY }
    }

    /// When to look next.
    pub(super) fn watch_timeout(&self) -> Option<Instant> {
        match self.watching {
            Watching::Off => None,
            Watching::From(at) => Some(at),
            Watching::On => Some(self.look_at.min(self.vigil_at)),
        }
    }

    /// Looks, if it is time.
    pub(super) fn handle_watch_timeout(&mut self, now: Instant) {
        match self.watching {
            Watching::From(at) if at <= now => self.keep_watch(now),
            Watching::On => {
                if self.vigil_at <= now {
                    self.keep_vigil(now);
                }
                if self.look_at <= now {
                    self.look(now);
                }
            }
            Watching::Off | Watching::From(_) => {}
        }
    }

    /// Whether an interface has this address.
    pub(in crate::mesh) fn has_address(&self, ip: IpAddr) -> bool {
        self.interfaces.iter().flat_map(|interface| &interface.addresses).any(|address| address.ip == ip)
    }

    /// Looks at the interfaces, and begins anew if they are others than before.
    fn look(&mut self, now: Instant) {
        let is_told = self.surroundings.is_watching() || self.agents.is_empty();
        self.look_at = now + if is_told { LOOK_SELDOM } else { LOOK_EVERY };
        let interfaces = interfaces();
        if interfaces != self.interfaces {
            tracing::info!("an interface changed: looking for paths anew");
            self.interfaces = interfaces;
            self.begin_anew(now);
        }
    }

    /// Asks whether the machine slept. If so the NAT has forgotten us, and the others do not know that we are back.
    fn keep_vigil(&mut self, now: Instant) {
        let interval = self.vigil_at.saturating_duration_since(self.vigil.last_look());
        self.vigil_at = now + self.vigil_interval();
        if let Some(asleep) = self.vigil.look(now, world_time(), interval) {
            tracing::info!(?asleep, "this machine slept: looking for paths anew");
            self.interfaces = interfaces();
            self.begin_anew(now);
        }
    }

    fn begin_anew(&mut self, now: Instant) {
        self.events.push_back(PathEvent::Elsewhere);
        let Some((port, with_ipv6)) = self.socket else { return };
        self.hosts = host_candidates(&self.interfaces, port, with_ipv6);
        self.reflexive.restart(now);
        self.hairpin.forget();
        self.sampled = Sampled::default();
        self.surroundings.begin_anew();
        self.nat64 = None;
        self.explore();
        self.untold = true;
        // The responders are asked anew already.
        self.refreshed_at = Some(now);
        let (networks, candidates) = (networks(&self.interfaces), self.candidates());
        self.agents.tell_all(now, |mapped, agent| {
            let theirs = self.links.get(mapped).map(|link| reachable(&link.theirs, None)).unwrap_or_default();
            agent.set_networks(&networks);
            agent.relocate(&candidates, &theirs, now);
        });
        self.searches.restart(now);
        self.tell_sources(now);
    }

    /// Hears what the responders see.
    pub(super) fn hear_responders(&mut self, now: Instant) {
        while let Some(event) = self.reflexive.poll_event() {
            match event {
                ReflexiveEvent::Found(seen) => {
                    self.untold = true;
                    if seen.is_ipv4() && !self.is_own(seen) {
                        self.hairpin.begin(seen, now);
                    }
                    self.judge(now);
                }
                ReflexiveEvent::Mapping(_) => self.judge(now),
            }
        }
    }

    /// Says what the NAT does, as far as the answers tell, and finds out more where they do not.
    fn judge(&mut self, now: Instant) {
        let Some((port, _)) = self.socket else { return };
        let (nat, asks) = judged(&self.reflexive, port, &self.hosts, self.sampled.ports);
        if let Some(responder) = asks
            && self.sampled.at.is_none_or(|at| at + SAMPLE_EVERY <= now)
        {
            self.sampled.at = Some(now);
            self.surroundings.sample(responder);
        }
        self.set_nat(nat);
        self.try_filter();
    }

    /// Finds out anew what is let in to us.
    pub(super) fn try_filter_anew(&mut self) {
        if self.sampled.trial == Trial::Done {
            self.sampled.trial = Trial::Wanted;
            self.try_filter();
        }
    }

    /// Finds out what is let in to us, once in each place, as soon as there is somebody to ask: a responder of the relay's
    /// that answered and has another port.
    fn try_filter(&mut self) {
        if self.sampled.trial != Trial::Wanted {
            return;
        }
        let answered = self.reflexive.report().into_iter().filter(|responder| responder.seen.is_some());
        let of_relay = answered.map(|responder| responder.addr).filter(|addr| self.relay.contains(addr));
        let both = of_relay.filter_map(|addr| {
            let other = self.witnesses.iter().find(|other| other.ip() == addr.ip() && **other != addr)?;
            Some((addr, other.port()))
        });
        // IPv4 if there is any: most NATs are there.
        if let Some((responder, other_port)) = both.min_by_key(|(addr, _)| addr.is_ipv6()) {
            self.sampled.trial = Trial::Running;
            self.surroundings.try_filter(responder, other_port);
        }
    }

    fn is_own(&self, seen: SocketAddr) -> bool {
        is_own(&self.hosts, seen)
    }
}

/// What the answers say of the NAT, and whom to ask for how it picks ports.
fn judged(reflexive: &Reflexive, port: u16, hosts: &[Candidate], sampled: Ports) -> (Nat, Option<SocketAddr>) {
    let Some((responder, seen)) = reflexive.answered(true).or_else(|| reflexive.answered(false)) else {
        return (Nat::default(), None);
    };
    if is_own(hosts, seen) {
        return (Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving }, None);
    }
    let kept = if seen.port() == port { Ports::Preserving } else { Ports::Unknown };
    match reflexive.mapping() {
        Mapping::Dependent => (Nat { mapping: Mapping::Dependent, ports: sampled }, Some(responder)),
        mapping @ (Mapping::Unknown | Mapping::EndpointIndependent) => (Nat { mapping, ports: kept }, None),
    }
}

fn is_own(hosts: &[Candidate], seen: SocketAddr) -> bool {
    hosts.iter().any(|host| host.kind == CandidateKind::Host && host.addr == seen)
}

#[cfg(test)]
#[path = "here_tests.rs"]
mod tests;
