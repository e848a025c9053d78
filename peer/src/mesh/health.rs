//! What a relay says of itself to anybody: whether it is well, its version, its clock.
//!
//! In: a [`RelayUrl`] and a [`DialConfig`]. Out: [`Health`], from `GET /health` on a connection made as that of the uplink is.
//! It needs no token, and contacts nothing that the two do not name.
//! Bounds: [`MAX_ANSWER_BYTES`]; the caller's deadline for all of it.

use std::{
    fmt, io,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::dial::{self, DialConfig, RelayUrl};

/// Longest answer that is read, in bytes: a relay's counters are about 2 KiB.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// What a relay says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// `ok`, or `draining` while it shuts down.
    pub status: String,
    /// Its version.
    pub version: String,
    /// How its clock stands against ours, if it tells the time.
    pub clock: Option<Clock>,
}

/// How a clock stands against ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// How far it is ahead, in milliseconds; negative if it is behind.
    pub ahead_ms: i64,
    /// How wrong that may be: half the time that asking took.
    pub within: Duration,
}

/// Why a relay does not say how it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct NoHealth {
    /// Why.
    pub cause: String,
    /// What to do about it, where more is known than that nothing answers.
    pub hint: Option<String>,
}

impl NoHealth {
    fn because(cause: impl fmt::Display) -> Self {
        Self { cause: cause.to_string(), hint: None }
    }
}

/// The fields of the answer that are used.
#[derive(Deserialize)]
struct Answer {
    status: String,
    version: String,
    #[serde(default)]
    time_ms: Option<u64>,
}

/// Asks a relay how it is.
///
/// # Errors
/// [`NoHealth`]; after `deadline` at the latest.
pub async fn health(url: &RelayUrl, config: &DialConfig, deadline: Duration) -> Result<Health, NoHealth> {
    let asked = timeout(deadline, ask(url, config)).await;
    asked.unwrap_or_else(|_| Err(NoHealth::because(format_args!("no answer within {} s", deadline.as_secs_f32()))))
}

async fn ask(url: &RelayUrl, config: &DialConfig) -> Result<Health, NoHealth> {
    let connected = dial::connect(url, config).await;
    let (mut stream, _) = connected.map_err(|fault| NoHealth { cause: fault.to_string(), hint: Some(fault.hint()) })?;
    // HTTP/1.0: the answer ends with the connection and comes in one piece.
    let (prefix, host) = (url.prefix(), url.host_header());
    let request = format!("GET {prefix}/health HTTP/1.0\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let (sent, sent_at) = (Instant::now(), SystemTime::now());
    let broke = |error: io::Error| NoHealth::because(format_args!("the connection broke: {error}"));
    stream.write_all(request.as_bytes()).await.map_err(broke)?;
    stream.flush().await.map_err(broke)?;
    let mut answer = vec![stream.read_u8().await.map_err(broke)?];
    let took = sent.elapsed();
    match stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await {
        // Some end TLS without a word; whether all of the answer came shows in the answer.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(broke(error)),
        Ok(_) | Err(_) => {}
    }
    read(&answer, sent_at, took).map_err(NoHealth::because)
}

fn read(answer: &[u8], sent_at: SystemTime, took: Duration) -> Result<Health, String> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or("its answer is no HTTP")?;
    // A relay that drains says so with 503.
    let answer: Answer = serde_json::from_str(body).map_err(|_| {
        let status = head.lines().next().unwrap_or_default();
        format!("no peerfleet relay answers there: it says `{status}`")
    })?;
    let clock = answer.time_ms.map(|theirs| Clock { ahead_ms: ahead(theirs, sent_at + took / 2), within: took / 2 });
    Ok(Health { status: answer.status, version: answer.version, clock })
}

fn ahead(theirs_ms: u64, ours: SystemTime) -> i64 {
    let ours_ms = ours.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let ahead = i128::from(theirs_ms) - i128::try_from(ours_ms).unwrap_or(i128::MAX);
    i64::try_from(ahead).unwrap_or(if ahead < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n";

    fn at(ms: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(ms)
    }

    #[test]
    fn the_clock_is_compared_with_the_middle_of_asking() {
        let answer = format!(r#"{HEAD}{{"status":"ok","version":"1.2.3","time_ms":10050,"more":1}}"#);
        let health = read(answer.as_bytes(), at(9_000), Duration::from_millis(100)).unwrap();
        assert_eq!(health.clock, Some(Clock { ahead_ms: 1_000, within: Duration::from_millis(50) }));
        assert_eq!((health.status.as_str(), health.version.as_str()), ("ok", "1.2.3"));
    }

    #[test]
    fn a_clock_that_is_behind_or_absurd_is_told_without_overflow() {
        assert_eq!(ahead(1_000, at(61_000)), -60_000);
        assert_eq!(ahead(u64::MAX, at(0)), i64::MAX);
    }

    #[test]
    fn a_relay_that_tells_no_time_is_well_all_the_same() {
        let answer = format!(r#"{HEAD}{{"status":"draining","version":"1.2.3"}}"#);
        assert_eq!(read(answer.as_bytes(), at(0), Duration::ZERO).unwrap().clock, None);
    }

    #[test]
    fn what_is_no_relay_is_told_with_its_status() {
        let why = read(b"HTTP/1.1 404 Not Found\r\n\r\nno", at(0), Duration::ZERO).unwrap_err();
        assert!(why.contains("404 Not Found"), "{why}");
        assert!(read(b"SSH-2.0-x\r\n", at(0), Duration::ZERO).is_err());
    }
}
