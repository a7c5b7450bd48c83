//! Who is next in a drop directory, and what claiming and removing a file costs: `source::directory` of the crate.

#[path = "../../../src/source/directory/claim.rs"]
#[expect(dead_code, reason = "only what is measured is used here")]
mod claim;
#[path = "../../../src/source/directory/reserve.rs"]
#[expect(dead_code, reason = "only what is measured is used here")]
mod reserve;
#[path = "../../../src/source/directory/tree.rs"]
#[expect(dead_code, reason = "only what is measured is used here")]
mod tree;
#[path = "../../../src/source/directory/window.rs"]
#[expect(dead_code, unused_imports, reason = "only what is measured is used here")]
mod window;

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use divan::Bencher;
use jiff::Timestamp;
use tokio::time::Instant;

use self::claim::Root;
use self::window::{Key, Limits, Waiting, Window};
use super::Order;

/// The next one is taken and done with, what waits beyond the window moves up, and another comes.
#[divan::bench(args = [1, 1_000, 1_000_000])]
fn next_of_waiting(bencher: Bencher<'_, '_>, waiting: i64) {
    let (cam, now) = (Arc::from("cam"), Instant::now());
    let mut window = scanned(&cam, waiting, now);
    bencher.bench_local(|| {
        let taken = window.next(&cam, now).expect("one waits");
        window.forget(&taken.key);
        window.top_up(&cam);
        window.add(&cam, taken, false, 0)
    });
}

/// What a scan finds beyond the window.
#[divan::bench]
fn beyond_the_window(bencher: Bencher<'_, '_>) {
    let (cam, now) = (Arc::from("cam"), Instant::now());
    let mut window = scanned(&cam, 100_000, now);
    bencher.with_inputs(|| a_file(-1, now)).bench_local_values(|file| window.add(&cam, file, false, 1));
}

fn scanned(cam: &Arc<str>, files: i64, now: Instant) -> Window {
    let mut window = Window::new(Order::FreshestFirst, Limits::shared_by(1, 1));
    drop(window.begin_scan(1));
    for n in 0..files {
        window.add(cam, a_file(n, now), false, 1);
    }
    let mut reserve = window.gathered();
    reserve.sort();
    window.end_scan(reserve);
    window
}

/// A rename into our hidden directory, and an unlink there.
#[divan::bench]
fn claim_and_remove(bencher: Bencher<'_, '_>) {
    let home = a_directory();
    let root = Arc::new(Root::open(home.path()).expect("a drop directory"));
    let (below, mut files) = (Arc::from(*b""), Files::new(home.path()));
    bencher.with_inputs(|| files.next()).bench_local_values(|file| {
        let name = Arc::from(file.file_name().expect("a name").as_encoded_bytes());
        let claim = root.claim(root.fd.as_fd(), &below, &name).expect("claimed").expect("it is there");
        claim.remove().expect("removed");
    });
}

/// What `claim_and_remove` is measured against.
#[divan::bench]
fn remove(bencher: Bencher<'_, '_>) {
    let home = a_directory();
    let mut files = Files::new(home.path());
    bencher.with_inputs(|| files.next()).bench_local_values(|file| fs::remove_file(file).expect("removed"));
}

fn a_file(n: i64, now: Instant) -> Waiting {
    Waiting {
        key: Key { dir: Arc::from(*b""), name: format!("{n:07}.jpg").as_bytes().into() },
        size: 40 << 10,
        mtime: n,
        noticed: now,
        received_at: Timestamp::UNIX_EPOCH,
        still_since: now,
        settled: true,
        claim: None,
    }
}

fn a_directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// Makes files of 40 KiB.
struct Files {
    at: PathBuf,
    image: Vec<u8>,
    made: u64,
}

impl Files {
    fn new(at: &Path) -> Self {
        Self { at: at.to_owned(), image: vec![0x55; 40 << 10], made: 0 }
    }

    fn next(&mut self) -> PathBuf {
        let file = self.at.join(format!("{:07}.jpg", self.made));
        fs::write(&file, &self.image).expect("a file");
        self.made += 1;
        file
    }
}
