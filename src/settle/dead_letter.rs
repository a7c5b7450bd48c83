//! Dead letters: the frames that could not be published, each with its reason, durably in one directory.
//!
//! A dead letter is a pair `<id>.image` and `<id>.json`. The JSON is written last and removed first: it is what makes the
//! dead letter exist. In the sub-directory `retry` are those on their way back to being published (see `source::retry`).
//! [`Store`] is the files, also used by the commands without a daemon; [`DeadLetters`] adds the bounds and the metrics.
//!
//! No name is ever made from anything but a [`FrameId`].

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bytesize::ByteSize;
use jiff::Timestamp;
use metrics::Gauge;
use rustix::fs::OFlags;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::frame::{Frame, FrameId};
use crate::log::Repeats;
use crate::metrics::Metrics;
use crate::settle::{Reason, Refusal};

/// Leftovers of a write that never ended are removed when they are older than this.
const LEFTOVER_AGE: Duration = Duration::from_hours(1);
/// A wall clock that is further than this, in milliseconds, from where the monotonic one says it should be has jumped.
const JUMP_MS: u64 = 3_600_000;
/// How long after a jump no dead letter is too old: time for somebody, or NTP, to set the clock right.
const DISTRUST: Duration = Duration::from_hours(24);
/// 2020-01-01. What died earlier died while the clock was not set: its age is not known, so it is never too old.
const CLOCK_UNSET_BEFORE_MS: i64 = 1_577_836_800_000;
/// What a file takes at least on the disk; counting it bounds the number of files, too.
const BLOCK_BYTES: u64 = 4096;
/// A dead letter's JSON is smaller; more is not read.
const JSON_BYTES_MAX: u64 = 256 << 10;
const RETRY: &str = "retry";
const TEMPORARY: &str = ".tmp-";

/// `[dead_letter]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where they are kept, for the service's user alone. Changes with a restart only.
    pub directory: PathBuf,
    /// All of them together; beyond it the oldest are removed. Files count as whole blocks of 4 KiB.
    #[schemars(with = "String")]
    pub max_size: ByteSize,
    /// How long they are kept; 0: none is ever too old.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_age: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: "/var/lib/framegate/dead-letter".into(),
            max_size: ByteSize::gib(1),
            max_age: Duration::from_hours(7 * 24),
        }
    }
}

/// What is known about a dead letter: its JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The frame's.
    #[serde(serialize_with = "id_to_text", deserialize_with = "id_from_text")]
    pub id: FrameId,
    /// The engine's `detectorName`.
    pub detector: String,
    /// IANA name.
    pub time_zone: String,
    /// When the face was detected.
    pub detect_time_utc: Timestamp,
    /// The class of refusal.
    pub reason: Reason,
    /// The engine's status, where it was the engine that refused.
    pub status: Option<u16>,
    /// For people.
    pub message: String,
    /// The kind of source it came from.
    pub source: String,
    /// Its name at the source; bytes that are no text are shown as `\xNN`.
    pub original_name: String,
    /// Attempts made.
    pub attempts: u32,
    /// When Framegate noticed it.
    pub received_at: Timestamp,
    /// When it became a dead letter.
    pub died_at: Timestamp,
    /// Size of the image.
    pub image_bytes: u64,
}

/// One entry of a list.
#[derive(Clone, Debug, PartialEq)]
pub enum Listed {
    /// Whole.
    Sound(DeadLetter),
    /// It has an id, but its JSON or its image is missing or broken.
    Damaged {
        /// Whose.
        id: FrameId,
        /// What is wrong.
        problem: String,
    },
}

impl Listed {
    /// Of either kind.
    pub fn id(&self) -> &FrameId {
        match self {
            Listed::Sound(letter) => &letter.id,
            Listed::Damaged { id, .. } => id,
        }
    }
}

/// Which dead letters are meant: those that fit all that is given. The default means all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// One of these; empty means any.
    pub ids: Vec<FrameId>,
    /// Of this reason.
    pub reason: Option<Reason>,
    /// Of exactly this detector.
    pub detector: Option<String>,
    /// Died before this.
    pub before: Option<Timestamp>,
    /// Died after this.
    pub after: Option<Timestamp>,
}

impl Filter {
    /// A damaged one fits where nothing is asked about its content.
    fn fits(&self, listed: &Listed) -> bool {
        match listed {
            Listed::Sound(letter) => {
                self.reason.is_none_or(|reason| reason == letter.reason)
                    && self.detector.as_ref().is_none_or(|detector| *detector == letter.detector)
                    && self.before.is_none_or(|before| letter.died_at < before)
                    && self.after.is_none_or(|after| letter.died_at > after)
            }
            Listed::Damaged { .. } => {
                self.reason.is_none() && self.detector.is_none() && self.before.is_none() && self.after.is_none()
            }
        }
    }
}

