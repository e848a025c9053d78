//! Who may still connect: bounds per address and in total, and how fast one address may come.
//!
//! In: the address of a new connection and `now`; the address again when the connection ends. Out: admitted or why not.
//! Never locks and never waits: the accept loop owns one [`Census`], each STUN responder one [`Pace`].
//! A connection is admitted, or waits for its refusal in the lobby, or is turned away at once.
//! Bounds: `Limits` from the configuration, [`LOBBY`] and [`MAX_PACED`] here.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use peerfleet_proto::wire::relay::ClosingReason;

/// Connections over a limit that are served at a time, only to be told why they cannot stay (or how the relay is:
/// a full relay still answers its health check). More are closed without a word.
pub const LOBBY: usize = 64;

/// Addresses whose pace is remembered within one [`WINDOW`]; beyond that, new addresses wait for the next window.
/// 24 bytes each: under a megabyte.
pub const MAX_PACED: usize = 16 * 1024;

/// Span over which the pace of an address is counted.
pub const WINDOW: Duration = Duration::from_secs(1);

/// An address as limits count it: all of an IPv4 address, the first 64 bits of an IPv6 address (what one customer has).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin(u128);

impl Origin {
    /// The origin of an address; an IPv4 address mapped into IPv6 counts as IPv4.
    pub fn of(address: SocketAddr) -> Self {
        match address.ip().to_canonical() {
            IpAddr::V4(v4) => Self(u128::from(v4.to_ipv6_mapped())),
            IpAddr::V6(v6) => Self(u128::from(v6) >> 64 << 64),
        }
    }
}

/// What a [`Census`] keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time.
    pub connections: usize,
    /// Most connections of one origin at a time.
    pub per_address: usize,
    /// Most new connections of one origin within one [`WINDOW`].
    pub per_address_rate: u32,
}

/// Answer to a new connection. Whoever is not turned away must be given back with [`Census::left`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Come in.
    Admitted,
    /// Over a limit: may hear why, then goes.
    Lobby(ClosingReason),
    /// Over a limit, and so is the lobby: goes at once.
    TurnedAway,
}

/// Who is connected now.
#[derive(Debug)]
pub struct Census {
    limits: Limits,
    admitted: usize,
    lobby: usize,
    origins: HashMap<Origin, usize>,
    pace: Pace,
}

impl Census {
    /// Nobody is connected.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let pace = Pace::new(limits.per_address_rate, now);
        Self { limits, admitted: 0, lobby: 0, origins: HashMap::new(), pace }
    }

    /// Somebody connects.
    pub fn arrived(&mut self, origin: Origin, now: Instant) -> Entry {
        let over = if self.admitted >= self.limits.connections {
            Some(ClosingReason::RelayFull)
        } else if self.origins.get(&origin).is_some_and(|count| *count >= self.limits.per_address)
            || !self.pace.allows(origin, now)
        {
            Some(ClosingReason::AddressLimit)
        } else {
            None
        };
        match over {
            None => {
                self.admitted += 1;
                *self.origins.entry(origin).or_insert(0) += 1;
                Entry::Admitted
            }
            Some(reason) if self.lobby < LOBBY => {
                self.lobby += 1;
                Entry::Lobby(reason)
            }
            Some(_) => Entry::TurnedAway,
        }
    }

    /// Somebody who got this entry is gone.
    pub fn left(&mut self, origin: Origin, entry: Entry) {
        match entry {
            Entry::Admitted => {
                self.admitted -= 1;
                if let Some(count) = self.origins.get_mut(&origin) {
                    *count -= 1;
                    if *count == 0 {
                        self.origins.remove(&origin);
                    }
                }
            }
            Entry::Lobby(_) => self.lobby -= 1,
            Entry::TurnedAway => {}
        }
    }
}

/// How often each origin came within the current [`WINDOW`].
#[derive(Debug)]
pub struct Pace {
    most: u32,
    window: Instant,
    seen: HashMap<Origin, u32>,
}

impl Pace {
    /// Allows each origin `most` times per [`WINDOW`].
    pub fn new(most: u32, now: Instant) -> Self {
        Self { most, window: now, seen: HashMap::new() }
    }

    /// Whether this origin may come once more; counts it if so.
    pub fn allows(&mut self, origin: Origin, now: Instant) -> bool {
        if now.saturating_duration_since(self.window) >= WINDOW {
            self.window = now;
            self.seen.clear();
        }
        if self.seen.len() >= MAX_PACED && !self.seen.contains_key(&origin) {
            return false;
        }
        let count = self.seen.entry(origin).or_insert(0);
        *count += 1;
        *count <= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { connections: 3, per_address: 2, per_address_rate: 100 };

    fn origin(text: &str) -> Origin {
        Origin::of(text.parse().unwrap())
    }

    #[test]
    fn the_third_connection_of_an_address_goes_to_the_lobby_until_one_leaves() {
        let now = Instant::now();
        let mut census = Census::new(LIMITS, now);
        let one = origin("192.0.2.1:1000");
        assert_eq!(census.arrived(one, now), Entry::Admitted);
        assert_eq!(census.arrived(one, now), Entry::Admitted);
        let refused = census.arrived(one, now);
        assert_eq!(refused, Entry::Lobby(ClosingReason::AddressLimit));
        census.left(one, refused);
        census.left(one, Entry::Admitted);
        assert_eq!(census.arrived(one, now), Entry::Admitted);
    }

    #[test]
    fn a_full_relay_refuses_any_address_and_then_turns_away() {
        let now = Instant::now();
        let mut census = Census::new(LIMITS, now);
        for last in 1..=3 {
            assert_eq!(census.arrived(origin(&format!("192.0.2.{last}:1")), now), Entry::Admitted);
        }
        for _ in 0..LOBBY {
            assert_eq!(census.arrived(origin("192.0.2.9:1"), now), Entry::Lobby(ClosingReason::RelayFull));
        }
        assert_eq!(census.arrived(origin("192.0.2.9:1"), now), Entry::TurnedAway);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_origin() {
        assert_eq!(origin("[2001:db8:0:1::1]:1"), origin("[2001:db8:0:1:ffff::2]:9"));
        assert_ne!(origin("[2001:db8:0:1::1]:1"), origin("[2001:db8:0:2::1]:1"));
        assert_eq!(origin("[::ffff:192.0.2.1]:1"), origin("192.0.2.1:2"));
        assert_ne!(origin("192.0.2.2:1"), origin("192.0.2.1:1"));
    }

    #[test]
    fn pace_begins_anew_with_each_window() {
        let start = Instant::now();
        let mut pace = Pace::new(2, start);
        let one = origin("192.0.2.1:1");
        assert!(pace.allows(one, start) && pace.allows(one, start));
        assert!(!pace.allows(one, start));
        assert!(pace.allows(origin("192.0.2.2:1"), start));
        assert!(pace.allows(one, start + WINDOW));
    }

    #[test]
    fn pace_remembers_a_bounded_number_of_addresses() {
        let start = Instant::now();
        let mut pace = Pace::new(2, start);
        for number in 0..MAX_PACED as u128 {
            assert!(pace.allows(Origin(number << 64), start));
        }
        assert!(!pace.allows(Origin(u128::MAX), start));
        assert!(pace.allows(Origin(0), start));
    }
}
