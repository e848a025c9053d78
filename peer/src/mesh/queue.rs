//! A queue of packet batches, bounded in bytes, that makes room by dropping the oldest.
//!
//! In: batches from one side of a link's socket. Out: the same batches in order, to one reader that is woken.
//! Never waits and never refuses: what it carries is repaired by QUIC, and an old packet is worth less than a new one. A writer
//! that can wait asks whether it is half full first, and then drops nothing.
//! Bounds: bytes, given at making; drops are counted.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::sync::Notify;

/// Something that counts in bytes.
pub(super) trait Weigh {
    /// How many bytes it counts for.
    fn weight(&self) -> usize;
}

impl Weigh for bytes::Bytes {
    fn weight(&self) -> usize {
        self.len()
    }
}

/// The queue: any number of writers, one reader.
#[derive(Debug)]
pub(super) struct DropOldest<T> {
    limit_bytes: usize,
    state: Mutex<State<T>>,
    emptier: Notify,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    bytes: usize,
    dropped: u64,
    reader: Option<Waker>,
}

impl<T: Weigh> DropOldest<T> {
    /// An empty queue of at most `limit_bytes`.
    pub(super) fn new(limit_bytes: usize) -> Self {
        let state = State { items: VecDeque::new(), bytes: 0, dropped: 0, reader: None };
        Self { limit_bytes, state: Mutex::new(state), emptier: Notify::new() }
    }

    /// Whether it is half full: who can wait should, for [`Self::emptier`].
    pub(super) fn is_half_full(&self) -> bool {
        self.lock().bytes > self.limit_bytes / 2
    }

    /// Waits until it is no more than a quarter full.
    pub(super) async fn emptier(&self) {
        loop {
            let mut emptier = pin!(self.emptier.notified());
            emptier.as_mut().enable();
            if self.lock().bytes <= self.low() {
                return;
            }
            emptier.await;
        }
    }

    fn low(&self) -> usize {
        self.limit_bytes / 4
    }

    /// Adds at the end, and drops at the front what no longer fits.
    pub(super) fn push(&self, item: T) {
        let mut state = self.lock();
        state.bytes += item.weight();
        state.items.push_back(item);
        while state.bytes > self.limit_bytes {
            let Some(oldest) = state.items.pop_front() else { break };
            state.bytes -= oldest.weight();
            state.dropped += 1;
        }
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Wakes the reader though there is nothing: it should look elsewhere.
    pub(super) fn wake(&self) {
        let reader = self.lock().reader.take();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Takes the first, if there is one now.
    pub(super) fn pop(&self) -> Option<T> {
        let mut state = self.lock();
        let before = state.bytes;
        let item = state.pop();
        if before > self.low() && state.bytes <= self.low() {
            drop(state);
            self.emptier.notify_waiters();
        }
        item
    }

    /// Takes the first; the reader is woken when there is one.
    pub(super) fn poll_pop(&self, cx: &Context<'_>) -> Poll<T> {
        if let Some(item) = self.pop() {
            return Poll::Ready(item);
        }
        let mut state = self.lock();
        let item = state.pop();
        if item.is_none() {
            state.reader = Some(cx.waker().clone());
        }
        item.map_or(Poll::Pending, Poll::Ready)
    }

    /// Drops everything, because nobody will read it.
    pub(super) fn clear(&self) {
        let mut state = self.lock();
        state.dropped += state.items.len() as u64;
        state.items = VecDeque::new();
        state.bytes = 0;
        drop(state);
        self.emptier.notify_waiters();
    }

    /// How many were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Weigh> State<T> {
    fn pop(&mut self) -> Option<T> {
        let item = self.items.pop_front()?;
        self.bytes -= item.weight();
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_full_queue_drops_the_oldest_and_counts_it() {
        let queue = DropOldest::new(10);
        for batch in [&b"aaaa"[..], b"bbbb", b"cccc"] {
            queue.push(Bytes::from_static(batch));
        }
        assert_eq!(queue.dropped(), 1);
        assert_eq!(queue.pop(), Some(Bytes::from_static(b"bbbb")));
        assert_eq!(queue.pop(), Some(Bytes::from_static(b"cccc")));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_waiting_reader_is_woken_by_the_next_push() {
        let queue = DropOldest::new(10);
        let (waker, count) = futures_waker();
        let cx = Context::from_waker(&waker);
        assert!(queue.poll_pop(&cx).is_pending());
        queue.push(Bytes::from_static(b"a"));
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 1);
        assert_eq!(queue.poll_pop(&cx), Poll::Ready(Bytes::from_static(b"a")));
    }

    #[tokio::test]
    async fn who_waits_for_room_goes_on_when_a_quarter_is_left_or_all_is_dropped() {
        let queue = DropOldest::new(16);
        let full = || (0..3).for_each(|_| queue.push(Bytes::from_static(b"aaaa")));
        assert!(!queue.is_half_full());
        queue.emptier().await;
        full();
        assert!(queue.is_half_full());
        let mut waiting = by_hand(queue.emptier());
        assert!(waiting.poll().is_pending());
        queue.pop();
        assert!(waiting.poll().is_pending());
        queue.pop();
        assert!(waiting.poll().is_ready());
        full();
        let mut waiting = by_hand(queue.emptier());
        assert!(waiting.poll().is_pending());
        queue.clear();
        assert!(waiting.poll().is_ready());
        assert!(!queue.is_half_full());
    }

    /// A future that is polled by hand.
    struct ByHand<F>(std::pin::Pin<Box<F>>);

    impl<F: Future> ByHand<F> {
        fn poll(&mut self) -> Poll<F::Output> {
            self.0.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        }
    }

    fn by_hand<F: Future>(future: F) -> ByHand<F> {
        ByHand(Box::pin(future))
    }

    fn futures_waker() -> (Waker, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
        struct Count(std::sync::Arc<std::sync::atomic::AtomicUsize>);
        impl std::task::Wake for Count {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let count = std::sync::Arc::default();
        (std::sync::Arc::new(Count(std::sync::Arc::clone(&count))).into(), count)
    }
}
