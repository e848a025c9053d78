//! Exchanges in a hostile world, in virtual time: the relay does what it likes, and so do members of the room.

#[path = "../common/mod.rs"]
mod common;
mod members;
mod net;
mod relay;
