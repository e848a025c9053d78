//! A STUN server that the user named.
//!
//! In: `HOST`, `HOST:PORT`, `[IPV6]:PORT`. Out: host and port. It resolves nothing.

use std::{fmt, net::Ipv6Addr, str::FromStr};

/// The port if none is named (RFC 8489 §18.6).
const DEFAULT_PORT: u16 = 3478;

/// Longest host: a name of DNS (RFC 1035 §2.3.4).
const MAX_HOST_BYTES: usize = 253;

/// Where a STUN server is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StunServer {
    host: String,
    port: u16,
}

/// The text names no server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a STUN server as in stun.example.net:3478")]
pub struct InvalidStunServer;

impl StunServer {
    /// Name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// UDP port; never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for StunServer {
    type Err = InvalidStunServer;

    fn from_str(text: &str) -> Result<Self, InvalidStunServer> {
        let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(None) => return Err(InvalidStunServer),
            Some(Some((host, rest))) => {
                host.parse::<Ipv6Addr>().map_err(|_| InvalidStunServer)?;
                let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or(InvalidStunServer)?) };
                (host, port)
            }
            None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
        };
        let is_sane = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        if host.is_empty() || host.len() > MAX_HOST_BYTES || !host.chars().all(is_sane) {
            return Err(InvalidStunServer);
        }
        let port = port.map_or(Ok(DEFAULT_PORT), str::parse).map_err(|_| InvalidStunServer)?;
        if port == 0 { Err(InvalidStunServer) } else { Ok(Self { host: host.to_owned(), port }) }
    }
}

impl fmt::Display for StunServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_host_and_a_port_or_the_usual_one() {
        for (text, shown) in [
            ("stun.example.net:19302", "stun.example.net:19302"),
            ("192.0.2.1", "192.0.2.1:3478"),
            ("[2001:db8::1]:9", "[2001:db8::1]:9"),
            ("[2001:db8::1]", "[2001:db8::1]:3478"),
        ] {
            assert_eq!(text.parse::<StunServer>().map(|server| server.to_string()), Ok(shown.to_owned()));
        }
        for text in ["", ":1", "a:0", "a:65536", "a:b", "2001:db8::1", "[x]:1", "[::1", "[::1]1", "a b:1", "stun://a:1"]
        {
            assert_eq!(text.parse::<StunServer>(), Err(InvalidStunServer), "{text}");
        }
    }
}
