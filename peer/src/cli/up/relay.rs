//! The relay inside `peer up`.

use std::net::SocketAddr;

use crate::failure::{Failure, Result};

/// A relay that runs in this process.
pub(super) struct OwnRelay {
    address: SocketAddr,
}

/// Starts a relay.
pub(super) fn start(bind: SocketAddr) -> Result<OwnRelay> {
    let _ = OwnRelay { address: bind };
    Err(Failure::bug("the relay is not connected yet"))
}

impl OwnRelay {
    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells its peers, and ends.
    pub(super) async fn stop(self) {}
}
