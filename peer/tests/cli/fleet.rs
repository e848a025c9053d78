//! `peer fleet exec` against played hosts.

use std::{collections::BTreeMap, sync::Arc};

use peerfleet_peer::{
    daemon::call::{Call, Reply},
    machine::Host,
    mesh::{AskFault, AskProgress, NotJoined},
};
use peerfleet_proto::{
    id::InstanceId,
    request::{Failure, FailureKind, Outcome, Request, exec::*},
};
use tokio::sync::{Notify, mpsc};

use crate::{
    exec::interrupt,
    machine::{Asked, Machine, Said, answer, end, ended, host, introduce, request_id},
};

type Answers = BTreeMap<InstanceId, Result<Outcome, AskFault>>;

/// A machine whose hosts answer an exec so; a host without an answer works for ever.
fn fleet(hosts: Vec<Host>, answers: Answers) -> (Machine, Asked, Arc<Notify>) {
    let asked = Asked::default();
    let waiting = Arc::new(Notify::new());
    let (seen, waits) = (Arc::clone(&asked), Arc::clone(&waiting));
    let machine = Machine::with_daemon(move |call, stream| {
        let (hosts, answers) = (hosts.clone(), answers.clone());
        let (asked, waiting) = (Arc::clone(&asked), Arc::clone(&waiting));
        Box::pin(async move {
            let Some((Call::AskMany { to, request, .. }, mut stream)) = introduce(&hosts, call, stream).await else {
                return;
            };
            asked.lock().expect("not poisoned").push(request.clone());
            if let Request::Cancel(_) = request {
                return answer(&mut stream, to[0], Ok(Outcome::Done)).await;
            }
            let mut forever = false;
            for instance in to {
                match answers.get(&instance) {
                    Some(ended) => answer(&mut stream, instance, ended.clone()).await,
                    None => {
                        forever = true;
                        let progress = AskProgress::Asked(request_id(instance));
                        let _ = stream.send.write_frame(&Reply::Progress(instance, progress)).await;
                    }
                }
            }
            if forever {
                waiting.notify_one();
                // The caller says nothing more: this ends when it goes away.
                let _ = stream.recv.read_chunk(1).await;
            }
        })
    });
    (machine, seen, waits)
}

fn three() -> Vec<Host> {
    vec![host(1, "web-1"), host(2, "web-2"), host(3, "web-3")]
}

fn answers(list: &[(u8, Result<Outcome, AskFault>)]) -> Answers {
    list.iter().map(|(number, ended)| (host(*number, "").instance, ended.clone())).collect()
}

fn good(number: u8, stdout: &[u8]) -> (u8, Result<Outcome, AskFault>) {
    (number, Ok(ended(host(number, "").instance, 0, stdout, b"")))
}

