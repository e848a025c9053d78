//! The peerfleet peer: the shells around the core in `peerfleet_proto`.
//!
//! Front doors ([`cli`]) speak to people and call [`client`] and [`fleet`] only. [`mesh`] is one instance in one room
//! and knows no service. [`serve`] takes what others ask, lets [`access`] judge it and hands it to a service
//! ([`exec`], [`transfer`]), which never knows by which door it came. A [`machine`] is mesh and services together:
//! what [`daemon`] keeps going, and what a command starts for itself where no daemon runs.

pub mod access;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod env;
pub mod exec;
pub mod failure;
pub mod fleet;
pub mod identity;
pub mod machine;
pub mod mesh;
pub mod random;
pub mod serve;
pub mod state;
pub mod store;
pub mod transfer;
pub mod ui;
