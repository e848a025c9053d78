//! `peer send-file`: one file from host to host.

use std::{
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use data_encoding::{BASE64, HEXLOWER};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peerfleet_proto::request::transfer::{PathNow, PathWish};
use serde_json::json;

use super::{context::Context, signals};
use crate::{
    client::{
        Client,
        send::{Delivered, Delivery, Place, Update, deliver},
    },
    failure::{EXIT_INTERRUPTED, Failure, Kind, Result},
    ui::{self, Ui},
};

/// Least time between two JSON events of progress: enough for a smooth bar, little to parse.
const EVENT_INTERVAL: Duration = Duration::from_millis(200);

/// Send a file from here to a host, from a host to here, or from host to host
///
/// The bytes of the last never pass through this machine. What was interrupted is resumed by running the same command
/// again. The file appears under its final name only when its SHA-256 was verified; mode bits and time are kept.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SendFile {
    /// The file, as PATH here or HOST:PATH; write ./a:b for a local name with a colon
    #[arg(value_name = "[HOST:]SRC")]
    source: OsString,
    /// Where it goes, as PATH here or HOST:PATH: a folder that exists, or the final name
    #[arg(value_name = "[HOST:]DST")]
    destination: OsString,
    /// How the bytes may travel
    #[arg(long, value_enum, default_value_t = Way::Auto)]
    path: Way,
}

const EXAMPLES: &str = "\
Examples:
  peer send-file ./site.tar web-1:/srv/             from here to a host
  peer send-file web-1:/var/log/syslog .            from a host to here
  peer send-file web-1:backup.db db-1:/tmp/         from host to host, not through here
  peer send-file big.iso web-1: --path relayed      never by a direct path";

/// How the bytes may travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Directly where possible, else by way of the relay
    Auto,
    /// Directly or not at all
    Direct,
    /// By way of the relay
    Relayed,
}

/// A `[HOST:]PATH`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Spot<'a> {
    host: Option<&'a str>,
    path: &'a OsStr,
}

impl SendFile {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let mut display = Display::new(context.ui);
        let sent = self.send(context, &mut display).await;
        display.finish(sent)
    }

    async fn send(self, context: &Context, display: &mut Display) -> Result<(Delivery, Delivered)> {
        let stopped = signals::stopped()?;
        let mut client = None;
        let sent = tokio::select! {
            sent = self.send_by(context, &mut client, display) => sent,
            () = stopped => Err(Failure::fixable("interrupted")
                .hint("run the same command again: what arrived is kept, and only the rest is sent")
                .exit_with(EXIT_INTERRUPTED)),
        };
        if let Some(client) = client {
            client.close().await;
        }
        sent
    }

    /// Sends it, by a client that the caller closes.
    async fn send_by(
        &self,
        context: &Context,
        client: &mut Option<Client>,
        display: &mut Display,
    ) -> Result<(Delivery, Delivered)> {
        let (source, destination) = (spot(&self.source)?, spot(&self.destination)?);
        if source.host.is_none() && destination.host.is_none() {
            return Err(Failure::usage("both ends are on this machine")
                .cause("neither SRC nor DST names a host")
                .hint("write HOST:PATH for one of them; to copy a file here, use cp"));
        }
        let source_here = source.host.is_none().then(|| readable(source.path)).transpose()?;
        let client = client.insert(context.client().await?);
        let delivery = Delivery {
            from: place(client, &source, source_here).await?,
            to: place(client, &destination, None).await?,
            path: match self.path {
                Way::Auto => PathWish::Auto,
                Way::Direct => PathWish::Direct,
                Way::Relayed => PathWish::Relayed,
            },
        };
        let delivered = deliver(client, &delivery, |update| display.update(&update)).await?;
        Ok((delivery, delivered))
    }
}

