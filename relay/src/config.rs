//! Flags, environment and file -> [`Config`].
//!
//! In: [`Options`] from the command line (clap has already put the environment beneath the flags) and from the file.
//! Out: a [`Config`] in which every value is there and makes sense, or an error that names the option, or the file's line.
//! Never falls back to a default because something was unreadable.
//! Raw options -> merged options -> resolved configuration; flag beats environment beats file beats default.
//! Bounds: each default stands beside its reason.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueEnum};
use peerfleet_proto::limits::{IDLE_TIMEOUT, JOIN_DEADLINE, MAX_FRAME_BYTES};
use serde::{Deserialize, Deserializer, de};

use crate::{
    limits::Limits,
    queue::{ENTRY_BYTES, QueueLimits},
};

/// Where the relay listens unless told otherwise: this machine only.
pub const DEFAULT_BIND: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// Smallest queue that is any use: one frame of the largest size, with its cost.
const SMALLEST_QUEUE: usize = MAX_FRAME_BYTES + ENTRY_BYTES;

/// Everything that can be set, as it was written; `None` where it was not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Address and port to listen on, TCP and UDP; repeat it for several
    ///
    /// IPv6 in brackets: `--bind [::]:8080`. Default: 127.0.0.1:8080, this machine only.
    #[arg(long, env = "RELAY_BIND", value_name = "ADDR", value_delimiter = ',')]
    pub bind: Option<Vec<SocketAddr>>,

    /// Close a connection that was silent for this long [default: 90s]
    #[arg(long, env = "RELAY_IDLE_TIMEOUT", value_name = "TIME")]
    pub idle_timeout: Option<Span>,

    /// Close a connection that has not joined a room after this long [default: 10s]
    #[arg(long, env = "RELAY_JOIN_TIMEOUT", value_name = "TIME")]
    pub join_timeout: Option<Span>,

    /// Close a connection that has taken no byte for this long while some were waiting [default: 10s]
    #[arg(long, env = "RELAY_WRITE_TIMEOUT", value_name = "TIME")]
    pub write_timeout: Option<Span>,

    /// Longest time between the signal to stop and the end [default: 5s]
    #[arg(long, env = "RELAY_DRAIN_TIMEOUT", value_name = "TIME")]
    pub drain_timeout: Option<Span>,

    /// When stopping, ask peers to come back within this long, each at its own moment [default: 3s]
    #[arg(long, env = "RELAY_DRAIN_JITTER", value_name = "TIME")]
    pub drain_jitter: Option<Span>,

    /// Most connections at a time [default: 16384]
    #[arg(long, env = "RELAY_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,

    /// Most connections of one address (IPv6: one /64) at a time [default: 1024]
    #[arg(long, env = "RELAY_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N")]
    pub max_connections_per_address: Option<usize>,

    /// Most new connections of one address (IPv6: one /64) per second [default: 256]
    #[arg(long, env = "RELAY_MAX_CONNECTION_RATE", value_name = "N")]
    pub max_connection_rate: Option<u32>,

    /// Most peers in one room [default: 4096]
    #[arg(long, env = "RELAY_MAX_PEERS_PER_ROOM", value_name = "N")]
    pub max_peers_per_room: Option<usize>,

    /// Most bytes of news (who joined, left) that wait for one peer [default: 1MiB]
    #[arg(long, env = "RELAY_CONTROL_QUEUE", value_name = "SIZE")]
    pub control_queue: Option<Size>,

    /// Most bytes of messages that wait for one peer [default: 1MiB]
    #[arg(long, env = "RELAY_MESSAGE_QUEUE", value_name = "SIZE")]
    pub message_queue: Option<Size>,

    /// Most bytes of datagrams that wait for one peer for more than 20 ms; four times that for less [default: 512KiB]
    #[arg(long, env = "RELAY_DATAGRAM_QUEUE", value_name = "SIZE")]
    pub datagram_queue: Option<Size>,

    /// Most bytes that wait in all queues of one room [default: 64MiB]
    #[arg(long, env = "RELAY_ROOM_QUEUES", value_name = "SIZE")]
    pub room_queues: Option<Size>,

    /// Most bytes that wait in all queues of all rooms [default: 512MiB]
    #[arg(long, env = "RELAY_ALL_QUEUES", value_name = "SIZE")]
    pub all_queues: Option<Size>,

    /// Do not answer STUN over UDP (peers then find fewer direct paths)
    #[arg(long, env = "RELAY_NO_STUN", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub no_stun: Option<bool>,

    /// Answer STUN on this UDP port as well, so that peers can tell what kind of NAT they are behind; 0: any [default: the
    /// port behind that of --bind]
    #[arg(long, env = "RELAY_STUN_ALTERNATE_PORT", value_name = "PORT")]
    pub stun_alternate_port: Option<u16>,

    /// Form of the log on stderr [default: text]
    #[arg(long, env = "RELAY_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What to log: error, warn, info, debug or trace, or a filter such as `info,peerfleet_relay=debug` [default: info]
    #[arg(long, env = "RELAY_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// One line of words per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

