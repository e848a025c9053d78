//! One peer of a simulated internet: the real machines, driven as the mesh drives them, and held to their bounds.
//!
//! In: packets, the other side's candidates, word that the interfaces may have changed, `now`. Out: packets to send, candidates to
//! tell. It has no opinion about paths.
//! Every packet is checked as it leaves: a check goes to addresses that somebody named, within pace and budget; an answer goes
//! to who asked, once.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::{
    limits::MAX_CANDIDATES,
    path::{
        Agent, Candidate, CandidateKind, Config, Event, Handled, PACE, Reflexive, ReflexiveEvent, Transmit,
        check::{BUDGET, BUDGET_WINDOW},
        mapping::{Nat, SOCKETS},
        reflexive::RETRANSMIT,
        search::{
            self, History, PAUSES, Side,
            plan::{MAX_PROBES, MAX_SOCKETS},
            round::{self, MAX_MET, PASSES, ROUND},
        },
    },
    stun::{Class, Message},
};

use crate::{
    clock::Dice,
    internet::{RESPONDERS, WITNESSES},
    seeker::Seeker,
};

/// Least time between two rounds of checks that begin because the other side told the same again, as the mesh has it.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

/// Least time between two tellings of what is no news, as the mesh has it.
const TELL_PAUSE: Duration = Duration::from_secs(1);

/// Most requests of one round of a search: the longer of the two plans, and a burst back to each address that was met.
const SHOTS: usize = (if MAX_PROBES > MAX_SOCKETS * PASSES { MAX_PROBES } else { MAX_SOCKETS * PASSES }) + 6 * MAX_MET;

/// Sources whose packets are taken for the other side's, as the mesh keeps them: the oldest is forgotten first.
const MAX_SOURCES: usize = 8;

/// First byte of a packet that is not STUN.
const DATA: u8 = 0x40;

/// What other packets carry, as QUIC's do: their own number, or 0 if they only acknowledge, and the highest that was heard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Numbers {
    own: u32,
    heard: u32,
}

impl Numbers {
    pub(crate) fn packet(self) -> Vec<u8> {
        [&[DATA][..], &self.own.to_be_bytes(), &self.heard.to_be_bytes()].concat()
    }

    pub(crate) fn of(packet: &[u8]) -> Self {
        let number = |at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().expect("four bytes"));
        Self { own: number(1), heard: number(5) }
    }
}

/// Where one side might be reached, and what it knows of the NAT in front of it.
#[derive(Debug, Clone)]
pub(crate) struct Whereabouts {
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) nat: Nat,
}

impl Whereabouts {
    fn side(&self) -> Side {
        Side::new(self.nat, &self.candidates)
    }
}

/// A packet on its way out, from a machine's port.
pub(crate) struct Outgoing {
    pub(crate) machine: usize,
    pub(crate) port: u16,
    pub(crate) transmit: Transmit,
}

pub(crate) struct Peer {
    pub(crate) machine: usize,
    pub(crate) port: u16,
    /// Made when the link is agreed.
    pub(crate) agent: Option<Agent>,
    pub(crate) reflexive: Reflexive,
    pub(crate) seeker: Seeker,
    /// Every change of path, and when.
    pub(crate) changes: Vec<(Instant, Option<SocketAddr>)>,
    /// When it was last told something that came directly, or by way of the relay.
    pub(crate) heard: Heard,
    pub(crate) audit: Audit,
    /// The newest packet that was sent, that was heard, and that the other side heard; the first that was sent on the path of now.
    sent: u32,
    received: u32,
    acknowledged: u32,
    first_on_path: u32,
    /// What the other side told.
    theirs: Option<Whereabouts>,
    /// When a round of checks began because the other side told something.
    round_at: Option<Instant>,
    /// Checks that came before the link was agreed here.
    early: Vec<(SocketAddr, Vec<u8>)>,
    hosts: Vec<Candidate>,
    proven: VecDeque<SocketAddr>,
    /// The other side does not know yet where it is.
    news: bool,
    /// When to tell it once more, and when it was told.
    again: Option<Instant>,
    told: Option<Instant>,
}

