//! Drop directories of the real binary, against detectors and file systems that misbehave. FAULTS.md sections A and E1.

mod support;

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{Seek as _, Write as _};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use rustix::process::Signal;
use serde_json::Value;

use support::engine::{Engine, Hash, arrivals, hash, image, nothing_lost};
use support::faults::{Mount, Strace, Sysctl, skipped, works};
use support::{Daemon, PATIENCE, Samples, Site, SlowWriter, eventually, faces, files_below, put};

/// A detector that is waited for no longer than a test has to.
const QUICK: &str = "directory.quiet = \"50ms\"\ndirectory.rescan = \"200ms\"\ndirectory.partial_timeout = \"300ms\"";
/// Scans are so rare that what is found soon was found by an event.
const BY_EVENT: &str = "directory.quiet = \"50ms\"\ndirectory.rescan = \"10m\"\ndirectory.partial_timeout = \"10m\"";
/// Unfinished files are waited for longer than any test runs.
const PATIENT: &str = "directory.quiet = \"50ms\"\ndirectory.rescan = \"200ms\"\ndirectory.partial_timeout = \"10m\"";
/// Held against what an event takes; the design says 10 ms, a debug build on two busy cores gets more.
const SOON: Duration = Duration::from_secs(2);
const DAY: Duration = Duration::from_hours(24);

const RECEIVED: &str = "framegate_frames_received_total";
const PUBLISHED: &str = "framegate_frames_published_total";
const DEAD: &str = "framegate_frames_dead_lettered_total";
const DROPPED: &str = "framegate_frames_dropped_total";
const RETURNED: &str = "framegate_frames_returned_total";
const REFUSED: &str = "framegate_frames_refused_total";
const PENDING: &str = "framegate_frames_pending";
const ERRORS: &str = "framegate_settle_errors_total";
const PARTIAL_WAITS: &str = "framegate_partial_waits_total";
const UP: &str = "framegate_detector_up";

/// One detector `Cam` with these keys.
fn site(engine: &Engine, keys: &str) -> Site {
    Site::new(&engine.base_url()).detector("Cam", "UTC", keys)
}

/// One detector `Cam` that archives what is published, and its archive.
fn archiving(engine: &Engine, keys: &str) -> (Site, PathBuf) {
    let site = Site::new(&engine.base_url());
    let archive = site.path().join("archive");
    let path = archive.to_str().expect("a plain path");
    let keys = format!("{QUICK}\n{keys}\ndirectory.after_publish = \"archive\"\ndirectory.archive = {path:?}");
    (site.detector("Cam", "UTC", &keys), archive)
}

fn until(daemon: &Daemon<'_>, what: &str, condition: impl Fn(&Samples) -> bool) -> Samples {
    eventually(what, PATIENCE, || Some(daemon.metrics()).filter(&condition))
}

fn reason(reason: &str) -> String {
    format!("reason=\"{reason}\"")
}

fn set_modified(path: &Path, time: SystemTime) {
    let file = File::open(path).expect("the file can be opened");
    file.set_times(FileTimes::new().set_modified(time)).expect("its time can be set");
}

/// Writes a file that came `age` ago.
fn old_file(path: &Path, image: &[u8], age: Duration) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(image).unwrap();
    file.set_times(FileTimes::new().set_modified(SystemTime::now() - age)).unwrap();
}

/// The dead letters: their JSON and their image.
fn dead_letters(site: &Site) -> Vec<(Value, Vec<u8>)> {
    let json =
        files_below(&site.dead_letters()).into_iter().filter(|path| path.extension() == Some(OsStr::new("json")));
    json.map(|path| {
        let letter = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        (letter, fs::read(path.with_extension("image")).unwrap())
    })
    .collect()
}

/// Resident memory of a process, bytes.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Every line of a log in JSON is one event, whatever names are in it.
fn one_line_an_event(log: &str) {
    assert!(log.lines().count() > 3, "{log}");
    for line in log.lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "not one event: {line:?}");
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
    }
}

const JSON_LOG: &str = "[log]\nlevel = \"debug\"\nformat = \"json\"";

// ---- A1–A3: writers

#[test]
fn a1_a_slow_writer_that_keeps_its_file_open_is_published_once_and_whole() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let mut daemon = site.run();
    let face = image(1);
    let mut writer = SlowWriter::create(&site.drop_dir("Cam").join("slow.jpg"), &face, 10);
    for n in 0..9 {
        assert!(writer.piece());
        until(&daemon, "the file is looked at and left to its writer", |it| it.count(PARTIAL_WAITS, "") > n);
    }
    assert_eq!(engine.counts().publish, 0);
    assert!(writer.piece() && !writer.piece());
    engine.until_accepted(1);
    drop(writer);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&face)]), 0);
    assert_eq!((samples.count(RECEIVED, ""), samples.count(DEAD, "")), (1, 0));
}

#[test]
fn a1_a_slow_writer_that_opens_appends_and_closes_each_time_is_published_once_and_whole() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let mut daemon = site.run();
    let face = image(2);
    let path = site.drop_dir("Cam").join("slow.jpg");
    for (n, piece) in (0..).zip(face.chunks(face.len().div_ceil(10))) {
        let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        file.write_all(piece).unwrap();
        drop(file);
        if n < 9 {
            until(&daemon, "the file is left to its writer", |it| it.count(PARTIAL_WAITS, "") > n);
            assert_eq!(engine.counts().publish, 0);
        }
    }
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&face)]), 0);
    assert_eq!(samples.count(RECEIVED, ""), 1);
}

#[test]
fn a2_a_writer_that_dies_half_way_becomes_a_dead_letter_after_the_time_out() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let mut daemon = site.run();
    let face = image(3);
    let mut writer = SlowWriter::create(&site.drop_dir("Cam").join("half.jpg"), &face, 2);
    writer.piece();
    drop(writer);
    until(&daemon, "it is a dead letter", |it| it.count(DEAD, &reason("truncated")) == 1);
    daemon.idle(PATIENCE);
    assert_eq!(engine.counts().publish, 0);
    let letters = dead_letters(&site);
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].1, face[..face.len().div_ceil(2)]);
    assert_eq!(letters[0].0["original_name"], "half.jpg");
}

#[test]
fn a3_a_file_that_is_renamed_in_is_noticed_at_once() {
    let engine = Engine::start();
    let _watches = inotify();
    let site = site(&engine, BY_EVENT);
    let mut daemon = site.run();
    let mut times = Vec::new();
    for n in 0..20 {
        let begun = Instant::now();
        put(&site.drop_dir("Cam"), "same.jpg", &image(n));
        engine.until_accepted(n + 1);
        times.push(begun.elapsed());
    }
    times.sort();
    assert!(times[10] < Duration::from_millis(250) && times[19] < SOON, "{times:?}");
    assert_eq!(daemon.idle(PATIENCE).count("framegate_watch_errors_total", ""), 0);
    nothing_lost(&[&engine], &(0..20).map(|n| hash(&image(n))).collect::<Vec<_>>());
}

// ---- A4–A8: watching

/// Held by a test that changes the kernel's inotify settings, and by those that need them as they are.
fn inotify() -> MutexGuard<'static, ()> {
    static SETTINGS: Mutex<()> = Mutex::new(());
    SETTINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a4_when_the_kernel_drops_events_a_scan_finds_everything() {
    const FILES: u64 = 2000;
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let settings = inotify();
    let Some(short) = Sysctl::set("fs.inotify.max_queued_events", "16") else {
        return skipped("a4", "fs.inotify.max_queued_events cannot be set");
    };
    let mut daemon = site.run();
    let put_one = |n: u64| {
        put(&site.drop_dir("Cam"), &format!("{n}.jpg"), &image(n));
        hash(&image(n))
    };
    // Ready is not yet watching: a first frame shows that it is.
    let first = put_one(FILES);
    engine.until_accepted(1);
    drop((short, settings));
    // While it stands still, nothing is read from the queue.
    daemon.signal(Signal::STOP);
    let written: Vec<Hash> = (0..FILES).map(put_one).chain([first]).collect();
    daemon.signal(Signal::CONT);
    let samples = daemon.idle(PATIENCE * 2);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert!(samples.count("framegate_watch_overflows_total", "") >= 1);
    assert!(samples.count("framegate_rescans_total", "") >= 2);
}

#[test]
fn a5_without_watches_left_directories_are_polled_and_it_is_said_once() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    for n in 0..5 {
        fs::create_dir(dir.join(n.to_string())).unwrap();
    }
    if !works("unshare", &["-U", "-r", "sh", "-c", "echo 1 > /proc/sys/user/max_inotify_watches"]) {
        return skipped("a5", "no user namespace with a limit of its own");
    }
    let limited = site.shell("echo 1 > /proc/sys/user/max_inotify_watches && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["-U", "-r"]).arg(limited.get_program()).args(limited.get_args());
    let mut daemon = site.start_as(command).until_ready();
    put(&dir, "top.jpg", &image(1));
    put(&dir.join("4"), "below.jpg", &image(2));
    let begun = Instant::now();
    let samples = daemon.idle(PATIENCE);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(samples.count("framegate_watch_errors_total", "") >= 1);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(1)), hash(&image(2))]), 0);
    assert_eq!(site.log().matches("fs.inotify.max_user_watches").count(), 1);
}

