//! `true` on every host of a room with one upload, beside starting as many here with the same parallelism.
//!
//! The relay is a process of its own; the hosts and who asks them are in this one. Cold: the caller has no session
//! with anybody; it knows the room. Warm: the same caller asks again. Floor, cold and warm take turns; medians count.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use peerfleet_benches::{
    crowd::{self, Crowd, DEADLINE},
    floor::spawn,
    report,
    room::Room,
};
use peerfleet_peer::mesh::{AskProgress, Mesh};
use peerfleet_proto::{id::InstanceId, request::exec::Follow};

/// Time for everybody to learn of a caller's coming and going, before anything is measured.
const SETTLE: Duration = Duration::from_millis(500);

#[derive(Parser)]
struct Args {
    /// Hosts in the room.
    #[arg(long, default_value_t = 200)]
    hosts: usize,
    /// Rounds of floor, cold and warm.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let room = Room::start()?;
    let crowd = Crowd::new(room.addr, room.folder.path())?;
    let hosts: Vec<Mesh> = (0..args.hosts).map(|number| crowd.host(&format!("host-{number}"))).collect();
    let everybody: Vec<InstanceId> = hosts.iter().map(|host| host.me().instance).collect();
    let (mut floor, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let caller = crowd.caller(args.hosts).await?;
        tokio::time::sleep(SETTLE).await;
        floor.push(spawn::many(args.hosts, args.hosts).await?.as_secs_f64() * 1e3);
        cold.push(sweep(&caller, &everybody).await?);
        warm.push(sweep(&caller, &everybody).await?);
        caller.shutdown().await;
    }
    report(&format!("true on {} hosts, cold", args.hosts), "ms", &floor, &cold, "≤ 3");
    report(&format!("true on {} hosts, warm", args.hosts), "ms", &floor, &warm, "≤ 1.5");
    Ok(())
}

/// Milliseconds from asking to the last outcome.
async fn sweep(caller: &Mesh, everybody: &[InstanceId]) -> Result<f64> {
    let start = Instant::now();
    let mut progress = caller.ask_many(everybody.to_vec(), crowd::run_true(Follow::Collected), DEADLINE);
    let mut ended = 0;
    while let Some((_, progress)) = progress.recv().await {
        if let AskProgress::Ended(outcome) = progress {
            crowd::ended_well(&outcome.context("a host was not asked")?)?;
            ended += 1;
        }
    }
    let took = start.elapsed();
    ensure!(ended == everybody.len(), "{ended} of {} ended", everybody.len());
    Ok(took.as_secs_f64() * 1e3)
}
