//! Taking: a frame in line is offered to the queue, and on an encode worker read, checked and claimed.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use rustix::buffer::spare_capacity;
use rustix::fs::FileType;
use rustix::io::Errno;
use tokio::time::Instant;

use super::super::claim::{Claim, Root};
use super::super::tree::{self, Look};
use super::super::window::{Key, Waiting};
use super::noticing::{LOOK_AGAIN_MAX, YOUNG_MAX, Young};
use super::settling::Held;
use super::trouble::{advice, concerns_all};
use super::{NOTHING, Registered, Site, key_of};
use crate::encode::image::{self, Flaw};
use crate::frame::{Frame, SourceKind};
use crate::queue::{Line, Offer, Taken};
use crate::settle::{Disposition, Reason, Receipt, Refusal};

/// A file that could not be read or claimed is tried again after this.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Trouble with taking is over when no file has met it for this long: longer than any waits between two tries.
const TROUBLE_LASTS: Duration = Duration::from_secs(8);

/// One that gave trouble, a claim as a rule, and when it goes back in line.
pub(super) struct Later {
    pub due: Instant,
    pub detector: Arc<str>,
    pub waiting: Waiting,
}

/// The detector's line in the queue.
pub(super) struct SiteLine {
    pub site: Arc<Site>,
    pub detector: Arc<str>,
}

/// A frame on its way to being taken. Dropped untaken, it goes back in line; after a panic, behind the others.
struct Offered {
    site: Arc<Site>,
    detector: Arc<str>,
    /// Gone once something else has become of it.
    waiting: Option<Waiting>,
    /// Whoever settles it counts it as done.
    handed_on: bool,
}

impl Site {
    /// Who is next in `detector`'s line, unless nothing may be taken now.
    fn next(&self, detector: &Arc<str>) -> Option<Waiting> {
        // Stuck: what is published now could not be settled either, and would pile up beside what cannot be already.
        // Right after one could not be taken, none is: whoever looks after the directory asks again within a second.
        if self.stopping.load(Ordering::SeqCst)
            || self.stuck.load(Ordering::Relaxed) > 0
            || self.put_back.load(Ordering::Relaxed)
            || self.waits_for_settler()
        {
            return None;
        }
        self.inner().next(detector)
    }

    /// Runs on an encode worker: reads, checks, claims.
    fn take(self: &Arc<Self>, offered: &mut Offered, buffer: &mut Vec<u8>) -> Taken {
        let Some(waiting) = offered.waiting.clone() else { return Taken::Gone };
        let Some(root) = self.root.load_full() else {
            // Held: back in line, until the directory is there again.
            return Taken::Gone;
        };
        let result = match &waiting.claim {
            Some(claim) => self.take_claimed(claim.clone(), &waiting, buffer),
            None => self.take_file(&root, &waiting, buffer),
        };
        if let Ok(Catch::Whole(claim, _) | Catch::Flawed(claim, ..)) = &result {
            self.claimed(offered, &waiting, claim);
        }
        match result {
            Ok(Catch::Whole(claim, look)) => return self.frame(offered, &waiting, &claim, look, buffer, None),
            Ok(Catch::Flawed(claim, look, refusal)) => {
                return self.frame(offered, &waiting, &claim, look, buffer, Some(refusal));
            }
            Ok(Catch::NotYet(look)) => {
                self.metrics.counter("partial_waits_total", &[]).increment(1);
                self.back_to_young(offered, &waiting, look, None);
            }
            Ok(Catch::Vanished) => self.gone(offered, &waiting, |line| line.dropped("vanished")),
            Ok(Catch::Refused(look, reason)) => {
                self.refuse(&mut self.inner(), &place(&waiting), &look, reason);
                if look.kind == FileType::RegularFile {
                    self.gone(offered, &waiting, |line| line.returned(1));
                } else {
                    self.gone(offered, &waiting, |line| line.dropped("vanished"));
                }
            }
            Ok(Catch::Caught(claim, look, reason)) => {
                self.refuse(&mut self.inner(), &place(&waiting), &look, reason);
                self.later(offered, &waiting, claim);
            }
            Err(failure) => self.failed(offered, &waiting, failure),
        }
        Taken::Gone
    }

