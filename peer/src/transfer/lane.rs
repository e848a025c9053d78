//! One lane of a receiver: asks for ranges, reads them whole, and hands them to the disk.
//!
//! In: what to ask for. Out: [`Report`]s to the receiver's loop. A range's bytes go from the stream into one buffer, in
//! which they are hashed, written and hashed again for the whole; the lane reads on meanwhile. It decides nothing.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use peerfleet_proto::{
    request::{
        Failure,
        transfer::{RangeReply, RangeRequest},
    },
    transfer::{LaneId, span_of},
};
use tokio::{
    io::AsyncReadExt,
    sync::{Semaphore, mpsc},
};

use super::{
    buffers::{Buffer, Buffers},
    destination::Partial,
    lanes::{LaneFault, Lanes},
    whole::Whole,
};
use crate::mesh::stream::{RecvHalf, SendHalf};

/// Bytes after which a lane counts as having moved: well below what the slowest useful path carries in a minute.
const READ_BYTES: usize = 64 * 1024;

/// Where ranges land: shared by the lanes of one try.
pub(super) struct Landing {
    /// The disk.
    pub(super) partial: Arc<Partial>,
    /// The hash of the whole.
    pub(super) whole: Whole,
    /// Memory for ranges.
    pub(super) buffers: Arc<Buffers>,
    /// Size of the file.
    pub(super) size: u64,
    /// How many ranges may be hashed and written at once.
    pub(super) workers: Arc<Semaphore>,
}

/// What a lane tells the receiver's loop.
pub(super) enum Report {
    /// The stream is open.
    Opened(LaneId),
    /// The stream broke or could not be opened.
    Lost(LaneId, String),
    /// The source cannot go on, or no longer wants to.
    SourceFailed(Failure),
    /// This side's disk does not take what came.
    DiskFailed(Failure),
    /// A whole range came; if its hashes agree it stands on the disk.
    Range { lane: LaneId, index: u64, claimed: [u8; 32], actual: [u8; 32] },
    /// The source said what the SHA-256 of the whole is.
    Sha256(LaneId, [u8; 32]),
}

/// What one lane works with.
pub(super) struct Lane {
    /// Its number.
    pub(super) id: LaneId,
    /// Opens its stream.
    pub(super) lanes: Arc<dyn Lanes>,
    /// What to ask for.
    pub(super) requests: mpsc::UnboundedReceiver<RangeRequest>,
    /// The receiver's loop.
    pub(super) reports: mpsc::Sender<Report>,
    /// Where ranges land.
    pub(super) landing: Arc<Landing>,
    /// Counts bytes and signs of life, so that the loop sees that the lane moves.
    pub(super) moved: Arc<AtomicU64>,
}

impl Lane {
    /// Opens the stream and pulls until it breaks or the task is ended.
    pub(super) async fn run(self) {
        let Self { id, lanes, requests, reports, landing, moved } = self;
        let report = match lanes.open().await {
            Ok(stream) => {
                if reports.send(Report::Opened(id)).await.is_err() {
                    return;
                }
                let reading = Reading { id, reports: reports.clone(), landing, moved };
                let pulled = tokio::select! {
                    asked = ask(stream.send, requests) => asked.map(|()| None),
                    read = reading.run(stream.recv) => read,
                };
                match pulled {
                    Ok(Some(failure)) => Report::SourceFailed(failure),
                    Ok(None) => Report::Lost(id, "the source ended the stream".to_owned()),
                    Err(error) => Report::Lost(id, error.to_string()),
                }
            }
            Err(LaneFault::Lost(why)) => Report::Lost(id, why),
            Err(LaneFault::Refused(failure)) => Report::SourceFailed(failure),
        };
        let _loop_ended = reports.send(report).await;
    }
}

/// Ends when the receiver's loop lets go of the lane.
async fn ask(mut send: SendHalf, mut requests: mpsc::UnboundedReceiver<RangeRequest>) -> io::Result<()> {
    while let Some(request) = requests.recv().await {
        send.write_frame(&request).await?;
    }
    Ok(())
}

struct Reading {
    id: LaneId,
    reports: mpsc::Sender<Report>,
    landing: Arc<Landing>,
    moved: Arc<AtomicU64>,
}

impl Reading {
    /// Reads replies to the end of the stream, or to the source's failure.
    async fn run(self, mut recv: RecvHalf) -> io::Result<Option<Failure>> {
        while let Some(reply) = recv.read_frame::<RangeReply>().await? {
            self.moved.fetch_add(1, Ordering::Relaxed);
            match reply {
                RangeReply::Range { index, len, blake3 } => {
                    if span_of(self.landing.size, index).is_none_or(|span| span.len != len) {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "a range of the wrong length"));
                    }
                    let buffer = self.read_range(&mut recv, len as usize).await?;
                    self.land(index, buffer, blake3);
                }
                RangeReply::Sha256(hash) => {
                    let _loop_ended = self.reports.send(Report::Sha256(self.id, hash)).await;
                }
                RangeReply::Failed(failure) => return Ok(Some(failure)),
                RangeReply::Hashing(_) => {}
            }
        }
        Ok(None)
    }

    async fn read_range(&self, recv: &mut RecvHalf, len: usize) -> io::Result<Buffer> {
        let mut buffer = self.landing.buffers.take(len).await;
        for piece in buffer.as_mut().chunks_mut(READ_BYTES) {
            recv.read_exact(piece).await?;
            self.moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(buffer)
    }

    /// Hashes, writes and records a range where that may wait, then tells the loop. The buffers' number bounds how
    /// many are at it.
    fn land(&self, index: u64, buffer: Buffer, claimed: [u8; 32]) {
        let (lane, reports, landing) = (self.id, self.reports.clone(), Arc::clone(&self.landing));
        let work = move || {
            let actual = *blake3::hash(buffer.as_ref()).as_bytes();
            let span = span_of(landing.size, index).expect("it was looked at when the range's head came");
            let intact = claimed == actual;
            let written = if intact { landing.partial.write(index, span, buffer.as_ref(), &actual) } else { Ok(()) };
            let report = match written {
                Ok(()) => Report::Range { lane, index, claimed, actual },
                Err(failure) => Report::DiskFailed(failure),
            };
            let stands = intact && matches!(report, Report::Range { .. });
            let _loop_ended = reports.blocking_send(report);
            if stands {
                landing.whole.pass(index, Bytes::from_owner(buffer));
            }
        };
        let workers = Arc::clone(&self.landing.workers);
        tokio::spawn(async move {
            let _permit = workers.acquire().await.expect("the semaphore is never closed");
            if tokio::task::spawn_blocking(work).await.is_err() {
                tracing::error!(index, "landing a range ended early");
            }
        });
    }
}
