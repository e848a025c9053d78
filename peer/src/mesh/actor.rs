//! The one task of an instance: it owns every machine, and carries out what they say.
//!
//! In: commands of handles, the relay's frames, what links and the socket tell, outcomes of services. Out: frames, STUN
//! packets, calls of [`Serve`], the roster. It decides nothing that a machine of the core decides.
//! Runs until every handle is gone or one shuts it down; then it says goodbye to the relay and to every link.
//! Bounds: [`BATCH`] inputs a turn, those of [`serving`]; its queues are bounded where they are made.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    exchange::{Address, Config, Exchange},
    id::{InstanceId, RequestId},
    presence::{Mode, Presence, PresenceOpener, PresenceSealer},
    request::{Outcome, Request, link::Route},
    uplink::{Credentials, Uplink},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{Id, JoinError, JoinSet},
    time::sleep_until,
};
use zeroize::Zeroizing;

use super::{
    AskFault, AskProgress, Caller, MeshConfig, NotJoined, OpenFault, Roster, Serve, UplinkState,
    agreement::{Book, Reply},
    asks::{Asks, Waiting},
    heads::LinkHandle,
    link::LinkEvent,
    path::Paths,
    roster::Members,
    socket::{FromSocket, Switch},
    surroundings::{Surroundings, Told},
    uplink::{Line, LineEvent},
    views::Views,
    wire::ToRelay,
};
use crate::random::{self, SystemRandom};

mod links;
mod report;
mod room;
mod serving;

pub(super) use report::ReportWanted;

/// Inputs handled before what came of them goes out: one turn of a busy room stays below a millisecond.
const BATCH: usize = 64;

/// How often requests that nobody waits for and links that nobody uses are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Commands that may wait.
const COMMANDS: usize = 256;

/// Notes of the socket that may wait; it drops what does not fit, as the network does.
const NOTES: usize = 256;

/// Words of links that may wait.
const LINK_EVENTS: usize = 64;

/// What handles want.
pub(super) enum Command {
    /// Ask one instance.
    Ask {
        /// Whom.
        to: InstanceId,
        /// What.
        request: Box<Request>,
        /// Time for the outcome.
        deadline: Duration,
        /// Who waits.
        reply: oneshot::Sender<Result<Outcome, AskFault>>,
    },
    /// Ask many instances the same.
    AskMany {
        /// Whom.
        to: Vec<InstanceId>,
        /// What.
        request: Box<Request>,
        /// Time for the outcomes.
        deadline: Duration,
        /// Who waits, with room for every word.
        progress: mpsc::Sender<(InstanceId, AskProgress)>,
    },
    /// Get a link.
    Link {
        /// To whom.
        to: InstanceId,
        /// How it may travel.
        route: Route,
        /// Who waits.
        reply: Reply,
    },
    /// Tell what is known of the network around.
    Report(ReportWanted),
    /// Tell the room another mode.
    SetMode(Mode),
    /// Leave.
    Shutdown(oneshot::Sender<()>),
}

/// The task's state.
pub(super) struct Actor {
    serve: Arc<dyn Serve>,
    rng: SystemRandom,
    // The room.
    uplink: Uplink,
    line: Line,
    relay: Vec<SocketAddr>,
    /// Where the system sends to the relay from.
    relay_source: Option<IpAddr>,
    line_trouble: Option<NotJoined>,
    outgoing: Option<ToRelay>,
    relay_rtt: Option<Duration>,
    wants_ping: bool,
    presence: Presence,
    sealer: PresenceSealer,
    opener: PresenceOpener,
    members: Members,
    // Messages.
    exchange: Exchange,
    asks: Asks,
    serving: JoinSet<Outcome>,
    served: HashMap<Id, (InstanceId, RequestId)>,
    // Links.
    switch: Arc<Switch>,
    book: Book,
    paths: Paths,
    streams: JoinSet<()>,
    // What comes in.
    commands: mpsc::Receiver<Command>,
    notes: mpsc::Receiver<FromSocket>,
    facts: mpsc::Receiver<Told>,
    link_events: mpsc::Receiver<LinkEvent>,
    sweep_at: Option<Instant>,
    /// When links are made ready, if something is still worked on then.
    ready_at: Option<Instant>,
}

