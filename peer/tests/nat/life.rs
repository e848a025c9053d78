//! The life of a path: what befalls networks, while a large file and somebody's typing are on their way.
//!
//! In: two sites, and what happens to them. Out: the file arrived and is the same, every line came back in order, and how
//! long the longest pause was. Both hosts are 20 ms from the relay and 40 ms from each other, as [`FAR`] says.
//! Direct -> both go on -> something happens -> the typing goes on -> the file is there.
//! Bounds: [`LENIENT`], so that a busy machine fails nothing; `measure.rs` has the figures that matter.

use std::{
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use serde_json::Value;

use super::{
    KIB, MIB, Pair, arrived,
    cable::Condition,
    echo::Echo,
    file,
    lab::{Kind, Lab, Site},
    pair,
    program::{Peer, Sending},
};

/// The file.
const BYTES: usize = 256 * MIB;

/// Half of the round trip to the relay, on each site's cable. What it lets through is what the machine can do.
pub(super) const FAR: Condition = Condition { delay: Duration::from_millis(10), loss_permille: 0, megabit: None };

/// How long a bad time lasts, in lines typed: three seconds.
const BAD_TIME: usize = 60;

/// How long the file goes through the worst time, and how much of it at most.
const WORST_TIME: Duration = Duration::from_secs(20);
const WORST_BYTES: u64 = 192 * MIB as u64;

/// The least that the file's rate may be then, in megabits a second: a third of what a busy machine with two processors does, and
/// a hundred times what is left where every lost packet is taken for congestion.
const WORST_RATE: f64 = 10.0;

/// No pause may be longer, on whatever machine. What each should be is much less, see `measure.rs`.
const LENIENT: Duration = Duration::from_secs(10);

/// Two hosts with much to do.
struct Busy {
    // The programs end before the lab.
    echo: Echo,
    sending: Sending,
    one: Peer,
    other: Peer,
    sites: [Site; 2],
    lab: Lab,
    file: PathBuf,
}

impl Busy {
    /// Brings both on their way, directly.
    fn start(kinds: [Kind; 2]) -> Option<Self> {
        let lab = Lab::new()?;
        let Pair { first: (site, one), second: (site_of_other, other) } = pair(&lab, kinds[0], kinds[1]);
        let sites = [site, site_of_other];
        for (site, host) in sites.iter().zip([&one, &other]) {
            lab.set_cable(site, FAR);
            let round_trip = lab.ping_to_relay(site, host);
            assert!(round_trip >= FAR.delay * 2, "the cable is too short: {round_trip:?}");
        }
        one.sees(&other);
        let first = file(one.home(), "first", 64 * KIB);
        arrived(&one.send(&first, &other, "direct").end(), &first, &other);
        let echo = Echo::start(&one, &other);
        let file = file(one.home(), "large", BYTES);
        let sending = one.send(&file, &other, "auto");
        let busy = Self { echo, sending, one, other, sites, lab, file };
        busy.until("some came directly", "direct", 16 * MIB);
        Some(busy)
    }

    /// Waits until the file has come so far, and goes this way.
    fn until(&self, what: &str, path: &str, bytes: usize) -> u64 {
        let here =
            self.sending.until(what, |event| event["path"] == path && event["bytes"].as_u64() >= Some(bytes as u64));
        here["bytes"].as_u64().expect("a number")
    }

    /// The file's rate for so long, or until so much of it has come, in megabits a second, whichever way it goes.
    fn rate(&self, time: Duration, most: u64) -> f64 {
        let come = |event: &Value| event["bytes"].as_u64().expect("a number");
        let before = come(&self.sending.until("there is news of it", |_| true));
        let begin = Instant::now();
        let is_enough = |event: &Value| begin.elapsed() > time || come(event) >= before + most;
        let after = come(&self.sending.until("it goes on", is_enough));
        (after - before) as f64 * 8e-6 / begin.elapsed().as_secs_f64()
    }

    /// Lets something happen, and everything come to its end.
    fn survive(self, what: &str, happen: impl FnOnce(&Self)) {
        let (begin, began_at) = (Instant::now(), SystemTime::now());
        happen(&self);
        self.echo.answers(1);
        let end = Instant::now();
        let Self { echo, sending, one, other, file, lab, .. } = self;
        arrived(&sending.end(), &file, &other);
        let pause = echo.end().longest_pause(begin, end);
        let changes = one.path_changes(began_at);
        let told: Vec<_> =
            changes.iter().map(|(after, direct)| (after, if *direct { "direct" } else { "relayed" })).collect();
        eprintln!("{what}: the longest pause was {pause:.2?}; then {told:.2?}");
        drop(lab);
        assert!(pause < LENIENT, "{pause:?}");
    }
}

#[test]
fn a_nat_that_forgets_its_flows_is_not_noticed() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("flows forgotten", |busy| busy.sites.iter().for_each(|site| busy.lab.forget_flows(site)));
}

