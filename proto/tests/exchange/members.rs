//! Exchanges against members of the room that speak the protocol's own language, but not its rules.

use std::time::Duration;

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use peerfleet_proto::{
    exchange::{Address, AskFault, Dropped, Event},
    id::{InstanceId, JobId, RequestId},
    presence::Epoch,
    request::{Outcome, Request},
    sealed::{
        OpenKey, SealKey, Sealed, initiation,
        noise::{Handshake, Identity, Initiator, Responder},
        response,
    },
    wire::{
        decode, encode,
        message::{Message, Numbering},
        relay::{MESSAGE_HEADER_BYTES, PeerFrame},
    },
};
use x25519_dalek::StaticSecret;

use super::net::{Fate, LONG, Net, secret};

/// The machine that breaks the rules; its own exchange does nothing.
const FORGER: usize = 2;

#[test]
fn one_member_begins_so_many_sessions_at_once_and_others_as_before() {
    let mut net = quiet_net();
    let first = Message::Poll { id: id(1), number: 0, settled: 0 };
    for index in 0..100 {
        Forged { index, ..Forged::of(&net) }.begin(&mut net, &first);
    }
    assert_eq!(net.peers[1].exchange.dropped(), &[(Dropped::OverBudget, 84)].into());
    let asked = net.ask(0, 1);
    net.run_until_ended(asked);
    assert!(net.is_ok(asked));
    net.run_for(Duration::from_secs(2));
    assert!(Forged { index: 100, ..Forged::of(&net) }.begin(&mut net, &first).is_some(), "time gives some back");
}

#[test]
fn a_number_and_an_id_belong_together() {
    let mut net = quiet_net();
    let mut session = Session::begin(&mut net);
    assert_eq!(asked(&mut net), [id(1)]);
    for (message, fresh) in [
        (ask(&net, 2, 10), None),
        (ask(&net, 1, 11), None),
        (ask(&net, 1, 10), None),
        (ask(&net, 3, 12), Some(id(3))),
        (ask(&net, 4, u64::MAX), None),
    ] {
        session.say(&mut net, &message, None);
        assert_eq!(asked(&mut net), Vec::from_iter(fresh), "{message:?}");
    }
    assert_eq!(net.peers[1].exchange.dropped(), &[(Dropped::OutOfTurn, 2)].into());
}

#[test]
fn what_its_asker_has_settled_is_not_taken_any_more() {
    let mut net = quiet_net();
    let mut session = Session::begin(&mut net);
    let settling = Numbering { number: 20, settled: 20, born: net.peers[1].epoch };
    session.say(&mut net, &Message::Ask { id: id(2), numbering: settling, request: Request::Ping }, None);
    let below = ask(&net, 3, 15);
    session.say(&mut net, &below, None);
    assert_eq!(asked(&mut net), [id(1), id(2)]);
    assert!(session.heard(&net).contains(&Message::Forgotten { id: id(3) }));
}

#[test]
fn an_ask_of_an_unknown_epoch_is_not_taken() {
    let mut net = quiet_net();
    let numbering = Numbering { number: 1, settled: 0, born: Epoch([0xEE; 16]) };
    let stale = Message::Ask { id: id(1), numbering, request: Request::Ping };
    let session = Forged::of(&net).begin(&mut net, &stale).expect("a session");
    assert_eq!(asked(&mut net), []);
    assert_eq!(session.heard(&net), [Message::Forgotten { id: id(1) }]);
}

#[test]
fn a_share_is_taken_with_its_own_shared_part_alone() {
    let mut net = quiet_net();
    let mut session = Session::begin(&mut net);
    asked(&mut net);
    let key = [7; 32];
    let seal = |request| {
        let payload = Payload { msg: &encode(&request), aad: b"peerfleet multicast v1" };
        Aes256Gcm::new(&key.into()).encrypt(&[0; 12].into(), payload).expect("it is short")
    };
    // Both open under the key, which every recipient knows.
    let (shared, another) = (seal(Request::Ping), seal(Request::Jobs));
    let numbering = Numbering { number: 11, settled: 0, born: net.peers[1].epoch };
    let share = Message::AskShared { id: id(2), numbering, key, digest: *blake3::hash(&shared).as_bytes() };
    session.say(&mut net, &share, Some(&another));
    session.say(&mut net, &share, None);
    let whole = ask(&net, 3, 12);
    session.say(&mut net, &whole, Some(&shared));
    assert_eq!(asked(&mut net), []);
    session.say(&mut net, &share, Some(&shared));
    assert_eq!(asked(&mut net), [id(2)]);
}

