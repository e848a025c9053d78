//! All rooms, and the mailbox of each member. The only file that locks.
//!
//! In: who joins, leaves or says something new of itself, and frames for a slot. Out: a [`Seat`] in a room, and wake-ups
//! of the tasks whose mailbox got something.
//! Never holds a lock while waiting, and never two locks but a room's and then a mailbox's.
//! A room exists from its first join until its last member leaves; then its id means nothing to the relay any more.
//! Bounds: those of [`crate::room`] and [`crate::queue`]; there are at most as many rooms as connections.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use peerfleet_proto::{
    id::{RoomId, Slot},
    wire::{
        relay::{ClosingReason, Member, RelayToPeer, control},
        websocket::Outbox,
    },
};

use crate::{
    metrics::DropReason,
    queue::{Budget, QueueLimits, Queues, RoomBounds},
    room::{Newcomer, Room, RoomFull},
    socket::{OUTBOX_BYTES, wire},
};

/// Bounds of rooms and of what waits in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoomLimits {
    pub(crate) peers: usize,
    pub(crate) queues: QueueLimits,
    pub(crate) room_bytes: usize,
    pub(crate) relay_bytes: usize,
}

/// All rooms of the relay.
#[derive(Debug)]
pub(crate) struct Rooms {
    rooms: Mutex<HashMap<RoomId, Arc<Cell>>>,
    limits: RoomLimits,
    budget: Arc<Budget>,
    peers: AtomicUsize,
    draining: AtomicBool,
}

/// One room behind its lock; `None` once its last member has left, and then it is not in the map either (or not for long).
#[derive(Debug)]
struct Cell {
    room: Mutex<Option<Room<Arc<Mailbox>>>>,
    bounds: Arc<RoomBounds>,
}

/// What waits for one member, and the task that waits for it.
#[derive(Debug)]
pub(crate) struct Mailbox {
    queues: Mutex<Queues>,
    owner: AtomicWaker,
}

/// One connection's place in a room; given up when dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    slot: Slot,
    id: RoomId,
    cell: Arc<Cell>,
    mailbox: Arc<Mailbox>,
    /// Whom this member sent to last: most frames of a burst go to one receiver, and need no look into the room.
    last: Option<(Slot, Arc<Mailbox>)>,
    rooms: Arc<Rooms>,
}

/// Locks, even if a thread panicked while it held the lock: every change under our locks is complete at each step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rooms {
    pub(crate) fn new(limits: RoomLimits) -> Self {
        Self {
            rooms: Mutex::default(),
            limits,
            budget: Arc::new(Budget::new(limits.relay_bytes)),
            peers: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
        }
    }

    /// Seats a newcomer, tells everybody in the room, and answers with who was there before.
    pub(crate) fn join(
        self: &Arc<Self>,
        id: RoomId,
        newcomer: Newcomer,
    ) -> Result<(Seat, Vec<Arc<Member>>), ClosingReason> {
        loop {
            let cell = self.cell(id);
            let mut guard = lock(&cell.room);
            // None: its last member left in this very moment, and the next round makes the room anew.
            let Some(room) = guard.as_mut() else { continue };
            let mailbox = Arc::new(Mailbox::new(cell.bounds.clone()));
            let (slot, others) = seat(room, newcomer, &mailbox).map_err(|_| ClosingReason::RoomFull)?;
            drop(guard);
            self.peers.fetch_add(1, Ordering::Relaxed);
            let seat = Seat { slot, id, cell, mailbox, last: None, rooms: self.clone() };
            // The flag was set before all who sit were told to go; who sits down after that is told here.
            return if self.is_draining() { Err(ClosingReason::ShuttingDown) } else { Ok((seat, others)) };
        }
    }

    fn cell(&self, id: RoomId) -> Arc<Cell> {
        let fresh = || {
            let bounds = RoomBounds::new(self.limits.queues, self.limits.room_bytes, self.budget.clone());
            Arc::new(Cell { room: Mutex::new(Some(Room::new(self.limits.peers))), bounds: Arc::new(bounds) })
        };
        lock(&self.rooms).entry(id).or_insert_with(fresh).clone()
    }

    /// Tells everybody to go and come back later; whoever joins from now on is refused.
    pub(crate) fn drain(&self, jitter_ms: u32) {
        self.draining.store(true, Ordering::SeqCst);
        let cells: Vec<_> = lock(&self.rooms).values().cloned().collect();
        let goodbye = wire(&control(&RelayToPeer::Drain { jitter_ms }));
        for cell in cells {
            for mailbox in lock(&cell.room).iter().flat_map(Room::everybody) {
                mailbox.put(|queues| {
                    queues.push_control(goodbye.clone());
                    queues.finish(ClosingReason::ShuttingDown);
                });
            }
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// How many rooms there are.
    pub(crate) fn count(&self) -> usize {
        lock(&self.rooms).len()
    }

    /// How many peers are in all rooms.
    pub(crate) fn peers(&self) -> usize {
        self.peers.load(Ordering::Relaxed)
    }

    /// Bytes of messages and datagrams that wait in all rooms.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.budget.used()
    }
}

