//! `peer exec` against a played host.

use std::{
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use peerfleet_peer::{
    client,
    daemon::call::{Call, Reply},
    mesh::{AskFault, AskProgress, Stream},
};
use peerfleet_proto::request::{Failure, FailureKind, Outcome, Request, exec::*, transfer::PathNow};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    sync::{Notify, mpsc},
};

use crate::machine::{Machine, Said, answer, attached, end, ended, host, introduce, request_id, running};

/// Bytes that a pipe holds in Linux, and most that are in one frame of output.
const PIPE_BYTES: usize = 64 * 1024;

/// Pieces of so many bytes.
const PIECES: usize = 8;

/// A machine with one host, `web-1`: `asked` answers messages, `opened` serves streams.
fn machine<A, O>(asked: A, opened: O) -> Machine
where
    A: Fn(Request) -> Result<Outcome, AskFault> + Send + Sync + 'static,
    O: Fn(Attach, Stream) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync + 'static,
{
    let (asked, opened) = (Arc::new(asked), Arc::new(opened));
    Machine::with_daemon(move |call, stream| {
        let (asked, opened) = (Arc::clone(&asked), Arc::clone(&opened));
        Box::pin(async move {
            match introduce(&[host(1, "web-1")], call, stream).await {
                Some((Call::AskMany { to, request, .. }, mut stream)) => {
                    answer(&mut stream, to[0], asked(request)).await;
                }
                Some((Call::Open { request: Request::Attach(attach), .. }, stream)) => opened(attach, stream).await,
                Some((call, _)) => panic!("an unexpected call: {call:?}"),
                None => {}
            }
        })
    })
}

fn runs(_: Request) -> Result<Outcome, AskFault> {
    Ok(running(host(1, "").instance))
}

async fn say(stream: &mut Stream, word: FromHost) {
    let _ = stream.send.write_frame(&word).await;
}

async fn heard(stream: &mut Stream) -> Option<FromCaller> {
    stream.recv.read_frame().await.ok().flatten()
}

#[tokio::test]
async fn output_that_came_with_the_answer_is_written_as_it_is_and_the_exit_code_is_the_remote_one() {
    let machine = machine(
        |request| {
            let Request::Exec(spec) = request else { panic!("{request:?}") };
            assert_eq!(spec.command, Command::Argv(vec![b"ls".to_vec(), b"-l".to_vec()]));
            assert_eq!(spec.env, [(b"A".to_vec(), b"b=c".to_vec())]);
            Ok(ended(host(1, "").instance, 7, b"out\x00\xff", b"err"))
        },
        |_, _| panic!("nothing is to be attached to"),
    );
    let said = machine.peer("exec web-1 --env A=b=c -- ls -l").await;
    assert_eq!((said.code, said.stdout.as_slice(), said.stderr.as_str()), (Some(7), &b"out\x00\xff"[..], "err"));
}

#[tokio::test]
async fn a_lost_stream_is_picked_up_at_the_bytes_that_were_written() {
    let tries = Arc::new(AtomicUsize::new(0));
    let machine = machine(runs, move |attach, mut stream| {
        let tried = tries.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            match tried {
                0 => {
                    assert_eq!((attach.stdout_from, attach.stderr_from, attach.owner), (0, 0, true));
                    attached(&mut stream, &attach, 0).await;
                    say(&mut stream, FromHost::Stdout(b"abc".to_vec())).await;
                    say(&mut stream, FromHost::Stderr(b"x".to_vec())).await;
                    while heard(&mut stream).await != Some(FromCaller::Taken { stdout: 3, stderr: 1 }) {}
                }
                1 => {}
                _ => {
                    assert_eq!((attach.stdout_from, attach.stderr_from), (3, 1));
                    attached(&mut stream, &attach, 0).await;
                    say(&mut stream, FromHost::Stdout(b"def".to_vec())).await;
                    say(&mut stream, FromHost::End(end(EndState::Exited(0)))).await;
                }
            }
        })
    });
    let said = machine.peer("exec web-1 -- long").await;
    assert_eq!((said.code, said.text(), said.stderr.as_str()), (Some(0), "abcdef", "x"));
}

