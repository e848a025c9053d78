//! Jobs as callers see them: real processes, streams within this process.

#![expect(clippy::unwrap_used, reason = "a test says by panicking what went wrong")]
#![expect(clippy::wildcard_enum_match_arm, reason = "any other outcome is the same failure of a test")]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use peerfleet_peer::{
    exec::{Jobs, JobsConfig},
    mesh::{Caller, Stream},
    store::Store,
};
use peerfleet_proto::{
    id::{InstanceId, JobId, PeerId, RequestId},
    limits::{INLINE_OUTPUT_BYTES, MAX_MESSAGE_BYTES, OUTPUT_WINDOW_BYTES, STDIN_WINDOW_BYTES},
    request::{
        Failure, FailureKind, Outcome,
        exec::{
            Attach, Attached, Command, EndState, ExecSpec, Follow, FromCaller, FromHost, JobEnd, JobReport, JobSignal,
            JobSummary,
        },
    },
    wire,
};
use proptest::{prelude::*, test_runner::TestRunner};
use tempfile::TempDir;

// How a job ends.

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_ends_at_once_is_answered_with_its_output() {
    let spec = shell("echo out; echo err >&2; exit 7");
    let report = Host::new().finish(spec).await;
    assert_eq!(state(&report), &EndState::Exited(7));
    assert_eq!((report.stdout.bytes.as_slice(), report.stderr.bytes.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_and_variables_and_output_are_bytes() {
    let mut spec = argv(&[b"sh", b"-c", b"printf '%s|%s|' \"$1\" \"$NAME\"; printf '\\000\\377'", b"-", b"\xFF a'b\n"]);
    spec.env = vec![(b"NAME".to_vec(), b"\xFE=1".to_vec())];
    let report = Host::new().finish(spec).await;
    assert_eq!(report.stdout.bytes, b"\xFF a'b\n|\xFE=1|\0\xFF");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_where_it_was_told_to_and_reads_no_input() {
    let host = Host::new();
    let report = host.finish(host.inside(shell("pwd; cat"))).await;
    let folder = host.folder.path().canonicalize().unwrap();
    assert_eq!(report.stdout.bytes, format!("{}\n", folder.display()).into_bytes());
    assert_eq!(state(&report), &EndState::Exited(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_is_an_end_state_of_its_own() {
    let report = Host::new().finish(shell("kill -9 $$")).await;
    assert_eq!(state(&report), &EndState::Signalled(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_the_whole_group_even_where_it_will_not_hear() {
    let mut spec = shell("trap '' TERM; (trap '' TERM; sleep 1000) & echo $! $$; while :; do sleep 1000; done");
    spec.timeout = Some(Duration::from_millis(300));
    let report = Host::new().finish(spec).await;
    assert_eq!(state(&report), &EndState::TimedOut);
    assert!(report.end.unwrap().duration >= Duration::from_millis(300));
    assert_none_alive(&report.stdout.bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_hears_its_timeout_may_still_say_something() {
    let mut spec = shell("trap 'echo bye; exit 3' TERM; echo hello; sleep 1000 & wait");
    spec.timeout = Some(Duration::from_millis(300));
    let report = Host::new().finish(spec).await;
    assert_eq!((state(&report), report.stdout.bytes.as_slice()), (&EndState::TimedOut, &b"hello\nbye\n"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_leaves_no_process() {
    let host = Host::new();
    let job = host.start(shell("(sleep 1000 & echo $!; wait) & echo $$; sleep 1000")).await;
    let mut caller = host.attach(owner(job)).await;
    let pids = caller.hear_until(|heard| heard.stdout.iter().filter(|byte| **byte == b'\n').count() == 2).await;
    assert_eq!(host.jobs.cancel(job).await, Outcome::Done);
    assert_eq!(caller.hear_all().await.end.unwrap().state, EndState::Cancelled);
    assert_none_alive(&pids.stdout).await;
    assert_eq!(host.jobs.running(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_process_hears_that_it_is_cancelled() {
    let host = Host::new();
    let job = host.start(shell("trap 'echo heard; exit' TERM; echo up; kill -STOP $$; sleep 1000")).await;
    let mut caller = host.attach(owner(job)).await;
    caller.hear_until(|heard| heard.stdout == b"up\n").await;
    host.jobs.cancel(job).await;
    assert_eq!(caller.hear_all().await.stdout, b"heard\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_started_says_why() {
    let host = Host::new();
    let script = host.folder.path().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let plain = argv(&[script.to_str().unwrap().as_bytes()]);
    let mut nowhere = argv(&[b"true"]);
    nowhere.cwd = Some(b"/no/such/folder".to_vec());
    for (spec, kind, words) in [
        (argv(&[b"no-such-program"]), FailureKind::NotFound, "there is no program no-such-program"),
        (argv(&[b"/etc/passwd/x"]), FailureKind::NotFound, "there is no program /etc/passwd/x"),
        (nowhere, FailureKind::NotFound, "there is no folder /no/such/folder"),
        (plain.clone(), FailureKind::Os, "may not be executed"),
        (argv(&[b"/tmp"]), FailureKind::Os, "/tmp may not be executed"),
    ] {
        let report = host.run(spec).await;
        let EndState::SpawnFailed(failure) = state(&report) else { panic!("{report:?}") };
        assert_eq!(failure.kind, kind, "{failure:?}");
        assert!(failure.what.contains(words) && !failure.hint.is_empty(), "{failure:?}");
    }
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let report = host.run(plain).await;
    let EndState::SpawnFailed(failure) = state(&report) else { panic!("{report:?}") };
    assert!(failure.what.contains("an interpreter that is not there"), "{failure:?}");
    assert_eq!(host.jobs.running(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rejects_what_contradicts_itself() {
    let host = Host::new();
    let mut equals = argv(&[b"true"]);
    equals.env = vec![(b"A=B".to_vec(), b"c".to_vec())];
    for spec in [argv(&[]), argv(&[b""]), shell(""), argv(&[b"a\0b"]), equals] {
        let outcome = host.jobs.exec(caller(1), fresh_id(), spec).await;
        assert_eq!(failure(outcome).kind, FailureKind::Invalid);
    }
    assert_eq!(host.listed().await, []);
}

// What a process leaves behind.

#[tokio::test(flavor = "multi_thread")]
async fn a_process_left_in_the_group_holds_up_no_end_and_is_ended() {
    let spec = shell("sleep 1000 & echo $!");
    let report = Host::new().finish(spec).await;
    assert_eq!(state(&report), &EndState::Exited(0));
    assert_none_alive(&report.stdout.bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_left_the_group_holds_up_no_end() {
    let spec = shell("setsid sleep 20 &");
    let began = Instant::now();
    let report = Host::new().finish(spec).await;
    assert_eq!(state(&report), &EndState::Exited(0));
    assert!(began.elapsed() < Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_outside_the_group_that_never_stops_writing_holds_up_no_end() {
    let host = Host::new();
    let spec = host.inside(shell("setsid sh -c 'echo $$ > pid; exec yes' & while ! test -s pid; do :; done"));
    host.finish(spec).await;
    // Nobody reads it any more: the closed pipe ends it.
    assert_none_alive(&fs::read(host.folder.path().join("pid")).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_job_lasts_until_its_pipes_are_closed() {
    let host = Host::new();
    let mut spec = host.inside(shell("(while ! test -e go; do sleep 0.01; done; echo late) & echo early"));
    spec.follow = Follow::Detached;
    let report = host.run(spec).await;
    assert_eq!(report.end, None);
    let mut viewer = host.attach(viewer(report.job)).await;
    viewer.hear_until(|heard| heard.stdout == b"early\n").await;
    assert_eq!(host.jobs.running(), 1);
    fs::write(host.folder.path().join("go"), "").unwrap();
    let heard = viewer.hear_all().await;
    assert_eq!((heard.stdout.as_slice(), heard.end.unwrap().state), (&b"late\n"[..], EndState::Exited(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_inherits_no_descriptor_of_the_peer() {
    let host = Host::new();
    let _open = fs::File::open("/etc/passwd").unwrap();
    let mut allowed = inherited_descriptors();
    // Its own three, and the folder that it lists, which has the first number that is free.
    allowed.extend(["0", "1", "2"].map(String::from));
    allowed.extend((3..).map(|number| number.to_string()).find(|number| !allowed.contains(number)));
    let report = host.finish(argv(&[b"ls", b"/proc/self/fd"])).await;
    let text = String::from_utf8(report.stdout.bytes).unwrap();
    assert_eq!(text.lines().filter(|line| !allowed.contains(*line)).collect::<Vec<_>>(), Vec::<&str>::new());
}

// Output, and who holds it back.

#[tokio::test(flavor = "multi_thread")]
async fn output_that_does_not_fit_the_answer_is_followed() {
    let host = Host::new();
    let report = host.run(shell("head -c 300000 /dev/zero; echo end >&2")).await;
    assert_eq!((report.end, report.stdout.total), (None, 0));
    let heard = host.attach(owner(report.job)).await.hear_all().await;
    assert_eq!((heard.stdout, heard.stderr.as_slice()), (vec![0; 300_000], &b"end\n"[..]));
    assert_eq!(heard.end.unwrap().state, EndState::Exited(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_nobody_reads_is_held_back() {
    let host = Host::new();
    let job = host.start(argv(&[b"cat", b"/dev/zero"])).await;
    let held = host.wait_for(|job| job.stdout_bytes >= OUTPUT_WINDOW_BYTES as u64).await;
    assert_eq!(held.stdout_bytes, OUTPUT_WINDOW_BYTES as u64);
    let mut caller = host.attach(owner(job)).await;
    caller.takes = false;
    let heard = caller.hear_until(|heard| heard.stdout.len() == OUTPUT_WINDOW_BYTES).await;
    caller.say(&FromCaller::Taken { stdout: heard.stdout.len() as u64, stderr: 0 }).await;
    let more = caller.hear_until(|heard| heard.stdout.len() == OUTPUT_WINDOW_BYTES).await;
    assert!(more.end.is_none());
    caller.say(&FromCaller::Signal(JobSignal::BrokenPipe)).await;
    assert_eq!(caller.hear_all().await.end.unwrap().state, EndState::Signalled(13));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ignores_a_broken_pipe_is_ended_all_the_same() {
    let host = Host::new();
    let job = host.start(shell("trap '' PIPE TERM; echo up; while :; do sleep 0.05; done")).await;
    let mut caller = host.attach(owner(job)).await;
    caller.hear_until(|heard| heard.stdout == b"up\n").await;
    caller.say(&FromCaller::Signal(JobSignal::BrokenPipe)).await;
    assert_eq!(caller.hear_all().await.end.unwrap().state, EndState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_decides_what_an_interrupt_does() {
    let host = Host::new();
    let job = host.start(shell("trap 'echo again' INT; echo up; while :; do sleep 0.01; done")).await;
    let mut caller = host.attach(owner(job)).await;
    caller.hear_until(|heard| heard.stdout == b"up\n").await;
    caller.say(&FromCaller::Signal(JobSignal::Interrupt)).await;
    caller.hear_until(|heard| heard.stdout == b"again\n").await;
    caller.say(&FromCaller::Signal(JobSignal::Terminate)).await;
    assert_eq!(caller.hear_all().await.end.unwrap().state, EndState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn collected_output_is_bounded_and_says_where_it_begins() {
    let host = Host::configured(|config| config.spool_bytes = 1024 * 1024);
    let spec = shell("yes | head -c 20000000");
    let report = host.finish(spec).await;
    assert_eq!((report.stdout.total, report.stdout.bytes.len()), (20_000_000, INLINE_OUTPUT_BYTES));
    assert!(report.stdout.is_truncated());
    let mut viewer = host.attach(viewer(report.job)).await;
    assert_eq!(viewer.attached.stdout_from, 20_000_000 - 512 * 1024);
    assert_eq!(viewer.hear_all().await.stdout, b"y\n".repeat(256 * 1024));
    assert_eq!(fs::read_dir(host.folder.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_disk_the_newest_output_stays() {
    let host = Host::configured(|config| config.folder = PathBuf::from("/no/such/folder"));
    let spec = shell("yes | head -c 3000000");
    let report = host.finish(spec).await;
    let mut viewer = host.attach(viewer(report.job)).await;
    let from = viewer.attached.stdout_from;
    assert!(from > 0 && from < 3_000_000, "{from}");
    assert_eq!(viewer.hear_all().await.stdout.len() as u64, 3_000_000 - from);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_that_wants_no_more_hears_what_there_is() {
    let host = Host::new();
    let mut spec = shell("echo up; sleep 1000");
    spec.follow = Follow::Detached;
    let job = host.run(spec).await.job;
    host.wait_for(|job| job.stdout_bytes == 3).await;
    let heard = host.attach(Attach { follow: false, ..viewer(job) }).await.hear_all().await;
    assert_eq!((heard.stdout.as_slice(), heard.paused), (&b"up\n"[..], true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_does_not_speak_to_the_process() {
    let host = Host::new();
    let job =
        host.start(shell("trap 'echo signalled; exit' TERM; while ! read line; do sleep 0.1; done; echo $line")).await;
    let mut viewer = host.attach(viewer(job)).await;
    viewer.say(&FromCaller::Signal(JobSignal::Terminate)).await;
    drop(viewer);
    let mut owner = host.attach(owner(job)).await;
    owner.say(&FromCaller::Signal(JobSignal::Interrupt)).await;
    assert_eq!(owner.hear_all().await.end.unwrap().state, EndState::Signalled(2));
}

#[test]
fn no_byte_is_lost_or_repeated_over_streams_cut_anywhere() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() });
    let cuts = prop::collection::vec((1..400_000_usize, any::<bool>()), 1..8);
    let outcome = runner.run(&cuts, |cuts| {
        runtime.block_on(output_and_input_survive(&cuts));
        Ok(())
    });
    outcome.unwrap();
}

/// Sends numbered lines to `cat` and hears them back, over streams that are cut after so many bytes were heard, some of
/// them without having said that any of it was taken.
async fn output_and_input_survive(cuts: &[(usize, bool)]) {
    let host = Host::new();
    let mut spec = shell("cat; echo done >&2");
    spec.stdin = true;
    let job = host.start(spec).await;
    let sent: Vec<u8> = (0..150_000).flat_map(|number| format!("{number}\n").into_bytes()).collect();
    let mut seen = Heard::default();
    for (cut, takes) in cuts.iter().copied().chain([(usize::MAX, true)]) {
        let from = (seen.stdout.len() as u64, seen.stderr.len() as u64);
        let mut caller = host.attach(Attach { stdout_from: from.0, stderr_from: from.1, ..owner(job) }).await;
        assert_eq!((caller.attached.stdout_from, caller.attached.stderr_from), from);
        caller.takes = takes;
        let heard = caller.talk(&sent, cut.min(OUTPUT_WINDOW_BYTES.max(cut * usize::from(takes)))).await;
        seen.stdout.extend(heard.stdout);
        seen.stderr.extend(heard.stderr);
        seen.end = heard.end;
        if seen.end.is_some() {
            break;
        }
    }
    assert_eq!(seen.end.unwrap().state, EndState::Exited(0));
    assert_eq!((seen.stdout == sent, seen.stderr.as_slice()), (true, &b"done\n"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_left_is_kept_until_its_owner_says_that_it_was_taken() {
    let host = Host::new();
    // More than is kept of what was taken, and less than holds the process back.
    let len = 300_000;
    let job = host.start(shell(&format!("sleep 0.3; head -c {len} /dev/zero"))).await;
    for _ in 0..20 {
        let mut caller = host.attach(owner(job)).await;
        caller.takes = false;
        assert_eq!(caller.attached.stdout_from, 0);
        let heard = caller.hear_all().await;
        assert_eq!((heard.stdout.len(), heard.end.unwrap().state), (len, EndState::Exited(0)));
    }
    let mut last = host.attach(owner(job)).await;
    assert_eq!(last.hear_all().await.stdout.len(), len);
    let deadline = Instant::now() + Duration::from_secs(20);
    while host.attach(viewer(job)).await.attached.stdout_from == 0 {
        assert!(Instant::now() < deadline, "what was taken is not kept for its owner");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

// Input.

#[tokio::test(flavor = "multi_thread")]
async fn input_that_is_not_read_is_told_to_the_owner() {
    let host = Host::new();
    let mut spec = shell("exec <&-; echo up; sleep 1000");
    spec.stdin = true;
    let job = host.start(spec).await;
    let mut caller = host.attach(owner(job)).await;
    caller.hear_until(|heard| heard.stdout == b"up\n").await;
    caller.say(&FromCaller::Stdin(b"x".to_vec())).await;
    let heard = caller.hear_until(|heard| heard.stdin_closed).await;
    assert!(heard.stdin_closed && heard.end.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn more_input_than_the_window_ends_the_stream_but_not_the_job() {
    let host = Host::new();
    let mut spec = argv(&[b"sleep", b"1000"]);
    spec.stdin = true;
    let job = host.start(spec).await;
    let mut caller = host.attach(owner(job)).await;
    for _ in 0..STDIN_WINDOW_BYTES / 65_536 + 3 {
        caller.say(&FromCaller::Stdin(vec![0; 65_536])).await;
    }
    let heard = caller.hear_all().await;
    assert!(heard.end.is_none() && !heard.paused);
    assert_eq!(host.jobs.running(), 1);
}

// Owners.

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_its_owner_is_cancelled() {
    let host = Host::configured(|config| config.abandoned = Duration::from_millis(300));
    let job = host.start(argv(&[b"sleep", b"1000"])).await;
    drop(host.attach(owner(job)).await);
    let end = host.wait_for(|job| job.end.is_some()).await.end.unwrap();
    assert_eq!(end.state, EndState::Cancelled);
    assert!(end.duration >= Duration::from_millis(300));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_is_here_keeps_its_job() {
    let host = Host::configured(|config| config.abandoned = Duration::from_millis(300));
    let job = host.start(shell("sleep 1; echo done")).await;
    let heard = host.attach(owner(job)).await.hear_all().await;
    assert_eq!((heard.stdout.as_slice(), heard.end.unwrap().state), (&b"done\n"[..], EndState::Exited(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_owner_takes_over() {
    let host = Host::new();
    let job = host.start(shell("echo one; sleep 1000")).await;
    let mut first = host.attach(owner(job)).await;
    first.hear_until(|heard| heard.stdout == b"one\n").await;
    let mut second = host.attach(Attach { stdout_from: 4, ..owner(job) }).await;
    assert!(first.hear_all().await.end.is_none());
    second.say(&FromCaller::Signal(JobSignal::Terminate)).await;
    assert_eq!(second.hear_all().await.end.unwrap().state, EndState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_owns_a_job() {
    let host = Host::new();
    let job = host.start(argv(&[b"sleep", b"1000"])).await;
    let outcome = host.open(caller(2), owner(job)).recv.read_frame().await.unwrap().unwrap();
    assert_eq!(failure(outcome).kind, FailureKind::Refused);
}

// Ids and bounds.

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_id_runs_once_and_has_the_first_outcome() {
    let host = Host::new();
    let spec = || {
        let mut spec = host.inside(shell("echo x >> ran; cat ran; sleep 0.1"));
        spec.follow = Follow::Collected;
        spec
    };
    let id = fresh_id();
    let repeats: Vec<_> = (0..8)
        .map(|_| {
            let (jobs, spec) = (host.jobs.clone(), spec());
            tokio::spawn(async move { jobs.exec(caller(1), id, spec).await })
        })
        .collect();
    let mut outcomes = Vec::new();
    for repeat in repeats {
        outcomes.push(repeat.await.unwrap());
    }
    outcomes.push(host.jobs.exec(caller(1), id, spec()).await);
    assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]), "{outcomes:?}");
    assert_eq!(fs::read(host.folder.path().join("ran")).unwrap(), b"x\n");
    assert_eq!(failure(host.jobs.exec(caller(2), id, spec()).await).kind, FailureKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_of_an_earlier_process_runs_no_more_and_what_ran_then_is_lost() {
    let host = Host::new();
    let id = fresh_id();
    let spec = || {
        let mut spec = host.inside(shell("echo x >> ran; sleep 1000"));
        spec.follow = Follow::Detached;
        spec
    };
    host.jobs.exec(caller(1), id, spec()).await;
    let mut later = host.clone();
    later.jobs = Jobs::new(host.store.clone(), host.config.clone());
    assert_eq!(later.jobs.recover().await.unwrap(), 1);
    let Outcome::Job(report) = later.jobs.exec(caller(1), id, spec()).await else { panic!("it is known") };
    assert_eq!(state(&report), &EndState::Lost);
    assert_eq!(later.listed().await[0].end.as_ref().unwrap().state, EndState::Lost);
    assert_eq!(later.jobs.cancel(id.into()).await, Outcome::Done);
    assert!(later.refused(viewer(id.into())).await.what.contains("no longer kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_runs_has_its_record_in_the_file_already() {
    let mut host = Host::new();
    host.store = Store::at(host.folder.path().join("state.db"));
    host.jobs = Jobs::new(host.store.clone(), host.config.clone());
    assert_eq!(host.jobs.recover().await.unwrap(), 0);
    for follow in [Follow::Attached, Follow::Collected, Follow::Detached] {
        let marker = format!("mark-{follow:?}");
        // The record holds the command, and the command looks for itself. What a reader sees, no kill takes away.
        let look =
            shell(&format!("cat state.db state.db-wal | grep -q {marker}; echo $? > told.new; mv told.new told"));
        let id = host.run(ExecSpec { follow, ..host.inside(look) }).await.job;
        host.wait_for(|job| job.job == id && job.end.is_some()).await;
        assert_eq!(fs::read_to_string(host.folder.path().join("told")).unwrap(), "0\n", "{follow:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_cancelled_while_its_record_is_written_never_runs() {
    let mut host = Host::new();
    let file = host.folder.path().join("state.db");
    host.store = Store::at(file.clone());
    host.jobs = Jobs::new(host.store.clone(), host.config.clone());
    assert_eq!(state(&host.finish(shell("true")).await), &EndState::Exited(0));
    host.store.flush().await;
    let writer = rusqlite::Connection::open(file).unwrap();
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (id, spec) = (fresh_id(), host.inside(shell("echo x > ran; sleep 1000")));
    let (outcome, cancelled) = tokio::join!(
        host.jobs.exec(caller(1), id, ExecSpec { follow: Follow::Collected, ..spec }),
        host.jobs.cancel(id.into())
    );
    let Outcome::Job(report) = outcome else { panic!("{outcome:?}") };
    assert_eq!((state(&report), cancelled), (&EndState::Cancelled, Outcome::Done));
    // A process that is ended at once has no time to leave a trace, but it has taken time.
    assert_eq!(report.end.unwrap().duration, Duration::ZERO);
    assert!(!host.folder.path().join("ran").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_job_too_many_is_refused_until_one_ends() {
    let host = Host::configured(|config| config.running = 2);
    let job = host.start(argv(&[b"sleep", b"1000"])).await;
    host.start(argv(&[b"sleep", b"1000"])).await;
    let outcome = host.jobs.exec(caller(1), fresh_id(), argv(&[b"true"])).await;
    assert_eq!(failure(outcome).kind, FailureKind::Busy);
    host.jobs.cancel(job).await;
    assert_eq!(host.finish(argv(&[b"true"])).await.job, host.listed().await[0].job);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_ended_jobs_lose_their_logs_then_their_place_but_not_their_line() {
    let host = Host::configured(|config| {
        config.remembered = 3;
        config.remembered_bytes = 4 * 8192;
    });
    let mut jobs = Vec::new();
    for _ in 0..6 {
        let mut spec = shell("head -c 8192 /dev/zero");
        spec.follow = Follow::Detached;
        let job = host.run(spec).await.job;
        host.attach(viewer(job)).await.hear_all().await;
        jobs.push(job);
    }
    let heard = host.attach(viewer(jobs[5])).await.hear_all().await;
    assert_eq!(heard.stdout.len(), 8192);
    let failure = host.refused(viewer(jobs[0])).await;
    assert!(failure.what.contains("no longer kept"), "{failure:?}");
    assert!(host.refused(viewer(JobId::from_bytes([9; 16]))).await.what.contains("there is no job"));
    let listed: Vec<JobId> = host.listed().await.iter().map(|job| job.job).collect();
    assert!(jobs.iter().all(|job| listed.contains(job)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_many_jobs_fits_an_answer_and_keeps_those_that_run() {
    let host = Host::new();
    let running = host.start(argv(&[b"sleep", b"1000"])).await;
    let long = format!(": {}", "x".repeat(500));
    for _ in 0..400 {
        host.finish(shell(&long)).await;
    }
    let outcome = host.jobs.list().await;
    assert!(wire::encode(&outcome).len() < MAX_MESSAGE_BYTES);
    let Outcome::Jobs(listed) = outcome else { panic!("{outcome:?}") };
    assert!(listed.len() > 100 && listed.iter().any(|job| job.job == running));
    assert!(listed.is_sorted_by(|one, other| one.started_unix_ms >= other.started_unix_ms));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_host_ends_its_jobs_and_takes_no_more() {
    let host = Host::new();
    let mut spec = shell("(trap '' TERM; sleep 1000) & echo $! $$; sleep 1000");
    spec.follow = Follow::Detached;
    let job = host.run(spec).await.job;
    let mut viewer = host.attach(viewer(job)).await;
    let pids = viewer.hear_until(|heard| heard.stdout.ends_with(b"\n")).await;
    host.jobs.shutdown().await;
    assert_none_alive(&pids.stdout).await;
    let outcome = host.jobs.exec(caller(1), fresh_id(), argv(&[b"true"])).await;
    assert_eq!(failure(outcome).kind, FailureKind::Busy);
    assert_eq!(host.store.job(job).await.unwrap().unwrap().end.unwrap().state, EndState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_commands_at_once_all_end() {
    let host = Host::new();
    let running: Vec<_> = (0..200)
        .map(|_| {
            let jobs = host.jobs.clone();
            let spec = ExecSpec { follow: Follow::Collected, ..argv(&[b"true"]) };
            tokio::spawn(async move { jobs.exec(caller(1), fresh_id(), spec).await })
        })
        .collect();
    for outcome in running {
        let Outcome::Job(report) = outcome.await.unwrap() else { panic!("not refused") };
        assert_eq!(state(&report), &EndState::Exited(0));
    }
    assert_eq!(host.jobs.running(), 0);
}

// A host, and a caller of it.

#[derive(Clone)]
struct Host {
    folder: Arc<TempDir>,
    config: JobsConfig,
    store: Store,
    jobs: Jobs,
}

impl Host {
    fn new() -> Self {
        Self::configured(|_| {})
    }

    fn configured(configure: impl FnOnce(&mut JobsConfig)) -> Self {
        let folder = Arc::new(TempDir::new().unwrap());
        let mut config = JobsConfig::new(folder.path().to_path_buf());
        config.grace = Duration::from_millis(800);
        configure(&mut config);
        let store = Store::volatile();
        Self { folder, jobs: Jobs::new(store.clone(), config.clone()), config, store }
    }

    /// The same, run in the host's own folder.
    fn inside(&self, spec: ExecSpec) -> ExecSpec {
        ExecSpec { cwd: Some(self.folder.path().to_str().unwrap().into()), ..spec }
    }

    /// Runs a command to its end.
    async fn finish(&self, spec: ExecSpec) -> JobReport {
        self.run(ExecSpec { follow: Follow::Collected, ..spec }).await
    }

    async fn run(&self, spec: ExecSpec) -> JobReport {
        match self.jobs.exec(caller(1), fresh_id(), spec).await {
            Outcome::Job(report) => report,
            outcome => panic!("{outcome:?}"),
        }
    }

    /// Starts a job that outlasts the answer.
    async fn start(&self, spec: ExecSpec) -> JobId {
        let report = self.run(spec).await;
        assert_eq!(report.end, None);
        report.job
    }

    fn open(&self, caller: Caller, attach: Attach) -> Stream {
        let (ours, theirs) = Stream::local_pair();
        let jobs = self.jobs.clone();
        tokio::spawn(async move { jobs.attach(caller, attach, theirs).await });
        ours
    }

    async fn attach(&self, attach: Attach) -> Attending {
        let mut stream = self.open(caller(1), attach);
        let Outcome::Attached(attached) = stream.recv.read_frame().await.unwrap().unwrap() else { panic!("refused") };
        Attending { stream, attached, takes: true, taken: [attached.stdout_from, attached.stderr_from] }
    }

    async fn refused(&self, attach: Attach) -> Failure {
        failure(self.open(caller(1), attach).recv.read_frame().await.unwrap().unwrap())
    }

    async fn listed(&self) -> Vec<JobSummary> {
        match self.jobs.list().await {
            Outcome::Jobs(jobs) => jobs,
            outcome => panic!("{outcome:?}"),
        }
    }

    /// A job, once it is as wanted.
    async fn wait_for(&self, wanted: impl Fn(&JobSummary) -> bool) -> JobSummary {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(job) = self.listed().await.into_iter().find(&wanted) {
                return job;
            }
            assert!(Instant::now() < deadline, "no job came to be as wanted");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let jobs = self.jobs.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            tokio::task::block_in_place(|| runtime.block_on(jobs.shutdown()));
        }
    }
}

/// A caller that is attached.
struct Attending {
    stream: Stream,
    attached: Attached,
    takes: bool,
    taken: [u64; 2],
}

#[derive(Debug, Default)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    stdin_taken: u64,
    stdin_closed: bool,
    end: Option<JobEnd>,
    paused: bool,
}

impl Attending {
    async fn say(&mut self, frame: &FromCaller) {
        // The host may have ended the stream: what it said last tells.
        let _ = self.stream.send.write_frame(frame).await;
    }

    async fn hear_all(&mut self) -> Heard {
        self.hear_until(|_| false).await
    }

    async fn hear_until(&mut self, enough: impl Fn(&Heard) -> bool) -> Heard {
        let mut heard = Heard::default();
        while !enough(&heard) && self.hear(&mut heard).await {}
        heard
    }

    /// Hears one frame; false if it was the last.
    async fn hear(&mut self, heard: &mut Heard) -> bool {
        let frame = tokio::time::timeout(Duration::from_secs(30), self.stream.recv.read_frame()).await;
        let Ok(Some(frame)) = frame.expect("something is said") else { return false };
        match frame {
            FromHost::Stdout(bytes) => {
                self.taken[0] += bytes.len() as u64;
                heard.stdout.extend(bytes);
            }
            FromHost::Stderr(bytes) => {
                self.taken[1] += bytes.len() as u64;
                heard.stderr.extend(bytes);
            }
            FromHost::StdinTaken(taken) => heard.stdin_taken = taken,
            FromHost::StdinClosed => heard.stdin_closed = true,
            FromHost::End(end) => heard.end = Some(end),
            FromHost::Pause => heard.paused = true,
        }
        if self.takes {
            let [stdout, stderr] = self.taken;
            self.say(&FromCaller::Taken { stdout, stderr }).await;
        }
        heard.end.is_none() && !heard.paused
    }

    /// Sends all of `input` from where the host is, and hears until the end or so many bytes.
    async fn talk(mut self, input: &[u8], cut: usize) -> Heard {
        let mut heard = Heard { stdin_taken: self.attached.stdin_taken, ..Heard::default() };
        let mut sent = self.attached.stdin_taken as usize;
        let mut ended = false;
        loop {
            let window = heard.stdin_taken as usize + STDIN_WINDOW_BYTES;
            while sent < input.len().min(window) {
                let next = (sent + 32 * 1024).min(input.len()).min(window);
                self.say(&FromCaller::Stdin(input[sent..next].to_vec())).await;
                sent = next;
            }
            if sent == input.len() && !ended {
                ended = true;
                self.say(&FromCaller::StdinEnd).await;
            }
            if !self.hear(&mut heard).await || heard.stdout.len() >= cut {
                return heard;
            }
        }
    }
}

fn caller(number: u8) -> Caller {
    Caller { peer: PeerId::from_bytes([number; 32]), instance: InstanceId::from_bytes([number; 16]) }
}

fn fresh_id() -> RequestId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    RequestId::from_bytes(bytes)
}

fn spec(command: Command) -> ExecSpec {
    ExecSpec { command, cwd: None, env: Vec::new(), timeout: None, stdin: false, follow: Follow::Attached }
}

fn shell(line: &str) -> ExecSpec {
    spec(Command::Shell(line.into()))
}

fn argv(words: &[&[u8]]) -> ExecSpec {
    spec(Command::Argv(words.iter().map(|word| word.to_vec()).collect()))
}

fn owner(job: JobId) -> Attach {
    Attach { job, stdout_from: 0, stderr_from: 0, follow: true, owner: true }
}

fn viewer(job: JobId) -> Attach {
    Attach { owner: false, ..owner(job) }
}

fn state(report: &JobReport) -> &EndState {
    &report.end.as_ref().expect("it ended").state
}

fn failure(outcome: Outcome) -> Failure {
    match outcome {
        Outcome::Failed(failure) => failure,
        outcome => panic!("{outcome:?}"),
    }
}

/// Sees to it that none of these processes runs (one that ended may wait for whoever adopted it).
async fn assert_none_alive(pids: &[u8]) {
    let pids = String::from_utf8(pids.to_vec()).unwrap();
    assert!(!pids.trim().is_empty());
    let deadline = Instant::now() + Duration::from_secs(5);
    for pid in pids.split_whitespace() {
        let is_alive = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
        };
        while is_alive() {
            assert!(Instant::now() < deadline, "process {pid} still runs");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Descriptors that this process passes on because its own parent did.
fn inherited_descriptors() -> BTreeSet<String> {
    let is_passed_on = |info: &str| {
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0");
        u32::from_str_radix(flags.trim(), 8).is_ok_and(|flags| flags & 0o2_000_000 == 0)
    };
    let entries = fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let passed_on = entries.filter(|entry| fs::read_to_string(entry.path()).is_ok_and(|info| is_passed_on(&info)));
    passed_on.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
