//! `peer send-file` against played hosts.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use peerfleet_peer::{
    client::JOIN_WAIT,
    daemon::call::{Call, Reply},
    mesh::Stream,
};
use peerfleet_proto::{
    id::Ticket,
    request::{Failure, FailureKind, Outcome, Request, link::Route, transfer::*},
};

use tokio::sync::Notify;

use crate::machine::{Machine, Said, answer, host, introduce, me};

fn offered() -> Outcome {
    let file = FileInfo { name: b"f".to_vec(), size: 100, mode: 0o644, mtime_s: 0, mtime_ns: 0 };
    Outcome::Offered(Offered { ticket: Ticket::from_bytes([5; 16]), file })
}

fn moved(bytes: u64, resumed: u64) -> Progress {
    Progress::Moved { bytes, total: 100, resumed, path: PathNow::Direct }
}

fn done(resumed: u64) -> Progress {
    let destination = b"/srv/f".to_vec();
    Progress::Done { bytes: 100, resumed, sha256: [0xab; 32], path: PathNow::Relayed, destination }
}

/// A machine with the hosts `web-1` and `db-1`; every receiver tells this progress, by the count of tries.
fn machine(check: fn(&Call), tell: fn(usize) -> Vec<Progress>) -> Machine {
    let tries = Arc::new(AtomicUsize::new(0));
    Machine::with_daemon(move |call, stream| {
        let tries = Arc::clone(&tries);
        Box::pin(async move {
            let hosts = [host(1, "web-1"), host(2, "db-1")];
            let Some((call, mut stream)) = introduce(&hosts, call, stream).await else { return };
            check(&call);
            match call {
                Call::AskHere(Request::Offer(_)) => {
                    let _ = stream.send.write_frame(&Reply::Answered(offered())).await;
                }
                Call::AskMany { to, request: Request::Offer(_), .. } => answer(&mut stream, to[0], Ok(offered())).await,
                Call::Open { request: Request::Receive(_), .. } | Call::OpenHere(Request::Receive(_)) => {
                    receive(stream, tell(tries.fetch_add(1, Ordering::SeqCst))).await;
                }
                other => panic!("an unexpected call: {other:?}"),
            }
        })
    })
}

async fn receive(mut stream: Stream, progress: Vec<Progress>) {
    let _ = stream.send.write_frame(&Reply::Opened(Ok(Outcome::Receiving))).await;
    for word in progress {
        let _ = stream.send.write_frame(&word).await;
    }
}

#[tokio::test]
async fn from_here_the_daemon_offers_by_an_absolute_path_and_the_host_receives() {
    let machine = machine(
        |call| match call {
            Call::AskHere(Request::Offer(spec)) => {
                assert!(spec.path.starts_with(b"/") && spec.path.ends_with(b"/site.tar"));
                assert_eq!(spec.receiver, host(2, "").peer);
            }
            Call::Open { to, request: Request::Receive(spec), route } => {
                assert_eq!((*to, *route), (host(2, "").instance, Route::RelayedOnly));
                assert_eq!((spec.source, spec.source_instance), (me().peer, me().instance));
                assert_eq!((spec.destination.as_slice(), spec.path), (&b"/srv/"[..], PathWish::Relayed));
            }
            other => panic!("an unexpected call: {other:?}"),
        },
        |_| vec![moved(100, 0), Progress::Verifying, done(0)],
    );
    fs::write(machine.home().join("site.tar"), "x").expect("a file");
    let said = machine.peer("send-file site.tar db-1:/srv/ --path relayed").await;
    assert_eq!((said.code, said.text()), (Some(0), ""), "{said:?}");
    assert!(said.stderr.contains("db-1:/srv/f: 100 B in"), "{said:?}");
}

#[tokio::test]
async fn from_host_to_host_neither_end_is_here() {
    let machine = machine(
        |call| match call {
            Call::AskMany { to, request: Request::Offer(spec), .. } => {
                assert_eq!((to[0], spec.receiver), (host(1, "").instance, host(2, "").peer));
            }
            Call::Open { to, request: Request::Receive(spec), .. } => {
                assert_eq!((*to, spec.source), (host(2, "").instance, host(1, "").peer));
                assert_eq!(spec.source_instance, host(1, "").instance);
            }
            other => panic!("an unexpected call: {other:?}"),
        },
        |_| vec![done(0)],
    );
    let said = machine.peer("send-file web-1:/a db-1:/tmp/b --json").await;
    let event = said.json().pop().expect("an event");
    assert_eq!((said.code, &event["event"], &event["path"]), (Some(0), &"done".into(), &"relayed".into()));
    assert_eq!(event["sha256"], "ab".repeat(32));
    for field in ["bytes", "total", "seconds"] {
        assert!(event[field].is_number(), "{field} in {event}");
    }
}

