//! Settling: what became of a claimed frame is carried out, and in the end everything left is given back.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::time::Instant;

use super::super::claim::{Claim, Root};
use super::super::tree::{self, Look};
use super::super::window::Waiting;
use super::super::{AfterPublish, archive};
use super::taking::Later;
use super::{Inner, Site, UNSETTLED_MAX, key_of};
use crate::settle::Disposition;

/// What became of a frame that we had claimed.
pub(in crate::source::directory) struct Settled {
    pub held: Held,
    pub disposition: Disposition,
    /// Not pending any more, although the file may still be there.
    counted: bool,
}

/// A claimed frame in the pipeline's hands.
pub(in crate::source::directory) struct Held {
    pub claim: Claim,
    pub detector: Arc<str>,
    pub(super) look: Look,
    pub(super) noticed: Instant,
    pub(super) received_at: Timestamp,
}

/// What sources could not settle before they ended, for those that follow them in this process: nobody else adopts the
/// claims, so none is published again, and a reload that mends the cause settles them.
#[derive(Clone, Default)]
pub(in crate::source::directory) struct Unsettled(Arc<Mutex<Vec<Settled>>>);

impl Unsettled {
    /// Keeps these until somebody serves their directory, or the process ends.
    pub(in crate::source::directory) fn leave(&self, stuck: Vec<Settled>) {
        self.all().extend(stuck);
    }

    /// Those whose claims lie in this drop directory: the caller's from now on.
    pub(in crate::source::directory) fn take(&self, root: &Root) -> Vec<Settled> {
        let here = |settled: &mut Settled| {
            let its = &settled.held.claim.root;
            (its.dev, its.ino) == (root.dev, root.ino)
        };
        self.all().extract_if(.., here).collect()
    }

    fn all(&self) -> MutexGuard<'_, Vec<Settled>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Site {
    /// Where published files go, if they are not removed.
    pub(in crate::source::directory) fn archive(&self) -> Option<&Path> {
        self.config.archive.as_deref().filter(|_| self.config.after_publish == AfterPublish::Archive)
    }

    /// Hands on what became of a frame.
    pub(super) fn tell(self: &Arc<Self>, held: Held, disposition: Disposition) {
        self.unsettled.fetch_add(1, Ordering::SeqCst);
        self.settler.put(self.clone(), Settled { held, disposition, counted: false });
    }

    /// Carries it out, or keeps it for those that are tried again: never published again while this process lives.
    pub(in crate::source::directory) fn settle_or_keep(self: &Arc<Self>, settled: Settled) {
        if let Some(stuck) = self.try_to_settle(settled) {
            self.stuck.fetch_add(1, Ordering::Relaxed);
            self.kept().push(stuck);
            self.keeps_more.notify_one();
        }
    }

    /// The settler has no more to do with one of the frames that it was told of.
    pub(in crate::source::directory) fn done_settling(&self) {
        let left = self.unsettled.fetch_sub(1, Ordering::SeqCst) - 1;
        if left == UNSETTLED_MAX / 2 {
            self.go_on();
        }
        self.done();
    }

    /// Whether nothing is to be taken until the settler has caught up.
    pub(super) fn waits_for_settler(&self) -> bool {
        let waits = self.unsettled.load(Ordering::SeqCst) >= UNSETTLED_MAX;
        if waits {
            self.awaits_settler.store(true, Ordering::SeqCst);
        }
        waits
    }

    /// Lines that waited for the settler have something again. Call it also every second or so: it may have caught up between the
    /// look at its count and the note that somebody waits.
    pub(in crate::source::directory) fn go_on(&self) {
        if self.awaits_settler.swap(false, Ordering::SeqCst) {
            self.nudge();
        }
    }

