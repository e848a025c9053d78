//! Drives two peers over a simulated internet, and holds them to their bounds all the while.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Agent, Candidate, CandidateKind, CheckKey, Config, Event, Handled, PACE, Reflexive, Role,
        check::{BUDGET, BUDGET_WINDOW},
    },
    stun::{Class, Message, is_stun},
};

use crate::{
    clock::{Dice, beginning},
    net::{Arrived, Gate, Net, RESPONDER, Weather},
};

/// Interval of other packets, while there is traffic.
const TRAFFIC: Duration = Duration::from_millis(50);

/// First byte of a packet that is not STUN.
const DATA: u8 = 0x40;

/// More turns than this in a second of virtual time: something wakes up for nothing.
const MAX_TURNS_PER_SECOND: u32 = 2_000;

pub(crate) struct Pair {
    pub(crate) now: Instant,
    pub(crate) net: Net,
    pub(crate) peers: [Peer; 2],
    /// Both sides send other packets along their paths.
    pub(crate) traffic: bool,
    /// Candidates reach the other side.
    pub(crate) signalling: bool,
    began: Instant,
    next_traffic: Instant,
    signals: BTreeMap<(Instant, u64), Signal>,
    signal_delay: Duration,
    sequence: u64,
}

pub(crate) struct Peer {
    pub(crate) agent: Agent,
    pub(crate) reflexive: Reflexive,
    pub(crate) host: usize,
    /// Every change of path, and when.
    pub(crate) changes: Vec<(Instant, Option<SocketAddr>)>,
    checks: BTreeMap<SocketAddr, VecDeque<Instant>>,
    last_check: Option<Instant>,
}

struct Signal {
    to: usize,
    candidates: Vec<Candidate>,
}

impl Pair {
    /// Two peers in sites of their own, or in one if there is a single gate; the first begins to call now.
    pub(crate) fn new(gates: &[Gate], weather: Weather, seed: u64) -> Self {
        let (now, mut dice) = (beginning(), Dice::new(seed));
        let mut net = Net::new(weather, Dice::new(dice.roll()));
        let sites: Vec<_> = gates.iter().map(|gate| net.add_site(*gate)).collect();
        let key = CheckKey::agree(&dice.bytes(), &dice.bytes());
        let peers = [Role::Controlling, Role::Controlled].map(|role| {
            let site = if role == Role::Controlling { sites[0] } else { *sites.last().unwrap() };
            let config = Config { key: key.clone(), role, seed: dice.bytes() };
            Peer {
                agent: Agent::new(config, now),
                reflexive: Reflexive::new(dice.bytes(), now),
                host: net.add_host(site),
                changes: Vec::new(),
                checks: BTreeMap::new(),
                last_check: None,
            }
        });
        let mut pair = Self {
            now,
            net,
            peers,
            traffic: false,
            signalling: true,
            began: now,
            next_traffic: now,
            signals: BTreeMap::new(),
            signal_delay: dice.millis(5, 300),
            sequence: 0,
        };
        for at in 0..2 {
            let peer = &mut pair.peers[at];
            peer.reflexive.set_responders(&[RESPONDER.parse().unwrap()], now);
            peer.reflexive.set_active(true, now);
            pair.announce(at);
        }
        pair.drain();
        pair
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.began
    }

    pub(crate) fn path(&self, at: usize) -> Option<SocketAddr> {
        self.peers[at].agent.path().map(|direct| direct.addr)
    }

    pub(crate) fn both_direct(&self) -> bool {
        self.peers.iter().all(|peer| peer.agent.path().is_some())
    }

