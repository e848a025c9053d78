//! The daemon, as a front door reaches it through its socket.

use std::{collections::BTreeSet, io, path::PathBuf, time::Duration};

use peerfleet_proto::{
    id::InstanceId,
    presence::Mode,
    request::{Outcome, Request, link::Route},
};
use tokio::sync::mpsc;

use crate::{
    daemon::{
        call::{Call, MAX_ASKED, Reply},
        door,
    },
    failure::{Failure, Result},
    machine::{Host, ModeChange, Status},
    mesh::{AskFault, AskProgress, NotJoined, OpenFault, Report, Stream},
};

/// Progress of asking many that waits to be read; the daemon waits beyond.
const PROGRESS_QUEUE: usize = 256;

/// A daemon's door. Every call is a connection of its own, so a daemon that was restarted is reached again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorClient {
    path: PathBuf,
}

impl DoorClient {
    /// Reaches the door at `path`; `None` if no daemon is there.
    ///
    /// # Errors
    /// If there is a daemon, but it does not let us in.
    pub async fn reach(path: PathBuf) -> Result<Option<Self>> {
        match door::connect(&path).await {
            Ok(_) => Ok(Some(Self { path })),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(Self { path }.broken(error)),
        }
    }

    /// How the daemon's machine stands.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn status(&self) -> Result<Status> {
        let reply = self.one_reply(Call::Status).await?;
        let Reply::Status(status) = reply else { return Err(self.odd(&reply)) };
        Ok(status)
    }

    /// The hosts of the room.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let mut stream = self.call(&Call::Hosts).await.map_err(|error| self.broken(error))?;
        let mut hosts = Vec::new();
        while let Some(reply) = stream.recv.read_frame().await.map_err(|error| self.broken(error))? {
            let Reply::Hosts(some) = reply else { return Err(self.odd(&reply)) };
            hosts.extend(some);
        }
        Ok(hosts)
    }

    /// Waits until the room's roster is known.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn joined(&self, timeout: Duration) -> Result<std::result::Result<(), NotJoined>> {
        let reply = self.one_reply(Call::Joined { timeout }).await?;
        let Reply::Joined(joined) = reply else { return Err(self.odd(&reply)) };
        Ok(joined)
    }

    /// What the daemon knows of the network around it, and of its link to `about`.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn report(
        &self,
        about: Option<InstanceId>,
        fresh: bool,
    ) -> Result<std::result::Result<Report, NotJoined>> {
        let reply = self.one_reply(Call::Report { about, fresh }).await?;
        let Reply::Report(report) = reply else { return Err(self.odd(&reply)) };
        Ok(*report)
    }

    /// Changes what the daemon's machine lets others do.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn set_mode(&self, mode: Mode) -> Result<ModeChange> {
        let reply = self.one_reply(Call::SetMode(mode)).await?;
        let Reply::ModeSet(change) = reply else { return Err(self.odd(&reply)) };
        Ok(change)
    }

    /// Asks many instances; each ends exactly once, as lost if the daemon goes away.
    pub fn ask_many(
        &self,
        to: &[InstanceId],
        request: &Request,
        deadline: Duration,
    ) -> mpsc::Receiver<(InstanceId, AskProgress)> {
        let (sender, receiver) = mpsc::channel(PROGRESS_QUEUE);
        for some in to.chunks(MAX_ASKED) {
            let call = Call::AskMany { to: some.to_vec(), request: request.clone(), deadline };
            tokio::spawn(self.clone().pass_progress(call, some.iter().copied().collect(), sender.clone()));
        }
        receiver
    }

    /// Opens a stream to an instance.
    ///
    /// # Errors
    /// [`OpenFault`], also if the daemon cannot be asked.
    pub async fn open(
        &self,
        to: InstanceId,
        request: Request,
        route: Route,
    ) -> std::result::Result<(Outcome, Stream), OpenFault> {
        self.opened(Call::Open { to, request, route }).await
    }

    /// Has the daemon do something on its machine.
    ///
    /// # Errors
    /// If the daemon cannot be asked.
    pub async fn ask_here(&self, request: Request) -> Result<Outcome> {
        let reply = self.one_reply(Call::AskHere(request)).await?;
        let Reply::Answered(outcome) = reply else { return Err(self.odd(&reply)) };
        Ok(outcome)
    }

    /// Has the daemon do something on its machine, with a stream behind it.
    ///
    /// # Errors
    /// [`OpenFault`], also if the daemon cannot be asked.
    pub async fn open_here(&self, request: Request) -> std::result::Result<(Outcome, Stream), OpenFault> {
        self.opened(Call::OpenHere(request)).await
    }

    async fn call(&self, call: &Call) -> io::Result<Stream> {
        let mut stream = door::connect(&self.path).await?;
        stream.send.write_frame(call).await?;
        Ok(stream)
    }

    async fn one_reply(&self, call: Call) -> Result<Reply> {
        let reply = async { self.call(&call).await?.recv.read_frame().await };
        match reply.await {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.broken("it closed the door before it answered")),
            Err(error) => Err(self.broken(error)),
        }
    }

    async fn opened(&self, call: Call) -> std::result::Result<(Outcome, Stream), OpenFault> {
        let broken = |why: String| OpenFault::NoLink(format!("the daemon on this machine does not answer: {why}"));
        let mut stream = self.call(&call).await.map_err(|error| broken(error.to_string()))?;
        match stream.recv.read_frame().await {
            Ok(Some(Reply::Opened(opened))) => Ok((opened?, stream)),
            Ok(Some(other)) => Err(broken(self.odd(&other).to_string())),
            Ok(None) => Err(OpenFault::Lost),
            Err(error) => Err(broken(error.to_string())),
        }
    }

    async fn pass_progress(
        self,
        call: Call,
        mut unfinished: BTreeSet<InstanceId>,
        to: mpsc::Sender<(InstanceId, AskProgress)>,
    ) {
        let pass = async {
            let mut stream = self.call(&call).await?;
            while let Some(Reply::Progress(instance, progress)) = stream.recv.read_frame().await? {
                if matches!(progress, AskProgress::Ended(_)) && !unfinished.remove(&instance) {
                    continue;
                }
                if to.send((instance, progress)).await.is_err() {
                    break;
                }
            }
            io::Result::Ok(())
        };
        tokio::select! {
            // The connection ends with this task, and so does the daemon's asking.
            () = to.closed() => return,
            passed = pass => if let Err(error) = passed {
                tracing::debug!(%error, "the daemon's answer broke off");
            },
        }
        for instance in unfinished {
            let _ = to.send((instance, AskProgress::Ended(Err(AskFault::Lost)))).await;
        }
    }

    fn broken(&self, why: impl std::fmt::Display) -> Failure {
        Failure::unreachable("cannot reach the peer that runs on this machine")
            .cause(format!("{}: {why}", self.path.display()))
            .hint("look at its log, or start it again with `peer run`")
    }

    fn odd(&self, reply: &Reply) -> Failure {
        let ours = env!("CARGO_PKG_VERSION");
        let cause = match reply {
            Reply::NotUnderstood { version } => format!("it is version {version}, this command is {ours}"),
            Reply::Status(_)
            | Reply::Hosts(_)
            | Reply::Joined(_)
            | Reply::ModeSet(_)
            | Reply::Progress(..)
            | Reply::Opened(_)
            | Reply::Answered(_)
            | Reply::Report(_) => "its answer does not belong to the question".to_owned(),
        };
        Failure::fixable("the peer that runs on this machine does not understand this command")
            .cause(cause)
            .hint("stop it and start it again, so that both are the same version")
    }
}