#[test]
fn a_host_whose_nat_gives_it_another_port_goes_on() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::Public]) else { return };
    busy.survive("another port, to a public host", |busy| busy.lab.rebind_udp(&busy.sites[0]));
}

#[test]
fn a_host_whose_nat_gives_it_another_port_that_the_others_nat_does_not_know_goes_on() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("another port, to a NAT", |busy| busy.lab.rebind_udp(&busy.sites[0]));
}

#[test]
fn a_host_that_roams_to_another_network_goes_on() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("roamed", |busy| {
        let began_at = SystemTime::now();
        let elsewhere = busy.lab.site_with(Kind::FullCone, "10.1.2.0/24");
        busy.lab.set_cable(&elsewhere, FAR);
        busy.lab.roam(&busy.one, &elsewhere);
        busy.echo.answers(1);
        busy.one.becomes(true, began_at);
    });
}

#[test]
fn a_host_that_roams_to_a_network_where_its_address_is_the_same_goes_on() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("roamed, to the same address", |busy| {
        let elsewhere = busy.lab.site(Kind::PortRestricted);
        busy.lab.set_cable(&elsewhere, FAR);
        busy.lab.roam(&busy.one, &elsewhere);
        busy.echo.answers(1);
    });
}

#[test]
fn udp_that_is_blocked_for_a_while_costs_a_pause() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("no UDP for a while", |busy| {
        busy.lab.cut_udp(&busy.sites[0]);
        let before = busy.until("it goes by way of the relay", "relayed", 0);
        busy.until("it goes on there", "relayed", before as usize + 1);
        let mended_at = SystemTime::now();
        busy.lab.mend_udp(&busy.sites[0]);
        eprintln!("direct {:.2?} after UDP passed again", busy.one.becomes(true, mended_at));
    });
}

#[test]
fn a_relay_that_dies_and_comes_back_is_not_noticed_on_a_direct_path() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("the relay died and came back", |busy| {
        busy.lab.kill_relay();
        busy.echo.answers(BAD_TIME / 3);
        busy.lab.start_relay();
        busy.one.sees(&busy.other);
    });
}

#[test]
fn a_twentieth_of_all_packets_may_be_lost() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("5 % lost, each way", |busy| {
        busy.lab.set_cable(&busy.sites[0], Condition { loss_permille: 50, ..FAR });
        busy.echo.answers(BAD_TIME);
        busy.lab.set_cable(&busy.sites[0], FAR);
    });
}

#[test]
fn a_way_may_become_five_times_as_long() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("200 ms there and back", |busy| {
        busy.lab.set_cable(&busy.sites[0], Condition { delay: Duration::from_millis(90), ..FAR });
        busy.echo.answers(BAD_TIME);
        busy.lab.set_cable(&busy.sites[0], FAR);
    });
}

#[test]
fn a_file_gets_through_where_a_twentieth_is_lost_on_a_long_way() {
    let Some(busy) = Busy::start([Kind::PortRestricted, Kind::PortRestricted]) else { return };
    busy.survive("5 % lost each way, 200 ms there and back", |busy| {
        let worst = Condition { delay: Duration::from_millis(90), loss_permille: 50, ..FAR };
        busy.lab.set_cable(&busy.sites[0], worst);
        let rate = busy.rate(WORST_TIME, WORST_BYTES);
        eprintln!("meanwhile the file came at {rate:.0} Mbit/s");
        assert!(rate > WORST_RATE, "{rate} Mbit/s");
        busy.lab.set_cable(&busy.sites[0], FAR);
    });
}
