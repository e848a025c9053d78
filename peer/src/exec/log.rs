//! One stream of a job's output: what is still kept of it, and from which offset on.
//!
//! In: bytes from the pipe, how far the owner has taken them. Out: bytes from any offset that is kept, and how many
//! more may be read from the pipe. It never touches the disk: where bytes belong there, it says so and waits to be told
//! that they arrived.
//!
//! A *held* log keeps what its owner has not taken, and holds the process back at [`OUTPUT_WINDOW_BYTES`]. A *running*
//! log never holds back: Memory -> Spool (more than [`MEMORY_BYTES`]), or Memory -> newest bytes only, where there is
//! no spool to be had. Either is emptied by `forget`, which keeps the count.

use std::{collections::VecDeque, ops::Range};

use peerfleet_proto::limits::{INLINE_OUTPUT_BYTES, OUTPUT_WINDOW_BYTES};

/// Output that stays in memory, per stream: what a running log keeps before it is spooled, and what a held one keeps
/// for others of what its owner has taken. The size of a pipe in Linux, so that most jobs never touch the disk.
pub(super) const MEMORY_BYTES: usize = 64 * 1024;

/// What is kept of one stream of output.
#[derive(Debug)]
pub(super) struct Log {
    first: u64,
    next: u64,
    window: VecDeque<u8>,
    head: Vec<u8>,
    keeping: Keeping,
}

#[derive(Debug)]
enum Keeping {
    Held { taken: u64 },
    Memory,
    Spool { capacity: u64 },
    Newest,
}

/// Where the next bytes of a running log belong.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In memory: call [`Log::append`].
    Memory,
    /// In the spool at this offset, behind the bytes that were in memory until now; then call [`Log::spooled`] or
    /// [`Log::spool_failed`].
    Spool {
        /// Offset of `moved`, or of the new bytes if that is empty.
        at: u64,
        /// Bytes that leave memory for the spool.
        moved: Vec<u8>,
    },
}

/// What a log has from some offset on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// These bytes were added to the buffer.
    Bytes(usize),
    /// The bytes are in the spool.
    Spooled(Range<u64>),
    /// The bytes are no longer kept.
    Gone,
    /// There are none yet.
    Nothing,
}

impl Log {
    /// A log whose owner's reading holds the process back.
    pub(super) fn held() -> Self {
        Self::new(Keeping::Held { taken: 0 })
    }

    /// A log that never holds the process back.
    pub(super) fn running() -> Self {
        Self::new(Keeping::Memory)
    }

    fn new(keeping: Keeping) -> Self {
        Self { first: 0, next: 0, window: VecDeque::new(), head: Vec::new(), keeping }
    }

    /// The first offset that is kept.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Bytes in all, so far.
    pub(super) fn total(&self) -> u64 {
        self.next
    }

    /// Bytes of memory in use.
    pub(super) fn memory(&self) -> usize {
        self.window.capacity() + self.head.capacity()
    }

    /// Bytes that may be read from the pipe now.
    pub(super) fn room(&self) -> usize {
        match self.keeping {
            Keeping::Held { taken } => OUTPUT_WINDOW_BYTES.saturating_sub(as_len(self.next - taken)),
            Keeping::Memory | Keeping::Spool { .. } | Keeping::Newest => usize::MAX,
        }
    }

    /// Whether the owner has taken all there is. A log without an owner has nobody to wait for.
    pub(super) fn is_taken(&self) -> bool {
        match self.keeping {
            Keeping::Held { taken } => taken >= self.next,
            Keeping::Memory | Keeping::Spool { .. } | Keeping::Newest => true,
        }
    }

    /// The first bytes ever, for the report: those that a running log set aside, or those a held one still has.
    pub(super) fn head(&self) -> Vec<u8> {
        if !self.head.is_empty() || self.first > 0 {
            return self.head.clone();
        }
        self.window.iter().take(INLINE_OUTPUT_BYTES).copied().collect()
    }

