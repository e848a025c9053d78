//! Congestion control on a simulated bottleneck, in virtual time: how much of a path is used, how little is queued and lost,
//! and who gets which share of it.
//!
//! Bounds are what is promised; what is measured, on stderr, is better.

#![expect(clippy::print_stderr, reason = "the figures are worth a look")]

#[path = "congestion/bottleneck.rs"]
mod bottleneck;
#[path = "congestion/cubic.rs"]
mod cubic;
#[path = "congestion/sender.rs"]
mod sender;

use std::time::Duration;

use bottleneck::{Path, Sum, World};
use cubic::Cubic;
use peerfleet_proto::congestion::RateModel;
use sender::Control;

/// QUIC's packets on most paths.
const PACKET: u16 = 1452;

/// Time in which a flow has found its rate.
const START: Duration = Duration::from_secs(2);

/// 200 Mbit/s, 50 ms there and back, a queue of as much as is on the way.
const USUAL: Path = path(200.0, 50.0, 1.0);

/// A path with a queue of so many bandwidth-delay products.
const fn path(megabit: f64, milliseconds: f64, products: f64) -> Path {
    Path {
        megabit,
        round_trip: Duration::from_micros((milliseconds * 1e3) as u64),
        queue: (megabit * 125.0 * milliseconds * products) as u64,
        loss_permille: 0,
        bunches: Duration::ZERO,
        jitter: Duration::ZERO,
        mark_above: None,
    }
}

fn ours(packet: u16) -> Box<dyn Control> {
    Box::new(RateModel::new(packet))
}

fn theirs() -> Box<dyn Control> {
    Box::new(Cubic::new(PACKET.into()))
}

/// What one flow of ours does on this path in so many seconds, after it has found its rate.
fn alone(path: Path, packet: u16, seconds: u64) -> Figures {
    let mut world = World::new(path, 7);
    world.add(ours(packet), packet.into());
    world.run(START);
    let time = Duration::from_secs(seconds);
    Figures::new(world.run(time)[0], path, time)
}

/// What became of one flow, in units of the path.
#[derive(Debug, Clone, Copy)]
struct Figures {
    /// Of the path's rate.
    share: f64,
    /// Hundredths that the full queue dropped.
    dropped_percent: f64,
    /// Mean time in the queue.
    waited: Duration,
}

impl Figures {
    fn new(sum: Sum, path: Path, time: Duration) -> Self {
        let figures = Self {
            share: sum.delivered as f64 * 8e-6 / time.as_secs_f64() / path.megabit,
            dropped_percent: sum.dropped as f64 * 100.0 / sum.sent.max(1) as f64,
            waited: sum.waited / u32::try_from(sum.packets.max(1)).expect("few packets"),
        };
        eprintln!("{figures:.3?} on {path:?}");
        figures
    }
}

/// What two flows get of a path, the second five seconds after the first, when both have had time.
fn two(path: Path, second: Box<dyn Control>) -> [f64; 2] {
    let mut world = World::new(path, 7);
    world.add(ours(PACKET), PACKET.into());
    world.run(Duration::from_secs(5));
    world.add(second, PACKET.into());
    world.run(Duration::from_secs(10));
    let time = Duration::from_secs(40);
    let sums = world.run(time);
    [0, 1].map(|flow| Figures::new(sums[flow], path, time).share)
}

/// What one flow does from `after` the path's change to another, and for a second.
fn changed(before: Path, to: Path, after: Duration) -> Figures {
    let mut world = World::new(before, 7);
    world.add(ours(PACKET), PACKET.into());
    world.run(Duration::from_secs(5));
    world.path = to;
    world.run(after);
    let time = Duration::from_secs(1);
    Figures::new(world.run(time)[0], to, time)
}

#[test]
fn random_loss_costs_little_of_the_rate() {
    for (loss_permille, share) in [(0, 0.95), (1, 0.95), (10, 0.94), (30, 0.9), (50, 0.88)] {
        let figures = alone(Path { loss_permille, ..USUAL }, PACKET, 10);
        assert!(figures.share >= share, "{loss_permille} in 1000: {figures:?}");
        assert!(figures.dropped_percent < 0.2, "{loss_permille} in 1000: {figures:?}");
    }
}

