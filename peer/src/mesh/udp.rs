//! One UDP socket beneath QUIC.
//!
//! In: batches to send, buffers to fill. Out: batches as they came. STUN packets are sent past QUIC.
//! Never fails for what a network says of one packet.
//! Bounds: the kernel's buffers, of [`SOCKET_BUFFER_BYTES`] where QUIC uses it.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll, ready},
};

use peerfleet_proto::path::search::SocketId;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;

/// Socket buffers asked of the kernel, in bytes: the default of 208 KiB overflows in 2 ms at 1 GB/s.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// One UDP socket.
#[derive(Debug)]
pub(super) struct Udp {
    /// Which of the extra ones it is.
    id: Option<SocketId>,
    socket: tokio::net::UdpSocket,
    state: UdpSocketState,
    is_ipv6: bool,
    /// A send found the kernel's buffer full; cleared when it is writable again.
    is_full: AtomicBool,
    /// Receiving failed for good; from then on packets travel by way of the relay.
    is_broken: AtomicBool,
}

impl Udp {
    /// The one of all links. Called within the runtime that shall drive it.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn open() -> io::Result<Self> {
        let (socket, is_ipv6) = match Self::bind(Domain::IPV6) {
            Ok(socket) => (socket, true),
            Err(error) => {
                tracing::debug!(%error, "no dual-stack UDP socket: IPv4 only");
                (Self::bind(Domain::IPV4)?, false)
            }
        };
        let udp = Self::of(socket, is_ipv6, None)?;
        udp.grow();
        Ok(udp)
    }

    /// An extra one, likewise. Only IPv4 knows NATs that need it.
    ///
    /// # Errors
    /// Those of the system; among them, that too many files are open.
    pub(super) fn open_extra(id: SocketId) -> io::Result<Self> {
        Self::of(Self::bind(Domain::IPV4)?, false, Some(id))
    }

    /// Asks for the buffers that QUIC needs.
    pub(super) fn grow(&self) {
        let socket = SockRef::from(&self.socket);
        for (which, result) in [
            ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)),
            ("send", socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, which, "the kernel grants no larger socket buffer");
            }
        }
    }

    /// Which of the extra ones it is; `None` is the one of all links.
    pub(super) fn id(&self) -> Option<SocketId> {
        self.id
    }

    /// Its port, and whether it speaks IPv6 as well as IPv4.
    pub(super) fn port(&self) -> Option<(u16, bool)> {
        Some((self.socket.local_addr().ok()?.port(), self.is_ipv6))
    }

    /// What the system can do for it.
    pub(super) fn state(&self) -> &UdpSocketState {
        &self.state
    }

    /// Whether a send found the kernel's buffer full, and nobody saw it emptied since.
    pub(super) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Waits until it may send again.
    pub(super) async fn writable(&self) -> io::Result<()> {
        let result = self.socket.writable().await;
        self.is_full.store(false, Ordering::Relaxed);
        result
    }

    /// Whether receiving failed for good.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Receiving failed for good.
    pub(super) fn give_up(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    /// Sends one STUN packet; lost when the kernel cannot take it, as any packet may be.
    pub(super) fn send_stun(&self, to: SocketAddr, packet: &[u8]) {
        let transmit = Transmit { destination: to, ecn: None, contents: packet, segment_size: None, src_ip: None };
        // Whether a new socket is writable the runtime learns later.
        if self.put(&transmit).is_err() {
            tracing::trace!(%to, "the kernel took no STUN packet");
        }
    }

    /// Receives one packet, for who does not give it to QUIC.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        loop {
            match self.socket.recv_from(buffer).await {
                Err(error) if is_passing(&error) => {}
                received => return received,
            }
        }
    }

    /// Sends a batch.
    ///
    /// # Errors
    /// `WouldBlock` where the kernel's buffer is full, which [`Udp::writable`] waits for; those of the system.
    pub(super) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.socket.try_io(Interest::WRITABLE, || self.put(transmit));
        if matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.is_full.store(true, Ordering::Relaxed);
        }
        sent
    }

    /// Receives batches. What a network says of earlier packets is passed over.
    pub(super) fn poll_recv(
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

    fn put(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let destination = self.reachable(transmit.destination);
        self.state.send((&self.socket).into(), &Transmit { destination, ..transmit.clone() })
    }

    /// The address as this socket's family writes it.
    fn reachable(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.is_ipv6 => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            SocketAddr::V4(_) | SocketAddr::V6(_) => address,
        }
    }

    fn of(socket: Socket, is_ipv6: bool, id: Option<SocketId>) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let socket = tokio::net::UdpSocket::from_std(socket.into())?;
        let (is_full, is_broken) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { id, socket, state, is_ipv6, is_full, is_broken })
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
        Ok(socket)
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
