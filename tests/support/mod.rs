//! The integration harness: a site with drop directories, and the real binary run on it as a technician would.
//!
//! Nothing in here sleeps but [`eventually`], which waits for a condition. Every port is 0. The daemon says over its
//! control socket where its admin listener is.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_imports,
    reason = "each test binary uses its own part of the harness"
)]

pub mod brokers;
pub mod browser;
pub mod engine;
pub mod faults;
pub mod machine;
pub mod network;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

// The engine and the pictures come from the library, in this process: a test asks the simulator directly.
#[allow(unused_imports, reason = "each test binary uses its own part of the harness")]
pub use framegate::simulator::{Action, Options, Reply, Simulator, faces};

/// For what should take moments: long, since two cores may run everything at once.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);
/// A socket that says nothing for so long is broken.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// Lines of the daemon's log that a failed test shows.
const LOG_LINES_SHOWN: usize = 60;

pub const USERNAME: &str = "edge-07";
/// Recognisable wherever it should not appear.
pub const PASSWORD: &str = "canary-password-8f41";

/// Waits until `condition` gives something, and gives that.
#[track_caller]
pub fn eventually<T>(what: &str, patience: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// A box on site: one temporary directory with a configuration, drop directories, dead letters, a secret.
pub struct Site {
    dir: TempDir,
    engine: String,
    account: String,
    sections: String,
    detectors: Vec<(String, String)>,
    environment: Vec<(String, String)>,
}

impl Site {
    /// A site whose engine is at `base_url`, without detectors yet.
    pub fn new(base_url: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let password = dir.path().join("engine-password");
        fs::write(&password, PASSWORD).expect("the password can be written");
        fs::set_permissions(&password, Permissions::from_mode(0o600)).expect("and be made private");
        Self {
            dir,
            engine: format!("base_url = {}\n", quoted(base_url)),
            account: format!("username = {}\npassword_file = \"engine-password\"\n", quoted(USERNAME)),
            sections: String::new(),
            detectors: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds a detector with a drop directory of its own. `keys` are further lines of its entry, such as
    /// `weight = 2` or `directory.quiet = "50ms"`.
    #[must_use]
    pub fn detector(mut self, name: &str, time_zone: &str, keys: &str) -> Self {
        let drop_dir = self.dir.path().join("drop").join(self.detectors.len().to_string());
        fs::create_dir_all(&drop_dir).expect("a drop directory can be made");
        let entry = format!(
            "[[detectors]]\nname = {}\ntime_zone = {}\ndirectory.path = {}\n{keys}\n",
            quoted(name),
            quoted(time_zone),
            quoted(drop_dir.to_str().expect("temporary directories have plain names")),
        );
        self.detectors.push((name.to_owned(), entry));
        self
    }

    /// Adds a detector that is fed in another way: `keys` name its source, such as `push = {}`.
    #[must_use]
    pub fn fed(mut self, name: &str, time_zone: &str, keys: &str) -> Self {
        let entry = format!("[[detectors]]\nname = {}\ntime_zone = {}\n{keys}\n", quoted(name), quoted(time_zone));
        self.detectors.push((name.to_owned(), entry));
        self
    }

    /// Further keys of `[engine]`.
    #[must_use]
    pub fn engine_keys(mut self, keys: &str) -> Self {
        writeln!(self.engine, "{keys}").expect("a string takes everything");
        self
    }

    /// A ready token in place of the account.
    #[must_use]
    pub fn token(mut self, token: &str) -> Self {
        let path = self.dir.path().join("engine-token");
        fs::write(&path, token).expect("the token can be written");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("and be made private");
        self.account = "token_file = \"engine-token\"\n".into();
        self
    }

    /// Further tables, such as `[publish]\nrate = 5`. Not `[engine]`, `[admin]`, `[dead_letter]`: those are written.
    #[must_use]
    pub fn section(mut self, toml: &str) -> Self {
        writeln!(self.sections, "{toml}").expect("a string takes everything");
        self
    }

    /// A variable in the environment of everything that [`Site::command`] runs.
    #[must_use]
    pub fn environment(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("framegate.toml")
    }

    pub fn dead_letters(&self) -> PathBuf {
        self.dir.path().join("dead-letter")
    }

    /// Everything that the daemons of this site have written, one after the other.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The drop directory of a detector.
    #[track_caller]
    pub fn drop_dir(&self, detector: &str) -> PathBuf {
        let index = self.detectors.iter().position(|(name, _)| name == detector);
        self.dir.path().join("drop").join(index.expect("the site has this detector").to_string())
    }

    /// Every file below the drop directories, claims of a daemon included, the locks of living ones not: empty when all
    /// is settled.
    pub fn files_left(&self) -> Vec<PathBuf> {
        let mut files = files_below(&self.dir.path().join("drop"));
        files.retain(|path| {
            let hidden = path.parent().and_then(Path::file_name).is_some_and(|dir| dir == ".framegate");
            !(hidden && path.extension().is_some_and(|it| it == "lock"))
        });
        files
    }

    /// Writes the configuration as it stands; [`Site::start`] does so too.
    pub fn write_config(&self) {
        let path = self.dir.path().to_str().expect("temporary directories have plain names");
        let mut toml = format!(
            "[engine]\n{}{}\n\
             [dead_letter]\ndirectory = {}\n\n\
             [admin]\nlisten = \"127.0.0.1:0\"\ncontrol = {}\n\n{}\n",
            self.engine,
            self.account,
            quoted(&format!("{path}/dead-letter")),
            quoted(&format!("{path}/control.sock")),
            self.sections,
        );
        for (_, entry) in &self.detectors {
            writeln!(toml, "{entry}").expect("a string takes everything");
        }
        fs::write(self.config(), toml).expect("the configuration can be written");
    }

    /// The real binary, told to use this site's configuration.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
        command.args(arguments).arg("--config").arg(self.config());
        command.env_remove("NOTIFY_SOCKET").env_remove("CREDENTIALS_DIRECTORY");
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command
    }

    /// Starts the daemon and waits until it is ready.
    #[track_caller]
    pub fn run(&self) -> Daemon<'_> {
        self.start().until_ready()
    }

    /// Starts the daemon and does not wait: for those that must fail, or cannot become ready.
    pub fn start(&self) -> Daemon<'_> {
        self.start_as(self.command(&["run"]))
    }

    /// `framegate run` as a shell starts it: `script` ends in `exec "$@"`, after a limit or with a redirection.
    pub fn shell(&self, script: &str) -> Command {
        let run = self.command(&["run"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(run.get_program()).args(run.get_args());
        for (key, value) in run.get_envs() {
            match value {
                Some(value) => shell.env(key, value),
                None => shell.env_remove(key),
            };
        }
        shell
    }

    /// [`Site::start`] by a command of the test's own, such as that of [`Site::shell`].
    pub fn start_as(&self, mut command: Command) -> Daemon<'_> {
        self.write_config();
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).expect("the log can be opened");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        Daemon { site: self, child, admin: String::new() }
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("daemon.log")
    }
}

