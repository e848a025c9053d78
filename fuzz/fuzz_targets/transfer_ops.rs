//! A receiver and its source under any order of events, and journals from a disk that lies.
#![no_main]

use std::{collections::BTreeSet, time::Duration};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use peerfleet_fuzz::START;
use peerfleet_proto::{
    id::PeerId,
    limits::RANGE_BYTES,
    request::transfer::{FileInfo, RangeRequest},
    transfer::{Event, Fingerprint, Journal, LaneId, RangeSet, Receiver, Source, Verdict, span_of},
};

#[derive(Debug, Arbitrary)]
struct Input {
    ranges: u8,
    tail: u16,
    verified: Vec<u8>,
    journal: Vec<u8>,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Open { lane: u8 },
    Lose { lane: u8 },
    Ask { lane: u8 },
    Receive { lane: u8, index: u8, len: Option<u32>, damaged: bool },
    Whole { lane: u8 },
    Wait { milliseconds: u16 },
}

fuzz_target!(|input: Input| {
    let size = u64::from(input.ranges) * RANGE_BYTES + u64::from(input.tail);
    let fingerprint = fingerprint(size);
    let _ = Journal::decode(&input.journal, &fingerprint, size);

    let mut now = *START;
    let mut verified = RangeSet::new();
    for index in input.verified.into_iter().map(u64::from).filter(|index| span_of(size, *index).is_some()) {
        verified.insert(index);
    }
    let mut receiver = Receiver::new(size, verified, now);
    let mut source = Source::new(size);
    let mut accepted = BTreeSet::new();
    for step in input.steps.into_iter().take(256) {
        match step {
            Step::Open { lane } => receiver.lane_opened(LaneId(lane.into()), now),
            Step::Lose { lane } => receiver.lane_lost(LaneId(lane.into()), now),
            Step::Ask { lane } => {
                if let Some(request) = receiver.poll_request(LaneId(lane.into()), now) {
                    assert!(source.handle_request(request).is_ok(), "the source refuses an honest request");
                    source.handle_answered();
                    if let RangeRequest::Range(index) = request {
                        assert!(!accepted.contains(&index), "a verified range is asked for again");
                    }
                }
            }
            Step::Receive { lane, index, len, damaged } => {
                let index = u64::from(index);
                let right = span_of(size, index).map_or(0, |span| span.len);
                let actual = if damaged { [1; 32] } else { [0; 32] };
                let lane = LaneId(lane.into());
                // The driver asks before it takes the bytes, as here.
                if !receiver.expects(lane, index, len.unwrap_or(right)) {
                    continue;
                }
                assert_eq!(len.unwrap_or(right), right, "a range of another length is expected");
                if receiver.range_received(lane, index, &[0; 32], &actual, now) == Verdict::Accepted {
                    assert!(!damaged && accepted.insert(index));
                }
            }
            Step::Whole { lane } => receiver.sha256_received(LaneId(lane.into()), [5; 32], now),
            Step::Wait { milliseconds } => {
                now += Duration::from_millis(milliseconds.into());
                receiver.handle_timeout(now);
            }
        }
        while let Some(event) = receiver.poll_event() {
            if let Event::Complete { .. } = event {
                assert!(receiver.is_verified() && receiver.verified_bytes() == size);
            }
        }
    }
});

fn fingerprint(size: u64) -> Fingerprint {
    let file = FileInfo { name: b"file".to_vec(), size, mode: 0o644, mtime_s: 0, mtime_ns: 0 };
    Fingerprint::new(&PeerId::from_bytes([1; 32]), &file, b"/tmp/file")
}
