//! Links as they are wanted, offered, answered, and end.

use std::{sync::Arc, time::Instant};

use peerfleet_proto::{
    id::InstanceId,
    request::{
        Failure, FailureKind, Outcome, Request,
        link::{CandidateUpdate, LinkOffer, Route},
    },
};

use super::{Actor, unknown_instance};
use crate::mesh::{
    AskFault, Caller, OpenFault,
    agreement::{AGREE_DEADLINE, Agreed, Here, Key, Reply},
    asks::Waiting,
    heads,
    link::LinkEvent,
    path::{PathEvent, Whereabouts},
    routes::Remote,
    search::SearchEvent,
};

impl Actor {
    /// A handle wants a link.
    pub(super) async fn want_link(&mut self, to: InstanceId, route: Route, reply: Reply, now: Instant) {
        let key = (to, route);
        if let Some(handle) = self.book.get(key, now) {
            _ = reply.send(Ok(handle));
            return;
        }
        let Some((peer, slot)) = self.members.get(to).map(|member| (member.peer, member.slot)) else {
            _ = reply.send(Err(unknown_instance()));
            return;
        };
        if let Err(why) = self.start_links(now).await {
            _ = reply.send(Err(why));
            return;
        }
        let Some((check_share, tls_key)) = self.book.want(key, peer, slot, reply, now) else { return };
        let Whereabouts { candidates, nat } = self.whereabouts(route);
        let offer = Request::Link(LinkOffer { route, tls_key, check_share, candidates, nat });
        let id = self.exchange.ask(to, offer, AGREE_DEADLINE, now, &mut self.rng);
        self.asks.insert(id, Waiting::Link(key));
    }

    /// The other side offers a link.
    pub(super) async fn link_offered(&mut self, caller: Caller, offer: &LinkOffer, now: Instant) -> Outcome {
        if let Err(why) = self.start_links(now).await {
            return Outcome::Failed(Failure::new(FailureKind::Os, why.to_string(), "its log says more"));
        }
        let slot = self.members.get(caller.instance).and_then(|member| member.slot);
        let plausible_mtu = self.paths.plausible_mtu(&offer.candidates);
        let Whereabouts { candidates, nat } = self.whereabouts(offer.route);
        let here = Here { candidates, nat, plausible_mtu };
        let before = self.book.remote(caller.instance);
        match self.book.offered(caller, slot, offer, here, now) {
            Ok((answer, agreed)) => {
                if let (Some(agreed), Some(before)) = (&agreed, before)
                    && offer.route == Route::Auto
                    && agreed.remote.mapped != before.mapped
                {
                    self.paths.remove(&before, now);
                }
                let there = Whereabouts { candidates: offer.candidates.clone(), nat: offer.nat };
                self.agreed(agreed, there, now);
                Outcome::Link(answer)
            }
            Err(why) => Outcome::Failed(why.into()),
        }
    }

    /// A request that was about a link ended.
    pub(super) fn link_answered(&mut self, about: Option<(Key, Result<Outcome, AskFault>)>) {
        let Some((key, result)) = about else { return };
        match result {
            Ok(Outcome::Link(answer)) => {
                let plausible_mtu = self.paths.plausible_mtu(&answer.candidates);
                let agreed = self.book.answered(key, &answer, plausible_mtu);
                let there = Whereabouts { candidates: answer.candidates, nat: answer.nat };
                self.agreed(agreed, there, Instant::now());
            }
            Ok(Outcome::Failed(failure)) => self.book.refused(key, &failure.what),
            Ok(_) => self.book.refused(key, "the other side gave an answer of another kind"),
            Err(fault) => self.book.refused(key, &fault.to_string()),
        }
    }

    /// Something happened to a connection.
    pub(super) fn link_event(&mut self, event: LinkEvent, now: Instant) {
        match event {
            LinkEvent::Up { mapped, connection } => {
                let Some((caller, leases)) = self.book.up(mapped, connection.clone(), now) else { return };
                self.paths.up(mapped, connection.clone(), now);
                tracing::debug!(instance = %caller.instance, "a link is up");
                self.streams.spawn(heads::accept(connection, leases, caller, Arc::clone(&self.serve)));
                self.members.changed(now);
            }
            LinkEvent::Down { mapped, connection, why } => {
                if let Some(remote) = self.book.down(mapped, connection, &why) {
                    tracing::debug!(instance = %remote.instance, %why, "a link is down");
                    self.link_ended(&remote, now);
                }
            }
        }
    }