/// A running daemon. Dropped, it is killed; a failing test then shows the end of its log.
pub struct Daemon<'a> {
    site: &'a Site,
    child: Child,
    admin: String,
}

impl Daemon<'_> {
    /// Waits until it has told where it listens, and is ready.
    #[track_caller]
    pub fn until_ready(self) -> Self {
        let mut daemon = self.until_told();
        eventually("the daemon is ready", PATIENCE, || {
            daemon.assert_alive();
            daemon.get("/readyz").ok().filter(|(status, _)| *status == 200)
        });
        daemon
    }

    /// Waits until it has told where it listens, for those that cannot become ready.
    #[track_caller]
    pub fn until_told(mut self) -> Self {
        self.admin = eventually("the daemon answers on its control socket", PATIENCE, || {
            self.assert_alive();
            let status = self.site.command(&["status", "--json"]).stderr(Stdio::null()).output().ok()?;
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
            Some(status["admin"].as_str()?.to_owned())
        });
        self
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) {
        self.child.kill().expect("the daemon runs");
        self.child.wait().expect("a child can be waited for");
    }

    /// SIGTERM, and waits for the end.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// SIGHUP: the daemon reads its configuration again. Nothing is waited for; `framegate reload` does that.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the daemon runs");
    }

    /// Waits for the end, without asking for it.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the daemon ends", PATIENCE, || self.child.try_wait().expect("a child can be waited for"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the admin listener is.
    pub fn admin(&self) -> &str {
        &self.admin
    }

    /// One GET on the admin listener: status and body.
    pub fn get(&self, path: &str) -> io::Result<(u16, String)> {
        http_get(&self.admin, path)
    }

    #[track_caller]
    pub fn metrics(&self) -> Samples {
        let (status, text) = self.get("/metrics").expect("the admin listener answers");
        assert_eq!(status, 200, "{text}");
        Samples::parse(&text)
    }

    /// Waits until nothing is pending and the drop directories are empty, then holds the equation.
    #[track_caller]
    pub fn idle(&mut self, patience: Duration) -> Samples {
        let begun = Instant::now();
        let samples = loop {
            self.assert_alive();
            let samples = self.metrics();
            let (pending, left) = (samples.count("framegate_frames_pending", ""), self.site.files_left());
            if pending == 0 && left.is_empty() {
                // Once more: a scrape shows its counters as they were a moment before its gauges.
                break self.metrics();
            }
            assert!(
                begun.elapsed() < patience,
                "not settled within {patience:?}: {pending} pending, {} files left, such as {:?}; {}",
                left.len(),
                left.first(),
                self.get("/status").map_or_else(|error| error.to_string(), |(_, status)| status),
            );
            std::thread::sleep(POLL);
        };
        samples.equation_holds().expect("the equation of the design");
        samples
    }

    #[track_caller]
    fn assert_alive(&mut self) {
        let ended = self.child.try_wait().expect("a child can be waited for");
        assert!(ended.is_none(), "the daemon ended: {ended:?}");
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
        if std::thread::panicking() {
            let log = self.site.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
            let _lost = writeln!(io::stderr(), "--- end of the daemon's log\n{shown}\n---");
        }
    }
}

