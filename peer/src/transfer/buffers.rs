//! A bounded number of range-sized buffers that are used again: no transfer's memory grows with its file or its disk's
//! slowness, and no page is faulted in twice.

use std::sync::{Arc, Mutex, PoisonError};

use peerfleet_proto::transfer::range_bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Buffers of one transfer.
pub(super) struct Buffers {
    free: Mutex<Vec<Box<[u8]>>>,
    permits: Arc<Semaphore>,
}

/// One buffer, given back when dropped.
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
    home: Arc<Buffers>,
    _permit: OwnedSemaphorePermit,
}

impl Buffers {
    /// Up to `count` buffers, made when first needed.
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(Vec::new()), permits: Arc::new(Semaphore::new(count)) })
    }

    /// A buffer of which the first `len` bytes are used, once there is one.
    pub(super) async fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let permits = Arc::clone(&self.permits);
        let permit = permits.acquire_owned().await.expect("the semaphore is never closed");
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = free.unwrap_or_else(|| vec![0; range_bytes()].into_boxed_slice());
        Buffer { bytes, len: len.min(range_bytes()), home: Arc::clone(self), _permit: permit }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.home.free.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}