#[tokio::test]
async fn a_piece_that_nobody_reads_yet_is_written_in_full_although_its_stream_is_lost() {
    // Each piece fills a pipe: the second is being written when the stream breaks, and nobody reads.
    let piece = |number: usize| vec![b'0' + number as u8; PIPE_BYTES];
    let (tries, (again, mut came_again)) = (Arc::new(AtomicUsize::new(0)), mpsc::unbounded_channel());
    let (viewed, mut viewers) = mpsc::unbounded_channel();
    let machine = machine(runs, move |attach, mut stream| {
        let tried = if attach.owner { tries.fetch_add(1, Ordering::SeqCst) } else { 0 };
        let (again, viewed) = (again.clone(), viewed.clone());
        Box::pin(async move {
            if !attach.owner {
                let _ = viewed.send(());
                return;
            }
            if tried > 0 {
                let _ = again.send(());
            }
            attached(&mut stream, &attach, 0).await;
            let from = attach.stdout_from as usize;
            assert_eq!(from % PIPE_BYTES, 0, "a piece was written in part");
            if tried == 0 {
                for number in 0..3 {
                    say(&mut stream, FromHost::Stdout(piece(number))).await;
                }
                while heard(&mut stream).await != Some(FromCaller::Taken { stdout: PIPE_BYTES as u64, stderr: 0 }) {}
                return;
            }
            for number in from / PIPE_BYTES..PIECES {
                say(&mut stream, FromHost::Stdout(piece(number))).await;
            }
            say(&mut stream, FromHost::End(end(EndState::Exited(3)))).await;
            while heard(&mut stream).await.is_some() {}
        })
    });
    let mut command = machine.command(["exec", "web-1", "--stdin", "--", "much"]);
    let mut child = command.env("PEER_LOG", "peerfleet_peer=debug").stdin(Stdio::piped()).spawn().expect("peer runs");
    let mut log = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let mut noticed = async || {
        while let Some(line) = log.next_line().await.expect("it is text") {
            if line.contains("the stream of the job broke") {
                return;
            }
        }
        panic!("the command ended");
    };
    // Words to the host are what shows that the stream is gone.
    let mut stdin = child.stdin.take().expect("a pipe");
    let speaking = async {
        while stdin.write_all(b"more").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = speaking => panic!("the command ended"),
        () = noticed() => {}
    }
    // Another command that loses its stream, and was started later, is the clock: it tries again after the same pause.
    let job = request_id(host(1, "").instance).to_string();
    let _viewer = machine.command(["logs", "web-1", &job, "-f"]).spawn().expect("peer runs");
    for _ in 0..3 {
        assert!(viewers.recv().await.is_some());
    }
    assert!(came_again.try_recv().is_err(), "the stream was picked up while a piece of output was being written");
    drop(stdin);
    let words = tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
    let said = Said::of(child.wait_with_output().await.expect("it ends"));
    let wanted: Vec<u8> = (0..PIECES).flat_map(piece).collect();
    assert_eq!((said.code, said.stdout == wanted), (Some(3), true));
    assert!(came_again.recv().await.is_some());
    words.await.expect("the log is read to its end");
}

