//! What a request to the push server means: log in, renew, push a frame. The engine's own calls, and one for raw images.
//!
//! Not here: connections and their bounds (`server`), and how an answer is written (`answer`).

use std::borrow::Cow;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH};
use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::answer::{self, Answer};
use super::{Door, Route};
use crate::frame::{FrameId, SourceKind};
use crate::secret::Secret;
use crate::source::believed;
use crate::source::message::{self, Flaw, Image, Known};
use crate::source::spool::{self, Arrival, Refused};

/// For the whole body of a request.
const BODY_MAX: Duration = Duration::from_secs(30);
/// Bytes of a login.
const LOGIN_BYTES_MAX: u64 = 16 << 10;
/// Who tries passwords waits so long for each answer.
const LOGIN_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a refused request that are read nevertheless, and for how long, so that its sender gets to read the answer.
const DRAIN_BYTES_MAX: u64 = 1 << 20;
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// The engine in the cloud has its API below this.
const PREFIX: &str = "/identities";

/// An answer that ends a call early; boxed, since most never do.
type Refusal = Box<Answer>;

/// A body in memory, with its room there.
struct Body {
    bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

#[derive(Deserialize)]
struct Login {
    username: String,
    password: String,
}

/// Answers any request at all. `peer` is for people.
pub(super) async fn answer(door: &Door, request: Request<Incoming>, peer: &str) -> Answer {
    let (parts, mut body) = request.into_parts();
    let answer = route(door, &parts.method, parts.uri.path(), &parts.headers, &mut body, peer).await;
    if !body.is_end_stream() {
        drain(&parts.headers, body).await;
    }
    let status = answer.status();
    door.metrics.counter("push_answers_total", &[("status", status.as_str())]).increment(1);
    answer
}

async fn route(
    door: &Door,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    body: &mut Incoming,
    peer: &str,
) -> Answer {
    let path = path.strip_prefix(PREFIX).unwrap_or(path);
    let raw = path.strip_prefix("/frames/");
    let wanted = match path {
        "/api/v1/authenticate" | "/api/v1/faceEdge/publish" => Method::POST,
        "/api/v1/renewToken" => Method::GET,
        _ if raw.is_some() => Method::POST,
        _ => return answer::not_found(),
    };
    if *method != wanted {
        return answer::other_method(if wanted == Method::GET { "GET" } else { "POST" });
    }
    let done = match (path, raw) {
        ("/api/v1/authenticate", _) => authenticate(door, headers, body).await,
        ("/api/v1/renewToken", _) => renew(door, headers),
        (_, Some(detector)) => publish_raw(door, headers, detector, body, peer).await,
        (_, None) => publish(door, headers, body, peer).await,
    };
    done.unwrap_or_else(|refused| *refused)
}

/// The engine's login. Where we have no account to ask for, everybody is let in.
async fn authenticate(door: &Door, headers: &HeaderMap, body: &mut Incoming) -> Result<Answer, Refusal> {
    let body = read(door, headers, body, LOGIN_BYTES_MAX).await?;
    let login: Login = serde_json::from_slice(&body.bytes).map_err(|_| -> Refusal {
        // Not serde's words: they may hold the password.
        let message = r#"is not {"username":"…","password":"…"}"#.to_owned();
        answer::wrong(&Flaw { field: None, message }).into()
    })?;
    let config = door.config.load_full();
    if let (Some(username), Some(file)) = (&config.username, &config.password_file) {
        let path = (door.files)(file);
        let password = tokio::task::spawn_blocking(move || Secret::read(&path)).await;
        let password = password.map_err(anyhow::Error::from).flatten().map_err(|error| {
            tracing::error!("nobody can log in to push: {error:#}");
            Refusal::from(answer::unavailable("the password cannot be read here"))
        })?;
        let known = door.tokens.same(&login.username, username);
        if !(door.tokens.same(&login.password, password.expose()) && known) {
            tokio::time::sleep(LOGIN_PAUSE).await;
            return Err(answer::unauthorized("unknown account or wrong password").into());
        }
    }
    Ok(answer::token(&login.username, &door.tokens.issue(&login.username, Timestamp::now())))
}

fn renew(door: &Door, headers: &HeaderMap) -> Result<Answer, Refusal> {
    let user = let_in(door, headers)?.unwrap_or_default();
    Ok(answer::token(&user, &door.tokens.issue(&user, Timestamp::now())))
}

/// The engine's own call.
async fn publish(door: &Door, headers: &HeaderMap, body: &mut Incoming, peer: &str) -> Result<Answer, Refusal> {
    let_in(door, headers)?;
    let body = read(door, headers, body, message::bytes_max(door.max_frame)).await?;
    let (image, known) = message::json(&body.bytes).map_err(|flaw| Refusal::from(answer::wrong(&flaw)))?;
    let image = look(door, &body.bytes, &image)?;
    keep(door, known, peer, image).await
}

/// A raw image, with what is known about it in path and headers.
async fn publish_raw(
    door: &Door,
    headers: &HeaderMap,
    detector: &str,
    body: &mut Incoming,
    peer: &str,
) -> Result<Answer, Refusal> {
    let_in(door, headers)?;
    let known = known_of(headers, detector).map_err(|flaw| Refusal::from(answer::wrong(&flaw)))?;
    let body = read(door, headers, body, door.max_frame).await?;
    let image = look(door, &body.bytes, &Image::Raw(&body.bytes))?;
    keep(door, known, peer, image).await
}

fn known_of(headers: &HeaderMap, detector: &str) -> Result<Known, Flaw> {
    let detector = percent_decode_str(detector).decode_utf8();
    let detector =
        detector.map_err(|_| Flaw { field: Some("detectorName"), message: "is not UTF-8 in the path".into() })?;
    let header =
        |name: &str| headers.get(name).map(|value| value.to_str().map_or(Cow::Borrowed("not ASCII"), Cow::Borrowed));
    let (time, zone) = (header("detect-time-utc"), header("iana-time-zone"));
    Known::from_fields(Some(&detector), time.as_deref(), zone.as_deref())
}

/// Looks at the image before anybody is told that we have it.
fn look(door: &Door, body: &Bytes, image: &Image<'_>) -> Result<spool::Image, Refusal> {
    spool::Image::look(image, body, door.max_frame).map_err(|flaw| match flaw {
        spool::Flaw::TooLarge => answer::too_large(door.max_frame).into(),
        spool::Flaw::Unusable(message) => answer::wrong(&Flaw { field: Some("expanded"), message }).into(),
    })
}

async fn keep(door: &Door, known: Known, peer: &str, image: spool::Image) -> Result<Answer, Refusal> {
    let routes = door.routes.load_full();
    let (route, detector) =
        route_of(&routes, known.detector_name.as_deref()).map_err(|flaw| Refusal::from(answer::wrong(&flaw)))?;
    let received_at = Timestamp::now();
    let detect_time = believed(known.detect_time, received_at, &door.metrics);
    let arrival = Arrival {
        id: FrameId::generate(),
        entry: route.entry.name.as_str().into(),
        source: SourceKind::Push,
        time_zone: known.time_zone.unwrap_or_else(|| route.entry.time_zone.clone()),
        detect_time: detect_time.unwrap_or(received_at),
        received_at,
        name: peer.to_owned(),
        image,
        flaw: None,
        detector: detector.clone(),
    };
    match door.spool.put(arrival).await {
        Ok(()) => {
            door.heard(&route.entry.name, &detector);
            Ok(answer::accepted())
        }
        Err(refused @ Refused::Busy) => Err(answer::busy(&refused.to_string()).into()),
        Err(refused @ (Refused::Full | Refused::Stopping)) => Err(answer::unavailable(&refused.to_string()).into()),
        // Its words name paths of ours.
        Err(Refused::Broken(_)) => Err(answer::unavailable("nothing can be kept at the moment").into()),
    }
}

/// The entry for a frame and the name that it gets: an entry of exactly this name before one with placeholders. A frame
/// without a name belongs to the only entry of one name, if there is no other.
fn route_of<'a>(routes: &'a [Route], name: Option<&str>) -> Result<(&'a Route, String), Flaw> {
    let wrong = |message: String| Flaw { field: Some("detectorName"), message };
    let filled = |route: &Route| {
        let field = |key: &str| name.filter(|_| key == "detectorName").map(str::to_owned);
        route.name.fill(&[], field)
    };
    let mut fixed = routes.iter().filter(|route| route.name.is_fixed());
    let Some(name) = name else {
        return match (routes, fixed.next()) {
            ([only], Some(_)) => Ok((only, only.entry.name.clone())),
            _ => Err(wrong("is missing or empty".into())),
        };
    };
    if let Some(route) = fixed.find(|route| route.entry.name == name) {
        return Ok((route, name.to_owned()));
    }
    let family = routes.iter().filter(|route| !route.name.is_fixed());
    let found = { family }.find_map(|route| Some((route, filled(route)?)));
    found.ok_or_else(|| wrong("is not the name of a detector that frames are pushed for here".into()))
}

