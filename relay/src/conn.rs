//! One connection: one task that reads, writes and watches its deadlines.
//!
//! In: an accepted TCP socket. Out: frames into other members' mailboxes, and what is in the own mailbox to the peer.
//! Never waits for another peer, and never looks behind a frame's header.
//! Request -> Challenge -> Joined -> Goodbye; a connection over a limit goes from Request to Goodbye.
//! Bounds: a deadline for each state, [`crate::socket`] for what is in memory, `MAX_FRAME_BYTES` for a frame; the read
//! buffer grows to at most twice a frame and stays as large as it was needed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::StreamExt;
use peerfleet_proto::{
    admission::Admission,
    id::RoomId,
    limits::{MAX_FRAME_BYTES, MAX_PRESENCE_BYTES},
    wire::{
        decode,
        relay::{ClosingReason, Join, Member, PeerFrame, PeerToRelay, RelayToPeer, control},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tracing::{debug, info};

mod member;

use member::Membership;

use crate::{
    Core,
    entropy::Entropy,
    http,
    metrics::CloseReason,
    room::Newcomer,
    rooms::Seat,
    socket::{Socket, wire},
};

/// Read buffer of an idle connection. Small, because thousands are idle; a busy one reads ahead.
const READ_BUFFER_BYTES: usize = 1024;

/// Room for what tungstenite itself says: pongs and a close, at most 131 bytes each.
const OWN_WRITES_BYTES: usize = 1024;

/// Longest control frame from a peer: a join with the largest presence, and the fixed fields around it.
const MAX_CONTROL_BYTES: usize = MAX_PRESENCE_BYTES + 256;

/// Time for the last words, and then again for the peer to close first: data that it has sent and nobody reads would
/// make the system reset the connection, and the last words would be lost.
const GOODBYE: Duration = Duration::from_secs(1);

type WebSocket = WebSocketStream<Socket>;

/// Serves a connection to its end. `refused` is set if it is over a limit.
pub(crate) async fn serve(core: Arc<Core>, stream: TcpStream, remote: SocketAddr, refused: Option<ClosingReason>) {
    // Fails only on a socket that is dead already, which the first read will tell.
    let _ = stream.set_nodelay(true);
    // Boxed each for itself, so that the state of greeting is not kept while a member idles.
    let (reason, room) = match Box::pin(greet(&core, stream, remote, refused)).await {
        Ok(membership) => {
            let room = membership.seat.room();
            (membership.run().await, Some(room))
        }
        Err(reason) => (reason, None),
    };
    core.metrics.closed(reason);
    log(reason, remote, room);
}

/// What a log says about a room: enough to tell rooms apart.
fn short(room: RoomId) -> String {
    room.to_string().chars().take(peerfleet_proto::id::SHORT_ID_CHARS).collect()
}

fn log(reason: CloseReason, remote: SocketAddr, room: Option<RoomId>) {
    let room = room.map(short).unwrap_or_default();
    match reason {
        CloseReason::Left | CloseReason::Lost | CloseReason::Answered | CloseReason::ShuttingDown => {
            debug!(%reason, %remote, room, "connection ended");
        }
        CloseReason::BadRequest
        | CloseReason::RequestTimeout
        | CloseReason::TurnedAway
        | CloseReason::BadProof
        | CloseReason::JoinTimeout
        | CloseReason::RoomFull
        | CloseReason::AddressLimit
        | CloseReason::RelayFull
        | CloseReason::Malformed
        | CloseReason::OutOfTurn
        | CloseReason::Idle
        | CloseReason::SlowReader => info!(%reason, %remote, room, "connection cut"),
    }
}

/// From the first byte to a seat in a room.
async fn greet(
    core: &Arc<Core>,
    mut stream: TcpStream,
    remote: SocketAddr,
    refused: Option<ClosingReason>,
) -> Result<Box<Membership>, CloseReason> {
    let rest = tokio::select! {
        // Whoever comes during a shutdown may still ask how the relay is.
        () = core.stopped(), if refused.is_none() => return Err(CloseReason::ShuttingDown),
        upgraded = timeout(core.config.join_timeout, upgrade(core, &mut stream)) => {
            upgraded.map_err(|_| CloseReason::RequestTimeout)??
        }
    };
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(OWN_WRITES_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES));
    let mut ws = WebSocket::from_raw_socket(Socket::new(stream, &rest), Role::Server, Some(config)).await;
    let joined = match refused {
        Some(reason) => Err(reason.into()),
        None => tokio::select! {
            () = core.stopped() => Err(CloseReason::ShuttingDown),
            joined = timeout(core.config.join_timeout, join(core, &mut ws)) => {
                joined.unwrap_or(Err(CloseReason::JoinTimeout))
            }
        },
    };
    match joined {
        Ok((seat, others)) => Ok(Membership::new(core.clone(), ws, seat, others, remote)),
        Err(reason) => {
            say_goodbye(ws, reason).await;
            Err(reason)
        }
    }
}

/// Reads the request and answers it. `Ok` if it was an upgrade, with what came behind it.
async fn upgrade(core: &Core, stream: &mut TcpStream) -> Result<Vec<u8>, CloseReason> {
    let mut bytes = Vec::with_capacity(1024);
    let (len, answer) = loop {
        if let Some(read) = http::read(&bytes) {
            break read;
        }
        let limit = (http::MAX_HEAD_BYTES - bytes.len()) as u64;
        match (&mut *stream).take(limit).read_buf(&mut bytes).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Err(CloseReason::Lost),
        }
    };
    let (response, end) = match answer {
        http::Answer::Upgrade(response) => (response, None),
        http::Answer::Health => {
            (http::health(core.rooms.is_draining(), &core.health_json()), Some(CloseReason::Answered))
        }
        http::Answer::Refuse(refusal) => (http::refusal(refusal), Some(CloseReason::BadRequest)),
    };
    stream.write_all(response.as_bytes()).await.map_err(|_| CloseReason::Lost)?;
    match end {
        None => Ok(bytes.split_off(len)),
        Some(reason) => {
            linger(stream).await;
            Err(reason)
        }
    }
}

