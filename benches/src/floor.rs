//! The floors: the least that the same work costs with the bare libraries.

pub mod forwarder;
pub mod quic;
pub mod spawn;
