//! The `peer` program as a person and a script meet it: what it prints, where, and how it ends.

#![expect(clippy::wildcard_enum_match_arm, reason = "a played daemon panics at every call that a test does not expect")]

use std::fs;

use peerfleet_peer::{
    daemon::call::{Call, Reply},
    machine::ModeChange,
};
use peerfleet_proto::{presence::Mode, token::Token};

#[path = "cli/exec.rs"]
mod exec;
#[path = "cli/fleet.rs"]
mod fleet;
#[path = "cli/machine.rs"]
mod machine;
#[path = "cli/send_file.rs"]
mod send_file;

use machine::{Machine, host, introduce};

const COMMANDS: [&str; 17] = [
    "",
    "up",
    "run",
    "ls",
    "status",
    "doctor",
    "token",
    "token new",
    "id",
    "mode",
    "exec",
    "jobs",
    "logs",
    "cancel",
    "fleet exec",
    "send-file",
    "completions",
];

#[tokio::test]
async fn help_of_every_command_shows_examples_on_stdout() {
    let machine = Machine::new();
    for command in COMMANDS {
        for flag in ["-h", "--help"] {
            let said = machine.peer(&format!("{command} {flag}")).await;
            assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{command}");
            let (_, examples) = said.text().split_once("\nExamples:\n").expect(command);
            let last = command.split(' ').next_back().expect("a word");
            assert!(examples.contains(last) && examples.contains("peer"), "{command}: {examples}");
        }
    }
}

#[tokio::test]
async fn the_help_of_doctor_is_as_agreed() {
    let said = Machine::new().peer("doctor --help").await;
    assert_eq!(said.text(), include_str!("cli/doctor.help"));
}

#[tokio::test]
async fn a_wrong_command_line_ends_with_2_and_leads_to_the_help() {
    let machine = Machine::new();
    for line in ["", "nonsense", "exec", "exec h", "ls --nonsense", "mode all", "fleet exec --target a& -- ls"] {
        let said = machine.peer(line).await;
        assert!(said.failed(2).part("hint").is_some_and(|hint| hint.contains("--help")), "{line}: {said:?}");
        assert!(said.stdout.is_empty() && said.stderr.lines().count() <= 3, "{line}: {said:?}");
    }
}

#[tokio::test]
async fn a_command_without_the_dashes_before_it_is_told_of_them() {
    let machine = Machine::new();
    for line in ["exec web-1 uname -a", "fleet exec --target all uptime"] {
        let said = machine.peer(line).await;
        assert!(said.failed(2).part("hint").is_some_and(|hint| hint.starts_with("put `--` in front of")), "{said:?}");
    }
}

#[tokio::test]
async fn without_token_and_daemon_the_way_in_is_told() {
    let machine = Machine::new();
    for (line, code) in [("ls", 1), ("status", 1), ("run", 1), ("jobs h", 1), ("exec h -- true", 125)] {
        let said = machine.peer(line).await;
        let hint = said.failed(code).part("hint").expect("a hint");
        assert!(hint.contains("peer up") && hint.contains("PEER_TOKEN"), "{said:?}");
    }
}

#[tokio::test]
async fn a_broken_configuration_is_told_with_line_and_column_and_nothing_starts() {
    let machine = Machine::new();
    let path = machine.write_config("name = 'a'\nmode = 'everything'\n");
    let said = machine.peer("run").await;
    let error = said.failed(1).part("error").expect("an error");
    assert!(error.ends_with(&format!("{}:2:8", path.display())), "{said:?}");
    assert!(said.part("cause").is_some_and(|cause| cause.contains("not a mode")), "{said:?}");
}

#[tokio::test]
async fn a_token_is_never_repeated_in_a_failure() {
    let machine = Machine::new();
    let secret = "pft1-hunter2hunter2";
    for line in [
        format!("ls --token {secret}"),
        format!("ls --token {secret} --token-file x"),
        format!("ls --token {secret} --nonsense"),
        format!("--token {secret} nonsense"),
    ] {
        let said = machine.peer(&line).await;
        assert_ne!(said.code, Some(0));
        assert!(!said.stderr.contains("hunter2"), "{line}: {said:?}");
    }
}

