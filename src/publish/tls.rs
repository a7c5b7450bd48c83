//! TLS towards the engine: the box's CAs, one CA, pinned keys, or (said aloud) no verification. And the pin of a server, for
//! `framegate pin`. Not here: serving TLS.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};
use tokio::net::TcpStream;
use webpki::EndEntityCert;

use super::engine;

/// How long `framegate pin` waits for the server.
const PIN_TIMEOUT: Duration = Duration::from_secs(10);

type Pin = [u8; 32];

/// What `framegate pin` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinReport {
    /// For `engine.pin_sha256`: base64 of the SHA-256 of the certificate's public key.
    pub pin_sha256: String,
    /// Common name of the subject, if it has one.
    pub subject: String,
    /// Common name of the issuer, if it has one.
    pub issuer: String,
    /// First moment of validity.
    pub not_before: Option<Timestamp>,
    /// Last moment of validity.
    pub not_after: Option<Timestamp>,
}

/// Fetches the public key of the server at `url`, trusting nothing that it says.
pub async fn fetch_pin(url: &str) -> anyhow::Result<PinReport> {
    let verifier = Verifier { provider: provider(), authority: None, trusted: Vec::new(), pins: None };
    let certificate = handshake(url, with_verifier(verifier)?).await?;
    let pin = pin_of(&certificate).map_err(|e| anyhow!("cannot read the server's certificate: {e}"))?;
    let fields = Fields::read(&certificate).context("cannot read the server's certificate")?;
    Ok(PinReport {
        pin_sha256: STANDARD.encode(pin),
        subject: common_name(fields.subject),
        issuer: common_name(fields.issuer),
        not_before: parse_time(fields.not_before),
        not_after: parse_time(fields.not_after),
    })
}

/// Whether the engine's certificate is trusted as `[engine]` says.
pub(super) async fn try_handshake(config: &engine::Config) -> anyhow::Result<()> {
    handshake(&config.base_url, client_config(config, true)?).await.map(drop)
}

/// Connects, shakes hands, and gives back the server's own certificate.
async fn handshake(url: &str, config: ClientConfig) -> anyhow::Result<CertificateDer<'static>> {
    let url = reqwest::Url::parse(url).with_context(|| format!("`{url}` is no URL; expected https://host:port"))?;
    if url.scheme() != "https" {
        bail!("`{url}` is not https: there is no certificate to pin");
    }
    let host = url.host_str().context("the URL has no host")?.trim_matches(['[', ']']).to_owned();
    let port = url.port_or_known_default().unwrap_or(443);
    let name = ServerName::try_from(host.clone()).with_context(|| format!("`{host}` is no host name"))?;
    tokio::time::timeout(PIN_TIMEOUT, async {
        let stream =
            TcpStream::connect((&*host, port)).await.with_context(|| format!("cannot connect to {host}:{port}"))?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .with_context(|| format!("TLS with {host}:{port} failed"))?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        certificates.first().cloned().context("the server showed no certificate")
    })
    .await
    .with_context(|| format!("no answer from {host}:{port} within {PIN_TIMEOUT:?}"))?
}

/// The client's configuration as `[engine]` says.
pub(super) fn client_config(config: &engine::Config, https: bool) -> anyhow::Result<ClientConfig> {
    let mut tls = if !https {
        // Never used, and the box may have no CA at all.
        builder()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
    } else if config.danger_accept_invalid_certs {
        with_verifier(Verifier { provider: provider(), authority: None, trusted: Vec::new(), pins: None })?
    } else {
        let pins = config.pin_sha256.iter().map(|text| parse_pin(text)).collect::<anyhow::Result<Vec<_>>>()?;
        let pins = (!pins.is_empty()).then_some(pins);
        let (authority, trusted) = match (&config.ca_file, &pins) {
            (Some(path), _) => {
                let trusted = read_ca(path)?;
                (Some(authority(&trusted).with_context(|| format!("engine.ca_file `{}`", path.display()))?), trusted)
            }
            (None, Some(_)) => (None, Vec::new()),
            (None, None) => (Some(system_authority()?), Vec::new()),
        };
        with_verifier(Verifier { provider: provider(), authority, trusted, pins })?
    };
    tls.alpn_protocols =
        if config.http2 { vec![b"h2".to_vec(), b"http/1.1".to_vec()] } else { vec![b"http/1.1".to_vec()] };
    Ok(tls)
}

