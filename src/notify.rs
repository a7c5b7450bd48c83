//! What the service manager is told (`sd_notify`), and the watchdog that tells it only while the daemon really turns.
//!
//! Not here: what is worth telling (that is `daemon`). Without a service manager everything here does nothing, apart from
//! [`Watchdog::alive`], which is also `/healthz`. A message that cannot be sent is never an error of the daemon's.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Between two looks at the loops where no service manager says otherwise.
const PERIOD_DEFAULT: Duration = Duration::from_secs(10);
/// No shorter looks than this, whatever the service manager says.
const PERIOD_MIN: Duration = Duration::from_millis(100);

/// The way to the service manager.
#[derive(Debug)]
pub struct Notify {
    manager: Option<(UnixDatagram, SocketAddr)>,
}

impl Notify {
    /// To the service manager of the environment, if there is one.
    pub fn from_env() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Self { manager: None } };
        Self::to(&path).unwrap_or_else(|error| {
            tracing::warn!(%error, path = ?path, "cannot tell the service manager anything: NOTIFY_SOCKET is of no use");
            Self { manager: None }
        })
    }

    /// To nobody.
    pub fn silent() -> Self {
        Self { manager: None }
    }

    /// To a socket; `@name` is an abstract one.
    pub fn to(path: &OsStr) -> io::Result<Self> {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { manager: Some((socket, address)) })
    }

    /// Started, or done with reloading.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// What `systemctl status` shows.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", one_line(text)));
    }

    /// Reloading; [`Notify::ready`] ends it.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        // In one datagram: systemd takes the time only together with the news.
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// Stopping; what is in flight is being settled.
    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=stopping: settling what is in flight");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.manager
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::debug!(%error, message, "the service manager was not told");
        }
    }
}

/// Pings the service manager as long as every registered loop turns.
pub struct Watchdog {
    notify: Arc<Notify>,
    /// Whether the service manager wants pings.
    asked: bool,
    period: Duration,
    loops: Mutex<Vec<Watched>>,
    /// The loops that did not turn in the last period, for people.
    stuck: Mutex<Option<String>>,
}

/// A loop's proof of progress. Dropped when the loop ends, which is no reason to worry.
#[derive(Clone)]
pub struct Progress {
    beats: Arc<AtomicU64>,
}

impl Progress {
    /// The loop turned. To be called at least every [`Watchdog::period`], also when there is nothing to do.
    pub fn tick(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }
}

struct Watched {
    name: String,
    beats: Weak<AtomicU64>,
    /// `None`: registered since the last look, so nothing is expected yet.
    seen: Option<u64>,
}

impl Watchdog {
    /// With the service manager's time-out from the environment, if it watches this process.
    pub fn from_env(notify: Arc<Notify>) -> Arc<Self> {
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let timeout = number("WATCHDOG_USEC").filter(|micros| for_us && *micros > 0).map(Duration::from_micros);
        Self::new(notify, timeout)
    }

