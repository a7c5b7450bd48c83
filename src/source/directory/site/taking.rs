//! Taking: a frame in line is offered to the queue, and on an encode worker read, checked and claimed.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use rustix::io::Errno;
use tokio::time::Instant;

use super::super::claim::{Claim, Root};
use super::super::tree::{self, Look};
use super::super::window::{Key, Waiting};
use super::noticing::{LOOK_AGAIN_MAX, Young};
use super::settling::Held;
use super::{NOTHING, Site, key_of};
use crate::encode::image::{self, Flaw};
use crate::frame::{Frame, SourceKind};
use crate::queue::{Line, Offer, Taken};
use crate::settle::{Disposition, Reason, Receipt, Refusal};

/// A file that could not be read or claimed is tried again after this.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The detector's line in the queue.
pub(super) struct SiteLine {
    pub site: Arc<Site>,
    pub detector: Arc<str>,
}

/// A frame on its way to being taken. Dropped untaken, it goes back in line.
struct Offered {
    site: Arc<Site>,
    detector: Arc<str>,
    waiting: Option<Waiting>,
}

impl Site {
    /// Who is next in `detector`'s line, unless nothing may be taken now.
    fn next(&self, detector: &str) -> Option<Waiting> {
        // Stuck: what is published now could not be settled either, and would pile up beside what cannot be already.
        // Right after one could not be taken, none is: whoever looks after the directory asks again within a second.
        if self.stopping.load(Ordering::SeqCst)
            || self.stuck.load(Ordering::Relaxed) > 0
            || self.put_back.load(Ordering::Relaxed)
        {
            return None;
        }
        self.inner().window.next(detector, Instant::now())
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
        match result {
            Ok(Catch::Whole(claim, look)) => self.frame(offered, &waiting, &claim, look, buffer, None),
            Ok(Catch::Flawed(claim, look, refusal)) => {
                self.frame(offered, &waiting, &claim, look, buffer, Some(refusal))
            }
            Ok(Catch::NotYet(look)) => {
                self.metrics.counter("partial_waits_total", &[]).increment(1);
                self.back_to_young(offered, &waiting, look, None);
                Taken::Gone
            }
            Ok(Catch::Vanished) => {
                self.vanished(offered, &waiting);
                Taken::Gone
            }
            Ok(Catch::Refused(look, reason)) => {
                self.refuse(&mut self.inner(), &waiting.key, &look, reason);
                self.vanished(offered, &waiting);
                Taken::Gone
            }
            Ok(Catch::Stuck(claim, error)) => {
                self.metrics.counter("settle_errors_total", &[("operation", "claim")]).increment(1);
                self.hold(&trouble(&error));
                let mut inner = self.inner();
                if inner.window.forget(&waiting.key) {
                    self.look_again(&mut inner, &waiting.key);
                }
                drop(inner);
                // Back in line when `offered` is dropped.
                offered.waiting = Some(Waiting { key: key_of(&claim), claim: Some(claim), ..waiting });
                Taken::Gone
            }
            Err(error) => {
                self.metrics.counter("settle_errors_total", &[("operation", "claim")]).increment(1);
                self.hold(&trouble(&error));
                let look = Look { size: waiting.size, mtime: waiting.mtime, ..NOTHING };
                // A claim goes back in line as it is: there is nothing in its old place to look at.
                if offered.waiting.as_ref().is_some_and(|waiting| waiting.claim.is_none()) {
                    self.back_to_young(offered, &waiting, look, Some(RETRY_AFTER));
                }
                Taken::Gone
            }
        }
    }

