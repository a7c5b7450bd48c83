//! What the push server says: as the engine does, an empty 200 or a problem document that names the field.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::source::message::Flaw;

/// An answer, ready to be sent.
pub(super) type Answer = Response<Full<Bytes>>;

/// Seconds after which it is worth trying again: what is full or broken for a while.
const RETRY_AFTER_SECONDS: &str = "5";
/// And what is busy for a moment.
const RETRY_SOON_SECONDS: &str = "1";

/// The frame is ours now.
pub(super) fn accepted() -> Answer {
    Response::new(Full::default())
}

/// What a login or renewal gives.
pub(super) fn token(username: &str, token: &str) -> Answer {
    let answer = document(StatusCode::OK, "application/json", &json!({ "username": username, "token": token }));
    with(answer, CACHE_CONTROL, "no-store")
}

/// The request is wrong.
pub(super) fn wrong(flaw: &Flaw) -> Answer {
    let mut problem = problem(StatusCode::BAD_REQUEST, &flaw.to_string());
    if let Some(field) = flaw.field {
        problem["errors"] = json!({ field: [flaw.message] });
    }
    document(StatusCode::BAD_REQUEST, "application/problem+json", &problem)
}

/// No token, or not a good one; or no account of ours.
pub(super) fn unauthorized(detail: &str) -> Answer {
    with(refused(StatusCode::UNAUTHORIZED, detail), WWW_AUTHENTICATE, "Bearer")
}

/// It is more than we take. The rest of it is not read.
pub(super) fn too_large(max: u64) -> Answer {
    let answer = refused(StatusCode::PAYLOAD_TOO_LARGE, &format!("at most {max} bytes are taken"));
    with(answer, CONNECTION, "close")
}

/// It did not come in time.
pub(super) fn too_slow() -> Answer {
    let answer = refused(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
    with(answer, CONNECTION, "close")
}

/// Too much comes at once.
pub(super) fn busy(detail: &str) -> Answer {
    with(refused(StatusCode::TOO_MANY_REQUESTS, detail), RETRY_AFTER, RETRY_SOON_SECONDS)
}

/// Nothing can be kept now.
pub(super) fn unavailable(detail: &str) -> Answer {
    with(refused(StatusCode::SERVICE_UNAVAILABLE, detail), RETRY_AFTER, RETRY_AFTER_SECONDS)
}

/// There is no such call.
pub(super) fn not_found() -> Answer {
    refused(
        StatusCode::NOT_FOUND,
        "here are POST /api/v1/authenticate, GET /api/v1/renewToken, POST /api/v1/faceEdge/publish and POST /frames/{detector}",
    )
}

/// There is, with another method.
pub(super) fn other_method(allowed: &'static str) -> Answer {
    with(refused(StatusCode::METHOD_NOT_ALLOWED, &format!("only {allowed}")), ALLOW, allowed)
}

fn refused(status: StatusCode, detail: &str) -> Answer {
    document(status, "application/problem+json", &problem(status, detail))
}

fn problem(status: StatusCode, detail: &str) -> Value {
    let title = status.canonical_reason().unwrap_or_default();
    json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail })
}

fn document(status: StatusCode, content_type: &'static str, body: &Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_string())));
    *answer.status_mut() = status;
    with(answer, CONTENT_TYPE, content_type)
}

fn with(mut answer: Answer, name: HeaderName, value: &'static str) -> Answer {
    answer.headers_mut().insert(name, HeaderValue::from_static(value));
    answer
}
