//! `peer up` in the real program: a relay, a kept token, a peer, a door, and the line that brings the next machine in.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Output, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

fn peer(home: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
    command.args(line.split_whitespace()).env_clear().env("HOME", home).env("PEER_PORT_MAPPING", "0").current_dir(home);
    command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    command
}

/// Starts `peer up` and reads what it says first.
async fn up(home: &Path, flags: &str) -> (Child, serde_json::Value) {
    let line = format!("up --json --quiet --bind 127.0.0.1:0 --name one {flags}");
    let mut child = peer(home, &line).spawn().expect("peer runs");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let first = lines.next_line().await.expect("read").expect("a line");
    (child, serde_json::from_str(&first).expect("JSON"))
}

async fn end(mut child: Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("it runs"), rustix::process::Signal::INT).expect("a signal");
    assert!(child.wait().await.expect("it ends").success());
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn the_printed_line_brings_another_machine_in_and_the_token_is_kept_private() {
    let (one, two) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let (child, said) = up(one.path(), "--mode bypass").await;
    let line = said["line"].as_str().expect("a line").to_owned();
    let token = fs::metadata(one.path().join(".local/state/peerfleet/token")).expect("a kept token");
    assert_eq!(token.permissions().mode() & 0o777, 0o600);

    // The line as it was printed, with another command in place of `run`.
    let (variable, command) = line.split_once(" peer run ").expect("a token and a command");
    let token = variable.strip_prefix("PEER_TOKEN=").expect("a token");
    let listed = peer(two.path(), &format!("ls --json {command}")).env("PEER_TOKEN", token).output().await;
    let listed = listed.expect("peer runs");
    let list: serde_json::Value = serde_json::from_str(text(&listed)).expect("JSON");
    assert_eq!((list.as_array().map(Vec::len), &list[0]["name"]), (Some(1), &"one".into()), "{list}");

    let ran = peer(two.path(), &format!("exec one {command} -- echo hello")).env("PEER_TOKEN", token).output().await;
    assert_eq!(text(&ran.expect("peer runs")), "hello\n");
    end(child).await;

    let (child, again) = up(one.path(), "").await;
    assert!(again["line"].as_str().is_some_and(|again| again.starts_with(variable)), "the token stays");
    end(child).await;
}

#[tokio::test]
async fn commands_beside_it_need_no_token_and_a_second_daemon_is_refused() {
    let home = tempfile::tempdir().expect("a folder");
    let (child, _) = up(home.path(), "").await;
    let status = peer(home.path(), "status --json").output().await.expect("peer runs");
    let status: serde_json::Value = serde_json::from_str(text(&status)).expect("JSON");
    assert_eq!((&status["daemon"], &status["name"]), (&true.into(), &"one".into()));

    assert!(peer(home.path(), "mode edit").output().await.expect("peer runs").status.success());
    let mode = peer(home.path(), "ls --json").output().await.expect("peer runs");
    let list: serde_json::Value = serde_json::from_str(text(&mode)).expect("JSON");
    assert_eq!((&list[0]["mode"], &list[0]["path"]), (&"edit".into(), &"self".into()), "{list}");

    let second = peer(home.path(), "up --bind 127.0.0.1:0").stderr(Stdio::piped()).output().await.expect("peer runs");
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(1) && words.contains("already runs"), "{words}");
    end(child).await;
    assert!(!home.path().join(".local/state/peerfleet/door").exists(), "the door is forgotten");
}
