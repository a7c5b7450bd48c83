//! A Redis stream: entries read as one consumer of a group, acknowledged when their frames are settled.
//!
//! What was delivered and not acknowledged stays pending at the server. At start our own pending entries come first; while
//! entries are in hand a heartbeat keeps others from them; what a dead consumer left is taken over. Not here: what an entry
//! means for its frame (`inbox`).

mod config;
mod link;

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use redis::RedisResult;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

pub use self::config::Config;
use self::link::{EntryId, Link, PendingRow, StreamEntry, Touch, Whose};
use super::inbox::{Inbox, Message, News, Verdict, refusal};
use super::reconnect::Backoff;
use super::{Files, State, Surroundings};
use crate::frame::SourceKind;
use crate::settle::{Disposition, Reason};

/// Settled frames that are acknowledged with one command.
const BATCH: usize = 256;
/// Heartbeats in the time after which others take over.
const HEARTBEATS: u32 = 4;
/// An entry that was delivered so often without being settled is suspected of bringing us down, and comes alone.
const SUSPECT_DELIVERIES: u64 = 3;
/// A suspect that was delivered so often becomes a dead letter.
const DELIVERIES_MAX: u64 = 10;
/// How long a stop waits for the server to hear of what was settled; it is delivered again otherwise.
const FAREWELL: Duration = Duration::from_secs(5);

/// The consumers that this process serves.
static SERVED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// How often a consumer is looked for that is still served.
const SERVED_LOOK_EVERY: Duration = Duration::from_millis(50);

/// Serves one entry until it is stopped; returns when everything in hand is settled.
pub async fn run(config: Config, around: Surroundings) {
    // After a reload the old source may still have frames in hand, which are pending for the same consumer: they are not ours.
    let name = format!("{} {} {} {}", config.url, config.stream, config.group, config.consumer());
    let _turn = loop {
        if let Some(turn) = Turn::take(&name) {
            break turn;
        }
        tokio::select! {
            () = tokio::time::sleep(SERVED_LOOK_EVERY) => {}
            () = around.stop.cancelled() => return,
        }
    };
    let (inbox, mut news) = Inbox::new(&around, SourceKind::Redis);
    let mut source = Source::new(config, around, inbox);
    let mut backoff = Backoff::default();
    loop {
        match source.session(&mut news, &mut backoff).await {
            Ok(()) => return,
            Err(error) => source.hold(&link::explain(&error)),
        }
        source.pause(backoff.failed(), &mut news).await;
        if source.given_up() {
            return;
        }
    }
}

/// The right to serve a consumer in this process.
struct Turn(String);

