//! Following one job over as many streams as it takes.
//!
//! In: frames of the host, standard input, the user's wishes. Out: output in order, words to the host, the job's end.
//! It says that output was taken only once it was written, so nothing is lost with a stream; what a lost stream took
//! along is asked for again from that point. Attached <-> lost (up to [`RECONNECT_DEADLINE`]) -> ended.
//! Bounds: [`WORDS_QUEUE`] words, one piece of output, the window of [`Stdin`].

use std::{collections::VecDeque, io};

use peerfleet_proto::{
    id::{InstanceId, JobId},
    request::{
        FailureKind, Outcome, Request,
        exec::{Attach, Attached, FromCaller, FromHost, JobEnd, JobReport, JobSignal},
        link::Route,
    },
};
use tokio::{sync::mpsc, time::Instant};

use super::{
    BROKEN_PIPE_GRACE, Finished, Input, NotRun, Output, Stdin, WORDS_QUEUE, Which, Wish, cancel, interrupted, unwritten,
};
use crate::{
    client::{Client, RECONNECT_DEADLINE, RETRY_PAUSE},
    failure::Failure,
    machine::Host,
    mesh::{
        Stream,
        stream::{RecvHalf, SendHalf},
    },
};

pub(super) struct Following<'a> {
    client: &'a Client,
    host: &'a Host,
    job: JobId,
    owner: bool,
    stdout: u64,
    stderr: u64,
    stdout_broken: bool,
    stderr_broken: bool,
    pub(super) output: &'a mut dyn Output,
    unsaid: VecDeque<JobSignal>,
    patience: Patience,
}

/// How long a job that cannot be attached to is waited for, since it last could.
#[derive(Debug)]
struct Patience {
    give_up: Instant,
    attached: Option<Instant>,
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self { give_up: now + RECONNECT_DEADLINE, attached: None }
    }

    fn attached(&mut self, now: Instant) {
        self.attached = Some(now);
    }

    /// The try ended. A connection that stood for a moment, or brought output, was one, however silent the job: but one
    /// that breaks at once again and again is none.
    fn lost(&mut self, brought_output: bool, now: Instant) {
        let stood = self.attached.take().is_some_and(|since| now - since >= RETRY_PAUSE);
        if stood || brought_output {
            self.give_up = now + RECONNECT_DEADLINE;
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.give_up
    }
}

/// How one attachment ended.
enum Detached {
    End(JobEnd),
    Pause,
    Lost,
    Quit,
    Failed(NotRun),
}

impl<'a> Following<'a> {
    pub(super) fn new(client: &'a Client, host: &'a Host, job: JobId, owner: bool, output: &'a mut dyn Output) -> Self {
        Self {
            client,
            host,
            job,
            owner,
            stdout: 0,
            stderr: 0,
            stdout_broken: false,
            stderr_broken: false,
            output,
            unsaid: VecDeque::new(),
            patience: Patience::new(Instant::now()),
        }
    }

    pub(super) fn finished(&self, end: Option<JobEnd>) -> Finished {
        Finished { job: self.job, end, broken_pipe: self.is_broken() }
    }

    fn is_broken(&self) -> bool {
        self.stdout_broken || self.stderr_broken
    }

    pub(super) fn has_all_of(&self, stdout: u64, stderr: u64) -> bool {
        (self.stdout, self.stderr) == (stdout, stderr)
    }

    pub(super) async fn write_captured(&mut self, report: &JobReport) -> Result<(), NotRun> {
        for (which, captured) in [(Which::Stdout, &report.stdout), (Which::Stderr, &report.stderr)] {
            self.take(which, captured.bytes.clone()).await.map_err(|error| unwritten(self.job, error))?;
        }
        Ok(())
    }

