//! The receiver's disk: a hidden partial file and its journal beside the final name, until the file is whole.
//!
//! In: verified ranges. Out: what of an earlier try still stands, then the file under its final name. The final name
//! only ever appears by a rename of a whole, synced file. Two receivers never share a partial file: its journal is
//! locked. Everything happens relative to the opened folder, so a folder moved meanwhile leads nowhere else.
//!
//! Opened → written range by range → finished (renamed, journal gone) or discarded (both gone) or kept (dropped).

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Metadata},
    io::{self, Read, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    thread,
    time::{Duration, Instant},
};

use data_encoding::HEXLOWER;
use peerfleet_proto::{
    id::PeerId,
    request::{Failure, FailureKind, transfer::FileInfo},
    transfer::{Fingerprint, HEADER_BYTES, Journal, RECORD_BYTES, Span, range_count},
};
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, Timespec, Timestamps};

use super::place::{NAME_MAX, Place, os_failure, shown};

/// Bits of the source's mode that are kept: the rights. Set-user-id and its like would give the rights of whoever runs
/// this peer to a file that somebody else chose.
const KEPT_MODE: u32 = 0o777;

/// How long to wait for the lock: a receiver that was ended a moment ago still finishes its last write.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// `f_type` of tmpfs (linux/magic.h): allocating there beforehand touches every page twice.
const TMPFS_MAGIC: u64 = 0x0102_1994;

const PART_SUFFIX: &str = ".part";
const JOURNAL_SUFFIX: &str = ".journal";

/// A partial file and its journal, both open, the journal locked.
pub(super) struct Partial {
    place: Place,
    folder: File,
    part_name: OsString,
    journal_name: OsString,
    part: Arc<File>,
    journal: File,
    fingerprint: Fingerprint,
    size: u64,
    /// Held for reading by each write; once it says `true` the file is whole and must not be touched any more.
    closed: RwLock<bool>,
}

/// Ranges that the journal says stand in the partial file, each with its hash, lowest first.
pub(super) type Claimed = Vec<(u64, [u8; 32])>;

impl Partial {
    /// Opens what an earlier try left of this transfer, or begins anew.
    pub(super) fn open(place: Place, source: &PeerId, file: &FileInfo) -> Result<(Self, Claimed), Failure> {
        let path = place.path();
        let failure = |error: io::Error| os_failure("write", &path, &error);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&place.folder, flags, Mode::empty());
        let folder = File::from(folder.map_err(|error| os_failure("open the folder", &place.folder, &error.into()))?);
        let fingerprint = Fingerprint::new(source, file, path.as_os_str().as_bytes());
        let (part_name, journal_name) = hidden_names(&place.name, source, &file.name);
        let journal = lock_journal(&folder, &journal_name, &path)?;

