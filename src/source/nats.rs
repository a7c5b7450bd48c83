//! A NATS `JetStream` stream: messages pulled through a durable consumer, acknowledged when their frames are settled.
//!
//! What was delivered and not acknowledged is delivered again after the consumer's deadline, to whomever. While messages
//! are in hand, progress reports move that deadline. Not here: what a message means for its frame (`inbox`).

mod config;
mod link;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::bail;
use async_nats::Message as Wire;
use async_nats::subject::Subject;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

pub use self::config::Config;
use self::link::{Came, Link, Reply};
use super::inbox::{Inbox, Message, News, Verdict};
use super::reconnect::Backoff;
use super::{Files, State, Surroundings};
use crate::frame::SourceKind;
use crate::settle::Disposition;

/// Settled frames that are looked at in one go.
const BATCH: usize = 256;
/// Progress reports in the time after which a message is delivered again.
const REPORTS: u32 = 3;
/// The shortest time between two progress reports.
const REPORT_MIN: Duration = Duration::from_millis(50);
/// How long a message that came back while we run is kept from being delivered again.
const BACK_DELAY: Duration = Duration::from_secs(1);
/// How long a stop waits for the server to hear of what was settled; it is delivered again otherwise.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    let (inbox, mut news) = Inbox::new(&around, SourceKind::Nats);
    let mut source = Source {
        config,
        around,
        inbox,
        replies: HashMap::new(),
        asked: HashSet::new(),
        seen: 0,
        deadline: Duration::MAX,
        touched: Instant::now(),
        said_limit: false,
        stopped: None,
    };
    let mut backoff = Backoff::default();
    loop {
        match source.session(&mut news, &mut backoff).await {
            Ok(()) => return,
            Err(error) => source.hold(&format!("{error:#}")),
        }
        source.pause(backoff.failed(), &mut news).await;
        if source.given_up() {
            return;
        }
    }
}

/// Connects, takes and makes nothing, and says what there is, or what stands in the way.
pub(super) async fn reach(config: &Config, files: &Files<'_>) -> anyhow::Result<String> {
    let is_there = Link::connect(config, files).await?.has_consumer(config).await?;
    let consumer = if is_there { "is there" } else { "will be made" };
    Ok(format!("it lets us in, its stream is there, consumer {} {consumer}", config.consumer))
}

struct Source {
    config: Config,
    around: Surroundings,
    /// By the stream's sequence.
    inbox: Inbox<u64>,
    /// Where to say what became of each message in hand: that of its last delivery.
    replies: HashMap<u64, Subject>,
    /// Messages of which the server has been told, and has not confirmed it.
    asked: HashSet<u64>,
    /// The greatest sequence that was ever delivered to us.
    seen: u64,
    /// After so long without a report a message is delivered again.
    deadline: Duration,
    /// When the server last heard of what is in hand.
    touched: Instant,
    /// Somebody was told that the consumer gives messages up.
    said_limit: bool,
    /// Everything that had to be given back has been.
    stopped: Option<Instant>,
}

/// Confirmations that are awaited.
type Confirmations = FuturesUnordered<BoxFuture<'static, (u64, anyhow::Result<()>)>>;

