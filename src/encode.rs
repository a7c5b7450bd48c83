//! Encoding: the threads where a frame is claimed, read, looked at and turned into its request body, in one hop.
//!
//! Threads of their own, because all of it blocks or burns CPU. No decisions about what becomes of a frame: only what was found.

pub mod body;
pub mod image;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use bytesize::ByteSize;
use crossbeam_channel::{Receiver, Sender};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use self::body::Body;
use self::image::Flaw;
use crate::frame::Frame;
use crate::metrics::Metrics;
use crate::queue::{Take, Taken};
use crate::settle::{Reason, Receipt, Refusal};

/// Jobs that may wait for each thread, so that none idles while the next one is on its way.
const WAITING_PER_WORKER: usize = 2;
/// Bytes that a thread's buffer keeps between frames.
const BUFFER_KEPT_MAX: u64 = 1 << 20;

/// `[encode]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Threads that read and encode images; 0: one for each CPU. Changes with a restart only.
    pub workers: usize,
    /// Memory for images and request bodies together. When it is used up, frames wait at their sources.
    #[schemars(with = "String")]
    pub memory: ByteSize,
    /// The largest image. Larger files are left where they are, counted and said once; larger messages become dead letters.
    /// Changes with a restart only.
    #[schemars(with = "String")]
    pub max_frame: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self { workers: 0, memory: ByteSize::mib(256), max_frame: ByteSize::mib(8) }
    }
}

/// The encode threads. They end when it is dropped.
#[derive(Debug)]
pub struct Encoder {
    jobs: Sender<Job>,
    slots: Arc<Semaphore>,
}

/// What came of one [`Take`].
#[derive(Debug)]
pub enum Encoded {
    /// A whole image and its body.
    Ready {
        /// The frame.
        frame: Frame,
        /// What to post.
        body: Body,
        /// To settle.
        receipt: Receipt,
    },
    /// Nothing that can be published.
    Flawed {
        /// The frame.
        frame: Frame,
        /// Its bytes as far as there are any, for the dead letter.
        image: Bytes,
        /// Why.
        refusal: Refusal,
        /// To settle.
        receipt: Receipt,
    },
    /// Nothing to do.
    Gone,
}

/// Makes an image's body, or says what is wrong with it.
type Build = fn(&Frame, &[u8]) -> Result<Body, Flaw>;

struct Job {
    take: Take,
    reply: oneshot::Sender<Encoded>,
    /// The job's place in the channel.
    slot: OwnedSemaphorePermit,
}

impl Encoder {
    /// Starts the threads; 0 `workers` means one for each CPU. Images are expected to be at most `max_frame` bytes.
    pub fn start(workers: usize, max_frame: u64, metrics: Arc<Metrics>) -> Self {
        Self::building(workers, max_frame, metrics, build)
    }

    /// [`Encoder::start`] with a way of its own to make an image's body.
    #[expect(clippy::needless_pass_by_value, reason = "each thread owns one; callers have one to give")]
    pub(crate) fn building(workers: usize, max_frame: u64, metrics: Arc<Metrics>, build: Build) -> Self {
        let workers = if workers == 0 { thread::available_parallelism().map_or(1, usize::from) } else { workers };
        let places = workers * WAITING_PER_WORKER;
        let (jobs, inbox) = crossbeam_channel::bounded(places);
        let buffer_max = usize::try_from(max_frame.min(BUFFER_KEPT_MAX)).expect("1 MiB fits");
        for n in 0..workers {
            let (inbox, metrics) = (inbox.clone(), metrics.clone());
            thread::Builder::new()
                .name(format!("encode-{n}"))
                .spawn(move || work(&inbox, buffer_max, build, &metrics))
                .expect("the system lets a thread start");
        }
        Self { jobs, slots: Arc::new(Semaphore::new(places)) }
    }

    /// Runs `take` on one of the threads. Cancel safe: when the waiter is gone, the frame goes back to its source.
    pub async fn encode(&self, take: Take) -> Encoded {
        let slot = self.slots.clone().acquire_owned().await.expect("never closed");
        let (reply, answer) = oneshot::channel();
        // There is a place in the channel for each slot, and the threads live as long as the sender.
        self.jobs.try_send(Job { take, reply, slot }).expect("a slot is a place in the channel");
        answer.await.unwrap_or(Encoded::Gone)
    }
}