#[test]
fn a5_one_inotify_instance_is_enough_for_any_number_of_directories() {
    const CAMERAS: u64 = 12;
    if !works("unshare", &["-U", "-r", "sh", "-c", "echo 1 > /proc/sys/user/max_inotify_instances"]) {
        return skipped("a5", "no user namespace with a limit of its own");
    }
    let engine = Engine::start();
    let mut site = Site::new(&engine.base_url());
    for n in 0..CAMERAS {
        site = site.detector(&format!("Cam {n}"), "UTC", BY_EVENT);
    }
    let limited = site.shell("echo 1 > /proc/sys/user/max_inotify_instances && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["-U", "-r"]).arg(limited.get_program()).args(limited.get_args());
    let mut daemon = site.start_as(command).until_ready();
    let written: Vec<Hash> = (0..CAMERAS)
        .map(|n| {
            put(&site.drop_dir(&format!("Cam {n}")), "face.jpg", &image(n));
            hash(&image(n))
        })
        .collect();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count("framegate_watch_errors_total", ""), 0);
    assert!(!site.log().contains("polled"), "{}", site.log());
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn a6_what_is_written_below_an_overlay_is_found_by_polling() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let below = site.path().join("below");
    let Some(_disk) = Mount::tmpfs(&below, "size=16m") else { return skipped("a6", "no tmpfs can be mounted") };
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| below.join(name));
    for dir in [&lower, &upper, &work] {
        fs::create_dir(dir).unwrap();
    }
    let Some(_overlay) = Mount::overlay(&dir, &lower, &upper, &work) else {
        return skipped("a6", "no overlay can be mounted");
    };
    let mut daemon = site.run();
    put(&upper, "upper.jpg", &image(1));
    engine.until_accepted(1);
    put(&dir, "top.jpg", &image(2));
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(1)), hash(&image(2))]), 0);
    assert_eq!(site.log().matches("polling").count(), 1, "said once");
}

#[test]
fn a7_a_file_system_mounted_over_the_directory_and_unmounted_again_loses_nothing() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    engine.hold();
    put(&dir, "under.jpg", &image(1));
    eventually("it is in flight", PATIENCE, || (engine.counts().in_flight == 1).then_some(()));
    let Some(mount) = Mount::tmpfs(&dir, "size=16m") else { return skipped("a7", "no tmpfs can be mounted") };
    engine.release();
    engine.until_accepted(1);
    put(&dir, "over.jpg", &image(2));
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    drop(mount);
    put(&dir, "after.jpg", &image(3));
    engine.until_accepted(3);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count(UP, ""), 1);
    assert_eq!(nothing_lost(&[&engine], &[1, 2, 3].map(|n| hash(&image(n)))), 0);
}

#[test]
fn a7_a_file_system_can_be_unmounted_once_a_reload_took_its_detector_out() {
    let engine = Engine::start();
    let site = site(&engine, QUICK).detector("Other", "UTC", QUICK);
    let dir = site.drop_dir("Cam");
    let Some(_disk) = Mount::tmpfs(&dir, "size=16m") else { return skipped("a7", "no tmpfs can be mounted") };
    let mut daemon = site.run();
    put(&dir, "a.jpg", &image(1));
    engine.until_accepted(1);
    daemon.idle(PATIENCE);
    let umount = || works("umount", &[dir.to_str().unwrap()]);
    assert!(!umount(), "its detector keeps it busy");
    let config = fs::read_to_string(site.config()).unwrap();
    let (head, rest) = config.split_once("[[detectors]]").unwrap();
    let (_, other) = rest.split_once("[[detectors]]").unwrap();
    fs::write(site.config(), format!("{head}[[detectors]]{other}")).unwrap();
    assert!(site.command(&["reload"]).output().unwrap().status.success());
    eventually("it can be unmounted", PATIENCE, || umount().then_some(()));
}

#[test]
fn a8_a_directory_that_is_removed_and_made_again_is_served_again() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    fs::remove_dir_all(&dir).unwrap();
    until(&daemon, "its detector is down", |it| it.count(UP, "") == 0);
    eventually("and it is said", PATIENCE, || daemon.get("/readyz").ok().filter(|(status, _)| *status == 503));
    fs::create_dir(&dir).unwrap();
    put(&dir, "again.jpg", &image(1));
    engine.until_accepted(1);
    until(&daemon, "its detector is up", |it| it.count(UP, "") == 1);
    // Watched, too, not only scanned once.
    put(&dir, "second.jpg", &image(2));
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    // Too quick to be seen missing.
    fs::remove_dir_all(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    put(&dir, "third.jpg", &image(3));
    engine.until_accepted(3);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2, 3].map(|n| hash(&image(n)))), 0);
    assert!(site.log().contains("detector held") && site.log().contains("delivers again"));
}

#[test]
fn a8_when_somebody_removes_the_claims_directory_it_is_made_again() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    put(&dir, "first.jpg", &image(1));
    engine.until_accepted(1);
    daemon.idle(PATIENCE);
    fs::remove_dir_all(dir.join(".framegate")).unwrap();
    put(&dir, "second.jpg", &image(2));
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    until(&daemon, "its detector is up", |it| it.count(UP, "") == 1);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
}

// ---- A9–A11: what must never be opened

#[test]
fn a9_symbolic_links_are_never_followed() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let secrets = site.path().join("canary-secrets");
    fs::create_dir(&secrets).unwrap();
    let canary = image(666);
    fs::write(secrets.join("canary.jpg"), &canary).unwrap();
    let fifo = secrets.join("canary-fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut daemon = site.run();
    let trace = site.path().join("trace");
    let strace = Strace::attach(daemon.pid(), &trace, &["-y", "-e", "trace=openat,open,openat2,readlink,readlinkat"]);
    symlink(secrets.join("canary.jpg"), dir.join("secret.jpg")).unwrap();
    symlink(&fifo, dir.join("fifo.jpg")).unwrap();
    symlink("/nowhere/at/all", dir.join("dangling.jpg")).unwrap();
    symlink("loop.jpg", dir.join("loop.jpg")).unwrap();
    symlink(&secrets, dir.join("directory.jpg")).unwrap();
    symlink(&secrets, dir.join("directory")).unwrap();
    // Renamed in, as a detector would.
    symlink(secrets.join("canary.jpg"), dir.join(".later")).unwrap();
    fs::rename(dir.join(".later"), dir.join("renamed.jpg")).unwrap();
    put(&dir, "good.jpg", &image(1));
    engine.until_accepted(1);
    let samples = until(&daemon, "each is refused", |it| it.count(REFUSED, &reason("symlink")) >= 6);
    let rescans = samples.count("framegate_rescans_total", "");
    let samples = until(&daemon, "two more scans", |it| it.count("framegate_rescans_total", "") >= rescans + 2);
    assert_eq!(samples.count(REFUSED, &reason("symlink")), 6, "counted once each");
    assert_eq!(site.log().matches("symbolic link").count(), 6, "said once each");
    samples.equation_holds().unwrap();
    if let Some(strace) = strace {
        let trace = strace.trace();
        assert!(trace.contains("good.jpg"), "the trace shows what is opened");
        assert!(!trace.contains("canary"), "{trace}");
        for link in ["secret.jpg", "fifo.jpg", "dangling.jpg", "loop.jpg", "renamed.jpg"] {
            assert!(!trace.contains(link), "{link} was opened");
        }
    } else {
        skipped("a9 (only that links are not even opened)", "strace cannot attach");
    }
    for link in ["secret.jpg", "fifo.jpg", "dangling.jpg", "loop.jpg", "directory.jpg", "directory", "renamed.jpg"] {
        fs::remove_file(dir.join(link)).expect("it was left alone");
    }
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(1))]), 0);
    assert_eq!(fs::read(secrets.join("canary.jpg")).unwrap(), canary);
}

#[test]
fn a9_the_drop_directory_itself_may_be_a_link_of_the_operator() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let real = site.path().join("real");
    fs::rename(&dir, &real).unwrap();
    symlink(&real, &dir).unwrap();
    let daemon = site.run();
    put(&real, "a.jpg", &image(1));
    engine.until_accepted(1);
    until(&daemon, "it is settled", |it| it.count(PENDING, "") == 0);
    assert!(!real.join("a.jpg").exists());
}

#[test]
fn a10_fifos_sockets_devices_and_directories_with_image_names_are_refused_and_block_nothing() {
    let engine = Engine::start();
    let site = site(&engine, &format!("{QUICK}\ndirectory.recursive = false"));
    let dir = site.drop_dir("Cam");
    let daemon = site.run();
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, dir.join("fifo.jpg"), FileType::Fifo, mode, 0).unwrap();
    let _socket = UnixListener::bind(dir.join("socket.jpg")).unwrap();
    fs::create_dir(dir.join("directory.jpg")).unwrap();
    let device = |name: &str, kind, major, minor| {
        rustix::fs::mknodat(CWD, dir.join(name), kind, mode, rustix::fs::makedev(major, minor)).is_ok()
    };
    // /dev/zero would never end; the other is nobody's.
    let devices = i64::from(device("zero.jpg", FileType::CharacterDevice, 1, 5))
        + i64::from(device("block.jpg", FileType::BlockDevice, 240, 7));
    if devices < 2 {
        skipped("a10 (only the devices)", "device nodes cannot be made");
    }
    put(&dir, "good.jpg", &image(1));
    engine.until_accepted(1);
    let samples = until(&daemon, "all are refused", |it| it.count(REFUSED, "") >= 3 + devices);
    for (kind, times) in [("fifo", 1), ("socket", 1), ("directory", 1), ("device", devices)] {
        assert_eq!(samples.count(REFUSED, &reason(kind)), times, "{kind}");
    }
    put(&dir, "still good.jpg", &image(2));
    engine.until_accepted(2);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
    assert!(dir.join("fifo.jpg").exists() && dir.join("directory.jpg").exists(), "left alone");
    assert!(daemon.stop().success());
}

