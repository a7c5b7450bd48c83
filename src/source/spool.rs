//! The spool: a durable queue on disk for frames whose sender is told "we have it" before they are published. One for each
//! daemon, shared by all sources of that kind.
//!
//! `Spool::put` takes one frame and resolves when it is durable; frames that come while the disk syncs are synced
//! together. [`run`] is the clockwork: it keeps groups, carries out dispositions and looks after the disk. What blocks is in
//! `store`; who is next, and what is held at all, is in `index`.
//!
//! Not here: the senders and what they are answered (`push`, `mqtt`).

mod image;
mod index;
mod record;
mod store;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytesize::ByteSize;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

pub(super) use self::image::{Flaw, Image};
use self::index::{Index, News};
use self::record::Meta;
use self::store::{Spot, Store};
use super::{Config as SourceConfig, Entry};
use crate::frame::{FrameId, SourceKind};
use crate::metrics::Metrics;
use crate::queue::Intake;
use crate::settle::{Disposition, Refusal};

/// Frames that wait for a sync; who puts more is refused. Their bytes are bounded by whoever received them.
const PUTS_MAX: usize = 4096;
/// Frames, and bytes, that are synced together.
const GROUP_MAX: usize = 256;
const GROUP_BYTES_MAX: u64 = 8 << 20;
/// Dispositions carried out in one go.
const SETTLE_MAX: usize = 1024;
/// Frames held. Each takes about 200 bytes of memory.
const FRAMES_MAX: usize = 500_000;
/// What a source calls a frame is kept up to so many characters: with detector, entry and zone it stays far below what a
/// record's head may be.
const NAME_CHARS_MAX: usize = 1000;
/// And a detector's name, which no source makes that long.
const DETECTOR_CHARS_MAX: usize = 512;
/// What is wrong with a frame is kept up to so many characters.
const FLAW_CHARS_MAX: usize = 500;
/// Between two looks at the disk while it is in trouble, and at frames that were given back.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Bytes written and synced to find out whether the disk works again.
const PROBE_BYTES: usize = 64 << 10;

/// `[spool]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where pushed and MQTT frames are kept until they are published. Changes with a restart only.
    pub directory: PathBuf,
    /// All of it on disk. When it is full, new frames are refused, and their senders keep them.
    #[schemars(with = "String")]
    pub max_size: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self { directory: "/var/lib/framegate/spool".into(), max_size: ByteSize::gib(2) }
    }
}

/// A frame that has come, with all that is known about it.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    /// The frame's: a new one, or the same each time where its source knows that it may come again.
    pub id: FrameId,
    /// The name of its entry as it is written: rate, weight, order and `max_age` are looked up by it when it is offered.
    pub entry: Arc<str>,
    /// Where it came from.
    pub source: SourceKind,
    /// The engine's `detectorName`.
    pub detector: String,
    /// The engine's `ianaTimeZone`.
    pub time_zone: String,
    /// The engine's `detectTimeUtc`.
    pub detect_time: Timestamp,
    /// When it came.
    pub received_at: Timestamp,
    /// What its source calls it.
    pub name: String,
    /// The image.
    pub image: Image,
    /// Why it can be no frame: it becomes a dead letter.
    pub flaw: Option<Refusal>,
}

/// Why a frame is not kept: nobody may be told that we have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The bound is reached.
    Full,
    /// More frames come than the disk takes.
    Busy,
    /// The disk does not work.
    Broken(String),
    /// The daemon stops.
    Stopping,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Full => f.write_str("the spool is full"),
            Refused::Busy => f.write_str("more frames come than the disk takes"),
            Refused::Broken(why) => write!(f, "the spool cannot be written: {why}"),
            Refused::Stopping => f.write_str("the daemon is stopping"),
        }
    }
}

/// Which frames an operator means: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// Of exactly this detector.
    pub detector: Option<String>,
    /// Received before.
    pub before: Option<Timestamp>,
    /// Received after.
    pub after: Option<Timestamp>,
}

impl Which {
    fn fits(&self, detector: &str, received_at: Timestamp) -> bool {
        self.detector.as_ref().is_none_or(|it| it == detector)
            && self.before.is_none_or(|it| received_at < it)
            && self.after.is_none_or(|it| received_at > it)
    }
}

