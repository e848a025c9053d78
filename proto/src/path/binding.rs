//! How long the NATs on a path remember it when nothing is sent, and so how often an idle path is kept alive.
//!
//! In: how a check after an idle time went. Out: the interval of keep-alives. It knows no address and no timer.
//! An interval that was lived through lengthens the next; a binding that died shortens it, and no interval comes near that
//! again until [`FORGIVEN_AFTER`]: a router may be replaced, and a lost network may look like a forgetful NAT.
//! The side that controls checks a little earlier than the other, whose check its own then makes needless: an idle path costs
//! one check and one answer an interval, not two.
//! Bounds: [`KEEP_ALIVE_LEAST`] to [`KEEP_ALIVE`]. The first interval is [`KEEP_ALIVE_FIRST`].

use std::time::{Duration, Instant};

use super::{check::Role, direct::KEEP_ALIVE};

/// The first interval: half of the 30 s after which many NATs forget, and below the 20 s of the hastier ones, with room for
/// checks that are lost and sent again.
pub const KEEP_ALIVE_FIRST: Duration = Duration::from_secs(15);

/// The shortest interval: a path that needs more than twelve packets a minute is better relayed while it is idle.
pub const KEEP_ALIVE_LEAST: Duration = Duration::from_secs(5);

/// How much an interval grows that was lived through: from the first to the longest in a minute and a half.
const STEP: Duration = Duration::from_secs(1);

/// Time after which it is forgotten that a binding died.
pub const FORGIVEN_AFTER: Duration = Duration::from_secs(3600);

/// What is known of the bindings of one path.
#[derive(Debug)]
pub(super) struct Binding {
    interval: Duration,
    /// The shortest idle time that a binding did not outlive, and when.
    died: Option<(Duration, Instant)>,
}

impl Default for Binding {
    fn default() -> Self {
        Self { interval: KEEP_ALIVE_FIRST, died: None }
    }
}

impl Binding {
    /// Time between keep-alives of the side with this role.
    pub(super) fn interval(&self, role: Role) -> Duration {
        match role {
            Role::Controlling => self.interval * 7 / 8,
            Role::Controlled => self.interval,
        }
    }

    /// The binding was there still after nothing had been sent for `idle`.
    pub(super) fn lived(&mut self, idle: Duration, now: Instant) {
        self.forgive(now);
        if idle >= self.interval * 3 / 4 {
            let most = self.died.map_or(KEEP_ALIVE, |(died, _)| died * 3 / 4);
            self.interval = (self.interval + STEP).min(most).clamp(KEEP_ALIVE_LEAST, KEEP_ALIVE);
        }
    }

    /// The binding was gone after nothing had been sent for `idle`. That of a busy path died of something else.
    pub(super) fn died(&mut self, idle: Duration, now: Instant) {
        if idle < KEEP_ALIVE_LEAST {
            return;
        }
        self.forgive(now);
        let shortest = self.died.map_or(idle, |(died, _)| died.min(idle));
        self.died = Some((shortest, now));
        self.interval = (shortest / 2).clamp(KEEP_ALIVE_LEAST, KEEP_ALIVE);
    }

    fn forgive(&mut self, now: Instant) {
        self.died = self.died.filter(|(_, at)| *at + FORGIVEN_AFTER > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made in any other way")]
    fn beginning() -> Instant {
        Instant::now()
    }

    fn live(binding: &mut Binding, times: u32, now: Instant) -> Duration {
        for _ in 0..times {
            binding.lived(binding.interval(Role::Controlling), now);
        }
        binding.interval(Role::Controlled)
    }

    #[test]
    fn an_interval_that_is_lived_through_grows_to_the_longest_and_no_further() {
        let now = beginning();
        assert_eq!(live(&mut Binding::default(), 100, now), KEEP_ALIVE);
    }

    #[test]
    fn after_a_death_no_interval_comes_near_it_until_it_is_forgiven() {
        let (mut binding, now) = (Binding::default(), beginning());
        binding.died(Duration::from_secs(16), now);
        assert_eq!(live(&mut binding, 1000, now), Duration::from_secs(12));
        assert_eq!(live(&mut binding, 1000, now + FORGIVEN_AFTER), KEEP_ALIVE);
    }

    #[test]
    fn a_busy_path_that_dies_shortens_nothing() {
        let (mut binding, now) = (Binding::default(), beginning());
        binding.died(Duration::from_secs(1), now);
        assert_eq!(binding.interval(Role::Controlled), KEEP_ALIVE_FIRST);
    }

    #[test]
    fn a_path_that_dies_again_and_again_is_not_checked_all_the_time() {
        let (mut binding, now) = (Binding::default(), beginning());
        (0..20).for_each(|_| binding.died(binding.interval(Role::Controlling), now));
        assert_eq!(binding.interval(Role::Controlled), KEEP_ALIVE_LEAST);
    }
}
