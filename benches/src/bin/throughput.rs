//! A file from host to host: bare quinn against a direct transfer, a bare forwarder against a relayed one.
//!
//! Every process is real: relay, two peers, the caller. Floor and ours take turns; medians count.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use peerfleet_benches::{
    floor::{forwarder, quic},
    megabytes_per_second, report, report_absolute, resident,
    room::{Process, Room},
};

/// Bytes in a GSO batch of ten packets as quinn makes them: the size of a relayed frame.
const BATCH_BYTES: usize = 14_520;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// Size of the file, in MiB.
    #[arg(long, default_value_t = 1024)]
    mebibytes: u64,
    /// Pairs of floor and ours.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
}

/// The processes that the bench starts of itself.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    QuicServer { certificate: String, key: String },
    #[command(hide = true)]
    QuicClient { server: SocketAddr, certificate: String, bytes: u64 },
    #[command(hide = true)]
    Forwarder,
    #[command(hide = true)]
    ForwardedTaker { forwarder: SocketAddr, bytes: u64 },
    #[command(hide = true)]
    ForwardedSender { forwarder: SocketAddr, bytes: u64 },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.role {
        Some(role) => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(play(role)),
        None => measure(args.mebibytes * 1024 * 1024, args.pairs),
    }
}

async fn play(role: Role) -> Result<()> {
    match role {
        Role::QuicServer { certificate, key } => {
            quic::serve(std::fs::read(certificate)?, std::fs::read(key)?).await?;
        }
        Role::QuicClient { server, certificate, bytes } => {
            announce(quic::send(server, std::fs::read(certificate)?, bytes).await?);
        }
        Role::Forwarder => forwarder::serve().await?,
        Role::ForwardedTaker { forwarder, bytes } => {
            let client = forwarder::connect(forwarder).await?;
            announce(Duration::ZERO);
            forwarder::take(client, bytes).await?;
        }
        Role::ForwardedSender { forwarder, bytes } => {
            let client = forwarder::connect(forwarder).await?;
            announce(forwarder::send(client, bytes, BATCH_BYTES).await?);
        }
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the parent reads the figure from here")]
fn announce(took: Duration) {
    println!("{}", took.as_secs_f64());
}

fn measure(bytes: u64, pairs: usize) -> Result<()> {
    let mut room = Room::start()?;
    room.add_peer("left")?;
    room.add_peer("right")?;
    room.wait_for_hosts("left", 2)?;
    write_random(&room.path("file"), bytes)?;
    let floors = Floors::prepare(&room)?;
    let processes = [("relay", room.relay.pid()), ("left", room.peers[0].pid()), ("right", room.peers[1].pid())];
    for (path, bound) in [("direct", "≥ 0.6"), ("relayed", "≥ 0.4")] {
        let (mut floor, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let took = if path == "direct" { floors.quic(bytes)? } else { floors.forwarder(bytes)? };
            floor.push(megabytes_per_second(bytes, took));
            ours.push(megabytes_per_second(bytes, send_file(&room, path)?));
        }
        report(&format!("{path} transfer"), "MB/s", &floor, &ours, bound);
    }
    for (name, pid) in processes {
        let peak = resident(pid)?.1;
        report_absolute(&format!("peak resident memory of {name}"), "MiB", peak as f64 / 1048576.0, "< 64");
    }
    Ok(())
}

fn write_random(path: &Path, bytes: u64) -> Result<()> {
    let mut source = std::io::Read::take(std::fs::File::open("/dev/urandom")?, bytes);
    std::io::copy(&mut source, &mut std::fs::File::create(path)?)?;
    Ok(())
}

/// From the start of the command to its end, everything included.
fn send_file(room: &Room, path: &str) -> Result<Duration> {
    let target = room.path("copy");
    let start = Instant::now();
    let output = room
        .peer("left")?
        .args(["send-file", "--json", "--path", path])
        .arg(room.path("file"))
        .arg(format!("right:{}", target.display()))
        .stderr(Stdio::inherit())
        .output()?;
    let took = start.elapsed();
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "send-file failed: {words}");
    let last = words.lines().last().context("send-file said nothing")?;
    let done: serde_json::Value = serde_json::from_str(last)?;
    ensure!(done["event"] == "done" && done["path"] == path, "not done by a {path} path: {last}");
    std::fs::remove_file(target)?;
    Ok(took)
}

struct Floors {
    certificate: String,
    quic: SocketAddr,
    forwarder: SocketAddr,
    _servers: [Process; 2],
}

impl Floors {
    fn prepare(room: &Room) -> Result<Self> {
        let (certificate, key) = (room.path("certificate.der"), room.path("key.der"));
        make_certificate(&certificate, &key)?;
        let certificate = certificate.display().to_string();
        let key = key.display().to_string();
        let (quic_server, quic) = role(&["quic-server", &certificate, &key])?;
        let (forwarder_server, forwarder) = role(&["forwarder"])?;
        let _servers = [quic_server, forwarder_server];
        Ok(Self { certificate, quic: quic.parse()?, forwarder: forwarder.parse()?, _servers })
    }

    fn quic(&self, bytes: u64) -> Result<Duration> {
        let (_client, took) = role(&["quic-client", &self.quic.to_string(), &self.certificate, &bytes.to_string()])?;
        Ok(Duration::from_secs_f64(took.parse()?))
    }

    fn forwarder(&self, bytes: u64) -> Result<Duration> {
        let (addr, bytes) = (self.forwarder.to_string(), bytes.to_string());
        let (_taker, _) = role(&["forwarded-taker", &addr, &bytes])?;
        let (_sender, took) = role(&["forwarded-sender", &addr, &bytes])?;
        Ok(Duration::from_secs_f64(took.parse()?))
    }
}

/// Starts this bench in another role.
fn role(args: &[&str]) -> Result<(Process, String)> {
    Process::start_announcing(Command::new(std::env::current_exe()?).args(args))
}

/// A self-signed certificate for the floor alone; ours use raw public keys.
fn make_certificate(certificate: &Path, key: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    std::fs::write(certificate, made.cert.der())?;
    std::fs::write(key, made.signing_key.serialize_der())?;
    Ok(())
}