#[test]
fn a11_a_hard_link_to_somebody_elses_file_is_refused() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let canary = site.path().join("canary.jpg");
    fs::write(&canary, image(666)).unwrap();
    let mut daemon = site.run();
    fs::hard_link(&canary, dir.join("link.jpg")).unwrap();
    put(&dir, "good.jpg", &image(1));
    until(&daemon, "it is refused", |it| it.count(REFUSED, &reason("hard-link")) == 1);
    engine.until_accepted(1);
    assert_eq!(fs::read(&canary).unwrap(), image(666));
    assert!(dir.join("link.jpg").exists());
    // Its other name gone, it is a file like any other.
    fs::remove_file(&canary).unwrap();
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
}

#[test]
fn a11_a_link_swapped_in_between_looking_and_opening_leaks_nothing() {
    const SWAPS_MAX: u32 = 5_000_000;
    const RACE_MAX: Duration = Duration::from_secs(10);
    const TAKEN: usize = 500;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let canary = site.path().join("canary.jpg");
    fs::write(&canary, image(666)).unwrap();
    let daemon = site.run();
    let (shown, spare, fresh) = (dir.join("x.jpg"), dir.join(".spare"), dir.join(".fresh"));
    let written = std::cell::RefCell::new(Vec::new());
    let write = |path: &Path| {
        let mut written = written.borrow_mut();
        let n = 1000 + written.len() as u64;
        fs::write(&fresh, image(n)).unwrap();
        // Nothing may be replaced: it would be lost by us, not by the daemon.
        if rustix::fs::renameat_with(CWD, &fresh, CWD, path, RenameFlags::NOREPLACE).is_ok() {
            written.push(hash(&image(n)));
        }
    };
    symlink(&canary, &spare).unwrap();
    write(&shown);
    let begun = Instant::now();
    let (mut swaps, mut chance) = (0, fastrand::Rng::with_seed(11));
    for n in 0..SWAPS_MAX {
        swaps = n;
        if begun.elapsed() > RACE_MAX {
            break;
        }
        // Each turn lasts about as long as taking a file does, a little more or less.
        let turn = Instant::now() + Duration::from_micros(chance.u64(..400));
        while Instant::now() < turn {
            std::hint::spin_loop();
        }
        if rustix::fs::renameat_with(CWD, &shown, CWD, &spare, RenameFlags::EXCHANGE).is_err() {
            if !fs::symlink_metadata(&spare).is_ok_and(|spare| spare.is_symlink()) {
                drop(fs::rename(&spare, dir.join(format!("rest{n}.jpg"))));
                symlink(&canary, &spare).unwrap();
            }
            write(&shown);
            if written.borrow().len() >= TAKEN {
                break;
            }
        }
    }
    if fs::symlink_metadata(&spare).is_ok_and(|spare| !spare.is_symlink()) {
        fs::rename(&spare, dir.join("rest.jpg")).unwrap();
    }
    let written = written.into_inner();
    engine.until_accepted(written.len() as u64);
    // How many files come through is luck: one that is a link at each look is not taken while the race lasts.
    assert!(swaps > 1000, "a race: {swaps} swaps, {} files", written.len());
    assert!(site.log().matches("symbolic link").count() < 10, "the log is not filled with it");
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    until(&daemon, "nothing is pending", |it| it.count(PENDING, "") == 0 && it.equation_holds().is_ok());
    assert!(daemon.stop().success());
    // What lies in the claims by now is a link at worst: the next start must not be fooled either.
    let daemon = site.run();
    until(&daemon, "nothing is pending", |it| it.count(PENDING, "") == 0);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(fs::read(&canary).unwrap(), image(666));
}

// ---- A12, A13: names

fn names() -> Vec<OsString> {
    let long = [vec![b'x'; 251], b".jpg".to_vec()].concat();
    let names: [&[u8]; 16] = [
        b"\xff\xfe\x80.jpg",
        b"new\nline.jpg",
        b"{\"level\":\"ERROR\"}\n{\"level\":\"ERROR\"}.jpg",
        b"\x1b[31mred\x1b[0m\x07.jpg",
        b"carriage\rreturn.jpg",
        &long,
        b"-rf",
        b"--config",
        b"a..jpg",
        b"* $(reboot) `reboot`.jpg",
        b"back\\slash.jpg",
        b"quo\"te's.jpg",
        b" ",
        b"{path.0}%s%n.jpg",
        "\u{202e}gpj.exe\u{2028}\u{85}.jpg".as_bytes(),
        b"semi;colon&and|pipe.jpg",
    ];
    names.iter().map(|name| OsString::from_vec(name.to_vec())).collect()
}

#[test]
fn a12_any_byte_string_is_a_name_and_the_log_stays_one_line_an_event() {
    let engine = Engine::start();
    let site = site(&engine, &format!("{QUICK}\ndirectory.include = [\"*\"]")).section(JSON_LOG);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let mut written = Vec::new();
    for (n, name) in (0..).zip(names()) {
        fs::write(dir.join(&name), image(n)).unwrap();
        // As a sub-directory, too: watched, mirrored, removed.
        let below = dir.join("sub").join(&name);
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join(&name), image(100 + n)).unwrap();
        written.extend([hash(&image(n)), hash(&image(100 + n))]);
    }
    // Names that begin with a dot are not looked at.
    fs::write(dir.join("..jpg"), image(666)).unwrap();
    // And one that is refused, and so logged at each level.
    symlink("/etc/passwd", dir.join("link\n\x1b[2J.jpg")).unwrap();
    engine.until_accepted(written.len() as u64);
    until(&daemon, "the link is refused", |it| it.count(REFUSED, &reason("symlink")) == 1);
    fs::remove_file(dir.join("..jpg")).expect("it was left alone");
    fs::remove_file(dir.join("link\n\x1b[2J.jpg")).expect("it was left alone");
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert!(daemon.stop().success());
    one_line_an_event(&site.log());
}

#[test]
fn a13_a_bad_image_under_such_a_name_is_a_dead_letter_under_its_id_with_the_name_in_its_json() {
    let engine = Engine::start();
    let site = site(&engine, &format!("{QUICK}\ndirectory.include = [\"*\"]")).section("[log]\nlevel = \"debug\"");
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    for name in names() {
        fs::write(dir.join(&name), b"no image").unwrap();
    }
    until(&daemon, "all are dead letters", |it| it.count(DEAD, &reason("unsupported")) == 16);
    daemon.idle(PATIENCE);
    for path in files_below(&site.dead_letters()) {
        let name = path.file_name().unwrap().to_str().expect("a plain name");
        assert_eq!(path.parent(), Some(&*site.dead_letters()));
        let id = name.strip_suffix(".json").or_else(|| name.strip_suffix(".image")).expect(name);
        assert!(id.len() == 26 && id.bytes().all(|b| b.is_ascii_alphanumeric()), "{name}");
    }
    let letters = dead_letters(&site);
    let said: HashSet<&str> = letters.iter().map(|(json, _)| json["original_name"].as_str().unwrap()).collect();
    assert_eq!(said.len(), 16, "each has its own: {said:?}");
    for name in ["new\\u{a}line.jpg", "-rf", "a..jpg", "\\xff\\xfe\\x80.jpg", "quo\"te's.jpg"] {
        assert!(said.contains(name), "{name} is not in {said:?}");
    }
    let config = site.config();
    let words: [&OsStr; 4] = ["dead-letter".as_ref(), "--config".as_ref(), config.as_ref(), "list".as_ref()];
    let listed = Command::new(env!("CARGO_BIN_EXE_framegate")).args(words).output().unwrap();
    assert!(listed.status.success(), "{listed:?}");
    for text in [String::from_utf8(listed.stdout).unwrap(), site.log()] {
        assert!(text.lines().all(|line| !line.contains(|c: char| c.is_control())), "{text}");
        assert!(!text.contains("\nline.jpg"), "{text}");
    }
}

// ---- A14, A15: rewriting

#[test]
fn a14_a_name_rewritten_by_rename_while_it_is_published_is_published_twice() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    engine.hold();
    for n in 1..=3 {
        put(&dir, "same.jpg", &image(n));
        eventually("this version is taken", PATIENCE, || (!dir.join("same.jpg").exists()).then_some(()));
    }
    engine.release();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2, 3].map(|n| hash(&image(n)))), 0);
}

/// Truncates and rewrites in place, by a descriptor that stays open.
struct Rewriter(File);

impl Rewriter {
    fn begin(&mut self, part: &[u8]) {
        self.0.set_len(0).unwrap();
        self.0.rewind().unwrap();
        self.0.write_all(part).unwrap();
    }
}

