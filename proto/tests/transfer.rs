//! The receiving side of a transfer in virtual time, with lanes that break, ranges that arrive damaged, and receivers
//! that are killed at any moment.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::PeerId,
    limits::RANGE_BYTES,
    request::transfer::{FileInfo, RangeRequest},
    transfer::{
        Event, Fingerprint, GIVE_UP_AFTER, HEADER_BYTES, Journal, JournalFault, LANE_STALLS_AFTER, LANES, LaneId,
        MAX_ASKED, MAX_CORRUPT, RECORD_BYTES, RangeSet, ReceiveFault, Receiver, Source, Verdict, Wanted, is_plausible,
        range_count, span_of,
    },
};
use proptest::prelude::*;

const MIB: u64 = 1024 * 1024;
const WHOLE: [u8; 32] = [0x5A; 32];

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arrives_whole_in_any_order_over_lanes_that_break(seed: u64, size in 0..40 * MIB) {
        let mut world = World::new(seed, size);
        world.trouble = Trouble { lane_breaks: 10, opening_fails: 20, damage: 3 };
        prop_assert_eq!(world.attempt(None), Ended::Complete);
        prop_assert!(world.disk_is_whole());
    }

    #[test]
    fn a_kill_at_any_moment_costs_less_than_five_percent(seed: u64, kill_at in 0..600_usize) {
        let mut world = World::new(seed, 256 * MIB);
        let first = world.attempt(Some(kill_at));
        if first == Ended::Killed {
            prop_assert_eq!(world.attempt(None), Ended::Complete);
        }
        prop_assert!(world.disk_is_whole());
        let again = (world.asked - range_count(256 * MIB)) * RANGE_BYTES;
        prop_assert!(again * 20 < 256 * MIB, "{again} bytes were asked for again");
    }

    #[test]
    fn kills_lost_writes_and_torn_journals_never_make_a_wrong_file(seed: u64, kills in 1..8_usize) {
        let mut world = World::new(seed, 24 * MIB + 5);
        world.trouble = Trouble { lane_breaks: 5, opening_fails: 5, damage: 1 };
        for _ in 0..kills {
            let kill_at = world.below(60);
            if world.attempt(Some(kill_at)) != Ended::Killed {
                break;
            }
            world.lose_writes();
        }
        prop_assert_eq!(world.attempt(None), Ended::Complete);
        prop_assert!(world.disk_is_whole());
    }

    #[test]
    fn a_journal_cut_or_changed_anywhere_says_only_what_was_recorded(
        count in 0..20_u64,
        cut in 0..1200_usize,
        flip in 0..1200_usize,
    ) {
        let fingerprint = fingerprint(20 * MIB);
        let mut bytes = Journal::header(&fingerprint).to_vec();
        for index in 0..count {
            bytes.extend(Journal::record(index, &hash_of(index)));
        }
        bytes.truncate(cut);
        if let Some(byte) = bytes.get_mut(flip) {
            *byte ^= 0x10;
        }
        let Ok(journal) = Journal::decode(&bytes, &fingerprint, 20 * MIB) else { return Ok(()) };
        prop_assert!(journal.intact_bytes <= bytes.len());
        prop_assert_eq!((journal.intact_bytes - HEADER_BYTES) / RECORD_BYTES, journal.ranges.len());
        for (index, hash) in journal.ranges {
            prop_assert!(index < count && hash == hash_of(index));
        }
    }

    #[test]
    fn random_bytes_are_no_journal(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(Journal::decode(&bytes, &fingerprint(MIB), MIB), Err(JournalFault::Unreadable));
    }

    #[test]
    fn a_range_set_agrees_with_a_plain_set(indexes in prop::collection::vec(0..60_u64, 0..80), from in 0..60_u64) {
        let set: RangeSet = indexes.iter().copied().collect();
        let plain: std::collections::BTreeSet<u64> = indexes.into_iter().collect();
        prop_assert_eq!(set.count(), plain.len() as u64);
        prop_assert!(set.iter().eq(plain.iter().copied()));
        prop_assert!((0..60).all(|index| set.contains(index) == plain.contains(&index)));
        prop_assert_eq!(Some(set.first_missing(from)), (from..).find(|index| !plain.contains(index)));
    }

    #[test]
    fn operations_in_any_order_never_panic(
        size in prop_oneof![0..10 * MIB, Just(u64::MAX)],
        operations in prop::collection::vec((0..6_u8, 0..6_u32, 0..12_u64, any::<bool>()), 0..200),
    ) {
        let mut now = virtual_start();
        let mut receiver = Receiver::new(size, RangeSet::new(), now);
        for (operation, lane, index, good) in operations {
            let lane = LaneId(lane);
            match operation {
                0 => receiver.lane_opened(lane, now),
                1 => receiver.lane_lost(lane, now),
                2 => drop(receiver.poll_request(lane, now)),
                3 => drop(receiver.range_received(lane, index, &[0; 32], &[u8::from(!good); 32], now)),
                4 => receiver.sha256_received(lane, WHOLE, now),
                _ => {
                    now += Duration::from_secs(index);
                    receiver.handle_timeout(now);
                }
            }
            while receiver.poll_event().is_some() {}
            prop_assert!(receiver.verified_bytes() <= size);
        }
    }
}

