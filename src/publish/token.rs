//! The token: getting one (file, renewal, login) and knowing when to renew it. Times are measured on the monotonic clock from
//! the moment of receipt, so a wrong wall clock hurts nothing. Not here: when one is needed (that is `line`).

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderValue;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::time::Instant;

use super::engine::{self, Client};
use super::verdict::{Reply, SendError, Verdict, judge};
use crate::metrics::Metrics;
use crate::secret::Secret;

/// A renewal that failed is tried again no sooner.
const RENEWAL_RETRY: Duration = Duration::from_secs(30);
/// A life shorter than this is not believed, nor one longer.
const LIFE_MIN: Duration = Duration::from_secs(1);
const LIFE_MAX: Duration = Duration::from_hours(24 * 3650);

const SCHEME: &str = "Bearer ";

/// Generations differ also between the tokens of two engines, before and after a reload.
static NEXT_GENERATION: AtomicU64 = AtomicU64::new(1);

/// Waits for the rate limit, which logins and renewals count against.
pub(super) type Pass<'a> = &'a (dyn Fn() -> BoxFuture<'a, ()> + Sync);

/// The token in use.
#[derive(Clone)]
pub(super) struct Token {
    pub(super) generation: u64,
    /// Marked sensitive.
    pub(super) header: HeaderValue,
    pub(super) fresh_login: bool,
    received: Instant,
    /// `exp − iat`.
    pub(super) life: Option<Duration>,
    pub(super) expires: Option<Timestamp>,
}

impl Token {
    /// Itself, to be masked where the engine says it back.
    pub(super) fn text(&self) -> &str {
        // Made in `keep`, of a text.
        self.header.to_str().ok().and_then(|header| header.strip_prefix(SCHEME)).unwrap_or_default()
    }

    fn is_alive(&self, now: Instant) -> bool {
        self.life.is_none_or(|life| now < self.received + life)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.generation)
    }
}

/// Keeps the token of one engine. Used by one task at a time, so there is never more than one login or renewal in flight.
pub(super) struct Tokens {
    client: Client,
    username: Option<String>,
    secrets: engine::Secrets,
    metrics: Arc<Metrics>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    token: Option<Token>,
    renew_at: Option<Instant>,
    file_changed: Option<SystemTime>,
}

#[derive(Clone, Copy)]
enum Kind {
    Login,
    Renewal,
}

#[derive(Deserialize)]
struct Answer {
    token: String,
}

impl Tokens {
    pub(super) fn new(
        client: Client,
        username: Option<String>,
        secrets: engine::Secrets,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { client, username, secrets, metrics, kept: Mutex::default() }
    }

    pub(super) fn current(&self) -> Option<Token> {
        self.kept().token.clone()
    }

    /// When to renew ahead of time.
    pub(super) fn renew_at(&self) -> Option<Instant> {
        self.kept().renew_at
    }

    /// Whether the token file is another than the one that was read. Stats the file.
    pub(super) fn file_changed(&self) -> bool {
        self.secrets.token_file.as_deref().is_some_and(|path| {
            let known = self.kept().file_changed;
            known.is_some() && changed_at(path).is_some_and(|at| Some(at) != known)
        })
    }

    pub(super) fn has_file(&self) -> bool {
        self.secrets.token_file.is_some()
    }

    /// A token, by the cheapest way that may work: file, renewal (if `renewable`), login. `pass` waits for the rate limit before each request.
    pub(super) async fn get(&self, renewable: bool, pass: Pass<'_>) -> Result<Token, Verdict> {
        if let Some(path) = &self.secrets.token_file
            && (self.current().is_none() || self.file_changed())
        {
            return self.read_file(path);
        }
        if renewable && self.current().is_some_and(|token| token.is_alive(Instant::now())) {
            match self.renew(pass).await {
                Ok(token) => return Ok(token),
                Err(Verdict::Credentials(_)) => {}
                Err(verdict) => return Err(verdict),
            }
        }
        if let Some(path) = &self.secrets.token_file {
            let show = path.display();
            return Err(Verdict::Credentials(format!("the engine refuses the token in `{show}`; put a new one there")));
        }
        self.login(pass).await
    }

