//! Which pairs can have a direct path, by host, server-reflexive and peer-reflexive candidates alone.

use crate::net::{Filter, Gate, Mapping};

/// Whether two hosts behind gates of their own can. Two behind the same gate always can.
pub(crate) fn can_be_direct(one: &Gate, other: &Gate) -> bool {
    if one.udp_blocked || other.udp_blocked {
        return false;
    }
    if one.ipv6 && other.ipv6 {
        // Nothing is translated: each opens its own firewall by sending.
        return true;
    }
    match (is_stable(one), is_stable(other)) {
        (true, true) => true,
        (true, false) => hears_from_a_new_port(one),
        (false, true) => hears_from_a_new_port(other),
        (false, false) => meets(one, other) || meets(other, one),
    }
}

/// Everybody sees it at the address that it told.
fn is_stable(gate: &Gate) -> bool {
    matches!(gate.mapping, Mapping::None | Mapping::Independent)
}

/// What comes from an address that was sent to, but another port, gets in.
fn hears_from_a_new_port(gate: &Gate) -> bool {
    gate.filter != Filter::Port
}

/// Neither is where it told. `caller` sends to where `called` told, through a mapping that has never sent anywhere but to
/// the responder; so `called` must let anybody in. It sends back from a new port, which `caller` must let in. From then on one
/// of the two must keep its mapping when the other's port is new.
fn meets(caller: &Gate, called: &Gate) -> bool {
    let both_move = caller.mapping == Mapping::Port && called.mapping == Mapping::Port;
    called.filter == Filter::Independent && hears_from_a_new_port(caller) && !both_move
}
