//! Drives the searches for paths through hard NATs: one per link, all of them at one pace and on the same sockets.
//!
//! In: links as they are agreed and end, where both sides are, STUN packets, paths as they come and go, sockets as they
//! are opened. Out: packets with the socket each leaves from, [`SearchEvent`]s.
//! Never decides what to send: [`peerfleet_proto::path::search`] does. It only spaces it.
//! Bounds: [`MAX_AT_ONCE`] searches under way, further ones wait; a packet every [`PACE`] for all of them; [`MAX_HISTORIES`]
//! instances whose failures are remembered.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::InstanceId,
    path::{
        CheckKey, Handled, Role,
        search::{Config, Event, History, NoSearch, Search, Shot, Side, SocketId, Standing, round::PACE},
    },
    request::network::SearchReport,
};

use super::{path::Whereabouts, routes::Remote};
use crate::random;

/// Searches under way at one time. Each takes two seconds of packets at the pace of one; four come to an end well before
/// NATs forget what the first of their packets opened.
const MAX_AT_ONCE: usize = 4;

/// Instances whose failed searches are remembered; beyond it the one tried longest ago is forgotten.
const MAX_HISTORIES: usize = 256;

/// How far packets may be behind their pace and still catch up: the system's timers are a millisecond or two late.
const CATCH_UP: Duration = Duration::from_millis(16);

/// What the owner of the sockets shall do.
#[derive(Debug)]
pub(super) enum SearchEvent {
    /// Open so many, and call [`Searches::opened`].
    Open(usize),
    /// Keep one for a link's packets to this address.
    Keep {
        /// Which.
        socket: SocketId,
        /// Whose packets.
        remote: Arc<Remote>,
        /// Where to.
        addr: SocketAddr,
    },
    /// Close those that are not kept.
    Close,
}

/// The searches of one instance.
pub(super) struct Searches {
    allowed: bool,
    links: BTreeMap<SocketAddr, Entry>,
    histories: BTreeMap<InstanceId, History>,
    /// A round has sockets that were not closed since.
    has_sockets: bool,
    next_shot: Instant,
    outbox: VecDeque<Shot>,
    events: VecDeque<SearchEvent>,
}

struct Entry {
    search: Search,
    remote: Arc<Remote>,
    there: Side,
    /// How many sockets it waits for.
    wants: Option<usize>,
    kept: Option<(SocketId, SocketAddr)>,
    told: Standing,
}

