//! Sending one file: the caller has the source offer it and the receiver pull it, and watches.
//!
//! In: where from, where to, how it may travel. Out: [`Update`]s, and the receiver's last word.
//! The bytes never pass through here unless this machine is one of the two. Nothing is sent twice: the receiver keeps
//! what it verified. Offering -> receiving <-> trying again (up to [`RECONNECT_DEADLINE`] without progress) -> done.

use std::{os::unix::ffi::OsStrExt, path::PathBuf, time::Duration};

use peerfleet_proto::{
    id::{InstanceId, PeerId},
    request::{
        self, FailureKind, Outcome, Request,
        link::Route,
        transfer::{OfferSpec, Offered, PathNow, PathWish, Progress, ReceiveSpec},
    },
};
use tokio::time::Instant;

use super::{Client, RECONNECT_DEADLINE, RETRY_PAUSE};
use crate::{
    failure::{Failure, Result},
    machine::Host,
    mesh::Stream,
};

/// Time for the source to look at a file and offer it.
const OFFER_DEADLINE: Duration = Duration::from_secs(30);

/// Time between two looks at whether the source's peer is still the process that offered the file: some milliseconds'
/// work for a daemon that knows a thousand hosts.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// One end of a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine, by its absolute path.
    Here(PathBuf),
    /// On a host, by a path as that host reads it.
    There {
        /// The host.
        host: Box<Host>,
        /// The path.
        path: Vec<u8>,
    },
}

impl Place {
    fn name(&self) -> &str {
        match self {
            Self::Here(_) => "this machine",
            Self::There { host, .. } => host.name(),
        }
    }

    fn path(&self) -> Vec<u8> {
        match self {
            Self::Here(path) => path.as_os_str().as_bytes().to_vec(),
            Self::There { path, .. } => path.clone(),
        }
    }
}

/// What is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Where the file is.
    pub from: Place,
    /// Where it goes.
    pub to: Place,
    /// How the bytes may travel.
    pub path: PathWish,
}

/// How it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// So far.
    Moved {
        /// Bytes verified, those of an earlier try included.
        bytes: u64,
        /// Bytes in all.
        total: u64,
        /// Bytes that this try began with.
        resumed: u64,
        /// The path now.
        path: PathNow,
    },
    /// All bytes arrived; the whole is being verified.
    Verifying,
    /// The connection was lost; it is being tried again.
    Again(String),
}

/// The receiver's last word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that the last try began with.
    pub resumed: u64,
    /// SHA-256 of the whole.
    pub sha256: [u8; 32],
    /// The path that carried most bytes.
    pub path: PathNow,
    /// The final name.
    pub destination: Vec<u8>,
}

/// How one try ended without the file.
enum Setback {
    /// Trying again may help.
    Lost(Failure),
    /// Nothing helps.
    Final(Failure),
}

