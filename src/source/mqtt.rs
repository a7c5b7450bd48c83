//! An MQTT subscription: messages spooled, then acknowledged, in the order in which they came.
//!
//! A broker sends again what was not acknowledged, but only when we connect anew. So what the spool refuses is held here
//! and put again, and nothing behind it is acknowledged before it; what is held is bounded, and beyond it the broker holds
//! the rest. What is held outlives a connection. Not here: packets and signs of life (`link`), and frames once they are
//! spooled (`spool`).

mod arrival;
mod config;
mod link;
mod remembered;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::{BoxFuture, FutureExt as _, ready};
use futures_util::stream::FuturesOrdered;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use self::arrival::Reader;
pub use self::config::Config;
use self::link::{Link, Purpose};
use self::remembered::Remembered;
use self::wire::{Came, Greeting, Id, Publish};
use super::message;
use super::reconnect::Backoff;
use super::spool::{Arrival, Refused, Spool};
use super::{Files, State, Surroundings};
use crate::metrics::{DetectorMetrics, Serving};

/// Messages that are on their way into the spool, and so not acknowledged. A broker of MQTT 5 is told; where one sends
/// more, nothing is read until there is room. After a crash as many may come again; and with them on their way it takes a
/// sync of more than 10 ms to be slower than 6,000 frames a second.
const HELD_MAX: u16 = 64;
/// Bytes of them, and one message: beyond, nothing is read until there is room.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Detectors of one entry that are shown as up or not.
const DETECTORS_MAX: usize = 1000;
/// After the spool refused a frame: it is put again after so long, once the spool takes frames.
const PUT_AGAIN: Duration = Duration::from_millis(100);
/// How often it is looked whether the spool is well.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A connection that lasts so long is a good one: before, another client of our name may be throwing us out.
const STEADY: Duration = Duration::from_secs(10);

