//! The real binary on a host that gives way: file systems, disks, memory, time and outputs that fail. Rows of FAULTS.md
//! A, D and E1, E4 that take a mount, a control group or a system call that fails on order.
//!
//! What needs mounts has them in a namespace of the daemon's own: they are gone with it, whatever becomes of the test.

mod support;

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::Signal;

use support::engine::{Engine, Hash, arrivals, hash, image, nothing_lost, put_face};
use support::faults::{Mount, Strace, skipped, works};
use support::{Daemon, PASSWORD, PATIENCE, Samples, Site, eventually, faces, files_below, put};

/// A detector that is waited for no longer than a test has to.
const QUICK: &str = "directory.quiet = \"50ms\"\ndirectory.rescan = \"200ms\"\ndirectory.partial_timeout = \"300ms\"";
/// Unfinished files are waited for longer than any test runs.
const PATIENT: &str = "directory.quiet = \"50ms\"\ndirectory.rescan = \"200ms\"\ndirectory.partial_timeout = \"10m\"";
const MAX_IN_FLIGHT: u64 = 8;

const RECEIVED: &str = "framegate_frames_received_total";
const DEAD: &str = "framegate_frames_dead_lettered_total";
const PENDING: &str = "framegate_frames_pending";
const ERRORS: &str = "framegate_settle_errors_total";
const UP: &str = "framegate_detector_up";

fn site(engine: &Engine, keys: &str) -> Site {
    Site::new(&engine.base_url())
        .section(&format!("[publish]\nmax_in_flight = {MAX_IN_FLIGHT}"))
        .detector("Cam", "UTC", keys)
}

fn until(daemon: &Daemon<'_>, what: &str, condition: impl Fn(&Samples) -> bool) -> Samples {
    eventually(what, PATIENCE, || Some(daemon.metrics()).filter(&condition))
}

fn operation(operation: &str) -> String {
    format!("operation=\"{operation}\"")
}

fn hashes(numbers: std::ops::Range<u64>) -> Vec<Hash> {
    numbers.map(|n| hash(&image(n))).collect()
}

/// What is left of frames below a drop directory: all but the locks of living instances.
fn frames_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = files_below(dir);
    files.retain(|path| path.extension() != Some(OsStr::new("lock")));
    files
}

/// A daemon with a mount namespace of its own.
struct Apart<'a> {
    daemon: Daemon<'a>,
}

impl<'a> Apart<'a> {
    /// `setup` is shell: what is mounted before the daemon starts. `None`: mounting is not permitted here.
    fn start(site: &'a Site, setup: &str) -> Option<Self> {
        let private = ["-m", "--propagation", "private"];
        let probe = "mount -t tmpfs tmpfs /tmp && umount /tmp";
        if !works("unshare", &[&private[..], &["sh", "-c", probe]].concat()) || !works("nsenter", &["--version"]) {
            return None;
        }
        let run = site.shell(&format!("set -e\n{setup}\nexec \"$@\""));
        let mut command = Command::new("unshare");
        command.args(private).arg(run.get_program()).args(run.get_args());
        for (key, value) in run.get_envs() {
            if let Some(value) = value {
                command.env(key, value)
            } else {
                command.env_remove(key)
            };
        }
        Some(Self { daemon: site.start_as(command) })
    }

    fn until_ready(self) -> Self {
        Self { daemon: self.daemon.until_ready() }
    }

    /// Runs a command among its mounts: whether it succeeded.
    fn works(&self, arguments: &[&str]) -> bool {
        let pid = self.daemon.pid().to_string();
        works("nsenter", &[&["-t", &pid, "-m"], arguments].concat())
    }

    #[track_caller]
    fn shell(&self, script: &str) {
        assert!(self.works(&["sh", "-e", "-c", script]), "{script}");
    }

    /// A path as the daemon sees it.
    fn path(&self, path: &Path) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.daemon.pid())).join(path.strip_prefix("/").expect("absolute"))
    }

    /// Waits until nothing is pending and no frame is left in the directory as the daemon sees it.
    #[track_caller]
    fn idle(&self, dir: &Path) -> Samples {
        let samples = until(&self.daemon, "all is settled", |it| {
            it.count(PENDING, "") == 0 && frames_below(&self.path(dir)).is_empty() && it.equation_holds().is_ok()
        });
        samples.equation_holds().expect("the equation of the design");
        samples
    }

    /// Whether it holds anything open on this device.
    fn holds(&self, device: u64) -> bool {
        let open = fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).expect("it lives");
        open.flatten().any(|fd| fs::metadata(fd.path()).is_ok_and(|it| it.dev() == device))
    }
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

// ---- A7: mounts come and go

#[test]
fn a7_what_is_mounted_over_the_directory_is_held_while_unusable_then_served_and_so_is_what_was_below() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(apart) = Apart::start(&site, "") else { return skipped("a7", "nothing can be mounted") };
    let apart = apart.until_ready();
    let mount = shown(&dir);
    put_face(&dir, 0);
    engine.until_accepted(1);
    engine.hold();
    put_face(&dir, 1);
    eventually("it is in flight", PATIENCE, || (engine.counts().in_flight == 1).then_some(()));

    apart.shell(&format!("mount -t tmpfs -o ro,size=16m tmpfs {mount}"));
    until(&apart.daemon, "the detector is down", |it| it.count(UP, "") == 0);
    let (status, reasons) = apart.daemon.get("/readyz").unwrap();
    assert!(status == 503 && reasons.contains("Cam"), "{status} {reasons}");
    // Its place is covered; from outside of the namespace it can be reached.
    put_face(&dir, 2);
    engine.release();
    engine.until_accepted(2);
    eventually("what was in flight is removed all the same", PATIENCE, || {
        (frames_below(&dir).len() == 1).then_some(())
    });

    apart.shell(&format!("mount -o remount,rw {mount}"));
    until(&apart.daemon, "it is up again", |it| it.count(UP, "") == 1);
    let over = apart.path(&dir);
    let device = fs::metadata(&over).unwrap().dev();
    for n in 3..6 {
        put_face(&over, n);
    }
    engine.until_accepted(5);
    apart.idle(&dir);
    assert!(apart.holds(device), "it works there");
    assert_eq!(frames_below(&dir).len(), 1, "below, nothing was touched");

    // What it has open makes the mount busy: then as one who pulls the disk.
    if !apart.works(&["umount", mount]) {
        apart.shell(&format!("umount -l {mount}"));
    }
    engine.until_accepted(6);
    put_face(&dir, 6);
    engine.until_accepted(7);
    apart.idle(&dir);
    until(&apart.daemon, "it is up", |it| it.count(UP, "") == 1);
    eventually("nothing holds the disk any more", PATIENCE, || (!apart.holds(device)).then_some(()));
    assert_eq!(nothing_lost(&[&engine], &hashes(0..7)), 0, "came twice");
}

