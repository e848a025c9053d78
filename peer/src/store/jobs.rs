//! What ran on this host: a row per job, from its start on.
//!
//! In: jobs as they start and end. Out: the same, newest first. It never holds output, environment or input; the
//! command is shortened. A row without an end is a job that runs, or ran when the host died: [`Store::recover`] tells.
//! Bounds: [`JOBS_KEPT`] rows and a few more, the oldest go first.

use std::{sync::atomic::Ordering, time::Duration};

use peerfleet_proto::{
    id::{JobId, PeerId},
    request::{
        Failure, FailureKind,
        exec::{EndState, JobEnd, JobSummary},
    },
    wire,
};
use rusqlite::{Connection, OptionalExtension, Row, params, types::Type};

use super::{Store, StoreFault};

/// Jobs that the store remembers: some 400 KiB of file; as many ids in memory are 100 KiB.
pub const JOBS_KEPT: usize = 2048;

/// Jobs between two looks for rows to delete, which count the whole table.
const EXPIRE_EVERY: u64 = 64;

const COLUMNS: &str =
    "id, caller, command, started_ms, state, number, failure, duration_us, stdout_bytes, stderr_bytes";

/// What the store knew of jobs when the process started.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Every job, oldest first.
    pub jobs: Vec<JobId>,
    /// How many of them were running when the host died.
    pub lost: usize,
}

impl Store {
    /// Marks jobs without an end as lost. Called once, before jobs run. The first job makes the file: a host that runs none
    /// does without, and without SQLite's two megabytes of code in memory.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub async fn recover(&self) -> Result<Recovered, StoreFault> {
        if self.is_unmade() {
            return Ok(Recovered::default());
        }
        self.read(|connection| {
            let lost = connection.execute("UPDATE jobs SET state = 'lost' WHERE state IS NULL", [])?;
            let mut query = connection.prepare("SELECT id FROM jobs ORDER BY started_ms")?;
            let jobs = query.query_map([], |row| row.get(0).map(JobId::from_bytes))?;
            Ok(Recovered { jobs: jobs.collect::<Result<_, _>>()?, lost })
        })
        .await
    }

    /// A job is about to start. Its row outlives a kill of this process from when this returns, unless the disk takes
    /// longer than a second.
    pub async fn job_started(&self, job: JobSummary) {
        let expires = self.0.jobs_started.fetch_add(1, Ordering::Relaxed).is_multiple_of(EXPIRE_EVERY);
        let write = move |connection: &Connection| {
            connection
                .prepare_cached("INSERT OR IGNORE INTO jobs (id, caller, command, started_ms) VALUES (?, ?, ?, ?)")?
                .execute(params![
                    job.job.as_bytes(),
                    job.caller.as_bytes(),
                    job.command,
                    number(job.started_unix_ms)
                ])?;
            if expires { expire(connection) } else { Ok(()) }
        };
        self.write_now(write).await;
    }

    /// A job ended.
    pub fn job_ended(&self, job: JobSummary) {
        let Some(end) = job.end else { return };
        self.try_write(move |connection| {
            let (state, detail, failure) = columns(&end.state);
            connection
                .prepare_cached(
                    "UPDATE jobs SET state = ?, number = ?, failure = ?, duration_us = ?, stdout_bytes = ?, \
                     stderr_bytes = ? WHERE id = ?",
                )?
                .execute(params![
                    state,
                    detail,
                    failure,
                    i64::try_from(end.duration.as_micros()).unwrap_or(i64::MAX),
                    number(job.stdout_bytes),
                    number(job.stderr_bytes),
                    job.job.as_bytes(),
                ])
                .map(drop)
        });
    }

    /// Every job that is remembered, newest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn jobs(&self) -> Result<Vec<JobSummary>, StoreFault> {
        if self.is_unmade() {
            return Ok(Vec::new());
        }
        self.read(|connection| {
            let mut query = connection.prepare(&format!("SELECT {COLUMNS} FROM jobs ORDER BY started_ms DESC"))?;
            query.query_map([], summary)?.collect()
        })
        .await
    }

    /// One job, if it is remembered.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn job(&self, id: JobId) -> Result<Option<JobSummary>, StoreFault> {
        self.read(move |connection| {
            let mut query = connection.prepare(&format!("SELECT {COLUMNS} FROM jobs WHERE id = ?"))?;
            query.query_row([id.as_bytes()], summary).optional()
        })
        .await
    }
}

/// Lets the oldest that ended go.
fn expire(connection: &Connection) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM jobs WHERE started_ms < (SELECT started_ms FROM jobs ORDER BY started_ms DESC LIMIT 1 OFFSET ?) \
             AND state IS NOT NULL",
        )?
        .execute([JOBS_KEPT as i64 - 1])
        .map(drop)
}

