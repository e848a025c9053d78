//! The searching half of a peer: what it knows of the NAT in front of it, and the sockets that it opens besides its own.
//!
//! In: what responders see, word of the other side, packets to the extra sockets, whether there is a path, `now`. Out: packets and
//! the port that each leaves from, what to tell of the NAT, addresses for the agent to try. It decides nothing: the machines do.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Candidate, CandidateKind, Handled, Reflexive, Sampling, Transmit,
        mapping::{Mapping, Nat, Ports, SOCKETS},
        search::{Config, Event, Search, Shot, Side, SocketId, Standing, round::PACE},
    },
    stun::{Class, Message},
};

use crate::clock::Dice;

/// Time between two samplings of one NAT's ports, as the mesh has it.
const SAMPLE_EVERY: Duration = Duration::from_secs(600);

/// The lowest port that the system gives to a socket that asks for none, and half of how many there are.
const EPHEMERAL: (u16, u64) = (32_768, 14_000);

pub(crate) struct Seeker {
    /// Made when the link is agreed.
    search: Option<Search>,
    nat: Nat,
    there: Side,
    sampling: Option<(Sampling, Vec<u16>)>,
    sampled: Ports,
    sampled_at: Option<Instant>,
    /// A sampling has ended since the NAT was judged.
    is_sampled: bool,
    open: BTreeMap<SocketId, u16>,
    kept: Option<Kept>,
    next_socket: u32,
    next_shot: Instant,
    /// The peer's own port; those of its other sockets are odd or even as it is, so that two on one machine have different ones.
    own: u16,
    dice: Dice,
}

/// The socket by which packets to an address leave.
#[derive(Debug, Clone, Copy)]
struct Kept {
    socket: SocketId,
    port: u16,
    addr: SocketAddr,
}

impl Seeker {
    pub(crate) fn new(own: u16, dice: Dice, now: Instant) -> Self {
        Self {
            search: None,
            nat: Nat::default(),
            there: Side::default(),
            sampling: None,
            sampled: Ports::Unknown,
            sampled_at: None,
            is_sampled: false,
            open: BTreeMap::new(),
            kept: None,
            next_socket: 0,
            next_shot: now,
            own,
            dice,
        }
    }

    /// The link is agreed.
    pub(crate) fn link(&mut self, config: Config, now: Instant) {
        self.search = Some(Search::new(config, now));
    }

    /// What is known of the NAT.
    pub(crate) fn nat(&self) -> Nat {
        self.nat
    }

    /// Rounds in a row that found nothing.
    pub(crate) fn failed(&self) -> u32 {
        self.search.as_ref().map_or(0, |search| search.history().failed)
    }

    /// How the search stands.
    pub(crate) fn standing(&self) -> Option<Standing> {
        self.search.as_ref().map(Search::standing)
    }

    /// Whether a socket has this port.
    pub(crate) fn has_port(&self, port: u16) -> bool {
        self.socket(port).is_some() || self.sampling.as_ref().is_some_and(|(_, ports)| ports.contains(&port))
    }

    /// Whether this is the port of the socket that is kept: other packets come there too.
    pub(crate) fn keeps(&self, port: u16) -> bool {
        self.kept.is_some_and(|kept| kept.port == port)
    }

    /// The search's socket that has this port.
    pub(crate) fn socket(&self, port: u16) -> Option<SocketId> {
        let kept = self.kept.filter(|kept| kept.port == port).map(|kept| kept.socket);
        kept.or_else(|| self.open.iter().find(|(_, other)| **other == port).map(|(socket, _)| *socket))
    }

    /// The port by which packets of the agent and of the link to this address leave.
    pub(crate) fn port_towards(&self, addr: SocketAddr) -> u16 {
        self.kept.filter(|kept| kept.addr == addr).map_or(self.own, |kept| kept.port)
    }

    // Where we are.

    /// An interface changed: all that was known is old.
    pub(crate) fn begin_anew(&mut self, now: Instant) {
        (self.sampling, self.sampled, self.sampled_at) = (None, Ports::Unknown, None);
        self.search.iter_mut().for_each(|search| search.restart(now));
    }

    /// Says once that a sampling has ended.
    pub(crate) fn take_sampled(&mut self) -> bool {
        std::mem::take(&mut self.is_sampled)
    }

    /// Says what the NAT does, as far as the answers tell, and finds out more where they do not; whether that is news.
    pub(crate) fn judge(&mut self, reflexive: &Reflexive, hosts: &[Candidate], now: Instant) -> bool {
        let (nat, asks) = self.judged(reflexive, hosts);
        if let Some(responder) = asks
            && self.sampled_at.is_none_or(|at| at + SAMPLE_EVERY <= now)
        {
            self.sampled_at = Some(now);
            let ports: Vec<_> = (0..SOCKETS).map(|_| self.free_port()).collect();
            self.sampling = Some((Sampling::new(responder, &ports, self.dice.bytes(), now), ports));
        }
        std::mem::replace(&mut self.nat, nat) != nat
    }

