//! An MQTT subscription: messages spooled, then acknowledged, in the order in which they came.
//!
//! A broker sends again what was not acknowledged, but only when we connect anew. So what the spool refuses is held here
//! and put again, and nothing behind it is acknowledged before it; what is held is bounded, and beyond it the broker holds
//! the rest. What is held outlives a connection. Not here: packets and signs of life (`link`), and frames once they are
//! spooled (`spool`).

mod config;
mod link;

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use futures_util::StreamExt as _;
use futures_util::future::{BoxFuture, FutureExt as _, ready};
use futures_util::stream::FuturesOrdered;
use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

pub use self::config::Config;
use self::link::{Came, Greeting, Link, Publish, Purpose};
use super::inbox::refusal;
use super::message::{self, Known};
use super::reconnect::Backoff;
use super::spool::{self, Arrival, Image, Refused, Spool};
use super::{State, Surroundings, Template, believed};
use crate::frame::{FrameId, SourceKind};
use crate::metrics::{DetectorMetrics, Serving};
use crate::settle::{Reason, Refusal};

/// Messages that are on their way into the spool, and so not acknowledged. A broker of MQTT 5 is told; where one sends
/// more, nothing is read until there is room. After a crash as many may come again; and with them on their way it takes a
/// sync of more than 10 ms to be slower than 6,000 frames a second.
const HELD_MAX: u16 = 64;
/// Bytes of them, and one message: beyond, nothing is read until there is room.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Messages whose acknowledgement may not have reached the broker: it has at most those of its window.
const REMEMBERED_MAX: usize = 4 * HELD_MAX as usize;
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
    tokio::select! {
        () = spool.tried() => {}
        () = stop.cancelled() => return,
    }
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
pub async fn reach(config: &Config, files: &(dyn Fn(&Path) -> PathBuf + Send + Sync)) -> anyhow::Result<()> {
    let client_id = format!("{}-doctor", config.client_id());
    let (link, _) = Link::connect(config, Purpose::Trial { client_id: &client_id }, 0, files).await?;
    link.close().await
}

struct Source {
    config: Config,
    around: Surroundings,
    spool: Arc<Spool>,
    template: Option<Template>,
    /// In the order in which they came.
    held: FuturesOrdered<BoxFuture<'static, Kept>>,
    held_bytes: usize,
    /// Counts connections: what came through an earlier one cannot be acknowledged through this one.
    connection: u64,
    /// The broker may have a session of ours.
    had_session: bool,
    /// It has our subscription.
    subscribed: bool,
    /// What came last: its packet id, and what tells its content from another's.
    remembered: VecDeque<(u16, u32)>,
    detectors: HashMap<String, (Arc<DetectorMetrics>, Serving)>,
    up: bool,
    said_unguarded: bool,
    said_other_topic: bool,
}

/// A message that is in the spool, or needs no place there.
struct Kept {
    id: Option<u16>,
    connection: u64,
    bytes: usize,
    /// `false`: we are stopping, and it is not.
    safe: bool,
}

impl Source {
    fn new(config: Config, around: Surroundings, spool: Arc<Spool>) -> Self {
        let entry = around.entry.clone();
        let template = Template::parse(&entry.name, entry.source.placeholders()).ok();
        let mut source = Self {
            config,
            spool,
            held: FuturesOrdered::new(),
            held_bytes: 0,
            connection: 0,
            had_session: false,
            subscribed: false,
            remembered: VecDeque::new(),
            detectors: HashMap::new(),
            up: false,
            said_unguarded: false,
            said_other_topic: false,
            template,
            around,
        };
        // From the start on its series are there.
        if source.template.as_ref().is_some_and(Template::is_fixed) {
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
        let purpose = Purpose::Session { client_id: &client_id, receive_max: HELD_MAX };
        let payload_max = message::bytes_max(self.around.max_frame);
        let connecting = Link::connect(&self.config, purpose, payload_max, &*files);
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
            self.had_session = true;
            return;
        }
        if self.had_session {
            self.count("sessions_lost_total", 1);
            tracing::error!(
                detector = %self.around.entry.name, place = %self.config.place(),
                "the broker has forgotten our session, and what waited in it is lost: let it keep its sessions on disk (mosquitto: persistence true)"
            );
        }
        self.had_session = true;
        self.subscribed = false;
        // Packet ids begin anew.
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
        let arrival = self.read(publish);
        let kept = keep(self.spool.clone(), arrival, self.around.stop.clone());
        self.held.push_back(kept.map(done).boxed());
    }