/// One frame in the spool, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// The frame's.
    pub id: String,
    /// When it came.
    pub received_at: Timestamp,
    /// When the face was detected.
    pub detect_time_utc: Timestamp,
    /// The engine's `detectorName`.
    pub detector: String,
    /// The engine's `ianaTimeZone`.
    pub time_zone: String,
    /// The kind of source.
    pub source: String,
    /// What its source calls it.
    pub original_name: String,
    /// Size of the image.
    pub image_bytes: u64,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

/// What a purge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged {
    /// Frames that are gone for good.
    pub removed: u64,
    /// Frames that fit and are being published right now: left alone.
    pub in_hand: u64,
}

/// What is in the spool in `directory`, the oldest first; with or without a daemon running.
pub fn list(directory: &Path, which: &Which) -> io::Result<Vec<Listed>> {
    let mut all = store::list(directory)?;
    all.retain(|(meta, _)| which.fits(&meta.detector, meta.received_at));
    let listed = |(meta, bytes): (Meta, u64)| Listed {
        id: meta.id,
        received_at: meta.received_at,
        detect_time_utc: meta.detect_time,
        detector: meta.detector,
        time_zone: meta.time_zone,
        source: meta.source,
        original_name: meta.name,
        image_bytes: meta.image_bytes,
        bytes,
    };
    Ok(all.into_iter().map(listed).collect())
}

/// Empties a spool that no daemon has open.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`]: one has. Ask it.
pub fn purge(config: &Config, which: &Which) -> io::Result<Purged> {
    if !config.directory.exists() {
        return Ok(Purged::default());
    }
    let (mut store, found) = Store::open(&config.directory, config.max_size.as_u64())?;
    let meant = found.into_iter().filter(|(meta, _)| which.fits(&meta.detector, meta.received_at));
    let meant: Vec<Spot> = meant.map(|(_, spot)| spot).collect();
    store.settle(&meant)?;
    Ok(Purged { removed: meant.len() as u64, in_hand: 0 })
}

/// Whether frames of an earlier life wait there, which want to be published whatever the configuration says now.
pub fn holds_frames(directory: &Path) -> bool {
    !store::is_empty(directory)
}

/// The spool of one daemon.
pub struct Spool {
    directory: PathBuf,
    max_bytes: Mutex<u64>,
    index: Mutex<Index>,
    /// Locked only where blocking is allowed. `None`: not opened yet.
    store: Mutex<Option<Store>>,
    metrics: Arc<Metrics>,
    puts: mpsc::Sender<Put>,
    news: mpsc::UnboundedSender<News>,
    trouble: Mutex<Option<String>>,
    /// Bytes of the frame that had no room last, until there is room for it.
    no_room_for: AtomicU64,
    /// Cancelled once the directory was tried for the first time.
    tried: CancellationToken,
    /// Told when it takes frames again.
    takes: Notify,
}

/// What comes in for [`run`].
#[derive(Debug)]
pub struct Inbox {
    puts: mpsc::Receiver<Put>,
    news: mpsc::UnboundedReceiver<News>,
}

#[derive(Debug)]
struct Put {
    arrival: Arrival,
    done: oneshot::Sender<Result<(), Refused>>,
}

impl Spool {
    /// A spool that opens its directory once it is [`run`].
    pub fn new(config: &Config, intake: Intake, metrics: Arc<Metrics>) -> (Arc<Self>, Inbox) {
        let (puts, put) = mpsc::channel(PUTS_MAX);
        // Never more than a message for each frame held, and the requests of operators.
        let (tell, news) = mpsc::unbounded_channel();
        let spool = Arc::new_cyclic(|this| Self {
            directory: config.directory.clone(),
            max_bytes: Mutex::new(config.max_size.as_u64()),
            index: Mutex::new(Index::new(this.clone(), intake, metrics.clone(), tell.clone())),
            store: Mutex::default(),
            metrics,
            puts,
            news: tell,
            trouble: Mutex::new(Some("the spool is being opened".into())),
            no_room_for: AtomicU64::new(0),
            tried: CancellationToken::new(),
            takes: Notify::new(),
        });
        spool.reconfigure(config, &[]);
        (spool, Inbox { puts: put, news })
    }

