//! What comes first on every connection: one HTTP request.
//!
//! In: bytes of a request's head. Out: that more are needed, or what to do: answer `GET /health`, upgrade to the relay's
//! WebSocket at `RELAY_PATH` with the sub-protocol that is its version, or refuse with a status and a word of help.
//! Never reads a body, keeps no connection alive, and answers nothing that tells rooms, peers or addresses.
//! Head -> answer -> end, or head -> upgrade -> WebSocket.
//! Bounds: [`MAX_HEAD_BYTES`] and [`MAX_HEADERS`]; the caller brings the deadline.

use std::fmt::Write as _;

use peerfleet_proto::wire::{RELAY_PATH, RELAY_PROTOCOL};
use tokio_tungstenite::tungstenite::{
    handshake::server::{Request, create_response},
    http::{HeaderName, HeaderValue, Method, StatusCode},
};

/// Longest head of a request, in bytes: what common servers and proxies allow as well.
pub(crate) const MAX_HEAD_BYTES: usize = 8 * 1024;

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// What a request is answered with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The state of the relay, as JSON.
    Health,
    /// This response, and then WebSocket.
    Upgrade(String),
    /// This refusal.
    Refuse(Refusal),
}

/// A status, and words for the person who reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    status: StatusCode,
    hint: &'static str,
}

const UNREADABLE: Refusal = Refusal { status: StatusCode::BAD_REQUEST, hint: "this is not an HTTP/1.1 request" };
const TOO_LARGE: Refusal =
    Refusal { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, hint: "the head of the request is too long" };
const NOT_FOUND: Refusal =
    Refusal { status: StatusCode::NOT_FOUND, hint: "a peerfleet relay: /health tells its state, peers connect to /v1" };
const NOT_GET: Refusal = Refusal { status: StatusCode::METHOD_NOT_ALLOWED, hint: "only GET is served here" };
const NO_UPGRADE: Refusal =
    Refusal { status: StatusCode::UPGRADE_REQUIRED, hint: "peers connect here by WebSocket (RFC 6455, version 13)" };
const OTHER_VERSION: Refusal =
    Refusal { status: StatusCode::BAD_REQUEST, hint: "this relay speaks the sub-protocol peerfleet.relay.v1" };

/// Reads a head. `None` if more bytes are needed; else the head's length and the answer.
pub(crate) fn read(bytes: &[u8]) -> Option<(usize, Answer)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => Some((len, route(&head))),
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_BYTES => None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Some((bytes.len(), Answer::Refuse(TOO_LARGE)))
        }
        Err(_) => Some((bytes.len(), Answer::Refuse(UNREADABLE))),
    }
}

fn route(head: &httparse::Request<'_, '_>) -> Answer {
    let path = head.path.unwrap_or_default().split('?').next().unwrap_or_default();
    if path != "/health" && path != RELAY_PATH {
        return Answer::Refuse(NOT_FOUND);
    }
    if head.method != Some("GET") {
        return Answer::Refuse(NOT_GET);
    }
    if path == "/health" { Answer::Health } else { upgrade(head).map_or_else(Answer::Refuse, Answer::Upgrade) }
}

fn upgrade(head: &httparse::Request<'_, '_>) -> Result<String, Refusal> {
    let mut request = Request::new(());
    *request.method_mut() = Method::GET;
    let mut offered = false;
    for header in head.headers.iter() {
        let value = HeaderValue::from_bytes(header.value).map_err(|_| UNREADABLE)?;
        if header.name.eq_ignore_ascii_case("sec-websocket-protocol") {
            offered |= value.to_str().is_ok_and(|list| list.split(',').any(|one| one.trim() == RELAY_PROTOCOL));
        }
        let name: HeaderName = header.name.parse().map_err(|_| UNREADABLE)?;
        request.headers_mut().append(name, value);
    }
    let response = create_response(&request).map_err(|_| NO_UPGRADE)?;
    if !offered {
        return Err(OTHER_VERSION);
    }
    let mut text = String::from("HTTP/1.1 101 Switching Protocols\r\n");
    for (name, value) in response.headers() {
        let value = value.to_str().map_err(|_| UNREADABLE)?;
        let _ = write!(text, "{name}: {value}\r\n");
    }
    let _ = write!(text, "sec-websocket-protocol: {RELAY_PROTOCOL}\r\n\r\n");
    Ok(text)
}

