//! The SQLite file: what must outlive the process. One table per concern: [`jobs`], [`audit`].
//!
//! In: rows to write, questions. Out: answers. It never opens the file before there is something to write or to read.
//! One thread does all of it, several rows in one transaction; no caller waits for it but one that starts a job, whose
//! row is to outlive a kill, and not for longer than [`RECORD_WAIT`].
//! Unopened -> Open -> Closed; a file that cannot be opened is tried again at the next batch.
//! Bounds: [`QUEUE`] operations wait; each table names how many rows it keeps.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use rusqlite::Connection;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

pub mod audit;
pub mod jobs;

pub use jobs::JOBS_KEPT;

/// Operations that wait for the store's thread. Beyond it an audited request waits, and a job's row is lost with a
/// warning and counted: a job must not hang because a disk does. 4,096: some 2 MiB.
const QUEUE: usize = 4096;

/// Operations in one transaction.
const BATCH: usize = 1024;

/// Pause in which writes gather that nobody waits for: the ends of a burst of small jobs cost one transaction, after they
/// were answered. A write that somebody waits for, or a question, ends it.
const GATHER: Duration = Duration::from_millis(20);

/// How long the start of a job waits for its row. A commit takes a tenth of a millisecond, one that is followed by a
/// checkpoint as long as the disk needs for `fsync`; a disk that hangs must not hold up the job.
const RECORD_WAIT: Duration = Duration::from_secs(1);

/// Page cache in KiB. The tables are read a page at a time; an idle peer has 16 MiB in all.
const CACHE_KIB: i64 = 256;

/// What leads from each version of the file to the next; `user_version` counts them.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE jobs (
        id           BLOB PRIMARY KEY,
        caller       BLOB NOT NULL,
        command      TEXT NOT NULL,
        started_ms   INTEGER NOT NULL,
        state        TEXT,
        number       INTEGER,
        failure      BLOB,
        duration_us  INTEGER,
        stdout_bytes INTEGER NOT NULL DEFAULT 0,
        stderr_bytes INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE INDEX jobs_by_start ON jobs (started_ms);
    CREATE TABLE audit (
        id       INTEGER PRIMARY KEY,
        at_ms    INTEGER NOT NULL,
        peer     BLOB NOT NULL,
        instance BLOB NOT NULL,
        kind     TEXT NOT NULL,
        what     TEXT NOT NULL,
        verdict  TEXT NOT NULL,
        outcome  TEXT
    );
"];

/// Why the store did not do something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreFault {
    /// The file cannot be opened, read or written.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or SQLite says.
        cause: String,
    },
    /// A newer version of this program made the file.
    #[error("{path} was made by a newer version of peer (its version is {found}, this one knows {known})")]
    Newer {
        /// The file.
        path: PathBuf,
        /// The file's version.
        found: i64,
        /// The newest version known.
        known: i64,
    },
    /// The store's thread has ended.
    #[error("the store is closed")]
    Closed,
}

type Write = Box<dyn FnOnce(&Connection) -> rusqlite::Result<()> + Send>;
type Read = Box<dyn FnOnce(Result<&mut Connection, StoreFault>) + Send>;

enum Operation {
    /// May wait for others.
    Write(Write),
    /// Somebody waits to hear that it was committed, or that it cannot be.
    Awaited(Write, oneshot::Sender<()>),
    Read(Read),
}

/// The store's thread and the way to it.
struct Worker {
    operations: mpsc::Sender<Operation>,
    thread: Option<Thread>,
}

impl Worker {
    fn start(place: Place) -> Self {
        let (operations, queue) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new().name("store".into()).spawn(move || work(&place, queue));
        let thread = thread.map(|thread| thread.thread().clone());
        let thread =
            thread.inspect_err(|error| tracing::error!(%error, "the store has no thread: nothing is recorded"));
        Self { operations, thread: thread.ok() }
    }

    /// Ends the pause in which writes gather.
    fn hurry(&self) {
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

/// A handle on the store; clones are the same store.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    place: Place,
    worker: OnceLock<Worker>,
    dropped: AtomicU64,
    jobs_started: AtomicU64,
}

#[derive(Debug, Clone)]
enum Place {
    File(PathBuf),
    Memory,
}

impl Store {
    /// The store in that file, which is made when there is something to write. One process has it at a time.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self::new(Place::File(path.into()))
    }

