//! The state folder: what this machine keeps between runs, readable by its user alone.
//!
//! In: a path. Out: small files read and written whole, the daemon's lock, where the door's socket is.
//! It never loosens permissions, never tightens a folder that it did not make, and never leaves a half-written file
//! under a final name. Absent -> made with 0700; present -> checked, and refused if others can look inside.
//! Bound: small files are read up to [`MAX_SMALL_FILE_BYTES`].

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    env::{self, Env},
    failure::{Failure, Result},
    random,
};

/// Longest small file that is read, in bytes: a key, a token, a mode or a path fit many times over.
pub const MAX_SMALL_FILE_BYTES: u64 = 16 * 1024;

const LOCK: &str = "daemon.lock";
const DOOR: &str = "door";
const DOOR_SOCKET: &str = "door.sock";

/// A state folder that exists and is private.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

/// Held by the one daemon of a state folder, until it is dropped or the process ends.
#[derive(Debug)]
pub struct DaemonLock {
    _file: File,
}

impl StateDir {
    /// Opens the folder, making it where it is missing.
    ///
    /// # Errors
    /// If it cannot be made, belongs to somebody else, or others can look inside.
    pub fn open(path: &Path) -> Result<Self> {
        private_folder(path, "choose another one with --state-dir or PEER_STATE_DIR").map(|path| Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the daemon's place; `None` if another daemon has it.
    ///
    /// # Errors
    /// If the lock file cannot be opened.
    pub fn lock(&self) -> Result<Option<DaemonLock>> {
        let path = self.path.join(LOCK);
        let failed = |error: io::Error| Failure::fixable(format!("cannot lock {}", shown(&path))).cause(error);
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(DaemonLock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Reads a small file; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read, or is longer than [`MAX_SMALL_FILE_BYTES`].
    pub fn read(&self, name: &str) -> Result<Option<String>> {
        let path = self.path.join(name);
        match read_small(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::fixable(format!("cannot read {}", shown(&path))).cause(error)),
        }
    }

    /// Reads a small file that must be readable by nobody else; `None` if there is none.
    ///
    /// # Errors
    /// As [`StateDir::read`], and if others may read it.
    pub fn read_secret(&self, name: &str) -> Result<Option<String>> {
        let path = self.path.join(name);
        if let Ok(meta) = fs::metadata(&path)
            && meta.mode() & 0o077 != 0
        {
            return Err(Failure::fixable(format!("will not use {}", shown(&path)))
                .cause(format!("others may read it (its mode is {:03o})", meta.mode() & 0o777))
                .hint(format!("run `chmod 600 {}`; if others did read it, delete it and start anew", shown(&path))));
        }
        self.read(name)
    }

    /// Replaces a small file, readable by its owner alone.
    ///
    /// # Errors
    /// If it cannot be written; the file before stays then.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        let failed = |error: io::Error| Failure::fixable(format!("cannot write {}", shown(&path))).cause(error);
        let fresh = self.write_beside(name, text).map_err(failed)?;
        fs::rename(&fresh, &path).map_err(|error| {
            let _ = fs::remove_file(&fresh);
            failed(error)
        })
    }

    /// Writes a small file unless there is one by that name, and says which text stands there now.
    ///
    /// # Errors
    /// If it can neither be written nor read.
    pub fn write_new(&self, name: &str, text: &str) -> Result<String> {
        let path = self.path.join(name);
        let failed = |error: io::Error| Failure::fixable(format!("cannot write {}", shown(&path))).cause(error);
        let fresh = self.write_beside(name, text).map_err(failed)?;
        // A link fails where a rename would replace: of two processes that begin at once, one wins and both agree.
        let linked = fs::hard_link(&fresh, &path);
        let _ = fs::remove_file(&fresh);
        match linked {
            Ok(()) => Ok(text.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.read_secret(name)?.ok_or_else(|| failed(error))
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Where the door's socket of this folder's daemon goes.
    pub fn door_socket(&self, env: &Env) -> PathBuf {
        let Some(runtime) = env.path(env::XDG_RUNTIME_DIR).filter(|path| path.is_absolute() && path.is_dir()) else {
            return self.path.join(DOOR_SOCKET);
        };
        let hash = blake3::hash(self.path.as_os_str().as_encoded_bytes()).to_hex();
        runtime.join("peerfleet").join(format!("{}.sock", &hash[..16]))
    }

    /// Where the running daemon's door is, as that daemon wrote it down: it may have had another environment than we.
    ///
    /// # Errors
    /// If the note is there but cannot be read.
    pub fn known_door(&self) -> Result<Option<PathBuf>> {
        Ok(self.read(DOOR)?.map(|text| PathBuf::from(text.trim_end_matches('\n'))))
    }

    /// Writes down where the door is.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note_door(&self, socket: &Path) -> Result<()> {
        let text = socket.to_str().ok_or_else(|| {
            Failure::fixable(format!("cannot use {} for the door's socket", shown(socket)))
                .cause("the path is not UTF-8")
                .hint("choose another state folder with --state-dir")
        })?;
        self.write(DOOR, &format!("{text}\n"))
    }

    /// Forgets where the door was.
    pub fn forget_door(&self) {
        let _ = fs::remove_file(self.path.join(DOOR));
    }

    fn write_beside(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let fresh = self.path.join(format!(".{name}.{}", u64::from_le_bytes(random::bytes())));
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&fresh)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        if let Err(error) = written {
            let _ = fs::remove_file(&fresh);
            return Err(error);
        }
        Ok(fresh)
    }
}

/// Makes the folder where it is missing, and sees to it that its owner alone can look inside.
///
/// # Errors
/// If it cannot be made, belongs to somebody else, or others can look inside; `way_out` is what to do then.
pub fn private_folder(path: &Path, way_out: &str) -> Result<PathBuf> {
    let named = || format!("cannot use folder {}", shown(path));
    let failed = |error: io::Error| Failure::fixable(named()).cause(error).hint(way_out);
    let absolute = std::path::absolute(path).map_err(failed)?;
    DirBuilder::new().recursive(true).mode(0o700).create(&absolute).map_err(failed)?;
    let path = absolute.canonicalize().map_err(failed)?;
    let meta = fs::metadata(&path).map_err(failed)?;
    let me = rustix::process::geteuid();
    if meta.uid() != me.as_raw() && !me.is_root() {
        return Err(Failure::fixable(named())
            .cause(format!("it belongs to uid {}, not to you", meta.uid()))
            .hint(format!("run peer as that user, or {way_out}")));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(Failure::fixable(named())
            .cause(format!("others can look inside (its mode is {:03o})", meta.mode() & 0o777))
            .hint(format!("run `chmod 700 {}` if nothing else uses it, or {way_out}", shown(&path))));
    }
    Ok(path)
}

/// Reads a text file of at most [`MAX_SMALL_FILE_BYTES`].
///
/// # Errors
/// Those of the file system; `InvalidData` if it is longer or not UTF-8.
pub fn read_small(path: &Path) -> io::Result<String> {
    let not_text = |_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8");
    String::from_utf8(read_small_bytes(path)?).map_err(not_text)
}

/// Reads a file of at most [`MAX_SMALL_FILE_BYTES`].
///
/// # Errors
/// Those of the file system; `InvalidData` if it is longer.
pub fn read_small_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_SMALL_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SMALL_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than 16 KiB"));
    }
    Ok(bytes)
}

/// The permission bits of a file that others than its owner may read, if the owner could change that: what somebody
/// else owns and lets our group read was made so on purpose.
pub fn readable_by_others(path: &Path) -> Option<u32> {
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let is_ours = meta.uid() == rustix::process::geteuid().as_raw();
    let unwanted = if is_ours { 0o044 } else { 0o004 };
    (meta.mode() & unwanted != 0).then_some(meta.mode() & 0o777)
}

/// Whether anybody may read the file.
pub fn is_world_readable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0)
}