impl Turn {
    fn take(name: &str) -> Option<Self> {
        served().insert(name.to_owned()).then(|| Self(name.to_owned()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        served().remove(&self.0);
    }
}

fn served() -> MutexGuard<'static, BTreeSet<String>> {
    SERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects, takes and makes nothing, and says what there is, or what stands in the way.
pub(super) async fn reach(config: &Config, files: &Files<'_>) -> anyhow::Result<String> {
    let looked = async {
        let mut link = Link::connect(config, config.consumer(), files).await?;
        anyhow::Ok(link.last_generated().await?)
    };
    match looked.await {
        Ok(Some(last)) => Ok(format!("it lets us in, the last entry of its stream is {last}")),
        Ok(None) => Ok("it lets us in, the stream will be made with its group".into()),
        Err(error) => Err(anyhow::anyhow!(link::explain(&error))),
    }
}

struct Source {
    config: Config,
    consumer: String,
    around: Surroundings,
    inbox: Inbox<EntryId>,
    /// The greatest id that was ever delivered to us.
    seen: Option<EntryId>,
    /// How far our own pending entries have been taken up; `None`: all of them.
    own: Option<Own>,
    /// The one entry in hand that is suspected of bringing us down.
    suspect: Option<EntryId>,
    /// When the server last heard of what is in hand.
    touched: Instant,
    /// Somebody was told that entries were trimmed.
    said_trimmed: bool,
    /// Everything that had to be given back has been.
    stopped: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Own {
    after: Option<EntryId>,
}

type Reading = Pin<Box<dyn Future<Output = RedisResult<Vec<StreamEntry>>> + Send>>;

impl Source {
    fn new(config: Config, around: Surroundings, inbox: Inbox<EntryId>) -> Self {
        Self {
            consumer: config.consumer(),
            config,
            around,
            inbox,
            seen: None,
            own: Some(Own { after: None }),
            suspect: None,
            touched: Instant::now(),
            said_trimmed: false,
            stopped: None,
        }
    }

    /// One connection, from its beginning to its end. `Ok`: we were stopped, and everything is settled.
    async fn session(&mut self, news: &mut News<EntryId>, backoff: &mut Backoff) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let files = self.around.files.clone();
        let connecting = Link::connect(&self.config, self.consumer.clone(), &*files);
        let mut link = tokio::select! {
            link = connecting => link?,
            () = stop.cancelled(), if self.inbox.len() == 0 => return Ok(()),
        };
        let behind = self.inbox.in_hand().map(|(id, _)| id).min().map(EntryId::before).or(self.seen);
        link.ensure_group(behind).await?;
        self.keep_what_is_ours(&mut link).await?;
        // What the last connection was sent and did not pass on is pending, too.
        self.own = Some(Own { after: None });
        backoff.reset();
        self.is_well();
        self.serve(&mut link, news).await
    }

    async fn serve(&mut self, link: &mut Link, news: &mut News<EntryId>) -> anyhow::Result<()> {
        let stop = self.around.stop.clone();
        let mut reading: Option<Reading> = None;
        let mut heartbeat = every(self.config.take_over_after / HEARTBEATS);
        let mut take_over = every(self.config.take_over_after / HEARTBEATS);
        let mut batch = Vec::new();
        loop {
            if self.inbox.unconfirmed_len() > 0 {
                self.tell(link).await?;
            }
            if stop.is_cancelled() {
                self.stop(link).await?;
                if self.inbox.len() == 0 {
                    return Ok(());
                }
                reading = None;
            } else {
                self.take_up_own(link).await?;
                let room = self.room();
                if reading.is_none() && self.own.is_none() && room > 0 {
                    reading = Some(Box::pin(link.read(room)));
                }
            }
            // News first: what is settled makes room.
            tokio::select! {
                biased;
                _ = news.recv_many(&mut batch, BATCH) => {
                    self.hear(&mut batch);
                }
                _ = heartbeat.tick() => self.beat(link).await?,
                () = stop.cancelled(), if self.stopped.is_none() => {}
                _ = take_over.tick(), if self.own.is_none() && self.stopped.is_none() => self.take_over(link).await?,
                read = async { reading.as_mut().expect("guarded").await }, if reading.is_some() => {
                    reading = None;
                    for entry in read? {
                        self.accept(entry, 1);
                    }
                }
            }
        }
    }

    fn room(&self) -> usize {
        if self.suspect.is_some() { 0 } else { self.inbox.room() }
    }

    /// Notes what became of frames.
    fn hear(&mut self, batch: &mut Vec<(EntryId, Disposition)>) {
        for (id, disposition) in batch.drain(..) {
            match self.inbox.settled(id, disposition) {
                Some(Verdict::Done | Verdict::Dead) | None => {}
                // It stays pending: whoever looks for idle entries next has it, perhaps we.
                Some(Verdict::Back) => self.forget(id),
            }
        }
    }

    /// Acknowledges what is settled.
    async fn tell(&mut self, link: &mut Link) -> RedisResult<()> {
        let ids: Vec<EntryId> = self.inbox.unconfirmed().into_iter().map(|(id, _)| id).collect();
        if !ids.is_empty() {
            link.acknowledge(&ids, self.config.delete).await?;
        }
        for id in ids {
            self.forget(id);
        }
        Ok(())
    }

    fn forget(&mut self, id: EntryId) {
        self.inbox.confirmed(id);
        if self.suspect == Some(id) {
            self.suspect = None;
        }
    }

    /// Keeps others from taking over what is in hand.
    async fn beat(&mut self, link: &mut Link) -> RedisResult<()> {
        self.inbox.excuse_silence();
        if self.touched.elapsed() > self.config.take_over_after / 2 {
            self.keep_what_is_ours(link).await?;
        }
        let touch = |(id, taken)| (id, if taken { Touch::Harmless } else { Touch::InHand });
        let touches: Vec<_> = self.inbox.in_hand().map(touch).collect();
        link.touch(&touches).await?;
        self.touched = Instant::now();
        if touches.iter().any(|(id, touch)| Some(*id) == self.suspect && *touch == Touch::Harmless) {
            self.suspect = None;
        }
        Ok(())
    }

    /// After a silence of ours: what others have taken over meanwhile and no worker here has begun is left to them.
    async fn keep_what_is_ours(&mut self, link: &mut Link) -> RedisResult<()> {
        if self.inbox.len() == 0 {
            return Ok(());
        }
        let mut owners = HashMap::new();
        let (mut after, last) =
            (self.inbox.in_hand().map(|it| it.0.before()).min(), self.inbox.in_hand().map(|it| it.0).max());
        loop {
            let rows = link.pending(Whose::All, after, usize::MAX).await?;
            after = rows.last().map(|row| row.id);
            owners.extend(rows.into_iter().map(|row| (row.id, row.consumer)));
            if after.is_none() || after >= last {
                break;
            }
        }
        let theirs = |id| owners.get(&id).is_some_and(|owner| *owner != self.consumer);
        let gone = self.inbox.give_back(|id| !theirs(id));
        if gone.contains(&self.suspect.unwrap_or_default()) {
            self.suspect = None;
        }
        Ok(())
    }

    /// Takes up what was pending for us when we started, as there is room.
    async fn take_up_own(&mut self, link: &mut Link) -> RedisResult<()> {
        while let Some(Own { after }) = self.own {
            let room = self.room();
            if room == 0 {
                return Ok(());
            }
            let rows = link.pending(Whose::Ours, after, room).await?;
            if rows.is_empty() {
                self.own = None;
                return Ok(());
            }
            match self.reclaim(link, rows, Duration::ZERO).await? {
                Some(after) => self.own = Some(Own { after: Some(after) }),
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Takes over what nobody has touched for long: its consumer is dead.
    async fn take_over(&mut self, link: &mut Link) -> RedisResult<()> {
        let idle = self.config.take_over_after;
        let mut after = None;
        loop {
            let room = self.room();
            if room == 0 {
                return Ok(());
            }
            let rows = link.pending(Whose::Idle(idle), after, room).await?;
            if rows.is_empty() {
                return Ok(());
            }
            after = self.reclaim(link, rows, idle).await?;
            if after.is_none() {
                return Ok(());
            }
        }
    }

    /// Makes pending entries ours and puts them in line. Suspects come one at a time with nothing else in hand. Gives how
    /// far it went; `None`: no further for now.
    async fn reclaim(
        &mut self,
        link: &mut Link,
        rows: Vec<PendingRow>,
        idle: Duration,
    ) -> RedisResult<Option<EntryId>> {
        let mut rows: Vec<PendingRow> = {
            let calm = rows.iter().take_while(|row| row.deliveries < SUSPECT_DELIVERIES).count();
            if calm == 0 && self.inbox.len() > 0 {
                return Ok(None);
            }
            rows.into_iter().take(calm.max(1)).collect()
        };
        let last = rows.last().map(|row| row.id);
        rows.retain(|row| !self.inbox.holds(row.id));
        let ids: Vec<EntryId> = rows.iter().map(|row| row.id).collect();
        if ids.is_empty() {
            return Ok(last);
        }
        let deliveries: HashMap<EntryId, u64> = rows.iter().map(|row| (row.id, row.deliveries)).collect();
        let found = link.claim(&ids, idle).await?;
        let missing: Vec<EntryId> = ids.into_iter().filter(|id| found.iter().all(|entry| entry.id != *id)).collect();
        for entry in found {
            let before = deliveries.get(&entry.id).copied().unwrap_or(0);
            if before >= SUSPECT_DELIVERIES {
                self.suspect = Some(entry.id);
            }
            self.accept(entry, before + 1);
        }
        self.lost(link, &missing).await?;
        Ok(last)
    }

    /// Entries that are pending and that the stream has not any more.
    async fn lost(&mut self, link: &mut Link, ids: &[EntryId]) -> RedisResult<()> {
        let trimmed = link.trimmed(ids).await?;
        if trimmed.is_empty() {
            return Ok(());
        }
        link.acknowledge(&trimmed, false).await?;
        self.inbox.lost_upstream(trimmed.len() as u64);
        if !self.said_trimmed {
            self.said_trimmed = true;
            tracing::error!(
                detector = %self.around.entry.name, stream = %self.config.stream, entries = trimmed.len(),
                "entries were trimmed from the stream before they were published, and are lost: let its producers keep more (MAXLEN)"
            );
        }
        Ok(())
    }

    fn accept(&mut self, entry: StreamEntry, deliveries: u64) {
        self.seen = self.seen.max(Some(entry.id));
        self.inbox.accept(message(entry, deliveries));
    }

    /// Gives back what stands in line; what a worker has is waited for.
    async fn stop(&mut self, link: &mut Link) -> RedisResult<()> {
        if self.stopped.is_some() {
            return Ok(());
        }
        let gone = self.inbox.give_back(|_| false);
        self.stopped = Some(Instant::now());
        let touch = Touch::GivenBack(self.config.take_over_after);
        link.touch(&gone.into_iter().map(|id| (id, touch)).collect::<Vec<_>>()).await
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
    async fn pause(&mut self, wait: Duration, news: &mut News<EntryId>) {
        let until = tokio::time::sleep(wait);
        tokio::pin!(until);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                () = &mut until => return,
                _ = news.recv_many(&mut batch, BATCH) => self.hear(&mut batch),
            }
        }
    }

    fn is_well(&mut self) {
        // First: who sees it ready sees it up.
        self.inbox.up(true);
        if self.around.health.set(State::Ok) {
            tracing::info!(detector = %self.around.entry.name, place = %self.config.place(), consumer = %self.consumer, "reading the stream");
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

/// The image and what stands beside it: the fields of that name, or one field with the engine's JSON.
fn message(entry: StreamEntry, deliveries: u64) -> Message<EntryId> {
    let StreamEntry { id, mut fields } = entry;
    let mut field = |name: &str| {
        let at = fields.iter().position(|(it, _)| it == name.as_bytes())?;
        Some(fields.swap_remove(at).1)
    };
    let image = field("image");
    let beside = ["detectorName", "detectTimeUtc", "ianaTimeZone"]
        .map(|name| field(name).map(|value| String::from_utf8_lossy(&value).into_owned()));
    let mut condemned = (deliveries > DELIVERIES_MAX).then(|| {
        let why = format!("delivered {deliveries} times and never settled: framegate ended each time");
        refusal(Reason::InternalError, why)
    });
    let payload = image.unwrap_or_else(|| {
        let json = fields.len() == 1 && fields[0].1.trim_ascii_start().starts_with(b"{");
        if !json {
            let why = "no field `image`, and not one field with the engine's JSON".to_owned();
            condemned = Some(refusal(Reason::Unsupported, why));
        }
        // The largest one is most likely what somebody wants to look at.
        fields.into_iter().map(|(_, value)| value).max_by_key(Vec::len).unwrap_or_default()
    });
    let broker_time = i64::try_from(id.millis).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    Message {
        key: id,
        name: id.to_string(),
        payload,
        beside,
        levels: Vec::new(),
        broker_time: broker_time.unwrap_or_else(Timestamp::now),
        again: deliveries > 1,
        condemned,
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = interval(period.max(Duration::from_millis(1)));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fields: &[(&str, &str)]) -> StreamEntry {
        let fields = fields.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
        StreamEntry { id: EntryId { millis: 1_700_000_000_123, sequence: 4 }, fields }
    }

    #[test]
    fn an_entry_is_an_image_with_fields_or_one_field_of_json() {
        let found = message(entry(&[("detectorName", "A"), ("image", "x"), ("ianaTimeZone", "UTC")]), 1);
        assert_eq!((found.payload.as_slice(), found.condemned.is_none()), (b"x".as_slice(), true));
        assert_eq!(found.beside, [Some("A".to_owned()), None, Some("UTC".to_owned())]);
        assert_eq!(found.broker_time.as_millisecond(), 1_700_000_000_123);
        assert_eq!((found.name.as_str(), found.again), ("1700000000123-4", false));
        let found = message(entry(&[("body", " {}")]), 2);
        assert_eq!((found.payload.as_slice(), found.condemned.is_none(), found.again), (b" {}".as_slice(), true, true));
    }

    #[test]
    fn what_is_neither_and_what_came_too_often_is_condemned() {
        for fields in [&[][..], &[("a", "{}"), ("b", "longer")], &[("a", "x")]] {
            let found = message(entry(fields), 1);
            assert_eq!(found.condemned.map(|it| it.reason), Some(Reason::Unsupported), "{fields:?}");
        }
        let found = message(entry(&[("image", "x")]), DELIVERIES_MAX + 1);
        assert_eq!(found.condemned.map(|it| it.reason), Some(Reason::InternalError));
        assert_eq!(message(entry(&[("image", "x")]), DELIVERIES_MAX).condemned, None);
    }
}
