//! What is told of a NAT from the addresses that responders see.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Hairpin, Handled, Ignored, Reflexive, ReflexiveEvent, Sampling, Transmit,
        mapping::{ENOUGH, LONGEST_BLOCK, Mapping, PATIENCE, Ports, REPEAT, SOCKETS, SPACING, Sample, mapping, ports},
        reflexive::REFRESH,
    },
    stun::{Class, Draft, Message},
};

#[path = "sim/clock.rs"]
#[expect(dead_code, reason = "little here is random")]
mod clock;

use clock::Dice;

const MAIN: &str = "203.0.113.1:8080";
const WITNESS: &str = "203.0.113.1:8081";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// What the responder answers to this request.
fn answer(request: &Transmit, seen: SocketAddr) -> Vec<u8> {
    let transaction = Message::parse(&request.bytes).unwrap().transaction();
    Draft::new(Class::Success, transaction).mapped_address(seen).finish()
}

mod one_socket {
    use super::*;

    struct One {
        reflexive: Reflexive,
        now: Instant,
    }

    impl One {
        fn new() -> Self {
            let now = clock::beginning();
            let mut reflexive = Reflexive::new([5; 32], now);
            reflexive.set_active(true, now);
            reflexive.set_responders(&[addr(MAIN)], now);
            reflexive.set_witnesses(&[addr(WITNESS), addr(MAIN)], now);
            Self { reflexive, now }
        }

        /// Every waiting request is answered; gives who was asked.
        fn answer_all(&mut self, main: &str, witness: &str) -> Vec<SocketAddr> {
            let requests: Vec<_> = std::iter::from_fn(|| self.reflexive.poll_transmit()).collect();
            for request in &requests {
                let seen = if request.to == addr(MAIN) { main } else { witness };
                let bytes = answer(request, addr(seen));
                assert_eq!(self.reflexive.handle_packet(request.to, &bytes, self.now), Handled::Answer);
            }
            requests.into_iter().map(|request| request.to).collect()
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            self.reflexive.handle_timeout(self.now);
        }

        fn events(&mut self) -> Vec<ReflexiveEvent> {
            std::iter::from_fn(|| self.reflexive.poll_event()).collect()
        }
    }

    #[test]
    fn two_responders_that_see_one_address_tell_of_an_independent_mapping() {
        let mut one = One::new();
        assert_eq!(one.answer_all("198.51.100.7:4000", "198.51.100.7:4000"), [addr(MAIN), addr(WITNESS)]);
        assert_eq!(one.reflexive.mapping(), Mapping::EndpointIndependent);
        assert!(one.events().contains(&ReflexiveEvent::Mapping(Mapping::EndpointIndependent)));
    }

    #[test]
    fn two_responders_that_see_two_addresses_tell_of_a_dependent_mapping() {
        for other in ["198.51.100.7:4001", "198.51.100.8:4000"] {
            let mut one = One::new();
            one.answer_all("198.51.100.7:4000", other);
            assert_eq!(one.reflexive.mapping(), Mapping::Dependent, "{other}");
        }
    }

    #[test]
    fn one_answer_tells_nothing_of_the_mapping() {
        let mut one = One::new();
        let request = one.reflexive.poll_transmit().unwrap();
        one.reflexive.handle_packet(request.to, &answer(&request, addr("198.51.100.7:4000")), one.now);
        assert_eq!(one.reflexive.mapping(), Mapping::Unknown);
        assert_eq!(mapping(&[]), Mapping::Unknown);
    }

    #[test]
    fn what_a_witness_sees_is_offered_to_nobody() {
        let mut one = One::new();
        one.answer_all("198.51.100.7:4000", "198.51.100.7:4001");
        assert_eq!(one.reflexive.addresses(), BTreeSet::from([addr("198.51.100.7:4000")]));
    }

    #[test]
    fn a_witness_is_asked_once_however_long_links_need_the_address() {
        let mut one = One::new();
        one.answer_all("198.51.100.7:4000", "198.51.100.7:4000");
        for _ in 0..20 {
            one.pass(REFRESH);
            assert_eq!(one.answer_all("198.51.100.7:4000", "198.51.100.7:4000"), [addr(MAIN)]);
        }
    }

    #[test]
    fn a_rebinding_is_not_mistaken_for_a_dependent_mapping() {
        let mut one = One::new();
        one.answer_all("198.51.100.7:4000", "198.51.100.7:4000");
        one.events();
        one.pass(REFRESH);
        one.answer_all("198.51.100.7:5000", "198.51.100.7:5000");
        assert_ne!(one.reflexive.mapping(), Mapping::Dependent);
        one.pass(Duration::ZERO);
        assert_eq!(one.answer_all("198.51.100.7:5000", "198.51.100.7:5000"), [addr(WITNESS)]);
        assert_eq!(one.reflexive.mapping(), Mapping::EndpointIndependent);
        assert!(!one.events().contains(&ReflexiveEvent::Mapping(Mapping::Dependent)));
    }

