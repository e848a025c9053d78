//! What QUIC itself shows of a link's path: whether data is sent, and whether any of it is acknowledged.
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
}

/// The counters of one link, and what they were.
#[derive(Debug)]
pub(super) struct Evidence {
    connection: Connection,
    remote: Arc<Remote>,
    sent: u64,
    delivered: u64,
    read_at: Instant,
}

impl Evidence {
    /// From now on, for a link that is up.
    pub(super) fn new(connection: Connection, remote: Arc<Remote>, now: Instant) -> Self {
        let mut evidence = Self { connection, remote, sent: 0, delivered: 0, read_at: now };
        evidence.begin_anew(now);
        evidence
    }

    /// What was sent so far says nothing of the path that is taken now.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        let stats = self.connection.stats();
        self.remote.note_mtu(stats.path.current_mtu);
        self.sent = frames_of_data(&stats.frame_tx);
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
        let sent = frames_of_data(&stats.frame_tx);
        let delivered = self.remote.delivered.load(Ordering::Relaxed);
        let is_sent = std::mem::replace(&mut self.sent, sent) != sent;
        if std::mem::replace(&mut self.delivered, delivered) != delivered {
            return Some(Finding::Delivered);
        }
        is_sent.then_some(Finding::Sent)
    }
}

/// Frames sent that the other side acknowledges (RFC 9000 §13.2: all but ACK, PADDING and CONNECTION_CLOSE).
fn frames_of_data(sent: &FrameStats) -> u64 {
    [
        sent.stream,
        sent.datagram,
        sent.ping,
        sent.crypto,
        sent.max_data,
        sent.max_stream_data,
        sent.max_streams_bidi,
        sent.reset_stream,
        sent.stop_sending,
        sent.data_blocked,
        sent.stream_data_blocked,
        sent.streams_blocked_bidi,
        sent.new_connection_id,
        sent.retire_connection_id,
    ]
    .into_iter()
    .fold(0, u64::wrapping_add)
}
