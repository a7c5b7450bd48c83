//! Frames that others push over HTTP: spooled, then answered. One server for all entries of this kind, which speaks the
//! engine's own API, so that a detector changes only its URL.
//!
//! Here is what it is configured with, and the [`Door`] between the daemon and the server. What a request means is in
//! `call`, connections are in `server`.

mod answer;
mod call;
mod server;
mod token;

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

pub use self::server::{Inherited, serve, take_inherited};
use self::token::Tokens;
use super::message;
use super::spool::Spool;
use super::{Config as SourceConfig, Entry, State, Surroundings, Template};
use crate::metrics::{DetectorMetrics, Metrics, Serving};

/// How often an entry looks whether the server and the spool are well.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Bytes of requests in memory at once, unless two of the largest need more; who sends beyond is answered 429.
const BODIES_BYTES_MAX: u64 = 64 << 20;
/// Detectors of one entry whose state and silence are shown.
const MEMBERS_MAX: usize = 1000;

/// `[detectors.push]`: nothing of its own; where to listen is said in `[push]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        "push".into()
    }
}

/// `[push]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// A Unix socket (`unix:/run/framegate/push.sock`, for framegate's user and group), an address and port, or `systemd` for the
    /// socket of `framegate-push.socket`. Needed where an entry has `push`. Changes with a restart only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// The account that pushes. It and the certificate are needed for any other address than loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// A file with its password, looked up like the engine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Our certificate and those between it and its CA (a PEM file). Read again at a reload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert_file: Option<PathBuf>,
    /// Its private key (a PEM file), looked up like `password_file`. Read again at a reload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key_file: Option<PathBuf>,
}

/// What `listen` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An address and port.
    Tcp(SocketAddr),
    /// A Unix socket's path.
    Unix(PathBuf),
    /// A socket that systemd listens on and hands over.
    Systemd,
}

impl Listen {
    /// Takes it apart.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err("has no whole path behind unix:"),
            None => text.parse().map(Self::Tcp).map_err(|_| "is neither an address with a port nor unix: and a path"),
        }
    }

    /// Whether only this box can reach it: then it may go without credentials. Of a socket of systemd's it is known when it
    /// is handed over.
    pub fn is_local(&self) -> bool {
        match self {
            Listen::Tcp(address) => is_loopback(address),
            Listen::Unix(_) | Listen::Systemd => true,
        }
    }
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

impl Server {
    /// Whether pushing needs a token.
    fn has_credentials(&self) -> bool {
        self.username.is_some() && self.password_file.is_some()
    }

    fn has_tls(&self) -> bool {
        self.tls_cert_file.is_some() && self.tls_key_file.is_some()
    }

    /// Whether strangers may reach it.
    fn is_guarded(&self) -> bool {
        self.has_tls() && self.has_credentials()
    }
}

/// What the daemon hands to the server, and what entries ask it.
pub struct Door {
    config: ArcSwap<Server>,
    routes: ArcSwap<Vec<Route>>,
    acceptor: ArcSwapOption<Acceptor>,
    files: Files,
    spool: Arc<Spool>,
    metrics: Arc<Metrics>,
    tokens: Tokens,
    max_frame: u64,
    /// KiB of requests that may come into memory.
    memory: Arc<Semaphore>,
    trouble: Mutex<Option<String>>,
    /// Where it listens, while it does.
    address: Mutex<Option<String>>,
    /// Whether that can be reached from the network.
    for_strangers: AtomicBool,
    /// By the name of their entry as it is written.
    members: Mutex<HashMap<String, Arc<Members>>>,
}

/// The detectors of one entry: the one of its name, or those of a family that frames were pushed for.
struct Members {
    metrics: Arc<Metrics>,
    silence_alarm: Option<Duration>,
    detectors: Mutex<HashMap<String, (Arc<DetectorMetrics>, Serving)>>,
}

impl Members {
    /// There is a detector of this name.
    fn heard(&self, detector: &str) {
        let mut detectors = lock(&self.detectors);
        if detectors.len() < MEMBERS_MAX && !detectors.contains_key(detector) {
            let counts = self.metrics.detector(detector);
            counts.up(true);
            let serving = counts.serve(self.silence_alarm);
            detectors.insert(detector.to_owned(), (counts, serving));
        }
    }

