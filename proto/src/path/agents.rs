//! All agents of one process: one budget of checks, and one look to find whose a datagram is.
//!
//! In: agents under keys of the caller's choice, what [`Agent`] takes, `now`. Out: the agents' datagrams and events, one wake-up
//! for all. It decides nothing about paths.
//! A check of a path that is taken goes first; the others' turns go round, one check an agent, so that a link to a host with
//! many addresses does not keep the rest waiting. What does not fit the [`Budget`] waits, and an agent that waited leaves out
//! the steps of a burst that it came too late for.
//! A request is its agent's by USERNAME, an answer by the hint in its transaction id: both are looked up, and only the agent
//! found spends a MAC on it. So a flood of what is nobody's costs one reading of the header and one look-up each.
//! Bounds: those of each agent; one entry an agent in each table. The caller bounds the number of agents.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Instant,
};

use super::{
    Agent, Budget, Event, Handled, Ignored, Transmit,
    check::Name,
    transaction::{Hint, hint_of},
};
use crate::stun::{Class, Message};

/// The agents of one process, by keys of type `K`.
///
/// After every call that takes `now` drain [`Agents::poll_transmit`] and [`Agents::poll_event`], then sleep until
/// [`Agents::poll_timeout`] and call [`Agents::handle_timeout`].
#[derive(Debug)]
pub struct Agents<K> {
    agents: BTreeMap<K, Entry>,
    names: BTreeSet<(Name, K)>,
    hints: BTreeSet<(Hint, K)>,
    budget: Budget,
    /// When each agent is to be woken.
    wakes: BTreeSet<(Instant, K)>,
    /// When the next check of each agent is due that does not wait for its turn already.
    checks: BTreeSet<(Instant, K)>,
    /// Whose turn it is to check a path that is taken, then whose it is to look for one; an agent waits once.
    pressing: VecDeque<K>,
    waiting: VecDeque<K>,
    outbox: VecDeque<Transmit>,
    events: VecDeque<(K, Event)>,
    now: Instant,
}

#[derive(Debug)]
struct Entry {
    agent: Agent,
    name: Name,
    hint: Hint,
    /// What stands in `wakes` and `checks`.
    wake: Option<Instant>,
    check: Option<Instant>,
    turn: Option<Turn>,
}

/// Which queue an agent's turn is in. One that moved on is passed over in the queue before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Pressing,
    Waiting,
}

impl<K: Ord + Clone> Agents<K> {
    /// None yet, and a full budget.
    pub fn new(now: Instant) -> Self {
        Self {
            agents: BTreeMap::new(),
            names: BTreeSet::new(),
            hints: BTreeSet::new(),
            budget: Budget::new(now),
            wakes: BTreeSet::new(),
            checks: BTreeSet::new(),
            pressing: VecDeque::new(),
            waiting: VecDeque::new(),
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            now,
        }
    }

    /// Adds an agent, in place of the one that had this key.
    pub fn insert(&mut self, key: K, mut agent: Agent, now: Instant) {
        self.remove(&key);
        agent.meter();
        let (name, hint) = (agent.codec.their_name(), agent.transactions.hint().unwrap_or_default());
        self.names.insert((name, key.clone()));
        self.hints.insert((hint, key.clone()));
        let entry = Entry { agent, name, hint, wake: None, check: None, turn: None };
        self.agents.insert(key.clone(), entry);
        self.settle(&key);
        self.serve(now);
    }

    /// Removes an agent: nothing more is sent or told of it.
    pub fn remove(&mut self, key: &K) {
        let Some(entry) = self.agents.remove(key) else { return };
        self.names.remove(&(entry.name, key.clone()));
        self.hints.remove(&(entry.hint, key.clone()));
        let Entry { mut wake, mut check, .. } = entry;
        note(&mut self.wakes, &mut wake, None, key);
        note(&mut self.checks, &mut check, None, key);
        self.pressing.retain(|waiting| waiting != key);
        self.waiting.retain(|waiting| waiting != key);
        self.events.retain(|(whose, _)| whose != key);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.agents.len()
    }

    /// An agent to look at.
    pub fn get(&self, key: &K) -> Option<&Agent> {
        self.agents.get(key).map(|entry| &entry.agent)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.agents.keys()
    }

    /// Tells one agent something, if there is one of that key; any method that takes `now`.
    pub fn tell<T>(&mut self, key: &K, now: Instant, word: impl FnOnce(&mut Agent) -> T) -> Option<T> {
        let told = word(&mut self.agents.get_mut(key)?.agent);
        self.settle(key);
        self.serve(now);
        Some(told)
    }

    /// Tells every agent something.
    pub fn tell_all(&mut self, now: Instant, mut word: impl FnMut(&K, &mut Agent)) {
        let keys: Vec<K> = self.agents.keys().cloned().collect();
        for key in keys {
            if let Some(entry) = self.agents.get_mut(&key) {
                word(&key, &mut entry.agent);
            }
            self.settle(&key);
        }
        self.serve(now);
    }

    /// Gives a datagram whose first byte says STUN to the agent that it is for, and says which one that was.
    pub fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> (Option<K>, Handled) {
        self.hand(bytes, now, |agent| agent.handle_packet(from, bytes, now))
    }

    /// Gives a check that came before its agent was added to that agent, and says which one that was.
    pub fn handle_early_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> (Option<K>, Handled) {
        self.hand(bytes, now, |agent| agent.handle_early_packet(from, bytes, now))
    }