#[tokio::test]
async fn every_host_appears_once_with_its_state_and_the_summary_comes_last() {
    let refused = Failure::new(FailureKind::Refused, "its mode is plan", "ask its owner");
    let hosts = (1..=7).map(|number| host(number, &format!("h{number}"))).collect();
    let job = |state| {
        let report = JobReport {
            job: request_id(host(1, "").instance).into(),
            end: Some(end(state)),
            stdout: Captured { bytes: b"\xff".to_vec(), total: 9 },
            stderr: Captured::default(),
        };
        Ok(Outcome::Job(report))
    };
    let list = [
        good(1, b"ok\n"),
        (2, Err(AskFault::Unreachable)),
        (3, Err(AskFault::Lost)),
        (4, Ok(Outcome::Failed(refused))),
        (5, job(EndState::TimedOut)),
        (6, job(EndState::Signalled(9))),
        (7, Ok(ended(host(7, "").instance, 2, b"", b"bad"))),
    ];
    let (machine, _, _) = fleet(hosts, answers(&list));
    let said = machine.peer("fleet exec --target all --json -- x").await;
    let mut lines = said.json();
    let summary = lines.pop().expect("a summary");
    assert_eq!((said.code, &summary["summary"]["hosts"], &summary["summary"]["ok"]), (Some(1), &7.into(), &1.into()));
    let states: BTreeMap<&str, &str> =
        lines.iter().map(|line| (line["name"].as_str().unwrap_or(""), line["state"].as_str().unwrap_or(""))).collect();
    let expected = [
        ("h1", "exited"),
        ("h2", "unreachable"),
        ("h3", "lost"),
        ("h4", "refused"),
        ("h5", "timed_out"),
        ("h6", "signalled"),
        ("h7", "exited"),
    ];
    assert_eq!((lines.len(), states), (7, BTreeMap::from(expected)));
    let line = |name: &str| lines.iter().find(|line| line["name"] == name).expect("a line");
    for field in ["id", "name", "state", "exit_code", "duration_ms", "stdout", "stderr", "truncated"] {
        assert!(line("h1").get(field).is_some(), "{field}");
    }
    assert_eq!((&line("h7")["exit_code"], &line("h7")["stderr"]), (&2.into(), &"bad".into()));
    assert_eq!((&line("h5")["stdout_b64"], &line("h5")["truncated"]), (&"/w==".into(), &true.into()));
    assert!(line("h5").get("stdout").is_none());
}

#[tokio::test]
async fn lines_for_people_name_each_host_and_say_what_is_missing() {
    let cut = Captured { bytes: b"one\ntwo\n".to_vec(), total: 5000 };
    let report = JobReport {
        job: request_id(host(2, "").instance).into(),
        end: Some(end(EndState::Exited(0))),
        stdout: cut,
        stderr: Captured::default(),
    };
    let list = [good(1, b"up 3 days\n"), (2, Ok(Outcome::Job(report))), (3, Err(AskFault::Unreachable))];
    let (machine, _, _) = fleet(three(), answers(&list));
    let said = machine.peer("fleet exec --target all -- x").await;
    assert!(said.text().contains("web-1  ok             12 ms  up 3 days\n"), "{said:?}");
    assert!(said.text().contains("web-2 | one\nweb-2 | two\nweb-2 … 4.9 KiB more; `peer logs web-2"), "{said:?}");
    assert!(said.text().contains("web-3  unreachable"), "{said:?}");
    assert!(said.stderr.contains("2 ok, 1 unreachable (web-3)"), "{said:?}");
}

#[tokio::test]
async fn all_good_ends_with_0_and_equal_outputs_are_folded() {
    let list = [good(1, b"6.1\n"), good(2, b"6.1\n"), good(3, b"5.10\n")];
    let (machine, _, _) = fleet(three(), answers(&list));
    let said = machine.peer("fleet exec --target all --fold -- uname -r").await;
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.text().contains("web-1,web-2: ok (2 hosts)\n  | 6.1\n"), "{said:?}");
    assert!(said.text().contains("web-3: ok (1 host)\n  | 5.10\n"), "{said:?}");
}

#[tokio::test]
async fn a_target_that_matches_nobody_ends_with_2() {
    let (machine, asked, _) = fleet(three(), Answers::new());
    let said = machine.peer("fleet exec --target db -- x").await;
    assert_eq!(said.failed(2).part("error"), Some("no host matches `db`"));
    let said = machine.peer("fleet exec --target db --json -- x").await;
    assert_eq!((said.code, &said.json()[0]["summary"]["hosts"]), (Some(2), &0.into()));
    assert!(asked.lock().expect("not poisoned").is_empty());
}

#[tokio::test]
async fn one_question_carries_as_many_hosts_as_may_work_at_once() {
    let list = [good(1, b""), good(2, b""), good(3, b"")];
    let (machine, asked, _) = fleet(three(), answers(&list));
    assert_eq!(machine.peer("fleet exec --target all -- x").await.code, Some(0));
    assert_eq!(asked.lock().expect("not poisoned").len(), 1);
    assert_eq!(machine.peer("fleet exec --target all --concurrency 1 -- x").await.code, Some(0));
    assert_eq!(asked.lock().expect("not poisoned").len(), 4);
}

