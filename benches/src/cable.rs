//! A long, narrow, lossy cable between two UDP sockets of this machine: no namespace, no root.
//!
//! In: where the far end is, what the cable is like. Out: the near end's address, and packets, later or not at all. Each
//! direction has its own dice and delay; the rate and its queue are those of the direction away from the near end.
//! Bounds: the queue in bytes; a packet is late by [`TICK`] at most while the thread gets a processor.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use socket2::SockRef;

/// How often packets are looked for: small beside every delay worth setting.
const TICK: Duration = Duration::from_micros(150);

/// Largest packet, and packets that are taken at a time before others are let go.
const PACKET_BYTES: usize = 65_535;
const BATCH: usize = 512;

/// What the kernel keeps while the thread has no processor: 150 ms at 200 Mbit/s, and as much as Linux gives anybody.
const BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// What a cable is like.
#[derive(Debug, Clone, Copy)]
pub struct Condition {
    /// There and back.
    pub round_trip: Duration,
    /// Packets in a thousand that are lost, each way.
    pub loss_permille: u64,
    /// Megabits a second.
    pub megabit: f64,
    /// Bytes that wait at most.
    pub queue: usize,
}

/// The cable, until it is dropped.
#[derive(Debug)]
pub struct Cable {
    /// Where to send to.
    pub near: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Cable {
    /// Lays a cable to the socket at `far`.
    ///
    /// # Errors
    /// If there are no sockets.
    pub fn lay(far: SocketAddr, condition: Condition) -> io::Result<Self> {
        let (near_end, far_end) = (open()?, open()?);
        far_end.connect(far)?;
        let near = near_end.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || carry(&near_end, &far_end, condition, &stopped));
        Ok(Self { near, stop, thread: Some(thread) })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Sockets fail only when their process ends.
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

fn open() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_nonblocking(true)?;
    SockRef::from(&socket).set_recv_buffer_size(BUFFER_BYTES)?;
    Ok(socket)
}

fn carry(near: &UdpSocket, far: &UdpSocket, condition: Condition, stop: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; PACKET_BYTES];
    let mut away = Line::new(1, condition, true);
    let mut back = Line::new(2, condition, false);
    let mut caller = None;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            let Some((len, from)) = received(near.recv_from(&mut buffer))? else { break };
            caller = Some(from);
            away.take(&buffer[..len]);
        }
        for _ in 0..BATCH {
            let Some(len) = received(far.recv(&mut buffer))? else { break };
            back.take(&buffer[..len]);
        }
        away.let_go(|packet| far.send(packet));
        back.let_go(|packet| caller.map_or(Ok(0), |to| near.send_to(packet, to)));
        thread::sleep(TICK);
    }
    Ok(())
}

/// Nothing there, and the word that an earlier packet found nobody, are no errors of the cable.
fn received<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(received) => Ok(Some(received)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One direction.
struct Line {
    condition: Condition,
    is_narrow: bool,
    free_at: Instant,
    held: VecDeque<(Instant, Vec<u8>)>,
    dice: u64,
}

impl Line {
    fn new(seed: u64, condition: Condition, is_narrow: bool) -> Self {
        let dice = 0x9e37_79b9_7f4a_7c15 ^ seed;
        Self { condition, is_narrow, free_at: Instant::now(), held: VecDeque::new(), dice }
    }

    fn take(&mut self, packet: &[u8]) {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        if self.dice % 1000 < self.condition.loss_permille {
            return;
        }
        let now = Instant::now();
        let mut leaves = now;
        if self.is_narrow {
            let bytes_a_second = self.condition.megabit * 125_000.0;
            let begins = self.free_at.max(now);
            if (begins - now).as_secs_f64() * bytes_a_second > self.condition.queue as f64 {
                return;
            }
            leaves = begins + Duration::from_secs_f64(packet.len() as f64 / bytes_a_second);
            self.free_at = leaves;
        }
        self.held.push_back((leaves + self.condition.round_trip / 2, packet.to_vec()));
    }

    fn let_go(&mut self, send: impl Fn(&[u8]) -> io::Result<usize>) {
        let now = Instant::now();
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, packet)) = self.held.pop_front() else { return };
            // What a socket cannot take is lost, as on any cable.
            let _lost = send(&packet);
        }
    }
}
