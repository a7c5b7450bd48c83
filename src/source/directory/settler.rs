//! The settler: carries out what became of claimed frames, for all drop directories together, so that one thread is woken for
//! what many detectors have settled at the same time. File systems wait for each other no more than their threads do: each
//! has jobs of its own, and so has each archive, which may be on another: one that hangs keeps only its own frames.
//!
//! Not here: what settling is (`site`), and what is tried again (`directory::settle_again`).

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::site::{Settled, Site};

/// Frames of one job.
const BATCH: usize = 256;
/// While a place's jobs are at work, so many frames are worth another one: removing takes long there.
const WORTH_A_JOB: usize = 16;
/// Jobs of one place at once.
const JOBS_MAX: usize = 8;
/// Jobs beyond the first of each place, all together: a box may have an archive for each detector, all of them on one server, and
/// the threads of those that hang are gone for everything else that blocks.
const MORE_JOBS_MAX: usize = 16;

/// Where sites put what is to be settled.
#[derive(Clone)]
pub(super) struct Settler(mpsc::UnboundedSender<Settling>);

/// What sites have put there, for [`run`].
pub(super) struct Inbox(mpsc::UnboundedReceiver<Settling>);

/// A frame to settle. When it is dropped, its site has one less in hand: that is all it can do for one that nobody settles,
/// whose claim the next start finds.
struct Settling {
    site: Arc<Site>,
    /// Gone once it is settled, or stuck.
    settled: Option<Settled>,
}

/// What frames wait for together when they are settled.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Place {
    /// The file system that they lie on.
    device: u64,
    archive: Option<PathBuf>,
}

/// What is to be done in one place.
#[derive(Default)]
struct Work {
    waiting: VecDeque<Settling>,
    jobs: usize,
}

/// The two ends.
pub(super) fn settler() -> (Settler, Inbox) {
    // The queue's byte budget does not bound it, a frame that the engine has leaves that before it is settled; each site does.
    let (to, from) = mpsc::unbounded_channel();
    (Settler(to), Inbox(from))
}

impl Settler {
    /// Hands on what became of a frame of `site`; while nobody settles any more, the claim stays for the next start.
    pub(super) fn put(&self, site: Arc<Site>, settled: Settled) {
        // What cannot be sent is dropped.
        self.0.send(Settling { site, settled: Some(settled) }).ok();
    }
}

/// Settles what is put there, until `stop`.
pub(super) async fn run(inbox: Inbox, stop: CancellationToken) {
    let Inbox(mut inbox) = inbox;
    let mut places: HashMap<Place, Work> = HashMap::new();
    let mut jobs = JoinSet::new();
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(job) = jobs.join_next() => {
                if let Ok(place) = job
                    && let Some(work) = places.get_mut(&place)
                {
                    work.jobs -= 1;
                }
            }
            n = inbox.recv_many(&mut batch, BATCH) => {
                if n == 0 {
                    return;
                }
                // Whoever is about to settle too gets the chance, so that one thread is woken for all of them.
                tokio::task::yield_now().await;
                while batch.len() < BATCH && let Ok(one) = inbox.try_recv() {
                    batch.push(one);
                }
                for one in batch.drain(..) {
                    let Some(settled) = &one.settled else { continue };
                    let place = Place::of(&one.site, settled);
                    places.entry(place).or_default().waiting.push_back(one);
                }
            }
        }
        let mut more: usize = places.values().map(|work| work.jobs.saturating_sub(1)).sum();
        for (place, work) in &mut places {
            while wants_a_job(work.jobs, more, work.waiting.len()) {
                more += usize::from(work.jobs > 0);
                let (frames, place) = (work.take(), place.clone());
                jobs.spawn_blocking(move || {
                    frames.into_iter().for_each(Settling::settle);
                    place
                });
            }
        }
        places.retain(|_, work| work.jobs > 0);
    }
}

impl Place {
    fn of(site: &Site, settled: &Settled) -> Self {
        Self { device: settled.held.claim.root.dev, archive: site.archive().map(PathBuf::from) }
    }
}

impl Work {
    fn take(&mut self) -> Vec<Settling> {
        self.jobs += 1;
        self.waiting.drain(..self.waiting.len().min(BATCH)).collect()
    }
}

/// Whether a place with so many jobs at work gets another one for the frames that wait. `more`: all jobs beyond the first of a place.
fn wants_a_job(jobs: usize, more: usize, waiting: usize) -> bool {
    if jobs == 0 { waiting > 0 } else { jobs < JOBS_MAX && more < MORE_JOBS_MAX && waiting >= WORTH_A_JOB }
}

impl Settling {
    /// Blocks. What cannot be settled now goes to its site, which tries again.
    fn settle(mut self) {
        let Some(settled) = self.settled.take() else { return };
        let site = &self.site;
        if catch_unwind(AssertUnwindSafe(|| site.settle_or_keep(settled))).is_err() {
            tracing::error!("settling failed; the claim is found again at the next start");
        }
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.site.done_settling();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_gets_more_jobs_when_much_waits_behind_those_at_work() {
        for (jobs, more, waiting, expected) in [
            (0, 0, 0, false),
            (0, MORE_JOBS_MAX, 1, true),
            (1, 0, WORTH_A_JOB - 1, false),
            (1, 0, WORTH_A_JOB, true),
            (JOBS_MAX - 1, JOBS_MAX - 2, WORTH_A_JOB, true),
            (JOBS_MAX, JOBS_MAX - 1, 10 * WORTH_A_JOB, false),
            (1, MORE_JOBS_MAX, 10 * WORTH_A_JOB, false),
        ] {
            assert_eq!(wants_a_job(jobs, more, waiting), expected, "{jobs} jobs, {more} more, {waiting} waiting");
        }
    }
}
