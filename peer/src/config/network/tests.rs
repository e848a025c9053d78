use std::fs;

use super::*;
use crate::config::{Config, Layer};

struct Machine {
    folder: tempfile::TempDir,
    variables: Vec<(&'static str, &'static str)>,
}

impl Machine {
    fn with(variables: &[(&'static str, &'static str)]) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), variables: variables.to_vec() }
    }

    fn network(&self, flags: &Layer) -> Network {
        let env = Env::from_source(|name| match name {
            env::HOME => Some(self.folder.path().into()),
            _ => self.variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.into()),
        });
        Config::resolve(flags, None, &env).unwrap().network
    }

    fn proxy(&self, relay: &str) -> Option<(String, String)> {
        let proxy = self.network(&Layer::default()).proxy_for(&relay.parse().unwrap()).unwrap()?;
        Some((proxy.value.to_string(), proxy.origin.to_string()))
    }
}

fn by(proxy: &str, variable: &str) -> Option<(String, String)> {
    Some((proxy.to_owned(), variable.to_owned()))
}

#[test]
fn each_scheme_has_its_variable_and_all_proxy_is_the_last() {
    let machine = Machine::with(&[("HTTPS_PROXY", "secure:1"), ("http_proxy", "plain:2"), ("all_proxy", "all:3")]);
    assert_eq!(machine.proxy("wss://relay"), by("http://secure:1", "HTTPS_PROXY"));
    assert_eq!(machine.proxy("ws://relay"), by("http://plain:2", "http_proxy"));
    let machine = Machine::with(&[("ALL_PROXY", "all:3"), ("HTTPS_PROXY", "")]);
    assert_eq!(machine.proxy("wss://relay"), by("http://all:3", "ALL_PROXY"));
    assert_eq!(Machine::with(&[("HTTPS_PROXY", "secure:1")]).proxy("ws://relay"), None);
}

#[test]
fn lower_case_goes_before_upper_case() {
    let machine =
        Machine::with(&[("HTTPS_PROXY", "upper:1"), ("https_proxy", "lower:1"), ("NO_PROXY", "*"), ("no_proxy", "x")]);
    assert_eq!(machine.proxy("wss://relay"), by("http://lower:1", "https_proxy"));
}

#[test]
fn an_excepted_relay_is_dialled_directly() {
    let machine = Machine::with(&[("ALL_PROXY", "all:3"), ("NO_PROXY", "example.net")]);
    assert_eq!(machine.proxy("wss://relay.example.net"), None);
    assert_eq!(machine.proxy("ws://127.0.0.1:8080"), None);
    assert!(machine.proxy("wss://example.org").is_some());
}

#[test]
fn a_proxy_of_our_own_goes_before_the_shared_ones_and_no_proxy_does_not_concern_it() {
    let shared = [("HTTPS_PROXY", "shared:1"), ("NO_PROXY", "*"), ("PEER_PROXY", "http://me:secret@own:2")];
    assert_eq!(Machine::with(&shared).proxy("wss://relay"), by("http://own:2", "PEER_PROXY"));
    assert_eq!(Machine::with(&shared).proxy("ws://127.0.0.1:1"), by("http://own:2", "PEER_PROXY"));
    assert_eq!(Machine::with(&[("HTTPS_PROXY", "shared:1"), ("PEER_PROXY", "none")]).proxy("wss://relay"), None);
    let flags = Layer { proxy: "flag:3".parse().ok(), ..Layer::default() };
    let proxy = Machine::with(&shared).network(&flags).proxy_for(&"wss://relay".parse().unwrap()).unwrap().unwrap();
    assert_eq!((proxy.value.to_string().as_str(), proxy.origin), ("http://flag:3", Origin::Flag("--proxy")));
}

#[test]
fn a_proxy_that_does_not_read_is_an_error_where_it_would_be_used_and_nowhere_else() {
    let machine = Machine::with(&[("ALL_PROXY", "socks5://me:hunter2@proxy:1080"), ("NO_PROXY", "example.net")]);
    let network = machine.network(&Layer::default());
    let failure = network.dial_config(&"wss://relay".parse().unwrap()).unwrap_err();
    assert!(failure.what.contains("ALL_PROXY") && failure.cause.as_ref().unwrap().contains("SOCKS"), "{failure:?}");
    assert!(!format!("{failure:?} {network:?}").contains("hunter2"), "{failure:?}");
    assert!(network.dial_config(&"wss://example.net".parse().unwrap()).unwrap().proxy.is_none());
}

#[test]
fn a_file_without_readable_certificates_is_an_error_that_names_it() {
    let machine = Machine::with(&[]);
    let path = machine.folder.path().join("ca.pem");
    let failure = || {
        let flags = Layer { ca_file: Some(path.clone()), ..Layer::default() };
        let failure = machine.network(&flags).dial_config(&"wss://relay".parse().unwrap()).unwrap_err();
        assert!(failure.what.contains("ca.pem") && failure.hint.is_some(), "{failure:?}");
        failure.cause.unwrap()
    };
    assert!(failure().contains("No such file"));
    fs::write(&path, "not a certificate").unwrap();
    assert!(failure().contains("no certificate"));
    fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    assert!(failure().contains("certificate 1"));
    fs::write(&path, "-----BEGIN CERTIFICATE-----\nAA!A\n-----END CERTIFICATE-----\n").unwrap();
    assert!(failure().contains("certificate 1"));
    fs::write(&path, vec![b' '; 3 << 20]).unwrap();
    assert!(failure().contains("2 MiB"));
}