/// One scrape: the value of each series, by its whole text, such as `framegate_frames_pending{detector="A"}`.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<String, f64>);

impl Samples {
    pub fn parse(text: &str) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// The sum over all series of this name that have `label`, as in `reason="truncated"`; `""` stands for every series.
    pub fn sum(&self, name: &str, label: &str) -> f64 {
        self.0.iter().filter(|(series, _)| is(series, name, label)).map(|(_, value)| value).sum()
    }

    /// [`Samples::sum`] for what is counted in whole frames.
    #[expect(clippy::cast_possible_truncation, reason = "no test has that many frames")]
    pub fn count(&self, name: &str, label: &str) -> i64 {
        self.sum(name, label).round() as i64
    }

    /// `received = published + dead_lettered + dropped + returned + pending`, for each detector. At a quiet moment only.
    pub fn equation_holds(&self) -> Result<(), String> {
        let mut detectors = 0;
        for series in self.0.keys() {
            let Some(labels) = series.strip_prefix("framegate_frames_pending{") else { continue };
            let detector = labels.trim_end_matches('}');
            let frames = |what: &str| self.count(&format!("framegate_frames_{what}"), detector);
            let received = frames("received_total");
            let parts = ["published_total", "dead_lettered_total", "dropped_total", "returned_total", "pending"];
            let accounted: i64 = parts.iter().map(|part| frames(part)).sum();
            if received != accounted {
                let parts: Vec<String> = parts.iter().map(|part| format!("{part} {}", frames(part))).collect();
                return Err(format!("{detector}: received {received}, but {}", parts.join(", ")));
            }
            detectors += 1;
        }
        if detectors == 0 { Err("no detector in these metrics".to_owned()) } else { Ok(()) }
    }
}

