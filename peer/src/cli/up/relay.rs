//! The relay inside `peer up`.

use std::{net::SocketAddr, time::Duration};

use peerfleet_relay::{Config, Handle, Relay};
use tokio::task::JoinHandle;

use crate::failure::{Failure, Result};

/// Time for the relay's peers to be told that it ends; it has a deadline of its own, which this is beyond.
const STOP_DEADLINE: Duration = Duration::from_secs(6);

/// A relay that runs in this process.
#[derive(Debug)]
pub(super) struct OwnRelay {
    address: SocketAddr,
    handle: Handle,
    running: JoinHandle<()>,
}

/// Starts a relay.
pub(super) fn start(bind: SocketAddr) -> Result<OwnRelay> {
    let relay = Relay::bind(Config { bind: vec![bind], ..Config::default() }).map_err(|error| {
        Failure::fixable("cannot start the relay")
            .cause(error)
            .hint("is another program on that port? --bind takes another address, as in --bind 0.0.0.0:9000")
    })?;
    let address = relay.local_addrs().first().copied().unwrap_or(bind);
    let handle = relay.handle();
    Ok(OwnRelay { address, handle, running: tokio::spawn(relay.run()) })
}

impl OwnRelay {
    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells its peers, and ends.
    pub(super) async fn stop(self) {
        self.handle.shutdown();
        if tokio::time::timeout(STOP_DEADLINE, self.running).await.is_err() {
            tracing::warn!("the relay did not end in time");
        }
    }
}
