//! What QUIC takes for its UDP socket: packets leave and arrive directly or by way of the relay, batch by batch.
//!
//! In: QUIC's batches for a mapped address; UDP packets; Datagram frames that the uplink brought. Out: UDP packets
//! (GSO kept), Datagram frames for the uplink (one batch is one frame), batches for QUIC under the mapped address of
//! whose they are, and STUN packets and notes of traffic for the path machine.
//! Never blocks, never ends for an error of the network, and never passes on what came from an unproved source.
//! Bounds: [`RELAY_QUEUE_BYTES`] each way between here and the uplink, oldest dropped first.

use std::{
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use peerfleet_proto::{
    id::Slot,
    request::link::Route,
    wire::relay::{self, Datagram},
};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{io::Interest, sync::mpsc};

use super::{
    Drops, mtu,
    queue::{DropOldest, Weigh},
    routes::{Remote, Routes, own_mapped_address, plain},
};

/// Batches of packets between QUIC and the uplink, each way, in bytes: 64 batches of ten packets. At 100 Mbit/s that is
/// 80 ms of queue; what does not fit is dropped, oldest first, which QUIC takes for congestion.
pub(super) const RELAY_QUEUE_BYTES: usize = 64 * 10 * 1472;

/// Socket buffers asked of the kernel, in bytes: the default of 208 KiB overflows in 2 ms at 1 GB/s.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

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
        self.packets.len()
    }
}

/// What lies between the links' socket and the uplink: the only thing both know.
#[derive(Debug)]
pub(super) struct Switch {
    /// Which way each link's packets travel.
    pub(super) routes: Routes,
    /// Datagram frames for the relay.
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
            from_relay: DropOldest::new(RELAY_QUEUE_BYTES),
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

    fn count_stray(&self) {
        self.stray.fetch_add(1, Ordering::Relaxed);
    }
}

/// The socket that QUIC is given.
pub(super) struct MappedSocket {
    switch: Arc<Switch>,
    udp: Option<Udp>,
    notes: mpsc::Sender<FromSocket>,
    epoch: Instant,
    relay_first: AtomicBool,
}

