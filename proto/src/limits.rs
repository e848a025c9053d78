//! Every number that two sides must agree on: its unit, what happens at the bound, and why this value.

use std::time::Duration;

/// Largest WebSocket message between peer and relay, in bytes; a longer one ends the connection.
/// One GSO batch (at most 65,535 bytes of UDP payload in Linux, `UDP_MAX_SEGMENTS`) and its header must fit.
pub const MAX_FRAME_BYTES: usize = 80 * 1024;

/// Largest payload of one sealed message, in bytes. A longer answer must go over a stream.
/// Below Noise's message limit of 65,535 bytes (Noise §3) with room for the seal and the frame's header.
pub const MAX_MESSAGE_BYTES: usize = 60 * 1024;

/// Output of a job that travels inside its sealed outcome, per stream, in bytes; what is beyond is read over a link.
/// Both streams together, with the outcome around them, stay below [`MAX_MESSAGE_BYTES`].
pub const INLINE_OUTPUT_BYTES: usize = 28 * 1024;

/// Largest sealed presence, in bytes; a longer one is refused at joining. The most tags of the longest kind need 2.3
/// KiB with all else; a well-tagged host needs about 400 bytes.
pub const MAX_PRESENCE_BYTES: usize = 3 * 1024;

/// Output of an attached job that its owner has not yet taken, per stream, in bytes; at the bound the host stops reading
/// the process. 1 MiB: 100 Mbit/s over a round trip of 80 ms.
pub const OUTPUT_WINDOW_BYTES: usize = 1024 * 1024;

/// Standard input that the caller has sent and the host has not yet taken, in bytes; beyond it the host ends the stream.
/// So a host can hear other frames behind input that its process does not read. 256 KiB: four pipes of 64 KiB.
pub const STDIN_WINDOW_BYTES: usize = 256 * 1024;

/// Most recipients of one multicast; larger fan-outs are sent as several.
pub const MAX_MULTICAST: usize = 256;

/// Longest part for one recipient of a multicast, in bytes: a Noise first message (96 + 32) with a body key and digest.
pub const MAX_MULTICAST_PART_BYTES: usize = 512;

/// Longest host name, in bytes, as DNS labels have it (RFC 1035 §2.3.4).
pub const MAX_NAME_BYTES: usize = 63;

/// Most tags of one host.
pub const MAX_TAGS: usize = 32;

/// Longest tag, in bytes.
pub const MAX_TAG_BYTES: usize = 63;

/// Longest file path in a request, in bytes: Linux's `PATH_MAX`.
pub const MAX_PATH_BYTES: usize = 4096;

/// Time from the upgrade until a peer must have joined; then the relay closes the connection.
/// Three round trips of a satellite link (0.6 s each) with room for a slow client.
pub const JOIN_DEADLINE: Duration = Duration::from_secs(10);

/// Silence after which the relay reaps a connection, unless configured. Three missed keep-alives.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Interval of a peer's keep-alive to the relay: below the 30 s after which common NATs and proxies forget a flow.
pub const UPLINK_KEEPALIVE: Duration = Duration::from_secs(25);

/// First pause before joining again, before jitter.
pub const REJOIN_MIN: Duration = Duration::from_millis(200);

/// Longest pause before joining again, before jitter.
pub const REJOIN_MAX: Duration = Duration::from_secs(30);

/// Most candidates of one peer; further ones are ignored (iroh caps at 32 as well).
pub const MAX_CANDIDATES: usize = 32;

/// Bytes of one range of a transfer: the unit that is asked for, verified and resumed.
/// 1 MiB: at most 5 % of a 256 MiB file is in flight with 8 ranges asked for, and a hash per range is noise.
pub const RANGE_BYTES: u64 = 1024 * 1024;

/// Longest typed head (a request or an outcome) on a stream, in bytes.
pub const MAX_HEAD_BYTES: usize = 128 * 1024;

/// Pause before an ask is repeated for the first time; it doubles with each repeat. RFC 6298 §2.1 starts there too.
pub const ASK_RETRY_FIRST: Duration = Duration::from_secs(1);

/// Longest pause between repeats, and the interval at which an accepted ask is asked after.
pub const ASK_RETRY_MAX: Duration = Duration::from_secs(10);

/// An ask that was accepted or answered by nobody for so long has failed: three repeats went unanswered.
pub const ASK_CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// An accepted ask whose host left the room and did not come back for so long is lost: a relay's restart takes less.
pub const ASK_LOST_AFTER: Duration = Duration::from_secs(30);

/// How long a host remembers an outcome for who asks again.
pub const OUTCOME_MEMORY: Duration = Duration::from_secs(600);
