//! What the simulated engine answers: the calls, the faults in their order, the control calls. Connections are `simulator`'s affair.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use bytes::{Bytes, BytesMut};
use fastrand::Rng;
use http::header::{CONTENT_LENGTH, DATE};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answer::{
    Answer, clock_offset, date, elsewhere, empty, flood, json, message, reply, status, trickle, typed,
};
use super::records::{Accepted, Call, Records, hex};
use super::{Action, Faults, Options, check, tls, token, wire};

/// Largest request body read, bytes.
const BODY_MAX: usize = 64 << 20;
/// Where the control calls live.
const CONTROL: &str = "/__simulator/";

/// What all connections share.
pub(super) struct Engine {
    pub(super) options: Options,
    pub(super) tls: Option<tls::Tls>,
    pub(super) faults: ArcSwap<Faults>,
    /// Held while the faults are changed, so that no change is lost.
    changing: Mutex<()>,
    pub(super) script: Mutex<VecDeque<Action>>,
    pub(super) tokens: token::Tokens,
    records: Mutex<Records>,
    pub(super) changed: Notify,
    held: watch::Sender<bool>,
    rng: Mutex<Rng>,
    /// What the rate fault has left, and when that was so.
    allowance: Mutex<(f64, Instant)>,
    /// The connections that [`cut_connections`](Self::cut_connections) would cut.
    pub(super) open: Mutex<OpenLines>,
}

