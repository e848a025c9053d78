//! Files from a source to a receiver with real disks, over lanes within this process.

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test fails by panicking, and says why it is skipped")]

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use peerfleet_peer::{
    mesh::{BoxFuture, Caller, PathView, Stream},
    transfer::{LaneFault, Lanes, LocalLanes, MAX_OFFERS_PER_CALLER, Origin, ReceiveEnd, Received, Transfers},
};
use peerfleet_proto::{
    id::{InstanceId, PeerId, Ticket},
    request::{
        Failure, FailureKind, Outcome,
        transfer::{OfferSpec, Offered, PathNow, PathWish, Progress, ReceiveSpec},
    },
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt, sync::mpsc, task::JoinHandle};

const MIB: usize = 1024 * 1024;
const SOURCE: PeerId = PeerId::from_bytes([1; 32]);
const RECEIVER: PeerId = PeerId::from_bytes([2; 32]);
const OTHER: Origin = Origin::Remote(PeerId::from_bytes([3; 32]));

#[tokio::test(flavor = "multi_thread")]
async fn a_file_arrives_whole_with_its_rights_and_time_and_nothing_beside_it() {
    let world = World::new();
    let content = world.put("data.bin", 20 * MIB + 12345);
    fs::set_permissions(world.source("data.bin"), fs::Permissions::from_mode(0o4751)).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 123_456_789);
    fs::File::options().write(true).open(world.source("data.bin")).unwrap().set_modified(time).unwrap();

    let received = world.send("data.bin", &world.folder()).await.unwrap();
    assert!(fs::read(world.target("data.bin")).unwrap() == content);
    assert_eq!(received.sha256, <[u8; 32]>::from(Sha256::digest(&content)));
    assert_eq!((received.bytes, received.resumed), (content.len() as u64, 0));
    assert_eq!((received.path, received.destination), (PathNow::Direct, world.target("data.bin")));
    let found = fs::metadata(world.target("data.bin")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o751);
    assert_eq!(found.modified().unwrap(), time);
    assert_eq!(world.listing(), ["data.bin"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_arrives() {
    let world = World::new();
    world.put("empty", 0);
    world.send("empty", &world.folder()).await.unwrap();
    assert_eq!(fs::read(world.target("empty")).unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_is_a_folder_or_the_final_name() {
    let world = World::new();
    world.put("a", 10);
    for (asked, stands) in [("", "a"), ("/", "a"), ("/.", "a"), ("/b", "b"), ("/b", "b")] {
        let destination = [world.folder().as_slice(), asked.as_bytes()].concat();
        let received = world.send("a", &destination).await.unwrap();
        assert_eq!(received.destination, world.target(stands), "{asked:?}");
    }
    fs::create_dir(world.target("sub")).unwrap();
    symlink(world.target("sub"), world.target("link")).unwrap();
    let received = world.send("a", world.target("link").as_os_str().as_bytes()).await.unwrap();
    assert_eq!(received.destination, world.target("sub/a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_that_name_is_replaced_and_a_symlink_is_not_followed() {
    let world = World::new();
    let content = world.put("a", 10);
    fs::write(world.target("a"), b"old").unwrap();
    symlink(world.target("elsewhere"), world.target("link")).unwrap();
    world.send("a", &world.folder()).await.unwrap();
    world.send("a", world.target("link").as_os_str().as_bytes()).await.unwrap();
    assert_eq!(fs::read(world.target("a")).unwrap(), content);
    assert_eq!(fs::read(world.target("link")).unwrap(), content);
    assert!(!world.target("elsewhere").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_that_a_file_system_takes_arrives() {
    let world = World::new();
    let longest = vec![b'x'; 255];
    for name in [b"new\nline".as_slice(), b"\xFF\xFEnot text", b"...", b" ", b"-rf", &longest] {
        let name = OsStr::from_bytes(name);
        fs::write(world.source_dir.path().join(name), name.as_bytes()).unwrap();
        world.send(name, &world.folder()).await.unwrap();
        assert_eq!(fs::read(world.target_dir.path().join(name)).unwrap(), name.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_cannot_be_are_refused_and_leave_nothing() {
    let world = World::new();
    world.put("a", 10);
    let too_long = [b"/".as_slice(), &[b'x'; 256]].concat();
    for (asked, kind) in [
        (b"/nul\0".as_slice(), FailureKind::Invalid),
        (&too_long, FailureKind::Invalid),
        (&[b'/'; 5000], FailureKind::Invalid),
        (b"/missing/", FailureKind::NotFound),
        (b"/missing/a", FailureKind::NotFound),
        (b"/missing/../..", FailureKind::NotFound),
    ] {
        let failure = world.send("a", &[&world.folder(), asked].concat()).await.unwrap_err().failure;
        assert_eq!(failure.kind, kind, "{failure:?}");
        assert!(!failure.hint.is_empty());
    }
    let offered = world.offer("a").await.unwrap();
    for name in [b"..".as_slice(), b"", b".", b"a/b", b"x\0"] {
        let mut spec = world.spec(&offered, &world.folder());
        spec.file.name = name.to_vec();
        let failure = world.receive(spec).await.unwrap_err().failure;
        assert_eq!(failure.kind, FailureKind::Invalid, "{name:?}");
    }
    assert_eq!(world.listing(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_or_device_under_the_final_name_is_never_replaced() {
    let world = World::new();
    world.put("a", 10);
    fs::create_dir(world.target("a")).unwrap();
    let failure = world.send("a", &world.folder()).await.unwrap_err().failure;
    assert_eq!(failure.kind, FailureKind::Invalid);
    assert!(failure.what.contains("is a folder"), "{failure:?}");
    let failure = world.send("a", b"/dev/null").await.unwrap_err().failure;
    assert_eq!(failure.kind, FailureKind::Invalid);
    assert_eq!(world.listing(), ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_regular_files_are_offered() {
    let world = World::new();
    assert!(Command::new("mkfifo").arg(world.source("fifo")).status().unwrap().success());
    let folder = world.offer("").await.unwrap_err();
    assert_eq!(folder.kind, FailureKind::Invalid);
    assert!(folder.hint.contains("archive"), "{folder:?}");
    for odd in ["fifo", "/dev/null", "/proc/cpuinfo"] {
        assert_eq!(world.offer(odd).await.unwrap_err().kind, FailureKind::Invalid);
    }
    assert_eq!(world.offer("missing").await.unwrap_err().kind, FailureKind::NotFound);
    let content = world.put("real", 100);
    symlink(world.source("real"), world.source("link")).unwrap();
    world.send("link", &world.folder()).await.unwrap();
    assert_eq!(fs::read(world.target("link")).unwrap(), content);
}

#[tokio::test(flavor = "multi_thread")]
async fn others_cannot_reach_into_the_state_folder() {
    let world = World::new();
    let secret = world.state_dir.path().join("identity");
    fs::write(&secret, b"secret").unwrap();
    symlink(&secret, world.source("innocent")).unwrap();
    for path in [secret.clone(), world.source("innocent")] {
        let spec = OfferSpec { path: path.as_os_str().as_bytes().to_vec(), receiver: RECEIVER };
        assert_eq!(world.transfers.offer(OTHER, spec.clone()).await.unwrap_err().kind, FailureKind::Refused);
        assert!(world.transfers.offer(Origin::Here, spec).await.is_ok());
    }
    world.put("a", 10);
    symlink(world.state_dir.path(), world.target("way")).unwrap();
    for destination in [world.target("way"), secret.clone(), world.target("way/x")] {
        let end = world.send("a", destination.as_os_str().as_bytes()).await.unwrap_err();
        assert_eq!(end.failure.kind, FailureKind::Refused);
    }
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_good_for_its_receiver_alone() {
    let world = World::new();
    world.put("a", 10);
    let offered = world.offer("a").await.unwrap();
    let thief = Caller { peer: PeerId::from_bytes([9; 32]), instance: InstanceId::from_bytes([9; 16]) };
    let stolen = LocalLanes::new(world.transfers.clone(), thief, offered.ticket).open().await;
    let guessed = LocalLanes::new(world.transfers.clone(), receiver(), Ticket::from_bytes([0; 16])).open().await;
    let refused = |opened: Result<Stream, LaneFault>| match opened {
        Err(LaneFault::Refused(failure)) => failure,
        Err(LaneFault::Lost(why)) => panic!("{why}"),
        Ok(_) => panic!("the stream was served"),
    };
    assert_eq!(refused(stolen), refused(guessed));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_offers_too_much_loses_its_own_oldest_offer() {
    let world = World::new();
    world.put("a", 10);
    let mine = world.offer("a").await.unwrap();
    let spec = OfferSpec { path: world.source("a").as_os_str().as_bytes().to_vec(), receiver: RECEIVER };
    let greedy = Origin::Remote(PeerId::from_bytes([8; 32]));
    let first = world.transfers.offer(greedy, spec.clone()).await.unwrap();
    for _ in 0..MAX_OFFERS_PER_CALLER {
        world.transfers.offer(greedy, spec.clone()).await.unwrap();
    }
    let end = world.receive(world.spec(&first, &world.folder())).await.unwrap_err();
    assert_eq!((end.failure.kind, end.kept), (FailureKind::NotFound, false));
    assert_eq!(world.listing(), Vec::<String>::new());
    assert!(world.receive(world.spec(&mine, &world.folder())).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_lanes_are_opened_again_and_the_file_arrives() {
    let world = World::new();
    let content = world.put("big", 24 * MIB);
    let offered = world.offer("big").await.unwrap();
    let lanes = world.lanes(&offered, 9 * MIB);
    lanes.refill.store(9 * MIB as i64, Ordering::Relaxed);
    world.spawn(world.spec(&offered, &world.folder()), lanes).await.unwrap().unwrap();
    assert!(fs::read(world.target("big")).unwrap() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_ended_at_any_point_leaves_no_final_name_and_little_is_sent_again() {
    let world = World::new();
    let content = world.put("big", 32 * MIB);
    for ended_after in [1, MIB, 7 * MIB + 5, 15 * MIB, 31 * MIB] {
        let lanes = world.interrupt("big", ended_after).await;
        assert!(!world.target("big").exists());
        let before = lanes.carried.load(Ordering::Relaxed);

        let again = world.offer("big").await.unwrap();
        let lanes = world.lanes(&again, usize::MAX);
        let task = world.spawn(world.spec(&again, &world.folder()), Arc::clone(&lanes));
        let received = task.await.unwrap().unwrap();
        assert!(fs::read(world.target("big")).unwrap() == content);
        assert_eq!(world.listing(), ["big"]);
        let after = lanes.carried.load(Ordering::Relaxed);
        let twice = (before + after).saturating_sub(content.len() as u64);
        assert!(twice <= 10 * MIB as u64, "{twice} bytes were sent twice; resumed {}", received.resumed);
        fs::remove_file(world.target("big")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_a_partial_file_is_found_and_mended() {
    let world = World::new();
    let content = world.put("big", 16 * MIB);
    world.interrupt("big", 9 * MIB).await;
    let part = world.hidden(".part");
    let mut bytes = fs::read(&part).unwrap();
    bytes[100] ^= 1;
    bytes[3 * MIB] ^= 1;
    fs::write(&part, bytes).unwrap();
    let mut journal = fs::read(world.hidden(".journal")).unwrap();
    journal.extend(b"torn");
    fs::write(world.hidden(".journal"), journal).unwrap();
    let received = world.send("big", &world.folder()).await.unwrap();
    assert!(received.resumed > 0 && received.resumed <= 9 * MIB as u64, "{}", received.resumed);
    assert!(fs::read(world.target("big")).unwrap() == content);
    assert_eq!(world.listing(), ["big"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_since_the_last_try_takes_the_place_of_its_older_self() {
    let world = World::new();
    world.put("big", 16 * MIB);
    world.interrupt("big", 9 * MIB).await;
    let content = world.put("big", 15 * MIB);
    let received = world.send("big", &world.folder()).await.unwrap();
    assert_eq!(received.resumed, 0);
    assert!(fs::read(world.target("big")).unwrap() == content);
    assert_eq!(world.listing(), ["big"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_while_it_is_sent_fails_and_leaves_nothing() {
    let world = World::new();
    world.put("big", 16 * MIB);
    let offered = world.offer("big").await.unwrap();
    let lanes = world.lanes(&offered, 5 * MIB);
    let task = world.spawn(world.spec(&offered, &world.folder()), Arc::clone(&lanes));
    lanes.wait_until_spent().await;
    fs::write(world.source("big"), vec![7; 16 * MIB]).unwrap();
    lanes.refill.store(i64::MAX, Ordering::Relaxed);
    let end = task.await.unwrap().unwrap_err();
    assert_eq!((end.failure.kind, end.kept), (FailureKind::Corrupt, false));
    assert_eq!(world.listing(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_receivers_never_share_a_partial_file() {
    let world = World::new();
    world.put("big", 16 * MIB);
    let offered = world.offer("big").await.unwrap();
    let lanes = world.lanes(&offered, 5 * MIB);
    let task = world.spawn(world.spec(&offered, &world.folder()), Arc::clone(&lanes));
    lanes.wait_until_spent().await;
    let end = world.receive(world.spec(&offered, &world.folder())).await.unwrap_err();
    assert_eq!(end.failure.kind, FailureKind::Busy);
    task.abort();
    assert!(task.await.is_err());
    assert!(world.send("big", &world.folder()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_hears_of_the_end_and_its_going_ends_the_transfer() {
    let world = World::new();
    let content = world.put("big", 8 * MIB);
    let offered = world.offer("big").await.unwrap();
    let (mut near, far) = Stream::local_pair();
    let lanes = world.lanes(&offered, usize::MAX);
    let (transfers, spec) = (world.transfers.clone(), world.spec(&offered, &world.folder()));
    let serving = tokio::spawn(async move { transfers.serve_receive_over(OTHER, spec, lanes, far).await });
    assert_eq!(near.recv.read_frame::<Outcome>().await.unwrap(), Some(Outcome::Receiving));
    let mut last = None;
    while let Some(word) = near.recv.read_frame::<Progress>().await.unwrap() {
        last = Some(word);
    }
    serving.await.unwrap();
    let Some(Progress::Done { sha256, bytes, .. }) = last else { panic!("{last:?}") };
    assert_eq!((bytes, sha256), (8 * MIB as u64, Sha256::digest(&content).into()));

    fs::remove_file(world.target("big")).unwrap();
    let (mut near, far) = Stream::local_pair();
    let lanes = world.lanes(&offered, 7 * MIB);
    let (transfers, spec) = (world.transfers.clone(), world.spec(&offered, &world.folder()));
    let serving = tokio::spawn(async move { transfers.serve_receive_over(OTHER, spec, lanes, far).await });
    assert_eq!(near.recv.read_frame::<Outcome>().await.unwrap(), Some(Outcome::Receiving));
    let arrived = |word: Progress| matches!(word, Progress::Moved { bytes: 1.., .. });
    while !near.recv.read_frame().await.unwrap().is_some_and(arrived) {}
    drop(near);
    serving.await.unwrap();
    assert!(!world.target("big").exists());
    assert!(world.hidden(".part").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_noticed_at_once_and_nothing_is_left() {
    let Some(small) = Mounted::new(&["-t", "tmpfs", "-o", "size=8m", "tmpfs"]) else { return };
    let world = World::new();
    world.put("big", 16 * MIB);
    let offered = world.offer("big").await.unwrap();
    let lanes = world.lanes(&offered, usize::MAX);
    let spec = world.spec(&offered, small.path().as_os_str().as_bytes());
    let end = world.spawn(spec, Arc::clone(&lanes)).await.unwrap().unwrap_err();
    assert_eq!(end.failure.kind, FailureKind::Os);
    assert!(end.failure.hint.contains("free space"), "{end:?}");
    assert_eq!(lanes.carried.load(Ordering::Relaxed), 0);
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_meanwhile_ends_it_and_nothing_is_left() {
    let Some(small) = Mounted::new(&["-t", "tmpfs", "-o", "size=12m", "tmpfs"]) else { return };
    let world = World::new();
    world.put("big", 10 * MIB);
    let offered = world.offer("big").await.unwrap();
    let lanes = world.lanes(&offered, 3 * MIB);
    let task = world.spawn(world.spec(&offered, small.path().as_os_str().as_bytes()), Arc::clone(&lanes));
    lanes.wait_until_spent().await;
    // The write that fails has filled what was left.
    assert!(fs::write(small.path().join("other"), vec![1; 12 * MIB]).is_err());
    lanes.refill.store(i64::MAX, Ordering::Relaxed);
    let end = task.await.unwrap().unwrap_err();
    assert_eq!(end.failure.kind, FailureKind::Os);
    let left: Vec<_> = fs::read_dir(small.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_may_not_be_written_is_a_clear_failure() {
    let Some(closed) = Mounted::new(&["-t", "tmpfs", "-o", "ro", "tmpfs"]) else { return };
    let world = World::new();
    world.put("a", 10);
    let end = world.send("a", closed.path().as_os_str().as_bytes()).await.unwrap_err();
    assert_eq!(end.failure.kind, FailureKind::Os);
    assert!(end.failure.hint.contains("read-only"), "{end:?}");
}

/// A source and a receiver with a folder each; both are one `Transfers`, which changes nothing for either.
struct World {
    source_dir: TempDir,
    target_dir: TempDir,
    state_dir: TempDir,
    transfers: Transfers,
    seed: AtomicU64,
}

impl World {
    fn new() -> Self {
        let dir = || TempDir::new().unwrap();
        let state_dir = dir();
        let transfers = Transfers::new(state_dir.path());
        Self { source_dir: dir(), target_dir: dir(), state_dir, transfers, seed: AtomicU64::new(1) }
    }

    fn put(&self, name: &str, len: usize) -> Vec<u8> {
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let mut content = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut content);
        fs::write(self.source(name), &content).unwrap();
        content
    }

    fn source(&self, name: &str) -> PathBuf {
        self.source_dir.path().canonicalize().unwrap().join(name)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.target_dir.path().canonicalize().unwrap().join(name)
    }

    fn folder(&self) -> Vec<u8> {
        self.target_dir.path().as_os_str().as_bytes().to_vec()
    }

    fn listing(&self) -> Vec<String> {
        let entries = fs::read_dir(self.target_dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    fn hidden(&self, suffix: &str) -> PathBuf {
        let listing = self.listing();
        let name = listing.iter().find(|name| name.starts_with('.') && name.ends_with(suffix));
        self.target(name.unwrap_or_else(|| panic!("no {suffix} in {listing:?}")))
    }

    async fn offer(&self, name: impl AsRef<OsStr>) -> Result<Offered, Failure> {
        let path = self.source_dir.path().join(name.as_ref()).as_os_str().as_bytes().to_vec();
        self.transfers.offer(OTHER, OfferSpec { path, receiver: RECEIVER }).await
    }

    fn spec(&self, offered: &Offered, destination: &[u8]) -> ReceiveSpec {
        ReceiveSpec {
            ticket: offered.ticket,
            file: offered.file.clone(),
            source: SOURCE,
            source_instance: InstanceId::from_bytes([1; 16]),
            destination: destination.to_vec(),
            path: PathWish::Auto,
        }
    }

    fn lanes(&self, offered: &Offered, budget: usize) -> Arc<Metered> {
        let inner = LocalLanes::new(self.transfers.clone(), receiver(), offered.ticket);
        let budget = AtomicI64::new(i64::try_from(budget).unwrap_or(i64::MAX));
        let (carried, refill) = (AtomicU64::new(0), AtomicI64::new(0));
        Arc::new(Metered(Arc::new(Meter { inner, budget, refill, carried })))
    }

    async fn send(&self, name: impl AsRef<OsStr>, destination: &[u8]) -> Result<Received, ReceiveEnd> {
        let offered = self.offer(name).await.unwrap();
        self.receive(self.spec(&offered, destination)).await
    }

    async fn receive(&self, spec: ReceiveSpec) -> Result<Received, ReceiveEnd> {
        let lanes = Arc::new(LocalLanes::new(self.transfers.clone(), receiver(), spec.ticket));
        let (watcher, _progress) = mpsc::channel(1);
        self.transfers.receive(OTHER, spec, lanes, watcher).await
    }

    fn spawn(&self, spec: ReceiveSpec, lanes: Arc<Metered>) -> JoinHandle<Result<Received, ReceiveEnd>> {
        let transfers = self.transfers.clone();
        tokio::spawn(async move {
            let (watcher, _progress) = mpsc::channel(1);
            transfers.receive(OTHER, spec, lanes, watcher).await
        })
    }

    /// Receives so many bytes, then ends the receiver.
    async fn interrupt(&self, name: &str, after: usize) -> Arc<Metered> {
        let offered = self.offer(name).await.unwrap();
        let lanes = self.lanes(&offered, after);
        let task = self.spawn(self.spec(&offered, &self.folder()), Arc::clone(&lanes));
        lanes.wait_until_spent().await;
        task.abort();
        assert!(task.await.is_err());
        lanes
    }
}

fn receiver() -> Caller {
    Caller { peer: RECEIVER, instance: InstanceId::from_bytes([2; 16]) }
}

/// Lanes that carry a number of bytes in all, then break until there is more.
struct Metered(Arc<Meter>);

struct Meter {
    inner: LocalLanes,
    budget: AtomicI64,
    /// What a lane that is opened once the budget is spent sets it to.
    refill: AtomicI64,
    carried: AtomicU64,
}

impl std::ops::Deref for Metered {
    type Target = Meter;

    fn deref(&self) -> &Meter {
        &self.0
    }
}

impl Metered {
    async fn wait_until_spent(&self) {
        while self.budget.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
    }
}

impl Lanes for Metered {
    fn open(&self) -> BoxFuture<Result<Stream, LaneFault>> {
        let opened = self.inner.open();
        let meter = Arc::clone(&self.0);
        Box::pin(async move {
            if meter.budget.load(Ordering::Relaxed) <= 0 {
                let refill = meter.refill.load(Ordering::Relaxed);
                if refill == 0 {
                    return Err(LaneFault::Lost("the budget is spent".to_owned()));
                }
                meter.budget.store(refill, Ordering::Relaxed);
            }
            let source = opened.await?;
            let (near, far) = Stream::local_pair();
            tokio::spawn(meter.carry(source, far));
            Ok(near)
        })
    }

    fn path(&self) -> PathView {
        self.inner.path()
    }
}

impl Meter {
    async fn carry(self: Arc<Self>, source: Stream, receiver: Stream) {
        let (mut asks, mut to_source) = (receiver.recv, source.send);
        let (mut bytes, mut to_receiver) = (source.recv, receiver.send);
        let back = async {
            while let Ok(Some(chunk)) = bytes.read_chunk(MIB).await {
                let len = i64::try_from(chunk.len()).unwrap();
                if self.budget.fetch_sub(len, Ordering::Relaxed) < len {
                    break;
                }
                self.carried.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                if to_receiver.write_all(&chunk).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            _ = tokio::io::copy(&mut asks, &mut to_source) => {}
            () = back => {}
        }
    }
}

/// A file system of its own, for as long as the test lasts.
struct Mounted(TempDir);

impl Mounted {
    fn new(arguments: &[&str]) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let mounted = Command::new("mount").args(arguments).arg(dir.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("SKIPPED: this test mounts a file system, which needs root");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "a file system stays mounted");
    }
}
