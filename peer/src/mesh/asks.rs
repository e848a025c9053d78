//! Who waits for the outcome of which request.
//!
//! In: requests as they were asked, what became of them. Out: that, to who waits. Never keeps a request that nobody waits
//! for: those are given back to be forgotten.
//! Bounds: one entry per request under way, whose number the exchange bounds.

use std::collections::HashMap;

use peerfleet_proto::{
    id::{InstanceId, RequestId},
    request::Outcome,
};
use tokio::sync::{mpsc, oneshot};

use super::{AskFault, AskProgress, agreement::Key};

/// Who waits for one request.
#[derive(Debug)]
pub(super) enum Waiting {
    /// A caller who asked one.
    One(oneshot::Sender<Result<Outcome, AskFault>>),
    /// A caller who asked many.
    Many(InstanceId, mpsc::Sender<(InstanceId, AskProgress)>),
    /// We ourselves, who offered a link.
    Link(Key),
    /// We ourselves, who told our candidates: nobody needs the outcome.
    Candidates,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Asks(HashMap<RequestId, Waiting>);

impl Asks {
    /// A request is under way.
    pub(super) fn insert(&mut self, id: RequestId, waiting: Waiting) {
        self.0.insert(id, waiting);
    }

    /// The other side has the request.
    pub(super) fn accepted(&self, id: RequestId) {
        if let Some(Waiting::Many(from, progress)) = self.0.get(&id) {
            tell(progress, *from, AskProgress::Accepted);
        }
    }

    /// The request ended. Gives the link that it was about, if it was.
    pub(super) fn ended(
        &mut self,
        id: RequestId,
        result: Result<Outcome, AskFault>,
    ) -> Option<(Key, Result<Outcome, AskFault>)> {
        match self.0.remove(&id)? {
            Waiting::One(reply) => {
                if reply.send(result).is_err() {
                    tracing::trace!(%id, "nobody waits for an outcome any more");
                }
                None
            }
            Waiting::Many(from, progress) => {
                tell(&progress, from, AskProgress::Ended(result));
                None
            }
            Waiting::Link(key) => Some((key, result)),
            Waiting::Candidates => None,
        }
    }

    /// Takes out the requests that nobody waits for any more.
    pub(super) fn take_abandoned(&mut self) -> Vec<RequestId> {
        let abandoned = |waiting: &Waiting| match waiting {
            Waiting::One(reply) => reply.is_closed(),
            Waiting::Many(_, progress) => progress.is_closed(),
            Waiting::Link(_) | Waiting::Candidates => false,
        };
        self.0.extract_if(|_, waiting| abandoned(waiting)).map(|(id, _)| id).collect()
    }

    /// Whether nothing is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The mesh ends: nothing will be answered.
    pub(super) fn end_all(&mut self) {
        self.0.clear();
    }
}

fn tell(progress: &mpsc::Sender<(InstanceId, AskProgress)>, from: InstanceId, word: AskProgress) {
    // The channel was made with room for every word of every instance: only a caller who left cannot be told.
    if progress.try_send((from, word)).is_err() {
        tracing::trace!(%from, "nobody follows a request any more");
    }
}