    /// Something went wrong: said, counted and tried again; only what every file would meet delays the others.
    fn failed(&self, offered: &mut Offered, waiting: &Waiting, Failure { step, error, claim }: Failure) {
        self.metrics.counter("settle_errors_total", &[("operation", step.as_str())]).increment(1);
        if concerns_all(&error) {
            self.taking_trouble(advice(&error), TROUBLE_LASTS);
            if let Some(claim) = claim {
                self.claimed(offered, waiting, &claim);
            }
            // Back in line when `offered` is dropped.
            return;
        }
        match step {
            Step::Claim => self.taking_trouble(advice(&error), TROUBLE_LASTS),
            Step::Read => {
                let key = place(waiting);
                let file = tree::join(&key.dir, &key.name);
                let (path, file) = (&self.config.path, std::ffi::OsStr::from_bytes(&file));
                tracing::warn!(detector = %offered.detector, ?path, ?file, %error, "a file cannot be read; it is tried again");
            }
        }
        if let Some(claim) = claim {
            return self.later(offered, waiting, claim);
        }
        let look = Look { size: waiting.size, mtime: waiting.mtime, ..NOTHING };
        self.back_to_young(offered, waiting, look, Some(pause(waiting)));
    }

    /// From now on it goes back in line as a claim: nobody would find it where it lay.
    fn claimed(&self, offered: &mut Offered, waiting: &Waiting, claim: &Claim) {
        if waiting.claim.is_none() {
            offered.waiting = Some(Waiting { key: key_of(claim), claim: Some(claim.clone()), ..waiting.clone() });
            self.forget(&waiting.key);
        }
    }

