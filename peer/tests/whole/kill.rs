//! Processes that are killed in the middle of a transfer.

use std::{fs, path::Path, time::Instant};

use super::room::{DEADLINE, Dice, Machine, Room, digest, next_event, until};

const SIZE: usize = 256 << 20;
const ROUNDS: usize = 20;

/// Most that may be sent again after one restart: 5 % of the file.
const SENT_AGAIN: u64 = SIZE as u64 / 20;

#[test]
fn kill_9_at_random_points_of_a_transfer() {
    let mut dice = Dice(0x5eed_0001);
    let content = dice.bytes(SIZE);
    let hash = digest(&content);
    let mut room = Room::start();
    let mut sender = room.peer("sender", &[]);
    let mut receiver = room.peer("receiver", &["--mode", "edit"]);
    let source = sender.home.join("source");
    fs::write(&source, content).unwrap();
    let target = receiver.home.join("target");

    let (mut files, mut verified, mut round) = (0, 0, 0);
    let mut patience = Instant::now();
    while round < ROUNDS {
        sender.sees(&["receiver"]);
        let kill_at = verified + (1 << 20) * (4 + dice.next() % 24);
        let (mut sending, mut events) = sender.spawn(&arguments(&source, &target));
        let mut first = true;
        let end = loop {
            let event = next_event(&mut events).unwrap_or_else(|| panic!("round {round}: no event"));
            if event["event"] != "progress" {
                break Some(event);
            }
            let bytes = event["bytes"].as_u64().unwrap();
            if bytes > 0 && first {
                first = false;
                if target.exists() {
                    // The last try ended well behind the back of its killed command.
                    verified = bytes;
                }
                assert!(bytes + SENT_AGAIN >= verified, "round {round}: {bytes} of {verified} were kept");
            }
            verified = verified.max(bytes);
            if bytes >= kill_at {
                break None;
            }
        };
        assert_whole_or_absent(&target, &hash);
        if let Some(end) = end {
            if end["event"] == "failed" && patience.elapsed() < DEADLINE {
                // The receiver notices only after a while that the last sender is gone, and keeps the file for it.
                eprintln!("round {round}, {:?}: {end}", patience.elapsed());
                continue;
            }
            assert_eq!((&end["event"], &end["sha256"]), (&"done".into(), &hash.as_str().into()), "{end}");
            files += 1;
            (verified, patience) = (0, Instant::now());
            fs::remove_file(&target).unwrap();
            continue;
        }
        match dice.next() % 3 {
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
        sending.kill();
        (round, patience) = (round + 1, Instant::now());
    }
    sender.sees(&["receiver"]);
    if files == 0 || verified > 0 {
        finish(&sender, &source, &target, &hash, verified);
    }
    let left = fs::read_dir(&receiver.home).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("target")).collect();
    assert!(left == ["target"] || files > 0, "{left:?}");
}

fn arguments<'a>(source: &'a Path, target: &Path) -> [&'a str; 4] {
    let place = Box::leak(format!("receiver:{}", target.display()).into_boxed_str());
    ["send-file", source.to_str().unwrap(), place, "--json"]
}

fn finish(sender: &Machine, source: &Path, target: &Path, hash: &str, verified: u64) {
    // A peer that was killed a moment ago is still seen, and not reached.
    let done = until("the file is sent", || {
        let ended = sender.run(&arguments(source, target));
        ended.json().pop().filter(|_| ended.code == Some(0))
    });
    assert_eq!((&done["event"], &done["sha256"]), (&"done".into(), &hash.into()));
    assert!(done["resumed"].as_u64().unwrap() + SENT_AGAIN >= verified, "{done} after {verified}");
    assert_eq!(digest(&fs::read(target).unwrap()), hash);
}

fn assert_whole_or_absent(target: &Path, hash: &str) {
    if let Ok(bytes) = fs::read(target) {
        assert_eq!(bytes.len(), SIZE, "a partial file has the final name");
        assert_eq!(digest(&bytes), hash, "a wrong file has the final name");
    }
}
