//! What this host learns of the network around it, by tasks in the background.
//!
//! In: what to find out. Out: [`Fact`]s, when they are known. Never keeps anybody waiting: whatever takes time, a router that
//! does not answer or a resolver that is slow, takes it in a task of its own.
//! Bounds: one task of each kind; starting it anew ends the one before. [`FACTS`] facts wait to be heard.

use std::net::SocketAddr;

use peerfleet_proto::path::mapping::Ports;
use tokio::{sync::mpsc, task::JoinSet};

use super::{interfaces::watch::Watch, sampling::sample};

/// Facts that may wait; tasks wait beyond.
const FACTS: usize = 16;

/// Something that was learnt.
#[derive(Debug)]
pub(super) enum Fact {
    /// An interface, an address or a default route changed.
    Interfaces,
    /// How the NAT picks ports.
    Ports(Ports),
}

/// The tasks.
pub(super) struct Surroundings {
    tell: mpsc::Sender<Fact>,
    watching: JoinSet<()>,
    sampling: JoinSet<()>,
}

impl Surroundings {
    /// No tasks, and where their facts will come out.
    pub(super) fn new() -> (Self, mpsc::Receiver<Fact>) {
        let (tell, facts) = mpsc::channel(FACTS);
        (Self { tell, watching: JoinSet::new(), sampling: JoinSet::new() }, facts)
    }

    /// Tells of every change of interfaces from now on, as long as the system does.
    pub(super) fn watch(&mut self) {
        let mut watch = match Watch::open() {
            Ok(watch) => watch,
            Err(error) => {
                tracing::debug!(%error, "the system does not tell of interfaces: they are looked at from time to time");
                return;
            }
        };
        let tell = self.tell.clone();
        self.watching.spawn(async move {
            loop {
                match watch.changed().await {
                    Ok(()) => {
                        if tell.send(Fact::Interfaces).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => return tracing::warn!(%error, "the system tells of interfaces no more"),
                }
            }
        });
    }

    /// Whether the system tells of changes by itself.
    pub(super) fn is_watching(&mut self) -> bool {
        while self.watching.try_join_next().is_some() {}
        !self.watching.is_empty()
    }

    /// Finds out how the NAT picks ports.
    pub(super) fn sample(&mut self, responder: SocketAddr) {
        self.sampling = JoinSet::new();
        let tell = self.tell.clone();
        self.sampling.spawn(async move {
            match sample(responder).await {
                // Whoever wanted to know may be gone.
                Ok(ports) => _ = tell.send(Fact::Ports(ports)).await,
                Err(error) => tracing::debug!(%error, "no sockets to learn how the NAT picks ports"),
            }
        });
    }
}
