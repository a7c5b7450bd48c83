//! The pipeline: takes frames from the queue and carries each through encode, publish and the dead letters to its
//! settlement. `carry` is one frame's whole way.
//!
//! Not here: where frames come from and what a source does with a [`Disposition`].

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::encode::{Encoded, Encoder};
use crate::frame::Frame;
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
    /// Cancelled: nothing waits any more, what has no answer is released.
    pub stop: CancellationToken,
}

/// Carries frames until `stages.stop` is cancelled, and then until every frame in hand is settled.
///
/// Aborting it releases what is in hand: the receipts drop.
pub async fn run(mut outlet: Outlet, stages: Arc<Stages>, beat: Progress) {
    let mut in_hand = JoinSet::new();
    loop {
        beat.tick();
        tokio::select! {
            biased;
            () = stages.stop.cancelled() => break,
            Some(joined) = in_hand.join_next() => note_panic(joined),
            delivery = outlet.next() => match delivery {
                Some(delivery) => { in_hand.spawn(carry(delivery, stages.clone())); }
                None => break,
            },
            () = tokio::time::sleep(IDLE_BEAT) => {}
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
                tracing::warn!(id = %frame.id, %error, "cannot keep a dead letter; the frame stays at its source and is tried again");
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