// ---- A17: another file system, and a crash at every step

/// Kills the daemon at the first, second, … of each system call that changes something, from a frame's claim to its
/// settlement, and looks at what there is each time: before the next start, and after it.
fn killed_at_every_step(
    test: &str,
    site: &Site,
    calls: &[&str],
    frame: impl Fn(u64) -> Vec<u8>,
    mut look: impl FnMut(&[u8], &str),
) {
    const STEPS_MAX: u64 = 40;
    let dir = site.drop_dir("Cam");
    let (mut n, mut killed) = (0, 0);
    for call in calls {
        for step in 1.. {
            assert!(step < STEPS_MAX, "{call} has no end");
            let at = format!("{call} {step}");
            let daemon = site.run();
            let inject = format!("inject={call}:signal=KILL:when={step}");
            let options = ["-e", &format!("trace={call}"), "-e", &inject];
            let Some(strace) = Strace::attach(daemon.pid(), &site.path().join("trace"), &options) else {
                return skipped(test, "strace cannot attach");
            };
            n += 1;
            let bytes = frame(n);
            put(&dir, &format!("{n}.jpg"), &bytes);
            let dead = eventually(&format!("settled, or killed at {at}"), PATIENCE, || {
                let dead = !Path::new(&format!("/proc/{}/exe", daemon.pid())).exists();
                (dead || site.files_left().is_empty()).then_some(dead)
            });
            drop(strace);
            if !dead {
                assert!(daemon.stop().success());
                look(&bytes, &at);
                break;
            }
            killed += 1;
            drop(daemon);
            let mut copies = site.files_left().iter().filter(|path| holds(path, &bytes)).count();
            copies += files_below(&site.path().join("archive")).iter().filter(|path| holds(path, &bytes)).count();
            copies += files_below(&site.dead_letters()).iter().filter(|path| holds(path, &bytes)).count();
            assert!(copies >= 1, "no whole copy is left after a crash at {at}");
            let mut daemon = site.run();
            daemon.idle(PATIENCE);
            assert!(daemon.stop().success());
            look(&bytes, &at);
        }
    }
    assert!(killed >= calls.len(), "it was killed only {killed} times");
}

fn holds(path: &Path, bytes: &[u8]) -> bool {
    fs::read(path).is_ok_and(|it| it == bytes)
}

#[test]
fn a17_a_crash_at_any_step_into_an_archive_on_another_file_system_leaves_a_whole_copy() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url());
    let archive = site.path().join("archive");
    let keys = format!("{QUICK}\ndirectory.after_publish = \"archive\"\ndirectory.archive = {:?}", shown(&archive));
    let site = site.detector("Cam", "UTC", &keys);
    let Some(_disk) = Mount::tmpfs(&archive, "size=64m") else { return skipped("a17", "no tmpfs can be mounted") };
    let calls = ["renameat2", "copy_file_range", "sendfile", "utimensat", "fsync", "unlinkat"];
    let mut steps = 0;
    killed_at_every_step("a17", &site, &calls, image, |bytes, at| {
        steps += 1;
        let kept = files_below(&archive);
        assert!(kept.iter().any(|path| holds(path, bytes)), "not in the archive after {at}");
        let leftovers = kept.iter().filter(|path| path.extension().is_none_or(|it| it != "jpg")).count();
        assert_eq!(leftovers, 0, "after {at}: {kept:?}");
    });
    let written = hashes(1..steps + 1);
    for path in files_below(&archive) {
        assert!(written.contains(&hash(&fs::read(&path).unwrap())), "{} is not whole", path.display());
    }
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= steps, "each came twice at most: {doubled} of {steps}");
}

#[test]
fn a17_a_crash_at_any_step_into_the_dead_letters_on_another_file_system_leaves_a_whole_one() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let Some(_disk) = Mount::tmpfs(&site.dead_letters(), "size=64m") else {
        return skipped("a17", "no tmpfs can be mounted");
    };
    let calls = ["renameat2", "fsync", "rename", "unlinkat"];
    let bad = |n: u64| format!("{n} is no image").repeat(500).into_bytes();
    let mut steps = 0;
    killed_at_every_step("a17", &site, &calls, bad, |bytes, at| {
        steps += 1;
        // Temporary files of a dead daemon stay for the janitor.
        let kept = files_below(&site.dead_letters());
        let images = kept.iter().filter(|path| path.extension().is_some_and(|it| it == "image"));
        let whole: Vec<_> = images.filter(|path| holds(path, bytes)).collect();
        assert_eq!(whole.len(), 1, "after {at}: {kept:?}");
        let json = fs::read(whole[0].with_extension("json")).expect(at);
        let letter: serde_json::Value = serde_json::from_slice(&json).expect(at);
        assert_eq!(letter["reason"], "unsupported");
        assert_eq!(letter["original_name"], format!("{steps}.jpg"));
    });
    assert_eq!(engine.counts().publish, 0);
}

// ---- A18, A19: full disks

