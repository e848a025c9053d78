//! Several exchanges, the hosts behind them, and the relay between them, in virtual time.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{
    exchange::{Address, AskFault, Config, Event, Exchange},
    id::{InstanceId, JobId, PeerId, RequestId, RoomId, Slot},
    presence::Epoch,
    request::{Failure, FailureKind, Outcome, Request},
    wire::relay::{MESSAGE_HEADER_BYTES, PeerFrame, RefusalReason, Refused},
};
use x25519_dalek::{PublicKey, StaticSecret};

use super::common::Hashes;

/// Time that a frame takes from one peer to another.
pub(crate) const LATENCY: Duration = Duration::from_millis(20);

/// Longer than any test waits.
pub(crate) const LONG: Duration = Duration::from_secs(30 * 86_400);

/// What the relay makes of one frame for one receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Deliver,
    Drop,
    /// Deliver it so often, each later than the one before.
    Repeat(u8),
    /// Deliver it after so many milliseconds.
    Delay(u16),
    /// Keep it until [`Net::release`].
    Hold,
    /// Deliver it, and keep a copy until [`Net::release`].
    Copy,
    /// Deliver it to another peer.
    Redirect(u8),
    /// Deliver it as if another peer had sent it.
    Misattribute(u8),
    Truncate(u16),
    Flip(u16),
    /// Deliver it with the shared part of another multicast.
    Swap,
    /// Deliver a share as a message, or a message as a share.
    Recast,
    Refuse(RefusalReason),
}

/// A frame on its way to one peer.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) sealed: Bytes,
    pub(crate) shared: Option<Bytes>,
}

/// What the relay does with each packet.
type Relay = Box<dyn FnMut(&Packet) -> Fate>;

/// One machine: its process now, and what it works on.
pub(crate) struct Peer {
    pub(crate) exchange: Exchange,
    pub(crate) address: Address,
    pub(crate) slot: Slot,
    pub(crate) epoch: Epoch,
    /// Whether the relay has it in the room.
    pub(crate) is_present: bool,
    /// How long its host works on a request.
    pub(crate) works_for: Duration,
    /// Bytes that its outcomes are padded with.
    pub(crate) padding: usize,
    /// By how much its clock is behind, as it stood still while the machine slept.
    pub(crate) slept: Duration,
    is_asleep: bool,
}

/// Everything.
pub(crate) struct Net {
    pub(crate) now: Instant,
    pub(crate) rng: Hashes,
    pub(crate) peers: Vec<Peer>,
    pub(crate) relay: Relay,
    /// Every frame that a peer sent, as `(sender, frame)`.
    pub(crate) sent: Vec<(usize, Bytes)>,
    /// Where each request was handled: the instance, and the number that it carried.
    pub(crate) handled: BTreeMap<RequestId, Vec<(InstanceId, u64)>>,
    /// Whom each ask was meant for, and the number that it carried.
    pub(crate) meant: BTreeMap<RequestId, (InstanceId, u64)>,
    pub(crate) accepted: Vec<RequestId>,
    pub(crate) ends: BTreeMap<RequestId, Result<Outcome, AskFault>>,
    /// Asks whose asker was restarted.
    pub(crate) orphaned: Vec<RequestId>,
    /// Whether a peer's new epoch reaches the others.
    pub(crate) tells_epochs: bool,
    in_flight: BTreeMap<(Instant, u64), Packet>,
    held: Vec<Packet>,
    working: BTreeMap<(Instant, u64), (usize, Address, RequestId, u64)>,
    last_shared: Option<Bytes>,
    /// Every packet, with whom it was for.
    record: Vec<((usize, InstanceId), Packet)>,
    sequence: u64,
    next_slot: u32,
    next_instance: u64,
    next_number: u64,
}