impl Engine {
    pub(super) fn new(options: Options, tls: Option<tls::Tls>) -> Self {
        let secret = Rng::new().u128(..).to_be_bytes();
        Self {
            tls,
            faults: ArcSwap::from_pointee(options.faults.clone()),
            changing: Mutex::new(()),
            script: Mutex::new(VecDeque::new()),
            tokens: token::Tokens::new(&secret),
            records: Mutex::new(Records::default()),
            changed: Notify::new(),
            held: watch::Sender::new(false),
            rng: Mutex::new(Rng::with_seed(options.seed)),
            allowance: Mutex::new((0.0, Instant::now())),
            open: Mutex::new(OpenLines::default()),
            options,
        }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Faults)) {
        let _changing = self.changing.lock().expect("changing lock");
        let mut faults = Faults::clone(&self.faults.load());
        change(&mut faults);
        self.faults.store(Arc::new(faults));
    }

    pub(super) fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    /// What it gives is empty as soon as nothing more is read from any of them.
    pub(super) fn cut_connections(&self) -> TaskTracker {
        let lines = std::mem::take(&mut *self.open.lock().expect("open lock"));
        lines.cut.cancel();
        lines.tasks.close();
        lines.tasks
    }

    pub(super) fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("records lock")
    }

    pub(super) fn note(&self, note: impl FnOnce(&mut Records)) {
        note(&mut self.records());
        self.changed.notify_waiters();
    }

    pub(super) fn violated(&self, message: String) {
        self.note(|records| records.violated(message));
    }

    /// Answers any request at all.
    pub(super) async fn answer(&self, request: Request<Incoming>, line: &Line) -> Answer {
        let arrival = Instant::now();
        let (parts, body) = request.into_parts();
        if self.options.control
            && let Some(command) = parts.uri.path().strip_prefix(CONTROL)
        {
            let Ok(body) = read(&parts.headers, body).await else { return status(StatusCode::PAYLOAD_TOO_LARGE) };
            return self.control(&parts.method, command, &body);
        }
        let call = self.call(&parts);
        self.note(|records| records.arrived(call, arrival));
        let faults = self.faults.load_full();
        let mut answer = match call {
            Call::Publish => self.publish(&parts.headers, body, arrival, &faults, line).await,
            Call::Authenticate | Call::Renew | Call::Unknown => match read(&parts.headers, body).await {
                Err(_) => status(StatusCode::BAD_REQUEST),
                Ok(body) => elsewhere(&faults).unwrap_or_else(|| match call {
                    Call::Authenticate => self.authenticate(&parts.headers, &body, &faults),
                    Call::Renew => self.renew(&parts.headers, &faults),
                    Call::Publish | Call::Unknown => self.unknown(&parts),
                }),
            },
        };
        if faults.clock_offset_seconds != 0 {
            answer.headers_mut().insert(DATE, date(clock_offset(&faults)));
        }
        self.note(|records| *records.counts.statuses.entry(answer.status().as_u16()).or_default() += 1);
        answer
    }

    fn call(&self, parts: &http::request::Parts) -> Call {
        let path = parts.uri.path().strip_prefix(&*self.options.prefix);
        match (&parts.method, path, parts.uri.query()) {
            (&Method::POST, Some("/api/v1/faceEdge/publish"), None) => Call::Publish,
            (&Method::POST, Some("/api/v1/authenticate"), None) => Call::Authenticate,
            (&Method::GET, Some("/api/v1/renewToken"), None) => Call::Renew,
            _ => Call::Unknown,
        }
    }

    fn unknown(&self, parts: &http::request::Parts) -> Answer {
        self.violated(format!("no such call: {} {}", parts.method, parts.uri));
        status(StatusCode::NOT_FOUND)
    }

    fn authenticate(&self, headers: &HeaderMap, body: &[u8], faults: &Faults) -> Answer {
        let given = match check::credentials(headers, body) {
            Ok(given) => given,
            Err(flaw) => return self.refuse(format!("authenticate: {flaw}")),
        };
        if let Some(status) = faults.login_status {
            return reply(&faults.error(status));
        }
        if given != [&*self.options.username, &*self.options.password] {
            return message(StatusCode::UNAUTHORIZED, "bad credentials");
        }
        self.token(faults)
    }

    fn renew(&self, headers: &HeaderMap, faults: &Faults) -> Answer {
        let live = match check::bearer(headers) {
            Ok(token) => self.tokens.is_live(token),
            Err(flaw) => {
                self.violated(format!("renewToken: {flaw}"));
                false
            }
        };
        match faults.renew_status {
            Some(status) => reply(&faults.error(status)),
            None if live => self.token(faults),
            None => message(StatusCode::UNAUTHORIZED, "the token is not valid"),
        }
    }

    fn token(&self, faults: &Faults) -> Answer {
        if faults.single_token {
            self.tokens.revoke_all();
        }
        let user = &self.options.username;
        let token = self.tokens.issue(user, faults.token_ttl, clock_offset(faults));
        json(StatusCode::OK, &serde_json::json!({ "username": user, "token": token }))
    }

    fn refuse(&self, flaw: String) -> Answer {
        let answer = message(StatusCode::BAD_REQUEST, &flaw);
        self.violated(flaw);
        answer
    }

    async fn publish(
        &self,
        headers: &HeaderMap,
        body: Incoming,
        arrival: Instant,
        faults: &Faults,
        line: &Line,
    ) -> Answer {
        let action = self.next_action(faults);
        if action == Action::CutBefore {
            line.cut(self).await;
        }
        let flight = InFlight::enter(self);
        let over = self.over(faults, flight.place, arrival);
        let body = match read(headers, body).await {
            Ok(body) => body,
            Err(BodyFlaw::TooLarge) => return status(StatusCode::PAYLOAD_TOO_LARGE),
            Err(BodyFlaw::Broken) => return status(StatusCode::BAD_REQUEST), // nobody is left to read it
        };
        self.note(|records| records.counts.bytes += body.len() as u64);
        if action == Action::Hang {
            std::future::pending::<()>().await;
        }
        self.dawdle(faults).await;
        let taken = self.judge(headers, &body, arrival, faults, &action, over);
        drop(flight);
        match taken {
            Err(answer) => *answer,
            Ok(()) => self.deliver(&action, line).await,
        }
    }

    /// Takes the frame, or says how it is refused.
    fn judge(
        &self,
        headers: &HeaderMap,
        body: &[u8],
        arrival: Instant,
        faults: &Faults,
        action: &Action,
        over: Option<u16>,
    ) -> Result<(), Box<Answer>> {
        // The checks come first, so that a violation is seen whatever the answer will be.
        let bearer = check::bearer(headers);
        let frame = check::publish(headers, body, self.options.images_only);
        for flaw in [bearer.as_ref().err(), frame.as_ref().err()].into_iter().flatten() {
            self.violated(format!("publish: {flaw}"));
        }
        if let Some(elsewhere) = elsewhere(faults) {
            return Err(Box::new(elsewhere));
        }
        if let Action::Answer(scripted) = action {
            return Err(Box::new(reply(scripted)));
        }
        if let Some(status) = over {
            return Err(Box::new(reply(&faults.error(status))));
        }
        if !bearer.is_ok_and(|token| self.tokens.is_live(token)) {
            return Err(Box::new(message(StatusCode::UNAUTHORIZED, "the token is missing or not valid")));
        }
        if let Some(status) = faults.answer_all {
            return Err(Box::new(reply(&faults.error(status))));
        }
        let frame = frame.map_err(|flaw: String| Box::new(message(StatusCode::BAD_REQUEST, &flaw)))?;
        if let Some(status) = faults.by_detector.get(&*frame.detector) {
            return Err(Box::new(reply(&faults.error(*status))));
        }
        let sha256 = (self.options.keep || faults.need_hash()).then(|| sha256(&frame.image));
        if let Some(status) = sha256.and_then(|sha256| refusal(faults, &sha256)) {
            return Err(Box::new(reply(&faults.error(status))));
        }
        let kept = sha256.filter(|_| self.options.keep).map(|sha256| Accepted {
            order: 0,
            detector: frame.detector.into_owned(),
            zone: frame.zone.into_owned(),
            time: frame.time,
            sha256,
            size: frame.image.len(),
            arrival,
            accepted: Instant::now(),
        });
        self.note(|records| records.accept(kept));
        Ok(())
    }

    /// The 200 of an accepted frame, in the way that the action says.
    async fn deliver(&self, action: &Action, line: &Line) -> Answer {
        match action {
            Action::CutAfter => line.cut(self).await,
            Action::Trickle => trickle(),
            Action::Flood => flood(),
            Action::EndlessHeaders => {
                if let Some(wire) = &line.plain {
                    wire::endless_headers(wire).await;
                }
                std::future::pending().await
            }
            Action::Serve | Action::Answer(_) | Action::CutBefore | Action::Hang => empty(StatusCode::OK),
        }
    }

    fn next_action(&self, faults: &Faults) -> Action {
        if let Some(action) = self.script.lock().expect("script lock").pop_front() {
            return action;
        }
        faults.draw(&mut self.rng.lock().expect("rng lock"))
    }

    /// The status for what is beyond capacity or rate.
    fn over(&self, faults: &Faults, place: u64, now: Instant) -> Option<u16> {
        if faults.capacity.is_some_and(|capacity| place > capacity as u64) {
            return Some(StatusCode::SERVICE_UNAVAILABLE.as_u16());
        }
        let rate = faults.rate?;
        let mut allowance = self.allowance.lock().expect("allowance lock");
        let (left, since) = *allowance;
        let left = (left + now.saturating_duration_since(since).as_secs_f64() * rate).min((rate / 10.0).max(1.0));
        let pass = left >= 1.0;
        *allowance = (if pass { left - 1.0 } else { left }, now);
        (!pass).then_some(StatusCode::TOO_MANY_REQUESTS.as_u16())
    }

    async fn dawdle(&self, faults: &Faults) {
        let jitter = if faults.jitter.is_zero() {
            Duration::ZERO
        } else {
            faults.jitter.mul_f64(self.rng.lock().expect("rng lock").f64())
        };
        let latency = faults.latency + jitter;
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let mut held = self.held.subscribe();
        // The sender lives as long as we do.
        drop(held.wait_for(|held| !held).await);
    }

    fn control(&self, method: &Method, command: &str, body: &[u8]) -> Answer {
        match (method.as_str(), command) {
            ("GET", "counts") => json(StatusCode::OK, &self.records().counts),
            ("GET", "accepted") => self.accepted_lines(),
            ("GET", "faults") => json(StatusCode::OK, &**self.faults.load()),
            ("PUT", "faults") => self.told(body, |faults: Faults| self.change(|now| *now = faults)),
            ("POST", "script") => {
                self.told(body, |actions: Vec<Action>| self.script.lock().expect("script lock").extend(actions))
            }
            ("POST", "revoke-tokens") => self.done(|| self.tokens.revoke_all()),
            ("POST", "cut-connections") => self.done(|| drop(self.cut_connections())), // this one is among them
            ("POST", "hold") => self.done(|| self.hold(true)),
            ("POST", "release") => self.done(|| self.hold(false)),
            _ => message(StatusCode::NOT_FOUND, "no such control call"),
        }
    }

    fn accepted_lines(&self) -> Answer {
        let accepted = self.records().accepted.clone(); // nobody waits while we write
        let mut lines = Vec::new();
        for frame in accepted {
            let line = serde_json::json!({
                "order": frame.order, "detector": frame.detector, "zone": frame.zone,
                "time": frame.time.to_string(), "sha256": frame.sha256_hex(), "size": frame.size,
            });
            lines.extend_from_slice(line.to_string().as_bytes());
            lines.push(b'\n');
        }
        typed(StatusCode::OK, "application/x-ndjson", lines)
    }

    fn told<T: serde::de::DeserializeOwned>(&self, body: &[u8], act: impl FnOnce(T)) -> Answer {
        match serde_json::from_slice(body) {
            Ok(told) => self.done(|| act(told)),
            Err(error) => message(StatusCode::BAD_REQUEST, &error.to_string()),
        }
    }

    #[expect(clippy::unused_self, reason = "reads as the other control calls")]
    fn done(&self, act: impl FnOnce()) -> Answer {
        act();
        empty(StatusCode::NO_CONTENT)
    }
}

