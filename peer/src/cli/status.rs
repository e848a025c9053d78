//! `peer status`: how this machine stands in its room.

use std::time::Duration;

use clap::Args;
use peerfleet_proto::request::transfer::PathNow;
use serde_json::json;

use super::context::Context;
use crate::{
    client::{Client, JOIN_WAIT},
    config::Layer,
    failure::Result,
    machine::{Host, Status as Standing},
    mesh::UplinkState,
    ui,
};

/// Show how this machine stands: relay, room, identity, mode, and the links that stand
///
/// Two machines meet only if their room ids are equal: compare them when one does not see the other.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {}

const EXAMPLES: &str = "\
Examples:
  peer status
  peer status --json | jq -r .room_id";

impl Status {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let client = context.client().await?;
        let standing = client.status().await?;
        let why_not = match (standing.uplink, client.is_daemon()) {
            (UplinkState::Joined, _) => None,
            // It has been trying since it was started: what it knows, it knows now.
            (UplinkState::Joining, true) => client.joined(Duration::ZERO).await?.err(),
            (UplinkState::Joining, false) => client.joined(JOIN_WAIT).await?.err(),
        };
        let mut standing = client.status().await?;
        if !client.is_daemon() {
            // This command alone lets others do nothing; what counts is what a peer that runs here will let them do.
            standing.mode = context.config(Layer::default())?.mode.value;
        }
        let hosts = client.hosts_now().await?;
        if context.ui.json {
            context.ui.json_line(&as_json(&client, &standing, &hosts))?;
        } else {
            as_words(context, &client, &standing, &hosts)?;
            if let Some(why) = why_not {
                let hint = why.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
                context.ui.warn(&format!("the room is not joined: {why}{hint}"));
            }
        }
        client.close().await;
        Ok(0)
    }
}

fn links(hosts: &[Host]) -> impl Iterator<Item = (&Host, PathNow)> {
    hosts.iter().filter_map(|host| Some((host, host.link.now?)))
}

fn uplink(state: UplinkState) -> &'static str {
    match state {
        UplinkState::Joining => "joining",
        UplinkState::Joined => "joined",
    }
}

fn path(now: PathNow) -> &'static str {
    match now {
        PathNow::Direct => "direct",
        PathNow::Relayed => "relayed",
    }
}

fn others(hosts: &[Host]) -> usize {
    hosts.iter().filter(|host| !host.here).count()
}

fn as_json(client: &Client, standing: &Standing, hosts: &[Host]) -> serde_json::Value {
    let links: Vec<serde_json::Value> = links(hosts)
        .map(|(host, now)| {
            json!({
                "id": host.peer.to_string(),
                "name": host.name(),
                "path": path(now),
                "rtt_ms": host.link.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
                "age_s": host.link.age.map(|age| age.as_secs_f64()),
                "address": host.link.address,
                "direct_bytes": host.link.direct_bytes,
                "relayed_bytes": host.link.relayed_bytes,
            })
        })
        .collect();
    json!({
        "daemon": client.is_daemon(),
        "relay": standing.relay,
        "room": standing.room,
        "room_id": standing.room_id.to_string(),
        "uplink": uplink(standing.uplink),
        "hosts": others(hosts),
        "id": standing.me.peer.to_string(),
        "instance": standing.me.instance.to_string(),
        "name": standing.name,
        "version": standing.version,
        "mode": standing.mode.to_string(),
        "mode_origin": standing.mode_origin,
        "no_exec": standing.no_exec,
        "state_dir": standing.state_dir,
        "links": links,
    })
}

fn as_words(context: &Context, client: &Client, standing: &Standing, hosts: &[Host]) -> Result<()> {
    let exec = if standing.no_exec { ", never runs commands of others" } else { "" };
    let process = if client.is_daemon() { "runs here" } else { "does not run here; asked by this command alone" };
    for (what, value) in [
        ("peer", format!("{} {process}", standing.version)),
        ("relay", format!("{} ({})", standing.relay, uplink(standing.uplink))),
        ("room", standing.room.clone()),
        ("room id", standing.room_id.to_string()),
        ("others", others(hosts).to_string()),
        ("name", standing.name.clone()),
        ("id", standing.me.peer.to_string()),
        ("mode", format!("{} ({}){exec}", standing.mode, standing.mode_origin)),
        ("state", standing.state_dir.clone()),
    ] {
        context.ui.line(&format!("{what:<8} {}", ui::printable(&value)))?;
    }
    let rows: Vec<Vec<String>> = links(hosts).map(|(host, now)| link_row(host, now)).collect();
    if !rows.is_empty() {
        context.ui.line("")?;
        context.ui.table(&["LINK TO", "PATH", "RTT", "AGE", "DIRECT", "RELAYED"], &rows)?;
    }
    Ok(())
}

fn link_row(host: &Host, now: PathNow) -> Vec<String> {
    vec![
        host.name().to_owned(),
        path(now).to_owned(),
        host.link.rtt.map_or_else(|| "-".to_owned(), |rtt| format!("{:.1} ms", rtt.as_secs_f64() * 1e3)),
        host.link.age.map_or_else(|| "-".to_owned(), ui::human_duration),
        ui::human_bytes(host.link.direct_bytes),
        ui::human_bytes(host.link.relayed_bytes),
    ]
}