    fn up(&self, up: bool) {
        for (counts, _) in lock(&self.detectors).values() {
            counts.up(up);
        }
    }
}

/// Where secret and CA files are now.
type Files = Arc<dyn Fn(&Path) -> PathBuf + Send + Sync>;

struct Acceptor(TlsAcceptor);

/// An entry that takes pushes.
#[derive(Debug)]
struct Route {
    entry: Arc<Entry>,
    name: Template,
}

impl Door {
    /// A door that nobody has opened: [`serve`] does.
    pub fn new(config: &Server, files: Files, spool: Arc<Spool>, metrics: Arc<Metrics>, max_frame: u64) -> Arc<Self> {
        let largest = message::bytes_max(max_frame);
        let memory = BODIES_BYTES_MAX.max(2 * largest) >> 10;
        Arc::new(Self {
            config: ArcSwap::from_pointee(config.clone()),
            routes: ArcSwap::default(),
            acceptor: ArcSwapOption::empty(),
            files,
            spool,
            metrics,
            tokens: Tokens::new(),
            max_frame,
            memory: Arc::new(Semaphore::new(usize::try_from(memory).unwrap_or(Semaphore::MAX_PERMITS))),
            trouble: Mutex::new(Some("not listening yet".into())),
            address: Mutex::default(),
            for_strangers: AtomicBool::new(false),
            members: Mutex::default(),
        })
    }

    /// Credentials, certificates and entries of now. Where it listens stays as it is until a restart; whoever wants that
    /// changed gets the credentials changed with it, for those of another place may be none.
    pub fn reconfigure(&self, config: &Server, entries: &[Arc<Entry>]) {
        let route = |entry: &Arc<Entry>| {
            let pushed = matches!(entry.source, SourceConfig::Push(_));
            // The configuration was checked before.
            let name = Template::parse(&entry.name, entry.source.placeholders()).ok().filter(|_| pushed)?;
            Some(Route { entry: entry.clone(), name })
        };
        self.routes.store(Arc::new(entries.iter().filter_map(route).collect()));
        if config.listen != self.config.load().listen {
            return;
        }
        if self.for_strangers.load(Ordering::Relaxed) && !config.is_guarded() {
            tracing::error!(
                "the socket for pushes can be reached from the network: it keeps its account and certificate until a restart"
            );
            return;
        }
        let before = self.config.swap(Arc::new(config.clone()));
        if (&before.username, &before.password_file) != (&config.username, &config.password_file) {
            self.tokens.end_all();
        }
        if !config.has_tls() {
            self.acceptor.store(None);
        } else if self.address().is_some()
            && let Err(error) = self.read_certificate()
        {
            tracing::error!("the certificate for pushes is not taken anew, the old one goes on: {error:#}");
        }
    }

    /// Where it listens, while it does.
    pub fn address(&self) -> Option<String> {
        lock(&self.address).clone()
    }

    /// Why nothing can be pushed.
    fn held(&self) -> Option<String> {
        lock(&self.trouble).clone().or_else(|| self.spool.held())
    }

    /// A frame of this detector was taken, for the entry of this name.
    fn heard(&self, entry: &str, detector: &str) {
        let members = lock(&self.members).get(entry).cloned();
        if let Some(members) = members {
            members.heard(detector);
        }
    }

    /// It listens at this address, or it does not and why.
    fn listens(&self, state: Result<String, String>) {
        let (address, trouble) = match state {
            Ok(address) => (Some(address), None),
            Err(why) => (None, Some(why)),
        };
        *lock(&self.address) = address;
        *lock(&self.trouble) = trouble;
    }
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

/// Serves one entry until it is stopped. The server does the work; here it is shown how the entry is.
pub async fn run(around: Surroundings) {
    let Some(door) = around.push.clone() else {
        // The configuration was checked before.
        around.health.set(State::Held("[push] says nowhere to listen".into()));
        return around.stop.cancelled().await;
    };
    let fixed = Template::parse(&around.entry.name, around.entry.source.placeholders()).is_ok_and(|it| it.is_fixed());
    let Surroundings { entry, metrics, .. } = &around;
    let members = Members { metrics: metrics.clone(), silence_alarm: entry.silence_alarm, detectors: Mutex::default() };
    let members = Arc::new(members);
    if fixed {
        members.heard(&entry.name);
    }
    lock(&door.members).insert(entry.name.clone(), members.clone());
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        let held = door.held();
        members.up(held.is_none());
        around.health.set(held.map_or(State::Ok, State::Held));
        tokio::select! {
            () = around.stop.cancelled() => break,
            _ = look.tick() => {}
        }
    }
    // A reload that changes the entry has put its successor there already.
    lock(&door.members).retain(|_, there| !Arc::ptr_eq(there, &members));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{queue, source::spool};