/// What the relay runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Addresses to listen on; port 0 lets the system choose.
    pub bind: Vec<SocketAddr>,
    /// Silence after which a connection is reaped.
    pub idle_timeout: Duration,
    /// Time for the HTTP request, and again for joining.
    pub join_timeout: Duration,
    /// Time without progress after which a peer that does not read is cut.
    pub write_timeout: Duration,
    /// Longest time that shutting down takes.
    pub drain_timeout: Duration,
    /// Span over which peers come back after a shutdown.
    pub drain_jitter: Duration,
    /// Who may connect.
    pub limits: Limits,
    /// Most peers in one room.
    pub peers_per_room: usize,
    /// Bounds of one peer's queues.
    pub queues: QueueLimits,
    /// Bytes in all queues of one room.
    pub room_bytes: usize,
    /// Bytes in all queues of all rooms.
    pub relay_bytes: usize,
    /// Whether STUN is answered.
    pub stun: bool,
    /// The second port that STUN is answered on; port 0 lets the system choose. `None`: the one behind the first, or
    /// any if that is taken.
    pub stun_alternate_port: Option<u16>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: vec![DEFAULT_BIND],
            idle_timeout: IDLE_TIMEOUT,
            join_timeout: JOIN_DEADLINE,
            // Ten seconds without a single byte taken: longer than any radio hand-over, shorter than patience.
            write_timeout: Duration::from_secs(10),
            // Below the ten seconds that container engines wait before they kill.
            drain_timeout: Duration::from_secs(5),
            // 2,000 peers in 3 s are 667 joins a second, 6 % of one core at 84 µs of X25519 each.
            drain_jitter: Duration::from_secs(3),
            // 16,384 connections with full read buffers and an unfinished datagram (240 KiB) are 3.8 GiB at the very worst, 100 MiB
            // when idle.
            // A company behind one address fits into 1,024; and 256 a second lets all of it back within the jitter.
            limits: Limits { connections: 16_384, per_address: 1024, per_address_rate: 256 },
            // Joining costs a frame to everybody: beyond some thousands, use several rooms.
            peers_per_room: 4096,
            // Control: 2,000 joins at once. Messages: 17 of the largest. Datagrams: 40 ms at 100 Mbit/s.
            queues: QueueLimits { control: 1 << 20, messages: 1 << 20, datagrams: 512 << 10 },
            // 21 receivers that read nothing may fill up, bursts and all, without touching another room's share.
            room_bytes: 64 << 20,
            relay_bytes: 512 << 20,
            stun: true,
            stun_alternate_port: None,
        }
    }
}

/// An option whose value makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{option}` {rule}")]
pub struct Invalid {
    /// The option, without dashes.
    pub option: &'static str,
    /// What it must be.
    pub rule: String,
}

