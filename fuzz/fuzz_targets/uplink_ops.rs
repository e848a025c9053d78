//! A relay that says anything at any time: the roster stays bounded and consistent, and every member ends once.
#![no_main]

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
    time::Duration,
};

use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use peerfleet_fuzz::{START, Seeded};
use peerfleet_proto::{
    id::InstanceId,
    limits::MAX_FRAME_BYTES,
    token::{RoomKeys, Token},
    uplink::{Credentials, Event, Uplink},
    wire::{decode, relay::RelayToPeer},
};
use x25519_dalek::StaticSecret;

static KEYS: LazyLock<Arc<RoomKeys>> =
    LazyLock::new(|| Arc::new(RoomKeys::derive(&Token::generate(&mut Seeded(1)), "dev")));

fuzz_target!(|data: &[u8]| {
    let instance = InstanceId::from_bytes([1; 16]);
    let credentials = Credentials { keys: KEYS.clone(), identity: StaticSecret::from([7; 32]), instance };
    let (mut rng, mut now) = (Seeded(2), *START);
    let mut uplink = Uplink::new(credentials, vec![1], now);
    let mut present = BTreeSet::new();
    let mut input = Unstructured::new(data);
    while let (false, Ok(step)) = (input.is_empty(), input.arbitrary::<u8>()) {
        match step % 6 {
            0 => uplink.handle_connected(now),
            1 => uplink.handle_disconnected(now, &mut rng),
            2 => {
                now += Duration::from_millis(input.arbitrary::<u16>().unwrap_or_default().into());
                uplink.handle_timeout(now, &mut rng);
            }
            3 => uplink.handle_heard(now),
            _ => {
                let len = usize::from(input.arbitrary::<u8>().unwrap_or_default());
                let Ok(bytes) = input.bytes(len.min(input.len())) else { break };
                if let Ok(word) = decode::<RelayToPeer>(bytes, MAX_FRAME_BYTES) {
                    uplink.handle_control(word, now, &mut rng);
                }
            }
        }
        while uplink.poll_transmit().is_some() {}
        while let Some(event) = uplink.poll_event() {
            match event {
                Event::MemberJoined(member) => assert!(present.insert(member.instance), "joined twice"),
                Event::MemberLeft(member) => assert!(present.remove(&member.instance), "left without joining"),
                Event::MemberMoved(member) | Event::PresenceChanged(member) => {
                    assert!(present.contains(&member.instance), "changed without joining");
                }
                _ => {}
            }
        }
    }
});
