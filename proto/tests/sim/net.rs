//! An internet of sites, each behind a NAT or a firewall, with loss, delay and a STUN responder.
//!
//! A NAT is mapping × filter × expiry as RFC 4787 has them. It does not hairpin, gives every mapping a port that nobody
//! can guess, and forgets a mapping that nothing went out of for as long as its expiry.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::stun::{Class, Draft, Message};

use crate::clock::Dice;

/// Which packets of one socket leave through one mapping (RFC 4787 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// No translation: the host has a public address.
    None,
    /// All.
    Independent,
    /// Those to one address.
    Address,
    /// Those to one address and port.
    Port,
}

/// Which packets come in through a mapping (RFC 4787 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filter {
    /// All.
    Independent,
    /// From addresses that it sent to.
    Address,
    /// From addresses and ports that it sent to.
    Port,
}

pub(crate) const MAPPINGS: [Mapping; 4] = [Mapping::None, Mapping::Independent, Mapping::Address, Mapping::Port];
pub(crate) const FILTERS: [Filter; 3] = [Filter::Independent, Filter::Address, Filter::Port];

/// What stands between a site and the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gate {
    pub(crate) mapping: Mapping,
    pub(crate) filter: Filter,
    pub(crate) expiry: Duration,
    /// Hosts have public IPv6 addresses besides, behind a firewall of the same filter.
    pub(crate) ipv6: bool,
    pub(crate) udp_blocked: bool,
}

impl Gate {
    pub(crate) fn new(mapping: Mapping, filter: Filter) -> Self {
        Self { mapping, filter, expiry: Duration::from_secs(30), ipv6: false, udp_blocked: false }
    }
}

/// Behaviour of the internet between sites.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    pub(crate) loss_percent: u64,
    pub(crate) duplicate_percent: u64,
    /// One way, between sites.
    pub(crate) delay_ms: (u64, u64),
}

pub(crate) const CALM: Weather = Weather { loss_percent: 0, duplicate_percent: 0, delay_ms: (20, 20) };

pub(crate) const RESPONDER: &str = "203.0.113.253:3478";

/// One way, within a site.
const LAN_DELAY: Duration = Duration::from_micros(200);

pub(crate) struct Net {
    pub(crate) weather: Weather,
    /// Nothing between sites arrives.
    pub(crate) down: bool,
    sites: Vec<Site>,
    hosts: Vec<Host>,
    flying: BTreeMap<(Instant, u64), Flying>,
    sequence: u64,
    dice: Dice,
}

struct Site {
    gate: Gate,
    public: IpAddr,
    mappings: Vec<Translation>,
}

struct Host {
    site: usize,
    addrs: Vec<SocketAddr>,
}

/// One mapping, and whom it may hear from.
struct Translation {
    inner: SocketAddr,
    outer: SocketAddr,
    bound_to: Option<(IpAddr, Option<u16>)>,
    used: Instant,
    sent_to: BTreeMap<SocketAddr, Instant>,
}

struct Flying {
    from: SocketAddr,
    to: SocketAddr,
    /// Within this site, or between sites.
    site: Option<usize>,
    bytes: Vec<u8>,
}

/// A packet at its destination.
pub(crate) struct Arrived {
    pub(crate) host: usize,
    pub(crate) from: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

impl Net {
    pub(crate) fn new(weather: Weather, dice: Dice) -> Self {
        Self { weather, down: false, sites: Vec::new(), hosts: Vec::new(), flying: BTreeMap::new(), sequence: 0, dice }
    }

    pub(crate) fn add_site(&mut self, gate: Gate) -> usize {
        let public = IpAddr::from([198, 51, 100, u8::try_from(self.sites.len() + 1).unwrap()]);
        self.sites.push(Site { gate, public, mappings: Vec::new() });
        self.sites.len() - 1
    }

    /// A host in a site; its interfaces' addresses are [`Net::addrs`].
    pub(crate) fn add_host(&mut self, site: usize) -> usize {
        let (host, gate) = (self.hosts.len() as u16, self.sites[site].gate);
        let v4 = match gate.mapping {
            Mapping::None => IpAddr::from([203, 0, 113 + site as u8, 10 + host as u8]),
            Mapping::Independent | Mapping::Address | Mapping::Port => {
                IpAddr::from([10, 0, site as u8, 10 + host as u8])
            }
        };
        let v6 = IpAddr::from([0x2001, 0xdb8, site as u16, 0, 0, 0, 0, 10 + host]);
        let port = 4000 + host;
        let mut addrs = vec![SocketAddr::new(v4, port)];
        addrs.extend(gate.ipv6.then_some(SocketAddr::new(v6, port)));
        self.hosts.push(Host { site, addrs });
        usize::from(host)
    }

    pub(crate) fn addrs(&self, host: usize) -> &[SocketAddr] {
        &self.hosts[host].addrs
    }

    /// Every NAT restarts with an empty table.
    pub(crate) fn forget_mappings(&mut self) {
        self.sites.iter_mut().for_each(|site| site.mappings.clear());
    }

    pub(crate) fn next_arrival(&self) -> Option<Instant> {
        self.flying.keys().next().map(|(at, _)| *at)
    }

