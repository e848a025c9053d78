//! A small internet in network namespaces: a relay in a data centre, sites behind routers of every kind, hosts.
//!
//! In: which sites and hosts there are, and what befalls them. Out: places to run programs in. Namespaces, cables and
//! NATs are patchbay's; the programs are real ones. All addresses exist inside the namespaces only, and nothing touches
//! the host's own network. Homes number their hosts alike, as real ones do: an address of the other's network is also
//! one of ours. Whatever was made ends with the [`Lab`], also while a test panics.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::Future,
    io::Write as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use patchbay::{Device, Firewall, IpSupport, Nat, NatConfig, NatFiltering, Router};

use super::{
    cable::{Cable, Condition},
    program::{Peer, Relay, show_tail, succeed, wait_until},
};

/// The relay's port, on each of its addresses.
const RELAY_PORT: u16 = 8080;

/// Set where a machine that cannot run these tests is an error: in continuous integration.
const REQUIRE_ALL: &str = "PEERFLEET_REQUIRE_ALL";

/// The network of every home.
const HOME: &str = "192.168.1.0/24";

/// The network between a carrier's NAT and its customers' (RFC 6598).
const CARRIER: &str = "100.64.0.0/24";

/// What stands between a site and everybody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Nothing: hosts have public addresses, of both families.
    Public,
    /// One public port per host's port, and anybody may send to it.
    FullCone,
    /// One public port per host's port; lets in addresses that the host has sent to.
    AddressRestricted,
    /// One public port per host's port; lets in addresses and ports that the host has sent to.
    PortRestricted,
    /// Another public port, by chance, for each address and port that the host sends to; lets in those alone.
    Symmetric,
    /// A port-restricted NAT behind another of a carrier.
    DoubleNat,
    /// A port-restricted NAT that lets no UDP out.
    WithoutUdp,
    /// IPv6 alone, without translation; lets in addresses and ports that the host has sent to.
    V6Only,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 8] = [
        Self::Public,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
        Self::DoubleNat,
        Self::WithoutUdp,
        Self::V6Only,
    ];

    fn nat(self) -> Option<NatConfig> {
        match self {
            Self::Public | Self::V6Only => None,
            Self::FullCone => Nat::Open.to_config(),
            Self::AddressRestricted => {
                Some(NatConfig::builder().filtering(NatFiltering::AddressDependent).build().expect("it is possible"))
            }
            Self::PortRestricted | Self::DoubleNat | Self::WithoutUdp => Nat::Moderate.to_config(),
            Self::Symmetric => Nat::Strict.to_config(),
        }
    }
}

/// A network of hosts.
#[derive(Clone)]
pub(super) struct Site {
    kind: Kind,
    /// What hosts are plugged into.
    router: Router,
    /// Its interface to the world.
    wan: &'static str,
    number: usize,
}

/// The lab.
pub(super) struct Lab {
    // In the order in which they must end.
    relay: RefCell<Option<Relay>>,
    cables: RefCell<BTreeMap<usize, Cable>>,
    server: Device,
    net: patchbay::Lab,
    runtime: tokio::runtime::Runtime,
    scratch: tempfile::TempDir,
    token: String,
    sites: Cell<usize>,
    /// How often ports were changed.
    rebound: Cell<u16>,
}

