//! Two hosts at the ends of a street, each perhaps behind a NAT, and all that can happen to a street: packets are delayed or
//! lost, data alone is swallowed, NATs forget, a host moves. What the agents say is noted, with the time.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{Agent, Candidate, CandidateKind, CheckKey, Config, Event, Role},
    stun::is_stun,
};

use crate::clock::{Dice, beginning};

/// First byte of a packet that is not STUN.
const DATA: u8 = 0x40;

/// What data is: something to acknowledge, or an acknowledgement.
const SAYS: u8 = 1;
const ACKNOWLEDGES: u8 = 2;

/// Of something that was sent directly: congestion control tells what is acknowledged on the path of now from the rest.
const DIRECTLY: u8 = 0x10;

/// A host and what stands before it.
pub(crate) struct Host {
    pub(crate) agent: Agent,
    pub(crate) inner: SocketAddr,
    /// With a NAT: what the world sees of the host, and to whom it has sent since.
    pub(crate) nat: Option<Nat>,
    /// Says something every so often, on whatever path there is.
    pub(crate) says_every: Option<Duration>,
    next_word: Instant,
    /// Tells its agent of data as QUIC's counters would.
    sent: bool,
    delivered: bool,
    /// When something of the other side's was heard or acknowledged, by any path.
    pub(crate) heard: Vec<Instant>,
    pub(crate) changes: Vec<(Instant, Option<SocketAddr>)>,
    pub(crate) checks: Vec<(Instant, SocketAddr)>,
    pub(crate) bytes: usize,
}

/// A NAT with one mapping: endpoint-independent, which forgets when nothing goes out for `expiry`.
pub(crate) struct Nat {
    pub(crate) public: IpAddr,
    pub(crate) expiry: Duration,
    pub(crate) filters_ports: bool,
    pub(crate) port: u16,
    pub(crate) used: Option<Instant>,
    pub(crate) sent_to: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    pub(crate) fn new(public: &str, expiry: u64) -> Self {
        let expiry = Duration::from_secs(expiry);
        let public = public.parse().unwrap();
        Self { public, expiry, filters_ports: false, port: 20_000, used: None, sent_to: BTreeMap::new() }
    }

    /// Another port from now on, and nobody is let in.
    pub(crate) fn forget(&mut self) {
        self.port += 1;
        self.sent_to.clear();
    }

    fn leave(&mut self, to: SocketAddr, now: Instant) -> SocketAddr {
        if self.used.is_some_and(|used| used + self.expiry <= now) {
            self.forget();
        }
        self.used = Some(now);
        self.sent_to.insert(to, now);
        SocketAddr::new(self.public, self.port)
    }

    fn lets_in(&self, from: SocketAddr, to: SocketAddr, now: Instant) -> bool {
        let is_ours = to == SocketAddr::new(self.public, self.port);
        let lives = self.used.is_some_and(|used| used + self.expiry > now);
        let knows =
            |sent_to: &SocketAddr| if self.filters_ports { *sent_to == from } else { sent_to.ip() == from.ip() };
        is_ours && lives && self.sent_to.keys().any(knows)
    }
}

struct Packet {
    to: usize,
    from: SocketAddr,
    addressed: SocketAddr,
    bytes: Vec<u8>,
}

/// What a street does to packets.
#[derive(Clone, Copy)]
pub(crate) struct Street {
    pub(crate) delay: Duration,
    pub(crate) loss_percent: u64,
    /// Nothing direct arrives.
    pub(crate) blocked: bool,
    /// Of what goes directly to this end, only STUN arrives.
    pub(crate) swallows_data: [bool; 2],
}

pub(crate) struct Life {
    began: Instant,
    pub(crate) now: Instant,
    pub(crate) hosts: [Host; 2],
    pub(crate) street: Street,
    /// One way by the relay.
    pub(crate) relay_delay: Duration,
    flying: BTreeMap<(Instant, u64), Packet>,
    relayed: BTreeMap<(Instant, u64), (usize, u8)>,
    sequence: u64,
    dice: Dice,
}

