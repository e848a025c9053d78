//! A caller on a stream with a job: output one way; input, signals and what was taken the other way.
//!
//! In: a job, a stream, where to begin. Out: [`FromHost`] frames, and to the job what [`FromCaller`] frames say. It never
//! keeps output itself: what the stream does not take stays in the log, and what the log no longer has ends the stream,
//! so that the caller asks again and is told where the log begins.
//! Head (an outcome) -> Following -> End, or Pause, or cut off (the caller left, or somebody else is the owner now).

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use peerfleet_proto::{
    request::{
        Failure, FailureKind, Outcome,
        exec::{Attach, Attached, FromCaller, FromHost},
    },
    wire,
};
use tokio::{task::spawn_blocking, time::sleep};

use super::{
    input::Overrun,
    job::{Job, Which},
    log::Found,
};
use crate::mesh::{
    Caller, Stream,
    stream::{RecvHalf, SendHalf},
};

/// Output in one frame: half of what a head may be, and a pipe's worth.
const FRAME_BYTES: usize = 64 * 1024;

/// Time for an owner that is here to take the last output, before it counts as gone: a terminal may be stopped for a
/// while (Ctrl-S). Only the owner's own word counts, as what its machine has received may still be lost there.
const LAST_WORD: Duration = Duration::from_secs(600);

/// Why a stream ends before its last word.
enum Cut {
    /// The carrier broke, or the caller left.
    Broken,
    /// Bytes that are next for this caller are no longer kept.
    Gone,
    /// The caller breaks the rules.
    Misbehaved,
}

impl From<std::io::Error> for Cut {
    fn from(_: std::io::Error) -> Self {
        Self::Broken
    }
}

/// Serves one attached stream until its end.
pub(super) async fn attach(job: Arc<Job>, caller: Caller, attach: Attach, stream: Stream) {
    let Stream { mut send, recv } = stream;
    if attach.owner && caller.peer != job.caller {
        let _ = send.write_frame(&Outcome::Failed(not_the_owner(&job))).await;
        let _ = send.finish().await;
        return;
    }
    let mut owner = job.owner();
    let (number, start) = begin(&job, attach);
    let mut speaker = Speaker::new(&job, start, attach, send);
    let superseded = async {
        match number {
            Some(number) => drop(owner.wait_for(|owner| owner.number > number).await),
            None => std::future::pending().await,
        }
    };
    let mut listening = pin!(listen(&job, recv, number));
    let cut = tokio::select! {
        cut = speaker.speak(start) => cut.err(),
        cut = &mut listening => Some(cut),
        () = superseded => Some(Cut::Broken),
    };
    if cut.is_none() && number.is_some() {
        tokio::select! {
            () = job.delivered() => {}
            _ = listening => {}
            () = sleep(LAST_WORD) => {}
        }
    }
    if let Some(cut) = cut {
        let why = match cut {
            Cut::Broken => "the caller left",
            Cut::Gone => "older output is no longer kept",
            Cut::Misbehaved => "the caller broke the rules",
        };
        tracing::debug!(job = %job.id, why, "an attached stream was cut off");
    }
    if let Some(number) = number {
        job.leave(number);
    }
}

fn not_the_owner(job: &Job) -> Failure {
    Failure::new(
        FailureKind::Refused,
        format!("job {} is somebody else's: only who started it may speak to it", job.id),
        "`peer logs` reads along, `peer cancel` ends it",
    )
}

/// Where the stream goes on, and the owner's number. A new owner has everything before that, and is heard from now on.
fn begin(job: &Job, attach: Attach) -> (Option<u64>, Attached) {
    // Held throughout: of two that become owner at once, one is the later in all respects.
    let mut input = job.input();
    let number = attach.owner.then(|| job.claim());
    let stdin_taken = match number {
        Some(number) => input.restart(number),
        None => input.taken(),
    };
    let from = |which, wanted: u64| {
        let from = wanted.max(job.log(which).first());
        if number.is_some() {
            job.take(which, from);
        }
        from
    };
    let stdout_from = from(Which::Stdout, attach.stdout_from);
    let stderr_from = from(Which::Stderr, attach.stderr_from);
    (number, Attached { stdin_taken, stdout_from, stderr_from })
}

struct Speaker<'a> {
    job: &'a Job,
    send: SendHalf,
    next: [u64; 2],
    follow: bool,
    is_owner: bool,
    stdin_told: u64,
    stdin_closed_told: bool,
}

impl<'a> Speaker<'a> {
    fn new(job: &'a Job, start: Attached, attach: Attach, send: SendHalf) -> Self {
        Self {
            job,
            send,
            next: [start.stdout_from, start.stderr_from],
            follow: attach.follow,
            is_owner: attach.owner,
            stdin_told: start.stdin_taken,
            stdin_closed_told: false,
        }
    }

    async fn speak(&mut self, start: Attached) -> Result<(), Cut> {
        self.send.write_frame(&Outcome::Attached(start)).await?;
        let mut news = self.job.news();
        loop {
            news.borrow_and_update();
            // Looked at before the logs: all output was in them when the end was published.
            let end = self.job.end();
            self.tell_input().await?;
            let stdout = self.tell_output(Which::Stdout).await?;
            let stderr = self.tell_output(Which::Stderr).await?;
            if stdout || stderr {
                continue;
            }
            match end {
                Some(end) => return self.conclude(&FromHost::End(end)).await,
                None if !self.follow => return self.conclude(&FromHost::Pause).await,
                None => news.changed().await.map_err(|_| Cut::Broken)?,
            }
        }
    }

