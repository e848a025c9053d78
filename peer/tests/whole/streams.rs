//! Output of commands: what holds it back, and what may happen on its way.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use super::room::{Room, Running, next_event, until};

/// After so much silence a link counts as broken.
const LINK_TIME_OUT: Duration = Duration::from_secs(60);

/// Most that a process may ever have resident.
const MOST_MEMORY: u64 = 64 << 20;

#[test]
fn a_relay_that_is_killed_costs_neither_the_direct_path_nor_a_line() {
    let mut room = Room::start();
    let one = room.peer("one", &[]);
    let other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    let stop = other.home.join("stop");
    let script = format!("i=0; while [ ! -e '{}' ]; do i=$((i+1)); echo $i; sleep 0.01; done", stop.display());
    let (mut running, mut lines) = one.spawn(&["exec", "other", "--shell", "--", &script]);
    let mut count = 0_u64;
    let mut read = |wanted: u64| {
        let end = count.saturating_add(wanted);
        while count < end {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap() == 0 {
                break;
            }
            count += 1;
            assert_eq!(line, format!("{count}\n"));
        }
        count == end
    };
    assert!(read(20));
    until("a direct path", || (one.path_of("other")? == "direct").then_some(()));
    room.kill_relay();
    assert!(read(200), "the stream ended with the relay");

    let source = one.home.join("source");
    fs::write(&source, "x".repeat(8 << 20)).unwrap();
    let target = one.home.join("fetched");
    fs::copy(&source, other.home.join("there")).unwrap();
    let place = format!("other:{}", other.home.join("there").display());
    let ended = one.run(&["send-file", &place, target.to_str().unwrap(), "--json"]).expect(0);
    assert_eq!(ended.json().last().unwrap()["path"], "direct");

    room.start_relay();
    until("the room is joined again", || {
        (one.run(&["status", "--json"]).json()[0]["uplink"] == "joined").then_some(())
    });
    one.sees(&["other"]);
    assert!(read(200), "the stream ended when the relay came back");
    assert_eq!(one.path_of("other").as_deref(), Some("direct"));
    fs::write(&stop, "").unwrap();
    assert!(!read(u64::MAX));
    assert!(running.0.wait().unwrap().success());
}

#[test]
fn output_faster_than_its_reader_arrives_in_full_although_the_relay_is_killed() {
    let mut room = Room::start();
    let one = room.peer("one", &[]);
    let _other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); echo $i; done";
    let (mut running, lines) = one.spawn(&["exec", "other", "--shell", "--", script]);
    let mut count = 0_u64;
    for line in lines.lines() {
        count += 1;
        assert_eq!(line.unwrap(), count.to_string());
        if count == 1_000 {
            // Meanwhile nobody reads: the command ends when all that is left fits the windows on the way.
            room.kill_relay();
            room.start_relay();
            one.sees(&["other"]);
        }
    }
    assert_eq!(count, 200_000);
    assert!(running.0.wait().unwrap().success());
}

#[test]
fn a_relayed_command_loses_no_byte_although_the_relay_is_killed_again_and_again() {
    let Some(mut room) = Room::without_udp() else { return };
    let one = room.peer("one", &[]);
    let _other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    // More than the windows on the way hold, so that the command runs at each kill.
    let script = "seq 1 600000; echo done >&2; exit 7";
    let mut command = one.command(&["exec", "other", "--shell", "--", script]);
    let mut running = Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let mut count = 0_u64;
    for line in lines {
        count += 1;
        assert_eq!(line.unwrap(), count.to_string());
        if count % 150_000 == 1_000 {
            assert_eq!(one.path_of("other").as_deref(), Some("relayed"));
            room.kill_relay();
            room.start_relay();
        }
    }
    assert_eq!((count, running.0.wait().unwrap().code()), (600_000, Some(7)));
    let mut stderr = String::new();
    running.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(stderr, "done\n");
}

#[test]
fn a_relayed_command_is_picked_up_after_its_link_was_given_up() {
    let Some(mut room) = Room::without_udp() else { return };
    let one = room.peer("one", &[]);
    let other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    let (mut running, mut lines) = one.spawn(&["exec", "other", "--shell", "--", "seq 1 600000; exit 7"]);
    let mut count = 0_u64;
    let mut read = |wanted: u64| {
        let mut line = String::new();
        while count < wanted {
            line.clear();
            if lines.read_line(&mut line).unwrap() == 0 {
                break;
            }
            count += 1;
            assert_eq!(line, format!("{count}\n"));
        }
        count
    };
    read(1_000);
    room.kill_relay();
    for machine in [&one, &other] {
        until("the link is given up", || {
            let status = machine.run(&["status", "--json"]).json().remove(0);
            status["links"].as_array().unwrap().is_empty().then_some(())
        });
    }
    room.start_relay();
    assert_eq!(read(u64::MAX), 600_000);
    assert_eq!(running.0.wait().unwrap().code(), Some(7));
}

#[test]
fn a_silent_command_whose_host_was_killed_is_lost_as_soon_as_the_host_is_back() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let mut other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    let (mut running, mut events) = one.spawn(&["exec", "other", "--json", "--", "sleep", "1000"]);
    let started = next_event(&mut events).unwrap();
    until("a direct path", || (one.path_of("other")? == "direct").then_some(()));
    other.kill();
    other.start();
    let killed = Instant::now();
    let exit = next_event(&mut events).unwrap();
    assert_eq!((&exit["event"], &exit["state"], &exit["job"]), (&"exit".into(), &"lost".into(), &started["job"]));
    assert_eq!(running.0.wait().unwrap().code(), Some(125));
    // The link alone would find out by its time-out.
    assert!(killed.elapsed() < LINK_TIME_OUT / 2, "{:?}", killed.elapsed());
    let listed = one.run(&["jobs", "other", "--json"]).json().remove(0);
    assert_eq!((&listed[0]["job"], &listed[0]["state"]), (&started["job"], &"lost".into()));
}

#[test]
fn a_pipe_that_closes_ends_the_remote_command_and_memory_stays_bounded() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let other = room.peer("other", &["--mode", "bypass"]);
    one.sees(&["other"]);
    let pid = other.home.join("pid");
    let script = format!("echo $$ > '{}'; exec cat /dev/zero", pid.display());
    let (mut running, mut output) = one.spawn(&["exec", "other", "--shell", "--", &script]);
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..64 {
        output.read_exact(&mut buffer).unwrap();
    }
    let pid = fs::read_to_string(&pid).unwrap();
    let process = Path::new("/proc").join(pid.trim());
    assert!(process.exists());
    for (name, process) in
        [("relay", room.relay()), ("caller", one.daemon()), ("host", other.daemon()), ("command", &running)]
    {
        let most = process.most_memory();
        assert!(most < MOST_MEMORY, "{name} took {} MiB", most >> 20);
    }
    drop(output);
    assert_eq!(running.0.wait().unwrap().code(), Some(141));
    until("the remote command ends", || (!process.exists()).then_some(()));
}