/// What a handle needs of the actor.
pub(super) struct Contact {
    /// Takes commands.
    pub(super) commands: mpsc::Sender<Command>,
    /// Who is in the room.
    pub(super) roster: watch::Receiver<Arc<Roster>>,
    /// How links travel.
    pub(super) views: Arc<Views>,
    /// What was dropped.
    pub(super) switch: Arc<Switch>,
}

/// One thing that came in.
enum Input {
    Command(Option<Command>),
    Line(LineEvent),
    Link(LinkEvent),
    Note(FromSocket),
    Told(Told),
    Served(Result<(Id, Outcome), JoinError>),
    Accepted,
    Room,
    Time,
}

impl Actor {
    /// An instance that has not begun to connect.
    pub(super) fn new(config: MeshConfig, me: Caller, serve: Arc<dyn Serve>) -> (Self, Contact) {
        let (now, mut rng) = (Instant::now(), SystemRandom);
        let keys = &config.keys;
        let exchange = Exchange::new(
            Config {
                identity: config.identity.clone(),
                me: Address { peer: me.peer, instance: me.instance },
                room: keys.room(),
                psk: Zeroizing::new(*keys.psk()),
            },
            &mut rng,
            now,
        );
        let presence = Presence { epoch: exchange.epoch(), ..config.presence };
        let mut sealer = PresenceSealer::new(keys, me.peer, me.instance);
        let credentials = Credentials { keys: Arc::clone(keys), identity: config.identity, instance: me.instance };
        let uplink = Uplink::new(credentials, sealer.seal(&presence), now);
        let switch = Arc::new(Switch::new());
        let (note, notes) = mpsc::channel(NOTES);
        let (tell, link_events) = mpsc::channel(LINK_EVENTS);
        let book = Book::new(me, config.udp, Arc::clone(&switch), note, tell);
        let (surroundings, facts) = Surroundings::new(config.paths);
        let members = Members::new();
        let (sender, commands) = mpsc::channel(COMMANDS);
        let contact =
            Contact { commands: sender, roster: members.subscribe(), views: book.views(), switch: Arc::clone(&switch) };
        let actor = Self {
            serve,
            rng,
            uplink,
            line: Line::new(config.relay, config.dial, Arc::clone(&switch)),
            relay: Vec::new(),
            relay_source: None,
            line_trouble: None,
            outgoing: None,
            relay_rtt: None,
            wants_ping: false,
            presence,
            sealer,
            opener: PresenceOpener::new(keys),
            members,
            exchange,
            asks: Asks::default(),
            serving: JoinSet::new(),
            served: HashMap::new(),
            switch,
            book,
            paths: Paths::new(surroundings, now),
            streams: JoinSet::new(),
            commands,
            notes,
            facts,
            link_events,
            sweep_at: None,
            ready_at: None,
        };
        (actor, contact)
    }

    /// Runs until told to leave.
    pub(super) async fn run(mut self) {
        let left = loop {
            self.drain();
            let input = self.next().await;
            match self.handle(input).await {
                Flow::On => {}
                Flow::Leave(reply) => break reply,
            }
            for _ in 1..BATCH {
                let Some(input) = self.try_next() else { break };
                if let Flow::Leave(reply) = self.handle(input).await {
                    return self.leave(reply).await;
                }
            }
        };
        self.leave(left).await;
    }

    async fn leave(mut self, reply: Option<oneshot::Sender<()>>) {
        // Whoever wants something from now on is told at once that nothing left.
        self.commands.close();
        self.asks.end_all();
        self.serving.abort_all();
        // First the links, because those that are relayed say goodbye by way of the relay.
        tokio::join!(self.book.close(), self.paths.leave());
        self.line.leave().await;
        self.streams.abort_all();
        // Whoever asked for it may have stopped waiting.
        _ = reply.map(|reply| reply.send(()));
    }