    #[test]
    fn a_changed_interface_forgets_the_mapping() {
        let mut one = One::new();
        one.answer_all("198.51.100.7:4000", "198.51.100.7:4001");
        one.reflexive.restart(one.now);
        assert_eq!(one.reflexive.mapping(), Mapping::Unknown);
        assert_eq!(one.answer_all("198.51.100.7:4000", "198.51.100.7:4000"), [addr(MAIN), addr(WITNESS)]);
        assert_eq!(one.reflexive.mapping(), Mapping::EndpointIndependent);
    }
}

mod ports_of {
    use super::*;

    fn samples(seen: impl IntoIterator<Item = u16>) -> Vec<Sample> {
        let locals = (0..).map(|at| 40_000 + at * 7);
        seen.into_iter().zip(locals).map(|(seen, local)| Sample { local, seen }).collect()
    }

    #[test]
    fn too_few_samples_tell_nothing() {
        assert_eq!(ports(&samples((0..15).map(|at| 5000 + at).take(ENOUGH - 1))), Ports::Unknown);
    }

    #[test]
    fn ports_kept_are_preserved_although_some_were_taken() {
        let mut all: Vec<_> = (0..16).map(|at| Sample { local: 40_000 + at * 7, seen: 40_000 + at * 7 }).collect();
        all[3].seen = 1024;
        all[9].seen = 61_000;
        assert_eq!(ports(&all), Ports::Preserving);
    }

    #[test]
    fn ports_one_behind_the_other_are_sequential_although_others_take_some_between() {
        assert_eq!(ports(&samples((0..16).map(|at| 5000 + at * 2))), Ports::Sequential { last: 5030, step: 2 });
        assert_eq!(ports(&samples((0..16).map(|at| 5000 - at))), Ports::Sequential { last: 4985, step: -1 });
        let busy = [5000, 5001, 5002, 5005, 5006, 5007, 5012, 5013, 5014, 5015];
        assert_eq!(ports(&samples(busy)), Ports::Sequential { last: 5015, step: 1 });
        let wraps = [65_533, 65_534, 65_535, 1024, 1025, 1026, 1027, 1028, 1029];
        assert_eq!(ports(&samples(wraps)), Ports::Sequential { last: 1029, step: 1 });
    }

    #[test]
    fn ports_of_an_aligned_block_are_that_block() {
        let mut dice = Dice::new(1);
        for size in [64, 256, 512, 1024, 2048, 4096_u16] {
            for _ in 0..200 {
                let first = (1 + dice.below(u64::from(60_000 / size)) as u16) * size;
                let seen: Vec<_> = (0..SOCKETS).map(|_| first + dice.below(size.into()) as u16).collect();
                let told = ports(&samples(seen.iter().copied()));
                let Ports::Block { first: low, last: high } = told else { panic!("{told:?} from {seen:?}") };
                assert!(seen.iter().all(|port| (low..=high).contains(port)));
                assert!(u32::from(high - low) < u32::from(size) * 2, "{low}..{high} of {size}");
            }
        }
    }

    #[test]
    fn ports_of_a_block_across_a_boundary_lie_within_what_is_told() {
        let mut dice = Dice::new(2);
        for _ in 0..200 {
            let seen: Vec<_> = (0..SOCKETS).map(|_| 32_768 - 500 + dice.below(1000) as u16).collect();
            let told = ports(&samples(seen.iter().copied()));
            let Ports::Block { first, last } = told else { panic!("{told:?} from {seen:?}") };
            assert!(seen.iter().all(|port| (first..=last).contains(port)) && last - first < 2000);
        }
    }

    #[test]
    fn any_ports_are_random() {
        let mut dice = Dice::new(3);
        for _ in 0..1000 {
            let seen: Vec<_> = (0..SOCKETS).map(|_| 1024 + dice.below(64_512) as u16).collect();
            assert_eq!(ports(&samples(seen)), Ports::Random);
        }
    }

    #[test]
    fn no_port_is_told_that_is_none() {
        let mut dice = Dice::new(4);
        for _ in 0..2000 {
            let around = dice.below(65_536) as u16;
            let seen: Vec<_> = (0..SOCKETS).map(|_| around.saturating_add(dice.below(3000) as u16)).collect();
            if let Ports::Block { first, last } = ports(&samples(seen)) {
                assert!(first >= 1 && first <= last);
            }
        }
        assert!(u32::from(LONGEST_BLOCK) < 65_536);
    }
}

mod sampling {
    use super::*;

    struct Asked {
        sampling: Sampling,
        locals: Vec<u16>,
        now: Instant,
    }

    impl Asked {
        fn new() -> Self {
            let (now, locals) = (clock::beginning(), (0..16).map(|at| 40_000 + at).collect::<Vec<_>>());
            Self { sampling: Sampling::new(addr(MAIN), &locals, [3; 32], now), locals, now }
        }

