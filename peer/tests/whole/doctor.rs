//! What `peer doctor` finds, in rooms where all is well and where it is not.

use serde_json::Value;

use super::room::{Ended, Machine, Room};

fn json(ended: Ended, code: i32) -> Value {
    ended.expect(code).json().remove(0)
}

/// The finding of that name.
fn of<'a>(report: &'a Value, name: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

fn level<'a>(report: &'a Value, name: &str) -> &'a str {
    of(report, name)["level"].as_str().unwrap()
}

fn doctor(machine: &Machine, arguments: &[&str]) -> Ended {
    machine.run(&[&["doctor"], arguments].concat())
}

#[test]
fn a_healthy_room_is_told_as_well_in_words_and_in_json() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);

    let report = json(doctor(&one, &["--json"]), 0);
    assert_eq!((&report["ok"], &report["daemon"], &report["host"]), (&true.into(), &true.into(), &Value::Null));
    assert!(report["relay"]["rtt_ms"].is_f64() && report["relay"]["joined"] == true, "{report:#}");
    assert!(report["relay"]["clock_ahead_ms"].as_i64().unwrap().abs() < 1000, "{report:#}");
    assert!(report["network"]["stun"][0]["rtt_ms"].is_f64(), "{report:#}");
    for name in ["state", "daemon", "relay", "clock", "room", "udp", "nat"] {
        assert_eq!(level(&report, name), "good", "{report:#}");
    }

    let words = doctor(&one, &[]).expect(0);
    assert!(words.stdout.lines().any(|line| line.starts_with("ok   relay ")), "{words:?}");
    assert!(!words.stdout.contains("what you can do") && words.stderr.is_empty(), "{words:?}");
}

#[test]
fn a_direct_path_is_told_with_the_checks_of_both_sides_and_the_reason() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    let report = json(doctor(&one, &["two", "--json"]), 0);
    let host = &report["host"];
    assert_eq!((host["name"].as_str(), host["path"].as_str()), (Some("two"), Some("direct")), "{report:#}");
    for side in ["from_here", "from_there"] {
        let checks = host[side]["checks"].as_array().unwrap();
        let answered = checks.iter().filter(|check| check["outcome"] == "answered").count();
        assert!(answered > 0 && checks.iter().all(|check| check["sent"].is_u64()), "{report:#}");
        let taken = &host[side]["taken"];
        assert!(checks.iter().any(|check| check["address"] == taken["address"]), "{report:#}");
    }
    let (ours, theirs) = (&report["network"]["addresses"], &host["network"]["addresses"]);
    assert!(ours.as_array().is_some_and(|list| !list.is_empty()) && theirs.is_array(), "{report:#}");
    let what = of(&report, "path")["what"].as_str().unwrap();
    assert!(what.starts_with("direct over ") && what.contains(": chosen because "), "{what}");

    let words = doctor(&one, &["two"]).expect(0).stdout;
    for part in ["\nchecks of this machine\n", "\nchecks of `two`\n", " answered\n", "chosen because"] {
        assert!(words.contains(part), "{part} in {words}");
    }
    let listed = one.hosts();
    let two = listed.iter().find(|host| host["name"] == "two").unwrap();
    assert!(two["path"] == "direct" && two["rtt_ms"].is_f64() && two["age_s"].is_f64(), "{two}");
    let status = one.run(&["status", "--json"]).json().remove(0);
    assert!(status["links"][0]["age_s"].is_f64() && status["links"][0]["address"].is_string(), "{status}");
}

#[test]
fn an_examination_by_an_instance_of_its_own_finds_the_same_way() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    let ended = Ended::from(one.beside(&["doctor", "two", "--json"]).output().unwrap());
    let report = json(ended, 0);
    assert_eq!((&report["daemon"], &report["host"]["path"]), (&false.into(), &"direct".into()), "{report:#}");
    assert!(report["relay"]["rtt_ms"].is_f64(), "{report:#}");
}

#[test]
fn looking_breaks_no_link_and_moves_none() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    let before = json(doctor(&one, &["two", "--json"]), 0)["host"]["age_s"].as_f64().unwrap();
    let after = json(doctor(&one, &["two", "--json"]), 0)["host"].take();
    assert!(after["path"] == "direct" && after["age_s"].as_f64().unwrap() > before, "{after}");
}

#[test]
fn a_relay_that_is_gone_is_told_with_exit_code_3() {
    let mut room = Room::start();
    let one = room.peer("one", &[]);
    one.sees(&["one"]);
    room.kill_relay();
    let report = json(doctor(&one, &["--json"]), 3);
    assert_eq!([level(&report, "relay"), level(&report, "room")], ["unreachable"; 2], "{report:#}");
    assert!(of(&report, "relay")["hint"].as_str().unwrap().contains("is the relay running"), "{report:#}");
    assert_eq!(level(&report, "udp"), "note", "who would answer is gone: {report:#}");

    let beside = Ended::from(one.beside(&["doctor", "somebody", "--json"]).output().unwrap());
    let report = json(beside, 3);
    assert_eq!([level(&report, "relay"), level(&report, "host")], ["unreachable"; 2], "{report:#}");
}

