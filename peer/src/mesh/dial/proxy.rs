//! HTTP proxies: how one is named, and the tunnel that it is asked for (RFC 9110 §9.3.6, `CONNECT`).
//!
//! In: what a person wrote; a connection to the proxy. Out: a [`Proxy`]; the same connection, which now leads to the
//! relay, or why not. Credentials go into the one request (RFC 7617, Basic) and nowhere else: neither `Debug` nor
//! `Display` nor any fault shows them.
//! Bounds: [`MAX_ANSWER_BYTES`] and [`MAX_HEADERS`] of an answer; the caller brings the deadline.

use std::{fmt, io, str::FromStr};

use data_encoding::BASE64;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use super::url::{authority, usual_port};

/// Longest head of an answer, in bytes: what common servers send at most, and what the relay reads of a request.
const MAX_ANSWER_BYTES: usize = 8 * 1024;

/// Most headers of an answer.
const MAX_HEADERS: usize = 64;

/// Most of a header's text that is shown to a person, in characters.
const MAX_SHOWN: usize = 100;

/// A proxy that takes `CONNECT`.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    secure: bool,
    host: String,
    port: u16,
    credentials: Option<Zeroizing<String>>,
}

/// What a person chose: a proxy, or none whatever the environment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProxyChoice {
    /// No proxy.
    Direct,
    /// This one.
    Through(Proxy),
}

/// A text does not name a proxy.
/// The text is not repeated: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a proxy's address: {why}; write it as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT")]
pub struct InvalidProxy {
    why: &'static str,
}

/// Why a proxy opened no tunnel.
#[derive(Debug)]
pub(in crate::mesh) enum ProxyFault {
    /// It wants other credentials (407), by one of these schemes.
    Credentials { given: bool, offered: String },
    /// It does not allow it (403).
    Forbidden,
    /// It answered with another status.
    Refused(u16),
    /// What it sent is no answer of HTTP.
    NotHttp,
    /// Its answer does not end within [`MAX_ANSWER_BYTES`].
    TooLong,
    /// It sent more than an answer, although the relay was not asked anything yet.
    Early,
    /// It closed the connection in place of an answer.
    Closed,
    /// The connection broke.
    Io(io::Error),
}

impl Proxy {
    /// Its host name or address.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Host and port, without credentials.
    pub(in crate::mesh) fn authority(&self) -> String {
        authority(&self.host, self.port)
    }

    /// Whether it is itself reached by TLS.
    pub(super) fn is_secure(&self) -> bool {
        self.secure
    }

    /// Whether it was named with a user or a password.
    pub fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority())
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl FromStr for ProxyChoice {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        if text.trim().eq_ignore_ascii_case("none") { Ok(Self::Direct) } else { text.parse().map(Self::Through) }
    }
}

impl FromStr for Proxy {
    type Err = InvalidProxy;

    /// Reads `[http[s]://][USER[:PASSWORD]@]HOST[:PORT][/]`. Done by hand, because passwords in such variables often
    /// have characters that no URL may have.
    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        let invalid = |why| InvalidProxy { why };
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let secure = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            other if other.starts_with("socks") => {
                return Err(invalid("SOCKS proxies are not supported, HTTP ones are"));
            }
            _ => return Err(invalid("its scheme is neither http nor https")),
        };
        let (user_info, place) = match rest.rsplit_once('@') {
            Some((user_info, place)) => (Some(user_info), place),
            None => (None, rest),
        };
        let place = place.strip_suffix('/').unwrap_or(place);
        let (host, port) = host_and_port(place, usual_port(secure)).map_err(invalid)?;
        let credentials = user_info.map(basic).transpose().map_err(invalid)?;
        Ok(Self { secure, host, port, credentials })
    }
}

fn host_and_port(place: &str, usual: u16) -> Result<(String, u16), &'static str> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, behind) = rest.split_once(']').ok_or("the bracket of its address is not closed")?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| "what is in brackets is no IPv6 address")?;
            (host, behind.strip_prefix(':').or(behind.is_empty().then_some("")).ok_or("its port is not a number")?)
        }
        None => place.split_once(':').unwrap_or((place, "")),
    };
    // A host that could end a line of the request, or looks like none, is refused.
    let is_plain = |char: char| char.is_ascii_alphanumeric() || matches!(char, '.' | '-' | '_' | ':');
    if host.is_empty() || !host.chars().all(is_plain) {
        return Err("it has no readable host name");
    }
    let port = match port {
        "" => usual,
        port => port.parse().ok().filter(|port| *port != 0).ok_or("its port is not a number from 1 to 65535")?,
    };
    Ok((host.to_owned(), port))
}