impl Source {
    /// One connection, from its beginning to its end. `Ok`: we were stopped, and everything is settled.
    async fn session(&mut self, news: &mut News<u64>, backoff: &mut Backoff) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let files = self.around.files.clone();
        self.asked.clear();
        let connecting = async {
            let mut link = Link::connect(&self.config, &*files).await?;
            let facts = link.consumer(&self.config, self.first_wanted()).await?;
            anyhow::Ok((link, facts))
        };
        let (link, facts) = tokio::select! {
            connected = connecting => connected?,
            () = stop.cancelled(), if self.inbox.len() == 0 => return Ok(()),
        };
        self.deadline = facts.deadline;
        if let Some(deliveries) = facts.gives_up_after.filter(|_| !self.said_limit) {
            self.said_limit = true;
            tracing::warn!(
                detector = %self.around.entry.name, consumer = %self.config.consumer, deliveries,
                "this consumer gives a message up after so many deliveries, and a frame may be lost: set its max_deliver to -1"
            );
        }
        self.report(&link).await?;
        backoff.reset();
        self.is_well();
        self.serve(link, news).await
    }

    /// Where a consumer that must be made anew begins: at the first message that is not settled.
    fn first_wanted(&self) -> Option<u64> {
        let in_hand = self.inbox.in_hand().map(|(sequence, _)| sequence).min();
        in_hand.or((self.seen > 0).then_some(self.seen + 1))
    }

    async fn serve(&mut self, mut link: Link, news: &mut News<u64>) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let mut report = interval((self.deadline / REPORTS).max(REPORT_MIN));
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut confirmations = Confirmations::new();
        let mut batch = Vec::new();
        loop {
            if stop.is_cancelled() {
                self.stop(&mut link).await?;
                if self.inbox.len() == 0 {
                    return link.flush().await;
                }
            } else if !link.pulling() {
                let (room, bytes) = (self.inbox.room(), self.inbox.room_bytes());
                if room > 0 {
                    link.pull(room, bytes).await?;
                }
            }
            self.tell(&link, &mut confirmations);
            // Before the select: it borrows the link.
            let stalled = link.stalls_at();
            tokio::select! {
                biased;
                _ = news.recv_many(&mut batch, BATCH) => self.hear(&link, &mut batch).await?,
                Some((sequence, confirmed)) = confirmations.next() => {
                    confirmed?;
                    self.forget(sequence);
                }
                _ = report.tick() => self.report(&link).await?,
                () = stop.cancelled(), if self.stopped.is_none() => {}
                came = link.next() => match came? {
                    Came::Message(message) => self.accept(message),
                    Came::Nothing => {}
                },
                () = sleep_until(stalled.unwrap_or_else(Instant::now)), if stalled.is_some() => {
                    bail!("the server has fallen silent in the middle of a pull");
                }
            }
        }
    }

    /// Notes what became of frames.
    async fn hear(&mut self, link: &Link, batch: &mut Vec<(u64, Disposition)>) -> anyhow::Result<()> {
        let delay = if self.stopped.is_some() { Duration::ZERO } else { BACK_DELAY };
        for (sequence, disposition) in batch.drain(..) {
            match self.inbox.settled(sequence, disposition) {
                Some(Verdict::Done | Verdict::Dead) | None => {}
                Some(Verdict::Back) => {
                    let reply = self.replies.get(&sequence).cloned();
                    self.forget(sequence);
                    if let Some(reply) = reply {
                        link.say(reply, Reply::Back(delay)).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells the server of what is settled, and awaits that it confirms.
    fn tell(&mut self, link: &Link, confirmations: &mut Confirmations) {
        if self.asked.len() == self.inbox.unconfirmed_len() {
            return;
        }
        for (sequence, verdict) in self.inbox.unconfirmed() {
            let reply = match verdict {
                Verdict::Done => Reply::Done,
                Verdict::Dead => Reply::Dead,
                Verdict::Back => continue,
            };
            let Some(subject) = self.replies.get(&sequence) else { continue };
            if self.asked.insert(sequence) {
                let confirmation = link.say_and_confirm(subject.clone(), reply);
                confirmations.push(Box::pin(async move { (sequence, confirmation.await) }));
            }
        }
    }

    fn forget(&mut self, sequence: u64) {
        self.inbox.confirmed(sequence);
        self.replies.remove(&sequence);
        self.asked.remove(&sequence);
    }

    /// Moves the deadline of everything in hand. After a silence of ours, what stands in line may be with others already
    /// and is left to them.
    async fn report(&mut self, link: &Link) -> anyhow::Result<()> {
        self.inbox.excuse_silence();
        if self.touched.elapsed() > self.deadline {
            for sequence in self.inbox.give_back(|_| false) {
                self.replies.remove(&sequence);
            }
        }
        for (sequence, _) in self.inbox.in_hand() {
            if let Some(reply) = self.replies.get(&sequence) {
                link.say(reply.clone(), Reply::Progress).await?;
            }
        }
        self.touched = Instant::now();
        Ok(())
    }

    fn accept(&mut self, wire: Wire) {
        let Some(reply) = wire.reply.clone() else { return };
        let Some(place) = link::place(&reply) else { return };
        self.seen = self.seen.max(place.sequence);
        // A delivery again of what is in hand: the server wants to hear of the last one.
        self.replies.insert(place.sequence, reply);
        self.asked.remove(&place.sequence);
        self.inbox.accept(message(wire, place));
    }

    /// Gives back what stands in line; what a worker has is waited for.
    async fn stop(&mut self, link: &mut Link) -> anyhow::Result<()> {
        if self.stopped.is_some() {
            return Ok(());
        }
        self.stopped = Some(Instant::now());
        let mut back: Vec<Subject> =
            self.inbox.give_back(|_| false).into_iter().filter_map(|it| self.replies.remove(&it)).collect();
        back.extend(link.close().await);
        for reply in back {
            link.say(reply, Reply::Back(Duration::ZERO)).await?;
        }
        link.flush().await
    }

    /// Stopped, and the server does not come back to hear of the rest.
    fn given_up(&mut self) -> bool {
        if !self.around.stop.is_cancelled() {
            return false;
        }
        if self.stopped.is_none() {
            self.inbox.give_back(|_| false);
            self.stopped = Some(Instant::now());
        }
        let settled = self.inbox.in_hand().next().is_none();
        settled && (self.inbox.len() == 0 || self.stopped.is_some_and(|at| at.elapsed() > FAREWELL))
    }

    /// Waits before the next connection, and goes on noting what becomes of frames.
    async fn pause(&mut self, wait: Duration, news: &mut News<u64>) {
        let until = tokio::time::sleep(wait);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return,
                Some((sequence, disposition)) = news.recv() => {
                    // Nobody can be told: it is delivered again after its deadline.
                    if self.inbox.settled(sequence, disposition) == Some(Verdict::Back) {
                        self.forget(sequence);
                    }
                }
            }
        }
    }

    fn is_well(&mut self) {
        // First: who sees it ready sees it up.
        self.inbox.up(true);
        if self.around.health.set(State::Ok) {
            tracing::info!(detector = %self.around.entry.name, place = %self.config.place(), consumer = %self.config.consumer, "pulling from the stream");
        }
    }

    fn hold(&mut self, why: &str) {
        let why = format!("{}: {why}", self.config.place());
        self.inbox.up(false);
        if self.around.health.set(State::Held(why.clone())) {
            tracing::warn!(detector = %self.around.entry.name, "held: {why}");
        }
    }
}

/// The payload and the headers beside it.
fn message(wire: Wire, place: link::Place) -> Message<u64> {
    let header = |name: &str| Some(wire.headers.as_ref()?.get(name)?.as_str().to_owned());
    let beside = ["Detector-Name", "Detect-Time-Utc", "Iana-Time-Zone"].map(header);
    Message {
        key: place.sequence,
        name: format!("{} {}", wire.subject, place.sequence),
        levels: wire.subject.split('.').map(str::to_owned).collect(),
        payload: wire.payload.into(),
        beside,
        broker_time: place.published.unwrap_or_else(Timestamp::now),
        again: place.delivered > 1,
        condemned: None,
    }
}
