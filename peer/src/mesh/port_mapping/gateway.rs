//! The router that the IPv4 default route leaves by.
//!
//! In: the system's table of routes. Out: an address. Nothing is sent.
//! Bound: [`TABLE_BYTES`] of the table are read; the default route is the first in it.

use std::net::Ipv4Addr;

/// Bytes of Linux's table that are read, 128 to a route.
#[cfg(target_os = "linux")]
const TABLE_BYTES: u64 = 64 * 1024;

/// `RTF_UP` and `RTF_GATEWAY` of linux/route.h.
#[cfg(target_os = "linux")]
const VIA_GATEWAY: u32 = 0x1 | 0x2;

/// The gateway, if there is one.
#[cfg(target_os = "linux")]
pub(super) async fn find() -> Option<Ipv4Addr> {
    use tokio::io::AsyncReadExt;

    let table = tokio::fs::File::open("/proc/net/route").await.ok()?;
    let mut text = String::new();
    table.take(TABLE_BYTES).read_to_string(&mut text).await.ok()?;
    in_table(&text)
}

/// The gateway, if there is one.
#[cfg(not(target_os = "linux"))]
pub(super) async fn find() -> Option<Ipv4Addr> {
    let found = tokio::task::spawn_blocking(netdev::get_default_gateway).await.ok()?.ok()?;
    found.ipv4.first().copied()
}

/// The gateway of the default route with the smallest metric. Columns: interface, destination, gateway, flags, two
/// counters, metric, mask; addresses are in hexadecimal, as they lie in memory.
#[cfg(target_os = "linux")]
fn in_table(text: &str) -> Option<Ipv4Addr> {
    let routes = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, destination, gateway, flags, _, _, metric, mask, ..] = fields[..] else { return None };
        let hex = |text: &str| u32::from_str_radix(text, 16).ok();
        let is_default = hex(destination)? == 0 && hex(mask)? == 0 && hex(flags)? & VIA_GATEWAY == VIA_GATEWAY;
        is_default.then_some((metric.parse::<u32>().ok()?, Ipv4Addr::from(hex(gateway)?.to_ne_bytes())))
    });
    routes.min().map(|(_, gateway)| gateway)
}

#[cfg(all(test, target_os = "linux", target_endian = "little"))]
mod tests {
    use super::*;

    const HEAD: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    #[test]
    fn the_default_route_with_the_smallest_metric_names_the_gateway() {
        let table = format!(
            "{HEAD}wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
             eth0\t00000000\tFE01000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
             eth0\t0001000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        );
        assert_eq!(in_table(&table), Some(Ipv4Addr::new(10, 0, 1, 254)));
    }

    #[test]
    fn a_default_route_without_a_gateway_names_none() {
        let table = format!("{HEAD}ppp0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n");
        assert_eq!(in_table(&table), None);
        for broken in ["", HEAD, "x\ny z\n", &format!("{HEAD}eth0\tXY\t0101A8C0\t0003\t0\t0\t0\t00000000\n")] {
            assert_eq!(in_table(broken), None, "{broken:?}");
        }
    }
}
