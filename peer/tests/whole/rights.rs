//! Who may do what, who sees whom, and what becomes of each host of a fleet.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Stdio},
};

use super::room::{Ended, Room, skip, until};

#[test]
fn each_mode_lets_others_do_what_it_says_and_no_more() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let host = room.peer("host", &[]);
    one.sees(&["host"]);
    let source = one.home.join("source");
    fs::write(&source, "words").unwrap();
    let target = host.home.join("target");
    let place = format!("host:{}", target.display());
    let exec = || one.run(&["exec", "host", "--", "echo", "ran"]);
    let send = || one.run(&["send-file", source.to_str().unwrap(), &place]);
    let refused = |ended: Ended, code| {
        let ended = ended.expect(code);
        assert!(ended.stderr.contains("hint: "), "{ended:?}");
        assert_eq!(ended.stdout, "");
    };

    refused(exec(), 125);
    refused(send(), 4);
    assert!(!target.exists());
    host.run(&["mode", "edit"]).expect(0);
    refused(exec(), 125);
    send().expect(0);
    assert_eq!(fs::read(&target).unwrap(), b"words");
    host.run(&["mode", "bypass"]).expect(0);
    assert_eq!(exec().expect(0).stdout, "ran\n");
    host.run(&["mode", "disabled"]).expect(0);
    refused(exec(), 125);
    refused(send(), 4);
}

#[test]
fn a_host_without_exec_runs_nothing_in_any_mode() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _host = room.peer("host", &["--mode", "bypass", "--no-exec"]);
    one.sees(&["host"]);
    let ended = one.run(&["exec", "host", "--", "echo", "ran"]).expect(125);
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_stranger_with_another_token_sees_nobody() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let other = room.peer("other", &[]);
    one.sees(&["other"]);
    let mut elsewhere = Room::start();
    elsewhere.name.clone_from(&room.name);
    let stranger = elsewhere.peer_by(room.relay_address, "stranger", &[]);
    let friend = elsewhere.peer_by(room.relay_address, "friend", &[]);
    stranger.sees(&["friend"]);
    friend.sees(&["stranger"]);
    for (machine, foreign) in
        [(&stranger, ["one", "other"]), (&one, ["stranger", "friend"]), (&other, ["stranger", "friend"])]
    {
        let hosts = machine.hosts();
        assert!(!hosts.iter().any(|host| foreign.iter().any(|name| host["name"] == *name)), "{hosts:?}");
    }
    stranger.run(&["exec", "one", "--", "true"]).expect(125);
}

#[test]
fn commands_that_join_by_themselves_disturb_no_daemon() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let host = room.peer("host", &["--mode", "bypass"]);
    one.sees(&["host"]);
    let through = one.command(&["exec", "host", "--stdin", "--", "cat"]);
    let mut through = { through }.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let beside: Vec<Child> = (0..10)
        .map(|number| {
            let mut command = one.beside(&["exec", "host", "--", "echo", &number.to_string()]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, child) in beside.into_iter().enumerate() {
        let ended = Ended::from(child.wait_with_output().unwrap()).expect(0);
        assert_eq!(ended.stdout, format!("{number}\n"));
    }
    std::io::Write::write_all(&mut through.stdin.take().unwrap(), b"still here").unwrap();
    let ended = Ended::from(through.wait_with_output().unwrap()).expect(0);
    assert_eq!(ended.stdout, "still here");
    for machine in [&one, &host] {
        let log = machine.log();
        assert_eq!(log.matches("in the room").count(), 1, "{log}");
    }
}

#[test]
fn every_host_of_a_fleet_appears_once_with_what_became_of_it() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _good = room.peer("good", &["--mode", "bypass", "--tags", "job,fine"]);
    let _plan = room.peer("plan", &["--mode", "plan", "--tags", "job"]);
    let mut dies = room.peer("dies", &["--mode", "bypass", "--tags", "job"]);
    one.sees(&["good", "plan", "dies"]);
    let stay = dies.home.join("stay");
    let begun = dies.home.join("begun");
    fs::write(&stay, "").unwrap();
    let script = format!(
        "case $HOME in */dies) sleep 1; : > '{}'; while [ -e '{}' ]; do sleep 0.1; done;; esac; echo fine",
        begun.display(),
        stay.display()
    );
    let mut fleet = one.command(&["fleet", "exec", "--target", "job", "--json", "--shell", "--", &script]);
    let fleet = fleet.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the command runs", || begun.exists().then_some(()));
    dies.kill();
    let ended = Ended::from(fleet.wait_with_output().unwrap()).expect(1);
    fs::remove_file(&stay).unwrap();
    let mut lines = ended.json();
    let summary = lines.pop().unwrap();
    assert_eq!(summary["summary"]["hosts"], 3);
    assert_eq!(lines.len(), 3, "{lines:?}");
    let states: BTreeMap<_, _> =
        lines.iter().map(|line| (line["name"].as_str().unwrap(), line["state"].as_str().unwrap())).collect();
    assert_eq!(states, BTreeMap::from([("dies", "lost"), ("good", "exited"), ("plan", "refused")]));
    one.run(&["fleet", "exec", "--target", "fine", "--", "true"]).expect(0);
    one.run(&["fleet", "exec", "--target", "nobody", "--", "true"]).expect(2);
}

