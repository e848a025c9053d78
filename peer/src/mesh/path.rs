//! Drives hole punching: one agent per link, one socket, and what this host knows of its own addresses.
//!
//! In: notes of the socket, the relay's addresses, links that were agreed, what QUIC shows of them. Out: STUN packets,
//! [`PathEvent`]s.
//! Never decides which path is good: [`peerfleet_proto::path`] does.
//! Nothing happens before the first link: without one there is no socket.
//! Bounds: those of the agents and of their common budget; interfaces are looked after while there are agents.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    limits::MAX_CANDIDATES,
    path::{
        Agent, Agents, Config, Direct, Event, Hairpin, Handled, Reflexive, Transmit,
        nat64::Prefix,
        search::{Shot, SocketId},
    },
    request::{
        link::{Candidate, CandidateKind, Nat},
        network::{NetworkReport, PathReport},
    },
};
use quinn::Connection;

use super::{
    agreement::Agreed,
    evidence::{Evidence, Finding},
    interfaces::{Interface, host_candidates, interfaces, networks, source_towards},
    mtu,
    report::{routes, with_routes},
    routes::{Remote, Routes},
    search::{SearchEvent, Searches},
    socket::FromSocket,
    surroundings::Surroundings,
    wake::{Vigil, world_time},
};
use crate::random;

mod early;
mod here;
mod news;

use early::EarlyChecks;
use here::{Sampled, Watching};
use news::News;

/// Least time between two questions to the relay because paths were lost: many are lost at once where a network goes.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);

/// Least time between two rounds of checks that begin because the other side told the same again. Half of its own pause, so
/// that none is passed over that the relay delayed less than the one before.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

/// What the drivers of links should know.
#[derive(Debug)]
pub(super) enum PathEvent {
    /// This link's packets travel another way now.
    Changed {
        /// Whose.
        remote: Arc<Remote>,
        /// Directly, or by way of the relay.
        direct: Option<Direct>,
    },
    /// This link's direct path is in doubt, or no longer: packets travel both ways meanwhile.
    Doubted {
        /// Whose.
        remote: Arc<Remote>,
        /// Whether it is.
        is_doubted: bool,
    },
    /// This machine is in another place of the network, or slept.
    Elsewhere,
    /// Where we might be reached changed: the others should know.
    Moved(Whereabouts),
    /// The other side of this link should be told once more where we might be reached, which may be no news.
    Again(Arc<Remote>, Whereabouts),
    /// A search for a path wants sockets, or has enough of them.
    Search(SearchEvent),
}

/// Where one side might be reached, and what it knows of the NAT in front of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Whereabouts {
    /// Best first.
    pub(super) candidates: Vec<Candidate>,
    /// As far as it is known.
    pub(super) nat: Nat,
}

/// The agents, and what they share.
pub(super) struct Paths {
    socket: Option<(u16, bool)>,
    // Where we are.
    surroundings: Surroundings,
    relay: Vec<SocketAddr>,
    witnesses: Vec<SocketAddr>,
    interfaces: Vec<Interface>,
    hosts: Vec<Candidate>,
    reflexive: Reflexive,
    hairpin: Hairpin,
    sampled: Sampled,
    named: Vec<SocketAddr>,
    nat64: Option<Prefix>,
    nat: Nat,
    watching: Watching,
    searches: Searches,
    look_at: Instant,
    vigil: Vigil,
    vigil_at: Instant,
    // Where the others are.
    agents: Agents<SocketAddr>,
    links: BTreeMap<SocketAddr, Link>,
    early: EarlyChecks,
    refreshed_at: Option<Instant>,
    news: News,
    /// Whether the others do not know yet where we are.
    untold: bool,
    events: VecDeque<PathEvent>,
}

