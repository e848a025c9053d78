//! This machine in one room: its mesh and its services, as every front door reaches them.
//!
//! In: configuration and token. Out: who is there, asking them, streams to them, and what is done on this very machine.
//! A request to this machine's own id is judged by its mode as anybody's would be; what its own user does here with
//! their own files (both ends of a transfer that are here) is not: they could do it without us.
//! It never speaks to a person and keeps nothing on disk itself.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use peerfleet_proto::{
    id::{InstanceId, PeerId, RequestId, RoomId},
    presence::{Mode, Presence},
    request::{Outcome, Request, link::Route},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::{
    access::Policy,
    config::{Origin, Sourced},
    exec::Jobs,
    mesh::{self, AskFault, AskProgress, Caller, Mesh, NotJoined, OpenFault, PathView, Serve, Stream, UplinkState},
    random,
};

mod services;
mod start;

pub use start::{Role, start};

/// Progress of asking many that waits to be read; the sender waits beyond.
const PROGRESS_QUEUE: usize = 256;

/// What answers on this machine.
#[derive(Clone)]
pub struct Services {
    /// What others ask, judged by mode and access rules.
    pub for_others: Arc<dyn Serve>,
    /// What this machine's own user asks of it, judged by the operating system alone.
    pub for_here: Arc<dyn Serve>,
    /// What runs here.
    pub jobs: Jobs,
}

/// A host, as a front door sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its identity.
    pub peer: PeerId,
    /// Its process.
    pub instance: InstanceId,
    /// What it says of itself.
    pub presence: Presence,
    /// Whether the relay has it in the room now.
    pub present: bool,
    /// Whether it is this machine.
    pub here: bool,
    /// How the link to it travels.
    pub link: PathView,
}

impl Host {
    /// What people call it.
    pub fn name(&self) -> &str {
        &self.presence.name
    }
}

/// How this machine stands in its room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// URL of the relay.
    pub relay: String,
    /// Name of the room.
    pub room: String,
    /// The room as the relay knows it.
    pub room_id: RoomId,
    /// How the connection to the relay stands.
    pub uplink: UplinkState,
    /// Name of this machine.
    pub name: String,
    /// This process in the room.
    pub me: Caller,
    /// What this machine lets others do.
    pub mode: Mode,
    /// Who set the mode.
    pub mode_origin: String,
    /// Whether commands of others are never run.
    pub no_exec: bool,
    /// The state folder.
    pub state_dir: String,
}

/// What a machine says of itself to its own user.
#[derive(Debug, Clone)]
pub struct About {
    /// URL of the relay.
    pub relay: String,
    /// Name of the room.
    pub room: String,
    /// The room as the relay knows it.
    pub room_id: RoomId,
    /// What it says of itself to others.
    pub presence: Presence,
    /// The mode at the start, and who set it.
    pub mode: Sourced<Mode>,
    /// Whether commands of others are never run.
    pub no_exec: bool,
    /// The state folder.
    pub state_dir: String,
}

/// Which mode is in force, who set it, and which was at the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeChange {
    /// The mode before.
    pub before: Mode,
    /// The flag or variable that will set the mode again at the next start, if there is one.
    pub overridden_by: Option<String>,
}

/// Mesh and services of one instance.
pub struct Machine {
    mesh: Mesh,
    services: Services,
    about: About,
    policy: watch::Sender<Arc<Policy>>,
    mode_origin: Mutex<Origin>,
}

impl Machine {
    /// Joins the parts; `policy` is what others are judged by.
    pub fn new(mesh: Mesh, services: Services, about: About, policy: watch::Sender<Arc<Policy>>) -> Self {
        let mode_origin = Mutex::new(about.mode.origin.clone());
        Self { mesh, services, about, policy, mode_origin }
    }

    /// This process in the room.
    pub fn me(&self) -> Caller {
        self.mesh.me()
    }

    /// Waits until the room's roster is known.
    ///
    /// # Errors
    /// [`NotJoined`] after `timeout`, saying why.
    pub async fn joined(&self, timeout: Duration) -> Result<(), NotJoined> {
        self.mesh.joined(timeout).await
    }

    /// The hosts of the room, this machine among them if it is one, by name and id.
    pub fn hosts(&self) -> Vec<Host> {
        let me = self.me();
        let roster = self.mesh.roster().borrow().clone();
        let others = roster.peers.iter().filter(|entry| entry.presence.is_host()).map(|entry| Host {
            peer: entry.peer,
            instance: entry.instance,
            presence: entry.presence.clone(),
            present: entry.present,
            here: false,
            link: self.mesh.path(entry.instance, Route::Auto),
        });
        let presence = Presence { mode: self.policy.borrow().mode, ..self.about.presence.clone() };
        let here = presence.is_host().then(|| Host {
            peer: me.peer,
            instance: me.instance,
            presence,
            present: true,
            here: true,
            link: PathView::default(),
        });
        let mut hosts: Vec<Host> = others.chain(here).collect();
        hosts.sort_by(|one, other| {
            (one.name(), one.peer, one.instance).cmp(&(other.name(), other.peer, other.instance))
        });
        hosts
    }