    pub(crate) fn none_direct(&self) -> bool {
        self.peers.iter().all(|peer| peer.agent.path().is_none())
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Runs until it is so, for at most `time`; says whether it came to be.
    pub(crate) fn run_until(&mut self, time: Duration, is_so: impl Fn(&Self) -> bool) -> bool {
        let end = self.now + time;
        let (mut second, mut turns) = (self.now, 0);
        while !is_so(self) {
            let next = self.next_turn();
            if next > end {
                self.now = end;
                return is_so(self);
            }
            self.now = self.now.max(next);
            if self.now >= second + Duration::from_secs(1) {
                (second, turns) = (self.now, 0);
            }
            turns += 1;
            assert!(turns < MAX_TURNS_PER_SECOND, "busy for nothing");
            self.turn();
        }
        true
    }

    /// Tells a side that an interface changed: it asks for its outer address again, and tells the other side.
    pub(crate) fn interface_changed(&mut self, at: usize) {
        self.peers[at].reflexive.restart(self.now);
        self.peers[at].agent.restart(self.now);
        self.announce(at);
        self.drain();
    }

    fn next_turn(&self) -> Instant {
        let timers = self.peers.iter().flat_map(|peer| [peer.agent.poll_timeout(), peer.reflexive.poll_timeout()]);
        let signal = self.signals.keys().next().map(|(at, _)| *at);
        let traffic = self.traffic.then_some(self.next_traffic);
        let others = [self.net.next_arrival(), signal, traffic];
        timers.chain(others).flatten().min().expect("the responder is asked again and again")
    }

    fn turn(&mut self) {
        for arrived in self.net.arrive(self.now) {
            self.receive(arrived);
        }
        let later = self.signals.split_off(&(self.now + Duration::from_nanos(1), 0));
        for signal in std::mem::replace(&mut self.signals, later).into_values() {
            self.peers[signal.to].agent.set_remote(signal.candidates, self.now);
        }
        if self.traffic && self.next_traffic <= self.now {
            self.next_traffic = self.now + TRAFFIC;
            self.send_traffic();
        }
        for peer in &mut self.peers {
            peer.agent.handle_timeout(self.now);
            peer.reflexive.handle_timeout(self.now);
        }
        self.drain();
    }

    fn receive(&mut self, arrived: Arrived) {
        let now = self.now;
        let peer = self.peers.iter_mut().find(|peer| peer.host == arrived.host).unwrap();
        if !is_stun(arrived.bytes[0]) {
            peer.agent.on_received(arrived.from, now);
        } else if matches!(peer.reflexive.handle_packet(arrived.from, &arrived.bytes, now), Handled::Ignored(_)) {
            peer.agent.handle_packet(arrived.from, &arrived.bytes, now);
        }
    }

    fn send_traffic(&mut self) {
        for peer in &mut self.peers {
            if let Some(path) = peer.agent.path() {
                peer.agent.on_sent(self.now);
                self.net.send(peer.host, path.addr, vec![DATA; 1200], self.now);
            }
        }
    }

    fn drain(&mut self) {
        for at in 0..2 {
            let peer = &mut self.peers[at];
            while let Some(transmit) = peer.agent.poll_transmit() {
                peer.note_check(transmit.to, &transmit.bytes, self.now);
                self.net.send(peer.host, transmit.to, transmit.bytes, self.now);
            }
            while let Some(event) = peer.agent.poll_event() {
                let Event::PathChanged(path) = event else { continue };
                peer.changes.push((self.now, path.map(|direct| direct.addr)));
                if path.is_none() {
                    peer.reflexive.refresh(self.now);
                }
            }
            while let Some(transmit) = peer.reflexive.poll_transmit() {
                self.net.send(peer.host, transmit.to, transmit.bytes, self.now);
            }
            let mut found = false;
            while peer.reflexive.poll_event().is_some() {
                found = true;
            }
            if found {
                self.announce(at);
                return self.drain();
            }
        }
    }

    /// Tells both agents where this side may be reached.
    fn announce(&mut self, at: usize) {
        let peer = &mut self.peers[at];
        let hosts = self.net.addrs(peer.host).iter().map(|addr| (CandidateKind::Host, *addr));
        let reflexive = peer.reflexive.addresses().into_iter().map(|addr| (CandidateKind::ServerReflexive, addr));
        let candidates: Vec<_> = hosts.chain(reflexive).map(|(kind, addr)| Candidate { kind, addr }).collect();
        peer.agent.set_local(candidates.clone(), self.now);
        if self.signalling {
            self.sequence += 1;
            // The answer to an offer comes a delay later than the offer.
            let delay = self.signal_delay * if at == 0 { 1 } else { 2 };
            self.signals.insert((self.now + delay, self.sequence), Signal { to: 1 - at, candidates });
        }
    }
}

impl Peer {
    /// Holds every check to pace and budget.
    fn note_check(&mut self, to: SocketAddr, bytes: &[u8], now: Instant) {
        if Message::parse(bytes).unwrap().class() != Class::Request {
            return;
        }
        assert!(self.last_check.is_none_or(|last| last + PACE <= now), "checks faster than the pace");
        self.last_check = Some(now);
        let checks = self.checks.entry(to).or_default();
        checks.push_back(now);
        checks.retain(|at| *at + BUDGET_WINDOW > now);
        assert!(checks.len() <= BUDGET, "more checks of {to} than the budget");
    }
}