#[test]
fn a15_a_file_rewritten_in_place_while_it_is_published_is_published_again_when_it_is_whole() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let path = site.drop_dir("Cam").join("x.jpg");
    let mut daemon = site.run();
    let (first, second) = (image(1), image(2));
    engine.hold();
    let mut writer = Rewriter(File::create(&path).unwrap());
    writer.begin(&first);
    eventually("the first version is in flight", PATIENCE, || (engine.counts().in_flight == 1).then_some(()));
    let (head, tail) = second.split_at(second.len() / 2);
    writer.begin(head);
    engine.release();
    let samples = until(&daemon, "the half written second version is looked at", |it| {
        it.count(PARTIAL_WAITS, "") + it.count(DEAD, "") > 0
    });
    assert_eq!(samples.count(DEAD, ""), 0, "its writer is not done");
    writer.0.write_all(tail).unwrap();
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&first), hash(&second)]), 0);
}

#[test]
fn a15_a_half_written_second_version_whose_writer_died_becomes_a_dead_letter() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let path = site.drop_dir("Cam").join("x.jpg");
    let mut daemon = site.run();
    engine.hold();
    let mut writer = Rewriter(File::create(&path).unwrap());
    writer.begin(&image(1));
    eventually("the first version is in flight", PATIENCE, || (engine.counts().in_flight == 1).then_some(()));
    let head = image(2)[..1000].to_vec();
    writer.begin(&head);
    drop(writer);
    engine.release();
    until(&daemon, "it is a dead letter", |it| it.count(DEAD, &reason("truncated")) == 1);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(1))]), 0);
    assert_eq!(dead_letters(&site)[0].1, head);
}

#[test]
fn a15_a_file_rewritten_in_place_again_and_again_is_never_published_torn() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let path = site.drop_dir("Cam").join("x.jpg");
    let mut daemon = site.run();
    let versions: Vec<Vec<u8>> = (0..2000).map(image).collect();
    let mut writer = Rewriter(File::create(&path).unwrap());
    for version in &versions {
        let (head, tail) = version.split_at(version.len() / 2);
        writer.begin(head);
        writer.0.write_all(tail).unwrap();
    }
    drop(writer);
    let last = hash(versions.last().unwrap());
    eventually("the last version arrives", PATIENCE, || arrivals(&[&engine]).contains_key(&last).then_some(()));
    let samples = daemon.idle(PATIENCE);
    let known: HashSet<Hash> = versions.iter().map(|version| hash(version)).collect();
    assert!(arrivals(&[&engine]).keys().all(|it| known.contains(it)), "torn");
    assert_eq!(samples.count(DEAD, ""), 0);
    engine.contract_held();
}

// ---- A16–A19: sharing, archives and full disks

#[test]
fn a16_two_daemons_on_one_directory_publish_each_frame_once() {
    const FILES: u64 = 500;
    let engine = Engine::start();
    let one = site(&engine, QUICK);
    let dir = one.drop_dir("Cam");
    let two = Site::new(&engine.base_url()).section(&format!(
        "[[detectors]]\nname = \"Cam\"\ntime_zone = \"UTC\"\ndirectory.path = {:?}\n{QUICK}",
        dir.to_str().unwrap()
    ));
    for n in 0..FILES / 2 {
        put(&dir, &format!("{n}.jpg"), &image(n));
    }
    let (mut first, mut second) = (one.run(), two.run());
    for n in FILES / 2..FILES {
        put(&dir, &format!("{n}.jpg"), &image(n));
    }
    engine.until_accepted(FILES);
    let (a, b) = (first.idle(PATIENCE), second.idle(PATIENCE));
    assert_eq!(nothing_lost(&[&engine], &(0..FILES).map(|n| hash(&image(n))).collect::<Vec<_>>()), 0, "came twice");
    assert_eq!(a.count(PUBLISHED, "") + b.count(PUBLISHED, ""), 500);
    // One dies with frames in hand: the other takes them over.
    engine.hold();
    for n in FILES..FILES + 40 {
        put(&dir, &format!("{n}.jpg"), &image(n));
    }
    let claims = || one.files_left().iter().filter(|path| path.to_string_lossy().contains('~')).count();
    eventually("they are in hand", PATIENCE, || (claims() >= 16 && engine.counts().in_flight > 0).then_some(()));
    let in_hand = first.metrics().count("framegate_frames_in_flight", "").unsigned_abs();
    first.kill();
    engine.release();
    eventually("the survivor publishes all", PATIENCE, || {
        (arrivals(&[&engine]).len() as u64 == FILES + 40 && one.files_left().is_empty()).then_some(())
    });
    second.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &(0..FILES + 40).map(|n| hash(&image(n))).collect::<Vec<_>>());
    assert!(doubled <= in_hand, "{doubled} came twice, {in_hand} were in flight");
}

#[test]
fn a17_an_archive_on_another_file_system_keeps_bytes_and_relative_paths() {
    let engine = Engine::start();
    let (site, archive) = archiving(&engine, "");
    let dir = site.drop_dir("Cam");
    let Some(_disk) = Mount::tmpfs(&archive, "size=16m") else { return skipped("a17", "no tmpfs can be mounted") };
    let dead = Mount::tmpfs(&site.dead_letters(), "size=16m");
    assert!(dead.is_some());
    let mut daemon = site.run();
    let evil = OsString::from_vec(b"2026\n\xff.jpg".to_vec());
    put(&dir, "2026-11-23/001/a.jpg", &image(1));
    fs::write(dir.join(&evil), image(2)).unwrap();
    put(&dir, "bad.jpg", b"no image");
    daemon.idle(PATIENCE);
    engine.until_accepted(2);
    assert_eq!(fs::read(archive.join("2026-11-23/001/a.jpg")).unwrap(), image(1));
    assert_eq!(fs::read(archive.join(&evil)).unwrap(), image(2));
    assert_eq!(dead_letters(&site).len(), 1);
    for n in 3..6 {
        put(&dir, "2026-11-23/001/a.jpg", &image(n));
        daemon.idle(PATIENCE);
    }
    each_is_kept(&engine, &archive);
}

/// Nothing in the archive was replaced, and each kept its ending.
fn each_is_kept(engine: &Engine, archive: &Path) {
    let files = files_below(archive);
    let mut kept: Vec<Hash> = files.iter().map(|path| hash(&fs::read(path).unwrap())).collect();
    let mut published: Vec<Hash> = engine.accepted().iter().map(|frame| frame.sha256).collect();
    kept.sort_unstable();
    published.sort_unstable();
    assert_eq!(kept, published, "{files:?}");
    assert!(files.iter().all(|path| path.extension() == Some(OsStr::new("jpg"))));
}

#[test]
fn a17_an_archive_on_the_same_file_system_does_the_same_and_old_files_go() {
    let engine = Engine::start();
    let (site, archive) = archiving(&engine, "directory.archive_max_age = \"1ms\"");
    fs::create_dir_all(archive.join("old")).unwrap();
    fs::write(archive.join("old/old.jpg"), image(9)).unwrap();
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    eventually("what is too old goes", PATIENCE, || files_below(&archive).is_empty().then_some(()));
    for n in 0..3 {
        put(&dir, "2026-11-23/001/a.jpg", &image(n));
        daemon.idle(PATIENCE);
    }
    each_is_kept(&engine, &archive);
    assert_eq!(fs::read(archive.join("2026-11-23/001/a.jpg")).unwrap(), image(0));
}

/// Dead letters on a disk with too little of something: what does not fit stays, and follows when there is room.
fn dead_letters_without_room(test: &str, little: &str, enough: &str) {
    const BAD: u64 = 20;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(disk) = Mount::tmpfs(&site.dead_letters(), little) else {
        return skipped(test, "no tmpfs can be mounted");
    };
    let mut daemon = site.run();
    let bad: Vec<Vec<u8>> = (0..BAD).map(|n| format!("{n} is no image").repeat(8000).into_bytes()).collect();
    for (n, bytes) in bad.iter().enumerate() {
        put(&dir, &format!("bad{n}.jpg"), bytes);
    }
    put(&dir, "good.jpg", &image(1));
    engine.until_accepted(1);
    let samples = until(&daemon, "the disk is full", |it| it.count(ERRORS, "operation=\"dead-letter\"") > 0);
    let kept = until(&daemon, "the rest waits", |it| it.count(PENDING, "") + it.count(DEAD, "") == 20).count(DEAD, "");
    assert!(samples.count(DEAD, "") < 20 && kept < 20);
    let left = site.files_left().len() as u64;
    assert!(left + kept.unsigned_abs() >= BAD, "{left} left, {kept} dead letters");
    put(&dir, "good2.jpg", &image(2));
    engine.until_accepted(2);
    disk.remount(enough);
    daemon.idle(PATIENCE);
    let have: HashSet<Hash> = dead_letters(&site).iter().map(|(_, image)| hash(image)).collect();
    assert_eq!(have, bad.iter().map(|bytes| hash(bytes)).collect());
    assert_eq!(dead_letters(&site).len() as u64, BAD);
    assert_eq!(files_below(&site.dead_letters()).len() as u64, 2 * BAD, "no leftovers");
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
}

#[test]
fn a18_when_the_disk_of_the_dead_letters_is_full_the_source_keeps_its_files_until_there_is_room() {
    dead_letters_without_room("a18", "size=1m", "size=64m");
}

#[test]
fn a19_when_there_are_no_inodes_for_dead_letters_the_source_keeps_its_files_until_there_are() {
    dead_letters_without_room("a19", "nr_inodes=20", "nr_inodes=1000");
}

/// A detector `Cam` that archives to a file system in memory, which has room for two of [`six_faces`].
fn archive_without_room(test: &str) -> Option<(std::sync::Arc<Engine>, Site, Mount)> {
    let engine = Engine::start();
    let (site, archive) = archiving(&engine, "");
    let Some(disk) = Mount::tmpfs(&archive, "size=64k") else {
        skipped(test, "no tmpfs can be mounted");
        return None;
    };
    Some((engine, site, disk))
}

