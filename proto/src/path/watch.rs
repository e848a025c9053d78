//! Which path an agent takes: promotion by a measured reply, moves to better ones, and the ends of a path.
//!
//! In: proved pairs, changes of the ground, `now`. Out: the path taken, and checks that are wanted. What is good evidence
//! against a path is [`super::direct`]'s to say, and which of two is better [`super::score`]'s.

use std::{net::SocketAddr, time::Instant};

use super::{
    Agent, GOOD_ENOUGH, Reach, State, UPGRADE,
    binding::Binding,
    candidate::{Ground, Local},
    direct::{Current, Verdict},
};

impl Agent {
    /// Our own candidates are others than before.
    pub(super) fn ground_changed(&mut self, before: &Local, now: Instant) {
        if !self.pairs.has_other_interfaces(before) {
            // Only what others see of us is new: the other side hears of it, and checks.
            match &mut self.state {
                State::Punching { .. } => {
                    self.pairs.ensure_all(now);
                    // Its rounds begin anew, and so do ours: those that do not meet open no two NATs.
                    self.state = State::punching(now);
                }
                State::Direct { .. } => self.doubt(now),
            }
            return;
        }
        self.binding = Binding::default();
        self.pairs.trust_all();
        if let Some(current) = self.watched()
            && self.pairs.ground(before, current.addr, current.source()) == Ground::Gone
        {
            self.lose(now);
        } else {
            self.doubt(now);
        }
        self.restart(now);
    }

    /// The path may be gone: it has to prove itself soon.
    pub(super) fn doubt(&mut self, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state {
            current.hurry();
            if let Some(pair) = self.pairs.get_mut(&current.addr) {
                pair.plan.trigger(now);
            }
        }
    }

    /// A check of the path taken was answered.
    pub(super) fn path_answered(&mut self, is_seen_anew: bool, now: Instant) {
        let State::Direct { current, .. } = &mut self.state else { return };
        let idle = current.answered(now);
        if is_seen_anew {
            self.binding.died(idle, now);
        } else {
            self.binding.lived(idle, now);
        }
    }

    /// A pair other than the path taken was proved: is it the path to take?
    pub(super) fn consider(&mut self, addr: SocketAddr, was_proved: bool, now: Instant) {
        if !self.pairs.get_mut(&addr).is_some_and(|pair| pair.is_trusted(now)) {
            return;
        }
        let better = match &mut self.state {
            State::Punching { .. } => true,
            State::Direct { current, .. } => {
                if !was_proved {
                    current.rivalled(addr);
                }
                let rtt = self.pairs.rtt(&current.addr).unwrap_or_default();
                let scores = self.pairs.score(&addr).zip(self.pairs.score(&current.addr));
                current.is_doubtful(rtt, now) || scores.is_some_and(|(new, old)| new.displaces(&old))
            }
        };
        if better {
            self.take(addr, now);
        }
    }

    fn take(&mut self, addr: SocketAddr, now: Instant) {
        self.state = State::Direct { current: Current::new(addr, now), next_upgrade: now + UPGRADE, is_used: false };
        self.changed = true;
    }

    /// By way of the relay from now on, and everything is checked anew.
    pub(super) fn lose(&mut self, now: Instant) {
        self.state = State::punching(now);
        self.changed = true;
        self.pairs.forget_unproved();
        self.pairs.begin_all(now);
    }

    /// Looks after the path taken.
    pub(super) fn watch(&mut self, now: Instant) {
        let (Some(path), Some(current)) = (self.path(), self.watched()) else { return };
        let idle = current.idle();
        match current.verdict(path.rtt, now) {
            Verdict::Keep => self.look_after(path.addr, now),
            Verdict::Succeeded(rival) if self.pairs.contains(&rival) => {
                self.binding.died(idle, now);
                self.take(rival, now);
            }
            Verdict::Lost | Verdict::Succeeded(_) => {
                self.binding.died(idle, now);
                self.lose(now);
            }
            Verdict::CarriesNothing => {
                if let Some(pair) = self.pairs.get_mut(&path.addr) {
                    pair.distrust(now);
                }
                self.lose(now);
            }
        }
    }

    /// Checks the path if that is due, and now and then whether there is a better one.
    fn look_after(&mut self, addr: SocketAddr, now: Instant) {
        let rtt = self.pairs.rtt(&addr).unwrap_or_default();
        let interval = self.binding.interval(self.role);
        let State::Direct { current, next_upgrade, is_used } = &mut self.state else { return };
        if current.wants_check(rtt, interval, now)
            && !self.pairs.is_planned(&addr)
            && let Some(pair) = self.pairs.get_mut(&addr)
        {
            pair.plan.trigger(now);
            if current.is_asked_once() {
                // It was not answered: perhaps another path is alive.
                self.pairs.trigger_others(addr, now);
            }
        }
        if *next_upgrade <= now {
            *next_upgrade = now + UPGRADE;
            self.pairs.forget_unproved();
            if std::mem::take(is_used) && (self.pairs.reach(&addr) == Reach::Wide || rtt > GOOD_ENOUGH) {
                self.pairs.trigger_others(addr, now);
            }
        }
    }
}