/// Other packets that came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) at: Instant,
    /// Longest time without any, since it was last set to nothing.
    pub(crate) longest_pause: Duration,
    /// How many came directly.
    pub(crate) directly: u64,
}

impl Heard {
    pub(crate) fn note(&mut self, now: Instant) {
        self.longest_pause = self.longest_pause.max(now - self.at);
        self.at = now;
    }
}

impl Peer {
    pub(crate) fn new(machine: usize, port: u16, seed: [u8; 32], now: Instant) -> Self {
        Self {
            machine,
            port,
            agent: None,
            reflexive: Reflexive::new(seed, now),
            seeker: Seeker::new(port, Dice::new(u64::from_be_bytes(*seed.first_chunk().expect("32 bytes"))), now),
            changes: Vec::new(),
            heard: Heard { at: now, longest_pause: Duration::ZERO, directly: 0 },
            audit: Audit::default(),
            sent: 0,
            received: 0,
            acknowledged: 0,
            first_on_path: 1,
            theirs: None,
            round_at: None,
            early: Vec::new(),
            hosts: Vec::new(),
            proven: VecDeque::new(),
            news: false,
            again: None,
            told: None,
        }
    }

    /// There is a socket from now on.
    pub(crate) fn open(&mut self, addresses: Vec<IpAddr>, now: Instant) {
        self.hosts = self.host_candidates(addresses);
        self.reflexive.set_responders(&RESPONDERS, now);
        self.reflexive.set_witnesses(&WITNESSES, now);
        self.reflexive.set_active(true, now);
    }

    /// The link is agreed.
    pub(crate) fn link(&mut self, config: Config, seed: [u8; 32], theirs: Whereabouts, now: Instant) {
        let Config { key, role, .. } = &config;
        let search = search::Config { key: key.clone(), role: *role, seed, history: History::default() };
        self.seeker.link(search, now);
        let mut agent = Agent::new(config, now);
        agent.set_local(self.candidates(), now);
        self.agent = Some(agent);
        self.set_theirs(theirs, now);
        for (from, bytes) in std::mem::take(&mut self.early) {
            let handled = self.agent.as_mut().map(|agent| agent.handle_early_packet(from, &bytes, now));
            if handled == Some(Handled::Check) {
                self.audit.named.insert(from);
                self.prove_source(from);
            }
        }
    }

    /// The other side tells its candidates. It tells the same again when it lost its path: rounds that do not meet open no two
    /// routers that hear nobody else.
    pub(crate) fn set_theirs(&mut self, theirs: Whereabouts, now: Instant) {
        self.audit.named.extend(theirs.candidates.iter().map(|candidate| candidate.addr));
        self.seeker.set_sides(self.whereabouts().side(), theirs.side(), now);
        // News of the NAT alone is no reason for a round, which the other side would not make at the same time.
        let is_of_nat = self
            .theirs
            .replace(theirs.clone())
            .is_some_and(|before| before.candidates == theirs.candidates && before.nat != theirs.nat);
        let Some(agent) = &mut self.agent else { return };
        agent.set_remote(theirs.candidates, now);
        if agent.path().is_none() && !is_of_nat && self.round_at.is_none_or(|at| at + ROUND_PAUSE <= now) {
            self.round_at = Some(now);
            agent.restart(now);
        }
    }

    /// Looks at the interfaces.
    pub(crate) fn look(&mut self, addresses: Vec<IpAddr>, now: Instant) {
        let hosts = self.host_candidates(addresses);
        if hosts != self.hosts {
            self.hosts = hosts;
            self.reflexive.restart(now);
            self.agent.iter_mut().for_each(|agent| agent.restart(now));
            self.seeker.begin_anew(now);
            self.news = true;
        }
    }

    /// The relay is back: what it saw may be old.
    pub(crate) fn joined(&mut self, now: Instant) {
        self.reflexive.refresh(now);
    }

    /// Either side is back in the room: what was told meanwhile may be lost.
    pub(crate) fn tell(&mut self) {
        self.news = true;
    }

    /// The other side should look for a path at the same time.
    fn tell_again(&mut self, now: Instant) {
        let at = self.told.map_or(now, |told| now.max(told + TELL_PAUSE));
        self.again.get_or_insert(at);
    }

