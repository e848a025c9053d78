//! What `peer run` keeps going: this machine in its room, and the local door.
//!
//! In: a configuration with a token. Out: a machine that others see, until Ctrl-C or SIGTERM.
//! It never runs twice on one state folder, and never ends because the relay is away.
//! Starting -> running -> leaving (bounded by [`LEAVE_DEADLINE`]).

use std::{sync::Arc, time::Duration};

use peerfleet_proto::token::Token;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::Config,
    env::Env,
    failure::{Failure, Result},
    machine::{self, Machine, Role},
    mesh::BoxFuture,
    state::DaemonLock,
};

pub mod call;
pub mod door;

/// Time for jobs to end (they are asked, and killed 2 s later) and for telling the room good-bye. A relay that does not
/// answer must not keep a machine from shutting down: below the 10 s that container engines wait before they kill.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);

/// A daemon that runs.
pub struct Daemon {
    machine: Arc<Machine>,
    door: door::Door,
    stopped: BoxFuture<&'static str>,
    _lock: DaemonLock,
}

impl Daemon {
    /// Takes the state folder, so that no other daemon runs on it.
    ///
    /// # Errors
    /// If another daemon has it.
    pub fn lock(config: &Config) -> Result<DaemonLock> {
        config.state.lock()?.ok_or_else(|| {
            Failure::fixable("a peer already runs on this state folder")
                .cause(format!("{} is in use", config.state.path().display()))
                .hint("`peer status` shows it; for a second one on this machine give --state-dir")
        })
    }

    /// Joins the room and opens the door. From now on a signal to stop is heard, and kept for [`Daemon::run`].
    ///
    /// # Errors
    /// If something cannot be opened or started.
    pub async fn start(config: &Config, token: Token, env: &Env, lock: DaemonLock) -> Result<Self> {
        let stopped = Box::pin(stop_signal()?);
        let machine = machine::start(config, token, Role::Host).await?;
        let door = door::Door::bind(&config.state, env)?;
        Ok(Self { machine, door, stopped, _lock: lock })
    }

    /// The machine that it keeps going.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Runs until it is told to stop, then leaves the room.
    pub async fn run(self) {
        tokio::select! {
            () = self.door.serve(Arc::clone(&self.machine)) => {}
            name = self.stopped => tracing::info!(signal = name, "leaving the room"),
        }
        if tokio::time::timeout(LEAVE_DEADLINE, self.machine.shutdown()).await.is_err() {
            tracing::warn!("left without waiting any longer for jobs to end and the relay to answer");
        }
    }
}

/// The future of being told to stop; listens from the moment it is made. SIGHUP keeps its meaning: a peer that was
/// started with `nohup` outlives its terminal, any other ends with it.
///
/// # Errors
/// If the operating system gives no signals.
fn stop_signal() -> Result<impl Future<Output = &'static str>> {
    let listen =
        |kind| signal(kind).map_err(|error| Failure::bug("the operating system gives no signals").cause(error));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        }
    })
}
