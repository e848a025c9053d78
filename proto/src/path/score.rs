//! The order of proved paths, best first.
//!
//! In: what is known of a path. Out: which of two is better, and whether by enough to move. It holds no state.
//! Two rules besides: IPv6 is preferred where it costs little (no NAT to forget it), and a path is only left for one that is
//! clearly better, so that neither side swings between two that are alike.

use std::{net::SocketAddr, time::Duration};

use super::candidate::{CandidateKind, Reach};

/// How much slower IPv6 may be and still be preferred.
/// 3 ms: far below what anybody feels, above the noise between two routes to one place.
pub const IPV6_BIAS: Duration = Duration::from_millis(3);

/// How much faster another path of the same reach must be for a move.
/// 5 ms: above the noise of a round trip; a move makes congestion control start anew, which costs more than this.
pub const HYSTERESIS: Duration = Duration::from_millis(5);

/// What a path is judged by. The fields stand in order of priority; the least is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    reach: Reach,
    /// Smoothed round trip, in favour of IPv6.
    cost: Duration,
    kind: CandidateKind,
    /// Makes the order total.
    addr: SocketAddr,
}

impl Score {
    /// The score of a path to `addr`.
    pub fn new(addr: SocketAddr, kind: CandidateKind, reach: Reach, rtt: Duration) -> Self {
        let cost = if addr.is_ipv4() { rtt + IPV6_BIAS } else { rtt };
        Self { reach, cost, kind, addr }
    }

    /// Whether this path is so much better that `incumbent` should be left for it.
    pub fn displaces(&self, incumbent: &Self) -> bool {
        match self.reach.cmp(&incumbent.reach) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => self.cost + HYSTERESIS <= incumbent.cost,
            std::cmp::Ordering::Greater => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(addr: &str, kind: CandidateKind, reach: Reach, rtt_ms: u64) -> Score {
        Score::new(addr.parse().unwrap(), kind, reach, Duration::from_millis(rtt_ms))
    }

    #[test]
    fn a_neighbour_displaces_a_faster_path_through_the_world() {
        let lan = score("192.168.1.2:7", CandidateKind::Host, Reach::Lan, 30);
        let wide = score("192.0.2.1:7", CandidateKind::ServerReflexive, Reach::Wide, 1);
        assert!(lan < wide && lan.displaces(&wide) && !wide.displaces(&lan));
    }

    #[test]
    fn a_path_is_not_left_for_one_that_is_hardly_faster() {
        let old = score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20);
        assert!(!score("192.0.2.2:7", CandidateKind::Host, Reach::Wide, 16).displaces(&old));
        assert!(score("192.0.2.2:7", CandidateKind::Host, Reach::Wide, 15).displaces(&old));
    }

    #[test]
    fn ipv6_wins_while_it_is_at_most_3_ms_slower() {
        let v4 = score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20);
        assert!(score("[2001:db8::1]:7", CandidateKind::Host, Reach::Wide, 22) < v4);
        assert!(score("[2001:db8::1]:7", CandidateKind::Host, Reach::Wide, 24) > v4);
    }

    #[test]
    fn a_host_address_comes_before_a_reflexive_one_that_is_as_fast() {
        let host = score("192.0.2.9:7", CandidateKind::Host, Reach::Wide, 20);
        assert!(host < score("192.0.2.1:7", CandidateKind::ServerReflexive, Reach::Wide, 20));
    }

    #[test]
    fn no_two_paths_displace_each_other() {
        let paths = [
            score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20),
            score("192.0.2.2:7", CandidateKind::PeerReflexive, Reach::Wide, 14),
            score("[2001:db8::1]:7", CandidateKind::Host, Reach::Wide, 12),
            score("192.168.1.2:7", CandidateKind::Host, Reach::Lan, 90),
        ];
        for one in paths {
            assert!(paths.iter().all(|other| !(one.displaces(other) && other.displaces(&one))));
        }
    }
}
