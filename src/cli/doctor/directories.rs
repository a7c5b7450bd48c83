//! Drop directories: whether they are there, with the rights that taking files needs, on which file system, and what lies in them.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::process::geteuid;

use super::{Line, machine};
use crate::config::Settings;
use crate::source::Entry;
use crate::source::directory::{self, AfterPublish, Watch};

/// So many directories of a tree are counted.
const DIRECTORIES_MAX: u64 = 100_000;
/// So many files of a directory are looked at.
const FILES_MAX: usize = 1000;
/// Only root may delete others' files in a directory with this bit, besides the directory's owner.
const STICKY: u32 = 0o1000;
/// File systems whose changes by others no event tells.
const REMOTE: [&str; 8] = ["nfs", "nfs4", "cifs", "smb3", "fuse", "overlay", "9p", "ceph"];

pub(super) fn look(settings: &Settings, lines: &mut Vec<Line>) {
    for entry in &settings.detectors {
        if let Some(config) = entry.directory() {
            detector(entry, config, lines);
        }
    }
}

/// What a directory lets us do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rights {
    Missing,
    /// Why not everything.
    Lacking(String),
    All,
}

/// Listing, entering, making and removing entries.
pub(super) fn rights(path: &Path) -> Rights {
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Rights::Missing,
        Err(error) => return Rights::Lacking(error.to_string()),
        Ok(meta) if !meta.is_dir() => return Rights::Lacking("is no directory".into()),
        Ok(_) => {}
    }
    for (access, what) in [
        (Access::READ_OK, "cannot be listed"),
        (Access::EXEC_OK, "cannot be entered"),
        (Access::WRITE_OK, "files cannot be taken from it (no right to write)"),
    ] {
        match accessat(CWD, path, access, AtFlags::EACCESS) {
            Ok(()) => {}
            Err(rustix::io::Errno::ROFS) => {
                return Rights::Lacking("is on a file system that is mounted read-only".into());
            }
            Err(_) => return Rights::Lacking(what.into()),
        }
    }
    Rights::All
}

/// inotify watches: one for each directory of the tree, as far as they are counted.
pub(super) fn watches_needed(config: &directory::Config) -> u64 {
    if config.watch == Watch::Poll {
        return 0;
    }
    let mut count = 1;
    let mut left = VecDeque::from([config.path.clone()]);
    while let Some(next) = left.pop_front()
        && config.recursive
        && count < DIRECTORIES_MAX
    {
        let entries = fs::read_dir(next).into_iter().flatten().filter_map(Result::ok);
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            count += 1;
            left.push_back(entry.path());
        }
    }
    count
}

fn detector(entry: &Entry, config: &directory::Config, lines: &mut Vec<Line>) {
    let subject = format!("detector {}", entry.name);
    let show = config.path.display();
    match rights(&config.path) {
        Rights::Missing => {
            let remedy = format!("install -d -m 3770 -o framegate -g framegate-drop {show}; or correct directory.path");
            return lines.push(Line::fail(subject, format!("{show} does not exist"), remedy));
        }
        Rights::Lacking(what) => {
            let remedy = if what.contains("read-only") {
                format!("mount -o remount,rw the file system of {show}; under systemd also ReadWritePaths={show}")
            } else {
                format!(
                    "the service's user needs to read, write and enter it: setfacl -m u:framegate:rwx -m d:u:framegate:rwx {show}; under systemd also ReadWritePaths={show}"
                )
            };
            return lines.push(Line::fail(subject, format!("{show} {what}"), remedy));
        }
        Rights::All => {}
    }
    if let Some(line) = sticky(&subject, &config.path) {
        return lines.push(line);
    }
    let kind = mount_of(&config.path);
    lines.push(file_system(&subject, config, kind.as_deref()));
    if let Some(line) = unreadable(&subject, &config.path) {
        lines.push(line);
    }
    machine::space(&subject, &config.path, None, lines);
    if let (AfterPublish::Archive, Some(archive)) = (config.after_publish, &config.archive) {
        lines.push(archived(&subject, &config.path, archive));
    }
}

/// In a sticky directory of somebody else, others' files can be neither taken nor removed.
fn sticky(subject: &str, path: &Path) -> Option<Line> {
    let meta = fs::metadata(path).ok()?;
    let ours = geteuid().is_root() || meta.uid() == geteuid().as_raw();
    let show = path.display();
    (meta.mode() & STICKY != 0 && !ours).then(|| {
        Line::fail(
            subject,
            format!(
                "{show} has the sticky bit and belongs to uid {}: others' files cannot be taken from it",
                meta.uid()
            ),
            format!("chown framegate {show}, or chmod -t {show}"),
        )
    })
}

fn file_system(subject: &str, config: &directory::Config, kind: Option<&str>) -> Line {
    let (show, kind) = (config.path.display(), kind.unwrap_or("unknown"));
    let remote = REMOTE.iter().any(|name| kind == *name || kind.starts_with("fuse."));
    match (config.watch, remote) {
        (Watch::Inotify, true) => Line::warn(
            subject,
            format!(
                "{show} is on {kind}, which does not tell of files that others write; watch = \"inotify\" finds them late"
            ),
            "write watch = \"auto\" or \"poll\"",
        ),
        (Watch::Auto | Watch::Poll, true) => Line::ok(subject, format!("{show} is on {kind}: polled")),
        (Watch::Auto | Watch::Inotify | Watch::Poll, false) => {
            Line::ok(subject, format!("{show} is on {kind}, with all rights"))
        }
    }
}

/// The kind of the file system that holds `path`.
fn mount_of(path: &Path) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let of = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let point = place.split(' ').nth(4)?.replace("\\040", " ");
        real.starts_with(&point).then(|| (point.len(), kind.split(' ').next().unwrap_or_default().to_owned()))
    };
    // Of equal ones the last mounted is the one that shows.
    mounts.lines().filter_map(of).max_by_key(|(length, _)| *length).map(|(_, kind)| kind)
}

/// Files that lie there and cannot be read.
fn unreadable(subject: &str, path: &Path) -> Option<Line> {
    let files = fs::read_dir(path).ok()?.filter_map(Result::ok).take(FILES_MAX);
    let regular = files.filter(|file| file.file_type().is_ok_and(|kind| kind.is_file()));
    let denied = |file: &fs::DirEntry| accessat(CWD, file.path(), Access::READ_OK, AtFlags::EACCESS).is_err();
    let count = regular.filter(denied).count();
    let show = path.display();
    (count > 0).then(|| {
        Line::fail(
            subject,
            format!("{count} files in {show} cannot be read"),
            format!(
                "let their writer set umask 0027 and a group of framegate's, or: setfacl -R -m u:framegate:rwX -m d:u:framegate:rwX {show}"
            ),
        )
    })
}

fn archived(subject: &str, path: &Path, archive: &Path) -> Line {
    let show = archive.display();
    match rights(archive) {
        Rights::Missing => Line::warn(
            subject,
            format!("the archive {show} does not exist yet"),
            format!("install -d -m 0750 -o framegate {show}"),
        ),
        Rights::Lacking(what) => Line::fail(
            subject,
            format!("the archive {show} {what}"),
            format!("chown framegate {show}; under systemd also ReadWritePaths={show}"),
        ),
        Rights::All => {
            let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
            if device(path) == device(archive) {
                Line::ok(subject, format!("published files go to {show}"))
            } else {
                Line::warn(
                    subject,
                    format!("the archive {show} is on another file system: each file is copied and synced"),
                    "put it on the drop directory's file system",
                )
            }
        }
    }
}
