//! A small internet in network namespaces: a public segment with a relay on it, sites behind NAT routers, hosts.
//!
//! In: which sites and hosts there are, which traffic is cut. Out: namespaces to run programs in. All addresses are of
//! the documentation and private ranges and exist inside the namespaces only. Nothing touches the host's own network.
//! Whatever was made is removed on drop, also while a test panics; names hold the process id, so labs never collide.

use std::{
    cell::RefCell,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use super::program::{Peer, relay, wait_until};

/// Where the relay is reached.
pub(super) const RELAY_V4: &str = "203.0.113.1:8080";
/// Where those without IPv4 reach it.
pub(super) const RELAY_V6: &str = "[2001:db8::1]:8080";

/// Set where a machine that cannot run these tests is an error: in continuous integration.
const REQUIRE_ALL: &str = "PEERFLEET_REQUIRE_ALL";

/// What stands between a site and the public segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nat {
    /// Nothing: hosts have public addresses.
    Open,
    /// One public port per host's port, whoever it sends to; lets in only whom the host has sent to.
    Easy,
    /// Another public port for each whom the host sends to.
    Hard,
    /// As the easy one, but no UDP passes.
    WithoutUdp,
    /// IPv6 alone, without translation; lets in only whom the host has sent to.
    FirewalledV6,
}

/// A network of hosts, by its number in the lab.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    number: usize,
    nat: Nat,
}

/// The lab.
pub(super) struct Lab {
    prefix: String,
    token: String,
    scratch: tempfile::TempDir,
    spaces: RefCell<Vec<String>>,
    relay: Option<Child>,
    sites: Vec<Site>,
    hosts: RefCell<usize>,
}

impl Lab {
    /// A public segment with a relay; `None`, and a loud word, where the machine does not let us.
    pub(super) fn new() -> Option<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        if let Err(why) = possible() {
            assert!(std::env::var_os(REQUIRE_ALL).is_none(), "{REQUIRE_ALL} is set, but: {why}");
            eprintln!("SKIPPED: no test of NAT traversal was run: {why}");
            return None;
        }
        let mut lab = Self {
            prefix: format!("pfnat-{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed)),
            token: peer_token(),
            scratch: tempfile::tempdir().expect("a temporary folder"),
            spaces: RefCell::default(),
            relay: None,
            sites: Vec::new(),
            hosts: RefCell::new(0),
        };
        let public = lab.space("public");
        ip(
            &public,
            "link add public type bridge\nlink set public up\naddr add 203.0.113.1/24 dev public\naddr add 2001:db8::1/64 dev public nodad\n",
        );
        write_sysctl(&public, "ipv6/conf/all/forwarding");
        lab.relay = Some(lab.run_relay(&public));
        Some(lab)
    }

    /// One more site.
    pub(super) fn site(&mut self, nat: Nat) -> Site {
        let site = Site { number: self.sites.len() + 1, nat };
        self.sites.push(site);
        if nat != Nat::Open {
            let router = self.space(&site.router());
            self.plug_into_public(&router, &site.router(), "wan");
            let n = site.number;
            let mut setup = "link add lan type bridge\nlink set lan up\n".to_owned();
            match nat {
                Nat::FirewalledV6 => {
                    let public = self.name("public");
                    ip(&public, &format!("route add 2001:db8:{n}::/64 via 2001:db8::{n:x}1\n"));
                    write_sysctl(&router, "ipv6/conf/all/forwarding");
                    let _ = write!(
                        setup,
                        "addr add 2001:db8::{n:x}1/64 dev wan nodad\naddr add 2001:db8:{n}::1/64 dev lan nodad\n\
                         route add default via 2001:db8::1\n"
                    );
                }
                Nat::Open | Nat::Easy | Nat::Hard | Nat::WithoutUdp => {
                    write_sysctl(&router, "ipv4/ip_forward");
                    let _ = write!(setup, "addr add 203.0.113.{n}1/24 dev wan\naddr add 10.77.{n}.1/24 dev lan\n");
                }
            }
            ip(&router, &setup);
            nft(&router, &rules(nat));
        }
        site
    }

    /// A host at a site, with the peer running on it.
    pub(super) fn host(&self, site: Site, name: &str) -> Peer {
        let number = {
            let mut hosts = self.hosts.borrow_mut();
            *hosts += 1;
            *hosts
        };
        let space = self.space(name);
        let n = site.number;
        let last = 100 + number;
        let mut relay = RELAY_V4;
        match site.nat {
            Nat::Open => {
                self.plug_into_public(&space, name, "eth0");
                ip(&space, &format!("addr add 203.0.113.{last}/24 dev eth0\n"));
            }
            Nat::FirewalledV6 => {
                self.plug(&space, name, &self.name(&site.router()), "lan", "eth0");
                ip(
                    &space,
                    &format!(
                        "addr add 2001:db8:{n}::{last}/64 dev eth0 nodad\nroute add default via 2001:db8:{n}::1\n"
                    ),
                );
                relay = RELAY_V6;
            }
            Nat::Easy | Nat::Hard | Nat::WithoutUdp => {
                self.plug(&space, name, &self.name(&site.router()), "lan", "eth0");
                ip(&space, &format!("addr add 10.77.{n}.{last}/24 dev eth0\nroute add default via 10.77.{n}.1\n"));
            }
        }
        Peer::start(&space, name, &self.scratch.path().join(name), relay, &self.token)
    }

    /// Lets no UDP through this site's router any more.
    pub(super) fn cut_udp(&self, site: Site) {
        nft(&self.name(&site.router()), "add rule inet lab cut meta l4proto udp drop");
    }

