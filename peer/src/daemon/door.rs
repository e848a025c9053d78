//! The local door: a Unix socket by which this machine's user reaches the daemon.
//!
//! In: connections of the daemon's own user or root; anybody else's are closed unread. Out: calls of [`Machine`].
//! The socket has mode 0600 in a folder of mode 0700. A socket left behind by a daemon that died is replaced: whoever
//! binds holds the state folder's lock, so nobody listens on it.
//! Bounds: [`MAX_CALLS`] connections at once, [`CALL_DEADLINE`] to say what is wanted; streams push back both ways.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{OpenOptionsExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};

use super::call::{Call, HOSTS_PER_REPLY, MAX_ASKED, Reply};
use crate::{
    env::Env,
    failure::{Failure, Result},
    machine::Machine,
    mesh::{
        OpenFault, Stream,
        stream::{RecvHalf, SendHalf},
    },
    state::{StateDir, private_folder},
};

/// Connections served at once; further ones wait in the kernel's queue. A fleet command takes one, an exec two.
const MAX_CALLS: usize = 256;

/// Time from connecting until the call is said: a program that is stopped in between must not hold a place for ever.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Pause after the kernel could not give us a connection (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often it is looked whether a caller that said its last word is still there: only asking tells.
const GONE_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes passed on at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Longest path that fits `sockaddr_un`, in bytes: 108 with the terminating zero on Linux, 104 on macOS.
const MAX_SOCKET_PATH_BYTES: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// The daemon's side of the socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
    state: StateDir,
}

