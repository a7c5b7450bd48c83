//! The engine over HTTP: one client, three calls, answers read to a cap. Not here: what an answer means (that is `verdict`).

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};
use hyper::body::{Body as HttpBody, Frame as BodyFrame, SizeHint};
use reqwest::{Method, Url};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::tls;
use super::verdict::{Reply, SendError, bounded};

/// An answer is read up to here, in bytes; the engine's own are empty or a token.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Idle connections are closed by us before servers do it (5 s is common), so that a frame is not sent into a closing one.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// A connection gets no new request after this time, and its successor asks for the engine's address again: else one that is never idle
/// would stay with a server that the name has moved away from.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(30);
/// Between signs of life on an idle connection.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// `[engine]`: where it is and how to log in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the engine answers: on-premise `https://HOST:5009`, in the cloud `https://customer.econnectcloud.com/identities`.
    /// Must be set.
    pub base_url: String,
    /// The account; it needs the permission *Face Publishing*. Needed, with `password_file`, unless there is a `token_file`.
    pub username: Option<String>,
    /// A file with the password and nothing else, read again at every login. A relative path is looked up in systemd's
    /// `$CREDENTIALS_DIRECTORY`, then beside the configuration. Other users must not be able to read it.
    pub password_file: Option<PathBuf>,
    /// Instead of `username` and `password_file`: a file with a ready token, read again when it changes. Looked up like those.
    pub token_file: Option<PathBuf>,
    /// The longest that one attempt may take, from connecting to the answer's last byte. Not longer than `shutdown.deadline`.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub timeout: Duration,
    /// The longest that connecting may take: DNS, TCP and TLS together.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub connect_timeout: Duration,
    /// HTTP/2 instead of HTTP/1.1; it costs about twice the CPU time with bodies of this size.
    pub http2: bool,
    /// Trust this CA (a PEM file) and no other, for an on-premise engine that has its own. Looked up like `password_file`.
    pub ca_file: Option<PathBuf>,
    /// Accept exactly these public keys, self-signed or not: SHA-256 in base64 or hexadecimal, as `framegate pin URL` shows them.
    /// Empty: what a CA vouches for.
    pub pin_sha256: Vec<String>,
    /// Accept any certificate. Whoever can answer in the engine's place then gets the password and the faces.
    pub danger_accept_invalid_certs: bool,
    /// An HTTP proxy on the way to the engine. The proxies of the environment are not looked at.
    pub proxy: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            username: None,
            password_file: None,
            token_file: None,
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(3),
            http2: false,
            ca_file: None,
            pin_sha256: Vec::new(),
            danger_accept_invalid_certs: false,
            proxy: None,
        }
    }
}

/// Where the secrets are, with relative paths resolved. Only paths: the files are read again at every login.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Secrets {
    /// `engine.password_file`
    pub password_file: Option<PathBuf>,
    /// `engine.token_file`
    pub token_file: Option<PathBuf>,
}

/// One client with its connections.
#[derive(Clone)]
pub(super) struct Client {
    connections: Arc<Connections>,
    timeout: Duration,
    publish: Url,
    authenticate: Url,
    renew: Url,
}

impl Client {
    pub(super) fn new(config: &Config, max_in_flight: usize) -> anyhow::Result<Self> {
        let base = base_url(&config.base_url)?;
        let https = base.scheme() == "https";
        let connections = Connections::new(config, tls::client_config(config, https)?, https, max_in_flight)?;
        Ok(Self {
            connections: Arc::new(connections),
            timeout: config.timeout,
            publish: join(&base, "api/v1/faceEdge/publish"),
            authenticate: join(&base, "api/v1/authenticate"),
            renew: join(&base, "api/v1/renewToken"),
        })
    }

    #[cfg(test)]
    pub(super) fn base(&self) -> String {
        self.publish.as_str().replace("/api/v1/faceEdge/publish", "")
    }

    pub(super) async fn publish(&self, authorization: HeaderValue, body: Bytes) -> Result<Reply, SendError> {
        self.send(Method::POST, &self.publish, Some(authorization), Some(body)).await
    }

    pub(super) async fn authenticate(&self, body: Bytes) -> Result<Reply, SendError> {
        self.send(Method::POST, &self.authenticate, None, Some(body)).await
    }

