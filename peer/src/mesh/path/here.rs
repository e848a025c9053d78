//! What this host knows of its own place: interfaces, the NAT in front of it, whether it slept.
//!
//! In: looks at the system's table, [`Fact`]s, what responders see. Out: candidates and the [`Nat`] that others are told, new
//! rounds of checks when the place is another one.
//! Never looks twice for one burst of changes: it waits for [`SETTLE`] first.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Reflexive, ReflexiveEvent,
        mapping::{Mapping, Nat, Ports},
        nat64::reachable,
    },
    request::link::{Candidate, CandidateKind},
};

use super::Paths;
use crate::mesh::{
    interfaces::{host_candidates, interfaces, is_ipv6_only, networks},
    surroundings::Fact,
    wake::{Vigil, world_time},
};

/// How often the interfaces are looked at where the system does not tell of changes: reading its table takes about a
/// millisecond, and a laptop that wakes in another network waits no longer than this.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often they are looked at where it does; only in case it forgot.
pub(super) const LOOK_SELDOM: Duration = Duration::from_secs(60);

/// Time from the first word of a change to the look: an address comes with its routes, and half a dozen words.
const SETTLE: Duration = Duration::from_millis(100);

/// How often it is asked whether the machine slept, while there are agents.
pub(super) const VIGIL_EVERY: Duration = Duration::from_secs(1);

/// Time between two samplings of one NAT's ports: what it does does not change while the interfaces stay.
const SAMPLE_EVERY: Duration = Duration::from_secs(600);

/// What is known of the NAT, beside what the others are told.
#[derive(Debug, Default)]
pub(super) struct Sampled {
    ports: Ports,
    at: Option<Instant>,
}

impl Paths {
    /// Where the relay answers STUN, and on which port once more; nowhere if it does not.
    pub(in crate::mesh) fn set_responders(&mut self, relay: Vec<SocketAddr>, alternate: Option<u16>, now: Instant) {
        let beside = |port| relay.iter().map(move |addr| SocketAddr::new(addr.ip(), port)).collect();
        self.witnesses = alternate.map(beside).unwrap_or_default();
        self.relay = relay;
        if self.socket.is_some() {
            self.ask_responders(now);
        }
    }

    pub(super) fn ask_responders(&mut self, now: Instant) {
        let all: Vec<_> = self.relay.iter().chain(&self.named).copied().collect();
        self.reflexive.set_responders(&all, now);
        self.reflexive.set_witnesses(&self.witnesses, now);
    }

    /// Something was learnt in the background.
    pub(in crate::mesh) fn handle_fact(&mut self, fact: Fact, now: Instant) {
        match fact {
            Fact::Interfaces => self.look_at = self.look_at.min(now + SETTLE),
            Fact::Ports(ports) => {
                self.sampled.ports = ports;
                self.judge(now);
            }
            Fact::Responders(named) => {
                self.named = named;
                self.ask_responders(now);
            }
            Fact::Nat64(prefix) => {
                self.nat64 = Some(prefix);
                for entry in self.agents.values_mut() {
                    entry.agent.set_remote(reachable(&entry.theirs, self.nat64), now);
                }
            }
            Fact::Mapped(mapped) => {
                if self.mapped != mapped {
                    self.mapped = mapped;
                    self.tell_candidates(now);
                }
            }
        }
    }

    /// What can be reached of what the other side names.
    pub(super) fn reachable(&self, theirs: &[Candidate]) -> Vec<Candidate> {
        reachable(theirs, self.nat64)
    }

    /// Begins to find out what the system does not know, in the background.
    pub(super) fn explore(&mut self) {
        let Some((port, _)) = self.socket else { return };
        self.surroundings.map_port(port);
        self.surroundings.resolve();
        if is_ipv6_only(&self.interfaces) {
            self.surroundings.find_nat64();
        }
    }

    /// Gives back what others keep for us.
    pub(in crate::mesh) async fn leave(&mut self) {
        self.surroundings.leave().await;
    }

    /// What is known of the NAT in front of us; the others are told.
    pub(super) fn set_nat(&mut self, nat: Nat, now: Instant) {
        if self.nat != nat {
            tracing::debug!(?nat, hairpin = ?self.hairpin.outcome(), "what the NAT in front of us does");
            self.nat = nat;
            self.tell_candidates(now);
        }
    }