#[test]
fn chance_loss_is_not_taken_for_a_full_queue_where_round_trips_vary() {
    for (loss_permille, share) in [(0, 0.85), (10, 0.85), (50, 0.8)] {
        for milliseconds in [3, 10, 20] {
            let jitter = Duration::from_millis(milliseconds);
            let figures = alone(Path { loss_permille, jitter, ..USUAL }, PACKET, 10);
            assert!(figures.share >= share, "{loss_permille} in 1000, {jitter:?}: {figures:?}");
        }
    }
}

#[test]
fn loss_that_begins_in_the_middle_is_not_taken_for_a_full_queue() {
    let lossy = Path { loss_permille: 50, jitter: Duration::from_millis(5), ..USUAL };
    let figures = changed(USUAL, lossy, 2 * USUAL.round_trip);
    assert!(figures.share >= 0.75, "{figures:?}");
}

#[test]
fn the_simulated_cubic_collapses_as_the_real_one_does() {
    let mut world = World::new(Path { loss_permille: 10, ..USUAL }, 7);
    world.add(theirs(), PACKET.into());
    world.run(START);
    let time = Duration::from_secs(10);
    let share = Figures::new(world.run(time)[0], USUAL, time).share;
    assert!((0.005..0.03).contains(&share), "{share}");
}

#[test]
fn a_long_path_that_loses_a_twentieth_is_used() {
    let figures = alone(Path { loss_permille: 50, ..path(100.0, 200.0, 1.0) }, PACKET, 20);
    assert!(figures.share >= 0.8, "{figures:?}");
}

#[test]
fn a_queue_stays_short_however_long_it_could_be() {
    for products in [0.5, 1.0, 2.0, 5.0] {
        let figures = alone(path(200.0, 50.0, products), PACKET, 10);
        assert!(figures.waited < USUAL.round_trip / 10, "{figures:?}");
        assert!(figures.dropped_percent < 0.1, "{figures:?}");
    }
}

#[test]
fn a_short_queue_costs_less_than_a_hundredth_of_what_is_sent() {
    for (products, share) in [(0.05, 0.82), (0.1, 0.93), (0.22, 0.93)] {
        let figures = alone(path(200.0, 50.0, products), PACKET, 20);
        assert!(figures.dropped_percent < 1.0, "{figures:?}");
        assert!(figures.share >= share, "{figures:?}");
    }
}

#[test]
fn a_queue_that_marks_is_kept_below_the_mark() {
    let marking = Path { mark_above: Some(100_000), ..USUAL };
    let figures = alone(marking, PACKET, 10);
    assert!(figures.share >= 0.8, "{figures:?}");
    assert!(figures.waited < Duration::from_millis(4), "{figures:?}");
}

#[test]
fn two_flows_share_a_path() {
    for products in [0.1, 0.25, 0.5, 1.0, 2.0, 4.0] {
        let shares = two(path(50.0, 40.0, products), ours(PACKET));
        assert!(shares.iter().all(|share| *share >= 0.25), "{products}: {shares:?}");
        assert!(shares.iter().sum::<f64>() >= 0.88, "{products}: {shares:?}");
    }
}

#[test]
fn neither_we_nor_cubic_starve() {
    for (products, least) in [(0.1, 0.06), (0.25, 0.15), (0.5, 0.2), (1.0, 0.2), (2.0, 0.15), (4.0, 0.08)] {
        let shares = two(path(50.0, 40.0, products), theirs());
        assert!(shares.iter().all(|share| *share >= least), "{products}: {shares:?}");
    }
}

#[test]
fn a_path_that_becomes_slower_is_followed_within_forty_round_trips() {
    let slower = path(50.0, 50.0, 4.0);
    let figures = changed(USUAL, slower, 40 * USUAL.round_trip);
    assert!(figures.share >= 0.8 && figures.waited < USUAL.round_trip / 2, "{figures:?}");
    assert!(figures.dropped_percent < 1.0, "{figures:?}");
}

#[test]
fn a_path_that_becomes_faster_is_followed_within_sixteen_round_trips() {
    let figures = changed(USUAL, path(800.0, 50.0, 1.0), 16 * USUAL.round_trip);
    assert!(figures.share >= 0.85, "{figures:?}");
}

