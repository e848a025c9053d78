//! Looks at what this machine's network can do, and at the way to one host.
//!
//! In: a configuration, a way to the mesh if there is one, the host. Out: an [`Examination`]: what was seen, without judging
//! it; [`findings`] judges. It opens a link to the host if there is none and holds it while it looks, and asks the host for
//! its view once; a link that stands notices nothing of it.
//! Measuring -> settled (everything answered, or had its time) or out of time -> the host's view -> done.
//! Bounds: the caller's deadline, and then [`VIEW_DEADLINE`] for the host's view.

use std::time::{Duration, Instant};

use peerfleet_proto::{
    path::{check::BURST, transaction::ANSWER_DEADLINE},
    request::{
        Outcome, Request,
        link::Route,
        network::{CheckOutcome, NetworkReport, PathReport, PortMapping, ResponderReport, SearchReport},
    },
};

use super::{Client, JOIN_WAIT};
use crate::{
    config::Network,
    failure::{Failure, Result},
    machine::{Host, Status},
    mesh::{
        RelayUrl, Report, Stream, UplinkState,
        health::{Health, NoHealth, health},
    },
};

pub mod findings;

/// Time between two looks: short against what a person notices, long against what a look costs.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long the room is waited for after there was trouble: a relay that is just being started again is given a few tries.
const TROUBLE_WAIT: Duration = Duration::from_millis(1500);

/// Time for the host to tell its view, once this side is settled.
const VIEW_DEADLINE: Duration = Duration::from_secs(3);

/// Requests that a STUN responder may leave unanswered before it counts as silent: they are sent within 1.5 s.
pub const SILENT_AFTER: u32 = 3;

/// How long a path is watched after it was found: a nearer or faster one answers within a burst of checks.
const BETTER_PATH: Duration = BURST[BURST.len() - 1];

/// What was seen.
#[derive(Debug)]
pub struct Examination {
    /// URL of the relay.
    pub relay: RelayUrl,
    /// Whether a daemon runs on this machine, and was asked.
    pub daemon: bool,
    /// The state folder, which is readable by its owner alone, or nothing would run.
    pub state_dir: String,
    /// What the relay says of itself.
    pub health: std::result::Result<Health, NoHealth>,
    /// This machine in its room; why it is in none.
    pub mesh: Result<InRoom>,
    /// The host that was asked about.
    pub host: Option<Result<HostSeen>>,
}

/// This machine in its room.
#[derive(Debug)]
pub struct InRoom {
    /// How it stands.
    pub status: Status,
    /// How many other hosts are known.
    pub others: usize,
    /// What is known of the network around.
    pub report: Report,
}

/// A host, and the way to it.
#[derive(Debug)]
pub struct HostSeen {
    /// The host; its link as it was in the end.
    pub host: Host,
    /// Why no link to it came up.
    pub no_link: Option<String>,
    /// How it sees its network and its side of the link; why it does not tell.
    pub view: Result<NetworkReport>,
}

impl Examination {
    /// This side of the way to the host.
    pub fn path(&self) -> Option<&PathReport> {
        self.mesh.as_ref().ok()?.report.network.path.as_ref()
    }
}

/// What is wanted.
#[derive(Debug)]
pub struct Order<'a> {
    /// Where the relay is.
    pub relay: RelayUrl,
    /// How a relay is reached.
    pub network: Network,
    /// The state folder.
    pub state_dir: String,
    /// The host, by name or id.
    pub host: Option<&'a str>,
    /// Time for all measurements.
    pub deadline: Duration,
}

/// Looks. `tell` hears now and then what is waited for.
///
/// # Errors
/// If the daemon cannot be asked.
pub async fn examine(mesh: Result<Client>, order: Order<'_>, tell: &dyn Fn(&str)) -> Result<Examination> {
    let begun = Instant::now();
    let Order { relay, network, state_dir, host, deadline } = order;
    let client = match mesh {
        Ok(client) => client,
        Err(why) => {
            tell("asking the relay how it is");
            let health = health_by(&network, &relay, deadline).await;
            let host = host.map(|_| Err(why.clone()));
            return Ok(Examination { relay, daemon: false, state_dir, health, mesh: Err(why), host });
        }
    };
    let relay = client.status().await?.relay.parse().unwrap_or(relay);
    client.report(None, true).await?.map_err(|why| Failure::unreachable("cannot look").cause(why))?;
    let doctor = Doctor { client: &client, until: begun + deadline, tell };
    let (health, seen) = tokio::join!(health_by(&network, &relay, deadline), doctor.look(host));
    let (in_room, host) = seen?;
    let daemon = client.is_daemon();
    client.close().await;
    Ok(Examination { relay, daemon, state_dir: in_room.status.state_dir.clone(), health, mesh: Ok(in_room), host })
}

async fn health_by(network: &Network, relay: &RelayUrl, deadline: Duration) -> std::result::Result<Health, NoHealth> {
    match network.dial_config(relay) {
        Ok(config) => health(relay, &config, deadline).await,
        Err(why) => Err(NoHealth { cause: why.to_string(), hint: why.hint }),
    }
}

struct Doctor<'a> {
    client: &'a Client,
    until: Instant,
    tell: &'a dyn Fn(&str),
}