#[test]
fn a19_an_archive_without_inodes_holds_the_detector_and_nothing_is_published_twice() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url());
    let archive = site.path().join("archive");
    let keys = format!("{QUICK}\ndirectory.after_publish = \"archive\"\ndirectory.archive = {:?}", shown(&archive));
    let site = site.detector("Cam", "UTC", &keys);
    let Some(disk) = Mount::tmpfs(&archive, "size=16m,nr_inodes=8") else {
        return skipped("a19", "no tmpfs can be mounted");
    };
    let mut daemon = site.run();
    for n in 0..12 {
        put_face(&site.drop_dir("Cam").join(format!("{}", n % 3)), n);
    }
    let samples = until(&daemon, "the archive is full", |it| it.count(ERRORS, &operation("remove")) > 0);
    assert!(samples.count(DEAD, "") == 0);
    until(&daemon, "and it is said", |it| it.count(UP, "") == 0);
    disk.remount("nr_inodes=1000");
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &hashes(0..12)), 0, "came twice");
    let kept: HashSet<Hash> = files_below(&archive).iter().map(|path| hash(&fs::read(path).unwrap())).collect();
    assert_eq!(kept, hashes(0..12).into_iter().collect());
    until(&daemon, "it delivers again", |it| it.count(UP, "") == 1);
}

#[test]
fn a19_a_drop_directory_without_inodes_at_the_start_is_held_until_there_are_some() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(disk) = Mount::tmpfs(&dir, "size=16m,nr_inodes=20") else {
        return skipped("a19", "no tmpfs can be mounted");
    };
    let mut written = Vec::new();
    for n in 0..30 {
        // Whole and in place: there is no inode for another name.
        if fs::write(dir.join(format!("{n}.jpg")), image(n)).is_err() {
            break;
        }
        written.push(hash(&image(n)));
    }
    assert!(written.len() < 20, "it is full");
    let daemon = site.start();
    eventually("it is said", PATIENCE, || site.log().contains("detector held").then_some(()));
    assert_eq!(engine.counts().publish, 0);
    disk.remount("nr_inodes=1000");
    let mut daemon = daemon.until_ready();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
}

#[test]
fn a18_a19_a_drop_directory_that_detectors_filled_during_an_outage_is_emptied_although_no_directory_can_be_made() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(_disk) = Mount::tmpfs(&dir, "size=300k,nr_inodes=60") else {
        return skipped("a18", "no tmpfs can be mounted");
    };
    engine.down();
    let mut daemon = site.run();
    let mut written = Vec::new();
    for n in 0..100 {
        let below = dir.join(format!("2026-11-{:02}", n % 5));
        let path = below.join(format!("{n}.jpg"));
        if fs::create_dir_all(&below).and_then(|()| fs::write(&path, image(n))).is_err() {
            // Half a file is a torso that its camera left.
            fs::remove_file(&path).unwrap_or_default();
            break;
        }
        written.push(hash(&image(n)));
    }
    assert!((20..90).contains(&written.len()), "it is full: {}", written.len());
    // To the last inode, with what is nobody's frame.
    let fillers: Vec<PathBuf> = (0..100).map(|n| dir.join(format!("{n}.txt"))).collect();
    for filler in fillers.iter().take_while(|path| File::create(path).is_ok()) {
        assert!(filler.exists());
    }
    assert!(fs::create_dir(dir.join("one more")).is_err(), "it is full");
    engine.up();
    // Nobody makes room but Framegate, by emptying it.
    engine.until_accepted(written.len() as u64);
    assert!(!site.log().contains("detector held"), "{}", site.log());
    for filler in fillers.iter().filter(|path| path.exists()) {
        fs::remove_file(filler).unwrap();
    }
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
}

// ---- A20: read-only

#[test]
fn a20_a_disk_that_an_error_made_read_only_is_published_once_said_and_healed_by_a_restart() {
    const FILES: u64 = 40;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let (dir, disk) = (site.drop_dir("Cam"), site.path().join("disk"));
    let (mount, disk) = (shown(&dir), shown(&disk));
    File::create(disk).unwrap().set_len(64 << 20).unwrap();
    if !works("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", disk]) {
        return skipped("a20", "no mkfs.ext4");
    }
    let setup = format!("mount -o loop,errors=remount-ro {disk} {mount}");
    if !works("unshare", &["-m", "--propagation", "private", "sh", "-c", &setup]) {
        return skipped("a20", "no ext4 can be mounted");
    }
    let apart = Apart::start(&site, &setup).expect("it could be mounted a moment ago").until_ready();
    engine.hold();
    for n in 0..FILES {
        put_face(&apart.path(&dir), n);
    }
    eventually("some are in hand, some not yet", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    apart.shell(&format!("sync -f {mount}"));
    // As the kernel does it after an error. An orderly remount is refused as long as the daemon has its lock there.
    apart.shell(&format!("mount -o remount,abort {mount}"));
    assert!(!apart.works(&["touch", &format!("{mount}/x")]), "it is read-only");
    engine.release();
    until(&apart.daemon, "files cannot be removed", |it| it.count(ERRORS, &operation("remove")) > 0);
    until(&apart.daemon, "the detector is held", |it| it.count(UP, "") == 0);
    let (status, reasons) = apart.daemon.get("/readyz").unwrap();
    assert!(status == 503 && reasons.contains("Cam"), "{status} {reasons}");
    until(&apart.daemon, "removing each of them is tried three times", |it| {
        it.count(ERRORS, &operation("remove")).unsigned_abs() >= 3 * engine.counts().accepted
    });
    let stuck = arrivals(&[&engine]);
    assert!(stuck.values().all(|times| *times == 1), "none is published in a loop: {stuck:?}");
    assert!((stuck.len() as u64) < FILES, "what cannot be taken is not published");
    assert_eq!(engine.counts().publish, stuck.len() as u64);

    // It stops in order although nothing can be removed, and the next one finds the disk as somebody mended it.
    let Apart { daemon } = apart;
    assert_eq!(daemon.stop().code(), Some(0));
    let mended = Command::new("e2fsck").args(["-p", "-f", disk]).stdout(Stdio::null()).status().expect("e2fsck runs");
    assert!(mended.code().is_some_and(|code| code < 4), "{mended}");
    let apart = Apart::start(&site, &setup).expect("mounted before").until_ready();
    apart.idle(&dir);
    let doubled = nothing_lost(&[&engine], &hashes(0..FILES));
    assert!(doubled <= stuck.len() as u64, "only what was stuck came once more: {doubled} of {}", stuck.len());
    assert!(arrivals(&[&engine]).values().all(|times| *times <= 2));
}

