//! SHA-256 of a whole file, computed in step with ranges that pass in nearly any order.
//!
//! In: verified ranges while they are still in memory. Out: the hash. Ranges ahead of the hashed prefix wait in memory,
//! up to [`STASH`] of them; what did not wait is read from the file again, mostly from the page cache. Whoever brings
//! a range hashes what has become due, unless somebody is at it already; on two processors the next range waits that long.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use peerfleet_proto::transfer::{RangeSet, range_bytes, range_count, span_of};
use sha2::{Digest, Sha256};

/// Ranges that wait in memory: what the lanes of one transfer are apart, and some.
pub(super) const STASH: usize = 8;

/// Reads the file at an offset.
pub(super) type ReadAt = Box<dyn Fn(&mut [u8], u64) -> io::Result<()> + Send + Sync>;

/// The hash of a whole file in the making.
pub(super) struct Whole {
    size: u64,
    read_at: ReadAt,
    /// First range that is not hashed.
    next: AtomicU64,
    waiting: Mutex<Waiting>,
    hashing: Mutex<Hashing>,
}

struct Waiting {
    stash: BTreeMap<u64, Bytes>,
    /// Ranges that stand in the file; `None` where all do.
    standing: Option<RangeSet>,
}

struct Hashing {
    sha256: Sha256,
    again: Vec<u8>,
    end: Option<[u8; 32]>,
}

enum Due {
    Waited(Bytes),
    Stands,
    Nothing,
}

impl Whole {
    /// Of a file that stands complete: the source's.
    pub(super) fn of_complete(size: u64, read_at: ReadAt) -> Self {
        Self::new(size, read_at, None)
    }

    /// Of a file whose ranges come one by one: the receiver's.
    pub(super) fn of_partial(size: u64, read_at: ReadAt) -> Self {
        Self::new(size, read_at, Some(RangeSet::new()))
    }

    fn new(size: u64, read_at: ReadAt, standing: Option<RangeSet>) -> Self {
        let waiting = Mutex::new(Waiting { stash: BTreeMap::new(), standing });
        let hashing = Mutex::new(Hashing { sha256: Sha256::new(), again: Vec::new(), end: None });
        Self { size, read_at, next: AtomicU64::new(0), waiting, hashing }
    }

    /// A verified range; in a partial file it stands there by now. Hashes what has become due.
    pub(super) fn pass(&self, index: u64, bytes: Bytes) {
        {
            let mut waiting = self.waiting();
            if let Some(standing) = &mut waiting.standing {
                standing.insert(index);
            }
            if waiting.stash.len() < STASH && index >= self.next.load(Ordering::Acquire) {
                waiting.stash.insert(index, bytes);
            }
        }
        loop {
            let mut hashing = match self.hashing.try_lock() {
                Ok(hashing) => hashing,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            // A read that fails here fails again, and is reported, when the hash is wanted.
            while let Ok(true) = self.step(&mut hashing, false) {}
            drop(hashing);
            if !matches!(self.due(false, false), Due::Waited(_)) {
                return;
            }
        }
    }

    /// The hash of the whole, with all that is left read from the file, which must be complete by now.
    pub(super) fn finish(&self) -> io::Result<[u8; 32]> {
        let mut hashing = self.hashing.lock().unwrap_or_else(PoisonError::into_inner);
        while self.step(&mut hashing, true)? {}
        if hashing.end.is_none() {
            hashing.end = Some(std::mem::take(&mut hashing.sha256).finalize().into());
            hashing.again = Vec::new();
        }
        Ok(hashing.end.expect("it was just computed"))
    }

    /// Bytes hashed so far.
    pub(super) fn hashed_bytes(&self) -> u64 {
        let ranges = self.next.load(Ordering::Acquire);
        span_of(self.size, ranges).map_or(self.size, |span| span.offset)
    }

    /// Hashes the next range if it is due; whether it was.
    fn step(&self, hashing: &mut Hashing, complete: bool) -> io::Result<bool> {
        let next = self.next.load(Ordering::Acquire);
        let Some(span) = span_of(self.size, next) else { return Ok(false) };
        match self.due(complete, true) {
            Due::Waited(bytes) => hashing.sha256.update(&bytes),
            Due::Stands => {
                hashing.again.resize(range_bytes(), 0);
                let again = &mut hashing.again[..span.len as usize];
                (self.read_at)(again, span.offset)?;
                hashing.sha256.update(again);
            }
            Due::Nothing => return Ok(false),
        }
        self.next.store(next + 1, Ordering::Release);
        Ok(true)
    }

    /// How the next range is to be had. A complete file's is read early only when the stash is full: then the receiver
    /// had that range from an earlier try and does not ask for it.
    fn due(&self, complete: bool, take: bool) -> Due {
        let next = self.next.load(Ordering::Acquire);
        let mut waiting = self.waiting();
        waiting.stash.retain(|&index, _| index >= next);
        let waited = if take { waiting.stash.remove(&next) } else { waiting.stash.get(&next).cloned() };
        if let Some(bytes) = waited {
            return Due::Waited(bytes);
        }
        let stands = match &waiting.standing {
            Some(standing) => standing.contains(next),
            None => waiting.stash.len() >= STASH,
        };
        if (complete || stands) && next < range_count(self.size) { Due::Stands } else { Due::Nothing }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 20 * 1024 * 1024 + 7;

    fn content() -> Vec<u8> {
        (0..SIZE).map(|at| (at / 251 + at) as u8).collect()
    }

    fn reader(content: &[u8]) -> ReadAt {
        let content = content.to_vec();
        Box::new(move |bytes, offset| {
            bytes.copy_from_slice(&content[offset as usize..][..bytes.len()]);
            Ok(())
        })
    }

    fn range(content: &[u8], index: u64) -> Bytes {
        let span = span_of(SIZE, index).unwrap();
        Bytes::copy_from_slice(&content[span.offset as usize..][..span.len as usize])
    }

    fn agrees(order: impl Iterator<Item = u64>, whole: Whole, content: &[u8]) {
        for index in order {
            whole.pass(index, range(content, index));
        }
        let expected: [u8; 32] = Sha256::digest(content).into();
        assert_eq!(whole.finish().unwrap(), expected);
        assert_eq!(whole.finish().unwrap(), expected);
        assert_eq!(whole.hashed_bytes(), SIZE);
    }

    #[test]
    fn the_order_of_ranges_does_not_matter() {
        let content = content();
        agrees(0..21, Whole::of_partial(SIZE, reader(&content)), &content);
        agrees((0..21).rev(), Whole::of_partial(SIZE, reader(&content)), &content);
        agrees((0..21).map(|index| index * 8 % 21), Whole::of_partial(SIZE, reader(&content)), &content);
        agrees((0..21).rev(), Whole::of_complete(SIZE, reader(&content)), &content);
        agrees(12..21, Whole::of_complete(SIZE, reader(&content)), &content);
        agrees(0..0, Whole::of_complete(SIZE, reader(&content)), &content);
    }

    #[test]
    fn the_hash_of_a_file_that_is_complete_waits_for_no_range() {
        let content = content();
        agrees(0..20, Whole::of_partial(SIZE, reader(&content)), &content);
    }

    #[test]
    fn a_range_that_does_not_stand_yet_is_not_read() {
        let content = content();
        let whole = Whole::of_partial(SIZE, Box::new(|_, _| panic!("nothing may be read")));
        for index in 1..21 {
            whole.pass(index, range(&content, index));
        }
        assert_eq!(whole.hashed_bytes(), 0);
    }
}
