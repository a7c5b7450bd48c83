//! What one attempt means: the table of the design as one pure function. Not here: whose fault it is (that is `line`).

use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::de::IgnoredAny;

/// The engine's message is kept to so many characters.
const MESSAGE_CHARS_MAX: usize = 300;
/// So much of an answer is looked at for a message, in bytes.
const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// A run of base64 or token characters this long is nobody's prose: it may be an echo of the image or of a token.
const OPAQUE_RUN_MIN: usize = 40;
/// What an answer ends with may be the beginning of a secret: from so many characters on that is taken for one.
const SECRET_START_MIN: usize = 4;
/// A `Retry-After` is believed up to here.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(10);

/// An answer, read to a cap.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    /// At most the cap of the client.
    pub(super) body: Bytes,
    /// Whether `body` is all of it.
    pub(super) complete: bool,
    /// The header as sent.
    pub(super) retry_after: Option<String>,
    /// The engine's `Date`.
    pub(super) date: Option<SystemTime>,
}

impl Reply {
    /// The same without this secret of ours, should it be said back.
    pub(super) fn masking(mut self, secret: &str) -> Self {
        if !self.body.is_empty() {
            self.body = masked(&String::from_utf8_lossy(&self.body), secret).into();
        }
        self
    }
}

/// Why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SendError {
    Connect(String),
    Dns(String),
    Tls(String),
    /// The certificate is not the one that was asked for.
    Certificate(String),
    /// The deadline passed; `sent`: bytes of the request may have left.
    Timeout {
        sent: bool,
    },
    /// The server said that it has not looked at the request (HTTP/2: a refused stream, or one after its GOAWAY).
    Refused(String),
    /// The connection broke.
    Reset {
        sent: bool,
        what: String,
    },
}

/// What one attempt means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The engine has the frame.
    Accepted,
    /// 401: the token, never the frame.
    Token,
    /// The login was refused, or there is nothing to log in with. Only `token` says this.
    Credentials(String),
    /// 403: the permission, or this frame.
    Forbidden { status: u16, message: String },
    /// The request: this frame, or all of them.
    Rejected { status: u16, message: String },
    /// 500: an outage, or this frame.
    ServerError { status: u16, message: String },
    /// Overloaded, or on its way up or down.
    Transient { status: u16, retry_after: Option<Duration>, message: String },
    /// Somebody else answered: a portal, a proxy, the wrong server or certificate.
    NotOurEngine(String),
    /// The server is there and has not looked at the request: it may be sent again.
    Unread(String),
    /// Nobody answered, and nothing was sent.
    Unreachable(String),
    /// Something was sent and no answer came: the engine may have the frame.
    Ambiguous(String),
}

impl Verdict {
    /// The `reason` of `publish_retries_total`.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Verdict::Accepted => "accepted",
            Verdict::Token => "token",
            Verdict::Credentials(_) => "credentials",
            Verdict::Forbidden { .. } => "forbidden",
            Verdict::Rejected { .. } => "rejected",
            Verdict::ServerError { .. } => "server-error",
            Verdict::Transient { .. } => "transient",
            Verdict::NotOurEngine(_) => "unexpected-answer",
            Verdict::Unread(_) => "unread",
            Verdict::Unreachable(_) => "unreachable",
            Verdict::Ambiguous(_) => "ambiguous",
        }
    }

    /// What was said, for people: the reason first, in one bounded line.
    pub(super) fn said(&self) -> String {
        let reason = self.reason();
        match self {
            Verdict::Accepted => reason.to_owned(),
            Verdict::Token => format!("{reason}: status 401"),
            Verdict::Forbidden { status, message }
            | Verdict::Rejected { status, message }
            | Verdict::ServerError { status, message }
            | Verdict::Transient { status, message, .. } => {
                let colon = if message.is_empty() { "" } else { ": " };
                format!("{reason}: status {status}{colon}{message}")
            }
            Verdict::Credentials(what)
            | Verdict::NotOurEngine(what)
            | Verdict::Unread(what)
            | Verdict::Unreachable(what)
            | Verdict::Ambiguous(what) => format!("{reason}: {what}"),
        }
    }
}

