//! Notices that this machine slept: its clock of being awake stood still while the world's went on.
//!
//! In: both clocks, from time to time. Out: how long it slept, once. It never reads a clock itself but in [`world_time`].
//! A second sign is a look that came far too late, on systems where both clocks go on.
//! Bounds: sleeps below [`SHORTEST`] are not told; they cost a path no more than a lost packet.

use std::time::{Duration, Instant};

/// Shortest sleep that is told. Mappings of NATs and connections to relays outlive a few seconds; and a clock that is set
/// by less is none of our business.
pub(super) const SHORTEST: Duration = Duration::from_secs(4);

/// Compares the clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vigil {
    awake: Instant,
    world: Duration,
}

impl Vigil {
    /// The clocks as they stand now.
    pub(super) fn new(awake: Instant, world: Duration) -> Self {
        Self { awake, world }
    }

    /// When the last look was.
    pub(super) fn last_look(&self) -> Instant {
        self.awake
    }

    /// How long the machine slept since the last look, which should have been followed by this one after `interval`.
    pub(super) fn look(&mut self, awake: Instant, world: Duration, interval: Duration) -> Option<Duration> {
        let passed_here = awake.saturating_duration_since(self.awake);
        let passed_there = world.saturating_sub(self.world);
        *self = Self { awake, world };
        let asleep = passed_there.saturating_sub(passed_here).max(passed_here.saturating_sub(interval));
        (asleep >= SHORTEST).then_some(asleep)
    }
}

/// The time that went by in the world, from some beginning: what goes on while the machine sleeps.
#[cfg(target_os = "linux")]
pub(super) fn world_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// The time that went by in the world, from some beginning: what goes on while the machine sleeps.
#[cfg(not(target_os = "linux"))]
pub(super) fn world_time() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(1);
    const BEGAN: Duration = Duration::from_secs(1000);

    #[test]
    fn a_clock_that_stood_still_tells_of_sleep_once() {
        let start = Instant::now();
        let mut vigil = Vigil::new(start, BEGAN);
        assert_eq!(vigil.look(start + EVERY, BEGAN + EVERY, EVERY), None);
        let hour = Duration::from_secs(3600);
        assert_eq!(vigil.look(start + EVERY * 2, BEGAN + EVERY * 2 + hour, EVERY), Some(hour));
        assert_eq!(vigil.look(start + EVERY * 3, BEGAN + EVERY * 3 + hour, EVERY), None);
    }

    #[test]
    fn a_look_that_came_far_too_late_tells_of_sleep() {
        let start = Instant::now();
        let mut vigil = Vigil::new(start, BEGAN);
        let late = Duration::from_secs(60);
        assert_eq!(vigil.look(start + late, BEGAN + late, EVERY), Some(late - EVERY));
    }

    #[test]
    fn a_moment_of_delay_or_a_clock_set_back_is_no_sleep() {
        let start = Instant::now();
        let mut vigil = Vigil::new(start, BEGAN);
        assert_eq!(vigil.look(start + EVERY * 3, BEGAN + EVERY * 4, EVERY), None);
        assert_eq!(vigil.look(start + EVERY * 4, BEGAN, EVERY), None);
    }

    #[test]
    fn the_worlds_clock_goes_on() {
        let before = world_time();
        assert!(world_time() >= before && before > Duration::ZERO);
    }
}