    fn take_file(&self, root: &Arc<Root>, waiting: &Waiting, buffer: &mut Vec<u8>) -> io::Result<Catch> {
        let key = &waiting.key;
        let dir = match tree::open_below(root.fd.as_fd(), &key.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        let look = match tree::look(&dir, &key.name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
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
            other => other?,
        };
        if !read {
            return Ok(Catch::NotYet(look));
        }
        let flaw = image::inspect(buffer).err();
        if flaw.as_ref().is_some_and(|flaw| !self.is_final(flaw, &look, waiting)) {
            return Ok(Catch::NotYet(look));
        }
        let Some(claim) = root.claim(dir.as_fd(), &key.dir, &key.name)? else { return Ok(Catch::Vanished) };
        // From here on it is not at its place any more: trouble must not lose the claim.
        let caught = self.catch(claim.clone(), &look, flaw, waiting, buffer);
        Ok(caught.unwrap_or_else(|error| Catch::Stuck(claim, error)))
    }

    /// What was read has just been claimed: is it still the same?
    fn catch(
        &self,
        claim: Claim,
        read: &Look,
        flaw: Option<Flaw>,
        waiting: &Waiting,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Catch> {
        let (place, name) = claim.place(false)?;
        let claimed = tree::look(&place, &name)?;
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
    fn take_claimed(&self, claim: Claim, waiting: &Waiting, buffer: &mut Vec<u8>) -> io::Result<Catch> {
        let (place, name) = match claim.place(false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        let look = match tree::look(&place, &name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Catch::Vanished),
            other => other?,
        };
        if let Some(reason) = self.unfit(&look) {
            // A race put something else into our hands: it goes back where it was.
            claim.put_back()?;
            return Ok(Catch::Refused(look, reason));
        }
        let whole = read(place.as_fd(), &name, &look, buffer)?;
        match (whole, image::inspect(buffer)) {
            (true, Ok(_)) => Ok(Catch::Whole(claim, look)),
            (true, Err(flaw)) if waiting.claim.is_some() && self.is_final(&flaw, &look, waiting) => {
                Ok(Catch::Flawed(claim, look, refusal(&flaw)))
            }
            (_, _) => {
                // Somebody is writing it: it goes back to him.
                if claim.put_back()? {
                    return Ok(Catch::NotYet(look));
                }
                Ok(Catch::Flawed(claim, look, refusal(&Flaw::Truncated("rewritten while it was taken"))))
            }
        }
    }

    /// Whether nobody is going to mend it any more.
    fn is_final(&self, flaw: &Flaw, look: &Look, waiting: &Waiting) -> bool {
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        unchanged
            && match flaw {
                Flaw::Unsupported(_) => waiting.settled,
                Flaw::Truncated(_) => waiting.still_since.elapsed() >= self.entry.directory.partial_timeout,
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
        offered.waiting = None;
        let mut inner = self.inner();
        let again = inner.window.forget(&waiting.key);
        let detector = self.register(&mut inner, &offered.detector).detector.clone();
        if again {
            self.look_again(&mut inner, &waiting.key);
        }
        drop(inner);
        let age = Duration::try_from(now.duration_since(detect_time)).unwrap_or_default();
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

    fn vanished(&self, offered: &mut Offered, waiting: &Waiting) {
        offered.waiting = None;
        let mut inner = self.inner();
        if let Some(line) = inner.lines.get(&offered.detector) {
            line.dropped("vanished");
        }
        if inner.window.forget(&waiting.key) {
            self.look_again(&mut inner, &waiting.key);
        }
        drop(inner);
        self.done();
    }

    /// Not complete, or in trouble: looked at again later.
    fn back_to_young(&self, offered: &mut Offered, waiting: &Waiting, look: Look, after: Option<Duration>) {
        offered.waiting = None;
        let now = Instant::now();
        let unchanged = (look.size, look.mtime) == (waiting.size, waiting.mtime);
        let since = if unchanged { waiting.still_since } else { now };
        let quiet = self.entry.directory.quiet;
        // A file that has been still for long is looked at more and more rarely, and once at the time-out.
        let pause = after.unwrap_or_else(|| (now - since).clamp(quiet, LOOK_AGAIN_MAX.max(quiet)));
        let mut due = now + pause;
        let end = since + self.entry.directory.partial_timeout;
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
            looks: 1,
            counted: true,
            settled: waiting.settled && unchanged,
            noticed: waiting.noticed,
            received_at: waiting.received_at,
        };
        // A claim has been put back in its place.
        let key = match &waiting.claim {
            Some(claim) => Key { dir: claim.dir.clone(), name: claim.name.clone() },
            None => waiting.key.clone(),
        };
        if inner.young.insert(key, young).is_some_and(|before| before.counted)
            && let Some(line) = inner.lines.get(&offered.detector)
        {
            // Its place was free: the one that was waited for there is gone.
            line.dropped("vanished");
        }
        drop(inner);
        self.changed.notify_one();
        self.done();
    }
}

/// What taking a file came to.
enum Catch {
    Whole(Claim, Look),
    Flawed(Claim, Look, Refusal),
    NotYet(Look),
    Vanished,
    Refused(Look, &'static str),
    /// Claimed, and then something went wrong.
    Stuck(Claim, io::Error),
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
        let mut offered = Offered { site: self.site.clone(), detector: self.detector.clone(), waiting: Some(waiting) };
        Some(Offer { image_bytes, take: Box::new(move |buffer| self::take(&mut offered, buffer)) })
    }
}

fn take(offered: &mut Offered, buffer: &mut Vec<u8>) -> Taken {
    let site = offered.site.clone();
    site.take(offered, buffer)
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            let mut inner = self.site.inner();
            inner.window.put_back(&self.detector, waiting);
            drop(inner);
            self.site.put_back.store(true, Ordering::Relaxed);
            self.site.done();
        }
    }
}

/// `false`: it changed while it was read.
fn read(dir: BorrowedFd<'_>, name: &[u8], look: &Look, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let file = tree::open_file(dir, name)?;
    let before = tree::look_at(&file)?;
    if !before.same_content(look) {
        return Ok(false);
    }
    buffer.reserve(usize::try_from(look.size).unwrap_or(0) + 1);
    let mut file = std::fs::File::from(file);
    // One byte more than there should be: a file that grew is noticed without another call.
    (&mut file).take(look.size + 1).read_to_end(buffer)?;
    Ok(buffer.len() as u64 == look.size && tree::look_at(&file)?.same_content(look))
}

fn refusal(flaw: &Flaw) -> Refusal {
    let (reason, message) = match flaw {
        Flaw::Truncated(why) => (Reason::Truncated, why),
        Flaw::Unsupported(why) => (Reason::Unsupported, why),
    };
    Refusal { reason, status: None, message: (*message).to_owned(), attempts: 0 }
}

fn trouble(error: &io::Error) -> String {
    let what = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ROFS) => "the file system is read-only; nothing is taken until it can be written",
        Some(Errno::ACCESS | Errno::PERM) => {
            "files cannot be taken from it; make the service's user the owner of the directory"
        }
        Some(Errno::NOSPC | Errno::DQUOT) => "its file system is full",
        Some(Errno::MFILE | Errno::NFILE) => "no file descriptors are left; raise LimitNOFILE",
        Some(_) | None => "files cannot be taken from it",
    };
    format!("{what} ({error})")
}
