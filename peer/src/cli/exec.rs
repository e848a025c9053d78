//! `peer exec`: one command on one host, as if it ran here.

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use clap::Args;
use peerfleet_proto::request::exec::{Command, EndState, ExecSpec, Follow, JobEnd};
use serde_json::json;
use tokio::sync::mpsc;

use super::{
    context::Context,
    output::{Events, Raw},
    signals,
    span::Span,
};
use crate::{
    client::{
        Client,
        exec::{self, Finished, Input, NotRun, Output, Stdin, Wish},
    },
    failure::{EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, Failure, Result},
    machine::Host,
    ui::Ui,
};

/// Run a command on one host
///
/// Its output comes here as it is written, its exit code becomes ours: 124 if it timed out, 125 if it did not run.
/// Ctrl-C interrupts it; twice ends it; three times leaves it. The host's mode must be `bypass`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Exec {
    /// Name of the host, or 4 or more characters of its id
    host: String,
    #[command(flatten)]
    order: OrderFlags,
    /// End it after this time (30s, 5m, 1h)
    #[arg(long, value_name = "TIME")]
    timeout: Option<Span>,
    /// Send our standard input to it
    #[arg(long, conflicts_with = "detach")]
    stdin: bool,
    /// Print the job's id and leave it running
    #[arg(long)]
    detach: bool,
    /// The command and its arguments, behind `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  peer exec web-1 -- uname -a
  peer exec web-1 --shell -- 'df -h | sort'
  peer exec db-1 --cwd /srv --env LANG=C --timeout 5m -- ./backup.sh
  peer exec web-1 --stdin -- tar xz -C /srv < site.tar.gz
  peer exec build --detach -- make all       then: peer logs build JOB -f";

// What a command needs wherever it runs. No doc comment: clap would show it as the description of the command.
#[derive(Debug, Clone, Args)]
pub(super) struct OrderFlags {
    /// Folder to run it in [default: the home of the host's user]
    #[arg(long, value_name = "DIR")]
    cwd: Option<OsString>,
    /// Variable to set for it; repeat it for more
    #[arg(long, value_name = "K=V")]
    env: Vec<OsString>,
    /// Give the words to the host's shell, /bin/sh -c
    #[arg(long)]
    shell: bool,
}

impl OrderFlags {
    /// The order, without a timeout and without input.
    pub(super) fn spec(&self, command: &[OsString], follow: Follow) -> Result<ExecSpec> {
        let words: Vec<Vec<u8>> = command.iter().cloned().map(OsString::into_vec).collect();
        let command = if self.shell { Command::Shell(words.join(&b' ')) } else { Command::Argv(words) };
        let cwd = self.cwd.clone().map(OsString::into_vec);
        let env = self.env.iter().map(variable).collect::<Result<_>>()?;
        Ok(ExecSpec { command, cwd, env, timeout: None, stdin: false, follow })
    }
}

fn variable(text: &OsString) -> Result<(Vec<u8>, Vec<u8>)> {
    let bytes = text.clone().into_vec();
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) if at > 0 => Ok((bytes[..at].to_vec(), bytes[at + 1..].to_vec())),
        // The text may be a value without its name: it is not repeated.
        Some(_) | None => Err(Failure::usage("an --env is not of the form K=V")
            .hint("write it as in --env LANG=C; an empty value is fine, an empty name is not")),
    }
}

