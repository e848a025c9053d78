//! An internet: realms within realms behind routers, machines in them, weather between them, and the relay's STUN responder.
//!
//! In: packets that machines send. Out: packets that arrive, and where. Realm 0 is the public internet; every other realm
//! hangs behind a router in the realm outside it. IPv4 is translated by the routers that say so; IPv6 is routed, through
//! the firewalls of the same routers.
//! A packet rises from realm to realm until one knows its destination, flies there, and sinks to it: translated on the way
//! out when it is sent, and on the way in when it arrives.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::stun::{Class, Draft, Message};

use crate::{
    clock::Dice,
    nat::{Filter, Mapping, Nat, Table},
};

/// The public internet.
pub(crate) const WORLD: usize = 0;

/// Where the relay answers STUN.
pub(crate) const RESPONDERS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 253)), 3478),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1)), 3478),
];

/// The same on its second port, which tells whether a router maps each destination anew.
pub(crate) const WITNESSES: [SocketAddr; 2] =
    [SocketAddr::new(RESPONDERS[0].ip(), 3479), SocketAddr::new(RESPONDERS[1].ip(), 3479)];

/// One way within a machine, within a realm, and between the customers of one carrier.
const LOOPBACK_DELAY: Duration = Duration::from_micros(30);
const LAN_DELAY: Duration = Duration::from_micros(200);
const CARRIER_DELAY: Duration = Duration::from_millis(5);

/// Behaviour of the public internet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    pub(crate) loss_percent: u64,
    pub(crate) duplicate_percent: u64,
    /// One way; packets overtake each other within it.
    pub(crate) delay_ms: (u64, u64),
}

pub(crate) const CALM: Weather = Weather { loss_percent: 0, duplicate_percent: 0, delay_ms: (20, 20) };

/// What stands between a realm and the one outside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Router {
    pub(crate) nat: Nat,
    /// Of IPv6, which is not translated.
    pub(crate) firewall: Filter,
    /// Lets UDP pass at all.
    pub(crate) udp: bool,
    /// IPv6 passes; where it does not, the addresses are there and lead nowhere.
    pub(crate) ipv6: bool,
}

impl Router {
    pub(crate) const fn new(nat: Nat) -> Self {
        Self { nat, firewall: Filter::Port, udp: true, ipv6: true }
    }

    /// The rules for packets of the family of `addr`.
    fn rules(&self, addr: SocketAddr) -> Nat {
        if addr.is_ipv4() { self.nat } else { Nat { filter: self.firewall, mapping: Mapping::None, ..self.nat } }
    }

    fn passes(&self, addr: SocketAddr) -> bool {
        self.udp && (addr.is_ipv4() || self.ipv6)
    }
}

#[derive(Debug)]
pub(crate) struct Realm {
    /// The realm outside.
    pub(crate) outside: usize,
    pub(crate) router: Router,
    /// Those in it, its own routers as well, cannot talk to each other: a guest network, a carrier's.
    pub(crate) isolated: bool,
    prefix: [u8; 3],
    /// The router's own address in the realm outside.
    address: Ipv4Addr,
    table: Table,
}

#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) realm: usize,
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
    /// Addresses of bridges for containers: its own, and the same on other machines.
    pub(crate) bridges: Vec<Ipv4Addr>,
    pub(crate) asleep: bool,
}

/// Which address families a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Families {
    V4,
    V6,
    Both,
}

pub(crate) struct Internet {
    pub(crate) weather: Weather,
    /// The public internet carries nothing.
    pub(crate) down: bool,
    /// The relay answers STUN.
    pub(crate) responding: bool,
    pub(crate) realms: Vec<Realm>,
    pub(crate) machines: Vec<Machine>,
    flying: BTreeMap<(Instant, u64), Flying>,
    sequence: u64,
    dice: Dice,
}

#[derive(Debug, Clone)]
struct Flying {
    from: SocketAddr,
    to: SocketAddr,
    place: Place,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Machine(usize),
    Realm(usize),
}

/// Who knows a destination.
enum Hop {
    Machine(usize),
    Realm(usize),
}

/// A packet at its destination.
pub(crate) struct Arrived {
    pub(crate) machine: usize,
    pub(crate) port: u16,
    pub(crate) from: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

impl Internet {
    pub(crate) fn new(weather: Weather, dice: Dice) -> Self {
        let world = Realm {
            outside: WORLD,
            router: Router::new(Nat::OPEN),
            isolated: false,
            prefix: [198, 51, 100],
            address: Ipv4Addr::UNSPECIFIED,
            table: Table::default(),
        };
        Self {
            weather,
            down: false,
            responding: true,
            realms: vec![world],
            machines: Vec::new(),
            flying: BTreeMap::new(),
            sequence: 0,
            dice,
        }
    }

    /// A realm behind a router. `prefix` is that of its IPv4 addresses; others may have the same.
    pub(crate) fn add_realm(&mut self, outside: usize, router: Router, prefix: [u8; 3]) -> usize {
        let number = u8::try_from(self.realms.len()).expect("few realms");
        let address = self.own_address(outside, number, 1);
        self.realms.push(Realm { outside, router, isolated: false, prefix, address, table: Table::default() });
        self.realms.len() - 1
    }

