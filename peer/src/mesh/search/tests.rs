//! Searches of several links, without a socket.

use peerfleet_proto::{
    path::search::{plan::MAX_SOCKETS, round::ROUND},
    request::link::{Candidate, CandidateKind, Mapping, Nat, Ports, Route},
};

use super::*;
use crate::mesh::routes::Routes;

const EASY: Nat = Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving };
const HARD: Nat = Nat { mapping: Mapping::Dependent, ports: Ports::Random };

#[test]
fn many_searches_keep_the_pace_of_one_and_take_turns() {
    let mut mesh = Mesh::new(true);
    let remotes: Vec<_> = (0..10).map(|seed| mesh.add(seed, EASY, HARD)).collect();
    let mut shots = Vec::new();
    let mut most = 0;
    mesh.run(Duration::from_secs(60), |mesh, now, shot| {
        shots.push((now, shot.to));
        most = most.max(mesh.searches.under_way());
    });
    assert!(shots.windows(2).all(|two| two[1].0 - two[0].0 >= PACE));
    assert_eq!(most, MAX_AT_ONCE);
    for remote in &remotes {
        let to = there(remote.instance.as_bytes()[0]).ip();
        assert!(shots.iter().filter(|(_, addr)| addr.ip() == to).count() >= 1024, "{to}");
    }
}

#[test]
fn searches_share_their_sockets_which_are_closed_after_the_last() {
    let mut mesh = Mesh::new(true);
    let [one, other] = [1, 2].map(|seed| mesh.add(seed, HARD, EASY));
    let mut sockets = std::collections::BTreeSet::new();
    mesh.run(Duration::from_secs(5), |_, _, shot| {
        sockets.insert(shot.from);
    });
    assert_eq!((sockets.len(), mesh.open, mesh.closed), (MAX_SOCKETS, MAX_SOCKETS, 0));
    mesh.searches.set_path(&one, Some(there(1)), mesh.now);
    mesh.run(Duration::from_secs(1), |_, _, _| ());
    assert_eq!(mesh.closed, 0);
    mesh.searches.remove(&other);
    mesh.run(Duration::from_secs(1), |_, _, _| ());
    assert_eq!((mesh.open, mesh.closed), (0, 1));
}

#[test]
fn where_it_is_not_allowed_nothing_is_searched() {
    let mut mesh = Mesh::new(false);
    mesh.add(1, EASY, HARD);
    mesh.run(ROUND, |_, _, shot| panic!("{shot:?}"));
}

#[test]
fn a_new_link_to_where_all_failed_searches_only_after_a_network_changed() {
    let mut mesh = Mesh::new(true);
    let remote = mesh.add(1, HARD, EASY);
    mesh.run(Duration::from_secs(3600), |_, _, _| ());
    mesh.searches.remove(&remote);
    mesh.add(1, HARD, EASY);
    mesh.run(Duration::from_secs(3600), |_, _, shot| panic!("{shot:?}"));
    mesh.searches.restart(mesh.now);
    let mut shots = 0;
    mesh.run(ROUND, |_, _, _| shots += 1);
    assert!(shots >= MAX_SOCKETS);
}

struct Mesh {
    searches: Searches,
    routes: Routes,
    now: Instant,
    open: usize,
    closed: usize,
}

fn there(seed: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, seed], 7))
}

fn whereabouts(nat: Nat, addr: SocketAddr) -> Whereabouts {
    Whereabouts { candidates: vec![Candidate { kind: CandidateKind::ServerReflexive, addr }], nat }
}

impl Mesh {
    fn new(allowed: bool) -> Self {
        let now = Instant::now();
        Self { searches: Searches::new(allowed, now), routes: Routes::default(), now, open: 0, closed: 0 }
    }

    fn add(&mut self, seed: u8, ours: Nat, theirs: Nat) -> Arc<Remote> {
        let remote = self.routes.add(InstanceId::from_bytes([seed; 16]), Route::Auto, None);
        let key = CheckKey::agree(&[seed; 32], &[1; 32]);
        self.searches.add(Arc::clone(&remote), (key, Role::Controlling), self.now);
        let (here, there) = (whereabouts(ours, there(99)), whereabouts(theirs, there(seed)));
        self.searches.set_there(&remote, &here, &there, self.now);
        remote
    }

    fn run(&mut self, time: Duration, mut see: impl FnMut(&Self, Instant, Shot)) {
        let end = self.now + time;
        loop {
            while let Some(event) = self.searches.poll_event() {
                match event {
                    SearchEvent::Open(count) => {
                        self.open = self.open.max(count);
                        let sockets: Vec<_> = (0..).map(SocketId).take(self.open).collect();
                        self.searches.opened(&sockets, self.now);
                    }
                    SearchEvent::Keep { .. } => panic!("nobody answers"),
                    SearchEvent::Close => {
                        self.open = 0;
                        self.closed += 1;
                    }
                }
            }
            while let Some(shot) = self.searches.poll_transmit() {
                see(self, self.now, shot);
            }
            match self.searches.poll_timeout().filter(|at| *at <= end) {
                Some(at) => self.now = self.now.max(at),
                None => break,
            }
            self.searches.handle_timeout(self.now);
        }
        self.now = end;
    }
}