impl Net {
    /// So many peers that know each other, with an honest relay.
    #[expect(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
    pub(crate) fn new(count: usize) -> Self {
        let mut net = Self {
            now: Instant::now(),
            rng: Hashes(7),
            peers: Vec::new(),
            relay: Box::new(|_| Fate::Deliver),
            sent: Vec::new(),
            handled: BTreeMap::new(),
            meant: BTreeMap::new(),
            accepted: Vec::new(),
            ends: BTreeMap::new(),
            orphaned: Vec::new(),
            tells_epochs: true,
            in_flight: BTreeMap::new(),
            held: Vec::new(),
            working: BTreeMap::new(),
            last_shared: None,
            record: Vec::new(),
            sequence: 0,
            next_slot: 100,
            next_instance: 0,
            next_number: 0,
        };
        for index in 0..count {
            let peer = net.start(index);
            net.peers.push(peer);
        }
        net.introduce();
        net
    }

    /// A new process of this machine.
    fn start(&mut self, machine: usize) -> Peer {
        self.next_instance += 1;
        let mut instance = [0; 16];
        instance[..8].copy_from_slice(&self.next_instance.to_be_bytes());
        let address = Address { peer: peer_id(machine), instance: InstanceId::from_bytes(instance) };
        let config =
            Config { identity: secret(machine), me: address, room: RoomId::from_bytes([5; 32]), psk: [6; 32].into() };
        let slept = self.peers.get(machine).map_or(Duration::ZERO, |peer| peer.slept);
        let exchange = Exchange::new(config, &mut self.rng, self.now - slept);
        let epoch = exchange.epoch();
        Peer {
            exchange,
            address,
            slot: self.draw_slot(),
            epoch,
            is_present: true,
            works_for: Duration::ZERO,
            padding: 0,
            slept: Duration::ZERO,
            is_asleep: false,
        }
    }

    fn draw_slot(&mut self) -> Slot {
        self.next_slot += 1;
        Slot(self.next_slot)
    }

    /// Tells every peer in the room who else is.
    pub(crate) fn introduce(&mut self) {
        let members: Vec<_> = self
            .peers
            .iter()
            .filter(|peer| peer.is_present)
            .map(|peer| (peer.address, peer.slot, peer.epoch))
            .collect();
        for peer in self.peers.iter_mut().filter(|peer| peer.is_present) {
            for (address, slot, epoch) in &members {
                let now = self.now - peer.slept;
                peer.exchange.member_joined(*address, *slot, *epoch, now, &mut self.rng);
            }
        }
        self.settle();
    }

    /// The relay loses everybody; all come back under other slots, after this time.
    pub(crate) fn restart_relay(&mut self, after: Duration) {
        self.in_flight.clear();
        self.peers.iter_mut().for_each(|peer| peer.exchange.uplink_lost());
        self.run_for(after);
        for index in 0..self.peers.len() {
            self.peers[index].slot = self.draw_slot();
        }
        self.introduce();
    }

    /// The relay says that this peer left.
    pub(crate) fn leave(&mut self, index: usize) {
        self.peers[index].is_present = false;
        self.peers[index].exchange.uplink_lost();
        let left = self.peers[index].address.instance;
        for (_, peer) in self.peers.iter_mut().enumerate().filter(|(other, _)| *other != index) {
            peer.exchange.member_left(left, self.now - peer.slept);
        }
        self.settle();
    }

    /// This peer comes back into the room, as the same process.
    pub(crate) fn come_back(&mut self, index: usize) {
        self.peers[index].slot = self.draw_slot();
        self.peers[index].is_present = true;
        self.introduce();
    }

    /// This peer's machine sleeps for so long, in which its clock stands still; then it comes back.
    pub(crate) fn sleep(&mut self, index: usize, time: Duration) {
        self.leave(index);
        self.peers[index].is_asleep = true;
        // What it works on stands still too.
        let working = std::mem::take(&mut self.working).into_iter();
        let later = working.map(|((at, order), work)| ((if work.0 == index { at + time } else { at }, order), work));
        self.working = later.collect();
        self.run_for(time);
        self.peers[index].is_asleep = false;
        self.peers[index].slept += time;
        self.come_back(index);
    }

