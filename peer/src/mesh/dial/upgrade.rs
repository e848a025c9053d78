//! The last step: asking what answers at the relay's address to speak the relay's protocol over WebSocket.
//!
//! In: the relay's URL; how the request failed. Out: the request; what that failure means.
//! It decides nothing by the words of an answer, only by its status and by what kind of fault it is; of words that came
//! from elsewhere it keeps [`MAX_SHOWN`] characters, none of which can move a cursor.

use peerfleet_proto::wire::RELAY_PROTOCOL;
use tokio_tungstenite::tungstenite::{
    Error,
    error::ProtocolError,
    handshake::client::{Request, Response, generate_key},
    http::{
        HeaderValue, StatusCode, Version,
        header::{
            CONNECTION, HOST, LOCATION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
        },
    },
};

use super::{fault::DialFault, url::RelayUrl};

/// Most of another's text that is shown to a person, in characters.
const MAX_SHOWN: usize = 200;

/// Why what answers is not our relay.
#[derive(Debug)]
pub(in crate::mesh) enum UpgradeFault {
    /// There is nothing at the path (404).
    NothingThere,
    /// It is elsewhere (a redirect).
    Moved { status: u16, to: String },
    /// Whoever stands in front wants to know who asks (401, 403).
    Forbidden(u16),
    /// Whoever stands in front does not reach the relay (502, 503, 504).
    Gateway(u16),
    /// It answered with another status, and maybe a word.
    Refused { status: u16, word: String },
    /// It speaks WebSocket, but not our protocol.
    OtherProtocol,
    /// What it sent is no answer of HTTP.
    NotHttp,
    /// It closed the connection in place of an answer.
    Closed,
    /// It failed otherwise.
    Other(Box<Error>),
}

/// The request for the relay's WebSocket (RFC 6455 §4.1).
pub(super) fn request(url: &RelayUrl) -> Request {
    let scheme = if url.is_secure() { "wss" } else { "ws" };
    Request::builder()
        .method("GET")
        .version(Version::HTTP_11)
        .uri(format!("{scheme}://{}{}", url.authority(), url.path()))
        .header(HOST, url.host_header())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, generate_key())
        .header(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(RELAY_PROTOCOL))
        .body(())
        .expect("host and path were read from a URL")
}

/// What a failed upgrade means.
#[expect(clippy::wildcard_enum_match_arm, reason = "an enum of another crate, of which a few kinds are told apart")]
pub(super) fn fault(url: &RelayUrl, error: Error) -> DialFault {
    let fault = match error {
        Error::Http(response) => refused(&response),
        Error::Protocol(ProtocolError::SecWebSocketSubProtocolError(_)) => UpgradeFault::OtherProtocol,
        Error::Protocol(ProtocolError::HttparseError(_)) => UpgradeFault::NotHttp,
        Error::Protocol(ProtocolError::HandshakeIncomplete) | Error::ConnectionClosed => UpgradeFault::Closed,
        Error::Io(cause) if is_end(&cause) => UpgradeFault::Closed,
        other => UpgradeFault::Other(Box::new(other)),
    };
    DialFault::Upgrade { url: url.clone(), fault }
}

fn is_end(cause: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    [BrokenPipe, ConnectionReset, UnexpectedEof].contains(&cause.kind())
}

fn refused(response: &Response) -> UpgradeFault {
    let status = response.status();
    match status {
        StatusCode::NOT_FOUND => UpgradeFault::NothingThere,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => UpgradeFault::Forbidden(status.as_u16()),
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
            UpgradeFault::Gateway(status.as_u16())
        }
        status if status.is_redirection() => {
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
            UpgradeFault::Moved { status: status.as_u16(), to: tame(to) }
        }
        status => {
            let body = String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned();
            UpgradeFault::Refused { status: status.as_u16(), word: tame(body.lines().next().unwrap_or_default()) }
        }
    }
}

/// The start of a text from elsewhere, with nothing in it but visible characters of ASCII.
fn tame(text: &str) -> String {
    text.trim().chars().filter(|char| matches!(char, ' '..='~')).take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_says_moves_no_cursor_and_has_an_end() {
        assert_eq!(tame(" a\x1b[2Jb\u{202e}c "), "a[2Jbc");
        assert_eq!(tame(&"x".repeat(1000)).len(), MAX_SHOWN);
    }

    #[test]
    fn a_request_names_the_host_as_a_browser_would() {
        let request = request(&"wss://example.net/fleet".parse().unwrap());
        assert_eq!(request.uri().path(), "/fleet/v1");
        assert_eq!(request.headers()[HOST], "example.net");
    }
}
