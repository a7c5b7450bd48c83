//! What can be ordered to go wrong: [`Faults`] hold until changed, an [`Action`] is for one publish request. Plain data; `simulator` acts on it.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

/// How the engine behaves; everything off by default. Shares are between 0 and 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Share of publish requests answered with one of `error_statuses`.
    pub error_rate: f64,
    /// The statuses for it, drawn evenly.
    pub error_statuses: Vec<u16>,
    /// `Retry-After` of every error we inject, as it is: seconds, a date, or garbage.
    pub retry_after: Option<String>,
    /// Every publish request takes this long after its body was read …
    #[serde(with = "humantime_serde")]
    pub latency: Duration,
    /// … and up to this much more.
    #[serde(with = "humantime_serde")]
    pub jitter: Duration,
    /// Publish requests served at once; what is beyond gets 503.
    pub capacity: Option<usize>,
    /// Publish requests per second (a tenth of it at once); what is beyond gets 429.
    pub rate: Option<f64>,
    /// Life of the tokens given out from now on.
    #[serde(with = "humantime_serde")]
    pub token_ttl: Duration,
    /// A new token ends all older ones.
    pub single_token: bool,
    /// The status for logins, good or bad.
    pub login_status: Option<u16>,
    /// The status for renewals, good or bad.
    pub renew_status: Option<u16>,
    /// The status for every publish request with a valid token.
    pub answer_all: Option<u16>,
    /// The status for the frames of a detector: 403 for one that is not permitted.
    pub by_detector: BTreeMap<String, u16>,
    /// The status for one image, by its SHA-256 in lower-case hexadecimal.
    pub by_image: BTreeMap<String, u16>,
    /// Share of the images that are always refused with 400; which ones depends on their bytes alone.
    pub refuse_share: f64,
    /// A captive portal: 200 and a page of HTML for everything.
    pub portal: bool,
    /// Everything is redirected.
    pub redirect: Option<Redirect>,
    /// Share of publish requests whose connection is cut before the body is read.
    pub cut_before: f64,
    /// Share of frames that are taken and whose connection is cut instead of an answer.
    pub cut_after: f64,
    /// Share of publish requests that are read and never answered.
    pub hang: f64,
    /// The engine's clock runs this many seconds ahead: in `Date` and in tokens.
    pub clock_offset_seconds: i64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            error_rate: 0.0,
            error_statuses: vec![500, 502, 503],
            retry_after: None,
            latency: Duration::ZERO,
            jitter: Duration::ZERO,
            capacity: None,
            rate: None,
            token_ttl: Duration::from_hours(1),
            single_token: false,
            login_status: None,
            renew_status: None,
            answer_all: None,
            by_detector: BTreeMap::new(),
            by_image: BTreeMap::new(),
            refuse_share: 0.0,
            portal: false,
            redirect: None,
            cut_before: 0.0,
            cut_after: 0.0,
            hang: 0.0,
            clock_offset_seconds: 0,
        }
    }
}

/// A status with a place to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// 301, 302, 307 or 308.
    pub status: u16,
    /// The `Location`.
    pub location: String,
}

/// What happens to one publish request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// What the faults and the checks say.
    Serve,
    /// This answer, whatever the request; the frame is not taken.
    Answer(Reply),
    /// The connection is cut before the body is read.
    CutBefore,
    /// The frame is taken if it passes, then the connection is cut.
    CutAfter,
    /// The body is read, then silence.
    Hang,
    /// The frame is taken if it passes; the answer's body comes at a byte a second.
    Trickle,
    /// The frame is taken if it passes; the answer's headers never end (HTTP/1.1 without TLS; otherwise silence).
    EndlessHeaders,
    /// The frame is taken if it passes; the answer is a gibibyte long.
    Flood,
}

impl Action {
    /// An answer with this status and a short message.
    pub fn status(status: u16) -> Self {
        Action::Answer(Reply { status, headers: Vec::new(), body: r#"{"message":"scripted"}"#.into() })
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// More headers: `Retry-After`, `Location`, `Content-Type` (JSON if none is given).
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// The body.
    #[serde(default)]
    pub body: String,
}

impl Faults {
    /// What chance has for one publish request.
    pub(super) fn draw(&self, rng: &mut Rng) -> Action {
        let mut hit = |share: f64| share > 0.0 && rng.f64() < share;
        if hit(self.cut_before) {
            Action::CutBefore
        } else if hit(self.hang) {
            Action::Hang
        } else if hit(self.cut_after) {
            Action::CutAfter
        } else if hit(self.error_rate)
            && let Some(status) = rng.choice(&self.error_statuses)
        {
            Action::Answer(self.error(*status))
        } else {
            Action::Serve
        }
    }

    /// An injected error, with `Retry-After` where one is set.
    pub(super) fn error(&self, status: u16) -> Reply {
        let headers = self.retry_after.iter().map(|text| ("retry-after".to_owned(), text.clone())).collect();
        Reply { status, headers, body: r#"{"message":"injected"}"#.into() }
    }

    /// Whether this image is one of the `refuse_share`.
    pub(super) fn refuses(&self, sha256: &[u8; 32]) -> bool {
        let draw = u32::from_be_bytes([sha256[0], sha256[1], sha256[2], sha256[3]]);
        f64::from(draw) < self.refuse_share * (f64::from(u32::MAX) + 1.0)
    }

    /// Whether frames have to be hashed to know their fate.
    pub(super) fn need_hash(&self) -> bool {
        self.refuse_share > 0.0 || !self.by_image.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_met_and_the_seed_decides() {
        let faults = Faults { error_rate: 0.3, error_statuses: vec![500, 503], ..Faults::default() };
        let errors = |seed| {
            let mut rng = Rng::with_seed(seed);
            (0..10_000).filter(|_| faults.draw(&mut rng) != Action::Serve).count()
        };
        assert!((2_800..3_200).contains(&errors(1)), "{}", errors(1));
        assert_eq!(errors(1), errors(1));
    }

    #[test]
    fn refusal_depends_on_the_image_alone() {
        let faults = Faults { refuse_share: 0.25, ..Faults::default() };
        let refused = (0..=255u8).filter(|first| faults.refuses(&[*first; 32])).count();
        assert_eq!(refused, 64);
        assert!(!Faults::default().refuses(&[0; 32]));
        assert!(Faults { refuse_share: 1.0, ..Faults::default() }.refuses(&[255; 32]));
    }

    #[test]
    fn faults_and_scripts_read_from_json() {
        let faults: Faults =
            serde_json::from_str(r#"{"error_rate":0.5,"latency":"20ms","by_detector":{"Lobby":403}}"#).expect("faults");
        assert_eq!((faults.latency, faults.by_detector["Lobby"]), (Duration::from_millis(20), 403));
        assert!(serde_json::from_str::<Faults>(r#"{"eror_rate":0.5}"#).is_err(), "unknown keys are errors");
        let script: Vec<Action> =
            serde_json::from_str(r#"["hang",{"answer":{"status":429,"headers":[["Retry-After","7"]]}}]"#)
                .expect("script");
        assert_eq!(script[0], Action::Hang);
    }
}