    /// The process of this machine ends, and another begins.
    pub(crate) fn restart_peer(&mut self, index: usize) {
        self.leave(index);
        let mine = |id: &RequestId| self.meant_by(*id) == index;
        let orphaned: Vec<_> =
            self.meant.keys().filter(|id| !self.ends.contains_key(*id) && mine(id)).copied().collect();
        self.orphaned.extend(orphaned);
        self.working.retain(|_, (host, ..)| *host != index);
        let works_for = self.peers[index].works_for;
        let slept = self.peers[index].slept;
        self.peers[index] = Peer { works_for, slept, ..self.start(index) };
        self.introduce();
    }

    /// The asker is in the lowest byte of each number.
    fn meant_by(&self, id: RequestId) -> usize {
        (self.meant[&id].1 % 256) as usize
    }

    pub(crate) fn ask(&mut self, from: usize, to: usize) -> RequestId {
        let (number, target) = (self.draw_number(from), self.peers[to].address.instance);
        let Peer { exchange, slept, .. } = &mut self.peers[from];
        let id = exchange.ask(target, request(number), LONG, self.now - *slept, &mut self.rng);
        self.meant.insert(id, (target, number));
        self.settle();
        id
    }

    pub(crate) fn ask_many(&mut self, from: usize, to: &[usize]) -> Vec<RequestId> {
        let number = self.draw_number(from);
        let targets: Vec<_> = to.iter().map(|to| self.peers[*to].address.instance).collect();
        let Peer { exchange, slept, .. } = &mut self.peers[from];
        let asked = exchange.ask_many(&targets, request(number), LONG, self.now - *slept, &mut self.rng);
        self.meant.extend(asked.iter().map(|(target, id)| (*id, (*target, number))));
        self.settle();
        asked.into_iter().map(|(_, id)| id).collect()
    }

    fn draw_number(&mut self, from: usize) -> u64 {
        self.next_number += 1;
        self.next_number * 256 + from as u64
    }

    /// Every frame that was ever sent to a peer that is still there, ready to be delivered again.
    pub(crate) fn recorded(&self) -> Vec<Packet> {
        self.record
            .iter()
            .filter(|(to, _)| self.peers[to.0].address.instance == to.1)
            .map(|(_, packet)| packet.clone())
            .collect()
    }