    /// Where it might be reached, best first.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let seen = self.reflexive.addresses().into_iter();
        let unknown = seen.filter(|addr| self.hosts.iter().all(|host| host.addr != *addr));
        let reflexive = unknown.map(|addr| Candidate { kind: CandidateKind::ServerReflexive, addr });
        reflexive.chain(self.hosts.iter().copied()).take(MAX_CANDIDATES).collect()
    }

    /// Where it might be reached, and what it knows of its NAT.
    pub(crate) fn whereabouts(&self) -> Whereabouts {
        Whereabouts { candidates: self.candidates(), nat: self.seeker.nat() }
    }

    /// Whether a socket of its has this port.
    pub(crate) fn has_port(&self, port: u16) -> bool {
        self.port == port || self.seeker.has_port(port)
    }

    /// Whether packets that are not STUN are read there.
    pub(crate) fn reads_data(&self, port: u16) -> bool {
        self.port == port || self.seeker.keeps(port)
    }

    /// A STUN packet came to the socket of this port.
    pub(crate) fn handle_packet(&mut self, port: u16, from: SocketAddr, bytes: &[u8], now: Instant) {
        if self.seeker.handle_sampled(port, from, bytes, now) {
            return;
        }
        let mut asked = || self.reflexive.handle_packet(from, bytes, now);
        if self.port == port && !matches!(asked(), Handled::Ignored(_)) {
            return;
        }
        match self.agent.as_mut().map(|agent| agent.handle_packet(from, bytes, now)) {
            Some(Handled::Check) => {
                self.audit.owed.entry(from).and_modify(|owed| *owed += 1).or_insert(1);
                self.audit.named.insert(from);
                self.prove_source(from);
            }
            Some(Handled::Answer) => self.prove_source(from),
            Some(Handled::Ignored(_)) => {
                if self.seeker.handle_packet(port, from, bytes, now) == Some(Handled::Check) {
                    self.audit.owed.entry(from).and_modify(|owed| *owed += 1).or_insert(1);
                }
            }
            None => self.early.push((from, bytes.to_vec())),
        }
    }

    /// The next packet of data, which goes along the path.
    pub(crate) fn next_data(&mut self, now: Instant) -> Numbers {
        self.sent += 1;
        if let Some(agent) = self.agent.as_mut().filter(|agent| agent.path().is_some()) {
            agent.on_sent(now);
            agent.on_data_sent(now);
        }
        Numbers { own: self.sent, heard: self.received }
    }

    /// A packet that only says what was heard, which goes along the path.
    pub(crate) fn acknowledgement(&mut self, now: Instant) -> Numbers {
        self.agent.iter_mut().for_each(|agent| agent.on_sent(now));
        Numbers { own: 0, heard: self.received }
    }

    /// Another packet came directly; says whether it is to be acknowledged. It is only taken from where the other side was
    /// proved to be.
    pub(crate) fn handle_data(&mut self, from: SocketAddr, numbers: Numbers, now: Instant) -> bool {
        let Some(agent) = self.agent.as_mut().filter(|_| self.proven.contains(&from)) else { return false };
        agent.on_received(from, now);
        if numbers.own > 0 {
            agent.on_heard(now);
        }
        // What is heard from is not forgotten for what only checked.
        self.prove_source(from);
        self.heard.directly += u64::from(numbers.own > 0);
        self.handle_numbers(numbers, now)
    }

    /// Another packet came by way of the relay.
    pub(crate) fn handle_relayed(&mut self, numbers: Numbers, now: Instant) -> bool {
        self.agent.iter_mut().for_each(|agent| agent.on_relayed(now));
        self.handle_numbers(numbers, now)
    }

    fn handle_numbers(&mut self, numbers: Numbers, now: Instant) -> bool {
        self.heard.note(now);
        self.received = self.received.max(numbers.own);
        if numbers.heard > self.acknowledged {
            self.acknowledged = numbers.heard;
            let on_path = self.path().is_some() && numbers.heard >= self.first_on_path;
            self.agent.iter_mut().filter(|_| on_path).for_each(|agent| agent.on_delivered(now));
        }
        numbers.own > 0
    }

    pub(crate) fn path(&self) -> Option<SocketAddr> {
        self.agent.as_ref()?.path().map(|direct| direct.addr)
    }

    /// Whether the newest packet that went along the direct path of now is not acknowledged yet.
    pub(crate) fn is_unacknowledged(&self) -> bool {
        self.path().is_some() && self.sent >= self.first_on_path && self.acknowledged < self.sent
    }

    /// Whether what it sends goes by way of the relay as well.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.agent.as_ref().is_some_and(Agent::is_doubted)
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.agent.iter_mut().for_each(|agent| agent.handle_timeout(now));
        self.reflexive.handle_timeout(now);
        self.seeker.handle_timeout(now);
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let agent = self.agent.as_ref().and_then(Agent::poll_timeout);
        let others = [self.reflexive.poll_timeout(), self.seeker.poll_timeout(), self.again];
        others.into_iter().chain([agent]).flatten().min()
    }

    /// Fetches all that the machines want; gives the candidates to tell, if they are new.
    pub(crate) fn drain(&mut self, now: Instant, out: &mut Vec<Outgoing>) -> Option<Whereabouts> {
        self.hear_responders(now);
        while let Some(event) = self.agent.as_mut().and_then(Agent::poll_event) {
            match event {
                Event::PathChanged(direct) => self.path_changed(direct.map(|direct| direct.addr), now),
                Event::Doubted(_) => {}
            }
        }
        let is_news = std::mem::take(&mut self.news);
        let tells = is_news || self.again.is_some_and(|at| at <= now);
        let here = tells.then(|| self.whereabouts());
        if tells {
            (self.again, self.told) = (None, Some(now));
        }
        if let Some((agent, here)) = self.agent.as_mut().zip(here.as_ref()).filter(|_| is_news) {
            agent.set_local(here.candidates.clone(), now);
            self.seeker.set_here(here.side(), now);
        }
        if let Some((agent, found)) = self.agent.as_mut().zip(self.seeker.carry_out(now)) {
            // Its checks came from there, and this is another way to it than before.
            self.audit.named.insert(found);
            self.audit.checks.remove(&found);
            agent.try_address(found, now);
        }
        self.drain_packets(now, out);
        here
    }

    fn hear_responders(&mut self, now: Instant) {
        let mut is_told = self.seeker.take_sampled();
        while let Some(event) = self.reflexive.poll_event() {
            self.news |= matches!(event, ReflexiveEvent::Found(_));
            is_told = true;
        }
        self.news |= is_told && self.seeker.judge(&self.reflexive, &self.hosts, now);
    }

    fn drain_packets(&mut self, now: Instant, out: &mut Vec<Outgoing>) {
        let mut push = |port, transmit| out.push(Outgoing { machine: self.machine, port, transmit });
        while let Some(transmit) = self.reflexive.poll_transmit() {
            self.audit.note_request(&transmit, now);
            push(self.port, transmit);
        }
        while let Some((port, transmit)) = self.seeker.poll_sample() {
            self.audit.note_sample(&transmit, now);
            push(port, transmit);
        }
        while let Some(transmit) = self.agent.as_mut().and_then(Agent::poll_transmit) {
            self.audit.note(&transmit, now);
            push(self.seeker.port_towards(transmit.to), transmit);
        }
        while let Some((port, transmit)) = self.seeker.poll_shot(now) {
            self.audit.note_shot(&transmit, now);
            push(port, transmit);
        }
    }

    fn path_changed(&mut self, path: Option<SocketAddr>, now: Instant) {
        self.changes.push((now, path));
        self.first_on_path = self.sent + 1;
        self.reflexive.set_active(path.is_none(), now);
        self.seeker.set_path(path, now);
        match path {
            Some(addr) => self.prove_source(addr),
            // Perhaps because the router forgot us; and the other side should look for a path at the same time.
            None => {
                self.reflexive.refresh(now);
                self.tell_again(now);
            }
        }
    }

    fn prove_source(&mut self, from: SocketAddr) {
        self.proven.retain(|source| *source != from);
        self.proven.push_back(from);
        if self.proven.len() > MAX_SOURCES {
            self.proven.pop_front();
        }
    }

    fn host_candidates(&self, addresses: Vec<IpAddr>) -> Vec<Candidate> {
        let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, self.port));
        addresses.map(|addr| Candidate { kind: CandidateKind::Host, addr }).collect()
    }
}

