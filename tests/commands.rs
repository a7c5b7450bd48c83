//! The commands, as somebody on site types them: what they print, how they end, what they leave behind.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use framegate::simulator::Certificate;
use support::engine::{Engine, hash, image, nothing_lost, put_face};
use support::{Daemon, PATIENCE, Site, eventually, files_below};

/// What should take moments, but is not worth a test's whole patience.
const SOON: Duration = Duration::from_secs(15);

const COMMANDS: [&str; 15] = [
    "run",
    "check",
    "reload",
    "status",
    "top",
    "doctor",
    "publish",
    "dead-letter",
    "spool",
    "demo",
    "simulate-engine",
    "pin",
    "schema",
    "completions",
    "man",
];

#[test]
fn check_says_what_it_understood_and_78_with_every_problem_otherwise() {
    let site = Site::new("http://127.0.0.1:9").detector("Lobby", "Europe/Berlin", "");
    site.write_config();
    let text = said(&site, &["check"]);
    for part in ["engine http://127.0.0.1:9", "detector Lobby", "Europe/Berlin", "is valid: 1 detector, "] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let site = Site::new("http://127.0.0.1:9").section("[publish]\nattempts = 0").detector("Lobby", "Mars/Olympus", "");
    site.write_config();
    let refused = output(&site, &["check"]);
    assert_eq!(refused.status.code(), Some(78));
    let text = text_of(&refused.stderr);
    assert!(text.contains("publish.attempts") && text.contains("Mars/Olympus"), "{text}");
    assert!(refused.stdout.is_empty());
}

#[test]
fn status_shows_the_running_daemon_to_people_and_programs_and_fails_without_one() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Café \"1\"", "UTC", "");
    let mut daemon = site.run();
    put_face(&site.drop_dir("Café \"1\""), 1);
    daemon.idle(PATIENCE);
    let text = said(&site, &["status"]);
    for part in ["engine: open", "dead letters: 0", "Café", &format!("pid {}", daemon.pid())] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let status: Value = serde_json::from_str(&said(&site, &["status", "--json"])).unwrap();
    assert_eq!(status["detectors"][0]["name"], "Café \"1\"");
    assert_eq!(status["detectors"][0]["counts"]["published"], 1, "{status}");
    assert_eq!(status["engine"]["state"], "open");
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(daemon.stop().code(), Some(0));
    let refused = output(&site, &["status"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text_of(&refused.stderr).contains("no daemon can be asked"), "{}", text_of(&refused.stderr));
}

