//! What a caller may do on this host.
//!
//! In: the identity that was proved, what it asks for, this host's policy. Out: yes, or a refusal that says what the
//! owner of this host can do about it. It never asks the disk, the clock or the caller: the same question has the same
//! answer. A policy is made from this host's own configuration; nothing that arrives can raise it.
//!
//! | request | disabled | plan | edit | bypass |
//! |---|---|---|---|---|
//! | ping; pull, whose ticket is the right to it | yes | yes | yes | yes |
//! | list jobs, read a job's log, offer a file, see the network | no | yes | yes | yes |
//! | receive a file | no | no | yes | yes |
//! | exec, own a job, cancel a job | no | no | no | yes, unless exec is off |
//! | links and candidates, which the mesh answers itself | no | no | no | no |

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use peerfleet_proto::{
    id::PeerId,
    presence::Mode,
    request::{Failure, FailureKind, Request},
};

/// What this host lets others do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The mode of everybody who is not named in `access`. [`Mode::Disabled`] is for all.
    pub mode: Mode,
    /// Whether commands may be run at all, whoever asks.
    pub exec: bool,
    /// Single identities with less or more than `mode`: the `[access]` table of the configuration.
    pub access: BTreeMap<PeerId, Mode>,
    /// This peer's own folder, canonical: no request reads or writes there.
    pub state_folder: PathBuf,
}

impl Policy {
    /// The mode that holds for this identity.
    pub fn mode_of(&self, peer: PeerId) -> Mode {
        if self.mode == Mode::Disabled {
            return Mode::Disabled;
        }
        self.access.get(&peer).copied().unwrap_or(self.mode)
    }

    /// Refuses a path inside this peer's own folder. The path must be canonical, and is best asked about once the file
    /// is open: a name can change what it means.
    ///
    /// # Errors
    /// A refusal, naming no path beneath the folder.
    pub fn admit(&self, canonical: &Path) -> Result<(), Failure> {
        if !canonical.starts_with(&self.state_folder) {
            return Ok(());
        }
        Err(refusal(
            "keys and records of the peer itself are in that folder",
            "choose another folder; nobody may read or write this one through the peer",
        ))
    }
}

/// Whether this caller may do this here.
///
/// # Errors
/// A refusal that says what the owner of this host can do.
pub fn decide(caller: PeerId, request: &Request, policy: &Policy) -> Result<(), Failure> {
    let (least, doing) = match request {
        Request::Ping | Request::Pull(_) => return Ok(()),
        Request::Jobs => (Mode::Plan, "listing jobs"),
        Request::Attach(attach) if !attach.owner => (Mode::Plan, "reading a job's log"),
        Request::Offer(_) => (Mode::Plan, "reading files"),
        Request::Network => (Mode::Plan, "looking at its network"),
        Request::Receive(_) => (Mode::Edit, "writing files"),
        Request::Exec(_) | Request::Attach(_) => (Mode::Bypass, "running commands"),
        Request::Cancel(_) => (Mode::Bypass, "ending jobs"),
        Request::Link(_) | Request::Candidates(_) => {
            return Err(Failure::new(
                FailureKind::Invalid,
                "links are agreed by the mesh, not asked of a host",
                "update peer on both machines",
            ));
        }
    };
    let mode = policy.mode_of(caller);
    if least == Mode::Bypass && !policy.exec && mode != Mode::Disabled {
        return Err(refusal(
            format!("this host does not allow {doing}: it was started without exec"),
            "start its peer without --no-exec, on that host",
        ));
    }
    if mode < least {
        let by_name =
            if policy.access.contains_key(&caller) && policy.mode != Mode::Disabled { " for you" } else { "" };
        return Err(refusal(
            format!("this host does not allow {doing}: its mode{by_name} is {mode}"),
            remedy(least, !by_name.is_empty()),
        ));
    }
    Ok(())
}

fn remedy(least: Mode, by_name: bool) -> String {
    if by_name {
        format!("raise your line in [access] of its configuration to {least}, on that host")
    } else {
        format!("run `peer mode {least}` on that host, or give your id {least} in [access] of its configuration")
    }
}

