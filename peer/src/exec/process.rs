//! Starting a process in a group of its own, and signals to that group.
//!
//! In: what to run. Out: a running process with its pipes, or a failure that says what to do. It never waits for the
//! process and never runs code between fork and exec: so the child is spawned without copying this process's memory
//! map. Every file that this program opens is closed on exec.
//!
//! A group's number stays its own while any process is in it, and its leader is not reaped before the group is asked
//! for the last time or a moment after; so a signal never reaches a stranger.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::{ffi::OsStrExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use peerfleet_proto::request::{
    Failure, FailureKind,
    exec::{Command, EndState, ExecSpec},
};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::{
    process::{Child, Command as Spawner},
    time::{Instant, sleep},
};

/// Variables of this process that no job sees: secrets of the peer, and what its service manager meant for it alone.
const WITHHELD: [&str; 9] = [
    "PEER_TOKEN",
    "PEER_TOKEN_FILE",
    "PEER_PROXY",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// Longest command that a list of jobs shows, in characters; two lines of a terminal.
const SHOWN_CHARS: usize = 120;

/// First and longest pause between two looks at whether a group has gone: most are gone within the first.
const GROUP_LOOKS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// What no process can be started from, whatever the state of the host.
///
/// # Errors
/// The first contradiction found.
pub(super) fn check(spec: &ExecSpec) -> Result<(), Failure> {
    let words: Vec<&[u8]> = match &spec.command {
        Command::Argv(argv) => argv.iter().map(Vec::as_slice).collect(),
        Command::Shell(line) => vec![line],
    };
    let invalid = |what: &str, hint: &str| Err(Failure::new(FailureKind::Invalid, what, hint));
    if words.first().is_none_or(|program| program.is_empty()) {
        return invalid("there is no command to run", "name a program, or a line for the shell");
    }
    let values = spec.env.iter().flat_map(|(name, value)| [name.as_slice(), value]);
    if words.into_iter().chain(spec.cwd.as_deref()).chain(values).any(|text| text.contains(&0)) {
        return invalid(
            "the command, its folder or its environment contains a NUL byte",
            "leave it out: no system passes it on",
        );
    }
    if spec.env.iter().any(|(name, _)| name.is_empty() || name.contains(&b'=')) {
        return invalid("the name of a variable is empty or contains `=`", "write variables as NAME=VALUE");
    }
    Ok(())
}

/// Starts the process.
///
/// # Errors
/// A failure for a person, from what the system said.
pub(super) fn spawn(spec: &ExecSpec, home: &Path) -> Result<Child, Failure> {
    let folder = spec.cwd.as_deref().map_or(home, |cwd| Path::new(OsStr::from_bytes(cwd)));
    let mut spawner = match &spec.command {
        Command::Argv(argv) => {
            let mut spawner = Spawner::new(OsStr::from_bytes(&argv[0]));
            spawner.args(argv[1..].iter().map(|word| OsStr::from_bytes(word)));
            spawner
        }
        Command::Shell(line) => {
            let mut spawner = Spawner::new("/bin/sh");
            spawner.arg("-c").arg(OsStr::from_bytes(line));
            spawner
        }
    };
    for name in WITHHELD {
        spawner.env_remove(name);
    }
    spawner.envs(spec.env.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    spawner.current_dir(folder).process_group(0);
    spawner.stdin(if spec.stdin { Stdio::piped() } else { Stdio::null() });
    spawner.stdout(Stdio::piped()).stderr(Stdio::piped());
    spawner.spawn().map_err(|error| spawn_failure(spec, folder, &error))
}

fn spawn_failure(spec: &ExecSpec, folder: &Path, error: &io::Error) -> Failure {
    let program = match &spec.command {
        Command::Argv(argv) => PathBuf::from(OsString::from(OsStr::from_bytes(&argv[0]))),
        Command::Shell(_) => PathBuf::from("/bin/sh"),
    };
    let (program_shown, folder_shown) =
        (shown_word(program.as_os_str().as_bytes()), shown_word(folder.as_os_str().as_bytes()));
    let failure = |kind, what: String, hint: &str| Failure::new(kind, what, hint);
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES) if !folder.is_dir() => failure(
            FailureKind::NotFound,
            format!("there is no folder {folder_shown} to run in"),
            "name one that exists on that host with --cwd",
        ),
        Some(libc::ENOENT) if folder.join(&program).is_file() => failure(
            FailureKind::NotFound,
            format!("{program_shown} names an interpreter that is not there"),
            "look at its first line (#!), or whether it was built for another system",
        ),
        Some(libc::ENOENT | libc::ENOTDIR) => failure(
            FailureKind::NotFound,
            format!("there is no program {program_shown}"),
            "look at its spelling, give its full path, or use --shell for what only a shell knows",
        ),
        Some(libc::EACCES) => failure(
            FailureKind::Os,
            format!("{program_shown} may not be executed, or {folder_shown} not be entered"),
            "look at the permission bits of both, on that host",
        ),
        Some(libc::ENOEXEC) => failure(
            FailureKind::Os,
            format!("{program_shown} is no program that this host can run"),
            "a script needs a first line (#!), a program must be built for that host",
        ),
        Some(libc::E2BIG) => failure(
            FailureKind::Invalid,
            format!("the arguments and variables of {program_shown} are longer than the host's system allows"),
            "pass them by standard input or in a file",
        ),
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => failure(
            FailureKind::Busy,
            format!("the host has no room for another process: {error}"),
            "try again when less is running there, or raise its limits",
        ),
        _ => {
            failure(FailureKind::Os, format!("cannot start {program_shown}: {error}"), "look at the host's system log")
        }
    }
}