fn six_faces() -> Vec<Vec<u8>> {
    (0..6).map(|n| faces::face(n, 30 << 10)).collect()
}

/// Publishes these, all of them in hand before the first is settled, and waits until not all of them can be archived.
fn publish_into_full_archive(engine: &Engine, site: &Site, daemon: &Daemon<'_>, faces: &[Vec<u8>]) {
    let dir = site.drop_dir("Cam");
    engine.hold();
    for (n, face) in faces.iter().enumerate() {
        put(&dir, &format!("{n}.jpg"), face);
    }
    let taken = || (0..faces.len()).all(|n| !dir.join(format!("{n}.jpg")).exists());
    eventually("they are taken", PATIENCE, || taken().then_some(()));
    engine.release();
    engine.until_accepted(faces.len() as u64);
    until(daemon, "the archive is full, and it is said", |it| {
        it.count(ERRORS, "operation=\"remove\"") > 0 && it.count(UP, "") == 0
    });
}

/// Three more scans.
fn scans(daemon: &Daemon<'_>) -> Samples {
    let rescans = daemon.metrics().count("framegate_rescans_total", "");
    until(daemon, "three scans", |it| it.count("framegate_rescans_total", "") >= rescans + 3)
}

#[test]
fn a18_while_the_archive_is_full_nothing_more_is_taken_and_nothing_is_published_twice() {
    let Some((engine, site, disk)) = archive_without_room("a18") else { return };
    let faces = six_faces();
    let mut daemon = site.run();
    publish_into_full_archive(&engine, &site, &daemon, &faces);
    let later: Vec<Vec<u8>> = (0..20).map(|n| image(100 + n)).collect();
    for (n, face) in later.iter().enumerate() {
        put(&site.drop_dir("Cam"), &format!("later{n}.jpg"), face);
    }
    let samples = scans(&daemon);
    assert_eq!(samples.count(UP, ""), 0, "it stays held");
    assert_eq!((samples.count(PUBLISHED, ""), engine.counts().publish), (6, 6));
    assert!((0..20).all(|n| site.drop_dir("Cam").join(format!("later{n}.jpg")).exists()), "they wait in their place");
    disk.remount("size=16m");
    daemon.idle(PATIENCE);
    let all: Vec<Hash> = faces.iter().chain(&later).map(|face| hash(face)).collect();
    assert_eq!(nothing_lost(&[&engine], &all), 0);
    assert_eq!(files_below(&site.path().join("archive")).len(), 26);
    until(&daemon, "it delivers again", |it| it.count(UP, "") == 1);
}

#[test]
fn a18_a_reload_takes_over_what_could_not_be_archived_and_publishes_none_of_it_again() {
    let Some((engine, site, _disk)) = archive_without_room("a18") else { return };
    let faces = six_faces();
    let mut daemon = site.run();
    publish_into_full_archive(&engine, &site, &daemon, &faces);
    let reload = |from: &str, to: &str| {
        let config = fs::read_to_string(site.config()).unwrap();
        assert!(config.contains(from));
        fs::write(site.config(), config.replace(from, to)).unwrap();
        assert!(site.command(&["reload"]).output().unwrap().status.success());
    };
    let errors = daemon.metrics().count(ERRORS, "operation=\"remove\"");
    let stuck = i64::try_from(site.files_left().len()).unwrap();
    reload("UTC", "Europe/Paris");
    until(&daemon, "a last try, then one by the successor", |it| {
        it.count(ERRORS, "operation=\"remove\"") >= errors + 2 * stuck
    });
    put(&site.drop_dir("Cam"), "later.jpg", &image(100));
    let samples = scans(&daemon);
    assert_eq!((samples.count(UP, ""), engine.counts().publish), (0, 6));
    fs::create_dir(site.path().join("other")).unwrap();
    reload("/archive\"", "/other\"");
    daemon.idle(PATIENCE);
    let all: Vec<Hash> = faces.iter().map(|face| hash(face)).chain([hash(&image(100))]).collect();
    assert_eq!(nothing_lost(&[&engine], &all), 0);
    let kept = ["archive", "other"].map(|name| files_below(&site.path().join(name)).len());
    assert_eq!(kept.iter().sum::<usize>(), 7, "{kept:?}");
}

#[test]
fn a18_what_could_not_be_archived_is_published_at_most_once_more_after_a_restart() {
    let Some((engine, site, disk)) = archive_without_room("a18") else { return };
    let faces = six_faces();
    let daemon = site.run();
    publish_into_full_archive(&engine, &site, &daemon, &faces);
    let stuck = site.files_left().len() as u64;
    daemon.kill();
    // Ready before it is held again.
    engine.hold();
    let mut daemon = site.run();
    engine.release();
    until(&daemon, "it is held again", |it| it.count(ERRORS, "operation=\"remove\"") > 0 && it.count(UP, "") == 0);
    scans(&daemon);
    let published = engine.counts().publish;
    assert!(published <= 6 + stuck, "{published} published, {stuck} were stuck");
    scans(&daemon);
    assert_eq!(engine.counts().publish, published, "and none of them again while it runs");
    disk.remount("size=16m");
    daemon.idle(PATIENCE);
    assert!(engine.counts().publish <= 6 + stuck);
    assert_eq!(arrivals(&[&engine]).len(), 6);
}

#[test]
fn a18_what_could_not_be_archived_is_tried_once_more_at_a_stop() {
    let Some((engine, site, disk)) = archive_without_room("a18") else { return };
    let faces = six_faces();
    let daemon = site.run();
    publish_into_full_archive(&engine, &site, &daemon, &faces);
    disk.remount("size=16m");
    assert!(daemon.stop().success());
    assert_eq!(files_below(&site.path().join("archive")).len(), 6);
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    assert_eq!(engine.counts().publish, 6);
}

// ---- A20–A23: file systems that refuse

#[test]
fn a20_on_a_file_system_that_became_read_only_nothing_is_published_in_a_loop_and_it_recovers() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    engine.hold();
    for n in 0..3 {
        put(&dir, &format!("{n}.jpg"), &image(n));
    }
    eventually("they are taken", PATIENCE, || {
        let all_taken = (0..3).all(|n| !dir.join(format!("{n}.jpg")).exists());
        (all_taken && engine.counts().in_flight > 0).then_some(())
    });
    let trace = site.path().join("trace");
    let read_only = "inject=unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat:error=EROFS";
    let Some(strace) = Strace::attach(daemon.pid(), &trace, &["-e", read_only]) else {
        return skipped("a20", "strace cannot attach");
    };
    engine.release();
    engine.until_accepted(3);
    until(&daemon, "they cannot be removed", |it| it.count(ERRORS, "operation=\"remove\"") >= 3);
    for n in 3..6 {
        put(&dir, &format!("{n}.jpg"), &image(n));
    }
    let samples = until(&daemon, "two more rounds of it", |it| it.count(ERRORS, "operation=\"remove\"") >= 9);
    assert_eq!(samples.count(ERRORS, "operation=\"claim\""), 0, "no more are taken");
    assert!((3..6).all(|n| dir.join(format!("{n}.jpg")).exists()), "they wait in their place");
    assert_eq!(engine.counts().publish, 3);
    assert_eq!(samples.count(UP, ""), 0);
    let (status, reasons) = daemon.get("/readyz").unwrap();
    assert!(status == 503 && reasons.contains("Cam"), "{status} {reasons}");
    drop(strace);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &(0..6).map(|n| hash(&image(n))).collect::<Vec<_>>()), 0);
    assert_eq!(engine.counts().publish, 6);
    until(&daemon, "it delivers again", |it| it.count(UP, "") == 1);
}

const NOBODY: u32 = 65534;

/// `framegate run` as `nobody`, who owns the site by then.
fn as_nobody(site: &Site) -> Option<Command> {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    if !works("setpriv", &[nobody.as_slice(), &[env!("CARGO_BIN_EXE_framegate"), "--version"]].concat()) {
        return None;
    }
    site.write_config();
    if !works("chown", &["-R", "65534:65534", site.path().to_str().unwrap()]) {
        return None;
    }
    let run = site.command(&["run"]);
    let mut command = Command::new("setpriv");
    command.args(nobody).arg(run.get_program()).args(run.get_args());
    Some(command)
}

fn unprivileged(site: &Site) -> Option<Daemon<'_>> {
    Some(site.start_as(as_nobody(site)?).until_ready())
}

#[test]
fn a21_a_file_that_may_not_be_read_is_refused_and_published_once_it_may() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(mut daemon) = unprivileged(&site) else { return skipped("a21", "no other user to run as") };
    fs::write(dir.join(".x"), image(1)).unwrap();
    fs::set_permissions(dir.join(".x"), Permissions::from_mode(0o600)).unwrap();
    fs::rename(dir.join(".x"), dir.join("x.jpg")).unwrap();
    put(&dir, "good.jpg", &image(2));
    engine.until_accepted(1);
    let samples = until(&daemon, "it is refused", |it| it.count(REFUSED, &reason("unreadable")) == 1);
    let rescans = samples.count("framegate_rescans_total", "");
    let samples = until(&daemon, "three scans", |it| it.count("framegate_rescans_total", "") >= rescans + 3);
    assert_eq!(samples.count(REFUSED, ""), 1, "counted once");
    assert_eq!((samples.count(DROPPED, ""), samples.count(RETURNED, "")), (0, 1), "it is still there");
    samples.equation_holds().unwrap();
    fs::set_permissions(dir.join("x.jpg"), Permissions::from_mode(0o644)).unwrap();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
}