    /// A store that ends with this process.
    pub fn volatile() -> Self {
        Self::new(Place::Memory)
    }

    fn new(place: Place) -> Self {
        Self(Arc::new(Inner {
            place,
            worker: OnceLock::new(),
            dropped: AtomicU64::new(0),
            jobs_started: AtomicU64::new(0),
        }))
    }

    /// Whether there is nothing that could be read, without opening the file.
    fn is_unmade(&self) -> bool {
        self.0.worker.get().is_none() && matches!(&self.0.place, Place::File(path) if !path.exists())
    }

    /// Rows that were lost because too many waited.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all that was asked for so far is in the file.
    pub async fn flush(&self) {
        if self.0.worker.get().is_some() {
            // A store that cannot be opened has nothing to flush, and said so before.
            let _ = self.read(|_| Ok(())).await;
        }
    }

    fn worker(&self) -> &Worker {
        self.0.worker.get_or_init(|| Worker::start(self.0.place.clone()))
    }

    fn try_write(&self, write: impl FnOnce(&Connection) -> rusqlite::Result<()> + Send + 'static) {
        self.try_send(Operation::Write(Box::new(write)));
    }

    /// Writes before anything else is waited for; returns when it is committed or cannot be, after [`RECORD_WAIT`] at
    /// the latest.
    async fn write_now(&self, write: impl FnOnce(&Connection) -> rusqlite::Result<()> + Send + 'static) {
        let (told, written) = oneshot::channel();
        if !self.try_send(Operation::Awaited(Box::new(write), told)) {
            return;
        }
        self.worker().hurry();
        if timeout(RECORD_WAIT, written).await.is_err() {
            tracing::warn!(waited = ?RECORD_WAIT, "the disk does not keep up: a job starts before its record is written");
        }
    }

    /// Whether there was room for it.
    fn try_send(&self, operation: Operation) -> bool {
        let sent = self.worker().operations.try_send(operation).is_ok();
        if !sent {
            let dropped = self.0.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::warn!(dropped, "the disk does not keep up: a job's record was lost");
        }
        sent
    }

    async fn write(&self, write: impl FnOnce(&Connection) -> rusqlite::Result<()> + Send + 'static) {
        if self.worker().operations.send(Operation::Write(Box::new(write))).await.is_err() {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreFault> {
        let (answer, answered) = oneshot::channel();
        let place = self.0.place.clone();
        let read: Read = Box::new(move |connection| {
            let outcome = connection.and_then(|connection| read(connection).map_err(|error| place.fault(&error)));
            // Who asked may have gone.
            let _ = answer.send(outcome);
        });
        self.worker().operations.send(Operation::Read(read)).await.map_err(|_| StoreFault::Closed)?;
        self.worker().hurry();
        answered.await.map_err(|_| StoreFault::Closed)?
    }
}

impl Place {
    fn fault(&self, cause: &dyn std::fmt::Display) -> StoreFault {
        let path = match self {
            Self::File(path) => path.clone(),
            Self::Memory => PathBuf::from(":memory:"),
        };
        StoreFault::File { path, cause: cause.to_string() }
    }

    fn open(&self) -> Result<Connection, StoreFault> {
        let fault = |error: rusqlite::Error| self.fault(&error);
        let mut connection = match self {
            Self::File(path) => {
                make_private(path).map_err(|error| self.fault(&error))?;
                Connection::open(path).map_err(fault)?
            }
            Self::Memory => Connection::open_in_memory().map_err(fault)?,
        };
        prepare(&mut connection).map_err(fault)?;
        let known = i64::try_from(MIGRATIONS.len()).expect("a handful of migrations");
        let found = migrate(&mut connection).map_err(fault)?;
        if found > known {
            return Err(StoreFault::Newer { path: PathBuf::from(connection.path().unwrap_or_default()), found, known });
        }
        Ok(connection)
    }
}

/// Makes the file if there is none, readable by its owner alone; SQLite gives the files beside it the same mode.
fn make_private(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map(drop)
}

fn prepare(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)
}

/// Brings the file to the newest version; says which version it had, or has if that is newer.
fn migrate(connection: &mut Connection) -> rusqlite::Result<i64> {
    let transaction = connection.transaction()?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let done = usize::try_from(found).unwrap_or(0);
    if done < MIGRATIONS.len() {
        for migration in &MIGRATIONS[done..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
    }
    transaction.commit()?;
    Ok(found)
}

/// The store's thread: batches until every handle is gone.
fn work(place: &Place, mut queue: mpsc::Receiver<Operation>) {
    let mut connection = None;
    let mut batch = Vec::new();
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        gather(&mut queue, &mut batch);
        perform(place, &mut connection, &mut batch);
    }
}

/// Lets more writes come as long as nobody waits.
fn gather(queue: &mut mpsc::Receiver<Operation>, batch: &mut Vec<Operation>) {
    let until = Instant::now() + GATHER;
    while batch.len() < BATCH && batch.iter().all(|operation| matches!(operation, Operation::Write(_))) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        // An `unpark` before it, whose operation was taken already, costs one more turn.
        thread::park_timeout(left);
        while batch.len() < BATCH
            && let Ok(operation) = queue.try_recv()
        {
            batch.push(operation);
        }
    }
}

