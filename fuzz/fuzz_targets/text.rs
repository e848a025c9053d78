//! What people type: tokens, ids, modes, names, target expressions. No text panics; what parses prints and parses again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peerfleet_proto::{
    id::{InstanceId, PeerId},
    presence::{Mode, valid_name, valid_tag},
    target::{HostFacts, Target},
    token::Token,
};

fuzz_target!(|text: &str| {
    if let Ok(token) = Token::parse(text) {
        assert_eq!(Token::parse(&token.reveal()), Ok(token));
    }
    if let Ok(peer) = text.parse::<PeerId>() {
        assert_eq!(peer.to_string().parse(), Ok(peer));
    }
    let _ = text.parse::<InstanceId>();
    let _ = text.parse::<Mode>();
    let _ = (valid_name(text), valid_tag(text));
    if let Ok(target) = Target::parse(text) {
        let peer = PeerId::from_bytes([7; 32]);
        let tags = ["web".to_owned(), "eu".to_owned()];
        let host = HostFacts { peer, name: "web-1", tags: &tags, os: "linux", arch: "x86_64" };
        let printed = target.to_string();
        let again = Target::parse(&printed).expect("what was printed parses");
        assert_eq!(again.matches(&host), target.matches(&host));
        assert_eq!(again, target);
    }
});