#[test]
fn a_way_that_becomes_longer_is_followed_within_sixteen_of_its_round_trips() {
    let longer = path(200.0, 200.0, 1.0);
    let figures = changed(USUAL, longer, 16 * longer.round_trip);
    assert!(figures.share >= 0.85, "{figures:?}");
}

#[test]
fn who_had_little_to_send_has_learnt_nothing_of_the_path() {
    let mut world = World::new(USUAL, 7);
    let flow = world.add(ours(PACKET), PACKET.into());
    world.run(Duration::from_secs(5));
    for _ in 0..250 {
        world.sender(flow).pending = Some(2 * u64::from(PACKET));
        world.run(Duration::from_millis(20));
    }
    world.sender(flow).pending = None;
    // One round trip passes before anything arrives.
    world.run(2 * USUAL.round_trip);
    let time = Duration::from_millis(500);
    let figures = Figures::new(world.run(time)[0], USUAL, time);
    assert!(figures.share >= 0.85, "{figures:?}");
}

#[test]
fn acknowledgements_that_come_in_bunches_do_not_hold_a_flow_up() {
    for milliseconds in [5, 15, 30] {
        let bunched = Path { bunches: Duration::from_millis(milliseconds), ..path(50.0, 10.0, 4.0) };
        let figures = alone(bunched, PACKET, 10);
        assert!(figures.share >= 0.6, "{milliseconds} ms: {figures:?}");
    }
}

#[test]
fn within_one_machine_large_packets_that_overflow_a_queue_now_and_then_are_no_bottleneck() {
    for (packet, megabit, milliseconds) in
        [(1452, 1000.0, 0.3), (6500, 4000.0, 0.1), (16_250, 4000.0, 0.2), (16_250, 4000.0, 1.5)]
    {
        let near = Path { queue: 1_000_000, loss_permille: 5, ..path(megabit, milliseconds, 0.0) };
        let figures = alone(near, packet, 2);
        assert!(figures.share >= 0.93, "{packet} bytes: {figures:?}");
        assert!(figures.dropped_percent < 1.0, "{packet} bytes: {figures:?}");
        assert!(figures.waited < Duration::from_millis(2), "{packet} bytes: {figures:?}");
    }
}

#[test]
fn slow_paths_are_used_with_packets_of_any_size() {
    for (packet, megabit, milliseconds) in [(1200, 10.0, 20.0), (1452, 1.0, 50.0), (16_250, 20.0, 20.0)] {
        let slow = Path { queue: 300_000, ..path(megabit, milliseconds, 0.0) };
        let figures = alone(slow, packet, 20);
        assert!(figures.share >= 0.75, "{packet} bytes: {figures:?}");
    }
}

#[test]
fn when_nothing_arrived_for_long_a_path_begins_anew_with_a_few_packets() {
    let mut model = RateModel::new(PACKET);
    let before = model.window();
    model.handle_loss(u64::from(PACKET), true);
    assert_eq!(model.window(), 4 * u64::from(PACKET));
    assert!(model.window() < before);
}

#[test]
fn what_arrives_late_after_a_new_beginning_says_nothing_of_the_rate() {
    let (packet, round_trip) = (u64::from(PACKET), Duration::from_millis(100));
    let mut model = RateModel::new(PACKET);
    let start = bottleneck::beginning() + round_trip;
    model.handle_sent(start - round_trip);
    model.handle_loss(packet, true);
    model.handle_sent(start);
    let mut now = start + Duration::from_micros(50);
    (0..4).for_each(|_| model.handle_ack(start - round_trip, packet));
    model.handle_end_of_acks(now, packet, false);
    let mut widest = model.window();
    // The path: 1 MB/s, 100 ms.
    for _ in 0..50 {
        now += Duration::from_millis(12);
        model.handle_sent(now);
        model.handle_ack(now.checked_sub(round_trip).expect("it began earlier"), 12_000);
        model.handle_end_of_acks(now, packet, false);
        widest = widest.max(model.window());
    }
    assert!(widest <= 400_000, "{widest}");
}