/// What an agent's link is besides.
struct Link {
    remote: Arc<Remote>,
    /// What the other side names.
    theirs: Vec<Candidate>,
    /// What is known of the other side's NAT.
    their_nat: Nat,
    /// When a round of checks began because they were told.
    round_at: Option<Instant>,
    /// Once it is up.
    evidence: Option<Evidence>,
}

impl Paths {
    /// No socket yet, and no agents.
    pub(super) fn new(surroundings: Surroundings, now: Instant) -> Self {
        let may_search = surroundings.config().hard_nat_search;
        Self {
            socket: None,
            surroundings,
            relay: Vec::new(),
            witnesses: Vec::new(),
            interfaces: Vec::new(),
            hosts: Vec::new(),
            reflexive: Reflexive::new(random::bytes(), now),
            hairpin: Hairpin::new(random::bytes(), now),
            sampled: Sampled::default(),
            named: Vec::new(),
            nat64: None,
            nat: Nat::default(),
            searches: Searches::new(may_search, now),
            watching: Watching::Off,
            look_at: now,
            vigil: Vigil::new(now, world_time()),
            vigil_at: now,
            agents: Agents::new(now),
            links: BTreeMap::new(),
            early: EarlyChecks::default(),
            refreshed_at: None,
            news: News::default(),
            untold: false,
            events: VecDeque::new(),
        }
    }

    /// There is a socket from now on: its port, and whether it speaks IPv6.
    pub(super) fn open(&mut self, socket: (u16, bool), now: Instant) {
        self.socket = Some(socket);
        self.interfaces = interfaces();
        self.hosts = host_candidates(&self.interfaces, socket.0, socket.1);
        self.ask_responders(now);
        self.explore();
    }

    /// Where we might be reached.
    pub(super) fn whereabouts(&self) -> Whereabouts {
        // Who does not search tells of no NAT, so that nobody searches for it in vain.
        let nat = if self.searches.are_allowed() { self.nat } else { Nat::default() };
        Whereabouts { candidates: self.candidates(), nat }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let of = |kind| move |addr| Candidate { kind, addr };
        let mapped = self.sampled.mapped().into_iter().map(of(CandidateKind::Mapped));
        let reflexive = self.reflexive.addresses().into_iter().map(of(CandidateKind::ServerReflexive));
        let seen = mapped.chain(reflexive).filter(|seen| self.hosts.iter().all(|host| host.addr != seen.addr));
        let mut all: Vec<_> = seen.chain(self.hosts.iter().copied()).collect();
        all.truncate(MAX_CANDIDATES);
        all
    }

    /// Largest packet that a direct path to these candidates may take, in bytes.
    pub(super) fn plausible_mtu(&self, theirs: &[Candidate]) -> u16 {
        mtu::plausible(&self.interfaces, theirs)
    }

    /// Asks anew how others see us. Links notice nothing, unless the answer is another one than before.
    pub(super) fn measure(&mut self, now: Instant) {
        if self.socket.is_some() {
            self.reflexive.refresh(now);
            self.try_filter_anew();
        }
    }

    /// Whether something is being found out that [`Paths::report`] will tell, and that no part of it says of itself.
    pub(super) fn is_measuring(&self) -> bool {
        self.sampled.filtering().1 || self.hairpin.poll_timeout().is_some()
    }

    /// What is known of the network around, and of the path to this remote.
    pub(super) fn report(&self, about: Option<&Remote>, now: Instant) -> NetworkReport {
        let (routes_v4, routes_v6) = routes();
        NetworkReport {
            routes_v4,
            routes_v6,
            udp: self.socket.is_some(),
            candidates: self.candidates(),
            responders: self.reflexive.report(),
            nat: self.nat,
            hairpin: self.hairpin.outcome(),
            filtering: self.sampled.filtering().0,
            port_mapping: self.sampled.router,
            path: about.and_then(|remote| self.path_report(remote, now)),
            relay_rtt: None,
        }
    }

