//! A port that the router forwards to us: asked for by PCP (RFC 6887), NAT-PMP (RFC 6886) or UPnP IGD, kept, and given back.
//!
//! In: the gateway, our port. Out: what asking brought, whenever that changes: above all the address at which the world reaches us. Nobody but the gateway of
//! the default route is asked, and no answer from elsewhere is believed; UPnP has to search by multicast for its address.
//! Never asks for a mapping that outlives us by more than [`LIFETIME`], and offers none whose address is behind yet another
//! NAT. It runs in a task of its own, so a router that does not answer costs nobody anything.
//! Asking -> kept (renewed at half its life, then sooner) -> lost, or given back within [`RELEASE`] -> asking again after
//! [`RETRY_MIN`], doubling to [`RETRY_MAX`].
//! Bounds: one mapping; [`ATTEMPT`] for one try.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU16,
    pin::pin,
    time::Duration,
};

use peerfleet_proto::{path::candidate::is_global, request::network::PortMapping};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    interfaces,
    surroundings::{Fact, Teller},
};

mod gateway;
mod mapping;

use mapping::{Mapping, Refusal};

/// Life that is asked for. RFC 6886 §3.3 recommends two hours; one is enough for who renews at half of it, and a mapping that
/// nobody gave back is gone sooner.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Shortest life that is believed: a router that gives less would be asked without end.
const SHORTEST_LIFE: Duration = Duration::from_secs(60);

/// Time for one try by all protocols: 1.75 s for PCP and NAT-PMP each, 3 s for the search of UPnP, the rest for its requests.
const ATTEMPT: Duration = Duration::from_secs(20);

/// Time that PCP has for itself before UPnP gateways are searched for beside it. A router that speaks it answers within
/// milliseconds; where none does, the two take 3.3 s together in place of 4.8 s.
const HEAD_START: Duration = Duration::from_millis(250);

/// Time to give a mapping back. A router answers within milliseconds.
pub(super) const RELEASE: Duration = Duration::from_secs(1);

/// First pause after a router would not forward. Most never will: it is not worth asking often.
const RETRY_MIN: Duration = Duration::from_secs(120);

/// Longest pause after a router would not forward.
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// Where UPnP gateways are searched for (UPnP Device Architecture 2.0 §1.3.2).
const SEARCH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(239, 255, 255, 250)), 1900);

/// Whom to ask, and as whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// The router of the default route.
    gateway: Ipv4Addr,
    /// Our address in its network.
    client: Ipv4Addr,
    /// Where UPnP gateways are searched for.
    search: SocketAddr,
    /// Shortest life of a mapping that is believed.
    shortest_life: Duration,
}

impl Place {
    /// Where we are; or why nobody is to be asked: there is no router, or no NAT that we would need it for.
    async fn find() -> Result<Self, PortMapping> {
        let client = interfaces::source_v4().ok_or(PortMapping::NoRouter)?;
        if is_global(IpAddr::V4(client)) {
            return Err(PortMapping::NotNeeded);
        }
        let gateway = gateway::find().await.ok_or(PortMapping::NoRouter)?;
        Ok(Self { gateway, client, search: SEARCH, shortest_life: SHORTEST_LIFE })
    }
}

/// A mapping that is asked for and kept until this is dropped or released.
#[derive(Debug)]
pub(super) struct Keeper {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Begins to ask for this port of ours.
    pub(super) fn start(port: NonZeroU16, tell: Teller) -> Self {
        let (stop, stopped) = oneshot::channel();
        Self { stop, task: tokio::spawn(keep(Place::find, port, tell, stopped)) }
    }

    /// Gives the mapping back, if there is one; takes at most [`RELEASE`].
    pub(super) async fn release(self) {
        drop(self.stop);
        if timeout(RELEASE, self.task).await.is_err() {
            tracing::debug!("the router did not take the port mapping back in time; it ends by itself");
        }
    }
}

