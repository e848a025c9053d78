//! What QUIC takes for its UDP socket: packets leave and arrive directly or by way of the relay, batch by batch.
//!
//! In: QUIC's batches for a mapped address; UDP packets; Datagram frames that the uplink brought. Out: UDP packets
//! (GSO kept), Datagram frames for the uplink (one batch is one frame), batches for QUIC under the mapped address of
//! whose they are, and STUN packets and notes of traffic for the path machine.
//! Never blocks, never ends for an error of the network, and never passes on what came from an unproved source. A link whose
//! packets the uplink does not take holds them back; one that is direct never waits for the relay.
//! Where the direct path is in doubt, packets leave both ways.
//! Bounds: [`RELAY_QUEUE_BYTES`] towards the uplink and [`ARRIVED_BYTES`] from it, oldest dropped first; a link waits
//! [`RELAY_PATIENCE`] before it looks again whether it has another path.

use std::{
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{
    id::Slot,
    path::search::SocketId,
    request::link::Route,
    wire::{
        relay::{self, Datagram},
        websocket::MaskingKey,
    },
};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::{sync::mpsc, time::timeout};

use crate::random;

use super::{
    Drops, mtu,
    queue::{DropOldest, Weigh},
    routes::{Remote, Routes, own_mapped_address, plain},
    udp::Udp,
};

/// Batches of packets from QUIC to the uplink, in bytes: 64 batches of ten packets. Links hold back from half of it on, at
/// 100 Mbit/s 40 ms of queue; what does not fit nevertheless is dropped, oldest first, which QUIC takes for congestion.
pub(super) const RELAY_QUEUE_BYTES: usize = 64 * 10 * 1472;

/// Batches of packets from the uplink to QUIC, in bytes: what arrives while the thread of the links waits for a processor,
/// 10 ms at 400 MB/s. They have come all the way: to drop them costs more than to keep them.
const ARRIVED_BYTES: usize = 4 * 1024 * 1024;

/// What a batch costs besides its packets: its place in the queue and two small allocations.
const ENTRY_BYTES: usize = 128;

/// How long a link waits for the uplink to take its packets before it looks again whether it has another path.
const RELAY_PATIENCE: Duration = Duration::from_millis(25);

/// Packets of one batch where UDP does not limit it; QUIC makes no longer ones.
const RELAYED_BATCH: usize = 10;

/// Packets in one frame, in bytes: as many as in one UDP send.
const FRAME_BYTES: usize = 65_507;

/// Packets of the largest size that one received batch may hold: QUIC makes room for so many, and that must do for all
/// that Linux coalesces (65,535 bytes) and for a frame.
const RECEIVED_BATCH: usize = 65_535_usize.div_ceil(mtu::LARGEST_RELAYED as usize);

/// How often, at most, traffic on the direct path is told to the path machine, in milliseconds.
const NOTE_INTERVAL_MS: u64 = 50;

/// First byte of a STUN message (RFC 9443 §3); a QUIC packet has its fixed bit set.
const LAST_STUN_BYTE: u8 = 3;

/// What the socket tells the path machine.
#[derive(Debug)]
pub(super) enum FromSocket {
    /// A STUN packet arrived.
    Stun {
        /// At which of the extra sockets; `None` is the one of all links.
        via: Option<SocketId>,
        /// From where.
        from: SocketAddr,
        /// The packet.
        packet: Bytes,
    },
    /// Packets of this link left directly.
    Sent {
        /// The link's mapped address.
        mapped: SocketAddr,
    },
    /// Packets of this link arrived directly.
    Received {
        /// The link's mapped address.
        mapped: SocketAddr,
        /// From where.
        from: SocketAddr,
    },
}

/// A batch that came by way of the relay.
#[derive(Debug)]
pub(super) struct Relayed {
    remote: Arc<Remote>,
    segment: usize,
    packets: Bytes,
}

impl Weigh for Relayed {
    fn weight(&self) -> usize {
        self.packets.len() + ENTRY_BYTES
    }
}

/// What lies between the links' socket and the uplink: the only thing both know.
#[derive(Debug)]
pub(super) struct Switch {
    /// Which way each link's packets travel.
    pub(super) routes: Routes,
    /// Datagram frames for the relay, ready for the wire.
    pub(super) to_relay: DropOldest<Bytes>,
    from_relay: DropOldest<Relayed>,
    stray: AtomicU64,
}

impl Switch {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self {
            routes: Routes::default(),
            to_relay: DropOldest::new(RELAY_QUEUE_BYTES),
            from_relay: DropOldest::new(ARRIVED_BYTES),
            stray: AtomicU64::new(0),
        }
    }

    /// Takes a Datagram frame that the relay delivered.
    pub(super) fn relayed(&self, datagram: Datagram) {
        let Some(remote) = self.routes.by_slot(datagram.slot, datagram.lane) else { return self.count_stray() };
        if datagram.segment == 0 || datagram.packets.is_empty() {
            return self.count_stray();
        }
        remote.count_relayed(datagram.packets.len());
        remote.note_relayed();
        self.from_relay.push(Relayed { remote, segment: datagram.segment.into(), packets: datagram.packets });
    }

    /// What was dropped so far.
    pub(super) fn drops(&self) -> Drops {
        Drops {
            to_relay: self.to_relay.dropped(),
            from_relay: self.from_relay.dropped(),
            stray: self.stray.load(Ordering::Relaxed),
        }
    }

    /// Counts what came and belongs to nobody.
    pub(super) fn count_stray(&self) {
        self.stray.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Switch {
    /// What the relay would read next.
    pub(super) async fn next_for_relay(&self) -> Datagram {
        use peerfleet_proto::wire::{
            relay::RelayFrame,
            websocket::{Separator, Side},
        };
        let frame = std::future::poll_fn(|cx| self.to_relay.poll_pop(cx)).await;
        let (mut separator, mut taken) = (Separator::new(Side::Server), Vec::new());
        separator.take_datagrams();
        separator.feed(&frame, &mut Vec::new(), &mut taken);
        let payload = taken.pop().expect("a Datagram frame").into_payload();
        let Ok(RelayFrame::Datagram(datagram)) = RelayFrame::read(&payload) else { panic!("not a datagram") };
        datagram
    }
}

/// The socket that QUIC is given.
pub(super) struct MappedSocket {
    switch: Arc<Switch>,
    udp: Option<Arc<Udp>>,
    /// Sockets of single links, which own them.
    kept: RwLock<Vec<Weak<Udp>>>,
    notes: mpsc::Sender<FromSocket>,
    epoch: Instant,
    /// Which source of packets is looked at first, in turn.
    turn: AtomicUsize,
    /// Whether the last batch was held back because the uplink has enough: the link that gave it asks next when it may
    /// send again, on the same thread.
    held_back: AtomicBool,
    /// Whether who sends next has asked whether it may, and so can wait: QUIC's endpoint sends answers of its own without asking.
    asked: AtomicBool,
}

impl fmt::Debug for MappedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedSocket").field("udp", &self.udp.is_some()).finish_non_exhaustive()
    }
}

