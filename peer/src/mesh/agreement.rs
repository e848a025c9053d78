//! Which links there are, and how they are agreed upon.
//!
//! In: who wants a link, offers and answers as they came sealed, what became of connections. Out: offers and answers to
//! send, [`Agreed`] links for the path machine, [`LinkHandle`]s for who wanted one.
//! Each side has one random share per link, whether it offers, answers or both at once: so offers that cross lead to the
//! same key, and a share that changed says that the other side began anew. The lower (identity, instance) dials.
//! Wanted -> offered -> agreed -> up -> gone (lost, replaced, or without streams for [`idle::UNUSED`]). A link that was let go is made
//! anew when it is wanted again; none is let go while the relay could not help with that.
//! Bounds: [`MAX_LINKS`], at most one of each route per instance, of which the longest unused makes room for one more;
//! [`AGREE_DEADLINE`] from wanted to up.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::{InstanceId, PeerId, Slot},
    path::{CheckKey, Role, search::Shot},
    request::{
        Failure, FailureKind,
        link::{Candidate, LinkAnswer, LinkOffer, Nat, Route},
    },
};
use quinn::Connection;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Caller, OpenFault,
    extra::ExtraSockets,
    heads::LinkHandle,
    link::{CODE_DONE, CODE_UNUSED, LinkEvent, Links, LinksConfig, kick},
    routes::Remote,
    socket::{FromSocket, Switch},
    stream::{Lease, LeaseMaker},
    tls::{AnnouncedKey, TlsKey},
    views::Views,
};
use crate::random;

mod idle;

/// Most links at once; beyond it new ones are refused, if all have streams. Each costs some 100 KiB when idle.
const MAX_LINKS: usize = 1024;

/// Time from wanting a link to its being up.
pub(super) const AGREE_DEADLINE: Duration = Duration::from_secs(10);

/// A link, by whose it is and how it may travel.
pub(super) type Key = (InstanceId, Route);

/// Who waits for a link.
pub(super) type Reply = oneshot::Sender<Result<LinkHandle, OpenFault>>;

/// A link that both sides agreed on just now.
pub(super) struct Agreed {
    /// The other end.
    pub(super) remote: Arc<Remote>,
    /// Authenticates connectivity checks.
    pub(super) check_key: CheckKey,
    /// Which side this is.
    pub(super) role: Role,
}

/// What this side knows of its own place when a link is offered to it.
pub(super) struct Here {
    /// Where it might be reached.
    pub(super) candidates: Vec<Candidate>,
    /// What it knows of the NAT in front of it.
    pub(super) nat: Nat,
    /// Largest packet that a direct path between both sides may take, in bytes.
    pub(super) plausible_mtu: u16,
}

/// All links of one instance.
pub(super) struct Book {
    me: Caller,
    udp: bool,
    tls: Arc<TlsKey>,
    switch: Arc<Switch>,
    notes: mpsc::Sender<FromSocket>,
    events: mpsc::Sender<LinkEvent>,
    links: Option<Links>,
    entries: BTreeMap<Key, Entry>,
    by_mapped: HashMap<SocketAddr, Key>,
    /// Links that ended a moment ago, whose last packets still need a way out.
    parting: Vec<(Instant, Arc<Remote>)>,
    /// Links that were let go and not told of yet.
    let_go: Vec<Arc<Remote>>,
    views: Arc<Views>,
}

struct Entry {
    peer: PeerId,
    remote: Arc<Remote>,
    our_share: [u8; 32],
    their_share: Option<[u8; 32]>,
    connection: Option<Connection>,
    lease: Lease,
    direct: watch::Sender<bool>,
    waiting: Vec<Reply>,
    since: Instant,
    last_used: Instant,
}

impl Entry {
    /// Whether it was up and has ended, which is yet to be told.
    fn is_over(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.close_reason().is_some())
    }

    fn handle(&self) -> Option<LinkHandle> {
        let connection = self.connection.clone().filter(|connection| connection.close_reason().is_none())?;
        Some(LinkHandle { connection, lease: self.lease.clone(), direct: self.direct.subscribe() })
    }
}

/// Why a link was not agreed on.
pub(super) enum NoAgreement {
    /// There are too many.
    Full,
    /// The announced key is no key.
    BadKey,
}