    /// Decides where `len` more bytes belong. With a spool of `capacity` bytes per stream; older bytes than fit there
    /// are gone from now on, before they are overwritten.
    pub(super) fn place(&mut self, len: usize, capacity: u64) -> Place {
        match self.keeping {
            Keeping::Held { .. } | Keeping::Newest => Place::Memory,
            Keeping::Memory if self.window.len() + len <= MEMORY_BYTES => Place::Memory,
            Keeping::Memory => {
                let at = self.first;
                self.expire(len, capacity);
                Place::Spool { at, moved: self.window.iter().copied().collect() }
            }
            Keeping::Spool { capacity } => {
                self.expire(len, capacity);
                Place::Spool { at: self.next, moved: Vec::new() }
            }
        }
    }

    fn expire(&mut self, len: usize, capacity: u64) {
        self.first = self.first.max((self.next + len as u64).saturating_sub(capacity));
    }

    /// Adds bytes in memory.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.set_aside(bytes);
        self.window.extend(bytes);
        self.next += bytes.len() as u64;
        self.evict();
    }

    /// The bytes arrived in the spool.
    pub(super) fn spooled(&mut self, bytes: &[u8], capacity: u64) {
        self.set_aside(bytes);
        self.window = VecDeque::new();
        self.next += bytes.len() as u64;
        self.keeping = Keeping::Spool { capacity };
    }

    /// The spool would not take the bytes: from now on only the newest are kept, in memory.
    pub(super) fn spool_failed(&mut self, bytes: &[u8]) {
        self.keeping = Keeping::Newest;
        self.first = self.next - self.window.len() as u64;
        self.append(bytes);
    }

    fn set_aside(&mut self, bytes: &[u8]) {
        if !matches!(self.keeping, Keeping::Held { .. }) {
            let missing = INLINE_OUTPUT_BYTES.saturating_sub(self.head.len());
            self.head.extend(&bytes[..bytes.len().min(missing)]);
        }
    }

    /// The owner has passed on everything before this offset.
    pub(super) fn take(&mut self, upto: u64) {
        if let Keeping::Held { taken } = &mut self.keeping {
            *taken = upto.min(self.next).max(*taken);
        }
        self.evict();
    }

    fn evict(&mut self) {
        let wanted = match self.keeping {
            Keeping::Held { taken } => as_len(self.next - taken).max(MEMORY_BYTES),
            Keeping::Newest => MEMORY_BYTES,
            Keeping::Memory | Keeping::Spool { .. } => return,
        };
        let surplus = self.window.len().saturating_sub(wanted);
        self.window.drain(..surplus);
        self.first += surplus as u64;
    }

    /// Adds at most `max` bytes from that offset on to `buffer`, after calling `begin` with their number.
    pub(super) fn read(
        &self,
        from: u64,
        max: usize,
        buffer: &mut Vec<u8>,
        begin: impl FnOnce(&mut Vec<u8>, usize),
    ) -> Found {
        if from >= self.next {
            return Found::Nothing;
        }
        if from < self.first {
            return Found::Gone;
        }
        let len = max.min(as_len(self.next - from));
        if matches!(self.keeping, Keeping::Spool { .. }) {
            return Found::Spooled(from..from + len as u64);
        }
        begin(buffer, len);
        let skip = as_len(from - (self.next - self.window.len() as u64));
        let (front, back) = self.window.as_slices();
        let in_front = front.get(skip..).unwrap_or_default();
        let in_front = &in_front[..in_front.len().min(len)];
        let in_back = &back[skip.saturating_sub(front.len())..][..len - in_front.len()];
        buffer.extend_from_slice(in_front);
        buffer.extend_from_slice(in_back);
        Found::Bytes(len)
    }

    /// Nobody is waited for any longer: keeps the newest [`MEMORY_BYTES`] of what is in memory, and no spare room.
    pub(super) fn settle(&mut self) {
        self.take(u64::MAX);
        self.window.shrink_to_fit();
        self.head.shrink_to_fit();
    }

    /// Keeps the count alone.
    pub(super) fn forget(&mut self) {
        self.keeping = Keeping::Newest;
        self.first = self.next;
        self.window = VecDeque::new();
        self.head = Vec::new();
    }
}

