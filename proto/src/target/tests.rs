use proptest::prelude::*;

use super::*;

struct Host {
    peer: PeerId,
    name: &'static str,
    tags: Vec<String>,
    os: &'static str,
    arch: &'static str,
}

impl Host {
    fn facts(&self) -> HostFacts<'_> {
        HostFacts { peer: self.peer, name: self.name, tags: &self.tags, os: self.os, arch: self.arch }
    }
}

fn host(seed: u8, name: &'static str, tags: &[&str], os: &'static str, arch: &'static str) -> Host {
    let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
    Host { peer: PeerId::from_bytes([seed; 32]), name, tags, os, arch }
}

fn fleet() -> Vec<Host> {
    vec![
        host(1, "web-1", &["web", "prod"], "linux", "x86_64"),
        host(2, "web-2", &["web", "test"], "linux", "aarch64"),
        host(3, "db", &["prod"], "freebsd", "x86_64"),
        host(4, "mac", &[], "macos", "aarch64"),
    ]
}

fn selected(expression: &str) -> Vec<&'static str> {
    let target = Target::parse(expression).expect("the expression is valid");
    fleet().iter().filter(|host| target.matches(&host.facts())).map(|host| host.name).collect()
}

#[test]
fn all_selects_every_host() {
    assert_eq!(selected("all"), ["web-1", "web-2", "db", "mac"]);
}

#[test]
fn a_bare_word_is_a_name_or_a_tag() {
    assert_eq!(selected("db"), ["db"]);
    assert_eq!(selected("prod"), ["web-1", "db"]);
    assert_eq!(selected("nothing"), Vec::<&str>::new());
}

#[test]
fn a_list_means_any_and_binds_tightest() {
    assert_eq!(selected("test,mac"), ["web-2", "mac"]);
    assert_eq!(selected("web, db & os:linux"), ["web-1", "web-2"]);
    assert_eq!(selected("!web,db"), ["mac"]);
}

#[test]
fn keys_look_at_one_fact_only() {
    assert_eq!(selected("os:Linux"), ["web-1", "web-2"]);
    assert_eq!(selected("arch:x86_64"), ["web-1", "db"]);
    assert_eq!(selected("tag:db"), Vec::<&str>::new());
    assert_eq!(selected("name:prod"), Vec::<&str>::new());
    assert_eq!(selected("name:web-*"), ["web-1", "web-2"]);
    assert_eq!(selected("tag:?e*"), ["web-1", "web-2"]);
}

#[test]
fn and_binds_tighter_than_or_and_brackets_change_that() {
    assert_eq!(selected("mac | web & prod"), ["web-1", "mac"]);
    assert_eq!(selected("(mac | web) & prod"), ["web-1"]);
    assert_eq!(selected("!(web|mac)"), ["db"]);
    assert_eq!(selected("!!db"), ["db"]);
}

#[test]
fn an_id_selects_by_its_beginning_but_a_short_bare_word_does_not() {
    let id = fleet()[2].peer.to_string();
    assert_eq!(selected(&format!("id:{}", &id[..4])), ["db"]);
    assert_eq!(selected(&id[..SHORT_ID_CHARS].to_uppercase()), ["db"]);
    assert_eq!(selected(&id[..4]), Vec::<&str>::new());
}

#[test]
fn a_fault_names_its_rule_and_place() {
    for (text, at, what) in [
        ("", 0, TargetRule::Empty),
        ("  ", 2, TargetRule::Empty),
        ("web &", 5, TargetRule::ExpectedTerm),
        ("web && db", 5, TargetRule::ExpectedTerm),
        ("web db", 4, TargetRule::ExpectedJoin),
        ("web)", 3, TargetRule::ExpectedJoin),
        ("a | (b & c", 4, TargetRule::Unclosed),
        ("a,(b)", 2, TargetRule::ListOfWords),
        ("(a),b", 3, TargetRule::ListOfWords),
        ("colour:red", 0, TargetRule::UnknownKey),
        ("os:", 3, TargetRule::MissingValue),
        ("id:abc", 3, TargetRule::InvalidId),
        ("id:ab1d", 3, TargetRule::InvalidId),
        ("a,", 2, TargetRule::ExpectedTerm),
        ("w\u{e9}b", 1, TargetRule::ExpectedJoin),
    ] {
        assert_eq!(Target::parse(text), Err(TargetFault { at, what }), "{text:?}");
    }
}

#[test]
fn depth_and_length_are_bounded() {
    let deep = "(".repeat(MAX_TARGET_DEPTH + 1);
    assert_eq!(Target::parse(&deep).map_err(|fault| fault.what), Err(TargetRule::TooDeep));
    let negated = "!".repeat(MAX_TARGET_DEPTH + 1);
    assert_eq!(Target::parse(&negated).map_err(|fault| fault.what), Err(TargetRule::TooDeep));
    let long = "a".repeat(MAX_TARGET_BYTES + 1);
    assert_eq!(Target::parse(&long).map_err(|fault| fault.what), Err(TargetRule::TooLong));
    assert!(Target::parse(&"(a)|".repeat(1000)[..3999]).is_ok());
}

