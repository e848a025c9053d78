//! TLS of links: one Ed25519 key per process, shown as a raw public key (RFC 7250) and pinned by both sides.
//!
//! In: the key that the other side announced in a sealed message. Out: QUIC configurations that accept that key alone.
//! Never trusts a name, a certificate authority or a key that was not announced; never resumes a session, so every
//! handshake shows the key again.
//! Bounds: one key pair per process, one configuration per link and side.

use std::{fmt, sync::Arc};

use peerfleet_proto::wire::LINK_PROTOCOL;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use zeroize::Zeroizing;

/// The name that a client asks for; no side looks at it.
pub(super) const SERVER_NAME: &str = "peer";

/// DER before the 32 secret bytes of an Ed25519 key in PKCS #8 (RFC 8410 §7).
const PKCS8_ED25519: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// DER before the 32 public bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410 §4).
const SPKI_ED25519: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The TLS key that another process announced: an Ed25519 SubjectPublicKeyInfo.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct AnnouncedKey(Vec<u8>);

impl AnnouncedKey {
    /// Takes an announced key; `None` if it is not an Ed25519 SubjectPublicKeyInfo.
    pub(super) fn read(spki: &[u8]) -> Option<Self> {
        let is_ed25519 = spki.len() == SPKI_ED25519.len() + 32 && spki.starts_with(&SPKI_ED25519);
        is_ed25519.then(|| Self(spki.to_vec()))
    }

    /// Whether the other side of a finished handshake showed this key.
    pub(super) fn was_shown_on(&self, connection: &quinn::Connection) -> bool {
        let Some(identity) = connection.peer_identity() else { return false };
        let Ok(shown) = identity.downcast::<Vec<CertificateDer<'static>>>() else { return false };
        matches!(shown.as_slice(), [only] if only.as_ref() == self.0)
    }
}

impl fmt::Debug for AnnouncedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AnnouncedKey").field(&data_encoding::HEXLOWER.encode(&self.0[SPKI_ED25519.len()..])).finish()
    }
}

/// This process's TLS key.
pub(super) struct TlsKey {
    certified: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    spki: Vec<u8>,
}

impl fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsKey")
    }
}

impl TlsKey {
    /// The key whose secret is `seed`, which the caller drew at random for this process.
    pub(super) fn from_seed(seed: &[u8; 32]) -> Self {
        let mut pkcs8 = Zeroizing::new(PKCS8_ED25519.to_vec());
        pkcs8.extend(seed);
        let signing = aws_lc_rs::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_slice()))
            .expect("any 32 bytes are an Ed25519 secret key");
        let spki = signing.public_key().expect("an Ed25519 key has a public half").to_vec();
        let certified = CertifiedKey::new(vec![CertificateDer::from(spki.clone())], signing);
        Self { certified: Arc::new(certified), provider: Arc::new(aws_lc_rs::default_provider()), spki }
    }

    /// The public half, as it is announced.
    pub(super) fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// What a dialling side needs to reach exactly the process that announced `remote`.
    pub(super) fn client_to(&self, remote: &AnnouncedKey) -> Arc<QuicClientConfig> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3 suites")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.pinned(remote)))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.certified.clone())));
        config.alpn_protocols = vec![LINK_PROTOCOL.to_vec()];
        config.resumption = Resumption::disabled();
        Arc::new(QuicClientConfig::try_from(config).expect("the provider has QUIC's initial suite"))
    }

    /// What an accepting side needs to let in exactly the process that announced `remote`.
    pub(super) fn server_for(&self, remote: &AnnouncedKey) -> Arc<QuicServerConfig> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3 suites")
            .with_client_cert_verifier(Arc::new(self.pinned(remote)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(self.certified.clone())));
        config.alpn_protocols = vec![LINK_PROTOCOL.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(QuicServerConfig::try_from(config).expect("the provider has QUIC's initial suite"))
    }

    fn pinned(&self, remote: &AnnouncedKey) -> Pinned {
        Pinned { key: remote.clone(), algorithms: self.provider.signature_verification_algorithms }
    }
}

/// Accepts one key, whichever side shows it.
#[derive(Debug)]
struct Pinned {
    key: AnnouncedKey,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn judge(&self, shown: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        if shown.as_ref() == self.key.0 && more.is_empty() {
            return Ok(());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }
}

/// What rustls asks of either side's verifier about signatures, in the same words.
macro_rules! pinned_signatures {
    () => {
        /// QUIC is TLS 1.3 (RFC 9001 §4.2), so no older signature is ever asked about.
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("links speak TLS 1.3 only".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
            verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    pinned_signatures!();
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    pinned_signatures!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announced_form_of_our_own_key_reads_back() {
        let key = TlsKey::from_seed(&[7; 32]);
        assert!(AnnouncedKey::read(key.spki()).is_some());
    }

    #[test]
    fn refuses_to_pin_anything_but_an_ed25519_key() {
        let key = TlsKey::from_seed(&[7; 32]);
        assert!(AnnouncedKey::read(&key.spki()[1..]).is_none());
        assert!(AnnouncedKey::read(&[]).is_none());
        let mut other = key.spki().to_vec();
        other[8] ^= 1;
        assert!(AnnouncedKey::read(&other).is_none());
    }
}