#[tokio::test]
async fn a_token_file_that_others_may_read_is_used_with_a_warning() {
    let machine = Machine::new();
    let path = machine.home().join("token");
    // A token with a typing error ends the command before it looks for a relay.
    fs::write(&path, "pft1-hunter2hunter2\n").expect("a file");
    for (mode, warned) in [(0o600, false), (0o640, true), (0o604, true), (0o622, false), (0o400, false)] {
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("permissions");
        let said = machine.peer("ls --token-file token").await;
        assert!(said.failed(1).part("cause").is_some_and(|cause| cause.contains("--token-file")), "{said:?}");
        assert_eq!(
            said.part("warning").is_some_and(|warning| warning.contains("chmod 600 token")),
            warned,
            "{mode:o}: {said:?}"
        );
    }
    // Whoever else owns the file let us read it on purpose: only what everybody may read is warned about.
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(1), None).expect("another owner");
        for (mode, warned) in [(0o640, false), (0o644, true)] {
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("permissions");
            let said = machine.peer("ls --token-file token").await;
            assert_eq!(said.part("warning").is_some(), warned, "{mode:o}: {said:?}");
        }
    }
}

#[tokio::test]
async fn a_new_token_reads_back_and_no_two_are_equal() {
    let machine = Machine::new();
    let (one, other) = (machine.peer("token new").await, machine.peer("token new --json").await);
    let other = other.json()[0]["token"].as_str().expect("a text").to_owned();
    assert_ne!(one.text().trim(), other);
    for text in [one.text(), &other] {
        let token = Token::parse(text).expect("a token");
        assert!(!token.is_weak());
    }
}

#[tokio::test]
async fn the_identity_stays_and_each_state_folder_has_its_own() {
    let machine = Machine::new();
    let first = machine.peer("id").await;
    let again = machine.peer("id --json").await.json().remove(0);
    assert_eq!(first.text().trim(), again["id"]);
    assert!(first.text().starts_with(machine.peer("id --short").await.text().trim()));
    assert_ne!(first.stdout, machine.peer("id --state-dir other").await.stdout);
}

#[tokio::test]
async fn a_state_folder_that_others_can_look_into_is_refused() {
    let machine = Machine::new();
    fs::create_dir(machine.home().join("open")).expect("a folder");
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(machine.home().join("open"), permissions).expect("permissions");
    let said = machine.peer("id --state-dir open").await;
    assert!(said.failed(1).part("hint").is_some_and(|hint| hint.contains("chmod 700")), "{said:?}");
}

#[tokio::test]
async fn a_mode_is_kept_for_the_next_start() {
    let machine = Machine::new();
    assert!(machine.peer("mode").await.text().starts_with("plan  (default)"));
    assert_eq!(machine.peer("mode edit").await.code, Some(0));
    let shown = machine.peer("mode --json").await.json().remove(0);
    assert_eq!((shown["mode"].as_str(), shown["origin"].as_str()), (Some("edit"), Some("peer mode")));
}

#[tokio::test]
async fn a_mode_takes_effect_in_the_daemon_and_an_overriding_flag_is_told() {
    let machine = Machine::with_daemon(|call, stream| {
        Box::pin(async move {
            let Some((Call::SetMode(mode), mut stream)) = introduce(&[], call, stream).await else { return };
            assert_eq!(mode, Mode::Bypass);
            let change = ModeChange { before: Mode::Plan, overridden_by: Some("--mode".to_owned()) };
            let _ = stream.send.write_frame(&Reply::ModeSet(change)).await;
        })
    });
    let said = machine.peer("mode bypass").await;
    assert_eq!((said.code, said.text()), (Some(0), "bypass  (peer mode)\n"), "{said:?}");
    assert!(said.stderr.contains("--mode sets the mode again"), "{said:?}");
}

#[tokio::test]
async fn a_list_has_the_agreed_fields_and_this_machine_in_it() {
    let mut here = host(2, "here");
    here.here = true;
    let hosts = [host(1, "web-1"), here];
    let machine = Machine::with_daemon(move |call, stream| {
        let hosts = hosts.clone();
        Box::pin(async move {
            let Some((Call::AskMany { to, .. }, mut stream)) = introduce(&hosts, call, stream).await else { return };
            assert_eq!(to.len(), 1, "this machine is not asked for a round trip");
            machine::answer(&mut stream, to[0], Ok(peerfleet_proto::request::Outcome::Done)).await;
        })
    });
    let said = machine.peer("ls --json").await;
    let list = said.json().remove(0);
    for field in ["id", "name", "tags", "os", "arch", "version", "mode", "path", "rtt_ms"] {
        assert!(list[0].get(field).is_some(), "{field} in {list}");
    }
    assert!(list[0]["rtt_ms"].is_f64() && list[0]["path"] == "relayed", "{list}");
    assert_eq!((&list[1]["path"], &list[1]["rtt_ms"]), (&"self".into(), &serde_json::Value::Null));
}