        let said = read_journal(&journal, &fingerprint, file.size).map_err(failure)?;
        let resumed = match said {
            Some(said) => open_part(&folder, &part_name).map_err(failure)?.map(|part| (part, said)),
            None => None,
        };
        let begun = match resumed {
            Some((part, said)) => journal.set_len(said.intact_bytes as u64).map(|()| (part, said.ranges)),
            None => begin(&folder, &part_name, &journal, &fingerprint).map(|part| (part, Default::default())),
        };
        let (part, ranges) = begun.map_err(|error| {
            let _nothing_there = rustix::fs::unlinkat(&folder, &journal_name, AtFlags::empty());
            failure(error)
        })?;
        let (part, closed, size) = (Arc::new(part), RwLock::new(false), file.size);
        let partial = Self { place, folder, part_name, journal_name, part, journal, fingerprint, size, closed };
        if let Err(error) = partial.reserve() {
            partial.discard();
            return Err(failure(error));
        }
        Ok((partial, ranges.into_iter().collect()))
    }

    /// The partial file, to read from.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.part)
    }

    /// Where the file will stand.
    pub(super) fn path(&self) -> PathBuf {
        self.place.path()
    }

    /// Writes one verified range and records it.
    pub(super) fn write(&self, index: u64, span: Span, bytes: &[u8], blake3: &[u8; 32]) -> Result<(), Failure> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Ok(());
        }
        let written = self.part.write_all_at(bytes, span.offset);
        let recorded = written.and_then(|()| (&self.journal).write_all(&Journal::record(index, blake3)));
        recorded.map_err(|error| os_failure("write", &self.path(), &error))
    }

    /// Forgets every range: the next ones are the first.
    pub(super) fn start_over(&self) -> Result<(), Failure> {
        let cut = self.journal.set_len(0).and_then(|()| (&self.journal).write_all(&Journal::header(&self.fingerprint)));
        cut.map_err(|error| os_failure("write", &self.path(), &error))
    }

    /// Gives the whole file its rights, time and final name, and makes sure that they outlive a power failure.
    pub(super) fn finish(&self, file: &FileInfo) -> Result<(), Failure> {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        *closed = true;
        self.place.check_replaceable()?;
        let place = || -> io::Result<()> {
            let mode = Mode::from_raw_mode((file.mode & KEPT_MODE) as rustix::fs::RawMode);
            rustix::fs::fchmod(&self.part, mode)?;
            let untouched = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
            let modified = Timespec { tv_sec: file.mtime_s, tv_nsec: file.mtime_ns.into() };
            let times = Timestamps { last_access: untouched, last_modification: modified };
            rustix::fs::futimens(&self.part, &times)?;
            self.part.sync_all()?;
            rustix::fs::renameat(&self.folder, &self.part_name, &self.folder, &self.place.name)?;
            self.folder.sync_all()
        };
        place().map_err(|error| os_failure("finish", &self.path(), &error))?;
        self.unlink(&self.journal_name);
        Ok(())
    }

    /// Removes what there is: a next try could not use it.
    pub(super) fn discard(&self) {
        let mut closed = self.closed.write().unwrap_or_else(PoisonError::into_inner);
        *closed = true;
        self.unlink(&self.part_name);
        self.unlink(&self.journal_name);
    }

    fn unlink(&self, name: &OsStr) {
        if let Err(error) = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            tracing::warn!(%error, "a partial file could not be removed");
        }
    }

    /// Makes room for the whole file, so that a full disk is noticed before the first byte is asked for.
    fn reserve(&self) -> io::Result<()> {
        let held = self.part.metadata()?.blocks() * 512;
        let system = rustix::fs::fstatvfs(&self.part)?;
        let free = if rustix::process::geteuid().is_root() { system.f_bfree } else { system.f_bavail };
        let missing = self.size.saturating_sub(held);
        if system.f_blocks > 0 && free.saturating_mul(system.f_frsize) < missing {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.part.set_len(self.size)?;
        if self.size == 0 || is_tmpfs(&self.part)? {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.part, FallocateFlags::empty(), 0, self.size) {
            Err(error @ (rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)) => Err(error.into()),
            // Other refusals mean that this file system cannot: it fills up as the ranges come.
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn is_tmpfs(file: &File) -> io::Result<bool> {
    Ok(u64::try_from(rustix::fs::fstatfs(file)?.f_type).is_ok_and(|kind| kind == TMPFS_MAGIC))
}

/// `.NAME.<8 hex>.part` and its journal: one pair for each (source, name, destination), so that a file that changed
/// takes the place of its older self. The name is cut where it would be longer than file systems take.
fn hidden_names(name: &OsStr, source: &PeerId, sent_as: &[u8]) -> (OsString, OsString) {
    let mut hasher = blake3::Hasher::new();
    for part in [source.as_bytes().as_slice(), sent_as, name.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let tag = HEXLOWER.encode(&hasher.finalize().as_bytes()[..4]);
    let room = NAME_MAX - 2 - tag.len() - JOURNAL_SUFFIX.len();
    let name = &name.as_bytes()[..name.len().min(room)];
    let hidden = |suffix: &str| OsString::from_vec([b".", name, b".", tag.as_bytes(), suffix.as_bytes()].concat());
    (hidden(PART_SUFFIX), hidden(JOURNAL_SUFFIX))
}

/// Opens and locks the journal; when the lock is had, the journal is still the one of that name.
fn lock_journal(folder: &File, name: &OsStr, path: &std::path::Path) -> Result<File, Failure> {
    let failure = |error: io::Error| os_failure("write", path, &error);
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let journal = rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR);
        let journal = File::from(journal.map_err(|error| failure(error.into()))?);
        match rustix::fs::flock(&journal, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let ours = journal.metadata().map_err(failure)?;
                let named = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
                if named.is_ok_and(|named| named.st_ino == ours.ino() && named.st_dev == ours.dev()) {
                    check_private(&ours).map_err(failure)?;
                    return Ok(journal);
                }
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(failure(error.into())),
        }
        if Instant::now() >= give_up {
            let what = format!("another transfer is writing {}", shown(path));
            return Err(Failure::new(FailureKind::Busy, what, "wait until it has ended, or end it"));
        }
        thread::sleep(LOCK_PATIENCE / 40);
    }
}

fn read_journal(journal: &File, fingerprint: &Fingerprint, size: u64) -> io::Result<Option<Journal>> {
    let longest = range_count(size).saturating_mul(2 * RECORD_BYTES as u64).saturating_add(HEADER_BYTES as u64);
    let mut bytes = Vec::new();
    journal.take(longest).read_to_end(&mut bytes)?;
    Ok(Journal::decode(&bytes, fingerprint, size).ok())
}

/// The partial file of an earlier try, if it is there.
fn open_part(folder: &File, name: &OsStr) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(part) => {
            let part = File::from(part);
            check_private(&part.metadata()?)?;
            Ok(Some(part))
        }
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn begin(folder: &File, name: &OsStr, journal: &File, fingerprint: &Fingerprint) -> io::Result<File> {
    journal.set_len(0)?;
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let part = File::from(rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?);
    let mut journal = journal;
    journal.write_all(&Journal::header(fingerprint))?;
    Ok(part)
}

/// In a folder that others can write to, a file of this name may be theirs, or another name of something else.
fn check_private(found: &Metadata) -> io::Result<()> {
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if found.file_type().is_file() && found.nlink() == 1 && ours {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "somebody else's file has the name of the partial file"))
}
