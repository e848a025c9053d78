//! The order of proved paths, best first.
//!
//! In: what is known of a path. Out: which of two is better, and whether by enough to move. It holds no state.
//! The round trip decides; at equal ones, what kind of path it is, and IPv6 before IPv4. So that both are one number and no three
//! paths can chase each other round, a lesser kind counts as a longer round trip: by [`CLASS_COST`] for each step from this
//! machine to its network, to the world, to what a NAT translates, and by [`IPV4_COST`].
//! A path is only left for one that is better by [`HYSTERESIS`], so that neither side swings between two that are alike.

use std::{net::SocketAddr, time::Duration};

use super::candidate::{CandidateKind, Reach};

/// What IPv4 costs beside IPv6, which no NAT forgets.
/// 6 ms: at equal round trips enough for a move, and far below what anybody feels.
pub const IPV4_COST: Duration = Duration::from_millis(6);

/// What a path costs beside one that is a step nearer.
/// 6 ms: as [`IPV4_COST`], so that at equal round trips the nearer one is moved to.
pub const CLASS_COST: Duration = Duration::from_millis(6);

/// How much better another path must be for a move.
/// 5 ms: above the noise of a round trip; a move makes congestion control start anew, which costs more than this.
pub const HYSTERESIS: Duration = Duration::from_millis(5);

/// What a path is judged by. The fields stand in order of priority; the least is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    /// Smoothed round trip, and what the path's kind costs.
    cost: Duration,
    kind: CandidateKind,
    /// Makes the order total.
    addr: SocketAddr,
}

impl Score {
    /// The score of a path to `addr`.
    pub fn new(addr: SocketAddr, kind: CandidateKind, reach: Reach, rtt: Duration) -> Self {
        let family = if addr.is_ipv4() { IPV4_COST } else { Duration::ZERO };
        Self { cost: rtt + CLASS_COST * steps(kind, reach) + family, kind, addr }
    }

    /// Whether this path is so much better that `incumbent` should be left for it.
    pub fn displaces(&self, incumbent: &Self) -> bool {
        self.cost + HYSTERESIS <= incumbent.cost
    }
}

/// Steps from this machine to where the path leads.
fn steps(kind: CandidateKind, reach: Reach) -> u32 {
    match (reach, kind) {
        (Reach::Loopback, _) => 0,
        (Reach::Lan, _) => 1,
        (Reach::Wide, CandidateKind::Host) => 2,
        (Reach::Wide, CandidateKind::Mapped | CandidateKind::ServerReflexive | CandidateKind::PeerReflexive) => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(addr: &str, kind: CandidateKind, reach: Reach, rtt_ms: u64) -> Score {
        Score::new(addr.parse().unwrap(), kind, reach, Duration::from_millis(rtt_ms))
    }

    #[test]
    fn at_equal_round_trips_this_machine_comes_before_its_network_before_the_world_before_what_is_translated() {
        let order = [
            score("127.0.0.1:7", CandidateKind::Host, Reach::Loopback, 20),
            score("192.168.1.2:7", CandidateKind::Host, Reach::Lan, 20),
            score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20),
            score("192.0.2.2:7", CandidateKind::Mapped, Reach::Wide, 20),
        ];
        assert!(order.windows(2).all(|pair| pair[0].displaces(&pair[1]) && !pair[1].displaces(&pair[0])));
        assert!(order[3] < score("192.0.2.3:7", CandidateKind::ServerReflexive, Reach::Wide, 20));
    }

    #[test]
    fn at_equal_round_trips_ipv6_displaces_ipv4() {
        let v4 = score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20);
        let v6 = score("[2001:db8::1]:7", CandidateKind::Host, Reach::Wide, 21);
        assert!(v6.displaces(&v4) && !v4.displaces(&v6));
    }

    #[test]
    fn a_clearly_faster_path_displaces_one_of_a_better_kind() {
        let lan = score("192.168.1.2:7", CandidateKind::Host, Reach::Lan, 60);
        let wide = score("192.0.2.1:7", CandidateKind::ServerReflexive, Reach::Wide, 20);
        assert!(wide < lan && wide.displaces(&lan) && !lan.displaces(&wide));
    }

    #[test]
    fn a_path_is_not_left_for_one_that_is_hardly_faster() {
        let old = score("192.0.2.1:7", CandidateKind::Host, Reach::Wide, 20);
        assert!(!score("192.0.2.2:7", CandidateKind::Host, Reach::Wide, 16).displaces(&old));
        assert!(score("192.0.2.2:7", CandidateKind::Host, Reach::Wide, 15).displaces(&old));
    }

    #[test]
    fn no_two_paths_displace_each_other_and_no_three_chase_each_other_round() {
        let kinds = [CandidateKind::Host, CandidateKind::Mapped, CandidateKind::PeerReflexive];
        let reaches = [Reach::Loopback, Reach::Lan, Reach::Wide];
        let mut paths = Vec::new();
        for (at, (kind, reach)) in kinds.iter().flat_map(|kind| reaches.map(|reach| (*kind, reach))).enumerate() {
            for rtt in [1, 4, 9, 14, 20, 27] {
                paths.push(score(&format!("192.0.2.{}:7", at + 1), kind, reach, rtt));
                paths.push(score(&format!("[2001:db8::{}]:7", at + 1), kind, reach, rtt));
            }
        }
        // What displaces is less in the one total order: so no chain of moves comes back to where it began.
        for one in &paths {
            assert!(paths.iter().filter(|other| one.displaces(other)).all(|other| one < other));
        }
    }
}
