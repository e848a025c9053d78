//! The core of peerfleet: every byte on a wire and every decision about it.
//!
//! Nothing here opens a socket, reads a clock or draws a random number. Every state machine keeps one contract:
//!
//! 1. `handle_*` and operations take bytes, events, `now` and, where keys or nonces are made, a source of randomness;
//! 2. the caller then drains `poll_transmit` (what to send) and `poll_event` (what happened) until both say `None`;
//! 3. and sleeps until `poll_timeout`, upon which it calls `handle_timeout` and drains again.
//!
//! So the same code runs beneath the real sockets, in a simulated network with virtual time, and under the fuzzer.
//! Input never panics: bytes from outside end in a [`fault`], and an `expect` states the invariant that holds.
//!
//! | to find | look in |
//! |---|---|
//! | numbers that two sides must agree on | [`limits`] |
//! | ids and newtypes | [`id`] |
//! | token and room name → keys | [`token`] |
//! | frames between peer and relay | [`wire::relay`] |
//! | both sides of joining a room | [`admission`] |
//! | the life of the connection to the relay | [`uplink`] |
//! | what a peer says of itself | [`presence`] |
//! | sealed messages, and asking through them | [`sealed`], [`exchange`] |
//! | requests and their outcomes | [`request`] |
//! | which hosts | [`target`] |
//! | hole punching | [`path`], [`stun`] |
//! | files on their way | [`transfer`] |
//! | how much may be in flight | [`congestion`] |

#![forbid(unsafe_code)]

pub mod admission;
pub mod congestion;
pub mod exchange;
pub mod fault;
pub mod id;
pub mod limits;
pub mod path;
pub mod presence;
pub mod request;
pub mod sealed;
pub mod stun;
pub mod target;
pub mod token;
pub mod transfer;
pub mod uplink;
pub mod wire;
