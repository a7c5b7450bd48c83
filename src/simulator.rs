//! A stand-in for the engine with faults to order: for `framegate simulate-engine`, the demo, tests and benches.
//!
//! It is as strict as the contract allows ([`Counts::violations`] must stay 0 whatever is wrong with the network), remembers what it
//! accepted, and breaks as it is told to. It is not the engine: it recognises nobody. Nothing else of Framegate is used in here, so that
//! a mistake cannot be made on both sides at once.

mod check;
pub mod faces;
mod faults;
mod records;
mod tls;
mod token;
mod wire;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use bytes::{Bytes, BytesMut};
use fastrand::Rng;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, LOCATION};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Either, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use jiff::{SignedDuration, Timestamp};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use records::Records;

pub use faults::{Action, Faults, Redirect, Reply};
pub use records::{Accepted, Arrival, Call, Counts, busiest};
pub use tls::Certificate;

/// Largest request body read, bytes.
const BODY_MAX: usize = 64 << 20;
/// A TLS handshake has this long.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Connections waiting to be accepted.
const BACKLOG: u32 = 1024;
/// Pause after a failed accept: no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Time between the bytes of [`Action::Trickle`].
const TRICKLE_EVERY: Duration = Duration::from_secs(1);
/// Length of the answer of [`Action::Trickle`], bytes.
const TRICKLE_BYTES: usize = 3600;
/// Length of the answer of [`Action::Flood`], bytes.
const FLOOD_BYTES: usize = 1 << 30;
/// One piece of it.
static FLOOD_PIECE: [u8; 64 << 10] = [b' '; 64 << 10];
/// Where the control calls live.
const CONTROL: &str = "/__simulator/";

/// How a simulator starts.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Path prefix: empty, or like `/identities`.
    pub prefix: String,
    /// The only user.
    pub username: String,
    /// Its password.
    pub password: String,
    /// TLS with this certificate; `None` is plain HTTP.
    pub tls: Option<Certificate>,
    /// Whether HTTP/2 is spoken too.
    pub http2: bool,
    /// Whether images have to begin like images.
    pub images_only: bool,
    /// Whether accepted frames are hashed and remembered; counts are kept anyway.
    pub keep: bool,
    /// Whether `/__simulator/` answers: counts, accepted frames and faults over HTTP.
    pub control: bool,
    /// Decides what chance does.
    pub seed: u64,
    /// The first faults.
    pub faults: Faults,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            prefix: String::new(),
            username: "framegate".into(),
            password: "simulated".into(),
            tls: None,
            http2: true,
            images_only: true,
            keep: true,
            control: false,
            seed: 0,
            faults: Faults::default(),
        }
    }
}

/// A running engine. Dropping it stops it.
pub struct Simulator {
    engine: Arc<Engine>,
    address: SocketAddr,
    /// Bound, never listening: the port stays ours while the engine is down.
    _reserved: TcpSocket,
    accepting: Mutex<Option<Accepting>>,
}