struct Udp {
    socket: tokio::net::UdpSocket,
    state: UdpSocketState,
    is_ipv6: bool,
    /// A send found the kernel's buffer full; cleared when it is writable again.
    is_full: AtomicBool,
    /// Receiving failed for good; from then on packets travel by way of the relay.
    is_broken: AtomicBool,
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
            Ok(udp) => Some(udp),
            Err(error) => {
                tracing::warn!(%error, "no UDP socket: links travel by way of the relay only");
                None
            }
        });
        Self { switch, udp, notes, epoch: Instant::now(), relay_first: AtomicBool::new(false) }
    }

    /// The port of the UDP socket, and whether it speaks IPv6 as well as IPv4; `None` without UDP.
    pub(super) fn udp_port(&self) -> Option<(u16, bool)> {
        let udp = self.udp.as_ref()?;
        Some((udp.socket.local_addr().ok()?.port(), udp.is_ipv6))
    }

    /// Sends one STUN packet; lost when the kernel cannot take it, as any packet may be.
    pub(super) fn send_stun(&self, to: SocketAddr, packet: &[u8]) {
        let Some(udp) = &self.udp else { return };
        let transmit = Transmit { destination: to, ecn: None, contents: packet, segment_size: None, src_ip: None };
        if udp.send(&transmit).is_err() {
            tracing::trace!(%to, "the kernel took no STUN packet");
        }
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
    fn send_relayed(&self, remote: &Remote, to: Slot, transmit: &Transmit<'_>) {
        let packet = transmit.segment_size.unwrap_or(transmit.contents.len());
        let Ok(segment) = u16::try_from(packet) else { return self.switch.count_stray() };
        if !remote.may_relay(packet) {
            return;
        }
        let whole_packets = (FRAME_BYTES / packet.max(1)).max(1) * packet;
        for batch in transmit.contents.chunks(whole_packets.max(1)) {
            self.switch.to_relay.push(relay::datagram(to, remote.route.lane(), segment, batch));
        }
        remote.count_relayed(transmit.contents.len());
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

    fn poll_udp(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<usize> {
        let Some(udp) = &self.udp else { return Poll::Pending };
        if udp.is_broken.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        match ready!(udp.poll_recv(cx, bufs, meta)) {
            Ok(count) => {
                for (meta, buf) in meta.iter_mut().zip(bufs.iter()).take(count) {
                    self.sort(meta, buf);
                }
                Poll::Ready(count)
            }
            Err(error) => {
                tracing::error!(%error, "the UDP socket failed: links travel by way of the relay from now on");
                udp.is_broken.store(true, Ordering::Relaxed);
                Poll::Pending
            }
        }
    }

    /// Gives a received batch the mapped address of whose it is; one that is not for QUIC is emptied.
    fn sort(&self, meta: &mut RecvMeta, buf: &[u8]) {
        let from = plain(meta.addr);
        let packets = &buf[..meta.len];
        let mut quic = false;
        for packet in packets.chunks(meta.stride.max(1)) {
            if packet.first().is_some_and(|first| *first <= LAST_STUN_BYTE) {
                self.note(FromSocket::Stun { from, packet: Bytes::copy_from_slice(packet) });
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
        let Some(remote) = self.switch.routes.by_mapped(transmit.destination) else {
            self.switch.count_stray();
            return Ok(());
        };
        let direct = if remote.route == Route::RelayedOnly { None } else { remote.direct() };
        match (direct, &self.udp, remote.slot()) {
            (Some(to), Some(udp), _) => self.send_direct(udp, &remote, to, transmit)?,
            (_, _, Some(to)) => self.send_relayed(&remote, to, transmit),
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
        let relay_first = self.relay_first.fetch_xor(true, Ordering::Relaxed);
        let mut count = if relay_first { self.poll_relay(cx, bufs, meta) } else { self.poll_udp(cx, bufs, meta) };
        if count.is_pending() {
            count = if relay_first { self.poll_udp(cx, bufs, meta) } else { self.poll_relay(cx, bufs, meta) };
        }
        count.map(Ok)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(own_mapped_address())
    }

    fn max_transmit_segments(&self) -> usize {
        self.udp.as_ref().map_or(RELAYED_BATCH, |udp| udp.state.max_gso_segments())
    }

    fn max_receive_segments(&self) -> usize {
        RECEIVED_BATCH
    }

    fn may_fragment(&self) -> bool {
        self.udp.as_ref().is_some_and(|udp| udp.state.may_fragment())
    }
}

impl Udp {
    fn open() -> io::Result<Self> {
        let (socket, is_ipv6) = match Self::bind(Domain::IPV6) {
            Ok(socket) => (socket, true),
            Err(error) => {
                tracing::debug!(%error, "no dual-stack UDP socket: IPv4 only");
                (Self::bind(Domain::IPV4)?, false)
            }
        };
        let state = UdpSocketState::new((&socket).into())?;
        let socket = tokio::net::UdpSocket::from_std(socket.into())?;
        Ok(Self { socket, state, is_ipv6, is_full: AtomicBool::new(false), is_broken: AtomicBool::new(false) })
    }

    fn bind(domain: Domain) -> io::Result<Socket> {
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        let any: SocketAddr = if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
            (Ipv6Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        };
        socket.bind(&any.into())?;
        socket.set_nonblocking(true)?;
        for (which, result) in [
            ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)),
            ("send", socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, which, "the kernel grants no larger socket buffer");
            }
        }
        Ok(socket)
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let destination = self.reachable(transmit.destination);
        let sent = self.socket.try_io(Interest::WRITABLE, || {
            self.state.send((&self.socket).into(), &Transmit { destination, ..transmit.clone() })
        });
        if matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.is_full.store(true, Ordering::Relaxed);
        }
        sent
    }

    /// The address as this socket's family writes it.
    fn reachable(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.is_ipv6 => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            SocketAddr::V4(_) | SocketAddr::V6(_) => address,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_recv_ready(cx))?;
            let received =
                self.socket.try_io(Interest::READABLE, || self.state.recv((&self.socket).into(), bufs, meta));
            match received {
                Ok(count) => return Poll::Ready(Ok(count)),
                // Nothing there after all, or an ICMP error about an earlier send, which says nothing for certain.
                Err(error) if is_passing(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkUnreachable, WouldBlock,
    };
    matches!(
        error.kind(),
        WouldBlock | Interrupted | ConnectionReset | ConnectionRefused | HostUnreachable | NetworkUnreachable
    )
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
        let this = &mut *self;
        let Some(udp) = &this.socket.udp else { return Poll::Ready(Ok(())) };
        if this.waiting.is_none() {
            if !udp.is_full.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            let socket = Arc::clone(&this.socket);
            this.waiting = Some(Box::pin(async move {
                match &socket.udp {
                    Some(udp) => udp.socket.writable().await,
                    None => Ok(()),
                }
            }));
        }
        let Some(waiting) = &mut this.waiting else { return Poll::Ready(Ok(())) };
        let result = ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        udp.is_full.store(false, Ordering::Relaxed);
        Poll::Ready(result)
    }
}
