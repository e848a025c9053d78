//! What the benches share: real binaries as child processes, medians, and the form in which figures are printed.
//!
//! Each bench is a binary of its own that measures a floor and ours in the same run, in turn, and prints both with
//! their ratio. Nothing here decides whether a figure is good: the README says which are promised.

#![expect(clippy::print_stdout, reason = "figures are what a bench is for")]

pub mod cable;
pub mod crowd;
pub mod floor;
pub mod room;

use std::time::Duration;

/// Median of some figures; the mean of the middle two where their number is even.
///
/// # Panics
/// If there is no figure.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

/// Prints one comparison: floor, ours, and ours in units of the floor, with the promised bound beside it.
pub fn report(name: &str, unit: &str, floor: &[f64], ours: &[f64], bound: &str) {
    let (floor_median, ours_median) = (median(floor), median(ours));
    println!(
        "{name}: floor {floor_median:.3} {unit} {}, ours {ours_median:.3} {unit} {}, ratio {:.3} (promised {bound})",
        spread(floor),
        spread(ours),
        ours_median / floor_median,
    );
}

/// Prints one absolute figure with the promised bound beside it.
pub fn report_absolute(name: &str, unit: &str, figure: f64, bound: &str) {
    println!("{name}: {figure:.2} {unit} (promised {bound})");
}

fn spread(figures: &[f64]) -> String {
    let low = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let high = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("[{low:.3}..{high:.3}, n={}]", figures.len())
}

/// Megabytes (10^6 bytes) a second.
pub fn megabytes_per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

/// Resident memory of a process, in bytes: now, and the highest it ever was.
///
/// # Errors
/// If the process is gone.
pub fn resident(pid: u32) -> anyhow::Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kibibytes.map(|kibibytes| kibibytes * 1024).ok_or_else(|| anyhow::anyhow!("no {name} in the process's status"))
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}
