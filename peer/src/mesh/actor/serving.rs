//! Requests of others, from the moment they are asked to their outcome.
//!
//! In: requests, what services make of them, `now`. Out: calls of [`Serve`](crate::mesh::Serve), answers. It knows no service.
//! Who asked for what takes longer than a moment will want a link to follow it: links are made ready meanwhile.
//! Bounds: [`MAX_SERVING`] requests being worked on.

use std::time::{Duration, Instant};

use peerfleet_proto::{
    id::RequestId,
    request::{Failure, FailureKind, Outcome, Request},
};
use tokio::task::{Id, JoinError};

use super::Actor;
use crate::mesh::Caller;

/// Requests being worked on at once; further ones are answered with "busy".
const MAX_SERVING: usize = 1024;

/// Time for which a request is worked on before links are made ready, and this machine asks how it is seen: who asked for what
/// takes longer than a moment will want a link to follow it, and whoever answers its offer then knows where it is reached.
/// 25 ms: half of the time after which a command that goes on is answered.
const READY_AFTER: Duration = Duration::from_millis(25);

impl Actor {
    /// Hands a request to the services.
    pub(super) fn serve(&mut self, caller: Caller, id: RequestId, request: Request, now: Instant) {
        if self.serving.len() >= MAX_SERVING {
            let busy =
                Failure::new(FailureKind::Busy, "it works on too many requests already", "try again in a moment");
            return self.exchange.answer(caller.instance, id, Outcome::Failed(busy), now);
        }
        let task = self.serving.spawn(self.serve.ask(caller, id, request));
        self.served.insert(task.id(), (caller.instance, id));
        if !self.book.is_started() {
            self.ready_at.get_or_insert(now + READY_AFTER);
        }
    }

    pub(super) fn served(&mut self, served: Result<(Id, Outcome), JoinError>, now: Instant) {
        let (task, outcome) = match served {
            Ok(served) => served,
            Err(error) => {
                tracing::error!("a service ended in a panic");
                let bug = Failure::new(FailureKind::Internal, "a service ended in a panic", "its log says more");
                (error.id(), Outcome::Failed(bug))
            }
        };
        if let Some((caller, id)) = self.served.remove(&task) {
            self.exchange.answer(caller, id, outcome, now);
        }
    }

    /// Starts the links' thread for whoever waits for what takes long.
    pub(super) async fn make_ready(&mut self, now: Instant) {
        self.ready_at = None;
        if !self.serving.is_empty()
            && let Err(error) = self.start_links(now).await
        {
            tracing::debug!(%error, "links are not ready yet");
        }
    }
}
