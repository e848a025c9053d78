//! Ended jobs: which of them keep their logs, and which are remembered at all.
//!
//! In: jobs as they end. Out: the ids of those that are forgotten. It never touches a job that runs. Oldest first, a job
//! loses its spool, then its log in memory, then its place. Bounds: [`JobsConfig`]'s.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use peerfleet_proto::id::JobId;

use super::{
    JobsConfig,
    job::{Job, Which},
};

/// Ended jobs in memory, oldest first.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    with_log: VecDeque<(Arc<Job>, usize)>,
    without_log: VecDeque<JobId>,
    bytes: usize,
    spools: usize,
}

impl Shelf {
    /// Remembers a job that ended.
    pub(super) fn push(&mut self, job: Arc<Job>) {
        let bytes = job.memory();
        self.bytes += bytes;
        self.spools += usize::from(job.spool().is_some());
        self.with_log.push_back((job, bytes));
    }

    /// Takes the logs of what is too much, and says which jobs are to be forgotten.
    pub(super) fn trim(&mut self, config: &JobsConfig) -> Vec<JobId> {
        while self.bytes > config.remembered_bytes || self.spools > config.remembered_spools {
            let Some((job, bytes)) = self.with_log.pop_front() else { break };
            self.bytes -= bytes;
            self.spools -= usize::from(job.spool().is_some());
            job.log(Which::Stdout).forget();
            job.log(Which::Stderr).forget();
            job.drop_spool();
            self.without_log.push_back(job.id);
        }
        let mut forgotten = Vec::new();
        while self.with_log.len() + self.without_log.len() > config.remembered {
            if let Some(id) = self.without_log.pop_front() {
                forgotten.push(id);
            } else if let Some((job, bytes)) = self.with_log.pop_front() {
                self.bytes -= bytes;
                self.spools -= usize::from(job.spool().is_some());
                forgotten.push(job.id);
            }
        }
        forgotten
    }
}

/// Ids that were used, as many as the store remembers.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    ids: HashSet<JobId>,
    order: VecDeque<JobId>,
    limit: usize,
}

impl Remembered {
    /// Remembers at most so many.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Remembers an id; the oldest gives way.
    pub(super) fn insert(&mut self, id: JobId) {
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        while self.order.len() > self.limit {
            let oldest = self.order.pop_front().expect("there are more than the limit");
            self.ids.remove(&oldest);
        }
    }

    /// Whether it was used.
    pub(super) fn contains(&self, id: &JobId) -> bool {
        self.ids.contains(id)
    }
}