    pub(super) async fn renew(&self, authorization: HeaderValue) -> Result<Reply, SendError> {
        self.send(Method::GET, &self.renew, Some(authorization), None).await
    }

    async fn send(
        &self,
        method: Method,
        url: &Url,
        authorization: Option<HeaderValue>,
        body: Option<Bytes>,
    ) -> Result<Reply, SendError> {
        let sent = Arc::new(AtomicBool::new(body.is_none()));
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, value);
        }
        let mut request = self.connections.young().request(method, url.clone());
        if let Some(bytes) = body {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            request = request.body(reqwest::Body::wrap(Sent { bytes: Some(bytes), sent: sent.clone() }));
        }
        let deadline = Instant::now() + self.timeout;
        let has_left = || sent.load(Ordering::Relaxed);
        let response = match tokio::time::timeout_at(deadline, request.headers(headers).send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(classify(error, has_left())),
            Err(_elapsed) => return Err(SendError::Timeout { sent: has_left() }),
        };
        read(response, deadline).await
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.publish)
    }
}

/// The HTTP client with its pool, replaced before its connections get old: reqwest knows no greatest age. What is in flight ends on the
/// old one, which closes its connections then. TLS sessions are resumed, files not read again.
struct Connections {
    config: Config,
    tls: rustls::ClientConfig,
    https: bool,
    max_in_flight: usize,
    current: Mutex<(reqwest::Client, Instant)>,
}

impl Connections {
    fn new(config: &Config, tls: rustls::ClientConfig, https: bool, max_in_flight: usize) -> anyhow::Result<Self> {
        let http = build(config, tls.clone(), https, max_in_flight)?;
        Ok(Self { config: config.clone(), tls, https, max_in_flight, current: Mutex::new((http, Instant::now())) })
    }

    fn young(&self) -> reqwest::Client {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.1.elapsed() >= CONNECTION_AGE_MAX {
            // The same could be built before; should it fail all the same, the old one goes on.
            if let Ok(http) = build(&self.config, self.tls.clone(), self.https, self.max_in_flight) {
                current.0 = http;
            }
            current.1 = Instant::now();
        }
        current.0.clone()
    }
}

fn build(
    config: &Config,
    tls: rustls::ClientConfig,
    https: bool,
    max_in_flight: usize,
) -> anyhow::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("framegate/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .no_proxy()
        .connect_timeout(config.connect_timeout)
        .pool_idle_timeout(IDLE_MAX)
        .pool_max_idle_per_host(max_in_flight.max(1))
        .tcp_nodelay(true)
        .tcp_keepalive(TCP_KEEPALIVE)
        // A half-open connection is noticed as soon as a new one would fail.
        .tcp_user_timeout(config.connect_timeout);
    if let Some(proxy) = &config.proxy {
        let proxy = reqwest::Proxy::all(proxy).context("engine.proxy is no URL of a proxy")?;
        builder = builder.proxy(proxy);
    }
    builder = match (config.http2, https) {
        (false, _) => builder.http1_only(),
        (true, true) => builder,
        (true, false) => builder.http2_prior_knowledge(),
    };
    builder.build().map_err(reqwest::Error::without_url).context("cannot set up the HTTP client")
}

/// The base URL, checked; a path prefix ends in `/` so that joins keep it.
fn base_url(text: &str) -> anyhow::Result<Url> {
    let mut url = Url::parse(text).with_context(|| {
        format!("engine.base_url: `{text}` is no URL; expected for example https://10.0.0.123:5009")
    })?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        bail!("engine.base_url: `{text}` must start with https:// or http:// and name a host");
    }
    if !url.username().is_empty() || url.password().is_some() {
        bail!("engine.base_url must not hold a user or password: use engine.username and engine.password_file");
    }
    if url.query().is_some() || url.fragment().is_some() {
        bail!("engine.base_url: `{text}` must end with its path, without `?` or `#`");
    }
    let path = format!("{}/", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
}

fn join(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}{path}", base.path()));
    url
}

