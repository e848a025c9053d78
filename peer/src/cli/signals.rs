//! What the user wants of a running command, told by signals to this process.

use std::time::{Duration, Instant};

use peerfleet_proto::request::exec::JobSignal;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    client::exec::Wish,
    failure::{Failure, Result},
    ui::Ui,
};

/// Wishes that wait: nobody presses Ctrl-C faster than they are taken.
const WISHES_QUEUE: usize = 8;

/// Interrupts this close together are one: a program that runs us may signal both us and our process group.
const SAME_PRESS: Duration = Duration::from_millis(100);

/// Ctrl-C once interrupts the remote process group, twice ends the job, three times leaves it. SIGTERM ends it kindly.
pub(super) fn wishes(ui: Ui) -> Result<mpsc::Receiver<Wish>> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let (sender, receiver) = mpsc::channel(WISHES_QUEUE);
    tokio::spawn(async move {
        let mut presses = 0;
        let mut last: Option<Instant> = None;
        loop {
            let wish = tokio::select! {
                _ = interrupt.recv() => {
                    if last.replace(Instant::now()).is_some_and(|last| last.elapsed() < SAME_PRESS) {
                        continue;
                    }
                    presses += 1;
                    match presses {
                        1 => Wish::Signal(JobSignal::Interrupt),
                        2 => {
                            ui.note("ending the job; press Ctrl-C once more to leave without waiting");
                            Wish::Cancel
                        }
                        _ => Wish::Quit,
                    }
                }
                _ = terminate.recv() => Wish::Signal(JobSignal::Terminate),
            };
            if sender.send(wish).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Ends when the user presses Ctrl-C or the process is told to end; listens from the moment it is made.
pub(super) fn stopped() -> Result<impl Future<Output = ()>> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Failure::bug("the operating system gives no signals").cause(error))
}