    /// A realm of a prefix of its own: private if the router translates, else public.
    pub(crate) fn add_site(&mut self, outside: usize, router: Router) -> usize {
        let number = self.realms.len() as u8;
        let prefix = if router.nat.mapping == Mapping::None { [203, 0, number] } else { [10, 0, number] };
        self.add_realm(outside, router, prefix)
    }

    pub(crate) fn add_machine(&mut self, realm: usize, families: Families) -> usize {
        let machine = Machine { realm, v4: None, v6: None, bridges: Vec::new(), asleep: false };
        self.machines.push(machine);
        let number = self.machines.len() - 1;
        self.attach(number, realm, families);
        number
    }

    /// Moves a machine to a realm, where it gets addresses.
    pub(crate) fn attach(&mut self, machine: usize, realm: usize, families: Families) {
        let [a, b, c] = self.realms[realm].prefix;
        let host = 10 + machine as u8;
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, realm as u16, 0, 0, 0, 0, u16::from(host));
        let it = &mut self.machines[machine];
        it.realm = realm;
        it.v4 = (families != Families::V6).then_some(Ipv4Addr::new(a, b, c, host));
        it.v6 = (families != Families::V4).then_some(v6);
    }

    /// Whether a realm or one outside it has this prefix.
    pub(crate) fn has_prefix(&self, realm: usize, prefix: [u8; 3]) -> bool {
        let realms = std::iter::successors(Some(realm), |realm| Some(self.realms[*realm].outside));
        realms.take_while(|realm| *realm != WORLD).any(|realm| self.realms[realm].prefix == prefix)
    }

    /// The addresses of a machine's interfaces, as it offers them: best first.
    pub(crate) fn addresses(&self, machine: usize) -> Vec<IpAddr> {
        let it = &self.machines[machine];
        let v6 = it.v6.map(IpAddr::V6).into_iter().chain(it.v6.map(|_| IpAddr::V6(Ipv6Addr::LOCALHOST)));
        let v4 = it.v4.map(IpAddr::V4).into_iter();
        let bridges = it.bridges.iter().map(|ip| IpAddr::V4(*ip));
        v4.chain(v6).chain(bridges).chain([IpAddr::V4(Ipv4Addr::LOCALHOST)]).collect()
    }

    /// The router of a realm restarts; its provider may give it another address.
    pub(crate) fn restart_router(&mut self, realm: usize, readdress: bool) {
        self.realms[realm].table.forget();
        if readdress {
            let times = self.realms[realm].address.octets()[3] % 100 + 1;
            self.realms[realm].address = self.own_address(self.realms[realm].outside, realm as u8, times);
        }
    }

    /// The realms that a machine is in, from its own outwards, without the public internet.
    pub(crate) fn realms_of(&self, machine: usize) -> Vec<usize> {
        let mut realms = Vec::new();
        let mut realm = self.machines[machine].realm;
        while realm != WORLD {
            realms.push(realm);
            realm = self.realms[realm].outside;
        }
        realms
    }

    pub(crate) fn next_arrival(&self) -> Option<Instant> {
        self.flying.keys().next().map(|(at, _)| *at)
    }

    /// A machine sends a packet from one of its ports.
    pub(crate) fn send(&mut self, machine: usize, port: u16, to: SocketAddr, bytes: Vec<u8>, now: Instant) {
        let it = &self.machines[machine];
        if it.has(to.ip()) {
            let from = SocketAddr::new(to.ip(), port);
            return self.fly(Flying { from, to, place: Place::Machine(machine), bytes }, now + LOOPBACK_DELAY);
        }
        let own = if to.is_ipv4() { it.v4.map(IpAddr::V4) } else { it.v6.map(IpAddr::V6) };
        let Some(own) = own else { return };
        let home = it.realm;
        let Some((from, realm)) = self.rise(home, SocketAddr::new(own, port), to, now) else { return };
        if realm == WORLD {
            self.cross(Flying { from, to, place: Place::Realm(realm), bytes }, now);
        } else {
            let delay = if realm == home { LAN_DELAY } else { CARRIER_DELAY };
            self.fly(Flying { from, to, place: Place::Realm(realm), bytes }, now + delay);
        }
    }

    /// What arrives at `now`.
    pub(crate) fn arrive(&mut self, now: Instant) -> Vec<Arrived> {
        let mut arrived = Vec::new();
        // What an arrival brings about flies on, if only for some microseconds.
        while let Some(entry) = self.flying.first_entry().filter(|entry| entry.key().0 <= now) {
            let flying = entry.remove();
            arrived.extend(self.land(flying, now));
        }
        arrived
    }

