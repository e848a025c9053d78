//! The real `relay` and `peer` programs together, as several machines that are one room.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "whole/doctor.rs"]
mod doctor;
#[path = "whole/kill.rs"]
mod kill;
#[path = "whole/rights.rs"]
mod rights;
#[path = "whole/room.rs"]
mod room;
#[path = "whole/secrets.rs"]
mod secrets;
#[path = "whole/streams.rs"]
mod streams;
