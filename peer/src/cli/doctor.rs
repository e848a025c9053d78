//! `peer doctor`: what this machine's network can do, and how a host is reached.

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peerfleet_proto::request::network::{CheckReport, NetworkReport};

use super::{context::Context, span::Span};
use crate::{
    client::doctor::{
        Examination, Order, examine,
        findings::{Finding, Level, exit_code, findings, millis},
    },
    config::Layer,
    failure::Result,
    ui::{self, Paint, Ui},
};

mod json;
mod word;

/// Time between two frames of the picture that shows that something goes on.
const TICK: Duration = Duration::from_millis(100);

/// Show what this machine's network can do, and with a host also how it is reached and why so
///
/// Checks are small packets between the addresses of the two machines. SENT and ANSWERED are those of the machine that
/// the list is of, HEARD are those that came to it from the address. KNOWN AS says how the address is known: as that of an
/// interface, because the relay sees the host there, because a check came from there, or because the router passes on what
/// comes there.
///
/// Where no peer runs, the router is asked for a port by this command, and told at its end that it is over.
///
/// Exit codes: 0 all is well, 1 something can be mended, 3 the relay or the host cannot be reached.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Doctor {
    /// Name of the host, or 4 or more characters of its id
    host: Option<String>,
    /// Time for all measurements, as in 5s or 1m
    #[arg(long, value_name = "TIME", default_value = "10s")]
    timeout: Span,
}

const EXAMPLES: &str = "\
Examples:
  peer doctor
  peer doctor web-1
  peer doctor web-1 --json | jq -r '.findings[] | select(.level != \"good\") | .what'";

impl Doctor {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let config = context.config(Layer::default())?;
        let order = Order {
            relay: config.relay.value.clone(),
            network: config.network.clone(),
            state_dir: config.state.path().display().to_string(),
            host: self.host.as_deref(),
            deadline: self.timeout.0,
        };
        let progress = Progress::new(context.ui);
        let seen = examine(context.examiner().await, order, &|what| progress.tell(what)).await?;
        drop(progress);
        let found = findings(&seen);
        if context.ui.json {
            context.ui.json_line(&json::report(&seen, &found))?;
        } else {
            in_words(context.ui, &seen, &found)?;
        }
        Ok(exit_code(&found))
    }
}

/// What is being waited for, on a terminal; gone when dropped.
struct Progress(ProgressBar);

impl Progress {
    fn new(ui: Ui) -> Self {
        if !ui.shows_progress() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(
            ProgressStyle::with_template("{spinner} {msg}, {elapsed}").expect("the template names known fields"),
        );
        bar.set_message("looking");
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    fn tell(&self, what: &str) {
        self.0.set_message(ui::printable(what));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn in_words(ui: Ui, seen: &Examination, found: &[Finding]) -> Result<()> {
    let width = found.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    for finding in found {
        let (paint, mark) = mark(finding.level);
        let name = finding.name.replace('_', " ");
        let what = ui::printable(&finding.what);
        ui.line(&format!("{} {name:<width$}  {what}", ui.paint_out(paint, mark)))?;
    }
    if let Some(path) = seen.path() {
        checks(ui, "checks of this machine", &path.checks)?;
    }
    if let Some(Ok(visited)) = &seen.host
        && let Ok(NetworkReport { path: Some(path), .. }) = &visited.view
    {
        checks(ui, &format!("checks of `{}`", ui::printable(visited.host.name())), &path.checks)?;
    }
    let hints: Vec<_> = found.iter().filter_map(|finding| Some((finding.name, finding.hint.as_deref()?))).collect();
    if !hints.is_empty() {
        ui.line("")?;
        ui.line("what you can do")?;
        for (name, hint) in hints {
            ui.line(&format!("  {}: {}", name.replace('_', " "), ui::printable(hint)))?;
        }
    }
    Ok(())
}

fn mark(level: Level) -> (Paint, &'static str) {
    match level {
        Level::Good => (Paint::Green, "ok  "),
        Level::Note => (Paint::Dim, "note"),
        Level::Fix => (Paint::Yellow, "fix "),
        Level::Unreachable => (Paint::Red, "gone"),
    }
}

fn checks(ui: Ui, title: &str, checks: &[CheckReport]) -> Result<()> {
    ui.line("")?;
    if checks.is_empty() {
        return ui.line(&format!("{title}: there was no address to check"));
    }
    ui.line(title)?;
    let rows: Vec<Vec<String>> = checks.iter().map(row).collect();
    ui.table(&["ADDRESS", "KNOWN AS", "WHERE", "SENT", "ANSWERED", "HEARD", "RTT", "OUTCOME"], &rows)
}

fn row(check: &CheckReport) -> Vec<String> {
    vec![
        check.addr.to_string(),
        word::kind(check.kind).to_owned(),
        word::reach(check.reach).to_owned(),
        check.sent.to_string(),
        check.answered.to_string(),
        check.heard.to_string(),
        check.rtt.map_or_else(|| "-".to_owned(), millis),
        word::outcome(check.outcome).replace('_', " "),
    ]
}
