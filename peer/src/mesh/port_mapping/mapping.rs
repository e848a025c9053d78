//! One port that one router forwards, by the protocol that it understood.
//!
//! In: a [`Place`], our port. Out: the address that the world sees, and for how long. PCP is asked first and falls back to
//! NAT-PMP where the router says so; UPnP is what remains.
//! Never asks for a mapping without an end, which some routers insist on: it would outlive a crash for ever.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use crab_nat::{
    GatewayAddress, InternetProtocol, MappingFailure, PortMapping, PortMappingOptions, PortMappingType, TimeoutConfig,
    natpmp, pcp,
};
use igd_next::{
    AddPortError, PortMappingProtocol, SearchOptions,
    aio::{Gateway, tokio::Tokio, tokio::search_gateway},
};
use peerfleet_proto::request::network::MappingProtocol;

use super::{LIFETIME, Place};

/// Requests to a router that is one hop away: 250, 500 and 1,000 ms are waited for an answer.
const PATIENCE: TimeoutConfig =
    TimeoutConfig { initial_timeout: Duration::from_millis(250), max_retries: 2, max_retry_timeout: None };

/// How long UPnP gateways are searched for; they spread their answers over up to 3 s, as the request says.
const SEARCH_TIME: Duration = Duration::from_secs(3);

/// What a router's list of mappings says of ours.
const DESCRIPTION: &str = "peerfleet";