#[test]
fn a21_a_sub_directory_that_may_not_be_looked_into_is_refused_once_and_served_once_it_may() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(mut daemon) = unprivileged(&site) else { return skipped("a21", "no other user to run as") };
    // One that cannot be listed, and one whose files cannot be looked at.
    for (name, mode) in [("list", 0o700), ("look", 0o744)] {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join(".x"), image(1)).unwrap();
        fs::set_permissions(dir.join(name), Permissions::from_mode(mode)).unwrap();
        fs::rename(dir.join(name).join(".x"), dir.join(name).join("x.jpg")).unwrap();
    }
    put(&dir, "good.jpg", &image(2));
    engine.until_accepted(1);
    until(&daemon, "both are refused", |it| it.count(REFUSED, &reason("unreadable")) == 2);
    let samples = scans(&daemon);
    assert_eq!(samples.count(REFUSED, ""), 2, "counted once each");
    assert_eq!(
        site.log().matches("may not look into it").count(),
        2,
        "said once each, with the remedy: {}",
        site.log()
    );
    for name in ["list", "look"] {
        chown(dir.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    engine.until_accepted(3);
    daemon.idle(PATIENCE);
}

#[test]
fn a21_a_directory_that_files_may_not_be_taken_from_holds_its_detector_and_publishes_nothing() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let Some(mut daemon) = unprivileged(&site) else { return skipped("a21", "no other user to run as") };
    engine.hold();
    put(&dir, "in flight.jpg", &image(1));
    eventually("it is in flight", PATIENCE, || (engine.counts().in_flight == 1).then_some(()));
    chown(&dir, Some(0), Some(0)).unwrap();
    put(&dir, "x.jpg", &image(2));
    engine.release();
    engine.until_accepted(1);
    let samples = until(&daemon, "it cannot be taken", |it| it.count(ERRORS, "operation=\"claim\"") >= 3);
    assert_eq!(samples.count(UP, ""), 0);
    assert_eq!(engine.counts().publish, 1);
    assert!(site.log().contains("owner"), "what to do is said");
    let samples = scans(&daemon);
    assert_eq!(samples.count(UP, ""), 0, "a scan that goes well does not mend it");
    assert_eq!(site.log().matches("detector held").count(), 1, "it is not said again and again: {}", site.log());
    chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
    // The same at the start: it waits, says so, and begins by itself.
    assert!(daemon.stop().success());
    let again = as_nobody(&site).expect("as before");
    chown(&dir, Some(0), Some(0)).unwrap();
    put(&dir, "y.jpg", &image(3));
    let before = site.log().matches("detector held").count();
    let daemon = site.start_as(again);
    eventually("it says so", PATIENCE, || (site.log().matches("detector held").count() > before).then_some(()));
    chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    engine.until_accepted(3);
    daemon.until_ready().idle(PATIENCE);
}

#[test]
fn a22_a_file_that_cannot_be_read_is_named_and_tried_again_and_delays_nothing_else() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let path = dir.join("x.jpg");
    let (trace, watched) = (site.path().join("trace"), path.to_str().unwrap().to_owned());
    let Some(strace) = Strace::attach(
        daemon.pid(),
        &trace,
        &["-y", "-P", &watched, "-e", "trace=read,pread64", "-e", "inject=read,pread64:error=EIO"],
    ) else {
        return skipped("a22", "strace cannot attach");
    };
    put(&dir, "x.jpg", &image(1));
    until(&daemon, "reading failed", |it| it.count(ERRORS, "operation=\"read\"") >= 1);
    assert!(strace.trace().contains("INJECTED"), "{}", strace.trace());
    put(&dir, "y.jpg", &image(2));
    engine.until_accepted(1);
    let samples = until(&daemon, "it is tried again", |it| it.count(ERRORS, "operation=\"read\"") >= 3);
    assert_eq!(samples.count(UP, ""), 1, "one bad file does not hold its detector");
    assert!(!site.log().contains("detector held"), "{}", site.log());
    let said = site.log();
    let said = said.lines().find(|line| line.contains("cannot be read")).expect("it is said");
    assert!(said.contains("Cam") && said.contains("x.jpg"), "{said}");
    drop(strace);
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
}

#[test]
fn a20_a_passing_trouble_with_taking_holds_the_detector_as_long_as_it_lasts_and_not_until_the_next_scan() {
    let engine = Engine::start();
    let site = site(&engine, BY_EVENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    put(&dir, "first.jpg", &image(1));
    engine.until_accepted(1);
    daemon.idle(PATIENCE);
    let trace = site.path().join("trace");
    let Some(strace) = Strace::attach(daemon.pid(), &trace, &["-e", "inject=renameat2:error=EROFS"]) else {
        return skipped("a20", "strace cannot attach");
    };
    put(&dir, "x.jpg", &image(2));
    let samples = until(&daemon, "it cannot be taken", |it| it.count(ERRORS, "operation=\"claim\"") >= 4);
    assert_eq!(samples.count(UP, ""), 0);
    drop(strace);
    engine.until_accepted(2);
    until(&daemon, "it delivers again", |it| it.count(UP, "") == 1);
    assert_eq!(site.log().matches("detector held").count(), 1, "{}", site.log());
    daemon.idle(PATIENCE);
}

#[test]
fn a22_an_error_after_a_file_was_claimed_does_not_strand_it() {
    let engine = Engine::start();
    let site = site(&engine, PATIENT);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let trace = site.path().join("trace");
    // The directory of the claims can be made but, once a file is in it, not opened or looked into.
    let hidden = files_below(&dir).into_iter().find(|path| path.extension() == Some(OsStr::new("lock"))).unwrap();
    let own = hidden.with_extension("");
    let own = own.to_str().unwrap();
    let Some(strace) = Strace::attach(
        daemon.pid(),
        &trace,
        &["-P", own, "-e", "trace=newfstatat", "-e", "inject=newfstatat:error=EIO"],
    ) else {
        return skipped("a22", "strace cannot attach");
    };
    put(&dir, "x.jpg", &image(1));
    until(&daemon, "looking at the claim failed", |it| it.count(ERRORS, "operation=\"claim\"") >= 1);
    assert!(strace.trace().contains("INJECTED"), "{}", strace.trace());
    drop(strace);
    engine.until_accepted(1);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(1))]), 0);
}

#[test]
fn a23_when_fsync_fails_a_dead_letter_is_written_anew() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let mut daemon = site.run();
    let trace = site.path().join("trace");
    let Some(strace) = Strace::attach(
        daemon.pid(),
        &trace,
        &["-e", "inject=fsync,fdatasync:error=EIO:when=1", "-e", "trace=fsync,fdatasync"],
    ) else {
        return skipped("a23", "strace cannot attach");
    };
    put(&site.drop_dir("Cam"), "bad.jpg", b"no image");
    until(&daemon, "it could not be kept", |it| it.count(ERRORS, "operation=\"dead-letter\"") >= 1);
    assert!(strace.trace().contains("INJECTED"), "{}", strace.trace());
    assert!(!site.files_left().is_empty(), "the source keeps it");
    drop(strace);
    daemon.idle(PATIENCE);
    let letters = dead_letters(&site);
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].1, b"no image");
    assert_eq!(files_below(&site.dead_letters()).len(), 2, "no leftovers");
}

// ---- A24–A27: many, absurd, bad and fleeting files

#[test]
fn a24_a_hundred_thousand_files_at_the_start_delay_nothing_take_little_memory_and_go_newest_first() {
    const FILES: u64 = 100_000;
    /// In hand already when the scan has seen everything.
    const AHEAD: usize = 64;
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(4));
    let site = site(&engine, "").section("[publish]\nmax_in_flight = 1");
    let dir = site.drop_dir("Cam");
    let _quick_disk = Mount::tmpfs(&dir, "size=2g,nr_inodes=300000");
    let face = faces::face(1, 1 << 10);
    let start = SystemTime::now() - 2 * DAY;
    for n in 0..FILES {
        // Not in order, so that the order of the directory is not that of the times.
        let n = n * 7919 % FILES;
        let mut file = File::create(dir.join(format!("{n}.jpg"))).unwrap();
        file.write_all(&faces::face_variant(&face, n)).unwrap();
        file.set_times(FileTimes::new().set_modified(start + Duration::from_secs(n))).unwrap();
    }
    let daemon = site.run();
    let ready = Instant::now();
    engine.until_accepted(1);
    assert!(ready.elapsed() < Duration::from_secs(2), "{:?}", ready.elapsed());
    until(&daemon, "all are seen", |it| it.count(RECEIVED, "") >= 100_000);
    let samples = daemon.metrics();
    assert_eq!(samples.count(RECEIVED, ""), 100_000, "each is counted once");
    let seen = engine.accepted().len();
    engine.until_accepted((seen + AHEAD + 300) as u64);
    let accepted = engine.accepted();
    let times: Vec<_> = accepted[seen + AHEAD..seen + AHEAD + 200].iter().map(|it| it.time).collect();
    in_order(&times.iter().map(|time| -time.as_second()).collect::<Vec<_>>());
    let newest = Timestamp::try_from(start + Duration::from_secs(FILES - 1000)).unwrap();
    assert!(times[0] > newest, "{}", times[0]);
    let used = memory(daemon.pid()) >> 20;
    assert!(used < 150, "{used} MiB");
    daemon.metrics().equation_holds().unwrap();
    daemon.kill();
}

