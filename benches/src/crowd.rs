//! Instances within this process, in a room of a relay that is a process of its own.
//!
//! In: the relay's address. Out: hosts that run commands, and callers, over real sockets. Hosts share one store
//! in a file: no command begins before its record is written there, as on a real host.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use peerfleet_peer::{
    access::Policy,
    exec::{Jobs, JobsConfig},
    mesh::{DialConfig, Mesh, MeshConfig, PathConfig, RelayUrl, UplinkState},
    random::{self, SystemRandom},
    serve::Services,
    store::Store,
};
use peerfleet_proto::{
    presence::{Epoch, Mode, Presence, Service},
    request::{
        Outcome, Request,
        exec::{Command, EndState, ExecSpec, Follow},
    },
    token::{RoomKeys, Token},
};
use tokio::sync::watch;
use x25519_dalek::StaticSecret;

/// How long anything asked here may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Whoever is in the room by this process.
pub struct Crowd {
    relay: RelayUrl,
    keys: Arc<RoomKeys>,
    store: Store,
    folder: PathBuf,
    policy: watch::Receiver<Arc<Policy>>,
}

impl Crowd {
    /// A room of its own at that relay; nobody is in it yet.
    ///
    /// # Errors
    /// If the address makes no URL.
    pub fn new(relay: SocketAddr, folder: &Path) -> Result<Self> {
        let policy =
            Policy { mode: Mode::Bypass, exec: true, access: Default::default(), state_folder: folder.to_owned() };
        Ok(Self {
            relay: format!("ws://{relay}").parse()?,
            keys: Arc::new(RoomKeys::derive(&Token::generate(&mut SystemRandom), "bench")),
            store: Store::at(folder.join("state.db")),
            folder: folder.to_owned(),
            policy: watch::channel(Arc::new(policy)).1,
        })
    }

    /// A host that runs whatever it is asked to, with an identity and a job engine of its own.
    pub fn host(&self, name: &str) -> Mesh {
        self.join(name, vec![Service::Exec])
    }

    /// A caller with an identity that nobody met before, once it sees that many hosts.
    ///
    /// # Errors
    /// If it does not within [`DEADLINE`].
    pub async fn caller(&self, hosts: usize) -> Result<Mesh> {
        let caller = self.join("caller", vec![]);
        let mut roster = caller.roster();
        let complete = roster.wait_for(|roster| {
            let present = roster.peers.iter().filter(|entry| entry.present && entry.presence.is_host()).count();
            roster.uplink == UplinkState::Joined && present == hosts
        });
        tokio::time::timeout(DEADLINE, complete).await.context("the room does not fill")??;
        Ok(caller)
    }

    fn join(&self, name: &str, services: Vec<Service>) -> Mesh {
        let jobs = Jobs::new(self.store.clone(), JobsConfig::new(self.folder.clone()));
        let serve =
            Services { jobs, files: None, network: None, policy: self.policy.clone(), store: self.store.clone() };
        let presence = Presence {
            name: name.to_owned(),
            tags: vec!["bench".to_owned()],
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: Mode::Bypass,
            services,
            epoch: Epoch([0; 16]),
        };
        let config = MeshConfig {
            dial: DialConfig::default(),
            relay: self.relay.clone(),
            keys: Arc::clone(&self.keys),
            identity: StaticSecret::from(random::bytes()),
            presence,
            udp: true,
            paths: PathConfig::default(),
        };
        Mesh::start(config, Arc::new(serve))
    }
}

/// The request to run `true`.
pub fn run_true(follow: Follow) -> Request {
    Request::Exec(ExecSpec {
        command: Command::Argv(vec![b"true".to_vec()]),
        cwd: None,
        env: vec![],
        timeout: Some(DEADLINE),
        stdin: false,
        follow,
    })
}

/// Whether that is the outcome of a command that ended well.
///
/// # Errors
/// If it is any other.
pub fn ended_well(outcome: &Outcome) -> Result<()> {
    let Outcome::Job(report) = outcome else { bail!("no job but {outcome:?}") };
    ensure!(report.end.as_ref().is_some_and(|end| end.state == EndState::Exited(0)), "it did not end well: {report:?}");
    Ok(())
}
