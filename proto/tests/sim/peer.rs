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
        Agent, Candidate, CandidateKind, Config, Event, Handled, PACE, Reflexive, Transmit,
        check::{BUDGET, BUDGET_WINDOW},
        reflexive::RETRANSMIT,
    },
    stun::{Class, Message},
};

use crate::internet::RESPONDERS;

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
    /// Checks that came before the link was agreed here.
    early: Vec<(SocketAddr, Vec<u8>)>,
    hosts: Vec<Candidate>,
    proven: VecDeque<SocketAddr>,
    /// What it wants to tell the other side.
    news: bool,
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
            changes: Vec::new(),
            heard: Heard { at: now, longest_pause: Duration::ZERO, directly: 0 },
            audit: Audit::default(),
            sent: 0,
            received: 0,
            acknowledged: 0,
            first_on_path: 1,
            early: Vec::new(),
            hosts: Vec::new(),
            proven: VecDeque::new(),
            news: false,
        }
    }

    /// There is a socket from now on.
    pub(crate) fn open(&mut self, addresses: Vec<IpAddr>, now: Instant) {
        self.hosts = self.host_candidates(addresses);
        self.reflexive.set_responders(&RESPONDERS, now);
        self.reflexive.set_active(true, now);
    }

    /// The link is agreed.
    pub(crate) fn link(&mut self, config: Config, theirs: Vec<Candidate>, now: Instant) {
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
    pub(crate) fn set_theirs(&mut self, theirs: Vec<Candidate>, now: Instant) {
        self.audit.named.extend(theirs.iter().map(|candidate| candidate.addr));
        let Some(agent) = &mut self.agent else { return };
        agent.set_remote(theirs, now);
        if agent.path().is_none() {
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

    /// Where it might be reached, best first.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let seen = self.reflexive.addresses().into_iter();
        let unknown = seen.filter(|addr| self.hosts.iter().all(|host| host.addr != *addr));
        let reflexive = unknown.map(|addr| Candidate { kind: CandidateKind::ServerReflexive, addr });
        reflexive.chain(self.hosts.iter().copied()).take(MAX_CANDIDATES).collect()
    }

    /// A STUN packet came.
    pub(crate) fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) {
        if !matches!(self.reflexive.handle_packet(from, bytes, now), Handled::Ignored(_)) {
            return;
        }
        match self.agent.as_mut().map(|agent| agent.handle_packet(from, bytes, now)) {
            Some(Handled::Check) => {
                self.audit.owed.entry(from).and_modify(|owed| *owed += 1).or_insert(1);
                self.audit.named.insert(from);
                self.prove_source(from);
            }
            Some(Handled::Answer) => self.prove_source(from),
            Some(Handled::Ignored(_)) => {}
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
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let agent = self.agent.as_ref().and_then(Agent::poll_timeout);
        [agent, self.reflexive.poll_timeout()].into_iter().flatten().min()
    }

    /// Fetches all that the machines want; gives the candidates to tell, if they are new.
    pub(crate) fn drain(&mut self, now: Instant, out: &mut Vec<Outgoing>) -> Option<Vec<Candidate>> {
        while self.reflexive.poll_event().is_some() {
            self.news = true;
        }
        while let Some(event) = self.agent.as_mut().and_then(Agent::poll_event) {
            match event {
                Event::PathChanged(direct) => self.path_changed(direct.map(|direct| direct.addr), now),
                Event::Doubted(_) => {}
            }
        }
        let news = std::mem::take(&mut self.news).then(|| self.candidates());
        if let Some((agent, candidates)) = self.agent.as_mut().zip(news.as_ref()) {
            agent.set_local(candidates.clone(), now);
        }
        while let Some(transmit) = self.reflexive.poll_transmit() {
            self.audit.note_request(&transmit, now);
            out.push(Outgoing { machine: self.machine, port: self.port, transmit });
        }
        while let Some(transmit) = self.agent.as_mut().and_then(Agent::poll_transmit) {
            self.audit.note(&transmit, now);
            out.push(Outgoing { machine: self.machine, port: self.port, transmit });
        }
        news
    }

    fn path_changed(&mut self, path: Option<SocketAddr>, now: Instant) {
        self.changes.push((now, path));
        self.first_on_path = self.sent + 1;
        self.reflexive.set_active(path.is_none(), now);
        match path {
            Some(addr) => self.prove_source(addr),
            // Perhaps because the router forgot us; and the other side should look for a path at the same time.
            None => {
                self.reflexive.refresh(now);
                self.news = true;
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
}

impl Audit {
    fn note(&mut self, transmit: &Transmit, now: Instant) {
        self.sent += 1;
        let class = Message::parse(&transmit.bytes).expect("what leaves is well formed").class();
        if class == Class::Request {
            return self.note_check(transmit.to, now);
        }
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
        assert!(RESPONDERS.contains(&transmit.to), "{} is asked, which is no responder", transmit.to);
        self.requests.push_back(now);
        forget(&mut self.requests, Duration::from_secs(10), now);
        // Three askings begun in ten seconds: for an interface, a lost path and the relay's return.
        let most = 3 * RESPONDERS.len() * RETRANSMIT.len();
        assert!(self.requests.len() <= most, "the responders are asked too often");
    }
}

fn forget(times: &mut VecDeque<Instant>, age: Duration, now: Instant) {
    while times.front().is_some_and(|at| *at + age <= now) {
        times.pop_front();
    }
}