fn is(series: &str, name: &str, label: &str) -> bool {
    let Some(rest) = series.strip_prefix(name) else { return false };
    let labels = rest.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    match labels {
        None => rest.is_empty() && label.is_empty(),
        Some(labels) => {
            label.is_empty()
                || labels.match_indices(label).any(|(at, _)| {
                    let end = &labels[at + label.len()..];
                    (at == 0 || labels[..at].ends_with(',')) && (end.is_empty() || end.starts_with(','))
                })
        }
    }
}

/// Puts an image into a drop directory as a careful detector does: under a name that is not looked at, then renamed.
#[track_caller]
pub fn put(dir: &Path, name: &str, image: &[u8]) {
    let unfinished = dir.join(format!(".{}.part", name.replace('/', "-")));
    let path = dir.join(name);
    fs::create_dir_all(path.parent().expect("a name below the directory")).expect("sub-directories can be made");
    fs::write(&unfinished, image).expect("an image can be written");
    fs::rename(&unfinished, path).expect("and renamed");
}

/// A detector that writes in place, piece by piece, when the test says so. Dropped early, it died half way.
pub struct SlowWriter {
    file: File,
    pieces: std::vec::IntoIter<Vec<u8>>,
}

impl SlowWriter {
    #[track_caller]
    pub fn create(path: &Path, image: &[u8], pieces: usize) -> Self {
        let size = image.len().div_ceil(pieces).max(1);
        let pieces: Vec<Vec<u8>> = image.chunks(size).map(<[u8]>::to_vec).collect();
        Self { file: File::create(path).expect("the file can be made"), pieces: pieces.into_iter() }
    }

    /// Writes the next piece; false when there is none left.
    #[track_caller]
    pub fn piece(&mut self) -> bool {
        let Some(piece) = self.pieces.next() else { return false };
        self.file.write_all(&piece).expect("a piece can be written");
        true
    }
}

/// Every file below `dir`, in order; what cannot be listed is not there.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.extend(files_below(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// HTTP/1.0, so that the answer ends with the connection.
pub fn http_get(address: &str, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(HTTP_TIMEOUT))?;
    stream.set_write_timeout(Some(HTTP_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("no end of the head"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| io::Error::other("no status"))?, body.to_owned()))
}

/// `text` as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

#[test]
fn the_equation_is_found_broken_for_one_detector_among_others() {
    let text = |published: u32| {
        format!(
            "# HELP framegate_frames_pending x\n\
             framegate_frames_received_total{{detector=\"A\",source=\"directory\"}} 3\n\
             framegate_frames_received_total{{detector=\"A\",source=\"command-line\"}} 1\n\
             framegate_frames_received_total{{detector=\"Say \\\"A\\\", {{x}}\",source=\"directory\"}} 7\n\
             framegate_frames_published_total{{detector=\"A\"}} {published}\n\
             framegate_frames_published_total{{detector=\"Say \\\"A\\\", {{x}}\"}} 7\n\
             framegate_frames_dead_lettered_total{{detector=\"A\",reason=\"truncated\"}} 1\n\
             framegate_frames_pending{{detector=\"A\"}} 1\n\
             framegate_frames_pending{{detector=\"Say \\\"A\\\", {{x}}\"}} 0\n"
        )
    };
    assert_eq!(Samples::parse(&text(2)).equation_holds(), Ok(()));
    assert!(Samples::parse(&text(1)).equation_holds().unwrap_err().starts_with("detector=\"A\": received 4"));
    assert!(Samples::default().equation_holds().is_err());
    assert_eq!(Samples::parse(&text(2)).count("framegate_frames_dead_lettered_total", "reason=\"truncated\""), 1);
}