    fn path_report(&self, remote: &Remote, now: Instant) -> Option<PathReport> {
        let report = self.agents.get(&remote.mapped)?.report(now);
        Some(PathReport { search: self.searches.report(&remote.mapped), ..with_routes(report) })
    }

    /// A link was agreed that may travel directly.
    pub(super) fn add(&mut self, agreed: Agreed, there: Whereabouts, routes: &Routes, now: Instant) {
        if self.socket.is_none() {
            return;
        }
        if self.agents.is_empty() {
            self.keep_watch(now);
        }
        let Agreed { remote, check_key: key, role } = agreed;
        let here = self.whereabouts();
        self.searches.add(Arc::clone(&remote), (key.clone(), role), now);
        self.searches.set_there(&remote, &here, &there, now);
        let mut agent = Agent::new(Config { key, role, seed: random::bytes() }, now);
        agent.set_networks(&networks(&self.interfaces));
        agent.set_local(here.candidates, now);
        agent.set_remote(self.reachable(&there.candidates), now);
        self.agents.insert(remote.mapped, agent, now);
        let link = Link {
            remote: Arc::clone(&remote),
            theirs: there.candidates,
            their_nat: there.nat,
            round_at: None,
            evidence: None,
        };
        self.links.insert(remote.mapped, link);
        for check in self.early.take(now) {
            let handled = self.agents.handle_early_packet(check.from, &check.packet, now);
            if !self.is_authentic(handled, check.from, routes) {
                self.early.put_back(check);
            }
        }
        self.attend(now);
    }

    /// Asks the responders as long as some link has no path. A path through a NAT keeps alive what that remembers of the socket;
    /// where all paths are near ones the address may be old, and is asked for anew with the next link.
    fn attend(&mut self, now: Instant) {
        let mut agents = self.agents.keys().filter_map(|mapped| self.agents.get(mapped));
        self.reflexive.set_active(agents.any(|agent| agent.path().is_none()), now);
    }

    /// A link is up.
    pub(super) fn up(&mut self, mapped: SocketAddr, connection: Connection, now: Instant) {
        if let Some(link) = self.links.get_mut(&mapped) {
            link.evidence = Some(Evidence::new(connection, Arc::clone(&link.remote), now));
        }
    }

    /// A link ended.
    pub(super) fn remove(&mut self, remote: &Remote, now: Instant) {
        self.agents.remove(&remote.mapped);
        self.links.remove(&remote.mapped);
        self.news.remove(&remote.mapped);
        self.searches.remove(remote);
        self.attend(now);
    }

    /// The other side is to be reached elsewhere, or knows more of its NAT; or it says the same again, because it lost its path or
    /// came back. Without a path both look for one at the same time then: rounds that do not meet open no two NATs. News of the NAT
    /// alone begin none, because whoever tells them begins none either.
    pub(super) fn set_theirs(&mut self, remote: &Remote, there: Whereabouts, now: Instant) {
        let here = self.whereabouts();
        self.searches.set_there(remote, &here, &there, now);
        let reachable = self.reachable(&there.candidates);
        if let Some(link) = self.links.get_mut(&remote.mapped) {
            let is_of_nat = link.theirs == there.candidates && link.their_nat != there.nat;
            (link.theirs, link.their_nat) = (there.candidates, there.nat);
            let is_round = !is_of_nat && link.round_at.is_none_or(|at| at + ROUND_PAUSE <= now);
            self.agents.tell(&remote.mapped, now, |agent| {
                agent.set_remote(reachable, now);
                if is_round && agent.path().is_none() {
                    agent.restart(now);
                    link.round_at = Some(now);
                }
            });
        }
    }

    /// The other side of a link is in the room again: what was told meanwhile did not arrive.
    pub(super) fn is_back(&mut self, remote: &Remote, now: Instant) {
        if self.links.contains_key(&remote.mapped) {
            self.news.want(remote.mapped, now);
        }
    }

