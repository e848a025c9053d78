//! Which way the packets of each link travel now: the table between QUIC's one address of a link and the world.
//!
//! In: slots as the relay gives them, paths as they are proved. Out: for a packet that leaves, where to; for one that
//! arrives, whose it is. A link's mapped address never changes, because QUIC drops what comes from a changed one.
//! Never guesses: a source that was not proved maps to nothing.
//! Bounds: one entry per link, [`MAX_SOURCES`] proved sources each.

use std::{
    collections::HashMap,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    time::Duration,
};

use peerfleet_proto::{
    id::{InstanceId, Slot},
    request::link::Route,
};
use tokio::sync::watch;

use super::{mtu, udp::Udp};

/// Proved source addresses kept per link, the one that was silent longest forgotten first: a host behind a NAT shows one per address family,
/// and a new one each time its network changes.
const MAX_SOURCES: usize = 8;

/// First half of mapped addresses: a unique local prefix (RFC 4193) that no packet ever carries.
const MAPPED_PREFIX: [u16; 4] = [0xfd70, 0x6c6e, 0x6b00, 0x0000];

/// Port of mapped addresses; QUIC refuses to dial port 0.
const MAPPED_PORT: u16 = 1;

/// Tag of "no slot" in [`Remote::slot`], beyond every slot.
const NO_SLOT: u64 = u64::MAX;

/// The address that QUIC knows this process by.
pub(super) fn own_mapped_address() -> SocketAddr {
    mapped_address(0)
}

fn mapped_address(number: u64) -> SocketAddr {
    let [a, b, c, d] = MAPPED_PREFIX;
    let tail = number.to_be_bytes();
    let part = |at: usize| u16::from_be_bytes([tail[at], tail[at + 1]]);
    let ip = Ipv6Addr::new(a, b, c, d, part(0), part(2), part(4), part(6));
    SocketAddrV6::new(ip, MAPPED_PORT, 0, 0).into()
}

/// An address without the mapping of IPv4 into IPv6 that a dual-stack socket shows.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The other end of one link, as the socket sees it.
#[derive(Debug)]
pub(super) struct Remote {
    /// The address that QUIC knows it by.
    pub(super) mapped: SocketAddr,
    /// Whose link it is.
    pub(super) instance: InstanceId,
    /// How packets may travel.
    pub(super) route: Route,
    /// Counts the changes of path, so that congestion control can start anew.
    pub(super) path_changes: Arc<AtomicU64>,
    /// Counts acknowledgements of packets that were sent since the last change of path.
    pub(super) delivered: Arc<AtomicU64>,
    heard_relayed: AtomicBool,
    is_doubted: AtomicBool,
    slot: AtomicU64,
    direct: watch::Sender<Option<SocketAddr>>,
    direct_mtu: AtomicU16,
    plausible_mtu: AtomicU16,
    kept: RwLock<Option<(SocketAddr, Arc<Udp>)>>,
    direct_rtt_us: AtomicU64,
    direct_bytes: AtomicU64,
    relayed_bytes: AtomicU64,
    sent_note_ms: AtomicU64,
    received_note_ms: AtomicU64,
}

impl Remote {
    /// Where packets go directly now, if a path is proved.
    pub(super) fn direct(&self) -> Option<SocketAddr> {
        *self.direct.borrow()
    }

    /// Waits until a direct path is proved.
    pub(super) async fn directly(&self) {
        let mut direct = self.direct.subscribe();
        direct.wait_for(Option::is_some).await.expect("the sender lives as long as this borrow");
    }

    /// Sends packets this way from now on; `None` is by way of the relay.
    pub(super) fn set_direct(&self, address: Option<SocketAddr>) {
        self.direct.send_if_modified(|direct| {
            let is_other = *direct != address;
            *direct = address;
            self.is_doubted.store(false, Ordering::Relaxed);
            if is_other {
                self.path_changes.fetch_add(1, Ordering::Relaxed);
            }
            is_other
        });
    }

