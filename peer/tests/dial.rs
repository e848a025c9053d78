//! Ways to a relay: TLS, paths, proxies, and what is said when one does not lead there. Real sockets, a real relay.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_peer::mesh::{DialConfig, Mesh, MeshConfig, NotJoined, Proxy};
use peerfleet_proto::request::{Outcome, Request, link::Route};
use peerfleet_relay::{Config, Handle, Relay};
use tokio::{task::JoinHandle, time::timeout};

#[path = "dial/authority.rs"]
mod authority;
mod common;
#[path = "dial/programs.rs"]
mod programs;
#[path = "dial/server.rs"]
mod server;

use authority::{Authority, Span, self_signed};
use common::{DEADLINE, Echo, echo};
use server::{Manner, Server};

/// What a peer may spend on one try, with some seconds for a machine that is busy.
const TRY: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_behind_tls_is_joined_by_whoever_trusts_its_authority() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = authority.server(&["localhost", "127.0.0.1"], Span::Now);
    let front = Server::tls(front, Manner::Forward(relay.address)).await;
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("wss://{host}:{}", front.address.port());
        joins(&mesh(&url, trusting(&authority))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_signed_by_itself_is_good_when_it_is_trusted_itself() {
    let relay = TestRelay::start();
    let (config, authorities) = self_signed(&["localhost"]);
    let front = Server::tls(config, Manner::Forward(relay.address)).await;
    let url = format!("wss://localhost:{}", front.address.port());
    joins(&mesh(&url, DialConfig { authorities, ..DialConfig::default() })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_of_tls_that_speaks_1_2_at_most_will_do() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = Server::tls(authority.old_server(&["localhost"]), Manner::Forward(relay.address)).await;
    joins(&mesh(&format!("wss://localhost:{}", front.address.port()), trusting(&authority))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_beneath_a_path_is_joined_through_what_takes_the_path_off() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = authority.server(&["localhost"], Span::Now);
    let front = Server::tls(front, Manner::Strip("/a/fleet", relay.address)).await;
    joins(&mesh(&format!("wss://localhost:{}/a/fleet/", front.address.port()), trusting(&authority))).await;
    let host = format!("\r\nHost: localhost:{}\r\n", front.address.port());
    assert!(
        front.heads()[0].starts_with("GET /a/fleet/v1 ") && front.heads()[0].contains(&host),
        "{:?}",
        front.heads()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_asked_for_the_relay_by_name_and_shown_the_credentials() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = authority.server(&["relay.invalid"], Span::Now);
    let front = Server::tls(front, Manner::Forward(relay.address)).await;
    let proxy = Server::plain(Manner::Tunnel(Some("me:p@ss/word"), front.address)).await;
    let config = through(&format!("http://me:p%40ss%2Fword@{}", proxy.address), &authority);
    joins(&mesh("wss://relay.invalid", config.clone())).await;
    joins(&mesh("wss://relay.invalid:8443/", config)).await;
    let asked: Vec<String> = proxy.heads().iter().map(|head| head.lines().next().unwrap().to_owned()).collect();
    assert_eq!(asked, ["CONNECT relay.invalid:443 HTTP/1.1", "CONNECT relay.invalid:8443 HTTP/1.1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_leads_to_a_relay_without_tls_and_to_an_ipv6_address_too() {
    let relay = TestRelay::start();
    let proxy = Server::plain(Manner::Tunnel(None, relay.address)).await;
    let config = DialConfig { proxy: Some(named(&format!("http://{}", proxy.address))), ..DialConfig::default() };
    joins(&mesh("ws://[2001:db8::1]:8080", config)).await;
    assert!(proxy.heads()[0].starts_with("CONNECT [2001:db8::1]:8080 HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\n"));
    assert!(!proxy.heads()[0].contains("Authorization"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_passes_whole_through_tls_within_tls() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = Server::tls(authority.server(&["relay.invalid"], Span::Now), Manner::Forward(relay.address)).await;
    let proxy = authority.server(&["localhost"], Span::Now);
    let proxy = Server::tls(proxy, Manner::Tunnel(Some("me:"), front.address)).await;
    let config = through(&format!("https://me@localhost:{}", proxy.address.port()), &authority);
    let (one, other) = (mesh("wss://relay.invalid", config.clone()), mesh("wss://relay.invalid", config));
    joins(&one).await;
    let known = one
        .roster()
        .wait_for(|roster| roster.peers.iter().any(|peer| peer.instance == other.me().instance))
        .await
        .is_ok();
    assert!(known);
    let opening = one.open(other.me().instance, Request::Ping, Route::RelayedOnly);
    let (outcome, stream) = timeout(DEADLINE, opening).await.unwrap().unwrap();
    assert_eq!(outcome, Outcome::Done);
    timeout(DEADLINE, echo(stream, 8 << 20, async |_| {})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_proxy_the_relays_own_address_is_still_asked_by_stun() {
    let relay = TestRelay::start();
    let proxy = Server::plain(Manner::OpenTunnel).await;
    let config = DialConfig { proxy: Some(named(&format!("http://{}", proxy.address))), ..DialConfig::default() };
    let url = format!("ws://{}", relay.address);
    let (one, other) = (mesh(&url, config.clone()), mesh(&url, config));
    is_asked_by_stun(&relay, &one, &other).await;
    assert!(!proxy.heads().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_behind_tls_is_asked_by_stun_at_its_own_port() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let front = Server::tls(authority.server(&["127.0.0.1"], Span::Now), Manner::Forward(relay.address)).await;
    let url = format!("wss://{}", front.address);
    let (one, other) = (mesh(&url, trusting(&authority)), mesh(&url, trusting(&authority)));
    is_asked_by_stun(&relay, &one, &other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_good_is_refused_with_the_reason() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let (stranger, namesake) = (Authority::named("a stranger"), Authority::new());
    let fronts = [
        (authority.server(&["localhost"], Span::Past), "has expired", "clock"),
        (authority.server(&["localhost"], Span::Future), "not valid yet", "clock"),
        (stranger.server(&["localhost"], Span::Now), "signed by nobody trusted", "--ca-file"),
        (namesake.server(&["localhost"], Span::Now), "not signed with its key", "made anew"),
        (authority.server(&["other.example", "192.0.2.7"], Span::Now), "other names: other.example, 192.0.2.7", "name"),
    ];
    for (config, cause, hint) in fronts {
        let front = Server::tls(config, Manner::Forward(relay.address)).await;
        let url = format!("wss://localhost:{}", front.address.port());
        told(&url, trusting(&authority), cause, hint).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secure_proxy_whose_certificate_is_not_good_gets_no_credentials() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let proxy = Server::tls(stranger.server(&["localhost"], Span::Now), Manner::Silent).await;
    let config = through(&format!("https://me:secret@localhost:{}", proxy.address.port()), &authority);
    told("wss://relay.invalid", config, "the certificate of the proxy https://localhost", "--ca-file").await;
    assert!(proxy.heads().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_on_a_port_without_it_and_no_tls_on_a_port_with_it_are_told_apart() {
    let (relay, authority) = (TestRelay::start(), Authority::new());
    let plain = format!("wss://{}", relay.address);
    told(&plain, trusting(&authority), "does not speak TLS", &format!("ws://{}", relay.address)).await;
    let front = authority.server(&["localhost"], Span::Now);
    let front = Server::tls(front, Manner::Forward(relay.address)).await;
    let url = format!("ws://localhost:{}/x", front.address.port());
    told(&url, trusting(&authority), "is no relay", &format!("wss://localhost:{}/x", front.address.port())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_relay_is_told_by_what_it_is() {
    for (answer, cause, hint) in [
        ("HTTP/1.1 404 Not Found\r\n\r\n", "nothing at /v1 (HTTP 404)", "wss://HOST/PATH"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "no peerfleet relay of this version (HTTP 200: hello)",
            "Upgrade",
        ),
        (
            "HTTP/1.1 301 Moved\r\nLocation: https://x.example/\r\n\r\n",
            "sends elsewhere (HTTP 301 to `https://x.example/`)",
            "redirects",
        ),
        ("HTTP/1.1 502 Bad Gateway\r\n\r\n", "does not reach the relay (HTTP 502)", "running behind it"),
        ("HTTP/1.1 401 Who\r\n\r\n", "lets nobody in at /v1 (HTTP 401)", "token"),
        ("SSH-2.0-OpenSSH_9.9\r\n", "does not speak HTTP", "wss://"),
        ("", "closed the connection without an answer", "wss://"),
    ] {
        let server = Server::plain(Manner::Says(answer)).await;
        told(&format!("ws://{}", server.address), DialConfig::default(), cause, hint).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_path_is_told_with_the_path() {
    let relay = TestRelay::start();
    let cause = format!("{} has nothing at /fleet/v1 (HTTP 404)", relay.address);
    told(&format!("ws://{}/fleet", relay.address), DialConfig::default(), &cause, "`/fleet`").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reached_is_told_with_name_or_address() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    told("ws://no-such-host.invalid", DialConfig::default(), "`no-such-host.invalid` has no address", "spelled right")
        .await;
    let cause = format!("the relay {closed} takes no connection: {closed}: Connection refused");
    told(&format!("ws://{closed}"), DialConfig::default(), &cause, "is the relay running").await;
    let config = DialConfig { proxy: Some(named(&closed.to_string())), ..DialConfig::default() };
    told("ws://relay.invalid", config, &format!("the proxy http://{closed} takes no connection"), "--proxy none").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_of_a_proxy_is_told_and_no_credentials_with_it() {
    let unused = SocketAddr::from(([127, 0, 0, 1], 9));
    for (manner, given, cause, hint) in [
        (Manner::Tunnel(Some("me:right"), unused), "", "wants a user and a password (HTTP 407)", "USER:PASSWORD"),
        (
            Manner::Tunnel(Some("me:right"), unused),
            "me:qvxz-secret@",
            "does not take the user and password given",
            "right?",
        ),
        (
            Manner::Says("HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\n\r\n"),
            "me:qvxz-secret@",
            "HTTP 407",
            "only Basic",
        ),
        (Manner::Says("HTTP/1.1 403 No\r\n\r\n"), "", "does not allow a connection to relay.invalid:8080", "443"),
        (
            Manner::Says("HTTP/1.1 502 No\r\n\r\n<html>"),
            "",
            "no connection to relay.invalid:8080 (HTTP 502)",
            "reach the relay",
        ),
        (Manner::Says("SSH-2.0-OpenSSH_9.9\r\n"), "", "does not answer as an HTTP proxy does", "an HTTP proxy at all"),
        (Manner::Says("HTTP/1.1 200 OK\r\n\r\nearly"), "", "sent more than the answer", "an HTTP proxy at all"),
        (Manner::Says(""), "", "closed the connection when asked for relay.invalid:8080", "https://HOST:PORT"),
        (Manner::Endless, "me:qvxz-secret@", "an answer without end", "an HTTP proxy at all"),
    ] {
        let proxy = Server::plain(manner).await;
        let config =
            DialConfig { proxy: Some(named(&format!("http://{given}{}", proxy.address))), ..DialConfig::default() };
        told("ws://relay.invalid:8080", config, cause, hint).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_never_answers_is_given_up_in_time_and_named_with_the_step() {
    let (silent, authority) = (Server::plain(Manner::Silent).await, Authority::new());
    let address = silent.address;
    let behind = DialConfig { proxy: Some(named(&address.to_string())), ..DialConfig::default() };
    let (plain, secure) = (format!("ws://{address}"), format!("wss://{address}"));
    let by_proxy = format!("the proxy http://{address} took the connection, but gave no answer");
    let by_relay = format!("the relay {address} took the connection, but gave no answer");
    let begun = Instant::now();
    tokio::join!(
        told("ws://relay.invalid", behind, &by_proxy, "--proxy none"),
        told(&plain, DialConfig::default(), &by_relay, "wss://HOST"),
        told(&secure, trusting(&authority), "did not finish the TLS handshake", "ws://HOST:PORT"),
    );
    assert!(begun.elapsed() < TRY, "{:?}", begun.elapsed());
}

/// Fails unless the first try to join ends with this cause and this hint.
async fn told(url: &str, config: DialConfig, cause: &str, hint: &str) {
    let shown = format!("{config:?}");
    let mesh = mesh(url, config);
    let mut roster = mesh.roster();
    let roster =
        timeout(DEADLINE, roster.wait_for(|roster| roster.trouble.is_some())).await.expect("a verdict").unwrap();
    let NotJoined { cause: said, hint: advice } = roster.trouble.clone().unwrap();
    let advice = advice.unwrap_or_default();
    assert!(said.contains(cause), "{url}: `{said}` lacks `{cause}`");
    assert!(advice.contains(hint), "{url}: `{advice}` lacks `{hint}`");
    assert!(!format!("{said} {advice} {shown}").contains("qvxz-secret"), "{said} {advice} {shown}");
}

/// Makes a link, and waits until the relay's responder was asked for one end of it.
async fn is_asked_by_stun(relay: &TestRelay, one: &Mesh, other: &Mesh) {
    let there = other.me().instance;
    let mut roster = one.roster();
    let known = roster.wait_for(|roster| roster.peers.iter().any(|peer| peer.instance == there));
    timeout(DEADLINE, known).await.unwrap().unwrap();
    assert!(one.wait_direct(there, DEADLINE).await);
    let asked = async {
        while relay.handle.stats().stun_answered == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, asked).await.expect("the responder was not asked");
}

async fn joins(mesh: &Mesh) {
    mesh.joined(DEADLINE).await.unwrap_or_else(|why| panic!("{why:?}"));
}

fn trusting(authority: &Authority) -> DialConfig {
    DialConfig { proxy: None, authorities: authority.trusted() }
}

fn through(proxy: &str, authority: &Authority) -> DialConfig {
    DialConfig { proxy: Some(named(proxy)), authorities: authority.trusted() }
}

fn named(proxy: &str) -> Proxy {
    proxy.parse().unwrap()
}

fn mesh(url: &str, dial: DialConfig) -> Mesh {
    Mesh::start(MeshConfig { dial, ..common::config(url) }, Arc::new(Echo))
}

/// A relay in this process.
struct TestRelay {
    address: SocketAddr,
    handle: Handle,
    running: JoinHandle<()>,
}

impl TestRelay {
    fn start() -> Self {
        let relay = Relay::bind(Config { bind: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() }).unwrap();
        Self { address: relay.local_addrs()[0], handle: relay.handle(), running: tokio::spawn(relay.run()) }
    }
}

impl Drop for TestRelay {
    fn drop(&mut self) {
        self.running.abort();
    }
}