/// Why a configuration file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    /// It could not be read.
    #[error("{}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
}

impl Options {
    /// Reads the options of a file.
    ///
    /// # Errors
    /// [`FileFault`] with the place of the first thing that is wrong.
    pub fn read(path: &Path) -> Result<Self, FileFault> {
        let bytes = std::fs::read(path).map_err(|cause| FileFault::Unreadable { path: path.to_owned(), cause })?;
        let parsed = match std::str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text),
            Err(fault) => Err((fault.valid_up_to(), "what stands there is not UTF-8".to_owned())),
        };
        parsed.map_err(|(at, message)| {
            let before = String::from_utf8_lossy(&bytes[..at.min(bytes.len())]);
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            FileFault::Broken { path: path.to_owned(), line, column, message }
        })
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        toml::from_str(text).map_err(|fault| {
            let at = fault.span().map_or(text.len(), |span| span.start);
            (at, fault.message().replace('\n', ", "))
        })
    }

    /// These options, and those of `beneath` where nothing is said here.
    #[must_use]
    pub fn over(self, beneath: Self) -> Self {
        Self {
            bind: self.bind.or(beneath.bind),
            idle_timeout: self.idle_timeout.or(beneath.idle_timeout),
            join_timeout: self.join_timeout.or(beneath.join_timeout),
            write_timeout: self.write_timeout.or(beneath.write_timeout),
            drain_timeout: self.drain_timeout.or(beneath.drain_timeout),
            drain_jitter: self.drain_jitter.or(beneath.drain_jitter),
            max_connections: self.max_connections.or(beneath.max_connections),
            max_connections_per_address: self.max_connections_per_address.or(beneath.max_connections_per_address),
            max_connection_rate: self.max_connection_rate.or(beneath.max_connection_rate),
            max_peers_per_room: self.max_peers_per_room.or(beneath.max_peers_per_room),
            control_queue: self.control_queue.or(beneath.control_queue),
            message_queue: self.message_queue.or(beneath.message_queue),
            datagram_queue: self.datagram_queue.or(beneath.datagram_queue),
            room_queues: self.room_queues.or(beneath.room_queues),
            all_queues: self.all_queues.or(beneath.all_queues),
            no_stun: self.no_stun.or(beneath.no_stun),
            stun_alternate_port: self.stun_alternate_port.or(beneath.stun_alternate_port),
            log_format: self.log_format.or(beneath.log_format),
            log_level: self.log_level.or(beneath.log_level),
        }
    }

    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`Invalid`] for the first value that makes no sense.
    pub fn resolve(&self) -> Result<Config, Invalid> {
        let default = Config::default();
        let config = Config {
            bind: self.bind.clone().unwrap_or(default.bind),
            idle_timeout: span(self.idle_timeout, default.idle_timeout),
            join_timeout: span(self.join_timeout, default.join_timeout),
            write_timeout: span(self.write_timeout, default.write_timeout),
            drain_timeout: span(self.drain_timeout, default.drain_timeout),
            drain_jitter: span(self.drain_jitter, default.drain_jitter),
            limits: Limits {
                connections: self.max_connections.unwrap_or(default.limits.connections),
                per_address: self.max_connections_per_address.unwrap_or(default.limits.per_address),
                per_address_rate: self.max_connection_rate.unwrap_or(default.limits.per_address_rate),
            },
            peers_per_room: self.max_peers_per_room.unwrap_or(default.peers_per_room),
            queues: QueueLimits {
                control: size(self.control_queue, default.queues.control),
                messages: size(self.message_queue, default.queues.messages),
                datagrams: size(self.datagram_queue, default.queues.datagrams),
            },
            room_bytes: size(self.room_queues, default.room_bytes),
            relay_bytes: size(self.all_queues, default.relay_bytes),
            stun: self.no_stun.map_or(default.stun, |no_stun| !no_stun),
            stun_alternate_port: self.stun_alternate_port,
        };
        config.check()?;
        Ok(config)
    }
}

