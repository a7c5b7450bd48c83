//! The settler: carries out what became of claimed frames, for all drop directories together, so that one thread is woken for
//! what many detectors have settled at the same time. File systems wait for each other no more than their threads do: each
//! has jobs of its own, so that one that hangs keeps only its own frames.
//!
//! Not here: what settling is (`site`), and what is tried again (`directory::settle`).

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::site::{Settled, Site};

/// Frames of one job.
const BATCH: usize = 256;
/// While a file system's jobs are at work, so many frames are worth another one: removing takes long there.
const WORTH_A_JOB: usize = 16;
/// Jobs of one file system at once.
const JOBS_MAX: usize = 8;

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

/// A file system.
#[derive(Default)]
struct Volume {
    waiting: Vec<Settling>,
    jobs: usize,
}

/// The two ends.
pub(super) fn settler() -> (Settler, Inbox) {
    // Bounded by the frames in hand, which the queue's byte budget bounds.
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
    let mut volumes: HashMap<u64, Volume> = HashMap::new();
    let mut jobs = JoinSet::new();
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(job) = jobs.join_next() => {
                if let Ok(device) = job
                    && let Some(volume) = volumes.get_mut(&device)
                {
                    volume.jobs -= 1;
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
                    volumes.entry(settled.held.claim.root.dev).or_default().waiting.push(one);
                }
            }
        }
        for (&device, volume) in &mut volumes {
            while wants_a_job(volume.jobs, volume.waiting.len()) {
                let frames = volume.take();
                jobs.spawn_blocking(move || {
                    frames.into_iter().for_each(Settling::settle);
                    device
                });
            }
        }
        volumes.retain(|_, volume| volume.jobs > 0);
    }
}

impl Volume {
    fn take(&mut self) -> Vec<Settling> {
        self.jobs += 1;
        self.waiting.drain(..self.waiting.len().min(BATCH)).collect()
    }
}

/// Whether a file system with so many jobs at work gets another one for the frames that wait.
fn wants_a_job(jobs: usize, waiting: usize) -> bool {
    let enough = if jobs == 0 { 1 } else { WORTH_A_JOB };
    jobs < JOBS_MAX && waiting >= enough
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
        self.site.done();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_gets_more_jobs_when_much_waits_behind_those_at_work() {
        for (jobs, waiting, expected) in [
            (0, 0, false),
            (0, 1, true),
            (1, WORTH_A_JOB - 1, false),
            (1, WORTH_A_JOB, true),
            (JOBS_MAX - 1, WORTH_A_JOB, true),
            (JOBS_MAX, 10 * WORTH_A_JOB, false),
        ] {
            assert_eq!(wants_a_job(jobs, waiting), expected, "{jobs} jobs, {waiting} waiting");
        }
    }
}