/// The status counts even if the rest of the answer gets lost, except for a 200: what it means is in the body.
async fn read(mut response: reqwest::Response, deadline: Instant) -> Result<Reply, SendError> {
    let status = response.status().as_u16();
    let header = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let retry_after = header(RETRY_AFTER).map(str::to_owned);
    let date = header(DATE).and_then(|text| httpdate::parse_http_date(text).ok());
    let mut body = BytesMut::new();
    let mut complete = false;
    while body.len() <= ANSWER_BYTES_MAX {
        match tokio::time::timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk[..chunk.len().min(ANSWER_BYTES_MAX + 1)]),
            Ok(Ok(None)) => {
                complete = true;
                break;
            }
            Ok(Err(error)) if status == 200 => return Err(classify(error, true)),
            Err(_elapsed) if status == 200 => return Err(SendError::Timeout { sent: true }),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    body.truncate(ANSWER_BYTES_MAX);
    Ok(Reply { status, body: body.freeze(), complete, retry_after, date })
}

/// Looks through the causes, while their types are still known.
fn classify(error: reqwest::Error, sent: bool) -> SendError {
    let (connect, dns, timeout) = (error.is_connect(), error.is_dns(), error.is_timeout());
    let error = error.without_url();
    let (mut what, mut certificate, mut tls, mut refused) = (error.to_string(), false, false, false);
    let mut cause = error.source();
    while let Some(inner) = cause {
        what = inner.to_string();
        if let Some(inner) = as_rustls(inner) {
            what = inner.to_string();
            tls = true;
            certificate =
                matches!(inner, rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented);
        }
        refused |= inner.downcast_ref::<h2::Error>().is_some_and(is_unread);
        cause = inner.source();
    }
    let what = bounded(&what);
    match (connect, tls, sent) {
        _ if refused => SendError::Refused(what),
        (true, true, _) if certificate => SendError::Certificate(what),
        (true, true, _) => SendError::Tls(what),
        (true, false, _) if dns => SendError::Dns(what),
        (true, false, _) => SendError::Connect(what),
        (false, ..) if timeout => SendError::Timeout { sent },
        (false, ..) => SendError::Reset { sent, what },
    }
}

/// Whether the server said that it has not looked at the stream (RFC 9113, 6.8 and 8.7).
fn is_unread(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// An I/O error hides what it wraps from `source`, and may wrap another one.
fn as_rustls<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    match error.downcast_ref::<io::Error>() {
        Some(io) => as_rustls(io.get_ref()?),
        None => error.downcast_ref(),
    }
}

/// A body that tells whether anybody asked for its bytes: only then can they have left.
struct Sent {
    bytes: Option<Bytes>,
    sent: Arc<AtomicBool>,
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Self::Error>>> {
        self.sent.store(true, Ordering::Relaxed);
        Poll::Ready(self.bytes.take().map(|bytes| Ok(BodyFrame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_keep_the_path_prefix() {
        for (base, expected) in [
            ("https://customer.econnectcloud.com/identities", "https://customer.econnectcloud.com/identities/api/v1/x"),
            (
                "https://customer.econnectcloud.com/identities/",
                "https://customer.econnectcloud.com/identities/api/v1/x",
            ),
            ("https://10.0.0.123:5009", "https://10.0.0.123:5009/api/v1/x"),
            ("http://[::1]:6009/", "http://[::1]:6009/api/v1/x"),
        ] {
            assert_eq!(join(&base_url(base).unwrap(), "api/v1/x").as_str(), expected);
        }
        for bad in ["", "engine", "ftp://a", "https://u:p@host", "https://host/?a=b"] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_defaults_are_the_designs() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config, Config::default());
        assert!(toml::from_str::<Config>("base_ulr = 'x'").is_err());
        let config: Config = toml::from_str("timeout = '2s'").unwrap();
        assert_eq!(config.timeout, Duration::from_secs(2));
    }

    #[test]
    fn a_plain_http_client_needs_no_ca() {
        let config = Config { base_url: "http://127.0.0.1:6009".into(), ..Config::default() };
        assert!(Client::new(&config, 4).is_ok());
        let config = Config { ca_file: Some("/nowhere/ca.pem".into()), ..config };
        assert!(Client::new(&config, 4).is_ok());
        let config = Config { base_url: "https://127.0.0.1:5009".into(), ..config };
        assert!(format!("{:#}", Client::new(&config, 4).unwrap_err()).contains("/nowhere/ca.pem"));
    }
}