/// What [`Store::retry`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retried {
    /// It is in line to be published.
    Moved,
    /// There is no such dead letter.
    Unknown,
    /// It is already in line.
    Waiting,
}

/// The files of the dead letters. Needs no daemon, and does no harm beside one.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// The dead letters in this directory. Looks at nothing yet; a directory that does not exist holds none.
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Those in line to be published again, in the same form.
    #[must_use]
    pub fn retry_line(&self) -> Self {
        Self { directory: self.directory.join(RETRY) }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Those that fit, the oldest first; each is read when its turn comes, and one that is removed meanwhile is left out.
    pub fn list(&self, filter: Filter) -> io::Result<impl Iterator<Item = Listed>> {
        let mut found = self.scan()?.letters.into_keys().collect::<Vec<_>>();
        if !filter.ids.is_empty() {
            found.retain(|(_, id)| filter.ids.contains(id));
        }
        let store = self.clone();
        Ok(found.into_iter().filter_map(move |(_, id)| store.show(&id)).filter(move |listed| filter.fits(listed)))
    }

    /// One of them, if there is one of that id.
    pub fn show(&self, id: &FrameId) -> Option<Listed> {
        match self.read(id) {
            Ok(letter) => letter.map(Listed::Sound),
            Err(problem) => Some(Listed::Damaged { id: id.clone(), problem }),
        }
    }

    /// How many there are of each reason; damaged ones are not counted.
    pub fn counts(&self) -> io::Result<BTreeMap<Reason, u64>> {
        let mut counts = BTreeMap::new();
        for listed in self.list(Filter::default())? {
            if let Listed::Sound(letter) = listed {
                *counts.entry(letter.reason).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// The image's bytes.
    pub fn image(&self, id: &FrameId) -> io::Result<Vec<u8>> {
        let mut image = Vec::new();
        self.read_image(id, &mut image)?;
        Ok(image)
    }

    /// Whether there is an image of that id, also where there is no JSON.
    pub fn has_image(&self, id: &FrameId) -> bool {
        self.image_path(id).exists()
    }

    /// Reads the image into a buffer.
    pub fn read_image(&self, id: &FrameId, buffer: &mut Vec<u8>) -> io::Result<()> {
        open_regular(&self.image_path(id))?.read_to_end(buffer).map(drop)
    }

    /// Removes one; `false` if there is none of that id.
    pub fn remove(&self, id: &FrameId) -> io::Result<bool> {
        let existed = unlink(&self.json_path(id))?;
        unlink(&self.image_path(id))?;
        Ok(existed)
    }

    /// Puts one in line to be published again. Image first: the JSON makes it exist, so it is at every moment here or there.
    pub fn retry(&self, id: &FrameId) -> io::Result<Retried> {
        let line = self.retry_line();
        // Also while one that was refused again is being cleared away there: its JSON goes last.
        if line.json_path(id).exists() {
            return Ok(Retried::Waiting);
        }
        if !self.json_path(id).exists() {
            return Ok(Retried::Unknown);
        }
        line.create()?;
        match fs::rename(self.image_path(id), line.image_path(id)) {
            // A move that was interrupted here goes on.
            Err(e) if e.kind() == io::ErrorKind::NotFound && line.image_path(id).exists() => {}
            moved => moved?,
        }
        match fs::rename(self.json_path(id), line.json_path(id)) {
            // The daemon went on with an interrupted move, or removed it as too old in this moment.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if !line.json_path(id).exists() {
                    unlink(&line.image_path(id))?;
                    return Ok(Retried::Unknown);
                }
            }
            moved => moved?,
        }
        sync_directory(&line.directory)?;
        sync_directory(&self.directory)?;
        Ok(Retried::Moved)
    }

    /// Brings an image after its JSON, should a power cut have kept only the second half of a move; `false`: there is none.
    pub fn finish_retry(&self, id: &FrameId) -> io::Result<bool> {
        match fs::rename(self.image_path(id), self.retry_line().image_path(id)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Takes a pair out of the retry line. The JSON goes last: as long as it is there, [`Store::retry`] does not put another.
    pub fn clear(&self, id: &FrameId) -> io::Result<()> {
        unlink(&self.image_path(id))?;
        unlink(&self.json_path(id))?;
        Ok(())
    }

    /// The ids that have a JSON, in no order.
    pub fn ids(&self) -> io::Result<Vec<FrameId>> {
        Ok(self.scan()?.letters.into_keys().map(|(_, id)| id).collect())
    }

    /// `Err`: it exists, but is damaged in this way.
    fn read(&self, id: &FrameId) -> Result<Option<DeadLetter>, String> {
        let mut json = Vec::new();
        match open_regular(&self.json_path(id)).and_then(|file| file.take(JSON_BYTES_MAX).read_to_end(&mut json)) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(format!("its JSON cannot be read: {e}")),
        }
        let letter: DeadLetter = serde_json::from_slice(&json).map_err(|e| format!("its JSON is broken: {e}"))?;
        if letter.id != *id {
            return Err("its JSON is another one's".to_owned());
        }
        match fs::symlink_metadata(self.image_path(id)) {
            Ok(image) if image.is_file() && image.len() == letter.image_bytes => Ok(Some(letter)),
            Ok(image) => Err(format!("its image has {} bytes instead of {}", image.len(), letter.image_bytes)),
            // Removed between the two looks: the JSON goes first.
            Err(_) if !self.json_path(id).exists() => Ok(None),
            Err(e) => Err(format!("its image is missing: {e}")),
        }
    }

    /// Writes a pair and puts it into place; on any error nothing of it is visible.
    fn write(&self, letter: &DeadLetter, image: &[u8]) -> io::Result<(Key, u64)> {
        let json = serde_json::to_vec_pretty(letter)?;
        // Somebody may have removed it under a running daemon.
        self.create()?;
        let (image_file, image_meta) = self.temporary(image)?;
        let (json_file, json_meta) = self.temporary(&json)?;
        image_file.rename(&self.image_path(&letter.id))?;
        let placed = json_file.rename(&self.json_path(&letter.id)).and_then(|()| sync_directory(&self.directory));
        if let Err(e) = placed {
            // Not known to be durable: the next try writes all of it anew. Best effort, the error says enough.
            self.remove(&letter.id).ok();
            return Err(e);
        }
        Ok(((millis(&json_meta), letter.id.clone()), cost(&image_meta) + cost(&json_meta)))
    }

    /// A new file that is on the disk, still under a name that nobody looks at.
    fn temporary(&self, bytes: &[u8]) -> io::Result<(Temporary, fs::Metadata)> {
        let path = self.directory.join(format!("{TEMPORARY}{:016x}", fastrand::u64(..)));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        let temporary = Temporary(path);
        file.write_all(bytes)?;
        file.sync_all()?;
        let meta = file.metadata()?;
        Ok((temporary, meta))
    }

    /// Creates the directory for its owner alone. Where root creates it, it belongs to the owner of the one it is in.
    fn create(&self) -> io::Result<()> {
        if self.directory.is_dir() {
            return Ok(());
        }
        let ancestors = self.directory.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let missing: Vec<_> = ancestors.collect();
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        for made in missing.into_iter().rev() {
            let parent = made.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if rustix::process::geteuid().is_root() {
                let owner = fs::metadata(parent)?;
                chown(made, Some(owner.uid()), Some(owner.gid()))?;
            }
            sync_directory(parent)?;
        }
        Ok(())
    }

    /// Names, sizes and times of all there is, without opening any.
    fn scan(&self) -> io::Result<Scan> {
        let mut scan = Scan::default();
        let mut images = BTreeMap::new();
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(scan),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            // Removed since, or not ours.
            let Some(meta) = entry.metadata().ok().filter(fs::Metadata::is_file) else { continue };
            if name.starts_with(TEMPORARY) {
                scan.leftovers.push((entry.path(), millis(&meta)));
            } else if let Some(id) = name.strip_suffix(".json").and_then(FrameId::parse) {
                scan.letters.insert((millis(&meta), id), cost(&meta));
            } else if let Some(id) = name.strip_suffix(".image").and_then(FrameId::parse) {
                images.insert(id, (cost(&meta), millis(&meta)));
            }
        }
        for ((_, id), bytes) in &mut scan.letters {
            *bytes += images.remove(id).map_or(0, |(cost, _)| cost);
        }
        scan.leftovers.extend(images.into_iter().map(|(id, (_, at))| (self.image_path(&id), at)));
        Ok(scan)
    }

    fn image_path(&self, id: &FrameId) -> PathBuf {
        self.directory.join(format!("{id}.image"))
    }

    fn json_path(&self, id: &FrameId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }
}

/// Time of death in milliseconds since 1970, as the file system has it, and the id: sorts by age.
type Key = (i64, FrameId);

#[derive(Default)]
struct Scan {
    /// By age, with the bytes that they take.
    letters: BTreeMap<Key, u64>,
    /// Temporary files and images without a JSON, with their times.
    leftovers: Vec<(PathBuf, i64)>,
}

/// A file that is thrown away unless it is renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn rename(mut self, to: &Path) -> io::Result<()> {
        fs::rename(&self.0, to)?;
        self.0 = PathBuf::new();
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // What cannot be removed now, the next pass of the janitor removes.
            fs::remove_file(&self.0).ok();
        }
    }
}

