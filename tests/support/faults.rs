//! Faults of the operating system: mounts, kernel settings, and system calls that fail on order. Each ends when it is dropped.
//!
//! What needs a privilege or a tool that is missing gives `None`; the test then says so with [`skipped`] and returns.

use std::fs::{self, File};
use std::io::{Write as _, stderr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, eventually};

/// Says loudly, past the capture of the test's output, that a test did not run.
pub fn skipped(test: &str, why: &str) {
    let line = format!("\nSKIPPED {test}: {why}\n");
    let _lost = File::options().append(true).open("/dev/stderr").and_then(|mut err| err.write_all(line.as_bytes()));
    let _lost = stderr().write_all(line.as_bytes());
}

/// Runs a command quietly: whether it exists and succeeded.
pub fn works(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// A mounted file system.
pub struct Mount(PathBuf);

impl Mount {
    /// A new, empty one in memory; `options` such as `size=1m`.
    pub fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        Self::new(&["-t", "tmpfs", "-o", options, "tmpfs"], at)
    }

    pub fn overlay(at: &Path, lower: &Path, upper: &Path, work: &Path) -> Option<Self> {
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        Self::new(&["-t", "overlay", "-o", &options, "overlay"], at)
    }

    /// A file that holds a file system.
    pub fn image(at: &Path, file: &Path) -> Option<Self> {
        Self::new(&["-o", "loop", file.to_str().expect("a plain path")], at)
    }

    fn new(arguments: &[&str], at: &Path) -> Option<Self> {
        fs::create_dir_all(at).expect("a mount point can be made");
        let path = at.to_str().expect("a plain path");
        works("mount", &[arguments, &[path]].concat()).then(|| Self(at.to_owned()))
    }

    /// Changes its options, such as `size=16m`.
    #[track_caller]
    pub fn remount(&self, options: &str) {
        let path = self.0.to_str().expect("a plain path");
        assert!(works("mount", &["-o", &format!("remount,{options}"), path]), "remount,{options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a daemon may still have it open.
        works("umount", &["-l", self.0.to_str().expect("a plain path")]);
    }
}

/// A kernel setting, set back in the end.
pub struct Sysctl {
    path: PathBuf,
    before: String,
}

impl Sysctl {
    pub fn set(name: &str, value: &str) -> Option<Self> {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let before = fs::read_to_string(&path).ok()?;
        fs::write(&path, value).ok()?;
        Some(Self { path, before })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).expect("what could be set can be set back");
    }
}

/// `strace` attached to a running daemon.
pub struct Strace {
    child: Child,
    tracee: u32,
    output: PathBuf,
}

impl Strace {
    /// Attaches with these arguments, such as `-e inject=fsync:error=EIO:when=1`, and writes its trace to `output`.
    pub fn attach(pid: u32, output: &Path, arguments: &[&str]) -> Option<Self> {
        let said = output.with_extension("stderr");
        let mut command = Command::new("strace");
        command.args(["-f", "-o"]).arg(output).args(arguments).args(["-p", &pid.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&said).expect("a file can be made"));
        let mut child = command.spawn().ok()?;
        let attached = eventually("strace attaches, or says why not", PATIENCE, || {
            let ended = child.try_wait().expect("a child can be waited for").is_some();
            let text = fs::read_to_string(&said).unwrap_or_default();
            (ended || text.contains("attached")).then_some(!ended)
        });
        attached.then(|| Self { child, tracee: pid, output: output.to_owned() })
    }

    /// What it has traced so far.
    pub fn trace(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // It detaches and lets the daemon run on. Beside a daemon that it has killed it would wait for ever.
        let alive = fs::read_link(format!("/proc/{}/exe", self.tracee)).is_ok();
        let signal = if alive { Signal::TERM } else { Signal::KILL };
        let _ended_already = kill_process(Pid::from_child(&self.child), signal);
        let _reaped = self.child.wait();
    }
}
