use std::{fs, os::unix::fs::PermissionsExt};

use super::*;

struct Machine {
    folder: tempfile::TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Machine {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    fn with_file(self, text: &str) -> Self {
        let path = self.folder.path().join(".config/peerfleet/config.toml");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self
    }

    fn resolve(&self, flags: &Layer) -> Result<Config> {
        let env = Env::from_source(|name| match name {
            env::HOME => Some(self.folder.path().into()),
            _ => self.variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.into()),
        });
        Config::resolve(flags, None, &env)
    }
}

#[test]
fn without_a_word_nothing_but_this_machine_is_contacted_and_others_may_only_look() {
    let config = Machine::new().resolve(&Layer::default()).unwrap();
    assert_eq!(config.relay, by_default(DEFAULT_RELAY.parse().unwrap()));
    assert_eq!(config.mode, by_default(Mode::Plan));
    assert_eq!(config.token_text(), Ok(None));
}

#[test]
fn stun_servers_are_asked_only_if_named_and_the_router_unless_that_is_switched_off() {
    let paths = |machine: &Machine| machine.resolve(&Layer::default()).unwrap().paths;
    assert_eq!(paths(&Machine::new()), PathConfig { port_mapping: true, stun: Vec::new(), hard_nat_search: true });
    let file = Machine::new().with_file("port-mapping = false\nstun = ['stun.example.net', '192.0.2.1:9']\n");
    let named: Vec<_> = ["stun.example.net:3478", "192.0.2.1:9"].map(|text| text.parse().unwrap()).into();
    assert_eq!(paths(&file), PathConfig { port_mapping: false, stun: named, hard_nat_search: true });
    let over = file.with(env::PORT_MAPPING, "1").with(env::STUN, "[2001:db8::1]:7, ");
    let other = vec!["[2001:db8::1]:7".parse().unwrap()];
    assert_eq!(paths(&over), PathConfig { port_mapping: true, stun: other, hard_nat_search: true });
    let broken = Machine::new().with(env::STUN, "stun.example.net:0").resolve(&Layer::default()).unwrap_err();
    assert!(broken.to_string().contains(env::STUN), "{broken}");
}

#[test]
fn flag_goes_before_environment_before_file() {
    let machine = Machine::new().with_file("room = 'file'\nrelay = 'ws://file:81'\nname = 'file'\n");
    let machine = machine.with(env::ROOM, "environment").with(env::RELAY, "ws://environment:81");
    let config = machine.resolve(&Layer { room: "flag".parse().ok(), ..Layer::default() }).unwrap();
    assert_eq!((config.room.value.as_str(), config.room.origin), ("flag", Origin::Flag("--room")));
    assert_eq!(
        (config.relay.value.to_string().as_str(), config.relay.origin),
        ("ws://environment:81", Origin::Environment(env::RELAY))
    );
    assert_eq!(config.name.value.as_str(), "file");
    assert!(matches!(config.name.origin, Origin::File(_)));
}

#[test]
fn the_word_of_peer_mode_stands_between_environment_and_file() {
    let machine = Machine::new().with_file("mode = 'edit'");
    let config = machine.resolve(&Layer::default()).unwrap();
    assert_eq!(config.mode.value, Mode::Edit);
    config.state.write(MODE_FILE, "bypass\n").unwrap();
    let stored = machine.resolve(&Layer::default()).unwrap().mode;
    assert_eq!(stored, Sourced { value: Mode::Bypass, origin: Origin::ModeCommand });
    let machine = machine.with(env::MODE, "disabled");
    assert_eq!(machine.resolve(&Layer::default()).unwrap().mode.value, Mode::Disabled);
}

#[test]
fn a_broken_mode_file_is_an_error_and_no_default() {
    let machine = Machine::new();
    machine.resolve(&Layer::default()).unwrap().state.write(MODE_FILE, "bypas").unwrap();
    assert!(machine.resolve(&Layer::default()).is_err());
}