/// The daemon's dead letters: bounded by size and age, and counted.
pub struct DeadLetters {
    store: Store,
    kept: Mutex<Kept>,
    changed: Notify,
    metrics: Arc<Metrics>,
    repeats: Repeats,
    count: Gauge,
    bytes: Gauge,
}

struct Kept {
    letters: BTreeMap<Key, u64>,
    bytes: u64,
    /// Writes going on: an image without a JSON may be one of theirs.
    writing: usize,
    max_size: u64,
    max_age: Duration,
    /// The wall clock, in milliseconds, and the monotonic one at the last pass.
    clocks: Option<(i64, Instant)>,
    /// The wall clock jumped: nobody is too old before this.
    distrusted_until: Option<Instant>,
}

impl Kept {
    /// Whether ages can be told by the wall clock. A jump of it makes everything old at once, and may be the mistake.
    fn trusts_clock(&mut self, wall: i64, now: Instant) -> bool {
        if let Some((before, then)) = self.clocks.replace((wall, now)) {
            let passed = i64::try_from(now.duration_since(then).as_millis()).unwrap_or(i64::MAX);
            if (wall - before).abs_diff(passed) > JUMP_MS {
                tracing::warn!(
                    "the clock of this box jumped: no dead letter is removed for its age within the next day"
                );
                self.distrusted_until = Some(now + DISTRUST);
            }
        }
        self.distrusted_until.is_none_or(|until| now >= until)
    }
}