#[test]
fn an_empty_file_needs_one_lane_and_its_hash() {
    let mut world = World::new(1, 0);
    assert_eq!(world.attempt(None), Ended::Complete);
    assert_eq!((world.opened, world.asked), (1, 0));
}

#[test]
fn a_complete_partial_file_asks_for_no_range() {
    let mut world = World::new(1, 10 * MIB);
    assert_eq!(world.attempt(None), Ended::Complete);
    world.asked = 0;
    assert_eq!(world.attempt(None), Ended::Complete);
    assert_eq!(world.asked, 0);
}

#[test]
fn a_range_damaged_again_and_again_fails_the_transfer() {
    let now = virtual_start();
    let mut receiver = Receiver::new(MIB, RangeSet::new(), now);
    let lane = open_one(&mut receiver, now);
    for _ in 0..MAX_CORRUPT {
        assert_eq!(receiver.poll_request(lane, now), Some(RangeRequest::Range(0)));
        assert_eq!(receiver.range_received(lane, 0, &[1; 32], &[2; 32], now), Verdict::Corrupt);
    }
    assert_eq!(receiver.poll_event(), Some(Event::Failed(ReceiveFault::Corrupt(0))));
    assert_eq!(receiver.poll_request(lane, now), None);
}

#[test]
fn a_lane_asks_for_two_ranges_and_for_more_only_in_a_large_file() {
    let now = virtual_start();
    for (size, most) in [(256 * MIB, 2), (4096 * MIB, 8)] {
        let mut receiver = Receiver::new(size, RangeSet::new(), now);
        let lane = open_one(&mut receiver, now);
        let mut asked = VecDeque::new();
        for _ in 0..100 {
            while let Some(RangeRequest::Range(index)) = receiver.poll_request(lane, now) {
                asked.push_back(index);
            }
            let oldest = asked.pop_front().expect("something is always asked for");
            assert_eq!(receiver.range_received(lane, oldest, &WHOLE, &WHOLE, now), Verdict::Accepted);
        }
        assert_eq!(asked.len() + 1, most);
    }
}

#[test]
fn a_silent_lane_is_closed_and_its_ranges_go_to_another() {
    let start = virtual_start();
    let mut receiver = Receiver::new(100 * MIB, RangeSet::new(), start);
    let silent = open_one(&mut receiver, start);
    let lively = open_one(&mut receiver, start);
    while receiver.poll_event().is_some() {}
    assert_eq!(receiver.poll_request(silent, start), Some(RangeRequest::Range(0)));
    let later = start + LANE_STALLS_AFTER;
    receiver.moved(lively, later);
    assert!(receiver.poll_timeout().is_some_and(|at| at <= later));
    receiver.handle_timeout(later);
    assert_eq!(receiver.poll_event(), Some(Event::CloseLane(silent)));
    assert_eq!(receiver.poll_request(lively, later), Some(RangeRequest::Range(0)));
}

#[test]
fn gives_up_when_nothing_moved_for_long() {
    let start = virtual_start();
    let mut receiver = Receiver::new(MIB, RangeSet::new(), start);
    let mut now = start;
    let fault = loop {
        match receiver.poll_event() {
            Some(Event::OpenLane(lane)) => receiver.lane_lost(lane, now),
            Some(Event::Failed(fault)) => break fault,
            Some(Event::CloseLane(_) | Event::Complete { .. }) => panic!("nothing was ever open"),
            None => {
                now = receiver.poll_timeout().expect("it waits for something").max(now);
                receiver.handle_timeout(now);
            }
        }
    };
    assert_eq!(fault, ReceiveFault::Silent);
    assert_eq!(now - start, GIVE_UP_AFTER);
    assert_eq!(receiver.poll_timeout(), None);
}

#[test]
fn a_range_that_nobody_asked_for_closes_its_lane() {
    let now = virtual_start();
    let mut receiver = Receiver::new(10 * MIB, RangeSet::new(), now);
    let lane = open_one(&mut receiver, now);
    while receiver.poll_event().is_some() {}
    assert!(!receiver.expects(lane, 5, 1));
    assert_eq!(receiver.range_received(lane, 5, &WHOLE, &WHOLE, now), Verdict::Unasked);
    assert_eq!(receiver.poll_event(), Some(Event::CloseLane(lane)));
}