#[test]
fn a_session_carries_its_initiators_asks_and_nothing_else() {
    let mut net = quiet_net();
    net.relay = Box::new(|_| Fate::Drop);
    let pending = net.ask(1, FORGER);
    net.relay = Box::new(|_| Fate::Deliver);
    let mut session = Session::begin(&mut net);
    asked(&mut net);
    for message in [
        Message::Accepted { id: pending },
        Message::Answer { id: pending, outcome: Outcome::Done },
        Message::Busy { id: pending },
        Message::Forgotten { id: pending },
    ] {
        session.say(&mut net, &message, None);
        assert_eq!(net.peers[1].exchange.poll_event(), None, "{message:?}");
    }
    assert_eq!(net.peers[1].exchange.dropped(), &[(Dropped::OutOfTurn, 4)].into());
}

#[test]
fn nobody_answers_for_another() {
    let mut net = quiet_net();
    net.relay = Box::new(|_| Fate::Drop);
    let asked_of_another = net.ask(0, 1);
    let forger = net.peers[FORGER].address;
    net.peers[0].exchange.ask(forger.instance, Request::Jobs, LONG, net.now, &mut net.rng);
    let first = net.peers[0].exchange.poll_transmit().expect("a first message");
    let mut session = Session::answer(&net, &first[MESSAGE_HEADER_BYTES..]);
    let noise = std::mem::take(&mut session.answer);
    let (slot, now) = (net.peers[FORGER].slot, net.now);
    net.peers[0].exchange.handle_message(slot, &noise, now, &mut net.rng);
    for message in [
        Message::Accepted { id: asked_of_another },
        Message::Answer { id: asked_of_another, outcome: Outcome::Done },
        Message::Busy { id: asked_of_another },
        ask(&net, 9, 1),
    ] {
        let sealed = session.seal.seal(&encode(&message)).expect("a fresh key");
        net.peers[0].exchange.handle_message(slot, &sealed, now, &mut net.rng);
        assert_eq!(net.peers[0].exchange.poll_event(), None, "{message:?}");
    }
    assert_eq!(net.peers[0].exchange.dropped(), &[(Dropped::OutOfTurn, 4)].into());
    net.run_until_ended(asked_of_another);
    assert_eq!(net.ends[&asked_of_another], Err(AskFault::Lost));
}

#[test]
fn nobody_asks_in_anothers_name() {
    let mut net = quiet_net();
    let victim = net.peers[0].address;
    let other = Address { instance: InstanceId::from_bytes([0xAA; 16]), ..net.peers[FORGER].address };
    let host = net.peers[1].address;
    let forged = Forged::of(&net);
    let first = ask(&net, 1, 1);
    for lie in [
        Forged { claims: victim, ..forged },
        Forged { inside: victim.instance, ..forged },
        Forged { claims: other, inside: other.instance, ..forged },
        Forged { to: victim, ..forged },
        Forged { psk: [0; 32], ..forged },
        Forged { room: [0; 32], ..forged },
        Forged { epoch: Epoch([0; 16]), ..forged },
        Forged { proved_index: 99, ..forged },
    ] {
        assert!(lie.begin(&mut net, &first).is_none());
    }
    assert_eq!(net.peers[1].exchange.dropped(), &[(Dropped::Forged, 8)].into());
    assert_eq!(net.peers[1].address, host);
    assert!(forged.begin(&mut net, &first).is_some());
    assert_eq!(asked(&mut net), [id(1)]);
}

/// Everything that a first message says of itself.
#[derive(Clone, Copy)]
struct Forged {
    claims: Address,
    inside: InstanceId,
    to: Address,
    room: [u8; 32],
    psk: [u8; 32],
    epoch: Epoch,
    index: u32,
    /// Another index under the seal than in the clear, unless 0.
    proved_index: u32,
}

/// A session with the host, from the forger's side.
struct Session {
    seal: SealKey,
    open: OpenKey,
    /// What it says to open the session, where the forger was asked.
    answer: Vec<u8>,
    index: u32,
    /// How many frames were sent before it began.
    since: usize,
}

impl Forged {
    /// The truth.
    fn of(net: &Net) -> Self {
        let (claims, host) = (net.peers[FORGER].address, &net.peers[1]);
        Self {
            claims,
            inside: claims.instance,
            to: host.address,
            room: [5; 32],
            psk: [6; 32],
            epoch: host.epoch,
            index: 77,
            proved_index: 0,
        }
    }