#[tokio::test]
async fn standard_input_is_sent_once_over_two_streams() {
    let tries = Arc::new(AtomicUsize::new(0));
    let machine = machine(runs, move |attach, mut stream| {
        let tried = tries.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            if tried == 0 {
                attached(&mut stream, &attach, 0).await;
                assert_eq!(heard(&mut stream).await, Some(FromCaller::Stdin(b"hello world".to_vec())));
                return;
            }
            attached(&mut stream, &attach, 6).await;
            assert_eq!(heard(&mut stream).await, Some(FromCaller::Stdin(b"world".to_vec())));
            assert_eq!(heard(&mut stream).await, Some(FromCaller::StdinEnd));
            say(&mut stream, FromHost::End(end(EndState::Exited(0)))).await;
        })
    });
    let mut child =
        machine.command(["exec", "web-1", "--stdin", "--", "cat"]).stdin(Stdio::piped()).spawn().expect("peer runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"hello world").await.expect("written");
    drop(stdin);
    let said = Said::of(child.wait_with_output().await.expect("it ends"));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_remote_process_and_us_as_sigpipe_would() {
    let told = Arc::new(Notify::new());
    let noted = Arc::clone(&told);
    let machine = machine(runs, move |attach, stream| {
        let told = Arc::clone(&told);
        Box::pin(async move {
            let Stream { mut send, mut recv } = stream;
            let outcome =
                Outcome::Attached(Attached { stdin_taken: 0, stdout_from: attach.stdout_from, stderr_from: 0 });
            let _ = send.write_frame(&Reply::Opened(Ok(outcome))).await;
            let flood = async { while send.write_frame(&FromHost::Stdout(vec![b'y'; 4096])).await.is_ok() {} };
            let listen = async {
                while let Ok(Some(word)) = recv.read_frame::<FromCaller>().await {
                    if word == FromCaller::Signal(JobSignal::BrokenPipe) {
                        told.notify_one();
                        return;
                    }
                }
            };
            tokio::select! {
                () = flood => {}
                () = listen => {}
            }
            let _ = send.write_frame(&FromHost::End(end(EndState::Signalled(13)))).await;
        })
    });
    let mut child = machine.command(["exec", "web-1", "--", "yes"]).spawn().expect("peer runs");
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut [0; 10_000]).await.expect("output");
    drop(stdout);
    let said = Said::of(child.wait_with_output().await.expect("it ends"));
    assert_eq!((said.code, said.stderr.as_str()), (Some(141), ""));
    noted.notified().await;
}

#[tokio::test]
async fn ctrl_c_interrupts_the_remote_process_group() {
    let ready = Arc::new(Notify::new());
    let machine = machine(runs, {
        let ready = Arc::clone(&ready);
        move |attach, mut stream| {
            let ready = Arc::clone(&ready);
            Box::pin(async move {
                attached(&mut stream, &attach, 0).await;
                ready.notify_one();
                assert_eq!(heard(&mut stream).await, Some(FromCaller::Signal(JobSignal::Interrupt)));
                say(&mut stream, FromHost::End(end(EndState::Signalled(2)))).await;
            })
        }
    });
    let child = machine.command(["exec", "web-1", "--", "sleep", "100"]).spawn().expect("peer runs");
    ready.notified().await;
    interrupt(&child);
    assert_eq!(Said::of(child.wait_with_output().await.expect("it ends")).code, Some(130));
}

pub(crate) fn interrupt(child: &tokio::process::Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("it runs"), rustix::process::Signal::INT).expect("a signal");
}

/// A machine whose daemon is never in the room, and tells when somebody waits for that.
pub(crate) fn never_joined(asked: Arc<Notify>) -> Machine {
    Machine::with_daemon(move |call, stream| {
        let asked = Arc::clone(&asked);
        Box::pin(async move {
            if matches!(call, Call::Joined { .. }) {
                asked.notify_one();
                return std::future::pending().await;
            }
            let _ = introduce(&[], call, stream).await;
        })
    })
}

#[tokio::test]
async fn ctrl_c_while_the_room_is_not_joined_ends_it_with_an_event() {
    let asked = Arc::new(Notify::new());
    let machine = never_joined(Arc::clone(&asked));
    let child = machine.command(["exec", "web-1", "--json", "--", "x"]).spawn().expect("peer runs");
    asked.notified().await;
    interrupt(&child);
    let said = Said::of(child.wait_with_output().await.expect("it ends"));
    assert_eq!(said.failed(130).part("error"), Some("interrupted before `web-1` was asked"));
    let event = said.json().remove(0);
    assert_eq!((&event["event"], &event["state"]), (&"exit".into(), &"cancelled".into()));
    assert_eq!(event.get("job"), Some(&serde_json::Value::Null));
}