impl Life {
    /// Two hosts 20 ms apart that know each other's addresses, and nothing has been sent.
    pub(crate) fn new(addrs: [&str; 2], nats: [Option<Nat>; 2], seed: u64) -> Self {
        let (now, mut dice) = (beginning(), Dice::new(seed));
        let key = CheckKey::agree(&dice.bytes(), &dice.bytes());
        let mut ends = [Role::Controlling, Role::Controlled].into_iter().zip(addrs).zip(nats);
        let hosts = std::array::from_fn(|_| {
            let ((role, inner), nat) = ends.next().unwrap();
            Host {
                agent: Agent::new(Config { key: key.clone(), role, seed: dice.bytes() }, now),
                inner: inner.parse().unwrap(),
                nat,
                says_every: None,
                next_word: now,
                sent: false,
                delivered: false,
                heard: Vec::new(),
                changes: Vec::new(),
                checks: Vec::new(),
                bytes: 0,
            }
        });
        let delay = Duration::from_millis(20);
        let street = Street { delay, loss_percent: 0, blocked: false, swallows_data: [false; 2] };
        let (flying, relayed) = (BTreeMap::new(), BTreeMap::new());
        Self { began: now, now, hosts, street, relay_delay: delay, flying, relayed, sequence: 0, dice }
    }

    /// Both know all of the other's addresses, and have had a path for three seconds.
    pub(crate) fn direct(addrs: [&str; 2], nats: [Option<Nat>; 2], seed: u64) -> Self {
        let mut life = Self::new(addrs, nats, seed);
        life.introduce(0);
        life.introduce(1);
        life.run(Duration::from_secs(3));
        assert!((0..2).all(|at| life.path(at).is_some()), "seed {seed}: never direct");
        life
    }

    /// Where one end may be reached, as it and the other end know it now.
    pub(crate) fn introduce(&mut self, at: usize) {
        let candidates = self.candidates(at);
        self.hosts[at].agent.set_local(candidates.clone(), self.now);
        self.hosts[1 - at].agent.set_remote(candidates, self.now);
        self.drain();
    }

    pub(crate) fn candidates(&self, at: usize) -> Vec<Candidate> {
        let host = &self.hosts[at];
        let outer = host.nat.as_ref().map(|nat| SocketAddr::new(nat.public, nat.port));
        let outer = outer.map(|addr| Candidate { kind: CandidateKind::ServerReflexive, addr });
        [Candidate { kind: CandidateKind::Host, addr: host.inner }].into_iter().chain(outer).collect()
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.began
    }

    pub(crate) fn path(&self, at: usize) -> Option<SocketAddr> {
        self.hosts[at].agent.path().map(|direct| direct.addr)
    }

    /// Both ends say something every 20 ms, as in a transfer and its acknowledgements.
    pub(crate) fn talk(&mut self) {
        for host in &mut self.hosts {
            host.says_every = Some(Duration::from_millis(20));
        }
    }

    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// How long it took until it was so.
    pub(crate) fn run_until(&mut self, time: Duration, is_so: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (began, end) = (self.now, self.now + time);
        while !is_so(self) {
            let next = self.next_turn().filter(|next| *next <= end);
            let Some(next) = next else {
                self.now = end;
                return is_so(self).then(|| self.now - began);
            };
            self.now = self.now.max(next);
            self.turn();
        }
        Some(self.now - began)
    }

    /// The longest time since `from` for which an end heard nothing of the other.
    pub(crate) fn longest_pause(&self, at: usize, from: Instant) -> Duration {
        let times: Vec<_> = self.hosts[at].heard.iter().filter(|heard| **heard >= from).collect();
        let first = times.first().map_or(self.now - from, |first| **first - from);
        times.windows(2).map(|pair| *pair[1] - *pair[0]).chain([first]).max().unwrap()
    }

