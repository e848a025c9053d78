//! What the relay tells of the room, and the messages that pass through it.

use std::{net::SocketAddr, time::Instant};

use peerfleet_proto::{
    exchange::{self, Address},
    id::PeerId,
    presence::Presence,
    request::{Failure, FailureKind, Outcome, Request, link::Route},
    uplink::{self, LostReason},
    wire::relay::{self, RelayFrame, RelayToPeer, Welcome},
};

use super::{Actor, LineEvent};
use crate::mesh::{
    Caller, NotJoined, UplinkState, interfaces::source_towards, link::CODE_DONE, path::Whereabouts, roster::Member,
    wire::ToRelay,
};

impl Actor {
    /// Something happened on the line to the relay.
    pub(super) fn line_event(&mut self, event: LineEvent, now: Instant) {
        match event {
            LineEvent::Connected(addresses) => {
                self.relay = addresses;
                self.uplink.handle_connected(now);
            }
            LineEvent::Heard(rtt) => {
                self.relay_rtt = rtt.or(self.relay_rtt);
                self.uplink.handle_heard(now);
            }
            LineEvent::Ended(why) => {
                tracing::debug!(cause = %why, hint = why.hint, "no connection to the relay");
                self.line_trouble = Some(why);
                self.uplink.handle_disconnected(now, &mut self.rng);
            }
            LineEvent::Frame(frame) => self.frame(frame, now),
        }
        self.drain_uplink(now);
    }

    fn frame(&mut self, frame: RelayFrame, now: Instant) {
        match frame {
            RelayFrame::Control(RelayToPeer::Refused(refused)) => {
                self.uplink.handle_heard(now);
                self.exchange.handle_refused(refused, now, &mut self.rng);
            }
            RelayFrame::Control(word) => self.uplink.handle_control(word, now, &mut self.rng),
            RelayFrame::Message { from, sealed } => {
                self.uplink.handle_heard(now);
                self.exchange.handle_message(from, &sealed, now, &mut self.rng);
            }
            RelayFrame::MulticastShare { from, part, shared } => {
                self.uplink.handle_heard(now);
                self.exchange.handle_share(from, &part, &shared, now, &mut self.rng);
            }
            // The wire hands these to the links.
            RelayFrame::Datagram(_) => {}
        }
    }

    /// Carries out what the uplink wants.
    pub(super) fn drain_uplink(&mut self, now: Instant) {
        while let Some(event) = self.uplink.poll_event() {
            self.uplink_event(event, now);
        }
    }

    fn uplink_event(&mut self, event: uplink::Event, now: Instant) {
        match event {
            uplink::Event::Connect => {
                // From here the connection will come, if it comes.
                self.relay_source = self.relay.first().and_then(|relay| source_towards(*relay));
                self.line.connect();
            }
            uplink::Event::Disconnect => self.line.cut(),
            uplink::Event::Joined(welcome) => self.joined(&welcome, now),
            uplink::Event::RosterComplete => {
                tracing::info!("in the room");
                self.members.set_joined(now);
            }
            uplink::Event::MemberJoined(member) | uplink::Event::MemberMoved(member) => {
                self.member(&member, now);
                // Either side was away.
                if let Some(remote) = self.book.remote(member.instance) {
                    self.paths.is_back(&remote, now);
                }
            }
            uplink::Event::PresenceChanged(member) => self.member(&member, now),
            uplink::Event::MemberLeft(member) => self.member_left(&member, now),
            uplink::Event::Lost(reason) => self.lost(reason, now),
        }
    }

    fn joined(&mut self, welcome: &Welcome, now: Instant) {
        let responders = welcome.stun.map(|port| responders(&self.relay, port)).unwrap_or_default();
        self.relay_source = self.relay.first().and_then(|relay| source_towards(*relay));
        self.paths.watch_soon(now);
        self.paths.set_responders(responders, welcome.stun_alternate, now);
        self.paths.joined(now);
    }

    fn member(&mut self, member: &relay::Member, now: Instant) {
        let presence = match self.opener.open(member.peer, member.instance, &member.presence) {
            Ok(presence) => presence,
            Err(fault) => {
                tracing::debug!(instance = %member.instance, %fault, "a presence was not taken");
                return;
            }
        };
        let address = Address { peer: member.peer, instance: member.instance };
        self.exchange.member_joined(address, member.slot, presence.epoch, now, &mut self.rng);
        self.book.set_slot(member.instance, Some(member.slot));
        let known = Member { peer: member.peer, presence, slot: Some(member.slot) };
        self.members.set(member.instance, known, now);
        self.end_links_to_replaced(member.peer, now);
    }