#[test]
fn a_source_serves_only_ranges_that_exist_and_a_bounded_number_at_a_time() {
    let mut source = Source::new(2 * MIB + 1);
    let last = span_of(2 * MIB + 1, 2).expect("the last range exists");
    assert_eq!((last.offset, last.len), (2 * MIB, 1));
    assert_eq!(source.handle_request(RangeRequest::Range(2)), Ok(Wanted::Range { index: 2, span: last }));
    assert!(source.handle_request(RangeRequest::Range(3)).is_err());
    assert!(source.handle_request(RangeRequest::Range(u64::MAX)).is_err());
    for _ in 1..MAX_ASKED {
        assert!(source.handle_request(RangeRequest::Sha256).is_ok());
    }
    assert!(source.handle_request(RangeRequest::Sha256).is_err());
    source.handle_answered();
    assert!(source.handle_request(RangeRequest::Sha256).is_ok());
}

#[test]
fn names_that_could_leave_the_folder_are_not_plausible() {
    let named = |name: &[u8]| FileInfo { name: name.to_vec(), ..file(1) };
    for bad in [b"".as_slice(), b".", b"..", b"a/b", b"/etc/passwd", b"a\0b"] {
        assert!(!is_plausible(&named(bad)), "{bad:?}");
    }
    for good in [b"...".as_slice(), b"a\nb", b"\xFF\xFE", b"..a"] {
        assert!(is_plausible(&named(good)), "{good:?}");
    }
    assert!(!is_plausible(&FileInfo { size: u64::MAX, ..file(1) }));
    assert!(!is_plausible(&FileInfo { mode: 0o10000, ..file(1) }));
}

#[test]
fn a_journal_of_a_changed_file_is_of_another_transfer() {
    let bytes = Journal::header(&fingerprint(MIB));
    assert_eq!(Journal::decode(&bytes, &fingerprint(2 * MIB), 2 * MIB), Err(JournalFault::OtherTransfer));
}

#[expect(clippy::disallowed_methods, reason = "virtual time needs one instant to start from")]
fn virtual_start() -> Instant {
    Instant::now()
}

fn open_one(receiver: &mut Receiver, now: Instant) -> LaneId {
    loop {
        if let Some(Event::OpenLane(lane)) = receiver.poll_event() {
            receiver.lane_opened(lane, now);
            return lane;
        }
    }
}

fn hash_of(index: u64) -> [u8; 32] {
    *blake3::hash(&index.to_le_bytes()).as_bytes()
}

fn file(size: u64) -> FileInfo {
    FileInfo { name: b"file".to_vec(), size, mode: 0o644, mtime_s: 1, mtime_ns: 2 }
}

fn fingerprint(size: u64) -> Fingerprint {
    Fingerprint::new(&PeerId::from_bytes([7; 32]), &file(size), b"/tmp/file")
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Complete,
    Failed(ReceiveFault),
    Killed,
}

/// How often something goes wrong, in percent.
#[derive(Clone, Copy, Default)]
struct Trouble {
    lane_breaks: usize,
    opening_fails: usize,
    damage: usize,
}

/// A disk, a source and lanes that deliver after random delays.
struct World {
    seed: u64,
    size: u64,
    now: Instant,
    disk: BTreeMap<u64, [u8; 32]>,
    journal: Vec<u8>,
    asked: u64,
    opened: usize,
    trouble: Trouble,
    damaged: BTreeMap<u64, u8>,
    lanes: BTreeMap<LaneId, VecDeque<(Instant, Reply)>>,
}

#[derive(Clone, Copy)]
enum Reply {
    Opened,
    Range(u64),
    Whole,
    Broken,
}

