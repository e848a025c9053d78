//! `peer logs`: what a job wrote, from its beginning.

use clap::Args;

use super::{
    context::Context,
    exec::ended,
    jobs,
    output::{Events, Raw},
    signals,
};
use crate::{
    client::exec::{self, Finished, Output},
    failure::{EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_NOT_RUN, Failure, Result},
};

/// Print what a job wrote, standard output and standard error apart
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Logs {
    /// Name of the host, or 4 or more characters of its id
    host: String,
    /// The job, by 4 or more characters of its id
    job: String,
    /// Go on until the job ends; Ctrl-C stops reading and lets it run
    #[arg(short, long)]
    follow: bool,
}

const EXAMPLES: &str = "\
Examples:
  peer logs build k3v5mq
  peer logs build k3v5mq --follow
  peer logs build k3v5mq 2>/dev/null | tail";

impl Logs {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let ui = context.ui;
        let client = context.client().await?;
        let host = client.host(&self.host).await?;
        let job = jobs::find(&client, &host, &self.job).await?;
        let mut output: Box<dyn Output> =
            if ui.json { Box::new(Events::new(ui, &host)) } else { Box::new(Raw::new(ui)?) };
        let stopped = signals::stopped()?;
        let (_sender, mut wishes) = tokio::sync::mpsc::channel(1);
        let read = tokio::select! {
            read = exec::log(&client, &host, job, self.follow, &mut *output, &mut wishes) => read,
            () = stopped => return Ok(EXIT_INTERRUPTED),
        };
        client.close().await;
        match read {
            Ok(Finished { broken_pipe: true, .. }) => Ok(EXIT_BROKEN_PIPE),
            // Reading the log went well, however the job ended.
            Ok(finished) if ui.json => match ended(ui, &host, &finished) {
                // That the job did not run is its end, and told; any other failure is ours.
                Err(failure) if failure.exit_code() != EXIT_NOT_RUN => Err(failure),
                Ok(_) | Err(_) => Ok(0),
            },
            Ok(_) => Ok(0),
            Err(not_run) => Err(Failure::new(not_run.failure.kind, not_run.failure.what.clone())
                .cause(not_run.failure.cause.unwrap_or_default())
                .hint(not_run.failure.hint.unwrap_or_default())),
        }
    }
}
