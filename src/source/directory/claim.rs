//! Claims: a file is taken by renaming it, without replacing anything, into a hidden directory of ours below the drop
//! directory: `.framegate/<instance>/<frame id>~<path>`, with `%2F` for each slash of its path and `%25` for each percent
//! sign. So nobody else takes or rewrites it, and where it came from is kept in its name. An instance holds a lock on
//! `<instance>.lock` as long as it lives; the claims of a dead one are adopted by whoever gets its lock.
//!
//! The cost: one rename for each frame, about as much as the unlink. No directory is made for it, so that a full disk can
//! be emptied. Only paths too long for that (more than 228 bytes) mirror their sub-directories and get a directory of
//! their own, `<sub-directories>/<frame id>~/<name>`, and on a full disk wait until the others have made room.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::tree::{self, Opened};
use crate::frame::FrameId;

/// The hidden directory in each drop directory.
const HIDDEN: &str = ".framegate";
/// The longest name that file systems take, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// An opened drop directory with our instance in it. It lives as long as a claim below it does.
#[derive(Debug)]
pub(super) struct Root {
    pub fd: OwnedFd,
    pub dev: u64,
    pub ino: u64,
    hidden: OwnedFd,
    own: Arc<Instance>,
    adopted: Mutex<Vec<Arc<Instance>>>,
}

/// Whose claims: ours, or those of an instance that died.
#[derive(Debug)]
pub(super) struct Instance {
    name: String,
    fd: OwnedFd,
    /// Locked as long as this lives.
    _lock: OwnedFd,
}

/// A file of ours in the hidden directory.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub root: Arc<Root>,
    instance: Arc<Instance>,
    pub id: FrameId,
    /// Sub-directory that it came from.
    pub dir: Arc<[u8]>,
    /// The name that it had.
    pub name: Arc<[u8]>,
}

