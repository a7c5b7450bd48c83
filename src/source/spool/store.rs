//! The spool on disk: a log of segments that are only appended to, each removed as a whole when nothing in it is wanted any
//! more. Everything in here blocks.
//!
//! `<n>.seg` holds records, `<n>.gone` where those begin that are settled. The second is never synced: a power cut may
//! bring a published frame back. Where much of a segment is settled and little is not, the little is copied to the end of
//! the log and the segment removed.
//!
//! Not here: which frame goes first, and who waits for what.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::record::{self, HEAD_BYTES, Head, Meta};

/// A segment's share of the spool's bound, and its own bounds in bytes.
const SEGMENTS: u64 = 64;
const SEGMENT_BYTES_MIN: u64 = 256 << 10;
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// The segment that is written to goes, too, when all of it is settled and it is larger than this, bytes, or than this share
/// of the spool's bound: what is left must have room for the largest frame.
const IDLE_BYTES_MAX: u64 = 1 << 20;
const IDLE_SHARE: u64 = 8;
/// Bytes that are copied in one go out of a segment of which little is left.
const MOVE_BYTES_MAX: u64 = 4 << 20;
/// Bytes of the buffer that are kept between groups.
const BUFFER_KEPT_MAX: usize = 4 << 20;
/// Bytes that say where a record begins, and which one it is.
const MARK_BYTES: usize = 8;
/// Bytes read at once while records are looked for: a head and what is usually known about a frame.
const LOOK_BYTES: usize = 1024;

type Mark = [u8; MARK_BYTES];

/// The spool's directory, ours alone.
pub(super) struct Store {
    directory: PathBuf,
    /// To sync it.
    dir: File,
    /// Held as long as this lives.
    _lock: File,
    max_bytes: u64,
    segments: BTreeMap<u64, Segment>,
    /// The one that is appended to.
    active: Option<u64>,
    next: u64,
    bytes: u64,
    live_bytes: u64,
    buffer: Vec<u8>,
}

struct Segment {
    file: Arc<File>,
    /// Appended to when the first frame is settled.
    gone: Option<File>,
    /// Settled, and not yet written there.
    unmarked: Vec<u8>,
    bytes: u64,
    live: u64,
    live_bytes: u64,
    /// Some of it could not be read: it is never removed, only put aside.
    damaged: bool,
}

/// Where a frame's record lies. Good even after its segment was removed, for whoever reads it just then.
#[derive(Clone, Debug)]
pub(super) struct Spot {
    file: Arc<File>,
    segment: u64,
    at: u32,
    head: Head,
}

impl Spot {
    /// Bytes on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.head.record_bytes()
    }

    /// The segment that it lies in.
    pub(super) fn segment(&self) -> u64 {
        self.segment
    }

    /// Reads it: the image (as it is kept) into the empty buffer. `None`: the disk gave something else than was written.
    pub(super) fn read(&self, image: &mut Vec<u8>) -> io::Result<(Option<Meta>, bool)> {
        let mut begin = vec![0; HEAD_BYTES + self.head.meta as usize];
        self.file.read_exact_at(&mut begin, self.at.into())?;
        image.resize(self.head.image as usize, 0);
        self.file.read_exact_at(image, u64::from(self.at) + begin.len() as u64)?;
        Ok((record::meta(&begin), crc32fast::hash(image) == self.head.crc))
    }

    fn mark(&self) -> Mark {
        let mut mark = [0; MARK_BYTES];
        mark[..4].copy_from_slice(&self.at.to_le_bytes());
        mark[4..].copy_from_slice(&self.head.crc.to_le_bytes());
        mark
    }
}

/// What stands in the spool at the start.
pub(super) type Found = Vec<(Meta, Spot)>;

