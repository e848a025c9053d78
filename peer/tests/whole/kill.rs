//! Processes that are killed in the middle of a transfer.

use std::{
    fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::ChildStdout,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::room::{Dice, Machine, Room, Running, digest, next_event, until};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const ROUNDS: usize = 20;

/// Most that may be sent again after one restart: 5 % of the file.
const SENT_AGAIN: u64 = SIZE / 20;

#[test]
fn kill_9_at_random_points_of_a_transfer() {
    let mut dice = Dice(0x5eed_0001);
    let content = dice.bytes(SIZE as usize);
    let hash = digest(&content);
    let mut room = Room::start();
    let mut sender = room.peer("sender", &[]);
    let mut receiver = room.peer("receiver", &["--mode", "edit"]);
    let source = sender.home.join("source");
    fs::write(&source, content).unwrap();
    let target = receiver.home.join("target");

    let (mut files, mut verified, mut round) = (0, 0, 0);
    let (mut victims, mut killed) = (Vec::new(), [0; 3]);
    while round < ROUNDS {
        meet(&sender, &receiver);
        let kill_at = verified + MIB * (4 + dice.next() % 24);
        let mut sending = Sending::begin(&sender, &source, &target, verified);
        let mut event = sending.next();
        if target.exists() {
            // The last try ended well behind the back of its killed command: this one begins anew.
            assert_eq!(event["resumed"], 0, "round {round}: {event}");
            assert_whole_or_absent(&target, &hash);
            fs::remove_file(&target).unwrap();
            files += 1;
            sending.verified = 0;
        }
        while event["event"] == "progress" && sending.verified < kill_at {
            event = sending.next();
        }
        if event["event"] != "progress" {
            assert_done(&event, &hash);
            files += 1;
            verified = 0;
            fs::remove_file(&target).unwrap();
            continue;
        }
        let victim = draw(&mut victims, &mut dice);
        match victim {
            0 => {
                room.kill_relay();
                room.start_relay();
            }
            1 => {
                sender.kill();
                sender.start();
            }
            _ => {
                receiver.kill();
                receiver.start();
            }
        }
        assert_whole_or_absent(&target, &hash);
        verified = sending.kill();
        killed[victim] += 1;
        round += 1;
    }
    assert!(killed.iter().all(|times| *times >= ROUNDS / 3), "each of the three was killed: {killed:?}");
    meet(&sender, &receiver);
    if target.exists() {
        assert_whole_or_absent(&target, &hash);
        fs::remove_file(&target).unwrap();
        (files, verified) = (files + 1, 0);
    }
    if files == 0 || verified > 0 {
        let done = Sending::begin(&sender, &source, &target, verified).end();
        assert_done(&done, &hash);
        assert_whole_or_absent(&target, &hash);
        assert_nothing_but_the_target(&receiver);
    }
}

#[test]
fn a_source_that_was_killed_in_a_transfer_between_others_is_asked_anew_once_it_is_back() {
    let content = Dice(0x5eed_0003).bytes(SIZE as usize);
    let hash = digest(&content);
    let room = Room::start();
    let caller = room.peer("caller", &[]);
    let mut source = room.peer("source", &[]);
    let receiver = room.peer("receiver", &["--mode", "edit"]);
    fs::write(source.home.join("file"), content).unwrap();
    let target = receiver.home.join("target");
    caller.sees(&["source", "receiver"]);
    let (from, to) =
        (format!("source:{}", source.home.join("file").display()), format!("receiver:{}", target.display()));
    let (mut running, mut events) = caller.spawn(&["send-file", "--json", &from, &to]);
    while next_event(&mut events).unwrap()["bytes"].as_u64().unwrap() < 32 * MIB {}
    source.kill();
    source.start();
    let back = Instant::now();
    let done = std::iter::from_fn(|| next_event(&mut events)).last().unwrap();
    assert_done(&done, &hash);
    assert!(running.0.wait().unwrap().success() && done["resumed"].as_u64().unwrap() > 0, "{done}");
    // The receiver alone would wait a minute for the process that offered the file.
    assert!(back.elapsed() < Duration::from_secs(45), "{:?}", back.elapsed());
    assert_whole_or_absent(&target, &hash);
}

#[test]
fn a_sender_that_was_killed_and_is_back_goes_on_at_once() {
    let mut dice = Dice(0x5eed_0002);
    let content = dice.bytes(SIZE as usize);
    let hash = digest(&content);
    let room = Room::start();
    let mut sender = room.peer("sender", &[]);
    let receiver = room.peer("receiver", &["--mode", "edit"]);
    let source = sender.home.join("source");
    fs::write(&source, content).unwrap();
    let target = receiver.home.join("target");
    meet(&sender, &receiver);
    let mut sending = Sending::begin(&sender, &source, &target, 0);
    while sending.verified < 32 * MIB {
        sending.next();
    }
    // The receiver has a link on which nobody answers any more: for a while it looks like a slow one.
    sender.kill();
    let verified = sending.kill();
    assert!(verified < SIZE, "the sender was killed too late");
    sender.start();
    meet(&sender, &receiver);
    let done = Sending::begin(&sender, &source, &target, verified).end();
    assert_done(&done, &hash);
    assert!(done["resumed"].as_u64().unwrap() > 0, "{done}");
    assert_nothing_but_the_target(&receiver);
}

/// One `peer send-file`, whose every word is looked at.
struct Sending {
    target: PathBuf,
    running: Running,
    events: BufReader<ChildStdout>,
    /// Most bytes that are known to stand at the receiver.
    verified: u64,
    /// Bytes that the try which goes on now began with.
    resumed: Option<u64>,
}

impl Sending {
    /// `verified` is what an earlier command has brought.
    fn begin(sender: &Machine, source: &Path, target: &Path, verified: u64) -> Self {
        let place = format!("receiver:{}", target.display());
        let (running, events) = sender.spawn(&["send-file", source.to_str().unwrap(), &place, "--json"]);
        Self { target: target.into(), running, events, verified, resumed: None }
    }

    /// The next event; the command does not fail.
    fn next(&mut self) -> Value {
        let event = next_event(&mut self.events).expect("a command says how it ended");
        assert_ne!(event["event"], "failed", "{event} after {} bytes", self.verified);
        self.heard(&event);
        event
    }

    fn heard(&mut self, event: &Value) {
        let number = |field: &str| event[field].as_u64().unwrap_or_else(|| panic!("no `{field}` in {event}"));
        let resumed = number("resumed");
        let before = self.resumed.replace(resumed);
        if before != Some(resumed) {
            let verified = self.verified;
            let is_anew = before.is_none() && self.target.exists();
            assert!(is_anew || resumed + SENT_AGAIN >= verified, "{resumed} of {verified} were kept: {event}");
        }
        self.verified = self.verified.max(number("bytes"));
    }

    /// Reads on to the end.
    fn end(mut self) -> Value {
        loop {
            let event = self.next();
            if event["event"] != "progress" {
                return event;
            }
        }
    }

    /// Kills the command; gives what it last knew to stand at the receiver.
    fn kill(mut self) -> u64 {
        self.running.kill();
        while let Some(event) = next_event(&mut self.events).filter(|event| event["event"] == "progress") {
            self.heard(&event);
        }
        self.verified
    }
}

/// Both have joined, and see each other as they run now.
fn meet(one: &Machine, other: &Machine) {
    for machine in [one, other] {
        until("the room is joined", || {
            (machine.run(&["status", "--json"]).json().first()?["uplink"] == "joined").then_some(())
        });
    }
    one.sees(&[&other.name]);
    other.sees(&[&one.name]);
}

/// One of three, each as often as the others.
fn draw(left: &mut Vec<usize>, dice: &mut Dice) -> usize {
    if left.is_empty() {
        left.extend(0..3);
    }
    left.swap_remove(dice.next() as usize % left.len())
}

fn assert_done(event: &Value, hash: &str) {
    assert_eq!((&event["event"], &event["sha256"]), (&"done".into(), &hash.into()), "{event}");
}

fn assert_whole_or_absent(target: &Path, hash: &str) {
    if let Ok(bytes) = fs::read(target) {
        assert_eq!(bytes.len() as u64, SIZE, "a partial file has the final name");
        assert_eq!(digest(&bytes), hash, "a wrong file has the final name");
    }
}

fn assert_nothing_but_the_target(receiver: &Machine) {
    let left = fs::read_dir(&receiver.home).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("target")).collect();
    assert_eq!(left, ["target"]);
}