#[tokio::test]
async fn a_table_shows_no_control_character_of_others() {
    let hosts = [host(1, "web\x1b[2J")];
    let machine = Machine::with_daemon(move |call, stream| {
        let hosts = hosts.clone();
        Box::pin(async move {
            let _ = introduce(&hosts, call, stream).await;
        })
    });
    let said = machine.peer("ls").await;
    assert!(said.text().contains("web\\u{1b}[2J") && !said.stdout.contains(&0x1b), "{said:?}");
}

#[tokio::test]
async fn a_daemon_of_another_version_is_told_as_that() {
    let machine = Machine::with_daemon(|_call, mut stream| {
        Box::pin(async move {
            let _ = stream.send.write_frame(&Reply::NotUnderstood { version: "9.9.9".to_owned() }).await;
        })
    });
    let said = machine.peer("ls").await;
    assert!(said.failed(1).part("cause").is_some_and(|cause| cause.contains("9.9.9")), "{said:?}");
}

#[tokio::test]
async fn an_unknown_host_is_told_with_room_and_near_names_and_an_ambiguous_one_with_candidates() {
    let hosts = [host(1, "web-1"), host(2, "web-2"), host(3, "twin"), host(4, "twin")];
    let machine = Machine::with_daemon(move |call, stream| {
        let hosts = hosts.clone();
        Box::pin(async move {
            let _ = introduce(&hosts, call, stream).await;
        })
    });
    let said = machine.peer("jobs wep-1").await;
    assert_eq!(said.failed(3).part("error"), Some("cannot reach `wep-1`"));
    assert!(said.part("cause").is_some_and(|cause| cause.contains("`dev` on ws://relay.test (4 peers are)")));
    assert!(said.part("hint").is_some_and(|hint| hint.contains("`web-1`")), "{said:?}");
    let said = machine.peer("jobs twin").await;
    assert_eq!(said.failed(1).part("cause").map(|cause| cause.matches("`twin`").count()), Some(2), "{said:?}");
}

#[tokio::test]
async fn completions_know_every_command() {
    let machine = Machine::new();
    for shell in ["bash", "zsh", "fish"] {
        let said = machine.peer(&format!("completions {shell}")).await;
        assert!(said.text().contains("send-file") && said.text().contains("fleet"), "{shell}");
    }
}

#[tokio::test]
async fn completions_load_in_their_shells_and_offer_commands() {
    let machine = Machine::new();
    let zsh = "autoload -U compinit; compinit -u -d dump; source peer.zsh && print $_comps[peer]";
    for (shell, load, offers) in [
        (
            "bash",
            "source peer.bash; COMP_WORDS=(peer sen) COMP_CWORD=1; _peer peer sen peer; echo $COMPREPLY",
            "send-file",
        ),
        ("zsh", zsh, "_peer"),
        ("fish", "source peer.fish; complete -C 'peer sen'", "send-file"),
    ] {
        if std::process::Command::new(shell).arg("--version").output().is_err() {
            skip(&format!("completions of {shell} were not loaded: it is not installed"));
            continue;
        }
        let script = machine.peer(&format!("completions {shell}")).await.stdout;
        fs::write(machine.home().join(format!("peer.{shell}")), script).expect("a file");
        let bare: &[&str] = match shell {
            "bash" => &["--norc", "-c"],
            "zsh" => &["-f", "-c"],
            _ => &["--no-config", "-c"],
        };
        let mut command = tokio::process::Command::new(shell);
        command.args(bare).arg(load).current_dir(machine.home()).env("HOME", machine.home());
        let said = machine::Said::of(command.output().await.expect("it runs"));
        assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{shell}: {said:?}");
        assert!(said.text().contains(offers), "{shell}: {said:?}");
    }
}

/// Says loudly that something was skipped, or fails where that is an error: in continuous integration.
#[expect(clippy::print_stderr, reason = "who reads a skipped run has nothing else")]
fn skip(why: &str) {
    assert!(std::env::var_os("PEERFLEET_REQUIRE_ALL").is_none(), "PEERFLEET_REQUIRE_ALL is set, but: {why}");
    eprintln!("SKIPPED: {why}");
}

#[tokio::test]
async fn output_that_nobody_reads_ends_the_command_without_a_word() {
    let machine = Machine::new();
    let mut child = machine.command(["completions", "bash"]).spawn().expect("peer runs");
    drop(child.stdout.take());
    let said = machine::Said::of(child.wait_with_output().await.expect("it ends"));
    assert_eq!((said.code, said.stderr.as_str()), (Some(141), ""));
}