    async fn tell_input(&mut self) -> Result<(), Cut> {
        if !self.is_owner {
            return Ok(());
        }
        let (taken, is_closed) = {
            let input = self.job.input();
            (input.taken(), input.is_closed())
        };
        if taken > self.stdin_told {
            self.stdin_told = taken;
            self.send.write_frame(&FromHost::StdinTaken(taken)).await?;
        }
        if is_closed && !self.stdin_closed_told {
            self.stdin_closed_told = true;
            self.send.write_frame(&FromHost::StdinClosed).await?;
        }
        Ok(())
    }

    /// Sends the next bytes of one stream; false if there are none.
    async fn tell_output(&mut self, which: Which) -> Result<bool, Cut> {
        let from = self.next[which.index()];
        let mut frame = Vec::new();
        let found = self.job.log(which).read(from, FRAME_BYTES, &mut frame, |frame, len| frame_head(which, len, frame));
        let len = match found {
            Found::Nothing => return Ok(false),
            Found::Gone => return Err(Cut::Gone),
            Found::Bytes(len) => len as u64,
            Found::Spooled(range) => {
                let len = range.end - range.start;
                frame = self.read_spool(which, from, len).await?;
                len
            }
        };
        self.send.write_chunk(Bytes::from(frame)).await?;
        self.next[which.index()] += len;
        Ok(true)
    }

    async fn read_spool(&self, which: Which, from: u64, len: u64) -> Result<Vec<u8>, Cut> {
        let spool = self.job.spool().ok_or(Cut::Gone)?;
        let len = usize::try_from(len).map_err(|_| Cut::Gone)?;
        let reading = spawn_blocking(move || {
            let mut frame = Vec::new();
            frame_head(which, len, &mut frame);
            let begin = frame.len();
            frame.resize(begin + len, 0);
            spool.read(which, from, &mut frame[begin..]).map(|()| frame)
        });
        let frame = reading.await.map_err(|_| Cut::Broken)??;
        // The ring may have come round while it was read: the log lets go of bytes before they are overwritten.
        if self.job.log(which).first() > from { Err(Cut::Gone) } else { Ok(frame) }
    }

    async fn conclude(&mut self, last: &FromHost) -> Result<(), Cut> {
        self.send.write_frame(last).await?;
        self.send.finish().await?;
        if self.is_owner && self.job.is_taken() {
            self.job.deliver();
        }
        Ok(())
    }
}

/// The head of an output frame, as [`wire::encode`] makes it of [`FromHost`]: length, variant, length of the bytes.
fn frame_head(which: Which, len: usize, frame: &mut Vec<u8>) {
    let empty = match which {
        Which::Stdout => FromHost::Stdout(Vec::new()),
        Which::Stderr => FromHost::Stderr(Vec::new()),
    };
    let mut head = wire::encode(&empty);
    // The length of no bytes is the last byte; the length that is meant takes its place.
    head.pop();
    head.extend(wire::encode(&(len as u64)));
    let body = u32::try_from(head.len() + len).expect("a frame is bounded by FRAME_BYTES");
    frame.reserve_exact(4 + head.len() + len);
    frame.extend(body.to_be_bytes());
    frame.extend(head);
}

/// Hears what the caller says, until it leaves. Only the owner is listened to.
async fn listen(job: &Job, mut recv: RecvHalf, owner: Option<u64>) -> Cut {
    loop {
        let frame = match recv.read_frame::<FromCaller>().await {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(_) => return Cut::Broken,
        };
        if let Some(owner) = owner
            && let Err(cut) = obey(job, owner, frame)
        {
            return cut;
        }
    }
}

fn obey(job: &Job, owner: u64, frame: FromCaller) -> Result<(), Cut> {
    // Held throughout: what an earlier owner said must not come behind what the next one was told.
    let mut input = job.input();
    if !input.hears(owner) {
        return Err(Cut::Broken);
    }
    match frame {
        FromCaller::Stdin(bytes) => {
            input.push(&bytes).map_err(|Overrun| Cut::Misbehaved)?;
            job.wake_input();
            job.tell();
        }
        FromCaller::StdinEnd => {
            input.finish();
            job.wake_input();
        }
        FromCaller::Taken { stdout, stderr } => {
            job.take(Which::Stdout, stdout);
            job.take(Which::Stderr, stderr);
            if job.is_taken() {
                job.deliver();
            }
        }
        FromCaller::Signal(signal) => job.signal(signal),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_frames_read_as_any_other() {
        for len in [1, 127, 128, 16_384, FRAME_BYTES] {
            let mut frame = Vec::new();
            frame_head(Which::Stderr, len, &mut frame);
            frame.resize(frame.len() + len, 7);
            let body = wire::encode(&FromHost::Stderr(vec![7; len]));
            assert_eq!(frame[..4], (body.len() as u32).to_be_bytes());
            assert_eq!(frame[4..], body);
        }
    }
}
