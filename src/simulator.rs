//! A stand-in for the engine with faults to order: for `framegate simulate-engine`, the demo, tests and benches.
//!
//! It is as strict as the contract allows (`violations` in its counts must stay 0 whatever is wrong with the network), remembers what it
//! accepted, and breaks as it is told to. It is not the engine: it recognises nobody. Nothing else of Framegate is used in here, so that
//! a mistake cannot be made on both sides at once.

mod answer;
mod check;
mod engine;
pub mod faces;
mod faults;
mod records;
mod tls;
mod token;
mod wire;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use http::StatusCode;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use engine::{Engine, Line, OpenLines};

pub use faults::{Action, Faults, Redirect, Reply};
pub use records::{Accepted, Arrival, Call, Counts, busiest};
pub use tls::Certificate;

/// HTTP/1.1 reads at most this much at once, bytes.
const READ_BUFFER: usize = 256 << 10;
/// HTTP/2 flow control: what one request, and what one connection may send unread, bytes.
const WINDOWS: (u32, u32) = (1 << 20, 16 << 20);
/// A TLS handshake has this long.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Connections waiting to be accepted.
const BACKLOG: u32 = 1024;
/// Pause after a failed accept: no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How a simulator starts.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches, named where they are set")]
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
    /// An HTTP/1.1 connection without a request is closed after this time.
    pub idle: Duration,
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
            idle: Duration::from_mins(1),
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

    /// Cuts the connections that exist; new ones are welcome. When it returns, no request that came on an old one is
    /// counted any more. Cancel safe: they are cut all the same.
    pub async fn cut_connections(&self) {
        self.engine.cut_connections().wait().await;
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
    let OpenLines { cut, tasks } = engine.open.lock().expect("open lock").clone();
    let _served = tasks.token();
    let _open = Open::enter(&engine);
    let cut = cut.child_token();
    let streams = Streams { cut: cut.clone(), tasks };
    if stream.set_nodelay(true).is_err() {
        return; // gone already
    }
    let stream = Arc::new(stream);
    let wire = wire::Wire(Arc::clone(&stream));
    let serve = async {
        match &engine.tls {
            None => exchange(&engine, wire, streams, &Line { cut: cut.clone(), plain: Some(stream) }).await,
            Some(tls) => {
                let handshake = tokio::time::timeout(HANDSHAKE_MAX, tls.acceptor().accept(wire));
                if let Ok(Ok(wire)) = handshake.await {
                    exchange(&engine, wire, streams, &Line { cut: cut.clone(), plain: None }).await;
                }
            }
        }
    };
    tokio::select! {
        biased; // what is cut reads nothing more
        () = cut.cancelled() => {}
        () = serve => {}
    }
}

async fn exchange(
    engine: &Arc<Engine>,
    wire: impl AsyncRead + AsyncWrite + Unpin + 'static,
    streams: Streams,
    line: &Line,
) {
    let service = service_fn(|request| {
        let (engine, line) = (Arc::clone(engine), line.clone());
        async move { Ok::<_, Infallible>(engine.answer(request, &line).await) }
    });
    let mut builder = auto::Builder::new(streams);
    let mut http1 = builder.http1();
    http1.timer(TokioTimer::new()).header_read_timeout(engine.options.idle).max_buf_size(READ_BUFFER);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).initial_stream_window_size(WINDOWS.0).initial_connection_window_size(WINDOWS.1);
    let builder = if engine.options.http2 { builder } else { builder.http1_only() };
    // How a connection ends is the client's affair.
    drop(builder.serve_connection(TokioIo::new(wire), service).await);
}

/// Runs the streams of an HTTP/2 connection, which end with it.
#[derive(Clone)]
struct Streams {
    cut: CancellationToken,
    tasks: TaskTracker,
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        self.tasks.spawn(self.cut.clone().run_until_cancelled_owned(stream));
    }
}

/// A connection that has not ended.
struct Open<'a>(&'a Engine);

impl<'a> Open<'a> {
    fn enter(engine: &'a Engine) -> Self {
        engine.note(|records| {
            records.counts.connections += 1;
            records.counts.open += 1;
        });
        Self(engine)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.note(|records| records.counts.open -= 1);
    }
}

#[cfg(test)]
mod tests;
