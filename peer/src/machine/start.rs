//! From configuration to a running machine.

use std::sync::Arc;

use peerfleet_proto::{
    presence::{Epoch, Mode, Presence, Service},
    token::{RoomKeys, Token},
};
use tokio::sync::watch;

use super::{
    About, Machine, Services,
    services::{self, MeshCell},
};
use crate::{
    access::Policy,
    config::Config,
    exec::{Jobs, JobsConfig},
    failure::{Failure, Result},
    identity::Identity,
    mesh::{Mesh, MeshConfig},
    store::Store,
    transfer::Transfers,
};

/// The database of jobs and of the audit log, in the state folder.
const STORE: &str = "state.db";

/// What an instance is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It works for them, as far as its mode allows.
    Host,
    /// It only asks: it is not listed, and nobody asks anything of it but the files it offers.
    Caller,
}

/// Starts this machine in its room. It does not wait for the relay: see [`Machine::joined`].
///
/// # Errors
/// If the identity cannot be loaded or made, or a service cannot start.
pub async fn start(config: &Config, token: Token, role: Role) -> Result<Arc<Machine>> {
    let identity = Identity::load_or_create(&config.state)?;
    let room = config.room.value.to_string();
    let derived = room.clone();
    let keys = tokio::task::spawn_blocking(move || RoomKeys::derive(&token, &derived))
        .await
        .map_err(|error| Failure::bug("the room's keys could not be derived").cause(error))?;
    let about = About {
        relay: config.relay.value.to_string(),
        room,
        room_id: keys.room(),
        presence: presence(config, role),
        mode: config.mode.clone(),
        no_exec: config.no_exec,
        state_dir: config.state.path().display().to_string(),
    };
    let (policy, judged) = watch::channel(Arc::new(policy(config, role)));
    let (mesh, services) = connect(config, role, &identity, Arc::new(keys), about.presence.clone(), judged).await?;
    Ok(Arc::new(Machine::new(mesh, services, about, policy)))
}

fn presence(config: &Config, role: Role) -> Presence {
    let services = match (role, config.no_exec) {
        (Role::Caller, _) => vec![],
        (Role::Host, true) => vec![Service::Transfer],
        (Role::Host, false) => vec![Service::Exec, Service::Transfer],
    };
    Presence {
        name: config.name.value.to_string(),
        tags: config.tags.value.iter().map(ToString::to_string).collect(),
        os: std::env::consts::OS.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mode: config.mode.value,
        services,
        epoch: Epoch([0; 16]),
    }
}

/// The rules by which others are judged. A mere caller lets nobody do anything but pull what it offered.
fn policy(config: &Config, role: Role) -> Policy {
    let state_folder = config.state.path().canonicalize().unwrap_or_else(|_| config.state.path().to_owned());
    let mode = if role == Role::Host { config.mode.value } else { Mode::Disabled };
    Policy { mode, exec: !config.no_exec, access: config.access.clone(), state_folder }
}

/// Starts services and mesh, each knowing the other.
async fn connect(
    config: &Config,
    role: Role,
    identity: &Identity,
    keys: Arc<RoomKeys>,
    presence: Presence,
    policy: watch::Receiver<Arc<Policy>>,
) -> Result<(Mesh, Services)> {
    let folder = config.state.path();
    // A caller lives for one command beside the daemon, whose database is not its own.
    let store = if role == Role::Host { Store::at(folder.join(STORE)) } else { Store::volatile() };
    let jobs = Jobs::new(store.clone(), JobsConfig::new(folder.to_owned()));
    if role == Role::Host {
        let lost = jobs.recover().await.map_err(|fault| {
            Failure::fixable(format!("cannot open {}", folder.join(STORE).display()))
                .cause(fault)
                .hint("free some space, or move the file away to begin a new list of jobs")
        })?;
        tracing::debug!(lost, "jobs of the run before");
    }
    let transfers = Transfers::new(folder);
    let dial = config.network.dial_config(&config.relay.value)?;
    let cell = MeshCell::default();
    let for_others = services::for_others(jobs.clone(), transfers.clone(), Arc::clone(&cell), policy, store);
    let for_here = services::for_here(transfers, Arc::clone(&cell));
    let config = MeshConfig {
        relay: config.relay.value.clone(),
        dial,
        keys,
        identity: identity.secret().clone(),
        presence,
        udp: true,
        paths: config.paths.clone(),
    };
    let mesh = Mesh::start(config, Arc::clone(&for_others));
    let filled = cell.set(mesh.clone());
    debug_assert!(filled.is_ok(), "the cell is new");
    Ok((mesh, Services { for_others, for_here, jobs }))
}