    fn hand(
        &mut self,
        bytes: &[u8],
        now: Instant,
        mut give: impl FnMut(&mut Agent) -> Handled,
    ) -> (Option<K>, Handled) {
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(fault) => return (None, Handled::Ignored(Ignored::Malformed(fault))),
        };
        let mut handled = (None, Handled::Ignored(Ignored::NotOurs));
        for key in self.whose(&message) {
            let told = self.tell(&key, now, &mut give);
            handled = (Some(key), told.unwrap_or(handled.1));
            if handled.1 != Handled::Ignored(Ignored::NotOurs) {
                break;
            }
        }
        handled
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// What happened, and to whom.
    pub fn poll_event(&mut self) -> Option<(K, Event)> {
        self.events.pop_front()
    }

    /// When to call [`Agents::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.outbox.is_empty() || !self.events.is_empty() {
            return Some(self.now);
        }
        let first = |times: &BTreeSet<(Instant, K)>| times.first().map(|(at, _)| *at);
        let is_waiting = !(self.pressing.is_empty() && self.waiting.is_empty());
        [first(&self.wakes), first(&self.checks), is_waiting.then(|| self.budget.next().max(self.now))]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whose time has come: they may be about to judge their paths, and shall first be told what is known.
    pub fn due(&self, now: Instant) -> Vec<K> {
        self.wakes.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| key.clone()).collect()
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((_, key)) = self.wakes.first().filter(|(at, _)| *at <= now).cloned() {
            if let Some(entry) = self.agents.get_mut(&key) {
                entry.agent.handle_timeout(now);
            }
            self.settle(&key);
        }
        self.serve(now);
    }

    /// Whose a message claims to be. Two links may share a name or a hint by chance; more do not.
    fn whose(&self, message: &Message<'_>) -> Vec<K> {
        fn under<T: Copy + Ord, K: Clone + Ord>(table: &BTreeSet<(T, K)>, of: T, least: Option<&K>) -> Vec<K> {
            let Some(least) = least else { return Vec::new() };
            table
                .range((of, least.clone())..)
                .take_while(|(owner, _)| *owner == of)
                .map(|(_, key)| key.clone())
                .collect()
        }
        let least = self.agents.keys().next();
        match message.class() {
            Class::Request => {
                let name = message.username().and_then(|name| Name::try_from(name).ok());
                name.map_or_else(Vec::new, |name| under(&self.names, name, least))
            }
            Class::Success => under(&self.hints, hint_of(message.transaction()), least),
            Class::Indication | Class::Error => Vec::new(),
        }
    }

    /// Gives out what an agent wants sent and told, and writes down when it wants to be asked again.
    fn settle(&mut self, key: &K) {
        let Some(entry) = self.agents.get_mut(key) else { return };
        self.outbox.extend(std::iter::from_fn(|| entry.agent.poll_transmit()));
        self.events.extend(std::iter::from_fn(|| entry.agent.poll_event()).map(|event| (key.clone(), event)));
        let wake = entry.agent.poll_timeout();
        note(&mut self.wakes, &mut entry.wake, wake, key);
        let check = if entry.turn.is_some() { None } else { entry.agent.next_check() };
        note(&mut self.checks, &mut entry.check, check, key);
        if entry.turn == Some(Turn::Waiting) && entry.agent.is_pressing() {
            entry.turn = Some(Turn::Pressing);
            self.pressing.push_back(key.clone());
        }
    }

    /// Sends the checks that are due, as far as the budget goes.
    fn serve(&mut self, now: Instant) {
        self.now = self.now.max(now);
        while let Some((_, key)) = self.checks.first().filter(|(at, _)| *at <= now).cloned() {
            let Some(entry) = self.agents.get_mut(&key) else { break };
            note(&mut self.checks, &mut entry.check, None, &key);
            let (turn, queue) = if entry.agent.is_pressing() {
                (Turn::Pressing, &mut self.pressing)
            } else {
                (Turn::Waiting, &mut self.waiting)
            };
            entry.turn = Some(turn);
            queue.push_back(key);
        }
        while self.budget.next() <= now {
            let Some(key) = self.next_turn() else { break };
            if let Some(entry) = self.agents.get_mut(&key) {
                entry.turn = None;
                entry.agent.send_check(now);
                self.budget.take(now);
            }
            self.settle(&key);
        }
    }

    /// Whose turn it is.
    fn next_turn(&mut self) -> Option<K> {
        let is_in =
            |agents: &BTreeMap<K, Entry>, key: &K, turn| agents.get(key).is_some_and(|entry| entry.turn == Some(turn));
        while let Some(key) = self.pressing.pop_front() {
            if is_in(&self.agents, &key, Turn::Pressing) {
                return Some(key);
            }
        }
        while let Some(key) = self.waiting.pop_front() {
            if is_in(&self.agents, &key, Turn::Waiting) {
                return Some(key);
            }
        }
        None
    }
}

/// Makes `noted`, and the table that it stands in, say `at`.
fn note<K: Ord + Clone>(table: &mut BTreeSet<(Instant, K)>, noted: &mut Option<Instant>, at: Option<Instant>, key: &K) {
    if *noted == at {
        return;
    }
    if let Some(before) = noted.take() {
        table.remove(&(before, key.clone()));
    }
    if let Some(at) = at {
        table.insert((at, key.clone()));
    }
    *noted = at;
}
