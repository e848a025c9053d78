//! What front doors say to the daemon, and what it answers.
//!
//! One connection is one call: a [`Call`] frame, then [`Reply`] frames until the daemon ends the connection. The caller
//! says nothing more; closing the connection gives up. Only behind [`Reply::Opened`] the bytes of the stream flow both ways as they are. Frames are those of [`crate::mesh::stream`].
//! Both enums are append-only; a daemon that does not understand a call says so with its version.

use std::time::Duration;

use peerfleet_proto::{
    id::InstanceId,
    presence::Mode,
    request::{Outcome, Request, link::Route},
};
use serde::{Deserialize, Serialize};

use crate::{
    machine::{Host, ModeChange, Status},
    mesh::{AskProgress, NotJoined, OpenFault, Report},
};

/// Most instances in one [`Call::AskMany`]: with the request beside them they stay within a frame.
pub const MAX_ASKED: usize = 1024;

/// Hosts in one [`Reply::Hosts`]: each may have a presence of 2 KiB, and a frame holds 128 KiB.
pub const HOSTS_PER_REPLY: usize = 32;

/// What a front door wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// How does this machine stand? Answered by [`Reply::Status`].
    Status,
    /// Which hosts are there? Answered by [`Reply::Hosts`], as often as needed.
    Hosts,
    /// Wait for the room's roster. Answered by [`Reply::Joined`].
    Joined {
        /// How long.
        timeout: Duration,
    },
    /// Let others do this from now on. Answered by [`Reply::ModeSet`].
    SetMode(Mode),
    /// Ask these instances. Answered by [`Reply::Progress`] until each has ended.
    AskMany {
        /// At most [`MAX_ASKED`].
        to: Vec<InstanceId>,
        /// The same for all.
        request: Request,
        /// When to give up.
        deadline: Duration,
    },
    /// Open a stream. Answered by [`Reply::Opened`].
    Open {
        /// To whom.
        to: InstanceId,
        /// The head.
        request: Request,
        /// Which link.
        route: Route,
    },
    /// Do this on this machine, for its own user. Answered by [`Reply::Answered`].
    AskHere(Request),
    /// Do this on this machine, with a stream behind it. Answered by [`Reply::Opened`].
    OpenHere(Request),
    /// What is known of the network around? Answered by [`Reply::Report`].
    Report {
        /// The instance whose link it is about.
        about: Option<InstanceId>,
        /// Whether to measure anew.
        fresh: bool,
    },
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// How this machine stands.
    Status(Status),
    /// Some of the hosts; more follow until the connection ends.
    Hosts(Vec<Host>),
    /// The roster is known, or not.
    Joined(Result<(), NotJoined>),
    /// The mode is set.
    ModeSet(ModeChange),
    /// How asking one of many stands.
    Progress(InstanceId, AskProgress),
    /// The outcome of the head; if there is one, the stream follows.
    Opened(Result<Outcome, OpenFault>),
    /// The outcome.
    Answered(Outcome),
    /// The daemon does not know such a call.
    NotUnderstood {
        /// Its version.
        version: String,
    },
    /// What is known of the network.
    Report(Box<Result<Report, NotJoined>>),
}