/// Takes `[HOST:]PATH` apart: a host is named by what stands before a `:`, if no `/` stands before it.
fn spot(text: &OsStr) -> Result<Spot<'_>> {
    let bytes = text.as_bytes();
    let here = Spot { host: None, path: text };
    let Some(colon) = bytes.iter().position(|byte| *byte == b':') else { return Ok(here) };
    if bytes[..colon].contains(&b'/') {
        return Ok(here);
    }
    match std::str::from_utf8(&bytes[..colon]) {
        Ok(host) if !host.is_empty() => Ok(Spot { host: Some(host), path: OsStr::from_bytes(&bytes[colon + 1..]) }),
        Ok(_) | Err(_) => Err(Failure::usage(format!("`{}` names no host", ui::printable_bytes(bytes)))
            .cause("what stands before the first `:` is taken for a host")
            .hint("put ./ in front of a local name with a colon")),
    }
}

/// The absolute path of a local file that can be sent; what cannot is told before anybody is asked.
fn readable(path: &OsStr) -> Result<PathBuf> {
    let shown = ui::printable_bytes(path.as_bytes());
    let failed = |error: io::Error| {
        let hint = if error.kind() == ErrorKind::NotFound {
            "look at its spelling; a path that does not begin with / begins in this folder"
        } else if error.kind() == ErrorKind::PermissionDenied {
            "run this as a user who may read it"
        } else {
            "look at the disk that it is on"
        };
        Failure::fixable(format!("cannot read {shown}")).cause(error).hint(hint)
    };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if meta.is_dir() {
        return Err(Failure::fixable(format!("cannot send {shown}"))
            .cause("it is a folder, and send-file sends single files")
            .hint("pack it first: tar czf folder.tar.gz FOLDER; or send its files one by one"));
    }
    std::path::absolute(path).map_err(failed)
}

async fn place(client: &Client, spot: &Spot<'_>, checked: Option<PathBuf>) -> Result<Place> {
    let Some(host) = spot.host else {
        let path = match checked {
            Some(path) => path,
            None => destination_here(spot.path)?,
        };
        return Ok(Place::Here(path));
    };
    let host = client.host(host).await?;
    if host.here {
        return Err(Failure::usage(format!("`{}` is this machine", host.name()))
            .cause("a file here is named by its path alone")
            .hint(format!("leave out `{}:`", spot.host.unwrap_or_default())));
    }
    let path = if spot.path.is_empty() { b".".to_vec() } else { spot.path.as_bytes().to_vec() };
    Ok(Place::There { host: Box::new(host), path })
}

/// A local destination, absolute, because whoever writes it may work in another folder. A `/` at its end stays.
fn destination_here(path: &OsStr) -> Result<PathBuf> {
    let named = if path.is_empty() { Path::new(".") } else { Path::new(path) };
    let absolute = std::path::absolute(named).map_err(|error| {
        Failure::fixable(format!("cannot write to {}", ui::printable_bytes(path.as_bytes()))).cause(error)
    })?;
    Ok(absolute)
}

struct Display {
    ui: Ui,
    bar: Option<ProgressBar>,
    since: Instant,
    last_event: Option<Instant>,
    bytes: u64,
    total: u64,
    resumed: u64,
    path: Option<PathNow>,
}

impl Display {
    fn new(ui: Ui) -> Self {
        Self { ui, bar: None, since: Instant::now(), last_event: None, bytes: 0, total: 0, resumed: 0, path: None }
    }

    fn update(&mut self, update: &Update) {
        match update {
            Update::Moved { bytes, total, resumed, path } => {
                (self.bytes, self.total, self.resumed, self.path) = (*bytes, *total, *resumed, Some(*path));
                if self.bar.is_none() && self.ui.shows_progress() {
                    self.bar = Some(bar(*total, *resumed));
                }
                if let Some(bar) = &self.bar {
                    bar.set_position(*bytes);
                    bar.set_message(word(*path));
                }
                self.event();
            }
            Update::Verifying => {
                if let Some(bar) = &self.bar {
                    bar.set_message("verifying");
                }
            }
            Update::Again(why) => {
                let text = format!("{}; trying again", ui::printable(why));
                match &self.bar {
                    Some(bar) => bar.suspend(|| self.ui.detail(&text)),
                    None => self.ui.detail(&text),
                }
                if let Some(bar) = &self.bar {
                    bar.set_message("reconnecting");
                }
            }
        }
    }