impl Store {
    /// Opens or makes the directory, and finds what a life before left.
    ///
    /// # Errors
    /// Also if another process has it open ([`io::ErrorKind::ResourceBusy`]).
    pub(super) fn open(directory: &Path, max_bytes: u64) -> io::Result<(Self, Found)> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let lock = lock(directory)?;
        let mut store = Self {
            dir: File::open(directory)?,
            directory: directory.to_owned(),
            _lock: lock,
            max_bytes,
            segments: BTreeMap::new(),
            active: None,
            next: 0,
            bytes: 0,
            live_bytes: 0,
            buffer: Vec::new(),
        };
        let mut found = store.recover()?;
        // A crash while a segment was copied leaves some frames twice: the later one counts.
        let newest: HashMap<&str, u64> = found.iter().map(|(meta, spot)| (meta.id.as_str(), spot.segment)).collect();
        let twice: Vec<bool> = found.iter().map(|(meta, spot)| newest[meta.id.as_str()] != spot.segment).collect();
        let mut is_twice = twice.into_iter();
        let older = found.extract_if(.., |_| is_twice.next() == Some(true));
        let older: Vec<Spot> = older.map(|(_, spot)| spot).collect();
        store.settle(&older)?;
        store.settle(&[])?;
        Ok((store, found))
    }

    /// A new bound.
    pub(super) fn set_max(&mut self, max_bytes: u64) {
        self.max_bytes = max_bytes;
    }

    /// Bytes on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether so many bytes more fit the bound. One segment stays free, to copy into.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.bytes + bytes + self.segment_bytes() <= self.max_bytes
    }

    /// Appends a group of frames, each with its JSON, and syncs them together. All of them, or none.
    pub(super) fn put(&mut self, group: &[(Vec<u8>, Bytes)]) -> io::Result<Vec<Spot>> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let heads: Vec<Head> = group.iter().map(|(meta, image)| record::write(meta, image, &mut buffer)).collect();
        let done = self.append(&buffer, &heads);
        buffer.clear();
        buffer.shrink_to(BUFFER_KEPT_MAX);
        self.buffer = buffer;
        done
    }

    /// These frames are not wanted any more. Segments of which nothing is wanted are removed.
    ///
    /// # Errors
    /// Their frames are settled all the same, and what could not be written or removed is tried again at the next call.
    pub(super) fn settle(&mut self, spots: &[Spot]) -> io::Result<()> {
        for spot in spots {
            let Some(segment) = self.segments.get_mut(&spot.segment) else { continue };
            segment.unmarked.extend_from_slice(&spot.mark());
            segment.live -= 1;
            segment.live_bytes -= spot.bytes();
            self.live_bytes -= spot.bytes();
        }
        let mut done = Ok(());
        let touched = self.segments.iter().filter(|(_, it)| it.live == 0 || !it.unmarked.is_empty());
        for number in touched.map(|(number, _)| *number).collect::<Vec<_>>() {
            done = self.clear(number).and(done);
        }
        done
    }

    /// The segment that should be copied to the end of the log, because space is needed and most of it is settled.
    pub(super) fn worn(&self) -> Option<u64> {
        let garbage = self.bytes - self.live_bytes;
        if self.has_room(self.segment_bytes()) && garbage <= self.max_bytes / 4 {
            return None;
        }
        let closed = self.segments.iter().filter(|(number, it)| Some(**number) != self.active && !it.damaged);
        let (number, worst) = closed.min_by_key(|(_, it)| it.live_bytes * 1000 / it.bytes.max(1))?;
        (worst.live_bytes <= worst.bytes / 2).then_some(*number)
    }

    /// Copies frames to the end of the log, as many from the first on as are moved in one go, and settles the old places.
    pub(super) fn renew(&mut self, spots: &[Spot]) -> io::Result<Vec<Spot>> {
        let mut bytes = 0;
        let some = spots.iter().take_while(|spot| {
            let first = bytes == 0;
            bytes += spot.bytes();
            first || bytes <= MOVE_BYTES_MAX
        });
        let some: Vec<Spot> = some.cloned().collect();
        let mut buffer = Vec::new();
        for spot in &some {
            let begin = buffer.len();
            buffer.resize(begin + usize::try_from(spot.bytes()).unwrap_or(usize::MAX), 0);
            spot.file.read_exact_at(&mut buffer[begin..], spot.at.into())?;
        }
        let heads: Vec<Head> = some.iter().map(|spot| spot.head).collect();
        let renewed = self.append(&buffer, &heads)?;
        self.settle(&some)?;
        Ok(renewed)
    }

    fn append(&mut self, records: &[u8], heads: &[Head]) -> io::Result<Vec<Spot>> {
        let number = self.writable(records.len() as u64)?;
        let segment = self.segments.get_mut(&number).expect("writable gives one that is there");
        let at = segment.bytes;
        if let Err(error) = segment.file.write_all_at(records, at).and_then(|()| segment.file.sync_data()) {
            // What an fsync that failed has left on the disk, nobody knows: nothing is written behind it. Where the cut
            // fails, too, frames that were refused may come back after a restart.
            let cut = segment.file.set_len(at);
            tracing::debug!(?cut, "a group of frames could not be spooled");
            self.active = None;
            drop(self.clear(number));
            return Err(error);
        }
        segment.bytes += records.len() as u64;
        segment.live += heads.len() as u64;
        segment.live_bytes += records.len() as u64;
        self.bytes += records.len() as u64;
        self.live_bytes += records.len() as u64;
        let mut at = u32::try_from(at).expect("segments are smaller than 4 GiB");
        let file = segment.file.clone();
        let spot = |head: &Head| {
            let spot = Spot { file: file.clone(), segment: number, at, head: *head };
            at += u32::try_from(head.record_bytes()).expect("and so are records");
            spot
        };
        Ok(heads.iter().map(spot).collect())
    }

    /// The segment to append so much to.
    fn writable(&mut self, bytes: u64) -> io::Result<u64> {
        if let Some(active) = self.active {
            if self.segments[&active].bytes + bytes <= self.segment_bytes() || self.segments[&active].bytes == 0 {
                return Ok(active);
            }
            self.active = None;
            // Not worth failing for: it is tried again.
            drop(self.clear(active));
        }
        let number = self.next;
        // A crash may have left it behind; what it says is of another segment.
        ignore_missing(fs::remove_file(self.path(number, "gone")))?;
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.path(number, "seg"))?;
        if let Err(error) = self.dir.sync_all() {
            drop(fs::remove_file(self.path(number, "seg")));
            return Err(error);
        }
        self.next += 1;
        self.active = Some(number);
        self.segments.insert(number, Segment::new(file));
        Ok(number)
    }

    /// Writes down what of a segment is settled, or removes it if all is.
    fn clear(&mut self, number: u64) -> io::Result<()> {
        let (path, gone, aside) = (self.path(number, "seg"), self.path(number, "gone"), self.path(number, "damaged"));
        let idle_max = IDLE_BYTES_MAX.min(self.max_bytes / IDLE_SHARE);
        let Some(segment) = self.segments.get_mut(&number) else { return Ok(()) };
        let active = self.active == Some(number);
        if segment.live > 0 || active && segment.bytes <= idle_max {
            return segment.mark(&gone);
        }
        let removed = if segment.damaged { fs::rename(&path, aside) } else { fs::remove_file(&path) };
        ignore_missing(removed)?;
        self.bytes -= segment.bytes;
        self.segments.remove(&number);
        if active {
            self.active = None;
        }
        ignore_missing(fs::remove_file(&gone))
    }

    fn segment_bytes(&self) -> u64 {
        (self.max_bytes / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
    }

    fn path(&self, number: u64, extension: &str) -> PathBuf {
        path(&self.directory, number, extension)
    }

    fn recover(&mut self) -> io::Result<Found> {
        let numbers = numbers(&self.directory)?;
        let newest = numbers.last().copied();
        let mut all = Vec::new();
        for number in numbers {
            self.next = number + 1;
            let file = OpenOptions::new().read(true).write(true).open(self.path(number, "seg"))?;
            let mut segment = Segment::new(file);
            let is_newest = newest == Some(number);
            let Walk { found, whole, rest } = walk(&self.directory, number, &segment.file, is_newest)?;
            segment.bytes = whole;
            segment.live = found.len() as u64;
            segment.live_bytes = found.iter().map(|(_, spot)| spot.bytes()).sum();
            if rest > 0 && is_newest {
                // Nobody was told that it is safe: the write that a crash cut off.
                segment.file.set_len(whole)?;
            } else if rest > 0 {
                tracing::error!(
                    path = %self.path(number, "seg").display(), bytes = rest,
                    "the end of a spool segment cannot be read: the disk or its file system is damaged; the file is kept as .damaged"
                );
                segment.damaged = true;
                segment.bytes += rest;
            }
            self.bytes += segment.bytes;
            self.live_bytes += segment.live_bytes;
            self.segments.insert(number, segment);
            all.extend(found);
        }
        Ok(all)
    }
}

