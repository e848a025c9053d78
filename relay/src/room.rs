//! One room: who is in it, and who gets what.
//!
//! In: joins, leaves, new presences, and the slot a frame is for. Out: the member it goes to, or that there is none.
//! Never locks, waits, or looks into a frame; what stands behind a member (`M`) is the caller's business.
//! A member is in the room from `join` to `leave`; its slot is never given to anybody else.
//! Bounds: `most` members, each with a presence of at most `MAX_PRESENCE_BYTES`.

use std::{collections::BTreeMap, sync::Arc};

use peerfleet_proto::{
    id::{InstanceId, PeerId, Slot},
    wire::relay::Member,
};

/// The members of one room, each with its way to be reached.
#[derive(Debug)]
pub struct Room<M> {
    members: BTreeMap<Slot, (Arc<Member>, M)>,
    next: u32,
    most: usize,
}

/// Who wants in, and has proved it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newcomer {
    /// The proved identity.
    pub peer: PeerId,
    /// The instance.
    pub instance: InstanceId,
    /// The sealed presence.
    pub presence: Vec<u8>,
}

/// The room has its most members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the room is full")]
pub struct RoomFull;

impl<M> Room<M> {
    /// An empty room for at most `most` members.
    pub fn new(most: usize) -> Self {
        Self { members: BTreeMap::new(), next: 0, most }
    }

    /// Lets somebody in. Nobody has to go for it: the same identity, even the same instance, may be here many times.
    ///
    /// # Errors
    /// [`RoomFull`] if there are `most` members, or no slot that was never used.
    pub fn join(&mut self, newcomer: Newcomer, reach: M) -> Result<Arc<Member>, RoomFull> {
        if self.members.len() >= self.most {
            return Err(RoomFull);
        }
        let slot = Slot(self.next);
        self.next = self.next.checked_add(1).ok_or(RoomFull)?;
        let Newcomer { peer, instance, presence } = newcomer;
        let member = Arc::new(Member { slot, peer, instance, presence });
        self.members.insert(slot, (member.clone(), reach));
        Ok(member)
    }

    /// Lets a member go; says whether it was here.
    pub fn leave(&mut self, slot: Slot) -> bool {
        self.members.remove(&slot).is_some()
    }

    /// Replaces a member's presence; says whether it is here.
    pub fn publish(&mut self, slot: Slot, presence: Vec<u8>) -> bool {
        let Some((member, _)) = self.members.get_mut(&slot) else { return false };
        *member = Arc::new(Member { presence, ..Member::clone(member) });
        true
    }

    /// How to reach a member, or `None` if nobody has that slot (any more).
    pub fn route(&self, to: Slot) -> Option<&M> {
        self.members.get(&to).map(|(_, reach)| reach)
    }

    /// Every member but one, in the order of slots.
    pub fn others(&self, but: Slot) -> impl Iterator<Item = (&Arc<Member>, &M)> {
        self.members.iter().filter(move |(slot, _)| **slot != but).map(|(_, (member, reach))| (member, reach))
    }

    /// Every member, in the order of slots.
    pub fn everybody(&self) -> impl Iterator<Item = &M> {
        self.members.values().map(|(_, reach)| reach)
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether nobody is here.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn newcomer(byte: u8) -> Newcomer {
        let peer = PeerId::from_bytes([byte; 32]);
        Newcomer { peer, instance: InstanceId::from_bytes([byte; 16]), presence: vec![byte] }
    }

    #[test]
    fn a_second_instance_of_an_identity_evicts_nobody() {
        let mut room = Room::new(10);
        let first = room.join(newcomer(1), "first").unwrap().slot;
        let second =
            room.join(Newcomer { instance: InstanceId::from_bytes([2; 16]), ..newcomer(1) }, "second").unwrap();
        let again = room.join(newcomer(1), "again").unwrap().slot;
        assert_eq!(room.route(first), Some(&"first"));
        assert_eq!(room.route(second.slot), Some(&"second"));
        assert_eq!(room.route(again), Some(&"again"));
    }

    #[test]
    fn nobody_is_reached_under_the_slot_of_who_left() {
        let mut room = Room::new(10);
        let slot = room.join(newcomer(1), ()).unwrap().slot;
        assert!(room.leave(slot));
        assert!(!room.leave(slot));
        let later = room.join(newcomer(1), ()).unwrap().slot;
        assert_ne!(slot, later);
        assert_eq!(room.route(slot), None);
    }

    #[test]
    fn full_room_takes_one_more_when_one_has_left() {
        let mut room = Room::new(2);
        let slot = room.join(newcomer(1), ()).unwrap().slot;
        room.join(newcomer(2), ()).unwrap();
        assert_eq!(room.join(newcomer(3), ()).unwrap_err(), RoomFull);
        room.leave(slot);
        assert!(room.join(newcomer(3), ()).is_ok());
    }

    #[test]
    fn used_up_slots_are_not_used_again() {
        let mut room = Room { members: BTreeMap::new(), next: u32::MAX, most: 10 };
        assert_eq!(room.join(newcomer(1), ()).unwrap_err(), RoomFull);
    }

    #[test]
    fn others_see_the_newest_presence() {
        let mut room = Room::new(10);
        let one = room.join(newcomer(1), ()).unwrap().slot;
        let two = room.join(newcomer(2), ()).unwrap().slot;
        assert!(room.publish(one, vec![7]));
        let seen: Vec<_> = room.others(two).map(|(member, ())| (member.slot, member.presence.clone())).collect();
        assert_eq!(seen, [(one, vec![7])]);
        assert!(!room.publish(Slot(99), vec![8]));
    }

    proptest! {
        #[test]
        fn exactly_who_joined_and_has_not_left_is_reached(steps in prop::collection::vec((any::<bool>(), 0..40_u32), 0..200)) {
            let mut room = Room::new(16);
            let mut here = BTreeSet::new();
            let mut given = BTreeSet::new();
            for (join, slot) in steps {
                if join {
                    let joined = room.join(newcomer(0), ());
                    prop_assert_eq!(joined.is_ok(), here.len() < 16);
                    if let Ok(member) = joined {
                        prop_assert!(given.insert(member.slot), "a slot was given twice");
                        here.insert(member.slot);
                    }
                } else {
                    prop_assert_eq!(room.leave(Slot(slot)), here.remove(&Slot(slot)));
                }
                for slot in (0..40).map(Slot) {
                    prop_assert_eq!(room.route(slot).is_some(), here.contains(&slot));
                }
                prop_assert_eq!(room.len(), here.len());
            }
        }
    }
}
