//! The real `peer` program on its way out through a proxy and TLS, as a person sets it up.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use data_encoding::BASE64;
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

use super::{Authority, DEADLINE, Manner, Server, Span, TestRelay};

/// The proxy's user and password, as it wants them and as a URL writes them.
const CREDENTIALS: &str = "proxy-user-qvxz:p@ss-qvxz/w:rd";
const IN_URL: &str = "proxy-user-qvxz:p%40ss-qvxz%2Fw%3Ard";

/// The way: a proxy that wants credentials, an end of TLS that takes a path off, a relay.
struct Way {
    _relay: TestRelay,
    front: Server,
    proxy: Server,
    folder: tempfile::TempDir,
    token: String,
}

impl Way {
    async fn new() -> Self {
        let (relay, authority) = (TestRelay::start(), Authority::new());
        let front = authority.server(&["relay.invalid"], Span::Now);
        let front = Server::tls(front, Manner::Strip("/fleet", relay.address)).await;
        let proxy = Server::plain(Manner::Tunnel(Some(CREDENTIALS), front.address)).await;
        let folder = tempfile::tempdir().unwrap();
        let bundle = format!("Those trusted here:\n{}\n# and\n{}", Authority::named("another").pem, authority.pem);
        fs::write(folder.path().join("ca.pem"), bundle).unwrap();
        let token = Command::new(env!("CARGO_BIN_EXE_peer")).args(["token", "new"]).env_clear().output().await.unwrap();
        let token = String::from_utf8(token.stdout).unwrap().trim().to_owned();
        Self { _relay: relay, front, proxy, folder, token }
    }

    fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    fn home(&self, name: &str) -> PathBuf {
        let home = self.folder.path().join(name);
        fs::create_dir_all(&home).unwrap();
        home
    }

    /// A `peer` command on the machine `name`, with nothing of this process's environment.
    fn peer(&self, name: &str, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
        command.args(line.split_whitespace()).env_clear().env("HOME", self.home(name)).env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// A daemon on the machine `name` that logs all it can.
    fn daemon(&self, name: &str, line: &str, set: impl FnOnce(&mut Command) -> &mut Command) -> Child {
        let log = File::create(self.home(name).join("log")).unwrap();
        let mut command = self.peer(name, &format!("run --relay wss://relay.invalid/fleet --name {name} {line}"));
        command.env("PEER_TOKEN", &self.token).env("PEER_LOG", "trace").stderr(log);
        set(&mut command).spawn().unwrap()
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.home(name).join("log")).unwrap()
    }

