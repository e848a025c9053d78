//! `peer ls`: who is in the room.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use clap::Args;
use peerfleet_proto::{
    id::InstanceId,
    request::{Request, transfer::PathNow},
    target::Target,
};
use serde::Serialize;

use super::context::Context;
use crate::{
    client::Client,
    failure::{Failure, Result},
    fleet,
    machine::Host,
    mesh::AskProgress,
    ui::{Paint, human_duration},
};

/// Time that a host may take to answer; one that takes longer is listed without a round trip.
const PING_DEADLINE: Duration = Duration::from_secs(1);

/// List the hosts of the room: who they are, what they let others do, how they are reached
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Ls {
    /// Only hosts that this expression selects
    #[arg(long, value_name = "EXPR", default_value = "all")]
    target: Target,
}

const EXAMPLES: &str = "\
Examples:
  peer ls
  peer ls --target 'web & os:linux'
  peer ls --json | jq -r '.[].name'";

#[derive(Debug, Serialize)]
struct Line<'a> {
    id: String,
    name: &'a str,
    tags: &'a [String],
    os: &'a str,
    arch: &'a str,
    version: &'a str,
    mode: String,
    path: Option<&'static str>,
    rtt_ms: Option<f64>,
    age_s: Option<f64>,
    here: bool,
}

impl Ls {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let client = context.client().await?;
        let known = client.hosts().await?;
        let partly = known.warning();
        let hosts = fleet::choose(known.hosts, &self.target);
        let rtts = round_trips(&client, &hosts).await;
        client.close().await;
        if context.ui.json {
            let lines: Vec<Line<'_>> = hosts.iter().map(|host| line(host, rtts.get(&host.instance).copied())).collect();
            context.ui.json_line(&lines)?;
        } else if hosts.is_empty() {
            context.ui.note("nobody is here yet: the line that `peer up` printed brings another machine in");
            context.ui.note("if somebody should be, compare `peer status` on both machines: room ids must be equal");
        } else {
            let rows: Vec<Vec<String>> =
                hosts.iter().map(|host| row(host, rtts.get(&host.instance).copied())).collect();
            context.ui.table(&["ID", "NAME", "TAGS", "OS/ARCH", "VERSION", "MODE", "PATH", "RTT", "AGE"], &rows)?;
            let silent = hosts.iter().filter(|host| !host.here && !rtts.contains_key(&host.instance)).count();
            if silent > 0 {
                let text = format!("{silent} did not answer within {} s", PING_DEADLINE.as_secs());
                context.ui.note(&context.ui.paint_err(Paint::Yellow, &text));
            }
        }
        if let Some(why) = partly {
            context.ui.warn(&why);
        }
        Ok(0)
    }
}

/// Round trips: those that a link measured, and of the others one question and answer, all at once.
async fn round_trips(client: &Client, hosts: &[Host]) -> BTreeMap<InstanceId, Duration> {
    let mut known: BTreeMap<InstanceId, Duration> =
        hosts.iter().filter_map(|host| Some((host.instance, host.link.rtt?))).collect();
    let unknown: Vec<InstanceId> =
        hosts.iter().filter(|host| !host.here && host.link.rtt.is_none()).map(|host| host.instance).collect();
    if unknown.is_empty() {
        return known;
    }
    let asked = Instant::now();
    let mut answers = client.ask_many(&unknown, &Request::Ping, PING_DEADLINE);
    let gather = async {
        while let Some((instance, progress)) = answers.recv().await {
            if let AskProgress::Ended(Ok(_)) = progress {
                known.insert(instance, asked.elapsed());
            }
        }
    };
    // Whatever the mesh does, a list comes.
    let _ = tokio::time::timeout(PING_DEADLINE, gather).await;
    known
}

/// What reaches the host now. Without a link that is messages, and they go by the relay.
fn path(host: &Host) -> Option<&'static str> {
    if host.here {
        return Some("self");
    }
    match host.link.now {
        Some(PathNow::Direct) => Some("direct"),
        Some(PathNow::Relayed) => Some("relayed"),
        None => host.present.then_some("relayed"),
    }
}

fn line(host: &Host, rtt: Option<Duration>) -> Line<'_> {
    let presence = &host.presence;
    Line {
        id: host.peer.to_string(),
        name: &presence.name,
        tags: &presence.tags,
        os: &presence.os,
        arch: &presence.arch,
        version: &presence.version,
        mode: presence.mode.to_string(),
        path: path(host),
        rtt_ms: rtt.map(|rtt| (rtt.as_secs_f64() * 1e6).round() / 1e3),
        age_s: host.link.age.map(|age| age.as_secs_f64()),
        here: host.here,
    }
}

fn row(host: &Host, rtt: Option<Duration>) -> Vec<String> {
    let presence = &host.presence;
    vec![
        host.peer.short(),
        presence.name.clone(),
        if presence.tags.is_empty() { "-".to_owned() } else { presence.tags.join(",") },
        format!("{}/{}", presence.os, presence.arch),
        presence.version.clone(),
        presence.mode.to_string(),
        path(host).unwrap_or("-").to_owned(),
        rtt.map_or_else(|| "-".to_owned(), |rtt| format!("{:.1} ms", rtt.as_secs_f64() * 1e3)),
        host.link.age.map_or_else(|| "-".to_owned(), human_duration),
    ]
}

/// The failure of a target that selects nobody.
pub(super) fn nobody(target: &Target, hosts: usize) -> Failure {
    Failure::usage(format!("no host matches `{target}`"))
        .cause(match hosts {
            0 => "nobody is in the room".to_owned(),
            1 => "the room has 1 host".to_owned(),
            many => format!("the room has {many} hosts"),
        })
        .hint("`peer ls` lists names and tags; `all` means every host")
}
