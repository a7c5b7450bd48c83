//! The way to the engine, walked once and step by step: name, connection, certificate, login. For `framegate doctor`.
//!
//! Publishes nothing and pauses nothing. Not here: what to advise (that is the command's).

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use jiff::{SignedDuration, Timestamp};
use reqwest::Url;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::engine::{self, Client, Secrets};
use super::state::State;
use super::tls::{self, PinReport};
use super::token::Tokens;
use super::verdict::{Verdict, judge};
use crate::metrics::Metrics;

/// For the engine's name.
const RESOLVE_MAX: Duration = Duration::from_secs(5);

/// What was found on the way. A step that was not reached is `None`.
#[derive(Debug)]
pub struct Examined {
    /// Host and port that were tried: the proxy's, if there is one.
    pub target: String,
    /// What the name stands for.
    pub addresses: Result<Vec<SocketAddr>, String>,
    /// The address that took a connection, and how long it took.
    pub connection: Option<Result<(SocketAddr, Duration), String>>,
    /// What the server shows, trusted or not.
    pub certificate: Option<Result<PinReport, String>>,
    /// Whether the configuration trusts it.
    pub trust: Option<Result<(), String>>,
    /// The account.
    pub login: Option<Result<Login, (State, String)>>,
}

/// A login that worked.
#[derive(Clone, Copy, Debug)]
pub struct Login {
    /// When the token ends, if it says so.
    pub expires: Option<Timestamp>,
    /// How long a new token lives, if it says so.
    pub life: Option<Duration>,
    /// This box's clock minus the engine's.
    pub skew: Option<SignedDuration>,
}

/// Walks as far as it gets. Sends one login and one renewal.
pub async fn examine(config: &engine::Config, secrets: Secrets) -> anyhow::Result<Examined> {
    let engine = Url::parse(&config.base_url)?;
    let hop = config.proxy.as_deref().map_or(Ok(engine.clone()), Url::parse)?;
    let (host, port) = (hop.host_str().unwrap_or_default(), hop.port_or_known_default().unwrap_or(443));
    let mut found = Examined {
        target: format!("{host}:{port}"),
        addresses: resolve(host.trim_matches(['[', ']']), port).await,
        connection: None,
        certificate: None,
        trust: None,
        login: None,
    };
    let Ok(addresses) = &found.addresses else { return Ok(found) };
    let connection = connect(addresses, config.connect_timeout).await;
    let connected = connection.is_ok();
    found.connection = Some(connection);
    if !connected {
        return Ok(found);
    }
    if engine.scheme() == "https" && config.proxy.is_none() {
        found.certificate = Some(tls::fetch_pin(&config.base_url).await.map_err(|error| format!("{error:#}")));
        let trust = tls::try_handshake(config).await.map_err(|error| format!("{error:#}"));
        let trusted = trust.is_ok();
        found.trust = Some(trust);
        if !trusted {
            return Ok(found);
        }
    }
    found.login = Some(login(config, secrets).await.map_err(|verdict| in_words(&verdict)));
    Ok(found)
}

async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    match timeout(RESOLVE_MAX, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {RESOLVE_MAX:?}")),
    }
}

async fn connect(addresses: &[SocketAddr], patience: Duration) -> Result<(SocketAddr, Duration), String> {
    let mut last = "it has no address".to_owned();
    for address in addresses {
        let begun = Instant::now();
        match timeout(patience, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok((*address, begun.elapsed())),
            Ok(Err(error)) => last = format!("{address}: {error}"),
            Err(_elapsed) => last = format!("{address}: no answer within {patience:?}"),
        }
    }
    Err(last)
}

async fn login(config: &engine::Config, secrets: Secrets) -> Result<Login, Verdict> {
    let client = Client::new(config, 1).map_err(|error| Verdict::Credentials(format!("{error:#}")))?;
    // Counted nowhere: these are of nobody's daemon.
    let tokens = Tokens::new(client.clone(), config.username.clone(), secrets, Metrics::new());
    let token = tokens.get(false, &|| std::future::ready(()).boxed()).await?;
    let reply = client.renew(token.header.clone()).await.map(|reply| reply.masking(token.text()));
    let skew = reply.as_ref().ok().and_then(|reply| reply.date).map(skew);
    match judge(&reply, SystemTime::now()) {
        Verdict::Token => Err(Verdict::Credentials("the engine does not renew the token it was shown (401)".into())),
        Verdict::Accepted => Ok(Login { expires: token.expires, life: token.life, skew }),
        other @ (Verdict::Credentials(_)
        | Verdict::Forbidden { .. }
        | Verdict::Rejected { .. }
        | Verdict::ServerError { .. }
        | Verdict::Transient { .. }
        | Verdict::NotOurEngine(_)
        | Verdict::Unread(_)
        | Verdict::Unreachable(_)
        | Verdict::Ambiguous(_)) => Err(other),
    }
}

fn skew(engines: SystemTime) -> SignedDuration {
    let ours = Timestamp::now();
    Timestamp::try_from(engines).map_or(SignedDuration::ZERO, |theirs| ours.duration_since(theirs))
}

/// The state that the daemon would be in, and why.
fn in_words(verdict: &Verdict) -> (State, String) {
    match verdict {
        Verdict::Accepted => (State::Open, String::new()),
        Verdict::Token => (State::Credentials, "401".into()),
        Verdict::Credentials(what) => (State::Credentials, what.clone()),
        Verdict::Forbidden { status, message } => (State::Forbidden, format!("{status}: {message}")),
        Verdict::Rejected { status, message } => (State::Rejecting, format!("{status}: {message}")),
        Verdict::ServerError { status, message } => (State::Failing, format!("{status}: {message}")),
        Verdict::Transient { status, message, .. } => (State::Throttled, format!("{status}: {message}")),
        Verdict::NotOurEngine(what) => (State::UnexpectedAnswer, what.clone()),
        Verdict::Unread(what) | Verdict::Unreachable(what) | Verdict::Ambiguous(what) => {
            (State::Unreachable, what.clone())
        }
    }
}
