//! What a relay that records everything could read.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use data_encoding::{BASE32_NOPAD, BASE64_NOPAD, HEXLOWER};

use super::room::{Room, digest};

#[test]
fn a_recording_relay_finds_no_secret() {
    let room = Room::named("room-qvxz-distinctive");
    let tap = Tap::before(room.relay_address);
    let one = room.peer_by(tap.address, "caller-qvxz", &["--tags", "tag-one-qvxz"]);
    let other = room.peer_by(tap.address, "worker-qvxz", &["--tags", "tag-two-qvxz", "--mode", "bypass"]);
    one.sees(&["worker-qvxz"]);

    let exec = ["exec", "worker-qvxz", "--env", "VARIABLE_QVXZ=value-qvxz", "--", "sh", "-c"];
    let script = "printf out-; echo qvxz-plain | tr a-z A-Z; : argument-qvxz";
    let ended = one.run(&[&exec[..], &[script]].concat()).expect(0);
    assert_eq!(ended.stdout, "out-QVXZ-PLAIN\n");
    let ended = one.run(&["fleet", "exec", "--target", "tag-two-qvxz", "--", "echo", "fleet-word-qvxz"]).expect(0);
    assert!(ended.stdout.contains("fleet-word-qvxz"), "{ended:?}");

    let content = "content-qvxz-0123456789\n".repeat(1 << 16);
    let source = one.home.join("source-qvxz.bin");
    fs::write(&source, &content).unwrap();
    let target = other.home.join("target-qvxz.bin");
    let place = format!("worker-qvxz:{}", target.display());
    let ended = one.run(&["send-file", source.to_str().unwrap(), &place, "--path", "relayed", "--json"]).expect(0);
    assert_eq!(ended.json().last().unwrap()["path"], "relayed");
    assert_eq!(fs::read(&target).unwrap(), content.as_bytes());

    let id = one.run(&["id"]).expect(0).stdout.trim().to_uppercase();
    let recorded = tap.recorded();
    assert!(recorded.holds(b"peerfleet.relay.v1"), "the tap saw no greeting");
    assert!(recorded.holds(&BASE32_NOPAD.decode(id.as_bytes()).unwrap()), "the tap saw no identity");
    assert!(recorded.len() > content.len(), "the tap saw no file pass");

    let token = room.token.strip_prefix("pft1-").unwrap().to_uppercase();
    let key = BASE32_NOPAD.decode(token.as_bytes()).unwrap();
    let folder = room.folder.path().to_str().unwrap().to_owned();
    let hash = digest(content.as_bytes());
    let secrets: [&[u8]; 16] = [
        room.token.as_bytes(),
        token.as_bytes(),
        &key[..32],
        room.name.as_bytes(),
        b"caller-qvxz",
        b"worker-qvxz",
        b"tag-one-qvxz",
        b"tag-two-qvxz",
        b"VARIABLE_QVXZ",
        b"value-qvxz",
        b"argument-qvxz",
        b"QVXZ-PLAIN",
        b"fleet-word-qvxz",
        b"content-qvxz-0123",
        folder.as_bytes(),
        hash.as_bytes(),
    ];
    for secret in secrets {
        recorded.lacks(secret);
    }
    for word in ["qvxz", "source-qvxz.bin", "target-qvxz.bin", "linux", "x86_64"] {
        recorded.lacks(word.as_bytes());
    }
}

#[test]
fn a_secret_in_a_masked_or_cut_frame_would_be_found() {
    let mut sent = b"GET /v1 HTTP/1.1\r\n\r\n".to_vec();
    let mask = [7, 99, 3, 250];
    for part in [&b"hun"[..], b"ter2"] {
        sent.extend([0x82, 0x80 | u8::try_from(part.len()).unwrap()]);
        sent.extend(mask);
        sent.extend(part.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    }
    assert!(!holds(&sent, b"hunter2"));
    assert!(Recorded(vec![readable(&sent)]).holds(b"hunter2"));
    assert!(std::panic::catch_unwind(|| Recorded(vec![readable(&sent)]).lacks(b"hunter2")).is_err());
}

/// A TCP proxy that keeps every byte of both directions.
struct Tap {
    address: SocketAddr,
    kept: Arc<Mutex<Vec<Direction>>>,
}

type Direction = Arc<Mutex<Vec<u8>>>;

impl Tap {
    fn before(relay: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let kept = Arc::<Mutex<Vec<Direction>>>::default();
        let keep = Arc::clone(&kept);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(relay).unwrap();
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let direction = Direction::default();
                    keep.lock().unwrap().push(Arc::clone(&direction));
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || record(from, to, &direction));
                }
            }
        });
        Self { address, kept }
    }

    fn recorded(&self) -> Recorded {
        let kept = self.kept.lock().unwrap();
        Recorded(kept.iter().map(|direction| readable(&direction.lock().unwrap())).collect())
    }
}

fn record(mut from: TcpStream, mut to: TcpStream, kept: &Mutex<Vec<u8>>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        kept.lock().unwrap().extend(&buffer[..len]);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // The other side may be gone already.
    let _ = to.shutdown(Shutdown::Write);
}

/// What passed, without frame heads and masks: one text per direction of each connection.
struct Recorded(Vec<Vec<u8>>);

impl Recorded {
    fn len(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    fn holds(&self, wanted: &[u8]) -> bool {
        self.0.iter().any(|passed| holds(passed, wanted))
    }

    fn lacks(&self, secret: &[u8]) {
        let base32 = BASE32_NOPAD.encode(secret);
        let hex = HEXLOWER.encode(secret);
        // The last character of base64 and base32 depends on what follows.
        let base64 = BASE64_NOPAD.encode(&secret[..secret.len() / 3 * 3]);
        let forms = [base32.to_lowercase(), base32[..secret.len() * 8 / 5].to_owned(), hex.to_uppercase(), hex, base64];
        let written = String::from_utf8_lossy(secret);
        assert!(!self.holds(secret), "the relay could read {written}");
        for form in forms {
            assert!(!self.holds(form.as_bytes()), "the relay could read {written} as {form}");
        }
    }
}

fn holds(text: &[u8], wanted: &[u8]) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted)
}

/// The HTTP head and the payloads behind it, unmasked and joined.
fn readable(passed: &[u8]) -> Vec<u8> {
    let Some(head) = passed.windows(4).position(|window| window == b"\r\n\r\n") else { return passed.to_vec() };
    let (head, mut rest) = passed.split_at(head + 4);
    let mut text = head.to_vec();
    while let Some((payload, behind)) = frame(rest) {
        text.extend(payload);
        rest = behind;
    }
    // Whatever is no whole frame is searched as it is.
    text.extend(rest);
    text
}

fn frame(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let (head, rest) = bytes.split_at_checked(2)?;
    let (len, rest) = match head[1] & 0x7f {
        126 => rest
            .split_at_checked(2)
            .map(|(len, rest)| (u64::from(u16::from_be_bytes(len.try_into().unwrap())), rest))?,
        127 => rest.split_at_checked(8).map(|(len, rest)| (u64::from_be_bytes(len.try_into().unwrap()), rest))?,
        len => (u64::from(len), rest),
    };
    let (mask, rest) = rest.split_at_checked(if head[1] & 0x80 == 0 { 0 } else { 4 })?;
    let (payload, rest) = rest.split_at_checked(usize::try_from(len).unwrap())?;
    let mask = if mask.is_empty() { &[0; 4] } else { mask };
    Some((payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect(), rest))
}