#[tokio::test]
async fn the_first_failure_ends_all_when_asked_to() {
    let (machine, asked, _) = fleet(three(), answers(&[(1, Err(AskFault::Unreachable)), good(2, b""), good(3, b"")]));
    let said = machine.peer("fleet exec --target all --concurrency 1 --fail-fast --json -- x").await;
    let lines = said.json();
    let states: Vec<&str> = lines.iter().filter_map(|line| line["state"].as_str()).collect();
    assert_eq!((said.code, states), (Some(1), vec!["unreachable", "cancelled", "cancelled"]));
    assert_eq!(asked.lock().expect("not poisoned").len(), 1);
}

#[tokio::test]
async fn ctrl_c_keeps_what_came_cancels_the_rest_and_names_it() {
    let (machine, asked, waiting) = fleet(three(), answers(&[good(1, b"done\n")]));
    let mut child = machine.command(["fleet", "exec", "--target", "all", "--", "x"]).spawn().expect("peer runs");
    waiting.notified().await;
    // What came is printed before the interrupt, or the interrupt would find it under way.
    let (line, mut first) = mpsc::channel(1);
    let stdout = child.stdout.take().expect("a pipe");
    let reader = tokio::spawn(async move {
        use tokio::io::{AsyncBufReadExt, BufReader};
        let mut lines = BufReader::new(stdout).lines();
        let mut all = Vec::new();
        while let Ok(Some(text)) = lines.next_line().await {
            all.push(text);
            let _ = line.try_send(());
        }
        all
    });
    first.recv().await.expect("a line");
    interrupt(&child);
    let said = Said::of(child.wait_with_output().await.expect("it ends"));
    let lines = reader.await.expect("read");
    assert!(lines[0].contains("web-1") && lines[0].contains("done"), "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.contains("cancelled")).count(), 2, "{lines:?}");
    assert!(said.stderr.contains("2 cancelled (web-2, web-3)"), "{said:?}");
    assert_eq!(said.code, Some(1));
    let asked = asked.lock().expect("not poisoned");
    assert_eq!(asked.iter().filter(|request| matches!(request, Request::Cancel(_))).count(), 2, "{asked:?}");
}

#[tokio::test]
async fn without_the_relay_it_is_said_that_hosts_may_be_missing() {
    let machine = Machine::with_daemon(|call, mut stream| {
        Box::pin(async move {
            if matches!(call, Call::Joined { .. }) {
                let why =
                    NotJoined { cause: "nobody listens there".to_owned(), hint: Some("is it running?".to_owned()) };
                let _ = stream.send.write_frame(&Reply::Joined(Err(why))).await;
                return;
            }
            let hosts = [host(1, "web-1"), host(2, "web-2")];
            let Some((Call::AskMany { to, .. }, mut stream)) = introduce(&hosts, call, stream).await else { return };
            for instance in to {
                answer(&mut stream, instance, Ok(ended(instance, 0, b"", b""))).await;
            }
        })
    });
    let said = machine.peer("fleet exec --target all --json -- x").await;
    let summary = said.json().pop().expect("a summary");
    assert_eq!((said.code, &summary["summary"]["complete"]), (Some(0), &false.into()), "{said:?}");
    for said in [said, machine.peer("ls").await] {
        let warned = said.part("warning").expect("a warning");
        assert!(warned.contains("nobody listens there; is it running?"), "{said:?}");
    }
    let said = machine.peer("jobs db-1").await;
    assert!(said.failed(3).part("cause").is_some_and(|cause| cause.contains("nobody listens there")), "{said:?}");
    assert_eq!(said.part("hint"), Some("is it running?"));
}