impl Lab {
    /// A data centre with a relay; `None`, and a loud word, where the machine does not let us.
    pub(super) fn new() -> Option<Self> {
        if let Err(why) = possible() {
            assert!(std::env::var_os(REQUIRE_ALL).is_none(), "{REQUIRE_ALL} is set, but: {why}");
            eprintln!("SKIPPED: no test of NAT traversal was run: {why}");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (net, server) = runtime.block_on(async {
            let net = patchbay::Lab::builder().allow_real_root().build().await.expect("a lab");
            let centre = net.add_router("centre").ip_support(IpSupport::DualStack).build().await.expect("a router");
            let server = net.add_device("relay").iface("eth0", centre.id()).build().await.expect("a server");
            (net, server)
        });
        let lab = Self {
            relay: RefCell::new(None),
            cables: RefCell::default(),
            server,
            net,
            runtime,
            scratch: tempfile::tempdir().expect("a temporary folder"),
            token: peer_token(),
            sites: Cell::new(0),
            rebound: Cell::new(0),
        };
        settle(&lab.server);
        lab.start_relay();
        Some(lab)
    }

    /// One more site.
    pub(super) fn site(&self, kind: Kind) -> Site {
        self.site_with(kind, HOME)
    }

    /// One more site, whose hosts have addresses of this network if there is a NAT.
    pub(super) fn site_with(&self, kind: Kind, network: &str) -> Site {
        self.sites.set(self.sites.get() + 1);
        let number = self.sites.get();
        let carrier = (kind == Kind::DoubleNat).then(|| {
            let between = CARRIER.parse().expect("a network");
            let router = self.net.add_router(&format!("carrier{number}")).nat(Nat::Moderate).downstream_cidr(between);
            let router = self.wait(router.build()).expect("a router");
            drop_unsolicited(&router, "ix");
            router
        });
        let wan = if carrier.is_some() { "wan" } else { "ix" };
        let mut router = self.net.add_router(&format!("site{number}")).nat(kind.nat());
        if let Some(carrier) = carrier {
            router = router.upstream(carrier.id());
        }
        router = match kind {
            Kind::Public => router.ip_support(IpSupport::DualStack),
            Kind::V6Only => router.ip_support(IpSupport::V6Only).firewall(Firewall::BlockInbound),
            Kind::FullCone | Kind::AddressRestricted | Kind::PortRestricted | Kind::Symmetric | Kind::DoubleNat => {
                router.downstream_cidr(network.parse().expect("a network"))
            }
            Kind::WithoutUdp => {
                router.downstream_cidr(network.parse().expect("a network")).firewall_custom(|rules| rules.block_udp())
            }
        };
        let router = self.wait(router.build()).expect("a router");
        if kind != Kind::Public {
            drop_unsolicited(&router, wan);
        }
        Site { kind, router, wan, number }
    }

    /// A host at a site, with the peer running on it.
    pub(super) fn host(&self, site: &Site, name: &str) -> Peer {
        self.host_with(site, name, &[])
    }

    /// A host whose peer runs with these flags too.
    pub(super) fn host_with(&self, site: &Site, name: &str, flags: &[&str]) -> Peer {
        let device = self.net.add_device(name).iface("eth0", site.router.id());
        let device = self.wait(device.build()).expect("a host");
        settle(&device);
        let relay = self.relay_as_seen_from(site.kind);
        Peer::start(device, &self.scratch.path().join(name), relay, &self.token, flags)
    }

    /// Lets no UDP through this site's router any more, not that of flows that stand either.
    pub(super) fn cut_udp(&self, site: &Site) {
        nft(
            &site.router,
            "table inet cut { chain forward { type filter hook forward priority -10; meta l4proto udp drop\n}\n}",
        );
    }

    /// Undoes [`Lab::cut_udp`].
    pub(super) fn mend_udp(&self, site: &Site) {
        nft(&site.router, "delete table inet cut");
    }

    /// Makes the cable between a site and the world like this.
    pub(super) fn set_cable(&self, site: &Site, condition: Condition) {
        let mut cables = self.cables.borrow_mut();
        match cables.get(&site.number) {
            Some(cable) => cable.set(condition),
            None => {
                cables.insert(site.number, Cable::lay(&site.router, site.wan, condition));
            }
        }
    }

    /// What the network itself needs from this host to the relay and back.
    pub(super) fn ping_to_relay(&self, site: &Site, host: &Peer) -> Duration {
        host.ping(self.relay_as_seen_from(site.kind).ip())
    }

    /// The router forgets every flow, as if it had been switched off and on. Ports stay what they are by chance: those
    /// that are the same for all destinations are the host's own.
    pub(super) fn forget_flows(&self, site: &Site) {
        self.wait(site.router.flush_nat_state()).expect("flows are forgotten");
    }

    /// The router forgets every flow of UDP, and gives out other ports from now on: one for each port of a host, whoever
    /// it sends to. Only for sites whose NAT does so.
    pub(super) fn rebind_udp(&self, site: &Site) {
        let number = self.rebound.get();
        self.rebound.set(number + 1);
        let (low, high) = (20_000 + 1000 * number, 20_999 + 1000 * number);
        let (wan, address) = (site.wan, site.router.uplink_ip().expect("it has one"));
        nft(
            &site.router,
            &format!(
                "flush chain ip nat prerouting
                 flush chain ip nat postrouting
                 add rule ip nat postrouting oif \"{wan}\" meta l4proto udp snat to {address}:{low}-{high}
                 add rule ip nat postrouting oif \"{wan}\" snat to {address}"
            ),
        );
        site.router.run_sync(|| succeed("conntrack -D -p udp")).expect("flows are forgotten");
    }

    /// Takes a host's plug out of its network and puts it into another's.
    pub(super) fn roam(&self, host: &Peer, to: &Site) {
        let interface = host.device().iface("eth0").expect("it has one");
        self.wait(interface.replug(to.router.id())).expect("it is plugged in");
    }

    /// Ends the relay's program at once.
    pub(super) fn kill_relay(&self) {
        self.relay.take();
    }

    /// Starts the relay's program, and waits until it answers.
    pub(super) fn start_relay(&self) {
        let addresses = [Kind::Public, Kind::V6Only].map(|kind| self.relay_as_seen_from(kind));
        let relay = Relay::start(self.server.clone(), addresses, &self.log_of_relay());
        *self.relay.borrow_mut() = Some(relay);
    }

    fn relay_as_seen_from(&self, kind: Kind) -> SocketAddr {
        match kind {
            Kind::V6Only => (self.server.ip6().expect("it has one"), RELAY_PORT).into(),
            Kind::Public
            | Kind::FullCone
            | Kind::AddressRestricted
            | Kind::PortRestricted
            | Kind::Symmetric
            | Kind::DoubleNat
            | Kind::WithoutUdp => (self.server.ip().expect("it has one"), RELAY_PORT).into(),
        }
    }

    fn log_of_relay(&self) -> PathBuf {
        self.scratch.path().join("relay.log")
    }

    fn wait<T>(&self, done: impl Future<Output = T>) -> T {
        self.runtime.block_on(done)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_tail("relay", &self.log_of_relay());
        }
        self.relay.take();
    }
}

