//! Watching a drop directory with inotify. Events are hints: what they miss, the next scan finds.
//!
//! Not here: what an event's file is good for.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

use super::tree;

/// The kernel's events are read in portions of this many bytes: some thousand events.
const BUFFER_BYTES: usize = 64 * 1024;

/// What the kernel told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A file was renamed to this name: complete.
    Moved { dir: Arc<[u8]>, name: Arc<[u8]> },
    /// A writer closed the file.
    Closed { dir: Arc<[u8]>, name: Arc<[u8]> },
    /// There is a new sub-directory.
    Directory { dir: Arc<[u8]> },
    /// Events were lost: everything must be looked at.
    Overflow,
    /// The watched directory itself went away or another was put in its place.
    Gone,
}

/// The events of one drop directory. Cancel safe.
pub(super) struct Events {
    stream: EventStream<Vec<u8>>,
    directories: Directories,
}

/// Adds directories to the watch; may be used while scanning, on another thread.
#[derive(Clone)]
pub(super) struct Watcher {
    watches: Watches,
    recursive: bool,
    directories: Directories,
}

type Directories = Arc<Mutex<HashMap<WatchDescriptor, Arc<[u8]>>>>;

/// Begins to watch nothing. Call it inside the runtime.
pub(super) fn begin(recursive: bool) -> io::Result<(Watcher, Events)> {
    let inotify = Inotify::init()?;
    let directories = Directories::default();
    let watcher = Watcher { watches: inotify.watches(), recursive, directories: directories.clone() };
    Ok((watcher, Events { stream: inotify.into_event_stream(vec![0; BUFFER_BYTES])?, directories }))
}

/// Whether the kernel tells of all changes on this file system: not where others (servers, layers) make them.
pub(super) fn tells_all(dir: impl AsFd) -> bool {
    const NFS: u64 = 0x6969;
    const SMB: u64 = 0x517b;
    const SMB2: u64 = 0xfe53_4d42;
    const CIFS: u64 = 0xff53_4d42;
    const FUSE: u64 = 0x6573_5546;
    const OVERLAY: u64 = 0x794c_7630;
    const NINE_P: u64 = 0x0102_1997;
    const CEPH: u64 = 0x00c3_6400;
    let Ok(stat) = rustix::fs::fstatfs(dir) else { return false };
    #[expect(clippy::allow_attributes, reason = "the type differs between architectures")]
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
    let kind = stat.f_type as u64 & 0xffff_ffff;
    ![NFS, SMB, SMB2, CIFS, FUSE, OVERLAY, NINE_P, CEPH].contains(&kind)
}

impl Watcher {
    /// Watches the directory that is open as `fd`. Watching it already is no error.
    pub(super) fn add(&self, fd: impl AsFd, dir: &Arc<[u8]>) -> io::Result<()> {
        let mut mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        if self.recursive {
            mask |= WatchMask::CREATE;
        }
        // The open directory itself, whatever its name leads to by now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
        // The lock is held over the call, so that no event comes before its directory is known.
        let mut directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = self.watches.clone().add(path, mask | WatchMask::ONLYDIR)?;
        directories.insert(watch, dir.clone());
        Ok(())
    }
}

impl Events {
    /// The next event that means something; an error ends the watch.
    pub(super) async fn next(&mut self) -> io::Result<Event> {
        loop {
            let event = match self.stream.next().await {
                Some(event) => event?,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            };
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                return Ok(Event::Overflow);
            }
            let mut directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(dir) = directories.get(&event.wd).cloned() else { continue };
            if event
                .mask
                .intersects(EventMask::IGNORED | EventMask::UNMOUNT | EventMask::DELETE_SELF | EventMask::MOVE_SELF)
            {
                if event.mask.intersects(EventMask::IGNORED) {
                    directories.remove(&event.wd);
                }
                if dir.is_empty() {
                    return Ok(Event::Gone);
                }
                continue;
            }
            let Some(name) = event.name.map(OsString::into_vec) else { continue };
            if event.mask.contains(EventMask::ISDIR) {
                return Ok(Event::Directory { dir: tree::join(&dir, &name).into() });
            }
            let name = name.into();
            if event.mask.contains(EventMask::MOVED_TO) {
                return Ok(Event::Moved { dir, name });
            }
            if event.mask.contains(EventMask::CLOSE_WRITE) {
                return Ok(Event::Closed { dir, name });
            }
        }
    }
}
