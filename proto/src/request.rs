//! The one enum of requests and the one of outcomes.
//!
//! A request travels as a sealed message when question and answer are small, or as the head of a stream when bytes
//! follow; the host's handler cannot tell which. Both enums are append-only.

use serde::{Deserialize, Serialize};

use crate::id::JobId;

pub mod exec;
pub mod link;
pub mod network;
pub mod transfer;

/// What one peer asks of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Agree on a link: keys and candidates. As a message.
    Link(link::LinkOffer),
    /// More candidates for a link agreed before. As a message.
    Candidates(link::CandidateUpdate),
    /// Is anybody there? As a message or a stream.
    Ping,
    /// Run a command. As a message.
    Exec(exec::ExecSpec),
    /// Follow a job from given offsets; the stream goes on as [`exec::FromHost`] and [`exec::FromCaller`]. As a stream.
    Attach(exec::Attach),
    /// List jobs, newest first. As a message or a stream.
    Jobs,
    /// End a job. As a message or a stream.
    Cancel(JobId),
    /// Offer one file to one receiver. As a message or a stream.
    Offer(transfer::OfferSpec),
    /// Receive an offered file; the stream goes on as [`transfer::Progress`]. As a stream.
    Receive(transfer::ReceiveSpec),
    /// Serve ranges of an offered file; the stream goes on as [`transfer::RangeRequest`] and ranges. As a stream.
    Pull(transfer::PullSpec),
    /// How does the network look from there, and that side of the link between us? As a message or a stream.
    Network,
}

/// How a request ended, or how the stream that it heads begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Answer to [`Request::Link`].
    Link(link::LinkAnswer),
    /// Done; there is nothing to say.
    Done,
    /// Answer to [`Request::Exec`]: it runs, or ended before the caller needed to follow it.
    Job(exec::JobReport),
    /// Answer to [`Request::Attach`]: the stream follows.
    Attached(exec::Attached),
    /// Answer to [`Request::Jobs`].
    Jobs(Vec<exec::JobSummary>),
    /// Answer to [`Request::Offer`].
    Offered(transfer::Offered),
    /// Answer to [`Request::Pull`]: ranges follow as they are asked for.
    Pulling,
    /// Answer to [`Request::Receive`]: progress follows.
    Receiving,
    /// The host does not do this.
    Failed(Failure),
    /// Answer to [`Request::Network`].
    Network(Box<network::NetworkReport>),
}

/// A failure that a person can act upon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What sort of failure.
    pub kind: FailureKind,
    /// What was being done, and what went wrong, in words.
    pub what: String,
    /// What to do about it.
    pub hint: String,
}

/// What sort of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureKind {
    /// The host's mode or access rules do not allow it.
    Refused,
    /// The host does not know what was named (a job, a ticket, a file).
    NotFound,
    /// The request contradicts itself or a limit.
    Invalid,
    /// The host cannot take more of this now.
    Busy,
    /// The operating system said no: disk full, no permission, and their like.
    Os,
    /// What arrived is not what was sent.
    Corrupt,
    /// The other host that is needed cannot be reached.
    Unreachable,
    /// A bug on the host.
    Internal,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: hint.into() }
    }
}
