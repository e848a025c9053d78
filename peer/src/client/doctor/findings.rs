//! Judges what was seen: what is well, what is worth knowing, and what the user can do.
//!
//! In: an [`Examination`]. Out: [`Finding`]s in a fixed order, each with a stable name, and the exit code. Pure: the same
//! examination has the same findings.
//! Bounds: at most one finding of each name.

use std::{fmt::Display, time::Duration};

use super::{Examination, InRoom};
use crate::{
    failure::{Failure, Kind},
    mesh::{UplinkState, health::Clock},
};

mod network;
mod way;

/// How far the clocks of this machine and of the relay may differ, in milliseconds, before it is told as something to mend.
/// One minute: times in lists become misleading; what breaks for certain (certificates) needs more.
pub const CLOCK_BOUND_MS: u64 = 60_000;

/// What helps where something was still going on.
const MORE_TIME: &str = "look again in a moment, or give it longer with --timeout 30s";

/// Findings whose hints are about direct paths.
const OF_DIRECT_PATHS: [&str; 2] = ["nat", "port_mapping"];

/// How a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Good,
    /// Worth knowing; nothing needs to be done.
    Note,
    /// The user can mend it.
    Fix,
    /// The relay or the host cannot be reached.
    Unreachable,
}

impl Level {
    /// The level as JSON writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Fix => "fix",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at; scripts tell findings apart by it.
    pub name: &'static str,
    /// How it weighs.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Finding {
    fn new(name: &'static str, level: Level, what: impl Into<String>) -> Self {
        Self { name, level, what: what.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A failure, as a finding.
    fn of(name: &'static str, failure: &Failure) -> Self {
        let level = if failure.kind == Kind::Unreachable { Level::Unreachable } else { Level::Fix };
        let what = failure.to_string();
        Self { name, level, what, hint: failure.hint.clone() }
    }
}

/// The exit code: 0 all well, 1 something to mend, 3 the relay or the host cannot be reached.
pub fn exit_code(findings: &[Finding]) -> u8 {
    match findings.iter().map(|finding| finding.level).max() {
        None | Some(Level::Good | Level::Note) => 0,
        Some(Level::Fix) => Kind::Fixable.exit_code(),
        Some(Level::Unreachable) => Kind::Unreachable.exit_code(),
    }
}

/// Everything that is to be said of an examination.
pub fn findings(seen: &Examination) -> Vec<Finding> {
    let mut found = vec![
        Finding::new("state", Level::Good, format!("{}, which nobody else can look into", seen.state_dir)),
        daemon(seen),
    ];
    let joined = seen.mesh.as_ref().is_ok_and(|in_room| in_room.report.uplink == UplinkState::Joined);
    found.push(relay(seen, joined));
    found.extend(clock(seen));
    match &seen.mesh {
        Err(why) => found.push(Finding::of("room", why)),
        Ok(in_room) => {
            found.push(room(in_room, joined, seen.health.is_ok()));
            found.push(proxy(in_room.report.proxy.as_deref(), joined));
            found.extend(network::here(&in_room.report.network, joined));
        }
    }
    let way = way::findings(seen);
    if way.iter().any(|finding| finding.name == "path" && finding.level == Level::Good) {
        // What would help to find a direct path is no advice where there is one.
        found
            .iter_mut()
            .filter(|finding| OF_DIRECT_PATHS.contains(&finding.name))
            .for_each(|finding| finding.hint = None);
    }
    found.extend(way);
    found
}

fn daemon(seen: &Examination) -> Finding {
    match &seen.mesh {
        Ok(in_room) if seen.daemon => {
            let status = &in_room.status;
            let what = format!("peer {} runs here as `{}`, mode {}", status.version, status.name, status.mode);
            Finding::new("daemon", Level::Good, what)
        }
        Ok(_) | Err(_) => {
            let what = "no peer runs here for others; this command looked by itself";
            Finding::new("daemon", Level::Note, what).hint("`peer run` makes this machine a host of the room")
        }
    }
}

fn relay(seen: &Examination, joined: bool) -> Finding {
    let rtt = seen.mesh.as_ref().ok().and_then(|in_room| in_room.report.network.relay_rtt);
    let rtt = rtt.map(|rtt| format!(", {} by WebSocket", millis(rtt))).unwrap_or_default();
    let relay = &seen.relay;
    match &seen.health {
        Ok(health) if health.status == "ok" => {
            Finding::new("relay", Level::Good, format!("{relay} answers (version {}){rtt}", health.version))
        }
        Ok(health) => {
            let what = format!("{relay} is shutting down (it says `{}`){rtt}", health.status);
            Finding::new("relay", Level::Note, what).hint("peers join again when it is back")
        }
        Err(why) if joined => {
            let what = format!("{relay} carries frames{rtt}, but does not tell how it is: {why}");
            Finding::new("relay", Level::Note, what)
        }
        Err(why) => {
            let usual = "is the relay running and its address right? --relay or PEER_RELAY names another one";
            Finding::new("relay", Level::Unreachable, format!("{relay} cannot be reached: {why}"))
                .hint(why.hint.as_deref().unwrap_or(usual))
        }
    }
}

fn clock(seen: &Examination) -> Option<Finding> {
    let Clock { ahead_ms, within } = seen.health.as_ref().ok()?.clock?;
    let apart = Duration::from_millis(ahead_ms.unsigned_abs());
    if ahead_ms.unsigned_abs() <= CLOCK_BOUND_MS {
        let what = format!("differs from the relay's by {} (known to {})", millis(apart), millis(within));
        return Some(Finding::new("clock", Level::Good, what));
    }
    let side = if ahead_ms > 0 { "behind" } else { "ahead of" };
    let what = format!(
        "is {} {side} the relay's: times in lists of jobs and in the audit log mislead, files sent from here bear wrong \
         times, and a relay's certificate may count as expired",
        crate::ui::human_duration(apart)
    );
    let hint = "set the clock of whichever is wrong, for instance with `timedatectl set-ntp true`";
    Some(Finding::new("clock", Level::Fix, what).hint(hint))
}

fn room(in_room: &InRoom, joined: bool, relay_answers: bool) -> Finding {
    let room = &in_room.status.room;
    if joined {
        let others = match in_room.others {
            0 => "nobody else is there".to_owned(),
            1 => "1 other host is there".to_owned(),
            many => format!("{many} other hosts are there"),
        };
        return Finding::new("room", Level::Good, format!("`{room}` is joined; {others}"));
    }
    let trouble = in_room.report.trouble.as_ref();
    let why = trouble.map_or("no answer yet", |trouble| trouble.cause.as_str());
    // What keeps from the relay itself is said of the relay already.
    let hint = trouble.and_then(|trouble| trouble.hint.as_deref()).filter(|_| relay_answers);
    Finding::new("room", Level::Unreachable, format!("`{room}` is not joined: {why}"))
        .hint(hint.unwrap_or("links that stand go on; see what is said of the relay"))
}

fn proxy(proxy: Option<&str>, joined: bool) -> Finding {
    let new = |level, what: String| Finding::new("proxy", level, what);
    match proxy {
        Some(proxy) if joined => new(Level::Good, format!("the relay is reached by way of {proxy}")),
        Some(proxy) => new(Level::Note, format!("the way to the relay is by {proxy}; see what is said of the relay")),
        None => new(Level::Good, "none is used on the way to the relay".to_owned()),
    }
}

/// A span as people read it: `0.4 ms`, `2.5 s`.
pub fn millis(span: Duration) -> String {
    let ms = span.as_secs_f64() * 1e3;
    if ms < 1000.0 { format!("{ms:.1} ms") } else { crate::ui::human_duration(span) }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}

#[cfg(test)]
mod tests;
