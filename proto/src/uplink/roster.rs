//! Who is in the room, as the relay tells it.
//!
//! In: members, leavings and presences of one connection after the other. Out: [`Event`]s about instances. A hostile
//! relay can hide members or invent some, who then can prove nothing; a hostile member cannot take another's place.
//! Told → known, or kept aside while another identity is known by the same instance id → gone. Bounds: [`MAX_MEMBERS`]
//! of this connection, and as many of those before.

use std::collections::{BTreeMap, VecDeque};

use super::{Event, MAX_MEMBERS};
use crate::{
    id::{InstanceId, PeerId, Slot},
    wire::relay::Member,
};

/// Who is in the room: connections by slot, as the relay tells them, and the one by which each instance is known.
#[derive(Default)]
pub(super) struct Roster {
    by_slot: BTreeMap<Slot, Member>,
    slots: BTreeMap<InstanceId, Slot>,
    /// Known from the connection before, until the new roster is complete.
    unconfirmed: BTreeMap<InstanceId, Member>,
}

impl Roster {
    /// The instance behind a slot, unless the slot is of somebody who only claims its id.
    pub(super) fn instance(&self, slot: Slot) -> Option<InstanceId> {
        let member = self.by_slot.get(&slot)?;
        self.current(member.instance).filter(|current| current.peer == member.peer).map(|_| member.instance)
    }

    /// The identity of an instance that is in the room, or was when it was last known.
    pub(super) fn identity(&self, instance: InstanceId) -> Option<PeerId> {
        self.current(instance).or_else(|| self.unconfirmed.get(&instance)).map(|member| member.peer)
    }

    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.slots.values().filter_map(|slot| self.by_slot.get(slot))
    }

    fn current(&self, instance: InstanceId) -> Option<&Member> {
        self.slots.get(&instance).and_then(|slot| self.by_slot.get(slot))
    }

    /// Out of the room: everybody known waits for the next roster.
    pub(super) fn begin_anew(&mut self, events: &mut VecDeque<Event>) {
        for (instance, slot) in std::mem::take(&mut self.slots) {
            let Some(member) = self.by_slot.remove(&slot) else { continue };
            if self.unconfirmed.len() < MAX_MEMBERS {
                self.unconfirmed.insert(instance, member);
            } else {
                events.push_back(Event::MemberLeft(member));
            }
        }
        self.by_slot.clear();
    }

    pub(super) fn add(&mut self, member: Member, events: &mut VecDeque<Event>) {
        if self.by_slot.get(&member.slot).is_some_and(|before| !same_process(before, &member)) {
            self.remove(member.slot, events);
        }
        if self.by_slot.len() >= MAX_MEMBERS && !self.by_slot.contains_key(&member.slot) {
            return;
        }
        let before = self.current(member.instance).cloned();
        let known = before.as_ref().or_else(|| self.unconfirmed.get(&member.instance)).cloned();
        self.by_slot.insert(member.slot, member.clone());
        match known {
            None => self.show(member, events),
            // Kept for the day on which that instance is gone.
            Some(known) if known.peer != member.peer => {}
            Some(known) => {
                self.unconfirmed.remove(&member.instance);
                self.slots.insert(member.instance, member.slot);
                let moved = before.is_none_or(|before| before.slot != member.slot);
                report_changes(&known, member, moved, events);
            }
        }
    }

    pub(super) fn remove(&mut self, slot: Slot, events: &mut VecDeque<Event>) {
        let Some(gone) = self.by_slot.remove(&slot) else { return };
        if self.slots.get(&gone.instance) != Some(&slot) {
            return;
        }
        self.slots.remove(&gone.instance);
        let other = self.by_slot.values().rfind(|member| same_process(member, &gone)).cloned();
        if let Some(other) = other {
            self.slots.insert(other.instance, other.slot);
            return report_changes(&gone, other, true, events);
        }
        self.leave(gone, events);
    }

    pub(super) fn change_presence(&mut self, slot: Slot, sealed: Vec<u8>, events: &mut VecDeque<Event>) {
        let Some(member) = self.by_slot.get_mut(&slot) else { return };
        let before = member.clone();
        member.presence = sealed;
        if self.slots.get(&before.instance) == Some(&slot) {
            report_changes(&before, member.clone(), false, events);
        }
    }

    /// All who are in the room are told: whoever is still unconfirmed has gone.
    pub(super) fn complete(&mut self, events: &mut VecDeque<Event>) {
        for gone in std::mem::take(&mut self.unconfirmed).into_values() {
            self.leave(gone, events);
        }
    }

    /// An instance is gone; its id is free for whoever else claims it.
    fn leave(&mut self, gone: Member, events: &mut VecDeque<Event>) {
        let other = self.by_slot.values().rfind(|member| member.instance == gone.instance).cloned();
        events.push_back(Event::MemberLeft(gone));
        if let Some(other) = other {
            self.show(other, events);
        }
    }

    fn show(&mut self, member: Member, events: &mut VecDeque<Event>) {
        self.slots.insert(member.instance, member.slot);
        events.push_back(Event::MemberJoined(member));
    }
}

fn same_process(one: &Member, other: &Member) -> bool {
    (one.peer, one.instance) == (other.peer, other.instance)
}

fn report_changes(before: &Member, after: Member, moved: bool, events: &mut VecDeque<Event>) {
    if moved {
        events.push_back(Event::MemberMoved(after.clone()));
    }
    if before.presence != after.presence {
        events.push_back(Event::PresenceChanged(after));
    }
}
