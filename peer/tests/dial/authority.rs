//! A certificate authority of the test's own.

use std::sync::Arc;

use data_encoding::BASE64;
use peerfleet_peer::mesh::Authorities;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio_rustls::rustls::{
    ServerConfig, SupportedProtocolVersion,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer},
    version::{TLS12, TLS13},
};

/// An authority, which signs what it is asked to.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// When a certificate is good.
#[derive(Clone, Copy)]
pub(crate) enum Span {
    Now,
    Past,
    Future,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("an authority of the tests")
    }

    pub(crate) fn named(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = pem(params.self_signed(&key).unwrap().der());
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// What a peer is given to trust it.
    pub(crate) fn trusted(&self) -> Authorities {
        Authorities::from_pem(self.pem.as_bytes()).unwrap()
    }

    /// What a server of some years ago needs, which speaks nothing newer than TLS 1.2.
    pub(crate) fn old_server(&self, names: &[&str]) -> Arc<ServerConfig> {
        self.server_of(&[&TLS12], names, Span::Now)
    }

    /// What a server needs to show that it is one of `names`.
    pub(crate) fn server(&self, names: &[&str], span: Span) -> Arc<ServerConfig> {
        self.server_of(&[&TLS13, &TLS12], names, span)
    }

    fn server_of(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        names: &[&str],
        span: Span,
    ) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let mut params = leaf(names);
        match span {
            Span::Now => {}
            Span::Past => params.not_after = date_time_ymd(2001, 1, 1),
            Span::Future => params.not_before = date_time_ymd(3001, 1, 1),
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        server(versions, certificate.der().clone(), &key)
    }
}

/// A server whose certificate is signed by itself and is none of an authority; and that certificate.
pub(crate) fn self_signed(names: &[&str]) -> (Arc<ServerConfig>, Authorities) {
    let key = KeyPair::generate().unwrap();
    let mut params = leaf(names);
    params.is_ca = IsCa::ExplicitNoCa;
    let certificate = params.self_signed(&key).unwrap();
    let trusted = Authorities::from_pem(pem(certificate.der()).as_bytes()).unwrap();
    (server(&[&TLS13], certificate.der().clone(), &key), trusted)
}

fn leaf(names: &[&str]) -> CertificateParams {
    CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
}

/// As reverse proxies are usually set up: they would rather speak HTTP/2.
fn server(
    versions: &[&'static SupportedProtocolVersion],
    certificate: CertificateDer<'static>,
    key: &KeyPair,
) -> Arc<ServerConfig> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

fn pem(der: &[u8]) -> String {
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", BASE64.encode(der))
}