        /// Runs to the end; `see` is how each request is answered, if it is.
        fn run(&mut self, mut see: impl FnMut(usize) -> Option<u16>) -> Vec<(Instant, usize)> {
            let mut sent = Vec::new();
            loop {
                while let Some((socket, request)) = self.sampling.poll_transmit() {
                    assert_eq!(request.to, addr(MAIN));
                    sent.push((self.now, socket));
                    if let Some(seen) = see(socket) {
                        let bytes = answer(&request, SocketAddr::new(addr("198.51.100.7:1").ip(), seen));
                        assert_eq!(self.sampling.handle_packet(socket, addr(MAIN), &bytes, self.now), Handled::Answer);
                    }
                }
                match self.sampling.poll_timeout() {
                    Some(wake) => self.now = wake,
                    None => return sent,
                }
                self.sampling.handle_timeout(self.now);
            }
        }
    }

    #[test]
    fn every_socket_asks_once_and_one_behind_the_other() {
        let mut asked = Asked::new();
        let began = asked.now;
        let locals = asked.locals.clone();
        let sent = asked.run(|socket| Some(locals[socket]));
        let expected: Vec<_> = (0..SOCKETS).map(|at| (began + SPACING * at as u32, at)).collect();
        assert_eq!(sent, expected);
        assert_eq!(asked.sampling.outcome(), Some(Ports::Preserving));
    }

    #[test]
    fn a_lost_request_is_repeated_once() {
        let mut asked = Asked::new();
        let began = asked.now;
        let mut tries = 0;
        let sent = asked.run(|socket| {
            tries += usize::from(socket == 4);
            (socket != 4).then_some(9000 + socket as u16)
        });
        assert_eq!(tries, 2);
        let of_it: Vec<_> = sent.iter().filter(|(_, socket)| *socket == 4).map(|(at, _)| *at).collect();
        assert_eq!(of_it[1] - of_it[0], REPEAT);
        assert!(asked.now <= began + SPACING * SOCKETS as u32 + PATIENCE);
        assert!(matches!(asked.sampling.outcome(), Some(Ports::Sequential { step: 1, .. })));
    }

    #[test]
    fn silence_tells_nothing_and_ends() {
        let mut asked = Asked::new();
        let sent = asked.run(|_| None);
        assert_eq!(sent.len(), SOCKETS * 2);
        assert_eq!(asked.sampling.outcome(), Some(Ports::Unknown));
    }

    #[test]
    fn an_answer_that_nobody_asked_for_counts_for_nothing() {
        let mut asked = Asked::new();
        let (socket, request) = asked.sampling.poll_transmit().unwrap();
        let bytes = answer(&request, addr("198.51.100.7:9"));
        let from_elsewhere = asked.sampling.handle_packet(socket, addr(WITNESS), &bytes, asked.now);
        assert_eq!(from_elsewhere, Handled::Ignored(Ignored::WrongSource));
        assert_eq!(asked.sampling.handle_packet(99, addr(MAIN), &bytes, asked.now), Handled::Ignored(Ignored::NotOurs));
    }

    #[test]
    fn without_sockets_nothing_is_asked() {
        let now = clock::beginning();
        let mut sampling = Sampling::new(addr(MAIN), &[], [3; 32], now);
        assert_eq!((sampling.poll_transmit(), sampling.poll_timeout()), (None, None));
        assert_eq!(sampling.outcome(), Some(Ports::Unknown));
    }
}

mod hairpin {
    use super::*;

    #[test]
    fn what_comes_back_tells_of_a_hairpin() {
        let now = clock::beginning();
        let mut hairpin = Hairpin::new([9; 32], now);
        assert_eq!(hairpin.poll_timeout(), None);
        hairpin.begin(addr("198.51.100.7:4000"), now);
        let request = hairpin.poll_transmit().unwrap();
        assert_eq!(request.to, addr("198.51.100.7:4000"));
        assert_eq!(hairpin.handle_packet(&request.bytes, now), Handled::Check);
        assert_eq!((hairpin.outcome(), hairpin.poll_timeout()), (Some(true), None));
    }

    #[test]
    fn what_does_not_come_back_in_time_tells_of_none_after_two_tries() {
        let mut now = clock::beginning();
        let mut hairpin = Hairpin::new([9; 32], now);
        hairpin.begin(addr("198.51.100.7:4000"), now);
        let mut tries = 0;
        loop {
            tries += std::iter::from_fn(|| hairpin.poll_transmit()).count();
            let Some(wake) = hairpin.poll_timeout() else { break };
            now = wake;
            hairpin.handle_timeout(now);
        }
        assert_eq!((tries, hairpin.outcome()), (2, Some(false)));
    }

    #[test]
    fn the_request_of_somebody_else_is_not_ours() {
        let now = clock::beginning();
        let mut hairpin = Hairpin::new([9; 32], now);
        let mut stranger = Hairpin::new([8; 32], now);
        for one in [&mut hairpin, &mut stranger] {
            one.begin(addr("198.51.100.7:4000"), now);
        }
        let bytes = stranger.poll_transmit().unwrap().bytes;
        assert_eq!(hairpin.handle_packet(&bytes, now), Handled::Ignored(Ignored::NotOurs));
        assert_eq!(hairpin.outcome(), None);
        hairpin.forget();
        assert_eq!((hairpin.poll_transmit(), hairpin.poll_timeout()), (None, None));
    }
}