fn columns(state: &EndState) -> (&'static str, Option<i32>, Option<Vec<u8>>) {
    match state {
        EndState::Exited(code) => ("exited", Some(*code), None),
        EndState::Signalled(signal) => ("signalled", Some(*signal), None),
        EndState::TimedOut => ("timed_out", None, None),
        EndState::Cancelled => ("cancelled", None, None),
        EndState::SpawnFailed(failure) => ("spawn_failed", None, Some(wire::encode(failure))),
        EndState::Lost => ("lost", None, None),
    }
}

fn summary(row: &Row<'_>) -> rusqlite::Result<JobSummary> {
    let duration = row.get::<_, Option<i64>>("duration_us")?.unwrap_or(0);
    let state = row.get::<_, Option<String>>("state")?.map(|state| end_state(&state, row)).transpose()?;
    let end = state.map(|state| JobEnd { state, duration: Duration::from_micros(count(duration)) });
    Ok(JobSummary {
        job: JobId::from_bytes(row.get("id")?),
        caller: PeerId::from_bytes(row.get("caller")?),
        command: row.get("command")?,
        started_unix_ms: count(row.get("started_ms")?),
        end,
        stdout_bytes: count(row.get("stdout_bytes")?),
        stderr_bytes: count(row.get("stderr_bytes")?),
    })
}

fn end_state(state: &str, row: &Row<'_>) -> rusqlite::Result<EndState> {
    Ok(match state {
        "exited" => EndState::Exited(row.get("number")?),
        "signalled" => EndState::Signalled(row.get("number")?),
        "timed_out" => EndState::TimedOut,
        "cancelled" => EndState::Cancelled,
        "spawn_failed" => EndState::SpawnFailed(failure(&row.get::<_, Vec<u8>>("failure")?)),
        "lost" => EndState::Lost,
        other => {
            let unknown = format!("unknown end state {other}");
            return Err(rusqlite::Error::FromSqlConversionFailure(4, Type::Text, unknown.into()));
        }
    })
}

fn failure(encoded: &[u8]) -> Failure {
    wire::decode(encoded, usize::MAX).unwrap_or_else(|_| {
        Failure::new(FailureKind::Internal, "the process could not be started; why was not kept", "try it again")
    })
}

/// A count as SQLite has numbers.
fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A number of SQLite's as a count.
fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: u64, end: Option<EndState>) -> JobSummary {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        JobSummary {
            job: JobId::from_bytes(id),
            caller: PeerId::from_bytes([7; 32]),
            command: "make all".into(),
            started_unix_ms: 1000 + number,
            end: end.map(|state| JobEnd { state, duration: Duration::from_micros(1500) }),
            stdout_bytes: 3 * number,
            stderr_bytes: number,
        }
    }

    #[tokio::test]
    async fn every_end_state_reads_back() {
        let store = Store::volatile();
        let failure = Failure::new(FailureKind::NotFound, "there is no program x", "look at its spelling");
        let states = [
            EndState::Exited(-1),
            EndState::Signalled(9),
            EndState::TimedOut,
            EndState::Cancelled,
            EndState::SpawnFailed(failure),
            EndState::Lost,
        ];
        let mut expected = Vec::new();
        for (number, state) in (0..).zip(states) {
            store.job_started(JobSummary { stdout_bytes: 0, ..job(number, None) }).await;
            store.job_ended(job(number, Some(state.clone())));
            expected.insert(0, job(number, Some(state)));
        }
        assert_eq!(store.jobs().await.unwrap(), expected);
        assert_eq!(store.job(expected[0].job).await.unwrap().as_ref(), Some(&expected[0]));
    }

    #[tokio::test]
    async fn jobs_without_an_end_are_lost_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let before = Store::at(&path);
        before.job_started(job(1, None)).await;
        before.job_started(job(2, None)).await;
        before.job_ended(job(2, Some(EndState::Exited(0))));
        before.flush().await;
        let after = Store::at(&path);
        let recovered = after.recover().await.unwrap();
        assert_eq!((recovered.jobs, recovered.lost), (vec![job(1, None).job, job(2, None).job], 1));
        let states: Vec<_> = after.jobs().await.unwrap().into_iter().map(|job| job.end.unwrap().state).collect();
        assert_eq!(states, [EndState::Exited(0), EndState::Lost]);
    }

    #[tokio::test]
    async fn the_oldest_job_gives_way_and_a_running_one_never_does() {
        let store = Store::volatile();
        store.job_started(job(0, None)).await;
        let newest = JOBS_KEPT as u64 + 2 * EXPIRE_EVERY;
        for number in 1..=newest {
            store.job_started(job(number, None)).await;
            store.job_ended(job(number, Some(EndState::Exited(0))));
            store.flush().await;
        }
        assert_eq!(store.dropped(), 0);
        let jobs = store.jobs().await.unwrap();
        assert!(jobs.len() <= JOBS_KEPT + EXPIRE_EVERY as usize, "{}", jobs.len());
        assert_eq!(jobs.last().unwrap().job, job(0, None).job);
        assert_eq!(jobs[0].job, job(newest, None).job);
    }
}