#[test]
fn a25_an_absurd_modification_time_is_replaced_by_the_time_of_arrival() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    for (n, time) in [SystemTime::UNIX_EPOCH, SystemTime::now() + 365 * DAY, SystemTime::now() - DAY].iter().enumerate()
    {
        let path = dir.join(format!("{n}.jpg"));
        fs::write(&path, image(n as u64)).unwrap();
        set_modified(&path, *time);
    }
    let start = Timestamp::now();
    let mut daemon = site.run();
    // While it runs, too.
    fs::write(dir.join(".x"), image(3)).unwrap();
    set_modified(&dir.join(".x"), SystemTime::now() + 3650 * DAY);
    fs::rename(dir.join(".x"), dir.join("x.jpg")).unwrap();
    engine.until_accepted(4);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count("framegate_detect_times_corrected_total", ""), 3);
    for frame in engine.accepted() {
        if frame.sha256 == hash(&image(2)) {
            assert!(frame.time < start - Duration::from_hours(23));
        } else {
            assert!(frame.time >= start - Duration::from_secs(1) && frame.time <= Timestamp::now(), "{}", frame.time);
        }
    }
}

/// A PNG of one chunk after another; checksums as they should be.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 0, 0, 0, 0]].concat();
    for (kind, data) in [(b"IHDR", &header[..]), (b"IDAT", b"\x78\x9c\x63\x00\x00\x00\x02\x00\x01"), (b"IEND", b"")] {
        png.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        let body = [&kind[..], data].concat();
        png.extend(&body);
        png.extend(crc32(&body).to_be_bytes());
    }
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn a26_what_is_no_image_is_a_dead_letter_and_an_image_under_a_wrong_ending_is_published() {
    let engine = Engine::start();
    let site = site(&engine, QUICK).section("[encode]\nmax_frame = \"64KiB\"");
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let before = memory(daemon.pid());
    let tiny = png(1, 1);
    fs::write(dir.join("empty.jpg"), b"").unwrap();
    fs::write(dir.join("one byte.jpg"), b"\xff").unwrap();
    fs::write(dir.join("text.jpg"), b"no image").unwrap();
    fs::write(dir.join("png.jpg"), &tiny).unwrap();
    fs::write(dir.join("jpeg.PNG"), image(1)).unwrap();
    fs::write(dir.join("notes.txt"), image(2)).unwrap();
    let huge = File::create(dir.join("huge.jpg")).unwrap();
    huge.set_len(200 << 20).unwrap();
    drop(huge);
    engine.until_accepted(2);
    let samples = until(&daemon, "the rest is judged", |it| it.count(DEAD, "") == 3 && it.count(REFUSED, "") == 1);
    assert_eq!(samples.count(DEAD, &reason("truncated")), 2, "an empty file and one of a byte");
    assert_eq!(samples.count(DEAD, &reason("unsupported")), 1);
    assert_eq!(samples.count(REFUSED, &reason("too-large")), 1);
    assert!(memory(daemon.pid()) < before + (32 << 20));
    fs::remove_file(dir.join("huge.jpg")).expect("left alone");
    fs::remove_file(dir.join("notes.txt")).expect("not looked at");
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&tiny), hash(&image(1))]), 0);
}

#[test]
fn a27_files_that_vanish_before_they_are_taken_are_counted_and_nothing_more() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    let mut kept = Vec::new();
    for n in 0..1000 {
        let name = format!("{n}.jpg");
        put(&dir, &name, &image(n));
        if n % 10 == 0 {
            kept.push(hash(&image(n)));
        } else if fs::remove_file(dir.join(&name)).is_err() {
            // The daemon was quicker.
            kept.push(hash(&image(n)));
        }
    }
    // While it stands still it cannot be quicker.
    daemon.signal(Signal::STOP);
    for n in 1000..1050 {
        put(&dir, &format!("{n}.jpg"), &image(n));
        fs::remove_file(dir.join(format!("{n}.jpg"))).unwrap();
    }
    daemon.signal(Signal::CONT);
    engine.until_accepted(kept.len() as u64);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &kept), 0);
    assert_eq!(samples.count(DROPPED, ""), samples.count(DROPPED, &reason("vanished")));
    assert_eq!(samples.count(DEAD, ""), 0);
    assert_eq!(samples.count(ERRORS, ""), 0);
}

// ---- E1

#[test]
fn e1_bombs_become_dead_letters_and_memory_stays_flat() {
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let dir = site.drop_dir("Cam");
    let mut daemon = site.run();
    put(&dir, "first.jpg", &image(1));
    engine.until_accepted(1);
    let before = memory(daemon.pid());
    let mut compressed = png(10, 10);
    // A text chunk that says it is a gibibyte, where the end should be.
    compressed.truncate(compressed.len() - 12);
    compressed.extend((1u32 << 30).to_be_bytes());
    compressed.extend(b"zTXtbomb");
    let bombs: [(&str, Vec<u8>); 6] = [
        ("huge.png", png(100_000, 100_000)),
        ("largest.png", png(u32::MAX, u32::MAX)),
        ("nothing.png", png(0, 0)),
        ("chunk.png", compressed),
        ("tiff.jpg", b"II*\0\x08\0\0\0\xff\xff\xff\xff\xff\xff".to_vec()),
        ("webp.jpg", [b"RIFF\xff\xff\xff\xffWEBPVP8 ".to_vec(), vec![0; 64]].concat()),
    ];
    for (name, bomb) in &bombs {
        put(&dir, name, bomb);
    }
    until(&daemon, "all are dead letters", |it| it.count(DEAD, "") == 6);
    daemon.idle(PATIENCE);
    let used = memory(daemon.pid());
    assert!(used < before + (32 << 20), "{before} before, {used} after");
    assert_eq!(engine.counts().publish, 1);
    let kept: HashSet<Hash> = dead_letters(&site).iter().map(|(_, image)| hash(image)).collect();
    assert_eq!(kept, bombs.iter().map(|(_, bomb)| hash(bomb)).collect(), "as they came");
}

// ---- settings

#[test]
fn the_trees_of_ftp_cameras_name_their_detectors_and_new_directories_are_watched_at_once() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("{path.0}", "America/New_York", BY_EVENT);
    let dir = site.drop_dir("{path.0}");
    put(&dir, "LobbyCam/2026-11-23/001/jpg/x.jpg", &image(1));
    let mut daemon = site.run();
    engine.until_accepted(1);
    let mut written = vec![hash(&image(1))];
    for n in 2..40 {
        let face = image(n);
        // Half of them written in place the moment their directory exists.
        let path = dir.join(format!("Cam{}/2026-11-{n:02}/001/jpg", n % 4));
        fs::create_dir_all(&path).unwrap();
        if n % 2 == 0 {
            fs::write(path.join("x.jpg"), &face).unwrap();
        } else {
            put(&path, "x.jpg", &face);
        }
        written.push(hash(&face));
    }
    // A whole tree moved in.
    let outside = site.path().join("outside/2026-11-23/001");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("y.jpg"), image(50)).unwrap();
    fs::rename(site.path().join("outside"), dir.join("Moved")).unwrap();
    written.push(hash(&image(50)));
    // The first level is the detector: a file beside it has none.
    put(&dir, "nowhere.jpg", &image(60));
    engine.until_accepted(written.len() as u64);
    until(&daemon, "the one without a name is refused", |it| it.count(REFUSED, &reason("no-name")) == 1);
    fs::remove_file(dir.join("nowhere.jpg")).expect("left alone");
    daemon.idle(PATIENCE);
    // The family's own name is no detector's: nobody looks for one that is held or gone.
    let status: serde_json::Value = serde_json::from_str(&daemon.get("/status").unwrap().1).unwrap();
    let shown = |name: &str| status["detectors"].as_array().unwrap().iter().any(|it| it["name"] == name);
    assert!(shown("LobbyCam") && !shown("{path.0}"), "{status}");
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    let names: HashSet<String> = engine.accepted().into_iter().map(|frame| frame.detector).collect();
    assert_eq!(names, ["LobbyCam", "Cam0", "Cam1", "Cam2", "Cam3", "Moved"].map(str::to_owned).into());
    assert!(engine.accepted().iter().all(|frame| frame.zone == "America/New_York"));
}

