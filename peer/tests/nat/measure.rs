//! The figures of a path's life: how soon it is direct, how long a pause is, what an idle one costs.
//!
//! In: `PEERFLEET_MEASURE_RUNS`, how often each thing is done. Out: on stderr, one line a figure: median, 95th percentile and
//! how many runs. Nothing is asserted but that everything arrived. Run on an idle machine, alone, with the programs as they
//! are shipped: `just paths`. Both hosts are 20 ms from the relay and 40 ms from each other.
//! Bounds: [`RUNS`] of each figure unless told otherwise; [`IDLE`] for the cost of an idle path.

use std::{
    thread,
    time::{Duration, Instant, SystemTime},
};

use super::{
    KIB, Pair, arrived,
    echo::Echo,
    file,
    lab::{Kind, Lab, Site},
    life::FAR,
    pair,
    program::{Peer, wait_until},
};

/// Runs of each figure: the 95th percentile is the last but one.
const RUNS: usize = 20;

/// How long an idle path is watched.
const IDLE: Duration = Duration::from_secs(180);

/// Time in which whatever is to happen after an event has happened: a path that is not direct by then is not found soon.
const AFTERMATH: Duration = Duration::from_secs(12);

#[test]
#[ignore = "it measures"]
fn time_to_the_first_direct_packet() {
    for kinds in [[Kind::Public, Kind::PortRestricted], [Kind::PortRestricted, Kind::PortRestricted]] {
        let mut after_answer = Figure::new(&format!("{kinds:?}: direct after the request's answer"));
        let mut after_command = Figure::new(&format!("{kinds:?}: direct after the command began"));
        for _ in 0..runs() {
            let Some(lab) = Lab::new() else { return };
            let Pair { first: (site, one), second: (site_of_other, other) } = pair(&lab, kinds[0], kinds[1]);
            far(&lab, [(&site, &one), (&site_of_other, &other)]);
            one.sees(&other);
            let begin = SystemTime::now();
            let mut command = one.exec(&other, &["sleep", "3"]);
            let direct = one.becomes(true, begin);
            after_command.add(direct);
            // The request to run the command: its answer says that it goes on, which makes this host want a link.
            after_answer.add(direct.saturating_sub(one.got_an_answer(begin)));
            assert!(command.wait().expect("it ends").success());
        }
    }
}

#[test]
#[ignore = "it measures"]
fn pause_after_a_rebinding() {
    for other in [Kind::Public, Kind::PortRestricted] {
        pauses(&format!("another port, to {other:?}"), [Kind::PortRestricted, other], |typing| {
            typing.lab.rebind_udp(&typing.sites[0]);
        });
    }
}

#[test]
#[ignore = "it measures"]
fn pause_after_roaming() {
    for network in ["10.1.2.0/24", "192.168.1.0/24"] {
        pauses(&format!("roamed to {network}"), [Kind::PortRestricted, Kind::PortRestricted], |typing| {
            typing.lab.roam(&typing.one, &typing.elsewhere(network));
        });
    }
}

#[test]
#[ignore = "it measures"]
fn pause_after_udp_is_blocked() {
    pauses("no UDP any more", [Kind::PortRestricted, Kind::PortRestricted], |typing| {
        typing.lab.cut_udp(&typing.sites[0]);
    });
    pauses("UDP is lost on its way", [Kind::Public, Kind::PortRestricted], |typing| {
        typing.lab.cut_udp(&typing.sites[1]);
    });
}

#[test]
#[ignore = "it measures"]
fn cost_of_an_idle_path() {
    let Some(lab) = Lab::new() else { return };
    let Pair { first: (_, one), second: (_, other) } = pair(&lab, Kind::PortRestricted, Kind::PortRestricted);
    one.sees(&other);
    // A path of each is kept by a command that does nothing.
    let mut command = one.exec(&other, &["sleep", "3600"]);
    one.becomes(true, SystemTime::now() - AFTERMATH);
    thread::sleep(AFTERMATH);
    let (begin, before) = (Instant::now(), one.traffic());
    let (cpu, cpu_of_other) = (one.cpu(), other.cpu());
    thread::sleep(IDLE);
    let hours = begin.elapsed().as_secs_f64() / 3600.0;
    let traffic = one.traffic();
    let per_hour = |now: u64, before: u64| (now - before) as f64 / hours;
    eprintln!(
        "an idle path: {:.0} UDP datagrams an hour sent and {:.0} received; {:.0} bytes an hour sent and {:.0} received on \
         the interface, the relay's connection included; {:.2} and {:.2} s of CPU an hour",
        per_hour(traffic.datagrams_out, before.datagrams_out),
        per_hour(traffic.datagrams_in, before.datagrams_in),
        per_hour(traffic.bytes_out, before.bytes_out),
        per_hour(traffic.bytes_in, before.bytes_in),
        (one.cpu() - cpu).as_secs_f64() / hours,
        (other.cpu() - cpu_of_other).as_secs_f64() / hours,
    );
    let _gone_already = command.kill();
    let _gone_already = command.wait();
}

