//! The admin server: the status page, `/metrics`, `/healthz`, `/readyz` and `/status`. It only reads, answers GET and nothing else, and knows
//! nothing of what it shows: the daemon hands it a [`View`].
//!
//! Not here: the commands that change something. They go over the control socket, whose users are known.

pub mod page;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::stream::{BoxStream, FuturesUnordered};
use futures_util::{FutureExt as _, StreamExt as _};
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{Either, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::page::Shown;
use crate::metrics::Metrics;

/// Connections served at once; the others wait in the kernel.
const CONNECTIONS_MAX: usize = 32;
/// From the connection to the end of its one answer.
const CONNECTION_MAX: Duration = Duration::from_secs(10);
/// For the head of the request.
const HEAD_MAX: Duration = Duration::from_secs(5);
/// Bytes that a connection may buffer; only a head is ever read.
const BUFFER_MAX: usize = 16 << 10;
/// Browsers that the status page is kept live for at once.
const LIVE_MAX: usize = 8;
/// From a live connection's begin to its end; the browser comes back by itself.
const LIVE_TIME_MAX: Duration = Duration::from_hours(1);
/// Between two looks for a live page.
const LIVE_EVERY: Duration = Duration::from_secs(1);
/// After which a browser comes back whose connection ended. A page beyond [`LIVE_MAX`] is kept up to date in this way alone,
/// and does not take that for a loss: see `LOST_MS` of the page's script.
const LIVE_AGAIN_MS: u32 = 5000;
/// After `accept` failed, which it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where metrics, health and status are read, over HTTP. There is no password: keep it on loopback, or behind a proxy.
    /// Changes with a restart only.
    pub listen: SocketAddr,
    /// The Unix socket of the commands that act on the running daemon; for its own user and root. Changes with a restart only.
    pub control: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)), control: "/run/framegate/control.sock".into() }
    }
}

/// What the server shows. Each function is called for a request and must only read what is at hand.
pub struct View {
    /// `/metrics`
    pub metrics: Arc<Metrics>,
    /// `/healthz`: whether the daemon turns.
    pub alive: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// `/readyz`: what keeps it from being ready; nothing: it is.
    pub ready: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    /// `/status`: an object; its `engine` is also shown with the health.
    pub status: Box<dyn Fn() -> Value + Send + Sync>,
    /// What the status page shows.
    pub shown: Box<dyn Fn() -> Shown + Send + Sync>,
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("View")
    }
}

