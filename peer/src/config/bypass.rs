//! `NO_PROXY`: which hosts are reached without the proxy of the environment.
//!
//! In: the variable's text, a host and a port. Out: whether the host is excepted.
//! Entries are parted by commas or spaces; each is `*`, an address, a network (`10.0.0.0/8`), or a domain, which stands
//! for itself and everything beneath it, with or without a leading `.` or `*.`; a `:PORT` behind it means that port
//! alone. Names are never looked up to be compared with addresses. This machine itself is always excepted: no proxy
//! leads back to it. An entry that does not read excepts nothing.

use std::net::IpAddr;

/// Whether `host` is reached without a proxy.
pub(super) fn excepts(list: &str, host: &str, port: u16) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let ip: Option<IpAddr> = host.parse().ok().map(|ip: IpAddr| ip.to_canonical());
    if host == "localhost" || ip.is_some_and(|ip| ip.is_loopback()) {
        return true;
    }
    list.split([',', ' ', '\t', '\n']).filter(|entry| !entry.is_empty()).any(|entry| {
        let (name, only_port) = name_and_port(entry);
        only_port.is_none_or(|only| only == port) && is_named(name, &host, ip)
    })
}

fn is_named(name: &str, host: &str, ip: Option<IpAddr>) -> bool {
    if name == "*" {
        return true;
    }
    if let Some((network, length)) = name.split_once('/') {
        let network = network.parse().ok().zip(length.parse().ok());
        return ip.zip(network).is_some_and(|(ip, (network, length))| is_within(ip, network, length));
    }
    if let Ok(address) = name.parse::<IpAddr>() {
        return ip == Some(address.to_canonical());
    }
    let name = name.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.').to_ascii_lowercase();
    if name.is_empty() || ip.is_some() {
        return false;
    }
    host.strip_suffix(&name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The entry without its port. An IPv6 address has brackets where a port follows it.
fn name_and_port(entry: &str) -> (&str, Option<u16>) {
    if let Some((address, behind)) = entry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (address, behind.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match entry.split_once(':') {
        Some((name, port)) if !port.contains(':') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (entry, None),
        },
        Some(_) | None => (entry, None),
    }
}

fn is_within(ip: IpAddr, network: IpAddr, length: u32) -> bool {
    match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) if length <= u32::BITS => {
            let mask = u32::MAX.checked_shl(u32::BITS - length).unwrap_or(0);
            u32::from(ip) & mask == u32::from(network) & mask
        }
        (IpAddr::V6(ip), IpAddr::V6(network)) if length <= u128::BITS => {
            let mask = u128::MAX.checked_shl(u128::BITS - length).unwrap_or(0);
            u128::from(ip) & mask == u128::from(network) & mask
        }
        (IpAddr::V4(_) | IpAddr::V6(_), _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_stands_for_itself_and_what_is_beneath_it() {
        for list in ["example.net", ".example.net", "*.example.net", "other, Example.NET.", "a b example.net"] {
            for host in ["example.net", "relay.example.net", "a.b.Example.Net", "example.net."] {
                assert!(excepts(list, host, 443), "{list} {host}");
            }
            for host in ["badexample.net", "example.net.evil", "net", "192.0.2.1"] {
                assert!(!excepts(list, host, 443), "{list} {host}");
            }
        }
    }

    #[test]
    fn a_port_limits_an_entry_to_itself() {
        assert!(excepts("example.net:8443", "relay.example.net", 8443));
        assert!(!excepts("example.net:8443", "relay.example.net", 443));
        assert!(excepts("[2001:db8::1]:443", "2001:db8::1", 443));
        assert!(!excepts("[2001:db8::1]:443", "2001:db8::1", 80));
    }

    #[test]
    fn an_address_or_network_excepts_addresses_and_no_name() {
        for (list, host, excepted) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.10", false),
            ("2001:db8::1", "2001:db8:0::1", true),
            ("10.0.0.0/8", "10.200.3.4", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.1.2.3/0", "192.0.2.1", true),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("2001:db8::/32", "10.0.0.1", false),
            ("10.0.0.0/33", "10.0.0.1", false),
            ("10.0.0.0/8", "ten.example", false),
            ("0.2.1", "192.0.2.1", false),
        ] {
            assert_eq!(excepts(list, host, 443), excepted, "{list} {host}");
        }
    }

    #[test]
    fn this_machine_is_always_excepted_and_a_star_excepts_all() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"] {
            assert!(excepts("", host, 80), "{host}");
        }
        assert!(!excepts("", "example.net", 80));
        assert!(excepts("*", "example.net", 80));
        assert!(excepts("a,*", "192.0.2.1", 80));
    }

    proptest::proptest! {
        #[test]
        fn any_list_excepts_or_does_not(list in "[a-z0-9.:/*, \\[\\]%-]{0,40}", host in "[a-z0-9.:]{0,20}", port: u16) {
            let _ = excepts(&list, &host, port);
            let everything = list + ",*";
            proptest::prop_assert!(excepts(&everything, &host, port));
        }
    }

    #[test]
    fn what_does_not_read_excepts_nothing() {
        for list in [",", " , ", ".", "*.", ":80", "[", "[]", "[::1", "/8", "10.0.0.0/", "example.net:x"] {
            assert!(!excepts(list, "relay.example.net", 80), "{list}");
        }
    }
}