/// How the process ended by itself.
pub(super) fn end_state(status: ExitStatus) -> EndState {
    match status.signal() {
        Some(signal) => EndState::Signalled(signal),
        None => EndState::Exited(status.code().expect("a process that no signal ended has a code")),
    }
}

/// The process group of a job.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group(Pid);

impl Group {
    /// The group that this process leads.
    ///
    /// # Panics
    /// If the process was waited for already.
    pub(super) fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Self(id.expect("a process that was not waited for has an id"))
    }

    /// Sends a signal to all that are left.
    pub(super) fn signal(self, signal: Signal) {
        // The only other outcome is that nobody is left.
        let _ = kill_process_group(self.0, signal);
    }

    /// Asks all that are left to end, those that are stopped too.
    pub(super) fn ask_to_end(self, signal: Signal) {
        self.signal(signal);
        self.signal(Signal::CONT);
    }

    /// Waits until nobody is left, or that time. True if nobody is left.
    pub(super) async fn gone_by(self, deadline: Instant) -> bool {
        let (mut pause, longest) = GROUP_LOOKS;
        while test_kill_process_group(self.0).is_ok() {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(pause.min(deadline - Instant::now())).await;
            pause = (pause * 2).min(longest);
        }
        true
    }
}

/// A command as a person would write it, shortened.
pub(super) fn shown(command: &Command) -> String {
    shown_within(command, SHOWN_CHARS)
}

/// A command as a person would write it, of at most so many characters. Nothing in it moves a terminal's cursor.
pub(crate) fn shown_within(command: &Command, chars: usize) -> String {
    let mut text = String::new();
    match command {
        Command::Argv(argv) => {
            for word in argv {
                if !text.is_empty() {
                    text.push(' ');
                }
                text.push_str(&shown_word(word));
                if text.len() > chars * 4 {
                    break;
                }
            }
        }
        Command::Shell(line) => text = plain(&line[..line.len().min(chars * 4)]),
    }
    if text.chars().count() > chars {
        text = text.chars().take(chars - 1).chain(['…']).collect();
    }
    text
}

fn shown_word(word: &[u8]) -> String {
    let text = plain(word);
    let is_plain = |char: char| char.is_alphanumeric() || "-_./:=@%+,…".contains(char);
    if !text.is_empty() && text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn plain(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for char in String::from_utf8_lossy(bytes).chars() {
        if char.is_control() { text.extend(char.escape_default()) } else { text.push(char) }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(words: &[&str]) -> Command {
        Command::Argv(words.iter().map(|word| word.as_bytes().to_vec()).collect())
    }

    #[test]
    fn a_command_is_shown_as_a_shell_would_take_it() {
        assert_eq!(shown(&argv(&["ls", "-l", "a b", "it's", ""])), r"ls -l 'a b' 'it'\''s' ''");
        assert_eq!(shown(&Command::Shell(b"echo $HOME | wc".to_vec())), "echo $HOME | wc");
    }

    #[test]
    fn a_shown_command_moves_no_cursor() {
        assert_eq!(shown(&argv(&["echo", "\x1b[2Jx\n"])), r"echo '\u{1b}[2Jx\n'");
    }

    #[test]
    fn a_long_command_is_shortened() {
        let text = shown(&argv(&["echo", &"ä".repeat(5000)]));
        assert_eq!(text.chars().count(), SHOWN_CHARS);
        assert!(text.ends_with('…'));
    }
}