#[test]
fn a_direct_link_is_examined_though_the_relay_is_gone() {
    let mut room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    json(doctor(&one, &["two", "--json"]), 0);
    room.kill_relay();
    let report = json(doctor(&one, &["two", "--json"]), 3);
    assert_eq!((&report["host"]["path"], level(&report, "path")), (&"direct".into(), "good"), "{report:#}");
    assert!(report["host"]["from_there"]["checks"].is_array(), "the host is asked over the link: {report:#}");
}

#[test]
fn a_relay_without_stun_is_something_to_mend() {
    let room = Room::with_relay("no-stun", &["--no-stun"]);
    let one = room.peer("one", &[]);
    one.sees(&["one"]);
    let report = json(doctor(&one, &["--json"]), 1);
    assert_eq!(level(&report, "udp"), "fix", "{report:#}");
    assert!(of(&report, "udp")["hint"].as_str().unwrap().contains("--no-stun"), "{report:#}");
    assert_eq!(report["network"]["stun"].as_array().unwrap().len(), 0);
}

#[test]
fn an_unknown_host_is_told_with_exit_code_3_and_this_machine_as_this_machine() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    let report = json(doctor(&one, &["tvo", "--json"]), 3);
    assert_eq!(level(&report, "host"), "unreachable", "{report:#}");
    assert!(of(&report, "host")["hint"].as_str().unwrap().contains("did you mean `two`"), "{report:#}");
    assert_eq!(level(&report, "relay"), "good", "the rest is told all the same");
    let report = json(doctor(&one, &["one", "--json"]), 0);
    assert_eq!((&report["host"]["here"], level(&report, "host")), (&true.into(), "note"), "{report:#}");
}

#[test]
fn a_host_that_is_disabled_tells_no_view_and_the_way_is_told_from_here() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &["--mode", "disabled"]);
    one.sees(&["two"]);
    let report = json(doctor(&one, &["two", "--json"]), 0);
    assert!(of(&report, "host")["what"].as_str().unwrap().contains("mode is disabled"), "{report:#}");
    assert_eq!((&report["host"]["path"], &report["host"]["from_there"]), (&"direct".into(), &Value::Null));
}

#[test]
fn a_host_tells_of_the_link_with_who_asks_and_of_no_other() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let two = room.peer("two", &[]);
    let _three = room.peer("three", &[]);
    one.sees(&["two", "three"]);
    json(doctor(&one, &["three", "--json"]), 0);
    two.sees(&["one"]);
    let report = json(doctor(&two, &["one", "--json"]), 0);
    let addresses = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|one| one["address"].as_str().unwrap().to_owned()).collect()
    };
    let ours = addresses(&report["network"]["addresses"]);
    let told = addresses(&report["host"]["from_there"]["checks"]);
    assert!(!told.is_empty() && told.iter().all(|addr| ours.contains(addr)), "{report:#}");
}

#[test]
fn without_a_token_the_relay_is_looked_at_and_the_way_in_is_told() {
    let room = Room::start();
    let one = room.peer("one", &[]);
    let relay = format!("ws://{}", room.relay_address);
    let mut command = one.command(&["--state-dir", "elsewhere", "--relay", &relay, "doctor", "--json"]);
    let report = json(Ended::from(command.current_dir(&one.home).output().unwrap()), 1);
    assert_eq!((level(&report, "relay"), level(&report, "room")), ("good", "fix"), "{report:#}");
    assert!(of(&report, "room")["hint"].as_str().unwrap().contains("peer up"), "{report:#}");
}

#[test]
fn a_network_without_udp_is_told_with_what_it_costs() {
    let Some(room) = Room::without_udp() else { return };
    let one = room.peer("one", &[]);
    let _two = room.peer("two", &[]);
    one.sees(&["two"]);
    let report = json(doctor(&one, &["two", "--json"]), 1);
    assert_eq!((level(&report, "udp"), level(&report, "relay")), ("fix", "good"), "{report:#}");
    assert_eq!(report["host"]["path"], "relayed", "{report:#}");
    let checks = report["host"]["from_here"]["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["outcome"] == "silent" && check["sent"].as_u64() > Some(1)), "{report:#}");
    let what = of(&report, "path")["what"].as_str().unwrap();
    assert!(what.starts_with("relayed (") && what.contains("lets UDP through"), "{what}");
    let words = doctor(&one, &[]).expect(1).stdout;
    assert!(words.contains("\nwhat you can do\n") && words.contains("let UDP out"), "{words}");
}
