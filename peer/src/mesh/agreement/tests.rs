//! Two books whose links are carried by a relay of two queues.

use peerfleet_proto::wire::relay::Datagram;
use tokio::{
    task::JoinHandle,
    time::{Duration, timeout},
};

use super::{
    idle::{FORGET_AFTER, UNUSED},
    *,
};

/// Longest that anything here may take.
const SOON: Duration = Duration::from_secs(10);

struct Side {
    me: Caller,
    book: Book,
    events: mpsc::Receiver<LinkEvent>,
    _notes: mpsc::Receiver<FromSocket>,
}

impl Side {
    async fn start(id: u8) -> Self {
        let me = Caller { peer: PeerId::from_bytes([id; 32]), instance: InstanceId::from_bytes([id; 16]) };
        let (note, notes) = mpsc::channel(16);
        let (tell, events) = mpsc::channel(16);
        let mut book = Book::new(me, false, Arc::new(Switch::new()), note, tell);
        book.start().await.unwrap();
        Self { me, book, events, _notes: notes }
    }

    fn slot(&self) -> Slot {
        Slot(self.me.instance.as_bytes()[0].into())
    }

    fn wants(&mut self, other: &Self) -> (LinkOffer, oneshot::Receiver<Result<LinkHandle, OpenFault>>) {
        let (reply, link) = oneshot::channel();
        let key = (other.me.instance, Route::Auto);
        let offer = self.book.want(key, other.me.peer, Some(other.slot()), reply, Instant::now());
        let (check_share, tls_key) = offer.expect("nobody wanted the link before");
        (LinkOffer { route: Route::Auto, tls_key, check_share, candidates: vec![], nat: Nat::default() }, link)
    }

    fn is_offered(&mut self, from: &Self, offer: &LinkOffer) -> LinkAnswer {
        let here = Here { candidates: vec![], nat: Nat::default(), plausible_mtu: 1452 };
        let offered = self.book.offered(from.me, Some(from.slot()), offer, here, Instant::now());
        offered.ok().expect("the offer is in order").0
    }

    async fn is_up(&mut self) {
        match timeout(SOON, self.events.recv()).await.unwrap().unwrap() {
            LinkEvent::Up { mapped, connection } => self.book.up(mapped, connection, Instant::now()).unwrap(),
            LinkEvent::Down { why, .. } => panic!("{why}"),
        };
    }

    /// The end of the link before may be told first.
    async fn is_up_again(&mut self) {
        loop {
            match timeout(SOON, self.events.recv()).await.unwrap().unwrap() {
                LinkEvent::Up { mapped, connection } => {
                    self.book.up(mapped, connection, Instant::now()).unwrap();
                    return;
                }
                LinkEvent::Down { mapped, connection, why } => {
                    assert!(self.book.down(mapped, connection, &why).is_none())
                }
            }
        }
    }

    async fn is_down(&mut self) {
        match timeout(SOON, self.events.recv()).await.unwrap().unwrap() {
            LinkEvent::Down { mapped, connection, why } => self.book.down(mapped, connection, &why).unwrap(),
            LinkEvent::Up { .. } => panic!("another link is up"),
        };
    }
}

/// Brings what one side sends to the other.
fn carry(from: &Side, to: &Side) -> JoinHandle<()> {
    let (sender, slot, receiver) = (Arc::clone(&from.book.switch), from.slot(), Arc::clone(&to.book.switch));
    tokio::spawn(async move {
        loop {
            let datagram = sender.next_for_relay().await;
            receiver.relayed(Datagram { slot, ..datagram });
        }
    })
}

async fn linked() -> (Side, Side, LinkHandle) {
    let (mut one, mut other) = (Side::start(1).await, Side::start(2).await);
    carry(&one, &other);
    carry(&other, &one);
    let (offer, link) = one.wants(&other);
    let answer = other.is_offered(&one, &offer);
    one.book.answered((other.me.instance, Route::Auto), &answer, 1452).unwrap();
    one.is_up().await;
    other.is_up().await;
    let link = link.await.unwrap().unwrap();
    (one, other, link)
}