/// Whose token it is; `None` where none is asked for.
fn let_in(door: &Door, headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    let user = bearer.and_then(|token| door.tokens.user(token, Timestamp::now()));
    let config = door.config.load();
    if config.has_credentials() && user.as_deref() != config.username.as_deref() {
        return Err(answer::unauthorized("log in at /api/v1/authenticate, and send the token as a bearer").into());
    }
    Ok(user)
}

/// Reads a body into memory, if there is room for it, and no more of it than is allowed.
async fn read(door: &Door, headers: &HeaderMap, body: &mut Incoming, max: u64) -> Result<Body, Refusal> {
    let until = Instant::now() + BODY_MAX;
    let announced = announced(headers);
    if announced.is_some_and(|length| length > max) {
        return Err(answer::too_large(max).into());
    }
    let mut read = BytesMut::new();
    let mut room: Option<OwnedSemaphorePermit> = None;
    loop {
        let frame = timeout_at(until, body.frame()).await.map_err(|_| Refusal::from(answer::too_slow()))?;
        let data = match frame {
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            // Nobody is left to read the answer.
            Some(Err(_)) => return Err(answer::too_slow().into()),
            None => return Ok(Body { bytes: read.freeze(), _room: room }),
        };
        let length = (read.len() + data.len()) as u64;
        if length > max {
            return Err(answer::too_large(max).into());
        }
        // Room for what has really come: who announces much and sends nothing takes none.
        let held = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits) as u64;
        let needed = u32::try_from(length.div_ceil(1 << 10).saturating_sub(held)).unwrap_or(u32::MAX);
        if needed > 0 {
            let more = door.memory.clone().try_acquire_many_owned(needed);
            let more = more.map_err(|_| Refusal::from(answer::busy("too many frames come at once")))?;
            match &mut room {
                Some(room) => room.merge(more),
                None => room = Some(more),
            }
        }
        if read.is_empty() {
            let likely = announced.unwrap_or(0).min(max).min(length.max(1) * 16);
            read.reserve(usize::try_from(likely).unwrap_or(0));
        }
        read.extend_from_slice(&data);
    }
}

