//! How a relay is named: `ws://HOST[:PORT][/PREFIX]`, or `wss://` for TLS.
//!
//! In: what a person wrote. Out: host, port, whether TLS is to be used, and the path of the relay's WebSocket.
//! It never repeats a text that it refuses: people put secrets into URLs.
//! Ports that are not written are 80 and 443. A prefix is for whatever stands in front of the relay, which takes it off
//! again: the relay itself serves `/v1` alone.

use std::{fmt, str::FromStr};

use peerfleet_proto::wire::RELAY_PATH;
use tokio_tungstenite::tungstenite::http::Uri;

/// Where a relay is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelayUrl {
    secure: bool,
    host: String,
    port: u16,
    base: String,
}

/// A text is not the address of a relay.
/// The text is not repeated: people put secrets into URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a relay's address: {why}; write it as ws://HOST:PORT or wss://HOST")]
pub struct InvalidRelayUrl {
    why: &'static str,
}

impl RelayUrl {
    /// The relay's host name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The relay's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the connection is to be wrapped into TLS.
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// The prefix in front of the relay's own path, empty or with a leading slash.
    pub(in crate::mesh) fn prefix(&self) -> &str {
        &self.base
    }

    /// The path of the relay's WebSocket.
    pub(super) fn path(&self) -> String {
        format!("{}{RELAY_PATH}", self.base)
    }

    /// Host and port.
    pub(super) fn authority(&self) -> String {
        authority(&self.host, self.port)
    }

    /// Host, and the port where it is not that of the scheme: some servers choose a site by this very text.
    pub(in crate::mesh) fn host_header(&self) -> String {
        let authority = self.authority();
        let usual = format!(":{}", usual_port(self.secure));
        authority.strip_suffix(&usual).map(str::to_owned).unwrap_or(authority)
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "wss" } else { "ws" };
        write!(f, "{scheme}://{}{}", self.authority(), self.base)
    }
}

impl FromStr for RelayUrl {
    type Err = InvalidRelayUrl;

    fn from_str(text: &str) -> Result<Self, InvalidRelayUrl> {
        let invalid = |why| InvalidRelayUrl { why };
        let uri: Uri = text.trim().parse().map_err(|_| invalid("it does not read as a URL"))?;
        let secure = match uri.scheme_str() {
            Some("ws") => false,
            Some("wss") => true,
            Some(_) => return Err(invalid("its scheme is neither ws nor wss")),
            None => return Err(invalid("it has no scheme")),
        };
        let authority = uri.authority().ok_or_else(|| invalid("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(invalid("it names a user"));
        }
        if uri.query().is_some() {
            return Err(invalid("it has a query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(invalid("it has no host"));
        }
        let port = match (authority.port_u16(), authority.as_str().rsplit_once(':')) {
            (Some(0), _) => return Err(invalid("port 0 cannot be dialled")),
            (Some(port), _) => port,
            (None, Some((_, rest))) if !rest.ends_with(']') => return Err(invalid("its port is not a number")),
            (None, _) => usual_port(secure),
        };
        let base = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { secure, host: host.to_owned(), port, base })
    }
}

/// The port of `ws` and `http`, or of `wss` and `https` (RFC 6455 §3).
pub(super) fn usual_port(secure: bool) -> u16 {
    if secure { 443 } else { 80 }
}

/// Host and port, an IPv6 address in brackets.
pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_url_reads_back_with_its_port_written_out() {
        for (text, written) in [
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080"),
            ("ws://relay.example.net", "ws://relay.example.net:80"),
            ("wss://relay.example.net/", "wss://relay.example.net:443"),
            ("ws://[::1]:9/fleet/", "ws://[::1]:9/fleet"),
        ] {
            let url: RelayUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), written);
            assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn rejects_what_does_not_name_a_relay() {
        for text in
            ["", "relay", "http://relay", "ws://", "ws://u:p@relay", "ws://relay?x", "ws://relay:0", "ws://relay:x"]
        {
            assert!(text.parse::<RelayUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_prefix_stands_before_the_relays_own_path_and_a_usual_port_is_not_said() {
        for (text, header, path) in [
            ("wss://example.net/fleet", "example.net", "/fleet/v1"),
            ("wss://example.net:443/a/b/", "example.net", "/a/b/v1"),
            ("wss://example.net:80", "example.net:80", "/v1"),
            ("ws://[2001:db8::1]", "[2001:db8::1]", "/v1"),
        ] {
            let url: RelayUrl = text.parse().unwrap();
            assert_eq!((url.host_header().as_str(), url.path().as_str()), (header, path), "{text}");
        }
    }
}