    /// Writes the next bytes of a stream, or drops them when nobody reads it any more.
    async fn take(&mut self, which: Which, bytes: Vec<u8>) -> io::Result<()> {
        let len = bytes.len() as u64;
        let (offset, broken) = match which {
            Which::Stdout => (&mut self.stdout, &mut self.stdout_broken),
            Which::Stderr => (&mut self.stderr, &mut self.stderr_broken),
        };
        *offset += len;
        if *broken || len == 0 {
            return Ok(());
        }
        match self.output.write(which, bytes).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                *broken = true;
                Ok(())
            }
            written => written,
        }
    }

    pub(super) async fn follow(&mut self, to_the_end: bool, input: &mut Input<'_>) -> Result<Option<JobEnd>, NotRun> {
        let mut instance = self.host.instance;
        loop {
            let before = (self.stdout, self.stderr);
            match self.attach(instance, to_the_end, input).await {
                Detached::End(end) => return Ok(Some(end)),
                Detached::Pause => return Ok(None),
                Detached::Failed(not_run) => return Err(not_run),
                Detached::Quit => return Err(interrupted(self.host, Some(self.job))),
                Detached::Lost => {}
            }
            if self.is_broken() {
                cancel(self.client, instance, self.job).await;
                return Ok(None);
            }
            let now = Instant::now();
            self.patience.lost(before != (self.stdout, self.stderr), now);
            if self.patience.is_over(now) {
                return Err(self.lost());
            }
            self.pause(instance, input.wishes).await?;
            instance = self.client.instance_of(self.host).await.unwrap_or(instance);
        }
    }

    /// Waits before the next try; the user can still wish meanwhile.
    async fn pause(&mut self, instance: InstanceId, wishes: &mut mpsc::Receiver<Wish>) -> Result<(), NotRun> {
        let until = Instant::now() + RETRY_PAUSE;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                Some(wish) = wishes.recv() => match wish {
                    Wish::Signal(signal) => self.unsaid.push_back(signal),
                    Wish::Cancel => cancel(self.client, instance, self.job).await,
                    Wish::Quit => return Err(interrupted(self.host, Some(self.job))),
                },
            }
        }
    }

    async fn attach(&mut self, instance: InstanceId, to_the_end: bool, input: &mut Input<'_>) -> Detached {
        let head = Request::Attach(Attach {
            job: self.job,
            stdout_from: self.stdout,
            stderr_from: self.stderr,
            follow: to_the_end,
            owner: self.owner,
        });
        let opened = tokio::select! {
            opened = self.client.open(instance, head, Route::Auto) => opened,
            quit = quit_wish(input.wishes, &mut self.unsaid, self.client, instance, self.job) => return quit,
        };
        match opened {
            Ok((Outcome::Attached(attached), stream)) => {
                self.patience.attached(Instant::now());
                self.resume_at(attached, input.stdin.as_ref());
                self.converse(stream, instance, input).await
            }
            Ok((Outcome::Failed(failure), _)) if failure.kind == FailureKind::Busy => Detached::Lost,
            Ok((Outcome::Failed(failure), _)) => {
                let state = if failure.kind == FailureKind::Refused { "refused" } else { "lost" };
                let what = format!("cannot follow job {} on `{}`", self.job, self.host.name());
                let failure = Failure::from_host(what, failure).not_run();
                Detached::Failed(NotRun { state, job: Some(self.job), failure })
            }
            Ok((_, _)) => {
                let failure = Failure::odd_answer(self.host.name()).not_run();
                Detached::Failed(NotRun { state: "lost", job: Some(self.job), failure })
            }
            Err(fault) => {
                tracing::debug!(%fault, "could not attach to the job; trying again");
                Detached::Lost
            }
        }
    }

    fn resume_at(&mut self, attached: Attached, stdin: Option<&Stdin>) {
        for (which, at, from) in [
            (Which::Stdout, &mut self.stdout, attached.stdout_from),
            (Which::Stderr, &mut self.stderr, attached.stderr_from),
        ] {
            if from > *at {
                self.output.gap(which, from - *at);
                *at = from;
            }
        }
        if let Some(stdin) = stdin {
            stdin.resume_at(attached.stdin_taken);
        }
    }

    /// Listens and speaks until the stream or the job ends.
    async fn converse(&mut self, stream: Stream, instance: InstanceId, input: &mut Input<'_>) -> Detached {
        let Stream { send, mut recv } = stream;
        let (words, heard) = mpsc::channel(WORDS_QUEUE);
        for signal in self.unsaid.drain(..) {
            // The queue is fresh and longer than the few signals that a person sends meanwhile.
            let _ = words.try_send(FromCaller::Signal(signal));
        }
        let Input { stdin, wishes } = input;
        let stdin = stdin.as_ref();
        let (client, job) = (self.client, self.job);
        // Only whoever listens says that the stream is lost: a piece of output that is being written is written in full,
        // as its bytes count as taken and will not be asked for again.
        let speaking = async {
            if let Err(error) = speak(send, heard).await {
                tracing::debug!(%error, "the stream of the job broke");
            }
            std::future::pending().await
        };
        tokio::select! {
            ended = self.listen(&mut recv, &words, stdin) => ended,
            () = speaking => Detached::Lost,
            () = feed(stdin, &words), if stdin.is_some() => Detached::Lost,
            () = grant(wishes, &words, client, instance, job) => Detached::Quit,
        }
    }

    async fn listen(
        &mut self,
        recv: &mut RecvHalf,
        words: &mpsc::Sender<FromCaller>,
        stdin: Option<&Stdin>,
    ) -> Detached {
        let mut broken_since: Option<Instant> = None;
        loop {
            let patience = broken_since.map(|since| since + BROKEN_PIPE_GRACE);
            let frame = tokio::select! {
                frame = recv.read_frame::<FromHost>() => frame,
                () = sleep_until(patience) => return Detached::Lost,
            };
            let (which, bytes) = match frame {
                Ok(Some(FromHost::Stdout(bytes))) => (Which::Stdout, bytes),
                Ok(Some(FromHost::Stderr(bytes))) => (Which::Stderr, bytes),
                Ok(Some(FromHost::StdinTaken(taken))) => {
                    if let Some(stdin) = stdin {
                        stdin.taken(taken);
                    }
                    continue;
                }
                Ok(Some(FromHost::StdinClosed)) => {
                    if let Some(stdin) = stdin {
                        stdin.close();
                    }
                    continue;
                }
                Ok(Some(FromHost::End(end))) => return Detached::End(end),
                Ok(Some(FromHost::Pause)) => return Detached::Pause,
                Ok(None) | Err(_) => return Detached::Lost,
            };
            if let Err(error) = self.take(which, bytes).await {
                let _ = words.send(FromCaller::Signal(JobSignal::Terminate)).await;
                return Detached::Failed(unwritten(self.job, error));
            }
            if self.is_broken() && broken_since.is_none() {
                broken_since = Some(Instant::now());
                if !self.owner || words.send(FromCaller::Signal(JobSignal::BrokenPipe)).await.is_err() {
                    return Detached::Pause;
                }
            }
            let taken = FromCaller::Taken { stdout: self.stdout, stderr: self.stderr };
            if words.send(taken).await.is_err() {
                return Detached::Lost;
            }
        }
    }

    fn lost(&self) -> NotRun {
        let host = self.host.name();
        let failure = Failure::unreachable(format!("lost job {} on `{host}`", self.job))
            .cause(format!("no connection to it for {} s", RECONNECT_DEADLINE.as_secs()))
            .hint(format!("`peer jobs {host}` tells how it ended once the host is back"));
        NotRun { state: "lost", job: Some(self.job), failure: failure.not_run() }
    }
}