/// What this attempt means. `now` is the wall clock, for a `Retry-After` that names a date.
pub(super) fn judge(result: &Result<Reply, SendError>, now: SystemTime) -> Verdict {
    match result {
        Ok(reply) => judge_reply(reply, now),
        Err(SendError::Connect(what)) => Verdict::Unreachable(format!("cannot connect: {what}")),
        Err(SendError::Dns(what)) => Verdict::Unreachable(format!("cannot resolve the engine's name: {what}")),
        Err(SendError::Tls(what)) => Verdict::Unreachable(format!("TLS failed: {what}")),
        Err(SendError::Certificate(what)) => Verdict::NotOurEngine(format!("the certificate was refused: {what}")),
        Err(SendError::Timeout { sent: false }) => Verdict::Unreachable("no connection before the deadline".into()),
        Err(SendError::Timeout { sent: true }) => Verdict::Ambiguous("no answer before the deadline".into()),
        Err(SendError::Refused(what)) => Verdict::Unread(format!("the server did not take the request: {what}")),
        Err(SendError::Reset { sent: false, what }) => Verdict::Unreachable(format!("the connection broke: {what}")),
        Err(SendError::Reset { sent: true, what }) => {
            Verdict::Ambiguous(format!("the connection broke before the answer: {what}"))
        }
    }
}

fn judge_reply(reply: &Reply, now: SystemTime) -> Verdict {
    let status = reply.status;
    let message = || message(&reply.body);
    match status {
        200 if is_engines(reply) => Verdict::Accepted,
        200 => Verdict::NotOurEngine(format!("200 with a body that is not the engine's: {}", message())),
        300..400 => Verdict::NotOurEngine(format!("a redirect ({status}), which is never followed")),
        401 => Verdict::Token,
        403 => Verdict::Forbidden { status, message: message() },
        404 | 405 | 407 | 421 | 426 | 501 | 511 => Verdict::NotOurEngine(format!("status {status}: {}", message())),
        408 | 425 | 429 | 502..=510 | 512..600 => transient(reply, now),
        400..500 => Verdict::Rejected { status, message: message() },
        500 => Verdict::ServerError { status, message: message() },
        _ => Verdict::NotOurEngine(format!("status {status}, which the engine does not use")),
    }
}

fn transient(reply: &Reply, now: SystemTime) -> Verdict {
    // A date is one of the server's clock, so it is held against that one where it shows.
    let now = reply.date.unwrap_or(now);
    let retry_after = reply.retry_after.as_deref().and_then(|text| parse_retry_after(text, now));
    Verdict::Transient { status: reply.status, retry_after, message: message(&reply.body) }
}

/// The engine's 200 is empty; JSON is taken too. A page of HTML is a captive portal's.
fn is_engines(reply: &Reply) -> bool {
    reply.complete && (reply.body.trim_ascii().is_empty() || serde_json::from_slice::<IgnoredAny>(&reply.body).is_ok())
}

/// Seconds or an HTTP date, at most [`RETRY_AFTER_MAX`]; `None` for anything else.
pub(super) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let wait = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// What the engine said, for people: one bounded line without control characters, images or tokens.
pub(super) fn message(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(MESSAGE_BYTES_MAX)]);
    bounded(text.trim())
}

/// `text` with `***` where `secret` was, as it is or with JSON's escapes.
fn masked(text: &str, as_it_is: &str) -> String {
    let (said, secret) = (units(text), units(as_it_is));
    let secret: Vec<u16> = secret.into_iter().map(|(unit, _)| unit).collect();
    let (mut shown, mut shown_to, mut at) = (String::new(), 0, 0);
    while at < said.len() {
        let same = said[at..].iter().zip(&secret).take_while(|((unit, _), wanted)| unit == *wanted).count();
        let cut_off = at + same == said.len() && same >= SECRET_START_MIN;
        if same > 0 && (same == secret.len() || cut_off) {
            shown.push_str(&text[shown_to..said[at].1.start.max(shown_to)]);
            shown.push_str("***");
            at += same;
            shown_to = said[at - 1].1.end;
        } else {
            at += 1;
        }
    }
    shown.push_str(&text[shown_to..]);
    // What looks like an escape may be none, and hold the beginning of it.
    if as_it_is.is_empty() { shown } else { shown.replace(as_it_is, "***") }
}

/// `text` in UTF-16, which is what `\uXXXX` speaks of, with the place of each unit. Backslashes are passed over: a message in JSON
/// in JSON has more of them, and nothing is told by them here.
fn units(text: &str) -> Vec<(u16, Range<usize>)> {
    let mut units = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let after = at + text[at..].bytes().take_while(|byte| *byte == b'\\').count();
        let hex = if after > at && text[after..].starts_with('u') { text.get(after + 1..after + 5) } else { None };
        if let Some(unit) = hex.and_then(|hex| u16::from_str_radix(hex, 16).ok()) {
            units.push((unit, at..after + 5));
            at = after + 5;
        } else {
            let Some(c) = text[after..].chars().next() else { break };
            let end = after + c.len_utf8();
            units.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| (*unit, at..end)));
            at = end;
        }
    }
    units
}