/// Two hosts, and somebody who types.
struct Typing {
    echo: Echo,
    one: Peer,
    other: Peer,
    sites: [Site; 2],
    lab: Lab,
}

impl Typing {
    fn start(kinds: [Kind; 2]) -> Option<Self> {
        let lab = Lab::new()?;
        let Pair { first: (site, one), second: (site_of_other, other) } = pair(&lab, kinds[0], kinds[1]);
        far(&lab, [(&site, &one), (&site_of_other, &other)]);
        one.sees(&other);
        let first = file(one.home(), "first", 64 * KIB);
        arrived(&one.send(&first, &other, "direct").end(), &first, &other);
        let echo = Echo::start(&one, &other);
        Some(Self { echo, one, other, sites: [site, site_of_other], lab })
    }

    /// Another home, as far away.
    fn elsewhere(&self, network: &str) -> Site {
        let site = self.lab.site_with(Kind::PortRestricted, network);
        self.lab.set_cable(&site, FAR);
        site
    }
}

/// Measures the pause of the typing after something happened, and when packets travelled by which way.
fn pauses(what: &str, kinds: [Kind; 2], happen: impl Fn(&Typing)) {
    let mut pause = Figure::new(&format!("{what}: longest pause"));
    let mut relayed = Figure::new(&format!("{what}: by way of the relay after"));
    let mut direct = Figure::new(&format!("{what}: direct again after"));
    for _ in 0..runs() {
        let Some(typing) = Typing::start(kinds) else { return };
        let (begin, began_at) = (Instant::now(), SystemTime::now());
        happen(&typing);
        typing.echo.answers(1);
        let settled = || {
            let is_direct = typing.one.path_changes(began_at).last().is_none_or(|(_, direct)| *direct);
            (is_direct && begin.elapsed() > AFTERMATH / 4 || begin.elapsed() > AFTERMATH).then_some(())
        };
        wait_until("what is to happen has happened", settled);
        let end = Instant::now();
        let Typing { echo, one, other, lab, .. } = typing;
        pause.add(echo.end().longest_pause(begin, end));
        let changes = one.path_changes(began_at);
        for (figure, wanted) in [(&mut relayed, false), (&mut direct, true)] {
            if let Some((after, _)) = changes.iter().find(|(_, is_direct)| *is_direct == wanted) {
                figure.add(*after);
            }
        }
        drop((one, other, lab));
    }
}

/// Moves both hosts away from each other, and makes sure that they are.
fn far(lab: &Lab, hosts: [(&Site, &Peer); 2]) {
    for (site, host) in hosts {
        lab.set_cable(site, FAR);
        let wanted = FAR.delay * 2;
        wait_until("the relay is as far as it should be", || {
            let round_trip = lab.ping_to_relay(site, host);
            assert!(round_trip >= wanted, "the cable is too short: {round_trip:?}");
            (round_trip < wanted * 3 / 2).then_some(())
        });
    }
}

fn runs() -> usize {
    let told = std::env::var("PEERFLEET_MEASURE_RUNS").ok();
    told.map_or(RUNS, |runs| runs.parse().expect("PEERFLEET_MEASURE_RUNS is a number"))
}

/// What is measured several times. Tells of itself when it ends.
struct Figure {
    what: String,
    values: Vec<Duration>,
}

impl Figure {
    fn new(what: &str) -> Self {
        Self { what: what.to_owned(), values: Vec::new() }
    }

    fn add(&mut self, value: Duration) {
        self.values.push(value);
    }
}

impl Drop for Figure {
    fn drop(&mut self) {
        self.values.sort_unstable();
        let count = self.values.len();
        let at = |percent: usize| self.values.get((count * percent).div_ceil(100).saturating_sub(1));
        match (at(50), at(95)) {
            (Some(median), Some(high)) => {
                eprintln!("{}: median {median:.2?}, 95 % within {high:.2?}, {count} runs", self.what);
            }
            (None, _) | (_, None) => eprintln!("{}: never", self.what),
        }
    }
}