    /// Takes a packet outwards to the realm that knows its destination; what it is seen as there.
    fn rise(&mut self, home: usize, mut from: SocketAddr, to: SocketAddr, now: Instant) -> Option<(SocketAddr, usize)> {
        let (mut realm, mut left) = (home, None);
        loop {
            match self.next_hop(realm, to.ip()) {
                Some(Hop::Realm(below)) if left == Some(below) && !self.realms[below].router.nat.hairpin => {
                    return None;
                }
                Some(_) => return (!self.realms[realm].isolated).then_some((from, realm)),
                None if realm == WORLD => return is_responder(to).then_some((from, realm)),
                None => {
                    let (outer, outside) = self.leave(realm, from, to, now)?;
                    (left, from, realm) = (Some(realm), outer, outside);
                }
            }
        }
    }

    /// A packet passes a router outwards: what it is seen as, and where.
    fn leave(&mut self, realm: usize, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<(SocketAddr, usize)> {
        let Realm { outside, router, address, table, .. } = &mut self.realms[realm];
        let outer = || table.leave(&router.rules(to), IpAddr::V4(*address), [from, to], &mut self.dice, now);
        router.passes(to).then(outer).map(|outer| (outer, *outside))
    }

    fn land(&mut self, flying: Flying, now: Instant) -> Option<Arrived> {
        let Flying { from, mut to, place, bytes } = flying;
        let machine = match place {
            Place::Machine(machine) => machine,
            Place::Realm(WORLD) if is_responder(to) => {
                self.respond(from, to, &bytes, now);
                return None;
            }
            Place::Realm(mut realm) => loop {
                match self.next_hop(realm, to.ip())? {
                    Hop::Machine(machine) => break machine,
                    Hop::Realm(below) => {
                        let Realm { router, table, .. } = &mut self.realms[below];
                        let inner = router.passes(to).then(|| table.enter(&router.rules(to), from, to, now)).flatten();
                        (to, realm) = (inner?, below);
                    }
                }
            },
        };
        (!self.machines[machine].asleep).then_some(Arrived { machine, port: to.port(), from, bytes })
    }

    /// Who in a realm knows this address: a machine, or a router of a realm below.
    fn next_hop(&self, realm: usize, ip: IpAddr) -> Option<Hop> {
        let own = |machine: &Machine| machine.v4.map(IpAddr::V4) == Some(ip) || machine.v6.map(IpAddr::V6) == Some(ip);
        for (number, _) in self.machines.iter().enumerate().filter(|(_, machine)| own(machine)) {
            let (mut at, mut below) = (self.machines[number].realm, None);
            while at != realm && at != WORLD && !self.translates(at, ip) {
                (below, at) = (Some(at), self.realms[at].outside);
            }
            if at == realm {
                return Some(below.map_or(Hop::Machine(number), Hop::Realm));
            }
        }
        let routers = self.realms.iter().enumerate().skip(1);
        let found = routers.filter(|(number, it)| it.outside == realm && self.translates(*number, ip));
        found.into_iter().find(|(_, it)| IpAddr::V4(it.address) == ip).map(|(number, _)| Hop::Realm(number))
    }

    fn translates(&self, realm: usize, ip: IpAddr) -> bool {
        ip.is_ipv4() && self.realms[realm].router.nat.mapping != Mapping::None
    }

    fn own_address(&self, outside: usize, number: u8, times: u8) -> Ipv4Addr {
        if outside == WORLD {
            return Ipv4Addr::new(192, 0, number, times);
        }
        let [a, b, c] = self.realms[outside].prefix;
        // Apart from machines, which begin at 10; readdressing moves within a block of its own.
        Ipv4Addr::new(a, b, c, 100 + number * 4 % 150 + times % 4)
    }

    fn cross(&mut self, flying: Flying, now: Instant) {
        let copies = 1 + u64::from(self.dice.percent(self.weather.duplicate_percent));
        for _ in 0..copies {
            let lost = self.dice.percent(self.weather.loss_percent) || self.down;
            let delay = self.dice.millis(self.weather.delay_ms.0, self.weather.delay_ms.1);
            if !lost {
                self.fly(flying.clone(), now + delay);
            }
        }
    }

    fn fly(&mut self, flying: Flying, at: Instant) {
        self.sequence += 1;
        self.flying.insert((at, self.sequence), flying);
    }

    fn respond(&mut self, asker: SocketAddr, responder: SocketAddr, bytes: &[u8], now: Instant) {
        let Some(request) = Message::parse(bytes).ok().filter(|request| request.class() == Class::Request) else {
            return;
        };
        let answer = Draft::new(Class::Success, request.transaction()).mapped_address(asker).finish();
        // As the relay has it: nobody is answered with more bytes than came.
        if self.responding && answer.len() <= bytes.len() {
            self.cross(Flying { from: responder, to: asker, place: Place::Realm(WORLD), bytes: answer }, now);
        }
    }
}

fn is_responder(addr: SocketAddr) -> bool {
    RESPONDERS.contains(&addr) || WITNESSES.contains(&addr)
}

impl Machine {
    fn has(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip.is_loopback() || self.v4 == Some(ip) || self.bridges.contains(&ip),
            IpAddr::V6(ip) => ip.is_loopback() || self.v6 == Some(ip),
        }
    }
}