/// The state folder that the environment leads to; `None` without a home.
pub fn default_path(env: &Env) -> Option<PathBuf> {
    env.xdg(env::XDG_STATE_HOME, ".local/state").map(|base| base.join("peerfleet"))
}

fn shown(path: &Path) -> std::path::Display<'_> {
    path.display()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, StateDir) {
        let outer = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::open(&outer.path().join("deep/state")).expect("made");
        (outer, state)
    }

    #[test]
    fn is_made_with_0700_and_refused_when_others_can_look_inside() {
        let (_outer, state) = folder();
        assert_eq!(fs::metadata(state.path()).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let refused = StateDir::open(state.path()).unwrap_err();
        assert!(refused.hint.unwrap().contains("chmod 700"));
    }

    #[test]
    fn only_one_holds_the_lock() {
        let (_outer, state) = folder();
        let held = state.lock().unwrap();
        assert!(held.is_some());
        assert!(state.lock().unwrap().is_none());
        drop(held);
        assert!(state.lock().unwrap().is_some());
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let (_outer, state) = folder();
        state.write("secret", "x").unwrap();
        assert_eq!(state.read_secret("secret").unwrap().as_deref(), Some("x"));
        fs::set_permissions(state.path().join("secret"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(state.read_secret("secret").unwrap_err().hint.unwrap().contains("chmod 600"));
    }

    #[test]
    fn the_first_of_two_new_files_stays() {
        let (_outer, state) = folder();
        assert_eq!(state.write_new("key", "one").unwrap(), "one");
        assert_eq!(state.write_new("key", "two").unwrap(), "one");
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 1);
    }

    #[test]
    fn folders_of_their_own_have_sockets_of_their_own() {
        let (outer, one) = folder();
        let other = StateDir::open(&outer.path().join("other")).unwrap();
        let runtime = outer.path().as_os_str().to_owned();
        let env = Env::from_source(|name| (name == env::XDG_RUNTIME_DIR).then(|| runtime.clone()));
        assert_ne!(one.door_socket(&env), other.door_socket(&env));
        assert_eq!(one.door_socket(&Env::default()), one.path().join("door.sock"));
    }
}