    fn server(listen: &str, guarded: bool) -> Server {
        let file = |name: &str| guarded.then(|| PathBuf::from(name));
        Server {
            listen: Some(listen.into()),
            username: guarded.then(|| "cameras".into()),
            password_file: file("password"),
            tls_cert_file: file("cert"),
            tls_key_file: file("key"),
        }
    }

    #[test]
    fn e3_no_reload_takes_the_account_from_a_socket_that_strangers_reach() {
        let metrics = Metrics::new();
        let (intake, _outlet) = queue::queue(1, &metrics);
        let (spool, _inbox) = Spool::new(&spool::Config::default(), intake, metrics.clone());
        let door = |config: &Server| Door::new(config, Arc::new(Path::to_owned), spool.clone(), metrics.clone(), 1);
        // It would listen on loopback after a restart, and needs no account there.
        let network = door(&server("0.0.0.0:5009", true));
        network.reconfigure(&server("127.0.0.1:5009", false), &[]);
        assert!(network.config.load().is_guarded());
        // What systemd listens on is known only when it is handed over.
        let handed_over = door(&server("systemd", true));
        handed_over.for_strangers.store(true, Ordering::Relaxed);
        handed_over.reconfigure(&server("systemd", false), &[]);
        assert!(handed_over.config.load().is_guarded());
        let local = door(&server("127.0.0.1:5009", true));
        local.reconfigure(&server("127.0.0.1:5009", false), &[]);
        assert!(!local.config.load().is_guarded());
    }

    #[test]
    fn e3_tokens_of_a_time_without_an_account_or_of_another_one_are_worth_nothing_after_the_reload() {
        let metrics = Metrics::new();
        let (intake, _outlet) = queue::queue(1, &metrics);
        let (spool, _inbox) = Spool::new(&spool::Config::default(), intake, metrics.clone());
        let open = server("127.0.0.1:5009", false);
        let door = Door::new(&open, Arc::new(Path::to_owned), spool, metrics, 1);
        let now = jiff::Timestamp::now();
        // Anybody gets one for any name, as long as nobody is asked for a password.
        let token = door.tokens.issue("cameras", now);
        door.reconfigure(&open, &[]);
        assert_eq!(door.tokens.user(&token, now).as_deref(), Some("cameras"), "nothing changed");
        let guarded = server("127.0.0.1:5009", true);
        door.reconfigure(&guarded, &[]);
        assert_eq!(door.tokens.user(&token, now), None);
        let token = door.tokens.issue("cameras", now);
        door.reconfigure(&Server { password_file: Some("another".into()), ..guarded }, &[]);
        assert_eq!(door.tokens.user(&token, now), None);
    }

    #[test]
    fn places_to_listen() {
        for (text, found) in [
            ("127.0.0.1:5009", Some((Listen::Tcp(([127, 0, 0, 1], 5009).into()), true))),
            ("0.0.0.0:1", Some((Listen::Tcp(([0, 0, 0, 0], 1).into()), false))),
            ("unix:/run/push.sock", Some((Listen::Unix("/run/push.sock".into()), true))),
            ("systemd", Some((Listen::Systemd, true))),
            ("unix:push.sock", None),
            ("localhost:5009", None),
            ("", None),
        ] {
            let got = Listen::parse(text).ok().map(|listen| (listen.clone(), listen.is_local()));
            assert_eq!(got, found, "{text}");
        }
        assert!(Listen::parse("[::ffff:127.0.0.1]:1").unwrap().is_local());
        assert!(!Listen::parse("[::]:1").unwrap().is_local());
    }
}