/// Lets a newcomer into its room and tells the others.
fn seat(
    room: &mut Room<Arc<Mailbox>>,
    newcomer: Newcomer,
    mailbox: &Arc<Mailbox>,
) -> Result<(Slot, Vec<Arc<Member>>), RoomFull> {
    let member = room.join(newcomer, mailbox.clone())?;
    let news = wire(&control(&RelayToPeer::Joined(Member::clone(&member))));
    let mut others = Vec::with_capacity(room.len() - 1);
    for (other, reach) in room.others(member.slot) {
        others.push(other.clone());
        reach.put(|queues| queues.push_control(news.clone()));
    }
    Ok((member.slot, others))
}

impl Mailbox {
    fn new(bounds: Arc<RoomBounds>) -> Self {
        Self { queues: Mutex::new(Queues::new(bounds)), owner: AtomicWaker::new() }
    }

    /// Changes the queues and wakes their owner.
    fn put<T>(&self, change: impl FnOnce(&mut Queues) -> T) -> T {
        let result = change(&mut lock(&self.queues));
        self.owner.wake();
        result
    }

    /// The task to wake when something is put in. To be called before looking, else a wake-up is lost.
    pub(crate) fn register(&self, owner: &Waker) {
        self.owner.register(owner);
    }

    /// Moves frames into the outbox for as long as it has room. Says why the member is to be closed, if it is.
    pub(crate) fn fill(&self, outbox: &mut Outbox) -> Option<ClosingReason> {
        let mut queues = lock(&self.queues);
        while outbox.bytes() < OUTBOX_BYTES {
            let Some(frame) = queues.pop() else { break };
            outbox.push(frame);
        }
        queues.cut_for()
    }

    /// Tells the member something itself.
    pub(crate) fn tell(&self, word: &RelayToPeer) {
        let frame = wire(&control(word));
        self.put(|queues| queues.push_control(frame));
    }
}

impl Seat {
    /// The member's own slot.
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    /// The room's id.
    pub(crate) fn room(&self) -> RoomId {
        self.id
    }

    /// The member's own mailbox.
    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// Puts a message into a member's mailbox.
    pub(crate) fn send_message(&mut self, to: Slot, frame: Bytes) -> Result<(), DropReason> {
        let reach = self.reach(to).ok_or(DropReason::MessageGone)?;
        reach.put(|queues| queues.push_message(frame))
    }

    /// Puts a datagram into a member's mailbox; says how many older ones had to go for it.
    pub(crate) fn send_datagram(&mut self, to: Slot, frame: Bytes, now: Instant) -> Result<u64, DropReason> {
        let reach = self.reach(to).ok_or(DropReason::DatagramGone)?;
        reach.put(|queues| queues.push_datagram(frame, now))
    }

    fn reach(&mut self, to: Slot) -> Option<&Mailbox> {
        if self.last.as_ref().is_none_or(|(slot, _)| *slot != to) {
            let found = lock(&self.cell.room).as_ref().and_then(|room| room.route(to).cloned())?;
            self.last = Some((to, found));
        }
        self.last.as_ref().map(|(_, mailbox)| &**mailbox)
    }

    /// Replaces the member's presence and tells the others.
    pub(crate) fn publish(&self, sealed: Vec<u8>) {
        let slot = self.slot;
        let frame = wire(&control(&RelayToPeer::Presence { slot, sealed: sealed.clone() }));
        if let Some(room) = lock(&self.cell.room).as_mut() {
            room.publish(slot, sealed);
            for (_, reach) in room.others(slot) {
                reach.put(|queues| queues.push_presence(slot, frame.clone()));
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let frame = wire(&control(&RelayToPeer::Left(self.slot)));
        let mut guard = lock(&self.cell.room);
        let over = guard.as_mut().is_some_and(|room| {
            room.leave(self.slot);
            for (_, reach) in room.others(self.slot) {
                reach.put(|queues| queues.push_left(self.slot, frame.clone()));
            }
            room.is_empty()
        });
        if over {
            *guard = None;
        }
        drop(guard);
        lock(&self.mailbox.queues).close();
        self.rooms.peers.fetch_sub(1, Ordering::Relaxed);
        if over {
            let mut rooms = lock(&self.rooms.rooms);
            if rooms.get(&self.id).is_some_and(|current| Arc::ptr_eq(current, &self.cell)) {
                rooms.remove(&self.id);
            }
        }
    }
}
