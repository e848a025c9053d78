//! The record of verified ranges that outlives a receiver: a header, then one record a range, each with a checksum.
//!
//! In: the bytes of a journal as a killed process left them. Out: which ranges are said to stand in the partial file,
//! each with the BLAKE3 hash by which the driver checks that they do. A torn or damaged tail is ignored, never believed.
//! It never says that a range *is* there: the disk may have lost what the journal kept.
//!
//! Header: `magic [8] | fingerprint [32] | checksum [8]`. Record: `range u64 LE | blake3 [32] | checksum [8]`.
//! Bounds: at most one record a range is kept; records behind the first bad one are not read.

use std::collections::BTreeMap;

use super::range_count;
use crate::{id::PeerId, request::transfer::FileInfo};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;

/// Bytes of one record.
pub const RECORD_BYTES: usize = 48;

/// Distinguishes a journal of this layout from any other file.
const MAGIC: &[u8; 8] = b"pfleetJ1";

const FINGERPRINT_LABEL: &str = "peerfleet 2026 transfer fingerprint v1";
const CHECKSUM_LABEL: &str = "peerfleet 2026 transfer journal v1";

/// What a partial file is a part of; another fingerprint makes its ranges worthless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of this file, as it stands on this source, on its way to this final name.
    pub fn new(source: &PeerId, file: &FileInfo, destination: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(FINGERPRINT_LABEL);
        hasher.update(source.as_bytes());
        hasher.update(&file.size.to_le_bytes());
        hasher.update(&file.mtime_s.to_le_bytes());
        hasher.update(&file.mtime_ns.to_le_bytes());
        for text in [file.name.as_slice(), destination] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Why a journal says nothing about this transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JournalFault {
    /// It is empty, torn within its header, or no journal at all.
    #[error("not a journal")]
    Unreadable,
    /// It belongs to another file, or to this one before it changed.
    #[error("a journal of another transfer")]
    OtherTransfer,
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    /// Ranges recorded as verified, each with its BLAKE3 hash.
    pub ranges: BTreeMap<u64, [u8; 32]>,
    /// How many bytes of the journal are whole: what is behind them must be cut off before anything is appended.
    pub intact_bytes: usize,
}

impl Journal {
    /// The header that a new journal begins with.
    pub fn header(fingerprint: &Fingerprint) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..40].copy_from_slice(&fingerprint.0);
        seal(&mut header);
        header
    }

    /// The record to append for a verified range.
    pub fn record(index: u64, blake3: &[u8; 32]) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&index.to_le_bytes());
        record[8..40].copy_from_slice(blake3);
        seal(&mut record);
        record
    }

    /// Reads a journal of a file of this size.
    ///
    /// # Errors
    /// [`JournalFault`] if it does not belong to this transfer; the ranges must then be taken for missing.
    pub fn decode(bytes: &[u8], fingerprint: &Fingerprint, size: u64) -> Result<Self, JournalFault> {
        let (header, records) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(JournalFault::Unreadable)?;
        if !is_sealed(header) || header[..8] != *MAGIC {
            return Err(JournalFault::Unreadable);
        }
        if header[8..40] != fingerprint.0 {
            return Err(JournalFault::OtherTransfer);
        }
        let mut journal = Self { ranges: BTreeMap::new(), intact_bytes: HEADER_BYTES };
        let (records, _torn) = records.as_chunks::<RECORD_BYTES>();
        for record in records {
            let Some((index, blake3)) = read_record(record).filter(|(index, _)| *index < range_count(size)) else {
                break;
            };
            journal.ranges.insert(index, blake3);
            journal.intact_bytes += RECORD_BYTES;
        }
        Ok(journal)
    }
}

fn read_record(record: &[u8; RECORD_BYTES]) -> Option<(u64, [u8; 32])> {
    if !is_sealed(record) {
        return None;
    }
    let (index, rest) = record.split_first_chunk::<8>()?;
    let blake3 = rest.first_chunk::<32>()?;
    Some((u64::from_le_bytes(*index), *blake3))
}

fn seal(record: &mut [u8; RECORD_BYTES]) {
    let checksum = checksum(record);
    record[40..].copy_from_slice(&checksum);
}

fn is_sealed(record: &[u8; RECORD_BYTES]) -> bool {
    record[40..] == checksum(record)
}

fn checksum(record: &[u8; RECORD_BYTES]) -> [u8; 8] {
    let mut checksum = [0; 8];
    checksum.copy_from_slice(&blake3::derive_key(CHECKSUM_LABEL, &record[..40])[..8]);
    checksum
}