    /// Whether the broker sends once more what we have: our acknowledgement of it went down with a connection.
    fn is_known(&mut self, publish: &Publish) -> bool {
        let Some(id) = publish.id else { return false };
        let this = (id, content(publish));
        if publish.again && self.remembered.contains(&this) {
            return true;
        }
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.pop_front();
        }
        self.remembered.push_back(this);
        false
    }

    /// Whether it is none of those that are asked for, which is counted.
    fn is_refused(&mut self, publish: &Publish) -> bool {
        let reason = if !link::fits(&self.config.topic, &publish.topic) {
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
        let name = self.name(publish, None).unwrap_or_else(|| self.around.entry.name.clone());
        self.around.metrics.detector(&name).refused(reason);
        true
    }

    /// Whose frame it is, and what it says of itself.
    fn read(&mut self, publish: Publish) -> Arrival {
        let entry = self.around.entry.clone();
        let received_at = Timestamp::now();
        let [detector_name, detect_time, time_zone] = &publish.beside;
        let known = Known::from_fields(detector_name.as_deref(), detect_time.as_deref(), time_zone.as_deref());
        let found = match &publish.malformed {
            Some(why) => Err(refusal(Reason::Unsupported, format!("the message: {why}"))),
            None => known.map_err(|flaw| unsupported(&flaw)).and_then(|known| self.image(&publish, known)),
        };
        let (image, known, mut flaw) = match found {
            Ok((image, known)) => (image, known, None),
            Err(flaw) => (Image::raw(publish.payload.clone()), Known::default(), Some(flaw)),
        };
        let name = self.name(&publish, known.detector_name.as_deref());
        if name.is_none() && flaw.is_none() {
            let why = format!("the message does not say what `{}` stands for", entry.name);
            flaw = Some(refusal(Reason::Unsupported, why));
        }
        let detector = name.unwrap_or_else(|| entry.name.clone());
        self.detector(&detector);
        Arrival {
            id: if flaw.is_some() { id_of(&entry.place(), &publish) } else { FrameId::generate() },
            entry: entry.name.as_str().into(),
            source: SourceKind::Mqtt,
            time_zone: known.time_zone.unwrap_or_else(|| entry.time_zone.clone()),
            detect_time: believed(known.detect_time, received_at, &self.around.metrics).unwrap_or(received_at),
            received_at,
            name: publish.topic,
            image,
            flaw,
            detector,
        }
    }

    /// The image, as far as it can be told without looking at it; base64 is.
    fn image(&self, publish: &Publish, known: Known) -> Result<(Image, Known), Refusal> {
        let max = self.around.max_frame;
        let too_large = |bytes: usize| refusal(Reason::TooLarge, format!("{bytes} bytes; `encode.max_frame` is {max}"));
        if let Some(whole) = publish.cut_from {
            let mut flaw = too_large(whole);
            flaw.message.push_str("; only its beginning is kept");
            return Err(flaw);
        }
        let (image, known) = message::payload(&publish.payload, known).map_err(|flaw| unsupported(&flaw))?;
        let image = match &image {
            message::Image::Raw(bytes) if bytes.len() as u64 > max => return Err(too_large(bytes.len())),
            message::Image::Raw(_) => Image::raw(publish.payload.clone()),
            message::Image::Base64(_) => Image::look(&image, &publish.payload, max).map_err(|flaw| match flaw {
                spool::Flaw::TooLarge => too_large(publish.payload.len()),
                spool::Flaw::Unusable(message) => unsupported(&message::Flaw { field: Some("expanded"), message }),
            })?,
        };
        Ok((image, known))
    }

    /// The name of its detector; `None` if the message lacks what it is made of.
    fn name(&self, publish: &Publish, said: Option<&str>) -> Option<String> {
        let levels: Vec<&[u8]> = publish.topic.split('/').map(str::as_bytes).collect();
        let said = said.or(publish.beside[0].as_deref()).map(str::to_owned);
        self.template.as_ref()?.fill(&levels, |_| said.clone())
    }

    /// Shows a detector as one of ours.
    fn detector(&mut self, name: &str) {
        if self.detectors.contains_key(name) || self.detectors.len() >= DETECTORS_MAX {
            return;
        }
        let counts = self.around.metrics.detector(name);
        counts.up(self.up);
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
        self.up = state == State::Ok;
        for (counts, _) in self.detectors.values() {
            counts.up(self.up);
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

fn unsupported(flaw: &message::Flaw) -> Refusal {
    refusal(Reason::Unsupported, format!("the message: {flaw}"))
}

/// Tells a message's content from another's of the same packet id.
fn content(publish: &Publish) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(publish.topic.as_bytes());
    for said in publish.beside.iter().flatten() {
        crc.update(said.as_bytes());
    }
    crc.update(&publish.payload);
    crc.finalize()
}

/// The same for each delivery of what becomes a dead letter: it becomes one, whenever we are killed.
fn id_of(place: &str, publish: &Publish) -> FrameId {
    let mut context = Context::new(&SHA256);
    let whole = publish.cut_from.unwrap_or(publish.payload.len()).to_le_bytes();
    for part in [place.as_bytes(), publish.topic.as_bytes(), &whole, &publish.payload] {
        context.update(part);
        context.update(b"\0");
    }
    let digest = context.finish();
    let mut short = [0; 10];
    short.copy_from_slice(&digest.as_ref()[..10]);
    FrameId::derived(0, short)
}
