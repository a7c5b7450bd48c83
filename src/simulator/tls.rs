//! Certificates made on the spot, good ones and bad ones, under an authority of the simulator's own.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio_rustls::TlsAcceptor;

/// What the engine shows to its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Certificate {
    /// Valid, signed by the simulator's authority. Each one has a key of its own.
    Good,
    /// Signed by the authority, ended in 2020.
    Expired,
    /// Signed by the authority, begins in 2090.
    NotYetValid,
    /// Signed by the authority for another host.
    WrongName,
    /// Signed by itself and marked as an authority, as many on-premise servers have it.
    SelfSigned,
    /// Valid, signed by an authority that nobody has heard of.
    OtherAuthority,
}

/// The authority and the certificate shown now.
pub(super) struct Tls {
    authority: CertifiedIssuer<'static, KeyPair>,
    names: Vec<String>,
    protocols: Vec<Vec<u8>>,
    acceptor: ArcSwap<Acceptor>,
    shown: Mutex<Shown>,
}

struct Acceptor(TlsAcceptor);

#[derive(Clone)]
struct Shown {
    ca_pem: String,
    pin: String,
}

impl Tls {
    pub(super) fn new(certificate: Certificate, address: IpAddr, http2: bool) -> anyhow::Result<Self> {
        let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
        let address = address.to_string();
        if !names.contains(&address) {
            names.push(address);
        }
        let protocols: &[&[u8]] = if http2 { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
        let protocols: Vec<_> = protocols.iter().map(|name| name.to_vec()).collect();
        let authority = authority("Framegate simulator CA").context("making the simulator's authority")?;
        let (acceptor, shown) = make(certificate, &authority, &names, &protocols).context("making a certificate")?;
        let (acceptor, shown) = (ArcSwap::from_pointee(acceptor), Mutex::new(shown));
        Ok(Self { authority, names, protocols, acceptor, shown })
    }

    /// Shows another certificate to the connections that come from now on.
    pub(super) fn show(&self, certificate: Certificate) -> anyhow::Result<()> {
        let (acceptor, shown) =
            make(certificate, &self.authority, &self.names, &self.protocols).context("making a certificate")?;
        self.acceptor.store(Arc::new(acceptor));
        *self.shown.lock().expect("certificate lock") = shown;
        Ok(())
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.load().0.clone()
    }

    /// What a client has to trust, PEM.
    pub(super) fn ca_pem(&self) -> String {
        self.shown.lock().expect("certificate lock").ca_pem.clone()
    }

    /// Base64 of the SHA-256 of the shown certificate's public key (its `SubjectPublicKeyInfo`).
    pub(super) fn pin(&self) -> String {
        self.shown.lock().expect("certificate lock").pin.clone()
    }
}

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate()?)
}

fn make(
    certificate: Certificate,
    authority_: &CertifiedIssuer<'static, KeyPair>,
    names: &[String],
    protocols: &[Vec<u8>],
) -> anyhow::Result<(Acceptor, Shown)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, "Framegate simulated engine");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let ca_pem = authority_.pem();
    let (leaf, ca_pem) = match certificate {
        Certificate::Good => (params.signed_by(&key, authority_)?, ca_pem),
        Certificate::Expired => {
            (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(2020, 1, 1));
            (params.signed_by(&key, authority_)?, ca_pem)
        }
        Certificate::NotYetValid => {
            params.not_before = date_time_ymd(2090, 1, 1);
            (params.signed_by(&key, authority_)?, ca_pem)
        }
        Certificate::WrongName => {
            params.subject_alt_names = CertificateParams::new(vec!["engine.example.net".to_owned()])?.subject_alt_names;
            (params.signed_by(&key, authority_)?, ca_pem)
        }
        Certificate::SelfSigned => {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let leaf = params.self_signed(&key)?;
            let pem = leaf.pem();
            (leaf, pem)
        }
        // The PEM stays that of the authority which did not sign it: trusting it must not help.
        Certificate::OtherAuthority => (params.signed_by(&key, &*authority("Somebody else")?)?, ca_pem),
    };
    let pin = STANDARD.encode(digest::digest(&digest::SHA256, &key.subject_public_key_info()));
    Ok((acceptor(leaf.der().clone(), &key, protocols)?, Shown { ca_pem, pin }))
}

fn acceptor(leaf: CertificateDer<'static>, key: &KeyPair, protocols: &[Vec<u8>]) -> anyhow::Result<Acceptor> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf], key)?;
    config.alpn_protocols = protocols.to_vec();
    Ok(Acceptor(TlsAcceptor::from(Arc::new(config))))
}