/// Packets to the router itself that nobody asked for are dropped, as home routers do: answered, they would leave a
/// connection entry that takes the port from the host behind it.
fn drop_unsolicited(router: &Router, wan: &str) {
    nft(
        router,
        &format!(
            "table inet own {{ chain input {{
type filter hook input priority 0; iifname \"{wan}\" meta l4proto udp drop
             }}\n}}"
        ),
    );
}

/// Waits until a host's addresses can be used: those of IPv6 are tentative until the cable's other end is up.
fn settle(device: &Device) {
    let addresses = device.ip().map(IpAddr::from).into_iter().chain(device.ip6().map(IpAddr::from));
    for address in addresses {
        wait_until("the address can be used", || device.run_sync(move || Ok(UdpSocket::bind((address, 0))?)).ok());
    }
}

/// Runs `nft` on a router.
#[track_caller]
fn nft(router: &Router, rules: &str) {
    let input = rules.to_owned();
    let done = router.run_sync(move || attempt("nft", &["-f", "-"], &input).map_err(anyhow::Error::msg));
    if let Err(why) = done {
        panic!("{why:#}\n{rules}");
    }
}

fn possible() -> Result<(), String> {
    patchbay::check_caps().map_err(|error| error.to_string())?;
    for (program, argument) in [
        ("nft", "--version"),
        ("iptables", "--version"),
        ("ip6tables", "--version"),
        ("conntrack", "--version"),
        ("ping", "-V"),
        ("setpriv", "--version"),
    ] {
        attempt(program, &[argument], "")?;
    }
    // In a namespace of its own, which ends with the command.
    attempt("unshare", &["--net", "nft", "add table inet trial"], "")
}

fn peer_token() -> String {
    let made = Command::new(env!("CARGO_BIN_EXE_peer")).args(["token", "new"]).output().expect("peer runs");
    String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned()
}

fn attempt(program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shown = format!("`{program} {}`", arguments.join(" "));
    let mut child = command.spawn().map_err(|error| format!("{shown}: {error}"))?;
    // Whoever reads no input has closed it, and is judged by how it ends.
    let _closed = child.stdin.take().expect("it is piped").write_all(input.as_bytes());
    let output = child.wait_with_output().map_err(|error| format!("{shown}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{shown}: {}", said.trim())) }
}