impl Segment {
    fn new(file: File) -> Self {
        Self {
            file: Arc::new(file),
            gone: None,
            unmarked: Vec::new(),
            bytes: 0,
            live: 0,
            live_bytes: 0,
            damaged: false,
        }
    }

    /// Writes down what is settled. Not synced.
    fn mark(&mut self, path: &Path) -> io::Result<()> {
        if self.unmarked.is_empty() {
            return Ok(());
        }
        // Opened anew after an error: what was written of it may end within a mark.
        let mut gone = match self.gone.take() {
            Some(gone) => gone,
            None => open_marks(path)?,
        };
        gone.write_all(&self.unmarked)?;
        self.gone = Some(gone);
        self.unmarked.clear();
        Ok(())
    }
}

/// To append marks to. Half of one at its end would shift those behind it, and nobody could read them.
fn open_marks(path: &Path) -> io::Result<File> {
    let gone = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let length = gone.metadata()?.len();
    let half = length % MARK_BYTES as u64;
    if half > 0 {
        gone.set_len(length - half)?;
    }
    Ok(gone)
}

/// What is in the spool, without opening it: also while a daemon has it.
pub(super) fn list(directory: &Path) -> io::Result<Vec<(Meta, u64)>> {
    let mut all = HashMap::new();
    for number in numbers(directory)? {
        let walked = File::open(path(directory, number, "seg"))
            .map(Arc::new)
            .and_then(|file| walk(directory, number, &file, false));
        match walked {
            Ok(walk) => all.extend(walk.found.into_iter().map(|(meta, spot)| (meta.id.clone(), (meta, spot.bytes())))),
            // The daemon has just settled all of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut all: Vec<_> = all.into_values().collect();
    all.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
    Ok(all)
}

/// Whether there is anything in it, without opening it.
pub(super) fn is_empty(directory: &Path) -> bool {
    numbers(directory).is_ok_and(|numbers| numbers.is_empty())
}

struct Walk {
    /// What is not settled.
    found: Found,
    /// Bytes of whole records.
    whole: u64,
    /// Bytes behind them.
    rest: u64,
}

/// Goes from record to record. Images are read only to find out how far the last write came (`images`).
fn walk(directory: &Path, number: u64, file: &Arc<File>, images: bool) -> io::Result<Walk> {
    let length = file.metadata()?.len();
    let gone = marks(&path(directory, number, "gone"))?;
    let (mut at, mut found) = (0u64, Vec::new());
    let mut begin = vec![0; LOOK_BYTES];
    let mut image = Vec::new();
    while at < length {
        let read = read_at_most(file, &mut begin, at)?;
        let Some(head) = record::head(&begin[..read]) else { break };
        let until = HEAD_BYTES + head.meta as usize;
        if at + head.record_bytes() > length {
            break;
        }
        if until > read {
            begin.resize(begin.len().max(until), 0);
            file.read_exact_at(&mut begin[..until], at)?;
        }
        let Some(meta) = record::meta(&begin[..until]) else { break };
        let Ok(place) = u32::try_from(at) else { break };
        let spot = Spot { file: file.clone(), segment: number, at: place, head };
        if images && !spot.read(&mut image)?.1 {
            break;
        }
        if !gone.contains(&spot.mark()) {
            found.push((meta, spot));
        }
        at += head.record_bytes();
    }
    Ok(Walk { found, whole: at, rest: length - at })
}

fn read_at_most(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

fn marks(path: &Path) -> io::Result<HashSet<Mark>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(mut file) => file.read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(bytes.as_chunks().0.iter().copied().collect())
}

/// The segments there are, in their order.
fn numbers(directory: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        numbers.extend(number.and_then(|hex| u64::from_str_radix(hex, 16).ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn path(directory: &Path, number: u64, extension: &str) -> PathBuf {
    directory.join(format!("{number:016x}.{extension}"))
}

fn lock(directory: &Path) -> io::Result<File> {
    let path = directory.join("lock");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(io::Error::new(io::ErrorKind::ResourceBusy, "another framegate uses it")),
        Err(error) => Err(error.into()),
    }
}

fn ignore_missing(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::meta_of;
    use super::*;

    const MAX: u64 = 64 << 20;

    fn open(directory: &Path) -> (Store, Found) {
        Store::open(directory, MAX).unwrap()
    }

    fn open_again(store: Store, directory: &Path) -> Found {
        drop(store);
        open(directory).1
    }

    fn group(numbers: std::ops::Range<u64>, image: &[u8]) -> Vec<(Vec<u8>, Bytes)> {
        numbers.map(|n| (serde_json::to_vec(&meta_of(n)).unwrap(), Bytes::copy_from_slice(image))).collect()
    }

    fn ids(found: &Found) -> Vec<u64> {
        found.iter().map(|(meta, _)| meta.id.parse().unwrap()).collect()
    }

    fn files(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn what_was_put_is_found_again_but_for_what_was_settled() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, found) = open(dir.path());
        assert!(found.is_empty() && is_empty(dir.path()));
        let spots = store.put(&group(0..5, b"image")).unwrap();
        store.settle(&spots[1..3]).unwrap();
        assert_eq!(store.put(&group(5..6, b"other")).unwrap().len(), 1);
        assert_eq!(list(dir.path()).unwrap().len(), 4, "looked at while it is open");
        drop(store);
        let (mut store, found) = open(dir.path());
        assert_eq!(ids(&found), [0, 3, 4, 5]);
        let mut image = Vec::new();
        assert_eq!(found[3].1.read(&mut image).unwrap(), (Some(meta_of(5)), true));
        assert_eq!(image, b"other");
        store.settle(&found.into_iter().map(|(_, spot)| spot).collect::<Vec<_>>()).unwrap();
        assert_eq!((store.bytes(), files(dir.path())), (0, 1), "only the lock is left");
    }

    #[test]
    fn only_one_has_it_open() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let again = Store::open(dir.path(), MAX).err().unwrap();
        assert_eq!(again.kind(), io::ErrorKind::ResourceBusy);
        drop(store);
        open(dir.path());
    }

    #[test]
    fn d3_wherever_a_crash_cuts_the_last_write_everything_before_it_is_there_and_nothing_torn() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        store.put(&group(0..2, b"safe")).unwrap();
        let safe = store.bytes();
        store.put(&group(2..3, b"last")).unwrap();
        drop(store);
        let path = path(dir.path(), 0, "seg");
        let whole = fs::read(&path).unwrap();
        let cut = usize::try_from(safe).unwrap();
        for length in cut..whole.len() {
            // Cut short, or the length written before the bytes.
            for torn in [whole[..length].to_vec(), [&whole[..length], &vec![0; whole.len() - length]].concat()] {
                fs::write(&path, torn).unwrap();
                let (mut store, found) = open(dir.path());
                assert_eq!((ids(&found), store.bytes()), (vec![0, 1], safe), "{length}");
                store.put(&group(9..10, b"next")).unwrap();
                assert_eq!(ids(&open_again(store, dir.path())), [0, 1, 9]);
                fs::remove_file(super::path(dir.path(), 1, "seg")).unwrap();
            }
        }
    }

    #[test]
    fn d3_half_a_mark_that_a_crash_left_hides_none_of_those_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let spots = store.put(&group(0..4, b"image")).unwrap();
        store.settle(&spots[..1]).unwrap();
        drop(store);
        let mut gone = OpenOptions::new().append(true).open(path(dir.path(), 0, "gone")).unwrap();
        gone.write_all(b"hal").unwrap();
        let (mut store, found) = open(dir.path());
        assert_eq!(ids(&found), [1, 2, 3]);
        store.settle(&[found[0].1.clone(), found[1].1.clone()]).unwrap();
        assert_eq!(ids(&open_again(store, dir.path())), [3]);
    }

    #[test]
    fn a_segment_damaged_in_the_middle_keeps_what_can_be_read_and_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let spots = store.put(&group(0..3, b"image")).unwrap();
        store.active = None;
        store.put(&group(3..4, b"image")).unwrap();
        drop(store);
        let path = path(dir.path(), 0, "seg");
        let mut bytes = fs::read(&path).unwrap();
        bytes[spots[1].at as usize + 30] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (mut store, found) = open(dir.path());
        assert_eq!(ids(&found), [0, 3]);
        store.settle(&[found[0].1.clone()]).unwrap();
        assert!(!path.exists() && path.with_extension("damaged").exists());
    }

    #[test]
    fn little_that_is_left_of_a_segment_is_copied_when_space_is_short_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let max = 4 << 20;
        let (mut store, _) = Store::open(dir.path(), max).unwrap();
        let image = vec![7; 40 << 10];
        let (mut kept, mut n) = (Vec::new(), 0);
        // One in ten stays for ever: without copying, each would keep its segment.
        while n < 500 {
            while let Some(number) = store.worn() {
                let (mut worn, rest): (Vec<_>, Vec<_>) = kept.drain(..).partition(|spot: &Spot| spot.segment == number);
                kept = rest;
                let renewed = store.renew(&worn).unwrap();
                worn.drain(..renewed.len());
                kept.extend(renewed.into_iter().chain(worn));
            }
            assert!(store.has_room(image.len() as u64 + 1000), "{n}: {} bytes for {}", store.bytes(), kept.len());
            let spots = store.put(&group(n..n + 10, &image)).unwrap();
            kept.push(spots[0].clone());
            store.settle(&spots[1..]).unwrap();
            assert!(store.bytes() <= max);
            n += 10;
        }
        assert_eq!(store.live_bytes, kept.iter().map(Spot::bytes).sum::<u64>());
        drop(store);
        let (_, found) = Store::open(dir.path(), max).unwrap();
        let mut found = ids(&found);
        found.sort_unstable();
        assert_eq!(found, (0..500).step_by(10).collect::<Vec<_>>());
    }

    #[test]
    fn once_all_is_settled_there_is_room_for_the_largest_frame_however_small_the_spool() {
        for max in [1u64 << 20, 4 << 20, 64 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let (mut store, _) = Store::open(dir.path(), max).unwrap();
            // A group that takes all there is, in one segment.
            let image = vec![7; 10 << 10];
            let many = (max - store.segment_bytes()) / (11 << 10);
            let spots = store.put(&group(0..many, &image)).unwrap();
            assert!(!store.has_room(max / 3));
            store.settle(&spots).unwrap();
            assert!(store.has_room(max / 3), "{} of {max} bytes are left", store.bytes());
        }
    }

    #[test]
    fn a_crash_between_copying_and_removing_leaves_no_frame_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        store.put(&group(0..2, b"image")).unwrap();
        store.active = None;
        store.put(&group(1..3, b"image")).unwrap();
        drop(store);
        let (store, found) = open(dir.path());
        assert_eq!(ids(&found), [0, 1, 2]);
        drop((store, found));
        assert_eq!(ids(&open(dir.path()).1), [0, 1, 2], "and it stays so");
    }
}
