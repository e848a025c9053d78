//! The STUN codec and the machines that read STUN from strangers: nothing unsigned moves anything or is answered.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use peerfleet_fuzz::START;
use peerfleet_proto::{
    path::{
        Agent, Config, FilterTrial,
        check::{CheckKey, Role},
        reflexive::Reflexive,
    },
    stun::{IntegrityKey, Message},
};

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = Message::parse(data) {
        let _ = (message.class(), message.is_binding(), message.transaction(), message.username());
        let _ = (message.mapped_address(), message.check_number(), message.change_request(), message.unknown_required());
        let _ = message.has_fingerprint();
        assert!(!message.is_signed_by(&IntegrityKey::new(b"a key that nobody has")));
    }
    let stranger = SocketAddr::from(([192, 0, 2, 1], 4444));
    let key = CheckKey::agree(&[1; 32], &[2; 32]);
    let mut agent = Agent::new(Config { key, role: Role::Controlling, seed: [3; 32] }, *START);
    agent.handle_packet(stranger, data, *START);
    assert!(agent.poll_transmit().is_none() && agent.poll_event().is_none());
    let mut reflexive = Reflexive::new([4; 32], *START);
    reflexive.set_responders(&[SocketAddr::from(([192, 0, 2, 2], 8080))], *START);
    reflexive.handle_packet(stranger, data, *START);
    assert!(reflexive.addresses().is_empty());
    let mut trial = FilterTrial::new(SocketAddr::from(([192, 0, 2, 2], 8080)), 8081, [5; 32], *START);
    trial.handle_packet(stranger, data, *START);
    assert!(trial.outcome().is_none());
});