impl Doctor<'_> {
    async fn look(&self, host: Option<&str>) -> Result<(InRoom, Option<Result<HostSeen>>)> {
        let joined = self.join().await?;
        let (report, visited) = match host {
            None => (self.settled(None, joined).await?, None),
            Some(text) => match self.find(text, joined).await {
                Err(why) => (self.settled(None, joined).await?, Some(Err(why))),
                Ok(host) => {
                    let (report, visited) = self.visit(host, joined).await?;
                    (report, Some(Ok(visited)))
                }
            },
        };
        let status = self.client.status().await?;
        let others = self.client.hosts_now().await?.iter().filter(|host| !host.here).count();
        Ok((InRoom { status, others, report }, visited))
    }

    /// Waits for the room, but not long for one that there is trouble with.
    async fn join(&self) -> Result<bool> {
        (self.tell)("joining the room");
        let give_up = Instant::now() + TROUBLE_WAIT;
        loop {
            if self.client.joined(LOOK_EVERY.min(self.left())).await?.is_ok() {
                return Ok(true);
            }
            let report = self.client.report(None, false).await?;
            let in_trouble = report.is_ok_and(|report| report.trouble.is_some()) && give_up <= Instant::now();
            if in_trouble || self.left() == Duration::ZERO {
                return Ok(false);
            }
        }
    }

    async fn find(&self, text: &str, joined: bool) -> Result<Host> {
        let wait = if joined { JOIN_WAIT } else { TROUBLE_WAIT };
        let found = tokio::time::timeout(wait, self.client.host(text)).await;
        found.unwrap_or_else(|_| {
            Err(Failure::unreachable(format!("cannot reach `{text}`"))
                .cause("the room is not joined, and no link to a host of that name stands")
                .hint("see what is said of the relay"))
        })
    }

    /// Looks at the way to a host.
    async fn visit(&self, host: Host, joined: bool) -> Result<(Report, HostSeen)> {
        if host.here {
            let view = Err(Failure::fixable("this machine is no other"));
            return Ok((self.settled(None, joined).await?, HostSeen { host, no_link: None, view }));
        }
        (self.tell)(&format!("opening a link to `{}`", host.name()));
        // Held until all was seen, so that the link stays.
        let (no_link, _stream) = match self.link(&host).await {
            Ok(stream) => (None, Some(stream)),
            Err(why) => (Some(why), None),
        };
        let about = no_link.is_none().then_some(&host);
        let report = self.settled(about, joined).await?;
        (self.tell)(&format!("asking `{}` how it looks from there", host.name()));
        let asked = self.client.ask(host.instance, &Request::Network, VIEW_DEADLINE).await;
        let view = match asked {
            Ok(Outcome::Network(view)) => Ok(*view),
            Ok(Outcome::Failed(failure)) => Err(Failure::from_host("it does not tell its view", failure)),
            Ok(_) => Err(Failure::odd_answer(host.name())),
            Err(fault) => Err(Failure::from_ask(host.name(), fault)),
        };
        let now = self.client.hosts_now().await?.into_iter().find(|now| now.instance == host.instance);
        Ok((report, HostSeen { host: now.unwrap_or(host), no_link, view }))
    }

    async fn link(&self, host: &Host) -> std::result::Result<Stream, String> {
        let opening = self.client.open(host.instance, Request::Ping, Route::Auto);
        match tokio::time::timeout(self.left(), opening).await {
            // Whatever the host thinks of the question: the link stands.
            Ok(Ok((_, stream))) => Ok(stream),
            Ok(Err(fault)) => Err(fault.to_string()),
            Err(_) => Err("it did not come up in time".to_owned()),
        }
    }

    /// The report, once nothing more is to be expected of it or the time is over.
    async fn settled(&self, about: Option<&Host>, joined: bool) -> Result<Report> {
        loop {
            let report = self.client.report(about.map(|host| host.instance), false).await?;
            let report = report.map_err(|why| Failure::unreachable("cannot look").cause(why))?;
            let waits = waits_for(&report, about.is_some(), joined);
            match waits {
                Some(what) if self.left() > Duration::ZERO => (self.tell)(&what),
                Some(_) | None => return Ok(report),
            }
            tokio::time::sleep(LOOK_EVERY.min(self.left())).await;
        }
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// What is still to be waited for, in words.
fn waits_for(report: &Report, linked: bool, joined: bool) -> Option<String> {
    let network = &report.network;
    if joined && report.uplink == UplinkState::Joined {
        if network.relay_rtt.is_none() {
            return Some("measuring the way to the relay".to_owned());
        }
        if let Some(responder) = network.responders.iter().find(|responder| responder_is_open(responder)) {
            return Some(format!("asking {} over UDP how it sees us", responder.addr));
        }
        if report.measuring {
            return Some("trying what the NAT lets in".to_owned());
        }
    }
    linked_waits_for(network, linked).or_else(|| {
        // Last, because it takes longest where no router answers.
        (network.port_mapping == Some(PortMapping::Asking)).then(|| "asking the router to open a port".to_owned())
    })
}

fn linked_waits_for(network: &NetworkReport, linked: bool) -> Option<String> {
    let path = network.path.as_ref().filter(|_| linked)?;
    let answered = path.checks.iter().filter(|check| check.answered > 0).count();
    let is_settled = match &path.taken {
        Some(taken) => taken.age >= BETTER_PATH,
        None => path.age >= BETTER_PATH + ANSWER_DEADLINE && !path.checks.iter().any(|check| is_open(check.outcome)),
    };
    let searching = path.taken.is_none() && matches!(path.search, Some(SearchReport::Waiting | SearchReport::Running));
    (!is_settled || searching).then(|| format!("checking addresses: {answered} of {} answer", path.checks.len()))
}

fn responder_is_open(responder: &ResponderReport) -> bool {
    responder.rtt.is_none() && responder.unanswered < SILENT_AFTER
}

fn is_open(outcome: CheckOutcome) -> bool {
    match outcome {
        CheckOutcome::Planned | CheckOutcome::Waiting | CheckOutcome::Answered => true,
        CheckOutcome::NotTried
        | CheckOutcome::NoRoute
        | CheckOutcome::Silent
        | CheckOutcome::Forged
        | CheckOutcome::Lost
        | CheckOutcome::Distrusted => false,
    }
}