fn work(inbox: &Receiver<Job>, buffer_max: usize, build: Build, metrics: &Metrics) {
    let mut buffer = Vec::new();
    for Job { take, reply, slot } in inbox {
        drop(slot);
        let begun = Instant::now();
        let encoded = encode(take, &mut buffer, build);
        if !matches!(encoded, Encoded::Gone) {
            metrics.encode_duration.record(begun.elapsed());
        }
        // Where nobody waits any more, the receipt is dropped in here, which gives the frame back.
        if catch_unwind(AssertUnwindSafe(|| drop(reply.send(encoded)))).is_err() {
            tracing::error!("a source failed while a frame was given back to it");
        }
        buffer.clear();
        buffer.shrink_to(buffer_max);
    }
}

fn build(frame: &Frame, image: &[u8]) -> Result<Body, Flaw> {
    image::inspect(image)?;
    Ok(Body::build(frame, image))
}

/// A panic costs one frame, never the thread: in `take`, whatever it held is given back; behind it, the frame is flawed.
fn encode(take: Take, buffer: &mut Vec<u8>, build: impl FnOnce(&Frame, &[u8]) -> Result<Body, Flaw>) -> Encoded {
    let (frame, receipt, refusal) = match catch_unwind(AssertUnwindSafe(|| take(buffer))) {
        Ok(Taken::Frame(frame, receipt)) => match catch_unwind(AssertUnwindSafe(|| build(&frame, buffer))) {
            Ok(Ok(body)) => return Encoded::Ready { frame, body, receipt },
            Ok(Err(flaw)) => (frame, receipt, refusal(flaw)),
            Err(_) => (frame, receipt, refuse(Reason::InternalError, "framegate failed while encoding this image")),
        },
        // Nothing in here can fail but the allocation.
        Ok(Taken::Base64(frame, receipt)) => {
            let body = Body::of_base64(&frame, buffer);
            return Encoded::Ready { frame, body, receipt };
        }
        Ok(Taken::Flawed(frame, receipt, refusal)) => (frame, receipt, refusal),
        Ok(Taken::Gone) => return Encoded::Gone,
        Err(_) => {
            tracing::error!("a source failed while taking a frame; the frame stays with its source");
            return Encoded::Gone;
        }
    };
    Encoded::Flawed { frame, image: Bytes::copy_from_slice(buffer), refusal, receipt }
}

fn refusal(flaw: Flaw) -> Refusal {
    match flaw {
        Flaw::Truncated(message) => refuse(Reason::Truncated, message),
        Flaw::Unsupported(message) => refuse(Reason::Unsupported, message),
    }
}

