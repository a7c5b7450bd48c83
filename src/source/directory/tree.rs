//! Paths below a directory that others write to: opened component by component, never through a symbolic link, never
//! above or beside it. Everything is relative to a descriptor; names are bytes.
//!
//! Not here: what a file means.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

/// A directory is read in portions of this many bytes: some hundred names.
const ENTRIES_BYTES: usize = 32 * 1024;
/// How deep a tree is followed.
pub(super) const DEPTH_MAX: usize = 32;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// What one look at a file tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime: i64,
    /// Nanoseconds since 1970.
    pub ctime: i64,
    pub links: u64,
    pub kind: FileType,
    pub owner: u32,
}

impl Look {
    fn new(stat: &Stat) -> Self {
        let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        #[expect(clippy::allow_attributes, reason = "the types differ between architectures")]
        #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap, clippy::cast_sign_loss)]
        Self {
            dev: stat.st_dev as u64,
            ino: stat.st_ino as u64,
            size: stat.st_size as u64,
            mtime: nanos(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            ctime: nanos(stat.st_ctime as i64, stat.st_ctime_nsec as i64),
            links: stat.st_nlink as u64,
            kind: FileType::from_raw_mode(stat.st_mode),
            owner: stat.st_uid,
        }
    }

    /// The same file with the same content, as far as the kernel tells.
    pub(super) fn same_content(&self, other: &Self) -> bool {
        (self.dev, self.ino, self.size, self.mtime) == (other.dev, other.ino, other.size, other.mtime)
    }
}

/// Opens a directory by its configured path. That path is the operator's and may hold links.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, DIRECTORY, Mode::empty())?)
}

/// Looks at what a configured path leads to.
pub(super) fn look_along(path: &Path) -> io::Result<Look> {
    // An interrupted look would make the directory seem gone.
    Ok(Look::new(&rustix::io::retry_on_intr(|| rustix::fs::stat(path))?))
}

/// A directory that was opened, or that was open already.
pub(super) enum Opened<'a> {
    Already(BorrowedFd<'a>),
    Now(OwnedFd),
}

impl AsFd for Opened<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Already(fd) => *fd,
            Self::Now(fd) => fd.as_fd(),
        }
    }
}

/// As [`open_below`], but `root` itself is not opened once more: for each frame.
pub(super) fn reach_below<'a>(root: BorrowedFd<'a>, rel: &[u8]) -> io::Result<Opened<'a>> {
    if rel.is_empty() { Ok(Opened::Already(root)) } else { open_below(root, rel).map(Opened::Now) }
}

/// Opens the directory `rel` (components between slashes, empty for `root` itself) below `root`, on the same file system.
pub(super) fn open_below(root: BorrowedFd<'_>, rel: &[u8]) -> io::Result<OwnedFd> {
    walk(root, rel, |_, _| Err(Errno::NOENT))
}

/// The same, making what is missing, for us alone.
pub(super) fn make_below(root: BorrowedFd<'_>, rel: &[u8]) -> io::Result<OwnedFd> {
    walk(root, rel, |parent, name| match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    })
}

fn walk(
    root: BorrowedFd<'_>,
    rel: &[u8],
    missing: impl Fn(BorrowedFd<'_>, &OsStr) -> Result<(), Errno>,
) -> io::Result<OwnedFd> {
    let mut here: Option<OwnedFd> = None;
    for component in rel.split(|b| *b == b'/').filter(|c| !c.is_empty()) {
        let parent = here.as_ref().map_or(root, AsFd::as_fd);
        let name = OsStr::from_bytes(component);
        if component == b"." || component == b".." {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let open = || rustix::fs::openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) => missing(parent, name).and_then(|()| open()),
            other => other,
        };
        here = Some(opened?);
    }
    match here {
        Some(fd) => Ok(fd),
        None => Ok(rustix::fs::openat(root, ".", DIRECTORY, Mode::empty())?),
    }
}

/// Looks at a name without following it.
pub(super) fn look(dir: impl AsFd, name: &[u8]) -> io::Result<Look> {
    Ok(Look::new(&rustix::fs::statat(dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)?))
}

/// Looks at an open file.
pub(super) fn look_at(file: impl AsFd) -> io::Result<Look> {
    Ok(Look::new(&rustix::fs::fstat(file)?))
}

/// Opens a file for reading without following it and without ever waiting for a FIFO's writer.
pub(super) fn open_file(dir: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::openat(dir, OsStr::from_bytes(name), flags, Mode::empty())?)
}

/// Calls `each` with every name in the directory but `.` and `..`; what the kernel says of its kind may be `Unknown`.
pub(super) fn each(dir: impl AsFd, mut each: impl FnMut(&[u8], FileType) -> io::Result<()>) -> io::Result<()> {
    // A descriptor of its own: reading moves its position.
    let own = rustix::fs::openat(&dir, ".", DIRECTORY, Mode::empty())?;
    let mut buffer = Vec::with_capacity(ENTRIES_BYTES);
    let mut entries = RawDir::new(own, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            each(name, entry.file_type())?;
        }
    }
    Ok(())
}

/// Whether there is nothing in the directory.
pub(super) fn is_empty(dir: impl AsFd) -> io::Result<bool> {
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the directories below `dir` that are empty; the others stay. Whether `dir` itself is empty then.
pub(super) fn prune(dir: BorrowedFd<'_>, depth: usize) -> io::Result<bool> {
    let mut empty = true;
    let mut below = Vec::new();
    each(dir, |name, kind| {
        if kind == FileType::Directory && depth < DEPTH_MAX + 2 {
            below.push(name.to_vec());
        } else {
            empty = false;
        }
        Ok(())
    })?;
    for name in below {
        let inside = open_below(dir, &name)?;
        let gone = prune(inside.as_fd(), depth + 1)?
            && rustix::fs::unlinkat(dir, OsStr::from_bytes(&name), AtFlags::REMOVEDIR).is_ok();
        empty &= gone;
    }
    Ok(empty)
}

/// `dir/name`, or `name` alone.
pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}
