//! Letting links go that nobody uses: a link, and the path beneath it, are made when they are wanted and last as long as they
//! are used.
//!
//! In: `now`, and the leases that streams hold. Out: the links that ended. A link whose other end the relay does not know now
//! stays: another could not be made without it.
//! Bounds: [`UNUSED`] without streams; at [`MAX_LINKS`] the longest unused one makes room.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Book, CODE_UNUSED, Entry, Key, MAX_LINKS, Remote};

/// Time without streams after which a link is closed, and its path with it. Keeping both for 3 min costs 2 KB; making them
/// anew costs two round trips by way of the relay and as many checks as there are addresses. Whoever works on a host comes
/// back sooner, and whoever went through the whole fleet once does not keep it.
pub(super) const UNUSED: Duration = Duration::from_secs(180);

/// How much longer the side that did not dial waits, so that the two do not both close while the other opens a stream.
const UNUSED_GRACE: Duration = Duration::from_secs(30);

/// Time after which a link that never came up is forgotten: it may still come while somebody waits.
pub(super) const FORGET_AFTER: Duration = Duration::from_secs(30);

/// Time that a link's last packets are given to leave, and the other side's to arrive.
const PARTING: Duration = Duration::from_secs(2);

impl Book {
    /// Closes links without streams, and forgets those that never came up. Gives those that ended.
    pub(in crate::mesh) fn sweep(&mut self, now: Instant) -> Vec<Arc<Remote>> {
        for (_, remote) in self.parting.extract_if(.., |(since, _)| now.saturating_duration_since(*since) > PARTING) {
            self.switch.routes.remove(&remote);
        }
        let mut over = Vec::new();
        let is_member = |entry: &Entry| entry.remote.slot().is_some();
        for (key, entry) in &mut self.entries {
            if entry.lease.is_shared() {
                entry.last_used = now;
            }
            let dials = (self.me.peer, self.me.instance) < (entry.peer, key.0);
            let patience = if dials { UNUSED } else { UNUSED + UNUSED_GRACE };
            let is_over = match entry.connection {
                // Without the relay no other could be made.
                Some(_) => is_member(entry) && now.saturating_duration_since(entry.last_used) > patience,
                None => now.saturating_duration_since(entry.since) > FORGET_AFTER,
            };
            if is_over {
                over.push(*key);
            }
        }
        over.into_iter().for_each(|key| self.let_go(key, "nobody used it"));
        std::mem::take(&mut self.let_go)
    }

    /// Whether there may be one more link, for which the longest unused one may have to go.
    pub(super) fn make_room(&mut self) -> bool {
        if self.entries.len() < MAX_LINKS {
            return true;
        }
        let unused = self.entries.iter().filter(|(_, entry)| entry.connection.is_some() && !entry.lease.is_shared());
        let Some(longest) = unused.min_by_key(|(_, entry)| entry.last_used).map(|(key, _)| *key) else { return false };
        self.let_go(longest, "others were needed more");
        true
    }

    /// Ends a link that nobody uses; [`Book::sweep`] tells of it.
    pub(super) fn let_go(&mut self, key: Key, why: &str) {
        if let Some(connection) = self.entries.get(&key).and_then(|entry| entry.connection.as_ref()) {
            connection.close(CODE_UNUSED, b"unused");
        }
        let ended = self.fail(key, why);
        self.let_go.extend(ended);
    }
}