impl MappedSocket {
    /// Opens the UDP socket if wanted and possible. Called within the runtime that shall drive it.
    pub(super) fn open(switch: Arc<Switch>, udp: bool, notes: mpsc::Sender<FromSocket>) -> Self {
        let udp = udp.then(Udp::open).and_then(|opened| match opened {
            Ok(udp) => Some(Arc::new(udp)),
            Err(error) => {
                tracing::warn!(%error, "no UDP socket: links travel by way of the relay only");
                None
            }
        });
        Self {
            switch,
            udp,
            kept: RwLock::default(),
            notes,
            epoch: Instant::now(),
            turn: AtomicUsize::new(0),
            held_back: AtomicBool::new(false),
            asked: AtomicBool::new(false),
        }
    }

    /// The port of the UDP socket, and whether it speaks IPv6 as well as IPv4; `None` without UDP.
    pub(super) fn udp_port(&self) -> Option<(u16, bool)> {
        self.udp.as_ref()?.port()
    }

    /// Sends one STUN packet; lost when the kernel cannot take it, as any packet may be.
    pub(super) fn send_stun(&self, to: SocketAddr, packet: &[u8]) {
        self.udp.iter().for_each(|udp| udp.send_stun(to, packet));
    }

    /// Reads packets from this socket too, as long as somebody has it.
    pub(super) fn add_kept(&self, udp: Weak<Udp>) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|udp| udp.strong_count() > 0);
        kept.push(udp);
        drop(kept);
        self.switch.from_relay.wake();
    }

    fn kept(&self) -> Vec<Arc<Udp>> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn send_direct(&self, udp: &Udp, remote: &Remote, to: SocketAddr, transmit: &Transmit<'_>) -> io::Result<()> {
        udp.send(&Transmit { destination: to, src_ip: None, ..transmit.clone() })?;
        remote.count_direct(transmit.contents.len());
        if remote.note_sent(self.now_ms(), NOTE_INTERVAL_MS) {
            self.note(FromSocket::Sent { mapped: remote.mapped });
        }
        Ok(())
    }

    /// Sends a batch as one frame, or as a few where its packets are large.
    ///
    /// # Errors
    /// `WouldBlock` where the uplink has enough to carry.
    fn send_relayed(&self, remote: &Remote, to: Slot, transmit: &Transmit<'_>) -> io::Result<()> {
        let packet = transmit.segment_size.unwrap_or(transmit.contents.len());
        let Ok(segment) = u16::try_from(packet) else {
            self.switch.count_stray();
            return Ok(());
        };
        if !remote.may_relay(packet) {
            return Ok(());
        }
        if self.switch.to_relay.is_half_full() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let whole_packets = (FRAME_BYTES / packet.max(1)).max(1) * packet;
        for batch in transmit.contents.chunks(whole_packets.max(1)) {
            let key = MaskingKey(random::bytes());
            self.switch.to_relay.push(relay::masked_datagram(to, remote.route.lane(), segment, batch, key));
        }
        remote.count_relayed(transmit.contents.len());
        Ok(())
    }

    fn note(&self, note: FromSocket) {
        if self.notes.try_send(note).is_err() {
            tracing::trace!("the path machine is behind: a note was dropped");
        }
    }

    fn poll_relay(&self, cx: &Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<usize> {
        let mut filled = 0;
        while filled < bufs.len().min(meta.len()) {
            let batch = match self.switch.from_relay.pop() {
                Some(batch) => batch,
                None if filled > 0 => break,
                None => ready!(self.switch.from_relay.poll_pop(cx)),
            };
            let len = batch.packets.len();
            let Some(buf) = bufs[filled].get_mut(..len) else {
                self.switch.count_stray();
                continue;
            };
            buf.copy_from_slice(&batch.packets);
            meta[filled] = RecvMeta { addr: batch.remote.mapped, len, stride: batch.segment, ecn: None, dst_ip: None };
            filled += 1;
        }
        Poll::Ready(filled)
    }

    fn poll_kept(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<usize> {
        let polled = self.kept().into_iter().map(|udp| self.poll_udp(Some(&udp), cx, bufs, meta)).find(Poll::is_ready);
        polled.unwrap_or(Poll::Pending)
    }

    fn poll_udp(
        &self,
        udp: Option<&Arc<Udp>>,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<usize> {
        let Some(udp) = udp else { return Poll::Pending };
        if udp.is_broken() {
            return Poll::Pending;
        }
        match ready!(udp.poll_recv(cx, bufs, meta)) {
            Ok(count) => {
                for (meta, buf) in meta.iter_mut().zip(bufs.iter()).take(count) {
                    self.sort(udp.id(), meta, buf);
                }
                Poll::Ready(count)
            }
            Err(error) => {
                tracing::error!(%error, id = ?udp.id(), "a UDP socket failed: its links travel by way of the relay from now on");
                udp.give_up();
                Poll::Pending
            }
        }
    }

    /// Gives a received batch the mapped address of whose it is; one that is not for QUIC is emptied.
    fn sort(&self, via: Option<SocketId>, meta: &mut RecvMeta, buf: &[u8]) {
        let from = plain(meta.addr);
        let packets = &buf[..meta.len];
        let mut quic = false;
        for packet in packets.chunks(meta.stride.max(1)) {
            if packet.first().is_some_and(|first| *first <= LAST_STUN_BYTE) {
                self.note(FromSocket::Stun { via, from, packet: Bytes::copy_from_slice(packet) });
            } else {
                quic = true;
            }
        }
        meta.dst_ip = None;
        let remote = if quic { self.switch.routes.by_source(from) } else { None };
        let Some(remote) = remote else {
            if quic {
                self.switch.count_stray();
            }
            meta.len = 0;
            return;
        };
        meta.addr = remote.mapped;
        remote.count_direct(packets.len());
        if remote.note_received(self.now_ms(), NOTE_INTERVAL_MS) {
            self.note(FromSocket::Received { mapped: remote.mapped, from });
        }
    }
}

impl AsyncUdpSocket for MappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let can_wait = self.asked.swap(false, Ordering::Relaxed);
        let Some(remote) = self.switch.routes.by_mapped(transmit.destination) else {
            self.switch.count_stray();
            return Ok(());
        };
        let direct = if remote.route == Route::RelayedOnly { None } else { remote.direct() };
        match (direct, &self.udp, remote.slot()) {
            (Some(to), Some(udp), slot) => {
                let is_copied = remote.is_doubted() && !self.switch.to_relay.is_half_full();
                let copied_to = slot.filter(|_| is_copied);
                if let Some(slot) = copied_to {
                    self.send_relayed(&remote, slot, transmit)?;
                }
                let kept = remote.kept(to);
                match self.send_direct(kept.as_ref().unwrap_or(udp), &remote, to, transmit) {
                    // The copy is on its way: who tries again would send it once more.
                    Err(error) if copied_to.is_some() && error.kind() == io::ErrorKind::WouldBlock => {}
                    sent => sent?,
                }
            }
            (_, _, Some(to)) => {
                let sent = self.send_relayed(&remote, to, transmit);
                self.held_back.store(sent.is_err() && can_wait, Ordering::Relaxed);
                return sent;
            }
            (_, _, None) => self.switch.count_stray(),
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        for at in 0..3 {
            let count = match turn.wrapping_add(at) % 3 {
                0 => self.poll_relay(cx, bufs, meta),
                1 => self.poll_udp(self.udp.as_ref(), cx, bufs, meta),
                _ => self.poll_kept(cx, bufs, meta),
            };
            if count.is_ready() {
                return count.map(Ok);
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(own_mapped_address())
    }

    fn max_transmit_segments(&self) -> usize {
        let most = self.udp.as_ref().map_or(RELAYED_BATCH, |udp| udp.state().max_gso_segments());
        // A device that takes no batches is noticed by the socket that sends through it.
        self.kept().iter().map(|udp| udp.state().max_gso_segments()).fold(most, usize::min)
    }

    fn max_receive_segments(&self) -> usize {
        RECEIVED_BATCH
    }

    fn may_fragment(&self) -> bool {
        self.udp.as_ref().is_some_and(|udp| udp.state().may_fragment())
    }
}

type Wait = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Tells one connection when it may send again.
struct Writable {
    socket: Arc<MappedSocket>,
    waiting: Option<Wait>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let writable = self.poll_room(cx);
        if writable.is_ready() {
            self.socket.asked.store(true, Ordering::Relaxed);
        }
        writable
    }
}

impl Writable {
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self;
        if this.waiting.is_none() && this.socket.held_back.swap(false, Ordering::Relaxed) {
            let switch = Arc::clone(&this.socket.switch);
            this.waiting = Some(Box::pin(async move {
                // Either way the link tries again, by the path that it has then.
                _ = timeout(RELAY_PATIENCE, switch.to_relay.emptier()).await;
                Ok(())
            }));
        }
        if this.waiting.is_none() {
            let sockets = this.socket.udp.iter().cloned().chain(this.socket.kept());
            let Some(full) = sockets.into_iter().find(|udp| udp.is_full()) else {
                return Poll::Ready(Ok(()));
            };
            this.waiting = Some(Box::pin(async move { full.writable().await }));
        }
        let Some(waiting) = &mut this.waiting else { return Poll::Ready(Ok(())) };
        let result = ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        Poll::Ready(result)
    }
}