    /// Begins a session with the host; `None` if the host does not answer.
    fn begin(&self, net: &mut Net, first: &Message) -> Option<Session> {
        let identity = Identity::new(secret(FORGER));
        let proved_index = if self.proved_index == 0 { self.index } else { self.proved_index };
        let prologue = prologue(&self.room, self.claims, self.to, self.epoch, proved_index);
        let handshake = Handshake { prologue: &prologue, psk: &self.psk, identity: &identity };
        let payload = [self.inside.as_bytes(), &encode(first)[..]].concat();
        let ephemeral = StaticSecret::random_from_rng(&mut net.rng);
        let begun = Initiator::begin(&handshake, ephemeral, net.peers[1].address.peer.as_bytes(), &payload);
        let (initiator, noise) = begun.expect("a key of full order");
        let (slot, now, since) = (net.peers[FORGER].slot, net.now, net.sent.len());
        net.peers[1].exchange.handle_message(slot, &initiation(self.index, &noise), now, &mut net.rng);
        let frame = net.peers[1].exchange.poll_transmit()?;
        while let Some(frame) = net.peers[1].exchange.poll_transmit() {
            net.sent.push((1, frame));
        }
        let Ok(Sealed::Response { receiver, sender, noise }) = Sealed::split(&frame[MESSAGE_HEADER_BYTES..]) else {
            panic!("the first word is the answer")
        };
        assert_eq!(receiver, self.index);
        let (payload, keys) = initiator.finish(noise).expect("an honest answer");
        assert_eq!(payload, sender.to_be_bytes());
        let (seal, open) = (SealKey::new(&keys.forward, sender), OpenKey::new(&keys.backward));
        Some(Session { seal, open, answer: Vec::new(), index: self.index, since })
    }
}

impl Session {
    /// A session with the host, begun with the ask 1 under the number 10.
    fn begin(net: &mut Net) -> Self {
        let first = ask(net, 1, 10);
        Forged::of(net).begin(net, &first).expect("the host answers")
    }

    /// The session that a first message for the forger begins.
    fn answer(net: &Net, first: &[u8]) -> Self {
        let Ok(Sealed::Initiation { sender, noise }) = Sealed::split(first) else { panic!("no first message") };
        let (asker, me) = (net.peers[0].address, &net.peers[FORGER]);
        let identity = Identity::new(secret(FORGER));
        let prologue = prologue(&[5; 32], asker, me.address, me.epoch, sender);
        let handshake = Handshake { prologue: &prologue, psk: &[6; 32], identity: &identity };
        let (responder, payload) = Responder::read(&handshake, noise).expect("an honest first message");
        assert_eq!(&payload[..16], asker.instance.as_bytes());
        let (index, ephemeral) = (5_u32, StaticSecret::from([3; 32]));
        let (noise, keys) = responder.answer(&ephemeral, &index.to_be_bytes()).expect("keys of full order");
        Self {
            seal: SealKey::new(&keys.backward, sender),
            open: OpenKey::new(&keys.forward),
            answer: response(sender, index, &noise),
            index,
            since: 0,
        }
    }

    fn say(&mut self, net: &mut Net, message: &Message, shared: Option<&[u8]>) {
        let sealed = self.seal.seal(&encode(message)).expect("a fresh key");
        let (slot, now) = (net.peers[FORGER].slot, net.now);
        let host = &mut net.peers[1].exchange;
        match shared {
            None => host.handle_message(slot, &sealed, now, &mut net.rng),
            Some(shared) => host.handle_share(slot, &sealed, shared, now, &mut net.rng),
        }
        while let Some(frame) = net.peers[1].exchange.poll_transmit() {
            net.sent.push((1, frame));
        }
    }

    /// What the host said in this session.
    fn heard(mut self, net: &Net) -> Vec<Message> {
        let mut heard = Vec::new();
        for (_, frame) in &net.sent[self.since..] {
            let Ok(PeerFrame::Message { to, .. }) = PeerFrame::split(frame) else { continue };
            match Sealed::split(&frame[MESSAGE_HEADER_BYTES..]) {
                Ok(Sealed::Transport { receiver, counter, header, ciphertext })
                    if receiver == self.index && to == net.peers[FORGER].slot =>
                {
                    let words = self.open.open(counter, header, ciphertext).expect("the host's own");
                    heard.push(decode(&words, 1 << 16).expect("a message"));
                }
                _ => {}
            }
        }
        heard
    }
}

/// What both sides of a session agree on, as PROTOCOL.md has it.
fn prologue(room: &[u8; 32], initiator: Address, responder: Address, epoch: Epoch, index: u32) -> Vec<u8> {
    [
        &b"peerfleet sealed session v1"[..],
        room,
        initiator.peer.as_bytes(),
        initiator.instance.as_bytes(),
        responder.peer.as_bytes(),
        responder.instance.as_bytes(),
        &epoch.0,
        &index.to_be_bytes(),
    ]
    .concat()
}

fn quiet_net() -> Net {
    Net::new(3)
}

fn id(number: u8) -> RequestId {
    RequestId::from_bytes([number; 16])
}

fn ask(net: &Net, name: u8, number: u64) -> Message {
    let numbering = Numbering { number, settled: 0, born: net.peers[1].epoch };
    Message::Ask { id: id(name), numbering, request: Request::Cancel(JobId::from_bytes([name; 16])) }
}

/// The requests that the host was told of since this was last looked at.
fn asked(net: &mut Net) -> Vec<RequestId> {
    let events = std::iter::from_fn(|| net.peers[1].exchange.poll_event());
    events.filter_map(|event| if let Event::Asked { id, .. } = event { Some(id) } else { None }).collect()
}