    pub(crate) fn send(&mut self, host: usize, to: SocketAddr, bytes: Vec<u8>, now: Instant) {
        let site = self.hosts[host].site;
        let inner = self.hosts[host].addrs.iter().find(|addr| addr.is_ipv4() == to.is_ipv4()).copied();
        let Some(inner) = inner else { return };
        let neighbour = self.hosts.iter().any(|host| host.site == site && host.addrs.contains(&to));
        if neighbour {
            return self.fly(Flying { from: inner, to, site: Some(site), bytes }, now + LAN_DELAY);
        }
        if is_private(to) || self.sites[site].gate.udp_blocked {
            return;
        }
        let unguessable = std::iter::repeat_with(|| 20_000 + self.dice.below(40_000) as u16);
        let taken = |port: &u16| self.sites[site].mappings.iter().any(|one| one.outer.port() == *port);
        let port = unguessable.into_iter().find(|port| !taken(port)).expect("a hundred of 40,000 ports are taken");
        let outer = self.sites[site].leave(inner, to, port, now);
        self.cross(Flying { from: outer, to, site: None, bytes }, now);
    }

    /// What arrives at `now`.
    pub(crate) fn arrive(&mut self, now: Instant) -> Vec<Arrived> {
        let later = self.flying.split_off(&(now + Duration::from_nanos(1), 0));
        let due = std::mem::replace(&mut self.flying, later);
        due.into_values().filter_map(|flying| self.land(flying, now)).collect()
    }

    fn cross(&mut self, flying: Flying, now: Instant) {
        let copies = 1 + u64::from(self.dice.percent(self.weather.duplicate_percent));
        for _ in 0..copies {
            let lost = self.dice.percent(self.weather.loss_percent) || self.down;
            let delay = self.dice.millis(self.weather.delay_ms.0, self.weather.delay_ms.1);
            if !lost {
                let Flying { from, to, site, ref bytes } = flying;
                self.fly(Flying { from, to, site, bytes: bytes.clone() }, now + delay);
            }
        }
    }

    fn fly(&mut self, flying: Flying, at: Instant) {
        self.sequence += 1;
        self.flying.insert((at, self.sequence), flying);
    }

    fn land(&mut self, flying: Flying, now: Instant) -> Option<Arrived> {
        if flying.to == RESPONDER.parse().unwrap() {
            self.respond(&flying, now);
            return None;
        }
        let inner = match flying.site {
            Some(_) => flying.to,
            None => self.enter(flying.from, flying.to, now)?,
        };
        let host = self.hosts.iter().position(|host| host.addrs.contains(&inner))?;
        Some(Arrived { host, from: flying.from, bytes: flying.bytes })
    }

    /// A packet comes from the world: where to, if it is let in.
    fn enter(&self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let untranslated = self.hosts.iter().find(|host| host.addrs.contains(&to));
        match untranslated {
            Some(host) if self.sites[host.site].gate.filter == Filter::Independent => Some(to),
            _ => self.sites.iter().find_map(|site| site.enter(from, to, now)),
        }
    }

    fn respond(&mut self, flying: &Flying, now: Instant) {
        let Ok(request) = Message::parse(&flying.bytes) else { return };
        if request.class() == Class::Request {
            let bytes = Draft::new(Class::Success, request.transaction()).mapped_address(flying.from).finish();
            // As the relay has it: nobody is answered with more bytes than came.
            if bytes.len() <= flying.bytes.len() {
                self.cross(Flying { from: flying.to, to: flying.from, site: None, bytes }, now);
            }
        }
    }
}

impl Site {
    /// A packet goes out: the address that the world sees.
    fn leave(&mut self, inner: SocketAddr, to: SocketAddr, port: u16, now: Instant) -> SocketAddr {
        let mapping = if inner.is_ipv4() { self.gate.mapping } else { Mapping::None };
        let bound_to = match mapping {
            Mapping::None | Mapping::Independent => None,
            Mapping::Address => Some((to.ip(), None)),
            Mapping::Port => Some((to.ip(), Some(to.port()))),
        };
        let expiry = self.gate.expiry;
        self.mappings.retain(|one| one.used + expiry > now);
        let at = self.mappings.iter().position(|one| one.inner == inner && one.bound_to == bound_to);
        let at = at.unwrap_or_else(|| {
            let outer = if mapping == Mapping::None { inner } else { SocketAddr::new(self.public, port) };
            self.mappings.push(Translation { inner, outer, bound_to, used: now, sent_to: BTreeMap::new() });
            self.mappings.len() - 1
        });
        let translation = &mut self.mappings[at];
        translation.used = now;
        translation.sent_to.insert(to, now);
        translation.outer
    }

    fn enter(&self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let Gate { filter, expiry, .. } = self.gate;
        let translation = self.mappings.iter().find(|one| one.outer == to && one.used + expiry > now)?;
        let heard = translation.sent_to.iter().any(|(sent_to, at)| {
            *at + expiry > now
                && match filter {
                    Filter::Independent => true,
                    Filter::Address => sent_to.ip() == from.ip(),
                    Filter::Port => *sent_to == from,
                }
        });
        heard.then_some(translation.inner)
    }
}

fn is_private(addr: SocketAddr) -> bool {
    matches!(addr.ip(), IpAddr::V4(ip) if ip.is_private())
}
