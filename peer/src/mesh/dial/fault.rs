//! Why there is no connection to the relay, and what to do about it, for a person.
//!
//! In: the step that failed, with whom, and how. Out: a cause (`Display`) and a hint. Neither repeats credentials, and
//! what other machines said in words appears only where it was tamed.

use std::{fmt, io, net::SocketAddr};

use rustls::CertificateError;

use super::{DIAL_DEADLINE, proxy::ProxyFault, tls::TlsFault, upgrade::UpgradeFault, url::RelayUrl};

/// Addresses that a cause names before it only counts them.
const SHOWN_ADDRESSES: usize = 4;

/// With whom a step was taken, and under which name.
#[derive(Debug, Clone)]
pub(in crate::mesh) enum Party {
    /// The relay, or what stands in front of it: host and port.
    Relay(String),
    /// The proxy: its URL without credentials.
    Proxy(String),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relay(authority) => write!(f, "the relay {authority}"),
            Self::Proxy(url) => write!(f, "the proxy {url}"),
        }
    }
}

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::mesh) enum Step {
    /// The addresses of a name were asked for.
    Lookup,
    /// A TCP connection was made.
    Connect,
    /// A TLS handshake was under way.
    Tls,
    /// A proxy was asked for a tunnel.
    Tunnel,
    /// The relay was asked for its WebSocket.
    Upgrade,
}

/// Why there is no connection to the relay.
#[derive(Debug)]
pub(in crate::mesh) enum DialFault {
    /// A name has no address.
    Lookup { host: String, cause: io::Error },
    /// No address took the connection; what each of them said.
    Connect { party: Party, attempts: Vec<(SocketAddr, io::Error)> },
    /// The proxy opened no tunnel to the target.
    Proxy { proxy: String, target: String, fault: ProxyFault },
    /// There is no TLS.
    Tls { party: Party, fault: TlsFault },
    /// Something answered that is not our relay.
    Upgrade { url: RelayUrl, fault: UpgradeFault },
    /// Time ran out in this step.
    Deadline { party: Party, step: Step },
    /// The task that dialled was ended.
    Stopped,
}

impl fmt::Display for DialFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lookup { host, cause } => write!(f, "the name `{host}` has no address: {cause}"),
            Self::Connect { party, attempts } => connect_cause(f, party, attempts),
            Self::Proxy { proxy, target, fault } => proxy_cause(f, proxy, target, fault),
            Self::Tls { party, fault } => tls_cause(f, party, fault),
            Self::Upgrade { url, fault } => upgrade_cause(f, url, fault),
            Self::Deadline { party, step } => deadline_cause(f, party, *step),
            Self::Stopped => f.write_str("the connection was given up"),
        }
    }
}

impl DialFault {
    /// What to do about it.
    pub(in crate::mesh) fn hint(&self) -> String {
        match self {
            Self::Lookup { host, .. } => {
                format!(
                    "is it spelled right? `getent hosts {host}` asks the same resolver; where only a proxy knows such names, name the proxy in HTTPS_PROXY or PEER_PROXY"
                )
            }
            Self::Connect { party, attempts } => connect_hint(party, attempts),
            Self::Proxy { fault, .. } => proxy_hint(fault),
            Self::Tls { party, fault } => tls_hint(party, fault),
            Self::Upgrade { url, fault } => upgrade_hint(url, fault),
            Self::Deadline { party, step } => deadline_hint(party, *step),
            Self::Stopped => "it is tried again".to_owned(),
        }
    }
}

fn connect_cause(f: &mut fmt::Formatter<'_>, party: &Party, attempts: &[(SocketAddr, io::Error)]) -> fmt::Result {
    write!(f, "{party} takes no connection")?;
    for (index, (address, cause)) in attempts.iter().take(SHOWN_ADDRESSES).enumerate() {
        write!(f, "{} {address}: {cause}", if index == 0 { ":" } else { ";" })?;
    }
    match attempts.len().saturating_sub(SHOWN_ADDRESSES) {
        0 => Ok(()),
        more => write!(f, "; and {more} more addresses"),
    }
}

