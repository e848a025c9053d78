//! Two peers in an internet, the relay between them, and time that jumps from one thing to do to the next.
//!
//! The first peer offers a link; the second answers when the offer arrives; from then on each tells the other what it finds.
//! The relay carries that, and other packets while there is no direct path, unless it is gone.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{CheckKey, Config, Role},
    stun::is_stun,
};

use crate::{
    clock::{Dice, beginning},
    internet::{Arrived, Families, Internet},
    peer::{Numbers, Peer, Whereabouts},
    verdict::{Verdict, verdict},
};

/// Interval of other packets, while there is traffic.
pub(crate) const TRAFFIC: Duration = Duration::from_millis(100);

/// Longest time in which peers notice that the relay is back, however long it was gone.
pub(crate) const RELAY_NOTICED: Duration = Duration::from_secs(5);

/// More turns than this in a second of virtual time: something wakes up for nothing. Two searches send a thousand packets in it,
/// which arrive, some of them twice, and are answered.
const MAX_TURNS_PER_SECOND: u32 = 5_000;

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) internet: Internet,
    pub(crate) peers: [Peer; 2],
    /// Both sides send other packets.
    pub(crate) traffic: bool,
    /// One way from each peer to the relay.
    pub(crate) relay_delay: [Duration; 2],
    pub(crate) dice: Dice,
    began: Instant,
    key: CheckKey,
    next_traffic: Instant,
    /// When each peer's connection to the relay is there (again).
    uplinks: [Uplink; 2],
    /// Interfaces that somebody will look at.
    looks: [Option<Instant>; 2],
    relayed: BTreeMap<(Instant, u64), Relayed>,
    sequence: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Uplink {
    Up,
    Down,
    Back(Instant),
}

/// What the relay carries.
struct Relayed {
    to: usize,
    what: Carried,
}

enum Carried {
    Offer(Whereabouts),
    Answer(Whereabouts),
    Update(Whereabouts),
    Data(Numbers),
}

impl World {
    /// The first peer begins to call now, from one of these machines to the other.
    pub(crate) fn new(internet: Internet, machines: [usize; 2], mut dice: Dice) -> Self {
        let now = beginning();
        let peers = [0, 1].map(|at| Peer::new(machines[at], 4000 + at as u16, dice.bytes(), now));
        let mut world = Self {
            now,
            internet,
            peers,
            traffic: false,
            relay_delay: [dice.millis(2, 100), dice.millis(2, 100)],
            began: now,
            key: CheckKey::agree(&dice.bytes(), &dice.bytes()),
            next_traffic: now,
            uplinks: [Uplink::Up; 2],
            looks: [None; 2],
            relayed: BTreeMap::new(),
            sequence: 0,
            dice,
        };
        for at in 0..2 {
            // The second has its socket already, or makes it for the offer.
            if at == 0 || world.dice.percent(50) {
                world.open(at);
            }
        }
        let whereabouts = world.peers[0].whereabouts();
        world.relay(1, Carried::Offer(whereabouts));
        world.drain();
        world
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.began
    }

    /// What the pair can come to now.
    pub(crate) fn verdict(&self) -> Verdict {
        verdict(&self.internet, self.peers[0].machine, self.peers[1].machine)
    }

    pub(crate) fn both_direct(&self) -> bool {
        self.peers.iter().all(|peer| peer.path().is_some())
    }

