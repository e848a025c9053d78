//! What each side of a search does: from how many sockets it sends, to which ports, and what the chances are.
//!
//! In: what both sides know of their NATs, the number of the round, a seed. Out: a [`Duty`], or why a search is no use; a
//! number of sockets; ports in the order in which to probe them. It holds no state and sends nothing.
//!
//! The hard NAT gives each of `open` sockets a port that nobody can ask for, out of `ports` that there are; the other side
//! probes `probes` of them, each once. At least one probe meets a socket with the probability
//! `1 − C(ports − open, probes) / C(ports, probes)` (hypergeometric; the table in
//! <https://tailscale.com/blog/how-nat-traversal-works> has the same numbers), which is what [`odds`] computes:
//!
//! | ports | sockets | probes | found |
//! |---|---|---|---|
//! | 64,512 (all but the well-known) | 256 | 174 | 50 % |
//! | 64,512 | 256 | 512 | 87 % |
//! | 64,512 | 256 | 1,024 | 98.3 % |
//! | 64,512 | 84 | 1,024 | 74 % |
//! | a block of 2,048 | 64 | 64 | 87 % |
//! | a block of 1,024 | 64 | 64 | 98.6 % |
//!
//! With two hard NATs both ends of the flow have to be guessed at once: 170,000 probes for half a chance, and in two blocks of
//! 1,024 ports 256 flows a side meet with 6 %. Only where both count their ports is there something to aim at.
//! Bounds: [`MAX_SOCKETS`] and [`MAX_PROBES`] a round.

use std::{collections::BTreeSet, ops::RangeInclusive};

use crate::request::link::{Mapping, Nat, Ports};

/// Most sockets that one side opens, and how many it opens if nothing is known of the ports.
pub const MAX_SOCKETS: usize = 256;

/// Most ports that one side probes in a round, and how many it probes if nothing is known of them.
pub const MAX_PROBES: usize = 1024;

/// Sockets behind a NAT that gives this host a block of ports: a carrier's subscriber has 512 to 4,096 of them for all its
/// devices (RFC 7422), and the search should not use them up.
pub const BLOCK_SOCKETS: usize = 64;

/// Part of a block that one search may use up: an eighth.
const BLOCK_SHARE: usize = 8;

/// Sockets behind a NAT that counts its ports: twice [`AHEAD`], so that they lie around the port aimed at.
pub const COUNTED_SOCKETS: usize = 32;

/// How many ports beyond the last one known is aimed, if both NATs count: other hosts behind it take some meanwhile.
pub const AHEAD: u16 = 16;

/// How many of the next ports of a NAT that counts are probed, if the other is endpoint-independent: room for what a few
/// dozen hosts behind it open within a few seconds.
pub const COUNTED_PROBES: u16 = 256;

/// The chance for which a block is probed.
pub const BLOCK_ODDS: f64 = 0.985;

/// The ports that NATs give to others' flows, well-known ones apart: 64,512.
pub const ALL_PORTS: RangeInclusive<u16> = 1024..=u16::MAX;

/// What one side does in a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// Behind the hard NAT: check from many sockets.
    Open,
    /// Behind the easy one: probe many ports.
    Probe,
    /// Both NATs are hard, and count their ports: check from some sockets to where the other's will be.
    Meet,
}

/// Why there is nothing to search for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoSearch {
    /// What NAT one of the sides is behind is not known, or it does not want to search.
    Unknown,
    /// Neither NAT is hard: what the candidates say suffices.
    NotNeeded,
    /// Both are hard: too many combinations.
    BothHard,
    /// The other side has no public address.
    NoAddress,
}

/// What to do behind the NAT `ours` to meet who is behind `theirs`.
///
/// # Errors
/// If a search is no use.
pub fn duty(ours: Nat, theirs: Nat) -> Result<Duty, NoSearch> {
    match (ours.mapping, theirs.mapping) {
        (Mapping::Unknown, _) | (_, Mapping::Unknown) => Err(NoSearch::Unknown),
        (Mapping::EndpointIndependent, Mapping::EndpointIndependent) => Err(NoSearch::NotNeeded),
        (Mapping::Dependent, Mapping::EndpointIndependent) => Ok(Duty::Open),
        (Mapping::EndpointIndependent, Mapping::Dependent) => Ok(Duty::Probe),
        (Mapping::Dependent, Mapping::Dependent) => {
            let both = counted(ours.ports).and(counted(theirs.ports));
            both.map(|_| Duty::Meet).ok_or(NoSearch::BothHard)
        }
    }
}

/// From how many sockets to check behind a NAT with these ports. What was inferred of them is trusted in the first round.
pub fn sockets(ours: Ports, round: u32) -> usize {
    match (known(ours), round) {
        (Ports::Block { first, last }, 0) => (ports_in(first, last) / BLOCK_SHARE).clamp(1, BLOCK_SOCKETS),
        (Ports::Sequential { .. }, 0) => COUNTED_SOCKETS,
        (_, _) => MAX_SOCKETS,
    }
}