/// Reads away what is left of a refused request, if it is little.
async fn drain(headers: &HeaderMap, mut body: Incoming) {
    if announced(headers).is_none_or(|length| length > DRAIN_BYTES_MAX) {
        return;
    }
    let until = Instant::now() + DRAIN_MAX;
    while let Ok(Some(Ok(_))) = timeout_at(until, body.frame()).await {}
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Template;
    use std::sync::Arc;

    fn routes(names: &[&str]) -> Vec<Route> {
        let route = |name: &&str| {
            let text = format!("name = '{name}'\ntime_zone = 'UTC'\npush = {{}}");
            let entry: crate::source::Entry = toml::from_str(&text).unwrap();
            Route { name: Template::parse(name, entry.source.placeholders()).unwrap(), entry: Arc::new(entry) }
        };
        names.iter().map(route).collect()
    }

    #[test]
    fn a_frame_goes_to_the_entry_of_its_name_before_a_family() {
        for (names, sent, found) in [
            (&["{detectorName}", "Lobby"][..], Some("Lobby"), Some(("Lobby", "Lobby"))),
            (&["{detectorName}", "Lobby"], Some("Other"), Some(("{detectorName}", "Other"))),
            (&["site-{detectorName}"], Some("A"), Some(("site-{detectorName}", "site-A"))),
            (&["Lobby"], Some("Other"), None),
            (&["Lobby"], None, Some(("Lobby", "Lobby"))),
            (&["Lobby", "Door"], None, None),
            (&["{detectorName}"], None, None),
            (&[], Some("A"), None),
        ] {
            let routes = routes(names);
            let got = route_of(&routes, sent).ok();
            let got = got.as_ref().map(|(route, name)| (route.entry.name.as_str(), name.as_str()));
            assert_eq!(got, found, "{names:?} {sent:?}");
        }
        assert_eq!(route_of(&routes(&["Lobby"]), Some("X")).unwrap_err().field, Some("detectorName"));
    }
}