impl Simulator {
    /// Starts one, listening already when this returns.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let reserved = socket(options.listen).with_context(|| format!("binding {}", options.listen))?;
        let address = reserved.local_addr()?;
        let tls = options.tls.map(|kind| tls::Tls::new(kind, address.ip(), options.http2)).transpose()?;
        let simulator = Self {
            engine: Arc::new(Engine::new(options, tls)),
            address,
            _reserved: reserved,
            accepting: Mutex::new(None),
        };
        simulator.up().await.with_context(|| format!("listening on {address}"))?;
        Ok(simulator)
    }

    /// What goes into `engine.base_url`.
    pub fn base_url(&self) -> String {
        let scheme = if self.engine.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{}", self.address, self.engine.options.prefix)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate to trust, PEM; none without TLS.
    pub fn ca_pem(&self) -> Option<String> {
        self.engine.tls.as_ref().map(tls::Tls::ca_pem)
    }

    /// Base64 of the SHA-256 of the certificate's public key; none without TLS.
    pub fn pin(&self) -> Option<String> {
        self.engine.tls.as_ref().map(tls::Tls::pin)
    }

    /// The user's name.
    pub fn username(&self) -> &str {
        &self.engine.options.username
    }

    /// The user's password.
    pub fn password(&self) -> &str {
        &self.engine.options.password
    }

    /// The faults as they are.
    pub fn faults(&self) -> Arc<Faults> {
        self.engine.faults.load_full()
    }

    /// Changes the faults for the requests that come from now on.
    pub fn change(&self, change: impl FnOnce(&mut Faults)) {
        self.engine.change(change);
    }

    /// Refuses the frames of this detector with 403.
    pub fn forbid_detector(&self, name: &str) {
        self.change(|faults| {
            faults.by_detector.insert(name.to_owned(), StatusCode::FORBIDDEN.as_u16());
        });
    }

    /// Appends what happens to the next publish requests, in order of arrival.
    pub fn script(&self, actions: impl IntoIterator<Item = Action>) {
        self.engine.script.lock().expect("script lock").extend(actions);
    }

    /// Every token so far is refused from now on.
    pub fn revoke_all_tokens(&self) {
        self.engine.tokens.revoke_all();
    }

    /// Publish requests are read, then wait, until [`Simulator::release`].
    pub fn hold(&self) {
        self.engine.hold(true);
    }

    /// Ends [`Simulator::hold`].
    pub fn release(&self) {
        self.engine.hold(false);
    }

    /// Shows another certificate to new connections. An error without TLS.
    pub fn show_certificate(&self, certificate: Certificate) -> anyhow::Result<()> {
        self.engine.tls.as_ref().context("the simulator runs without TLS")?.show(certificate)
    }

    /// Cuts the connections that exist; new ones are welcome.
    pub fn cut_connections(&self) {
        self.engine.cut_connections();
    }

    /// Stops listening and cuts every connection: from when this returns, connecting is refused. The port stays reserved.
    pub async fn down(&self) {
        let accepting = self.accepting.lock().expect("accepting lock").take();
        if let Some(accepting) = accepting {
            accepting.stop.cancel();
            // A panic in there has ended the listener all the same.
            drop(accepting.task.await);
        }
    }

    /// Listens again on the same port. Nothing happens if it does already.
    #[expect(clippy::unused_async, reason = "needs the runtime it is called in")]
    pub async fn up(&self) -> io::Result<()> {
        let mut accepting = self.accepting.lock().expect("accepting lock");
        if accepting.is_none() {
            let listener = socket(self.address)?.listen(BACKLOG)?;
            let stop = CancellationToken::new();
            let task = tokio::spawn(accept(Arc::clone(&self.engine), listener, stop.clone()));
            *accepting = Some(Accepting { stop, task });
        }
        Ok(())
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        self.engine.records().counts.clone()
    }

    /// The frames accepted so far, oldest first; empty unless [`Options::keep`].
    pub fn accepted(&self) -> Vec<Accepted> {
        self.engine.records().accepted.iter().cloned().collect()
    }

    /// When requests came, all kinds, oldest first.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.engine.records().arrivals.iter().copied().collect()
    }

    /// Waits until the counts are so; the counts, or what they were when the time was up. Cancel safe.
    pub async fn wait_for(&self, so: impl Fn(&Counts) -> bool, within: Duration) -> Result<Counts, Box<Counts>> {
        let seen = async {
            loop {
                let changed = self.engine.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                {
                    let records = self.engine.records();
                    if so(&records.counts) {
                        return records.counts.clone();
                    }
                }
                changed.await;
            }
        };
        tokio::time::timeout(within, seen).await.map_err(|_| Box::new(self.counts()))
    }

    /// Stops for good.
    pub async fn stop(self) {
        self.down().await;
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        if let Ok(Some(accepting)) = self.accepting.get_mut() {
            accepting.stop.cancel();
        }
    }
}

