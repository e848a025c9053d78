//! What the instance knows of the network around it, told to who asks.

use std::time::Instant;

use peerfleet_proto::{id::InstanceId, request::network::NetworkReport};
use tokio::sync::oneshot;

use super::Actor;
use crate::mesh::Report;

/// What a handle wants told.
pub(in crate::mesh) struct ReportWanted {
    /// Whether to measure anew what can be measured without a link.
    pub(in crate::mesh) fresh: bool,
    /// The instance whose link it is about.
    pub(in crate::mesh) about: Option<InstanceId>,
    /// Who waits.
    pub(in crate::mesh) reply: oneshot::Sender<Report>,
}

impl Actor {
    /// A handle wants to know. Where anew, what was measured before is forgotten; links notice nothing of it.
    pub(super) async fn report(&mut self, wanted: ReportWanted, now: Instant) {
        let ReportWanted { fresh, about, reply } = wanted;
        if fresh {
            self.measure(now).await;
        }
        let remote = about.and_then(|instance| self.book.remote(instance));
        let network = self.paths.report(remote.as_deref(), now);
        let (uplink, trouble) = self.members.standing();
        let report = Report {
            uplink,
            trouble,
            relay: self.relay.clone(),
            proxy: self.line.proxy(),
            measuring: self.paths.is_measuring(),
            network: NetworkReport { relay_rtt: self.relay_rtt, ..network },
        };
        if reply.send(report).is_err() {
            tracing::trace!("nobody waits for a report any more");
        }
    }

    async fn measure(&mut self, now: Instant) {
        if let Err(why) = self.start_links(now).await {
            tracing::debug!(%why, "nothing is measured over UDP");
        }
        self.paths.measure(now);
        self.relay_rtt = None;
        self.wants_ping = true;
    }
}
