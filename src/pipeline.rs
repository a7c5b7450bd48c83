//! The pipeline: takes frames from the queue and carries each through encode, publish and the dead letters to its
//! settlement. `carry` is one frame's whole way.
//!
//! Not here: where frames come from and what a source does with a [`Disposition`].

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::encode::{Encoded, Encoder};
use crate::frame::Frame;
use crate::log::Repeats;
use crate::metrics::{DetectorMetrics, Metrics};
use crate::notify::Progress;
use crate::publish::{Outcome, Publisher};
use crate::queue::{Delivery, Outlet};
use crate::settle::dead_letter::DeadLetters;
use crate::settle::{Disposition, Reason, Receipt, Refusal};

/// How long a dead letter that the disk refused waits before it is tried again.
const DEAD_LETTER_RETRY: Duration = Duration::from_secs(5);

/// How often the loop shows that it turns while there is nothing to do.
const IDLE_BEAT: Duration = Duration::from_secs(1);

/// What a frame passes through.
pub struct Stages {
    /// Claims, reads, checks and builds the body.
    pub encoder: Encoder,
    /// Posts it, as often as it takes.
    pub publisher: Arc<Publisher>,
    /// Keeps what can never be published.
    pub dead_letters: Arc<DeadLetters>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// What fails for one frame after the other is said once a minute.
    pub repeats: Repeats,
    /// Cancelled: nothing waits any more, what has no answer is released.
    pub stop: CancellationToken,
}

/// Carries frames until `stages.stop` is cancelled, and then until every frame in hand is settled.
///
/// Aborting it releases what is in hand: the receipts drop.
pub async fn run(mut outlet: Outlet, stages: Arc<Stages>, beat: Progress) {
    let mut in_hand = JoinSet::new();
    // Both live as long as the loop, which turns several times for each frame: to begin and end a wait takes locks.
    let mut stopped = pin!(stages.stop.cancelled());
    let mut idle = tokio::time::interval(IDLE_BEAT);
    idle.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick();
        tokio::select! {
            biased;
            () = &mut stopped => break,
            Some(joined) = in_hand.join_next() => note_panic(joined),
            delivery = outlet.next() => match delivery {
                Some(delivery) => { in_hand.spawn(carry(delivery, stages.clone())); }
                None => break,
            },
            _ = idle.tick() => {}
        }
    }
    drop(outlet);
    while !in_hand.is_empty() {
        beat.tick();
        tokio::select! {
            Some(joined) = in_hand.join_next() => note_panic(joined),
            () = tokio::time::sleep(IDLE_BEAT) => {}
        }
    }
}

/// One frame's whole way. A panic in publishing costs this frame only: it becomes a dead letter `internal-error`.
async fn carry(delivery: Delivery, stages: Arc<Stages>) {
    let Delivery { counts, take, lease, .. } = delivery;
    let (frame, receipt, image, refusal) = match stages.encoder.encode(take).await {
        Encoded::Gone => return,
        Encoded::Flawed { frame, image, refusal, receipt } => (frame, receipt, image, refusal),
        Encoded::Ready { frame, body, receipt } => {
            let attempt = stages.publisher.publish(&frame, body.bytes(), || lease.begun());
            match AssertUnwindSafe(attempt).catch_unwind().await {
                Ok(Outcome::Accepted) => return accepted(&counts, &frame, receipt),
                Ok(Outcome::Released { .. }) => return released(&frame, receipt),
                Ok(Outcome::Refused(refusal)) => (frame, receipt, Bytes::from(body.image()), refusal),
                Err(_panic) => {
                    let refusal = Refusal {
                        reason: Reason::InternalError,
                        status: None,
                        message: "framegate panicked while publishing this frame; please report it".into(),
                        attempts: 1,
                    };
                    (frame, receipt, Bytes::from(body.image()), refusal)
                }
            }
        }
    };
    lease.begun();
    let reason = refusal.reason;
    if keep(&stages, &frame, image, refusal).await {
        counts.dead_lettered(reason);
        tracing::debug!(id = %frame.id, detector = %frame.detector.name, name = ?frame.original_name, %reason, "frame kept as a dead letter");
        receipt.settle(Disposition::Rejected);
    } else {
        released(&frame, receipt);
    }
    // Frames that wait for the disk count in the budget.
    drop(lease);
}

fn accepted(counts: &DetectorMetrics, frame: &Frame, receipt: Receipt) {
    let delivery = frame.noticed.elapsed();
    let age = Duration::try_from(Timestamp::now().duration_since(frame.detect_time)).unwrap_or_default();
    counts.published(frame.image_bytes, delivery, age);
    tracing::debug!(id = %frame.id, detector = %frame.detector.name, name = ?frame.original_name, ms = delivery.as_millis(), "frame published");
    receipt.settle(Disposition::Accepted);
}

fn released(frame: &Frame, receipt: Receipt) {
    tracing::debug!(id = %frame.id, detector = %frame.detector.name, name = ?frame.original_name, "frame given back to its source");
    receipt.settle(Disposition::Released);
}