#[test]
fn a_broken_file_is_an_error_with_line_and_column() {
    for (text, at, why) in [
        ("room = 'x'\nrelay = \n", ":2:9", "value"),
        ("room = 'x'\n\n  colour = 'red'\n", ":3:3", "unknown field `colour`"),
        ("mode = 'all'\n", ":1:8", "not a mode"),
        ("tags = ['a', 'b c']\n", ":1:8", "a tag"),
        ("[access]\n# Who?\n'abc' = 'bypass'\n", ":3:1", "not a valid id"),
        (&format!("[access]\n'{}' = 'all'\n", PeerId::from_bytes([7; 32])), ":2:58", "not a mode"),
    ] {
        let failure = Machine::new().with_file(text).resolve(&Layer::default()).unwrap_err();
        assert!(failure.what.ends_with(at), "{text:?}: {failure:?}");
        assert!(failure.cause.as_deref().is_some_and(|cause| cause.contains(why)), "{text:?}: {failure:?}");
    }
}

#[test]
fn a_file_that_is_no_text_is_an_error_with_line_and_column() {
    let machine = Machine::new().with_file("");
    let path = machine.folder.path().join(".config/peerfleet/config.toml");
    fs::write(path, b"room = 'x'\n# \xc3\xa4\xff\n").unwrap();
    let failure = machine.resolve(&Layer::default()).unwrap_err();
    assert!(failure.what.ends_with(":2:4"), "{failure:?}");
    assert!(failure.cause.as_deref().is_some_and(|cause| cause.contains("UTF-8")), "{failure:?}");
}

#[test]
fn a_failure_never_repeats_the_token() {
    let machine = Machine::new().with_file("token = 'hunter2hunter2\nroom = 'x'\n");
    let failure = machine.resolve(&Layer::default()).unwrap_err();
    assert!(!format!("{failure:?}").contains("hunter2"), "{failure:?}");
}

#[test]
fn a_token_in_a_file_that_everybody_may_read_is_refused() {
    let machine = Machine::new().with_file("token = 'x'\n");
    let path = machine.folder.path().join(".config/peerfleet/config.toml");
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(machine.resolve(&Layer::default()).unwrap_err().hint.unwrap().contains("chmod 600"));
}

#[test]
fn two_tokens_of_one_source_are_refused_and_of_two_sources_the_weightier_wins() {
    let file = Machine::new().with(env::TOKEN, "from-variable");
    let path = file.folder.path().join("token");
    fs::write(&path, "from-file\nsecond line\n").unwrap();
    let flags = Layer { token_file: Some(path.clone()), ..Layer::default() };
    assert_eq!(file.resolve(&flags).unwrap().token_text().unwrap().unwrap().expose(), "from-file");
    let both = file.with(env::TOKEN_FILE, path.to_str().unwrap());
    assert_eq!(both.resolve(&Layer::default()).unwrap_err().exit_code(), 2);
}

#[test]
fn paths_through_hard_nats_are_searched_for_unless_somebody_says_no() {
    let searches = |machine: &Machine, flags: &Layer| machine.resolve(flags).unwrap().paths.hard_nat_search;
    assert!(searches(&Machine::new(), &Layer::default()));
    let file = Machine::new().with_file("hard-nat-search = false\n");
    assert!(!searches(&file, &Layer::default()));
    let variable = file.with(env::HARD_NAT_SEARCH, "1");
    assert!(searches(&variable, &Layer::default()));
    assert!(!searches(&variable, &Layer { hard_nat_search: Some(false), ..Layer::default() }));
    let unclear = Machine::new().with(env::HARD_NAT_SEARCH, "perhaps").resolve(&Layer::default()).unwrap_err();
    assert!(unclear.what.contains(env::HARD_NAT_SEARCH), "{unclear:?}");
}

#[test]
fn the_access_table_names_whole_identities() {
    let peer = PeerId::from_bytes([9; 32]);
    let machine = Machine::new().with_file(&format!("[access]\n{peer} = 'bypass'\n"));
    assert_eq!(machine.resolve(&Layer::default()).unwrap().access, BTreeMap::from([(peer, Mode::Bypass)]));
    let failure = Machine::new().with_file("[access]\nk3v5 = 'bypass'\n").resolve(&Layer::default()).unwrap_err();
    assert!(failure.cause.unwrap().contains("`k3v5`: not a valid id"));
}
