//! Congestion control by a model of the path: how fast it delivers, and how long the shortest way there and back is.
//!
//! In: packets that leave, arrive or are lost, with their times. Out: the window, in bytes that may be in flight. The product
//! of both, the bandwidth-delay product, is what fills the path and no queue.
//! Never takes a lost packet for a full queue by itself: radio links lose packets all day. It yields where more is lost
//! than this path loses anyway while its round trip is long, to heavy loss, to marks, and to a queue that stays.
//! Startup (doubles each round) -> Down (drains what that queued) -> Cruise -> Up (asks for more) -> Down ...; Probe, every
//! [`PROBE_INTERVAL`], looks for the shortest round trip. A round is the time until what is sent now is acknowledged.
//! Bounds: [`FLOOR_PACKETS`] packets at least; at most twice the product, and what acknowledgements come late by, which is no more
//! than the product again. What is remembered is bounded, see [`delivery`].

mod delivery;
mod round;

use std::time::{Duration, Instant};

use self::{
    delivery::{Delivery, Sample},
    round::{Recent, Round},
};

/// Fewest packets of the largest size in flight: as in BBR (draft-ietf-ccwg-bbr §2.7, MinPipeCwnd), enough for the receiver to
/// acknowledge every second packet and for a loss to be noticed.
const FLOOR_PACKETS: u64 = 4;

/// Time that the window lasts at least, however short the round trip: timers are as coarse as this (QUIC's own granularity,
/// RFC 9002 §6.1.2, is 1 ms), and two processes on one processor take turns that are longer.
const HORIZON: Duration = Duration::from_millis(1);

/// Rounds for which a rate is believed (BBR, version 1): about one cycle, so that one of them asked for more.
const RATE_ROUNDS: usize = 10;

/// Rounds between one that drains and the next that asks for more; up to three more, so that flows do not keep step.
const CRUISE_ROUNDS: u64 = 6;

/// Times as long as usual until one asks again that was refused: CUBIC's flows need long to recover from a loss.
const PATIENCE: u64 = 3;

/// Windows, in hundredths of the product. 2 doubles the rate each round, 1.25 is what BBR asks for. BBR then goes down to 0.75
/// of its pacing rate; a window of 0.9 drains as much, because what was queued beyond it is not sent anew.
const STARTUP_GAIN: u64 = 200;
const UP_GAIN: u64 = 125;
const DOWN_GAIN: u64 = 90;
const CRUISE_GAIN: u64 = 100;
/// While somebody else keeps a queue, a window of one product would leave more and more of the path to them.
const CROWDED_GAIN: u64 = 125;
/// As in BBR, version 3: half empties the queue, and costs half of the rate only.
const PROBE_GAIN: u64 = 50;

/// A rate that grew by less than a quarter in a round did not grow; after three such rounds the path is full (BBR).
const GROWTH: u64 = 125;
const FLAT_ROUNDS: u32 = 3;

/// After a round that asked for a quarter more: growth by this much, in hundredths, says that there is far more to have.
const FOUND_MORE: u64 = 115;

/// Time between two looks for the shortest round trip (BBR, version 3), and how long one is: the queue empties in the first
/// round, and what is sent then shows it in the second.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBE_ROUNDS: u64 = 2;

/// Loss beyond what the path loses anyway, in thousandths of a round: what means a full queue if the round trip is long
/// (BBR, version 3: 2 %), and what means congestion whatever the round trip is, because a policer has no queue. More than the latter
/// is never taken for usual.
const FULL_PERMILLE: u64 = 20;
const HEAVY_PERMILLE: u64 = 100;

/// Packets lost in a round below which its share says nothing: of 80 packets on a path that loses 5 %, as many are lost in one
/// round of fifty.
const TELLING_PACKETS: u64 = 8;

/// What is left of the window after congestion, in hundredths (RFC 8511 §3: 0.85 for whose queue was short).
const YIELD: u64 = 85;

/// How the bound that congestion set grows with each round that asked for more in vain, in roots of the packets that it
/// holds: a tenth of 900 packets, and a third of 80. Who has less gains more, and so two flows come to equal shares.
const RELENT_ROOTS: u64 = 3;

/// Rounds with a long round trip after which the queue is not ours: it stays although we drained.
const STANDING_ROUNDS: u32 = 4;

/// Probes in a row with a queue that is not ours, after which it is called a longer way: half a minute.
const CROWDED_PROBES: u32 = 6;

