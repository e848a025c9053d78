//! Speaking to a person or a script: standard output carries data, standard error carries words.
//!
//! In: data, notes, failures. Out: text on the two streams; colours only on a terminal and without `NO_COLOR`.
//! It never writes a control character that came from another machine: see [`printable`].

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use serde::Serialize;

use crate::failure::{Failure, Kind, Result};

/// How to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ui {
    /// Data as JSON.
    pub json: bool,
    /// No words but failures.
    pub quiet: bool,
    /// More words: 1 what is being done, 2 how.
    pub verbose: u8,
    out_terminal: bool,
    err_terminal: bool,
    colours: bool,
}

/// A colour of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// Something went wrong.
    Red,
    /// Something to look at.
    Yellow,
    /// Something went well.
    Green,
    /// Less important.
    Dim,
    /// Part of a picture.
    WhiteOnBlack,
}

impl Ui {
    /// Speaks on this process's streams.
    pub fn new(json: bool, quiet: bool, verbose: u8, no_colour: bool) -> Self {
        let out_terminal = io::stdout().is_terminal();
        let err_terminal = io::stderr().is_terminal();
        Self { json, quiet, verbose, out_terminal, err_terminal, colours: !no_colour }
    }

    /// Whether standard error is a terminal that may show progress.
    pub fn shows_progress(&self) -> bool {
        self.err_terminal && !self.quiet && !self.json
    }

    /// Whether standard output is a terminal.
    pub fn out_is_terminal(&self) -> bool {
        self.out_terminal
    }

    /// Whether words on standard error may be coloured.
    pub fn colours_words(&self) -> bool {
        self.colours && self.err_terminal
    }

    /// Writes one line of data.
    ///
    /// # Errors
    /// [`Kind::BrokenPipe`] when nobody reads, another failure when it cannot be written.
    pub fn line(&self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()).map_err(unwritten)
    }

    /// Writes one JSON value as one line of data.
    ///
    /// # Errors
    /// As [`Ui::line`].
    pub fn json_line<T: Serialize>(&self, value: &T) -> Result<()> {
        self.line(&serde_json::to_string(value).expect("our own types have string keys and finite numbers"))
    }

    /// Writes rows as aligned columns under a head line; every cell is made printable.
    ///
    /// # Errors
    /// As [`Ui::line`].
    pub fn table(&self, head: &[&str], rows: &[Vec<String>]) -> Result<()> {
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
        let widths: Vec<usize> = head
            .iter()
            .enumerate()
            .map(|(column, title)| {
                rows.iter().map(|row| row[column].chars().count()).chain([title.len()]).max().unwrap_or(0)
            })
            .collect();
        let titles: Vec<String> = head.iter().map(ToString::to_string).collect();
        self.line(&self.paint_out(Paint::Dim, &aligned(&titles, &widths)))?;
        rows.iter().try_for_each(|row| self.line(&aligned(row, &widths)))
    }

    /// Says something that is good to know.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }

    /// Says something that only who asked for more wants to know.
    pub fn detail(&self, text: &str) {
        if self.verbose > 0 {
            self.say(text);
        }
    }

    /// Warns.
    pub fn warn(&self, text: &str) {
        if !self.quiet {
            self.say(&format!("{} {text}", self.paint_err(Paint::Yellow, "warning:")));
        }
    }

    /// Tells what did not work, in up to three lines.
    pub fn fail(&self, failure: &Failure) {
        if failure.kind == Kind::BrokenPipe {
            return;
        }
        self.say(&format!("{} {}", self.paint_err(Paint::Red, "error:"), one_line(&failure.what)));
        if let Some(cause) = &failure.cause {
            self.say(&format!("{} {}", self.paint_err(Paint::Dim, "cause:"), one_line(cause)));
        }
        if let Some(hint) = &failure.hint {
            self.say(&format!("{} {}", self.paint_err(Paint::Green, "hint:"), one_line(hint)));
        }
    }

    /// Colours a word of data, if standard output shows colours.
    pub fn paint_out(&self, paint: Paint, text: &str) -> String {
        if self.colours && self.out_terminal && !self.json { painted(paint, text) } else { text.to_owned() }
    }

    /// Colours a word on standard error, if that shows colours.
    pub fn paint_err(&self, paint: Paint, text: &str) -> String {
        if self.colours_words() { painted(paint, text) } else { text.to_owned() }
    }

    /// Words that cannot be written are lost: there is nowhere else to say so.
    fn say(&self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "{text}");
    }
}

/// The failure of not being able to write data.
pub fn unwritten(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Failure::broken_pipe();
    }
    Failure::fixable("cannot write to standard output")
        .cause(error)
        .hint("check the disk or program that output goes to")
}

/// Text from elsewhere with control characters and direction overrides written as escapes, so that it can neither
/// drive the terminal nor look like other text.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        let deceives = matches!(char, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if char.is_control() || deceives {
            shown.extend(char.escape_default());
        } else {
            shown.push(char);
        }
    }
    shown
}

/// Bytes from elsewhere, likewise; what is not UTF-8 is written as `\xNN`.
pub fn printable_bytes(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        shown.push_str(&printable(chunk.valid()));
        for byte in chunk.invalid() {
            write!(shown, "\\x{byte:02x}").expect("writing to a string cannot fail");
        }
    }
    shown
}

/// Bytes with a unit, as people read them.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A duration as people read it.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 0.0995 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 59.95 {
        format!("{seconds:.1} s")
    } else {
        let whole = duration.as_secs();
        let (hours, minutes) = (whole / 3600, whole / 60 % 60);
        if hours > 0 { format!("{hours} h {minutes:02} min") } else { format!("{minutes} min {:02} s", whole % 60) }
    }
}

fn painted(paint: Paint, text: &str) -> String {
    let code = match paint {
        Paint::Red => "31",
        Paint::Yellow => "33",
        Paint::Green => "32",
        Paint::Dim => "2",
        Paint::WhiteOnBlack => "97;40",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

fn aligned(cells: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        write!(line, "{cell:<width$}  ").expect("writing to a string cannot fail");
    }
    line.truncate(line.trim_end().len());
    line
}

/// A failure's part on one line: line breaks of a parser's message become spaces.
fn one_line(text: &str) -> String {
    printable(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_direction_overrides_are_escaped() {
        assert_eq!(printable("a\x1b[31mb\u{202e}c"), "a\\u{1b}[31mb\\u{202e}c");
        assert_eq!(printable("größe 漢"), "größe 漢");
        assert_eq!(printable_bytes(b"a\xff\nb"), "a\\xff\\nb");
    }

    #[test]
    fn sizes_and_durations_read_as_people_write_them() {
        assert_eq!([human_bytes(12), human_bytes(1536), human_bytes(1 << 30)], ["12 B", "1.5 KiB", "1.0 GiB"]);
        let durations = [12, 1_500, 61_000, 3_660_000].map(|ms| human_duration(Duration::from_millis(ms)));
        assert_eq!(durations, ["12 ms", "1.5 s", "1 min 01 s", "1 h 01 min"]);
    }

    #[test]
    fn columns_are_aligned_without_trailing_space() {
        let cells = ["a".to_owned(), String::new()];
        assert_eq!(aligned(&cells, &[3, 4]), "a");
    }
}