#[test]
fn a20_a_dead_disk_that_was_replaced_frees_its_detector_without_a_restart() {
    const FILES: u64 = 40;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let (dir, disk) = (site.drop_dir("Cam"), site.path().join("disk"));
    let (mount, disk) = (shown(&dir), shown(&disk));
    File::create(disk).unwrap().set_len(64 << 20).unwrap();
    if !works("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", disk]) {
        return skipped("a20", "no mkfs.ext4");
    }
    let setup = format!("mount -o loop,errors=remount-ro {disk} {mount}");
    if !works("unshare", &["-m", "--propagation", "private", "sh", "-c", &setup]) {
        return skipped("a20", "no ext4 can be mounted");
    }
    let apart = Apart::start(&site, &setup).expect("it could be mounted a moment ago").until_ready();
    engine.hold();
    for n in 0..FILES {
        put_face(&apart.path(&dir), n);
    }
    eventually("some are in hand, some not yet", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    apart.shell(&format!("sync -f {mount}"));
    apart.shell(&format!("mount -o remount,abort {mount}"));
    engine.release();
    until(&apart.daemon, "files cannot be removed", |it| it.count(ERRORS, &operation("remove")) > 0);
    until(&apart.daemon, "nothing is in flight", |it| it.count("framegate_frames_in_flight", "") == 0);

    apart.shell(&format!(
        "umount -l {mount}; cp --sparse=always {disk} {disk}2; e2fsck -p -f {disk}2 || true; mount -o loop {disk}2 {mount}"
    ));
    engine.until_accepted(FILES);
    apart.idle(&dir);
    nothing_lost(&[&engine], &hashes(0..FILES));
    assert!(arrivals(&[&engine]).values().all(|times| *times <= 2), "once more at most");
    until(&apart.daemon, "it is up", |it| it.count(UP, "") == 1);
    assert!(site.log().contains("stay behind on a file system that was replaced"));
}

// ---- A22, A23: calls that fail

#[test]
fn a22_interrupted_calls_cost_nothing() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let mut daemon = site.run();
    let calls =
        "read,pread64,openat,openat2,newfstatat,fstat,statx,renameat2,rename,mkdirat,unlink,unlinkat,fsync,getdents64";
    let inject = format!("inject={calls}:error=EINTR:when=1+3");
    let options = ["-e", &format!("trace={calls}"), "-e", &inject];
    let Some(strace) = Strace::attach(daemon.pid(), &site.path().join("trace"), &options) else {
        return skipped("a22", "strace cannot attach");
    };
    for n in 0..30 {
        put_face(&site.drop_dir("Cam").join("below"), n);
    }
    put(&site.drop_dir("Cam"), "bad.jpg", b"no image");
    eventually("calls are interrupted", PATIENCE, || (strace.trace().matches("INJECTED").count() > 30).then_some(()));
    drop(strace);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &hashes(0..30)), 0, "came twice");
    assert_eq!(samples.count(DEAD, ""), 1);
    assert_eq!(samples.count("framegate_frames_dropped_total", ""), 0);
    until(&daemon, "nothing is held any more", |it| it.count(UP, "") == 1);
}

#[test]
fn a22_a_short_read_is_no_torn_frame() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let path = dir.join("x.jpg");
    // The file's end, where it is not.
    let inject = "inject=read,pread64:retval=0:when=1..2";
    let options = ["-y", "-P", shown(&path), "-e", "trace=read,pread64", "-e", inject];
    let Some(strace) = Strace::attach(daemon.pid(), &site.path().join("trace"), &options) else {
        return skipped("a22", "strace cannot attach");
    };
    put(&dir, "x.jpg", &image(1));
    engine.until_accepted(1);
    assert!(strace.trace().contains("INJECTED"), "{}", strace.trace());
    drop(strace);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &hashes(1..2)), 0);
    assert_eq!((samples.count(RECEIVED, ""), samples.count(DEAD, "")), (1, 0));
}

/// The `n`th fsync of what keeps a frame fails.
fn fsync_fails(test: &str, site: &Site, n: u32, frame: &[u8], trouble: &str) -> bool {
    let mut daemon = site.run();
    let inject = format!("inject=fsync,fdatasync:error=EIO:when={n}");
    let options = ["-e", "trace=fsync,fdatasync", "-e", &inject];
    let Some(strace) = Strace::attach(daemon.pid(), &site.path().join("trace"), &options) else {
        skipped(test, "strace cannot attach");
        return false;
    };
    put(&site.drop_dir("Cam"), "x.jpg", frame);
    until(&daemon, "it could not be kept", |it| it.count(ERRORS, &operation(trouble)) >= 1);
    assert!(strace.trace().contains("INJECTED"), "{}", strace.trace());
    assert!(!site.files_left().is_empty(), "the source keeps it");
    drop(strace);
    daemon.idle(PATIENCE);
    true
}

/// Of a dead letter: its image's, its JSON's, their directory's.
fn a_dead_letters_fsync_fails(n: u32) {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    if !fsync_fails("a23", &site, n, b"no image", "dead-letter") {
        return;
    }
    let kept = files_below(&site.dead_letters());
    assert_eq!(kept.len(), 2, "one letter and no leftovers: {kept:?}");
    assert!(kept.iter().any(|path| holds(path, b"no image")));
    assert_eq!(engine.counts().publish, 0);
}

#[test]
fn a23_a_failed_fsync_of_a_dead_letters_json_has_both_written_anew() {
    a_dead_letters_fsync_fails(2);
}

#[test]
fn a23_a_failed_fsync_of_the_dead_letters_directory_has_both_written_anew() {
    a_dead_letters_fsync_fails(3);
}

/// Of a copy into an archive: the file's, its directory's.
fn an_archives_fsync_fails(n: u32) {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url());
    let archive = site.path().join("archive");
    let keys = format!("{QUICK}\ndirectory.after_publish = \"archive\"\ndirectory.archive = {:?}", shown(&archive));
    let site = site.detector("Cam", "UTC", &keys);
    let Some(_disk) = Mount::tmpfs(&archive, "size=16m") else { return skipped("a23", "no tmpfs can be mounted") };
    if !fsync_fails("a23", &site, n, &image(1), "remove") {
        return;
    }
    let kept = files_below(&archive);
    assert!(!kept.is_empty() && kept.iter().all(|path| holds(path, &image(1))), "{kept:?}");
    assert_eq!(nothing_lost(&[&engine], &hashes(1..2)), 0, "came twice");
}

