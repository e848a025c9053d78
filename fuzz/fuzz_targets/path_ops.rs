//! Two path machines and a network that does anything: no panic, bounded queues, and no path to where no check came from.
#![no_main]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use peerfleet_fuzz::START;
use peerfleet_proto::{
    path::{
        Agent, Config,
        check::{CheckKey, Role},
    },
    request::link::{Candidate, CandidateKind},
};

#[derive(Debug, Arbitrary)]
enum Step {
    Local {
        end: bool,
        addrs: Vec<(u8, u16)>,
    },
    Remote {
        end: bool,
        addrs: Vec<(u8, u16)>,
    },
    /// Deliver a captured datagram, changed or not, from any address.
    Deliver {
        to: bool,
        which: u8,
        flip: Option<u16>,
        from: (u8, u16),
    },
    Sent {
        end: bool,
    },
    DataSent {
        end: bool,
    },
    Delivered {
        end: bool,
    },
    Relayed {
        end: bool,
    },
    Source {
        end: bool,
        host: Option<u8>,
    },
    Received {
        end: bool,
        from: (u8, u16),
    },
    Restart {
        end: bool,
    },
    Wait {
        milliseconds: u16,
    },
}

fuzz_target!(|steps: Vec<Step>| {
    let key = || CheckKey::agree(&[1; 32], &[2; 32]);
    let mut now = *START;
    let mut ends = [
        Agent::new(Config { key: key(), role: Role::Controlling, seed: [3; 32] }, now),
        Agent::new(Config { key: key(), role: Role::Controlled, seed: [4; 32] }, now),
    ];
    let mut captured: Vec<Vec<u8>> = Vec::new();
    for step in steps.into_iter().take(128) {
        match step {
            Step::Local { end, addrs } => ends[usize::from(end)].set_local(candidates(&addrs), now),
            Step::Remote { end, addrs } => ends[usize::from(end)].set_remote(candidates(&addrs), now),
            Step::Deliver { to, which, flip, from } => {
                let Some(mut bytes) = captured.get(usize::from(which)).cloned() else { continue };
                if let Some(flip) = flip.map(usize::from).filter(|flip| flip / 8 < bytes.len()) {
                    bytes[flip / 8] ^= 1 << (flip % 8);
                }
                ends[usize::from(to)].handle_packet(addr(from), &bytes, now);
            }
            Step::Sent { end } => ends[usize::from(end)].on_sent(now),
            Step::DataSent { end } => ends[usize::from(end)].on_data_sent(now),
            Step::Delivered { end } => ends[usize::from(end)].on_delivered(now),
            Step::Relayed { end } => ends[usize::from(end)].on_relayed(now),
            Step::Source { end, host } => {
                ends[usize::from(end)].on_source(host.map(|host| addr((host, 1)).ip()), now);
            }
            Step::Received { end, from } => ends[usize::from(end)].on_received(addr(from), now),
            Step::Restart { end } => ends[usize::from(end)].restart(now),
            Step::Wait { milliseconds } => {
                now += Duration::from_millis(milliseconds.into());
                ends.iter_mut().for_each(|end| end.handle_timeout(now));
            }
        }
        for end in &mut ends {
            while let Some(transmit) = end.poll_transmit() {
                assert_ne!(transmit.to.port(), 0);
                if captured.len() < 256 {
                    captured.push(transmit.bytes);
                }
            }
            while end.poll_event().is_some() {}
        }
    }
});

fn addr((host, port): (u8, u16)) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)), port)
}

fn candidates(addrs: &[(u8, u16)]) -> Vec<Candidate> {
    addrs.iter().map(|at| Candidate { kind: CandidateKind::Host, addr: addr(*at) }).collect()
}