fn refusal(what: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Refused, what, hint)
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::{
        id::{InstanceId, JobId, Ticket},
        request::{
            exec::{Attach, Command, ExecSpec, Follow},
            link::{CandidateUpdate, Nat},
            transfer::{FileInfo, OfferSpec, PathWish, PullSpec, ReceiveSpec},
        },
    };

    use super::*;

    const MODES: [Mode; 4] = [Mode::Disabled, Mode::Plan, Mode::Edit, Mode::Bypass];

    fn peer() -> PeerId {
        PeerId::from_bytes([1; 32])
    }

    fn policy(mode: Mode) -> Policy {
        Policy { mode, exec: true, access: BTreeMap::new(), state_folder: "/var/lib/peer".into() }
    }

    fn attach(owner: bool) -> Request {
        let job = JobId::from_bytes([0; 16]);
        Request::Attach(Attach { job, stdout_from: 0, stderr_from: 0, follow: true, owner })
    }

    fn exec() -> Request {
        Request::Exec(ExecSpec {
            command: Command::Shell(b"true".to_vec()),
            cwd: None,
            env: Vec::new(),
            timeout: None,
            stdin: false,
            follow: Follow::Attached,
        })
    }

    fn requests() -> [(Request, [bool; 4]); 11] {
        let ticket = Ticket::from_bytes([0; 16]);
        let file = FileInfo { name: b"f".to_vec(), size: 0, mode: 0, mtime_s: 0, mtime_ns: 0 };
        let receive = ReceiveSpec {
            ticket,
            file,
            source: peer(),
            source_instance: InstanceId::from_bytes([0; 16]),
            destination: b"/tmp".to_vec(),
            path: PathWish::Auto,
        };
        [
            (Request::Ping, [true, true, true, true]),
            (Request::Pull(PullSpec { ticket }), [true, true, true, true]),
            (Request::Jobs, [false, true, true, true]),
            (attach(false), [false, true, true, true]),
            (Request::Offer(OfferSpec { path: b"/f".to_vec(), receiver: peer() }), [false, true, true, true]),
            (Request::Network, [false, true, true, true]),
            (Request::Receive(receive), [false, false, true, true]),
            (exec(), [false, false, false, true]),
            (attach(true), [false, false, false, true]),
            (Request::Cancel(JobId::from_bytes([0; 16])), [false, false, false, true]),
            (
                Request::Candidates(CandidateUpdate { candidates: Vec::new(), nat: Nat::default() }),
                [false, false, false, false],
            ),
        ]
    }

    #[test]
    fn each_mode_allows_its_row_of_the_table() {
        for (request, allowed) in requests() {
            for (mode, allowed) in MODES.into_iter().zip(allowed) {
                let decision = decide(peer(), &request, &policy(mode));
                assert_eq!(decision.is_ok(), allowed, "{mode} {request:?}: {decision:?}");
            }
        }
    }

    #[test]
    fn without_exec_no_mode_runs_commands() {
        let policy = Policy { exec: false, ..policy(Mode::Bypass) };
        for (request, _) in requests() {
            let is_exec = matches!(request, Request::Exec(_) | Request::Cancel(_)) || request == attach(true);
            let is_meshs = matches!(request, Request::Candidates(_));
            assert_eq!(decide(peer(), &request, &policy).is_err(), is_exec || is_meshs, "{request:?}");
        }
    }

    #[test]
    fn an_identity_of_the_access_table_has_its_own_mode_unless_all_is_disabled() {
        let mut policy = policy(Mode::Plan);
        policy.access.insert(peer(), Mode::Bypass);
        assert_eq!(decide(peer(), &exec(), &policy), Ok(()));
        assert!(decide(PeerId::from_bytes([2; 32]), &exec(), &policy).is_err());
        policy.access.insert(peer(), Mode::Disabled);
        assert!(decide(peer(), &Request::Jobs, &policy).is_err());
        policy.access.insert(peer(), Mode::Bypass);
        policy.mode = Mode::Disabled;
        assert!(decide(peer(), &exec(), &policy).is_err());
    }

    #[test]
    fn a_refusal_says_what_to_do_on_that_host() {
        let failure = decide(peer(), &exec(), &policy(Mode::Plan)).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Refused);
        assert!(failure.what.contains("mode is plan") && failure.hint.contains("`peer mode bypass`"), "{failure:?}");
    }

    #[test]
    fn the_peers_own_folder_is_nobodys() {
        let policy = policy(Mode::Bypass);
        assert!(policy.admit(Path::new("/var/lib/peer/identity")).is_err());
        assert!(policy.admit(Path::new("/var/lib/peer")).is_err());
        assert!(policy.admit(Path::new("/var/lib/peerless")).is_ok());
    }
}
