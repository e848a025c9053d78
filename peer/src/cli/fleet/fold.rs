//! Equal outputs printed once, with the hosts that gave them.

use std::collections::BTreeMap;

use super::exec::{outcome, print_output};
use crate::{
    failure::Result,
    fleet::{Report, State},
    ui::{Paint, Ui},
};

/// What makes two reports equal to a reader. Output is compared by hash and length: a fleet's outputs may be many.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    is_good: bool,
    state: State,
    exit_code: Option<i32>,
    signal: Option<i32>,
    output: [u8; 32],
}

/// Reports by what they say; the failed ones first.
#[derive(Debug, Default)]
pub(super) struct Groups(BTreeMap<Key, Group>);

#[derive(Debug)]
struct Group {
    first: Report,
    names: Vec<String>,
}

impl Groups {
    pub(super) fn add(&mut self, report: Report) {
        let key = Key {
            is_good: report.is_good(),
            state: report.state,
            exit_code: report.exit_code,
            signal: report.signal,
            output: output(&report),
        };
        let name = report.host.name().to_owned();
        self.0.entry(key).or_insert_with(|| Group { first: report, names: Vec::new() }).names.push(name);
    }

    pub(super) fn print(self, ui: Ui) -> Result<()> {
        for Group { first, mut names } in self.0.into_values() {
            names.sort();
            let hosts = if names.len() == 1 { "1 host".to_owned() } else { format!("{} hosts", names.len()) };
            let paint = if first.is_good() { Paint::Green } else { Paint::Red };
            ui.line(&format!("{}: {} ({hosts})", names.join(","), ui.paint_out(paint, &outcome(&first))))?;
            print_output(ui, &first, " ")?;
        }
        Ok(())
    }
}

fn output(report: &Report) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    for captured in [&report.stdout, &report.stderr] {
        hash.update(&captured.total.to_be_bytes());
        hash.update(&(captured.bytes.len() as u64).to_be_bytes());
        hash.update(&captured.bytes);
    }
    // The words of a failure name their host; its cause and hint do not.
    if let Some(failure) = &report.failure {
        hash.update(failure.cause.as_deref().unwrap_or_default().as_bytes());
    }
    hash.finalize().into()
}