    /// Fails if the text holds a password, in whichever form it travels, or the token.
    fn keeps_secrets(&self, text: &str) {
        for secret in [CREDENTIALS, IN_URL, "p@ss", "p%40ss", &BASE64.encode(CREDENTIALS.as_bytes()), &self.token] {
            assert!(!text.contains(secret), "`{secret}` shows in: {text}");
        }
        assert!(!text.contains("proxy-user-qvxz"), "the user shows in: {text}");
    }
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_meet_through_a_proxy_with_a_password_and_tls_of_their_own_authority() {
    let way = Way::new().await;
    let url = format!("http://{IN_URL}@{}", way.proxy.address);
    let config = way.home("two").join("config.toml");
    fs::write(&config, format!("proxy = 'none'\nca-file = '{}'\nmode = 'bypass'\n", way.ca_file().display())).unwrap();
    let _one = way.daemon("one", "", |one| one.env("HTTPS_PROXY", &url).env("PEER_CA_FILE", way.ca_file()));
    let _two = way.daemon("two", &format!("--config {}", config.display()), |two| two.env("PEER_PROXY", &url));

    let meet = async {
        loop {
            let listed = way.peer("one", "ls --json").output().await.unwrap();
            let hosts: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
            if hosts.iter().any(|host| host["name"] == "two") {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let met = timeout(DEADLINE, meet).await;
    assert!(met.is_ok(), "one: {}\ntwo: {}", way.log("one"), way.log("two"));
    let ran = way.peer("one", "exec two -- sh -c").arg("echo hello; echo proxy=$PEER_PROXY").output().await.unwrap();
    assert_eq!(text(&ran), ("hello\nproxy=\n".to_owned(), String::new()));

    assert!(way.proxy.heads().iter().all(|head| head.starts_with("CONNECT relay.invalid:443 ")));
    assert!(way.front.heads().iter().all(|head| head.starts_with("GET /fleet/v1 ")));
    for name in ["one", "two"] {
        let log = way.log(name);
        assert!(log.contains("through http://127.0.0.1:") && log.contains("in the room"), "{log}");
        way.keeps_secrets(&log);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_on_the_way_is_told_in_three_lines_without_a_secret() {
    let way = Way::new().await;
    let right = format!("http://{IN_URL}@{}", way.proxy.address);
    let wrong = format!("http://proxy-user-qvxz:p%40ss-qvxz@{}", way.proxy.address);
    let trusted = way.ca_file();
    let stranger = way.folder.path().join("stranger.pem");
    fs::write(&stranger, Authority::named("a stranger").pem).unwrap();
    let cases = [
        (&wrong, &trusted, "cause: the proxy http://127.0.0.1:", "USER:PASSWORD"),
        (&right, &stranger, "cause: the certificate of the relay relay.invalid:443 is signed by nobody", "--ca-file"),
    ];
    let tries = cases.map(|(proxy, ca_file, cause, hint)| {
        let mut command = way.peer("one", "ls -vv --relay wss://relay.invalid/fleet");
        command.env("PEER_TOKEN", &way.token).env("PEER_PROXY", proxy).env("PEER_CA_FILE", ca_file);
        command.env("PEER_STATE_DIR", way.home("one").join(hint)).env("PEER_LOG", "trace");
        let ended = tokio::spawn(async move { command.output().await.unwrap() });
        (ended, cause, hint)
    });
    for (ended, cause, hint) in tries {
        let output = timeout(DEADLINE, ended).await.unwrap().unwrap();
        let said = text(&output).1;
        assert_eq!(output.status.code(), Some(3), "{said}");
        let advice = said.lines().find(|line| line.starts_with("hint: ")).unwrap();
        assert!(said.contains(&format!("\n{cause}")) && advice.contains(hint), "{said}");
        way.keeps_secrets(&said);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_says_in_its_status_why_it_is_not_in_the_room() {
    let way = Way::new().await;
    let _daemon = way.daemon("one", "", |one| one.env("PEER_PROXY", format!("http://{}", way.proxy.address)));
    let told = async {
        loop {
            let said = text(&way.peer("one", "status").output().await.unwrap()).1;
            if said.contains("the room is not joined: the proxy") && said.contains("USER:PASSWORD") {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(timeout(DEADLINE, told).await.is_ok(), "{}", way.log("one"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_that_cannot_be_used_is_an_error_before_anything_starts() {
    let way = Way::new().await;
    let broken = way.folder.path().join("broken.pem");
    fs::write(&broken, "nothing").unwrap();
    let open = way.folder.path().join("open.toml");
    fs::write(&open, format!("proxy = 'http://{IN_URL}@proxy'\n")).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
    let broken = broken.display();
    for (line, variable, code, words) in [
        (format!("run --ca-file {broken}"), "", 1, "no certificate"),
        (format!("run --ca-file {broken}.none"), "", 1, "No such file"),
        (format!("run --proxy socks5://{IN_URL}@proxy"), "", 2, "SOCKS"),
        (format!("ls --proxy http://{IN_URL}@proxy:0"), "", 2, "port"),
        ("run --relay wss://relay.invalid".to_owned(), "ftp://p@ss@proxy", 1, "HTTPS_PROXY"),
        (format!("run --config {}", open.display()), "", 1, "a proxy's password"),
        ("up --proxy proxy:3128".to_owned(), "", 2, "--bind"),
    ] {
        let mut command = way.peer("one", &line);
        command.env("PEER_TOKEN", &way.token).env("HTTPS_PROXY", variable);
        let output = timeout(DEADLINE, command.output()).await.unwrap().unwrap();
        let said = text(&output).1;
        assert_eq!(output.status.code(), Some(code), "{line}: {said}");
        assert!(said.contains(words) || line.starts_with("up"), "{line}: {said}");
        assert!(said.lines().count() == 3 && said.contains("\nhint: "), "{line}: {said}");
        way.keeps_secrets(&said);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_proxy_is_not_used_to_reach_this_very_machine() {
    let way = Way::new().await;
    let dead = "http://127.0.0.1:9";
    let mut command = way.peer("one", "up --json --bind 127.0.0.1:0 --name one");
    let set = ["HTTP_PROXY", "ALL_PROXY", "PEER_PROXY"];
    let _up = command.envs(set.map(|name| (name, dead))).spawn().unwrap();
    let joined = async {
        loop {
            let status = way.peer("one", "status --json").output().await.unwrap();
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            if status["uplink"] == "joined" {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, joined).await.expect("its own relay is reached");
}
