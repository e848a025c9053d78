//! Resident memory of a daemon that is in a room, with another one, and has nothing to do.

use std::time::Duration;

use anyhow::Result;
use peerfleet_benches::{report_absolute, resident, room::Room};

/// Time for what starting needed to be given back, before memory is read.
const SETTLE: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    let mut room = Room::start()?;
    for name in ["left", "right"] {
        room.add_peer(name)?;
    }
    room.wait_for_hosts("left", 2)?;
    std::thread::sleep(SETTLE);
    for (name, peer) in [("left", &room.peers[0]), ("right", &room.peers[1])] {
        let (now, peak) = resident(peer.pid())?;
        let mebibytes = |bytes: u64| bytes as f64 / 1048576.0;
        report_absolute(&format!("resident memory of idle {name}"), "MiB", mebibytes(now), "≤ 16");
        report_absolute(&format!("its peak since it started, {name}"), "MiB", mebibytes(peak), "none");
    }
    Ok(())
}
