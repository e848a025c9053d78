//! One ask of ours, from its sending to its end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::AskFault;
use crate::{
    id::{InstanceId, Slot},
    limits::{ASK_CONNECT_DEADLINE, ASK_LOST_AFTER, ASK_RETRY_FIRST, ASK_RETRY_MAX, ASK_SILENT_AFTER},
    request::Request,
};

/// Asked → (accepted →) answered, or failed.
pub(super) struct Ask {
    pub(super) to: InstanceId,
    pub(super) request: Arc<Request>,
    /// The tag and slot of the newest message: a refusal names them.
    pub(super) sent: Option<(u32, Slot)>,
    /// Messages that carried it.
    pub(super) attempts: u32,
    /// When the newest of them went out.
    pub(super) last_sent: Option<Instant>,
    /// When to look after it again.
    pub(super) wake: Instant,
    accepted: bool,
    asked: Instant,
    heard: Instant,
    gone: Option<Instant>,
    deadline: Instant,
    pause: Duration,
}

impl Ask {
    pub(super) fn new(to: InstanceId, request: Arc<Request>, deadline: Duration, now: Instant) -> Self {
        // An end that cannot be represented is as good as never.
        let deadline = now.checked_add(deadline).unwrap_or(now + Duration::from_secs(365 * 86_400));
        Self {
            to,
            request,
            sent: None,
            attempts: 0,
            last_sent: None,
            wake: now,
            accepted: false,
            asked: now,
            heard: now,
            gone: None,
            deadline,
            pause: ASK_RETRY_FIRST,
        }
    }

    /// It was accepted; true if that is news.
    pub(super) fn accept(&mut self, now: Instant) -> bool {
        self.heard = now;
        self.pause = ASK_RETRY_MAX;
        !std::mem::replace(&mut self.accepted, true)
    }

    /// The host left the room, or came back.
    pub(super) fn set_gone(&mut self, gone: bool, now: Instant) {
        self.gone = gone.then(|| self.gone.unwrap_or(now));
    }

    /// How it has failed by now, if it has.
    pub(super) fn fault(&self, now: Instant) -> Option<AskFault> {
        if !self.accepted {
            let given_up = now >= self.deadline.min(self.asked + ASK_CONNECT_DEADLINE);
            return given_up.then_some(AskFault::Unreachable);
        }
        if now >= self.lost_at() {
            return Some(AskFault::Lost);
        }
        (now >= self.deadline).then_some(AskFault::DeadlineExceeded)
    }

    /// After a message went out, or could not: when to look after it again.
    pub(super) fn schedule(&mut self, now: Instant) {
        let repeat = now + self.pause;
        self.pause = (self.pause * 2).min(ASK_RETRY_MAX);
        let end = if self.accepted { self.lost_at() } else { self.asked + ASK_CONNECT_DEADLINE };
        self.wake = repeat.min(end).min(self.deadline);
    }

    fn lost_at(&self) -> Instant {
        let silent = self.heard + ASK_SILENT_AFTER;
        self.gone.map_or(silent, |gone| silent.min(gone + ASK_LOST_AFTER))
    }
}