#[test]
fn a23_a_failed_fsync_of_an_archived_copy_has_it_made_anew_and_nothing_published_twice() {
    an_archives_fsync_fails(1);
}

#[test]
fn a23_a_failed_fsync_of_the_archives_directory_has_the_copy_made_anew_and_nothing_published_twice() {
    an_archives_fsync_fails(2);
}

// ---- A24: a backlog beyond all bounds

#[test]
fn a24_a_backlog_beyond_the_window_begins_at_once_and_never_takes_much_memory() {
    /// `TEST_BACKLOG_FILES=1000000` has the million of the fault matrix: about 5 GiB of memory for its files.
    const FILES: u64 = 200_000;
    /// The whole of it: the design's bound for a million files.
    const PEAK_MAX: u64 = 150 << 20;
    let files = std::env::var("TEST_BACKLOG_FILES").map_or(FILES, |it| it.parse().expect("a number of files"));
    let engine = Engine::with(|options| options.keep = false);
    let site = site(&engine, "");
    let dir = site.drop_dir("Cam");
    let _quick_disk = Mount::tmpfs(&dir, "size=75%,nr_inodes=2000000");
    let face = faces::face(1, 1 << 10);
    let start = SystemTime::now() - Duration::from_hours(48);
    for n in 0..files {
        let mut file = File::create(dir.join(format!("{n}.jpg"))).unwrap();
        file.write_all(&faces::face_variant(&face, n)).unwrap();
        file.set_times(FileTimes::new().set_modified(start + Duration::from_millis(n))).unwrap();
    }
    let begun = Instant::now();
    let daemon = site.start();
    engine.until_accepted(1);
    let first = begun.elapsed();
    let mut daemon = daemon.until_ready();
    let total = i64::try_from(files).unwrap();
    eventually("all are seen", PATIENCE * 4, || (daemon.metrics().count(RECEIVED, "") == total).then_some(()));
    let drained = if std::env::var_os("TEST_BACKLOG_FILES").is_some() { files } else { files / 10 };
    eventually("it is drained", Duration::from_mins(30), || (engine.counts().accepted >= drained).then_some(()));
    let peak = peak(daemon.pid());
    let rate = drained as f64 / begun.elapsed().as_secs_f64();
    writeln!(
        std::io::stderr(),
        "{files} files: the first after {first:?}, then {rate:.0} a second, {} MiB at the peak",
        peak >> 20
    )
    .expect("stderr");
    assert!(first < Duration::from_secs(5), "the first frame took {first:?}");
    assert!(peak < PEAK_MAX, "{peak} bytes at the peak");
    assert_eq!(daemon.metrics().count(RECEIVED, ""), total, "each is counted once");
    if drained == files {
        daemon.idle(PATIENCE);
        assert_eq!(engine.counts().publish, files, "each once");
    }
}

/// The most memory that a process ever had, bytes.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

// ---- D5: memory

/// A control group that bounds the memory of a daemon. It ends when it is dropped, after the daemon.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// `None`: no group can be made here, neither of version 2 nor of version 1.
    fn new(limit: u64) -> Option<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("framegate-test-{}-{number}", std::process::id());
        let ours = fs::read_to_string("/proc/self/cgroup").ok()?;
        let below = |controller: &str| {
            let line = ours.lines().find_map(|line| line.split_once(controller).map(|(_, path)| path.to_owned()));
            line.unwrap_or_default()
        };
        let parents = [
            format!("/sys/fs/cgroup{}", below("0::")),
            format!("/sys/fs/cgroup/memory{}", below(":memory:")),
            "/sys/fs/cgroup/memory".to_owned(),
            "/sys/fs/cgroup".to_owned(),
        ];
        parents.iter().find_map(|parent| {
            let group = Self(Path::new(parent).join(&name));
            fs::create_dir(&group.0).ok()?;
            group.limit(limit).then_some(group)
        })
    }

    /// Whether this bound could be set.
    fn limit(&self, bytes: u64) -> bool {
        let mut set = false;
        for file in ["memory.max", "memory.limit_in_bytes"] {
            let path = self.0.join(file);
            set |= path.exists() && fs::write(path, bytes.to_string()).is_ok();
        }
        // Where there is swap, it must not take what is too much.
        let _no_swap = fs::write(self.0.join("memory.swap.max"), "0");
        set
    }

    /// A daemon in it.
    fn start<'a>(&self, site: &'a Site) -> Daemon<'a> {
        site.start_as(site.shell(&format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display())))
    }

    /// Processes of it that the kernel has killed.
    fn killed(&self) -> u64 {
        let said = ["memory.events", "memory.oom_control"].map(|file| fs::read_to_string(self.0.join(file)));
        let said: String = said.into_iter().flatten().collect();
        let count = said.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).expect("the kernel counts")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its processes have been waited for, but the kernel may still be at it.
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && begun.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
    }
}

/// A face of about so many bytes, different for each `n`.
fn large(n: u64, bytes: usize) -> Vec<u8> {
    let mut face = image(n);
    // Behind the end marker a camera may put what it likes.
    face.resize(bytes - 2, u8::try_from(n % 200).unwrap());
    face.extend(b"\xff\xd9");
    face
}

#[test]
fn d5_a_flood_of_large_frames_stays_within_the_budget_and_64_mib_and_nothing_is_killed() {
    const BUDGET: u64 = 64 << 20;
    const BEYOND: u64 = 64 << 20;
    const FRAMES: u64 = 24;
    let engine = Engine::start();
    let site = site(&engine, QUICK).section("[encode]\nmemory = \"64MiB\"");
    let Some(group) = MemoryGroup::new(BUDGET + BEYOND) else {
        return skipped("d5", "no control group for memory can be made");
    };
    let mut daemon = group.start(&site).until_ready();
    engine.hold();
    let mut written = Vec::new();
    for n in 0..FRAMES {
        let face = large(n, 7 << 20);
        put(&site.drop_dir("Cam"), &format!("{n}.jpg"), &face);
        written.push(hash(&face));
    }
    let full = |it: &Samples| it.count("framegate_memory_in_use_bytes", "") > i64::try_from(BUDGET / 2).unwrap();
    until(&daemon, "the budget is used", full);
    engine.release();
    daemon.idle(PATIENCE * 2);
    assert_eq!(group.killed(), 0);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert!(daemon.stop().success());
}