    fn judged(&self, reflexive: &Reflexive, hosts: &[Candidate]) -> (Nat, Option<SocketAddr>) {
        let Some((responder, seen)) = reflexive.answered(true).or_else(|| reflexive.answered(false)) else {
            return (Nat::default(), None);
        };
        if hosts.iter().any(|host| host.kind == CandidateKind::Host && host.addr == seen) {
            return (Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving }, None);
        }
        let kept = if seen.port() == self.own { Ports::Preserving } else { Ports::Unknown };
        match reflexive.mapping() {
            Mapping::Dependent => (Nat { mapping: Mapping::Dependent, ports: self.sampled }, Some(responder)),
            mapping @ (Mapping::Unknown | Mapping::EndpointIndependent) => (Nat { mapping, ports: kept }, None),
        }
    }

    fn free_port(&mut self) -> u16 {
        loop {
            let port = EPHEMERAL.0 + 2 * self.dice.below(EPHEMERAL.1) as u16 + self.own % 2;
            if !self.has_port(port) {
                return port;
            }
        }
    }

    // What the search is told.

    /// Where both sides are.
    pub(crate) fn set_sides(&mut self, ours: Side, there: Side, now: Instant) {
        self.there = there;
        self.set_here(ours, now);
    }

    /// Where we are.
    pub(crate) fn set_here(&mut self, ours: Side, now: Instant) {
        let there = self.there;
        self.search.iter_mut().for_each(|search| search.set_sides(ours, there, now));
    }

    /// Packets travel another way now.
    pub(crate) fn set_path(&mut self, path: Option<SocketAddr>, now: Instant) {
        self.kept = self.kept.filter(|kept| path.is_none_or(|path| path == kept.addr));
        self.search.iter_mut().for_each(|search| search.set_path(path.is_some(), now));
    }

    /// A packet came to a socket of the sampling; says whether it did.
    pub(crate) fn handle_sampled(&mut self, port: u16, from: SocketAddr, bytes: &[u8], now: Instant) -> bool {
        let Some((sampling, ports)) = &mut self.sampling else { return false };
        let Some(socket) = ports.iter().position(|other| *other == port) else { return false };
        sampling.handle_packet(socket, from, bytes, now);
        self.end_sampling();
        true
    }

    /// A STUN packet came that was not the agent's.
    pub(crate) fn handle_packet(&mut self, port: u16, from: SocketAddr, bytes: &[u8], now: Instant) -> Option<Handled> {
        let via = self.socket(port);
        self.search.as_mut().map(|search| search.handle_packet(via, from, bytes, now))
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let search = self.search.as_ref().and_then(|search| {
            let due = search.poll_timeout()?;
            Some(if search.is_searching() { due.max(self.next_shot) } else { due })
        });
        let sampling = self.sampling.as_ref().and_then(|(sampling, _)| sampling.poll_timeout());
        [search, sampling].into_iter().flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if let Some((sampling, _)) = &mut self.sampling {
            sampling.handle_timeout(now);
            self.end_sampling();
        }
        if let Some(search) = self.search.as_mut().filter(|search| !search.is_searching() || self.next_shot <= now) {
            search.handle_timeout(now);
        }
    }

    fn end_sampling(&mut self) {
        if let Some(ports) = self.sampling.as_ref().and_then(|(sampling, _)| sampling.outcome()) {
            (self.sampled, self.sampling, self.is_sampled) = (ports, None, true);
        }
    }

    // What it wants.

    /// Opens, keeps and closes sockets as the search wants it; an address that the agent should try.
    pub(crate) fn carry_out(&mut self, now: Instant) -> Option<SocketAddr> {
        let mut found = None;
        while let Some(event) = self.search.as_mut().and_then(Search::poll_event) {
            match event {
                Event::Open(count) => self.open(count, now),
                Event::Found { socket, remote } => {
                    if let Some(port) = self.open.remove(&socket) {
                        self.kept = Some(Kept { socket, port, addr: remote });
                    }
                    found = Some(remote);
                }
                Event::Ended { .. } => {}
            }
        }
        if matches!(self.standing(), Some(Standing::NoUse(_))) {
            self.kept = None;
        }
        if self.search.as_ref().is_some_and(|search| !search.is_searching()) {
            self.open.clear();
        }
        found
    }

    fn open(&mut self, count: usize, now: Instant) {
        self.kept = None;
        while self.open.len() < count {
            let port = self.free_port();
            self.open.insert(SocketId(self.next_socket), port);
            self.next_socket += 1;
        }
        let sockets: Vec<_> = self.open.keys().copied().take(count).collect();
        self.search.iter_mut().for_each(|search| search.opened(&sockets, now));
    }

    /// The next request of the sampling, and the port that it leaves from.
    pub(crate) fn poll_sample(&mut self) -> Option<(u16, Transmit)> {
        let (sampling, ports) = self.sampling.as_mut()?;
        sampling.poll_transmit().map(|(socket, transmit)| (ports[socket], transmit))
    }

    /// The next packet of the search, and the port that it leaves from.
    pub(crate) fn poll_shot(&mut self, now: Instant) -> Option<(u16, Transmit)> {
        loop {
            let Shot { from, to, bytes } = self.search.as_mut()?.poll_transmit()?;
            if Message::parse(&bytes).is_ok_and(|message| message.class() == Class::Request) {
                self.next_shot = now + PACE;
            }
            // What would leave by a socket that was closed meanwhile is lost.
            if let Some(port) = from.map_or(Some(self.own), |socket| self.port_of(socket)) {
                return Some((port, Transmit { to, bytes }));
            }
        }
    }

    fn port_of(&self, socket: SocketId) -> Option<u16> {
        let kept = self.kept.filter(|kept| kept.socket == socket).map(|kept| kept.port);
        self.open.get(&socket).copied().or(kept)
    }
}
