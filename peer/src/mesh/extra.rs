//! Extra UDP sockets: opened for a search through a hard NAT, and closed again but for the one that it found.
//!
//! In: how many to open, which to keep for which link. Out: STUN packets that came to them, as notes for the path machine; a
//! kept one is handed to the socket of all links, which reads and writes QUIC's packets there too.
//! Never lives longer than what it is for: an open one as long as a search, a kept one as long as its link wants it.
//! Bounds: [`plan::MAX_SOCKETS`] open ones for all searches together, a quarter of the files that the process may have open if
//! that is less; [`MAX_KEPT`] kept ones.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use peerfleet_proto::{
    path::search::{SocketId, plan},
    stun::is_stun,
};
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::{AbortHandle, JoinHandle},
};

use super::{
    routes::{Remote, plain},
    socket::{FromSocket, MappedSocket},
    udp::Udp,
};

/// Most sockets kept for links at one time; with more, no search opens any. With those of a search it is a third of the
/// 1,024 files that a process may usually have open.
const MAX_KEPT: usize = 64;

/// Longest packet that is read from a socket that is not kept: a check is 100 bytes long.
const LONGEST_BYTES: usize = 512;

/// The extra sockets of one instance.
#[derive(Debug)]
pub(super) struct ExtraSockets {
    runtime: Handle,
    links: Arc<MappedSocket>,
    notes: mpsc::Sender<FromSocket>,
    open: BTreeMap<SocketId, Open>,
    /// They belong to the links' remotes.
    kept: BTreeMap<SocketId, Weak<Udp>>,
    next: u32,
}

#[derive(Debug)]
struct Open {
    udp: Arc<Udp>,
    reader: AbortHandle,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl ExtraSockets {
    /// None. They will be driven by `runtime`, which drives the socket of all links.
    pub(super) fn new(runtime: Handle, links: Arc<MappedSocket>, notes: mpsc::Sender<FromSocket>) -> Self {
        Self { runtime, links, notes, open: BTreeMap::new(), kept: BTreeMap::new(), next: 0 }
    }

    /// Opens sockets until there are `count`, or as many as there may be; gives all of them.
    pub(super) fn open(&mut self, count: usize) -> Vec<SocketId> {
        self.kept.retain(|_, udp| udp.strong_count() > 0);
        let most = if self.kept.len() < MAX_KEPT { count.min(most_open()) } else { 0 };
        let _entered = self.runtime.enter();
        while self.open.len() < most {
            let id = SocketId(self.next);
            match Udp::open_extra(id) {
                Ok(udp) => {
                    let udp = Arc::new(udp);
                    let reader: JoinHandle<()> = self.runtime.spawn(read(Arc::clone(&udp), id, self.notes.clone()));
                    self.open.insert(id, Open { udp, reader: reader.abort_handle() });
                    self.next += 1;
                }
                Err(error) => {
                    tracing::debug!(%error, open = self.open.len(), "no more sockets for a search");
                    break;
                }
            }
        }
        self.open.keys().copied().take(most).collect()
    }

    /// Sends one STUN packet; lost when the kernel cannot take it, or the socket is closed.
    pub(super) fn send_stun(&self, from: SocketId, to: SocketAddr, packet: &[u8]) {
        let open = self.open.get(&from).map(|open| Arc::clone(&open.udp));
        if let Some(udp) = open.or_else(|| self.kept.get(&from)?.upgrade()) {
            udp.send_stun(to, packet);
        }
    }

    /// From now on this link's packets to `addr` leave by this socket, and come to it.
    pub(super) fn keep(&mut self, socket: SocketId, remote: &Remote, addr: SocketAddr) {
        let Some(open) = self.open.remove(&socket) else {
            // Another search found the same one a moment before.
            if let Some(udp) = self.kept.get(&socket).and_then(Weak::upgrade) {
                remote.set_kept(Some((addr, udp)));
            }
            return;
        };
        let udp = Arc::clone(&open.udp);
        drop(open);
        udp.grow();
        self.kept.insert(socket, Arc::downgrade(&udp));
        self.links.add_kept(Arc::downgrade(&udp));
        remote.set_kept(Some((addr, udp)));
    }

    /// Closes every socket that is not kept.
    pub(super) fn close(&mut self) {
        self.open.clear();
    }
}

/// How many sockets may be open for searches.
fn most_open() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
    plan::MAX_SOCKETS.min(files / 4)
}

/// Tells of every STUN packet that comes, until the socket is kept or closed.
async fn read(udp: Arc<Udp>, via: SocketId, notes: mpsc::Sender<FromSocket>) {
    let mut buffer = [0; LONGEST_BYTES];
    loop {
        let (length, from) = match udp.receive(&mut buffer).await {
            Ok(received) => received,
            Err(error) => return tracing::debug!(%error, "a socket of a search failed"),
        };
        if !buffer[..length].first().is_some_and(|first| is_stun(*first)) {
            continue;
        }
        let note =
            FromSocket::Stun { via: Some(via), from: plain(from), packet: Bytes::copy_from_slice(&buffer[..length]) };
        if notes.send(note).await.is_err() {
            return;
        }
    }
}