/// A difference of offsets as a length: more than memory holds is as good as all of it.
fn as_len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: u64 = 256 * 1024;

    fn read(log: &Log, from: u64, max: usize) -> (Found, Vec<u8>) {
        let mut bytes = Vec::new();
        let found = log.read(from, max, &mut bytes, |_, _| {});
        (found, bytes)
    }

    #[test]
    fn a_held_log_has_no_room_until_its_owner_takes() {
        let mut log = Log::held();
        log.append(&vec![1; OUTPUT_WINDOW_BYTES]);
        assert_eq!(log.room(), 0);
        log.take(1000);
        assert_eq!(log.room(), 1000);
        assert_eq!((log.first(), log.total()), (1000, OUTPUT_WINDOW_BYTES as u64));
    }

    #[test]
    fn nobody_can_take_what_is_not_there() {
        let mut log = Log::held();
        log.append(b"abc");
        log.take(u64::MAX);
        log.append(b"def");
        assert_eq!(log.room(), OUTPUT_WINDOW_BYTES - 3);
        assert_eq!(read(&log, 0, 10), (Found::Bytes(6), b"abcdef".to_vec()));
    }

    #[test]
    fn a_held_log_keeps_the_newest_taken_bytes_for_others() {
        let mut log = Log::held();
        log.append(&vec![7; 3 * MEMORY_BYTES]);
        log.take(u64::MAX);
        assert_eq!(log.first(), 2 * MEMORY_BYTES as u64);
        assert_eq!(read(&log, 0, 1), (Found::Gone, vec![]));
    }

    #[test]
    fn a_running_log_goes_to_the_spool_at_its_bound_and_expires_before_it_overwrites() {
        let mut log = Log::running();
        assert_eq!(log.place(MEMORY_BYTES, CAPACITY), Place::Memory);
        log.append(&vec![1; MEMORY_BYTES]);
        let Place::Spool { at: 0, moved } = log.place(1, CAPACITY) else { panic!("memory is full") };
        assert_eq!(moved.len(), MEMORY_BYTES);
        log.spooled(&[2], CAPACITY);
        assert_eq!(read(&log, 0, 10).0, Found::Spooled(0..10));
        log.place(CAPACITY as usize, CAPACITY);
        assert_eq!(log.first(), MEMORY_BYTES as u64 + 1);
    }

    #[test]
    fn without_a_spool_the_newest_bytes_stay() {
        let mut log = Log::running();
        log.append(&vec![1; MEMORY_BYTES]);
        log.place(2, CAPACITY);
        log.spool_failed(&[2, 3]);
        assert_eq!((log.first(), log.total()), (2, MEMORY_BYTES as u64 + 2));
        assert_eq!(read(&log, MEMORY_BYTES as u64, 10), (Found::Bytes(2), vec![2, 3]));
        assert_eq!(log.head().len(), INLINE_OUTPUT_BYTES);
    }

    #[test]
    fn a_forgotten_log_still_counts() {
        let mut log = Log::held();
        log.append(b"abc");
        log.forget();
        assert_eq!((log.first(), log.total(), log.memory()), (3, 3, 0));
    }

    proptest! {
        #[test]
        fn reading_in_any_pieces_gives_the_bytes_written(
            pieces in prop::collection::vec(1..5000_usize, 1..40),
            reads in prop::collection::vec(1..9000_usize, 1..60),
        ) {
            let mut log = Log::held();
            let mut written = Vec::new();
            let mut seen = Vec::new();
            let mut reads = reads.into_iter().cycle();
            for piece in pieces {
                let bytes: Vec<u8> = (0..piece).map(|at| ((written.len() + at) % 251) as u8).collect();
                log.append(&bytes);
                written.extend(bytes);
                let found = log.read(seen.len() as u64, reads.next().unwrap(), &mut seen, |_, _| {});
                prop_assert!(matches!(found, Found::Bytes(_)));
                log.take(seen.len() as u64 / 2);
            }
            while log.read(seen.len() as u64, reads.next().unwrap(), &mut seen, |_, _| {}) != Found::Nothing {}
            prop_assert_eq!(seen, written);
        }
    }
}