    pub(crate) fn none_direct(&self) -> bool {
        self.peers.iter().all(|peer| peer.path().is_none())
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Runs until it is so, for at most `time`; how long it took.
    pub(crate) fn run_until(&mut self, time: Duration, is_so: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (began, end) = (self.now, self.now + time);
        let (mut second, mut turns) = (self.now, 0);
        while !is_so(self) {
            let next = self.next_turn().filter(|next| *next <= end);
            self.now = self.now.max(next.unwrap_or(end));
            if next.is_none() {
                return is_so(self).then(|| self.now - began);
            }
            if self.now >= second + Duration::from_secs(1) {
                (second, turns) = (self.now, 0);
            }
            turns += 1;
            assert!(turns < MAX_TURNS_PER_SECOND, "busy for nothing");
            self.turn();
        }
        Some(self.now - began)
    }

    /// Both send along their paths for a while, and those with a direct one must be heard there.
    pub(crate) fn paths_carry(&mut self) -> bool {
        let before = self.traffic;
        let claimed = [0, 1].map(|at| self.peers[at].path());
        let heard = [0, 1].map(|at| self.peers[at].heard.directly);
        self.set_traffic(true);
        let carried = self.run_until(Duration::from_secs(3), |world| {
            (0..2).all(|at| claimed[at].is_none() || world.peers[1 - at].heard.directly > heard[1 - at])
        });
        self.set_traffic(before);
        carried.is_some()
    }

    pub(crate) fn set_traffic(&mut self, traffic: bool) {
        if traffic && !self.traffic {
            self.next_traffic = self.now;
        }
        self.traffic = traffic;
    }

    /// Counts pauses from now on.
    pub(crate) fn forget_pauses(&mut self) {
        for peer in &mut self.peers {
            (peer.heard.at, peer.heard.longest_pause) = (self.now, Duration::ZERO);
        }
    }

    /// The longest time for which one side heard nothing.
    pub(crate) fn longest_pause(&self) -> Duration {
        let pauses = self.peers.iter().map(|peer| peer.heard.longest_pause.max(self.now - peer.heard.at));
        pauses.max().expect("there are two")
    }

    /// Moves a machine to another realm. Each of its peers sees that after `notice`.
    pub(crate) fn roam(&mut self, machine: usize, realm: usize, families: Families, notice: Duration) {
        self.internet.attach(machine, realm, families);
        for at in 0..2 {
            if self.peers[at].machine == machine {
                self.looks[at] = Some(self.now + notice);
                // The connection to the relay is dialled anew: TCP, TLS, upgrade and join.
                self.uplinks[at] = Uplink::Back(self.now + notice + self.relay_delay[at] * 8);
            }
        }
    }

    /// The relay is gone, with its responder.
    pub(crate) fn relay_gone(&mut self) {
        self.internet.responding = false;
        self.uplinks = [Uplink::Down; 2];
    }

    /// The relay is back, and the peers notice within some seconds.
    pub(crate) fn relay_back(&mut self) {
        self.internet.responding = true;
        for at in 0..2 {
            self.uplinks[at] = Uplink::Back(self.now + self.dice.millis(200, RELAY_NOTICED.as_millis() as u64));
        }
    }

    /// A machine sleeps: nothing on it runs, nothing arrives.
    pub(crate) fn sleep(&mut self, machine: usize) {
        self.internet.machines[machine].asleep = true;
        for at in 0..2 {
            if self.peers[at].machine == machine {
                self.uplinks[at] = Uplink::Down;
            }
        }
    }

    pub(crate) fn wake(&mut self, machine: usize) {
        self.internet.machines[machine].asleep = false;
        for at in 0..2 {
            if self.peers[at].machine == machine {
                self.uplinks[at] = Uplink::Back(self.now + self.relay_delay[at] * 8);
                self.looks[at] = Some(self.now);
            }
        }
    }

    fn open(&mut self, at: usize) {
        let addresses = self.internet.addresses(self.peers[at].machine);
        self.peers[at].open(addresses, self.now);
    }

    fn is_awake(&self, at: usize) -> bool {
        !self.internet.machines[self.peers[at].machine].asleep
    }

    fn next_turn(&self) -> Option<Instant> {
        let mut times = vec![self.internet.next_arrival(), self.relayed.keys().next().map(|(at, _)| *at)];
        times.push((0..2).any(|at| self.wants_to_send(at)).then_some(self.next_traffic));
        for at in 0..2 {
            if self.is_awake(at) {
                times.extend([self.peers[at].poll_timeout(), self.looks[at]]);
            }
            if let Uplink::Back(back) = self.uplinks[at] {
                times.push(Some(back));
            }
        }
        times.into_iter().flatten().min()
    }

    fn turn(&mut self) {
        for arrived in self.internet.arrive(self.now) {
            self.receive(&arrived);
        }
        while let Some(entry) = self.relayed.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let relayed = entry.remove();
            self.relayed(relayed);
        }
        for at in 0..2 {
            self.turn_of(at);
        }
        if self.next_traffic <= self.now && (0..2).any(|at| self.wants_to_send(at)) {
            self.next_traffic = self.now + TRAFFIC;
            self.send_traffic();
        }
        self.drain();
    }