impl World {
    fn new(seed: u64, size: u64) -> Self {
        let journal = Journal::header(&fingerprint(size)).to_vec();
        let (now, trouble) = (virtual_start(), Trouble::default());
        let (disk, damaged, lanes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { seed, size, now, disk, journal, asked: 0, opened: 0, trouble, damaged, lanes }
    }

    fn attempt(&mut self, kill_at: Option<usize>) -> Ended {
        let journal =
            Journal::decode(&self.journal, &fingerprint(self.size), self.size).expect("the header was written");
        self.journal.truncate(journal.intact_bytes);
        let stands = |(index, hash): &(u64, [u8; 32])| self.disk.get(index) == Some(hash);
        let verified = journal.ranges.into_iter().filter(stands).map(|(index, _)| index).collect();
        let mut receiver = Receiver::new(self.size, verified, self.now);
        self.lanes.clear();
        for step in 0.. {
            if kill_at == Some(step) {
                let torn = self.below(RECORD_BYTES);
                self.journal.extend(&Journal::record(0, &hash_of(1))[..torn]);
                return Ended::Killed;
            }
            if let Some(ended) = self.drain(&mut receiver) {
                return ended;
            }
            self.advance(&mut receiver);
        }
        unreachable!("the loop ends by returning")
    }

    fn drain(&mut self, receiver: &mut Receiver) -> Option<Ended> {
        while let Some(event) = receiver.poll_event() {
            match event {
                Event::OpenLane(lane) => {
                    self.opened += 1;
                    let reply = if self.chance(self.trouble.opening_fails) { Reply::Broken } else { Reply::Opened };
                    self.lanes.insert(lane, VecDeque::new());
                    self.schedule(lane, reply);
                }
                Event::CloseLane(lane) => drop(self.lanes.remove(&lane)),
                Event::Complete { sha256 } => {
                    assert_eq!(sha256, WHOLE);
                    return Some(Ended::Complete);
                }
                Event::Failed(fault) => return Some(Ended::Failed(fault)),
            }
        }
        let lanes: Vec<LaneId> = self.lanes.keys().copied().collect();
        assert!(lanes.len() <= LANES);
        for lane in lanes {
            while let Some(request) = receiver.poll_request(lane, self.now) {
                let reply = match request {
                    RangeRequest::Range(index) => {
                        self.asked += 1;
                        Reply::Range(index)
                    }
                    RangeRequest::Sha256 => Reply::Whole,
                };
                let broken = self.chance(self.trouble.lane_breaks);
                self.schedule(lane, if broken { Reply::Broken } else { reply });
            }
        }
        None
    }

    fn advance(&mut self, receiver: &mut Receiver) {
        let next = self.lanes.iter().filter_map(|(lane, replies)| Some((replies.front()?.0, *lane))).min();
        let wake = receiver.poll_timeout().expect("an unfinished transfer waits for something");
        match next {
            Some((at, lane)) if at <= wake => {
                self.now = self.now.max(at);
                let (_, reply) = self.lanes.get_mut(&lane).and_then(VecDeque::pop_front).expect("it was just seen");
                self.deliver(receiver, lane, reply);
            }
            Some(_) | None => {
                self.now = self.now.max(wake);
                receiver.handle_timeout(self.now);
            }
        }
    }

    fn deliver(&mut self, receiver: &mut Receiver, lane: LaneId, reply: Reply) {
        match reply {
            Reply::Opened => receiver.lane_opened(lane, self.now),
            Reply::Broken => {
                self.lanes.remove(&lane);
                receiver.lane_lost(lane, self.now);
            }
            Reply::Whole => receiver.sha256_received(lane, WHOLE, self.now),
            Reply::Range(index) => {
                let claimed = hash_of(index);
                let actual = if self.damages(index) { [0; 32] } else { claimed };
                let len = span_of(self.size, index).expect("only ranges that exist are asked for").len;
                assert!(receiver.expects(lane, index, len));
                if claimed == actual {
                    self.disk.insert(index, actual);
                    self.journal.extend(Journal::record(index, &actual));
                }
                let verdict = receiver.range_received(lane, index, &claimed, &actual, self.now);
                assert_eq!(verdict == Verdict::Accepted, claimed == actual);
            }
        }
    }

    fn schedule(&mut self, lane: LaneId, reply: Reply) {
        let delay = Duration::from_millis(self.below(50) as u64);
        let replies = self.lanes.get_mut(&lane).expect("the lane is there");
        let after = replies.back().map_or(self.now, |(at, _)| *at);
        replies.push_back((after + delay, reply));
    }

    /// The power failed: some writes never reached the disk, though the journal kept their records.
    fn lose_writes(&mut self) {
        let lost: Vec<u64> = self.disk.keys().copied().filter(|index| index % 7 == self.seed % 7).collect();
        for index in lost {
            self.disk.insert(index, [0; 32]);
        }
    }

    fn disk_is_whole(&self) -> bool {
        (0..range_count(self.size)).all(|index| self.disk.get(&index) == Some(&hash_of(index)))
    }

    /// Never so often that the transfer fails.
    fn damages(&mut self, index: u64) -> bool {
        let damage = self.chance(self.trouble.damage) && self.damaged.get(&index) < Some(&(MAX_CORRUPT - 1));
        *self.damaged.entry(index).or_default() += u8::from(damage);
        damage
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// SplitMix64.
    fn below(&mut self, bound: usize) -> usize {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).expect("bounds are small")
    }
}