/// Sends a file, and tells `on` how it goes.
///
/// # Errors
/// If either end says no, or the connection stays lost.
pub async fn deliver(client: &Client, delivery: &Delivery, mut on: impl FnMut(Update)) -> Result<Delivered> {
    let mut give_up: Option<Instant> = None;
    loop {
        let mut moved = false;
        let mut tell = |update| {
            moved |= matches!(update, Update::Moved { bytes, resumed, .. } if bytes > resumed);
            on(update);
        };
        let failure = match attempt(client, delivery, &mut tell).await {
            Ok(delivered) => return Ok(delivered),
            Err(Setback::Final(failure)) => return Err(failure),
            Err(Setback::Lost(failure)) => failure,
        };
        if moved {
            give_up = Some(Instant::now() + RECONNECT_DEADLINE);
        }
        // Whoever was never reached is not waited for: that is for the user to know at once.
        if give_up.is_none_or(|when| Instant::now() >= when) {
            return Err(failure);
        }
        on(Update::Again(failure.to_string()));
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn attempt(
    client: &Client,
    delivery: &Delivery,
    on: &mut impl FnMut(Update),
) -> std::result::Result<Delivered, Setback> {
    let me = client.status().await.map_err(Setback::Lost)?.me;
    let (source, source_instance) = end(client, &delivery.from, me.peer, me.instance).await;
    let (receiver, receiver_instance) = end(client, &delivery.to, me.peer, me.instance).await;
    let offer = Request::Offer(OfferSpec { path: delivery.from.path(), receiver });
    let Offered { ticket, file } = offered(client, &delivery.from, source_instance, offer).await?;
    let total = file.size;
    let spec =
        ReceiveSpec { ticket, file, source, source_instance, destination: delivery.to.path(), path: delivery.path };
    let stream = receiving(client, &delivery.to, receiver_instance, spec, delivery.path.route()).await?;
    tokio::select! {
        watched = watch(stream, delivery, total, on) => watched,
        failure = started_anew(client, &delivery.from, source_instance) => Err(Setback::Lost(failure)),
    }
}

/// Ends when the source's peer is another process than the one that offered the file. The receiver cannot know that, and
/// would wait for the old one.
async fn started_anew(client: &Client, from: &Place, offered_by: InstanceId) -> Failure {
    let Place::There { host, .. } = from else { return std::future::pending().await };
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if client.instance_of(host).await.is_some_and(|now| now != offered_by) {
            return Failure::unreachable(format!("lost the file's source on `{}`", host.name()))
                .cause("its peer was started anew")
                .hint("run the same command again: what arrived is kept, and only the rest is sent");
        }
    }
}

async fn end(client: &Client, place: &Place, me: PeerId, my_instance: InstanceId) -> (PeerId, InstanceId) {
    match place {
        Place::Here(_) => (me, my_instance),
        Place::There { host, .. } => (host.peer, client.instance_of(host).await.unwrap_or(host.instance)),
    }
}

async fn offered(
    client: &Client,
    from: &Place,
    instance: InstanceId,
    offer: Request,
) -> std::result::Result<Offered, Setback> {
    let outcome = match from {
        Place::Here(_) => client.ask_here(offer).await.map_err(Setback::Lost)?,
        Place::There { host, .. } => client
            .ask(instance, &offer, OFFER_DEADLINE)
            .await
            .map_err(|fault| Setback::Lost(Failure::from_question(host.name(), fault)))?,
    };
    if let Outcome::Offered(offered) = outcome {
        return Ok(offered);
    }
    let Outcome::Failed(failure) = outcome else { return Err(Setback::Final(Failure::odd_answer(from.name()))) };
    Err(setback(format!("cannot read the file on {}", quoted(from)), failure))
}

async fn receiving(
    client: &Client,
    to: &Place,
    instance: InstanceId,
    spec: ReceiveSpec,
    route: Route,
) -> std::result::Result<Stream, Setback> {
    let receive = Request::Receive(spec);
    let opened = match to {
        Place::Here(_) => client.open_here(receive).await,
        Place::There { .. } => client.open(instance, receive, route).await,
    };
    match opened {
        Ok((Outcome::Receiving, stream)) => Ok(stream),
        Ok((Outcome::Failed(failure), _)) => Err(setback(format!("cannot write the file on {}", quoted(to)), failure)),
        Ok((_, _)) => Err(Setback::Final(Failure::odd_answer(to.name()))),
        Err(fault) => Err(Setback::Lost(Failure::from_open(to.name(), &fault))),
    }
}

async fn watch(
    mut stream: Stream,
    delivery: &Delivery,
    total: u64,
    on: &mut impl FnMut(Update),
) -> std::result::Result<Delivered, Setback> {
    let what = || format!("cannot send the file from {} to {}", quoted(&delivery.from), quoted(&delivery.to));
    loop {
        match stream.recv.read_frame::<Progress>().await {
            Ok(Some(Progress::Moved { bytes, total, resumed, path })) => {
                on(Update::Moved { bytes, total, resumed, path });
            }
            Ok(Some(Progress::Verifying)) => on(Update::Verifying),
            Ok(Some(Progress::Done { bytes, resumed, sha256, path, destination })) => {
                return Ok(Delivered { bytes, resumed, sha256, path, destination });
            }
            Ok(Some(Progress::Failed(failure))) => return Err(setback(what(), failure)),
            Ok(None) | Err(_) => {
                let failure = Failure::unreachable(what())
                    .cause(format!("the connection was lost ({total} bytes in all)"))
                    .hint("run the same command again: what arrived is kept, and only the rest is sent");
                return Err(Setback::Lost(failure));
            }
        }
    }
}

fn quoted(place: &Place) -> String {
    match place {
        Place::Here(_) => "this machine".to_owned(),
        Place::There { host, .. } => format!("`{}`", host.name()),
    }
}

fn setback(what: String, failure: request::Failure) -> Setback {
    let may_pass = matches!(failure.kind, FailureKind::Unreachable | FailureKind::Busy);
    let failure = Failure::from_host(what, failure);
    if may_pass { Setback::Lost(failure) } else { Setback::Final(failure) }
}