    fn turn_of(&mut self, at: usize) {
        if !self.is_awake(at) {
            return;
        }
        if self.looks[at].is_some_and(|look| look <= self.now) {
            self.looks[at] = None;
            let addresses = self.internet.addresses(self.peers[at].machine);
            self.peers[at].look(addresses, self.now);
        }
        if let Uplink::Back(back) = self.uplinks[at]
            && back <= self.now
        {
            self.uplinks[at] = Uplink::Up;
            self.peers[at].joined(self.now);
            self.peers.iter_mut().for_each(Peer::tell);
        }
        self.peers[at].handle_timeout(self.now);
    }

    fn receive(&mut self, arrived: &Arrived) {
        let Arrived { machine, port, from, bytes } = arrived;
        let is_there = |peer: &Peer| peer.machine == *machine && peer.has_port(*port);
        let Some(at) = self.peers.iter().position(is_there) else { return };
        if is_stun(bytes[0]) {
            self.peers[at].handle_packet(*port, *from, bytes, self.now);
        } else if self.peers[at].reads_data(*port) && self.peers[at].handle_data(*from, Numbers::of(bytes), self.now) {
            self.send_data(at, Peer::acknowledgement);
        }
    }

    fn relayed(&mut self, relayed: Relayed) {
        let at = relayed.to;
        if self.uplinks[at] != Uplink::Up {
            return;
        }
        match relayed.what {
            Carried::Data(numbers) => {
                if self.peers[at].handle_relayed(numbers, self.now) {
                    self.send_data(at, Peer::acknowledgement);
                }
            }
            Carried::Update(theirs) => self.peers[at].set_theirs(theirs, self.now),
            Carried::Answer(theirs) => self.link(at, theirs),
            Carried::Offer(theirs) => {
                if self.peers[at].candidates().is_empty() {
                    self.open(at);
                }
                let ours = self.peers[at].whereabouts();
                self.link(at, theirs);
                self.relay(1 - at, Carried::Answer(ours));
            }
        }
    }

    fn link(&mut self, at: usize, theirs: Whereabouts) {
        let role = if at == 0 { Role::Controlling } else { Role::Controlled };
        let config = Config { key: self.key.clone(), role, seed: self.dice.bytes() };
        let seed = self.dice.bytes();
        self.peers[at].link(config, seed, theirs, self.now);
    }

    fn send_traffic(&mut self) {
        for at in 0..2 {
            if self.is_awake(at) && self.wants_to_send(at) {
                self.send_data(at, Peer::next_data);
            }
        }
    }

    /// What was sent directly and not acknowledged is sent again, as QUIC does.
    fn wants_to_send(&self, at: usize) -> bool {
        self.traffic || self.peers[at].is_unacknowledged()
    }

    /// Sends a packet along the path, or to the relay.
    fn send_data(&mut self, at: usize, packet: impl FnOnce(&mut Peer, Instant) -> Numbers) {
        let peer = &mut self.peers[at];
        let (path, numbers) = (peer.path(), packet(peer, self.now));
        let is_relayed = path.is_none() || peer.is_doubtful();
        if let Some(addr) = path {
            let port = peer.seeker.port_towards(addr);
            self.internet.send(peer.machine, port, addr, numbers.packet(), self.now);
        }
        if is_relayed {
            self.relay(1 - at, Carried::Data(numbers));
        }
    }

    fn drain(&mut self) {
        for at in 0..2 {
            let mut out = Vec::new();
            let news = self.peers[at].drain(self.now, &mut out);
            for outgoing in out {
                let transmit = outgoing.transmit;
                self.internet.send(outgoing.machine, outgoing.port, transmit.to, transmit.bytes, self.now);
            }
            // Before the offer arrived there is nobody to tell.
            if let Some(whereabouts) = news.filter(|_| at == 0 || self.peers[at].agent.is_some()) {
                self.relay(1 - at, Carried::Update(whereabouts));
            }
        }
    }

    /// Gives something to the relay; it is lost if either side has no connection to it.
    fn relay(&mut self, to: usize, what: Carried) {
        if self.uplinks[1 - to] == Uplink::Up {
            self.sequence += 1;
            let arrives = self.now + self.relay_delay[0] + self.relay_delay[1];
            self.relayed.insert((arrives, self.sequence), Relayed { to, what });
        }
    }
}