impl DeadLetters {
    /// Opens the directory, creates it where it is missing, and looks at what it holds.
    #[expect(clippy::needless_pass_by_value, reason = "callers have one to give")]
    pub fn open(config: Config, metrics: Arc<Metrics>) -> anyhow::Result<Arc<Self>> {
        let store = Store::at(&config.directory);
        store.create().and_then(|()| store.retry_line().create()).with_context(|| {
            format!(
                "dead_letter.directory {}: cannot be created; create it and make the daemon's user its owner",
                config.directory.display()
            )
        })?;
        let letters = Self {
            count: metrics.gauge("dead_letters", &[]),
            bytes: metrics.gauge("dead_letter_bytes", &[]),
            kept: Mutex::new(Kept {
                letters: BTreeMap::new(),
                bytes: 0,
                writing: 0,
                max_size: config.max_size.as_u64(),
                max_age: config.max_age,
                clocks: None,
                distrusted_until: None,
            }),
            changed: Notify::new(),
            metrics,
            repeats: Repeats::default(),
            store,
        };
        for reason in ["age", "size"] {
            letters.metrics.counter("dead_letters_purged_total", &[("reason", reason)]).absolute(0);
        }
        letters
            .tidy()
            .with_context(|| format!("dead_letter.directory {}: cannot be read", config.directory.display()))?;
        Ok(Arc::new(letters))
    }

    /// The files, to list, show, remove or retry.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Keeps a frame durably. Blocking. For a frame that is kept already: does nothing. On an error nothing is visible
    /// of it, and nothing but the oldest dead letters (where there had to be room) has changed.
    pub fn keep(&self, frame: &Frame, image: &[u8], refusal: &Refusal) -> io::Result<()> {
        let before = self.store.show(&frame.id);
        if let Some(Listed::Sound(letter)) = &before
            && letter.image_bytes == image.len() as u64
        {
            // Kept before a crash that may have come before the directory was on the disk.
            return sync_directory(&self.store.directory);
        }
        let letter = letter_of(frame, image, refusal);
        let mut kept = self.lock();
        let needed = round(image.len() as u64) + BLOCK_BYTES;
        self.shrink(&mut kept, needed);
        kept.writing += 1;
        drop(kept);
        let written = self.store.write(&letter, image);
        let mut kept = self.lock();
        kept.writing -= 1;
        let (key, bytes) = written?;
        if before.is_some() {
            forget(&mut kept, &frame.id);
        }
        // A pass of the janitor may have seen it before this line.
        if kept.letters.insert(key, bytes).is_none() {
            kept.bytes += bytes;
        }
        self.show_counts(&kept);
        Ok(())
    }

    /// The janitor's pass: looks at the directory anew, finishes interrupted retries, removes leftovers and what is
    /// too old or too much. Blocking; call it every minute or so.
    pub fn tidy(&self) -> io::Result<()> {
        let mut kept = self.lock();
        let line = self.store.retry_line();
        let halfway = line.scan()?.leftovers;
        let scan = self.store.scan()?;
        kept.letters = scan.letters;
        kept.bytes = kept.letters.values().sum();
        let now = now_ms();
        // While one is being written here, its image has no JSON.
        let leftovers = if kept.writing == 0 { scan.leftovers } else { Vec::new() };
        for (path, at) in leftovers.into_iter().chain(halfway) {
            let id = path.file_stem().and_then(OsStr::to_str).and_then(FrameId::parse);
            // In this order: a JSON moves from here to the retry line, so one that is in neither place is nowhere.
            match id {
                Some(id) if self.store.json_path(&id).exists() => {
                    if !self.store.image_path(&id).exists() {
                        // The image has moved to the retry line, the JSON not yet.
                        self.store.retry(&id)?;
                        forget(&mut kept, &id);
                    }
                }
                Some(id) if line.json_path(&id).exists() => {}
                Some(_) | None => {
                    if age(now, at) > LEFTOVER_AGE {
                        unlink(&path)?;
                    }
                }
            }
        }
        let limit = if kept.max_age == Duration::ZERO { Duration::MAX } else { kept.max_age };
        let known = kept.letters.keys().filter(|(at, _)| *at >= CLOCK_UNSET_BEFORE_MS);
        let old: Vec<_> = known.take_while(|(at, _)| age(now, *at) > limit).cloned().collect();
        let trusted = kept.trusts_clock(now, Instant::now());
        for key in old.into_iter().filter(|_| trusted) {
            self.purge(&mut kept, &key, "age")?;
        }
        self.shrink(&mut kept, 0);
        self.show_counts(&kept);
        Ok(())
    }

