//! What a person is told when something did not work, and the exit code that scripts see.
//!
//! In: what was being done, why it failed, what to do. Out: up to three lines and one exit code.
//! It never names a type, and never carries a secret: whoever makes a failure leaves values of secrets out.

use std::fmt;

use peerfleet_proto::request::{self, FailureKind};

use crate::mesh::{AskFault, OpenFault};

/// `exec` could not get the command to run, or lost it.
pub const EXIT_NOT_RUN: u8 = 125;

/// `exec` saw the command end by its timeout.
pub const EXIT_TIMED_OUT: u8 = 124;

/// Whoever read our output went away: 128 + SIGPIPE, as the shell reports it of other programs.
pub const EXIT_BROKEN_PIPE: u8 = 141;

/// The user pressed Ctrl-C: 128 + SIGINT.
pub const EXIT_INTERRUPTED: u8 = 130;

/// What sort of failure, and so which exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The user can fix it: a setting, a file, a name.
    Fixable,
    /// The command line is wrong.
    Usage,
    /// The relay or the other peer cannot be reached.
    Unreachable,
    /// The other side said no.
    Refused,
    /// A bug of ours.
    Bug,
    /// Nobody reads our output any more; there is nothing to say and nobody to say it to.
    BrokenPipe,
}

impl Kind {
    /// The exit code of commands other than `exec`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Fixable => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::Refused => 4,
            Self::Bug => 70,
            Self::BrokenPipe => EXIT_BROKEN_PIPE,
        }
    }
}

/// Something that did not work, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What sort.
    pub kind: Kind,
    /// What failed, named.
    pub what: String,
    /// Why.
    pub cause: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// An exit code in place of the kind's own.
    exit_code: Option<u8>,
}

/// A result for a person.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), cause: None, hint: None, exit_code: None }
    }

    /// One that the user can fix.
    pub fn fixable(what: impl Into<String>) -> Self {
        Self::new(Kind::Fixable, what)
    }

    /// A wrong command line.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// Somebody cannot be reached.
    pub fn unreachable(what: impl Into<String>) -> Self {
        Self::new(Kind::Unreachable, what)
    }

    /// A bug of ours.
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(Kind::Bug, what).hint("this is a bug in peerfleet: please report it with what you did")
    }

    /// Nobody reads our output any more.
    pub fn broken_pipe() -> Self {
        Self::new(Kind::BrokenPipe, "")
    }

    /// Says why.
    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Ends the program with this code instead of the kind's own.
    #[must_use]
    pub fn exit_with(mut self, code: u8) -> Self {
        self.exit_code = Some(code);
        self
    }

    /// Of a command that was to run elsewhere and did not: exit code [`EXIT_NOT_RUN`] whatever the reason.
    #[must_use]
    pub fn not_run(self) -> Self {
        match self.kind {
            Kind::BrokenPipe => self,
            Kind::Fixable | Kind::Usage | Kind::Unreachable | Kind::Refused | Kind::Bug => self.exit_with(EXIT_NOT_RUN),
        }
    }

    /// The exit code that the program ends with.
    pub fn exit_code(&self) -> u8 {
        self.exit_code.unwrap_or_else(|| self.kind.exit_code())
    }

    /// What a host answered in place of doing `what`.
    pub fn from_host(what: impl Into<String>, failure: request::Failure) -> Self {
        let kind = match failure.kind {
            FailureKind::Refused => Kind::Refused,
            FailureKind::Unreachable => Kind::Unreachable,
            FailureKind::NotFound
            | FailureKind::Invalid
            | FailureKind::Busy
            | FailureKind::Os
            | FailureKind::Corrupt
            | FailureKind::Internal => Kind::Fixable,
        };
        let told = Self::new(kind, what).cause(failure.what);
        if failure.hint.is_empty() { told } else { told.hint(failure.hint) }
    }

    /// Why asking `host` to do something led to nothing.
    pub fn from_ask(host: &str, fault: AskFault) -> Self {
        let told = |what: &str| Self::unreachable(format!("{what} `{host}`")).cause(fault);
        match fault {
            AskFault::Unreachable => told("cannot reach")
                .hint("`peer status` tells whether this machine is in the room, `peer ls` who else answers there"),
            AskFault::Lost => told("lost").cause("it gave no answer, and may have done what it was asked").hint(format!(
                "its peer or the way to it failed: when `peer ls` shows it again, `peer jobs {host}` tells what ran there"
            )),
            AskFault::DeadlineExceeded => told("no answer from").hint("try again, or allow more time with --timeout"),
            AskFault::Busy => told("no answer from").hint("try again in a moment"),
            AskFault::TooLarge => Self::fixable(format!("cannot ask `{host}`"))
                .cause(fault)
                .hint("shorten the command and its environment: together they may have 60 KiB"),
        }
    }

    /// Likewise of a question that changes nothing there.
    pub fn from_question(host: &str, fault: AskFault) -> Self {
        match fault {
            AskFault::Lost => Self::unreachable(format!("no answer from `{host}`"))
                .cause("its peer or the way to it failed")
                .hint("`peer ls` shows who answers; a machine that was switched off is listed until the relay notices"),
            AskFault::Unreachable | AskFault::DeadlineExceeded | AskFault::TooLarge | AskFault::Busy => {
                Self::from_ask(host, fault)
            }
        }
    }

    /// Why no stream to `host` could be opened.
    pub fn from_open(host: &str, fault: &OpenFault) -> Self {
        Self::unreachable(format!("cannot open a stream to `{host}`"))
            .cause(fault)
            .hint("try again; `peer status` shows the paths, `--path relayed` keeps a transfer off a broken direct one")
    }

    /// A host answered with something that does not belong to the question.
    pub fn odd_answer(host: &str) -> Self {
        Self::bug(format!("`{host}` gave an answer that does not belong to the question"))
            .hint("compare `peer --version` on both machines, and update the older one")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        match &self.cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_exit_code() {
        let codes = [Kind::Fixable, Kind::Usage, Kind::Unreachable, Kind::Refused, Kind::Bug].map(Kind::exit_code);
        assert_eq!(codes, [1, 2, 3, 4, 70]);
    }

    #[test]
    fn a_command_that_did_not_run_exits_125_whatever_the_reason() {
        assert_eq!(Failure::from_ask("web-1", AskFault::Unreachable).not_run().exit_code(), 125);
        assert_eq!(Failure::usage("x").not_run().exit_code(), 125);
        assert_eq!(Failure::broken_pipe().not_run().exit_code(), 141);
    }

    #[test]
    fn a_command_that_may_have_run_is_told_as_that_and_a_question_is_not() {
        let lost = Failure::from_ask("web-1", AskFault::Lost);
        assert!(lost.cause.is_some_and(|cause| cause.contains("may have")));
        assert!(lost.hint.is_some_and(|hint| hint.contains("`peer jobs web-1`")));
        let lost = Failure::from_question("web-1", AskFault::Lost);
        assert_eq!((lost.exit_code(), lost.what.as_str()), (3, "no answer from `web-1`"));
        assert!(lost.cause.is_some_and(|cause| !cause.contains("may have")));
    }

    #[test]
    fn a_refusal_keeps_the_hosts_words_and_hint() {
        let host = request::Failure::new(FailureKind::Refused, "mode is plan", "run `peer mode bypass` there");
        let told = Failure::from_host("cannot run on `web-1`", host);
        assert_eq!((told.exit_code(), told.cause.as_deref()), (4, Some("mode is plan")));
        assert_eq!(told.hint.as_deref(), Some("run `peer mode bypass` there"));
    }
}
