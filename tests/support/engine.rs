//! The simulated engine in the test's own process, and a camera that feeds drop directories no faster than the engine takes.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;

use super::{Options, PASSWORD, PATIENCE, Simulator, USERNAME, eventually, faces, put};

/// Small, so that a debug build is not what is tested.
const FACE_BYTES: usize = 4 << 10;

/// An image's SHA-256.
pub type Hash = [u8; 32];

/// A running simulator with a runtime of its own: a test need not be async.
pub struct Engine {
    simulator: Simulator,
    runtime: Runtime,
}

impl Deref for Engine {
    type Target = Simulator;

    fn deref(&self) -> &Simulator {
        &self.simulator
    }
}

impl Engine {
    pub fn start() -> Arc<Self> {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Options)) -> Arc<Self> {
        let mut options = Options { username: USERNAME.into(), password: PASSWORD.into(), ..Options::default() };
        change(&mut options);
        let runtime = Runtime::new().expect("a runtime");
        let simulator = runtime.block_on(Simulator::start(options)).expect("a simulator");
        Arc::new(Self { simulator, runtime })
    }

    /// Connecting is refused from when this returns.
    pub fn down(&self) {
        self.runtime.block_on(self.simulator.down());
    }

    /// No request on an old connection is counted from when this returns.
    pub fn cut_connections(&self) {
        self.runtime.block_on(self.simulator.cut_connections());
    }

    pub fn up(&self) {
        self.runtime.block_on(self.simulator.up()).expect("the port is still ours");
    }

    /// Waits until so many frames have been accepted since the start.
    #[track_caller]
    pub fn until_accepted(&self, frames: u64) {
        eventually(&format!("{frames} frames are accepted"), PATIENCE, || {
            (self.counts().accepted >= frames).then_some(())
        });
    }

    /// The engine was asked for nothing that its contract does not know.
    #[track_caller]
    pub fn contract_held(&self) {
        assert_eq!(self.counts().violation_messages, Vec::<String>::new());
    }
}

/// How often each image was accepted by these engines.
pub fn arrivals(engines: &[&Engine]) -> BTreeMap<Hash, u64> {
    let mut arrivals = BTreeMap::new();
    for frame in engines.iter().flat_map(|engine| engine.accepted()) {
        *arrivals.entry(frame.sha256).or_default() += 1;
    }
    arrivals
}

/// Every image that was written has arrived, whole, and nothing else has. Gives how many came once more than needed.
#[track_caller]
pub fn nothing_lost(engines: &[&Engine], written: &[Hash]) -> u64 {
    let mut arrivals = arrivals(engines);
    let lost = written.iter().filter(|hash| !arrivals.contains_key(*hash)).count();
    assert_eq!(lost, 0, "lost, of {}", written.len());
    let doubled = arrivals.values().map(|times| times - 1).sum();
    for hash in written {
        arrivals.remove(hash);
    }
    assert!(arrivals.is_empty(), "{} images arrived that nobody wrote", arrivals.len());
    for engine in engines {
        engine.contract_held();
    }
    doubled
}

/// Writes images of its own, each different, into directories in turn.
pub struct Camera {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Hash>>,
}

impl Camera {
    /// Feeds until [`Camera::finish`], at most `ahead` frames ahead of what these engines have accepted.
    pub fn start(engines: &[Arc<Engine>], directories: Vec<PathBuf>, ahead: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (engines, stopped) = (engines.to_vec(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut written = Vec::new();
            let stopped = || stopped.load(Ordering::Relaxed);
            let patience = Duration::from_mins(5);
            for (n, directory) in (0u64..).zip(directories.iter().cycle()) {
                eventually("there is room for another frame", patience, || {
                    let accepted: u64 = engines.iter().map(|engine| engine.counts().accepted).sum();
                    (stopped() || n < accepted + ahead).then_some(())
                });
                if stopped() {
                    break;
                }
                written.push(put_face(directory, n));
            }
            written
        });
        Self { stop, thread }
    }

    /// Stops, and gives the hashes of all that was written.
    pub fn finish(self) -> Vec<Hash> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the camera writes")
    }
}

/// Puts the `n`th face there.
pub fn put_face(directory: &std::path::Path, n: u64) -> Hash {
    let image = image(n);
    put(directory, &format!("{n:07}.jpg"), &image);
    hash(&image)
}

/// The `n`th face.
pub fn image(n: u64) -> Vec<u8> {
    static BASE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    faces::face_variant(BASE.get_or_init(|| faces::face(1, FACE_BYTES)), n)
}

pub fn hash(image: &[u8]) -> Hash {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, image);
    digest.as_ref().try_into().expect("32 bytes")
}
