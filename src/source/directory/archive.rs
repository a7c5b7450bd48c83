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
use tokio_util::sync::CancellationToken;

use super::claim::Claim;
use super::tree;

/// Moves a claimed file into the archive. A file of that name that is there already stays; the new one gets its frame
/// id in front. On another file system it is copied, and durable there before the claim goes. Done already is done.
pub(super) fn keep(archive: &Path, claim: &Claim) -> io::Result<()> {
    let root = tree::open(archive).map_err(|error| {
        io::Error::new(error.kind(), format!("the archive {} cannot be opened: {error}", archive.display()))
    })?;
    let (place, name) = match claim.place() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let second = [claim.id.as_str().as_bytes(), b".", claim.name.rsplit(|b| *b == b'.').next().unwrap_or(b"")].concat();
    // Twice: tidying may remove the directory between making it and renaming into it.
    for _ in 0..2 {
        let to = tree::make_below(root.as_fd(), &claim.dir)?;
        for as_name in [&*claim.name, &second] {
            match rename(place.as_fd(), &name, to.as_fd(), as_name) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(Errno::XDEV) => return copy(claim, place.as_fd(), &name, to.as_fd(), &second),
                Err(Errno::NOENT) => match tree::look(&place, &name) {
                    // Done by a try whose answer was lost, or somebody removed it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    Err(error) => return Err(error),
                    Ok(_) => break,
                },
                Err(error) => return Err(error.into()),
            }
        }
    }
    Err(io::Error::other(format!("no place for it in the archive {}", archive.display())))
}

fn copy(claim: &Claim, from: BorrowedFd<'_>, name: &[u8], to: BorrowedFd<'_>, second: &[u8]) -> io::Result<()> {
    let temp = format!(".{}.tmp", claim.id);
    let mut source = match tree::open_file(from, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => File::from(other?),
    };
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

/// Removes archived files that lie there for longer than `max_age`, and directories that are empty then, until `stop`. How
/// many files.
pub(super) fn tidy(archive: &Path, max_age: Duration, stop: &CancellationToken) -> io::Result<u64> {
    let root = tree::open(archive)?;
    let oldest = Timestamp::now().as_nanosecond() - i128::try_from(max_age.as_nanos()).unwrap_or(i128::MAX);
    let mut removed = 0;
    sweep(root.as_fd(), oldest, 0, &mut removed, stop)?;
    Ok(removed)
}

/// What an operator or another Framegate removes at the same time is gone, which is what is wanted.
fn sweep(
    dir: BorrowedFd<'_>,
    oldest: i128,
    depth: usize,
    removed: &mut u64,
    stop: &CancellationToken,
) -> io::Result<()> {
    let mut below = Vec::new();
    tree::each(dir, |name, _| {
        if stop.is_cancelled() {
            return Ok(());
        }
        let Some(look) = unless_gone(tree::look(dir, name))? else { return Ok(()) };
        if look.kind == FileType::Directory {
            below.push((name.to_vec(), look));
        // The change of its inode is when it came here, whatever its content's time.
        } else if look.kind == FileType::RegularFile && i128::from(look.ctime) < oldest {
            let unlinked = rustix::fs::unlinkat(dir, OsStr::from_bytes(name), AtFlags::empty());
            *removed += u64::from(unless_gone(unlinked.map_err(io::Error::from))?.is_some());
        }
        Ok(())
    })?;
    for (name, look) in below {
        if depth < tree::DEPTH_MAX
            && let Some(inside) = unless_gone(tree::open_below(dir, &name))?
        {
            sweep(inside.as_fd(), oldest, depth + 1, removed, stop)?;
        }
        if i128::from(look.ctime) < oldest {
            // Not empty: it stays.
            rustix::fs::unlinkat(dir, OsStr::from_bytes(&name), AtFlags::REMOVEDIR).ok();
        }
    }
    Ok(())
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn rename(from: BorrowedFd<'_>, name: &[u8], to: BorrowedFd<'_>, as_name: &[u8]) -> Result<(), Errno> {
    rustix::fs::renameat_with(from, OsStr::from_bytes(name), to, OsStr::from_bytes(as_name), RenameFlags::NOREPLACE)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::claim::Root;
    use super::*;

    fn claimed(drop_dir: &Path, name: &str) -> Claim {
        std::fs::write(drop_dir.join(name), name).unwrap();
        let root = Arc::new(Root::open(drop_dir).unwrap());
        root.claim(root.fd.as_fd(), &Arc::from(*b""), &name.as_bytes().into()).unwrap().unwrap()
    }

    #[test]
    fn a_claim_that_is_gone_already_is_archived_and_one_that_is_there_is_not_gone_because_the_archive_is() {
        let home = tempfile::tempdir().unwrap();
        let [drop_dir, archive] = ["drop", "archive"].map(|name| home.path().join(name));
        std::fs::create_dir(&drop_dir).unwrap();
        let claim = claimed(&drop_dir, "a.jpg");
        assert_eq!(keep(&archive, &claim).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::create_dir(&archive).unwrap();
        keep(&archive, &claim).unwrap();
        keep(&archive, &claim).unwrap();
        let claim = claimed(&drop_dir, "b.jpg");
        std::fs::remove_dir_all(drop_dir.join(".framegate")).unwrap();
        keep(&archive, &claim).unwrap();
        assert_eq!(std::fs::read_dir(&archive).unwrap().count(), 1);
    }

    #[test]
    fn only_files_that_lie_there_for_long_are_removed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("Lobby")).unwrap();
        std::fs::write(home.path().join("Lobby/a.jpg"), b"a").unwrap();
        let tidy = |max_age, stop: &CancellationToken| super::tidy(home.path(), max_age, stop).unwrap();
        let (go_on, stopped) = (CancellationToken::new(), CancellationToken::new());
        stopped.cancel();
        assert_eq!(tidy(Duration::from_hours(1), &go_on), 0);
        assert_eq!(tidy(Duration::ZERO, &stopped), 0, "a stop does not wait for it");
        assert_eq!(tidy(Duration::ZERO, &go_on), 1);
    }
}