fn refuse(reason: Reason, message: &str) -> Refusal {
    Refusal { reason, status: None, message: message.to_owned(), attempts: 0 }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::frame::{Detector, FrameId, SourceKind};
    use crate::settle::Disposition;
    use jiff::Timestamp;
    use std::sync::mpsc;

    pub(crate) fn frame_of(detector: &str) -> Frame {
        Frame {
            id: FrameId::generate(),
            detector: Arc::new(Detector {
                name: detector.into(),
                time_zone: "America/Los_Angeles".into(),
                rate: 0.0,
                weight: 1,
            }),
            detect_time: Timestamp::now(),
            received_at: Timestamp::now(),
            noticed: Instant::now(),
            source: SourceKind::Directory,
            original_name: "face.jpg".into(),
            image_bytes: 0,
        }
    }

    /// A take of these bytes, and where its receipt reports.
    fn taking(image: Vec<u8>) -> (Take, mpsc::Receiver<Disposition>) {
        let (tx, rx) = mpsc::channel();
        let take: Take = Box::new(move |buffer: &mut Vec<u8>| {
            assert!(buffer.is_empty());
            buffer.extend(image);
            // Not every test listens.
            Taken::Frame(frame_of("Cam"), Receipt::new(move |d| tx.send(d).unwrap_or_default()))
        });
        (take, rx)
    }

    fn start() -> (Encoder, Arc<Metrics>) {
        let metrics = Metrics::new();
        (Encoder::start(1, 8 << 20, metrics.clone()), metrics)
    }

    #[tokio::test]
    async fn a_whole_image_is_ready_and_a_flawed_one_comes_with_its_bytes_and_the_reason() {
        let (encoder, metrics) = start();
        let jpeg = image::tests::a_jpeg();
        let (take, settled) = taking(jpeg.clone());
        let Encoded::Ready { body, receipt, .. } = encoder.encode(take).await else { panic!("not ready") };
        assert_eq!(body.image(), jpeg);
        receipt.settle(Disposition::Accepted);
        assert_eq!(settled.recv(), Ok(Disposition::Accepted));

        for (bytes, reason) in
            [(&jpeg[..50], Reason::Truncated), (b"", Reason::Truncated), (b"text", Reason::Unsupported)]
        {
            let found = encoder.encode(taking(bytes.to_vec()).0).await;
            let Encoded::Flawed { image, refusal, .. } = found else { panic!("{found:?}") };
            assert_eq!((&*image, refusal.reason), (bytes, reason));
        }
        assert!(matches!(encoder.encode(Box::new(|_| Taken::Gone)).await, Encoded::Gone));
        assert!(metrics.render().contains("framegate_encode_duration_seconds_count 4"), "gone ones are not timed");
    }

    #[tokio::test]
    async fn a_frame_whose_waiter_is_gone_is_released() {
        let (encoder, _) = start();
        let (begun_tx, begun) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let (take, settled) = taking(image::tests::a_jpeg());
        let slow: Take = Box::new(move |buffer| {
            begun_tx.send(()).unwrap();
            wait.recv().unwrap();
            take(buffer)
        });
        tokio::select! {
            biased;
            _ = encoder.encode(slow) => panic!("still blocked"),
            () = std::future::ready(()) => {}
        }
        begun.recv().unwrap();
        go.send(()).unwrap();
        assert_eq!(settled.recv(), Ok(Disposition::Released));
    }

    #[tokio::test]
    async fn the_threads_end_with_the_encoder() {
        let (encoder, metrics) = start();
        drop(encoder);
        while Arc::strong_count(&metrics) > 1 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn more_jobs_than_places_wait_their_turn() {
        let (encoder, _) = start();
        let jobs = (0..100).map(|_| encoder.encode(taking(image::tests::a_jpeg()).0));
        let all = futures_util::future::join_all(jobs).await;
        assert!(all.iter().all(|found| matches!(found, Encoded::Ready { .. })));
    }

    #[tokio::test]
    async fn d7_a_panic_in_take_releases_the_frame_and_the_thread_lives_on() {
        let (encoder, _) = start();
        for _ in 0..3 {
            let (tx, settled) = mpsc::channel();
            let broken: Take = Box::new(move |buffer| {
                let _receipt = Receipt::new(move |d| tx.send(d).unwrap());
                buffer.extend(b"left over");
                panic!("on purpose");
            });
            assert!(matches!(encoder.encode(broken).await, Encoded::Gone));
            assert_eq!(settled.recv(), Ok(Disposition::Released));
        }
        let after = encoder.encode(taking(image::tests::a_jpeg()).0).await;
        assert!(matches!(after, Encoded::Ready { .. }), "{after:?}");
    }

    #[test]
    fn d7_a_panic_behind_take_makes_the_frame_an_internal_error_with_its_image() {
        let (take, settled) = taking(b"poison".to_vec());
        let found = encode(take, &mut Vec::new(), |_, _| panic!("on purpose"));
        let Encoded::Flawed { image, refusal, receipt, .. } = found else { panic!("{found:?}") };
        assert_eq!((&*image, refusal.reason), (b"poison".as_slice(), Reason::InternalError));
        receipt.settle(Disposition::Rejected);
        assert_eq!(settled.recv(), Ok(Disposition::Rejected));
    }
}
