//! Where files are: paths as others write them, on this host's disk, and how a disk's refusals are put to people.
//!
//! In: path bytes of a request. Out: absolute paths, or a failure that says what to do. Paths are bytes: no name is
//! refused for not being text. `~` and relative paths start at this user's home, as a remote shell's do.
//! Bounds: [`MAX_PATH_BYTES`] a path, [`NAME_MAX`] a name.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use peerfleet_proto::{
    limits::MAX_PATH_BYTES,
    request::{Failure, FailureKind},
};

use super::is_inside;

/// Longest file name, in bytes: `NAME_MAX` of Linux and macOS.
pub(super) const NAME_MAX: usize = 255;

/// A final name and the folder that it is in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The folder, canonical.
    pub(super) folder: PathBuf,
    /// The name in it.
    pub(super) name: OsString,
}

impl Place {
    /// Where a file named `name` goes when `destination` was asked for.
    pub(super) fn find(destination: &[u8], name: &[u8], forbidden: Option<&Path>) -> Result<Self, Failure> {
        let path = absolute(destination)?;
        let place = match fs::metadata(&path) {
            Ok(found) if found.is_dir() => Self::new(&path, OsStr::from_bytes(name))?,
            Ok(_) => Self::beside(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if destination.ends_with(b"/") {
                    return Err(no_folder(&path));
                }
                Self::beside(&path)?
            }
            Err(error) => return Err(os_failure("look at", &path, &error)),
        };
        if is_inside(&place.path(), forbidden) {
            return Err(private(&path));
        }
        place.check_replaceable()?;
        Ok(place)
    }

    /// The whole path.
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Whether what has the final name now may make way: nothing, a file or a symlink.
    pub(super) fn check_replaceable(&self) -> Result<(), Failure> {
        let Ok(found) = fs::symlink_metadata(self.path()) else { return Ok(()) };
        let kind = found.file_type();
        if kind.is_file() || kind.is_symlink() {
            return Ok(());
        }
        let what = if kind.is_dir() { "a folder" } else { "neither a file nor a folder" };
        Err(invalid(format!("{} is {what}", shown(&self.path())), "name another destination"))
    }

    fn beside(path: &Path) -> Result<Self, Failure> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Err(no_folder(path)) };
        Self::new(folder, name)
    }

    fn new(folder: &Path, name: &OsStr) -> Result<Self, Failure> {
        if name.len() > NAME_MAX {
            let what = format!("the name {} has {} bytes", shown(Path::new(name)), name.len());
            return Err(invalid(what, format!("file systems take at most {NAME_MAX}: give a shorter final name")));
        }
        let folder = fs::canonicalize(folder).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            if missing { no_folder(folder) } else { os_failure("open the folder", folder, &error) }
        })?;
        Ok(Self { folder, name: name.to_owned() })
    }
}

/// A file that can be sent: its real path, and its name as it was asked for.
pub(super) fn find_source(path: &[u8], forbidden: Option<&Path>) -> Result<(PathBuf, OsString), Failure> {
    if path.is_empty() {
        return Err(invalid("the path of the file to send is empty", "name a file"));
    }
    let asked = absolute(path)?;
    let real = fs::canonicalize(&asked).map_err(|error| os_failure("open", &asked, &error))?;
    if is_inside(&real, forbidden) {
        return Err(private(&asked));
    }
    let found = fs::symlink_metadata(&real).map_err(|error| os_failure("look at", &asked, &error))?;
    check_is_file(&asked, &found)?;
    let name = asked.file_name().or(real.file_name()).unwrap_or_default().to_owned();
    Ok((real, name))
}

/// Refuses everything but a regular file.
pub(super) fn check_is_file(path: &Path, found: &fs::Metadata) -> Result<(), Failure> {
    let kind = found.file_type();
    if kind.is_file() {
        return Ok(());
    }
    if kind.is_dir() {
        let what = format!("{} is a folder", shown(path));
        return Err(invalid(what, "folders cannot be sent yet: pack it (`tar -cf`) and send the archive"));
    }
    let what = if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(invalid(format!("{} is {what}", shown(path)), "only regular files can be sent"))
}

/// Size, modification time and place on disk: what changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl From<&fs::Metadata> for Stamp {
    fn from(found: &fs::Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            mtime_s: found.mtime(),
            mtime_ns: found.mtime_nsec(),
        }
    }
}

/// What an operating system's refusal means to a person.
#[expect(clippy::wildcard_enum_match_arm, reason = "most of the standard library's kinds have no better hint")]
pub(super) fn os_failure(doing: &str, path: &Path, error: &io::Error) -> Failure {
    let (kind, hint) = match error.kind() {
        io::ErrorKind::NotFound => (FailureKind::NotFound, "look for it with `ls` on that host"),
        io::ErrorKind::PermissionDenied => {
            (FailureKind::Os, "the user that runs the peer on that host may not do this: change the path or the rights")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (FailureKind::Os, "free space on that host's disk, or name a destination on another one")
        }
        io::ErrorKind::ReadOnlyFilesystem => (FailureKind::Os, "that file system is read-only: name another folder"),
        io::ErrorKind::FileTooLarge => (FailureKind::Os, "that file system does not take files of this size"),
        io::ErrorKind::InvalidFilename => (FailureKind::Invalid, "that file system does not take this name"),
        _ => (FailureKind::Os, "see the log of that host and its disk"),
    };
    Failure::new(kind, format!("cannot {doing} {}: {error}", shown(path)), hint)
}

/// A path for people: on one line, whatever bytes it has.
pub(super) fn shown(path: &Path) -> String {
    let mut text = String::from("`");
    for character in path.to_string_lossy().chars() {
        if character.is_control() {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    text.push('`');
    text
}

fn absolute(path: &[u8]) -> Result<PathBuf, Failure> {
    if path.len() > MAX_PATH_BYTES {
        return Err(invalid(
            format!("a path of {} bytes", path.len()),
            format!("at most {MAX_PATH_BYTES} are possible"),
        ));
    }
    if path.contains(&0) {
        return Err(invalid("a path with a NUL byte in it", "no file system takes such a name"));
    }
    let home = || std::env::home_dir().unwrap_or_else(|| PathBuf::from("/"));
    let relative = match path {
        b"~" => b"",
        [b'~', b'/', rest @ ..] => rest,
        _ => path,
    };
    Ok(if relative.is_empty() { home() } else { home().join(OsStr::from_bytes(relative)) })
}

fn no_folder(path: &Path) -> Failure {
    Failure::new(FailureKind::NotFound, format!("there is no folder {}", shown(path)), "make it first, or name another")
}

fn private(path: &Path) -> Failure {
    let what = format!("{} is in the peer's own state folder", shown(path));
    Failure::new(FailureKind::Refused, what, "it holds keys: only this machine's user can reach into it")
}

pub(super) fn invalid(what: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Invalid, what, hint)
}