#[tokio::test]
async fn a_link_without_streams_is_closed_and_the_other_side_learns_of_it_at_once() {
    let (mut one, mut other, link) = linked().await;
    drop(link);
    let later = Instant::now() + UNUSED + Duration::from_secs(1);
    assert_eq!(one.book.sweep(later).len(), 1);
    other.is_down().await;
    assert!(other.book.entries.is_empty());
}

#[tokio::test]
async fn a_link_with_an_open_stream_is_not_closed() {
    let (mut one, _other, link) = linked().await;
    let later = Instant::now() + UNUSED * 2;
    assert!(one.book.sweep(later).is_empty());
    drop(link);
    assert!(one.book.sweep(later + UNUSED).is_empty());
    assert_eq!(one.book.sweep(later + UNUSED * 2).len(), 1);
}

#[tokio::test]
async fn a_link_that_was_let_go_is_made_anew_for_who_still_holds_it() {
    let (mut one, mut other, link) = linked().await;
    drop(link);
    let held = other.book.get((one.me.instance, Route::Auto), Instant::now()).unwrap();
    let later = Instant::now() + UNUSED + Duration::from_secs(1);
    assert_eq!(one.book.sweep(later).len(), 1);
    // The other side opens a stream before its actor hears of the end.
    let opened = held.open(peerfleet_proto::request::Request::Jobs).await;
    assert!(matches!(opened, Err(crate::mesh::heads::Unopened::Unused)), "{opened:?}");
    let (offer, link) = other.wants(&one);
    assert_eq!(other.book.sweep(Instant::now()).len(), 1, "the link before has ended");
    let answer = one.is_offered(&other, &offer);
    other.book.answered((one.me.instance, Route::Auto), &answer, 1452).unwrap();
    one.is_up_again().await;
    other.is_up_again().await;
    link.await.unwrap().unwrap();
}

#[tokio::test]
async fn no_link_is_let_go_while_the_relay_could_not_help_to_make_another() {
    let (mut one, other, link) = linked().await;
    drop(link);
    one.book.clear_slots();
    let later = Instant::now() + UNUSED * 2;
    assert!(one.book.sweep(later).is_empty());
    one.book.set_slot(other.me.instance, Some(other.slot()));
    assert_eq!(one.book.sweep(later).len(), 1);
}

#[tokio::test]
async fn a_link_that_never_comes_up_is_forgotten_and_whoever_waits_is_told() {
    let (mut one, other) = (Side::start(1).await, Side::start(2).await);
    let (_, link) = one.wants(&other);
    assert_eq!(one.book.sweep(Instant::now() + FORGET_AFTER + Duration::from_secs(1)).len(), 1);
    assert!(matches!(link.await.unwrap(), Err(OpenFault::NoLink(_))));
}

#[tokio::test]
async fn offers_that_cross_lead_to_one_check_key() {
    let (mut one, mut other) = (Side::start(1).await, Side::start(2).await);
    let ((offer, _), (counter, _)) = (one.wants(&other), other.wants(&one));
    let answer = other.is_offered(&one, &offer);
    assert_eq!(answer.check_share, counter.check_share);
    assert_eq!(one.is_offered(&other, &counter).check_share, offer.check_share);
    assert!(one.book.answered((other.me.instance, Route::Auto), &answer, 1452).is_none());
}

#[tokio::test]
async fn an_offer_with_another_share_begins_the_link_anew() {
    let (mut one, mut other, _link) = linked().await;
    let key = (other.me.instance, Route::Auto);
    one.book.fail(key, "as if it had been lost");
    let (offer, _) = one.wants(&other);
    let answer = other.is_offered(&one, &offer);
    one.book.answered(key, &answer, 1452).unwrap();
    while one.book.get(key, Instant::now()).is_none() {
        if let LinkEvent::Up { mapped, connection } = timeout(SOON, one.events.recv()).await.unwrap().unwrap() {
            one.book.up(mapped, connection, Instant::now());
        }
    }
}

#[tokio::test]
async fn a_key_of_another_kind_is_not_agreed_on() {
    let (mut one, mut other) = (Side::start(1).await, Side::start(2).await);
    let (offer, _) = one.wants(&other);
    let offer = LinkOffer { tls_key: vec![1, 2, 3], ..offer };
    let here = Here { candidates: vec![], nat: Nat::default(), plausible_mtu: 1452 };
    assert!(other.book.offered(one.me, None, &offer, here, Instant::now()).is_err());
}