    /// Lets go of every frame that was held back.
    pub(crate) fn release(&mut self) {
        for packet in std::mem::take(&mut self.held) {
            self.put(packet, Duration::ZERO);
        }
        self.run_for(LATENCY);
    }

    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
    }

    /// Runs until this ask ended, for a day at most.
    pub(crate) fn run_until_ended(&mut self, id: RequestId) {
        let end = self.now + Duration::from_secs(86_400);
        while !self.ends.contains_key(&id) && self.step(end) {}
    }

    /// Goes to the next thing that happens, or to the end.
    fn step(&mut self, end: Instant) -> bool {
        let awake = self.peers.iter().filter(|peer| !peer.is_asleep);
        let timers = awake.map(|peer| peer.exchange.poll_timeout() + peer.slept);
        let packets = self.in_flight.keys().next().map(|(at, _)| *at);
        let works = self.working.keys().next().map(|(at, _)| *at);
        let next = timers.chain(packets).chain(works).min().unwrap_or(end);
        if next > end {
            self.now = self.now.max(end);
            return false;
        }
        self.now = self.now.max(next);
        for peer in self.peers.iter_mut().filter(|peer| !peer.is_asleep) {
            let now = self.now - peer.slept;
            if peer.exchange.poll_timeout() <= now {
                peer.exchange.handle_timeout(now, &mut self.rng);
            }
        }
        while let Some(entry) = self.working.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (host, caller, id, number) = entry.remove();
            let Peer { exchange, address, padding, slept, .. } = &mut self.peers[host];
            let outcome = outcome(address.instance, number, *padding);
            exchange.answer(caller.instance, id, outcome, self.now - *slept);
        }
        while let Some(entry) = self.in_flight.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let packet = entry.remove();
            self.arrive(&packet);
        }
        self.settle();
        true
    }

    /// Takes everything that the exchanges want sent and said.
    pub(crate) fn settle(&mut self) {
        for index in 0..self.peers.len() {
            while let Some(event) = self.peers[index].exchange.poll_event() {
                self.handle_event(index, event);
            }
            while let Some(frame) = self.peers[index].exchange.poll_transmit() {
                self.sent.push((index, frame.clone()));
                self.route(index, &frame);
            }
        }
    }

    fn handle_event(&mut self, index: usize, event: Event) {
        match event {
            Event::Asked { caller, id, request } => {
                let Request::Cancel(job) = request else { panic!("nobody asked {request:?}") };
                let number = u64::from_be_bytes(job.as_bytes()[..8].try_into().expect("eight bytes"));
                self.handled.entry(id).or_default().push((self.peers[index].address.instance, number));
                self.sequence += 1;
                let key = (self.now + self.peers[index].works_for, self.sequence);
                self.working.insert(key, (index, caller, id, number));
            }
            Event::Accepted { id } => self.accepted.push(id),
            Event::Answered { id, outcome } => self.end(id, Ok(outcome)),
            Event::Failed { id, fault } => self.end(id, Err(fault)),
            Event::EpochChanged(epoch) => {
                self.peers[index].epoch = epoch;
                if self.tells_epochs {
                    self.introduce();
                }
            }
        }
    }

    fn end(&mut self, id: RequestId, end: Result<Outcome, AskFault>) {
        let before = self.ends.insert(id, end);
        assert_eq!(before, None, "an ask ends once");
    }

    fn route(&mut self, from: usize, frame: &Bytes) {
        if !self.peers[from].is_present {
            return;
        }
        match PeerFrame::split(frame).expect("peers send what reads") {
            PeerFrame::Message { to, tag } => {
                self.pass(from, to, tag, frame.slice(MESSAGE_HEADER_BYTES..), None);
            }
            PeerFrame::Multicast(multicast) => {
                let shared = Bytes::copy_from_slice(multicast.shared);
                for (slot, part) in multicast.parts() {
                    self.pass(from, slot, multicast.tag, Bytes::copy_from_slice(part), Some(shared.clone()));
                }
                self.last_shared = Some(shared);
            }
            PeerFrame::Control(_) | PeerFrame::Datagram { .. } => panic!("an exchange sends messages"),
        }
    }

    fn pass(&mut self, from: usize, to: Slot, tag: u32, sealed: Bytes, shared: Option<Bytes>) {
        let Some(receiver) = self.peers.iter().position(|peer| peer.slot == to && peer.is_present) else {
            return self.refuse(from, Refused { slot: to, tag, reason: RefusalReason::Gone });
        };
        let mut packet = Packet { from, to: receiver, sealed, shared };
        self.record.push(((receiver, self.peers[receiver].address.instance), packet.clone()));
        let count = self.peers.len();
        match (self.relay)(&packet) {
            Fate::Deliver => {}
            Fate::Drop => return,
            Fate::Repeat(times) => {
                for time in 1..u32::from(times) {
                    self.put(packet.clone(), LATENCY * time);
                }
            }
            Fate::Delay(milliseconds) => return self.put(packet, Duration::from_millis(milliseconds.into())),
            Fate::Hold => return self.held.push(packet),
            Fate::Copy => self.held.push(packet.clone()),
            Fate::Redirect(by) => packet.to = (packet.to + usize::from(by)) % count,
            Fate::Misattribute(by) => packet.from = (packet.from + usize::from(by)) % count,
            Fate::Truncate(at) => packet.sealed.truncate(usize::from(at) % packet.sealed.len()),
            Fate::Flip(bit) => packet.sealed = flipped(&packet.sealed, usize::from(bit)),
            Fate::Swap => packet.shared = packet.shared.and(self.last_shared.clone()),
            Fate::Recast => packet.shared = if packet.shared.is_some() { None } else { self.last_shared.clone() },
            Fate::Refuse(reason) => return self.refuse(from, Refused { slot: to, tag, reason }),
        }
        self.put(packet, LATENCY);
    }

    pub(crate) fn put(&mut self, packet: Packet, after: Duration) {
        self.sequence += 1;
        self.in_flight.insert((self.now + after, self.sequence), packet);
    }

    fn refuse(&mut self, sender: usize, refused: Refused) {
        let Peer { exchange, slept, .. } = &mut self.peers[sender];
        exchange.handle_refused(refused, self.now - *slept, &mut self.rng);
    }

    fn arrive(&mut self, packet: &Packet) {
        let from = self.peers[packet.from].slot;
        let Peer { exchange, is_present: true, slept, .. } = &mut self.peers[packet.to] else { return };
        let now = self.now - *slept;
        match &packet.shared {
            None => exchange.handle_message(from, &packet.sealed, now, &mut self.rng),
            Some(shared) => exchange.handle_share(from, &packet.sealed, shared, now, &mut self.rng),
        }
    }

    /// Everything that must hold whatever the relay does.
    pub(crate) fn assert_sound(&self) {
        for (id, handled) in &self.handled {
            assert_eq!(handled.len(), 1, "a request was handled more than once");
            assert_eq!(handled[0], self.meant[id], "a request was handled by another, or is another");
        }
        for (id, end) in &self.ends {
            if let Err(AskFault::Unreachable | AskFault::Busy | AskFault::TooLarge) = end {
                assert!(!self.handled.contains_key(id), "{end:?} was said of a request that was handled");
            }
            let (target, number) = self.meant[id];
            if let Ok(end) = end {
                assert!(self.handled.contains_key(id), "an outcome of what nobody did");
                let Outcome::Failed(Failure { what, .. }) = end else { panic!("nobody said {end:?}") };
                assert_eq!(*what, words(target, number), "the outcome of something else");
            }
        }
    }

    pub(crate) fn assert_all_ended(&self) {
        for id in self.meant.keys().filter(|id| !self.orphaned.contains(id)) {
            assert!(self.ends.contains_key(id), "an ask never ended");
        }
    }

    pub(crate) fn is_ok(&self, id: RequestId) -> bool {
        matches!(self.ends.get(&id), Some(Ok(_)))
    }
}

