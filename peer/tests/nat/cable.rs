//! Slow, lossy and narrow cables, where the kernel has no netem: what a router forwards is held by us for a while.
//!
//! In: a router, how long, how much is lost, how fast. Out: packets, in their order, later or not at all. Each direction is
//! a line of its own. Packets wait in front of the router's connection tracking: behind it, the second packet of a new
//! flow would be tracked as if there had been no first.
//! Laid -> changed, as often as wished -> taken up with the [`Cable`], when the router's packets are dropped.
//! Bounds: [`QUEUE`] of a direction's rate, [`MOST_PACKETS`] in all; a packet is late by [`TICK`] at most.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nfq::{Message, Queue, Verdict};
use patchbay::Router;

use super::program::succeed;

/// How much a direction may be behind its rate before packets are dropped: a home router's queue.
const QUEUE: Duration = Duration::from_millis(50);

/// Most packets that wait for us in the kernel, and are held: 200 ms of half a Gbit/s.
const MOST_PACKETS: u32 = 16_384;

/// How often packets are looked for. Small beside any delay worth setting, and little work.
const TICK: Duration = Duration::from_micros(150);

/// Whether bridged frames pass by the rules of iptables, one for each family.
const BRIDGE_RULES: [&str; 2] =
    ["/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"];

/// Number of the queue of packets that leave a site, and of those that come to it.
const OUTWARD: u16 = 0;
const INWARD: u16 = 1;

/// What a cable is like, in each direction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Condition {
    /// Added to each packet's way.
    pub delay: Duration,
    /// Packets in a thousand that are lost.
    pub loss_permille: u32,
    /// Most that goes through; `None` is no bound.
    pub megabit: Option<u32>,
}

/// A cable between a site's router and the world.
pub(super) struct Cable {
    condition: Arc<Mutex<Condition>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Cable {
    /// Puts a cable of this condition behind the router's interface `wan`.
    pub(super) fn lay(router: &Router, wan: &str, condition: Condition) -> Self {
        let condition = Arc::new(Mutex::new(condition));
        let stop = Arc::new(AtomicBool::new(false));
        let mut lines = [Line::new(OUTWARD), Line::new(INWARD)];
        let (shared, stopped) = (Arc::clone(&condition), Arc::clone(&stop));
        let (bound, is_bound) = std::sync::mpsc::channel();
        let hold = move || {
            let mut queue = Queue::open()?;
            for number in [OUTWARD, INWARD] {
                queue.bind(number)?;
                // Enough to know the packet's length by its header.
                queue.set_copy_range(number, 64)?;
                queue.set_queue_max_len(number, MOST_PACKETS)?;
            }
            queue.set_nonblocking(true);
            let _the_router_waits = bound.send(());
            while !stopped.load(Ordering::Relaxed) {
                let condition = *shared.lock().expect("nobody panics with it");
                pass_on(&mut queue, &mut lines, condition)?;
                thread::sleep(TICK);
            }
            Ok(())
        };
        let thread = router.spawn_thread(hold).expect("a thread");
        is_bound.recv().expect("NFQUEUE can be bound");
        // Where the kernel shows bridged frames to iptables, the parts of a batch would share what it notes of their bridge,
        // and all but the first be lost.
        router
            .run_sync(|| Ok(BRIDGE_RULES.iter().try_for_each(|rule| write_if_there(rule, "0"))?))
            .expect("it is written");
        for program in ["iptables", "ip6tables"] {
            for (direction, queue) in [("!", OUTWARD), ("", INWARD)] {
                let rule =
                    format!("{program} -w -t raw -A PREROUTING {direction} -i {wan} -j NFQUEUE --queue-num {queue}");
                router.run_sync(move || succeed(&rule)).expect("packets can be queued");
            }
        }
        Self { condition, stop, thread: Some(thread) }
    }

    /// From now on the cable is like this.
    pub(super) fn set(&self, condition: Condition) {
        *self.condition.lock().expect("nobody panics with it") = condition;
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !matches!(ended, Some(Ok(Ok(())))) {
            eprintln!("a cable broke: {ended:?}");
        }
    }
}

fn write_if_there(path: &str, text: &str) -> io::Result<()> {
    match std::fs::write(path, text) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// One direction.
struct Line {
    number: u16,
    held: VecDeque<(Instant, Message)>,
    /// When the last packet has gone through at the line's rate.
    free_at: Option<Instant>,
    /// State of the dice: the same for each run, as far as packets are.
    dice: u64,
}

impl Line {
    fn new(number: u16) -> Self {
        Self { number, held: VecDeque::new(), free_at: None, dice: 0x9e37_79b9_7f4a_7c15 ^ u64::from(number) }
    }

    /// When this packet comes out at the other end; `None` is never.
    fn due(&mut self, packet: &Message, condition: Condition, now: Instant) -> Option<Instant> {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        if self.dice % 1000 < u64::from(condition.loss_permille) {
            return None;
        }
        let mut through = now;
        if let Some(megabit) = condition.megabit {
            let begin = self.free_at.map_or(now, |free_at| free_at.max(now));
            if begin > now + QUEUE {
                return None;
            }
            let bits = packet.get_original_len() as u64 * 8;
            through = begin + Duration::from_nanos(bits * 1000 / u64::from(megabit));
            self.free_at = Some(through);
        }
        // A cable that becomes shorter does not let packets overtake those that are in it.
        let last = self.held.back().map_or(now, |(due, _)| *due);
        Some((through + condition.delay).max(last))
    }
}

/// Takes what came, and lets go what is due.
fn pass_on(queue: &mut Queue, lines: &mut [Line; 2], condition: Condition) -> io::Result<()> {
    loop {
        let mut packet = match queue.recv() {
            Ok(packet) => packet,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // A packet that was let go is gone: its interface went down meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let line = lines.iter_mut().find(|line| line.number == packet.get_queue_num()).expect("two are bound");
        match line.due(&packet, condition, Instant::now()) {
            Some(due) => {
                packet.set_verdict(Verdict::Accept);
                line.held.push_back((due, packet));
            }
            None => {
                packet.set_verdict(Verdict::Drop);
                queue.verdict(packet)?;
            }
        }
    }
    let now = Instant::now();
    for line in lines {
        while line.held.front().is_some_and(|(due, _)| *due <= now) {
            let (_, packet) = line.held.pop_front().expect("there is one");
            queue.verdict(packet)?;
        }
    }
    Ok(())
}
