//! Local fork and exec: what a command costs where it runs, with nobody far away.

use std::{
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tokio::{process::Command, sync::Semaphore, task::JoinSet};

/// Runs `true` once, with its output piped as a remote one's is, and returns how long that took.
///
/// # Errors
/// If it cannot be started or fails.
pub async fn one() -> Result<Duration> {
    let start = Instant::now();
    let output = Command::new("true").stdin(Stdio::null()).output().await?;
    ensure!(output.status.success(), "`true` failed");
    Ok(start.elapsed())
}

/// Runs `true` that many times, so many at once, and returns how long all took.
///
/// # Errors
/// If one cannot be started or fails.
pub async fn many(count: usize, at_once: usize) -> Result<Duration> {
    let permits = Arc::new(Semaphore::new(at_once));
    let start = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..count {
        let permits = permits.clone();
        running.spawn(async move {
            let _permit = permits.acquire_owned().await?;
            one().await
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(start.elapsed())
}