    /// Waits for the next input, in the order of what matters most.
    async fn next(&mut self) -> Input {
        let due = self.poll_timeout();
        let is_waiting = self.outgoing.is_some();
        let has_room = self.line.has_room(is_waiting);
        tokio::select! {
            biased;
            // 1. What handles want, so that shutting down is never kept waiting by a busy room.
            command = self.commands.recv() => Input::Command(command),
            // 2. Links and paths: streams wait for them.
            Some(event) = self.link_events.recv() => Input::Link(event),
            Some(note) = self.notes.recv() => Input::Note(note),
            Some(told) = self.facts.recv() => Input::Told(told),
            // 3. The room.
            event = self.line.next() => Input::Line(event),
            () = has_room, if is_waiting => Input::Room,
            // 4. Services.
            Some(served) = self.serving.join_next_with_id() => Input::Served(served),
            Some(_) = self.streams.join_next() => Input::Accepted,
            () = sleep_until(due.into()) => Input::Time,
        }
    }

    /// An input that is there already.
    fn try_next(&mut self) -> Option<Input> {
        if let Ok(command) = self.commands.try_recv() {
            return Some(Input::Command(Some(command)));
        }
        if let Ok(event) = self.link_events.try_recv() {
            return Some(Input::Link(event));
        }
        if let Ok(note) = self.notes.try_recv() {
            return Some(Input::Note(note));
        }
        if let Some(event) = self.line.try_next() {
            return Some(Input::Line(event));
        }
        self.serving.try_join_next_with_id().map(Input::Served)
    }

    async fn handle(&mut self, input: Input) -> Flow {
        let now = Instant::now();
        match input {
            Input::Command(None) => return Flow::Leave(None),
            Input::Command(Some(Command::Shutdown(reply))) => return Flow::Leave(Some(reply)),
            Input::Command(Some(command)) => self.command(command, now).await,
            Input::Line(event) => self.line_event(event, now),
            Input::Link(event) => self.link_event(event, now),
            Input::Note(note) => self.paths.handle_note(note, &self.switch.routes, now),
            Input::Told(told) => self.paths.handle_told(told, now),
            Input::Served(served) => self.served(served, now),
            Input::Accepted | Input::Room => {}
            Input::Time => self.timeout(now).await,
        }
        // A request may need the links' thread, whose start is awaited: so these are not handled while draining.
        while let Some(event) = self.exchange.poll_event() {
            self.exchange_event(event, Instant::now()).await;
        }
        Flow::On
    }

