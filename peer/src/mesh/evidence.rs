//! What QUIC itself shows of a link's path: whether data is sent, whether any of it is acknowledged, and whether data comes.
//!
//! In: a link's connection, and acknowledgements as congestion control counts them for the path of now. Out: a [`Finding`] for the
//! path machine. Packets that only acknowledge are no data: nobody acknowledges those.
//! Bounds: the counters are read every [`READ_EVERY`] at most, for which the connection is locked for a moment.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use quinn::{Connection, FrameStats};

use super::routes::Remote;

/// Least time between two readings: a third of what the path machine takes for suspicious.
const READ_EVERY: Duration = Duration::from_millis(80);

/// What a reading shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// Data was acknowledged that was sent on the path of now.
    Delivered,
    /// Data was sent, and none was acknowledged.
    Sent,
    /// Data came, whichever way.
    Heard,
}

/// The counters of one link, and what they were.
#[derive(Debug)]
pub(super) struct Evidence {
    connection: Connection,
    remote: Arc<Remote>,
    sent: u64,
    heard: u64,
    delivered: u64,
    read_at: Instant,
}

impl Evidence {
    /// From now on, for a link that is up.
    pub(super) fn new(connection: Connection, remote: Arc<Remote>, now: Instant) -> Self {
        let mut evidence = Self { connection, remote, sent: 0, heard: 0, delivered: 0, read_at: now };
        evidence.begin_anew(now);
        evidence
    }

    /// What was sent so far says nothing of the path that is taken now.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        let stats = self.connection.stats();
        self.remote.note_mtu(stats.path.current_mtu);
        self.sent = frames_of_data(&stats.frame_tx);
        self.heard = frames_of_data(&stats.frame_rx);
        self.delivered = self.remote.delivered.load(Ordering::Relaxed);
        self.read_at = now;
    }

    /// What happened since the last reading, unless that was a moment ago.
    pub(super) fn read(&mut self, now: Instant) -> Option<Finding> {
        if now.saturating_duration_since(self.read_at) < READ_EVERY {
            return None;
        }
        self.read_at = now;
        let stats = self.connection.stats();
        self.remote.note_mtu(stats.path.current_mtu);
        let (sent, heard) = (frames_of_data(&stats.frame_tx), frames_of_data(&stats.frame_rx));
        let delivered = self.remote.delivered.load(Ordering::Relaxed);
        let is_sent = std::mem::replace(&mut self.sent, sent) != sent;
        let is_heard = std::mem::replace(&mut self.heard, heard) != heard;
        if std::mem::replace(&mut self.delivered, delivered) != delivered {
            return Some(Finding::Delivered);
        }
        if is_sent { Some(Finding::Sent) } else { is_heard.then_some(Finding::Heard) }
    }
}

/// Frames that are acknowledged (RFC 9000 §13.2: all but ACK, PADDING and CONNECTION_CLOSE).
fn frames_of_data(frames: &FrameStats) -> u64 {
    [
        frames.stream,
        frames.datagram,
        frames.ping,
        frames.crypto,
        frames.max_data,
        frames.max_stream_data,
        frames.max_streams_bidi,
        frames.reset_stream,
        frames.stop_sending,
        frames.data_blocked,
        frames.stream_data_blocked,
        frames.streams_blocked_bidi,
        frames.new_connection_id,
        frames.retire_connection_id,
    ]
    .into_iter()
    .fold(0, u64::wrapping_add)
}