/// `text` as one bounded line, safe to show.
pub(super) fn bounded(text: &str) -> String {
    let mut line = String::new();
    let mut chars = 0;
    for word in text.split_inclusive(|c: char| !is_opaque(c)) {
        let run = word.trim_end_matches(|c: char| !is_opaque(c));
        let shown = if run.len() >= OPAQUE_RUN_MIN { format!("***{}", &word[run.len()..]) } else { word.to_owned() };
        for c in shown.chars() {
            if chars == MESSAGE_CHARS_MAX {
                line.push('…');
                return line;
            }
            chars += 1;
            if c.is_control() || is_direction(c) { line.extend(c.escape_default()) } else { line.push(c) }
        }
    }
    line
}

/// Marks that change the direction of writing can make a line show what it does not say.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Of base64 and tokens, also as JSON (`\/`, `\u002B`), HTML (`&#x2B;`) and addresses (`%2B`) write them.
fn is_opaque(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=' | '-' | '_' | '.' | '\\' | '&' | '#' | ';' | '%')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    fn reply(status: u16, body: &'static str) -> Reply {
        Reply { status, body: Bytes::from_static(body.as_bytes()), complete: true, retry_after: None, date: None }
    }

    fn word(verdict: &Verdict) -> &'static str {
        verdict.reason()
    }

    /// Ranges of statuses that mean the same, one line each.
    fn policy() -> String {
        let now = SystemTime::UNIX_EPOCH;
        let mut rows: Vec<(u16, u16, String)> = Vec::new();
        for status in 100..600 {
            let words: Vec<_> =
                ["", r#"{"a":1}"#, "<html>"].iter().map(|body| word(&judge(&Ok(reply(status, body)), now))).collect();
            let meaning = if words.iter().all(|w| *w == words[0]) {
                words[0].to_owned()
            } else {
                format!("empty: {}, JSON: {}, HTML: {}", words[0], words[1], words[2])
            };
            match rows.last_mut() {
                Some((_, last, m)) if *m == meaning => *last = status,
                _ => rows.push((status, status, meaning)),
            }
        }
        let mut text = String::new();
        for (first, last, meaning) in rows {
            let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
            writeln!(text, "{range:<8}{meaning}").unwrap();
        }
        for (name, error) in [
            ("connect", SendError::Connect(String::new())),
            ("dns", SendError::Dns(String::new())),
            ("tls", SendError::Tls(String::new())),
            ("certificate", SendError::Certificate(String::new())),
            ("timeout, nothing sent", SendError::Timeout { sent: false }),
            ("timeout, sent", SendError::Timeout { sent: true }),
            ("refused", SendError::Refused(String::new())),
            ("reset, nothing sent", SendError::Reset { sent: false, what: String::new() }),
            ("reset, sent", SendError::Reset { sent: true, what: String::new() }),
        ] {
            writeln!(text, "{name:<24}{}", word(&judge(&Err(error), now))).unwrap();
        }
        text
    }

    #[test]
    fn the_whole_policy() {
        assert_eq!(
            policy(),
            "\
100-199 unexpected-answer
200     empty: accepted, JSON: accepted, HTML: unexpected-answer
201-399 unexpected-answer
400     rejected
401     token
402     rejected
403     forbidden
404-405 unexpected-answer
406     rejected
407     unexpected-answer
408     transient
409-420 rejected
421     unexpected-answer
422-424 rejected
425     transient
426     unexpected-answer
427-428 rejected
429     transient
430-499 rejected
500     server-error
501     unexpected-answer
502-510 transient
511     unexpected-answer
512-599 transient
connect                 unreachable
dns                     unreachable
tls                     unreachable
certificate             unexpected-answer
timeout, nothing sent   unreachable
timeout, sent           ambiguous
refused                 unread
reset, nothing sent     unreachable
reset, sent             ambiguous
"
        );
    }

    #[test]
    fn a_200_that_is_too_long_is_not_the_engines() {
        let reply = Reply { complete: false, ..reply(200, "{}") };
        assert_eq!(word(&judge(&Ok(reply), SystemTime::UNIX_EPOCH)), "unexpected-answer");
    }

    #[test]
    fn c2_a_retry_after_is_clamped_and_garbage_is_ignored() {
        let now = httpdate::parse_http_date("Mon, 23 Nov 2026 11:00:00 GMT").unwrap();
        let secs = Duration::from_secs;
        for (text, expected) in [
            ("7", Some(secs(7))),
            (" 0 ", Some(secs(0))),
            ("1000000000", Some(RETRY_AFTER_MAX)),
            ("99999999999999999999999999", Some(RETRY_AFTER_MAX)),
            ("Mon, 23 Nov 2026 11:00:09 GMT", Some(secs(9))),
            ("Mon, 23 Nov 2020 11:00:09 GMT", Some(secs(0))),
            ("Mon, 23 Nov 2099 11:00:09 GMT", Some(RETRY_AFTER_MAX)),
            ("-1", None),
            ("1.5", None),
            ("", None),
            ("soon", None),
        ] {
            assert_eq!(parse_retry_after(text, now), expected, "{text:?}");
        }
    }

    #[test]
    fn a_message_is_one_bounded_line_without_images_or_tokens() {
        assert_eq!(message(b" bad\n\x1b[31mrequest \xff "), "bad\\n\\u{1b}[31mrequest \u{fffd}");
        assert!(message("é ".repeat(5000).as_bytes()).chars().count() <= MESSAGE_CHARS_MAX + 1);
        let echo = format!(r#"{{"expanded":"{}","x":1}}"#, "/9j/4AAQ".repeat(100));
        assert_eq!(message(echo.as_bytes()), r#"{"expanded":"***","x":1}"#);
    }

    #[test]
    fn escapes_do_not_cut_an_image_into_shown_pieces() {
        let image = "+/9j/4AAQ".repeat(100);
        for (plus, slash) in [("\\u002B", "\\/"), ("\\\\u002b", "\\\\/"), ("&#x2B;", "&#47;"), ("%2B", "%2F")] {
            let echo = format!(r#"{{"expanded":"{}","x":1}}"#, image.replace('/', slash).replace('+', plus));
            assert_eq!(message(echo.as_bytes()), r#"{"expanded":"***","x":1}"#);
        }
    }

    #[test]
    fn our_own_secrets_are_masked_however_short_and_however_escaped() {
        for (secret, text, shown) in [
            ("hunter2", "no hunter2, hunter2!", "no ***, ***!"),
            ("hunter2", "no hunter3", "no hunter3"),
            ("aab", "aaab", "a***"),
            ("a+b/c", r#"{"m":"a\u002Bb\/c"}"#, r#"{"m":"***"}"#),
            ("a+b/c", r#""{\"m\":\"a\\u002bb\\\/c\"}""#, r#""{\"m\":\"***\"}""#),
            (r"a\b", r"a\b a\\b a\\\\b", "*** *** ***"),
            ("p\u{e4}s\u{1f600}", r"p\u00E4s\ud83d\uDE00 pä", "*** pä"),
            ("long-secret", "cut off in the middle: long-s", "cut off in the middle: ***"),
            ("long-secret", "at the end: lon", "at the end: lon"),
            ("x", r"\u12", r"\u12"),
            ("x", "", ""),
            ("", "all of it\\", "all of it\\"),
        ] {
            assert_eq!(masked(text, secret), shown, "{secret} in {text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn c2_no_retry_after_panics_or_is_believed_beyond_its_bound(text in "[0-9]{0,40}|[A-Za-z0-9:, -]{0,40}|\\PC{0,20}", seconds in 0_u64..8_000_000_000) {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            proptest::prop_assert!(parse_retry_after(&text, now).is_none_or(|wait| wait <= RETRY_AFTER_MAX));
        }

        #[test]
        fn masking_never_fails_and_leaves_nothing(secret in "[a-c\\\\u0é]{1,6}", text in "[a-c\\\\u0é😀]{0,40}") {
            let shown = masked(&text, &secret);
            proptest::prop_assert!(shown == text || shown.contains("***"));
            proptest::prop_assert!(!shown.contains(&secret));
        }
    }

    #[test]
    fn what_looks_like_an_escape_before_a_secret_does_not_hide_it() {
        assert_eq!(masked(r"token \ua00a-bcd", "a00a-bcd"), r"token \u***");
    }

    #[test]
    fn a_date_to_wait_for_is_held_against_the_servers_own_clock() {
        let servers = SystemTime::UNIX_EPOCH + Duration::from_hours(24 * 365 * 50);
        let mut reply = reply(503, "");
        reply.date = Some(servers);
        reply.retry_after = Some(httpdate::fmt_http_date(servers + Duration::from_secs(7)));
        let years = Duration::from_hours(24 * 365 * 5);
        for ours in [servers - years, servers, servers + years] {
            let Verdict::Transient { retry_after, .. } = judge(&Ok(reply.clone()), ours) else { panic!("{ours:?}") };
            assert_eq!(retry_after, Some(Duration::from_secs(7)), "{ours:?}");
        }
    }
}