/// The response with the relay's state; 503 while it shuts down, so that a balancer sends new peers elsewhere.
pub(crate) fn health(draining: bool, json: &str) -> String {
    let status = if draining { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    response(status, "application/json", json)
}

/// The response that refuses.
pub(crate) fn refusal(refusal: Refusal) -> String {
    let body = format!("{}\n", refusal.hint);
    response(refusal.status, "text/plain; charset=utf-8", &body)
}

fn response(status: StatusCode, content: &str, body: &str) -> String {
    let extra = match status {
        StatusCode::UPGRADE_REQUIRED => "connection: close, upgrade\r\nupgrade: websocket\r\n",
        StatusCode::METHOD_NOT_ALLOWED => "connection: close\r\nallow: GET\r\n",
        _ => "connection: close\r\n",
    };
    format!(
        "HTTP/1.1 {status}\r\n{extra}cache-control: no-store\r\nx-content-type-options: nosniff\r\n\
         content-type: {content}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPGRADE: &str = "GET /v1 HTTP/1.1\r\nHost: relay\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
        Sec-WebSocket-Protocol: other, peerfleet.relay.v1\r\n\r\n";

    fn refused(request: &str) -> Option<StatusCode> {
        match read(request.as_bytes()) {
            Some((_, Answer::Refuse(refusal))) => Some(refusal.status),
            Some((_, Answer::Health | Answer::Upgrade(_))) | None => None,
        }
    }

    #[test]
    fn upgrade_is_accepted_with_the_key_of_the_standard() {
        let Some((len, Answer::Upgrade(response))) = read(UPGRADE.as_bytes()) else { panic!("not upgraded") };
        assert_eq!(len, UPGRADE.len());
        // The example of RFC 6455 §1.3.
        assert!(response.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{response}");
        assert!(response.contains("sec-websocket-protocol: peerfleet.relay.v1\r\n"));
        assert!(response.ends_with("\r\n\r\n"));
    }

    #[test]
    fn every_truncation_asks_for_more() {
        for len in 0..UPGRADE.len() {
            assert_eq!(read(&UPGRADE.as_bytes()[..len]), None, "{len}");
        }
    }

    #[test]
    fn upgrade_without_our_version_says_which_is_spoken() {
        let request = UPGRADE.replace("peerfleet.relay.v1", "peerfleet.relay.v0");
        assert_eq!(refused(&request), Some(StatusCode::BAD_REQUEST));
        let without = UPGRADE.replace("Upgrade: websocket\r\n", "");
        assert_eq!(refused(&without), Some(StatusCode::UPGRADE_REQUIRED));
    }

    #[test]
    fn health_is_answered_and_nothing_else() {
        assert!(matches!(read(b"GET /health HTTP/1.1\r\n\r\n"), Some((_, Answer::Health))));
        assert!(matches!(read(b"GET /health?x HTTP/1.0\r\n\r\n"), Some((_, Answer::Health))));
        assert_eq!(refused("POST /health HTTP/1.1\r\n\r\n"), Some(StatusCode::METHOD_NOT_ALLOWED));
        assert_eq!(refused("GET / HTTP/1.1\r\n\r\n"), Some(StatusCode::NOT_FOUND));
        assert_eq!(refused("GET /v1 HTTP/1.1\r\n\r\n"), Some(StatusCode::UPGRADE_REQUIRED));
    }

    #[test]
    fn what_is_no_request_is_refused_at_once() {
        assert_eq!(refused("\x16\x03\x01\x02\x00"), Some(StatusCode::BAD_REQUEST));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(refused(&many), Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
        let long = format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD_BYTES));
        assert_eq!(refused(&long), Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
    }

    #[test]
    fn draining_relay_is_unavailable() {
        assert!(health(true, "{}").starts_with("HTTP/1.1 503 "));
        assert!(health(false, "{}").ends_with("content-length: 2\r\n\r\n{}"));
    }
}
