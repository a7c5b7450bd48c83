//! What the daemon does for each frame, piece by piece, each beside the least that could do it.
//!
//! Two of the pieces are private to the crate. Their files are compiled into this program a second time, at the same paths as
//! there (`source::directory`, `publish`), so that nothing has to be public for a bench.

/// What `crate::frame` is for them.
use framegate::frame;

#[path = "../support/frame.rs"]
mod incoming;
mod publish;
mod source;

use std::sync::Arc;
use std::time::Duration;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use framegate::encode::body::Body;
use framegate::encode::image::{Format, inspect};
use framegate::frame::{Detector, FrameId, SourceKind};
use framegate::metrics::Metrics;
use framegate::queue::{Intake, Line, Offer, Outlet, Ready, Taken, queue};
use framegate::simulator::faces;
use futures_util::FutureExt as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KIB: [usize; 3] = [8, 40, 200];
/// `encode.memory` of the queue's benches, bytes.
const BUDGET: u64 = 256 << 20;

fn main() {
    divan::main();
}

/// The request's body: base64, and the JSON around it.
#[divan::bench(args = KIB)]
fn body(bencher: Bencher<'_, '_>, kib: usize) {
    let (image, frame) = (faces::face(1, kib << 10), incoming::frame(&a_detector(0)));
    bencher.counter(BytesCount::of_slice(&image)).bench_local(|| {
        black_box(Body::build(&frame, black_box(&image)));
    });
}

/// The same bytes into memory of their own: what `body` is measured against.
#[divan::bench(args = KIB)]
fn body_as_a_copy(bencher: Bencher<'_, '_>, kib: usize) {
    let image = faces::face(1, kib << 10);
    bencher.counter(BytesCount::of_slice(&image)).bench_local(|| {
        black_box(black_box(&image).clone());
    });
}

/// Whether an image of 40 KiB is whole.
#[divan::bench(args = [Format::Jpeg, Format::Png, Format::WebP, Format::Bmp])]
fn structure(bencher: Bencher<'_, '_>, format: Format) {
    let image = an_image(format, 40 << 10);
    assert_eq!(inspect(&image), Ok(format));
    bencher.counter(BytesCount::of_slice(&image)).bench_local(|| inspect(black_box(&image)));
}

/// A frame's turn in the queue, with so many detectors that have something.
#[divan::bench(args = [1, 64, 500])]
fn turn(bencher: Bencher<'_, '_>, detectors: usize) {
    let metrics = Metrics::new();
    let (intake, mut outlet) = queue(BUDGET, &metrics);
    let _lines: Vec<Ready> = (0..detectors).map(|n| endless_line(&intake, n)).collect();
    let next = |outlet: &mut Outlet| {
        let delivery = outlet.next().now_or_never().flatten().expect("every line has something");
        delivery.lease.begun();
    };
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| next(&mut outlet));
}

/// What is counted for a frame that is received and published.
#[divan::bench]
fn counting(bencher: Bencher<'_, '_>) {
    let metrics = Metrics::new();
    let counts = metrics.detector("Lobby");
    bencher.bench_local(|| {
        counts.received(SourceKind::Directory, 1);
        metrics.encode_duration.record(20e-6);
        metrics.in_flight.increment(1.0);
        metrics.publish_duration.record(300e-6);
        metrics.in_flight.decrement(1.0);
        counts.published(40_000, Duration::from_millis(2), Duration::from_millis(3));
    });
}

#[divan::bench]
fn frame_id() -> FrameId {
    FrameId::generate()
}

fn a_detector(n: usize) -> Arc<Detector> {
    Arc::new(Detector { name: format!("cam-{n}").into(), time_zone: "UTC".into(), rate: 0.0, weight: 1 })
}

struct Endless;

impl Line for Endless {
    fn next(&self) -> Option<Offer> {
        Some(Offer { image_bytes: 40 << 10, take: Box::new(|_| Taken::Gone) })
    }
}

fn endless_line(intake: &Intake, n: usize) -> Ready {
    let ready = intake.register(a_detector(n), Arc::new(Endless));
    ready.ready();
    ready
}

/// Of about so many bytes. Drawn where that is a JPEG, else as far as its structure goes.
fn an_image(format: Format, bytes: usize) -> Vec<u8> {
    let filling = vec![0x55; bytes];
    let (le, be) = (|n: usize| u32::try_from(n).expect("small").to_le_bytes(), |n: u32| n.to_be_bytes());
    match format {
        Format::Jpeg => faces::face(1, bytes),
        Format::Png => {
            let chunk = |kind: &[u8], data: &[u8]| {
                [&be(u32::try_from(data.len()).expect("small"))[..], kind, data, &[0; 4]].concat()
            };
            let head = [&be(320)[..], &be(320), &[8, 2, 0, 0, 0]].concat();
            let mut image = [b"\x89PNG\r\n\x1a\n", &chunk(b"IHDR", &head)[..]].concat();
            // What encoders write: pieces of 8 KiB.
            filling.chunks(8 << 10).for_each(|piece| image.extend(chunk(b"IDAT", piece)));
            image.extend(chunk(b"IEND", b""));
            image
        }
        Format::WebP => {
            let picture = [b"\0\0\0\x9d\x01\x2a\x40\x01\x40\x01", &filling[..]].concat();
            let chunk = [b"VP8 ", &le(picture.len())[..], &picture].concat();
            [b"RIFF", &le(chunk.len() + 4)[..], b"WEBP", &chunk].concat()
        }
        Format::Bmp => {
            let rows = bytes / (100 * 4);
            let pixels = &filling[..rows * 100 * 4];
            let info = [&le(40)[..], &le(100), &le(rows), &[1, 0, 32, 0], &[0; 24]].concat();
            [b"BM", &le(54 + pixels.len())[..], &[0; 4], &le(54), &info, pixels].concat()
        }
    }
}
