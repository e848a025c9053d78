//! Somebody who types at a command of another host, and watches what comes back: the pauses that a person would feel.
//!
//! In: two hosts. Out: when each line was typed and when it came back, and whether all did, in order.
//! Typing, twenty lines a second -> no more typing, the last lines come -> the command ended.
//! Bounds: one thread types, one reads; a pause is known to [`EVERY`].

use std::{
    io::{BufRead, BufReader, Write},
    process::Child,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::program::{Peer, wait_until};

/// Time between two lines.
pub(super) const EVERY: Duration = Duration::from_millis(50);

/// A command that gives back what is typed.
pub(super) struct Echo {
    child: Child,
    stop: Arc<AtomicBool>,
    /// Lines so far.
    typed: Arc<AtomicUsize>,
    typist: Option<JoinHandle<()>>,
    reader: Option<JoinHandle<()>>,
    /// When each line came back, and what it says.
    came: Arc<Mutex<Vec<(Instant, String)>>>,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Echoed {
    came: Vec<Instant>,
}

impl Echo {
    /// Starts to type at `there`, and waits until the first line is back.
    pub(super) fn start(here: &Peer, there: &Peer) -> Self {
        let mut child = here.exec(there, &["cat"]);
        let (mut stdin, stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (stop, typed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let came = Arc::new(Mutex::new(Vec::new()));
        let (stopped, typing, coming) = (Arc::clone(&stop), Arc::clone(&typed), Arc::clone(&came));
        let typist = thread::spawn(move || {
            let begin = Instant::now();
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) || writeln!(stdin, "line {number}").is_err() {
                    return;
                }
                typing.store(number as usize + 1, Ordering::Relaxed);
                thread::sleep((begin + EVERY * (number + 1)).saturating_duration_since(Instant::now()));
            }
        });
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                coming.lock().expect("nobody panics with it").push((Instant::now(), line));
            }
        });
        let echo = Self { child, stop, typed, typist: Some(typist), reader: Some(reader), came };
        wait_until("a line came back", || (echo.count() > 0).then_some(()));
        echo
    }

    /// Waits until so many lines came back that were typed after now: the command is not cut off.
    #[track_caller]
    pub(super) fn answers(&self, lines: usize) {
        let typed = self.typed.load(Ordering::Relaxed);
        wait_until("lines come back", || (self.count() >= typed + lines).then_some(()));
    }

    /// Ends the typing. All lines must have come back, once and in order, and the command ended well.
    #[track_caller]
    pub(super) fn end(mut self) -> Echoed {
        self.stop.store(true, Ordering::Relaxed);
        self.typist.take().expect("it ends once").join().expect("it does not panic");
        let typed = self.typed.load(Ordering::Relaxed);
        let status = wait_until("the command ends", || self.child.try_wait().expect("it can be asked"));
        self.reader.take().expect("it ends once").join().expect("it does not panic");
        let came = std::mem::take(&mut *self.came.lock().expect("nobody panics with it"));
        let lines: Vec<_> = came.iter().map(|(_, line)| line.as_str()).collect();
        let first_wrong = (0..typed).zip(&lines).find(|(number, line)| format!("line {number}") != **line);
        assert_eq!((first_wrong, lines.len()), (None, typed), "{status}");
        assert!(status.success(), "{status}");
        Echoed { came: came.into_iter().map(|(at, _)| at).collect() }
    }

    fn count(&self) -> usize {
        self.came.lock().expect("nobody panics with it").len()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _gone_already = self.child.kill();
        let _gone_already = self.child.wait();
    }
}

impl Echoed {
    /// The longest time without a line, among those that ended between these moments.
    pub(super) fn longest_pause(&self, from: Instant, to: Instant) -> Duration {
        let pauses = self.came.windows(2).filter(|pair| from <= pair[1] && pair[0] <= to);
        pauses.map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }
}