    /// Whether the direct path is in doubt: packets go by way of the relay as well. QUIC drops those that come twice.
    pub(super) fn is_doubted(&self) -> bool {
        self.is_doubted.load(Ordering::Relaxed)
    }

    /// The direct path is in doubt, or no longer.
    pub(super) fn set_doubted(&self, is_doubted: bool) {
        self.is_doubted.store(is_doubted, Ordering::Relaxed);
    }

    /// Largest packet that a direct path may take.
    pub(super) fn plausible_mtu(&self) -> u16 {
        self.plausible_mtu.load(Ordering::Relaxed)
    }

    /// A direct path may take packets of this size.
    pub(super) fn set_plausible_mtu(&self, mtu: u16) {
        self.plausible_mtu.store(mtu, Ordering::Relaxed);
    }

    /// QUIC sends packets of this size now; where the path is direct, that is what it takes.
    pub(super) fn note_mtu(&self, mtu: u16) {
        if self.direct().is_some() {
            self.direct_mtu.store(mtu, Ordering::Relaxed);
        }
    }

    /// Whether a packet of this size may go by way of the relay. QUIC shall not find that the relay takes more than the
    /// direct path will that comes, or comes back.
    pub(super) fn may_relay(&self, packet: usize) -> bool {
        let direct = self.direct_mtu.load(Ordering::Relaxed);
        self.route == Route::RelayedOnly || packet <= mtu::USUAL.max(direct).into()
    }