/// The port to aim at, if both NATs count.
pub fn aim(theirs: Ports) -> Option<u16> {
    counted(theirs).map(|(last, step)| ahead(last, step, AHEAD))
}

/// The ports to probe of a NAT with these, in this order: the likely ones first, and in later rounds others too.
pub fn probes(theirs: Ports, round: u32, seed: &[u8; 32]) -> Vec<u16> {
    let mut draw = Draw::new(seed, round);
    let mut chosen = match known(theirs) {
        Ports::Block { first, last } => {
            let ports = ports_in(first, last);
            let sockets = (ports / BLOCK_SHARE).clamp(1, BLOCK_SOCKETS);
            draw.distinct(first..=last, probes_for(ports, sockets), &[])
        }
        Ports::Sequential { last, step } => {
            let mut ports: Vec<_> = (1..=COUNTED_PROBES).map(|count| ahead(last, step, count)).collect();
            let mut seen = BTreeSet::new();
            ports.retain(|port| seen.insert(*port));
            ports
        }
        Ports::Unknown | Ports::Preserving | Ports::Random => Vec::new(),
    };
    if chosen.is_empty() || round > 0 {
        let others = draw.distinct(ALL_PORTS, MAX_PROBES.saturating_sub(chosen.len()), &chosen);
        chosen.extend(others);
    }
    chosen
}

/// The probability that one of `probes` different ports out of `ports` is one of the `open` ones.
pub fn odds(ports: usize, open: usize, probes: usize) -> f64 {
    let missed: f64 = (0..probes.min(ports))
        .map(|probed| {
            let left = ports - probed;
            1.0 - ratio(open.min(left), left)
        })
        .product();
    1.0 - missed
}

/// The fewest probes of a block that find a socket with [`BLOCK_ODDS`].
fn probes_for(ports: usize, open: usize) -> usize {
    let mut missed = 1.0;
    for probed in 0..ports.min(MAX_PROBES) {
        if 1.0 - missed >= BLOCK_ODDS {
            return probed;
        }
        let left = ports - probed;
        missed *= 1.0 - ratio(open.min(left), left);
    }
    ports.min(MAX_PROBES)
}

fn ratio(part: usize, whole: usize) -> f64 {
    let exact = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    exact(part) / exact(whole)
}

/// What the other side says of ports, as far as it makes sense.
fn known(ports: Ports) -> Ports {
    match ports {
        Ports::Block { first, last } if first <= last && last >= *ALL_PORTS.start() => {
            Ports::Block { first: first.max(*ALL_PORTS.start()), last }
        }
        Ports::Block { .. } | Ports::Sequential { step: 0, .. } => Ports::Unknown,
        ports @ (Ports::Unknown | Ports::Preserving | Ports::Sequential { .. } | Ports::Random) => ports,
    }
}

fn counted(ports: Ports) -> Option<(u16, i16)> {
    match known(ports) {
        Ports::Sequential { last, step } => Some((last, step)),
        Ports::Unknown | Ports::Preserving | Ports::Block { .. } | Ports::Random => None,
    }
}

fn ports_in(first: u16, last: u16) -> usize {
    usize::from(last - first) + 1
}

/// The port `count` steps beyond `last`; a NAT that comes to the end of [`ALL_PORTS`] begins anew.
fn ahead(last: u16, step: i16, count: u16) -> u16 {
    let (lowest, ports) = (i32::from(*ALL_PORTS.start()), i32::from(*ALL_PORTS.end() - *ALL_PORTS.start()) + 1);
    let port = i32::from(last) - lowest + i32::from(step) * i32::from(count);
    u16::try_from(port.rem_euclid(ports) + lowest).expect("it lies within all ports, which are u16")
}

/// Numbers from a seed.
struct Draw(blake3::OutputReader);

impl Draw {
    fn new(seed: &[u8; 32], round: u32) -> Self {
        Self(blake3::Hasher::new_keyed(seed).update(b"ports").update(&round.to_be_bytes()).finalize_xof())
    }

    /// `count` different ones of these ports, or all; none of those in `but`.
    fn distinct(&mut self, ports: RangeInclusive<u16>, count: usize, but: &[u16]) -> Vec<u16> {
        let but: BTreeSet<_> = but.iter().collect();
        let mut ports: Vec<_> = ports.filter(|port| !but.contains(port)).collect();
        let count = count.min(ports.len());
        for at in 0..count {
            let other = at + self.below(ports.len() - at);
            ports.swap(at, other);
        }
        ports.truncate(count);
        ports
    }