    /// How this machine stands.
    pub fn status(&self) -> Status {
        let About { relay, room, room_id, presence, no_exec, state_dir, mode: _ } = self.about.clone();
        Status {
            version: presence.version,
            relay,
            room,
            room_id,
            uplink: self.mesh.roster().borrow().uplink,
            name: presence.name,
            me: self.me(),
            mode: self.policy.borrow().mode,
            mode_origin: self.mode_origin.lock().unwrap_or_else(PoisonError::into_inner).to_string(),
            no_exec,
            state_dir,
        }
    }

    /// What is known of the network around, and of the link to `about`; see [`Mesh::report`].
    ///
    /// # Errors
    /// [`NotJoined`] if the mesh has stopped.
    pub async fn report(&self, about: Option<InstanceId>, fresh: bool) -> Result<mesh::Report, NotJoined> {
        self.mesh.report(about, fresh).await
    }

    /// Changes what this machine lets others do, from now on and until this process ends.
    pub fn set_mode(&self, mode: Mode) -> ModeChange {
        let before = self.policy.borrow().mode;
        self.policy.send_modify(|policy| Arc::make_mut(policy).mode = mode);
        self.mesh.set_mode(mode);
        *self.mode_origin.lock().unwrap_or_else(PoisonError::into_inner) = Origin::ModeCommand;
        ModeChange { before, overridden_by: self.about.mode.overriding().map(str::to_owned) }
    }

    /// Asks many instances the same; each of them ends exactly once. Dropping the receiver gives up.
    pub fn ask_many(
        self: &Arc<Self>,
        to: Vec<InstanceId>,
        request: Request,
        deadline: Duration,
    ) -> mpsc::Receiver<(InstanceId, AskProgress)> {
        let me = self.me().instance;
        let (here, others): (Vec<InstanceId>, Vec<InstanceId>) = to.into_iter().partition(|instance| *instance == me);
        if here.is_empty() {
            return self.mesh.ask_many(others, request, deadline);
        }
        let (sender, receiver) = mpsc::channel(PROGRESS_QUEUE);
        if !others.is_empty() {
            let mut far = self.mesh.ask_many(others, request.clone(), deadline);
            let sender = sender.clone();
            tokio::spawn(async move {
                while let Some(progress) = far.recv().await {
                    if sender.send(progress).await.is_err() {
                        break;
                    }
                }
            });
        }
        let machine = Arc::clone(self);
        tokio::spawn(async move { machine.ask_self(request, deadline, sender).await });
        receiver
    }

    /// Opens a stream headed by a request and reads the head's outcome.
    ///
    /// # Errors
    /// [`OpenFault`] if there is no link, or it is lost first.
    pub async fn open(&self, to: InstanceId, request: Request, route: Route) -> Result<(Outcome, Stream), OpenFault> {
        let me = self.me();
        if to == me.instance {
            return serve_stream(&self.services.for_others, me, request).await;
        }
        self.mesh.open(to, request, route).await
    }

    /// Has this very machine do something for its own user.
    pub async fn ask_here(&self, request: Request) -> Outcome {
        self.services.for_here.ask(self.me(), new_request_id(), request).await
    }

    /// Has this very machine do something for its own user, with a stream behind it.
    ///
    /// # Errors
    /// [`OpenFault::Lost`] if the service ended without an answer.
    pub async fn open_here(&self, request: Request) -> Result<(Outcome, Stream), OpenFault> {
        serve_stream(&self.services.for_here, self.me(), request).await
    }

    /// Ends what runs here, and leaves the room.
    pub async fn shutdown(&self) {
        self.services.jobs.shutdown().await;
        self.mesh.shutdown().await;
    }

    async fn ask_self(&self, request: Request, deadline: Duration, to: mpsc::Sender<(InstanceId, AskProgress)>) {
        let me = self.me();
        let id = new_request_id();
        // A task of its own: a service that began goes on when nobody waits for its outcome any more.
        let answer = tokio::spawn(self.services.for_others.ask(me, id, request));
        for progress in [AskProgress::Asked(id), AskProgress::Accepted] {
            if to.send((me.instance, progress)).await.is_err() {
                return;
            }
        }
        let ended = match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(_panicked)) => Err(AskFault::Lost),
            Err(_elapsed) => Err(AskFault::DeadlineExceeded),
        };
        // Whoever asked may have given up meanwhile.
        let _ = to.send((me.instance, AskProgress::Ended(ended))).await;
    }
}

fn new_request_id() -> RequestId {
    RequestId::from_bytes(random::bytes())
}

async fn serve_stream(serve: &Arc<dyn Serve>, me: Caller, request: Request) -> Result<(Outcome, Stream), OpenFault> {
    let (mut near, far) = Stream::local_pair();
    tokio::spawn(serve.stream(me, request, far));
    match near.recv.read_frame().await {
        Ok(Some(outcome)) => Ok((outcome, near)),
        Ok(None) | Err(_) => Err(OpenFault::Lost),
    }
}
