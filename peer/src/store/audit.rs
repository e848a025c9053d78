//! Who asked this host for what, what it said, and how that ended.
//!
//! In: requests with the identity that was proved, as they are judged; later their outcomes. Out: the newest of them.
//! It never holds environment values, input, output or file contents. Bounds: [`AUDIT_KEPT`] rows of at most
//! [`WHAT_BYTES`] of text, the oldest go first.

use std::{
    sync::{Arc, OnceLock},
    time::{SystemTime, UNIX_EPOCH},
};

use peerfleet_proto::id::{InstanceId, PeerId};
use rusqlite::params;

use super::{Store, StoreFault};
use crate::mesh::Caller;

/// Requests that are remembered: a busy month of one person, at most 10 MiB of file.
pub const AUDIT_KEPT: i64 = 10_000;

/// Longest account of what was asked for, in bytes.
pub const WHAT_BYTES: usize = 1024;

/// A request as it was judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audited {
    /// When, in milliseconds since the Unix epoch by this host's clock.
    pub at_unix_ms: u64,
    /// The identity that was proved.
    pub peer: PeerId,
    /// Its process.
    pub instance: InstanceId,
    /// The request's kind, as `exec`.
    pub kind: String,
    /// What was asked for, shortened.
    pub what: String,
    /// What this host said: `allowed` or `refused`.
    pub verdict: String,
    /// How it ended, once it has.
    pub outcome: Option<String>,
}

/// Stands for a request whose outcome is yet to come.
#[derive(Debug, Clone)]
pub struct AuditId(Arc<OnceLock<i64>>);

impl Store {
    /// Writes a request down as it was judged.
    pub async fn audit(&self, caller: Caller, kind: &'static str, what: String, verdict: &'static str) -> AuditId {
        let id = Arc::new(OnceLock::new());
        let written = id.clone();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = i64::try_from(at.as_millis()).unwrap_or(i64::MAX);
        let what = shortened(what);
        self.write(move |connection| {
            connection
                .prepare_cached(
                    "INSERT INTO audit (at_ms, peer, instance, kind, what, verdict) VALUES (?, ?, ?, ?, ?, ?)",
                )?
                .execute(params![at, caller.peer.as_bytes(), caller.instance.as_bytes(), kind, what, verdict])?;
            let row = connection.last_insert_rowid();
            written.get_or_init(|| row);
            connection.prepare_cached("DELETE FROM audit WHERE id <= ?")?.execute([row - AUDIT_KEPT]).map(drop)
        })
        .await;
        AuditId(id)
    }

    /// Writes down how that request ended.
    pub async fn audit_outcome(&self, id: AuditId, outcome: String) {
        let outcome = shortened(outcome);
        self.write(move |connection| {
            // A request that could not be written has no outcome to be written either.
            let Some(row) = id.0.get() else { return Ok(()) };
            connection
                .prepare_cached("UPDATE audit SET outcome = ? WHERE id = ?")?
                .execute(params![outcome, row])
                .map(drop)
        })
        .await;
    }

    /// The newest requests, newest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn audited(&self, limit: u32) -> Result<Vec<Audited>, StoreFault> {
        if self.is_unmade() {
            return Ok(Vec::new());
        }
        self.read(move |connection| {
            let mut query = connection.prepare(
                "SELECT at_ms, peer, instance, kind, what, verdict, outcome FROM audit ORDER BY id DESC LIMIT ?",
            )?;
            let rows = query.query_map([limit], |row| {
                Ok(Audited {
                    at_unix_ms: u64::try_from(row.get::<_, i64>(0)?).unwrap_or(0),
                    peer: PeerId::from_bytes(row.get(1)?),
                    instance: InstanceId::from_bytes(row.get(2)?),
                    kind: row.get(3)?,
                    what: row.get(4)?,
                    verdict: row.get(5)?,
                    outcome: row.get(6)?,
                })
            })?;
            rows.collect()
        })
        .await
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > WHAT_BYTES {
        text.truncate(text.floor_char_boundary(WHAT_BYTES - '…'.len_utf8()));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Caller {
        Caller { peer: PeerId::from_bytes([1; 32]), instance: InstanceId::from_bytes([2; 16]) }
    }

    #[tokio::test]
    async fn a_request_is_found_with_its_outcome() {
        let store = Store::volatile();
        let id = store.audit(caller(), "exec", "true".into(), "allowed").await;
        store.audit(caller(), "jobs", String::new(), "refused").await;
        store.audit_outcome(id, "exited 0".into()).await;
        let audited = store.audited(10).await.unwrap();
        assert_eq!((audited[0].kind.as_str(), audited[0].outcome.as_deref()), ("jobs", None));
        assert_eq!((audited[1].kind.as_str(), audited[1].outcome.as_deref()), ("exec", Some("exited 0")));
        assert_eq!(audited[1].peer, caller().peer);
    }

    #[tokio::test]
    async fn the_oldest_request_gives_way() {
        let store = Store::volatile();
        for number in 0..AUDIT_KEPT + 5 {
            store.audit(caller(), "ping", number.to_string(), "allowed").await;
        }
        let audited = store.audited(u32::MAX).await.unwrap();
        assert_eq!(audited.len() as i64, AUDIT_KEPT);
        assert_eq!(audited.last().unwrap().what, "5");
    }

    #[tokio::test]
    async fn a_long_request_is_shortened_between_characters() {
        let text = shortened("ä".repeat(WHAT_BYTES));
        assert!(text.len() <= WHAT_BYTES && text.ends_with('…'));
    }
}