fn connect_hint(party: &Party, attempts: &[(SocketAddr, io::Error)]) -> String {
    let refused = attempts.iter().any(|(_, cause)| cause.kind() == io::ErrorKind::ConnectionRefused);
    match (party, refused) {
        (Party::Relay(_), true) => "nothing listens on that port: is the relay running, and its port right?".to_owned(),
        (Party::Relay(_), false) => {
            "is this machine online? where the way out is a proxy, name it in HTTPS_PROXY or PEER_PROXY".to_owned()
        }
        (Party::Proxy(_), true) => {
            "nothing listens on that port: is the proxy's address right? `--proxy none` goes without it".to_owned()
        }
        (Party::Proxy(_), false) => "is this machine online, and the proxy's address right?".to_owned(),
    }
}

fn proxy_cause(f: &mut fmt::Formatter<'_>, proxy: &str, target: &str, fault: &ProxyFault) -> fmt::Result {
    write!(f, "the proxy {proxy} ")?;
    match fault {
        ProxyFault::Credentials { given: false, .. } => f.write_str("wants a user and a password (HTTP 407)"),
        ProxyFault::Credentials { given: true, .. } => {
            f.write_str("does not take the user and password given (HTTP 407)")
        }
        ProxyFault::Forbidden => write!(f, "does not allow a connection to {target} (HTTP 403)"),
        ProxyFault::Refused(status) => write!(f, "made no connection to {target} (HTTP {status})"),
        ProxyFault::NotHttp => f.write_str("does not answer as an HTTP proxy does"),
        ProxyFault::TooLong => f.write_str("gave an answer without end"),
        ProxyFault::Early => f.write_str("sent more than the answer that it was asked for"),
        ProxyFault::Closed => write!(f, "closed the connection when asked for {target}"),
        ProxyFault::Io(cause) => write!(f, "broke the connection off when asked for {target}: {cause}"),
    }
}

fn proxy_hint(fault: &ProxyFault) -> String {
    let credentials = "write them into the proxy's URL as http://USER:PASSWORD@HOST:PORT, special characters as %XX";
    match fault {
        ProxyFault::Credentials { offered, .. } if !offered.is_empty() && !offers_basic(offered) => {
            format!(
                "it asks for {offered}, but only Basic is supported: ask its administrator, or run a local proxy that speaks {offered}"
            )
        }
        ProxyFault::Credentials { given: false, .. } => credentials.to_owned(),
        ProxyFault::Credentials { given: true, .. } => format!("are they right? {credentials}"),
        ProxyFault::Forbidden => {
            "many proxies allow port 443 alone: put the relay behind TLS on 443 (wss://HOST), or have it allowed"
                .to_owned()
        }
        ProxyFault::Refused(404 | 405 | 501) => "it may be a web server: is the proxy's address right?".to_owned(),
        ProxyFault::Refused(_) => "can the proxy reach the relay by that name and port?".to_owned(),
        ProxyFault::NotHttp | ProxyFault::TooLong | ProxyFault::Early => {
            "is it an HTTP proxy at all? one that is itself reached by TLS is written https://HOST:PORT".to_owned()
        }
        ProxyFault::Closed | ProxyFault::Io(_) => {
            "is the proxy's address right? one that is itself reached by TLS is written https://HOST:PORT".to_owned()
        }
    }
}

fn offers_basic(offered: &str) -> bool {
    offered.split(", ").any(|scheme| scheme.eq_ignore_ascii_case("basic"))
}