/// Performs a batch in order: neighbouring writes in one transaction, each read by itself behind what came before it.
fn perform(place: &Place, connection: &mut Option<Connection>, batch: &mut Vec<Operation>) {
    if connection.is_none() {
        match place.open() {
            Ok(opened) => *connection = Some(opened),
            Err(fault) => {
                tracing::error!(%fault, lost = batch.len(), "the store cannot be opened: nothing is recorded");
                refuse(&fault, batch);
                return;
            }
        }
    }
    let connection = connection.as_mut().expect("opened above");
    let (mut writes, mut awaiting) = (Vec::new(), Vec::new());
    for operation in batch.drain(..) {
        match operation {
            Operation::Write(write) => writes.push(write),
            Operation::Awaited(write, told) => {
                writes.push(write);
                awaiting.push(told);
            }
            Operation::Read(read) => {
                commit(connection, &mut writes, &mut awaiting);
                read(Ok(connection));
            }
        }
    }
    commit(connection, &mut writes, &mut awaiting);
}

fn refuse(fault: &StoreFault, batch: &mut Vec<Operation>) {
    for operation in batch.drain(..) {
        match operation {
            // Dropping its sender tells whoever waits.
            Operation::Write(_) | Operation::Awaited(..) => {}
            Operation::Read(read) => read(Err(fault.clone())),
        }
    }
}

fn commit(connection: &mut Connection, writes: &mut Vec<Write>, awaiting: &mut Vec<oneshot::Sender<()>>) {
    if writes.is_empty() {
        return;
    }
    let outcome = connection.transaction().and_then(|transaction| {
        for write in writes.drain(..) {
            if let Err(error) = write(&transaction) {
                tracing::error!(%error, "a record could not be written");
            }
        }
        transaction.commit()
    });
    writes.clear();
    if let Err(error) = outcome {
        tracing::error!(%error, "records could not be written");
    }
    for told in awaiting.drain(..) {
        // Whoever waited may have gone on.
        let _ = told.send(());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn the_file_is_made_at_the_first_use_and_readable_by_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let store = Store::at(&path);
        store.flush().await;
        assert!(store.is_unmade());
        store.read(|_| Ok(())).await.unwrap();
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[tokio::test]
    async fn refuses_the_file_of_a_newer_version() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let fault = Store::at(&path).read(|_| Ok(())).await.unwrap_err();
        assert!(matches!(fault, StoreFault::Newer { found: 99, .. }), "{fault}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_left_alone_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        std::fs::write(&path, "something of the user's, long enough to look like a header of a database").unwrap();
        let fault = Store::at(&path).read(|_| Ok(())).await.unwrap_err();
        assert!(fault.to_string().contains("state.db"), "{fault}");
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("something"));
    }

    #[tokio::test]
    async fn one_bad_write_spoils_no_other() {
        let store = Store::volatile();
        store.write(|connection| connection.execute_batch("CREATE TABLE t (n)")).await;
        store.write(|connection| connection.execute_batch("nonsense")).await;
        store.write(|connection| connection.execute_batch("INSERT INTO t VALUES (1)")).await;
        let count: i64 = store.read(|c| c.query_row("SELECT count(*) FROM t", [], |row| row.get(0))).await.unwrap();
        assert_eq!(count, 1);
    }
}