    fn next_turn(&self) -> Option<Instant> {
        let timers = self.hosts.iter().filter_map(|host| host.agent.poll_timeout());
        let words = self.hosts.iter().filter(|host| host.says_every.is_some()).map(|host| host.next_word);
        let flying = self.flying.keys().next().map(|(at, _)| *at);
        let relayed = self.relayed.keys().next().map(|(at, _)| *at);
        timers.chain(words).chain(flying).chain(relayed).min()
    }

    fn turn(&mut self) {
        let after = (self.now + Duration::from_nanos(1), 0);
        let later = self.flying.split_off(&after);
        for packet in std::mem::replace(&mut self.flying, later).into_values() {
            self.arrive(packet);
        }
        let later = self.relayed.split_off(&after);
        for (to, word) in std::mem::replace(&mut self.relayed, later).into_values() {
            self.hosts[to].agent.on_relayed(self.now);
            self.hear(to, word);
        }
        for at in 0..2 {
            let host = &mut self.hosts[at];
            if let Some(every) = host.says_every.filter(|_| host.next_word <= self.now) {
                host.next_word = self.now + every;
                self.say(at, SAYS);
            }
        }
        for host in &mut self.hosts {
            // What a driver reads of QUIC before an agent judges.
            if std::mem::take(&mut host.delivered) {
                host.agent.on_delivered(self.now);
                host.sent = false;
            } else if std::mem::take(&mut host.sent) {
                host.agent.on_data_sent(self.now);
            }
            host.agent.handle_timeout(self.now);
        }
        self.drain();
    }

    fn say(&mut self, at: usize, word: u8) {
        match self.path(at) {
            Some(to) => {
                self.hosts[at].sent |= word == SAYS;
                self.hosts[at].agent.on_sent(self.now);
                let word = if word == SAYS { SAYS | DIRECTLY } else { word };
                self.send(at, to, vec![DATA, word]);
            }
            None => {
                self.sequence += 1;
                self.relayed.insert((self.now + self.relay_delay, self.sequence), (1 - at, word));
            }
        }
    }

    fn hear(&mut self, at: usize, word: u8) {
        self.hosts[at].heard.push(self.now);
        if word & SAYS != 0 {
            self.say(at, ACKNOWLEDGES | word & DIRECTLY);
        } else if word & DIRECTLY != 0 {
            self.hosts[at].delivered = self.path(at).is_some();
        }
    }

    fn send(&mut self, at: usize, to: SocketAddr, bytes: Vec<u8>) {
        let host = &mut self.hosts[at];
        host.bytes += bytes.len() + 28;
        let from = host.nat.as_mut().map_or(host.inner, |nat| nat.leave(to, self.now));
        if self.street.blocked || self.dice.percent(self.street.loss_percent) {
            return;
        }
        self.sequence += 1;
        let packet = Packet { to: 1 - at, from, addressed: to, bytes };
        self.flying.insert((self.now + self.street.delay, self.sequence), packet);
    }

    fn arrive(&mut self, packet: Packet) {
        let Packet { to, from, addressed, bytes } = packet;
        let is_data = !is_stun(bytes[0]);
        let host = &mut self.hosts[to];
        let gets_in = match &host.nat {
            Some(nat) => nat.lets_in(from, addressed, self.now),
            None => addressed == host.inner,
        };
        if self.street.blocked || !gets_in || is_data && self.street.swallows_data[to] {
            return;
        }
        if is_data {
            host.agent.on_received(from, self.now);
            self.hear(to, bytes[1]);
        } else {
            host.agent.handle_packet(from, &bytes, self.now);
        }
    }

    fn drain(&mut self) {
        for at in 0..2 {
            while let Some(transmit) = self.hosts[at].agent.poll_transmit() {
                if crate::class(&transmit.bytes) == peerfleet_proto::stun::Class::Request {
                    self.hosts[at].checks.push((self.now, transmit.to));
                }
                self.send(at, transmit.to, transmit.bytes);
            }
            while let Some(event) = self.hosts[at].agent.poll_event() {
                let Event::PathChanged(path) = event else { continue };
                self.hosts[at].changes.push((self.now, path.map(|direct| direct.addr)));
            }
        }
    }
}
