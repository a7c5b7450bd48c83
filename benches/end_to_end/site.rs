//! What one run works on: drop directories with images, the daemon's configuration, an engine. All of it goes with the run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use framegate::simulator::{Certificate, Faults, Options, Simulator, faces};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::case::{Case, Worker};
use crate::roofline;

/// Different faces; each image differs from every other by a comment.
const FACES: u64 = 20;
/// `publish.max_in_flight`, and as many connections for the roofline.
pub(crate) const CONNECTIONS: usize = 64;
/// `encode.memory`, MiB.
pub(crate) const BUDGET_MIB: u32 = 64;

/// See the file's head.
pub(crate) struct Site {
    home: TempDir,
    pub simulator: Simulator,
    ca: Option<PathBuf>,
    pub drops: Vec<PathBuf>,
    faces: Vec<Vec<u8>>,
}

impl Site {
    /// `keep`: the engine remembers what it accepted, and when.
    pub(crate) fn new(case: &Case, parent: &Path, runtime: &Runtime, keep: bool) -> Self {
        let home = tempfile::tempdir_in(parent).expect("a directory");
        let options = Options {
            tls: case.tls.then_some(Certificate::Good),
            keep,
            faults: Faults { latency: case.latency, ..Faults::default() },
            ..Options::default()
        };
        let simulator = runtime.block_on(Simulator::start(options)).expect("an engine");
        let ca = simulator.ca_pem().map(|pem| {
            let file = home.path().join("ca.pem");
            fs::write(&file, pem).expect("a certificate");
            file
        });
        let drops = (0..case.detectors).map(|n| home.path().join(format!("cam-{n:03}"))).collect();
        for drop in &drops {
            fs::create_dir(drop).expect("a drop directory");
        }
        let faces = (0..FACES).map(|seed| faces::face(seed, case.kib << 10)).collect();
        Self { home, simulator, ca, drops, faces }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The `n`th image.
    pub(crate) fn image(&self, n: u64) -> Vec<u8> {
        faces::face_variant(&self.faces[usize::try_from(n % FACES).expect("small")], n)
    }

    /// Where it goes: the detectors take turns.
    pub(crate) fn file(&self, n: u64) -> PathBuf {
        let drop = usize::try_from(n).expect("it fits") % self.drops.len();
        self.drops[drop].join(format!("{n:07}.jpg"))
    }

    /// Whether no image is left, claimed ones included.
    pub(crate) fn is_empty(&self) -> bool {
        self.drops.iter().all(|drop| images(drop) == 0)
    }

    /// What starts the worker.
    pub(crate) fn command(&self, worker: Worker) -> Command {
        let url = self.simulator.base_url();
        match worker {
            Worker::Daemon => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
                command.args(["run", "--config"]).arg(self.configuration(&url));
                command
            }
            Worker::Roofline => {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                let args = roofline::Args {
                    url,
                    ca: self.ca.clone(),
                    connections: CONNECTIONS,
                    directories: self.drops.clone(),
                };
                command.args(args.line());
                command
            }
            Worker::Curl => {
                let mut command = Command::new("bash");
                command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/end_to_end/curl.sh")).arg(url);
                command.args(&self.drops);
                command
            }
        }
    }

    fn configuration(&self, url: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let secret = self.path("engine-password");
        fs::write(&secret, "simulated").expect("a password");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("its mode");
        let at = self.home.path().display();
        let ca = if self.ca.is_some() { "ca_file = \"ca.pem\"" } else { "" };
        let mut text = format!(
            r#"
            [engine]
            base_url = "{url}"
            username = "framegate"
            password_file = "engine-password"
            {ca}
            [publish]
            max_in_flight = {CONNECTIONS}
            [encode]
            memory = "{BUDGET_MIB}MiB"
            [dead_letter]
            directory = "{at}/dead-letter"
            [admin]
            listen = "127.0.0.1:0"
            control = "{at}/control"
            "#
        );
        for drop in &self.drops {
            let (path, name) = (drop.display(), drop.file_name().expect("a name").display());
            writeln!(text, "[[detectors]]\nname = \"{name}\"\ntime_zone = \"UTC\"").expect("a string");
            writeln!(text, "directory = {{ path = \"{path}\" }}").expect("a string");
        }
        let file = self.path("framegate.toml");
        fs::write(&file, text).expect("a configuration");
        file
    }
}

fn images(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => images(&entry.path()),
            Ok(_) => usize::from(entry.metadata().is_ok_and(|it| it.len() > 0)),
            Err(_) => 0,
        })
        .sum()
}