/// What the sender is doing. Rates are in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Doubles the rate each round. `best` so far, and rounds that did not grow.
    Startup { best: u64, flat: u32 },
    /// Drains what was queued. `rate` was believed before more was asked for.
    Down { rate: u64 },
    /// Fills the path, for so many rounds more.
    Cruise { left: u64 },
    /// Asks for more than `rate`.
    Up { rate: u64 },
    /// Looks for the shortest round trip, for so many rounds more; `rate` and `rtt` of the round before, the `lowest` so far.
    Probe { left: u64, rate: u64, rtt: Duration, lowest: Option<Duration> },
}

/// The model of one path, and the window that follows from it.
#[derive(Debug, Clone)]
pub struct RateModel {
    mtu: u64,
    /// What is promised: bytes that may be in flight.
    window: u64,
    phase: Phase,
    delivery: Delivery,
    /// The round of now.
    round: Round,
    /// The widest window of the round before: what is lost now was sent within it.
    window_before: u64,
    /// Highest rates of the last rounds, in bytes a second.
    rates: Recent<RATE_ROUNDS>,
    /// Most bytes by which acknowledgements ran ahead of the rate, of the last rounds.
    bunches: Recent<RATE_ROUNDS>,
    /// When the bunch of now began, and its bytes.
    bunch: Option<(Instant, u64)>,
    /// The shortest round trip, and when it was seen.
    shortest: Option<(Duration, Instant)>,
    /// What may be in flight after congestion.
    ceiling: Option<u64>,
    /// Thousandths that this path loses without a queue.
    usual_loss: u64,
    /// Rounds in a row with a long round trip.
    standing: u32,
    /// At so many probes in a row there was a queue that is not ours.
    crowded: u32,
    /// The shortest round trip before that.
    uncrowded: Option<Duration>,
    /// The latest round trip.
    last_rtt: Duration,
}

impl RateModel {
    /// Of a path of which nothing is known. Packets have at most `mtu` bytes.
    pub fn new(mtu: u16) -> Self {
        let mtu = u64::from(mtu);
        Self {
            mtu,
            window: initial_window(mtu),
            phase: Phase::Startup { best: 0, flat: 0 },
            delivery: Delivery::default(),
            round: Round::new(0),
            window_before: initial_window(mtu),
            rates: Recent::default(),
            bunches: Recent::default(),
            bunch: None,
            shortest: None,
            ceiling: None,
            usual_loss: 0,
            standing: 0,
            crowded: 0,
            uncrowded: None,
            last_rtt: Duration::ZERO,
        }
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// What a path of which nothing is known begins with (RFC 9002 §7.2).
    pub fn initial_window(&self) -> u64 {
        initial_window(self.mtu)
    }

    /// From now on packets may be so large.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu.into();
        self.window = self.window.max(self.floor());
    }

    /// Packets leave.
    pub fn handle_sent(&mut self, now: Instant) {
        self.delivery.sent(now);
    }

    /// A packet that left then arrived. A batch of these ends with [`Self::handle_end_of_acks`].
    pub fn handle_ack(&mut self, sent: Instant, bytes: u64) {
        self.delivery.acked(sent, bytes);
    }

    /// All that one acknowledgement acknowledged has been told; so many bytes are left in flight.
    /// `limited`: the sender had nothing more to send before.
    pub fn handle_end_of_acks(&mut self, now: Instant, in_flight: u64, limited: bool) {
        if limited || matches!(self.phase, Phase::Probe { .. }) {
            self.delivery.limit(in_flight);
        }
        let Some(sample) = self.delivery.end_batch(now, in_flight, HORIZON) else { return };
        self.last_rtt = sample.rtt;
        self.learn(now, sample);
        if sample.delivered_before >= self.round.end {
            self.end_round(now);
        }
        self.follow(sample.acked);
    }

    /// So many bytes were lost. `persistent`: nothing arrived for long (RFC 9002 §7.6).
    pub fn handle_loss(&mut self, bytes: u64, persistent: bool) {
        if persistent {
            let mtu = self.mtu;
            *self = Self { mtu, ..Self::new(u16::try_from(mtu).unwrap_or(u16::MAX)) };
            self.window = self.floor();
            return;
        }
        if self.rates.highest() == 0 {
            self.window = self.window.saturating_sub(bytes).max(self.floor());
        }
        // Tail drops are noticed by what came right behind them, through the full queue.
        let is_queued =
            self.shortest.is_some_and(|(shortest, _)| self.last_rtt > shortest + HORIZON.max(shortest / 32));
        let lost = if is_queued { &mut self.round.lost_in_queue } else { &mut self.round.lost_alone };
        *lost = lost.saturating_add(bytes);
    }

    /// The network marked packets instead of losing them (ECN).
    pub fn handle_mark(&mut self) {
        if !std::mem::replace(&mut self.round.is_marked, true) {
            self.give_way();
            self.window = self.window.min(self.ceiling.unwrap_or(u64::MAX));
        }
    }

