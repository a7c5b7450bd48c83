//! Answers as HTTP: empty, JSON, as ordered, without end. No decisions here.

use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Either, Full, StreamBody};
use hyper::body::Frame;
use jiff::{SignedDuration, Timestamp};

use super::{Faults, Reply};

/// Time between the bytes of a trickle.
const TRICKLE_EVERY: Duration = Duration::from_secs(1);
/// Length of the answer of a trickle, bytes.
const TRICKLE_BYTES: usize = 3600;
/// Length of the answer of a flood, bytes.
const FLOOD_BYTES: usize = 1 << 30;
/// One piece of it.
static FLOOD_PIECE: [u8; 64 << 10] = [b' '; 64 << 10];

pub(super) type Answer = Response<Either<Full<Bytes>, UnsyncBoxBody<Bytes, Infallible>>>;

/// The answer of something that is not the engine: a portal or a redirect.
pub(super) fn elsewhere(faults: &Faults) -> Option<Answer> {
    if faults.portal {
        let page = "<!doctype html><title>Welcome</title><p>Please accept the terms of this network.";
        return Some(typed(StatusCode::OK, "text/html; charset=utf-8", page));
    }
    let redirect = faults.redirect.as_ref()?;
    let headers = vec![(LOCATION.to_string(), redirect.location.clone())];
    Some(reply(&Reply { status: redirect.status, headers, body: String::new() }))
}

pub(super) fn clock_offset(faults: &Faults) -> SignedDuration {
    SignedDuration::from_secs(faults.clock_offset_seconds)
}

/// Our clock with the offset, as far as a date can say it.
pub(super) fn date(offset: SignedDuration) -> HeaderValue {
    let now = Timestamp::now().checked_add(offset).unwrap_or(Timestamp::UNIX_EPOCH);
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    let text = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds));
    HeaderValue::from_str(&text).expect("a date is ASCII")
}

pub(super) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Either::Left(Full::default()));
    *answer.status_mut() = status;
    answer
}

pub(super) fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(super) fn json(status: StatusCode, body: &impl serde::Serialize) -> Answer {
    typed(status, "application/json", serde_json::to_vec(body).expect("our own data is JSON"))
}

pub(super) fn message(status: StatusCode, text: &str) -> Answer {
    json(status, &serde_json::json!({ "message": text }))
}

pub(super) fn status(status: StatusCode) -> Answer {
    message(status, status.canonical_reason().unwrap_or_default())
}

/// An answer as it was ordered; what HTTP does not allow in it shows as 500 with the reason.
pub(super) fn reply(ordered: &Reply) -> Answer {
    let Ok(code) = StatusCode::from_u16(ordered.status) else {
        return message(StatusCode::INTERNAL_SERVER_ERROR, &format!("ordered status {} is none", ordered.status));
    };
    let mut answer = typed(code, "application/json", ordered.body.clone());
    for (name, value) in &ordered.headers {
        match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            (Ok(name), Ok(value)) => drop(answer.headers_mut().insert(name, value)),
            (Err(_), _) | (_, Err(_)) => {
                return message(StatusCode::INTERNAL_SERVER_ERROR, &format!("ordered header {name} is none"));
            }
        }
    }
    answer
}

/// Blanks, one at a time.
pub(super) fn trickle() -> Answer {
    let pieces = stream::iter(0..TRICKLE_BYTES).then(|_| async {
        tokio::time::sleep(TRICKLE_EVERY).await;
        Bytes::from_static(b" ")
    });
    streamed(TRICKLE_BYTES, pieces)
}

/// Blanks, as fast as they are read.
pub(super) fn flood() -> Answer {
    let pieces = (0..FLOOD_BYTES / FLOOD_PIECE.len()).map(|_| Bytes::from_static(&FLOOD_PIECE));
    streamed(FLOOD_BYTES, stream::iter(pieces))
}

fn streamed(length: usize, pieces: impl stream::Stream<Item = Bytes> + Send + 'static) -> Answer {
    let body = StreamBody::new(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))));
    let mut answer = Response::new(Either::Right(body.boxed_unsync()));
    answer.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