/// The connections since the last cut of all.
#[derive(Clone, Default)]
pub(super) struct OpenLines {
    /// Parent of every connection's token.
    pub(super) cut: CancellationToken,
    /// What serves them.
    pub(super) tasks: TaskTracker,
}

/// What a request can do to its connection.
#[derive(Clone)]
pub(super) struct Line {
    pub(super) cut: CancellationToken,
    /// The connection itself, where nothing is between it and HTTP.
    pub(super) plain: Option<Arc<TcpStream>>,
}

impl Line {
    async fn cut(&self, engine: &Engine) -> ! {
        engine.note(|records| records.counts.cut += 1);
        self.cut.cancel();
        std::future::pending().await
    }
}

/// A publish request between its headers and its verdict.
struct InFlight<'a> {
    engine: &'a Engine,
    /// How many there are with it.
    place: u64,
}

impl<'a> InFlight<'a> {
    fn enter(engine: &'a Engine) -> Self {
        let mut place = 0;
        engine.note(|records| {
            records.counts.in_flight += 1;
            place = records.counts.in_flight;
        });
        Self { engine, place }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.engine.note(|records| records.counts.in_flight -= 1);
    }
}

enum BodyFlaw {
    TooLarge,
    Broken,
}

/// The whole body in one piece, copied once.
async fn read(headers: &HeaderMap, mut body: Incoming) -> Result<Bytes, BodyFlaw> {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0usize);
    if length > BODY_MAX {
        return Err(BodyFlaw::TooLarge);
    }
    let mut whole = BytesMut::with_capacity(length);
    while let Some(piece) = body.frame().await {
        let Ok(piece) = piece.map_err(|_| BodyFlaw::Broken)?.into_data() else { continue };
        if whole.is_empty() && body.is_end_stream() {
            return Ok(piece);
        }
        if whole.len() + piece.len() > BODY_MAX {
            return Err(BodyFlaw::TooLarge);
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}

fn refusal(faults: &Faults, sha256: &[u8; 32]) -> Option<u16> {
    if let Some(status) = faults.by_image.get(&hex(sha256)) {
        return Some(*status);
    }
    faults.refuses(sha256).then_some(StatusCode::BAD_REQUEST.as_u16())
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 is 32 bytes")
}