    /// Ahead of time: a renewal, else a login. The old token stays in use if neither works.
    pub(super) async fn renew_early(&self, pass: Pass<'_>) -> Result<Token, Verdict> {
        self.kept().renew_at = Some(Instant::now() + RENEWAL_RETRY);
        match self.renew(pass).await {
            Err(Verdict::Credentials(_)) if !self.has_file() => self.login(pass).await,
            result => result,
        }
    }

    async fn renew(&self, pass: Pass<'_>) -> Result<Token, Verdict> {
        let Some(token) = self.current() else { return Err(Verdict::Credentials("there is no token to renew".into())) };
        pass().await;
        let result = self.client.renew(token.header.clone()).await;
        self.take(Kind::Renewal, result, token.text())
    }

    async fn login(&self, pass: Pass<'_>) -> Result<Token, Verdict> {
        let (Some(username), Some(path)) = (&self.username, &self.secrets.password_file) else {
            let text = "neither engine.username and engine.password_file nor engine.token_file are set";
            return Err(Verdict::Credentials(text.into()));
        };
        let password = Secret::read(path).map_err(|error| Verdict::Credentials(format!("{error:#}")))?;
        let body = serde_json::json!({ "username": username, "password": password.expose() }).to_string();
        pass().await;
        let result = self.client.authenticate(Bytes::from(body)).await;
        self.take(Kind::Login, result, password.expose())
    }

    /// What the answer to `shown` means, counted.
    fn take(&self, kind: Kind, result: Result<Reply, SendError>, shown: &str) -> Result<Token, Verdict> {
        let outcome = judge_token(result, shown).and_then(|text| self.keep(&text, matches!(kind, Kind::Login)));
        let result = match &outcome {
            Ok(_) => "success",
            Err(Verdict::Credentials(_)) => "refused",
            Err(_) => "failure",
        };
        let kind = match kind {
            Kind::Login => "login",
            Kind::Renewal => "renew",
        };
        self.metrics.counter("token_refreshes_total", &[("kind", kind), ("result", result)]).increment(1);
        outcome
    }

    fn read_file(&self, path: &Path) -> Result<Token, Verdict> {
        let changed = changed_at(path);
        let secret = Secret::read(path).map_err(|error| Verdict::Credentials(format!("{error:#}")))?;
        self.kept().file_changed = changed;
        self.keep(secret.expose(), false)
    }