#[test]
fn a_command_that_may_have_run_is_lost_and_never_unreachable() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let mut dies = room.peer("dies", &["--mode", "bypass"]);
    for command in [&["exec", "dies"][..], &["fleet", "exec", "--target", "dies"]] {
        one.sees(&["dies"]);
        let stay = dies.home.join("stay");
        let begun = dies.home.join("begun");
        fs::write(&stay, "").unwrap();
        let script = format!(": > '{}'; while [ -e '{}' ]; do sleep 0.1; done", begun.display(), stay.display());
        let mut asking = one.command(&[command, &["--json", "--shell", "--", &script]].concat());
        let asking = asking.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It runs, and its host has said nothing so far: that takes the host 100 ms.
        until("the command runs", || begun.exists().then_some(()));
        dies.kill();
        let ended = Ended::from(asking.wait_with_output().unwrap());
        fs::remove_file(&stay).unwrap();
        fs::remove_file(&begun).unwrap();
        let states: Vec<_> = ended.json().into_iter().filter_map(|line| line.get("state").cloned()).collect();
        assert_eq!(states, ["lost"], "{ended:?}");
        let is_fleet = command[0] == "fleet";
        let ended = ended.expect(if is_fleet { 1 } else { 125 });
        assert!(is_fleet || ended.stderr.contains("`peer jobs dies`"), "{ended:?}");
        dies.start();
    }
}

/// Somebody else on this machine.
const NOBODY: u32 = 65_534;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("nothing was tried as another user: that needs root");
    }
    root
}

#[test]
fn another_user_does_not_get_through_the_local_door() {
    if !is_root() {
        return;
    }
    let room = Room::start();
    let one = room.peer("one", &[]);
    let mut stranger = room.peer_as(NOBODY, "stranger", &[]);
    one.sees(&["stranger"]);
    stranger.kill();
    let door = one.home.join("state/door.sock");
    // The stranger's commands take this door for that of their own peer.
    fs::write(stranger.home.join("state/door"), format!("{}\n", door.display())).unwrap();
    let knock = |cause: &str| {
        for command in [&["status"][..], &["ls"], &["mode", "bypass"], &["exec", "one", "--", "true"]] {
            let ended = stranger.run(command);
            assert!(ended.code != Some(0) && ended.stdout.is_empty(), "{ended:?}");
            assert!(ended.stderr.contains(cause) && ended.stderr.contains("hint: "), "{ended:?}");
        }
    };
    knock("Permission denied");
    let refused = "closed a connection of another user";
    assert!(!one.log().contains(refused));
    // Were the folders and the socket open to everybody, the peer itself would look who comes.
    for (path, mode) in [(one.home.join("state"), 0o755), (door, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    // Closed at once, with or without what was asked in it.
    knock("door.sock: ");
    assert!(one.log().contains(refused));
    fs::set_permissions(one.home.join("state"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(one.run(&["mode", "--json"]).json()[0]["mode"], "plan");
}

#[test]
fn without_permission_a_transfer_says_so_and_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let room = Room::start();
    let one = room.peer("one", &[]);
    let host = room.peer_as(NOBODY, "host", &["--mode", "edit"]);
    one.sees(&["host"]);
    let source = one.home.join("source");
    fs::write(&source, "words").unwrap();
    let closed = host.home.join("closed");
    fs::create_dir(&closed).unwrap();
    let secret = host.home.join("secret");
    fs::write(&secret, "not for that user").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let fetched = one.home.join("fetched");

    let into = |path: &Path| format!("host:{}", path.display());
    let (from_here, to_here) = (source.to_str().unwrap(), fetched.to_str().unwrap());
    for (mode, source, destination) in [
        (0o755, from_here, into(&closed.join("target"))),
        (0o755, from_here, into(&closed)),
        (0o700, from_here, into(&closed.join("target"))),
        (0o755, &into(&secret), to_here.to_owned()),
    ] {
        fs::set_permissions(&closed, fs::Permissions::from_mode(mode)).unwrap();
        let ended = one.run(&["send-file", source, &destination]).expect(1);
        assert!(ended.stderr.to_lowercase().contains("permission denied"), "{ended:?}");
        assert!(ended.stderr.contains("hint: ") && ended.stdout.is_empty(), "{ended:?}");
        assert_eq!(fs::read_dir(&closed).unwrap().count(), 0);
    }
    let left = fs::read_dir(&one.home).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.contains("fetched")));
    // The same host takes what it may.
    one.run(&["send-file", from_here, &into(&host.home)]).expect(0);
    assert_eq!(fs::read(host.home.join("source")).unwrap(), b"words");
}
