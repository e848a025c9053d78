//! `peer fleet exec`: one command on every host that an expression selects.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    time::{Duration, Instant},
};

use clap::Args;
use data_encoding::BASE64;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peerfleet_proto::{request::exec::Follow, target::Target};
use serde_json::{Map, Value, json};

use super::fold;
use crate::{
    cli::{context::Context, exec::OrderFlags, ls::nobody, signals, span::Span},
    failure::Result,
    fleet::{self, Order, Report, State},
    machine::Host,
    ui::{self, Paint, Ui},
};

/// Hosts that work at once unless told otherwise: their answers, each up to 60 KiB, stay below 4 MiB.
const DEFAULT_CONCURRENCY: &str = "64";

/// Time for the command on each host unless told otherwise.
const DEFAULT_TIMEOUT: &str = "5m";

/// Hosts that are named in one line of words; the others are counted.
const NAMED_HOSTS: usize = 20;

/// Longest output that is printed beside the host's name; more goes below it.
const BESIDE_CHARS: usize = 100;

/// Run a command on every host that an expression selects
///
/// Expressions: all; web-1; tag1,tag2 (any of them); os:linux; with & | ! and brackets. Every selected host appears
/// exactly once. Exit code: 0 if all exited with 0, 1 if some did not, 2 if no host was selected. Ctrl-C cancels what
/// still runs, keeps what came, and names the hosts that did not finish.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Exec {
    /// Which hosts
    #[arg(long, value_name = "EXPR")]
    target: Target,
    #[command(flatten)]
    order: OrderFlags,
    /// Hosts that work at once
    #[arg(long, value_name = "N", default_value = DEFAULT_CONCURRENCY, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,
    /// End it on a host after this time (30s, 5m, 1h)
    #[arg(long, value_name = "TIME", default_value = DEFAULT_TIMEOUT)]
    timeout: Span,
    /// Cancel everything as soon as it fails on one host
    #[arg(long)]
    fail_fast: bool,
    /// Print equal outputs once, with the hosts that gave them
    #[arg(long)]
    fold: bool,
    /// The command and its arguments, behind `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  peer fleet exec --target all -- uptime
  peer fleet exec --target 'web & os:linux' --fold -- uname -r
  peer fleet exec --target 'web,db & !web-3' --timeout 30s --shell -- 'df -h / | tail -1'
  peer fleet exec --target all --json -- hostname | jq -r 'select(.state) | .name + \" \" + .state'";

impl Exec {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let spec = self.order.spec(&self.command, Follow::Collected)?;
        let client = context.client().await?;
        let room = client.hosts().await?;
        if let Some(why) = room.warning() {
            context.ui.warn(&why);
        }
        let (known, complete) = (room.hosts.len(), room.partly.is_none());
        let chosen = fleet::choose(room.hosts, &self.target);
        if chosen.is_empty() {
            if context.ui.json {
                Printer::new(context.ui, &chosen, complete, false).finish()?;
            }
            return Err(nobody(&self.target, known));
        }
        let (timeout, concurrency) = (self.timeout.0, usize::from(self.concurrency));
        let order = Order { spec, concurrency, timeout, fail_fast: self.fail_fast };
        let mut printer = Printer::new(context.ui, &chosen, complete, self.fold);
        let stop = signals::stopped()?;
        fleet::run(&client, chosen, &order, stop, |report| printer.report(report)).await;
        client.close().await;
        printer.finish()
    }
}

struct Printer {
    ui: Ui,
    width: usize,
    bar: ProgressBar,
    fold: Option<fold::Groups>,
    states: BTreeMap<&'static str, usize>,
    bad: BTreeMap<State, Vec<String>>,
    /// Whether all hosts of the room were known.
    complete: bool,
    total: usize,
    good: usize,
    since: Instant,
    unwritten: Result<()>,
}

impl Printer {
    fn new(ui: Ui, hosts: &[Host], complete: bool, fold: bool) -> Self {
        let total = hosts.len();
        let width = hosts.iter().map(|host| host.name().len()).max().unwrap_or(0);
        let bar = if ui.shows_progress() { bar(total) } else { ProgressBar::hidden() };
        let fold = (fold && !ui.json).then(fold::Groups::default);
        Self {
            ui,
            width,
            bar,
            fold,
            states: BTreeMap::new(),
            bad: BTreeMap::new(),
            complete,
            total,
            good: 0,
            since: Instant::now(),
            unwritten: Ok(()),
        }
    }

    fn report(&mut self, report: Report) {
        *self.states.entry(report.state.word()).or_default() += 1;
        if report.is_good() {
            self.good += 1;
        } else {
            self.bad.entry(report.state).or_default().push(report.host.name().to_owned());
        }
        let written = match &mut self.fold {
            _ if self.ui.json => self.ui.json_line(&as_json(&report)),
            Some(groups) => {
                groups.add(report);
                Ok(())
            }
            None => self.bar.suspend(|| print(self.ui, self.width, &report)),
        };
        // The sweep goes on for the hosts' sake; whoever stopped reading is told at the end.
        if self.unwritten.is_ok() {
            self.unwritten = written;
        }
        self.bar.inc(1);
        self.bar.set_message(format!("{} failed", self.total_bad()));
    }

    fn total_bad(&self) -> usize {
        self.bad.values().map(Vec::len).sum()
    }