/// A relay that does to the packets in turn what the list says, over and over.
pub(crate) fn scripted(fates: Vec<Fate>) -> Relay {
    let mut fates: VecDeque<Fate> = fates.into();
    Box::new(move |_| {
        fates.rotate_left(1);
        fates.back().copied().unwrap_or(Fate::Deliver)
    })
}

pub(crate) fn flipped(bytes: &Bytes, bit: usize) -> Bytes {
    let mut bytes = bytes.to_vec();
    let bit = bit % (bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes.into()
}

pub(crate) fn secret(machine: usize) -> StaticSecret {
    let mut bytes = [0x5A; 32];
    bytes[..8].copy_from_slice(&machine.to_be_bytes());
    StaticSecret::from(bytes)
}

pub(crate) fn peer_id(machine: usize) -> PeerId {
    PeerId::from_bytes(PublicKey::from(&secret(machine)).to_bytes())
}

fn request(number: u64) -> Request {
    let mut job = [0; 16];
    job[..8].copy_from_slice(&number.to_be_bytes());
    Request::Cancel(JobId::from_bytes(job))
}

fn outcome(host: InstanceId, number: u64, padding: usize) -> Outcome {
    Outcome::Failed(Failure::new(FailureKind::Busy, words(host, number), "x".repeat(padding)))
}

fn words(host: InstanceId, number: u64) -> String {
    format!("{host} did {number}")
}
