//! The first frame of every stream: what it asks for, and who gets it.
//!
//! In: a link, and a request that opens a stream or travels as one; incoming streams. Out: outcomes and streams; calls of
//! [`Serve`]. Never looks at what follows the first frames.
//! Bounds: [`HEAD_DEADLINE`] for an incoming stream's first frame, [`OUTCOME_DEADLINE`] for its outcome;
//! [`super::link::MAX_STREAMS`] streams at once.

use std::{io, sync::Arc, time::Duration};

use peerfleet_proto::{
    id::RequestId,
    request::{Failure, FailureKind, Outcome, Request},
    wire::message::StreamHead,
};
use quinn::{Connection, ConnectionError};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use super::{
    AskFault, Caller, OpenFault, Serve, Stream,
    link::CODE_UNUSED,
    stream::{Lease, LeaseMaker},
};

/// Time in which an incoming stream must say what it wants.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);

/// Time for the outcome of a stream's head: services answer at once or not at all, so this is the path's share, which
/// may change meanwhile.
const OUTCOME_DEADLINE: Duration = Duration::from_secs(30);

/// Why a stream was not opened.
#[derive(Debug)]
pub(super) enum Unopened {
    /// The other side let the link go for want of use, and has not looked at the stream: another link will do.
    Unused,
    /// There is no more to be done.
    Fault(OpenFault),
}

/// A link that is up.
#[derive(Debug, Clone)]
pub(super) struct LinkHandle {
    /// Its connection, whose other side has proved its key.
    pub(super) connection: Connection,
    /// Keeps it open.
    pub(super) lease: Lease,
    /// Whether it travels directly now.
    pub(super) direct: watch::Receiver<bool>,
}

impl LinkHandle {
    /// Opens a stream and reads the outcome of its head.
    pub(super) async fn open(&self, request: Request) -> Result<(Outcome, Stream), Unopened> {
        let opening = self.send_head(StreamHead::Open(request));
        match timeout(OUTCOME_DEADLINE, opening).await {
            Ok(Ok(opened)) => Ok(opened),
            Ok(Err(_)) if self.was_unused() => Err(Unopened::Unused),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a stream was lost before its outcome");
                Err(Unopened::Fault(OpenFault::Lost))
            }
            Err(_) => Err(Unopened::Fault(OpenFault::NoLink("the other side gave no answer in time".into()))),
        }
    }

    /// Whether the link ended because nobody used it, as far as either side knew.
    fn was_unused(&self) -> bool {
        let Some(ConnectionError::ApplicationClosed(close)) = self.connection.close_reason() else { return false };
        close.error_code == CODE_UNUSED
    }

    /// Asks what would travel as a message, were the relay there.
    pub(super) async fn ask(&self, id: RequestId, request: Request, deadline: Duration) -> Result<Outcome, AskFault> {
        match timeout(deadline, self.send_head(StreamHead::Ask { id, request })).await {
            Ok(Ok((outcome, _stream))) => Ok(outcome),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a link was lost while it carried a request");
                Err(AskFault::Lost)
            }
            Err(_) => Err(AskFault::DeadlineExceeded),
        }
    }

    async fn send_head(&self, head: StreamHead) -> io::Result<(Outcome, Stream)> {
        let (send, recv) = self.connection.open_bi().await?;
        let mut stream = Stream::over(send, recv, self.lease.clone());
        stream.send.write_frame(&head).await?;
        if matches!(head, StreamHead::Ask { .. }) {
            stream.send.finish().await?;
        }
        let outcome = stream.recv.read_frame().await?;
        let outcome = outcome.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        Ok((outcome, stream))
    }
}

/// Serves the streams that the other side of a link opens, until the link ends and all of them have.
pub(super) async fn accept(connection: Connection, leases: LeaseMaker, caller: Caller, serve: Arc<dyn Serve>) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            accepted = connection.accept_bi() => {
                let Ok((send, recv)) = accepted else { break };
                let Some(lease) = leases.make() else { break };
                streams.spawn(serve_stream(Stream::over(send, recv, lease), caller, Arc::clone(&serve)));
            }
            Some(ended) = streams.join_next() => report(ended),
        }
    }
    drop(connection);
    while let Some(ended) = streams.join_next().await {
        report(ended);
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!("a service ended in a panic; its stream was broken off");
    }
}

async fn serve_stream(mut stream: Stream, caller: Caller, serve: Arc<dyn Serve>) {
    let head = match timeout(HEAD_DEADLINE, stream.recv.read_frame()).await {
        Ok(Ok(Some(head))) => head,
        Ok(Ok(None) | Err(_)) | Err(_) => {
            tracing::debug!(instance = %caller.instance, "a stream did not say what it wants");
            return;
        }
    };
    match head {
        StreamHead::Open(Request::Link(_) | Request::Candidates(_)) => {
            let refused =
                Failure::new(FailureKind::Invalid, "links are not agreed on streams", "update the older side");
            answer(stream, Outcome::Failed(refused)).await;
        }
        StreamHead::Open(request) => serve.stream(caller, request, stream).await,
        StreamHead::Ask { request: Request::Link(_) | Request::Candidates(_), .. } => {
            let refused =
                Failure::new(FailureKind::Invalid, "links are not agreed on streams", "update the older side");
            answer(stream, Outcome::Failed(refused)).await;
        }
        StreamHead::Ask { id, request } => {
            let outcome = serve.ask(caller, id, request).await;
            answer(stream, outcome).await;
        }
    }
}

async fn answer(mut stream: Stream, outcome: Outcome) {
    let written = async {
        stream.send.write_frame(&outcome).await?;
        stream.send.finish().await
    };
    if let Err(error) = written.await {
        tracing::debug!(%error, "an outcome could not be told");
    }
}