/// Holds a peer's packets to what is allowed.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    /// All datagrams that left.
    pub(crate) sent: u64,
    /// Most checks in any second.
    pub(crate) peak: usize,
    named: BTreeSet<SocketAddr>,
    owed: BTreeMap<SocketAddr, u64>,
    checks: BTreeMap<SocketAddr, VecDeque<Instant>>,
    last_second: VecDeque<Instant>,
    requests: VecDeque<Instant>,
    samples: VecDeque<Instant>,
    shots: VecDeque<Instant>,
}

impl Audit {
    fn note(&mut self, transmit: &Transmit, now: Instant) {
        self.sent += 1;
        let class = Message::parse(&transmit.bytes).expect("what leaves is well formed").class();
        if class == Class::Request {
            return self.note_check(transmit.to, now);
        }
        self.note_answer(transmit);
    }

    fn note_answer(&mut self, transmit: &Transmit) {
        let owed = self.owed.get_mut(&transmit.to).filter(|owed| **owed > 0);
        *owed.unwrap_or_else(|| panic!("an answer to {}, which asked nothing", transmit.to)) -= 1;
    }

    fn note_check(&mut self, to: SocketAddr, now: Instant) {
        assert!(self.named.contains(&to), "a check to {to}, which nobody named");
        assert!(self.last_second.back().is_none_or(|last| *last + PACE <= now), "checks faster than the pace");
        self.last_second.push_back(now);
        forget(&mut self.last_second, Duration::from_secs(1), now);
        self.peak = self.peak.max(self.last_second.len());
        let checks = self.checks.entry(to).or_default();
        checks.push_back(now);
        forget(checks, BUDGET_WINDOW, now);
        assert!(checks.len() <= BUDGET, "more checks of {to} than the budget");
    }