/// Challenges the peer and seats it when its proofs hold.
async fn join(core: &Core, ws: &mut WebSocket) -> Result<(Seat, Vec<Arc<Member>>), CloseReason> {
    let (admission, challenge) = Admission::new(&mut Entropy);
    ws.get_mut().outbox().push(wire(&control(&RelayToPeer::Challenge(challenge))));
    let join = loop {
        std::future::poll_fn(|cx| ws.get_mut().poll_drain(cx)).await.map_err(|_| CloseReason::Lost)?;
        // Each poll is a turn: else one that used up its allowance would be woken for nothing, again and again.
        let next = std::future::poll_fn(|cx| {
            ws.get_mut().begin_turn();
            ws.poll_next_unpin(cx)
        });
        match next.await {
            Some(Ok(Message::Binary(frame))) => break read_join(&frame)?,
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Text(_) | Message::Frame(_))) => return Err(CloseReason::Malformed),
            Some(Ok(Message::Close(_))) | None => return Err(CloseReason::Left),
            Some(Err(fault)) => return Err(blame(&fault)),
        }
    };
    let admitted = admission.verify(&join).map_err(|_| CloseReason::BadProof)?;
    let newcomer = Newcomer { peer: admitted.peer, instance: admitted.instance, presence: join.presence };
    let seated = core.rooms.join(admitted.room, newcomer)?;
    core.metrics.joined();
    Ok(seated)
}

fn read_join(frame: &[u8]) -> Result<Join, CloseReason> {
    let PeerFrame::Control(bytes) = PeerFrame::split(frame).map_err(|_| CloseReason::Malformed)? else {
        return Err(CloseReason::OutOfTurn);
    };
    match decode(bytes, MAX_CONTROL_BYTES).map_err(|_| CloseReason::Malformed)? {
        PeerToRelay::Join(join) if join.presence.len() <= MAX_PRESENCE_BYTES => Ok(join),
        PeerToRelay::Join(_) => Err(CloseReason::Malformed),
        PeerToRelay::Presence(_) => Err(CloseReason::OutOfTurn),
    }
}

/// Whose fault a WebSocket's end is.
fn blame(fault: &tungstenite::Error) -> CloseReason {
    match fault {
        tungstenite::Error::Io(_) | tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            CloseReason::Lost
        }
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => CloseReason::Left,
        tungstenite::Error::Protocol(_)
        | tungstenite::Error::Capacity(_)
        | tungstenite::Error::Utf8(_)
        | tungstenite::Error::WriteBufferFull(_)
        | tungstenite::Error::AttackAttempt
        | tungstenite::Error::Tls(_)
        | tungstenite::Error::Url(_)
        | tungstenite::Error::Http(_)
        | tungstenite::Error::HttpFormat(_) => CloseReason::Malformed,
    }
}

/// Tells the peer why, if it is told, and closes.
async fn say_goodbye(mut ws: WebSocket, reason: CloseReason) {
    if reason == CloseReason::Lost {
        return;
    }
    let mut close = None;
    if let Some(told) = reason.told() {
        ws.get_mut().outbox().push(wire(&control(&RelayToPeer::Closing(told))));
        close = Some(CloseFrame { code: close_code(told), reason: reason.label().into() });
    }
    let farewell = async {
        // Fails only if a close was sent or received before; then that one is on its way.
        let _ = ws.close(close).await;
        std::future::poll_fn(|cx| ws.get_mut().poll_drain(cx)).await
    };
    if let Ok(Ok(())) = timeout(GOODBYE, farewell).await {
        linger(&mut ws.into_inner().into_stream()).await;
    }
}

fn close_code(reason: ClosingReason) -> CloseCode {
    match reason {
        ClosingReason::Malformed | ClosingReason::OutOfTurn => CloseCode::Protocol,
        ClosingReason::RoomFull | ClosingReason::AddressLimit | ClosingReason::RelayFull => CloseCode::Again,
        ClosingReason::ShuttingDown => CloseCode::Restart,
        ClosingReason::BadProof | ClosingReason::JoinTimeout | ClosingReason::Idle | ClosingReason::SlowReader => {
            CloseCode::Policy
        }
    }
}

/// Closes our half and waits for the peer to close its own, throwing away what it still sends.
async fn linger(stream: &mut TcpStream) {
    let until_closed = async {
        if stream.shutdown().await.is_ok() {
            let mut scrap = vec![0; 4096];
            while matches!(stream.read(&mut scrap).await, Ok(1..)) {}
        }
    };
    // Whoever does not close within the time is closed upon.
    let _ = timeout(GOODBYE, until_closed).await;
}