/// Sends what is to be said until the stream breaks.
async fn speak(mut send: SendHalf, mut words: mpsc::Receiver<FromCaller>) -> io::Result<()> {
    while let Some(word) = words.recv().await {
        send.write_frame(&word).await?;
    }
    std::future::pending().await
}

/// Sends standard input as far as the host takes it; never ends.
async fn feed(stdin: Option<&Stdin>, words: &mpsc::Sender<FromCaller>) {
    let Some(stdin) = stdin else { return };
    loop {
        let word = stdin.next().await;
        let _ = words.send(word).await;
    }
}

/// Does what the user wants; ends when they want to quit.
async fn grant(
    wishes: &mut mpsc::Receiver<Wish>,
    words: &mpsc::Sender<FromCaller>,
    client: &Client,
    instance: InstanceId,
    job: JobId,
) {
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Signal(signal) => {
                let _ = words.send(FromCaller::Signal(signal)).await;
            }
            Wish::Cancel => cancel(client, instance, job).await,
            Wish::Quit => return,
        }
    }
    std::future::pending().await
}

/// Likewise while no stream stands: signals wait for it.
async fn quit_wish(
    wishes: &mut mpsc::Receiver<Wish>,
    unsaid: &mut VecDeque<JobSignal>,
    client: &Client,
    instance: InstanceId,
    job: JobId,
) -> Detached {
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Signal(signal) => unsaid.push_back(signal),
            Wish::Cancel => cancel(client, instance, job).await,
            Wish::Quit => return Detached::Quit,
        }
    }
    std::future::pending().await
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    #[test]
    fn a_job_that_was_silent_for_an_hour_is_waited_for_when_its_connection_breaks() {
        let begin = Instant::now();
        let mut patience = Patience::new(begin);
        patience.attached(begin);
        let broke = begin + Duration::from_secs(3600);
        patience.lost(false, broke);
        assert!(!patience.is_over(broke + RECONNECT_DEADLINE - MOMENT));
        assert!(patience.is_over(broke + RECONNECT_DEADLINE));
    }

    #[test]
    fn connections_that_break_at_once_are_not_waited_for_any_longer() {
        let begin = Instant::now();
        let mut patience = Patience::new(begin);
        let mut now = begin;
        while !patience.is_over(now) {
            patience.attached(now);
            patience.lost(false, now + MOMENT);
            now += RETRY_PAUSE;
        }
        assert_eq!(now, begin + RECONNECT_DEADLINE);
    }
}