/// A pin as base64 or hexadecimal (colons allowed), with or without `sha256/` before it.
pub(super) fn parse_pin(text: &str) -> anyhow::Result<Pin> {
    let bare = text.trim().trim_start_matches("sha256/").trim_start_matches("sha256:");
    let hex: String = bare.chars().filter(|c| *c != ':').collect();
    let bytes = if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap_or(0)).collect()
    } else {
        STANDARD.decode(bare).unwrap_or_default()
    };
    bytes.try_into().map_err(|_| {
        anyhow!("engine.pin_sha256: `{text}` is no SHA-256 in base64 or hexadecimal; `framegate pin URL` shows the right one")
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn builder() -> anyhow::Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>> {
    ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().context("TLS")
}

fn with_verifier(verifier: Verifier) -> anyhow::Result<ClientConfig> {
    Ok(builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth())
}

fn read_ca(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let show = path.display();
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("engine.ca_file: cannot read certificates (PEM) from `{show}`"))?;
    if certificates.is_empty() {
        bail!("engine.ca_file: `{show}` holds no certificate in PEM form");
    }
    Ok(certificates)
}

fn authority(certificates: &[CertificateDer<'static>]) -> anyhow::Result<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates.iter().cloned());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build().context("no usable CA certificate")
}

fn system_authority() -> anyhow::Result<Arc<WebPkiServerVerifier>> {
    let found = rustls_native_certs::load_native_certs();
    authority(&found.certs)
        .context("this box has no CA certificates: install ca-certificates, or set engine.ca_file or engine.pin_sha256")
}

/// Checks the engine's certificate. With neither an authority nor pins it takes any.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    authority: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates of `ca_file`: a self-signed server's own one may be in there, even if it calls itself a CA.
    trusted: Vec<CertificateDer<'static>>,
    pins: Option<Vec<Pin>>,
}

impl Verifier {
    fn check_pin(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        let Some(pins) = &self.pins else { return Ok(()) };
        if !pins.contains(&pin_of(certificate)?) {
            let not_pinned = io::Error::other("its public key is none of engine.pin_sha256");
            return Err(CertificateError::Other(OtherError(Arc::new(not_pinned))).into());
        }
        check_validity(certificate, now)
    }

    fn check_authority(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<(), Error> {
        let Some(authority) = &self.authority else { return Ok(()) };
        let verified = authority.verify_server_cert(certificate, intermediates, name, ocsp, now);
        if verified.is_err() && self.trusted.iter().any(|known| known.as_ref() == certificate.as_ref()) {
            let parsed = EndEntityCert::try_from(certificate).map_err(|_| CertificateError::BadEncoding)?;
            parsed.verify_is_valid_for_subject_name(name).map_err(|_| CertificateError::NotValidForName)?;
            return check_validity(certificate, now);
        }
        verified.map(|_| ())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check_pin(certificate, now)?;
        self.check_authority(certificate, intermediates, name, ocsp, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn pin_of(certificate: &CertificateDer<'_>) -> Result<Pin, Error> {
    let parsed = EndEntityCert::try_from(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let hash = digest(&SHA256, parsed.subject_public_key_info().as_ref());
    hash.as_ref().try_into().map_err(|_| Error::General("SHA-256 has not 32 bytes".into()))
}

fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let fields = Fields::read(certificate).ok_or(CertificateError::BadEncoding)?;
    let (Some(from), Some(to)) = (parse_time(fields.not_before), parse_time(fields.not_after)) else {
        return Err(CertificateError::BadEncoding.into());
    };
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < from.as_second() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > to.as_second() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// The few fields of a certificate that webpki keeps to itself.
struct Fields<'a> {
    issuer: &'a [u8],
    not_before: &'a [u8],
    not_after: &'a [u8],
    subject: &'a [u8],
}

impl<'a> Fields<'a> {
    fn read(certificate: &'a CertificateDer<'_>) -> Option<Self> {
        let (_, outer, _) = der(certificate.as_ref())?;
        let (_, tbs, _) = der(outer)?;
        let (tag, _, rest) = der(tbs)?;
        // The version may be left out; then this was the serial number.
        let rest = if tag == 0xa0 { der(rest)?.2 } else { rest };
        let (_, _, rest) = der(rest)?; // signature algorithm
        let (_, issuer, rest) = der(rest)?;
        let (_, validity, rest) = der(rest)?;
        let (_, subject, _) = der(rest)?;
        let (_, not_before, times) = der(validity)?;
        let (_, not_after, _) = der(times)?;
        Some(Self { issuer, not_before, not_after, subject })
    }
}

/// Tag, content and what follows.
fn der(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let count = usize::from(first & 0x7f);
        if count > 4 {
            return None;
        }
        let (bytes, after) = rest.split_at_checked(count)?;
        length = bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b));
        rest = after;
    }
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

/// `UTCTime` (two digits of the year) or `GeneralizedTime`.
fn parse_time(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let full = match text.len() {
        12 if text < "50" => format!("20{text}"),
        12 => format!("19{text}"),
        _ => text.to_owned(),
    };
    let time = jiff::civil::DateTime::strptime("%Y%m%d%H%M%S", full).ok()?;
    jiff::tz::TimeZone::UTC.to_timestamp(time).ok()
}

/// The common name in a distinguished name (OID 2.5.4.3), or `?`.
fn common_name(mut name: &[u8]) -> String {
    while let Some((_, set, rest)) = der(name) {
        name = rest;
        let value = der(set).and_then(|(_, pair, _)| der(pair)).filter(|(_, oid, _)| *oid == [0x55, 4, 3]);
        if let Some((_, text, _)) = value.and_then(|(_, _, rest)| der(rest)) {
            return super::verdict::message(text);
        }
    }
    "?".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_taken_as_base64_and_as_hexadecimal() {
        let hash = digest(&SHA256, b"key");
        let hex: Vec<String> = hash.as_ref().iter().map(|b| format!("{b:02X}")).collect();
        let base64 = STANDARD.encode(hash.as_ref());
        for text in [hex.concat(), hex.join(":"), base64.clone(), format!("sha256/{base64}")] {
            assert_eq!(parse_pin(&text).unwrap(), hash.as_ref(), "{text}");
        }
        for text in ["", "abc", &base64[1..], &hex.concat()[2..]] {
            assert!(parse_pin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn fields_of_a_certificate_are_read_and_its_time_is_checked() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["engine.test".into()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2060, 1, 2);
        params.distinguished_name.push(rcgen::DnType::CommonName, "the engine");
        let der = params.self_signed(&key).unwrap().der().clone();
        let fields = Fields::read(&der).unwrap();
        assert_eq!(common_name(fields.subject), "the engine");
        assert_eq!(parse_time(fields.not_after).unwrap().to_string(), "2060-01-02T00:00:00Z");
        let at = |secs| UnixTime::since_unix_epoch(Duration::from_secs(secs));
        assert_eq!(check_validity(&der, at(0)), Err(CertificateError::NotValidYet.into()));
        assert_eq!(check_validity(&der, at(1_700_000_000)), Ok(()));
        assert_eq!(check_validity(&der, at(4_000_000_000)), Err(CertificateError::Expired.into()));
        for cut in 0..der.len() {
            assert!(Fields::read(&CertificateDer::from(der[..cut].to_vec())).is_none());
        }
    }
}
