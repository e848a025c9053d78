//! The one host that a `HOST` argument names: its name, or the beginning of its id.
//!
//! In: the text and the hosts there are. Out: the one that is meant, or what a person needs to correct the text. A name
//! goes before an id: whoever named a host so meant that host. It never guesses between two.
//! Bounds: at most [`MAX_NEAR`] suggestions, of names within [`MAX_EDITS`] edits.

use super::{HostFacts, has_prefix};
use crate::{id::SHORTEST_PREFIX, limits::MAX_NAME_BYTES};

/// Most hosts that are suggested for a text that names none: what fits a hint.
const MAX_NEAR: usize = 3;

/// Edits (a character put in, left out or changed) up to which a name is near another: two slips of the finger.
const MAX_EDITS: usize = 2;

/// Why a text names no single host. Hosts are given as positions in the candidates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostFault {
    /// No host has that name or id.
    #[error("no host has that name or id")]
    Unknown {
        /// Hosts whose names are spelled much like it.
        near: Vec<usize>,
    },
    /// Several hosts have that name, or ids that begin so.
    #[error("several hosts have that name or id")]
    Ambiguous(Vec<usize>),
}

/// Finds the host that has this name or whose id begins so, and gives its position.
///
/// # Errors
/// [`HostFault`] if there is none, or more than one.
pub fn resolve_host(text: &str, candidates: &[HostFacts<'_>]) -> Result<usize, HostFault> {
    let named = positions(candidates, |host| host.name == text);
    let found = if named.is_empty() && text.len() >= SHORTEST_PREFIX {
        positions(candidates, |host| has_prefix(&host.peer, text))
    } else {
        named
    };
    match found.as_slice() {
        [] => Err(HostFault::Unknown { near: near(text, candidates) }),
        [one] => Ok(*one),
        [..] => Err(HostFault::Ambiguous(found)),
    }
}

fn positions(candidates: &[HostFacts<'_>], wanted: impl Fn(&HostFacts<'_>) -> bool) -> Vec<usize> {
    candidates.iter().enumerate().filter(|(_, host)| wanted(host)).map(|(index, _)| index).collect()
}

fn near(text: &str, candidates: &[HostFacts<'_>]) -> Vec<usize> {
    if text.len() > MAX_NAME_BYTES + MAX_EDITS {
        return Vec::new();
    }
    let mut near: Vec<(usize, usize)> =
        candidates.iter().enumerate().map(|(index, host)| (edits(text, host.name), index)).collect();
    near.retain(|&(edits, index)| edits <= MAX_EDITS && edits < candidates[index].name.len());
    near.sort_unstable();
    near.into_iter().take(MAX_NEAR).map(|(_, index)| index).collect()
}

/// Fewest edits, without regard to case, that make one text the other.
fn edits(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, character) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, candidate) in other.iter().enumerate() {
            let changed = diagonal + usize::from(!character.eq_ignore_ascii_case(candidate));
            diagonal = row[column + 1];
            row[column + 1] = changed.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}