    /// What was kept since the last call.
    pub(in crate::source::directory) fn take_kept(&self) -> Vec<Settled> {
        std::mem::take(&mut *self.kept())
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Settled>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries it out. Else says what is wrong, and gives back what is to be tried again.
    pub(in crate::source::directory) fn try_to_settle(self: &Arc<Self>, mut settled: Settled) -> Option<Settled> {
        let error = self.settle(&mut settled).err()?;
        self.metrics.counter("settle_errors_total", &[("operation", "remove")]).increment(1);
        let what = "settled files cannot be removed or archived";
        self.settling_trouble(Some(format!("{what} ({error}); no more are taken until they are")));
        Some(settled)
    }

    /// Carries out one disposition. An error: try again later.
    fn settle(self: &Arc<Self>, settled: &mut Settled) -> io::Result<()> {
        if !settled.counted {
            self.count(settled);
            settled.counted = true;
        }
        let held = &settled.held;
        match settled.disposition {
            Disposition::Accepted => {
                if self.rewritten(held)? {
                    return Ok(());
                }
                match self.archive() {
                    Some(archive) => archive::keep(archive, &held.claim)?,
                    None => held.claim.remove()?,
                }
            }
            Disposition::Rejected => {
                if self.rewritten(held)? {
                    return Ok(());
                }
                held.claim.remove()?;
            }
            Disposition::Dropped => held.claim.remove()?,
            Disposition::Released => self.release(held),
        }
        Ok(())
    }

    /// The pipeline has counted what it published and dead-lettered; here it stops being pending for this source.
    fn count(&self, settled: &Settled) {
        let inner = self.inner();
        let Some(line) = inner.lines.get(&settled.held.detector) else { return };
        match settled.disposition {
            Disposition::Accepted | Disposition::Rejected => {
                line.pending.fetch_sub(1, Ordering::Relaxed);
            }
            Disposition::Dropped => line.dropped("max-age"),
            // In its place, somebody else may count it from now on.
            Disposition::Released if self.stopping.load(Ordering::SeqCst) => line.returned(1),
            Disposition::Released => {}
        }
    }

    /// A writer that still held the file has changed it since it was read: that is another frame.
    fn rewritten(self: &Arc<Self>, held: &Held) -> io::Result<bool> {
        let look = match held.claim.place().and_then(|(place, name)| tree::look(&place, &name)) {
            Ok(look) => look,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if look.same_content(&held.look) {
            return Ok(false);
        }
        let claim = held.claim.renew()?;
        // Its writer may be in the middle of it.
        self.add_claim(&mut self.inner(), &held.detector, claim, look, false);
        Ok(true)
    }

    fn release(self: &Arc<Self>, held: &Held) {
        if self.stopping.load(Ordering::SeqCst) {
            put_back(&held.claim);
            return;
        }
        let mut inner = self.inner();
        let waiting = Waiting {
            key: key_of(&held.claim),
            size: held.look.size,
            mtime: held.look.mtime,
            noticed: held.noticed,
            received_at: held.received_at,
            still_since: held.noticed,
            settled: true,
            claim: Some(held.claim.clone()),
        };
        inner.window.put_back(&held.detector, waiting);
        if let Some(line) = inner.lines.get(&held.detector) {
            line.ready.ready();
        }
    }

    /// The drop directory is gone or another: what stood in line by its place there does not any more. It is returned:
    /// nobody knows that it is lost, and should the directory come back, it is received again.
    pub(in crate::source::directory) fn forget_all(&self) {
        let inner = &mut *self.inner();
        let later = inner.later.extract_if(.., |it| it.waiting.claim.is_none());
        let mut returned: HashMap<Arc<str>, i64> = std::mem::take(&mut inner.beyond);
        for Later { detector, waiting, .. } in later {
            inner.window.forget(&waiting.key);
            *returned.entry(detector).or_default() += 1;
        }
        for (detector, waiting) in inner.window.drain() {
            if waiting.claim.is_some() {
                inner.window.put_back(&detector, waiting);
            } else {
                *returned.entry(detector).or_default() += 1;
            }
        }
        self.return_young(inner, &mut returned);
        inner.refused.clear();
        count_returned(inner, returned);
    }

    /// Nothing more is taken: what waits in line is returned, and only what is in hand is still pending here. A claim
    /// goes back to its place.
    pub(in crate::source::directory) fn return_waiting(&self) {
        let mut inner = self.inner();
        let later = std::mem::take(&mut inner.later).into_iter().map(|it| (it.detector, it.waiting));
        let mut returned: HashMap<Arc<str>, i64> = std::mem::take(&mut inner.beyond);
        for (detector, waiting) in inner.window.drain().into_iter().chain(later) {
            if let Some(claim) = &waiting.claim {
                put_back(claim);
            }
            *returned.entry(detector).or_default() += 1;
        }
        self.return_young(&mut inner, &mut returned);
        count_returned(&inner, returned);
    }

    fn return_young(&self, inner: &mut Inner, returned: &mut HashMap<Arc<str>, i64>) {
        for (key, young) in std::mem::take(&mut inner.young) {
            if young.counted
                && let Some(detector) = self.detector_of(inner, &key.dir)
            {
                *returned.entry(detector).or_default() += 1;
            }
        }
    }

    /// The end of this source: all that it still counts is returned.
    pub(in crate::source::directory) fn give_back(&self) {
        self.return_waiting();
        let mut inner = self.inner();
        for line in inner.lines.values() {
            let pending = line.pending.load(Ordering::Relaxed);
            if pending > 0 {
                line.returned(pending.unsigned_abs());
            }
            line.metrics.left();
        }
        // Ends the lines, which hold this site.
        inner.lines.clear();
    }
}

fn count_returned(inner: &Inner, returned: HashMap<Arc<str>, i64>) {
    for (detector, n) in returned {
        if let Some(line) = inner.lines.get(&detector) {
            line.returned(u64::try_from(n).unwrap_or(0));
        }
    }
}

fn put_back(claim: &Claim) {
    match claim.put_back() {
        Ok(true) => {}
        Ok(false) => tracing::debug!(id = %claim.id, "a claim stays for the next start: its place is taken"),
        Err(error) => tracing::debug!(id = %claim.id, %error, "a claim stays for the next start"),
    }
}