    fn note_request(&mut self, transmit: &Transmit, now: Instant) {
        self.sent += 1;
        let mut responders = RESPONDERS.iter().chain(&WITNESSES);
        assert!(responders.any(|responder| *responder == transmit.to), "{} is no responder", transmit.to);
        self.requests.push_back(now);
        forget(&mut self.requests, Duration::from_secs(10), now);
        // Three askings begun in ten seconds: for an interface, a lost path and the relay's return.
        let most = 3 * (RESPONDERS.len() + WITNESSES.len()) * RETRANSMIT.len();
        assert!(self.requests.len() <= most, "the responders are asked too often");
    }

    fn note_sample(&mut self, transmit: &Transmit, now: Instant) {
        self.sent += 1;
        assert!(RESPONDERS.contains(&transmit.to), "{} is asked, which is no responder", transmit.to);
        self.samples.push_back(now);
        forget(&mut self.samples, Duration::from_secs(60), now);
        // Another network may be sampled within the minute, and once more.
        assert!(self.samples.len() <= 3 * 2 * SOCKETS, "a NAT is sampled too often");
    }

    fn note_shot(&mut self, transmit: &Transmit, now: Instant) {
        self.sent += 1;
        let class = Message::parse(&transmit.bytes).expect("what leaves is well formed").class();
        if class != Class::Request {
            return self.note_answer(transmit);
        }
        let is_named = self.named.iter().any(|named| named.ip() == transmit.to.ip());
        assert!(is_named, "a search at {}, which nobody named", transmit.to);
        assert!(self.shots.back().is_none_or(|last| *last + round::PACE <= now), "a search faster than its pace");
        self.shots.push_back(now);
        // No two rounds have packets in one window of this length.
        forget(&mut self.shots, PAUSES[0] - ROUND, now);
        assert!(self.shots.len() <= SHOTS, "more packets in a round of a search than its bound");
    }
}

fn forget(times: &mut VecDeque<Instant>, age: Duration, now: Instant) {
    while times.front().is_some_and(|at| *at + age <= now) {
        times.pop_front();
    }
}