#[test]
fn directories_that_have_been_empty_for_long_are_removed_where_that_is_asked_for() {
    let engine = Engine::start();
    let site = site(&engine, &format!("{QUICK}\ndirectory.remove_empty_directories = true"));
    let dir = site.drop_dir("Cam");
    for name in ["outer/inner", "full", "new", ".hidden"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    fs::write(dir.join("full/notes.txt"), b"notes").unwrap();
    let long_ago = SystemTime::now() - Duration::from_mins(2);
    for name in ["outer/inner", "outer", "full", ".hidden"] {
        set_modified(&dir.join(name), long_ago);
    }
    let mut daemon = site.run();
    eventually("the inner one goes", PATIENCE, || (!dir.join("outer/inner").exists()).then_some(()));
    // That was a change of the outer one.
    assert!(dir.join("outer").exists());
    set_modified(&dir.join("outer"), long_ago);
    eventually("and the outer one", PATIENCE, || (!dir.join("outer").exists()).then_some(()));
    assert!(dir.join("new").exists() && dir.join("full/notes.txt").exists() && dir.join(".hidden").exists());
    put(&dir.join("new"), "x.jpg", &image(1));
    engine.until_accepted(1);
    fs::remove_file(dir.join("full/notes.txt")).unwrap();
    daemon.idle(PATIENCE);
    assert!(dir.exists());
}

#[test]
fn only_what_is_asked_for_is_looked_at_and_never_what_looks_unfinished() {
    let engine = Engine::start();
    let site =
        site(&engine, &format!("{QUICK}\ndirectory.include = [\"snap_*.jpg\", \"*.webp\", \"*.tmp\", \"*.part\"]"));
    let dir = site.drop_dir("Cam");
    let ignored = [
        "other.jpg",
        "snap_1.jpeg",
        ".snap_1.jpg",
        "snap_1.jpg.tmp",
        "snap_1.jpg.part",
        "snap_1.jpg.filepart",
        "snap_1.jpg~",
    ];
    for name in ignored {
        fs::write(dir.join(name), image(666)).unwrap();
    }
    let mut daemon = site.run();
    for name in ignored {
        put(&dir.join("later"), name, &image(666));
    }
    put(&dir, "SNAP_1.JPG", &image(1));
    put(&dir, "snap_2.jpg", &image(2));
    engine.until_accepted(2);
    let rescans = daemon.metrics().count("framegate_rescans_total", "");
    until(&daemon, "two more scans", |it| it.count("framegate_rescans_total", "") >= rescans + 2);
    for name in ignored {
        fs::remove_file(dir.join(name)).expect(name);
        fs::remove_file(dir.join("later").join(name)).expect(name);
    }
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
    assert_eq!((samples.count(RECEIVED, ""), samples.count(REFUSED, "")), (2, 0));
}

#[test]
fn frames_that_are_too_old_to_matter_are_dropped_and_counted() {
    let engine = Engine::start();
    let site = site(&engine, &format!("{QUICK}\nmax_age = \"1h\""));
    let dir = site.drop_dir("Cam");
    for n in 0..10 {
        old_file(&dir.join(format!("{n}.jpg")), &image(n), Duration::from_mins(61 + n));
    }
    old_file(&dir.join("young.jpg"), &image(10), Duration::from_mins(50));
    let mut daemon = site.run();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count(DROPPED, &reason("max-age")), 10);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(10))]), 0);
}

#[test]
fn a_detector_that_a_reload_replaces_counts_no_waiting_file_twice() {
    const FILES: i64 = 200;
    let engine = Engine::start();
    let site = site(&engine, QUICK);
    let mut daemon = site.run();
    engine.hold();
    for n in 0..FILES.unsigned_abs() {
        put(&site.drop_dir("Cam"), &format!("{n}.jpg"), &image(n));
    }
    until(&daemon, "all wait", |it| it.count(PENDING, "") == FILES);
    let config = fs::read_to_string(site.config()).unwrap();
    fs::write(site.config(), config.replace("UTC", "Europe/Paris")).unwrap();
    assert!(site.command(&["reload"]).output().unwrap().status.success());
    // The one that goes keeps what is in its hands, the one that comes finds the rest.
    let samples = until(&daemon, "all are received again", |it| {
        it.count(RECEIVED, "") > FILES && it.count(RECEIVED, "") - it.count(RETURNED, "") == FILES
    });
    assert_eq!(samples.count(PENDING, ""), FILES);
    engine.release();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &(0..FILES.unsigned_abs()).map(|n| hash(&image(n))).collect::<Vec<_>>()), 0);
}

/// One attempt at a time, so that the order of the engine is that of the queue.
fn one_by_one(keys: &str) -> (std::sync::Arc<Engine>, Site) {
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(5));
    let site = site(&engine, keys).section("[publish]\nmax_in_flight = 1");
    (engine, site)
}

/// Ascending, but for neighbours that overtook each other between two encode workers.
#[track_caller]
fn in_order<T: Ord + Copy + std::fmt::Debug>(given: &[T]) {
    const OVERTAKEN: usize = 8;
    let mut sorted = given.to_vec();
    sorted.sort_unstable();
    for (at, one) in given.iter().enumerate() {
        let near = &sorted[at.saturating_sub(OVERTAKEN)..(at + OVERTAKEN).min(sorted.len())];
        assert!(near.contains(one), "{one:?} at {at} is out of order: {given:?}");
    }
}

/// In hand before the rest was seen.
const IN_HAND: usize = 40;

#[test]
fn oldest_first_publishes_by_time() {
    let (engine, site) = one_by_one("order = \"oldest-first\"");
    let dir = site.drop_dir("Cam");
    for n in 0..300u64 {
        let n = n * 101 % 300;
        old_file(&dir.join(format!("{n}.jpg")), &image(n), Duration::from_secs(86_400 - n));
    }
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    let times: Vec<Timestamp> = engine.accepted().iter().map(|frame| frame.time).collect();
    assert_eq!(times.len(), 300);
    in_order(&times[IN_HAND..]);
}

#[test]
fn the_freshest_go_first_and_the_backlog_keeps_its_share() {
    const BACKLOG: u64 = 400;
    const FRESH: usize = 60;
    let (engine, site) = one_by_one("");
    let dir = site.drop_dir("Cam");
    for n in 0..BACKLOG {
        old_file(&dir.join(format!("{n}.jpg")), &image(n), Duration::from_secs(86_400 - n));
    }
    let mut daemon = site.run();
    until(&daemon, "the backlog is seen", |it| it.count(RECEIVED, "") == 400);
    let before = engine.accepted().len();
    for n in 0..FRESH as u64 {
        put(&dir, &format!("fresh{n}.jpg"), &image(1000 + n));
    }
    daemon.idle(PATIENCE);
    let fresh: HashSet<Hash> = (0..FRESH as u64).map(|n| hash(&image(1000 + n))).collect();
    let accepted = engine.accepted();
    let places: Vec<usize> = (0..accepted.len()).filter(|at| fresh.contains(&accepted[*at].sha256)).collect();
    assert_eq!(places.len(), FRESH);
    assert!(places[0] >= before);
    let span = places[FRESH - 1] - places[0] + 1;
    // Three of four turns are theirs; what was in hand when they came is passed by nobody.
    assert!(span <= FRESH * 4 / 3 + IN_HAND, "{span} turns for {FRESH} fresh frames");
    assert!(span >= FRESH * 5 / 4, "the backlog has its share: {span} turns for {FRESH} fresh frames");
    // The backlog is drained newest to oldest.
    let rest = accepted[before + IN_HAND..].iter().filter(|it| !fresh.contains(&it.sha256));
    in_order(&rest.map(|it| -it.time.as_second()).collect::<Vec<_>>());
}

/// `image` with a time of detection in it, as cameras write it.
fn with_exif(image: &[u8], time: &str) -> Vec<u8> {
    // TIFF, little endian: one directory that points to the Exif directory, which holds one text of 20 bytes.
    let mut tiff = b"II*\0\x08\0\0\0".to_vec();
    tiff.extend(b"\x01\0\x69\x87\x04\0\x01\0\0\0\x1a\0\0\0\0\0\0\0");
    tiff.extend(b"\x01\0\x03\x90\x02\0\x14\0\0\0\x2c\0\0\0\0\0\0\0");
    tiff.extend(time.as_bytes());
    tiff.push(0);
    let segment = [b"Exif\0\0", &tiff[..]].concat();
    let length = u16::try_from(segment.len() + 2).unwrap();
    [&image[..2], &[0xff, 0xe1], &length.to_be_bytes(), &segment, &image[2..]].concat()
}

#[test]
fn the_detection_time_is_what_the_name_the_image_or_the_arrival_says() {
    let engine = Engine::start();
    let by_name =
        format!("{QUICK}\ndirectory.detect_time = {{ name = '(?<time>\\d{{17}})', format = \"%Y%m%d%H%M%S%3f\" }}");
    let site = Site::new(&engine.base_url())
        .detector("Name", "America/Los_Angeles", &by_name)
        .detector("Exif", "America/Los_Angeles", &format!("{QUICK}\ndirectory.detect_time = \"exif\""))
        .detector("Arrival", "UTC", &format!("{QUICK}\ndirectory.detect_time = \"arrival\""))
        .detector("Modified", "UTC", QUICK);
    let start = Timestamp::now();
    let images = [image(1), with_exif(&image(2), "2025:07:01 03:00:00"), image(3), image(4)];
    let names = ["cam_20251123030000123.jpg", "exif.jpg", "arrival.jpg", "modified.jpg"];
    for ((detector, name), image) in ["Name", "Exif", "Arrival", "Modified"].iter().zip(names).zip(&images) {
        let path: PathBuf = site.drop_dir(detector).join(name);
        fs::write(&path, image).unwrap();
        set_modified(&path, SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    }
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &images.map(|image| hash(&image))), 0);
    for frame in engine.accepted() {
        match &*frame.detector {
            "Name" => assert_eq!(frame.time.to_string(), "2025-11-23T11:00:00.123Z"),
            "Exif" => assert_eq!(frame.time.to_string(), "2025-07-01T10:00:00Z"),
            "Arrival" => assert!(frame.time >= start && frame.time <= Timestamp::now()),
            "Modified" => assert_eq!(frame.time.as_second(), 1_700_000_000),
            other => panic!("{other}"),
        }
    }
}
