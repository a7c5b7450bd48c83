//! The archive: published files kept under their own names and sub-directories, and removed when they are old.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::claim::Claim;
use super::tree;

/// Moves a claimed file into the archive. A file of that name that is there already stays; the new one gets its frame
/// id in front. On another file system it is copied, and durable there before the claim goes.
pub(super) fn keep(archive: &Path, claim: &Claim) -> io::Result<()> {
    let root = tree::open(archive).map_err(|error| {
        io::Error::new(error.kind(), format!("the archive {} cannot be opened: {error}", archive.display()))
    })?;
    let to = tree::make_below(root.as_fd(), &claim.dir)?;
    let (place, name) = claim.place(false)?;
    let second = [claim.id.as_str().as_bytes(), b".", claim.name.rsplit(|b| *b == b'.').next().unwrap_or(b"")].concat();
    for as_name in [&*claim.name, &second] {
        match rename(place.as_fd(), &name, to.as_fd(), as_name) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(Errno::XDEV) => return copy(claim, place.as_fd(), &name, to.as_fd(), &second),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn copy(claim: &Claim, from: BorrowedFd<'_>, name: &[u8], to: BorrowedFd<'_>, second: &[u8]) -> io::Result<()> {
    let temp = format!(".{}.tmp", claim.id);
    let mut source = File::from(tree::open_file(from, name)?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut target = File::from(rustix::fs::openat(to, temp.as_str(), flags, Mode::RUSR | Mode::WUSR)?);
    let result = (|| {
        io::copy(&mut source, &mut target)?;
        target.set_modified(source.metadata()?.modified()?)?;
        target.sync_all()?;
        match rename(to, temp.as_bytes(), to, &claim.name) {
            // Under its id there can only be the same frame, from a copy that a crash ended before the unlink.
            Err(Errno::EXIST) => rustix::fs::renameat(to, temp.as_str(), to, OsStr::from_bytes(second))?,
            other => other?,
        }
        Ok(rustix::fs::fsync(to)?)
    })();
    if result.is_err() {
        // Best effort: the janitor takes what stays.
        rustix::fs::unlinkat(to, temp.as_str(), AtFlags::empty()).ok();
        return result;
    }
    claim.remove()
}

/// Removes archived files that lie there for longer than `max_age`, and directories that are empty then. How many files.
pub(super) fn tidy(archive: &Path, max_age: Duration) -> io::Result<u64> {
    let root = tree::open(archive)?;
    let oldest = Timestamp::now().as_nanosecond() - i128::try_from(max_age.as_nanos()).unwrap_or(i128::MAX);
    let mut removed = 0;
    sweep(root.as_fd(), oldest, 0, &mut removed)?;
    Ok(removed)
}

fn sweep(dir: BorrowedFd<'_>, oldest: i128, depth: usize, removed: &mut u64) -> io::Result<()> {
    let mut below = Vec::new();
    tree::each(dir, |name, _| {
        let look = tree::look(dir, name)?;
        if look.kind == FileType::Directory {
            below.push((name.to_vec(), look));
        // The change of its inode is when it came here, whatever its content's time.
        } else if look.kind == FileType::RegularFile && i128::from(look.ctime) < oldest {
            rustix::fs::unlinkat(dir, OsStr::from_bytes(name), AtFlags::empty())?;
            *removed += 1;
        }
        Ok(())
    })?;
    for (name, look) in below {
        if depth < tree::DEPTH_MAX {
            sweep(tree::open_below(dir, &name)?.as_fd(), oldest, depth + 1, removed)?;
        }
        if i128::from(look.ctime) < oldest {
            // Not empty: it stays.
            rustix::fs::unlinkat(dir, OsStr::from_bytes(&name), AtFlags::REMOVEDIR).ok();
        }
    }
    Ok(())
}

fn rename(from: BorrowedFd<'_>, name: &[u8], to: BorrowedFd<'_>, as_name: &[u8]) -> Result<(), Errno> {
    rustix::fs::renameat_with(from, OsStr::from_bytes(name), to, OsStr::from_bytes(as_name), RenameFlags::NOREPLACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_lie_there_for_long_are_removed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("Lobby")).unwrap();
        std::fs::write(home.path().join("Lobby/a.jpg"), b"a").unwrap();
        assert_eq!(tidy(home.path(), Duration::from_hours(1)).unwrap(), 0);
        assert_eq!(tidy(home.path(), Duration::ZERO).unwrap(), 1);
    }
}