impl Searches {
    /// None; and none ever, if they are not allowed.
    pub(super) fn new(allowed: bool, now: Instant) -> Self {
        Self {
            allowed,
            links: BTreeMap::new(),
            histories: BTreeMap::new(),
            has_sockets: false,
            next_shot: now,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Whether searches are allowed.
    pub(super) fn are_allowed(&self) -> bool {
        self.allowed
    }

    /// A link was agreed that may travel directly.
    pub(super) fn add(&mut self, remote: Arc<Remote>, (key, role): (CheckKey, Role), now: Instant) {
        if !self.allowed {
            return;
        }
        let history = self.histories.get(&remote.instance).copied().unwrap_or_default();
        let search = Search::new(Config { key, role, seed: random::bytes(), history }, now);
        let (mapped, told) = (remote.mapped, search.standing());
        let entry = Entry { search, remote, there: Side::default(), wants: None, kept: None, told };
        self.links.insert(mapped, entry);
    }

    /// A link ended. Its kept socket is closed with it.
    pub(super) fn remove(&mut self, remote: &Remote) {
        let Some(entry) = self.links.remove(&remote.mapped) else { return };
        if self.histories.len() >= MAX_HISTORIES && !self.histories.contains_key(&remote.instance) {
            let oldest = self.histories.iter().min_by_key(|(_, history)| history.began).map(|(instance, _)| *instance);
            oldest.map(|oldest| self.histories.remove(&oldest));
        }
        self.histories.insert(remote.instance, entry.search.history());
        self.close_unneeded();
    }

    /// Where we might be reached changed.
    pub(super) fn set_here(&mut self, here: &Whereabouts, now: Instant) {
        let here = Side::new(here.nat, &here.candidates);
        self.each(|entry| entry.search.set_sides(here, entry.there, now));
    }

    /// Where the other side of a link might be reached.
    pub(super) fn set_there(&mut self, remote: &Remote, here: &Whereabouts, there: &Whereabouts, now: Instant) {
        let (here, there) = (Side::new(here.nat, &here.candidates), Side::new(there.nat, &there.candidates));
        self.one(remote.mapped, |entry| {
            entry.there = there;
            entry.search.set_sides(here, there, now);
        });
    }

    /// A link travels another way now.
    pub(super) fn set_path(&mut self, remote: &Remote, direct: Option<SocketAddr>, now: Instant) {
        self.one(remote.mapped, |entry| {
            if direct.is_some_and(|direct| entry.kept.is_some_and(|(_, addr)| addr != direct)) {
                entry.let_go();
            }
            entry.search.set_path(direct.is_some(), now);
        });
    }

    /// An interface changed: what failed before may succeed now.
    pub(super) fn restart(&mut self, now: Instant) {
        self.histories.clear();
        self.each(|entry| entry.search.restart(now));
    }

    /// These sockets are open now.
    pub(super) fn opened(&mut self, sockets: &[SocketId], now: Instant) {
        self.has_sockets |= !sockets.is_empty();
        self.each(|entry| {
            if let Some(wanted) = entry.wants.take() {
                entry.search.opened(&sockets[..wanted.min(sockets.len())], now);
            }
        });
        // Whoever wanted them may be gone.
        self.close_unneeded();
    }

    /// Takes a STUN packet; says whether it was a search's.
    pub(super) fn handle_stun(&mut self, via: Option<SocketId>, from: SocketAddr, packet: &[u8], now: Instant) -> bool {
        let handled = |entry: &mut Entry| match entry.search.handle_packet(via, from, packet, now) {
            Handled::Check | Handled::Answer => true,
            Handled::Ignored(_) => false,
        };
        let whose = self.links.iter_mut().find_map(|(mapped, entry)| handled(entry).then_some(*mapped));
        whose.is_some_and(|mapped| {
            self.one(mapped, |_| ());
            true
        })
    }

    /// The socket by which an agent's checks to this address leave, if it is not the one of all links. Each address is
    /// that of one instance's one socket.
    pub(super) fn sender(&self, to: SocketAddr) -> Option<SocketId> {
        let kept = self.links.values().filter_map(|entry| entry.kept);
        kept.into_iter().find(|(_, addr)| *addr == to).map(|(socket, _)| socket)
    }

    /// How the search for this link's path stands.
    pub(super) fn report(&self, mapped: &SocketAddr) -> Option<SearchReport> {
        Some(match self.links.get(mapped)?.search.standing() {
            Standing::NotNeeded | Standing::NoUse(_) => SearchReport::NoUse,
            Standing::Waiting => SearchReport::Waiting,
            Standing::Searching => SearchReport::Running,
            Standing::GivenUp => SearchReport::GivenUp,
        })
    }

    /// The next packet to send.
    pub(super) fn poll_transmit(&mut self) -> Option<Shot> {
        self.outbox.pop_front()
    }

    /// The next thing to do.
    pub(super) fn poll_event(&mut self) -> Option<SearchEvent> {
        self.events.pop_front()
    }

    /// When to call [`Searches::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let is_full = self.under_way() >= MAX_AT_ONCE;
        let due = self.links.values().filter_map(|entry| match (entry.search.is_searching(), is_full) {
            (true, _) => Some(entry.search.poll_timeout()?.max(self.next_shot)),
            (false, false) => entry.search.poll_timeout(),
            (false, true) => None,
        });
        due.min()
    }

    /// The time is now.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        while self.under_way() < MAX_AT_ONCE {
            let Some((_, mapped)) = self.next_due(false, now) else { break };
            self.one(mapped, |entry| entry.search.handle_timeout(now));
        }
        while self.next_shot <= now {
            let Some((due, mapped)) = self.next_due(true, now) else { break };
            let before = self.outbox.len();
            self.one(mapped, |entry| entry.search.handle_timeout(now));
            if self.outbox.len() > before {
                let behind = now.checked_sub(CATCH_UP).unwrap_or(now);
                self.next_shot = self.next_shot.max(due).max(behind) + PACE;
            }
        }
    }

    fn under_way(&self) -> usize {
        self.links.values().filter(|entry| entry.search.is_searching()).count()
    }

    /// Since when a search is due, and which: the one due the longest of those that are under way, or of the others.
    fn next_due(&self, under_way: bool, now: Instant) -> Option<(Instant, SocketAddr)> {
        let those = self.links.iter().filter(|(_, entry)| entry.search.is_searching() == under_way);
        let due = those.filter_map(|(mapped, entry)| Some((entry.search.poll_timeout()?, *mapped)));
        due.filter(|(at, _)| *at <= now).min()
    }

    fn each(&mut self, mut act: impl FnMut(&mut Entry)) {
        let all: Vec<_> = self.links.keys().copied().collect();
        all.into_iter().for_each(|mapped| self.one(mapped, &mut act));
    }

    /// Does something with one search, and carries out what it wants.
    fn one(&mut self, mapped: SocketAddr, act: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.links.get_mut(&mapped) else { return };
        act(entry);
        while let Some(shot) = entry.search.poll_transmit() {
            self.outbox.push_back(shot);
        }
        while let Some(event) = entry.search.poll_event() {
            match event {
                Event::Open(count) => {
                    entry.let_go();
                    entry.wants = Some(count);
                    self.events.push_back(SearchEvent::Open(count));
                }
                Event::Found { socket, remote: addr } => {
                    entry.kept = Some((socket, addr));
                    self.events.push_back(SearchEvent::Keep { socket, remote: Arc::clone(&entry.remote), addr });
                }
                Event::Ended { how, sent, took } => {
                    tracing::debug!(instance = %entry.remote.instance, ?how, sent, ?took, "a search for a path ended");
                }
            }
        }
        // No search is of use: what one found before leaves by a port that nobody expects.
        if matches!(entry.search.standing(), Standing::NoUse(_)) {
            entry.let_go();
        }
        entry.tell();
        self.close_unneeded();
    }

    fn close_unneeded(&mut self) {
        if self.has_sockets && self.under_way() == 0 {
            self.has_sockets = false;
            self.events.push_back(SearchEvent::Close);
        }
    }
}

impl Entry {
    /// The socket that was kept is of no use any more.
    fn let_go(&mut self) {
        if self.kept.take().is_some() {
            self.remote.set_kept(None);
        }
    }

    /// Says once how it stands, where that explains why there is no path.
    fn tell(&mut self) {
        let standing = self.search.standing();
        if self.told == standing {
            return;
        }
        self.told = standing;
        let instance = self.remote.instance;
        match standing {
            Standing::NoUse(NoSearch::BothHard) => {
                tracing::info!(%instance, "both NATs give every destination another port: packets travel by way of the relay");
            }
            Standing::GivenUp => {
                tracing::info!(%instance, "no way through the NATs was found: packets travel by way of the relay");
            }
            Standing::Searching => tracing::debug!(%instance, "searching for a path through a hard NAT"),
            Standing::NotNeeded | Standing::NoUse(_) | Standing::Waiting => {}
        }
    }
}

#[cfg(test)]
mod tests;