    /// The socket by which packets to this address leave, if it is not the one of all links.
    pub(super) fn kept(&self, to: SocketAddr) -> Option<Arc<Udp>> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|(addr, _)| *addr == to).map(|(_, udp)| Arc::clone(udp))
    }

    /// Packets to one address leave by a socket of its own from now on; the one before is closed.
    pub(super) fn set_kept(&self, kept: Option<(SocketAddr, Arc<Udp>)>) {
        *self.kept.write().unwrap_or_else(PoisonError::into_inner) = kept;
    }

    /// The direct path's round trip, as it was measured last; zero before.
    pub(super) fn direct_rtt(&self) -> Duration {
        Duration::from_micros(self.direct_rtt_us.load(Ordering::Relaxed))
    }

    /// The direct path's round trip was measured.
    pub(super) fn set_direct_rtt(&self, rtt: Duration) {
        self.direct_rtt_us.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The relay's number for the other end, while it has one.
    pub(super) fn slot(&self) -> Option<Slot> {
        let slot = self.slot.load(Ordering::Relaxed);
        u32::try_from(slot).ok().map(Slot)
    }

    /// Counts bytes that travelled directly.
    pub(super) fn count_direct(&self, bytes: usize) {
        self.direct_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes that travelled by way of the relay.
    pub(super) fn count_relayed(&self, bytes: usize) {
        self.relayed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Packets of it came by way of the relay.
    pub(super) fn note_relayed(&self) {
        self.heard_relayed.store(true, Ordering::Relaxed);
    }

    /// Whether packets of it came by way of the relay since this was asked before.
    pub(super) fn take_heard_relayed(&self) -> bool {
        self.heard_relayed.swap(false, Ordering::Relaxed)
    }

    /// Bytes that travelled directly and by way of the relay.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.direct_bytes.load(Ordering::Relaxed), self.relayed_bytes.load(Ordering::Relaxed))
    }

    /// Whether a direct send at `now_ms` should be told to the path machine: at most one every `every_ms`.
    pub(super) fn note_sent(&self, now_ms: u64, every_ms: u64) -> bool {
        note(&self.sent_note_ms, now_ms, every_ms)
    }

    /// Whether direct traffic that came at `now_ms` should be told to the path machine, likewise.
    pub(super) fn note_received(&self, now_ms: u64, every_ms: u64) -> bool {
        note(&self.received_note_ms, now_ms, every_ms)
    }
}

fn note(last: &AtomicU64, now_ms: u64, every_ms: u64) -> bool {
    let before = last.load(Ordering::Relaxed);
    let due = before == 0 || now_ms.saturating_sub(before) >= every_ms;
    if due {
        last.store(now_ms.max(1), Ordering::Relaxed);
    }
    due
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Routes {
    tables: RwLock<Tables>,
    next: Mutex<u64>,
}

#[derive(Debug, Default)]
struct Tables {
    by_mapped: HashMap<SocketAddr, Arc<Remote>>,
    by_slot: HashMap<(Slot, u8), Arc<Remote>>,
    by_source: HashMap<SocketAddr, Arc<Remote>>,
    sources: HashMap<SocketAddr, Vec<SocketAddr>>,
}

impl Tables {
    /// Whether this source is the link's, and the last to be forgotten.
    fn is_newest(&self, remote: &Remote, source: SocketAddr) -> bool {
        self.sources.get(&remote.mapped).and_then(|sources| sources.last()) == Some(&source)
    }
}

impl Routes {
    /// A new link's entry, under a mapped address that was never used before.
    pub(super) fn add(&self, instance: InstanceId, route: Route, slot: Option<Slot>) -> Arc<Remote> {
        let number = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let remote = Arc::new(Remote {
            mapped: mapped_address(number),
            instance,
            route,
            path_changes: Arc::default(),
            delivered: Arc::default(),
            heard_relayed: AtomicBool::new(false),
            is_doubted: AtomicBool::new(false),
            slot: AtomicU64::new(NO_SLOT),
            direct: watch::Sender::new(None),
            direct_mtu: AtomicU16::new(0),
            plausible_mtu: AtomicU16::new(mtu::USUAL),
            kept: RwLock::new(None),
            direct_rtt_us: AtomicU64::new(0),
            direct_bytes: AtomicU64::new(0),
            relayed_bytes: AtomicU64::new(0),
            sent_note_ms: AtomicU64::new(0),
            received_note_ms: AtomicU64::new(0),
        });
        self.write(|tables| tables.by_mapped.insert(remote.mapped, Arc::clone(&remote)));
        self.set_slot(&remote, slot);
        remote
    }

    /// Forgets a link.
    pub(super) fn remove(&self, remote: &Remote) {
        self.write(|tables| {
            tables.by_mapped.remove(&remote.mapped);
            tables.by_slot.retain(|_, other| other.mapped != remote.mapped);
            for source in tables.sources.remove(&remote.mapped).unwrap_or_default() {
                tables.by_source.remove(&source);
            }
        });
    }

    /// The relay gave the other end another number, or it is not in the room.
    pub(super) fn set_slot(&self, remote: &Arc<Remote>, slot: Option<Slot>) {
        self.write(|tables| {
            if let Some(old) = remote.slot() {
                tables.by_slot.remove(&(old, remote.route.lane()));
            }
            remote.slot.store(slot.map_or(NO_SLOT, |slot| slot.0.into()), Ordering::Relaxed);
            if let Some(slot) = slot {
                tables.by_slot.insert((slot, remote.route.lane()), Arc::clone(remote));
                if remote.direct().is_none() {
                    remote.path_changes.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    /// An authenticated check came from `source`: packets from there are this link's.
    pub(super) fn prove_source(&self, remote: &Arc<Remote>, source: SocketAddr) {
        let source = plain(source);
        if self.read(|tables| tables.is_newest(remote, source)) {
            return;
        }
        self.write(|tables| {
            if let Some(previous) = tables.by_source.insert(source, Arc::clone(remote)) {
                tables.sources.entry(previous.mapped).or_default().retain(|other| *other != source);
            }
            let sources = tables.sources.entry(remote.mapped).or_default();
            sources.push(source);
            if sources.len() > MAX_SOURCES {
                let in_use = remote.direct().map(plain);
                let oldest = sources.iter().position(|source| Some(*source) != in_use).unwrap_or_default();
                let oldest = sources.remove(oldest);
                tables.by_source.remove(&oldest);
            }
        });
    }

    /// A packet came from `source`, which proves nothing: if it is this link's, it is the last to be forgotten.
    pub(super) fn heard_from(&self, remote: &Arc<Remote>, source: SocketAddr) {
        if self.by_source(plain(source)).is_some_and(|known| known.mapped == remote.mapped) {
            self.prove_source(remote, source);
        }
    }

    /// The link that QUIC knows by this address.
    pub(super) fn by_mapped(&self, mapped: SocketAddr) -> Option<Arc<Remote>> {
        self.read(|tables| tables.by_mapped.get(&mapped).cloned())
    }

    /// The link whose relayed packets bear this slot and lane.
    pub(super) fn by_slot(&self, slot: Slot, lane: u8) -> Option<Arc<Remote>> {
        self.read(|tables| tables.by_slot.get(&(slot, lane)).cloned())
    }

    /// The link whose packets come from this proved source.
    pub(super) fn by_source(&self, source: SocketAddr) -> Option<Arc<Remote>> {
        self.read(|tables| tables.by_source.get(&source).cloned())
    }

    fn read<T>(&self, look: impl FnOnce(&Tables) -> T) -> T {
        look(&self.tables.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Tables) -> T) -> T {
        change(&mut self.tables.write().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    #[test]
    fn a_new_slot_takes_the_place_of_the_old_one() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, Some(Slot(3)));
        routes.set_slot(&remote, Some(Slot(9)));
        assert!(routes.by_slot(Slot(3), 0).is_none());
        assert_eq!(routes.by_slot(Slot(9), 0).map(|found| found.mapped), Some(remote.mapped));
        assert!(routes.by_slot(Slot(9), 1).is_none());
    }

    #[test]
    fn an_unproved_source_is_nobodys_and_the_oldest_proved_one_is_forgotten() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        assert!(routes.by_source(source(1)).is_none());
        for port in 0..=MAX_SOURCES {
            routes.prove_source(&remote, source(u16::try_from(port).unwrap()));
        }
        assert!(routes.by_source(source(0)).is_none());
        assert!(routes.by_source(source(1)).is_some());
    }

    #[test]
    fn sources_that_only_check_do_not_displace_the_one_that_packets_come_from() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        routes.prove_source(&remote, source(1));
        for port in 100..200 {
            routes.prove_source(&remote, source(port));
            routes.heard_from(&remote, source(1));
        }
        assert!(routes.by_source(source(1)).is_some());
        routes.heard_from(&remote, source(7));
        assert!(routes.by_source(source(7)).is_none(), "a packet alone proves no source");
        assert_eq!(routes.read(|tables| tables.sources[&remote.mapped].len()), MAX_SOURCES);
    }

    #[test]
    fn a_source_that_is_proved_again_is_forgotten_later() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        for port in (1..=8).chain([1, 9]) {
            routes.prove_source(&remote, source(port));
        }
        assert!(routes.by_source(source(1)).is_some() && routes.by_source(source(2)).is_none());
    }

    #[test]
    fn where_packets_are_sent_is_not_forgotten_as_a_source() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        routes.prove_source(&remote, source(1));
        remote.set_direct(Some(source(1)));
        (100..200).for_each(|port| routes.prove_source(&remote, source(port)));
        assert!(routes.by_source(source(1)).is_some());
    }

    #[test]
    fn nothing_leads_to_a_removed_link() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, Some(Slot(3)));
        routes.prove_source(&remote, source(7));
        routes.remove(&remote);
        assert!(routes.by_mapped(remote.mapped).is_none());
        assert!(routes.by_slot(Slot(3), 0).is_none());
        assert!(routes.by_source(source(7)).is_none());
    }

    #[test]
    fn a_change_of_path_is_counted_once() {
        let routes = Routes::default();
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        remote.set_direct(Some(source(1)));
        remote.set_direct(Some(source(1)));
        routes.set_slot(&remote, Some(Slot(1)));
        assert_eq!(remote.path_changes.load(Ordering::Relaxed), 1);
        remote.set_direct(None);
        routes.set_slot(&remote, Some(Slot(2)));
        assert_eq!(remote.path_changes.load(Ordering::Relaxed), 3);
    }
}
