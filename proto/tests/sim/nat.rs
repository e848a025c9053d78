//! What one router does to packets: address translation and filtering as RFC 4787 has them.
//!
//! In: packets that leave and arrive, `now`. Out: the address that the other side sees, or where a packet goes within.
//! Filtering is by mapping, as connection tracking does it. A mapping is forgotten when nothing went out of it for as long
//! as the expiry; what comes in keeps it too if the router is of that kind (RFC 4787 REQ-6).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::clock::Dice;

/// Which packets of one socket leave through one mapping (RFC 4787 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mapping {
    /// No translation: the host's own address is seen.
    None,
    /// All.
    Independent,
    /// Those to one address.
    Address,
    /// Those to one address and port.
    Port,
}

impl Mapping {
    /// Whether another destination sees another port.
    pub(crate) fn moves(self) -> bool {
        matches!(self, Self::Address | Self::Port)
    }
}

/// Which packets come in through a mapping (RFC 4787 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Filter {
    /// All.
    Independent,
    /// From addresses that it sent to.
    Address,
    /// From addresses and ports that it sent to.
    Port,
}

/// How the port of a new mapping is chosen (RFC 4787 §4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ports {
    /// The host's own, while it is free.
    Preserving,
    /// One after the other.
    Sequential,
    /// Any.
    Random,
    /// Any of a block that every host within has for itself (RFC 7422).
    Block,
}

/// How many ports a block has: blocks are 63 in number, and begin at multiples of it.
const BLOCK: u16 = 1024;

pub(crate) const MAPPINGS: [Mapping; 3] = [Mapping::Independent, Mapping::Address, Mapping::Port];
pub(crate) const FILTERS: [Filter; 3] = [Filter::Independent, Filter::Address, Filter::Port];
pub(crate) const PORTS: [Ports; 4] = [Ports::Preserving, Ports::Sequential, Ports::Random, Ports::Block];

/// The rules of one router for one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nat {
    pub(crate) mapping: Mapping,
    pub(crate) filter: Filter,
    pub(crate) ports: Ports,
    pub(crate) expiry: Duration,
    /// Packets from within to an address of its own come back in.
    pub(crate) hairpin: bool,
    /// What comes in keeps a mapping, not only what goes out.
    pub(crate) kept_from_outside: bool,
}

impl Nat {
    pub(crate) const fn new(mapping: Mapping, filter: Filter) -> Self {
        let (ports, expiry) = (Ports::Random, Duration::from_secs(30));
        Self { mapping, filter, ports, expiry, hairpin: false, kept_from_outside: false }
    }

    /// No translation, and nothing is filtered.
    pub(crate) const OPEN: Self = Self::new(Mapping::None, Filter::Independent);
    /// "Full cone".
    pub(crate) const FULL_CONE: Self = Self::new(Mapping::Independent, Filter::Independent);
    /// "Address-restricted cone".
    pub(crate) const ADDRESS_RESTRICTED: Self = Self::new(Mapping::Independent, Filter::Address);
    /// "Port-restricted cone".
    pub(crate) const PORT_RESTRICTED: Self = Self::new(Mapping::Independent, Filter::Port);
    /// "Symmetric".
    pub(crate) const SYMMETRIC: Self = Self::new(Mapping::Port, Filter::Port);
}

/// The mappings of one router.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: Vec<Entry>,
    newest_port: u16,
    /// The lowest port of each host's block.
    blocks: BTreeMap<IpAddr, u16>,
}

/// One mapping, and whom it may hear from.
#[derive(Debug)]
struct Entry {
    inner: SocketAddr,
    outer: SocketAddr,
    bound_to: Option<(IpAddr, Option<u16>)>,
    used: Instant,
    sent_to: BTreeMap<SocketAddr, Instant>,
}

impl Table {
    /// As after a restart of the router.
    pub(crate) fn forget(&mut self) {
        self.entries.clear();
        self.blocks.clear();
    }

