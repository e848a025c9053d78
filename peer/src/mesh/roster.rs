//! Who is in the room, as the relay tells and presence proves.
//!
//! In: members with what they said of themselves, links that stand. Out: the [`Roster`] that everybody reads.
//! Never lists whose presence does not open: the relay named somebody who is none of us.
//! Bounds: those of the uplink's members; a new roster at most every [`PUBLISH_EVERY`], for a room that fills at once is
//! otherwise copied once for each who comes.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::{InstanceId, PeerId, Slot},
    presence::Presence,
};
use tokio::sync::watch;

use super::{NotJoined, PeerEntry, Roster, UplinkState, agreement::Book};

/// Time between two rosters.
const PUBLISH_EVERY: Duration = Duration::from_millis(10);

/// One other instance.
#[derive(Debug)]
pub(super) struct Member {
    /// Its identity.
    pub(super) peer: PeerId,
    /// What it says of itself.
    pub(super) presence: Presence,
    /// The relay's number for it, while it is in the room and we are.
    pub(super) slot: Option<Slot>,
}

/// Every instance that is known.
pub(super) struct Members {
    known: BTreeMap<InstanceId, Member>,
    uplink: UplinkState,
    trouble: Option<NotJoined>,
    roster: watch::Sender<Arc<Roster>>,
    publish_at: Option<Instant>,
    published: Option<Instant>,
}

impl Members {
    /// Nobody, and not in the room.
    pub(super) fn new() -> Self {
        let uplink = UplinkState::Joining;
        let roster = watch::Sender::new(Arc::new(Roster { uplink, trouble: None, peers: Vec::new() }));
        Self { known: BTreeMap::new(), uplink, trouble: None, roster, publish_at: None, published: None }
    }

    /// The roster, kept up to date.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Roster>> {
        self.roster.subscribe()
    }

    /// One that is known.
    pub(super) fn get(&self, instance: InstanceId) -> Option<&Member> {
        self.known.get(&instance)
    }

    /// Processes of this host that left the room and have a successor there. A host is one process at a time, by the
    /// lock on its state folder: they are dead, whereas one without a successor may only have lost the relay.
    pub(super) fn replaced(&self, peer: PeerId) -> Vec<InstanceId> {
        let hosts = || self.known.iter().filter(|(_, member)| member.peer == peer && member.presence.is_host());
        if !hosts().any(|(_, member)| member.slot.is_some()) {
            return Vec::new();
        }
        hosts().filter(|(_, member)| member.slot.is_none()).map(|(instance, _)| *instance).collect()
    }

    /// Somebody came, moved or changed.
    pub(super) fn set(&mut self, instance: InstanceId, member: Member, now: Instant) {
        self.known.insert(instance, member);
        self.changed(now);
    }

    /// Somebody left the room; who has a link is still known.
    pub(super) fn left(&mut self, instance: InstanceId, has_link: bool, now: Instant) {
        if !has_link {
            self.known.remove(&instance);
        } else if let Some(member) = self.known.get_mut(&instance) {
            member.slot = None;
        }
        self.changed(now);
    }

    /// We are in the room, and know who else is.
    pub(super) fn set_joined(&mut self, now: Instant) {
        self.uplink = UplinkState::Joined;
        self.trouble = None;
        self.changed(now);
    }

    /// We are not in the room, for this reason.
    pub(super) fn set_lost(&mut self, trouble: NotJoined, now: Instant) {
        self.uplink = UplinkState::Joining;
        self.trouble = Some(trouble);
        self.known.values_mut().for_each(|member| member.slot = None);
        self.changed(now);
    }

    /// How the connection to the relay stands.
    pub(super) fn uplink(&self) -> UplinkState {
        self.uplink
    }

    /// How the connection to the relay stands, and why the room was not joined at the last try.
    pub(super) fn standing(&self) -> (UplinkState, Option<NotJoined>) {
        (self.uplink, self.trouble.clone())
    }

    /// Something that the roster shows has changed.
    pub(super) fn changed(&mut self, now: Instant) {
        let earliest = self.published.map_or(now, |published| published + PUBLISH_EVERY);
        self.publish_at.get_or_insert(earliest.max(now));
    }

    /// When [`Members::publish`] is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.publish_at
    }

    /// Shows the roster, if it changed and is due.
    pub(super) fn publish(&mut self, links: &Book, now: Instant) {
        if self.publish_at.is_none_or(|at| at > now) {
            return;
        }
        self.publish_at = None;
        self.published = Some(now);
        let listed = self.known.iter().filter(|(instance, member)| member.slot.is_some() || links.is_up(**instance));
        let mut peers: Vec<PeerEntry> = listed
            .map(|(instance, member)| PeerEntry {
                peer: member.peer,
                instance: *instance,
                presence: member.presence.clone(),
                present: member.slot.is_some(),
            })
            .collect();
        peers.sort_by_key(|entry| (entry.peer, entry.instance));
        self.roster.send_replace(Arc::new(Roster { uplink: self.uplink, trouble: self.trouble.clone(), peers }));
    }
}