    fn keep(&self, text: &str, fresh_login: bool) -> Result<Token, Verdict> {
        let mut header = HeaderValue::from_str(&format!("{SCHEME}{text}"))
            .map_err(|_| Verdict::Credentials("the token holds characters that no header can carry".into()))?;
        header.set_sensitive(true);
        let (life, expires) = life_of(text);
        let received = Instant::now();
        let mut kept = self.kept();
        kept.renew_at = life.map(|life| received + life * 3 / 4);
        let token = Token {
            generation: NEXT_GENERATION.fetch_add(1, Ordering::Relaxed),
            header,
            fresh_login,
            received,
            life,
            expires,
        };
        kept.token = Some(token.clone());
        drop(kept);
        if let Some(expires) = expires {
            self.metrics.gauge("token_expiry_timestamp_seconds", &[]).set(expires.as_millisecond() as f64 / 1e3);
        }
        Ok(token)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The token in the answer of a login or renewal, which was shown the secret `shown`.
fn judge_token(result: Result<Reply, SendError>, shown: &str) -> Result<String, Verdict> {
    if let Ok(reply) = &result
        && reply.status == 200
    {
        return match serde_json::from_slice::<Answer>(&reply.body) {
            Ok(answer) if !answer.token.is_empty() => Ok(answer.token),
            // Not the body: there may be a token in it somewhere.
            Ok(_) | Err(_) => Err(Verdict::NotOurEngine("200 without a token".into())),
        };
    }
    let result = result.map(|reply| reply.masking(shown));
    Err(match judge(&result, SystemTime::now()) {
        Verdict::Token => Verdict::Credentials(format!("the login was refused (401): {}", said(&result))),
        Verdict::Forbidden { status, message } | Verdict::Rejected { status, message } => {
            Verdict::Credentials(format!("the login was refused ({status}): {message}"))
        }
        Verdict::Ambiguous(what) | Verdict::Unread(what) => Verdict::Unreachable(format!("at the login: {what}")),
        other @ (Verdict::Accepted
        | Verdict::Credentials(_)
        | Verdict::ServerError { .. }
        | Verdict::Transient { .. }
        | Verdict::NotOurEngine(_)
        | Verdict::Unreachable(_)) => other,
    })
}

fn said(result: &Result<Reply, SendError>) -> String {
    result.as_ref().map(|reply| super::verdict::message(&reply.body)).unwrap_or_default()
}

fn changed_at(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

/// `exp − iat` and `exp` of a JWT, not verified: the engine does that. Anything else is an opaque token.
fn life_of(text: &str) -> (Option<Duration>, Option<Timestamp>) {
    #[derive(Deserialize)]
    struct Claims {
        exp: Option<f64>,
        iat: Option<f64>,
    }
    let claims = text
        .split('.')
        .nth(1)
        .and_then(|payload| URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok())
        .and_then(|payload| serde_json::from_slice::<Claims>(&payload).ok());
    let Some(Claims { exp: Some(exp), iat }) = claims else { return (None, None) };
    #[expect(clippy::cast_possible_truncation, reason = "as saturates, and jiff checks the range")]
    let expires = Timestamp::from_second(exp as i64).ok();
    let life = iat
        .and_then(|iat| Duration::try_from_secs_f64(exp - iat).ok())
        .filter(|life| *life >= LIFE_MIN)
        .map(|life| life.min(LIFE_MAX));
    (life, expires)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(payload: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn the_life_of_a_token_is_exp_less_iat_and_everything_else_is_opaque() {
        let secs = Duration::from_secs;
        for (text, life, expires) in [
            (jwt(r#"{"exp":4600,"iat":1000}"#), Some(secs(3600)), Some(4600)),
            (jwt(r#"{"exp":4600.5,"iat":1000.5,"sub":"x"}"#), Some(secs(3600)), Some(4600)),
            (jwt(r#"{"exp":4600}"#), None, Some(4600)),
            (jwt(r#"{"iat":4600}"#), None, None),
            (jwt(r#"{"exp":1000,"iat":4600}"#), None, Some(1000)),
            (jwt(r#"{"exp":1e300,"iat":0}"#), None, None),
            (jwt("not JSON"), None, None),
            ("opaque".into(), None, None),
            ("a.b.c".into(), None, None),
            (String::new(), None, None),
        ] {
            assert_eq!(life_of(&text), (life, expires.map(|s| Timestamp::from_second(s).unwrap())), "{text}");
        }
    }

    #[test]
    fn answers_of_a_login() {
        let reply = |status: u16, body: &'static str| {
            Ok(Reply {
                status,
                body: Bytes::from_static(body.as_bytes()),
                complete: true,
                retry_after: None,
                date: None,
            })
        };
        let judged = |result: Result<Reply, SendError>| judge_token(result, "hunter2");
        assert_eq!(judged(reply(200, r#"{"username":"u","token":"t"}"#)), Ok("t".into()));
        assert!(matches!(judged(reply(200, "<html>")), Err(Verdict::NotOurEngine(_))));
        assert!(matches!(judged(reply(200, "")), Err(Verdict::NotOurEngine(_))));
        for status in [400, 401, 403] {
            let Err(Verdict::Credentials(message)) = judged(reply(status, "no hunter2 here")) else {
                panic!("{status}")
            };
            assert!(message.contains("no *** here"), "{message}");
        }
        assert!(matches!(judged(reply(500, "")), Err(Verdict::ServerError { .. })));
        assert!(matches!(judged(Err(SendError::Timeout { sent: true })), Err(Verdict::Unreachable(_))));
    }
}