impl Book {
    /// No links, and no thread for them yet.
    pub(super) fn new(
        me: Caller,
        udp: bool,
        switch: Arc<Switch>,
        notes: mpsc::Sender<FromSocket>,
        events: mpsc::Sender<LinkEvent>,
    ) -> Self {
        let tls = Arc::new(TlsKey::from_seed(&random::bytes()));
        let (entries, by_mapped, views) = (BTreeMap::new(), HashMap::new(), Arc::default());
        let (parting, let_go) = (Vec::new(), Vec::new());
        Self { me, udp, tls, switch, notes, events, links: None, entries, by_mapped, parting, let_go, views }
    }

    /// What handles may see.
    pub(super) fn views(&self) -> Arc<Views> {
        Arc::clone(&self.views)
    }

    /// Starts the links' thread, unless it runs. Gives the UDP socket if there is a new one.
    ///
    /// # Errors
    /// Those of starting it.
    pub(super) async fn start(&mut self) -> io::Result<Option<(u16, bool)>> {
        if self.links.is_some() {
            return Ok(None);
        }
        let config = LinksConfig {
            tls: Arc::clone(&self.tls),
            switch: Arc::clone(&self.switch),
            udp: self.udp,
            notes: self.notes.clone(),
            events: self.events.clone(),
        };
        let links = Links::start(config).await?;
        let socket = links.udp_port();
        self.links = Some(links);
        Ok(socket)
    }

    /// Whether the links' thread runs.
    pub(super) fn is_started(&self) -> bool {
        self.links.is_some()
    }

    /// A link that is up.
    pub(super) fn get(&mut self, key: Key, now: Instant) -> Option<LinkHandle> {
        let entry = self.entries.get_mut(&key)?;
        entry.last_used = now;
        entry.handle()
    }

    /// Whether there is any link to this instance, up or coming.
    pub(super) fn knows(&self, instance: InstanceId) -> bool {
        [Route::Auto, Route::RelayedOnly].iter().any(|route| self.entries.contains_key(&(instance, *route)))
    }

    /// Somebody waits for a link. If nobody did before, gives the offer to send.
    pub(super) fn want(
        &mut self,
        key: Key,
        peer: PeerId,
        slot: Option<Slot>,
        reply: Reply,
        now: Instant,
    ) -> Option<([u8; 32], Vec<u8>)> {
        if self.entries.get(&key).is_some_and(Entry::is_over) {
            self.let_go(key, "it has ended");
        }
        let is_new = !self.entries.contains_key(&key);
        if is_new && !self.make_room() {
            answer(reply, Err(OpenFault::NoLink("this machine has too many links".into())));
            return None;
        }
        let entry = self.entry(key, peer, slot, now);
        match entry.handle() {
            Some(handle) => answer(reply, Ok(handle)),
            None => entry.waiting.push(reply),
        }
        let (share, remote) = (entry.our_share, Arc::clone(&entry.remote));
        if !is_new {
            return None;
        }
        if !self.dials(key, peer)
            && let Some(links) = &self.links
        {
            links.expect(&remote);
        }
        Some((share, self.tls.spki().to_vec()))
    }

    /// The other side offers a link, or offers it again.
    pub(super) fn offered(
        &mut self,
        caller: Caller,
        slot: Option<Slot>,
        offer: &LinkOffer,
        here: Here,
        now: Instant,
    ) -> Result<(LinkAnswer, Option<Agreed>), NoAgreement> {
        let key = (caller.instance, offer.route);
        if !self.entries.contains_key(&key) && !self.make_room() {
            return Err(NoAgreement::Full);
        }
        let announced = AnnouncedKey::read(&offer.tls_key).ok_or(NoAgreement::BadKey)?;
        let known = self.entries.get(&key).and_then(|entry| entry.their_share);
        if known.is_some_and(|share| share != offer.check_share) {
            self.replace(key);
        }
        self.entry(key, caller.peer, slot, now);
        let agreed = self.agree(key, offer.check_share, announced, here.plausible_mtu);
        let our_share = self.entries.get(&key).map(|entry| entry.our_share).ok_or(NoAgreement::Full)?;
        let Here { candidates, nat, plausible_mtu: _ } = here;
        let answer = LinkAnswer { tls_key: self.tls.spki().to_vec(), check_share: our_share, candidates, nat };
        Ok((answer, agreed))
    }

    /// The other side answered our offer. An answer to an offer that was replaced since says nothing.
    pub(super) fn answered(&mut self, key: Key, answer: &LinkAnswer, plausible_mtu: u16) -> Option<Agreed> {
        let entry = self.entries.get(&key)?;
        if entry.their_share.is_some() {
            return None;
        }
        match AnnouncedKey::read(&answer.tls_key) {
            Some(announced) => self.agree(key, answer.check_share, announced, plausible_mtu),
            None => {
                self.fail(key, "the other side announced a key of another kind");
                None
            }
        }
    }