async fn keep<F: Future<Output = Result<Place, PortMapping>>>(
    find: impl Fn() -> F,
    port: NonZeroU16,
    tell: Teller,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut pause = RETRY_MIN;
    loop {
        let asked = async {
            let place = find().await?;
            let mapping = timeout(ATTEMPT, ask(&place, port)).await.unwrap_or(Err(PortMapping::NoAnswer))?;
            Ok((mapping, place.shortest_life))
        };
        let mapping = tokio::select! {
            _ = &mut stopped => return,
            mapping = asked => mapping,
        };
        let told = match mapping {
            Ok((mapping, shortest_life)) => {
                pause = RETRY_MIN;
                hold(mapping, shortest_life, &tell, &mut stopped).await
            }
            Err(why) => tell.tell(Fact::Router(why)).await,
        };
        if told.is_none() {
            return;
        }
        tokio::select! {
            _ = &mut stopped => return,
            () = sleep(pause) => pause = (pause * 2).min(RETRY_MAX),
        }
    }
}

/// A mapping, by whichever protocol the router speaks, that the world can use.
async fn ask(place: &Place, port: NonZeroU16) -> Result<Mapping, PortMapping> {
    let mapping = by_any(place, port).await.map_err(|[pcp, upnp]| {
        tracing::debug!(%pcp, %upnp, gateway = %place.gateway, "the router forwards no port to us");
        refusal(&[upnp, pcp])
    })?;
    let (protocol, external) = (mapping.protocol(), mapping.external());
    if is_global(external.ip()) && external.port() != 0 {
        return Ok(mapping);
    }
    tracing::debug!(%external, "the router that forwards a port to us is behind another NAT");
    mapping.release().await;
    Err(PortMapping::Nested { protocol, addr: external })
}

/// A mapping by PCP or NAT-PMP, else by UPnP, whose gateways are searched for meanwhile; why there is none by either.
async fn by_any(place: &Place, port: NonZeroU16) -> Result<Mapping, [Refusal; 2]> {
    let searching = async {
        sleep(HEAD_START).await;
        mapping::search(place).await
    };
    let (mut by_pcp, mut searching) = (pin!(Mapping::by_pcp(place, port)), pin!(searching));
    let mut found = None;
    let pcp = loop {
        tokio::select! {
            biased;
            mapping = &mut by_pcp => match mapping {
                Ok(mapping) => return Ok(mapping),
                Err(pcp) => break pcp,
            },
            gateway = &mut searching, if found.is_none() => found = Some(gateway),
        }
    };
    let gateway = match found {
        Some(gateway) => gateway,
        None => searching.await,
    };
    let by_upnp = async { Mapping::by_upnp(gateway?, place, port).await };
    by_upnp.await.map_err(|upnp| [pcp, upnp])
}

/// What asking brought that failed in every way.
fn refusal(failures: &[Refusal]) -> PortMapping {
    let answered = failures.iter().find_map(Refusal::answered_by);
    answered.map_or(PortMapping::NoAnswer, |protocol| PortMapping::Refused { protocol })
}

/// Keeps a mapping until it is lost; `None` if it was given back because nobody wants it any more.
async fn hold(
    mut mapping: Mapping,
    shortest_life: Duration,
    tell: &Teller,
    stopped: &mut oneshot::Receiver<()>,
) -> Option<()> {
    let protocol = mapping.protocol();
    tracing::info!(external = %mapping.external(), ?protocol, "the router forwards a port to us");
    loop {
        let open = PortMapping::Open { protocol, addr: mapping.external(), life: mapping.life() };
        tell.tell(Fact::Router(open)).await?;
        let mut lost = PortMapping::NoAnswer;
        let life = mapping.life().max(shortest_life);
        let mut is_renewed = false;
        for wait in [life / 2, life / 4, life / 8] {
            tokio::select! {
                _ = &mut *stopped => {
                    mapping.release().await;
                    return None;
                }
                () = sleep(wait) => {}
            }
            match timeout(ATTEMPT, mapping.renew()).await {
                Ok(Ok(())) => {
                    is_renewed = true;
                    break;
                }
                Ok(Err(why)) => {
                    tracing::debug!(%why, "a port mapping was not renewed");
                    lost = refusal(&[why]);
                }
                Err(_elapsed) => tracing::debug!("the router did not answer when a port mapping was to be renewed"),
            }
        }
        if !is_renewed {
            tracing::info!("the router forwards no port to us any more");
            tell.tell(Fact::Router(lost)).await?;
            return Some(());
        }
    }
}

#[cfg(test)]
mod tests;
