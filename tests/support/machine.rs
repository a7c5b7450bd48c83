//! A machine with a systemd of its own: a Debian booted in a container by `scripts/boot-systemd`, with the package of this
//! build installed on it as a technician would. Nothing of it is left when it is dropped.
//!
//! What is missing for it gives `None`; the test then has said so with [`skipped`] and returns.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use super::faults::skipped;
use super::{PASSWORD, PATIENCE, USERNAME, eventually, faces};

/// Exit status of our scripts when something that they need is missing.
const MISSING: i32 = 77;
/// Where the machine's stand-in engine listens.
const ENGINE: &str = "127.0.0.1:6009";

/// A booted machine.
pub struct Machine {
    container: Child,
    init: String,
}

impl Machine {
    /// Boots Debian `suite`.
    pub fn boot(test: &str, suite: &str) -> Option<Self> {
        let mut container = Command::new(repository().join("scripts/boot-systemd"))
            .arg(suite)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the script starts");
        let mut init = String::new();
        let stdout = container.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut init).expect("text");
        if init.is_empty() {
            let output = container.wait_with_output().expect("a child can be waited for");
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            assert_eq!(output.status.code(), Some(MISSING), "scripts/boot-systemd {suite}: {why}");
            skipped(test, &why);
            return None;
        }
        Some(Self { container, init: init.trim().to_owned() })
    }

    /// [`Machine::boot`], with the package of this build copied to `/root/framegate.deb`.
    pub fn with_package(test: &str, suite: &str) -> Option<Self> {
        let package = match package() {
            Ok(package) => package,
            Err(why) => {
                skipped(test, why);
                return None;
            }
        };
        let machine = Self::boot(test, suite)?;
        fs::copy(package, machine.path("/root/framegate.deb")).expect("the package can be copied");
        Some(machine)
    }

    /// [`Machine::with_package`], installed, and set up by the lines that the configuration offers: with a stand-in engine,
    /// the password as a credential, the users `ftp` and `cam`, who may drop images, and `stranger`, who may not. Not started.
    pub fn set_up(test: &str, suite: &str) -> Option<Self> {
        let machine = Self::with_package(test, suite)?;
        machine.says("dpkg --install /root/framegate.deb");
        machine.start_engine();
        machine.configure();
        machine.says(
            "useradd --create-home --groups framegate-drop ftp
             useradd --create-home --groups framegate-drop cam
             useradd --create-home stranger",
        );
        Some(machine)
    }

    /// [`Machine::set_up`], started and connected.
    pub fn running(test: &str, suite: &str) -> Option<Self> {
        let machine = Self::set_up(test, suite)?;
        machine.says("systemctl start framegate");
        Some(machine)
    }

    pub fn start_engine(&self) {
        self.says(&format!(
            "systemd-run --quiet --unit=engine --property=User=nobody framegate simulate-engine \
             --listen {ENGINE} --username {USERNAME} --password {PASSWORD}"
        ));
        self.until("the engine answers", &format!("curl -sf {ENGINE}/__simulator/counts"));
    }

    /// What the packaged configuration says is to be done, done.
    pub fn configure(&self) {
        self.says(&format!(
            "sed -i 's/^#\\([^ ]\\)/\\1/; s|https://10.0.0.123:5009|http://{ENGINE}|' /etc/framegate/framegate.toml
             echo {PASSWORD} | install -m 0600 /dev/stdin /etc/credstore/engine-password"
        ));
    }

    /// Runs a script in the machine, as root.
    pub fn shell(&self, script: &str) -> Output {
        self.run(&["sh", "-ec", script])
    }

    /// Runs a script that must succeed: its standard output.
    #[track_caller]
    pub fn says(&self, script: &str) -> String {
        let output = self.shell(script);
        assert!(output.status.success(), "{script}\n{}: {}", output.status, text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a script that must fail: everything that it said.
    #[track_caller]
    pub fn refuses(&self, script: &str) -> String {
        let output = self.shell(script);
        assert!(!output.status.success(), "{script}\nsucceeded: {}", text(&output));
        text(&output)
    }

    /// Runs a script as one of the machine's users: whether it succeeded.
    pub fn may(&self, user: &str, script: &str) -> bool {
        self.run(&["runuser", "-u", user, "--", "sh", "-ec", script]).status.success()
    }

    /// Waits until a script succeeds.
    #[track_caller]
    pub fn until(&self, what: &str, script: &str) {
        eventually(what, PATIENCE, || self.shell(script).status.success().then_some(()));
    }

    /// A property of the service, as systemd sees it.
    #[track_caller]
    pub fn property(&self, name: &str) -> String {
        self.says(&format!("systemctl show --value --property={name} framegate")).trim().to_owned()
    }

    /// Everything in the journal about the service.
    pub fn journal(&self) -> String {
        self.says("journalctl --sync; journalctl --unit=framegate --output=cat --no-pager")
    }

    /// How many frames the engine has accepted.
    #[track_caller]
    pub fn accepted(&self) -> u64 {
        let counts = self.says(&format!("curl -sf {ENGINE}/__simulator/counts"));
        let counts: serde_json::Value = serde_json::from_str(&counts).expect("JSON");
        counts["accepted"].as_u64().unwrap_or_else(|| panic!("{counts}"))
    }

    #[track_caller]
    pub fn until_accepted(&self, frames: u64) {
        eventually(&format!("{frames} frames are accepted"), PATIENCE, || (self.accepted() >= frames).then_some(()));
    }

    /// One GET on the daemon's admin listener.
    #[track_caller]
    pub fn admin(&self, path: &str) -> String {
        self.says(&format!("curl -sS 127.0.0.1:9464{path}"))
    }

    /// Drops a face into `directory` as `user`, under a name that is not looked at and then renamed.
    #[track_caller]
    pub fn drop_face(&self, user: &str, directory: &str, number: u64) {
        let image = format!("/tmp/face-{number}.jpg");
        fs::write(self.path(&image), faces::face(number, 4 << 10)).expect("an image can be written");
        let drop = format!(
            "umask 077; mkdir -p {directory}
             cp {image} {directory}/{number}.jpg.part; mv {directory}/{number}.jpg.part {directory}/{number}.jpg"
        );
        assert!(self.may(user, &drop), "{user} may not drop an image into {directory}");
    }

    /// A path of the machine as it is seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    fn run(&self, command: &[&str]) -> Output {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--all", "--target", &self.init]).args(command).stdin(Stdio::null());
        nsenter.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        nsenter.output().expect("nsenter starts")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut shown = String::from("--- end of the machine's journal\n");
            let journal = self.run(&["journalctl", "--no-pager", "--lines=60"]);
            let _lost = writeln!(shown, "{}---", String::from_utf8_lossy(&journal.stdout));
            let _lost = io::stderr().write_all(shown.as_bytes());
        }
        drop(self.container.stdin.take());
        let _reaped = self.container.wait();
    }
}

/// Standard output and error of a command.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The package of the binary that is tested, built once; or what is missing for it.
pub fn package() -> Result<&'static Path, &'static str> {
    static PACKAGE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = PACKAGE.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
        let mut script = Command::new(repository().join("scripts/package"));
        script.args(["--binary", env!("CARGO_BIN_EXE_framegate"), "--output"]).arg(&directory);
        // A test has no use for a small one.
        script.env("DPKG_DEB_COMPRESSOR_TYPE", "gzip").env("DPKG_DEB_COMPRESSOR_LEVEL", "1");
        let output = script.output().expect("the script starts");
        if output.status.code() == Some(MISSING) {
            return Err(text(&output).trim().to_owned());
        }
        assert!(output.status.success(), "{}", text(&output));
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    });
    built.as_deref().map_err(String::as_str)
}