/// Keeps the frame as a dead letter, for as long as it takes the disk to allow it; `false`: the daemon stops before that.
async fn keep(stages: &Stages, frame: &Frame, image: Bytes, refusal: Refusal) -> bool {
    loop {
        let (keeper, kept, bytes, why) = (stages.dead_letters.clone(), frame.clone(), image.clone(), refusal.clone());
        match tokio::task::spawn_blocking(move || keeper.keep(&kept, &bytes, &why)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                stages.metrics.counter("settle_errors_total", &[("operation", "dead-letter")]).increment(1);
                if let Some(more) = stages.repeats.came(&error.to_string(), Instant::now()) {
                    tracing::warn!(id = %frame.id, %error, "cannot keep a dead letter; the frame stays at its source and is tried again{more}");
                }
            }
            Err(error) => tracing::error!(id = %frame.id, %error, "keeping a dead letter failed"),
        }
        tokio::select! {
            () = tokio::time::sleep(DEAD_LETTER_RETRY) => {}
            () = stages.stop.cancelled() => return false,
        }
    }
}

/// `carry` catches panics where it can; one that still got here has released its frame by dropping the receipt.
fn note_panic(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a frame's task failed; the frame is back at its source");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Mutex;

    use tokio::sync::mpsc;

    use super::*;
    use crate::encode::body::Body;
    use crate::encode::tests::frame_of;
    use crate::notify::{Notify, Watchdog};
    use crate::publish::{self, engine};
    use crate::queue::{self, Line, Offer, Taken};
    use crate::settle::dead_letter::{self, Filter, Listed};
    use crate::simulator::{Options, Simulator};

    const PATIENCE: Duration = Duration::from_secs(30);
    const BUDGET: u64 = 64 << 20;
    const POISON: &[u8] = b"\xff\xd8\xff makes the encoder panic";
    const BROKEN: &[u8] = b"\xff\xd8\xff makes its source panic";

    /// Images that wait, and where their dispositions are told.
    struct Images {
        waiting: Mutex<VecDeque<&'static [u8]>>,
        told: mpsc::UnboundedSender<(&'static [u8], Disposition)>,
    }

    impl Line for Images {
        fn next(&self) -> Option<Offer> {
            let image = self.waiting.lock().unwrap().pop_front()?;
            let told = self.told.clone();
            let take = move |buffer: &mut Vec<u8>| {
                let receipt = Receipt::new(move |disposition| told.send((image, disposition)).unwrap());
                buffer.extend_from_slice(image);
                assert!(image != BROKEN, "on purpose");
                Taken::Frame(frame_of("Cam"), receipt)
            };
            Some(Offer { image_bytes: image.len() as u64, take: Box::new(take) })
        }
    }

    #[tokio::test]
    async fn d7_a_panic_costs_one_frame_which_is_a_dead_letter_and_the_worker_goes_on() {
        let simulator = Simulator::start(Options::default()).await.unwrap();
        let home = tempfile::tempdir().unwrap();
        let password = home.path().join("password");
        std::fs::write(&password, simulator.password()).unwrap();
        std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
        let account = engine::Config {
            base_url: simulator.base_url(),
            username: Some(simulator.username().to_owned()),
            ..engine::Config::default()
        };
        let secrets = engine::Secrets { password_file: Some(password), token_file: None };
        let metrics = Metrics::new();
        let publisher = Publisher::new(&account, secrets, &publish::Config::default(), metrics.clone()).unwrap();
        let kept = dead_letter::Config { directory: home.path().join("dead"), ..dead_letter::Config::default() };
        // One thread: if it ended, nothing more would come.
        let encoder = Encoder::building(1, 8 << 20, metrics.clone(), |frame, image| {
            assert!(image != POISON, "on purpose");
            Ok(Body::build(frame, image))
        });
        let (intake, outlet) = queue::queue(BUDGET, &metrics);
        let (told, mut dispositions) = mpsc::unbounded_channel();
        let images: [&[u8]; 5] = [b"\xff\xd8\xff one", POISON, BROKEN, b"\xff\xd8\xff two", b"\xff\xd8\xff three"];
        let line = Images { waiting: Mutex::new(images.into()), told };
        let ready = intake.register(frame_of("Cam").detector, Arc::new(line));
        ready.ready();
        let stages = Arc::new(Stages {
            encoder,
            publisher: publisher.clone(),
            dead_letters: DeadLetters::open(kept, metrics.clone()).unwrap(),
            metrics,
            repeats: Repeats::default(),
            stop: CancellationToken::new(),
        });
        let beat = Watchdog::new(Arc::new(Notify::silent()), None).watch("pipeline");

        let collect = async {
            let mut became = BTreeMap::new();
            while became.len() < images.len() {
                became.extend(dispositions.recv().await);
            }
            stages.stop.cancel();
            publisher.stop();
            became
        };
        let all =
            async { tokio::join!(collect, run(outlet, stages.clone(), beat), publisher.run(stages.stop.clone())).0 };
        let became = tokio::time::timeout(PATIENCE, all).await.expect("every frame has an end");
        let expected = images.map(|image| match image {
            POISON => (image, Disposition::Rejected),
            BROKEN => (image, Disposition::Released),
            _ => (image, Disposition::Accepted),
        });
        assert_eq!(became, expected.into());
        let letters: Vec<Listed> = stages.dead_letters.store().list(Filter::default()).unwrap().collect();
        let [Listed::Sound(letter)] = &letters[..] else { panic!("{letters:?}") };
        assert_eq!(letter.reason, Reason::InternalError);
        assert_eq!(stages.dead_letters.store().image(&letter.id).unwrap(), POISON);
    }
}