#[test]
fn d5_a_daemon_that_the_kernel_killed_for_memory_begins_again_where_it_was() {
    const FRAMES: u64 = 40;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let Some(group) = MemoryGroup::new(1 << 30) else {
        return skipped("d5", "no control group for memory can be made");
    };
    let mut daemon = group.start(&site).until_ready();
    put_face(&site.drop_dir("Cam"), 1000);
    engine.until_accepted(1);
    engine.hold();
    // Far below its budget: an operator's mistake.
    let used = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let used = used.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory").trim().to_owned();
    let used = used.trim_end_matches(" kB").parse::<u64>().expect("a number") << 10;
    assert!(group.limit(used + (16 << 20)));
    let mut written = vec![hash(&image(1000))];
    for n in 0..FRAMES {
        let face = large(n, 5 << 20);
        put(&site.drop_dir("Cam"), &format!("{n}.jpg"), &face);
        written.push(hash(&face));
    }
    assert_eq!(daemon.wait().signal(), Some(9));
    assert!(group.killed() >= 1, "by the kernel");
    drop(daemon);
    engine.release();
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= MAX_IN_FLIGHT, "{doubled} came twice");
    assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
}

// ---- D6: a box that slept

#[test]
fn d6_a_box_that_slept_longer_than_its_token_lives_logs_in_once_and_publishes_everything() {
    const LIFE: Duration = Duration::from_secs(4);
    let engine = Engine::with(|options| {
        options.faults.latency = Duration::from_millis(10);
        options.faults.token_ttl = LIFE;
    });
    let site = site(&engine, QUICK);
    let mut daemon = site.run();
    let dir = site.drop_dir("Cam");
    let mut written: Vec<Hash> = (0..100).map(|n| put_face(&dir, n)).collect();
    engine.until_accepted(5);
    daemon.signal(Signal::STOP);
    let (asleep, before) = (Instant::now(), engine.counts());
    written.extend((100..200).map(|n| put_face(&dir, n)));
    eventually("its token has ended", PATIENCE, || (asleep.elapsed() > LIFE + LIFE / 2).then_some(()));
    daemon.signal(Signal::CONT);
    daemon.idle(PATIENCE);
    let after = engine.counts();
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= MAX_IN_FLIGHT, "{doubled} came twice");
    // One login for the token that ended; what renewals there are belong to the seconds of work.
    assert!(after.authenticate - before.authenticate <= 1, "{after:?}");
    assert!(after.authenticate + after.renew <= 4, "{after:?}");
    assert!(after.publish <= written.len() as u64 + 2 * MAX_IN_FLIGHT, "no storm of attempts: {after:?}");
    assert_eq!(daemon.metrics().count(DEAD, ""), 0);
}

// ---- D9: a log that nobody reads

#[test]
fn d9_a_log_that_nobody_reads_stops_nothing() {
    let engine = Engine::start();
    let site = site(&engine, QUICK).section("[log]\nlevel = \"trace\"");
    let pipe = site.path().join("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _never_read = File::options().read(true).write(true).open(&pipe).unwrap();
    let shell = site.shell(&format!("exec \"$@\" >{pipe} 2>{pipe}", pipe = shown(&pipe)));
    let mut daemon = site.start_as(shell).until_ready();
    // Each frame says more than a kilobyte; a pipe has room for 64.
    let written: Vec<Hash> = (0..400).map(|n| put_face(&site.drop_dir("Cam"), n)).collect();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(daemon.stop().code(), Some(0));
}

// ---- E1: bombs and chimeras

/// A PNG of these chunks behind its header. Checksums are not looked at.
fn png(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let header = [0, 0, 0, 10, 0, 0, 0, 10, 8, 0, 0, 0, 0];
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [(b"IHDR", &header[..])].iter().chain(chunks) {
        png.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        png.extend(*kind);
        png.extend(*data);
        png.extend([0; 4]);
    }
    png
}

/// A zlib stream of some 7 MB that becomes so many zeros.
fn deflated_zeros(bytes: u64) -> Vec<u8> {
    // The fixed code: a literal zero, then copies of 258 bytes from one byte before, 13 bits each, then the end.
    let mut bits = vec![0x78, 0x01];
    let (mut held, mut width) = (0b000_0110_0011_u64, 11);
    for _ in 0..bytes / 258 {
        held |= 0b0_0000_1010_0011 << width;
        width += 13;
        while width >= 8 {
            bits.push(u8::try_from(held & 0xff).unwrap());
            held >>= 8;
            width -= 8;
        }
    }
    bits.extend(held.to_le_bytes());
    bits
}

#[test]
fn e1_bombs_are_never_unpacked_and_chimeras_are_what_their_first_bytes_say() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    put_face(&dir, 1);
    engine.until_accepted(1);
    let zip = b"PK\x03\x04\x14\0\0\0\0\0evil.exe".repeat(10);
    let page = b"<script>alert(1)</script>";
    let face = image(2);
    let comment = [&face[..2], b"\xff\xfe\0\x1b", page, &face[2..]].concat();
    let bomb = [b"Comment\0\0".to_vec(), deflated_zeros(1 << 30)].concat();
    assert!(bomb.len() > 6 << 20, "{}", bomb.len());
    // Whole by their structure: they go as they came, and nobody here unpacks them.
    let whole = [
        ("zTXt.png", png(&[(b"zTXt", &bomb), (b"IDAT", b"x"), (b"IEND", b"")])),
        ("iCCP.png", png(&[(b"iCCP", &bomb), (b"IDAT", b"x"), (b"IEND", b"")])),
        ("IDAT.png", png(&[(b"IDAT", &bomb[9..]), (b"IEND", b"")])),
        ("zip behind.jpg", [&image(3)[..], &zip].concat()),
        ("zip behind.png", [&png(&[(b"IDAT", b"x"), (b"IEND", b"")])[..], &zip].concat()),
        ("page inside.jpg", comment),
    ];
    // No image at all, or one that no face is in.
    let jpeg_of = |height: u16, width: u16| {
        let at = face.windows(2).position(|pair| pair == b"\xff\xc0").expect("a frame header");
        let mut face = face.clone();
        face[at + 5..at + 7].copy_from_slice(&height.to_be_bytes());
        face[at + 7..at + 9].copy_from_slice(&width.to_be_bytes());
        face
    };
    let vp8x = [&b"\x0a\0\0\0VP8X\x0a\0\0\0\0\0\0\0"[..], &[0xff; 6]].concat();
    let size = u32::try_from(4 + vp8x.len() - 4).unwrap().to_le_bytes();
    let bad = [
        ("page first.jpg", [&page[..], &image(4)].concat()),
        ("zip first.jpg", [&zip[..], &image(5)].concat()),
        ("gif.jpg", [b"GIF89a\xff\xff\xff\xff".to_vec(), vec![0; 100]].concat()),
        ("pdf.jpg", [b"%PDF-1.7\n".to_vec(), image(6)].concat()),
        ("radiance.jpg", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1000000000 +X 1000000000\n".to_vec()),
        ("elf.jpg", [b"\x7fELF".to_vec(), image(7)].concat()),
        ("large.jpg", jpeg_of(65_500, 65_500)),
        ("nothing.jpg", jpeg_of(0, 100)),
        ("webp.jpg", [&b"RIFF"[..], &size, b"WEBP", &vp8x[4..]].concat()),
        (
            "bmp.jpg",
            [&b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0"[..], &[0xff, 0xff, 0xff, 0x7f].repeat(2), &[0; 32]].concat(),
        ),
    ];
    for (name, bytes) in whole.iter().chain(&bad) {
        put(&dir, name, bytes);
    }
    daemon.idle(PATIENCE);
    let kept: BTreeMap<Hash, PathBuf> = files_below(&site.dead_letters())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|it| it == "image"))
        .map(|path| (hash(&fs::read(&path).unwrap()), path))
        .collect();
    for (name, bytes) in &bad {
        assert!(kept.contains_key(&hash(bytes)), "{name} is no dead letter");
    }
    assert_eq!(kept.len(), bad.len());
    let mut good: Vec<Hash> = whole.iter().map(|(_, bytes)| hash(bytes)).collect();
    good.extend(hashes(1..2));
    assert_eq!(nothing_lost(&[&engine], &good), 0);
    let peak = peak(daemon.pid());
    assert!(peak < 256 << 20, "{peak} bytes at the peak: something was unpacked");
}