    /// Somebody else has removed or moved some: a pass is due now.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// Waits until [`DeadLetters::changed`] was called since the last time.
    pub async fn until_changed(&self) {
        self.changed.notified().await;
    }

    /// How many there are, and how many bytes they take.
    pub fn totals(&self) -> (u64, u64) {
        let kept = self.lock();
        (kept.letters.len() as u64, kept.bytes)
    }

    /// Whether the directory is there and can be listed. Blocks for a moment.
    pub fn usable(&self) -> io::Result<()> {
        fs::read_dir(self.store.directory()).map(drop)
    }

    /// New bounds, applied at the next pass.
    pub fn reconfigure(&self, max_size: ByteSize, max_age: Duration) {
        let mut kept = self.lock();
        kept.max_size = max_size.as_u64();
        kept.max_age = max_age;
    }

    /// Removes the oldest until there is room for `needed` more bytes. One that cannot be removed stops it: the next pass
    /// tries again, and a dead letter too many is better than one less.
    fn shrink(&self, kept: &mut Kept, needed: u64) {
        while kept.bytes + needed > kept.max_size
            && let Some(oldest) = kept.letters.keys().next().cloned()
        {
            if let Err(error) = self.purge(kept, &oldest, "size") {
                if let Some(more) = self.repeats.came(&error.to_string(), Instant::now()) {
                    tracing::warn!(%error, directory = %self.store.directory.display(), "cannot remove the oldest dead letter{more}");
                }
                return;
            }
        }
    }

    fn purge(&self, kept: &mut Kept, key: &Key, reason: &'static str) -> io::Result<()> {
        // Where it is gone already, an operator took it.
        if self.store.remove(&key.1)? {
            self.metrics.counter("dead_letters_purged_total", &[("reason", reason)]).increment(1);
        }
        kept.bytes -= kept.letters.remove(key).unwrap_or(0);
        Ok(())
    }

    fn show_counts(&self, kept: &Kept) {
        self.count.set(kept.letters.len() as f64);
        self.bytes.set(kept.bytes as f64);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for DeadLetters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeadLetters({})", self.store.directory.display())
    }
}

fn forget(kept: &mut Kept, id: &FrameId) {
    let gone: u64 = kept.letters.extract_if(.., |(_, other), _| other == id).map(|(_, bytes)| bytes).sum();
    kept.bytes -= gone;
}

fn letter_of(frame: &Frame, image: &[u8], refusal: &Refusal) -> DeadLetter {
    DeadLetter {
        id: frame.id.clone(),
        detector: frame.detector.name.to_string(),
        time_zone: frame.detector.time_zone.to_string(),
        detect_time_utc: frame.detect_time,
        reason: refusal.reason,
        status: refusal.status,
        message: refusal.message.clone(),
        source: frame.source.as_str().to_owned(),
        original_name: shown(&frame.original_name),
        attempts: refusal.attempts,
        received_at: frame.received_at,
        died_at: Timestamp::now(),
        image_bytes: image.len() as u64,
    }
}