/// The credentials as the header has them.
fn basic(user_info: &str) -> Result<Zeroizing<String>, &'static str> {
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    let (user, password) = (percent_decoded(user)?, percent_decoded(password)?);
    if user.contains(&b':') {
        return Err("its user's name has a colon, which HTTP cannot send");
    }
    let pair = Zeroizing::new([&user[..], b":", &password[..]].concat());
    Ok(Zeroizing::new(BASE64.encode(&pair)))
}

fn percent_decoded(text: &str) -> Result<Zeroizing<Vec<u8>>, &'static str> {
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        let byte = match (first, behind) {
            (b'%', [high, low, behind @ ..]) => {
                let hex = |digit: &u8| char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                let (high, low) = hex(high).zip(hex(low)).ok_or("a % in its user or password is not written as %25")?;
                rest = behind;
                high << 4 | low
            }
            (b'%', _) => return Err("a % in its user or password is not written as %25"),
            (byte, _) => *byte,
        };
        decoded.push(byte);
    }
    Ok(decoded)
}

/// Asks the proxy at the other end of `stream` for a tunnel to `target`, a host and a port.
///
/// # Errors
/// [`ProxyFault`] if there is none.
pub(super) async fn tunnel<S>(stream: &mut S, proxy: &Proxy, target: &str) -> Result<(), ProxyFault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = Zeroizing::new(format!(
        "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: peerfleet/{}\r\n",
        env!("CARGO_PKG_VERSION")
    ));
    if let Some(credentials) = &proxy.credentials {
        request.push_str("Proxy-Authorization: Basic ");
        request.push_str(credentials);
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.map_err(ProxyFault::Io)?;
    stream.flush().await.map_err(ProxyFault::Io)?;
    read_answer(stream, proxy.has_credentials()).await
}

async fn read_answer<S: AsyncRead + Unpin>(stream: &mut S, given: bool) -> Result<(), ProxyFault> {
    let mut answer = vec![0; MAX_ANSWER_BYTES];
    let mut len = 0;
    loop {
        if let Some(read) = read(&answer[..len], given) {
            return read;
        }
        if len == answer.len() {
            return Err(ProxyFault::TooLong);
        }
        len += match stream.read(&mut answer[len..]).await.map_err(ProxyFault::Io)? {
            0 => return Err(ProxyFault::Closed),
            read => read,
        };
    }
}

/// Reads an answer; `None` if more bytes are needed.
fn read(bytes: &[u8], given: bool) -> Option<Result<(), ProxyFault>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let len = match answer.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return None,
        Err(httparse::Error::TooManyHeaders) => return Some(Err(ProxyFault::TooLong)),
        Err(_) => return Some(Err(ProxyFault::NotHttp)),
    };
    Some(match answer.code.unwrap_or_default() {
        // TLS and HTTP both have the client speak first, so nothing can be on its way to us yet.
        200..300 if len < bytes.len() => Err(ProxyFault::Early),
        200..300 => Ok(()),
        407 => Err(ProxyFault::Credentials { given, offered: schemes(answer.headers) }),
        403 => Err(ProxyFault::Forbidden),
        status => Err(ProxyFault::Refused(status)),
    })
}