impl Exec {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let follow = if self.detach { Follow::Detached } else { Follow::Attached };
        let spec = ExecSpec {
            timeout: self.timeout.map(|span| span.0),
            stdin: self.stdin,
            ..self.order.spec(&self.command, follow)?
        };
        let mut wishes = signals::wishes(context.ui)?;
        let mut client = None;
        let reached = tokio::select! {
            reached = self.reach(context, &mut client) => reached,
            Some(_wish) = wishes.recv() => Err(NotRun { state: "cancelled", job: None, failure: self.interrupted() }),
        };
        let code = match reached {
            Ok(host) => {
                let client = client.as_ref().expect("a host is found by a client");
                self.on(context, client, &host, spec, &mut wishes).await
            }
            Err(not_run) => told(context.ui, not_run),
        };
        if let Some(client) = client {
            client.close().await;
        }
        code
    }

    /// Finds the host, by a client that the caller closes.
    async fn reach(&self, context: &Context, client: &mut Option<Client>) -> std::result::Result<Host, NotRun> {
        let unreachable = |failure: Failure| NotRun { state: "unreachable", job: None, failure: failure.not_run() };
        let client = client.insert(context.client().await.map_err(unreachable)?);
        client.host(&self.host).await.map_err(unreachable)
    }

    fn interrupted(&self) -> Failure {
        Failure::fixable(format!("interrupted before `{}` was asked", self.host))
            .cause("the host was still being looked for")
            .hint("`peer status` tells how the connection to the relay stands")
            .exit_with(EXIT_INTERRUPTED)
    }

    async fn on(
        &self,
        context: &Context,
        client: &Client,
        host: &Host,
        spec: ExecSpec,
        wishes: &mut mpsc::Receiver<Wish>,
    ) -> Result<u8> {
        let ui = context.ui;
        if self.detach {
            return match exec::detach(client, host, spec, wishes).await {
                Ok(job) => started(ui, host, &job.to_string()),
                Err(not_run) => told(ui, not_run),
            };
        }
        let mut output: Box<dyn Output> =
            if ui.json { Box::new(Events::new(ui, host)) } else { Box::new(Raw::new(ui)?) };
        let stdin = self.stdin.then(|| Stdin::from_reader(std::io::stdin()));
        let input = Input { stdin, wishes };
        match exec::run(client, host, spec, &mut *output, input).await {
            Ok(finished) => ended(ui, host, &finished),
            Err(not_run) => told(ui, not_run),
        }
    }
}

fn started(ui: Ui, host: &Host, job: &str) -> Result<u8> {
    if ui.json {
        let (id, name) = (host.peer.to_string(), host.name());
        ui.json_line(&json!({ "event": "started", "job": job, "id": id, "name": name }))?;
    } else {
        ui.line(job)?;
        ui.note(&format!("follow it with `peer logs {} {job} -f`", host.name()));
    }
    Ok(0)
}

/// Tells how a command ended, and gives the exit code.
pub(super) fn ended(ui: Ui, host: &Host, finished: &Finished) -> Result<u8> {
    if finished.broken_pipe {
        return Ok(EXIT_BROKEN_PIPE);
    }
    let Some(JobEnd { state, duration }) = &finished.end else { return Ok(0) };
    let failure = without_exit(host, state);
    if ui.json {
        let (exit_code, signal) = match state {
            EndState::Exited(code) => (Some(*code), None),
            EndState::Signalled(signal) => (None, Some(*signal)),
            EndState::TimedOut | EndState::Cancelled | EndState::SpawnFailed(_) | EndState::Lost => (None, None),
        };
        let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        ui.json_line(&json!({
            "event": "exit",
            "job": finished.job.to_string(),
            "state": word(state),
            "exit_code": exit_code,
            "signal": signal,
            "duration_ms": duration_ms,
            "error": failure.as_ref().map(ToString::to_string),
        }))?;
    }
    match state {
        EndState::TimedOut => ui.note(&format!("timed out after {}", crate::ui::human_duration(*duration))),
        EndState::Cancelled => ui.note("cancelled"),
        EndState::Exited(_) | EndState::Signalled(_) | EndState::SpawnFailed(_) | EndState::Lost => {}
    }
    failure.map_or_else(|| Ok(exec::exit_code(state)), Err)
}

/// What a person is told of a command that neither exited nor was ended.
fn without_exit(host: &Host, state: &EndState) -> Option<Failure> {
    let failure = match state {
        EndState::Exited(_) | EndState::Signalled(_) | EndState::TimedOut | EndState::Cancelled => return None,
        EndState::SpawnFailed(failure) => {
            Failure::from_host(format!("cannot start this on `{}`", host.name()), failure.clone())
        }
        EndState::Lost => Failure::unreachable(format!("lost the command on `{}`", host.name()))
            .cause("its peer was stopped while the command ran")
            .hint("look on the host whether it did its work before you run it again"),
    };
    Some(failure.not_run())
}

/// The end state's word in JSON.
pub(super) fn word(state: &EndState) -> &'static str {
    match state {
        EndState::Exited(_) => "exited",
        EndState::Signalled(_) => "signalled",
        EndState::TimedOut => "timed_out",
        EndState::Cancelled => "cancelled",
        EndState::SpawnFailed(_) => "spawn_failed",
        EndState::Lost => "lost",
    }
}

fn told(ui: Ui, NotRun { state, job, failure }: NotRun) -> Result<u8> {
    if ui.json && failure.kind != crate::failure::Kind::BrokenPipe {
        ui.json_line(&json!({
            "event": "exit",
            "job": job.map(|job| job.to_string()),
            "state": state,
            "exit_code": null,
            "signal": null,
            "duration_ms": null,
            "error": failure.to_string(),
        }))?;
    }
    Err(failure)
}