fn tls_cause(f: &mut fmt::Formatter<'_>, party: &Party, fault: &TlsFault) -> fmt::Result {
    match fault {
        TlsFault::Name => write!(f, "{party} has a name that no certificate could have"),
        TlsFault::Expired { days } => {
            write!(f, "the certificate of {party} has expired")?;
            days.map_or(Ok(()), |days| write!(f, ", {days} days ago"))
        }
        TlsFault::NotYetValid { days } => {
            write!(f, "the certificate of {party} is not valid yet")?;
            days.map_or(Ok(()), |days| write!(f, ", for {days} more days"))
        }
        TlsFault::UnknownIssuer { .. } => write!(f, "the certificate of {party} is signed by nobody trusted here"),
        TlsFault::OtherName { names } if names.is_empty() => {
            write!(f, "the certificate of {party} is for no name at all")
        }
        TlsFault::OtherName { names } => write!(f, "the certificate of {party} is for other names: {names}"),
        TlsFault::Certificate(CertificateError::BadSignature) => {
            write!(f, "the certificate of {party} names an authority trusted here, but was not signed with its key")
        }
        TlsFault::Certificate(cause) => write!(f, "the certificate of {party} is not good: {cause}"),
        TlsFault::NotTls => write!(f, "{party} does not speak TLS on that port"),
        TlsFault::Alert(alert) => write!(f, "{party} broke off the TLS handshake: {alert:?}"),
        TlsFault::Closed => write!(f, "{party} closed the connection within the TLS handshake"),
        TlsFault::Other(cause) => write!(f, "no TLS with {party}: {cause}"),
    }
}

fn tls_hint(party: &Party, fault: &TlsFault) -> String {
    let clock = "is this machine's clock right?";
    match fault {
        TlsFault::Name => "write the name as the certificate has it".to_owned(),
        TlsFault::Expired { .. } => format!("renew it where TLS ends; {clock}"),
        TlsFault::NotYetValid { .. } => clock.to_owned(),
        TlsFault::UnknownIssuer { nobody_is_trusted: true } => {
            "this system has no certificate authorities: install its package ca-certificates, or give --ca-file".to_owned()
        }
        TlsFault::UnknownIssuer { nobody_is_trusted: false } => {
            "if its authority is your own (or the company's), give its certificate with --ca-file or PEER_CA_FILE; else somebody may be in between".to_owned()
        }
        TlsFault::Certificate(CertificateError::BadSignature) => {
            "was that authority made anew? give its certificate of today with --ca-file or PEER_CA_FILE; else somebody may be in between".to_owned()
        }
        TlsFault::OtherName { .. } => "use the name that the certificate has, or get one for this name".to_owned(),
        TlsFault::Certificate(_) => {
            "a certificate made by hand must not be one of an authority itself (basicConstraints CA:FALSE), and must name the host in subjectAltName".to_owned()
        }
        TlsFault::NotTls | TlsFault::Closed => match party {
            Party::Relay(authority) => {
                format!("a relay without TLS in front is written ws://{authority}; TLS is usually on port 443")
            }
            Party::Proxy(_) => "a proxy that is reached without TLS is written http://HOST:PORT".to_owned(),
        },
        TlsFault::Alert(_) | TlsFault::Other(_) => {
            "its log says more; TLS 1.2 and 1.3 are spoken here, with a certificate for the very name".to_owned()
        }
    }
}