    /// A packet goes out: the address that the other side sees. `outside` is the router's own.
    pub(crate) fn leave(
        &mut self,
        nat: &Nat,
        outside: IpAddr,
        [inner, to]: [SocketAddr; 2],
        dice: &mut Dice,
        now: Instant,
    ) -> SocketAddr {
        let bound_to = match nat.mapping {
            Mapping::None | Mapping::Independent => None,
            Mapping::Address => Some((to.ip(), None)),
            Mapping::Port => Some((to.ip(), Some(to.port()))),
        };
        self.entries.retain(|one| one.used + nat.expiry > now);
        let at = self.entries.iter().position(|one| one.inner == inner && one.bound_to == bound_to);
        let at = at.unwrap_or_else(|| {
            let outer = match nat.mapping {
                Mapping::None => inner,
                Mapping::Independent | Mapping::Address | Mapping::Port => {
                    SocketAddr::new(outside, self.choose_port(nat.ports, inner, dice))
                }
            };
            self.entries.push(Entry { inner, outer, bound_to, used: now, sent_to: BTreeMap::new() });
            self.entries.len() - 1
        });
        let entry = &mut self.entries[at];
        entry.used = now;
        entry.sent_to.insert(to, now);
        entry.outer
    }

    /// A packet comes: where it goes within, if it is let in.
    pub(crate) fn enter(&mut self, nat: &Nat, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        if nat.mapping == Mapping::None && nat.filter == Filter::Independent {
            return Some(to);
        }
        let entry = self.entries.iter_mut().find(|one| one.outer == to && one.used + nat.expiry > now)?;
        let is_heard = entry.sent_to.iter().any(|(sent_to, at)| {
            *at + nat.expiry > now
                && match nat.filter {
                    Filter::Independent => true,
                    Filter::Address => sent_to.ip() == from.ip(),
                    Filter::Port => *sent_to == from,
                }
        });
        if !is_heard {
            return None;
        }
        if nat.kept_from_outside {
            entry.used = now;
            entry.sent_to.entry(from).and_modify(|at| *at = now);
        }
        Some(entry.inner)
    }

    fn choose_port(&mut self, ports: Ports, inner: SocketAddr, dice: &mut Dice) -> u16 {
        let block = (ports == Ports::Block).then(|| self.block_of(inner.ip(), dice));
        let is_free = |port: &u16| self.entries.iter().all(|one| one.outer.port() != *port);
        let next = |port: u16| if port < 1024 { 1024 } else { port.wrapping_add(1).max(1024) };
        let port = match ports {
            Ports::Preserving if is_free(&inner.port()) => inner.port(),
            Ports::Preserving | Ports::Random | Ports::Block => {
                let within = block.and_then(|first| {
                    let drawn = std::iter::repeat_with(|| first + dice.below(BLOCK.into()) as u16);
                    drawn.take(usize::from(BLOCK) * 8).find(is_free)
                });
                // A block that is full is left.
                let any = std::iter::repeat_with(|| any_port(dice));
                within.or_else(|| any.into_iter().find(is_free)).expect("few of 64,512 ports are taken")
            }
            Ports::Sequential => {
                let first = if self.newest_port == 0 { any_port(dice) } else { next(self.newest_port) };
                std::iter::successors(Some(first), |port| Some(next(*port))).find(is_free).expect("few are taken")
            }
        };
        self.newest_port = port;
        port
    }

    /// The lowest port of a host's block: one that no other has.
    fn block_of(&mut self, host: IpAddr, dice: &mut Dice) -> u16 {
        if let Some(first) = self.blocks.get(&host) {
            return *first;
        }
        let mut drawn = std::iter::repeat_with(|| BLOCK * (1 + dice.below(63) as u16));
        let free = drawn.find(|first| self.blocks.values().all(|taken| taken != first));
        let first = free.expect("a router has fewer hosts than blocks");
        self.blocks.insert(host, first);
        first
    }
}

fn any_port(dice: &mut Dice) -> u16 {
    1024 + dice.below(64_512) as u16
}