    fn event(&mut self) {
        let now = Instant::now();
        let due = self.last_event.is_none_or(|last| now.duration_since(last) >= EVENT_INTERVAL);
        if !self.ui.json || !due {
            return;
        }
        self.last_event = Some(now);
        // A reader that went away does not end the transfer; the last event tells it.
        let _ = self.ui.json_line(&json!({
            "event": "progress",
            "bytes": self.bytes,
            "total": self.total,
            "resumed": self.resumed,
            "path": self.path.map(word),
            "sha256": null,
            "seconds": self.since.elapsed().as_secs_f64(),
        }));
    }

    fn finish(self, sent: Result<(Delivery, Delivered)>) -> Result<u8> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.since.elapsed().as_secs_f64();
        match sent {
            Ok((delivery, delivered)) => self.done(&delivery, &delivered, seconds),
            Err(failure) => {
                if self.ui.json && failure.kind != Kind::Usage {
                    self.ui.json_line(&json!({
                        "event": "failed",
                        "bytes": self.bytes,
                        "total": self.total,
                        "path": self.path.map(word),
                        "sha256": null,
                        "seconds": seconds,
                        "error": failure.to_string(),
                    }))?;
                }
                Err(failure)
            }
        }
    }

    fn done(&self, delivery: &Delivery, delivered: &Delivered, seconds: f64) -> Result<u8> {
        let Delivered { bytes, resumed, sha256, path, destination } = delivered;
        let sha256 = HEXLOWER.encode(sha256);
        let shown = ui::printable_bytes(destination);
        if self.ui.json {
            let mut done = json!({
                "event": "done",
                "bytes": bytes,
                "total": bytes,
                "resumed": resumed,
                "path": word(*path),
                "sha256": sha256,
                "seconds": seconds,
            });
            match std::str::from_utf8(destination) {
                Ok(text) => done["destination"] = text.into(),
                Err(_) => done["destination_b64"] = BASE64.encode(destination).into(),
            }
            self.ui.json_line(&done)?;
        } else {
            let host = match &delivery.to {
                Place::Here(_) => String::new(),
                Place::There { host, .. } => format!("{}:", host.name()),
            };
            let rate = bytes.saturating_sub(*resumed) as f64 / seconds.max(0.001);
            let again = if *resumed > 0 { format!(", {} resumed", ui::human_bytes(*resumed)) } else { String::new() };
            self.ui.note(&format!(
                "{host}{shown}: {} in {} ({}/s, {}{again}), sha256 {sha256}",
                ui::human_bytes(*bytes),
                ui::human_duration(Duration::from_secs_f64(seconds)),
                ui::human_bytes(rate as u64),
                word(*path),
            ));
        }
        Ok(0)
    }
}

fn bar(total: u64, resumed: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template =
        "{bar:30} {percent:>3} %  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left  {msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template names known fields"));
    // What an earlier try brought counts neither for the rate nor for the time left.
    bar.set_position(resumed);
    bar.reset_eta();
    bar
}

fn word(path: PathNow) -> &'static str {
    match path {
        PathNow::Direct => "direct",
        PathNow::Relayed => "relayed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (Option<&str>, &str) {
        let spot = spot(OsStr::new(text)).unwrap();
        (spot.host, spot.path.to_str().unwrap())
    }

    #[test]
    fn a_host_stands_before_the_first_colon_unless_a_slash_does() {
        assert_eq!(parts("web-1:/srv/a"), (Some("web-1"), "/srv/a"));
        assert_eq!(parts("web-1:"), (Some("web-1"), ""));
        assert_eq!(parts("web-1:a:b"), (Some("web-1"), "a:b"));
        assert_eq!(parts("./a:b"), (None, "./a:b"));
        assert_eq!(parts("/srv/a:b"), (None, "/srv/a:b"));
        assert_eq!(parts("plain"), (None, "plain"));
        assert_eq!(spot(OsStr::new(":a")).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_folder_is_refused_with_a_way_out() {
        let refused = readable(OsStr::new("/")).unwrap_err();
        assert!(refused.hint.unwrap().contains("tar"));
    }
}
