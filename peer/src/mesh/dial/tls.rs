//! TLS to a relay's terminator or to a proxy: whom to trust, and the handshake.
//!
//! In: a connection, the name that was dialled, the user's own authorities. Out: the connection wrapped, or why not.
//! Trusted are the system's certificate authorities and those of the user's file beside them; a certificate that is not
//! good for the very name is refused, and nothing switches that off. What passes is sealed anyway: this hides room ids
//! and sizes from the network between, and gets through networks that let nothing but TLS pass.
//! The system's authorities are read anew for each connection, so that a peer which runs for years learns of new ones.
//! Bounds: the caller brings the deadline; rustls bounds a handshake's messages (64 KiB).

use std::{fmt, io, sync::Arc};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, Error, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_rustls::TlsConnector;

use super::transport::Transport;

/// What is spoken inside: a terminator that prefers HTTP/2 must not choose it, because WebSocket is asked for by 1.1.
const HTTP_1_1: &[u8] = b"http/1.1";

/// Certificate authorities that the user named.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Authorities(Arc<[CertificateDer<'static>]>);

/// A text holds no certificate authorities.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthorities {
    /// There is no certificate in it.
    #[error("it holds no certificate (a block that begins with -----BEGIN CERTIFICATE-----)")]
    Empty,
    /// A certificate in it does not read.
    #[error("certificate {number} in it does not read")]
    Unreadable {
        /// Which, from 1.
        number: usize,
    },
}

impl Authorities {
    /// Reads one or more certificates in PEM; other blocks are passed over.
    ///
    /// # Errors
    /// [`InvalidAuthorities`] if there is none, or one does not read.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidAuthorities> {
        let mut probe = RootCertStore::empty();
        let mut read = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let unreadable = InvalidAuthorities::Unreadable { number: read.len() + 1 };
            let Ok(certificate) = certificate else { return Err(unreadable) };
            probe.add(certificate.clone()).map_err(|_| unreadable)?;
            read.push(certificate);
        }
        if read.is_empty() { Err(InvalidAuthorities::Empty) } else { Ok(Self(read.into())) }
    }
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authorities({})", self.0.len())
    }
}

/// Why there is no TLS.
#[derive(Debug)]
pub(in crate::mesh) enum TlsFault {
    /// The name that was dialled is none that a certificate could have.
    Name,
    /// The certificate was good until so many days ago.
    Expired { days: Option<u64> },
    /// The certificate will be good in so many days.
    NotYetValid { days: Option<u64> },
    /// Nobody whom we trust signed the certificate.
    UnknownIssuer { nobody_is_trusted: bool },
    /// The certificate is for other names.
    OtherName { names: String },
    /// The certificate is bad in another way.
    Certificate(CertificateError),
    /// What answers does not speak TLS.
    NotTls,
    /// The other side broke the handshake off.
    Alert(AlertDescription),
    /// The connection was closed in the handshake.
    Closed,
    /// It failed otherwise.
    Other(io::Error),
}

/// Wraps a connection into TLS, proving that the other side is `host`.
///
/// # Errors
/// [`TlsFault`].
pub(super) async fn wrap(stream: Transport, host: &str, authorities: &Authorities) -> Result<Transport, TlsFault> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsFault::Name)?;
    let own = authorities.clone();
    // Reading the system's authorities is reading files.
    let roots = tokio::task::spawn_blocking(move || roots(&own)).await;
    let roots = roots.map_err(|error| TlsFault::Other(io::Error::other(error)))?;
    let nobody_is_trusted = roots.is_empty();
    let connector = TlsConnector::from(Arc::new(client(roots)));
    let stream = connector.connect(name, stream).await.map_err(|error| fault(error, nobody_is_trusted))?;
    Ok(Transport::Tls(Box::new(stream)))
}

fn roots(own: &Authorities) -> RootCertStore {
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::debug!(%error, "a certificate authority of the system is passed over");
    }
    let mut roots = RootCertStore::empty();
    // Systems carry some that are malformed; a user's own were all found good when they were read.
    roots.add_parsable_certificates(system.certs.into_iter().chain(own.0.iter().cloned()));
    roots
}

fn client(roots: RootCertStore) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has suites of TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![HTTP_1_1.to_vec()];
    // Connections are rare, and a ticket would let a network tell that two of them are of one peer.
    config.resumption = Resumption::disabled();
    config
}

fn fault(error: io::Error, nobody_is_trusted: bool) -> TlsFault {
    let closed = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(bad)) => bad_certificate(bad, nobody_is_trusted),
        Some(Error::InvalidMessage(_)) => TlsFault::NotTls,
        Some(Error::AlertReceived(alert)) => TlsFault::Alert(*alert),
        Some(_) => TlsFault::Other(error),
        None if closed.contains(&error.kind()) => TlsFault::Closed,
        None => TlsFault::Other(error),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "an enum of another crate, of which a few kinds are told apart")]
fn bad_certificate(bad: &CertificateError, nobody_is_trusted: bool) -> TlsFault {
    match bad {
        CertificateError::Expired => TlsFault::Expired { days: None },
        CertificateError::ExpiredContext { time, not_after } => {
            TlsFault::Expired { days: Some(days(*not_after, *time)) }
        }
        CertificateError::NotValidYet => TlsFault::NotYetValid { days: None },
        CertificateError::NotValidYetContext { time, not_before } => {
            TlsFault::NotYetValid { days: Some(days(*time, *not_before)) }
        }
        CertificateError::UnknownIssuer => TlsFault::UnknownIssuer { nobody_is_trusted },
        CertificateError::NotValidForName => TlsFault::OtherName { names: String::new() },
        CertificateError::NotValidForNameContext { presented, .. } => TlsFault::OtherName { names: names(presented) },
        other => TlsFault::Certificate(other.clone()),
    }
}

/// Whole days from one moment to a later one.
fn days(from: UnixTime, to: UnixTime) -> u64 {
    to.as_secs().saturating_sub(from.as_secs()) / (24 * 60 * 60)
}

/// The names of a certificate for a person: `DnsName("a.example")` as `a.example`, a few of them.
fn names(presented: &[String]) -> String {
    const SHOWN: usize = 4;
    let bare = |name: &String| {
        let inside = name.split_once('(').map_or(name.as_str(), |(_, rest)| rest.trim_end_matches(')'));
        inside.trim_matches('"').to_owned()
    };
    let mut shown: Vec<String> = presented.iter().take(SHOWN).map(bare).collect();
    if presented.len() > SHOWN {
        shown.push("…".to_owned());
    }
    shown.join(", ")
}