fn upgrade_cause(f: &mut fmt::Formatter<'_>, url: &RelayUrl, fault: &UpgradeFault) -> fmt::Result {
    let (authority, path) = (url.authority(), url.path());
    match fault {
        UpgradeFault::NothingThere => write!(f, "{authority} has nothing at {path} (HTTP 404)"),
        UpgradeFault::Moved { status, to } => write!(f, "{authority} sends elsewhere (HTTP {status} to `{to}`)"),
        UpgradeFault::Forbidden(status) => write!(f, "{authority} lets nobody in at {path} (HTTP {status})"),
        UpgradeFault::Gateway(status) => {
            write!(f, "what stands at {authority} does not reach the relay (HTTP {status})")
        }
        UpgradeFault::Refused { status, word } if word.is_empty() => {
            write!(f, "{authority} is no peerfleet relay of this version (HTTP {status})")
        }
        UpgradeFault::Refused { status, word } => {
            write!(f, "{authority} is no peerfleet relay of this version (HTTP {status}: {word})")
        }
        UpgradeFault::OtherProtocol => {
            write!(f, "{authority} speaks WebSocket, but is no peerfleet relay of this version")
        }
        UpgradeFault::NotHttp => write!(f, "what answers at {authority} is no relay: it does not speak HTTP"),
        UpgradeFault::Closed => write!(f, "{authority} closed the connection without an answer"),
        UpgradeFault::Other(cause) => write!(f, "{authority} is no peerfleet relay of this version: {cause}"),
    }
}

fn upgrade_hint(url: &RelayUrl, fault: &UpgradeFault) -> String {
    let with_tls = format!("if TLS is spoken on that port, write wss://{}{}", url.authority(), url.prefix());
    match fault {
        UpgradeFault::NothingThere if url.prefix().is_empty() => {
            "is it a relay? if it is beneath a path of a web server, write that behind the host, as in wss://HOST/PATH".to_owned()
        }
        UpgradeFault::NothingThere => format!(
            "is `{}` the right path? what stands in front of the relay must take it off: the relay serves /v1 alone",
            url.prefix()
        ),
        UpgradeFault::Moved { .. } => "redirects are not followed: name the relay itself".to_owned(),
        UpgradeFault::Forbidden(_) => "the path to the relay must be open to everybody: the room's token is what lets in".to_owned(),
        UpgradeFault::Gateway(_) => "is the relay running behind it?".to_owned(),
        UpgradeFault::NotHttp | UpgradeFault::Closed if !url.is_secure() => with_tls,
        UpgradeFault::Refused { status: 400, .. } if !url.is_secure() => {
            format!("{with_tls}; else compare the versions of relay and peer")
        }
        UpgradeFault::Refused { .. } | UpgradeFault::OtherProtocol | UpgradeFault::Other(_) => {
            "what stands in front of a relay must pass WebSocket on (the headers Upgrade and Connection); else compare the versions of relay and peer".to_owned()
        }
        UpgradeFault::NotHttp | UpgradeFault::Closed => "is the relay's address right?".to_owned(),
    }
}

fn deadline_cause(f: &mut fmt::Formatter<'_>, party: &Party, step: Step) -> fmt::Result {
    let seconds = DIAL_DEADLINE.as_secs();
    match step {
        Step::Lookup => write!(f, "no resolver gave an address of {party} within {seconds} s"),
        Step::Connect => write!(f, "{party} does not answer: no connection within {seconds} s"),
        Step::Tls => write!(f, "{party} took the connection, but did not finish the TLS handshake within {seconds} s"),
        Step::Tunnel => write!(f, "{party} took the connection, but gave no answer within {seconds} s"),
        Step::Upgrade => write!(f, "{party} took the connection, but gave no answer within {seconds} s"),
    }
}

fn deadline_hint(party: &Party, step: Step) -> String {
    match (step, party) {
        (Step::Lookup, _) => "is this machine online, and its name server reachable?".to_owned(),
        (Step::Connect, Party::Relay(_)) => {
            "is the relay's machine up, and does a firewall let its port through? where the way out is a proxy, name it in HTTPS_PROXY or PEER_PROXY".to_owned()
        }
        (Step::Connect | Step::Tls | Step::Tunnel, Party::Proxy(_)) => {
            "is the proxy up, and its address right? `--proxy none` goes without it".to_owned()
        }
        (Step::Tls | Step::Tunnel | Step::Upgrade, _) => {
            "is it a relay at all? a relay without TLS in front is written ws://HOST:PORT, one behind TLS wss://HOST".to_owned()
        }
    }
}