impl Door {
    /// Opens the door of a state folder whose lock the caller holds, and notes where it is.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(state: &StateDir, env: &Env) -> Result<Self> {
        let path = state.door_socket(env);
        let failed = |error: io::Error| {
            Failure::fixable(format!("cannot open the local door {}", path.display()))
                .cause(error)
                .hint("choose another state folder with --state-dir, or another XDG_RUNTIME_DIR")
        };
        let folder = path.parent().expect("a socket's path has a folder");
        private_folder(folder, "unset XDG_RUNTIME_DIR to use the state folder")?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let (short, _folder) = short_path(&path).map_err(failed)?;
        let listener = UnixListener::bind(&short).map_err(failed)?;
        let door = Self { listener, path: path.clone(), state: state.clone() };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        state.note_door(&path)?;
        Ok(door)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves calls until the future is dropped; all calls end with it.
    pub async fn serve(&self, machine: Arc<Machine>) {
        let places = Arc::new(Semaphore::new(MAX_CALLS));
        let mut calls = JoinSet::new();
        loop {
            let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
            let socket = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = calls.join_next() => continue,
            };
            match socket {
                Ok((socket, _)) if is_trusted(&socket) => {
                    let machine = Arc::clone(&machine);
                    calls.spawn(async move {
                        let _place = place;
                        if let Err(error) = answer(socket, machine).await {
                            tracing::debug!(%error, "a call through the local door broke off");
                        }
                    });
                }
                Ok((socket, _)) => {
                    let uid = socket.peer_cred().map(|peer| peer.uid()).ok();
                    tracing::warn!(uid, "closed a connection of another user to the local door");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections to the local door");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.state.forget_door();
        let _ = fs::remove_file(&self.path);
    }
}

/// Connects to a door.
///
/// # Errors
/// Those of the socket; `NotFound` and `ConnectionRefused` mean that no daemon is there.
pub async fn connect(path: &Path) -> io::Result<Stream> {
    let (short, _folder) = short_path(path)?;
    Ok(stream_of(UnixStream::connect(short).await?))
}

fn stream_of(socket: UnixStream) -> Stream {
    let (recv, send) = socket.into_split();
    Stream { send: SendHalf::Door(send), recv: RecvHalf::Door(recv) }
}

/// A path to the same socket that fits the kernel's address: a long one goes by way of its open folder, which must
/// stay open until the path was used.
fn short_path(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if path.as_os_str().as_bytes().len() <= MAX_SOCKET_PATH_BYTES {
        return Ok((path.to_owned(), None));
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if !cfg!(target_os = "linux") {
        let why = format!("the path has more than {MAX_SOCKET_PATH_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let folder: OwnedFd =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(folder)?.into();
    let number = std::os::fd::AsRawFd::as_raw_fd(&folder);
    Ok((Path::new("/proc/self/fd").join(number.to_string()).join(name), Some(folder)))
}

/// Whether the other end is this process's own user, or root.
fn is_trusted(socket: &UnixStream) -> bool {
    let me = rustix::process::geteuid().as_raw();
    socket.peer_cred().is_ok_and(|peer| peer.uid() == me || peer.uid() == 0)
}

async fn answer(socket: UnixStream, machine: Arc<Machine>) -> io::Result<()> {
    let probe = socket.as_fd().try_clone_to_owned()?;
    let mut caller = stream_of(socket);
    let call = match tokio::time::timeout(CALL_DEADLINE, caller.recv.read_frame::<Call>()).await {
        Ok(Ok(Some(call))) => call,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            let version = env!("CARGO_PKG_VERSION").to_owned();
            return caller.send.write_frame(&Reply::NotUnderstood { version }).await;
        }
        Ok(Err(error)) => return Err(error),
        Err(_elapsed) => return Err(io::ErrorKind::TimedOut.into()),
    };
    match call {
        Call::Status => caller.send.write_frame(&Reply::Status(machine.status())).await,
        Call::Hosts => {
            for hosts in machine.hosts().chunks(HOSTS_PER_REPLY) {
                caller.send.write_frame(&Reply::Hosts(hosts.to_vec())).await?;
            }
            Ok(())
        }
        Call::Joined { timeout } => caller.send.write_frame(&Reply::Joined(machine.joined(timeout).await)).await,
        Call::SetMode(mode) => caller.send.write_frame(&Reply::ModeSet(machine.set_mode(mode))).await,
        Call::AskMany { to, request: _, deadline: _ } if to.len() > MAX_ASKED => {
            Err(io::ErrorKind::InvalidInput.into())
        }
        Call::AskMany { to, request, deadline } => {
            let progress = machine.ask_many(to, request, deadline);
            pass_progress(caller, progress).await
        }
        Call::Open { to, request, route } => {
            let opened = unless_gone(&mut caller.recv, machine.open(to, request, route)).await?;
            pass_stream(caller, probe, opened).await
        }
        Call::AskHere(request) => caller.send.write_frame(&Reply::Answered(machine.ask_here(request).await)).await,
        Call::OpenHere(request) => {
            let opened = machine.open_here(request).await;
            pass_stream(caller, probe, opened).await
        }
        Call::Report { about, fresh } => {
            let report = machine.report(about, fresh).await;
            caller.send.write_frame(&Reply::Report(Box::new(report))).await
        }
    }
}

/// Runs `work` unless the caller, which has nothing more to say, goes away.
async fn unless_gone<T>(caller: &mut RecvHalf, work: impl Future<Output = T>) -> io::Result<T> {
    let mut byte = [0];
    tokio::select! {
        done = work => Ok(done),
        _ = caller.read(&mut byte) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn pass_progress(
    mut caller: Stream,
    mut progress: tokio::sync::mpsc::Receiver<(peerfleet_proto::id::InstanceId, crate::mesh::AskProgress)>,
) -> io::Result<()> {
    let send = &mut caller.send;
    let pass = async {
        while let Some((instance, progress)) = progress.recv().await {
            send.write_frame(&Reply::Progress(instance, progress)).await?;
        }
        Ok(())
    };
    unless_gone(&mut caller.recv, pass).await?
}

async fn pass_stream(
    mut caller: Stream,
    probe: OwnedFd,
    opened: std::result::Result<(peerfleet_proto::request::Outcome, Stream), OpenFault>,
) -> io::Result<()> {
    let (outcome, mut far) = match opened {
        Ok((outcome, stream)) => (Ok(outcome), stream),
        Err(fault) => return caller.send.write_frame(&Reply::Opened(Err(fault))).await,
    };
    caller.send.write_frame(&Reply::Opened(outcome)).await?;
    let up = async {
        pass_bytes(&mut caller.recv, &mut far.send).await?;
        until_gone(&probe).await;
        Err(io::Error::from(io::ErrorKind::BrokenPipe))
    };
    tokio::select! {
        gone = up => gone,
        passed = pass_bytes(&mut far.recv, &mut caller.send) => passed,
    }
}

async fn pass_bytes(from: &mut RecvHalf, to: &mut SendHalf) -> io::Result<()> {
    while let Some(chunk) = from.read_chunk(CHUNK_BYTES).await? {
        to.write_chunk(chunk).await?;
    }
    to.finish().await
}

/// Waits until the other end closed both directions. A caller that only ended its own direction still reads.
async fn until_gone(socket: &OwnedFd) {
    while rustix::net::send(socket, &[], rustix::net::SendFlags::NOSIGNAL) != Err(rustix::io::Errno::PIPE) {
        tokio::time::sleep(GONE_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(folder: &Path) -> StateDir {
        StateDir::open(folder).expect("a state folder")
    }

    #[tokio::test]
    async fn a_socket_is_private_replaces_a_stale_one_and_goes_with_the_door() {
        let folder = tempfile::tempdir().unwrap();
        let state = state(&folder.path().join("s"));
        drop(std::os::unix::net::UnixListener::bind(state.path().join("door.sock")).unwrap());
        let door = Door::bind(&state, &Env::default()).unwrap();
        let mode = fs::metadata(door.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(state.known_door().unwrap().as_deref(), Some(door.path()));
        let path = door.path().to_owned();
        drop(door);
        assert!(!path.exists());
        assert_eq!(state.known_door().unwrap(), None);
    }

    #[tokio::test]
    async fn a_path_longer_than_the_kernels_address_works_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let state = state(&folder.path().join("x".repeat(120)));
        let door = Door::bind(&state, &Env::default()).unwrap();
        assert!(door.path().as_os_str().len() > MAX_SOCKET_PATH_BYTES);
        let (connected, accepted) = tokio::join!(connect(door.path()), door.listener.accept());
        assert!(connected.is_ok() && is_trusted(&accepted.unwrap().0));
    }

    #[tokio::test]
    async fn who_ends_only_its_own_direction_is_not_gone() {
        let (one, other) = UnixStream::pair().unwrap();
        let probe = one.as_fd().try_clone_to_owned().unwrap();
        let mut other = stream_of(other);
        other.send.finish().await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(50), until_gone(&probe)).await;
        assert!(waited.is_err());
        drop(other);
        until_gone(&probe).await;
    }
}
