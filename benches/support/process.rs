//! A child process that is measured: what it used of the machine. It ends with us.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// Of `/proc/PID/stat`, in which every time is rounded down: the same on every Linux.
const TICK: Duration = Duration::from_millis(10);

/// CPU time, by who spent it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub user: Duration,
    pub system: Duration,
}

impl Cpu {
    pub(crate) fn total(self) -> Duration {
        self.user + self.system
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { user: self.user.saturating_sub(before.user), system: self.system.saturating_sub(before.system) }
    }
}

/// See the file's head.
pub(crate) struct Process {
    child: Child,
    /// Its end tells some children to end themselves.
    input: Option<ChildStdin>,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a process");
        let input = child.stdin.take();
        Self { child, input }
    }

    /// Its own and that of its children that ended, so far.
    pub(crate) fn cpu(&self) -> Cpu {
        let stat = fs::read_to_string(self.proc("stat")).expect("it runs");
        // Behind the name, which may contain anything: the 14th to the 17th field are the 12th to the 15th.
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let time = |at: usize| TICK * fields[at].parse::<u32>().expect("ticks");
        Cpu { user: time(11) + time(13) + TICK / 2, system: time(12) + time(14) + TICK / 2 }
    }

    /// The most memory that it ever had, MiB.
    pub(crate) fn peak_mib(&self) -> f64 {
        self.status_mib("VmHWM:")
    }

    /// What it has now, MiB.
    pub(crate) fn resident_mib(&self) -> f64 {
        self.status_mib("VmRSS:")
    }

    /// Lets it end by itself: SIGTERM, and the end of its standard input.
    pub(crate) fn end(mut self) {
        drop(self.input.take());
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM)
            .ok();
        self.child.wait().expect("a child");
    }

    fn status_mib(&self, field: &str) -> f64 {
        let status = fs::read_to_string(self.proc("status")).expect("it runs");
        let value = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of status");
        value.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