#[tokio::test]
async fn a_refusal_ends_with_125_in_the_hosts_words_and_as_an_event() {
    let refuse = |_| {
        let failure = Failure::new(FailureKind::Refused, "its mode is plan", "run `peer mode bypass` on that host");
        Ok(Outcome::Failed(failure))
    };
    let machine = machine(refuse, |_, _| panic!("nothing is to be attached to"));
    let said = machine.peer("exec web-1 -- ls").await;
    assert_eq!(said.failed(125).part("cause"), Some("its mode is plan"));
    let event = machine.peer("exec web-1 --json -- ls").await.json().remove(0);
    assert_eq!((&event["event"], &event["state"]), (&"exit".into(), &"refused".into()));
    assert!(event["exit_code"].is_null());
}

#[tokio::test]
async fn an_unreachable_host_ends_with_125() {
    let machine = machine(|_| Err(AskFault::Unreachable), |_, _| panic!("nothing is to be attached to"));
    let said = machine.peer("exec web-1 -- ls").await;
    assert_eq!(said.failed(125).part("error"), Some("cannot reach `web-1`"));
    let said = machine.peer("exec nobody -- ls").await;
    assert_eq!(said.failed(125).part("error"), Some("cannot reach `nobody`"));
    for machine in [machine, Machine::new()] {
        let said = machine.peer("exec nobody --json -- ls").await;
        assert_eq!((said.code, &said.json()[0]["state"]), (Some(125), &"unreachable".into()));
    }
}

#[tokio::test]
async fn the_last_event_names_the_job_wherever_the_command_may_have_run() {
    for (fault, state) in [
        (AskFault::Lost, "lost"),
        (AskFault::DeadlineExceeded, "lost"),
        (AskFault::Unreachable, "unreachable"),
        (AskFault::Busy, "refused"),
    ] {
        let machine = Machine::with_daemon(move |call, stream| {
            Box::pin(async move {
                let Some((Call::AskMany { to, .. }, mut stream)) = introduce(&[host(1, "web-1")], call, stream).await
                else {
                    return;
                };
                // It was asked, and nobody knows whether the host heard it.
                for progress in [AskProgress::Asked(request_id(to[0])), AskProgress::Ended(Err(fault))] {
                    let _ = stream.send.write_frame(&Reply::Progress(to[0], progress)).await;
                }
            })
        });
        let job = serde_json::json!((state == "lost").then(|| request_id(host(1, "").instance).to_string()));
        for line in ["exec web-1 --json -- x", "exec web-1 --json --detach -- x"] {
            let said = machine.peer(line).await;
            let event = said.json().pop().expect("an event");
            assert_eq!((said.code, &event["event"], &event["state"]), (Some(125), &"exit".into(), &state.into()));
            assert_eq!(event.get("job"), Some(&job), "{event}");
        }
    }
}

#[tokio::test]
async fn a_host_to_which_a_link_stands_directly_is_asked_without_waiting_for_the_relay() {
    let mut linked = host(1, "web-1");
    linked.link.now = Some(PathNow::Direct);
    let machine = Machine::with_daemon(move |call, stream| {
        let hosts = [linked.clone()];
        Box::pin(async move {
            if matches!(call, Call::Joined { .. }) {
                // The room is joined never: whoever asks for that waits for as long as it takes.
                return std::future::pending().await;
            }
            let Some((Call::AskMany { to, .. }, mut stream)) = introduce(&hosts, call, stream).await else { return };
            answer(&mut stream, to[0], Ok(ended(to[0], 0, b"here\n", b""))).await;
        })
    });
    for name in ["web-1", &host(1, "").peer.to_string()[..8]] {
        let running = machine.run(["exec", name, "--", "x"]);
        let said = tokio::time::timeout(client::JOIN_WAIT, running).await.expect("it waits for nothing");
        assert_eq!((said.code, said.text()), (Some(0), "here\n"), "{said:?}");
    }
}