/// Why there is no mapping.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// PCP or NAT-PMP failed.
    #[error("{0}")]
    Pcp(#[from] MappingFailure),
    /// NAT-PMP does not tell the external address.
    #[error("NAT-PMP({0})")]
    NatPmp(#[from] natpmp::Failure),
    /// No UPnP gateway was found.
    #[error("{0}")]
    NotFound(#[from] igd_next::SearchError),
    /// Somebody else than the gateway said it was one.
    #[error("{0} says that it is the gateway, and is not")]
    Stranger(IpAddr),
    /// The UPnP gateway would not.
    #[error("{0}")]
    Upnp(#[from] AddPortError),
    /// The UPnP gateway would not forward any other port either.
    #[error("{0}")]
    UpnpAny(#[from] igd_next::AddAnyPortError),
    /// The UPnP gateway does not tell the external address.
    #[error("{0}")]
    NoAddress(#[from] igd_next::GetExternalIpError),
}

impl Refusal {
    /// By which protocol a router answered, if one did.
    pub(super) fn answered_by(&self) -> Option<MappingProtocol> {
        match self {
            Self::Pcp(MappingFailure::Pcp(pcp::Failure::Socket(_) | pcp::Failure::Timeout))
            | Self::NotFound(_)
            | Self::Stranger(_) => None,
            Self::Pcp(MappingFailure::Pcp(_)) => Some(MappingProtocol::Pcp),
            // It said that it speaks NAT-PMP, or it would not have been asked by it.
            Self::Pcp(MappingFailure::NatPmp(_)) | Self::NatPmp(_) => Some(MappingProtocol::NatPmp),
            Self::Upnp(_) | Self::UpnpAny(_) | Self::NoAddress(_) => Some(MappingProtocol::Upnp),
        }
    }
}

/// A mapping that a router made.
pub(super) struct Mapping {
    by: By,
    external: SocketAddr,
}

enum By {
    /// PCP or NAT-PMP.
    Pcp(Box<PortMapping>),
    Upnp {
        gateway: Box<Gateway<Tokio>>,
        local: SocketAddr,
    },
}

impl Mapping {
    /// By PCP, or NAT-PMP if the router speaks that.
    pub(super) async fn by_pcp(place: &Place, port: NonZeroU16) -> Result<Self, Refusal> {
        let lifetime = u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX);
        let options = PortMappingOptions {
            external_port: Some(port),
            lifetime_seconds: Some(lifetime),
            timeout_config: Some(PATIENCE),
        };
        let gateway = GatewayAddress::IpV4(place.gateway);
        let mapping = PortMapping::new(gateway, place.client.into(), InternetProtocol::Udp, port, options).await?;
        match external_of(&mapping).await {
            Ok(external) => Ok(Self { by: By::Pcp(Box::new(mapping)), external }),
            Err(why) => {
                // What cannot be offered is of no use; should this be lost, it ends by itself.
                _ = mapping.try_drop().await;
                Err(why)
            }
        }
    }

    /// By UPnP, from the gateway that [`search`] found.
    pub(super) async fn by_upnp(gateway: Gateway<Tokio>, place: &Place, port: NonZeroU16) -> Result<Self, Refusal> {
        let ip = gateway.get_external_ip().await?;
        let local = SocketAddr::new(place.client.into(), port.get());
        let external_port = match add(&gateway, port.get(), local).await {
            Ok(()) => port.get(),
            Err(AddPortError::PortInUse) => {
                gateway.add_any_port(PortMappingProtocol::UDP, local, lease(), DESCRIPTION).await?
            }
            Err(other) => return Err(other.into()),
        };
        let external = SocketAddr::new(ip, external_port);
        Ok(Self { by: By::Upnp { gateway: Box::new(gateway), local }, external })
    }

    /// Where the world reaches us.
    pub(super) fn external(&self) -> SocketAddr {
        self.external
    }

    /// For how long the router forwards, from the last renewal on.
    pub(super) fn life(&self) -> Duration {
        match &self.by {
            By::Pcp(mapping) => Duration::from_secs(mapping.lifetime().into()).min(LIFETIME),
            By::Upnp { .. } => LIFETIME,
        }
    }

    /// What the router understood.
    pub(super) fn protocol(&self) -> MappingProtocol {
        match &self.by {
            By::Pcp(mapping) => match mapping.mapping_type() {
                PortMappingType::NatPmp => MappingProtocol::NatPmp,
                PortMappingType::Pcp { .. } => MappingProtocol::Pcp,
            },
            By::Upnp { .. } => MappingProtocol::Upnp,
        }
    }

    /// Asks for a new life; the external address may be another one behind it.
    pub(super) async fn renew(&mut self) -> Result<(), Refusal> {
        match &mut self.by {
            By::Pcp(mapping) => {
                mapping.renew().await?;
                self.external = external_of(mapping).await?;
            }
            By::Upnp { gateway, local } => {
                add(gateway, self.external.port(), *local).await?;
                self.external = SocketAddr::new(gateway.get_external_ip().await?, self.external.port());
            }
        }
        Ok(())
    }

    /// Gives it back.
    pub(super) async fn release(self) {
        let refused = match self.by {
            By::Pcp(mapping) => mapping.try_drop().await.err().map(|(failure, _)| failure.to_string()),
            By::Upnp { gateway, .. } => {
                let removed = gateway.remove_port(PortMappingProtocol::UDP, self.external.port()).await;
                removed.err().map(|error| error.to_string())
            }
        };
        if let Some(why) = refused {
            tracing::debug!(%why, "the router did not take a port mapping back; it ends by itself");
        }
    }
}

/// Searches for the gateway by UPnP.
pub(super) async fn search(place: &Place) -> Result<Gateway<Tokio>, Refusal> {
    let mut options = SearchOptions::default();
    options.bind_addr = SocketAddr::new(place.client.into(), 0);
    options.broadcast_address = place.search;
    options.timeout = Some(SEARCH_TIME);
    options.single_search_timeout = Some(SEARCH_TIME);
    options.allowed_gateway_ips = vec![place.gateway.into()];
    let gateway = search_gateway(options).await?;
    if gateway.addr.ip() == IpAddr::V4(place.gateway) { Ok(gateway) } else { Err(Refusal::Stranger(gateway.addr.ip())) }
}

async fn external_of(mapping: &PortMapping) -> Result<SocketAddr, Refusal> {
    let ip = match mapping.mapping_type() {
        PortMappingType::Pcp { external_ip, .. } => external_ip.to_canonical(),
        PortMappingType::NatPmp => natpmp::external_address(mapping.gateway(), Some(PATIENCE)).await?.into(),
    };
    Ok(SocketAddr::new(ip, mapping.external_port().get()))
}

async fn add(gateway: &Gateway<Tokio>, external_port: u16, local: SocketAddr) -> Result<(), AddPortError> {
    gateway.add_port(PortMappingProtocol::UDP, external_port, local, lease(), DESCRIPTION).await
}

fn lease() -> u32 {
    u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX)
}