    /// New bounds and entries, from a reload.
    pub fn reconfigure(&self, config: &Config, entries: &[Arc<Entry>]) {
        *lock(&self.max_bytes) = config.max_size.as_u64();
        self.metrics.gauge("spool_max_bytes", &[]).set(config.max_size.as_u64() as f64);
        lock(&self.index).reconfigure(entries);
    }

    /// Puts a frame. Resolves when it is durable; only then may its sender be told. Frames are kept in the order of the
    /// calls, whenever their futures are polled. Dropping the future does not take the frame back.
    pub(super) fn put(&self, arrival: Arrival) -> impl Future<Output = Result<(), Refused>> + Send + use<> {
        let (done, kept) = oneshot::channel();
        let sent = match self.trouble() {
            Some(why) => Err(Refused::Broken(why)),
            None => self.puts.try_send(Put { arrival, done }).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Refused::Busy,
                mpsc::error::TrySendError::Closed(_) => Refused::Stopping,
            }),
        };
        async move {
            sent?;
            kept.await.unwrap_or(Err(Refused::Stopping))
        }
    }

    /// Why it takes no frames now; it recovers by itself.
    pub fn held(&self) -> Option<String> {
        let full = || {
            let (frames, _) = self.totals();
            let max = ByteSize(self.max_bytes()).display().iec();
            let waits = self.no_room_for.load(Ordering::Relaxed) > 0;
            waits.then(|| format!("the spool is full: {frames} frames, up to {max} of spool.max_size"))
        };
        self.trouble().or_else(full)
    }

    /// Resolves once the directory was opened, or could not be: before, everything would be refused that comes.
    pub(super) async fn tried(&self) {
        self.tried.cancelled().await;
    }

    /// Resolves while it takes frames: for those whose senders wait until it does.
    pub(super) async fn takes_frames(&self) {
        loop {
            let mut takes = std::pin::pin!(self.takes.notified());
            // Before the look: what changes after it is heard.
            takes.as_mut().enable();
            if self.held().is_none() {
                return;
            }
            takes.await;
        }
    }

    fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Frames held, and bytes on disk.
    pub fn totals(&self) -> (u64, u64) {
        let index = lock(&self.index);
        (index.len() as u64, index.bytes)
    }

    /// `spool.max_size`, as it is now.
    pub fn max_bytes(&self) -> u64 {
        *lock(&self.max_bytes)
    }

    /// Removes frames for good; each is counted as dropped.
    pub async fn purge(&self, which: Which) -> Result<Purged, String> {
        let (reply, purged) = oneshot::channel();
        let sent = self.news.send(News::Purge(which, reply));
        sent.map_err(|_| "the spool is closed".to_owned())?;
        purged.await.map_err(|_| "the spool is closed".to_owned())
    }

    /// Keeps what has come, in groups.
    async fn keep(self: &Arc<Self>, puts: &mut Vec<Put>) {
        let mut puts = puts.drain(..).peekable();
        while puts.peek().is_some() {
            let (mut group, mut bytes) = (Vec::new(), 0);
            while let Some(put) =
                puts.next_if(|put| bytes == 0 || bytes + put.arrival.image.bytes.len() as u64 <= GROUP_BYTES_MAX)
            {
                bytes += put.arrival.image.bytes.len() as u64;
                group.push(put);
            }
            self.keep_group(group).await;
        }
    }

    async fn keep_group(self: &Arc<Self>, group: Vec<Put>) {
        let at = self.clone();
        let kept = self.blocking(move |store| at.keep_together(store, group)).await;
        if let Err(error) = kept {
            self.in_trouble(&format!("{}: {error}", self.directory.display()));
        }
    }

    /// Blocks. An error is the disk's; everybody in the group has been answered.
    fn keep_together(&self, store: &mut Store, group: Vec<Put>) -> io::Result<()> {
        let mut room = FRAMES_MAX.saturating_sub(lock(&self.index).len());
        let (mut bytes, mut fit, mut records) = (0, Vec::new(), Vec::new());
        for put in group {
            let meta = serde_json::to_vec(&put.meta()).map_err(io::Error::other)?;
            let record = record::HEAD_BYTES + meta.len() + put.arrival.image.bytes.len();
            if room == 0 || !store.has_room(bytes + record as u64) {
                if self.no_room_for.swap(record as u64, Ordering::Relaxed) == 0 {
                    tracing::warn!(
                        directory = %self.directory.display(), bytes = store.bytes(),
                        "the spool is full: new frames are refused until the engine has taken some"
                    );
                }
                // Whoever waits for it may be gone; nothing is kept either way.
                drop(put.done.send(Err(Refused::Full)));
                continue;
            }
            room -= 1;
            bytes += record as u64;
            records.push((meta, put.arrival.image.bytes.clone()));
            fit.push(put);
        }
        if fit.is_empty() {
            return Ok(());
        }
        let spots = match store.put(&records) {
            Ok(spots) => spots,
            Err(error) => {
                for put in fit {
                    drop(put.done.send(Err(Refused::Broken(error.to_string()))));
                }
                return Err(error);
            }
        };
        self.metrics.counter("spool_syncs_total", &[]).increment(1);
        {
            let mut index = lock(&self.index);
            for (put, spot) in fit.iter().zip(spots) {
                index.add(&put.meta(), spot, true);
            }
            index.bytes = store.bytes();
            index.show();
        }
        // Counted and in line before anybody is told.
        for put in fit {
            drop(put.done.send(Ok(())));
        }
        Ok(())
    }

    /// Carries out what became of frames.
    async fn settle(self: &Arc<Self>, news: Vec<News>) {
        let (mut spots, mut replies) = (Vec::new(), Vec::new());
        {
            let mut index = lock(&self.index);
            for one in news {
                match one {
                    News::Settled(number, disposition) => spots.extend(index.settled(number, disposition)),
                    News::Purge(which, reply) => {
                        let (gone, purged) = index.purge(&which);
                        spots.extend(gone);
                        replies.push((reply, purged));
                    }
                }
            }
        }
        let at = self.clone();
        let done = self.blocking(move |store| {
            let done = store.settle(&spots);
            let done = at.renew(store).and(done);
            let needed = at.no_room_for.load(Ordering::Relaxed);
            if needed > 0 && store.has_room(needed) && lock(&at.index).len() < FRAMES_MAX {
                at.no_room_for.store(0, Ordering::Relaxed);
                tracing::info!("the spool has room again");
                at.takes.notify_waiters();
            }
            let mut index = lock(&at.index);
            index.bytes = store.bytes();
            index.show();
            done
        });
        if let Err(error) = done.await {
            self.metrics.counter("settle_errors_total", &[("operation", "spool")]).increment(1);
            tracing::warn!(
                %error, directory = %self.directory.display(),
                "settled frames cannot be removed from the spool; trying again"
            );
        }
        for (reply, purged) in replies {
            // Whoever asked may be gone.
            reply.send(purged).unwrap_or_default();
        }
    }

    /// Copies what little is left of worn segments, so that their space is free again. Blocks.
    fn renew(&self, store: &mut Store) -> io::Result<()> {
        let Some(segment) = store.worn() else { return Ok(()) };
        let held = lock(&self.index).in_segment(segment);
        if held.is_empty() {
            return Ok(());
        }
        let spots: Vec<Spot> = held.iter().map(|(_, spot)| spot.clone()).collect();
        let renewed = store.renew(&spots)?;
        lock(&self.index).moved(held.into_iter().map(|(number, _)| number).zip(renewed));
        Ok(())
    }

    /// What is done now and then: frames that were given back go in line again, and a disk in trouble is tried.
    async fn look(self: &Arc<Self>) {
        let at = self.clone();
        let max = self.max_bytes();
        let looked = tokio::task::spawn_blocking(move || at.look_at_disk(max)).await;
        match looked.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => self.out_of_trouble(),
            Err(error) => self.in_trouble(&format!("{}: {error}", self.directory.display())),
        }
        self.tried.cancel();
        lock(&self.index).offer_released();
        if self.trouble().is_none() {
            // What could not be written or removed.
            self.settle(Vec::new()).await;
        }
    }

    fn look_at_disk(&self, max: u64) -> io::Result<()> {
        let mut store = lock(&self.store);
        let Some(store) = store.as_mut() else {
            let (opened, found) = Store::open(&self.directory, max)?;
            let mut index = lock(&self.index);
            if !found.is_empty() {
                tracing::info!(frames = found.len(), directory = %self.directory.display(), "frames of an earlier life are in the spool");
            }
            for (meta, spot) in found {
                index.add(&meta, spot, false);
            }
            index.bytes = opened.bytes();
            index.show();
            *store = Some(opened);
            return Ok(());
        };
        store.set_max(max);
        if self.trouble().is_none() {
            return Ok(());
        }
        let path = self.directory.join("probe");
        let probe = std::fs::File::create(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, &vec![0; PROBE_BYTES]).and_then(|()| file.sync_all()));
        drop(std::fs::remove_file(path));
        probe
    }

    fn in_trouble(&self, why: &str) {
        let news = lock(&self.trouble).replace(why.to_owned()).is_none_or(|before| before != why);
        if news {
            tracing::warn!("the spool takes no frames until its disk works again: {why}");
        }
    }

    fn out_of_trouble(&self) {
        if lock(&self.trouble).take().is_some() {
            tracing::info!(directory = %self.directory.display(), "the spool takes frames");
            self.takes.notify_waiters();
        }
    }

    /// Runs something with the open store where it may block.
    async fn blocking(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Store) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let at = self.clone();
        let run = move || match lock(&at.store).as_mut() {
            Some(store) => work(store),
            None => Err(io::Error::other("not open")),
        };
        tokio::task::spawn_blocking(run).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