    /// Begins to look after interfaces and sleep: there is something to lose now.
    pub(super) fn keep_watch(&mut self, now: Instant) {
        if !self.surroundings.is_watching() {
            self.surroundings.watch();
        }
        self.vigil = Vigil::new(now, world_time());
        self.vigil_at = now + VIGIL_EVERY;
        // It may have changed while nobody looked.
        self.look_at = now;
    }

    /// Looks at the interfaces, and begins anew if they are others than before.
    pub(super) fn look(&mut self, now: Instant) {
        let every = if self.surroundings.is_watching() { LOOK_SELDOM } else { LOOK_EVERY };
        self.look_at = now + every;
        let interfaces = interfaces();
        if interfaces != self.interfaces {
            tracing::info!("an interface changed: looking for paths anew");
            self.interfaces = interfaces;
            self.begin_anew(now);
        }
    }

    /// Asks whether the machine slept. If so the NAT has forgotten us, and the others do not know that we are back.
    pub(super) fn keep_vigil(&mut self, now: Instant) {
        self.vigil_at = now + VIGIL_EVERY;
        if let Some(asleep) = self.vigil.look(now, world_time(), VIGIL_EVERY) {
            tracing::info!(?asleep, "this machine slept: looking for paths anew");
            self.interfaces = interfaces();
            self.begin_anew(now);
        }
    }

    fn begin_anew(&mut self, now: Instant) {
        let Some((port, with_ipv6)) = self.socket else { return };
        self.hosts = host_candidates(&self.interfaces, port, with_ipv6);
        self.reflexive.restart(now);
        self.hairpin.forget();
        self.sampled = Sampled::default();
        self.mapped = None;
        self.nat64 = None;
        self.explore();
        for entry in self.agents.values_mut() {
            entry.agent.restart(now);
        }
        self.tell_candidates(now);
    }

    /// Hears what the responders see. Says whether the others should know.
    pub(super) fn hear_responders(&mut self, now: Instant) -> bool {
        let mut found = false;
        while let Some(event) = self.reflexive.poll_event() {
            match event {
                ReflexiveEvent::Found(seen) => {
                    found = true;
                    if seen.is_ipv4() && !self.is_own(seen) {
                        self.hairpin.begin(seen, now);
                    }
                    self.judge(now);
                }
                ReflexiveEvent::Mapping(_) => self.judge(now),
            }
        }
        found
    }

    /// Says what the NAT does, as far as the answers tell, and finds out more where they do not.
    fn judge(&mut self, now: Instant) {
        let Some((port, _)) = self.socket else { return };
        let (nat, asks) = judged(&self.reflexive, port, &self.hosts, self.sampled.ports);
        if let Some(responder) = asks
            && self.sampled.at.is_none_or(|at| at + SAMPLE_EVERY <= now)
        {
            self.sampled.at = Some(now);
            self.surroundings.sample(responder);
        }
        self.set_nat(nat, now);
    }

    fn is_own(&self, seen: SocketAddr) -> bool {
        is_own(&self.hosts, seen)
    }

    pub(super) fn tell_networks(&mut self) {
        let networks = networks(&self.interfaces);
        for entry in self.agents.values_mut() {
            entry.agent.set_networks(&networks);
        }
    }
}

/// What the answers say of the NAT, and whom to ask for how it picks ports.
fn judged(reflexive: &Reflexive, port: u16, hosts: &[Candidate], sampled: Ports) -> (Nat, Option<SocketAddr>) {
    let Some((responder, seen)) = reflexive.answered(true).or_else(|| reflexive.answered(false)) else {
        return (Nat::default(), None);
    };
    if is_own(hosts, seen) {
        return (Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving }, None);
    }
    let kept = if seen.port() == port { Ports::Preserving } else { Ports::Unknown };
    match reflexive.mapping() {
        Mapping::Dependent => (Nat { mapping: Mapping::Dependent, ports: sampled }, Some(responder)),
        mapping @ (Mapping::Unknown | Mapping::EndpointIndependent) => (Nat { mapping, ports: kept }, None),
    }
}

fn is_own(hosts: &[Candidate], seen: SocketAddr) -> bool {
    hosts.iter().any(|host| host.kind == CandidateKind::Host && host.addr == seen)
}

#[cfg(test)]
#[path = "here_tests.rs"]
mod tests;