    /// We are in the room (again): what the relay saw of us may be old.
    pub(super) fn joined(&mut self, now: Instant) {
        if !self.agents.is_empty() {
            self.refreshed_at = Some(now);
            self.reflexive.refresh(now);
        }
    }

    /// The socket saw something.
    pub(super) fn handle_note(&mut self, note: FromSocket, routes: &Routes, now: Instant) {
        match note {
            FromSocket::Stun { via, from, packet } => self.handle_stun(via, from, &packet, routes, now),
            FromSocket::Sent { mapped } => {
                self.agents.tell(&mapped, now, |agent| agent.on_sent(now));
                self.tell_findings(&mapped, now);
            }
            FromSocket::Received { mapped, from } => {
                if let Some(link) = self.links.get(&mapped) {
                    routes.heard_from(&link.remote, from);
                }
                self.agents.tell(&mapped, now, |agent| agent.on_received(from, now));
            }
        }
    }

    /// Gives a packet to whoever it belongs to.
    fn handle_stun(&mut self, via: Option<SocketId>, from: SocketAddr, packet: &[u8], routes: &Routes, now: Instant) {
        let mut ours = || [self.reflexive.handle_packet(from, packet, now), self.hairpin.handle_packet(packet, now)];
        if via.is_none() && ours().iter().any(|handled| !matches!(handled, Handled::Ignored(_))) {
            return;
        }
        let handled = self.agents.handle_packet(from, packet, now);
        if !self.is_authentic(handled, from, routes) {
            self.early.keep(from, packet, now);
            self.searches.handle_stun(via, from, packet, now);
        }
    }

    /// Whether a packet was some agent's check, or the answer to one: then its source is proved.
    fn is_authentic(&self, handled: (Option<SocketAddr>, Handled), from: SocketAddr, routes: &Routes) -> bool {
        let (Some(mapped), Handled::Check | Handled::Answer) = handled else { return false };
        let Some(link) = self.links.get(&mapped) else { return false };
        if let Some(path) = self.agents.get(&mapped).and_then(Agent::path) {
            link.remote.set_direct_rtt(path.rtt);
        }
        routes.prove_source(&link.remote, from);
        true
    }

    /// Tells an agent what QUIC shows of its path.
    fn tell_findings(&mut self, mapped: &SocketAddr, now: Instant) {
        let Some(link) = self.links.get_mut(mapped) else { return };
        let is_heard_relayed = link.remote.take_heard_relayed();
        if is_heard_relayed {
            self.agents.tell(mapped, now, |agent| agent.on_relayed(now));
        }
        match link.evidence.as_mut().and_then(|evidence| evidence.read(now)) {
            Some(Finding::Delivered) => self.agents.tell(mapped, now, |agent| agent.on_delivered(now)),
            Some(Finding::Sent) => self.agents.tell(mapped, now, |agent| agent.on_data_sent(now)),
            Some(Finding::Heard) if !is_heard_relayed => self.agents.tell(mapped, now, |agent| agent.on_heard(now)),
            Some(Finding::Heard) | None => None,
        };
    }

    /// Tells every agent from where its packets leave.
    fn tell_sources(&mut self, now: Instant) {
        let mapped: Vec<_> = self.links.keys().copied().collect();
        mapped.iter().for_each(|mapped| self.tell_source(mapped, now));
    }

    fn tell_source(&mut self, mapped: &SocketAddr, now: Instant) {
        if let Some(path) = self.agents.get(mapped).and_then(Agent::path) {
            let source = source_towards(path.addr);
            self.agents.tell(mapped, now, |agent| agent.on_source(source, now));
        }
    }

    /// These sockets were opened for searches.
    pub(super) fn sockets_opened(&mut self, sockets: &[SocketId], now: Instant) {
        self.searches.opened(sockets, now);
    }