    /// Undoes [`Lab::cut_udp`].
    pub(super) fn mend_udp(&self, site: Site) {
        nft(&self.name(&site.router()), "flush chain inet lab cut");
    }

    /// Lets this host send no faster than so many megabit per second.
    pub(super) fn slow_down(&self, host: &Peer, megabit: u32) {
        let rate = format!("{megabit}mbit");
        run(
            "tc",
            &[
                "-n",
                host.space(),
                "qdisc",
                "add",
                "dev",
                "eth0",
                "root",
                "tbf",
                "rate",
                &rate,
                "burst",
                "64kb",
                "latency",
                "50ms",
            ],
            "",
        );
    }

    fn run_relay(&self, space: &str) -> Child {
        let program = relay();
        let log = fs::File::create(self.log_of_relay()).expect("a log");
        let mut command = in_space(space, &program);
        command.args(["--bind", RELAY_V4, "--bind", RELAY_V6]).env_clear().stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(log).spawn().expect("the relay runs");
        wait_until("the relay is well", || {
            let mut health = in_space(space, &program);
            let asked = health.args(["health", RELAY_V4]).stdout(Stdio::null()).stderr(Stdio::null());
            asked.status().expect("it runs").success().then_some(())
        });
        child
    }

    fn log_of_relay(&self) -> PathBuf {
        self.scratch.path().join("relay.log")
    }

    fn plug_into_public(&self, space: &str, label: &str, device: &str) {
        self.plug(space, label, &self.name("public"), "public", device);
    }

    /// A cable from `device` in `space` to the bridge of another namespace.
    fn plug(&self, space: &str, label: &str, far: &str, bridge: &str, device: &str) {
        ip(space, &format!("link add {device} type veth peer name to-{label} netns {far}\nlink set {device} up\n"));
        ip(far, &format!("link set to-{label} master {bridge}\nlink set to-{label} up\n"));
    }

    fn name(&self, label: &str) -> String {
        format!("{}-{label}", self.prefix)
    }

    fn space(&self, label: &str) -> String {
        let name = self.name(label);
        run("ip", &["netns", "add", &name], "");
        self.spaces.borrow_mut().push(name.clone());
        ip(&name, "link set lo up\n");
        name
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_tail("relay", &self.log_of_relay());
        }
        if let Some(mut relay) = self.relay.take() {
            let _gone_already = relay.kill();
            let _gone_already = relay.wait();
        }
        for space in self.spaces.get_mut() {
            let removed = Command::new("ip").args(["netns", "del", space]).status();
            if !removed.is_ok_and(|status| status.success()) {
                eprintln!("the namespace {space} could not be removed");
            }
        }
    }
}

impl Site {
    fn router(&self) -> String {
        format!("router{}", self.number)
    }
}

/// The command `program` inside a namespace.
pub(super) fn in_space(space: &str, program: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", space]).arg(program);
    command
}

/// Prints the last lines of a log.
pub(super) fn show_tail(whose: &str, log: &Path) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    eprintln!("--- the end of the log of {whose}:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
}

/// Unsolicited packets to the router itself are dropped, as home routers do: answered, they would leave a connection
/// entry that takes the port from the host behind it.
fn rules(nat: Nat) -> String {
    let (translate, forward) = match nat {
        Nat::Open => ("", ""),
        Nat::Easy => ("oifname wan masquerade", ""),
        Nat::Hard => ("oifname wan masquerade random", ""),
        Nat::WithoutUdp => ("oifname wan masquerade", "meta l4proto udp drop"),
        Nat::FirewalledV6 => ("", "iifname wan meta l4proto { tcp, udp } ct state new drop"),
    };
    format!(
        "table inet lab {{
            chain translate {{ type nat hook postrouting priority 100; {translate}
            }}
            chain cut {{ }}
            chain through {{ type filter hook forward priority 0; jump cut; {forward}
            }}
            chain own {{ type filter hook input priority 0; iifname wan meta l4proto {{ tcp, udp }} drop
            }}
        }}"
    )
}

fn possible() -> Result<(), String> {
    for program in ["ip", "nft", "tc"] {
        let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        found.map_err(|error| format!("`{program}` does not run: {error}"))?;
    }
    let trial = format!("pfnat-{}-trial-{:?}", std::process::id(), std::thread::current().id());
    let trial: String = trial.chars().filter(|char| char.is_ascii_alphanumeric() || *char == '-').collect();
    attempt("ip", &["netns", "add", &trial], "")?;
    let able = attempt("ip", &["netns", "exec", &trial, "nft", "add table inet trial"], "")
        .and_then(|()| attempt("ip", &["-n", &trial, "link", "add", "trial", "type", "bridge"], ""));
    run("ip", &["netns", "del", &trial], "");
    able
}

fn peer_token() -> String {
    let made = Command::new(env!("CARGO_BIN_EXE_peer")).args(["token", "new"]).output().expect("peer runs");
    String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned()
}

fn ip(space: &str, lines: &str) {
    run("ip", &["-n", space, "-batch", "-"], lines);
}

fn nft(space: &str, rules: &str) {
    run("ip", &["netns", "exec", space, "nft", "-f", "-"], rules);
}

fn write_sysctl(space: &str, name: &str) {
    run("ip", &["netns", "exec", space, "sh", "-c", &format!("echo 1 > /proc/sys/net/{name}")], "");
}

#[track_caller]
fn run(program: &str, arguments: &[&str], input: &str) {
    if let Err(why) = attempt(program, arguments, input) {
        panic!("{why}\n{input}");
    }
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