    fn take_file(&self, root: &Arc<Root>, waiting: &Waiting, buffer: &mut Vec<u8>) -> Result<Catch, Failure> {
        let key = &waiting.key;
        let reading = |error| Failure { step: Step::Read, error, claim: None };
        let dir = match tree::reach_below(root.fd.as_fd(), &key.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other.map_err(reading)?,
        };
        let look = match tree::look(&dir, &key.name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other.map_err(reading)?,
        };
        if let Some(reason) = self.unfit(&look) {
            return Ok(Catch::Refused(look, reason));
        }
        let read = match read(dir.as_fd(), &key.name, &look, buffer) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Ok(Catch::Refused(look, "unreadable"));
            }
            // Another took its place since: a symbolic link, a socket.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::LOOP | Errno::NXIO)) => {
                return Ok(Catch::NotYet(look));
            }
            other => other.map_err(reading)?,
        };
        if !read {
            return Ok(Catch::NotYet(look));
        }
        let flaw = image::inspect(buffer).err();
        if flaw.as_ref().is_some_and(|flaw| !self.is_final(flaw, &look, waiting)) {
            return Ok(Catch::NotYet(look));
        }
        let claimed = root.claim(dir.as_fd(), &key.dir, &key.name);
        match claimed.map_err(|error| Failure { step: Step::Claim, error, claim: None })? {
            Some(claim) => self.catch(claim, &look, flaw, waiting, buffer),
            None => Ok(Catch::Vanished),
        }
    }

    /// What was read has just been claimed: is it still the same?
    fn catch(
        &self,
        claim: Claim,
        read: &Look,
        flaw: Option<Flaw>,
        waiting: &Waiting,
        buffer: &mut Vec<u8>,
    ) -> Result<Catch, Failure> {
        let claimed = match claim.place().and_then(|(place, name)| tree::look(&place, &name)) {
            Ok(claimed) => claimed,
            // It is not at its place any more: trouble must not lose the claim.
            Err(error) => return Err(Failure { step: Step::Claim, error, claim: Some(claim) }),
        };
        if claimed.same_content(read) {
            return Ok(match flaw {
                None => Catch::Whole(claim, claimed),
                Some(flaw) => Catch::Flawed(claim, claimed, refusal(&flaw)),
            });
        }
        // Rewritten between reading and claiming: what we have is the newer one.
        buffer.clear();
        self.take_claimed(claim, waiting, buffer)
    }

    /// What is ours already: nobody else changes it but a writer that still holds it open.
    fn take_claimed(&self, claim: Claim, waiting: &Waiting, buffer: &mut Vec<u8>) -> Result<Catch, Failure> {
        let reading = |error| Failure { step: Step::Read, error, claim: Some(claim.clone()) };
        let (place, name) = match claim.place() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other.map_err(reading)?,
        };
        let look = match tree::look(&place, &name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other.map_err(reading)?,
        };
        if let Some(reason) = self.unfit(&look) {
            // A race put something else into our hands.
            return give_up(claim, look, reason);
        }
        let whole = match read(place.as_fd(), &name, &look, buffer) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return give_up(claim, look, "unreadable"),
            other => other.map_err(reading)?,
        };
        match (whole, image::inspect(buffer)) {
            (true, Ok(_)) => Ok(Catch::Whole(claim, look)),
            (true, Err(flaw)) if waiting.claim.is_some() && self.is_final(&flaw, &look, waiting) => {
                Ok(Catch::Flawed(claim, look, refusal(&flaw)))
            }
            // Somebody is writing it: it goes back to him.
            (_, _) => match claim.put_back() {
                Ok(true) => Ok(Catch::NotYet(look)),
                Ok(false) => {
                    let flaw = Flaw::Truncated("rewritten while it was taken");
                    Ok(Catch::Flawed(claim, look, refusal(&flaw)))
                }
                Err(error) => Err(Failure { step: Step::Claim, error, claim: Some(claim) }),
            },
        }
    }

    /// Whether nobody is going to mend it any more.
    fn is_final(&self, flaw: &Flaw, look: &Look, waiting: &Waiting) -> bool {
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        unchanged
            && match flaw {
                Flaw::Unsupported(_) => waiting.settled,
                Flaw::Truncated(_) => waiting.still_since.elapsed() >= self.config.partial_timeout,
            }
    }

    fn frame(
        self: &Arc<Self>,
        offered: &mut Offered,
        waiting: &Waiting,
        claim: &Claim,
        look: Look,
        buffer: &[u8],
        refusal: Option<Refusal>,
    ) -> Taken {
        let now = Timestamp::now();
        let (detect_time, corrected) = self.finder.find(&claim.name, buffer, look.mtime, waiting.received_at, now);
        if corrected {
            self.metrics.counter("detect_times_corrected_total", &[]).increment(1);
        }
        let held = Held {
            claim: claim.clone(),
            detector: offered.detector.clone(),
            look,
            noticed: waiting.noticed,
            received_at: waiting.received_at,
        };
        let detector = {
            let mut inner = self.inner();
            // Nothing is left of it but the claim; one of a file has been forgotten by its place.
            inner.window.forget(&key_of(claim));
            self.register(&mut inner, &offered.detector).detector.clone()
        };
        let age = Duration::try_from(now.duration_since(detect_time)).unwrap_or_default();
        offered.waiting = None;
        offered.handed_on = true;
        if refusal.is_none() && !self.entry.max_age.is_zero() && age > self.entry.max_age {
            self.tell(held, Disposition::Dropped);
            return Taken::Gone;
        }
        let frame = Frame {
            id: claim.id.clone(),
            detector,
            detect_time,
            received_at: waiting.received_at,
            noticed: waiting.noticed,
            source: SourceKind::Directory,
            original_name: std::ffi::OsStr::from_bytes(&tree::join(&claim.dir, &claim.name)).to_owned(),
            image_bytes: look.size,
        };
        let site = self.clone();
        let receipt = Receipt::new(move |disposition| site.tell(held, disposition));
        match refusal {
            None => Taken::Frame(frame, receipt),
            Some(refusal) => Taken::Flawed(frame, receipt, refusal),
        }
    }

    /// It is not in line any more, and counted so.
    fn gone(&self, offered: &mut Offered, waiting: &Waiting, count: impl FnOnce(&Registered)) {
        if let Some(line) = self.inner().lines.get(&offered.detector) {
            count(line);
        }
        self.forget(&waiting.key);
        offered.waiting = None;
    }

    /// A taken one is not in line any more; what came to its place meanwhile is looked at.
    fn forget(&self, key: &Key) {
        let mut inner = self.inner();
        if inner.window.forget(key) {
            self.look_again(&mut inner, key);
        }
    }

    /// A claim that gives trouble goes back in line later, behind those that give none.
    fn later(&self, offered: &mut Offered, waiting: &Waiting, claim: Claim) {
        self.forget(&waiting.key);
        let waiting = Waiting { key: key_of(&claim), claim: Some(claim), ..waiting.clone() };
        self.put_behind(&offered.detector, waiting);
        offered.waiting = None;
    }

    fn put_behind(&self, detector: &Arc<str>, waiting: Waiting) {
        let due = Instant::now() + pause(&waiting);
        self.inner().later.push(Later { due, detector: detector.clone(), waiting });
        self.changed.notify_one();
    }

    /// Not complete, or in trouble: looked at again later.
    fn back_to_young(&self, offered: &mut Offered, waiting: &Waiting, look: Look, after: Option<Duration>) {
        let now = Instant::now();
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        let since = if unchanged { waiting.still_since } else { now };
        let quiet = self.config.quiet;
        // A file that has been still for long is looked at more and more rarely, and once at the time-out.
        let pause = after.unwrap_or_else(|| (now - since).clamp(quiet, LOOK_AGAIN_MAX.max(quiet)));
        let mut due = now + pause;
        let end = since + self.config.partial_timeout;
        if after.is_none() && end > now {
            due = due.min(end);
        }
        let mut inner = self.inner();
        let again = inner.window.forget(&waiting.key);
        let young = Young {
            size: look.size,
            mtime: look.mtime,
            since,
            due: if again { now } else { due },
            counted: true,
            settled: waiting.settled && unchanged,
            noticed: waiting.noticed,
            received_at: waiting.received_at,
        };
        // A claim has been put back there.
        let key = place(waiting);
        if inner.young.len() >= YOUNG_MAX && !inner.young.contains_key(&key) {
            // As if it had gone out of the window: the next scan finds it.
            *inner.beyond.entry(offered.detector.clone()).or_default() += 1;
            *inner.doubtful.entry(offered.detector.clone()).or_default() += 1;
        } else if inner.young.insert(key, young).is_some_and(|before| before.counted)
            && let Some(line) = inner.lines.get(&offered.detector)
        {
            // Its place was free: the one that was waited for there is gone.
            line.dropped("vanished");
        }
        drop(inner);
        offered.waiting = None;
        self.changed.notify_one();
    }
}