#[tokio::test]
async fn end_states_lead_to_the_agreed_exit_codes() {
    for (state, code) in [
        (EndState::TimedOut, 124),
        (EndState::Signalled(9), 137),
        (EndState::Lost, 125),
        (EndState::SpawnFailed(Failure::new(FailureKind::NotFound, "no such program", "look for it")), 125),
    ] {
        let machine = machine(runs, move |attach, mut stream| {
            let state = state.clone();
            Box::pin(async move {
                attached(&mut stream, &attach, 0).await;
                say(&mut stream, FromHost::End(end(state))).await;
            })
        });
        assert_eq!(machine.peer("exec web-1 -- x").await.code, Some(code));
        let said = machine.peer("exec web-1 --json -- x").await;
        let event = said.json().pop().expect("an event");
        assert_eq!((said.code, &event["event"]), (Some(code), &"exit".into()));
        assert_eq!(event["error"].is_string(), code == 125, "{event}");
    }
}

#[tokio::test]
async fn events_carry_the_bytes_and_the_end() {
    let machine =
        machine(|_| Ok(ended(host(1, "").instance, 3, b"\xff", b"e")), |_, _| panic!("nothing is to be attached to"));
    let said = machine.peer("exec web-1 --json -- x").await;
    let events = said.json();
    let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    assert_eq!((said.code, names), (Some(3), vec!["started", "stdout", "stderr", "exit"]));
    assert_eq!(events[1]["data_b64"], "/w==");
    assert_eq!((&events[3]["exit_code"], &events[3]["state"]), (&3.into(), &"exited".into()));
    assert!(events[3]["duration_ms"].is_u64() && events[3]["signal"].is_null());
}

#[tokio::test]
async fn a_detached_command_prints_its_job() {
    let orders = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&orders);
    let machine = machine(
        move |request| {
            orders.lock().expect("not poisoned").push(request);
            runs(Request::Ping)
        },
        |_, _| panic!("nothing is to be attached to"),
    );
    let said = machine.peer("exec web-1 --detach -- make").await;
    assert!(said.text().trim().parse::<peerfleet_proto::id::JobId>().is_ok(), "{said:?}");
    let orders = seen.lock().expect("not poisoned");
    assert!(matches!(&orders[0], Request::Exec(spec) if spec.follow == Follow::Detached), "{orders:?}");
}

#[tokio::test]
async fn a_log_is_read_to_where_it_ends_now_and_owned_by_nobody() {
    let machine = machine(runs, |attach, mut stream| {
        Box::pin(async move {
            assert!(!attach.owner && !attach.follow);
            attached(&mut stream, &attach, 0).await;
            say(&mut stream, FromHost::Stdout(b"so far\n".to_vec())).await;
            say(&mut stream, FromHost::Pause).await;
        })
    });
    let job = request_id(host(1, "").instance);
    let said = machine.peer(&format!("logs web-1 {job}")).await;
    assert_eq!((said.code, said.text()), (Some(0), "so far\n"), "{said:?}");
}

#[tokio::test]
async fn reading_the_log_of_a_job_that_did_not_start_goes_well_and_says_why_it_did_not() {
    let why = || Failure::new(FailureKind::NotFound, "there is no program x", "look at its spelling");
    let machine = machine(
        move |request| {
            assert_eq!(request, Request::Jobs);
            Ok(Outcome::Jobs(vec![JobSummary {
                job: request_id(host(1, "").instance).into(),
                caller: crate::machine::me().peer,
                command: "x".to_owned(),
                started_unix_ms: 1,
                end: Some(end(EndState::SpawnFailed(why()))),
                stdout_bytes: 0,
                stderr_bytes: 0,
            }]))
        },
        move |attach, mut stream| {
            Box::pin(async move {
                attached(&mut stream, &attach, 0).await;
                say(&mut stream, FromHost::End(end(EndState::SpawnFailed(why())))).await;
            })
        },
    );
    let job = request_id(host(1, "").instance).to_string();
    let said = machine.run(["logs", "web-1", &job, "--json"]).await;
    let event = said.json().remove(0);
    assert_eq!((said.code, &event["state"]), (Some(0), &"spawn_failed".into()), "{said:?}");
    assert!(event["error"].as_str().is_some_and(|error| error.contains("no program x")), "{event}");
    let listed = machine.peer("jobs web-1 --json").await.json().remove(0);
    assert_eq!(listed[0]["error"], "there is no program x");
}
