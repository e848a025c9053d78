//! Moving one file: which ranges to ask for on which lane, and when the whole has arrived.
//!
//! In: lanes (pulling streams) that opened or broke, verified ranges, moved bytes, `now`. Out: what to ask for on each
//! lane, events that ask for lanes to be opened or closed, and the end. It never touches a file, a hash or a stream:
//! the driver hashes, writes and records, and says what came of it.
//!
//! Opening → Ranges (a lane opened) → Whole (every range is verified: ask for SHA-256) → Complete, or Failed from any.
//! Losing every lane is no failure: they are opened again, more and more slowly, until nothing moved for
//! [`GIVE_UP_AFTER`].
//!
//! Bounds: [`MAX_LANES`]; ranges asked for, see [`Receiver::new`]; [`MAX_CORRUPT`] bad copies of one range.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use crate::{
    limits::RANGE_BYTES,
    request::transfer::{FileInfo, RangeRequest},
};

mod journal;
mod plan;
mod ranges;
mod source;

pub use journal::{Fingerprint, HEADER_BYTES, Journal, JournalFault, RECORD_BYTES};
use plan::lanes_for;
pub use plan::{LANES, MAX_LANES, Span, range_count, span_of};
pub use ranges::RangeSet;
pub use source::{MAX_ASKED, Source, Wanted};

/// Bad copies of one range after which the transfer fails: the first may be a flaw on the way, the third is a flaw in
/// the source's memory or disk, and asking on would never end.
pub const MAX_CORRUPT: u8 = 3;

/// Silence of one lane that was asked for something, after which it is closed and its ranges asked for elsewhere.
/// Longer than a path takes to be replaced, and than a link without one takes to be given up.
pub const LANE_STALLS_AFTER: Duration = Duration::from_secs(45);

/// Time in which nothing moved on any lane, after which the transfer fails; what is verified stays for the next try.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(90);

/// First pause before a lost lane is opened again.
pub const REOPEN_MIN: Duration = Duration::from_millis(100);

/// Longest pause before a lost lane is opened again.
pub const REOPEN_MAX: Duration = Duration::from_secs(5);

/// One pulling stream of a transfer; a stream opened in place of a lost one is another lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(pub u32);

/// What the driver must do, or what came of it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Open a stream to the source, then say `lane_opened` or `lane_lost`.
    OpenLane(LaneId),
    /// Close this stream: it is of no more use. Nothing need be said back.
    CloseLane(LaneId),
    /// Every range is verified and the source said this of the whole.
    Complete {
        /// SHA-256 of the whole file, by the source.
        sha256: [u8; 32],
    },
    /// It cannot go on.
    Failed(ReceiveFault),
}

/// Why a transfer cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveFault {
    /// One range came [`MAX_CORRUPT`] times with bytes that do not have the hash that came along.
    #[error("range {0} arrived damaged again and again")]
    Corrupt(u64),
    /// Nothing moved for [`GIVE_UP_AFTER`].
    #[error("the source gave nothing for {} s", GIVE_UP_AFTER.as_secs())]
    Silent,
}

/// What a range that arrived is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Verified, and counted.
    Accepted,
    /// Not what its hash says; it will be asked for again.
    Corrupt,
    /// Never asked for on this lane, or of the wrong length: the lane is being closed.
    Unasked,
}

/// The receiving side of one transfer.
///
/// Call order: after each call drain [`Receiver::poll_event`], then [`Receiver::poll_request`] of every open lane, and
/// sleep until [`Receiver::poll_timeout`].
#[derive(Debug)]
pub struct Receiver {
    size: u64,
    verified: RangeSet,
    returned: BTreeSet<u64>,
    cursor: u64,
    corrupt: BTreeMap<u64, u8>,
    lanes: BTreeMap<LaneId, Lane>,
    lanes_wanted: usize,
    next_lane: u32,
    losses: u32,
    reopen_at: Option<Instant>,
    depth_limit: usize,
    last_moved: Instant,
    end: Option<End>,
    events: VecDeque<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Failed,
}

#[derive(Debug)]
struct Lane {
    open: bool,
    asked: BTreeSet<u64>,
    asked_whole: bool,
    depth: usize,
    last_moved: Instant,
}

