//! A bounded number of range-sized buffers that are used again, and of workers that use them: no transfer's memory grows with
//! its file or its disk's slowness, and no page is faulted in twice. When all are back, their memory is too: a file at rest
//! costs none.

use std::{
    num::NonZero,
    sync::{Arc, Mutex, PoisonError},
};

use peerfleet_proto::transfer::range_bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Who hashes and writes the ranges of one transfer at the same time: half the processors, because the others carry its packets.
/// More only take turns, and wait for each other at the file (measured on two processors: 6 % more work with four at a time).
pub(super) fn workers() -> Arc<Semaphore> {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    Arc::new(Semaphore::new((processors / 2).max(1)))
}

/// Buffers of one transfer.
pub(super) struct Buffers {
    stock: Mutex<Stock>,
    permits: Arc<Semaphore>,
}

#[derive(Default)]
struct Stock {
    free: Vec<Box<[u8]>>,
    lent: usize,
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
        Arc::new(Self { stock: Mutex::default(), permits: Arc::new(Semaphore::new(count)) })
    }

    /// A buffer of which the first `len` bytes are used, once there is one.
    pub(super) async fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let permits = Arc::clone(&self.permits);
        let permit = permits.acquire_owned().await.expect("the semaphore is never closed");
        let again = {
            let mut stock = self.stock.lock().unwrap_or_else(PoisonError::into_inner);
            stock.lent += 1;
            stock.free.pop()
        };
        let bytes = again.unwrap_or_else(|| vec![0; range_bytes()].into_boxed_slice());
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
        let idle = {
            let mut stock = self.home.stock.lock().unwrap_or_else(PoisonError::into_inner);
            stock.free.push(bytes);
            stock.lent -= 1;
            if stock.lent == 0 { std::mem::take(&mut stock.free) } else { Vec::new() }
        };
        // Outside the lock: unmapping takes a while.
        drop(idle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(buffers: &Buffers) -> usize {
        buffers.stock.lock().unwrap().free.len()
    }

    #[tokio::test]
    async fn a_buffer_is_used_again_while_others_are_lent() {
        let buffers = Buffers::new(2);
        let (one, other) = (buffers.take(1).await, buffers.take(1).await);
        drop(one);
        assert_eq!(free(&buffers), 1);
        let again = buffers.take(1).await;
        assert_eq!(free(&buffers), 0);
        drop((again, other));
    }

    #[tokio::test]
    async fn nothing_is_kept_once_all_are_back() {
        let buffers = Buffers::new(3);
        let lent = (buffers.take(1).await, buffers.take(1).await, buffers.take(1).await);
        drop(lent);
        assert_eq!(free(&buffers), 0);
    }
}