    /// Ends links to processes that another took the place of: what goes over them could only wait for its time-out.
    fn end_links_to_replaced(&mut self, peer: PeerId, now: Instant) {
        for instance in self.members.replaced(peer) {
            for route in [Route::Auto, Route::RelayedOnly] {
                if let Some(link) = self.book.get((instance, route), now) {
                    link.connection.close(CODE_DONE, b"replaced");
                }
            }
        }
    }

    fn member_left(&mut self, member: &relay::Member, now: Instant) {
        self.exchange.member_left(member.instance, now);
        self.book.set_slot(member.instance, None);
        let has_link = self.book.knows(member.instance);
        self.members.left(member.instance, has_link, now);
        self.opener.forget(member.instance);
        self.end_links_to_replaced(member.peer, now);
    }

    fn lost(&mut self, reason: LostReason, now: Instant) {
        // The line knows more than that it broke.
        let trouble = match reason {
            LostReason::NoConnection | LostReason::Broken => self.line_trouble.take(),
            LostReason::Silent | LostReason::Closed(_) | LostReason::Drained | LostReason::Misbehaved => None,
        };
        let trouble = trouble.unwrap_or_else(|| NotJoined::because(reason));
        tracing::info!(%trouble, hint = trouble.hint, "not in the room; trying to come back");
        self.exchange.uplink_lost();
        self.book.clear_slots();
        self.members.set_lost(trouble, now);
        // What was to be sent names slots that are gone.
        self.outgoing = None;
        self.relay_rtt = None;
    }

    /// The next frame for the relay: the uplink's own first.
    pub(super) fn next_frame(&mut self) -> Option<ToRelay> {
        match self.uplink.poll_transmit() {
            Some(uplink::Transmit::Frame(frame)) => return Some(ToRelay::Frame(frame)),
            Some(uplink::Transmit::Ping) => return Some(ToRelay::Ping),
            // Before that there is nobody to answer it.
            None if self.members.uplink() == UplinkState::Joined && std::mem::take(&mut self.wants_ping) => {
                return Some(ToRelay::Ping);
            }
            None => {}
        }
        self.exchange.poll_transmit().map(ToRelay::Frame)
    }

    /// Something happened to a request.
    pub(super) async fn exchange_event(&mut self, event: exchange::Event, now: Instant) {
        match event {
            exchange::Event::Asked { caller, id, request } => {
                let caller = Caller { peer: caller.peer, instance: caller.instance };
                match request {
                    Request::Link(offer) => {
                        let outcome = self.link_offered(caller, &offer, now).await;
                        self.exchange.answer(caller.instance, id, outcome, now);
                    }
                    Request::Candidates(update) => {
                        let outcome = self.candidates_told(caller, update, now);
                        self.exchange.answer(caller.instance, id, outcome, now);
                    }
                    request @ (Request::Ping
                    | Request::Exec(_)
                    | Request::Attach(_)
                    | Request::Jobs
                    | Request::Cancel(_)
                    | Request::Offer(_)
                    | Request::Receive(_)
                    | Request::Pull(_)
                    | Request::Network) => self.serve(caller, id, request, now),
                }
            }
            exchange::Event::Accepted { id } => self.asks.accepted(id),
            exchange::Event::Answered { id, outcome } => {
                tracing::debug!(request = ?id, "a request is answered");
                let about_link = self.asks.ended(id, Ok(outcome));
                self.link_answered(about_link);
            }
            exchange::Event::Failed { id, fault } => {
                let about_link = self.asks.ended(id, Err(fault));
                self.link_answered(about_link);
            }
            exchange::Event::EpochChanged(epoch) => {
                self.presence = Presence { epoch, ..self.presence.clone() };
                self.publish_presence();
            }
        }
    }

    fn candidates_told(
        &mut self,
        caller: Caller,
        update: peerfleet_proto::request::link::CandidateUpdate,
        now: Instant,
    ) -> Outcome {
        match self.book.remote(caller.instance) {
            Some(remote) => {
                let there = Whereabouts { candidates: update.candidates, nat: update.nat };
                self.paths.set_theirs(&remote, there, now);
                Outcome::Done
            }
            None => Outcome::Failed(Failure::new(FailureKind::NotFound, "there is no link", "offer one first")),
        }
    }
}

/// Where the relay's STUN responder may be: at its own port, where something in front of it was dialled; at the port
/// dialled, where both were mapped to another one together.
fn responders(relay: &[SocketAddr], port: u16) -> Vec<SocketAddr> {
    let mut responders: Vec<SocketAddr> = relay.iter().map(|address| SocketAddr::new(address.ip(), port)).collect();
    responders.extend(relay.iter().filter(|address| address.port() != port));
    responders
}