/// Keeps, offers and settles until stopped; then until everything in hand is settled. What is left is there for the next life.
pub async fn run(spool: Arc<Spool>, mut inbox: Inbox, stop: CancellationToken) {
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut puts = Vec::with_capacity(GROUP_MAX);
    let mut news = Vec::with_capacity(SETTLE_MAX);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = tick.tick() => spool.look().await,
            _ = inbox.puts.recv_many(&mut puts, GROUP_MAX) => spool.keep(&mut puts).await,
            _ = inbox.news.recv_many(&mut news, SETTLE_MAX) => spool.settle(std::mem::take(&mut news)).await,
        }
    }
    // Their senders wait for an answer.
    inbox.puts.close();
    while inbox.puts.recv_many(&mut puts, GROUP_MAX).await > 0 {
        spool.keep(&mut puts).await;
    }
    lock(&spool.index).stop();
    while lock(&spool.index).has_taken() {
        if inbox.news.recv_many(&mut news, SETTLE_MAX).await == 0 {
            break;
        }
        spool.settle(std::mem::take(&mut news)).await;
    }
    let last = spool.clone();
    // Closing may block for a moment, too.
    drop(tokio::task::spawn_blocking(move || drop(lock(&last.store).take())).await);
}

impl Put {
    fn meta(&self) -> Meta {
        let it = &self.arrival;
        Meta {
            id: it.id.to_string(),
            detector: it.detector.chars().take(DETECTOR_CHARS_MAX).collect(),
            time_zone: it.time_zone.clone(),
            detect_time: it.detect_time,
            received_at: it.received_at,
            source: it.source.as_str().into(),
            entry: it.entry.to_string(),
            name: it.name.chars().take(NAME_CHARS_MAX).collect(),
            base64: it.image.base64,
            image_bytes: it.image.size,
            flaw: it.flaw.as_ref().map(|it| record::Flaw {
                reason: it.reason,
                message: it.message.chars().take(FLAW_CHARS_MAX).collect(),
            }),
        }
    }
}

/// Whether an entry's frames go through the spool.
pub fn serves(entry: &Entry) -> bool {
    kind_of(entry).is_some()
}

fn kind_of(entry: &Entry) -> Option<SourceKind> {
    match &entry.source {
        SourceConfig::Push(_) => Some(SourceKind::Push),
        SourceConfig::Mqtt(_) => Some(SourceKind::Mqtt),
        SourceConfig::Directory(_) | SourceConfig::Redis(_) | SourceConfig::Nats(_) => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Spool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spool({})", self.directory.display())
    }
}

#[cfg(test)]
mod tests;