#[test]
fn a_host_is_found_by_name_or_by_four_characters_of_its_id() {
    let fleet = fleet();
    let facts: Vec<_> = fleet.iter().map(Host::facts).collect();
    assert_eq!(resolve_host("db", &facts), Ok(2));
    let id = fleet[1].peer.to_string();
    assert_eq!(resolve_host(&id[..4], &facts), Ok(1));
    assert_eq!(resolve_host(&id.to_uppercase(), &facts), Ok(1));
    assert_eq!(resolve_host(&id[..3], &facts), Err(HostFault::Unknown { near: vec![] }));
}

#[test]
fn an_unknown_host_brings_names_spelled_like_it() {
    let fleet = fleet();
    let facts: Vec<_> = fleet.iter().map(Host::facts).collect();
    assert_eq!(resolve_host("WEB-1", &facts), Err(HostFault::Unknown { near: vec![0, 1] }));
    assert_eq!(resolve_host("elsewhere", &facts), Err(HostFault::Unknown { near: vec![] }));
}

#[test]
fn a_name_or_prefix_of_several_hosts_is_ambiguous_and_a_name_goes_before_an_id() {
    let mut fleet = [host(9, "twin", &[], "linux", "x86_64"), host(8, "twin", &[], "linux", "x86_64")];
    let facts: Vec<_> = fleet.iter().map(Host::facts).collect();
    assert_eq!(resolve_host("twin", &facts), Err(HostFault::Ambiguous(vec![0, 1])));

    let prefix: &'static str = Box::leak(fleet[0].peer.to_string()[..5].to_owned().into_boxed_str());
    fleet[1].name = prefix;
    let facts: Vec<_> = fleet.iter().map(Host::facts).collect();
    assert_eq!(resolve_host(prefix, &facts), Ok(1));

    let mut bytes = [7; 32];
    let one = HostFacts { peer: PeerId::from_bytes(bytes), ..facts[0] };
    bytes[31] = 8;
    let other = HostFacts { peer: PeerId::from_bytes(bytes), ..facts[0] };
    let id = one.peer.to_string();
    assert_eq!(resolve_host(&id[..20], &[one, other]), Err(HostFault::Ambiguous(vec![0, 1])));
    assert_eq!(resolve_host(&id, &[one, other]), Ok(0));
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("all".to_owned()),
        "(web-1|web-2|db|mac|web|prod|test)",
        "(name|tag|os|arch):[a-z*?0-9._-]{1,6}",
        "id:[a-z2-7]{4,12}",
        "[A-Za-z0-9._*?-]{1,12}",
    ]
}

fn expression() -> impl Strategy<Value = String> {
    let list = prop::collection::vec(word(), 1..4).prop_map(|words| words.join(","));
    list.prop_recursive(5, 40, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|inner| format!("!({inner})")),
            inner.clone().prop_map(|inner| format!("({inner})")),
            prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| parts.join(" & ")),
            prop::collection::vec(inner, 2..4).prop_map(|parts| parts.join("|")),
        ]
    })
}

proptest! {
    #[test]
    fn printed_expressions_read_back_as_themselves(text in expression()) {
        let target = Target::parse(&text).expect("the strategy makes valid expressions");
        let printed = target.to_string();
        prop_assert_eq!(Target::parse(&printed), Ok(target), "{} -> {}", text, printed);
    }

    #[test]
    fn random_text_never_panics_and_faults_point_into_it(text in "[a-z0-9:,&|!()* \u{e9}]{0,40}|\\PC{0,40}") {
        if let Err(fault) = Target::parse(&text) {
            prop_assert!(fault.at <= text.len());
        }
        let fleet = fleet();
        let facts: Vec<_> = fleet.iter().map(Host::facts).collect();
        let _ = resolve_host(&text, &facts);
    }

    #[test]
    fn boolean_laws_hold_for_every_host(a in expression(), b in expression(), c in expression()) {
        let matches = |text: String| {
            let target = Target::parse(&text).expect("joined valid expressions are valid");
            fleet().iter().map(|host| target.matches(&host.facts())).collect::<Vec<_>>()
        };
        prop_assert_eq!(matches(format!("!(({a}) & ({b}))")), matches(format!("!({a}) | !({b})")));
        prop_assert_eq!(matches(format!("!(({a}) | ({b}))")), matches(format!("!({a}) & !({b})")));
        prop_assert_eq!(
            matches(format!("({a}) & (({b}) | ({c}))")),
            matches(format!("({a}) & ({b}) | ({a}) & ({c})"))
        );
        prop_assert_eq!(matches(format!("!!({a})")), matches(a.clone()));
        prop_assert_eq!(matches(format!("({a}) | !({a})")), matches("all".to_owned()));
        prop_assert_eq!(matches(format!("({a}) & ({b})")), matches(format!("({b}) & ({a})")));
    }

    #[test]
    fn globs_agree_with_their_definition(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
        prop_assert_eq!(glob(&pattern, &text), slow_glob(pattern.as_bytes(), text.as_bytes()));
    }
}

fn slow_glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((b'*', rest)), None) => slow_glob(rest, text),
        (Some((b'*', rest)), Some((_, shorter))) => slow_glob(rest, text) || slow_glob(pattern, shorter),
        (Some(_), None) => false,
        (Some((one, rest)), Some((byte, shorter))) => (*one == b'?' || one == byte) && slow_glob(rest, shorter),
    }
}