impl Config {
    /// Checks that every value makes sense.
    ///
    /// # Errors
    /// [`Invalid`] for the first that does not.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.bind.is_empty() {
            return Err(Invalid { option: "bind", rule: "must name at least one address".into() });
        }
        let is_main = |port| port != 0 && self.bind.iter().all(|address| address.port() == port);
        if self.stun_alternate_port.is_some_and(is_main) {
            return Err(Invalid { option: "stun-alternate-port", rule: "must be another than that of `bind`".into() });
        }
        let spans = [
            ("idle-timeout", self.idle_timeout),
            ("join-timeout", self.join_timeout),
            ("write-timeout", self.write_timeout),
        ];
        if let Some((option, _)) = spans.into_iter().find(|(_, span)| *span < Duration::from_millis(100)) {
            return Err(Invalid { option, rule: "must be at least 100ms".into() });
        }
        let counts = [
            ("max-connections", self.limits.connections),
            ("max-connections-per-address", self.limits.per_address),
            ("max-connection-rate", self.limits.per_address_rate as usize),
            ("max-peers-per-room", self.peers_per_room),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Invalid { option, rule: "must be at least 1".into() });
        }
        let sizes = [
            ("control-queue", self.queues.control),
            ("message-queue", self.queues.messages),
            ("datagram-queue", self.queues.datagrams),
            ("room-queues", self.room_bytes),
            ("all-queues", self.relay_bytes),
        ];
        if let Some((option, _)) = sizes.into_iter().find(|(_, size)| *size < SMALLEST_QUEUE) {
            return Err(Invalid { option, rule: format!("must be at least {SMALLEST_QUEUE} bytes, one frame") });
        }
        Ok(())
    }
}

fn span(written: Option<Span>, default: Duration) -> Duration {
    written.map_or(default, |Span(span)| span)
}

fn size(written: Option<Size>, default: usize) -> usize {
    written.map_or(default, |Size(size)| size)
}

/// A span of time as people write it: `90s`, `500ms`, `2m`, `1h`; a bare number is seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A number of bytes as people write it: `512KiB`, `1MiB`; a bare number is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub usize);

/// The text was no quantity of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct NotAQuantity(&'static str);

impl FromStr for Span {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let fault = NotAQuantity("a time such as 90s, 500ms, 2m or 1h");
        let (number, unit) = quantity(text).ok_or(fault)?;
        let millis = match unit {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(fault),
        };
        // Longer than a year is a mistake, and deadlines must stay within what a clock can add.
        let span = number.checked_mul(millis).map(Duration::from_millis);
        span.filter(|span| *span <= Duration::from_secs(366 * 86_400)).map(Self).ok_or(fault)
    }
}

impl FromStr for Size {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, NotAQuantity> {
        let fault = NotAQuantity("a size such as 524288, 512KiB or 1MiB");
        let (number, unit) = quantity(text).ok_or(fault)?;
        let bytes: u64 = match unit {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(fault),
        };
        let size = number.checked_mul(bytes).and_then(|size| usize::try_from(size).ok());
        size.filter(|size| *size <= isize::MAX as usize).map(Self).ok_or(fault)
    }
}

fn quantity(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim()))
}

