//! What keeps a drop directory from delivering. Each kind of trouble is said and ended by who meets it; the detector is
//! held while there is any.

use std::io;
use std::sync::PoisonError;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use super::Site;
use crate::source::State;

/// Everything that is wrong now.
#[derive(Default)]
pub(super) struct Troubles {
    directory: Option<String>,
    settling: Option<String>,
    taking: Option<Taking>,
}

struct Taking {
    why: String,
    until: Instant,
}

impl Troubles {
    fn worst(&self) -> Option<&str> {
        let taking = self.taking.as_ref().map(|taking| &taking.why);
        self.directory.as_ref().or(self.settling.as_ref()).or(taking).map(String::as_str)
    }
}

impl Site {
    /// The directory cannot be used, and why; `None`: it can.
    pub(in crate::source::directory) fn directory_trouble(&self, why: Option<String>) {
        self.change(|troubles| troubles.directory = why);
    }

    /// Settled files cannot be removed, and why; `None`: there are none.
    pub(in crate::source::directory) fn settling_trouble(&self, why: Option<String>) {
        self.change(|troubles| troubles.settling = why);
    }

    /// Files cannot be taken. It is over when it has not been met again for `lasts`.
    pub(super) fn taking_trouble(&self, why: String, lasts: Duration) {
        self.change(|troubles| troubles.taking = Some(Taking { why, until: Instant::now() + lasts }));
    }

    /// Ends trouble with taking that was not met again. Call it every second or so.
    pub(in crate::source::directory) fn forget_old_trouble(&self) {
        let now = Instant::now();
        let over = |taking: &mut Taking| taking.until <= now;
        if self.troubles.lock().unwrap_or_else(PoisonError::into_inner).taking.as_mut().is_some_and(over) {
            self.change(|troubles| drop(troubles.taking.take_if(over)));
        }
    }

    fn change(&self, change: impl FnOnce(&mut Troubles)) {
        // Held over all of it, so that what is shown is what was said last.
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut troubles);
        let (name, path) = (&self.entry.name, &self.config.path);
        let why = troubles.worst();
        let was_held = self.health.held().is_some();
        let news = {
            // Its state under this lock, for lines that are made just now; after the lines, so that who sees it ready sees it up.
            let inner = self.inner();
            for line in inner.lines.values() {
                line.metrics.up(why.is_none());
            }
            self.health.set(why.map_or(State::Ok, |why| State::Held(why.to_owned())))
        };
        match why {
            Some(why) if news => tracing::warn!(detector = %name, ?path, "detector held: {why}"),
            None if news && was_held => tracing::info!(detector = %name, ?path, "detector delivers again"),
            Some(_) | None => {}
        }
    }
}

/// Whether every other file would meet it too.
pub(super) fn concerns_all(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::ROFS | Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    )
}

/// What to do about it.
pub(super) fn advice(error: &io::Error) -> String {
    let what = match Errno::from_io_error(error) {
        Some(Errno::ROFS) => "the file system is read-only; nothing is taken until it can be written",
        Some(Errno::ACCESS | Errno::PERM) => {
            "files cannot be taken from it; make the service's user the owner of the directory"
        }
        Some(Errno::NOSPC | Errno::DQUOT) => "its file system is full",
        Some(Errno::MFILE | Errno::NFILE) => "no file descriptors are left; raise LimitNOFILE",
        Some(_) | None => "files cannot be taken from it",
    };
    format!("{what} ({error})")
}