    async fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Ask { to, request, deadline, reply } => self.ask(to, *request, deadline, reply, now),
            Command::AskMany { to, request, deadline, progress } => {
                self.ask_many(&to, *request, deadline, &progress, now);
            }
            Command::Link { to, route, reply } => self.want_link(to, route, reply, now).await,
            Command::Report(wanted) => self.report(wanted, now).await,
            Command::SetMode(mode) => {
                if self.presence.mode != mode {
                    self.presence.mode = mode;
                    self.publish_presence();
                }
            }
            Command::Shutdown(_) => {}
        }
    }

    fn ask(
        &mut self,
        to: InstanceId,
        request: Request,
        deadline: Duration,
        reply: oneshot::Sender<Result<Outcome, AskFault>>,
        now: Instant,
    ) {
        if let Some(link) = self.instead_of_relay(to, now) {
            let id = RequestId::from_bytes(random::bytes());
            self.streams.spawn(async move {
                // Whoever asked may have stopped waiting.
                _ = reply.send(link.ask(id, request, deadline).await);
            });
            return;
        }
        let id = self.exchange.ask(to, request, deadline, now, &mut self.rng);
        self.asks.insert(id, Waiting::One(reply));
    }

    fn ask_many(
        &mut self,
        to: &[InstanceId],
        request: Request,
        deadline: Duration,
        progress: &mpsc::Sender<(InstanceId, AskProgress)>,
        now: Instant,
    ) {
        let mut by_relay = Vec::with_capacity(to.len());
        for instance in to.iter().copied() {
            match self.instead_of_relay(instance, now) {
                Some(link) => self.ask_one_of_many(instance, link, request.clone(), deadline, progress.clone()),
                None => by_relay.push(instance),
            }
        }
        for (instance, id) in self.exchange.ask_many(&by_relay, request, deadline, now, &mut self.rng) {
            if progress.try_send((instance, AskProgress::Asked(id))).is_err() {
                tracing::trace!("nobody follows a request any more");
            }
            self.asks.insert(id, Waiting::Many(instance, progress.clone()));
        }
    }

    fn ask_one_of_many(
        &mut self,
        instance: InstanceId,
        link: LinkHandle,
        request: Request,
        deadline: Duration,
        progress: mpsc::Sender<(InstanceId, AskProgress)>,
    ) {
        let id = RequestId::from_bytes(random::bytes());
        self.streams.spawn(async move {
            // Whoever asked may have stopped following.
            _ = progress.send((instance, AskProgress::Asked(id))).await;
            let ended = link.ask(id, request, deadline).await;
            _ = progress.send((instance, AskProgress::Ended(ended))).await;
        });
    }

    /// The link that carries what would be a message: without the relay, one that travels directly.
    fn instead_of_relay(&mut self, to: InstanceId, now: Instant) -> Option<LinkHandle> {
        if self.members.uplink() == UplinkState::Joined {
            return None;
        }
        self.book.get((to, Route::Auto), now).filter(|link| *link.direct.borrow())
    }

    fn publish_presence(&mut self) {
        self.uplink.set_presence(self.sealer.seal(&self.presence));
    }

    fn poll_timeout(&self) -> Instant {
        let others = [self.paths.poll_timeout(), self.members.poll_timeout(), self.sweep_at, self.ready_at];
        let always = self.uplink.poll_timeout().min(self.exchange.poll_timeout());
        others.into_iter().flatten().fold(always, Instant::min)
    }

    async fn timeout(&mut self, now: Instant) {
        if self.uplink.poll_timeout() <= now {
            self.uplink.handle_timeout(now, &mut self.rng);
        }
        if self.exchange.poll_timeout() <= now {
            self.exchange.handle_timeout(now, &mut self.rng);
        }
        self.paths.handle_timeout(now);
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep(now);
        }
        if self.ready_at.is_some_and(|at| at <= now) {
            self.make_ready(now).await;
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.sweep_at = None;
        for id in self.asks.take_abandoned() {
            self.exchange.forget(id);
        }
        for remote in self.book.sweep(now) {
            self.link_ended(&remote, now);
        }
    }

    /// Carries out everything that the machines want, until they want nothing.
    fn drain(&mut self) {
        let now = Instant::now();
        self.drain_uplink(now);
        self.drain_paths(now);
        self.drain_frames();
        self.members.publish(&self.book, now);
        if self.sweep_at.is_none() && !(self.asks.is_empty() && self.book.is_empty()) {
            self.sweep_at = Some(now + SWEEP_EVERY);
        }
    }

    /// Hands frames over as long as the line takes them: what it does not take stays where it is made.
    fn drain_frames(&mut self) {
        loop {
            let next = self.outgoing.take().or_else(|| self.next_frame());
            let Some(frame) = next else { return };
            self.outgoing = self.line.send(frame);
            if self.outgoing.is_some() {
                return;
            }
        }
    }
}

/// Whether to go on.
enum Flow {
    On,
    Leave(Option<oneshot::Sender<()>>),
}

/// The reason that a handle is given when there is no instance of that name.
pub(super) fn unknown_instance() -> OpenFault {
    OpenFault::NoLink("it is not in the room".into())
}