    fn tell_whereabouts(&mut self, now: Instant) {
        let here = self.whereabouts();
        let networks = networks(&self.interfaces);
        self.agents.tell_all(now, |_, agent| {
            agent.set_networks(&networks);
            agent.set_local(here.candidates.clone(), now);
        });
        self.searches.set_here(&here, now);
        self.news.told(self.links.keys().copied(), now);
        self.events.push_back(PathEvent::Moved(here));
    }

    /// The next packet to send.
    pub(super) fn poll_transmit(&mut self) -> Option<Shot> {
        if let Some(Transmit { to, bytes }) = self.reflexive.poll_transmit().or_else(|| self.hairpin.poll_transmit()) {
            return Some(Shot { from: None, to, bytes });
        }
        if let Some(Transmit { to, bytes }) = self.agents.poll_transmit() {
            return Some(Shot { from: self.searches.sender(to), to, bytes });
        }
        self.searches.poll_transmit()
    }

    /// The next thing that happened.
    pub(super) fn poll_event(&mut self, now: Instant) -> Option<PathEvent> {
        self.hear_responders(now);
        if std::mem::take(&mut self.untold) {
            self.tell_whereabouts(now);
        }
        if let Some(queued) = self.events.pop_front() {
            return Some(queued);
        }
        if let Some(event) = self.searches.poll_event() {
            if let SearchEvent::Keep { remote, addr, .. } = &event {
                self.agents.tell(&remote.mapped, now, |agent| agent.try_address(*addr, now));
            }
            return Some(PathEvent::Search(event));
        }
        if let Some(link) = self.news.next(now).and_then(|mapped| self.links.get(&mapped)) {
            return Some(PathEvent::Again(Arc::clone(&link.remote), self.whereabouts()));
        }
        let (mapped, event) = self.agents.poll_event()?;
        match event {
            Event::PathChanged(direct) => self.path_changed(mapped, direct, now),
            Event::Doubted(is_doubted) => {
                let link = self.links.get_mut(&mapped)?;
                link.evidence.iter_mut().for_each(|evidence| evidence.begin_anew(now));
                Some(PathEvent::Doubted { remote: Arc::clone(&link.remote), is_doubted })
            }
        }
    }

    fn path_changed(&mut self, mapped: SocketAddr, direct: Option<Direct>, now: Instant) -> Option<PathEvent> {
        self.tell_source(&mapped, now);
        self.attend(now);
        if direct.is_none() {
            self.path_lost(mapped, now);
        }
        let link = self.links.get_mut(&mapped)?;
        link.evidence.iter_mut().for_each(|evidence| evidence.begin_anew(now));
        self.searches.set_path(&link.remote, direct.map(|direct| direct.addr), now);
        Some(PathEvent::Changed { remote: Arc::clone(&link.remote), direct })
    }

    /// Perhaps the NAT forgot us: then the other side does not know where we are. And it should look for a path when we do.
    fn path_lost(&mut self, mapped: SocketAddr, now: Instant) {
        if self.refreshed_at.is_none_or(|at| at + REFRESH_PAUSE <= now) {
            self.refreshed_at = Some(now);
            self.reflexive.refresh(now);
        }
        self.news.want(mapped, now);
    }

    /// When to call [`Paths::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let watch = self.watch_timeout();
        if self.socket.is_none() {
            return watch;
        }
        let asked = [self.reflexive.poll_timeout(), self.hairpin.poll_timeout(), self.news.poll_timeout()];
        asked.into_iter().chain([self.agents.poll_timeout(), watch, self.searches.poll_timeout()]).flatten().min()
    }

    /// The time is now.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.handle_watch_timeout(now);
        self.hairpin.handle_timeout(now);
        if self.reflexive.poll_timeout().is_some_and(|at| at <= now) {
            self.reflexive.handle_timeout(now);
        }
        self.searches.handle_timeout(now);
        // An agent may be about to judge its path: first it hears what is known.
        for mapped in self.agents.due(now) {
            self.tell_findings(&mapped, now);
        }
        self.agents.handle_timeout(now);
    }
}

#[cfg(test)]
mod tests;