    /// The link cannot be agreed on, unless it already is.
    pub(super) fn refused(&mut self, key: Key, why: &str) {
        if self.entries.get(&key).is_some_and(|entry| entry.their_share.is_none()) {
            self.fail(key, why);
        }
    }

    /// A connection proved its key. Gives who is at the other end, and what makes leases for its streams.
    pub(super) fn up(
        &mut self,
        mapped: SocketAddr,
        connection: Connection,
        now: Instant,
    ) -> Option<(Caller, LeaseMaker)> {
        let Some((key, entry)) = find(&self.by_mapped, &mut self.entries, mapped) else {
            connection.close(CODE_DONE, b"replaced");
            return None;
        };
        if let Some(before) = entry.connection.replace(connection.clone()) {
            before.close(CODE_DONE, b"replaced");
        }
        entry.last_used = now;
        let handle = entry.handle()?;
        entry.waiting.drain(..).for_each(|reply| answer(reply, Ok(handle.clone())));
        self.views.up(key, connection);
        Some((Caller { peer: entry.peer, instance: key.0 }, entry.lease.maker()))
    }

    /// A connection ended. Gives the link that ended with it.
    pub(super) fn down(&mut self, mapped: SocketAddr, connection: Option<usize>, why: &str) -> Option<Arc<Remote>> {
        let (key, entry) = find(&self.by_mapped, &mut self.entries, mapped)?;
        let current = entry.connection.as_ref().map(Connection::stable_id);
        let peer = entry.peer;
        // Whoever calls without the key fails too, and must not end the link of who has it.
        let is_ours =
            if connection.is_some() { current == connection } else { current.is_none() && self.dials(key, peer) };
        if !is_ours {
            tracing::debug!(%why, "a caller was not let in, or an old connection ended");
            return None;
        }
        self.fail(key, why)
    }

    /// A link travels another way now.
    pub(super) fn moved(&mut self, remote: &Remote, is_direct: bool) {
        let key = (remote.instance, remote.route);
        self.views.moved(key);
        if let Some(entry) = self.entries.get(&key) {
            entry.direct.send_replace(is_direct);
            entry.connection.iter().for_each(kick);
        }
    }

    /// A link travels another way besides: it sends at once, and what was lost meanwhile is found out by the answer.
    pub(super) fn hurry(&self, remote: &Remote) {
        if let Some(entry) = self.entries.get(&(remote.instance, remote.route)) {
            entry.connection.iter().for_each(kick);
        }
    }

    /// The relay gave an instance another slot, or none.
    pub(super) fn set_slot(&mut self, instance: InstanceId, slot: Option<Slot>) {
        for route in [Route::Auto, Route::RelayedOnly] {
            let Some(entry) = self.entries.get(&(instance, route)) else { continue };
            if entry.remote.slot() == slot {
                continue;
            }
            self.switch.routes.set_slot(&entry.remote, slot);
            if slot.is_some() {
                entry.connection.iter().for_each(kick);
            }
        }
    }

    /// The relay is gone: no instance has a slot.
    pub(super) fn clear_slots(&mut self) {
        for entry in self.entries.values() {
            self.switch.routes.set_slot(&entry.remote, None);
        }
    }

    /// Whether an instance can be reached though the relay may be gone.
    pub(super) fn is_up(&self, instance: InstanceId) -> bool {
        let is_up = |route| self.entries.get(&(instance, route)).is_some_and(|entry| entry.connection.is_some());
        is_up(Route::Auto) || is_up(Route::RelayedOnly)
    }

    /// Instances with a link that may travel directly, or to which one was offered: what is said to them now arrives
    /// behind the offer.
    pub(super) fn with_paths(&self) -> Vec<InstanceId> {
        let direct = self.entries.keys().filter(|(_, route)| *route == Route::Auto);
        direct.map(|(instance, _)| *instance).collect()
    }

    /// The other end of the link that may travel directly.
    pub(super) fn remote(&self, instance: InstanceId) -> Option<Arc<Remote>> {
        self.entries.get(&(instance, Route::Auto)).map(|entry| Arc::clone(&entry.remote))
    }

    /// Sends one STUN packet from the socket named, else from the one that all links use.
    pub(super) fn send_stun(&self, shot: &Shot) {
        if let Some(links) = &self.links {
            links.send_stun(shot.from, shot.to, &shot.bytes);
        }
    }