/// What taking a file came to.
enum Catch {
    Whole(Claim, Look),
    Flawed(Claim, Look, Refusal),
    /// Its writer is not done, and it is in its place.
    NotYet(Look),
    Vanished,
    /// Never to be taken, and in its place.
    Refused(Look, &'static str),
    /// The same, but in our hands: there is something else in its place.
    Caught(Claim, Look, &'static str),
}

/// What went wrong with one file; where there is a `claim`, it is ours by now.
struct Failure {
    step: Step,
    error: io::Error,
    claim: Option<Claim>,
}

#[derive(Clone, Copy)]
enum Step {
    Read,
    Claim,
}

impl Step {
    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Claim => "claim",
        }
    }
}

impl Line for SiteLine {
    fn next(&self) -> Option<Offer> {
        // Counted first and looked second, and the other way round where a stop waits for the count: one sees the other.
        self.site.outstanding.fetch_add(1, Ordering::SeqCst);
        let Some(waiting) = self.site.next(&self.detector) else {
            self.site.done();
            return None;
        };
        let image_bytes = waiting.size;
        let mut offered = Offered {
            site: self.site.clone(),
            detector: self.detector.clone(),
            waiting: Some(waiting),
            handed_on: false,
        };
        Some(Offer { image_bytes, take: Box::new(move |buffer| self::take(&mut offered, buffer)) })
    }
}

fn take(offered: &mut Offered, buffer: &mut Vec<u8>) -> Taken {
    let site = offered.site.clone();
    site.take(offered, buffer)
}

impl Drop for Offered {
    fn drop(&mut self) {
        match self.waiting.take() {
            // A bug, which it would meet again at once.
            Some(waiting) if std::thread::panicking() => self.site.put_behind(&self.detector, waiting),
            Some(waiting) => {
                self.site.inner().window.put_back(&self.detector, waiting);
                self.site.put_back.store(true, Ordering::Relaxed);
            }
            None => {}
        }
        if !self.handed_on {
            self.site.done();
        }
    }
}

/// `false`: it changed while it was read.
fn read(dir: BorrowedFd<'_>, name: &[u8], look: &Look, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let file = tree::open_file(dir, name)?;
    if !tree::look_at(&file)?.same_content(look) {
        return Ok(false);
    }
    // One byte more than there should be: the call that reads the file also tells whether it has grown.
    buffer.reserve(usize::try_from(look.size).unwrap_or(0) + 1);
    loop {
        let n = rustix::io::retry_on_intr(|| rustix::io::read(&file, spare_capacity(buffer)))?;
        if n == 0 || buffer.len() as u64 >= look.size {
            break;
        }
    }
    Ok(buffer.len() as u64 == look.size && tree::look_at(&file)?.same_content(look))
}

fn refusal(flaw: &Flaw) -> Refusal {
    let (reason, message) = match flaw {
        Flaw::Truncated(why) => (Reason::Truncated, why),
        Flaw::Unsupported(why) => (Reason::Unsupported, why),
    };
    Refusal { reason, status: None, message: (*message).to_owned(), attempts: 0 }
}

/// What is never taken goes back where it was.
fn give_up(claim: Claim, look: Look, reason: &'static str) -> Result<Catch, Failure> {
    match claim.put_back() {
        Ok(true) => Ok(Catch::Refused(look, reason)),
        // It would wait for ever as if it were a frame.
        Ok(false) if look.kind != FileType::RegularFile && claim.put_aside().is_ok_and(|gone| gone) => {
            Ok(Catch::Refused(look, reason))
        }
        Ok(false) => Ok(Catch::Caught(claim, look, reason)),
        Err(error) => Err(Failure { step: Step::Claim, error, claim: Some(claim) }),
    }
}

/// Where it lies, or lay before it was claimed.
fn place(waiting: &Waiting) -> Key {
    match &waiting.claim {
        Some(claim) => Key { dir: claim.dir.clone(), name: claim.name.clone() },
        None => waiting.key.clone(),
    }
}

/// How long one that gave trouble waits: the longer it has, the more rarely it is tried.
fn pause(waiting: &Waiting) -> Duration {
    waiting.noticed.elapsed().clamp(RETRY_AFTER, LOOK_AGAIN_MAX)
}
