//! Sealed bytes from a stranger, and changes to honest ones: nothing that was not sealed for this instance is delivered.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use peerfleet_fuzz::{START, Seeded};
use peerfleet_proto::{
    exchange::{Address, Config, Event, Exchange},
    id::{InstanceId, PeerId, RoomId, Slot},
    request::Request,
    wire::relay::{MESSAGE_HEADER_BYTES, RefusalReason, Refused},
};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

#[derive(Debug, Arbitrary)]
enum Step {
    Ask {
        from: bool,
    },
    /// Deliver a captured message, changed or not.
    Deliver {
        which: u8,
        flip: Option<u16>,
        cut: Option<u16>,
        to: bool,
        source: bool,
    },
    Garbage {
        to: bool,
        bytes: Vec<u8>,
        shared: Option<Vec<u8>>,
    },
    Refuse {
        to: bool,
        tag: u32,
        full: bool,
    },
    Leave {
        which: bool,
    },
    Join {
        which: bool,
    },
    Wait {
        milliseconds: u16,
    },
}

fuzz_target!(|steps: Vec<Step>| {
    let mut pair = Pair::new();
    for step in steps.into_iter().take(64) {
        pair.play(step);
        pair.drain();
    }
});

struct Pair {
    ends: [Exchange; 2],
    captured: Vec<(usize, Vec<u8>)>,
    asked: Vec<(usize, peerfleet_proto::id::RequestId)>,
    handled: Vec<peerfleet_proto::id::RequestId>,
    now: std::time::Instant,
    rng: Seeded,
}

impl Pair {
    fn new() -> Self {
        let mut rng = Seeded(1);
        let ends = [0, 1].map(|index| {
            let config = Config {
                identity: secret(index),
                me: address(index),
                room: RoomId::from_bytes([1; 32]),
                psk: Zeroizing::new([2; 32]),
            };
            Exchange::new(config, &mut rng, *START)
        });
        let mut pair = Self { ends, captured: Vec::new(), asked: Vec::new(), handled: Vec::new(), now: *START, rng };
        pair.introduce(0);
        pair.introduce(1);
        pair
    }

    fn introduce(&mut self, index: usize) {
        let other = 1 - index;
        let epoch = self.ends[other].epoch();
        self.ends[index].member_joined(address(other), Slot(other as u32), epoch, self.now, &mut self.rng);
    }

    fn play(&mut self, step: Step) {
        match step {
            Step::Ask { from } => {
                let (from, to) = (usize::from(from), usize::from(!from));
                let instance = address(to).instance;
                let deadline = Duration::from_secs(60);
                let id = self.ends[from].ask(instance, Request::Ping, deadline, self.now, &mut self.rng);
                self.asked.push((to, id));
            }
            Step::Deliver { which, flip, cut, to, source } => self.deliver(which, flip, cut, to.into(), source),
            Step::Garbage { to, bytes, shared } => {
                let (end, from) = (&mut self.ends[usize::from(to)], Slot(u32::from(!to)));
                match shared {
                    Some(shared) => end.handle_share(from, &bytes, &shared, self.now, &mut self.rng),
                    None => end.handle_message(from, &bytes, self.now, &mut self.rng),
                }
            }
            Step::Refuse { to, tag, full } => {
                let reason = if full { RefusalReason::QueueFull } else { RefusalReason::Gone };
                let refused = Refused { slot: Slot(u32::from(!to)), tag, reason };
                self.ends[usize::from(to)].handle_refused(refused, self.now, &mut self.rng);
            }
            Step::Leave { which } => {
                let gone = address(usize::from(!which)).instance;
                self.ends[usize::from(which)].member_left(gone, self.now);
            }
            Step::Join { which } => self.introduce(which.into()),
            Step::Wait { milliseconds } => {
                self.now += Duration::from_millis(milliseconds.into());
                for end in &mut self.ends {
                    end.handle_timeout(self.now, &mut self.rng);
                }
            }
        }
    }

    fn deliver(&mut self, which: u8, flip: Option<u16>, cut: Option<u16>, to: usize, source: bool) {
        let Some((_, sealed)) = self.captured.get(usize::from(which)) else { return };
        let mut sealed = sealed.clone();
        if let Some(flip) = flip.map(usize::from).filter(|flip| flip / 8 < sealed.len()) {
            sealed[flip / 8] ^= 1 << (flip % 8);
        }
        if let Some(cut) = cut.map(usize::from).filter(|cut| *cut < sealed.len()) {
            sealed.truncate(cut);
        }
        self.ends[to].handle_message(Slot(source.into()), &sealed, self.now, &mut self.rng);
    }

    fn drain(&mut self) {
        for index in 0..2 {
            while let Some(frame) = self.ends[index].poll_transmit() {
                self.captured.push((index, frame[MESSAGE_HEADER_BYTES..].to_vec()));
            }
            while let Some(event) = self.ends[index].poll_event() {
                if let Event::Asked { caller, id, request } = event {
                    assert!(self.asked.contains(&(index, id)), "a request that was not asked of this host");
                    assert!(!self.handled.contains(&id), "a request was done twice");
                    assert_eq!((caller, request), (address(1 - index), Request::Ping));
                    self.handled.push(id);
                    let outcome = peerfleet_proto::request::Outcome::Done;
                    self.ends[index].answer(caller.instance, id, outcome, self.now);
                }
            }
        }
    }
}

fn secret(index: usize) -> StaticSecret {
    StaticSecret::from([index as u8 + 10; 32])
}

fn address(index: usize) -> Address {
    let peer = PeerId::from_bytes(PublicKey::from(&secret(index)).to_bytes());
    Address { peer, instance: InstanceId::from_bytes([index as u8; 16]) }
}
