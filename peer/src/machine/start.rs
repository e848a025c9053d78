//! From configuration to a running machine.

use std::sync::Arc;

use peerfleet_proto::{
    presence::{Epoch, Presence, Service},
    token::{RoomKeys, Token},
};
use tokio::sync::watch;

use super::{About, Machine, Services};
use crate::{
    config::Config,
    failure::{Failure, Result},
    identity::Identity,
    mesh::{BoxFuture, Caller, Mesh, Serve, Stream},
};

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
        mode_origin: config.mode.origin.clone(),
        no_exec: config.no_exec,
        state_dir: config.state.path().display().to_string(),
    };
    let (mode, judged) = watch::channel(config.mode.value);
    let (mesh, services) = connect(config, identity, Arc::new(keys), &about, judged)?;
    Ok(Arc::new(Machine::new(mesh, services, about, mode)))
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

/// Starts services and mesh, each knowing the other.
fn connect(
    _config: &Config,
    _identity: Identity,
    _keys: Arc<RoomKeys>,
    _about: &About,
    _mode: watch::Receiver<peerfleet_proto::presence::Mode>,
) -> Result<(Mesh, Services)> {
    let _ = Services { for_others: Arc::new(Nothing), for_here: Arc::new(Nothing) };
    Err(Failure::bug("the mesh is not connected yet"))
}

struct Nothing;

impl Serve for Nothing {
    fn ask(
        &self,
        _: Caller,
        _: peerfleet_proto::id::RequestId,
        _: peerfleet_proto::request::Request,
    ) -> BoxFuture<peerfleet_proto::request::Outcome> {
        Box::pin(async { peerfleet_proto::request::Outcome::Done })
    }

    fn stream(&self, _: Caller, _: peerfleet_proto::request::Request, _: Stream) -> BoxFuture<()> {
        Box::pin(async {})
    }
}
