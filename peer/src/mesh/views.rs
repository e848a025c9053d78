//! What handles of the mesh may see of links at any time, without asking anybody.
//!
//! In: links as they come, move and go. Out: how a link travels and has travelled. Never keeps a link that is gone.
//! Bounds: one entry per link.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use peerfleet_proto::request::transfer::PathNow;
use quinn::Connection;

use super::{PathView, agreement::Key, routes::Remote};

/// The links to look at.
#[derive(Debug, Default)]
pub(super) struct Views(Mutex<HashMap<Key, View>>);

#[derive(Debug)]
struct View {
    remote: Arc<Remote>,
    connection: Option<Connection>,
    /// When it began to travel as it does.
    since: Instant,
}

impl Views {
    /// How a link travels and has travelled.
    pub(super) fn path(&self, key: Key) -> PathView {
        let views = self.lock();
        let Some(view) = views.get(&key) else { return PathView::default() };
        let (direct_bytes, relayed_bytes) = view.remote.bytes();
        let address = view.remote.direct().filter(|_| view.connection.is_some());
        let is_direct = address.is_some();
        let now = view.connection.as_ref().map(|_| if is_direct { PathNow::Direct } else { PathNow::Relayed });
        let measured = view.connection.as_ref().map(Connection::rtt);
        let rtt = if is_direct { Some(view.remote.direct_rtt()) } else { measured };
        let age = now.map(|_| view.since.elapsed());
        PathView { now, rtt, age, address, direct_bytes, relayed_bytes }
    }

    /// A link that is not up yet.
    pub(super) fn add(&self, key: Key, remote: &Arc<Remote>) {
        let view = View { remote: Arc::clone(remote), connection: None, since: Instant::now() };
        self.lock().insert(key, view);
    }

    /// A link is up.
    pub(super) fn up(&self, key: Key, connection: Connection) {
        if let Some(view) = self.lock().get_mut(&key) {
            view.connection = Some(connection);
            view.since = Instant::now();
        }
    }

    /// A link travels another way from now on.
    pub(super) fn moved(&self, key: Key) {
        if let Some(view) = self.lock().get_mut(&key) {
            view.since = Instant::now();
        }
    }

    /// A link is gone.
    pub(super) fn remove(&self, key: Key) {
        self.lock().remove(&key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, View>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
