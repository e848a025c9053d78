//! `peer jobs`: what a host ran and runs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use peerfleet_proto::{
    id::{JobId, SHORTEST_PREFIX},
    request::{
        Outcome, Request,
        exec::{EndState, JobSummary},
    },
};
use serde_json::json;

use super::{context::Context, exec::word};
use crate::{
    client::Client,
    failure::{Failure, Result},
    machine::Host,
    ui,
};

/// Time for a host to list its jobs.
const LIST_DEADLINE: Duration = Duration::from_secs(15);

/// List the jobs of a host, newest first
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Jobs {
    /// Name of the host, or 4 or more characters of its id
    host: String,
}

const EXAMPLES: &str = "\
Examples:
  peer jobs build
  peer jobs build --json | jq '.[] | select(.state == \"running\")'";

impl Jobs {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let client = context.client().await?;
        let host = client.host(&self.host).await?;
        let jobs = list(&client, &host).await?;
        client.close().await;
        if context.ui.json {
            let jobs: Vec<serde_json::Value> = jobs.iter().map(as_json).collect();
            context.ui.json_line(&jobs)?;
        } else if jobs.is_empty() {
            context.ui.note(&format!("`{}` has no jobs", host.name()));
        } else {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let rows: Vec<Vec<String>> = jobs.iter().map(|job| row(job, now)).collect();
            context.ui.table(&["JOB", "STATE", "STARTED", "TOOK", "STDOUT", "STDERR", "COMMAND"], &rows)?;
        }
        Ok(0)
    }
}

/// The host's jobs.
pub(super) async fn list(client: &Client, host: &Host) -> Result<Vec<JobSummary>> {
    match client.ask(host.instance, &Request::Jobs, LIST_DEADLINE).await {
        Ok(Outcome::Jobs(jobs)) => Ok(jobs),
        Ok(Outcome::Failed(failure)) => {
            Err(Failure::from_host(format!("cannot list jobs of `{}`", host.name()), failure))
        }
        Ok(_) => Err(Failure::odd_answer(host.name())),
        Err(fault) => Err(Failure::from_question(host.name(), fault)),
    }
}

/// The job that `text` names: its id, or the beginning of one that the host knows.
pub(super) async fn find(client: &Client, host: &Host, text: &str) -> Result<JobId> {
    if let Ok(job) = text.parse() {
        return Ok(job);
    }
    let hint =
        format!("`peer jobs {}` lists them; {SHORTEST_PREFIX} or more characters of an id are enough", host.name());
    let wanted = text.to_ascii_lowercase();
    let jobs = if wanted.len() < SHORTEST_PREFIX { Vec::new() } else { list(client, host).await? };
    let mut found = jobs.iter().filter(|job| job.job.to_string().starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(job), None) => Ok(job.job),
        (None, _) => Err(Failure::fixable(format!("`{}` knows no job `{text}`", host.name())).hint(hint)),
        (Some(one), Some(other)) => Err(Failure::fixable(format!("`{text}` is more than one job"))
            .cause(format!("{} and {} begin so", one.job, other.job))
            .hint(hint)),
    }
}

fn state(job: &JobSummary) -> String {
    match job.end.as_ref().map(|end| &end.state) {
        None => "running".to_owned(),
        Some(EndState::Exited(code)) => format!("exited {code}"),
        Some(EndState::Signalled(signal)) => format!("signal {signal}"),
        Some(state) => word(state).replace('_', " "),
    }
}

fn row(job: &JobSummary, now: Duration) -> Vec<String> {
    let ago = now.saturating_sub(Duration::from_millis(job.started_unix_ms));
    vec![
        job.job.to_string().chars().take(10).collect(),
        state(job),
        format!("{} ago", ui::human_duration(ago)),
        job.end.as_ref().map_or_else(|| "-".to_owned(), |end| ui::human_duration(end.duration)),
        ui::human_bytes(job.stdout_bytes),
        ui::human_bytes(job.stderr_bytes),
        job.command.clone(),
    ]
}

fn as_json(job: &JobSummary) -> serde_json::Value {
    let end = job.end.as_ref();
    let (exit_code, signal) = match end.map(|end| &end.state) {
        Some(EndState::Exited(code)) => (Some(*code), None),
        Some(EndState::Signalled(signal)) => (None, Some(*signal)),
        _ => (None, None),
    };
    let error = match end.map(|end| &end.state) {
        Some(EndState::SpawnFailed(failure)) => Some(failure.what.as_str()),
        _ => None,
    };
    json!({
        "job": job.job.to_string(),
        "caller": job.caller.to_string(),
        "command": job.command,
        "state": end.map_or("running", |end| word(&end.state)),
        "exit_code": exit_code,
        "signal": signal,
        "started_unix_ms": job.started_unix_ms,
        "duration_ms": end.map(|end| u64::try_from(end.duration.as_millis()).unwrap_or(u64::MAX)),
        "stdout_bytes": job.stdout_bytes,
        "stderr_bytes": job.stderr_bytes,
        "error": error,
    })
}