/// Serves one entry until it is stopped; returns when what was taken is spooled and acknowledged.
pub async fn run(config: Config, around: Surroundings) {
    let Some(spool) = around.spool.clone() else {
        // The daemon makes one wherever an entry needs it.
        around.health.set(State::Held("there is no spool".into()));
        return around.stop.cancelled().await;
    };
    let stop = around.stop.clone();
    // The broker lets one of a name in. After a reload, the former source says its last acknowledgements first.
    let name = format!("{} {}", config.url, config.client_id());
    let ready = async {
        spool.tried().await;
        around.sessions.take(name).await
    };
    let _session = tokio::select! {
        session = ready => session,
        () = stop.cancelled() => return,
    };
    let mut source = Source::new(config, around, spool);
    let mut backoff = Backoff::default();
    loop {
        let begun = Instant::now();
        match source.session().await {
            Ok(()) => return,
            Err(error) => source.hold(&format!("{error:#}")),
        }
        if begun.elapsed() > STEADY {
            backoff.reset();
        }
        tokio::select! {
            () = source.pause(backoff.failed()) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Connects beside whoever is connected already, takes nothing, and says what stands in the way.
pub(super) async fn reach(config: &Config, files: &Files<'_>) -> anyhow::Result<String> {
    let client_id = format!("{}-doctor", config.client_id());
    let purpose = Purpose { client_id: &client_id, session: None, payload_max: 0 };
    let (link, _) = Link::connect(config, purpose, files).await?;
    link.close().await?;
    Ok("it lets us in".into())
}

/// The sessions that this daemon has at brokers, each with one source at a time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<HashMap<String, Arc<AsyncMutex<()>>>>>);

impl Sessions {
    async fn take(&self, name: String) -> OwnedMutexGuard<()> {
        let session = self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default().clone();
        session.lock_owned().await
    }
}

struct Source {
    config: Config,
    around: Surroundings,
    spool: Arc<Spool>,
    reader: Reader,
    /// In the order in which they came.
    held: FuturesOrdered<BoxFuture<'static, Kept>>,
    held_bytes: usize,
    /// Counts connections: what came through an earlier one cannot be acknowledged through this one.
    connection: u64,
    /// It has our subscription.
    subscribed: bool,
    remembered: Remembered,
    detectors: HashMap<String, (Arc<DetectorMetrics>, Serving)>,
    said_unguarded: bool,
    said_other_topic: bool,
}

/// A message that is in the spool, or needs no place there.
struct Kept {
    id: Option<Id>,
    connection: u64,
    bytes: usize,
    /// `false`: we are stopping, and it is not.
    safe: bool,
}

impl Source {
    fn new(config: Config, around: Surroundings, spool: Arc<Spool>) -> Self {
        let entry = around.entry.clone();
        let mut source = Self {
            config,
            reader: Reader::new(&around),
            spool,
            held: FuturesOrdered::new(),
            held_bytes: 0,
            connection: 0,
            subscribed: false,
            remembered: Remembered::default(),
            detectors: HashMap::new(),
            said_unguarded: false,
            said_other_topic: false,
            around,
        };
        // From the start on its series are there.
        if source.reader.is_fixed() {
            source.detector(&entry.name);
        }
        for name in ["redelivered_total", "sessions_lost_total"] {
            source.count(name, 0);
        }
        source
    }

    /// One connection, from its beginning to its end. `Ok`: we were stopped.
    async fn session(&mut self) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let files = self.around.files.clone();
        let client_id = self.config.client_id();
        let payload_max = message::bytes_max(self.around.max_frame);
        let purpose = Purpose { client_id: &client_id, session: Some(HELD_MAX), payload_max };
        let connecting = Link::connect(&self.config, purpose, &*files);
        let (mut link, greeting) = tokio::select! {
            connected = connecting => connected?,
            () = stop.cancelled() => return Ok(()),
        };
        self.connection += 1;
        self.greeted(greeting);
        // Subscribing again brings what is retained again.
        if self.subscribed {
            self.is_well();
        } else {
            link.subscribe(&self.config.topic, self.config.retained)?;
        }
        self.serve(link).await
    }

    fn greeted(&mut self, greeting: Greeting) {
        if greeting.session_present {
            return;
        }
        if self.connection > 1 {
            self.count("sessions_lost_total", 1);
            tracing::error!(
                detector = %self.around.entry.name, place = %self.config.place(),
                "the broker has forgotten our session, and what waited in it is lost: let it keep its sessions on disk (mosquitto: persistence true)"
            );
        }
        self.subscribed = false;
        self.remembered.clear();
    }

    async fn serve(&mut self, mut link: Link) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let stopping = stop.is_cancelled();
            if stopping && self.held.is_empty() {
                return link.close().await;
            }
            let listen = !stopping && self.has_room();
            tokio::select! {
                biased;
                Some(kept) = self.held.next(), if !self.held.is_empty() => {
                    self.held_bytes -= kept.bytes;
                    if !kept.safe {
                        // Nothing behind it may be acknowledged either.
                        return link.close().await;
                    }
                    if let Some(id) = kept.id.filter(|_| kept.connection == self.connection) {
                        link.acknowledge(id)?;
                    }
                }
                () = stop.cancelled(), if !stopping => {}
                _ = look.tick() => self.look(),
                came = link.next(listen) => match came? {
                    Came::Publish(publish) => self.accept(publish),
                    Came::Subscribed(granted) => self.subscribed(granted),
                },
            }
        }
    }

    fn has_room(&self) -> bool {
        self.held.len() < usize::from(HELD_MAX) && self.held_bytes < HELD_BYTES_MAX
    }

    /// Waits before the next connection, and goes on spooling.
    async fn pause(&mut self, wait: Duration) {
        let until = sleep(wait);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return,
                Some(kept) = self.held.next(), if !self.held.is_empty() => self.held_bytes -= kept.bytes,
            }
        }
    }

    /// Takes a message in hand: it is put into the spool now, and acknowledged in its turn.
    fn accept(&mut self, publish: Publish) {
        if publish.again {
            self.count("redelivered_total", 1);
        }
        let (id, bytes, connection) = (publish.id, publish.payload.len(), self.connection);
        let done = move |safe| Kept { id, connection, bytes, safe };
        self.held_bytes += bytes;
        if self.is_known(&publish) || self.is_refused(&publish) {
            return self.held.push_back(ready(done(true)).boxed());
        }
        if id.is_none() && !std::mem::replace(&mut self.said_unguarded, true) {
            tracing::warn!(
                detector = %self.around.entry.name, topic = publish.topic,
                "messages come with QoS 0: those that are sent while this box is away are lost; let their sender use QoS 1"
            );
        }
        let arrival = self.reader.read(publish);
        self.detector(&arrival.detector);
        let kept = keep(self.spool.clone(), arrival, self.around.stop.clone());
        self.held.push_back(kept.map(done).boxed());
    }

    /// Whether the broker sends once more what we have: our acknowledgement of it went down with a connection.
    fn is_known(&mut self, publish: &Publish) -> bool {
        publish.id.is_some_and(|id| self.remembered.knows(id.number, publish))
    }

    /// Whether it is none of those that are asked for, which is counted.
    fn is_refused(&mut self, publish: &Publish) -> bool {
        let reason = if !wire::fits(&self.config.topic, &publish.topic) {
            if !std::mem::replace(&mut self.said_other_topic, true) {
                tracing::warn!(
                    detector = %self.around.entry.name, topic = publish.topic, client_id = self.config.client_id(),
                    "the broker still has an earlier subscription of this client_id, whose messages are not taken: with another topic, choose another client_id"
                );
            }
            "other-topic"
        } else if publish.retained && !self.config.retained {
            "retained"
        } else {
            return false;
        };
        self.around.metrics.detector(&self.reader.name(publish)).refused(reason);
        true
    }

    /// Shows a detector as one of ours.
    fn detector(&mut self, name: &str) {
        if self.detectors.contains_key(name) || self.detectors.len() >= DETECTORS_MAX {
            return;
        }
        let counts = self.around.metrics.detector(name);
        counts.up(self.around.health.get() == State::Ok);
        let serving = counts.serve(self.around.entry.silence_alarm);
        self.detectors.insert(name.to_owned(), (counts, serving));
    }

    fn subscribed(&mut self, granted: u8) {
        if granted == 0 {
            tracing::warn!(
                detector = %self.around.entry.name, place = %self.config.place(),
                "the broker grants QoS 0 only: what is sent while this box is away is lost"
            );
        }
        self.subscribed = true;
        self.is_well();
    }

    /// Connected, the source is as well as its spool.
    fn look(&mut self) {
        if !self.subscribed {
            return;
        }
        match self.spool.held() {
            None => self.is_well(),
            Some(why) => drop(self.show(State::Held(why))),
        }
    }

    fn is_well(&mut self) {
        if self.show(State::Ok) {
            tracing::info!(detector = %self.around.entry.name, place = %self.config.place(), client_id = self.config.client_id(), "subscribed");
        }
    }

    fn hold(&mut self, why: &str) {
        let why = format!("{}: {why}", self.config.place());
        if self.show(State::Held(why.clone())) {
            tracing::warn!(detector = %self.around.entry.name, "held: {why}");
        }
    }

    /// `true` if that is news.
    fn show(&mut self, state: State) -> bool {
        for (counts, _) in self.detectors.values() {
            counts.up(state == State::Ok);
        }
        self.around.health.set(state)
    }

    fn count(&self, name: &'static str, n: u64) {
        self.around.metrics.counter(name, &[("detector", &self.around.entry.name)]).increment(n);
    }
}

/// Puts a frame into the spool, for as long as it takes; `false`: we stop before that. The first time at once, so that
/// frames are put in the order of the calls.
fn keep(spool: Arc<Spool>, arrival: Arrival, stop: CancellationToken) -> impl Future<Output = bool> + Send + 'static {
    let mut put = spool.put(arrival.clone()).boxed();
    async move {
        loop {
            match put.await {
                Ok(()) => return true,
                Err(Refused::Stopping) => return false,
                Err(Refused::Full | Refused::Busy | Refused::Broken(_)) => {}
            }
            tokio::select! {
                () = async { sleep(PUT_AGAIN).await; spool.takes_frames().await } => {}
                () = stop.cancelled() => return false,
            }
            put = spool.put(arrival.clone()).boxed();
        }
    }
}