/// Serves until stopped. Every connection is for one request.
pub async fn serve(listener: TcpListener, view: Arc<View>, stop: CancellationToken) {
    let mut connections = FuturesUnordered::new();
    let live = Arc::new(Semaphore::new(LIVE_MAX));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                // A panic costs one answer.
                Ok((stream, _)) => connections.push(AssertUnwindSafe(connection(stream, view.clone(), live.clone())).catch_unwind()),
                Err(error) => {
                    tracing::debug!(%error, "the admin server could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(stream: TcpStream, view: Arc<View>, live: Arc<Semaphore>) {
    let is_live = Arc::new(AtomicBool::new(false));
    let turned_live = is_live.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = if request.uri().path() == "/events" && request.method() == Method::GET {
            let permit = live.clone().try_acquire_owned().ok();
            turned_live.store(permit.is_some(), Ordering::Relaxed);
            events(view.clone(), permit)
        } else {
            answer(request.method(), request.uri().path(), &view).map(Either::Left)
        };
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(BUFFER_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let too_long = async {
        tokio::time::sleep(CONNECTION_MAX).await;
        if is_live.load(Ordering::Relaxed) {
            tokio::time::sleep(LIVE_TIME_MAX).await;
        }
    };
    tokio::select! {
        ended = connection => if let Err(error) = ended { tracing::debug!(%error, "an admin connection failed") },
        () = too_long => tracing::debug!("an admin connection was ended: it took too long"),
    }
}

type Body = Either<Full<Bytes>, StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>>;

/// Server-sent events: the page's sections that changed, every time; none of them shows that the connection lives. A reader that
/// is slow gets fewer of them, and one without a permit the first alone.
fn events(view: Arc<View>, permit: Option<OwnedSemaphorePermit>) -> Response<Body> {
    let mut every = tokio::time::interval(LIVE_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let events = if permit.is_some() { usize::MAX } else { 1 };
    let begin = (view, every, BTreeMap::new(), permit);
    let stream = futures_util::stream::unfold(begin, async |(view, mut every, mut seen, permit)| {
        every.tick().await;
        let sections = page::sections(&(view.shown)());
        let news: BTreeMap<_, _> = sections.into_iter().filter(|(id, section)| seen.get(id) != Some(section)).collect();
        let text = format!("retry: {LIVE_AGAIN_MS}\nevent: sections\ndata: {}\n\n", json!(news));
        seen.extend(news);
        Some((Ok(Frame::data(Bytes::from(text))), (view, every, seen, permit)))
    });
    let headers = response(StatusCode::OK, "text/event-stream", String::new());
    headers.map(|_| Either::Right(StreamBody::new(stream.take(events).boxed())))
}

fn answer(method: &Method, path: &str, view: &View) -> Response<Full<Bytes>> {
    let known = matches!(path, "/" | "/events" | "/metrics" | "/healthz" | "/readyz" | "/status");
    if known && method != Method::GET {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
        answer.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET"));
        return answer;
    }
    match path {
        "/" => {
            let mut page = response(StatusCode::OK, "text/html; charset=utf-8", page::page(&(view.shown)()));
            let policy = http::HeaderValue::from_str(&page::CONTENT_SECURITY_POLICY).expect("hashes are plain text");
            page.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
            page.headers_mut().insert(REFERRER_POLICY, http::HeaderValue::from_static("no-referrer"));
            page
        }
        "/metrics" => text(StatusCode::OK, view.metrics.render()),
        "/healthz" => {
            let alive = (view.alive)();
            let status = if alive.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(status, &json!({ "alive": alive.is_ok(), "problem": alive.err(), "engine": engine(view) }))
        }
        "/readyz" => {
            let reasons = (view.ready)();
            let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(status, &json!({ "ready": reasons.is_empty(), "reasons": reasons, "engine": engine(view) }))
        }
        "/status" => json(StatusCode::OK, &(view.status)()),
        _ => text(StatusCode::NOT_FOUND, "here are /, /metrics, /healthz, /readyz and /status\n".into()),
    }
}

/// An engine that is away is shown with the health and is no part of it: keeping frames is the daemon's work.
fn engine(view: &View) -> Value {
    (view.status)().get_mut("engine").map_or(Value::Null, Value::take)
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; version=0.0.4; charset=utf-8", body)
}

fn json(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    response(status, "application/json", format!("{body:#}\n"))
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn view(alive: Result<(), String>, ready: &[&str]) -> Arc<View> {
        let reasons: Vec<String> = ready.iter().map(|&reason| reason.into()).collect();
        Arc::new(View {
            metrics: Metrics::new(),
            alive: Box::new(move || alive.clone()),
            ready: Box::new(move || reasons.clone()),
            status: Box::new(|| json!({ "version": "1", "engine": { "state": "unreachable" } })),
            shown: Box::new(page::tests::shown),
        })
    }

    /// Runs a server while `client` runs.
    async fn with_server<F: Future>(view: Arc<View>, client: impl FnOnce(SocketAddr) -> F) -> F::Output {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let client = async {
            let output = client(address).await;
            stop.cancel();
            output
        };
        tokio::join!(serve(listener, view, stop.clone()), client).1
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn serves_metrics_health_and_status_to_get_alone() {
        with_server(view(Ok(()), &[]), async |address| {
            let metrics = ask(address, "GET /metrics").await;
            assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("framegate_build_info"), "{metrics}");
            assert!(metrics.contains("content-type: text/plain; version=0.0.4"), "{metrics}");
            for path in ["/healthz", "/readyz", "/status"] {
                let answer = ask(address, &format!("GET {path}?x=1")).await;
                assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("unreachable"), "{answer}");
            }
            assert!(ask(address, "POST /status").await.starts_with("HTTP/1.1 405"));
            assert!(ask(address, "GET /etc/passwd").await.starts_with("HTTP/1.1 404"));
        })
        .await;
    }

    #[tokio::test]
    async fn says_503_with_the_reasons_and_names_the_engine() {
        with_server(view(Err("did not turn: outlet".into()), &["front door: missing"]), async |address| {
            let healthz = ask(address, "GET /healthz").await;
            assert!(healthz.starts_with("HTTP/1.1 503") && healthz.contains("did not turn: outlet"), "{healthz}");
            let readyz = ask(address, "GET /readyz").await;
            assert!(readyz.starts_with("HTTP/1.1 503") && readyz.contains("front door: missing"), "{readyz}");
            assert!(readyz.contains("\"state\": \"unreachable\""), "{readyz}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_panic_costs_one_answer() {
        let mut view = Arc::into_inner(view(Ok(()), &[])).unwrap();
        view.ready = Box::new(|| panic!("a bug"));
        with_server(Arc::new(view), async |address| {
            assert_eq!(ask(address, "GET /readyz").await, "");
            assert!(ask(address, "GET /healthz").await.starts_with("HTTP/1.1 200"));
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn silent_connections_are_closed_and_make_room() {
        with_server(view(Ok(()), &[]), async |address| {
            let mut silent = Vec::new();
            for _ in 0..CONNECTIONS_MAX + 5 {
                silent.push(TcpStream::connect(address).await.unwrap());
            }
            assert!(ask(address, "GET /healthz").await.starts_with("HTTP/1.1 200"));
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn pages_beyond_those_that_are_live_get_what_is_new_each_time_they_ask() {
        with_server(view(Ok(()), &[]), async |address| {
            let mut live = Vec::new();
            for _ in 0..LIVE_MAX {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
                stream.read_u8().await.unwrap();
                live.push(stream);
            }
            for _ in 0..2 {
                let answer = ask(address, "GET /events").await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                assert_eq!(answer.matches("event: sections\ndata: {\"").count(), 1, "{answer}");
                assert!(answer.contains("retry: 5000\n"), "{answer}");
            }
        })
        .await;
    }

    #[test]
    fn the_configuration_is_strict() {
        let parsed: Config = toml::from_str("listen = \"127.0.0.1:1\"").unwrap();
        assert_eq!(parsed.control, Config::default().control);
        assert!(toml::from_str::<Config>("port = 1").is_err());
    }

    #[test]
    fn the_status_is_read_once_for_each_answer() {
        let reads = Arc::new(Mutex::new(0));
        let counted = reads.clone();
        let view = View {
            metrics: Metrics::new(),
            alive: Box::new(|| Ok(())),
            ready: Box::new(Vec::new),
            status: Box::new(move || {
                *counted.lock().unwrap() += 1;
                Value::Null
            }),
            shown: Box::new(page::tests::shown),
        };
        assert_eq!(answer(&Method::GET, "/healthz", &view).status(), StatusCode::OK);
        assert_eq!(*reads.lock().unwrap(), 1);
    }
}
