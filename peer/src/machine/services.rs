//! What answers on this machine: jobs and transfers behind access rules for others, transfers alone for its own user.

use std::sync::{Arc, OnceLock};

use peerfleet_proto::request::{
    Failure, FailureKind, Outcome, Request,
    transfer::{OfferSpec, PullSpec, ReceiveSpec},
};
use tokio::sync::watch;

use crate::{
    access::Policy,
    exec::Jobs,
    mesh::{BoxFuture, Caller, Mesh, Roster, Serve, Stream, UplinkState},
    serve::{Files, Network, Services as Judged},
    store::Store,
    transfer::{Origin, Transfers},
};

/// The mesh that a transfer opens its lanes by. The mesh is made with its services, so it comes last.
pub(super) type MeshCell = Arc<OnceLock<Mesh>>;

/// What others ask, judged by mode and access rules.
pub(super) fn for_others(
    jobs: Jobs,
    transfers: Transfers,
    mesh: MeshCell,
    policy: watch::Receiver<Arc<Policy>>,
    store: Store,
) -> Arc<dyn Serve> {
    let network: Arc<dyn Network> = Arc::new(MeshNetwork(Arc::clone(&mesh)));
    let files: Arc<dyn Files> = Arc::new(MeshFiles { transfers, mesh });
    Arc::new(Judged { jobs, files: Some(files), network: Some(network), policy, store })
}

/// What this machine's own user asks of it, judged by the operating system alone.
pub(super) fn for_here(transfers: Transfers, mesh: MeshCell) -> Arc<dyn Serve> {
    Arc::new(Here(MeshFiles { transfers, mesh }))
}

/// How the mesh sees the network.
struct MeshNetwork(MeshCell);

impl Network for MeshNetwork {
    fn report(&self, caller: Caller) -> BoxFuture<Outcome> {
        let mesh = self.0.get().cloned();
        Box::pin(async move {
            let Some(mesh) = mesh else { return Outcome::Failed(starting()) };
            match mesh.report(Some(caller.instance), false).await {
                Ok(report) => Outcome::Network(Box::new(report.network)),
                Err(why) => Outcome::Failed(Failure::new(FailureKind::Unreachable, why.to_string(), "try again")),
            }
        })
    }
}

/// Transfers whose lanes go over the mesh.
#[derive(Clone)]
struct MeshFiles {
    transfers: Transfers,
    mesh: MeshCell,
}

impl MeshFiles {
    fn offer_as(&self, origin: Origin, spec: OfferSpec) -> BoxFuture<Outcome> {
        let transfers = self.transfers.clone();
        Box::pin(async move { transfers.offer(origin, spec).await.map_or_else(Outcome::Failed, Outcome::Offered) })
    }

    fn receive_as(&self, origin: Origin, spec: ReceiveSpec, mut stream: Stream) -> BoxFuture<()> {
        let Self { transfers, mesh } = self.clone();
        Box::pin(async move {
            match mesh.get() {
                Some(mesh) => transfers.serve_receive(origin, spec, mesh, stream).await,
                None => conclude(&mut stream, starting()).await,
            }
        })
    }
}

impl Files for MeshFiles {
    fn offer(&self, caller: Caller, spec: OfferSpec) -> BoxFuture<Outcome> {
        self.offer_as(caller.into(), spec)
    }

    fn pull(&self, caller: Caller, spec: PullSpec, stream: Stream) -> BoxFuture<()> {
        let transfers = self.transfers.clone();
        Box::pin(async move { transfers.serve_pull(caller, spec, stream).await })
    }

    fn receive(&self, caller: Caller, spec: ReceiveSpec, stream: Stream) -> BoxFuture<()> {
        let receiving = self.receive_as(caller.into(), spec, stream);
        let Some(mesh) = self.mesh.get().cloned() else { return receiving };
        Box::pin(async move {
            tokio::select! {
                () = receiving => {}
                () = replaced(&mesh, caller) => tracing::info!("who asked for a transfer is gone and has come back"),
            }
        })
    }
}

/// Waits until the caller's process has left the room and another one of its machine is there. What it asked for would
/// hold the partial file against the new one until its link is given up.
async fn replaced(mesh: &Mesh, caller: Caller) {
    let mut roster = mesh.roster();
    let is_replaced = |roster: &Arc<Roster>| {
        let mut present = roster.peers.iter().filter(|peer| peer.present && peer.peer == caller.peer).peekable();
        let is_back = present.peek().is_some();
        roster.uplink == UplinkState::Joined && is_back && present.all(|peer| peer.instance != caller.instance)
    };
    if roster.wait_for(is_replaced).await.is_err() {
        // The mesh ends, and everything with it.
        std::future::pending::<()>().await;
    }
}

/// Both ends of a transfer that are here: this machine's user could read and write those files without us.
struct Here(MeshFiles);

impl Serve for Here {
    fn ask(&self, _: Caller, _: peerfleet_proto::id::RequestId, request: Request) -> BoxFuture<Outcome> {
        let Request::Offer(spec) = request else { return Box::pin(async { Outcome::Failed(not_here()) }) };
        self.0.offer_as(Origin::Here, spec)
    }

    fn stream(&self, _: Caller, request: Request, mut stream: Stream) -> BoxFuture<()> {
        let Request::Receive(spec) = request else {
            return Box::pin(async move { conclude(&mut stream, not_here()).await });
        };
        self.0.receive_as(Origin::Here, spec, stream)
    }
}

async fn conclude(stream: &mut Stream, failure: Failure) {
    let said = stream.send.write_frame(&Outcome::Failed(failure)).await;
    if said.is_err() || stream.send.finish().await.is_err() {
        tracing::debug!("a caller went away before its answer");
    }
}

fn starting() -> Failure {
    Failure::new(FailureKind::Busy, "this machine is still starting", "try again in a moment")
}

fn not_here() -> Failure {
    Failure::new(FailureKind::Invalid, "this is asked of a host, not of one's own machine", "name the host")
}
