//! Where the output of a followed job goes: to our own streams as the bytes they are, or to JSON events.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use data_encoding::BASE64;
use peerfleet_proto::id::JobId;
use serde_json::{Value, json};

use crate::{
    client::exec::{Output, Which},
    failure::{Failure, Kind},
    machine::Host,
    mesh::BoxFuture,
    ui::{self, Ui},
};

/// Pause before writing again to a stream that somebody else made non-blocking.
const FULL_PAUSE: Duration = Duration::from_millis(5);

/// Our own standard output and error.
pub(super) struct Raw {
    ui: Ui,
    stdout: Arc<File>,
    stderr: Arc<File>,
}

impl Raw {
    /// Past the standard library's line buffer: bytes appear when they come.
    pub(super) fn new(ui: Ui) -> Result<Self, Failure> {
        let own = |stream: io::Result<std::os::fd::OwnedFd>| {
            stream
                .map(|fd| Arc::new(File::from(fd)))
                .map_err(|error| Failure::fixable("cannot write output").cause(error))
        };
        let stdout = own(io::stdout().as_fd().try_clone_to_owned())?;
        let stderr = own(io::stderr().as_fd().try_clone_to_owned())?;
        Ok(Self { ui, stdout, stderr })
    }
}

impl Output for Raw {
    fn started(&mut self, job: JobId) -> io::Result<()> {
        self.ui.detail(&format!("job {job}"));
        Ok(())
    }

    fn write(&mut self, which: Which, bytes: Vec<u8>) -> BoxFuture<io::Result<()>> {
        let stream = Arc::clone(match which {
            Which::Stdout => &self.stdout,
            Which::Stderr => &self.stderr,
        });
        Box::pin(async move {
            tokio::task::spawn_blocking(move || write_all(&stream, &bytes))
                .await
                .unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
        })
    }

    fn gap(&mut self, which: Which, bytes: u64) {
        let name = name(which);
        let lost = ui::human_bytes(bytes);
        self.ui.warn(&format!("{lost} of {name} are missing here: the host keeps only the newest output"));
    }
}

/// One JSON line for each piece.
pub(super) struct Events {
    ui: Ui,
    id: String,
    name: String,
}

impl Events {
    pub(super) fn new(ui: Ui, host: &Host) -> Self {
        Self { ui, id: host.peer.to_string(), name: host.name().to_owned() }
    }

    fn say(&self, value: &Value) -> io::Result<()> {
        self.ui.json_line(value).map_err(|failure| match failure.kind {
            Kind::BrokenPipe => io::ErrorKind::BrokenPipe.into(),
            Kind::Fixable | Kind::Usage | Kind::Unreachable | Kind::Refused | Kind::Bug => io::Error::other(failure),
        })
    }
}

impl Output for Events {
    fn started(&mut self, job: JobId) -> io::Result<()> {
        self.say(&json!({ "event": "started", "job": job.to_string(), "id": self.id, "name": self.name }))
    }

    fn write(&mut self, which: Which, bytes: Vec<u8>) -> BoxFuture<io::Result<()>> {
        let said = self.say(&json!({ "event": name(which), "data_b64": BASE64.encode(&bytes) }));
        Box::pin(std::future::ready(said))
    }

    fn gap(&mut self, which: Which, bytes: u64) {
        // A reader that went away shows at the next piece.
        let _ = self.say(&json!({ "event": "gap", "stream": name(which), "bytes": bytes }));
    }
}

fn name(which: Which) -> &'static str {
    match which {
        Which::Stdout => "stdout",
        Which::Stderr => "stderr",
    }
}

fn write_all(mut stream: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => bytes = &bytes[len..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(FULL_PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