struct Accepting {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn accept(engine: Arc<Engine>, listener: TcpListener, stop: CancellationToken) {
    let mut lines = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(ended) = lines.join_next() => {
                if ended.is_err_and(|error| error.is_panic()) {
                    engine.violated("the simulator itself panicked".into());
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(lines.spawn(connection(Arc::clone(&engine), stream))),
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }
    drop(listener);
    lines.shutdown().await;
}

/// Serves one connection until it ends or is cut.
async fn connection(engine: Arc<Engine>, stream: TcpStream) {
    engine.note(|records| records.counts.connections += 1);
    let cut = engine.lines.lock().expect("lines lock").child_token();
    if stream.set_nodelay(true).is_err() {
        return; // gone already
    }
    let stream = Arc::new(stream);
    let wire = wire::Wire(Arc::clone(&stream));
    let serve = async {
        match &engine.tls {
            None => exchange(&engine, wire, &Line { cut: cut.clone(), plain: Some(stream) }).await,
            Some(tls) => {
                let handshake = tokio::time::timeout(HANDSHAKE_MAX, tls.acceptor().accept(wire));
                if let Ok(Ok(wire)) = handshake.await {
                    exchange(&engine, wire, &Line { cut: cut.clone(), plain: None }).await;
                }
            }
        }
    };
    tokio::select! {
        () = serve => {}
        () = cut.cancelled() => {}
    }
}

async fn exchange(engine: &Arc<Engine>, wire: impl AsyncRead + AsyncWrite + Unpin + 'static, line: &Line) {
    let service = service_fn(|request| {
        let (engine, line) = (Arc::clone(engine), line.clone());
        async move { Ok::<_, Infallible>(engine.answer(request, &line).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).max_buf_size(256 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(16 << 20);
    let builder = if engine.options.http2 { builder } else { builder.http1_only() };
    // How a connection ends is the client's affair.
    drop(builder.serve_connection(TokioIo::new(wire), service).await);
}

/// What a request can do to its connection.
#[derive(Clone)]
struct Line {
    cut: CancellationToken,
    plain: Option<Arc<TcpStream>>,
}

impl Line {
    async fn cut(&self, engine: &Engine) -> ! {
        engine.note(|records| records.counts.cut += 1);
        self.cut.cancel();
        std::future::pending().await
    }
}

type Answer = Response<Either<Full<Bytes>, UnsyncBoxBody<Bytes, Infallible>>>;

/// What all connections share.
struct Engine {
    options: Options,
    tls: Option<tls::Tls>,
    faults: ArcSwap<Faults>,
    /// Held while the faults are changed, so that no change is lost.
    changing: Mutex<()>,
    script: Mutex<VecDeque<Action>>,
    tokens: token::Tokens,
    records: Mutex<Records>,
    changed: Notify,
    held: watch::Sender<bool>,
    rng: Mutex<Rng>,
    /// What the rate fault has left, and when that was so.
    allowance: Mutex<(f64, Instant)>,
    /// Parent of every connection's token.
    lines: Mutex<CancellationToken>,
}

impl Engine {
    fn new(options: Options, tls: Option<tls::Tls>) -> Self {
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
            lines: Mutex::new(CancellationToken::new()),
            options,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Faults)) {
        let _changing = self.changing.lock().expect("changing lock");
        let mut faults = Faults::clone(&self.faults.load());
        change(&mut faults);
        self.faults.store(Arc::new(faults));
    }

    fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    fn cut_connections(&self) {
        let lines = std::mem::take(&mut *self.lines.lock().expect("lines lock"));
        lines.cancel();
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("records lock")
    }

    fn note(&self, note: impl FnOnce(&mut Records)) {
        note(&mut self.records());
        self.changed.notify_waiters();
    }

    fn violated(&self, message: String) {
        self.note(|records| records.violated(message));
    }

    /// Answers any request at all.
    async fn answer(&self, request: Request<Incoming>, line: &Line) -> Answer {
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
            Action::Trickle => endless(TRICKLE_BYTES, trickle()),
            Action::Flood => endless(FLOOD_BYTES, flood()),
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
            ("POST", "cut-connections") => self.done(|| self.cut_connections()),
            ("POST", "hold") => self.done(|| self.hold(true)),
            ("POST", "release") => self.done(|| self.hold(false)),
            _ => message(StatusCode::NOT_FOUND, "no such control call"),
        }
    }
}

impl Engine {
    fn accepted_lines(&self) -> Answer {
        let lines: String = self
            .records()
            .accepted
            .iter()
            .map(|frame| {
                let line = serde_json::json!({
                    "order": frame.order, "detector": frame.detector, "zone": frame.zone,
                    "time": frame.time.to_string(), "sha256": frame.sha256_hex(), "size": frame.size,
                });
                format!("{line}\n")
            })
            .collect();
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

/// The answer of something that is not the engine: a portal or a redirect.
fn elsewhere(faults: &Faults) -> Option<Answer> {
    if faults.portal {
        let page = "<!doctype html><title>Welcome</title><p>Please accept the terms of this network.";
        return Some(typed(StatusCode::OK, "text/html; charset=utf-8", page));
    }
    let redirect = faults.redirect.as_ref()?;
    let headers = vec![(LOCATION.to_string(), redirect.location.clone())];
    Some(reply(&Reply { status: redirect.status, headers, body: String::new() }))
}

fn refusal(faults: &Faults, sha256: &[u8; 32]) -> Option<u16> {
    if let Some(status) = faults.by_image.get(&records::hex(sha256)) {
        return Some(*status);
    }
    faults.refuses(sha256).then_some(StatusCode::BAD_REQUEST.as_u16())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 is 32 bytes")
}

fn clock_offset(faults: &Faults) -> SignedDuration {
    SignedDuration::from_secs(faults.clock_offset_seconds)
}

/// Our clock with the offset, as far as a date can say it.
fn date(offset: SignedDuration) -> HeaderValue {
    let now = Timestamp::now().checked_add(offset).unwrap_or(Timestamp::UNIX_EPOCH);
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    let text = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds));
    HeaderValue::from_str(&text).expect("a date is ASCII")
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Either::Left(Full::default()));
    *answer.status_mut() = status;
    answer
}

fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Answer {
    typed(status, "application/json", serde_json::to_vec(body).expect("our own data is JSON"))
}

fn message(status: StatusCode, text: &str) -> Answer {
    json(status, &serde_json::json!({ "message": text }))
}

fn status(status: StatusCode) -> Answer {
    message(status, status.canonical_reason().unwrap_or_default())
}

/// An answer as it was ordered; what HTTP does not allow in it shows as 500 with the reason.
fn reply(ordered: &Reply) -> Answer {
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

fn endless(length: usize, pieces: impl stream::Stream<Item = Bytes> + Send + 'static) -> Answer {
    use futures_util::StreamExt as _;
    let body = StreamBody::new(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))));
    let mut answer = Response::new(Either::Right(body.boxed_unsync()));
    answer.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn trickle() -> impl stream::Stream<Item = Bytes> {
    stream::unfold(0, |sent| async move {
        if sent == TRICKLE_BYTES {
            return None;
        }
        tokio::time::sleep(TRICKLE_EVERY).await;
        Some((Bytes::from_static(b" "), sent + 1))
    })
}

fn flood() -> impl stream::Stream<Item = Bytes> {
    stream::iter((0..FLOOD_BYTES / FLOOD_PIECE.len()).map(|_| Bytes::from_static(&FLOOD_PIECE)))
}

#[cfg(test)]
mod tests;
