//! A transfer over long and lossy cables: bare quinn with its own CUBIC against the same with our congestion control.
//!
//! Sender, cable and receiver are on this machine, the receiver in a process of its own. CUBIC and ours take turns over
//! the same cable; medians count. What every cable has is a queue of one bandwidth-delay product, as home routers do.

use std::{path::PathBuf, process::Command, sync::Arc, time::Duration};

use anyhow::Result;
use clap::{Parser, Subcommand};
use peerfleet_benches::{
    cable::{Cable, Condition},
    floor::quic::{self, Poured},
    report, report_absolute,
    room::Process,
};
use peerfleet_peer::mesh::congestion::PathAwareFactory;
use quinn::congestion::{ControllerFactory, CubicConfig};

/// Cables: megabits a second, milliseconds there and back, lost packets in a thousand each way, and what is promised of
/// ours in units of CUBIC.
const CABLES: [(f64, u64, u64, &str); 6] = [
    (200.0, 50, 0, "≥ 0.9"),
    (200.0, 50, 1, "≥ 3"),
    (200.0, 50, 10, "≥ 10"),
    (200.0, 50, 30, "≥ 10"),
    (200.0, 50, 50, "≥ 10"),
    (100.0, 200, 50, "≥ 10"),
];

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// Seconds of each run.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Pairs of CUBIC and ours.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
}

/// The process that the bench starts of itself.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    Receiver { certificate: PathBuf, key: PathBuf },
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.role {
        Some(Role::Receiver { certificate, key }) => {
            runtime.block_on(quic::serve(std::fs::read(certificate)?, std::fs::read(key)?))
        }
        None => runtime.block_on(measure(Duration::from_secs(args.seconds), args.pairs)),
    }
}

async fn measure(time: Duration, pairs: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let generated = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let certificate = generated.cert.der().to_vec();
    let (certificate_file, key_file) = (folder.path().join("certificate"), folder.path().join("key"));
    std::fs::write(&certificate_file, &certificate)?;
    std::fs::write(&key_file, generated.signing_key.serialize_der())?;
    let mut receiver = Command::new(std::env::current_exe()?);
    receiver.arg("receiver").arg(&certificate_file).arg(&key_file);
    let receiver = Process::start_announcing(&mut receiver)?;
    let far = receiver.1.parse()?;
    for (megabit, round_trip, loss_permille, bound) in CABLES {
        let queue = (megabit * 125.0 * round_trip as f64) as usize;
        let round_trip = Duration::from_millis(round_trip);
        let cable = Cable::lay(far, Condition { round_trip, loss_permille, megabit, queue })?;
        let (mut floor, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            floor.push(quic::pour(cable.near, certificate.clone(), time, Arc::<CubicConfig>::default()).await?);
            ours.push(quic::pour(cable.near, certificate.clone(), time, our_own()).await?);
        }
        let name = format!("{megabit} Mbit/s, {round_trip:?}, {} % lost", loss_permille as f64 / 10.0);
        let arrived = |poured: &[Poured]| poured.iter().map(|poured| poured.megabits).collect::<Vec<_>>();
        report(&name, "Mbit/s", &arrived(&floor), &arrived(&ours), bound);
        let lost = ours.iter().map(|poured| poured.lost_percent).sum::<f64>() / ours.len() as f64;
        report_absolute(&format!("{name}: lost of ours"), "%", lost, "≤ 1 beyond what the cable loses");
    }
    Ok(())
}

/// Our congestion control, on a path that never changes.
fn our_own() -> Arc<dyn ControllerFactory + Send + Sync> {
    Arc::new(PathAwareFactory::new(Arc::default(), Arc::default()))
}
