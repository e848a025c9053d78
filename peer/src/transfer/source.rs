//! The source: a file on offer, its ranges, and the streams that pull them.
//!
//! In: range requests. Out: each range with its BLAKE3 hash, read one ahead of what is being sent, and the SHA-256 of
//! the whole. A file that is no longer the one offered (size, modification time, place on disk) is never sent on.
//! Bounds: [`BUFFERS`] ranges in memory for all lanes together, [`IDLE_DEADLINE`] and [`SEND_DEADLINE`] per lane.

use std::{
    fs::File,
    io,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{
    id::PeerId,
    request::{
        Failure, FailureKind,
        transfer::{FileInfo, RangeReply, RangeRequest},
    },
    transfer::{self, Span, Wanted},
};
use rustix::fs::{Mode, OFlags};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

use super::{
    Origin,
    buffers::{Buffer, Buffers, workers},
    internal,
    place::{self, Stamp, invalid, os_failure, shown},
    whole::{STASH, Whole},
};
use crate::mesh::{
    Stream,
    stream::{RecvHalf, SendHalf},
};

/// Ranges of one file in memory: those that wait to be hashed, and four for each of four lanes (read, waiting to be
/// sent, and sent but not acknowledged).
const BUFFERS: usize = STASH + 16;

/// Silence of a receiver after which its lane is ended: longer than a receiver's disk may take, and than a path.
const IDLE_DEADLINE: Duration = Duration::from_secs(600);

/// Longest time for one range to be taken by the receiver: 1 MiB at 70 kbit/s.
const SEND_DEADLINE: Duration = Duration::from_secs(120);

/// Interval of signs of life while the whole is being hashed, well below a receiver's patience.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// A file on offer.
pub(super) struct Offer {
    /// Who offered it.
    pub(super) origin: Origin,
    /// The only identity that may pull it.
    pub(super) receiver: PeerId,
    /// What is offered.
    pub(super) file: FileInfo,
    /// Where it is, and the file itself while it is pulled and a moment longer.
    pub(super) content: Arc<Content>,
    /// Lanes that pull it now.
    pub(super) lanes: usize,
    /// When it was offered, or last pulled.
    pub(super) last_used: Instant,
}

/// The file behind an offer; a disk that hangs holds up this file alone.
pub(super) struct Content {
    real: PathBuf,
    stamp: Stamp,
    size: u64,
    opened: Mutex<Option<Arc<OpenSource>>>,
}

/// An offered file while it is being pulled.
pub(super) struct OpenSource {
    file: Arc<File>,
    path: PathBuf,
    size: u64,
    stamp: Stamp,
    buffers: Arc<Buffers>,
    workers: Arc<Semaphore>,
    whole: Whole,
}

/// What is to be sent on a lane.
enum Reply {
    Range { index: u64, blake3: [u8; 32], bytes: Bytes },
    Word(RangeReply),
}

impl Offer {
    /// Looks at the file and offers it as it is now.
    pub(super) fn new(
        origin: Origin,
        receiver: PeerId,
        path: &[u8],
        forbidden: Option<&Path>,
    ) -> Result<Self, Failure> {
        let (real, name) = place::find_source(path, forbidden)?;
        let opened = open(&real)?;
        let found = opened.metadata().map_err(|error| os_failure("look at", &real, &error))?;
        if found.size() == 0 && opened.read_at(&mut [0], 0).is_ok_and(|len| len > 0) {
            let what = format!("the system does not say the size of {}", shown(&real));
            return Err(invalid(what, "copy it to a regular file first, and send that"));
        }
        let file = FileInfo {
            name: name.into_vec(),
            size: found.size(),
            mode: found.mode() & 0o7777,
            mtime_s: found.mtime(),
            mtime_ns: u32::try_from(found.mtime_nsec()).unwrap_or(0),
        };
        let content = Content { real, stamp: Stamp::from(&found), size: file.size, opened: Mutex::new(None) };
        Ok(Self { origin, receiver, file, content: Arc::new(content), lanes: 0, last_used: Instant::now() })
    }
}

impl Content {
    /// The opened file, if it is still the one that was offered.
    pub(super) fn open(&self) -> Result<Arc<OpenSource>, Failure> {
        let mut kept = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = &*kept {
            opened.check_unchanged()?;
            return Ok(Arc::clone(opened));
        }
        let file = Arc::new(open(&self.real)?);
        let for_whole = Arc::clone(&file);
        let opened = Arc::new(OpenSource {
            file,
            path: self.real.clone(),
            size: self.size,
            stamp: self.stamp,
            buffers: Buffers::new(BUFFERS),
            workers: workers(),
            whole: Whole::of_complete(self.size, Box::new(move |bytes, offset| for_whole.read_exact_at(bytes, offset))),
        });
        opened.check_unchanged()?;
        *kept = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// Lets go of the file, unless somebody is opening it right now.
    pub(super) fn close(&self) {
        if let Ok(mut kept) = self.opened.try_lock() {
            *kept = None;
        }
    }
}

/// Opens a regular file for reading, without waiting for the other end should it have become a pipe.
fn open(real: &Path) -> Result<File, Failure> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let failure = |error: io::Error| os_failure("open", real, &error);
    let file = File::from(rustix::fs::open(real, flags, Mode::empty()).map_err(|error| failure(error.into()))?);
    place::check_is_file(real, &file.metadata().map_err(failure)?)?;
    Ok(file)
}

impl OpenSource {
    fn check_unchanged(&self) -> Result<(), Failure> {
        let found = self.file.metadata().map_err(|error| os_failure("look at", &self.path, &error))?;
        if Stamp::from(&found) == self.stamp { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Failure {
        let what = format!("{} changed while it was being sent", shown(&self.path));
        Failure::new(FailureKind::Corrupt, what, "send it again when nothing writes to it")
    }

    /// Reads and hashes one range, then hashes what has become due of the whole, without the lane waiting for that.
    async fn range(self: &Arc<Self>, index: u64, span: Span) -> Result<Reply, Failure> {
        let mut buffer = self.buffers.take(span.len as usize).await;
        let permit = Arc::clone(&self.workers).acquire_owned().await.expect("the semaphore is never closed");
        let (done, range) = oneshot::channel();
        let source = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            match source.read(&mut buffer, span) {
                Ok(()) => {
                    let blake3 = *blake3::hash(buffer.as_ref()).as_bytes();
                    let bytes = Bytes::from_owner(buffer);
                    let _lane_gone = done.send(Ok(Reply::Range { index, blake3, bytes: bytes.clone() }));
                    source.whole.pass(index, bytes);
                }
                Err(failure) => drop(done.send(Err(failure))),
            }
            drop(permit);
        });
        range.await.unwrap_or_else(|_| Err(internal("reading a range ended early")))
    }

    fn read(&self, buffer: &mut Buffer, span: Span) -> Result<(), Failure> {
        self.file.read_exact_at(buffer.as_mut(), span.offset).map_err(|error| {
            let shorter = error.kind() == io::ErrorKind::UnexpectedEof;
            if shorter { self.changed() } else { os_failure("read", &self.path, &error) }
        })?;
        self.check_unchanged()
    }

    /// The SHA-256 of the whole, with signs of life as long as it takes.
    async fn sha256(self: &Arc<Self>, lane: &mpsc::Sender<Reply>) -> Result<RangeReply, Failure> {
        let source = Arc::clone(self);
        let mut hashing = tokio::task::spawn_blocking(move || {
            let hash = source.whole.finish().map_err(|error| os_failure("read", &source.path, &error))?;
            source.check_unchanged()?;
            Ok(RangeReply::Sha256(hash))
        });
        loop {
            match timeout(SIGN_OF_LIFE, &mut hashing).await {
                Ok(Ok(hash)) => return hash,
                Ok(Err(error)) => {
                    return Err(internal(format!("hashing the file ended early: {error}")));
                }
                Err(_) => {
                    let _lane_gone = lane.send(Reply::Word(RangeReply::Hashing(self.whole.hashed_bytes()))).await;
                }
            }
        }
    }
}

/// Answers one lane until the receiver ends it.
pub(super) async fn serve_lane(source: &Arc<OpenSource>, stream: Stream) -> io::Result<()> {
    let (replies, queued) = mpsc::channel(1);
    tokio::try_join!(read_requests(source, stream.recv, replies), send_replies(stream.send, queued))?;
    Ok(())
}

async fn read_requests(source: &Arc<OpenSource>, mut recv: RecvHalf, replies: mpsc::Sender<Reply>) -> io::Result<()> {
    let mut machine = transfer::Source::new(source.size);
    loop {
        let request = timeout(IDLE_DEADLINE, recv.read_frame::<RangeRequest>()).await;
        let Some(request) = request.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? else { return Ok(()) };
        let reply = match machine.handle_request(request) {
            Ok(Wanted::Range { index, span }) => source.range(index, span).await,
            Ok(Wanted::Sha256) => source.sha256(&replies).await.map(Reply::Word),
            Err(fault) => return Err(io::Error::new(io::ErrorKind::InvalidData, fault)),
        };
        machine.handle_answered();
        let last = reply.is_err();
        let reply = reply.unwrap_or_else(|failure| Reply::Word(RangeReply::Failed(failure)));
        if replies.send(reply).await.is_err() || last {
            return Ok(());
        }
    }
}

async fn send_replies(mut send: SendHalf, mut queued: mpsc::Receiver<Reply>) -> io::Result<()> {
    while let Some(reply) = queued.recv().await {
        let sent = timeout(SEND_DEADLINE, send_reply(&mut send, reply)).await;
        sent.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
    send.finish().await
}

async fn send_reply(send: &mut SendHalf, reply: Reply) -> io::Result<()> {
    match reply {
        Reply::Word(word) => send.write_frame(&word).await,
        Reply::Range { index, blake3, bytes } => {
            let len = u32::try_from(bytes.len()).expect("a range fits in 32 bits");
            send.write_frame(&RangeReply::Range { index, len, blake3 }).await?;
            send.write_chunk(bytes).await
        }
    }
}