    /// With the service manager's time-out: it is pinged twice in it.
    pub fn new(notify: Arc<Notify>, timeout: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            notify,
            asked: timeout.is_some(),
            period: timeout.map_or(PERIOD_DEFAULT, |timeout| (timeout / 2).max(PERIOD_MIN)),
            loops: Mutex::default(),
            stuck: Mutex::default(),
        })
    }

    /// Between two looks at the loops: each must turn at least once in it.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// Registers a loop by a name for people.
    pub fn watch(&self, name: impl Into<String>) -> Progress {
        let beats = Arc::new(AtomicU64::new(0));
        let watched = Watched { name: name.into(), beats: Arc::downgrade(&beats), seen: None };
        self.loops.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
        Progress { beats }
    }

    /// Whether every loop turned in the last period; otherwise, which did not.
    pub fn alive(&self) -> Result<(), String> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    /// Looks every period until stopped.
    pub async fn run(&self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.look();
        }
    }

    fn look(&self) {
        let mut stuck = Vec::new();
        self.loops.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(|watched| {
            let Some(beats) = watched.beats.upgrade() else { return false };
            let now = beats.load(Ordering::Relaxed);
            if watched.seen.replace(now) == Some(now) {
                stuck.push(watched.name.clone());
            }
            true
        });
        if stuck.is_empty() {
            if self.asked {
                self.notify.send("WATCHDOG=1");
            }
        } else {
            tracing::error!(loops = stuck.join(", "), period = ?self.period, "a loop of the daemon does not turn");
        }
        let stuck = (!stuck.is_empty()).then(|| format!("did not turn for {:?}: {}", self.period, stuck.join(", ")));
        *self.stuck.lock().unwrap_or_else(PoisonError::into_inner) = stuck;
    }
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watchdog({:?})", self.period)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// A line break would begin another assignment.
fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager() -> (tempfile::TempDir, UnixDatagram, Arc<Notify>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let notify = Notify::to(path.as_os_str()).unwrap();
        (directory, socket, Arc::new(notify))
    }

    fn heard(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 512];
        let n = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..n].to_vec()).unwrap())
    }

    #[test]
    fn the_manager_hears_each_piece_of_news_in_one_datagram() {
        let (_directory, socket, notify) = manager();
        notify.ready("two\ndetectors");
        assert_eq!(heard(&socket).unwrap(), "READY=1\nSTATUS=two detectors");
        notify.status("paused");
        assert_eq!(heard(&socket).unwrap(), "STATUS=paused");
        notify.reloading();
        let text = heard(&socket).unwrap();
        let micros: u64 = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!(micros > 0);
        notify.stopping();
        assert!(heard(&socket).unwrap().starts_with("STOPPING=1\n"));
        assert_eq!(heard(&socket), None);
    }

    #[test]
    fn abstract_sockets_work_and_a_missing_manager_does_no_harm() {
        let name = format!("framegate-test-{}", fastrand::u64(..));
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Notify::to(OsStr::new(&format!("@{name}"))).unwrap().status("here");
        assert_eq!(heard(&socket).unwrap(), "STATUS=here");
        Notify { manager: None }.ready("");
        Notify::to(OsStr::new("/nonexistent/notify")).unwrap().ready("");
    }

    #[test]
    fn a_full_manager_does_not_block() {
        let (_directory, socket, notify) = manager();
        for _ in 0..10_000 {
            notify.status("again");
        }
        assert!(heard(&socket).is_some());
    }

    #[test]
    fn pings_only_while_every_loop_turns() {
        let (_directory, socket, notify) = manager();
        let watchdog = Watchdog::new(notify, Some(Duration::from_secs(30)));
        assert_eq!(watchdog.period(), Duration::from_secs(15));
        let (outlet, publisher) = (watchdog.watch("outlet"), watchdog.watch("publisher"));
        let look = |ticking: &[&Progress]| {
            for progress in ticking {
                progress.tick();
            }
            watchdog.look();
            heard(&socket).is_some()
        };
        assert!(look(&[]), "nothing is expected of a loop that has just begun");
        assert!(look(&[&outlet, &publisher]));
        assert!(!look(&[&outlet]));
        assert_eq!(watchdog.alive().unwrap_err(), "did not turn for 15s: publisher");
        assert!(!look(&[&outlet]));
        assert!(look(&[&outlet, &publisher]), "it recovers");
        assert_eq!(watchdog.alive(), Ok(()));
        drop(publisher);
        assert!(look(&[&outlet]), "a loop that ended is not stuck");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_loop_stops_the_pings_of_the_running_watchdog() {
        let (_directory, socket, notify) = manager();
        let watchdog = Watchdog::new(notify, Some(Duration::from_secs(2)));
        let progress = watchdog.watch("pipeline");
        let stop = CancellationToken::new();
        let run = watchdog.run(stop.clone());
        let drive = async {
            for _ in 0..5 {
                progress.tick();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            while heard(&socket).is_some() {}
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(watchdog.alive().is_err());
            // One at most: the loop's last turn may have been seen late.
            assert!(heard(&socket).is_none() || heard(&socket).is_none());
            stop.cancel();
        };
        tokio::join!(run, drive);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_manager_the_loops_are_watched_all_the_same() {
        let watchdog = Watchdog::new(Arc::new(Notify { manager: None }), None);
        let _stuck = watchdog.watch("pipeline");
        let stop = CancellationToken::new();
        let drive = async {
            tokio::time::sleep(PERIOD_DEFAULT * 3).await;
            assert!(watchdog.alive().is_err());
            stop.cancel();
        };
        tokio::join!(watchdog.run(stop.clone()), drive);
    }
}
