//! Which links' other sides are to be told once more where we are, though that is no news.
//!
//! In: links whose path was lost, or whose other side is back in the room. Out: the same links, each when it may be told.
//! Never answers word of the other side's: that alone would go to and fro for ever.
//! Wanted -> told, and not again within [`PAUSE`].
//! Bounds: one entry per link.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Least time between two tellings of one link: a path that is lost again and again shall not flood the relay.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

/// What is to be told, and what was.
#[derive(Debug, Default)]
pub(super) struct News {
    /// When each may be told.
    wanted: BTreeMap<SocketAddr, Instant>,
    /// When each was told.
    told: BTreeMap<SocketAddr, Instant>,
}

impl News {
    /// The other side of this link shall be told.
    pub(super) fn want(&mut self, link: SocketAddr, now: Instant) {
        let at = self.told.get(&link).map_or(now, |told| (*told + PAUSE).max(now));
        self.wanted.entry(link).or_insert(at);
    }

    /// All other sides are told now.
    pub(super) fn told(&mut self, links: impl Iterator<Item = SocketAddr>, now: Instant) {
        self.wanted.clear();
        self.told = links.map(|link| (link, now)).collect();
    }

    /// A link ended.
    pub(super) fn remove(&mut self, link: &SocketAddr) {
        self.wanted.remove(link);
        self.told.remove(link);
    }

    /// A link to tell now, which counts as told.
    pub(super) fn next(&mut self, now: Instant) -> Option<SocketAddr> {
        let link = self.wanted.iter().find(|(_, at)| **at <= now).map(|(link, _)| *link)?;
        self.wanted.remove(&link);
        self.told.insert(link, now);
        Some(link)
    }

    /// When the next may be told.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.wanted.values().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(number: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], number))
    }

    #[test]
    fn a_link_is_told_at_once_and_not_again_within_a_second() {
        let (mut news, now) = (News::default(), Instant::now());
        for _ in 0..3 {
            news.want(link(1), now);
        }
        assert_eq!((news.poll_timeout(), news.next(now), news.next(now)), (Some(now), Some(link(1)), None));
        news.want(link(1), now + PAUSE / 2);
        assert_eq!((news.next(now + PAUSE / 2), news.poll_timeout()), (None, Some(now + PAUSE)));
        assert_eq!(news.next(now + PAUSE), Some(link(1)));
    }

    #[test]
    fn what_all_were_told_is_not_told_one_of_them_besides() {
        let (mut news, now) = (News::default(), Instant::now());
        news.want(link(1), now);
        news.told([link(1), link(2)].into_iter(), now);
        assert_eq!(news.next(now + PAUSE), None);
        news.want(link(2), now);
        assert_eq!(news.poll_timeout(), Some(now + PAUSE));
    }

    #[test]
    fn nothing_is_kept_of_a_link_that_ended() {
        let (mut news, now) = (News::default(), Instant::now());
        news.told([link(1)].into_iter(), now);
        news.want(link(1), now);
        news.remove(&link(1));
        assert!(news.wanted.is_empty() && news.told.is_empty());
    }
}