impl Root {
    /// Opens the drop directory and makes our place in it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fd = tree::open(path)?;
        let look = tree::look_at(&fd)?;
        let hidden = tree::make_below(fd.as_fd(), HIDDEN.as_bytes())?;
        let place = tree::look_at(&hidden)?;
        if place.owner != rustix::process::geteuid().as_raw() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("its directory {HIDDEN} belongs to another user (uid {}); remove it", place.owner),
            ));
        }
        if place.dev != look.dev {
            return Err(io::Error::other(format!("its directory {HIDDEN} is on another file system")));
        }
        rustix::fs::fchmod(&hidden, Mode::RWXU)?;
        let name = FrameId::generate().as_str().to_owned();
        let own = Instance::lock(hidden.as_fd(), name, true)?
            .ok_or_else(|| io::Error::other("the lock of a new instance is taken"))?;
        Ok(Self { fd, dev: look.dev, ino: look.ino, hidden, own: Arc::new(own), adopted: Mutex::default() })
    }

    /// Whether `path` still leads to this directory, and our place in it was not removed. Only looks: without file
    /// descriptors left it would seem gone.
    pub(super) fn is_still(&self, path: &Path) -> bool {
        tree::look_along(path).is_ok_and(|look| (look.dev, look.ino) == (self.dev, self.ino))
            && tree::look_at(&self.own.fd).is_ok_and(|look| look.links > 0)
    }

    /// Takes the file `name` in `dir` (which is open as `from`). `None`: it is not there any more.
    pub(super) fn claim(
        self: &Arc<Self>,
        from: BorrowedFd<'_>,
        dir: &Arc<[u8]>,
        name: &Arc<[u8]>,
    ) -> io::Result<Option<Claim>> {
        let id = FrameId::generate();
        let claim = Claim { root: self.clone(), instance: self.own.clone(), id, dir: dir.clone(), name: name.clone() };
        // Twice: pruning may remove a mirrored directory between making it and renaming into it.
        for _ in 0..2 {
            let (place, as_name) = match claim.make_place() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            match rename(from, name, place.as_fd(), &as_name) {
                Ok(()) => return Ok(Some(claim)),
                Err(Errno::NOENT) => match tree::look(from, name) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                    Ok(_) => {}
                },
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("the claims' directory keeps vanishing"))
    }

    /// The claims of instances that died: ours from now on. Those of instances adopted before are not listed again.
    pub(super) fn adopt(self: &Arc<Self>) -> io::Result<Vec<Claim>> {
        let mut names = Vec::new();
        tree::each(&self.hidden, |name, kind| {
            if kind == FileType::Directory && name != self.own.name.as_bytes() {
                names.extend(std::str::from_utf8(name).ok().and_then(FrameId::parse));
            }
            Ok(())
        })?;
        let mut claims = Vec::new();
        for name in names {
            if self.adopted().iter().any(|instance| instance.name == name.as_str()) {
                continue;
            }
            // One that gives trouble is tried again at the next scan, and holds up neither the others nor the scan.
            let dead = match Instance::lock(self.hidden.as_fd(), name.as_str().to_owned(), false) {
                Ok(Some(dead)) => Arc::new(dead),
                Ok(None) => continue,
                Err(error) => {
                    tracing::warn!(%error, instance = %name, "the claims of a dead instance cannot be adopted yet");
                    continue;
                }
            };
            let mut its = Vec::new();
            if let Err(error) = self.list(&dead, dead.fd.as_fd(), &[], 0, &mut its) {
                tracing::warn!(%error, instance = %name, "the claims of a dead instance cannot be listed yet");
                continue;
            }
            if its.is_empty() {
                dead.remove(self.hidden.as_fd());
            } else {
                claims.append(&mut its);
                self.adopted().push(dead);
            }
        }
        Ok(claims)
    }

    fn list(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        fd: BorrowedFd<'_>,
        dir: &[u8],
        depth: usize,
        claims: &mut Vec<Claim>,
    ) -> io::Result<()> {
        let mut below = Vec::new();
        let here: Arc<[u8]> = dir.into();
        let claim = |id: FrameId, dir: Arc<[u8]>, name: &[u8]| {
            let (root, instance, name) = (self.clone(), instance.clone(), name.into());
            Claim { root, instance, id, dir, name }
        };
        tree::each(fd, |entry, kind| {
            if kind == FileType::Directory {
                below.push(entry.to_vec());
            } else if depth == 0
                && let Some((id, path)) = split(entry)
                && let Some((dir, name)) = unescaped(path)
            {
                claims.push(claim(id, dir.into(), &name));
            }
            Ok(())
        })?;
        for entry in below {
            let inside = tree::open_below(fd, &entry)?;
            match split(&entry) {
                Some((id, b"")) => tree::each(&inside, |name, _| {
                    claims.push(claim(id.clone(), here.clone(), name));
                    Ok(())
                })?,
                Some(_) | None if depth < tree::DEPTH_MAX => {
                    self.list(instance, inside.as_fd(), &tree::join(dir, &entry), depth + 1, claims)?;
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    /// Removes mirrored directories that are empty, and adopted instances that have nothing left.
    pub(super) fn tidy(&self) -> io::Result<()> {
        tree::prune(self.own.fd.as_fd(), 0)?;
        let mut adopted = self.adopted();
        let mut left = Vec::new();
        for instance in adopted.drain(..) {
            // Somebody may still hold a claim of it that lies on its way back into line.
            if Arc::strong_count(&instance) == 1 && tree::prune(instance.fd.as_fd(), 0)? {
                instance.remove(self.hidden.as_fd());
            } else {
                left.push(instance);
            }
        }
        *adopted = left;
        Ok(())
    }

    fn adopted(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Instance>>> {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // Whatever stays is found by the next instance.
        if self.tidy().is_ok() && matches!(tree::is_empty(&self.own.fd), Ok(true)) {
            self.own.remove(self.hidden.as_fd());
        }
    }
}

impl Instance {
    /// Locks `<name>.lock` and opens (`new`: makes) the directory. `None`: somebody alive has it, or it is gone.
    fn lock(hidden: BorrowedFd<'_>, name: String, new: bool) -> io::Result<Option<Self>> {
        let lock_name = format!("{name}.lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(hidden, lock_name.as_str(), flags, Mode::RUSR | Mode::WUSR)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Whoever had it may have removed the file in between: then this lock is on nothing.
        match tree::look(hidden, lock_name.as_bytes()) {
            Ok(now) if now.ino == tree::look_at(&lock)?.ino => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let fd = if new {
            tree::make_below(hidden, name.as_bytes())?
        } else {
            match tree::open_below(hidden, name.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other?,
            }
        };
        Ok(Some(Self { name, fd, _lock: lock }))
    }

    /// Removes the empty directory and the lock file, in this order: a directory without its lock would be nobody's.
    fn remove(&self, hidden: BorrowedFd<'_>) {
        if tree::prune(self.fd.as_fd(), 0).is_ok_and(|empty| empty)
            && rustix::fs::unlinkat(hidden, self.name.as_str(), AtFlags::REMOVEDIR).is_ok()
        {
            // One that stays is an empty file of no consequence.
            rustix::fs::unlinkat(hidden, format!("{}.lock", self.name).as_str(), AtFlags::empty()).ok();
        }
    }
}

impl Claim {
    /// The directory that it lies in (the instance's own, as for all but long paths, or one of its own below that), and its
    /// name there.
    pub(super) fn place(&self) -> io::Result<(Opened<'_>, Vec<u8>)> {
        self.place_by(tree::open_below)
    }

    /// The same, making what is missing of a long path's directories.
    fn make_place(&self) -> io::Result<(Opened<'_>, Vec<u8>)> {
        self.place_by(tree::make_below)
    }

    fn place_by(
        &self,
        below: impl FnOnce(BorrowedFd<'_>, &[u8]) -> io::Result<OwnedFd>,
    ) -> io::Result<(Opened<'_>, Vec<u8>)> {
        let instance = self.instance.fd.as_fd();
        match self.short() {
            Some(name) => Ok((Opened::Already(instance), name)),
            None => Ok((Opened::Now(below(instance, &self.long())?), self.name.to_vec())),
        }
    }

    /// Its name in the instance's directory; `None`: it is too long.
    fn short(&self) -> Option<Vec<u8>> {
        let mut name = Vec::with_capacity(NAME_BYTES_MAX);
        name.extend_from_slice(self.id.as_str().as_bytes());
        name.push(b'~');
        if !self.dir.is_empty() {
            escape(&self.dir, &mut name);
            escape(b"/", &mut name);
        }
        escape(&self.name, &mut name);
        (name.len() <= NAME_BYTES_MAX).then_some(name)
    }

    /// The directory of its own that one with a long path has.
    fn long(&self) -> Vec<u8> {
        tree::join(&self.dir, format!("{}~", self.id).as_bytes())
    }

    /// Removes it. Done already is done.
    pub(super) fn remove(&self) -> io::Result<()> {
        let (place, name) = match self.place() {
            // Somebody removed the whole directory: there is nothing left to remove.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        match rustix::fs::unlinkat(&place, OsStr::from_bytes(&name), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        self.remove_place(&place);
        Ok(())
    }

    /// Puts it back where it came from. `false`: there is another file of that name now, or no such directory; it stays
    /// a claim, which the next start adopts.
    pub(super) fn put_back(&self) -> io::Result<bool> {
        let (place, name) = self.place()?;
        let back = match tree::open_below(self.root.fd.as_fd(), &self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        match rename(place.as_fd(), &name, back.as_fd(), &self.name) {
            Ok(()) => {
                self.remove_place(&place);
                Ok(true)
            }
            Err(Errno::EXIST | Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts what is no file back beside its place, under a hidden name: another is at its place now. `false`: there is no
    /// such directory any more.
    pub(super) fn put_aside(&self) -> io::Result<bool> {
        let (place, name) = self.place()?;
        let back = match tree::open_below(self.root.fd.as_fd(), &self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        rename(place.as_fd(), &name, back.as_fd(), format!(".{}", self.id).as_bytes())?;
        self.remove_place(&place);
        Ok(true)
    }

    /// The same file under a new id: its content is another frame now.
    pub(super) fn renew(&self) -> io::Result<Self> {
        let new = Self { id: FrameId::generate(), instance: self.root.own.clone(), ..self.clone() };
        let (from, name) = self.place()?;
        let (to, as_name) = new.make_place()?;
        rename(from.as_fd(), &name, to.as_fd(), &as_name)?;
        drop(to);
        Ok(new)
    }

    /// Removes the directory of its own; one that stays is pruned later.
    fn remove_place(&self, place: &Opened<'_>) {
        if let Opened::Now(_) = place
            && let Ok(parent) = tree::open_below(self.instance.fd.as_fd(), &self.dir)
        {
            rustix::fs::unlinkat(&parent, format!("{}~", self.id).as_str(), AtFlags::REMOVEDIR).ok();
        }
    }
}

/// Adds a path, or a part of one, as part of one name. Most need no escaping, and a claim's name is made several times.
fn escape(path: &[u8], name: &mut Vec<u8>) {
    let mut rest = path;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'/' | b'%')) {
        name.extend_from_slice(&rest[..at]);
        name.extend_from_slice(if rest[at] == b'/' { b"%2F" } else { b"%25" });
        rest = &rest[at + 1..];
    }
    name.extend_from_slice(rest);
}

/// The sub-directory and the name that [`escape`] was given. `None`: it is not of that form.
fn unescaped(name: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut path = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((byte, after)) = rest.split_first() {
        let (byte, after) = match (byte, after) {
            (b'%', [b'2', b'F', after @ ..]) => (b'/', after),
            (b'%', [b'2', b'5', after @ ..]) => (b'%', after),
            (b'%', _) => return None,
            (other, after) => (*other, after),
        };
        path.push(byte);
        rest = after;
    }
    let at = path.iter().rposition(|b| *b == b'/');
    let name = path.split_off(at.map_or(0, |at| at + 1));
    path.pop();
    (!name.is_empty()).then_some((path, name))
}

/// `<frame id>~<rest>`
fn split(entry: &[u8]) -> Option<(FrameId, &[u8])> {
    let at = entry.iter().position(|b| *b == b'~')?;
    let id = FrameId::parse(std::str::from_utf8(&entry[..at]).ok()?)?;
    Some((id, &entry[at + 1..]))
}

fn rename(from: BorrowedFd<'_>, name: &[u8], to: BorrowedFd<'_>, as_name: &[u8]) -> Result<(), Errno> {
    rustix::fs::renameat_with(from, OsStr::from_bytes(name), to, OsStr::from_bytes(as_name), RenameFlags::NOREPLACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(root: &Arc<Root>, dir: &[u8], name: &[u8]) -> Option<Claim> {
        let from = tree::open_below(root.fd.as_fd(), dir).unwrap();
        root.claim(from.as_fd(), &dir.into(), &name.into()).unwrap()
    }

    #[test]
    fn a_claim_goes_back_or_away_and_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("Lobby")).unwrap();
        let long = [b'x'; 255];
        let root = Arc::new(Root::open(home.path()).unwrap());
        for name in [&b"a.jpg"[..], b"\xff\n.jpg", &long] {
            let path = home.path().join("Lobby").join(OsStr::from_bytes(name));
            std::fs::write(&path, b"image").unwrap();
            let taken = claim(&root, b"Lobby", name).unwrap();
            assert!(!path.exists());
            assert!(claim(&root, b"Lobby", name).is_none(), "it is not there any more");
            assert!(taken.put_back().unwrap());
            assert_eq!(std::fs::read(&path).unwrap(), b"image");
            claim(&root, b"Lobby", name).unwrap().remove().unwrap();
            assert!(!path.exists());
        }
        drop(root);
        assert_eq!(std::fs::read_dir(home.path().join(".framegate")).unwrap().count(), 0);
    }

    #[test]
    fn claims_of_a_dead_instance_are_adopted_once_with_their_ids_and_those_of_a_living_one_never() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(home.path().join("a/b")).unwrap();
        let long = [b'y'; 240];
        let dead = Arc::new(Root::open(home.path()).unwrap());
        for (dir, name) in [(&b""[..], &b"1.jpg"[..]), (b"a/b", b"2.jpg"), (b"a", &long)] {
            std::fs::write(home.path().join(OsStr::from_bytes(dir)).join(OsStr::from_bytes(name)), name).unwrap();
            claim(&dead, dir, name).unwrap();
        }
        let next = Arc::new(Root::open(home.path()).unwrap());
        assert!(next.adopt().unwrap().is_empty(), "the other lives");
        drop(dead);
        let mut adopted = next.adopt().unwrap();
        assert!(next.adopt().unwrap().is_empty(), "only once");
        adopted.sort_by(|a, b| a.id.cmp(&b.id));
        let places: Vec<_> = adopted.iter().map(|c| (&*c.dir, &*c.name)).collect();
        assert_eq!(places, [(&b""[..], &b"1.jpg"[..]), (b"a/b", b"2.jpg"), (b"a", &long)]);
        for claim in adopted {
            assert!(claim.put_back().unwrap());
        }
        next.tidy().unwrap();
        drop(next);
        assert_eq!(std::fs::read_dir(home.path().join(".framegate")).unwrap().count(), 0);
    }

    #[test]
    fn a18_a19_a_claim_needs_no_room_but_for_its_name_wherever_the_file_lay() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(home.path().join("a%2Fb/c")).unwrap();
        std::fs::write(home.path().join("a%2Fb/c/100%.jpg"), b"image").unwrap();
        let root = Arc::new(Root::open(home.path()).unwrap());
        claim(&root, b"a%2Fb/c", b"100%.jpg").unwrap();
        tree::each(&root.own.fd, |_, kind| {
            assert_eq!(kind, FileType::RegularFile, "no directory is made for it");
            Ok(())
        })
        .unwrap();
        drop(root);
        let next = Arc::new(Root::open(home.path()).unwrap());
        let [adopted] = &next.adopt().unwrap()[..] else { panic!("one is adopted") };
        assert_eq!((&*adopted.dir, &*adopted.name), (&b"a%2Fb/c"[..], &b"100%.jpg"[..]));
        assert!(adopted.put_back().unwrap());
    }

    #[test]
    fn a_claim_is_never_put_back_over_another_file() {
        let home = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(home.path()).unwrap());
        std::fs::write(home.path().join("a.jpg"), b"old").unwrap();
        let taken = claim(&root, b"", b"a.jpg").unwrap();
        std::fs::write(home.path().join("a.jpg"), b"new").unwrap();
        assert!(!taken.put_back().unwrap());
        assert_eq!(std::fs::read(home.path().join("a.jpg")).unwrap(), b"new");
    }
}
