//! The line to the relay: carries out what [`peerfleet_proto::uplink`] decides, over one WebSocket after the other.
//!
//! In: connect, drop, frames to send. Out: [`LineEvent`]s. Never decides when to try again.
//! Idle -> dialling -> up -> idle.
//! Bounds: [`OUTBOUND_FRAMES`] frames wait for the WebSocket, [`INBOUND_FRAMES`] for the mesh; a goodbye takes at most
//! [`GOODBYE`].

use std::{future::pending, net::SocketAddr, sync::Arc, time::Duration};

use peerfleet_proto::wire::relay::RelayFrame;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::JoinHandle,
    time::timeout,
};

use super::{
    NotJoined,
    dial::{DialConfig, DialFault, Dialled, Proxy, RelayUrl, dial},
    socket::Switch,
    wire::{FromRelay, INBOUND_FRAMES, ToRelay, Wire, WireFault},
};

/// Frames that wait for the WebSocket to take them; further ones wait with who made them.
const OUTBOUND_FRAMES: usize = 32;

/// Time for a goodbye to the relay.
const GOODBYE: Duration = Duration::from_millis(500);

/// What happens on the line.
#[derive(Debug)]
pub(super) enum LineEvent {
    /// It stands; the relay has these addresses, the one connected to first.
    Connected(Vec<SocketAddr>),
    /// The relay sent a frame.
    Frame(RelayFrame),
    /// The relay gave a sign of life; the round trip, if it answers the last ping.
    Heard(Option<Duration>),
    /// It ended, or could not be made.
    Ended(NotJoined),
}

/// The line.
pub(super) struct Line {
    url: RelayUrl,
    config: Arc<DialConfig>,
    switch: Arc<Switch>,
    state: State,
}

enum State {
    Idle,
    Dialling(JoinHandle<Result<Dialled, DialFault>>),
    Up { outbound: mpsc::Sender<ToRelay>, inbound: mpsc::Receiver<FromRelay>, wire: JoinHandle<WireFault> },
}

impl Line {
    /// A line that is not connected.
    pub(super) fn new(url: RelayUrl, config: DialConfig, switch: Arc<Switch>) -> Self {
        Self { url, config: Arc::new(config), switch, state: State::Idle }
    }

    /// Host and port of the proxy on the way, if there is one.
    pub(super) fn proxy(&self) -> Option<String> {
        self.config.proxy.as_ref().map(Proxy::authority)
    }

    /// Starts to connect.
    pub(super) fn connect(&mut self) {
        self.cut();
        let (url, config) = (self.url.clone(), Arc::clone(&self.config));
        self.state = State::Dialling(tokio::spawn(async move { dial(&url, &config).await }));
    }

    /// Ends the connection, or the try to make one, at once.
    pub(super) fn cut(&mut self) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => {}
            State::Dialling(dialling) => dialling.abort(),
            State::Up { wire, .. } => wire.abort(),
        }
    }

    /// Sends what was handed over, says goodbye and ends.
    pub(super) async fn leave(&mut self) {
        if let State::Up { outbound, inbound, mut wire } = std::mem::replace(&mut self.state, State::Idle) {
            drop((outbound, inbound));
            if timeout(GOODBYE, &mut wire).await.is_err() {
                wire.abort();
            }
        }
    }

    /// Hands over a frame; gives it back if it must wait, and drops it if there is no connection.
    pub(super) fn send(&self, frame: ToRelay) -> Option<ToRelay> {
        let State::Up { outbound, .. } = &self.state else { return None };
        match outbound.try_send(frame) {
            Ok(()) | Err(TrySendError::Closed(_)) => None,
            Err(TrySendError::Full(frame)) => Some(frame),
        }
    }

    /// Waits until a frame can be handed over; for ever if nothing is waiting.
    pub(super) fn has_room(&self, is_waiting: bool) -> impl Future<Output = ()> + use<> {
        let outbound = match &self.state {
            State::Up { outbound, .. } => is_waiting.then(|| outbound.clone()),
            State::Idle | State::Dialling(_) => None,
        };
        async move {
            let Some(outbound) = outbound else { return pending().await };
            if outbound.reserve().await.is_err() {
                // The wire ended; the event of that follows.
                pending().await
            }
        }
    }

    /// The next event; waits for ever while the line is idle.
    pub(super) async fn next(&mut self) -> LineEvent {
        match &mut self.state {
            State::Idle => pending().await,
            State::Dialling(dialling) => {
                let dialled = dialling.await;
                self.dialled(dialled.unwrap_or(Err(DialFault::Stopped)))
            }
            State::Up { inbound, wire, .. } => match inbound.recv().await {
                Some(FromRelay::Frame(frame)) => LineEvent::Frame(frame),
                Some(FromRelay::Heard(rtt)) => LineEvent::Heard(rtt),
                None => {
                    let why = wire.await.map_or_else(|error| error.to_string(), |fault| fault.to_string());
                    self.state = State::Idle;
                    LineEvent::Ended(NotJoined::because(why))
                }
            },
        }
    }

    /// A frame that is there already.
    pub(super) fn try_next(&mut self) -> Option<LineEvent> {
        let State::Up { inbound, .. } = &mut self.state else { return None };
        match inbound.try_recv().ok()? {
            FromRelay::Frame(frame) => Some(LineEvent::Frame(frame)),
            FromRelay::Heard(rtt) => Some(LineEvent::Heard(rtt)),
        }
    }

    fn dialled(&mut self, dialled: Result<Dialled, DialFault>) -> LineEvent {
        match dialled {
            Ok(Dialled { socket, addresses }) => {
                let (outbound, frames) = mpsc::channel(OUTBOUND_FRAMES);
                let (sender, inbound) = mpsc::channel(INBOUND_FRAMES);
                let wire = Wire::new(socket, Arc::clone(&self.switch), frames, sender);
                self.state = State::Up { outbound, inbound, wire: tokio::spawn(wire.run()) };
                LineEvent::Connected(addresses)
            }
            Err(fault) => {
                self.state = State::Idle;
                LineEvent::Ended(NotJoined { cause: fault.to_string(), hint: Some(fault.hint()) })
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.cut();
    }
}