/// Any bytes as text that is safe on a terminal. What it gave, it gives back unchanged.
pub fn shown(name: &OsStr) -> String {
    let mut text = String::with_capacity(name.len());
    for part in name.as_bytes().utf8_chunks() {
        for c in part.valid().chars() {
            // Control characters, and what turns the direction of text round.
            if c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            {
                text.extend(c.escape_unicode());
            } else {
                text.push(c);
            }
        }
        text.extend(part.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

fn id_to_text<S: Serializer>(id: &FrameId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id.as_str())
}

fn id_from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FrameId, D::Error> {
    let text = String::deserialize(deserializer)?;
    FrameId::parse(&text).ok_or_else(|| serde::de::Error::custom("not an id"))
}

/// Never a link, never anything that blocks.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// `false`: there was none.
fn unlink(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn cost(meta: &fs::Metadata) -> u64 {
    round(meta.len())
}

fn round(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(BLOCK_BYTES)
}

fn millis(meta: &fs::Metadata) -> i64 {
    meta.mtime() * 1000 + meta.mtime_nsec() / 1_000_000
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

fn age(now_ms: i64, at_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(now_ms.saturating_sub(at_ms)).unwrap_or(0))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::frame::{Detector, SourceKind};

    pub(crate) fn frame() -> Frame {
        Frame {
            id: FrameId::generate(),
            detector: Arc::new(Detector {
                name: "Front \"Door\"".into(),
                time_zone: "America/Los_Angeles".into(),
                rate: 0.0,
                weight: 1,
            }),
            detect_time: "2026-11-23T11:00:00.123Z".parse().unwrap(),
            received_at: Timestamp::now(),
            noticed: Instant::now(),
            source: SourceKind::Directory,
            original_name: OsStr::from_bytes(b"../\xff\x1b[31m.jpg").to_owned(),
            image_bytes: 3,
        }
    }

    pub(crate) fn refusal(reason: Reason) -> Refusal {
        Refusal { reason, status: Some(400), message: "the engine said no".to_owned(), attempts: 2 }
    }

    pub(crate) fn open(directory: &Path) -> (Arc<DeadLetters>, Arc<Metrics>) {
        let metrics = Metrics::new();
        let config = Config { directory: directory.to_owned(), ..Config::default() };
        (DeadLetters::open(config, metrics.clone()).unwrap(), metrics)
    }

    fn kept(letters: &DeadLetters, image: &[u8], reason: Reason) -> FrameId {
        let frame = frame();
        letters.keep(&frame, image, &refusal(reason)).unwrap();
        frame.id
    }

    /// Every file and what it holds.
    fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.is_file()).map(|path| (path.display().to_string(), fs::read(&path).unwrap())).collect()
    }

    fn made_old(path: &Path, by: Duration) {
        let old = SystemTime::now() - by;
        File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    }

    fn listed(store: &Store, filter: Filter) -> Vec<FrameId> {
        store.list(filter).unwrap().map(|listed| listed.id().clone()).collect()
    }

    #[test]
    fn a13_a_frame_is_kept_with_its_reason_under_its_id_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("below/dead-letter");
        let (letters, metrics) = open(&directory);
        let frame = frame();
        letters.keep(&frame, b"abc", &refusal(Reason::Rejected)).unwrap();
        let Some(Listed::Sound(letter)) = letters.store().show(&frame.id) else { panic!("not sound") };
        assert_eq!(letter.detector, "Front \"Door\"");
        assert_eq!(letter.original_name, r"../\xff\u{1b}[31m.jpg");
        assert_eq!(shown(letter.original_name.as_ref()), letter.original_name, "showing twice changes nothing");
        assert_eq!((letter.status, letter.attempts, letter.image_bytes), (Some(400), 2, 3));
        assert_eq!(letters.store().image(&frame.id).unwrap(), b"abc");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(files(&directory).len(), 2, "no leftovers");
        assert!(files(&directory).keys().all(|name| mode(Path::new(name)) == 0o600));
        let text = metrics.render();
        assert!(
            text.contains("framegate_dead_letters 1") && text.contains("framegate_dead_letter_bytes 8192"),
            "{text}"
        );
        assert_eq!(letters.store().counts().unwrap(), BTreeMap::from([(Reason::Rejected, 1)]));
    }

    #[test]
    fn b15_keeping_a_frame_again_changes_nothing_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        let frame = frame();
        letters.keep(&frame, b"abc", &refusal(Reason::Rejected)).unwrap();
        let before = files(dir.path());
        letters.keep(&frame, b"abc", &refusal(Reason::Forbidden)).unwrap();
        let (letters, metrics) = open(dir.path());
        letters.keep(&frame, b"abc", &refusal(Reason::Forbidden)).unwrap();
        assert_eq!(files(dir.path()), before);
        assert!(metrics.render().contains("framegate_dead_letters 1"));
    }

    #[test]
    fn a_damaged_one_is_shown_and_replaced_when_its_frame_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, metrics) = open(dir.path());
        let frame = frame();
        let keep = || letters.keep(&frame, b"abc", &refusal(Reason::Rejected)).unwrap();
        let store = letters.store();
        let damages: [&dyn Fn(); 3] = [
            &|| fs::remove_file(store.image_path(&frame.id)).unwrap(),
            &|| fs::write(store.image_path(&frame.id), b"a").unwrap(),
            &|| fs::write(store.json_path(&frame.id), b"{").unwrap(),
        ];
        for damage in damages {
            keep();
            damage();
            assert!(matches!(store.show(&frame.id), Some(Listed::Damaged { .. })));
            assert_eq!(listed(store, Filter::default()), std::slice::from_ref(&frame.id));
            assert_eq!(listed(store, Filter { reason: Some(Reason::Rejected), ..Filter::default() }), []);
            keep();
            assert!(matches!(store.show(&frame.id), Some(Listed::Sound(_))));
            assert!(metrics.render().contains("framegate_dead_letters 1"), "and counted once");
        }
    }

    #[test]
    fn hostile_names_in_the_directory_are_not_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        let id = FrameId::generate();
        for name in ["..json", "evil.json", "x.image", "0123456789ABCDEFGHJKMNPQRS.json", "notes.txt"] {
            fs::write(dir.path().join(name), b"{}").unwrap();
        }
        fs::write(dir.path().join(OsStr::from_bytes(b"\xff.json")), b"{}").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", letters.store().json_path(&id)).unwrap();
        letters.tidy().unwrap();
        assert_eq!(listed(letters.store(), Filter::default()), []);
        let shown = letters.store().show(&id);
        assert!(matches!(shown, Some(Listed::Damaged { .. })), "a link is never followed: {shown:?}");
        assert_eq!(files(dir.path()).len(), 7, "and nothing of others is removed");
    }

    #[test]
    fn the_oldest_make_room_when_the_size_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, metrics) = open(dir.path());
        // Each takes two blocks.
        letters.reconfigure(ByteSize::b(3 * 2 * BLOCK_BYTES), Duration::ZERO);
        let mut ids = Vec::new();
        for n in 0..5u8 {
            ids.push(kept(&letters, &[n], Reason::Rejected));
            assert!(files(dir.path()).len() <= 6);
        }
        assert_eq!(listed(letters.store(), Filter::default()), ids[2..]);
        assert!(metrics.render().contains(r#"framegate_dead_letters_purged_total{reason="size"} 2"#));
        letters.reconfigure(ByteSize::b(2 * BLOCK_BYTES), Duration::ZERO);
        letters.tidy().unwrap();
        assert_eq!(listed(letters.store(), Filter::default()), ids[4..]);
        assert!(metrics.render().contains("framegate_dead_letter_bytes 8192"));
    }

    #[test]
    fn the_janitor_removes_what_is_too_old_but_not_what_died_before_the_clock_was_set() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, metrics) = open(dir.path());
        let ids: Vec<_> = (0..3).map(|n| kept(&letters, &[n], Reason::Rejected)).collect();
        made_old(&letters.store().json_path(&ids[0]), Duration::from_hours(24 * 8));
        let unset = UNIX_EPOCH + Duration::from_hours(1);
        File::options().write(true).open(letters.store().json_path(&ids[1])).unwrap().set_modified(unset).unwrap();
        letters.tidy().unwrap();
        assert_eq!(listed(letters.store(), Filter::default()), ids[1..]);
        assert!(metrics.render().contains(r#"framegate_dead_letters_purged_total{reason="age"} 1"#));
    }

    #[test]
    fn leftovers_of_interrupted_writes_are_removed_after_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, metrics) = open(dir.path());
        let sound = kept(&letters, b"abc", Reason::Rejected);
        let (orphan, temporary) = (letters.store().image_path(&FrameId::generate()), dir.path().join(".tmp-1"));
        fs::write(&orphan, b"x").unwrap();
        fs::write(&temporary, b"x").unwrap();
        letters.tidy().unwrap();
        assert!(orphan.exists() && temporary.exists(), "they may be somebody's who is writing");
        for path in [&orphan, &temporary, &letters.store().image_path(&sound)] {
            made_old(path, Duration::from_hours(2));
        }
        letters.tidy().unwrap();
        assert!(!orphan.exists() && !temporary.exists());
        assert!(matches!(letters.store().show(&sound), Some(Listed::Sound(_))), "a pair is no leftover");
        assert!(metrics.render().contains("framegate_dead_letters 1"));
    }

    #[test]
    fn filters_take_what_fits_all_of_them_the_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        let reasons = [Reason::Rejected, Reason::Truncated, Reason::Rejected];
        let ids = reasons.map(|reason| kept(&letters, b"abc", reason));
        // An older one, though its id is the newest.
        made_old(&letters.store().json_path(&ids[2]), Duration::from_mins(1));
        let of = |filter| listed(letters.store(), filter);
        assert_eq!(of(Filter::default()), [ids[2].clone(), ids[0].clone(), ids[1].clone()]);
        assert_eq!(of(Filter { reason: Some(Reason::Truncated), ..Filter::default() }), [ids[1].clone()]);
        assert_eq!(of(Filter { ids: vec![ids[0].clone()], ..Filter::default() }), [ids[0].clone()]);
        let wrong = Filter { ids: vec![ids[0].clone()], reason: Some(Reason::Truncated), ..Filter::default() };
        assert_eq!(of(wrong), []);
        assert_eq!(of(Filter { detector: Some("Front".to_owned()), ..Filter::default() }), []);
        assert_eq!(of(Filter { before: Some(Timestamp::now()), ..Filter::default() }).len(), 3);
        assert_eq!(of(Filter { after: Some(Timestamp::now()), ..Filter::default() }), []);
    }

    #[test]
    fn removing_takes_both_files_and_says_whether_there_were_any() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        let id = kept(&letters, b"abc", Reason::Rejected);
        assert!(letters.store().remove(&id).unwrap());
        assert!(!letters.store().remove(&id).unwrap());
        assert_eq!(files(dir.path()).len(), 0);
    }

    #[test]
    fn a_directory_that_was_removed_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("dead-letter");
        let (letters, _) = open(&directory);
        fs::remove_dir_all(&directory).unwrap();
        letters.tidy().unwrap();
        let id = kept(&letters, b"abc", Reason::Rejected);
        assert_eq!(letters.store().retry(&id).unwrap(), Retried::Moved);
    }

    #[test]
    fn a22_where_nothing_can_be_written_keeping_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("dead-letter");
        let (letters, _) = open(&directory);
        fs::remove_dir_all(&directory).unwrap();
        fs::write(&directory, b"in the way").unwrap();
        assert!(letters.keep(&frame(), b"abc", &refusal(Reason::Rejected)).is_err());
        assert!(letters.tidy().is_err());
    }

    #[test]
    fn a_retry_moves_the_pair_and_waits_while_one_is_in_line() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, metrics) = open(dir.path());
        let store = letters.store();
        let frame = frame();
        letters.keep(&frame, b"abc", &refusal(Reason::Rejected)).unwrap();
        assert_eq!(store.retry(&FrameId::generate()).unwrap(), Retried::Unknown);
        assert_eq!(store.retry(&frame.id).unwrap(), Retried::Moved);
        assert_eq!(store.show(&frame.id), None);
        assert!(matches!(store.retry_line().show(&frame.id), Some(Listed::Sound(_))));
        letters.tidy().unwrap();
        assert!(metrics.render().contains("framegate_dead_letters 0"), "those in line are no dead letters");
        // Refused again, and not cleared away yet.
        letters.keep(&frame, b"abc", &refusal(Reason::Forbidden)).unwrap();
        assert_eq!(store.retry(&frame.id).unwrap(), Retried::Waiting);
        store.retry_line().clear(&frame.id).unwrap();
        assert_eq!(store.retry(&frame.id).unwrap(), Retried::Moved);
    }

    #[test]
    fn a_retry_interrupted_between_its_two_files_is_finished_by_the_next_or_by_the_janitor() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        let store = letters.store();
        let line = store.retry_line();
        let finishes: [&dyn Fn(&FrameId); 2] =
            [&|id| assert_eq!(store.retry(id).unwrap(), Retried::Moved), &|_| letters.tidy().unwrap()];
        for finish in finishes {
            let id = kept(&letters, b"abc", Reason::Rejected);
            made_old(&store.image_path(&id), Duration::from_hours(3));
            fs::rename(store.image_path(&id), line.image_path(&id)).unwrap();
            finish(&id);
            assert_eq!(store.show(&id), None);
            assert!(matches!(line.show(&id), Some(Listed::Sound(_))));
        }
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a skipped test has to be heard")]
    fn a18_a19_a_full_disk_is_an_error_and_leaves_nothing() {
        for (limit, image) in [("size=128k", vec![7; 256 << 10]), ("size=8m,nr_inodes=5", vec![7; 10])] {
            let dir = tempfile::tempdir().unwrap();
            let mount = |args: &[&str]| std::process::Command::new(args[0]).args(&args[1..]).arg(dir.path()).status();
            if !mount(&["mount", "-t", "tmpfs", "-o", limit, "tmpfs"]).is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: a full disk was not tested, a tmpfs cannot be mounted here (it needs root)");
                return;
            }
            let (letters, metrics) = open(dir.path());
            // Of the inodes, the root, the retry line and this pair leave one: the image fits, the JSON does not.
            let sound = kept(&letters, b"abc", Reason::Rejected);
            let before = files(dir.path());
            let failed = letters.keep(&frame(), &image, &refusal(Reason::Rejected)).map_err(|e| e.kind());
            assert_eq!(failed, Err(io::ErrorKind::StorageFull), "{limit}");
            assert_eq!(files(dir.path()), before, "{limit}");
            assert!(metrics.render().contains("framegate_dead_letters 1"));
            letters.store().remove(&sound).unwrap();
            kept(&letters, b"abc", Reason::Rejected);
            drop(mount(&["umount"]));
        }
    }

    #[test]
    fn a25_a_clock_that_jumps_ahead_removes_no_dead_letter_for_its_age() {
        let dir = tempfile::tempdir().unwrap();
        let (letters, _) = open(dir.path());
        letters.keep(&frame(), b"abc", &refusal(Reason::Rejected)).unwrap();
        letters.reconfigure(ByteSize::mib(1), Duration::from_millis(1));
        std::thread::sleep(Duration::from_millis(5));
        // Ten years ago by the wall clock, this moment by the other.
        letters.lock().clocks = Some((now_ms() - 10 * 365 * 86_400_000, Instant::now()));
        letters.tidy().unwrap();
        letters.tidy().unwrap();
        assert_eq!(letters.totals().0, 1, "kept, although it looks ten years old");
        letters.lock().distrusted_until = None;
        letters.tidy().unwrap();
        assert_eq!(letters.totals().0, 0);
    }
}