    /// A number below this one. 64 bits folded onto at most 16: the bias is below 2⁻⁴⁸.
    fn below(&mut self, bound: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        usize::try_from(u64::from_be_bytes(bytes) % bound as u64).expect("it is below a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: [u8; 32] = [7; 32];

    fn nat(mapping: Mapping, ports: Ports) -> Nat {
        Nat { mapping, ports }
    }

    #[test]
    fn the_chances_are_those_of_the_table() {
        let close = |(ports, open, probes), percent: f64| (odds(ports, open, probes) * 100.0 - percent).abs() < 0.5;
        for (search, percent) in [
            ((64_512, 256, 174), 50.0),
            ((64_512, 256, 512), 87.0),
            ((64_512, 256, 1024), 98.3),
            ((64_512, 84, 1024), 74.0),
            ((2048, 64, 64), 87.0),
            ((1024, 64, 64), 98.6),
        ] {
            assert!(close(search, percent), "{search:?}: {}", odds(search.0, search.1, search.2));
        }
        assert_eq!((odds(10, 0, 10), odds(10, 1, 10)), (0.0, 1.0));
    }

    #[test]
    fn the_side_behind_the_hard_nat_opens_and_the_other_probes() {
        let (easy, hard) =
            (nat(Mapping::EndpointIndependent, Ports::Preserving), nat(Mapping::Dependent, Ports::Random));
        assert_eq!((duty(hard, easy), duty(easy, hard)), (Ok(Duty::Open), Ok(Duty::Probe)));
        assert_eq!(duty(easy, easy), Err(NoSearch::NotNeeded));
        assert_eq!(duty(hard, Nat::default()), Err(NoSearch::Unknown));
    }

    #[test]
    fn two_hard_nats_meet_only_if_both_count() {
        let counts = |step| nat(Mapping::Dependent, Ports::Sequential { last: 5000, step });
        let others =
            [Ports::Random, Ports::Block { first: 1024, last: 2047 }].map(|ports| nat(Mapping::Dependent, ports));
        assert_eq!(duty(counts(1), counts(-2)), Ok(Duty::Meet));
        for other in others.into_iter().chain([counts(0)]) {
            assert_eq!(
                (duty(counts(1), other), duty(other, counts(1))),
                (Err(NoSearch::BothHard), Err(NoSearch::BothHard))
            );
        }
    }

    #[test]
    fn a_block_takes_fewer_sockets_and_probes_for_the_same_chance() {
        for (first, last) in [(2048, 2559), (2048, 3071), (2048, 4095), (40_960, 45_055)] {
            let block = Ports::Block { first, last };
            let (ports, open) = (ports_in(first, last), sockets(block, 0));
            let probed = probes(block, 0, &SEED);
            assert!(open <= BLOCK_SOCKETS && probed.len() <= 280, "{} of {ports}", probed.len());
            assert!(odds(ports, open, probed.len()) >= BLOCK_ODDS);
            assert!(probed.iter().all(|port| (first..=last).contains(port)));
        }
        assert_eq!(probes(Ports::Block { first: 2048, last: 3071 }, 0, &SEED).len(), 64);
    }

    #[test]
    fn a_guess_that_failed_once_is_not_relied_on_again() {
        for guess in [Ports::Block { first: 2048, last: 3071 }, Ports::Sequential { last: 2048, step: 2 }] {
            assert_eq!((sockets(guess, 1), probes(guess, 1, &SEED).len()), (MAX_SOCKETS, MAX_PROBES));
            let (first, again) = (probes(guess, 0, &SEED), probes(guess, 1, &SEED));
            assert!(again.len() > first.len());
        }
    }

    #[test]
    fn no_port_is_probed_twice_in_a_round_and_none_that_is_well_known() {
        for ports in [
            Ports::Unknown,
            Ports::Random,
            Ports::Preserving,
            Ports::Block { first: 0, last: u16::MAX },
            Ports::Block { first: 9, last: 3 },
            Ports::Block { first: 5000, last: 5000 },
            Ports::Sequential { last: 65_500, step: 1 },
            Ports::Sequential { last: 1030, step: -1 },
            Ports::Sequential { last: 3, step: i16::MIN },
        ] {
            for round in 0..3 {
                let mut probed = probes(ports, round, &SEED);
                let count = probed.len();
                assert!((1..=MAX_PROBES).contains(&count), "{ports:?}");
                assert!(probed.iter().all(|port| ALL_PORTS.contains(port)), "{ports:?}");
                probed.sort_unstable();
                probed.dedup();
                assert_eq!(probed.len(), count, "{ports:?}");
            }
        }
    }

    #[test]
    fn another_round_probes_other_ports() {
        let [one, other] = [0, 1].map(|round| probes(Ports::Random, round, &SEED));
        let again = one.iter().filter(|port| other.contains(port)).count();
        assert!(again < 60, "{again} of 1,024 again; 16 are to be expected");
    }

    #[test]
    fn a_nat_that_counts_begins_anew_at_the_end() {
        assert_eq!(ahead(u16::MAX, 1, 1), 1024);
        assert_eq!(ahead(1024, -1, 1), u16::MAX);
        assert_eq!(aim(Ports::Sequential { last: 4000, step: 2 }), Some(4032));
    }
}