    /// A link is no more.
    pub(super) fn link_ended(&mut self, remote: &Remote, now: Instant) {
        self.paths.remove(remote, now);
        let is_gone = self.members.get(remote.instance).is_some_and(|member| member.slot.is_none());
        if is_gone && !self.book.knows(remote.instance) && self.uplink.identity(remote.instance).is_none() {
            self.members.left(remote.instance, false, now);
        }
        self.members.changed(now);
    }

    /// Carries out what the path machines want.
    pub(super) fn drain_paths(&mut self, now: Instant) {
        while let Some(event) = self.paths.poll_event(now) {
            match event {
                PathEvent::Changed { remote, direct } => self.path_changed(&remote, direct),
                PathEvent::Doubted { remote, is_doubted } => self.path_doubted(&remote, is_doubted),
                PathEvent::Elsewhere => self.moved(now),
                PathEvent::Moved(here) => {
                    for instance in self.book.with_paths() {
                        self.tell_whereabouts(instance, &here, now);
                    }
                }
                PathEvent::Again(remote, here) => self.tell_whereabouts(remote.instance, &here, now),
                PathEvent::Search(event) => self.search_event(event, now),
            }
        }
        while let Some(shot) = self.paths.poll_transmit() {
            self.book.send_stun(&shot);
        }
    }

    /// Opens, keeps and closes sockets as searches want it.
    fn search_event(&mut self, event: SearchEvent, now: Instant) {
        let sockets = self.book.extra_sockets();
        match event {
            SearchEvent::Open(count) => {
                let opened = sockets.map(|sockets| sockets.open(count)).unwrap_or_default();
                self.paths.sockets_opened(&opened, now);
            }
            SearchEvent::Keep { socket, remote, addr } => {
                if let Some(sockets) = sockets {
                    sockets.keep(socket, &remote, addr);
                }
            }
            SearchEvent::Close => {
                if let Some(sockets) = sockets {
                    sockets.close();
                }
            }
        }
    }

    /// This machine is elsewhere now: does the connection to the relay still stand?
    fn moved(&mut self, now: Instant) {
        let is_cut = self.relay_source.is_some_and(|source| !self.paths.has_address(source));
        self.uplink.handle_moved(is_cut, now, &mut self.rng);
        self.drain_uplink(now);
    }

    fn path_changed(&mut self, remote: &Arc<Remote>, direct: Option<peerfleet_proto::path::Direct>) {
        if let Some(direct) = direct {
            tracing::debug!(instance = %remote.instance, addr = %direct.addr, rtt = ?direct.rtt, "packets travel directly");
            self.switch.routes.prove_source(remote, direct.addr);
            remote.set_direct_rtt(direct.rtt);
        } else {
            tracing::debug!(instance = %remote.instance, "packets travel by way of the relay");
        }
        remote.set_direct(direct.map(|direct| direct.addr));
        self.book.moved(remote, direct.is_some());
    }

    fn path_doubted(&mut self, remote: &Remote, is_doubted: bool) {
        tracing::debug!(instance = %remote.instance, is_doubted, "whether the direct path is in doubt");
        remote.set_doubted(is_doubted);
        if is_doubted {
            self.book.hurry(remote);
        }
    }

    fn tell_whereabouts(&mut self, instance: InstanceId, here: &Whereabouts, now: Instant) {
        let update = Request::Candidates(CandidateUpdate { candidates: here.candidates.clone(), nat: here.nat });
        let id = self.exchange.ask(instance, update, AGREE_DEADLINE, now, &mut self.rng);
        self.asks.insert(id, Waiting::Candidates);
    }

    fn agreed(&mut self, agreed: Option<Agreed>, there: Whereabouts, now: Instant) {
        let Some(Agreed { remote, check_key, role }) = agreed else { return };
        if remote.route == Route::Auto {
            self.paths.add(Agreed { remote, check_key, role }, there, &self.switch.routes, now);
        }
    }

    /// Where we may be reached over a link of this route: nowhere, if it may only be relayed.
    fn whereabouts(&self, route: Route) -> Whereabouts {
        match route {
            Route::Auto => self.paths.whereabouts(),
            Route::RelayedOnly => Whereabouts::default(),
        }
    }

    pub(super) async fn start_links(&mut self, now: Instant) -> Result<(), OpenFault> {
        match self.book.start().await {
            Ok(Some(socket)) => self.paths.open(socket, now),
            Ok(None) => {}
            Err(error) => return Err(OpenFault::NoLink(format!("no thread for links can be started: {error}"))),
        }
        Ok(())
    }
}
