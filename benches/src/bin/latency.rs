//! One `exec true` through the relay on a session that stands, beside what it cannot do without: a round trip of a
//! message through a bare forwarder, and starting `true` here.
//!
//! Relay and forwarder are processes of their own; whoever asks and whoever answers are in this one, the same for
//! both. Floor and ours take turns; medians count.

use std::{process::Command, time::Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Parser;
use peerfleet_benches::{
    crowd::{self, Crowd, DEADLINE},
    floor::{forwarder, spawn},
    report,
    room::{Process, Room},
};
use peerfleet_peer::mesh::Mesh;
use peerfleet_proto::{id::InstanceId, request::exec::Follow};

/// Size of the floor's message: about that of a sealed exec.
const MESSAGE_BYTES: usize = 256;

/// Rounds before counting begins.
const WARM_UP: usize = 20;

#[derive(Parser)]
struct Args {
    /// Round trips of floor and ours, in turn.
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// Be the forwarder.
    #[arg(long, hide = true)]
    forwarder: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if args.forwarder {
        return forwarder::serve().await;
    }
    let forwarder = Process::start_announcing(Command::new(std::env::current_exe()?).arg("--forwarder"))?;
    let address = forwarder.1.parse()?;
    let mut client = forwarder::connect(address).await?;
    tokio::spawn(forwarder::echo(forwarder::connect(address).await?));
    let message = Bytes::from(vec![0x5A; MESSAGE_BYTES]);

    let room = Room::start()?;
    let crowd = Crowd::new(room.addr, room.folder.path())?;
    let host = crowd.host("host");
    let caller = crowd.caller(1).await?;

    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for round in 0..args.rounds + WARM_UP {
        let there_and_back = forwarder::round_trip(&mut client, &message).await?;
        let here = spawn::one().await?;
        let asked = exec_true(&caller, host.me().instance).await?;
        if round >= WARM_UP {
            floor.push((there_and_back + here).as_secs_f64() * 1e3);
            ours.push(asked);
        }
    }
    report("exec true through the relay, p50", "ms", &floor, &ours, "≤ 2");
    Ok(())
}

/// Milliseconds from asking to the outcome.
async fn exec_true(caller: &Mesh, host: InstanceId) -> Result<f64> {
    let start = Instant::now();
    let outcome = caller.ask(host, crowd::run_true(Follow::Attached), DEADLINE).await;
    let took = start.elapsed();
    crowd::ended_well(&outcome.context("the host was not asked")?)?;
    Ok(took.as_secs_f64() * 1e3)
}