impl Receiver {
    /// A transfer of a file of `size` bytes of which these ranges stand verified already.
    ///
    /// Each lane starts with two ranges asked for and gains one with each that is verified, as long as all lanes
    /// together ask for no more than 4 % of the file: what a killed receiver must ask for again.
    pub fn new(size: u64, verified: RangeSet, now: Instant) -> Self {
        let lanes_wanted = lanes_for(size, &verified);
        let mut receiver = Self {
            size,
            verified,
            returned: BTreeSet::new(),
            cursor: 0,
            corrupt: BTreeMap::new(),
            lanes: BTreeMap::new(),
            lanes_wanted,
            next_lane: 0,
            losses: 0,
            reopen_at: None,
            depth_limit: plan::depth_limit(size),
            last_moved: now,
            end: None,
            events: VecDeque::new(),
        };
        receiver.want_lanes(now);
        receiver
    }

    /// The stream of this lane is open.
    pub fn lane_opened(&mut self, lane: LaneId, now: Instant) {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.open = true;
            lane.last_moved = now;
        }
    }

    /// The stream of this lane broke or could not be opened: what was asked on it will be asked on another.
    pub fn lane_lost(&mut self, lane: LaneId, now: Instant) {
        let Some(lost) = self.lanes.remove(&lane) else { return };
        self.returned.extend(lost.asked);
        if self.end.is_some() {
            return;
        }
        if self.reopen_at.is_none() {
            let pause = REOPEN_MIN.saturating_mul(1 << self.losses.min(10)).min(REOPEN_MAX);
            self.losses = self.losses.saturating_add(1);
            self.reopen_at = Some(now + pause);
        }
    }

    /// What to ask for on this lane now; ask again until `None`.
    pub fn poll_request(&mut self, lane: LaneId, now: Instant) -> Option<RangeRequest> {
        let whole_asked = self.lanes.values().any(|lane| lane.asked_whole);
        let state = self.lanes.get(&lane)?;
        if self.end.is_some() || !state.open || state.asked.len() >= state.depth {
            return None;
        }
        let idle = state.asked.is_empty();
        let request = if self.is_verified() {
            (!whole_asked).then_some(RangeRequest::Sha256)?
        } else {
            RangeRequest::Range(self.next_range()?)
        };
        let state = self.lanes.get_mut(&lane)?;
        match request {
            RangeRequest::Range(index) => {
                state.asked.insert(index);
            }
            RangeRequest::Sha256 => state.asked_whole = true,
        }
        if idle {
            state.last_moved = now;
        }
        Some(request)
    }

    /// Bytes, or a sign of life, came on this lane, or its driver was busy with what had come.
    pub fn moved(&mut self, lane: LaneId, now: Instant) {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.last_moved = now;
            self.last_moved = now;
        }
    }

    /// Whether the head of a range that comes on this lane is one that was asked for there, with this many bytes.
    pub fn expects(&self, lane: LaneId, index: u64, len: u32) -> bool {
        let asked = self.lanes.get(&lane).is_some_and(|lane| lane.asked.contains(&index));
        asked && span_of(self.size, index).is_some_and(|span| span.len == len)
    }

    /// A whole range arrived: `claimed` is the hash that came along, `actual` that of the bytes. When this says
    /// [`Verdict::Accepted`] the bytes must stand where a resumed transfer will find them.
    pub fn range_received(
        &mut self,
        lane: LaneId,
        index: u64,
        claimed: &[u8; 32],
        actual: &[u8; 32],
        now: Instant,
    ) -> Verdict {
        self.moved(lane, now);
        let Some(state) = self.lanes.get_mut(&lane) else { return self.late(index, claimed == actual) };
        if !state.asked.remove(&index) {
            self.close(lane, now);
            return Verdict::Unasked;
        }
        if claimed != actual {
            self.returned.insert(index);
            let bad = self.corrupt.entry(index).or_default();
            *bad += 1;
            if *bad >= MAX_CORRUPT {
                self.fail(ReceiveFault::Corrupt(index));
            }
            return Verdict::Corrupt;
        }
        state.depth = (state.depth + 1).min(self.depth_limit);
        self.losses = 0;
        self.verified.insert(index);
        Verdict::Accepted
    }

    /// The source said what the SHA-256 of the whole is.
    pub fn sha256_received(&mut self, lane: LaneId, sha256: [u8; 32], now: Instant) {
        self.moved(lane, now);
        let asked = self.lanes.get(&lane).is_some_and(|lane| lane.asked_whole);
        if !asked {
            self.close(lane, now);
        } else if self.end.is_none() {
            self.end = Some(End::Complete);
            self.events.push_back(Event::Complete { sha256 });
        }
    }

    /// Closes every open lane, to be opened again: the path is not the one that was wished for.
    pub fn close_open(&mut self, now: Instant) {
        let lanes: Vec<LaneId> = self.lanes.iter().filter(|(_, lane)| lane.open).map(|(id, _)| *id).collect();
        for lane in lanes {
            self.close(lane, now);
        }
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Receiver::handle_timeout`] wants to be called; a moment in the past means at once.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.end.is_some() {
            return None;
        }
        let stalls = self.lanes.values().filter(|lane| lane.waits()).map(|lane| lane.last_moved + LANE_STALLS_AFTER);
        stalls.chain(self.reopen_at).chain([self.last_moved + GIVE_UP_AFTER]).min()
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.end.is_some() {
            return;
        }
        if now >= self.last_moved + GIVE_UP_AFTER {
            self.fail(ReceiveFault::Silent);
            return;
        }
        let stalled = |lane: &Lane| lane.waits() && now >= lane.last_moved + LANE_STALLS_AFTER;
        let lanes: Vec<LaneId> = self.lanes.iter().filter(|(_, lane)| stalled(lane)).map(|(id, _)| *id).collect();
        for lane in lanes {
            self.close(lane, now);
        }
        if self.reopen_at.is_some_and(|at| now >= at) {
            self.reopen_at = None;
            self.want_lanes(now);
        }
    }

    /// Bytes verified so far, those of an earlier try included.
    pub fn verified_bytes(&self) -> u64 {
        plan::bytes_in(self.size, &self.verified)
    }

    /// Whether every range is verified; the whole may still have to be compared.
    pub fn is_verified(&self) -> bool {
        self.verified.count() == range_count(self.size)
    }

    fn late(&mut self, index: u64, intact: bool) -> Verdict {
        if !intact || index >= range_count(self.size) {
            return Verdict::Unasked;
        }
        self.returned.remove(&index);
        self.verified.insert(index);
        Verdict::Accepted
    }

    fn next_range(&mut self) -> Option<u64> {
        while let Some(index) = self.returned.pop_first() {
            if !self.verified.contains(index) {
                return Some(index);
            }
        }
        let index = self.verified.first_missing(self.cursor);
        if index >= range_count(self.size) {
            return None;
        }
        self.cursor = index + 1;
        Some(index)
    }

    fn want_lanes(&mut self, now: Instant) {
        while self.lanes.len() < self.lanes_wanted {
            let id = LaneId(self.next_lane);
            self.next_lane += 1;
            self.lanes.insert(id, Lane::new(now));
            self.events.push_back(Event::OpenLane(id));
        }
    }

    fn close(&mut self, lane: LaneId, now: Instant) {
        self.events.push_back(Event::CloseLane(lane));
        self.lane_lost(lane, now);
    }

    fn fail(&mut self, fault: ReceiveFault) {
        if self.end.is_none() {
            self.end = Some(End::Failed);
            self.events.push_back(Event::Failed(fault));
        }
    }
}

impl Lane {
    fn new(now: Instant) -> Self {
        Self { open: false, asked: BTreeSet::new(), asked_whole: false, depth: plan::FIRST_DEPTH, last_moved: now }
    }

    /// Whether the other side owes something: an open stream, a range, the hash of the whole.
    fn waits(&self) -> bool {
        !self.open || !self.asked.is_empty() || self.asked_whole
    }
}

/// Whether a file's description can be true: what is checked before a byte of it is asked for.
pub fn is_plausible(file: &FileInfo) -> bool {
    let plain_name = !matches!(file.name.as_slice(), b"" | b"." | b"..");
    let clean = !file.name.iter().any(|byte| matches!(byte, 0 | b'/'));
    plain_name && clean && file.size <= i64::MAX as u64 && file.mtime_ns < 1_000_000_000 && file.mode <= 0o7777
}

/// Bytes of the longest range.
pub const fn range_bytes() -> usize {
    RANGE_BYTES as usize
}