#[tokio::test]
async fn a_destination_that_is_no_text_is_told_byte_by_byte() {
    let machine = machine(
        |_| {},
        |_| {
            let Progress::Done { bytes, resumed, sha256, path, .. } = done(0) else { unreachable!("it is done") };
            vec![Progress::Done { bytes, resumed, sha256, path, destination: b"/srv/\xff".to_vec() }]
        },
    );
    let event = machine.peer("send-file web-1:/a db-1: --json").await.json().pop().expect("an event");
    assert_eq!((&event["destination_b64"], event.get("destination")), (&"L3Nydi//".into(), None), "{event}");
}

#[tokio::test]
async fn ctrl_c_while_the_room_is_not_joined_ends_it_at_once() {
    let asked = Arc::new(Notify::new());
    let machine = crate::exec::never_joined(Arc::clone(&asked));
    let child = machine.command(["send-file", "web-1:/a", ".", "--json"]).spawn().expect("peer runs");
    asked.notified().await;
    crate::exec::interrupt(&child);
    let ends = tokio::time::timeout(JOIN_WAIT, child.wait_with_output());
    let said = Said::of(ends.await.expect("it does not wait for the room").expect("it ends"));
    assert_eq!(said.failed(130).part("error"), Some("interrupted"));
    assert_eq!(said.json()[0]["event"], "failed");
}

#[tokio::test]
async fn to_here_this_machine_receives_whatever_its_mode() {
    let machine = machine(
        |call| match call {
            Call::AskMany { request: Request::Offer(spec), .. } => assert_eq!(spec.receiver, me().peer),
            Call::OpenHere(Request::Receive(spec)) => assert!(spec.destination.starts_with(b"/")),
            other => panic!("an unexpected call: {other:?}"),
        },
        |_| vec![done(0)],
    );
    assert_eq!(machine.peer("send-file web-1:/var/log/syslog .").await.code, Some(0));
}

#[tokio::test]
async fn a_connection_lost_on_the_way_is_tried_again() {
    let machine = machine(|_| {}, |tried| if tried < 2 { vec![moved(40, 0)] } else { vec![moved(40, 40), done(40)] });
    let said = machine.peer("send-file web-1:/a db-1:").await;
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("40 B resumed"), "{said:?}");
}

#[tokio::test]
async fn what_the_receiver_cannot_do_is_told_and_not_tried_again() {
    let machine = machine(
        |_| {},
        |tried| {
            assert_eq!(tried % 2, tried, "once for words, once for JSON");
            let failure = Failure::new(FailureKind::Os, "No space left on device", "make room on that host");
            vec![moved(40, 0), Progress::Failed(failure)]
        },
    );
    let said = machine.peer("send-file web-1:/a db-1:").await;
    assert_eq!(said.failed(1).part("cause"), Some("No space left on device"));
    let said = machine.peer("send-file web-1:/a db-1: --json").await;
    let event = said.json().pop().expect("an event");
    assert_eq!((&event["event"], &event["bytes"], &event["total"]), (&"failed".into(), &40.into(), &100.into()));
}

#[tokio::test]
async fn what_cannot_be_sent_from_here_is_told_before_anybody_is_asked() {
    let machine = Machine::new();
    fs::create_dir(machine.home().join("folder")).expect("a folder");
    let said = machine.peer("send-file folder web-1:").await;
    assert!(said.failed(1).part("hint").is_some_and(|hint| hint.contains("tar")), "{said:?}");
    let said = machine.peer("send-file missing web-1:").await;
    assert_eq!(said.failed(1).part("error"), Some("cannot read missing"));
    assert!(said.part("hint").is_some_and(|hint| hint.contains("spelling")), "{said:?}");
    for line in ["send-file folder web-1: --json", "send-file missing web-1: --json"] {
        let said = machine.peer(line).await;
        let event = said.json().pop().expect("an event");
        assert_eq!((said.code, &event["event"], &event["bytes"]), (Some(1), &"failed".into(), &0.into()), "{said:?}");
        assert!(event["error"].as_str().is_some_and(|error| error.starts_with("cannot ")), "{event}");
    }
    assert_eq!(
        machine.peer("send-file ./a:b ./c:d").await.failed(2).part("error"),
        Some("both ends are on this machine")
    );
}
