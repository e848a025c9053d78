//! This machine's long-lived key pair, made on first use and kept in the state folder.
//!
//! In: a state folder. Out: the X25519 key pair and the id that others know this machine by.
//! The secret leaves this module only as a key; `Debug` never prints it. A key file that others may read is refused.

use std::fmt;

use data_encoding::HEXLOWER;
use peerfleet_proto::id::PeerId;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result},
    random,
    state::StateDir,
};

const FILE: &str = "identity.key";

/// A machine's key pair.
#[derive(Clone)]
pub struct Identity {
    secret: StaticSecret,
    peer: PeerId,
}

impl Identity {
    /// The state folder's identity; made if there is none yet.
    ///
    /// # Errors
    /// If the key file cannot be read or written, others may read it, or it holds no key.
    pub fn load_or_create(state: &StateDir) -> Result<Self> {
        if let Some(text) = state.read_secret(FILE)? {
            return Self::parse(&Zeroizing::new(text), state);
        }
        let fresh = Zeroizing::new(random::bytes::<32>());
        let text = Zeroizing::new(format!("{}\n", HEXLOWER.encode(&*fresh)));
        Self::parse(&Zeroizing::new(state.write_new(FILE, &text)?), state)
    }

    /// The identity with this secret.
    pub fn from_secret(secret: StaticSecret) -> Self {
        let peer = PeerId::from_bytes(PublicKey::from(&secret).to_bytes());
        Self { secret, peer }
    }

    /// The secret key.
    pub fn secret(&self) -> &StaticSecret {
        &self.secret
    }

    /// The public key, as others know this machine.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    fn parse(text: &str, state: &StateDir) -> Result<Self> {
        let key = HEXLOWER.decode(text.trim_end().as_bytes()).ok().map(Zeroizing::new);
        let key = key.and_then(|key| <[u8; 32]>::try_from(key.as_slice()).ok()).map(Zeroizing::new);
        let Some(key) = key else {
            let path = state.path().join(FILE);
            return Err(Failure::fixable(format!("cannot use {}", path.display()))
                .cause("it does not hold a key: 64 hexadecimal digits were expected")
                .hint("restore it from a backup; or delete it, and this machine becomes a new one to the others"));
        };
        Ok(Self::from_secret(StaticSecret::from(*key)))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer", &self.peer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn stays_the_same_and_is_readable_by_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(&folder.path().join("s")).unwrap();
        let first = Identity::load_or_create(&state).unwrap();
        let again = Identity::load_or_create(&state).unwrap();
        assert_eq!(first.peer(), again.peer());
        let meta = std::fs::metadata(state.path().join(FILE)).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_broken_key_file_is_an_error_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(&folder.path().join("s")).unwrap();
        state.write(FILE, "not a key").unwrap();
        assert!(Identity::load_or_create(&state).is_err());
        assert_eq!(state.read(FILE).unwrap().as_deref(), Some("not a key"));
    }

    #[test]
    fn the_secret_is_not_printed() {
        let identity = Identity::from_secret(StaticSecret::from([7; 32]));
        assert!(!format!("{identity:?}").contains("07"), "{identity:?}");
    }
}