/// The schemes of authentication that an answer offers, the first word of each.
fn schemes(headers: &[httparse::Header<'_>]) -> String {
    let offers = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("proxy-authenticate"));
    let words = offers.filter_map(|offer| std::str::from_utf8(offer.value).ok()?.split([' ', ',']).next());
    let plain = |char: &char| char.is_ascii_alphanumeric() || *char == '-';
    let words: Vec<String> = words.map(|word| word.chars().filter(plain).collect()).collect();
    words.join(", ").chars().take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(text: &str) -> Option<String> {
        let proxy: Proxy = text.parse().unwrap();
        Some(String::from_utf8(BASE64.decode(proxy.credentials?.as_bytes()).unwrap()).unwrap())
    }

    #[test]
    fn a_proxy_is_read_with_or_without_scheme_port_and_slash() {
        for (text, shown) in [
            ("proxy", "http://proxy:80"),
            ("proxy.example:3128/", "http://proxy.example:3128"),
            ("HTTP://proxy:3128", "http://proxy:3128"),
            ("https://proxy", "https://proxy:443"),
            ("http://user:pass@[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
            ("[::1]", "http://[::1]:80"),
        ] {
            assert_eq!(text.parse::<Proxy>().unwrap().to_string(), shown, "{text}");
        }
        assert_eq!("None".parse(), Ok(ProxyChoice::Direct));
    }

    #[test]
    fn credentials_are_decoded_and_a_password_may_have_any_character() {
        assert_eq!(credentials("http://proxy"), None);
        assert_eq!(credentials("http://me@proxy").unwrap(), "me:");
        assert_eq!(credentials("http://me:a%40b%3a%25@proxy").unwrap(), "me:a@b:%");
        assert_eq!(credentials("me:p@ss:w/rd#?@proxy:1").unwrap(), "me:p@ss:w/rd#?");
    }

    #[test]
    fn rejects_what_names_no_proxy_without_repeating_it() {
        for text in [
            "",
            "http://",
            "ftp://proxy",
            "socks5h://hunter2@proxy:1080",
            "proxy:0",
            "proxy:65536",
            "proxy:hunter2",
            "http://proxy/path",
            "http://pro xy",
            "http://proxy\r\nHost: hunter2",
            "[::1",
            "[::g]:1",
            "[::1]1",
            "http://a%3Ab:hunter2@proxy",
            "http://me:hunter2%@proxy",
            "http://me:hunter2%4@proxy",
            "http://me:hunter2%zz@proxy",
        ] {
            let fault = text.parse::<Proxy>().expect_err(text);
            assert!(!format!("{fault} {fault:?}").contains("hunter2"), "{fault}");
        }
    }

    #[test]
    fn credentials_are_never_shown() {
        let proxy: Proxy = "http://me:hunter2@proxy:3128".parse().unwrap();
        for shown in [format!("{proxy} {proxy:?}"), format!("{:?}", ProxyChoice::Through(proxy.clone()))] {
            let encoded = proxy.credentials.as_ref().unwrap();
            assert!(
                !shown.contains("hunter2") && !shown.contains(encoded.as_str()) && !shown.contains("me:"),
                "{shown}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_proxy_or_refused(text in "(https?://)?([a-z%:@\\[]{0,12}@)?\\PC{0,24}") {
            if let Ok(proxy) = text.parse::<Proxy>() {
                proptest::prop_assert_eq!(proxy.to_string().parse::<Proxy>().unwrap().to_string(), proxy.to_string());
            }
        }

        #[test]
        fn any_bytes_are_an_answer_or_refused(bytes: Vec<u8>, head in proptest::bool::ANY) {
            let start: &[u8] = if head { b"HTTP/1.1 " } else { b"" };
            let answer = [start, &bytes].concat();
            for len in 0..=answer.len() {
                read(&answer[..len], false);
            }
        }
    }

    async fn answered(answer: &[u8]) -> (String, Result<(), ProxyFault>) {
        let (mut near, mut far) = tokio::io::duplex(64 * 1024);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let proxy = "http://me:secret@proxy".parse().unwrap();
        let ended = tunnel(&mut near, &proxy, "[2001:db8::1]:8443").await;
        drop(near);
        let mut asked = String::new();
        far.read_to_string(&mut asked).await.unwrap();
        (asked, ended)
    }

    #[tokio::test]
    async fn a_tunnel_is_asked_for_by_host_and_port_with_the_credentials() {
        let (asked, ended) = answered(b"HTTP/1.0 200 Connection established\r\nVia: x\r\n\r\n").await;
        assert!(ended.is_ok(), "{ended:?}");
        assert!(asked.starts_with("CONNECT [2001:db8::1]:8443 HTTP/1.1\r\nHost: [2001:db8::1]:8443\r\n"), "{asked}");
        assert!(asked.contains("\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n") && asked.ends_with("\r\n\r\n"));
    }

    #[tokio::test]
    async fn each_refusal_is_told_apart() {
        let fault = async |answer: &str| answered(answer.as_bytes()).await.1.unwrap_err();
        let wanted = "HTTP/1.1 407 Who\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM x\r\n\r\n";
        let ProxyFault::Credentials { given: true, offered } = fault(wanted).await else { panic!("not 407") };
        assert_eq!(offered, "Negotiate, NTLM");
        assert!(matches!(fault("HTTP/1.1 403 No\r\n\r\n").await, ProxyFault::Forbidden));
        assert!(matches!(fault("HTTP/1.1 502 No\r\n\r\n<html>").await, ProxyFault::Refused(502)));
        assert!(matches!(fault("SSH-2.0-OpenSSH_9.9\r\n").await, ProxyFault::NotHttp));
        assert!(matches!(fault("HTTP/1.1 200 OK\r\n\r\nearly").await, ProxyFault::Early));
        assert!(matches!(fault("HTTP/1.1 200").await, ProxyFault::Closed));
        assert!(matches!(fault("").await, ProxyFault::Closed));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert!(matches!(fault(&many).await, ProxyFault::TooLong));
        let endless = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(2 * MAX_ANSWER_BYTES));
        assert!(matches!(fault(&endless).await, ProxyFault::TooLong));
    }
}