    /// The sockets beside the one that all links use, once there are links.
    pub(super) fn extra_sockets(&mut self) -> Option<&mut ExtraSockets> {
        self.links.as_mut().map(Links::extra)
    }

    /// Whether there is any link, or the rest of one.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.parting.is_empty() && self.let_go.is_empty()
    }

    /// Closes every link, lets them say goodbye and ends their thread.
    pub(super) async fn close(&mut self) {
        for (_, entry) in std::mem::take(&mut self.entries) {
            for reply in entry.waiting {
                answer(reply, Err(OpenFault::NoLink("this machine left the room".into())));
            }
        }
        if let Some(links) = self.links.take() {
            links.close().await;
        }
    }

    /// Ends a link, whatever its state, and tells who waits.
    pub(super) fn fail(&mut self, key: Key, why: &str) -> Option<Arc<Remote>> {
        let entry = self.take(key)?;
        for reply in entry.waiting {
            answer(reply, Err(OpenFault::NoLink(why.to_owned())));
        }
        Some(entry.remote)
    }

    fn entry(&mut self, key: Key, peer: PeerId, slot: Option<Slot>, now: Instant) -> &mut Entry {
        self.entries.entry(key).or_insert_with(|| {
            let remote = self.switch.routes.add(key.0, key.1, slot);
            self.by_mapped.insert(remote.mapped, key);
            self.views.add(key, &remote);
            Entry {
                peer,
                remote,
                our_share: random::bytes(),
                their_share: None,
                connection: None,
                lease: Lease::default(),
                direct: watch::Sender::new(false),
                waiting: Vec::new(),
                since: now,
                last_used: now,
            }
        })
    }

    /// Both shares and the other side's key are known: dial, or let in.
    fn agree(
        &mut self,
        key: Key,
        their_share: [u8; 32],
        announced: AnnouncedKey,
        plausible_mtu: u16,
    ) -> Option<Agreed> {
        let dials = self.dials(key, self.entries.get(&key)?.peer);
        let entry = self.entries.get_mut(&key)?;
        if entry.their_share == Some(their_share) {
            return None;
        }
        entry.their_share = Some(their_share);
        entry.remote.set_plausible_mtu(plausible_mtu);
        let links = self.links.as_ref()?;
        let (role, check_key) = if dials {
            links.dial(&entry.remote, announced);
            (Role::Controlling, CheckKey::agree(&entry.our_share, &their_share))
        } else {
            links.let_in(&entry.remote, announced);
            (Role::Controlled, CheckKey::agree(&their_share, &entry.our_share))
        };
        Some(Agreed { remote: Arc::clone(&entry.remote), check_key, role })
    }

    /// The other side began anew: so do we, for whoever waits.
    fn replace(&mut self, key: Key) {
        let Some(before) = self.take(key) else { return };
        let (slot, now) = (before.remote.slot(), before.since);
        self.entry(key, before.peer, slot, now).waiting = before.waiting;
    }

    fn take(&mut self, key: Key) -> Option<Entry> {
        let mut entry = self.entries.remove(&key)?;
        self.by_mapped.remove(&entry.remote.mapped);
        self.views.remove(key);
        self.parting.push((Instant::now(), Arc::clone(&entry.remote)));
        if let Some(links) = &self.links {
            links.forget(&entry.remote);
        }
        if let Some(connection) = entry.connection.take() {
            connection.close(CODE_DONE, b"done");
        }
        Some(entry)
    }

    /// Whether this side dials: one of the two does, so that they never dial each other.
    fn dials(&self, key: Key, peer: PeerId) -> bool {
        (self.me.peer, self.me.instance) < (peer, key.0)
    }
}

fn find<'a>(
    by_mapped: &HashMap<SocketAddr, Key>,
    entries: &'a mut BTreeMap<Key, Entry>,
    mapped: SocketAddr,
) -> Option<(Key, &'a mut Entry)> {
    let key = *by_mapped.get(&mapped)?;
    entries.get_mut(&key).map(|entry| (key, entry))
}

fn answer(reply: Reply, result: Result<LinkHandle, OpenFault>) {
    if reply.send(result).is_err() {
        tracing::trace!("nobody waits for a link any more");
    }
}

impl From<NoAgreement> for Failure {
    fn from(why: NoAgreement) -> Self {
        match why {
            NoAgreement::Full => Self::new(FailureKind::Busy, "it has too many links", "try again in a minute"),
            NoAgreement::BadKey => {
                Self::new(FailureKind::Invalid, "the announced key is no Ed25519 key", "update the older side")
            }
        }
    }
}

#[cfg(test)]
mod tests;
