//! The `relay` binary as a person or a service manager meets it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    process::{Child, Command, Output, Stdio},
};

mod common;

fn relay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relay"));
    command.env_clear().stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A running relay and the address it listens on.
struct Running(Child, BufReader<std::process::ChildStderr>, SocketAddr);

fn start(command: &mut Command) -> Running {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    let (_, rest) = line.split_once("addresses=[").unwrap_or_else(|| panic!("no address in {line}"));
    let address = rest.split([',', ']']).next().unwrap().parse().unwrap();
    Running(child, log, address)
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(unix)]
fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn health_exits_0_beside_a_relay_and_1_without() {
    let mut running = start(relay().args(["--bind", "127.0.0.1:0"]));
    let address = running.2.to_string();
    let (code, stdout, _) = run(relay().args(["health", &address]));
    assert_eq!(code, Some(0));
    assert!(stdout.contains("\"status\":\"ok\""), "{stdout}");
    // In a container the address comes the same way as for the relay itself.
    assert_eq!(run(relay().arg("health").env("RELAY_BIND", &address)).0, Some(0));
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    let (code, stdout, stderr) = run(relay().args(["health", &address]));
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.starts_with("error: the relay at ") && stderr.contains("\nhint: "), "{stderr}");
}

#[test]
fn what_is_wrong_is_blamed_on_who_wrote_it() {
    let (code, _, stderr) = run(relay().args(["--idle-timeout", "soon"]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.starts_with("error: invalid value 'soon' for '--idle-timeout <TIME>'"), "{stderr}");
    let (code, _, stderr) = run(relay().env("RELAY_IDLE_TIMEOUT", "soon"));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.starts_with("error: invalid value 'soon' for RELAY_IDLE_TIMEOUT: "), "{stderr}");
    let (code, _, stderr) = run(relay().env("RELAY_LOG_FORMAT", "xml").args(["--idle-timeout", "1s"]));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("RELAY_LOG_FORMAT") && stderr.contains("\nhint: "), "{stderr}");
    let (code, _, stderr) = run(relay().arg("--nonsense"));
    assert_eq!((code, stderr.lines().count()), (Some(2), 2), "{stderr}");
}

#[cfg(unix)]
#[test]
fn output_that_nobody_reads_ends_it_without_a_word() {
    let running = start(relay().args(["--bind", "127.0.0.1:0"]));
    let address = running.2.to_string();
    for arguments in [["completions", "bash"], ["health", &address]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = relay().args(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.as_str()), (Some(141), ""), "{arguments:?}");
    }
}

#[cfg(unix)]
#[test]
fn interrupt_and_terminate_drain_and_exit_0() {
    for kind in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let mut running = start(relay().args(["--bind", "127.0.0.1:0"]));
        signal(&running.0, kind);
        assert_eq!(running.0.wait().unwrap().code(), Some(0));
        let mut rest = String::new();
        running.1.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("relay is draining") && rest.contains("relay has stopped"), "{rest}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_second_signal_ends_the_relay_at_once_although_peers_are_there() {
    use rustix::process::Signal;
    for (first, second) in [(Signal::INT, Signal::INT), (Signal::TERM, Signal::INT), (Signal::INT, Signal::TERM)] {
        let mut running = start(relay().args(["--bind", "127.0.0.1:0", "--drain-timeout", "1h"]));
        // It hears that it should go, and stays.
        let _peer = common::TestPeer::join(running.2, &common::room()).await;
        signal(&running.0, first);
        let mut line = String::new();
        while !line.contains("relay is draining") {
            line.clear();
            assert!(running.1.read_line(&mut line).unwrap() > 0, "it ended at the first signal");
        }
        assert!(running.0.try_wait().unwrap().is_none());
        signal(&running.0, second);
        let ended = common::soon(async {
            loop {
                match running.0.try_wait().unwrap() {
                    Some(status) => return status,
                    None => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        });
        assert_eq!(ended.await.code(), Some(0));
        let mut rest = String::new();
        running.1.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("second signal: stopping at once"), "{rest}");
    }
}

#[test]
fn flag_beats_environment_beats_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, "bind = ['127.0.0.3:0']\n").unwrap();
    let from_file = start(relay().arg("--config").arg(&file));
    assert_eq!(from_file.2.ip().to_string(), "127.0.0.3");
    let from_environment = start(relay().env("RELAY_CONFIG", &file).env("RELAY_BIND", "127.0.0.2:0"));
    assert_eq!(from_environment.2.ip().to_string(), "127.0.0.2");
    let from_flag =
        start(relay().env("RELAY_CONFIG", &file).env("RELAY_BIND", "127.0.0.2:0").args(["--bind", "127.0.0.1:0"]));
    assert_eq!(from_flag.2.ip().to_string(), "127.0.0.1");
}

#[test]
fn broken_file_stops_the_start_and_names_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, "bind = ['127.0.0.1:0']\nidel-timeout = '9s'\n").unwrap();
    let (code, stdout, stderr) = run(relay().arg("--config").arg(&file));
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains(&format!("{}:2:1: unknown field `idel-timeout`", file.display())), "{stderr}");
    assert!(stderr.contains("\nhint: correct that line"), "{stderr}");
    let (code, _, stderr) = run(relay().arg("--config").arg(folder.path().join("missing")));
    assert_eq!(code, Some(1));
    assert!(stderr.contains("\nhint: make it, "), "{stderr}");
}

#[test]
fn port_in_use_is_said_with_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, stderr) = run(relay().args(["--bind", &address]));
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&address) && stderr.contains("hint: is another program on that port?"), "{stderr}");
}

#[test]
fn wrong_usage_exits_2() {
    assert_eq!(run(relay().arg("--bnid")).0, Some(2));
    assert_eq!(run(relay().args(["--bind", "nowhere"])).0, Some(2));
}

#[test]
fn help_shows_examples_and_completions_know_the_flags() {
    for arguments in [&["--help"][..], &["health", "--help"], &["completions", "--help"]] {
        let (code, stdout, _) = run(relay().args(arguments));
        assert_eq!(code, Some(0));
        assert!(stdout.contains("Examples:"), "{stdout}");
    }
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (code, stdout, _) = run(relay().args(["completions", shell]));
        assert_eq!(code, Some(0));
        assert!(stdout.contains("idle-timeout"), "{shell}");
    }
    assert_eq!(run(relay().arg("--version")).1, format!("relay {}\n", env!("CARGO_PKG_VERSION")));
}