    fn finish(self) -> Result<u8> {
        self.bar.finish_and_clear();
        self.unwritten?;
        let took = self.since.elapsed();
        if let Some(groups) = self.fold {
            groups.print(self.ui)?;
        }
        if self.ui.json {
            self.ui.json_line(&json!({ "summary": {
                "hosts": self.total,
                "ok": self.good,
                "failed": self.total - self.good,
                "states": self.states,
                "duration_ms": millis(took),
                "complete": self.complete,
            }}))?;
        } else {
            self.ui.note(&summary(self.total, self.good, &self.bad, took));
        }
        Ok(u8::from(self.good != self.total))
    }
}

fn bar(total: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} hosts, {msg}, {elapsed}")
        .expect("the template names known fields");
    bar.set_style(style);
    bar.set_message("0 failed");
    bar
}

/// One line for a host, and its output beside or below it.
fn print(ui: Ui, width: usize, report: &Report) -> Result<()> {
    let word = outcome(report);
    let paint = if report.is_good() { Paint::Green } else { Paint::Red };
    let took = ui::human_duration(report.duration);
    let head = format!("{:<width$}  {}  {took:>7}", report.host.name(), ui.paint_out(paint, &format!("{word:<11}")));
    if let Some(line) = beside(report) {
        return ui.line(format!("{head}  {line}").trim_end());
    }
    ui.line(&head)?;
    print_output(ui, report, report.host.name())
}

/// Output and reasons below a head; `name` is in front of each line of output.
pub(super) fn print_output(ui: Ui, report: &Report, name: &str) -> Result<()> {
    for (mark, bytes) in [("|", &report.stdout.bytes), ("!", &report.stderr.bytes)] {
        for line in lines(bytes) {
            ui.line(&format!("{name} {mark} {line}"))?;
        }
    }
    if report.is_truncated() {
        let missing = (report.stdout.total + report.stderr.total)
            .saturating_sub((report.stdout.bytes.len() + report.stderr.bytes.len()) as u64);
        let job = report.job.map(|job| job.to_string()).unwrap_or_default();
        let whole = format!("`peer logs {} {job}` has all of it", report.host.name());
        ui.line(&format!("{name} … {} more; {whole}", ui::human_bytes(missing)))?;
    }
    match &report.failure {
        Some(failure) => ui.line(&format!("{name} ! {}", ui::printable(&reason(failure)))),
        None => Ok(()),
    }
}

fn reason(failure: &crate::failure::Failure) -> String {
    let why = failure.cause.as_ref().unwrap_or(&failure.what);
    match &failure.hint {
        Some(hint) => format!("{why} (hint: {hint})"),
        None => why.clone(),
    }
}

/// What fits beside the host's name: nothing, or one short line of output, or why there is none.
fn beside(report: &Report) -> Option<String> {
    if let (Some(failure), true) = (&report.failure, report.stdout.bytes.is_empty() && report.stderr.bytes.is_empty()) {
        return Some(ui::printable(&reason(failure)));
    }
    if report.is_truncated() || !report.stderr.bytes.is_empty() {
        return None;
    }
    let mut lines = lines(&report.stdout.bytes).into_iter();
    match (lines.next(), lines.next()) {
        (None, _) => Some(String::new()),
        (Some(line), None) if line.chars().count() <= BESIDE_CHARS => Some(line),
        (Some(_), _) => None,
    }
}

/// Lines of output, made printable; a tab stays one.
fn lines(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes
        .split(|byte| *byte == b'\n')
        .map(|line| {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            line.split(|byte| *byte == b'\t').map(ui::printable_bytes).collect::<Vec<_>>().join("\t")
        })
        .collect()
}

/// How it ended, in a word or two.
pub(super) fn outcome(report: &Report) -> String {
    match (report.state, report.exit_code, report.signal) {
        (State::Exited, Some(0), _) => "ok".to_owned(),
        (State::Exited, Some(code), _) => format!("exit {code}"),
        (State::Signalled, _, Some(signal)) => format!("signal {signal}"),
        (state, _, _) => state.word().replace('_', " "),
    }
}

fn summary(total: usize, good: usize, bad: &BTreeMap<State, Vec<String>>, took: Duration) -> String {
    let hosts = if total == 1 { "1 host".to_owned() } else { format!("{total} hosts") };
    let mut text = format!("{hosts} in {}: {good} ok", ui::human_duration(took));
    for (state, names) in bad {
        let word = if *state == State::Exited { "failed".to_owned() } else { state.word().replace('_', " ") };
        let mut named: Vec<&str> = names.iter().map(String::as_str).collect();
        named.sort_unstable();
        let more = named.len().saturating_sub(NAMED_HOSTS);
        named.truncate(NAMED_HOSTS);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        text += &format!(", {} {word} ({}{more})", names.len(), named.join(", "));
    }
    text
}

fn as_json(report: &Report) -> Value {
    let mut line = Map::new();
    line.insert("id".into(), report.host.peer.to_string().into());
    line.insert("name".into(), report.host.name().into());
    line.insert("state".into(), report.state.word().into());
    line.insert("exit_code".into(), report.exit_code.into());
    line.insert("signal".into(), report.signal.into());
    line.insert("duration_ms".into(), millis(report.duration).into());
    for (name, captured) in [("stdout", &report.stdout), ("stderr", &report.stderr)] {
        match std::str::from_utf8(&captured.bytes) {
            Ok(text) => line.insert(name.into(), text.into()),
            Err(_) => line.insert(format!("{name}_b64"), BASE64.encode(&captured.bytes).into()),
        };
    }
    line.insert("truncated".into(), report.is_truncated().into());
    line.insert("job".into(), report.job.map(|job| job.to_string()).into());
    if let Some(failure) = &report.failure {
        line.insert("error".into(), failure.to_string().into());
    }
    Value::Object(line)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
