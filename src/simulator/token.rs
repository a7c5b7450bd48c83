//! The tokens that the simulated engine gives out: real JWTs (HS256), live until they expire or are revoked.
//!
//! A request's token is looked up among the live ones and not verified again: what we did not sign is not among them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// Tokens held at once; beyond it the one that ends first is forgotten.
const LIVE_MAX: usize = 10_000;

/// Signs, knows and revokes tokens.
pub(super) struct Tokens {
    key: hmac::Key,
    live: Mutex<HashMap<String, Instant>>,
    issued: AtomicU64,
}

impl Tokens {
    pub(super) fn new(secret: &[u8]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
            live: Mutex::new(HashMap::new()),
            issued: AtomicU64::new(0),
        }
    }

    /// A token for `user`, accepted for `ttl` from now. Its claims are in the engine's own clock, `clock_offset` away from ours.
    pub(super) fn issue(&self, user: &str, ttl: Duration, clock_offset: SignedDuration) -> String {
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let iat = Timestamp::now().as_second().saturating_add(clock_offset.as_secs());
        // Whole seconds, rounded up: `exp - iat` is never zero.
        let life = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        let claims = serde_json::json!({
            "sub": user, "iat": iat, "exp": iat.saturating_add(life), "jti": format!("{number:08x}-{:016x}", fastrand::u64(..)),
        });
        let mut token = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut token);
        let tag = hmac::sign(&self.key, token.as_bytes());
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(tag.as_ref(), &mut token);
        self.remember(token.clone(), Instant::now() + ttl);
        token
    }

    /// Whether a request with this token is let in now.
    pub(super) fn is_live(&self, token: &str) -> bool {
        self.live.lock().expect("tokens lock").get(token).is_some_and(|end| Instant::now() < *end)
    }

    /// Every token given out so far is refused from now on.
    pub(super) fn revoke_all(&self) {
        self.live.lock().expect("tokens lock").clear();
    }

    fn remember(&self, token: String, end: Instant) {
        let mut live = self.live.lock().expect("tokens lock");
        if live.len() >= LIVE_MAX {
            let now = Instant::now();
            live.retain(|_, end| *end > now);
        }
        if live.len() >= LIVE_MAX
            && let Some(first) = live.iter().min_by_key(|(_, end)| **end).map(|(token, _)| token.clone())
        {
            live.remove(&first);
        }
        live.insert(token, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_jwt_that_anyone_with_the_key_can_verify() {
        let tokens = Tokens::new(b"a secret");
        let token = tokens.issue("edge-07", Duration::from_secs(90), SignedDuration::ZERO);
        let parts: Vec<_> = token.split('.').collect();
        assert_eq!(parts.len(), 3, "{token}");
        let json = |part: &str| -> serde_json::Value {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
        };
        assert_eq!(json(parts[0]), serde_json::json!({"alg": "HS256", "typ": "JWT"}));
        let claims = json(parts[1]);
        assert_eq!(claims["sub"], "edge-07");
        assert_eq!(claims["exp"].as_i64().expect("exp") - claims["iat"].as_i64().expect("iat"), 90);
        assert!(claims["jti"].is_string());
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"a secret");
        let tag = URL_SAFE_NO_PAD.decode(parts[2]).expect("base64url");
        hmac::verify(&key, format!("{}.{}", parts[0], parts[1]).as_bytes(), &tag).expect("signature");
    }

    #[test]
    fn tokens_end_by_time_and_by_revocation() {
        let tokens = Tokens::new(b"a secret");
        let first = tokens.issue("u", Duration::ZERO, SignedDuration::ZERO);
        assert!(!tokens.is_live(&first), "expired");
        let second = tokens.issue("u", Duration::from_secs(4), SignedDuration::ZERO);
        assert!(tokens.is_live(&second) && !tokens.is_live("made.up.token"));
        assert_ne!(first, second);
        tokens.revoke_all();
        assert!(!tokens.is_live(&second), "revoked");
    }

    #[test]
    fn the_number_of_live_tokens_is_bounded() {
        let tokens = Tokens::new(b"a secret");
        for _ in 0..LIVE_MAX + 10 {
            tokens.issue("u", Duration::from_mins(1), SignedDuration::ZERO);
        }
        assert_eq!(tokens.live.lock().expect("lock").len(), LIVE_MAX);
    }
}