/// Reads a quantity that is written as a text or as a bare number.
fn quantity_from<'de, D, T>(deserializer: D, expected: &'static str) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = NotAQuantity>,
{
    struct Visitor<T>(&'static str, std::marker::PhantomData<T>);

    impl<T: FromStr<Err = NotAQuantity>> de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            number.to_string().parse().map_err(E::custom)
        }
    }

    deserializer.deserialize_any(Visitor(expected, std::marker::PhantomData))
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        quantity_from(deserializer, "a time such as \"90s\"")
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        quantity_from(deserializer, "a size such as \"512KiB\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_is_the_default() {
        assert_eq!(Options::default().resolve(), Ok(Config::default()));
    }

    #[test]
    fn upper_options_win_and_lower_ones_fill_in() {
        let upper = Options::parse("idle-timeout = '30s'").unwrap();
        let lower = Options::parse("idle-timeout = '60s'\njoin-timeout = 5\nmessage-queue = '2MiB'").unwrap();
        let config = upper.over(lower).resolve().unwrap();
        assert_eq!(config.idle_timeout, Duration::from_secs(30));
        assert_eq!(config.join_timeout, Duration::from_secs(5));
        assert_eq!(config.queues.messages, 2 << 20);
        assert_eq!(config.write_timeout, Config::default().write_timeout);
    }

    #[test]
    fn every_option_can_be_set_in_a_file() {
        let text = "bind = ['127.0.0.1:1', '[::1]:2']\nidle-timeout = '1m'\njoin-timeout = '1s'\nwrite-timeout = '2s'
            drain-timeout = '3s'\ndrain-jitter = '4s'\nmax-connections = 5\nmax-connections-per-address = 6
            max-connection-rate = 7\nmax-peers-per-room = 8\ncontrol-queue = '1GiB'\nmessage-queue = 1000000
            datagram-queue = '1000000B'\nroom-queues = '2MiB'\nall-queues = '3MiB'\nno-stun = true
            stun-alternate-port = 3479
            log-format = 'json'\nlog-level = 'debug'";
        let options = Options::parse(text).unwrap();
        assert_eq!(options, options.clone().over(Options::parse("log-level = 'x'").unwrap()));
        assert!(!format!("{options:?}").contains("None"), "an option is missing from this test: {options:?}");
        assert_eq!(Options::default().over(options.clone()), options, "an option is lost when layered");
        assert!(!options.resolve().unwrap().stun);
    }

    #[test]
    fn broken_file_is_an_error_with_line_and_column() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.toml");
        for (text, place, word) in [
            ("bind = [\"127.0.0.1:80\"]\nidel-timeout = '1s'\n", ":2:1:", "unknown field `idel-timeout`"),
            ("# ä\nidle-timeout = 'soon'\n", ":2:16:", "a time such as"),
            ("max-connections = -1\n", ":1:19:", "invalid value"),
            ("bind = [\n", ":", "array"),
        ] {
            std::fs::write(&path, text).unwrap();
            let fault = Options::read(&path).unwrap_err().to_string();
            assert!(fault.contains(&format!("relay.toml{place}")) && fault.contains(word), "{fault}");
        }
        std::fs::write(&path, b"# \xc3\xa4\n# \xc3\xa4\xff\n").unwrap();
        let fault = Options::read(&path).unwrap_err().to_string();
        assert!(fault.contains("relay.toml:2:4:") && fault.contains("UTF-8"), "{fault}");
        let missing = Options::read(&folder.path().join("none.toml")).unwrap_err();
        assert!(matches!(missing, FileFault::Unreadable { .. }));
    }

    #[test]
    fn values_without_sense_are_named() {
        for (text, option) in [
            ("bind = []", "bind"),
            ("idle-timeout = '0s'", "idle-timeout"),
            ("max-peers-per-room = 0", "max-peers-per-room"),
            ("datagram-queue = 10", "datagram-queue"),
            ("bind = ['127.0.0.1:7', '[::1]:7']\nstun-alternate-port = 7", "stun-alternate-port"),
        ] {
            assert_eq!(Options::parse(text).unwrap().resolve().unwrap_err().option, option);
        }
    }

    #[test]
    fn quantities_need_a_known_unit_and_must_not_overflow() {
        assert_eq!("1500ms".parse(), Ok(Span(Duration::from_millis(1500))));
        assert_eq!("2".parse(), Ok(Span(Duration::from_secs(2))));
        assert_eq!("1KiB".parse(), Ok(Size(1024)));
        for text in ["", "s", "1 fortnight", "-1s", "99999999999999999h", "400000h"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        for text in ["", "1k", "99999999999GiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