    /// Learns what one batch of acknowledgements shows.
    fn learn(&mut self, now: Instant, sample: Sample) {
        self.round.add(sample);
        if self.shortest.is_none_or(|(shortest, _)| sample.rtt <= shortest) {
            self.shortest = Some((sample.rtt, now));
        }
        if let Phase::Probe { lowest, .. } = &mut self.phase {
            *lowest = Some(lowest.map_or(sample.rtt, |lowest| lowest.min(sample.rtt)));
        }
        self.learn_bunch(now, sample.acked);
        if !sample.limited || sample.rate > self.rates.highest() {
            self.rates.raise(sample.rate);
        }
    }

    /// Acknowledgements that come in bunches need a window that lasts from one to the next.
    fn learn_bunch(&mut self, now: Instant, acked: u64) {
        let rate = self.rates.highest();
        let (since, before) = self.bunch.unwrap_or((now, 0));
        let expected = amount(rate, now.saturating_duration_since(since));
        if before <= expected {
            self.bunch = Some((now, acked));
            self.bunches.raise(acked);
            return;
        }
        let all = before + acked;
        self.bunch = Some((since, all));
        self.bunches.raise(all.saturating_sub(expected).min(amount(rate, self.horizon())));
    }

    /// Judges a round that is over, and goes on to what comes next.
    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(self.delivery.total()));
        let is_long = self.is_long(round.lowest);
        let is_congested = self.is_congested(&round, is_long);
        if is_congested {
            self.give_way();
        }
        if !is_long && !round.is_limited {
            self.learn_loss(&round);
        }
        self.window_before = round.window;
        self.step(now, &round, is_long, is_congested || round.is_marked);
        if !round.is_limited {
            self.rates.advance();
            self.bunches.advance();
        }
    }

    /// What is lost while there is no queue of ours is what this path loses anyway.
    fn learn_loss(&mut self, round: &Round) {
        let weight = match self.phase {
            Phase::Startup { .. } => 4,
            Phase::Cruise { .. } => 8,
            Phase::Down { .. } | Phase::Up { .. } | Phase::Probe { .. } => return,
        };
        let learnt = ((weight - 1) * self.usual_loss + round.permille(round.lost())) / weight;
        self.usual_loss = learnt.min(HEAVY_PERMILLE);
    }

    /// Whether more was lost than is by chance. After heavy loss, what was believed of the rate before is forgotten.
    fn is_congested(&mut self, round: &Round, is_long: bool) -> bool {
        let beyond = |lost: u64| round.permille(lost).saturating_sub(self.usual_loss);
        let is_telling = round.lost() >= TELLING_PACKETS * self.mtu;
        let is_heavy = is_telling && beyond(round.lost()) > HEAVY_PERMILLE;
        // A window of one product leaves no queue behind: what is lost then is lost by chance, however round trips vary.
        let is_calm = matches!(self.phase, Phase::Cruise { .. }) && !is_long;
        let is_full = !is_calm && round.lost_in_queue > 2 * self.mtu && beyond(round.lost_in_queue) > FULL_PERMILLE;
        if is_heavy && !round.is_limited {
            self.rates.set(round.rate);
        }
        is_heavy || is_full
    }

    /// Bounds the window by less than what was in flight when it was too much.
    fn give_way(&mut self) {
        self.ceiling = Some((self.window_before * YIELD / 100).max(self.floor()));
    }

    fn step(&mut self, now: Instant, round: &Round, is_long: bool, is_congested: bool) {
        let rate = self.rates.highest();
        self.phase = match self.phase {
            Phase::Startup { best, .. } if !round.is_limited && rate * 100 >= best * GROWTH && !round.is_marked => {
                Phase::Startup { best: rate, flat: 0 }
            }
            Phase::Startup { best, .. } if round.is_limited && !round.is_marked => Phase::Startup { best, flat: 0 },
            Phase::Startup { best, flat } if flat + 1 < FLAT_ROUNDS && !is_long && !is_congested => {
                Phase::Startup { best, flat: flat + 1 }
            }
            Phase::Startup { .. } => Phase::Down { rate },
            Phase::Up { rate } => {
                if !is_congested {
                    self.relent();
                }
                Phase::Down { rate }
            }
            Phase::Down { rate: before }
                if rate * 100 >= before * FOUND_MORE && !is_long && !is_congested && !round.is_limited =>
            {
                Phase::Startup { best: rate, flat: 0 }
            }
            Phase::Down { .. } => Phase::Cruise { left: self.cruise_rounds() },
            Phase::Cruise { left } => self.cruise(now, round, left),
            Phase::Probe { left, rate, rtt, lowest } if left > 1 => Phase::Probe { left: left - 1, rate, rtt, lowest },
            Phase::Probe { rate, rtt, lowest, .. } => self.end_probe(now, rate, rtt, lowest),
        };
    }

    fn cruise_rounds(&self) -> u64 {
        let rounds = CRUISE_ROUNDS + self.delivery.total() / self.mtu % 4;
        if self.ceiling.is_some() { PATIENCE * rounds } else { rounds }
    }

    fn cruise(&mut self, now: Instant, round: &Round, left: u64) -> Phase {
        self.standing = if self.is_long(round.lowest) { self.standing + 1 } else { 0 };
        let Some((shortest, at)) = self.shortest else { return Phase::Cruise { left } };
        let is_due = now.saturating_duration_since(at) >= PROBE_INTERVAL && shortest > HORIZON;
        if is_due || self.standing >= STANDING_ROUNDS {
            self.standing = 0;
            let rate = if round.is_limited { u64::MAX } else { round.rate };
            return Phase::Probe { left: PROBE_ROUNDS, rate, rtt: round.lowest, lowest: None };
        }
        match left.checked_sub(1) {
            None | Some(0) => Phase::Up { rate: self.rates.highest() },
            Some(left) => Phase::Cruise { left },
        }
    }

    /// With half of the window, a path that became longer stays as long, and one that became slower gets shorter.
    fn end_probe(&mut self, now: Instant, rate: u64, rtt: Duration, lowest: Option<Duration>) -> Phase {
        let Some((known, _)) = self.shortest else { return Phase::Cruise { left: 1 } };
        let found = lowest.unwrap_or(known);
        if rate.saturating_mul(4) < self.rates.highest() * 3 && found < rtt * 3 / 4 {
            self.rates.set(rate);
        }
        let uncrowded = self.uncrowded.map_or(known, |uncrowded| uncrowded.min(known));
        self.crowded = if found > uncrowded + long(uncrowded) { self.crowded + 1 } else { 0 };
        let is_longer = self.crowded > CROWDED_PROBES;
        if is_longer {
            self.crowded = 0;
        }
        self.uncrowded = Some(if is_longer { found } else { uncrowded });
        self.shortest = Some((found, now));
        Phase::Cruise { left: 1 }
    }

    /// Widens that bound a little, until it bounds nothing.
    fn relent(&mut self) {
        let most = self.product() * STARTUP_GAIN / 100;
        let more = |ceiling: u64| ceiling + RELENT_ROOTS * (ceiling / self.mtu).isqrt() * self.mtu;
        self.ceiling = self.ceiling.map(more).filter(|ceiling| *ceiling < most);
    }

    /// Sets the window that the model asks for.
    fn follow(&mut self, acked: u64) {
        let product = self.product();
        let bunch = self.bunches.highest();
        let gained = |gain: u64| product * gain / 100;
        let wanted = match self.phase {
            Phase::Startup { .. } => {
                let most = (gained(STARTUP_GAIN) + bunch).max(self.initial_window());
                (self.window + acked).min(most).max(self.window.min(most))
            }
            Phase::Down { .. } => gained(DOWN_GAIN),
            Phase::Cruise { .. } if self.crowded > 0 => gained(CROWDED_GAIN) + bunch,
            Phase::Cruise { .. } => gained(CRUISE_GAIN) + bunch,
            Phase::Up { .. } if self.crowded > 0 => gained(CROWDED_GAIN * UP_GAIN / 100) + bunch,
            Phase::Up { .. } => gained(UP_GAIN) + bunch,
            Phase::Probe { .. } => gained(PROBE_GAIN),
        };
        self.window = wanted.min(self.ceiling.unwrap_or(u64::MAX)).max(self.floor());
        self.round.window = self.round.window.max(self.window);
    }

    /// What fills the path, in bytes.
    fn product(&self) -> u64 {
        amount(self.rates.highest(), self.horizon())
    }

    /// The time that the window lasts.
    fn horizon(&self) -> Duration {
        self.shortest.map_or(HORIZON, |(shortest, _)| shortest.max(HORIZON))
    }

    fn is_long(&self, rtt: Duration) -> bool {
        self.shortest.is_some_and(|(shortest, _)| rtt > shortest + long(shortest))
    }

    fn floor(&self) -> u64 {
        FLOOR_PACKETS * self.mtu
    }
}

/// How much longer than the shortest the shortest round trip of a round must be to tell of a queue (HyStart++, RFC 9406 §4.2, but
/// down to 1 ms).
fn long(shortest: Duration) -> Duration {
    (shortest / 8).clamp(HORIZON, Duration::from_millis(16))
}

fn initial_window(mtu: u64) -> u64 {
    (10 * mtu).min(14_720.max(2 * mtu))
}

/// What a rate in bytes a second makes in this time.
fn amount(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}
