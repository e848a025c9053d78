//! A job's output on disk: a file of two rings, one per stream, that vanishes with its process.
//!
//! In: bytes and their offsets. Out: the same bytes, until newer ones took their place; which ones those are is the
//! log's to know. It keeps no name: the file is removed as soon as it is open, so that its bytes are gone with the
//! process, however that ends. Bounds: the capacity that it is given.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use peerfleet_proto::id::JobId;

use super::job::Which;

/// The file and the size of each of its rings.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    ring: u64,
}

impl Spool {
    /// Makes a spool in that folder, whose rings are `ring` bytes each.
    pub(super) fn create(folder: &Path, job: JobId, ring: u64) -> io::Result<Self> {
        let path = folder.join(format!("job-{job}.log"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        fs::remove_file(&path)?;
        Ok(Self { file, ring })
    }

    /// Writes at that offset of the stream; of more than the ring holds, the newest.
    pub(super) fn write(&self, which: Which, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        let surplus = (bytes.len() as u64).saturating_sub(self.ring);
        at += surplus;
        bytes = &bytes[usize::try_from(surplus).expect("below the length of a slice")..];
        let (now, wrapped) = self.split(at, bytes.len());
        self.file.write_all_at(&bytes[..now], self.position(which, at))?;
        if wrapped > 0 {
            self.file.write_all_at(&bytes[now..], self.position(which, at + now as u64))?;
        }
        Ok(())
    }

    /// Reads from that offset of the stream.
    pub(super) fn read(&self, which: Which, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (now, wrapped) = self.split(at, buffer.len());
        self.file.read_exact_at(&mut buffer[..now], self.position(which, at))?;
        if wrapped > 0 {
            self.file.read_exact_at(&mut buffer[now..], self.position(which, at + now as u64))?;
        }
        Ok(())
    }

    fn split(&self, at: u64, len: usize) -> (usize, usize) {
        let to_the_end = usize::try_from(self.ring - at % self.ring).unwrap_or(usize::MAX);
        let now = len.min(to_the_end);
        (now, len - now)
    }

    fn position(&self, which: Which, at: u64) -> u64 {
        which.index() as u64 * self.ring + at % self.ring
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_keep_apart_and_wrap() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::create(folder.path(), JobId::from_bytes([1; 16]), 10).unwrap();
        spool.write(Which::Stdout, 0, b"abcdefgh").unwrap();
        spool.write(Which::Stderr, 0, b"0123456789").unwrap();
        spool.write(Which::Stdout, 8, b"ijklm").unwrap();
        let mut bytes = [0; 10];
        spool.read(Which::Stdout, 3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"defghijklm");
        spool.read(Which::Stderr, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"0123456789");
    }

    #[test]
    fn more_than_the_ring_leaves_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::create(folder.path(), JobId::from_bytes([1; 16]), 4).unwrap();
        spool.write(Which::Stdout, 0, b"abcdefghij").unwrap();
        let mut bytes = [0; 4];
        spool.read(Which::Stdout, 6, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ghij");
    }

    #[test]
    fn leaves_no_name_behind() {
        let folder = tempfile::tempdir().unwrap();
        let _spool = Spool::create(folder.path(), JobId::from_bytes([1; 16]), 4).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
