//! `framegate top` on the real binary, in a terminal of tmux's: what it shows, what keys and a new size do, how it ends.

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::engine::{Engine, put_face};
use support::faults::{skipped, works};
use support::{PATIENCE, Site, eventually};
use tempfile::TempDir;

/// A tmux server of the test's own with one terminal, in which a shell runs.
struct Terminal {
    dir: TempDir,
}

impl Terminal {
    /// `None`, and it says so: there is no tmux.
    fn open(test: &str, width: u16, height: u16) -> Option<Self> {
        if !works("tmux", &["-V"]) {
            skipped(test, "tmux is missing");
            return None;
        }
        let terminal = Self { dir: tempfile::tempdir().expect("a temporary directory") };
        let (width, height) = (width.to_string(), height.to_string());
        // A shell without anybody's start files, whose prompt tells how the last command ended.
        let shell = "PS1='ended $? ' TERM=tmux-256color exec sh";
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &width, "-y", &height, shell]);
        terminal.until("its prompt", |screen| screen.contains("ended 0"));
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").arg("-u").arg("-S").arg(self.dir.path().join("socket"));
        let output = command.args(arguments).stdin(Stdio::null()).output().expect("tmux starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.keys(&["Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn resize(&self, width: u16, height: u16) {
        self.tmux(&["resize-window", "-x", &width.to_string(), "-y", &height.to_string()]);
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    #[track_caller]
    fn until(&self, what: &str, is: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, PATIENCE, || {
                last = self.screen();
                is(&last).then(|| last.clone())
            })
        }));
        found.unwrap_or_else(|_| panic!("not seen: {what}\n{last}"))
    }

    /// Nothing of `top` is on the screen or in the terminal's modes: what is typed shows, and signals are keys again.
    #[track_caller]
    fn is_restored(&self, ended: &str) {
        // Not the prompt in front of our own command, but the next one.
        self.until("the shell's screen is back", |screen| screen.trim_end().lines().last() == Some(ended));
        assert_eq!(self.tmux(&["display", "-p", "#{alternate_on} #{cursor_flag}"]).trim(), "0 1");
        self.type_line("stty -a");
        self.until("the terminal's modes", |screen| {
            ["icanon", "echo", "isig"].iter().all(|mode| screen.split_whitespace().any(|word| word == *mode))
        });
        self.type_line("clear; sh -c 'exit 0'");
        self.until("a clean screen", |screen| screen.trim() == "ended 0");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

/// The command line for a shell: `framegate top` and these arguments.
fn top(site: &Site, arguments: &str) -> String {
    format!("{} top --config {} {arguments}", env!("CARGO_BIN_EXE_framegate"), site.config().display())
}

fn pid_of_top(site: &Site) -> Pid {
    let is_top = |path: &PathBuf| {
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("\0top\0") && line.contains(site.config().to_str().expect("a plain path"))
    };
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path());
    let found = processes.filter(is_top).find_map(|path| path.file_name()?.to_str()?.parse().ok());
    Pid::from_raw(found.expect("top runs")).expect("a process")
}

#[test]
fn it_shows_the_running_daemon_follows_keys_and_sizes_and_gives_the_terminal_back() {
    let test = "it_shows_the_running_daemon_follows_keys_and_sizes_and_gives_the_terminal_back";
    let Some(terminal) = Terminal::open(test, 80, 24) else { return };
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "").detector("Zoo 動物園", "UTC", "");
    let mut daemon = site.run();
    put_face(&site.drop_dir("Lobby"), 1);
    daemon.idle(PATIENCE);

    terminal.type_line(&top(&site, "--interval 100ms"));
    let screen = terminal.until("engine and detectors", |screen| {
        screen.contains("✓ open for") && screen.contains("Lobby") && screen.contains("Zoo 動物園")
    });
    assert!(screen.contains("state▼") && screen.contains("published"), "{screen}");
    put_face(&site.drop_dir("Zoo 動物園"), 2);
    engine.until_accepted(2);
    terminal.keys(&["s"]);
    terminal.until("another order", |screen| screen.contains("per s▼"));
    terminal.keys(&["r"]);
    terminal.until("turned round", |screen| screen.contains("per s▲"));
    terminal.keys(&["/", "z", "o", "Enter"]);
    terminal.until("one of two", |screen| screen.contains("filter: zo") && screen.contains("1-1 of 1"));
    terminal.keys(&["Down"]);
    terminal.until("all about it", |screen| screen.contains("received 1, published 1"));
    terminal.resize(50, 12);
    terminal.until("a smaller picture", |screen| {
        screen.contains("per s▲") && !screen.contains("delivery") && screen.contains("q quit")
    });
    terminal.resize(120, 40);
    terminal.until("a larger one", |screen| screen.contains("published") && screen.contains("delivery"));
    terminal.keys(&["?"]);
    terminal.until("the help", |screen| screen.contains("turn the order round"));
    terminal.keys(&["x", "q"]);
    terminal.is_restored("ended 0");
}

#[test]
fn it_outlives_the_daemon_and_is_ended_by_keys_and_signals_with_the_terminal_given_back() {
    let test = "it_outlives_the_daemon_and_is_ended_by_keys_and_signals_with_the_terminal_given_back";
    let Some(terminal) = Terminal::open(test, 100, 30) else { return };
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    terminal.type_line(&top(&site, ""));
    terminal.until("what is wrong", |screen| screen.contains("framegate.toml") && screen.contains("ended 78"));
    site.write_config();
    terminal.type_line(&top(&site, ""));
    terminal.until("what is wrong", |screen| screen.contains("no daemon can be asked") && screen.contains("ended 1"));
    terminal.type_line("clear");

    let daemon = site.run();
    terminal.type_line(&top(&site, "--interval 100ms"));
    terminal.until("the daemon", |screen| screen.contains("✓ open for"));
    daemon.kill();
    terminal.until("its end", |screen| screen.contains("daemon  ✗ cannot be asked for") && screen.contains("Lobby"));
    let _daemon = site.run();
    terminal.until("its return", |screen| !screen.contains("cannot be asked") && screen.contains("✓ open for"));
    terminal.keys(&["C-c"]);
    terminal.is_restored("ended 0");

    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        terminal.type_line(&top(&site, ""));
        terminal.until("the daemon", |screen| screen.contains("✓ open for"));
        kill_process(pid_of_top(&site), signal).expect("top runs");
        terminal.is_restored("ended 0");
    }
}

#[test]
fn without_a_terminal_it_says_which_command_needs_none() {
    let site = Site::new("http://127.0.0.1:9").detector("Lobby", "UTC", "");
    site.write_config();
    let output = site.command(&["top"]).output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("needs a terminal") && text.contains("framegate status"), "{text}");
    assert!(output.stdout.is_empty());
    for wrong in ["0s", "1ms", "soon"] {
        let output = site.command(&["top", "--interval", wrong]).output().expect("the binary starts");
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}