// ---- E4: secrets, where an engine says them back

/// An engine that answers with what it was sent, and remembers each token that it gave.
struct Echo {
    address: std::net::SocketAddr,
    said: Arc<Said>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Default)]
struct Said {
    tokens: Mutex<Vec<String>>,
    /// Statuses of the next publish requests; then 200.
    publish: Mutex<Vec<u16>>,
    /// The status of logins.
    login: AtomicU16,
    renewals: AtomicU16,
    accepted: AtomicU16,
}

impl Echo {
    fn start() -> Self {
        let said = Arc::new(Said { login: AtomicU16::new(200), ..Said::default() });
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let app = axum::Router::new()
            .fallback(echo)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(said.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { address, said, _runtime: runtime }
    }

    fn tokens(&self) -> Vec<String> {
        self.said.tokens.lock().unwrap().clone()
    }
}

/// A JWT that lives for so many seconds. Its parts are its own.
fn jwt(seconds: u64) -> String {
    let part = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let id: u128 = fastrand::u128(..);
    let claims = serde_json::json!({ "jti": format!("{id:032x}"), "iat": now, "exp": now + seconds });
    let signature: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(32).collect();
    format!(
        "{}.{}.{}",
        part(br#"{"alg":"HS256","typ":"JWT","kid":"canary"}"#),
        part(claims.to_string().as_bytes()),
        part(&signature)
    )
}

async fn echo(
    axum::extract::State(said): axum::extract::State<Arc<Said>>,
    uri: axum::http::Uri,
    headers: axum::http::HeaderMap,
    body: bytes::Bytes,
) -> axum::response::Response {
    let sent = format!("{:?} {}", headers.get("authorization"), String::from_utf8_lossy(&body));
    // As the JSON of .NET and PHP writes it.
    let sent = format!("{sent} {}", sent.replace('+', "\\u002B").replace('/', "\\/"));
    let answer = |status: u16, body: String| {
        let mut answer = axum::response::Response::new(axum::body::Body::from(body));
        *answer.status_mut() = axum::http::StatusCode::from_u16(status).expect("a status");
        // Headers that are read, and those that are not.
        for name in ["location", "retry-after", "www-authenticate", "x-echo"] {
            if let Some(value) = headers.get("authorization") {
                answer.headers_mut().insert(name, value.clone());
            }
        }
        answer
    };
    let token = || {
        let token = jwt(4);
        said.tokens.lock().unwrap().push(token.clone());
        serde_json::json!({ "username": "edge-07", "token": token }).to_string()
    };
    match uri.path().rsplit('/').next().unwrap_or_default() {
        "authenticate" if said.login.load(Relaxed) == 200 => answer(200, token()),
        "authenticate" => answer(said.login.load(Relaxed), sent),
        "renewToken" => {
            said.renewals.fetch_add(1, Relaxed);
            answer(200, token())
        }
        _ => match said.publish.lock().unwrap().pop() {
            // A page of somebody who caught the request, another's text, the engine's own form.
            Some(200) => answer(200, format!("<html>{sent}</html>")),
            Some(status) if status % 2 == 0 => answer(status, sent),
            Some(status) => answer(status, serde_json::json!({ "message": sent, "status": status }).to_string()),
            None => {
                said.accepted.fetch_add(1, Relaxed);
                answer(200, String::new())
            }
        },
    }
}

/// What may appear nowhere, by its name.
type Secrets = Vec<(String, String)>;

#[track_caller]
fn none_is_in(secrets: &Secrets, shown: &[(String, String)]) {
    for (place, text) in shown {
        for (what, secret) in secrets {
            if let Some(at) = text.find(secret.as_str()) {
                let line = text[..at].rfind('\n').map_or(0, |it| it + 1);
                let end = text[at..].find('\n').map_or(text.len(), |it| at + it);
                panic!("{what} is in {place}: {}", &text[line..end]);
            }
        }
    }
}

/// Whatever it shows of itself.
fn everything_shown(site: &Site, daemon: &Daemon<'_>) -> Vec<(String, String)> {
    let mut shown: Vec<(String, String)> = ["/metrics", "/status", "/healthz", "/readyz"]
        .map(|path| (path.to_owned(), daemon.get(path).expect("it answers").1))
        .into();
    for arguments in [&["status"][..], &["status", "--json"], &["check"], &["dead-letter", "list", "--json"]] {
        let output = site.command(arguments).output().expect("the binary starts");
        let said = [output.stdout, output.stderr].concat();
        shown.push((arguments.join(" "), String::from_utf8_lossy(&said).into_owned()));
    }
    let json = files_below(&site.dead_letters()).into_iter().filter(|it| it.extension().is_some_and(|it| it == "json"));
    shown.extend(json.map(|path| (path.display().to_string(), fs::read_to_string(&path).expect("a letter"))));
    shown.push(("the log".into(), site.log()));
    assert!(site.log().contains("TRACE"), "it is verbose");
    shown
}

fn secrets_of(tokens: &[String], images: &[Vec<u8>]) -> Secrets {
    let mut secrets = vec![("the password".to_owned(), PASSWORD.to_owned())];
    for token in tokens {
        let parts = token.split('.').zip(["header", "payload", "signature"]);
        secrets.extend(parts.map(|(part, name)| (format!("a token's {name}"), part.to_owned())));
    }
    for image in images {
        let text = base64::engine::general_purpose::STANDARD.encode(image);
        // From anywhere in it, not only from its beginning.
        for at in (0..text.len() - 64).step_by(64) {
            secrets.push(("an image in base64".to_owned(), text[at..at + 24].to_owned()));
        }
    }
    secrets.push(("an image in base64".to_owned(), "AAEEpGSUYAAQIAAAEAAQ".to_owned()));
    secrets.push(("an image in base64".to_owned(), "AAEQgAZABkAwAiAAERAQIRA".to_owned()));
    secrets.push(("an image".to_owned(), "JFIF".to_owned()));
    secrets.push(("an image".to_owned(), "\u{fffd}\u{fffd}\u{fffd}".to_owned()));
    secrets
}

#[test]
fn e4_an_engine_that_says_everything_back_gets_no_token_password_or_image_into_what_is_shown() {
    const STATUSES: [u16; 16] = [400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 501, 502, 503, 511, 302, 200];
    for format in ["text", "json"] {
        let engine = Echo::start();
        let site = Site::new(&format!("http://{}", engine.address))
            .section("[publish]\nbackoff_min = \"10ms\"\nbackoff_max = \"50ms\"")
            .environment(
                "FRAMEGATE_LOG__LEVEL",
                "trace,hyper=trace,hyper_util=trace,reqwest=trace,rustls=trace,h2=trace",
            )
            .environment("FRAMEGATE_LOG__FORMAT", format)
            .detector("Cam", "UTC", QUICK);
        let daemon = site.run();
        let mut images = Vec::new();
        for (n, status) in (0..).zip(STATUSES) {
            // One frame for each, refused more than once, so that its answer is told in every way there is.
            engine.said.publish.lock().unwrap().extend([status; 2]);
            images.push(image(n));
            put_face(&site.drop_dir("Cam"), n);
            eventually(&format!("status {status} was answered"), PATIENCE * 2, || {
                engine.said.publish.lock().unwrap().is_empty().then_some(())
            });
            none_is_in(&secrets_of(&engine.tokens(), &images), &everything_shown(&site, &daemon));
        }
        eventually("a token was renewed", PATIENCE, || (engine.said.renewals.load(Relaxed) > 0).then_some(()));
        drop(daemon);
        // A login that is refused, with the password in the answer.
        for status in [401, 403, 500, 404] {
            engine.said.login.store(status, Relaxed);
            let daemon = site.run();
            images.push(image(u64::from(status)));
            put_face(&site.drop_dir("Cam"), u64::from(status));
            until(&daemon, "publishing is paused", |it| it.count("framegate_engine_state", "state=\"open\"") == 0);
            none_is_in(&secrets_of(&engine.tokens(), &images), &everything_shown(&site, &daemon));
        }
        assert!(engine.tokens().len() > 1);
    }
}

#[test]
fn e4_a_token_from_a_file_is_never_shown() {
    let part = |n: usize| format!("canary{n}token{:016x}", fastrand::u64(..));
    let opaque = format!("{}+{}/", part(0), part(1));
    let (short, parts) = (part(2), [part(3), part(4)]);
    for (token, pieces) in [
        (jwt(600), vec![]),
        (short.clone(), vec![short]),
        (parts.join("+"), parts.to_vec()),
        (opaque.clone(), opaque.split_terminator(['+', '/']).map(str::to_owned).collect()),
    ] {
        let engine = Echo::start();
        let site = Site::new(&format!("http://{}", engine.address))
            .token(&token)
            .section("[publish]\nbackoff_min = \"10ms\"\nbackoff_max = \"50ms\"")
            .environment("FRAMEGATE_LOG__LEVEL", "trace,hyper=trace,hyper_util=trace,reqwest=trace")
            .detector("Cam", "UTC", QUICK);
        let daemon = site.run();
        for (n, status) in (0..).zip([400, 403, 500, 503, 404, 401]) {
            engine.said.publish.lock().unwrap().push(status);
            put_face(&site.drop_dir("Cam"), n);
            eventually(&format!("status {status} was answered"), PATIENCE * 2, || {
                engine.said.publish.lock().unwrap().is_empty().then_some(())
            });
            let mut secrets = secrets_of(std::slice::from_ref(&token), &[image(n)]);
            secrets.extend(pieces.iter().map(|piece| ("a piece of the token".to_owned(), piece.clone())));
            none_is_in(&secrets, &everything_shown(&site, &daemon));
        }
    }
}
