//! The tokens that the push server gives out: JWTs like the engine's (HS256, with `exp`), known by their signature alone. The
//! key is drawn at the start, so that a restart ends them all, and anew where another account is configured; a client logs in
//! again, as it must when one expires.

use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::{constant_time, hmac, rand};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// How long one is good, in seconds.
const LIFE_SECONDS: i64 = 3600;
/// The longest that is looked at, in bytes.
const TOKEN_BYTES_MAX: usize = 4096;

/// Signs and knows tokens.
pub(super) struct Tokens {
    key: ArcSwap<hmac::Key>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    sub: String,
    iat: i64,
    exp: i64,
}

impl Tokens {
    pub(super) fn new() -> Self {
        Self { key: ArcSwap::from_pointee(drawn()) }
    }

    /// Every token that was issued before is worth nothing from now on.
    pub(super) fn end_all(&self) {
        self.key.store(Arc::new(drawn()));
    }

    /// A token for `user`.
    pub(super) fn issue(&self, user: &str, now: Timestamp) -> String {
        let iat = now.as_second();
        let claims = Claims { sub: user.to_owned(), iat, exp: iat + LIFE_SECONDS };
        let mut token = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(serde_json::to_vec(&claims).expect("plain claims"), &mut token);
        let tag = hmac::sign(&self.key.load(), token.as_bytes());
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(tag, &mut token);
        token
    }

    /// Whose token it is; `None` if it is not ours or has expired.
    pub(super) fn user(&self, token: &str, now: Timestamp) -> Option<String> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let (signed, tag) = token.rsplit_once('.')?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        hmac::verify(&self.key.load(), signed.as_bytes(), &tag).ok()?;
        let claims = URL_SAFE_NO_PAD.decode(signed.split_once('.')?.1).ok()?;
        let claims: Claims = serde_json::from_slice(&claims).ok()?;
        (now.as_second() < claims.exp).then_some(claims.sub)
    }

    /// Whether two texts are the same, in a time that says nothing about where they differ or how long they are.
    pub(super) fn same(&self, a: &str, b: &str) -> bool {
        let key = self.key.load();
        let tag = |text: &str| hmac::sign(&key, text.as_bytes());
        constant_time::verify_slices_are_equal(tag(a).as_ref(), tag(b).as_ref()).is_ok()
    }
}

fn drawn() -> hmac::Key {
    let mut secret = [0; 32];
    rand::fill(&mut secret).expect("the system has randomness");
    hmac::Key::new(hmac::HMAC_SHA256, &secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_life_and_any_other_is_not() {
        let (tokens, now) = (Tokens::new(), Timestamp::now());
        let token = tokens.issue("cam \"1\"", now);
        assert_eq!(tokens.user(&token, now).as_deref(), Some("cam \"1\""));
        let later = Timestamp::from_second(now.as_second() + LIFE_SECONDS).unwrap();
        assert_eq!(tokens.user(&token, later), None, "expired");
        assert_eq!(Tokens::new().user(&token, now), None, "of another life");
        for n in 0..token.len() {
            let mut forged = token.clone().into_bytes();
            forged[n] = if forged[n] == b'A' { b'B' } else { b'A' };
            assert_eq!(tokens.user(std::str::from_utf8(&forged).unwrap(), now), None, "byte {n}");
        }
        for no in ["", ".", "..", "a.b.c", &"x".repeat(TOKEN_BYTES_MAX + 1)] {
            assert_eq!(tokens.user(no, now), None, "{no}");
        }
        // {"alg":"none"} and no signature.
        let none = format!("eyJhbGciOiJub25lIn0.{}.", token.split('.').nth(1).unwrap());
        assert_eq!(tokens.user(&none, now), None);
    }

    #[test]
    fn texts_are_compared() {
        let tokens = Tokens::new();
        assert!(tokens.same("secret", "secret") && !tokens.same("secret", "secre") && !tokens.same("", "x"));
    }
}