#[test]
fn publish_sends_files_and_directories_keeps_them_and_tells_what_failed_and_why() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    site.write_config();
    let photos = site.path().join("photos");
    fs::create_dir_all(photos.join("deep")).unwrap();
    let good: Vec<_> = (0..20).map(|n| (photos.join(format!("deep/{n}.JPG")), image(n))).collect();
    for (path, bytes) in &good {
        fs::write(path, bytes).unwrap();
    }
    let directory = photos.to_str().unwrap();
    let text = said(&site, &["publish", directory]);
    assert!(text.starts_with("20 of 20 published"), "{text}");
    let hashes: Vec<_> = good.iter().map(|(_, bytes)| hash(bytes)).collect();
    assert_eq!(nothing_lost(&[&engine], &hashes), 0);
    assert!(engine.accepted().iter().all(|it| it.detector == "Lobby" && it.zone == "UTC"));
    assert!(good.iter().all(|(path, bytes)| fs::read(path).is_ok_and(|it| it == *bytes)), "the files stay");

    fs::write(photos.join("half.jpg"), &good[0].1[..2000]).unwrap();
    fs::write(photos.join("words.png"), "no image").unwrap();
    let failed = output(&site, &["publish", "--detector", "By hand", "--time-zone", "Asia/Tokyo", directory]);
    assert_eq!(failed.status.code(), Some(1), "{}", all_of(&failed));
    let text = text_of(&failed.stdout);
    for part in
        ["20 of 22 published", "half.jpg: truncated", "words.png: unsupported", "1 × truncated", "1 × unsupported"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let last = engine.accepted().pop().unwrap();
    assert_eq!((&*last.detector, &*last.zone), ("By hand", "Asia/Tokyo"));
    assert_eq!(files_below(&photos).len(), 22);

    let failed = output(&site, &["publish", "/nowhere/at/all.jpg"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(text_of(&failed.stderr).contains("/nowhere/at/all.jpg"));
    engine.contract_held();
}

#[test]
fn publish_finds_the_detection_time_as_the_detectors_entry_says() {
    let engine = Engine::start();
    let by_name = r"directory.detect_time = { name = '(?<time>\d{14})', format = '%Y%m%d%H%M%S' }";
    let site = Site::new(&engine.base_url()).detector("Lobby", "America/Los_Angeles", by_name);
    site.write_config();
    let photo = |name: &str| {
        let path = site.path().join(name);
        fs::write(&path, image(1)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    said(&site, &["publish", &photo("cam_20251123030000.jpg")]);
    assert_eq!(engine.accepted().pop().unwrap().time.to_string(), "2025-11-23T11:00:00Z");

    let unset = photo("no time.jpg");
    fs::File::options().write(true).open(&unset).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    said(&site, &["publish", &unset]);
    let time = engine.accepted().pop().unwrap().time.to_string();
    assert!(!time.starts_with("1970"), "an absurd one is replaced: {time}");
}

#[test]
fn an_interrupted_publish_reads_nothing_more_and_says_what_was_left() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url())
        .engine_keys("timeout = \"2s\"\nconnect_timeout = \"1s\"")
        .section("[publish]\nmax_in_flight = 1")
        .detector("Lobby", "UTC", "");
    site.write_config();
    let photos = site.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for n in 0..50 {
        fs::write(photos.join(format!("a{n:02}.jpg")), image(n)).unwrap();
        fs::write(photos.join(format!("b{n:02}.jpg")), "no image").unwrap();
    }
    engine.hold();
    let mut command = site.command(&["publish", photos.to_str().unwrap()]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("a frame is under way", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    engine.release();
    assert_eq!(output.status.code(), Some(1), "{}", all_of(&output));
    let text = text_of(&output.stdout);
    assert!(text.contains(" of 100 published") && text.contains("not tried"), "{text}");
    assert!(!text.contains("unsupported"), "{text}");
}

#[test]
fn publish_tells_what_the_engine_refuses() {
    let engine = Engine::start();
    // One after the other: a refusal counts once another frame has been accepted since.
    let site = Site::new(&engine.base_url()).section("[publish]\nmax_in_flight = 1").detector("Lobby", "UTC", "");
    site.write_config();
    let photos = site.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for n in 0..10 {
        fs::write(photos.join(format!("{n}.jpg")), image(n)).unwrap();
    }
    refuse(&engine, &image(3));
    let failed = output(&site, &["publish", photos.to_str().unwrap()]);
    assert_eq!(failed.status.code(), Some(1));
    let text = text_of(&failed.stdout);
    assert!(text.contains("9 of 10 published") && text.contains("3.jpg: rejected"), "{}", all_of(&failed));
}

#[test]
fn publish_gives_up_soon_where_only_somebody_can_help_and_says_what_the_engine_said() {
    /// What is wrong, how many files, what the summary says, and how many requests that took at most.
    type Trouble = (fn(&Engine), u64, [&'static str; 2], u64);
    let troubles: [Trouble; 6] = [
        (|engine| refuse(engine, &image(0)), 1, ["rejected: status 400", "injected"], 5),
        (|engine| engine.change(|faults| faults.answer_all = Some(403)), 1, ["forbidden: status 403", "injected"], 5),
        (|engine| engine.change(|faults| faults.answer_all = Some(403)), 9, ["forbidden", "Face Publishing"], 15),
        (|engine| engine.change(|faults| faults.answer_all = Some(400)), 30, ["rejecting: status 400", "injected"], 40),
        (|engine| engine.change(|faults| faults.login_status = Some(401)), 3, ["credentials", "password"], 0),
        (Engine::down, 3, ["unreachable", "cannot connect"], 0),
    ];
    for (trouble, files, says, requests_max) in troubles {
        let engine = Engine::start();
        let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
        site.write_config();
        let photos = site.path().join("photos");
        fs::create_dir(&photos).unwrap();
        for n in 0..files {
            fs::write(photos.join(format!("{n}.jpg")), image(n)).unwrap();
        }
        trouble(&engine);
        let failed = output(&site, &["publish", photos.to_str().unwrap()]);
        assert_eq!(failed.status.code(), Some(1), "{says:?}: {}", all_of(&failed));
        let text = text_of(&failed.stdout);
        assert!(text.starts_with(&format!("0 of {files} published")), "{says:?}: {}", all_of(&failed));
        assert!(says.iter().all(|part| text.contains(part)), "{says:?}: {}", all_of(&failed));
        assert!(text_of(&failed.stderr).contains("giving up"), "{says:?}: {}", all_of(&failed));
        let requests = engine.counts().publish;
        assert!(requests <= requests_max, "{says:?}: {requests} requests");
    }
}

#[test]
fn dead_letters_are_listed_shown_retried_and_purged_with_a_running_daemon() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    assert_eq!(said(&site, &["dead-letter", "list"]), "No dead letters.\n");
    let id = one_dead_letter(&engine, &site);

    let text = said(&site, &["dead-letter", "list", "--reason", "rejected", "--detector", "Lobby"]);
    assert!(text.contains(&id) && text.contains("rejected") && text.contains("400"), "{text}");
    assert!(said(&site, &["dead-letter", "list", "--reason", "truncated"]).contains("No dead letters that fit"));
    let shown: Value = serde_json::from_str(&said(&site, &["dead-letter", "show", &id])).unwrap();
    let keys =
        "id detector time_zone detect_time_utc reason status message source original_name attempts received_at died_at";
    for key in keys.split(' ') {
        assert!(shown.get(key).is_some(), "{key}: {shown}");
    }
    let copy = site.path().join("copy.jpg");
    said(&site, &["dead-letter", "show", &id, "--image", copy.to_str().unwrap()]);
    assert_eq!(fs::read(&copy).unwrap(), image(0));
    let refused = output(&site, &["dead-letter", "purge", "--all"]);
    assert_eq!(refused.status.code(), Some(1), "nobody can be asked");
    assert!(text_of(&refused.stderr).contains("--yes"), "{}", all_of(&refused));

    engine.change(|faults| faults.by_image.clear());
    let before = engine.counts().accepted;
    assert!(said(&site, &["dead-letter", "retry", &id]).starts_with("1 in line"));
    engine.until_accepted(before + 1);
    assert_eq!(engine.accepted().pop().unwrap().sha256, hash(&image(0)));
    eventually("it is gone", PATIENCE, || {
        (said(&site, &["dead-letter", "list"]) == "No dead letters.\n").then_some(())
    });
    daemon.idle(PATIENCE);
    engine.contract_held();
}

#[test]
fn the_daemons_metrics_follow_at_once_when_dead_letters_are_retried_or_purged() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let daemon_counts = |daemon: &Daemon<'_>, expected: i64| {
        // Well within the minute after which its janitor would look by itself.
        eventually("the daemon has counted them", SOON, || {
            let samples = daemon.metrics();
            let (count, bytes) =
                (samples.count("framegate_dead_letters", ""), samples.count("framegate_dead_letter_bytes", ""));
            (count == expected && (bytes > 0) == (expected > 0)).then_some(())
        });
    };
    for command in ["purge", "retry"] {
        let id = one_dead_letter(&engine, &site);
        daemon_counts(&daemon, 1);
        engine.change(|faults| faults.by_image.clear());
        let arguments = ["dead-letter", command, &id, "--yes"];
        said(&site, &arguments[..if command == "purge" { 4 } else { 3 }]);
        daemon_counts(&daemon, 0);
        daemon.idle(PATIENCE);
    }
}

#[test]
fn dead_letters_are_retried_and_purged_without_a_daemon() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    let daemon = site.run();
    let id = one_dead_letter(&engine, &site);
    assert!(daemon.stop().success());

    let mut behind = Command::new(env!("CARGO_BIN_EXE_framegate"));
    behind.arg("dead-letter").arg("--config").arg(site.config()).arg("list");
    assert!(text_of(&behind.output().unwrap().stdout).contains(&id), "--config is taken in front, too");
    let missing = output(&site, &["dead-letter", "retry", "01m85ns11900002qtrj8e1pc5f"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(said(&site, &["dead-letter", "retry", "--all"]).starts_with("1 in line"));
    engine.change(|faults| faults.by_image.clear());
    let before = engine.counts().accepted;
    let mut daemon = site.run();
    engine.until_accepted(before + 1);
    daemon.idle(PATIENCE);
    assert!(daemon.stop().success());

    let daemon = site.run();
    let id = one_dead_letter(&engine, &site);
    assert!(daemon.stop().success());
    assert_eq!(said(&site, &["dead-letter", "purge", &id, "--yes"]), "1 removed.\n");
    assert_eq!(said(&site, &["dead-letter", "list", "--json"]), "");
}

#[test]
fn pin_prints_what_engine_pin_sha256_takes_and_it_works() {
    let engine = Engine::with(|options| options.tls = Some(Certificate::SelfSigned));
    let pin = engine.pin().unwrap();
    let printed = free(&["pin", &engine.base_url()]);
    assert!(printed.status.success(), "{}", all_of(&printed));
    let line = text_of(&printed.stdout);
    assert!(line.starts_with("# https://") && line.ends_with(&format!("\npin_sha256 = [\"{pin}\"]\n")), "{line}");
    let site = Site::new(&engine.base_url()).engine_keys(&line).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = vec![put_face(&site.drop_dir("Lobby"), 1)];
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    let refused = free(&["pin", "http://127.0.0.1:9"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text_of(&refused.stderr).contains("https"), "{}", all_of(&refused));
}

#[test]
fn schema_completions_and_man_are_what_they_say() {
    let schema: Value = serde_json::from_slice(&free(&["schema"]).stdout).expect("JSON");
    assert!(schema["properties"]["detectors"].is_object(), "{schema}");
    for shell in ["bash", "zsh", "fish"] {
        let printed = free(&["completions", shell]);
        assert!(printed.status.success());
        assert!(text_of(&printed.stdout).contains("dead-letter"), "{shell}");
    }
    let man = text_of(&free(&["man"]).stdout);
    assert!(man.contains(".TH framegate 1") && man.contains("simulate\\-engine"), "{}", &man[..500]);
    assert_eq!(free(&["completions", "tcl"]).status.code(), Some(2));
}

#[test]
fn the_man_pages_are_also_written_one_file_for_each_command() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_str().expect("a plain path");
    let written = free(&["man", "--directory", path]);
    assert!(written.status.success() && written.stdout.is_empty(), "{}", all_of(&written));
    for command in COMMANDS.iter().map(|name| format!("framegate-{name}")).chain(["framegate".to_owned()]) {
        let page = std::fs::read_to_string(dir.path().join(format!("{command}.1"))).expect("its page");
        // In a page's title the dashes stand as they are.
        assert!(page.contains(&format!(".TH {command} 1")), "{command}: {page}");
    }
    let page = std::fs::read_to_string(dir.path().join("framegate-dead-letter-retry.1")).expect("its page");
    assert!(page.contains("dead\\-letter retry"), "{page}");
    let refused = free(&["man", "--directory", "/proc/nowhere"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text_of(&refused.stderr).contains("/proc/nowhere"), "{}", all_of(&refused));
}

#[test]
fn every_command_has_a_help_and_the_whole_names_them_all() {
    let whole = text_of(&free(&["--help"]).stdout);
    for command in COMMANDS {
        assert!(whole.contains(&format!("\n  {command} ")), "{command}: {whole}");
        let help = free(&[command, "--help"]);
        assert!(help.status.success(), "{command}: {}", all_of(&help));
        let help = text_of(&help.stdout);
        assert!(help.contains("Usage:") && help.contains("Examples:\n"), "{command}: {help}");
    }
    assert!(text_of(&free(&["--version"]).stdout).starts_with("framegate 0."));
    assert_eq!(free(&["frobnicate"]).status.code(), Some(2));
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_no_panic() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    let _daemon = site.run();
    for arguments in [&["check"][..], &["status"], &["status", "--json"], &["dead-letter", "list"], &["reload"]] {
        gone(site.command(arguments));
    }
    for arguments in [&["schema"][..], &["man"], &["completions", "bash"], &["--help"], &["dead-letter", "--help"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
        command.args(arguments);
        gone(command);
    }
}

#[test]
fn the_demo_publishes_everything_and_leaves_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let shown = demo(place.path(), &["--frames", "300", "--detectors", "3"]).output().unwrap();
    assert!(shown.status.success(), "{}", all_of(&shown));
    let text = text_of(&shown.stdout);
    assert!(text.contains("300 published, 0 lost, 0 dead letters"), "{text}");
    assert!(["DemoCam1", "DemoCam2", "DemoCam3"].iter().all(|it| text.contains(it)), "{text}");
    assert_eq!(left_in(place.path()), Vec::<PathBuf>::new());
}

#[test]
fn the_demo_with_errors_loses_nothing_either() {
    let place = tempfile::tempdir().unwrap();
    let shown = demo(place.path(), &["--frames", "200", "--errors", "0.3"]).output().unwrap();
    assert!(shown.status.success(), "{}", all_of(&shown));
    assert!(text_of(&shown.stdout).contains("200 published, 0 lost, 0 dead letters"), "{}", all_of(&shown));
    assert_eq!(left_in(place.path()), Vec::<PathBuf>::new());
    let refused = demo(place.path(), &["--errors", "2"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn an_interrupted_demo_ends_well_and_leaves_nothing_behind() {
    for signal in [Signal::INT, Signal::TERM] {
        let place = tempfile::tempdir().unwrap();
        let mut command = demo(place.path(), &["--frames", "100000", "--rate", "200"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        out.read_line(&mut first).unwrap();
        assert!(first.starts_with("100000 frames"), "{first}");
        kill_process(Pid::from_child(&child), signal).unwrap();
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
        let ended = child.wait().unwrap();
        assert_eq!(ended.code(), Some(0), "{signal:?}: {rest}");
        assert!(rest.contains("interrupted: "), "{rest}");
        assert_eq!(left_in(place.path()), Vec::<PathBuf>::new(), "{signal:?}");
    }
}

// ---- what the tests above say for short

/// The first face is refused, another one is taken after it: it becomes a dead letter. Gives its id.
fn one_dead_letter(engine: &Engine, site: &Site) -> String {
    refuse(engine, &image(0));
    put_face(&site.drop_dir("Lobby"), 0);
    let mut more = 1..;
    let listed = eventually("it is a dead letter", PATIENCE, || {
        put_face(&site.drop_dir("Lobby"), more.next()?);
        let listed = said(site, &["dead-letter", "list", "--json"]);
        (!listed.is_empty()).then_some(listed)
    });
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let letter: Value = serde_json::from_str(&listed).expect("JSON");
    letter["id"].as_str().expect("an id").to_owned()
}

fn refuse(engine: &Engine, image: &[u8]) {
    use std::fmt::Write as _;
    let hex = hash(image).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a string takes everything");
        hex
    });
    engine.change(|faults| {
        faults.by_image.insert(hex, 400);
    });
}

fn output(site: &Site, arguments: &[&str]) -> Output {
    site.command(arguments).output().expect("the binary starts")
}

#[track_caller]
fn said(site: &Site, arguments: &[&str]) -> String {
    let output = output(site, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", all_of(&output));
    text_of(&output.stdout)
}

/// A command that needs no site.
fn free(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_framegate")).args(arguments).output().expect("the binary starts")
}

fn demo(place: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
    command.arg("demo").args(arguments).env("TMPDIR", place).stdin(Stdio::null());
    command
}

fn left_in(place: &Path) -> Vec<PathBuf> {
    fs::read_dir(place).unwrap().map(|it| it.unwrap().path()).collect()
}

/// Runs it with a pipe that nobody reads any more.
#[track_caller]
fn gone(mut command: Command) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let name = format!("{:?}", command.get_args().collect::<Vec<&OsStr>>());
    let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), text_of(&output.stderr)), (Some(0), String::new()), "{name}");
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn all_of(output: &Output) -> String {
    format!("{}\n{}{}", output.status, text_of(&output.stdout), text_of(&output.stderr))
}
