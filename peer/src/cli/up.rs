//! `peer up`: everything on one machine, and the one line for the next.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use clap::Args;
use peerfleet_proto::token::Token;
use qrcode::{EcLevel, QrCode, render::unicode::Dense1x2};
use serde_json::json;

use super::{context::Context, run};
use crate::{
    config::{Config, Origin, Sourced},
    daemon::Daemon,
    env,
    failure::{Failure, Result},
    random::SystemRandom,
    ui::Paint,
};

mod relay;

/// File in the state folder with the token of the relay that `up` runs.
const TOKEN_FILE: &str = "token";

/// Where the relay listens unless told otherwise: everywhere, as other machines are to come.
const DEFAULT_BIND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8080);

/// Start everything on this machine: a relay, a token, this peer
///
/// Prints the one line to paste on the next machine (and a QR code of it on a terminal), and runs until Ctrl-C. The
/// token is made once and kept in the state folder. Whoever has the line is in the room: pass it on with care.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Up {
    /// Address and port of the relay [env: PEER_BIND] [default: 0.0.0.0:8080]
    #[arg(long, value_name = "ADDR")]
    bind: Option<SocketAddr>,
    #[command(flatten)]
    host: run::HostFlags,
}

const EXAMPLES: &str = "\
Examples:
  peer up
  peer up --bind 192.168.1.5:9000 --room lab
  peer up --mode bypass --tags web          others may run commands here";

impl Up {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        if context.names_a_relay() {
            return Err(Failure::usage("`peer up` runs a relay of its own")
                .cause("--relay names another one")
                .hint("to join that one, use `peer run`; to choose our own relay's address, use --bind"));
        }
        if context.names_a_way() {
            return Err(Failure::usage("`peer up` needs no way to a relay")
                .cause("--proxy and --ca-file are for relays elsewhere, and it runs one of its own")
                .hint("leave them out here; on the other machines they belong to `peer run`"));
        }
        let mut config = context.config(self.host.layer())?;
        config.network.go_directly();
        context.log("warn")?;
        let lock = Daemon::lock(&config)?;
        let token = if config.token.is_some() { context.token(&config)? } else { kept_token(&config)? };
        let relay = relay::start(self.bind(context)?)?;
        let url = |ip| format!("ws://{}", SocketAddr::new(ip, relay.address().port()));
        config.relay = Sourced { value: own_url(&url(reachable_here(relay.address().ip())))?, origin: Origin::Default };
        let line = line(&token, &url(reachable_there(relay.address().ip())), &config);
        let daemon = Daemon::start(&config, token, &context.env, lock).await?;
        run::announce(context, &config, &daemon);
        show(context, &line, relay.address(), &config)?;
        daemon.run().await;
        relay.stop().await;
        Ok(0)
    }

    fn bind(&self, context: &Context) -> Result<SocketAddr> {
        if let Some(bind) = self.bind {
            return Ok(bind);
        }
        let Some(text) = context.env.text(env::BIND)? else { return Ok(DEFAULT_BIND) };
        text.parse().map_err(|fault| {
            Failure::fixable(format!("cannot use {}", env::BIND)).cause(fault).hint("write it as in 0.0.0.0:8080")
        })
    }
}

/// The token that an earlier `up` kept; else a new one, kept from now on.
fn kept_token(config: &Config) -> Result<Token> {
    let text = match config.state.read_secret(TOKEN_FILE)? {
        Some(text) => text,
        None => config.state.write_new(TOKEN_FILE, &format!("{}\n", *Token::generate(&mut SystemRandom).reveal()))?,
    };
    let text = zeroize::Zeroizing::new(text);
    Token::parse(&text).map_err(|fault| {
        Failure::fixable(format!("cannot use {}", config.state.path().join(TOKEN_FILE).display()))
            .cause(fault)
            .hint("delete it to get a new token; the other machines then need the new line")
    })
}

fn own_url(url: &str) -> Result<crate::config::RelayUrl> {
    url.parse().map_err(|fault| Failure::bug("the relay's own address is no URL").cause(fault))
}

/// The address by which this machine reaches its own relay.
fn reachable_here(bound: IpAddr) -> IpAddr {
    match bound {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => bound,
    }
}

/// The address by which others reach it: the one that a packet to the world would leave from.
fn reachable_there(bound: IpAddr) -> IpAddr {
    if !bound.is_unspecified() {
        return bound;
    }
    // Connecting a UDP socket sends nothing, it only asks for the route; the addresses are for documentation (RFC 5737,
    // RFC 3849) and belong to nobody.
    let (from, to) = if bound.is_ipv4() { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let routed = UdpSocket::bind(from).and_then(|socket| {
        socket.connect(to)?;
        socket.local_addr()
    });
    routed.map_or_else(|_| reachable_here(bound), |address| address.ip())
}

fn line(token: &Token, url: &str, config: &Config) -> zeroize::Zeroizing<String> {
    let token = token.reveal();
    zeroize::Zeroizing::new(format!(
        "PEER_TOKEN={} peer run --relay {url} --room {}",
        quoted(&token),
        config.room.value
    ))
}

/// A word for a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.' | '/' | ':' | '@' | '+');
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

fn show(context: &Context, line: &str, bound: SocketAddr, config: &Config) -> Result<()> {
    let ui = context.ui;
    if ui.json {
        let (relay, room) = (config.relay.value.to_string(), config.room.value.as_str());
        return ui.json_line(&json!({ "event": "up", "line": line, "relay": relay, "bind": bound, "room": room }));
    }
    ui.note("on the next machine, paste this line (it holds the token: pass it on with care):");
    ui.line(line)?;
    if ui.out_is_terminal()
        && let Ok(code) = QrCode::with_error_correction_level(line, EcLevel::L)
    {
        // Light modules are drawn, white on black: a camera reads no code whose colours are swapped.
        let drawn = code.render().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).quiet_zone(true).build();
        drawn.lines().try_for_each(|row| ui.line(&ui.paint_out(Paint::WhiteOnBlack, row)))?;
    }
    if bound.ip().is_loopback() {
        ui.warn("the relay listens on this machine only: --bind 0.0.0.0:8080 lets other machines in");
    }
    ui.note("Ctrl-C stops relay and peer");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_with_spaces_or_quotes_is_one_word_of_the_shell() {
        assert_eq!(quoted("pft1-abc"), "pft1-abc");
        assert_eq!(quoted("it's me"), "'it'\\''s me'");
    }

    #[test]
    fn an_address_that_was_named_is_printed_as_it_is() {
        let ip = IpAddr::from([192, 168, 1, 5]);
        assert_eq!(reachable_there(ip), ip);
        assert!(!reachable_there(Ipv4Addr::UNSPECIFIED.into()).is_unspecified());
    }
}
