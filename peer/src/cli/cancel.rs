//! `peer cancel`: ends a job.

use std::time::Duration;

use clap::Args;
use peerfleet_proto::request::{Outcome, Request};
use serde_json::json;

use super::{context::Context, jobs};
use crate::failure::{Failure, Result};

/// Time for a host to take the cancellation.
const CANCEL_DEADLINE: Duration = Duration::from_secs(15);

/// End a job and everything that it started
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Cancel {
    /// Name of the host, or 4 or more characters of its id
    host: String,
    /// The job, by 4 or more characters of its id
    job: String,
}

const EXAMPLES: &str = "\
Examples:
  peer cancel build k3v5mq
  peer jobs build       shows ids, and afterwards how it ended";

impl Cancel {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let client = context.client().await?;
        let host = client.host(&self.host).await?;
        let job = jobs::find(&client, &host, &self.job).await?;
        let ended = client.ask(host.instance, &Request::Cancel(job), CANCEL_DEADLINE).await;
        client.close().await;
        match ended {
            Ok(Outcome::Done) => {}
            Ok(Outcome::Failed(failure)) => {
                return Err(Failure::from_host(format!("cannot cancel job {job} on `{}`", host.name()), failure));
            }
            Ok(_) => return Err(Failure::odd_answer(host.name())),
            Err(fault) => return Err(Failure::from_ask(host.name(), fault)),
        }
        if context.ui.json {
            context.ui.json_line(&json!({ "job": job.to_string(), "cancelled": true }))?;
        } else {
            context.ui.note(&format!("job {job} on `{}` has ended", host.name()));
        }
        Ok(0)
    }
}
