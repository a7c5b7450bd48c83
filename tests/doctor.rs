//! `framegate doctor`: on a healthy box, and on one with many things wrong, each found and named with its remedy.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use framegate::simulator::Certificate;
use serde_json::Value;
use support::brokers::{Nats, Redis};
use support::engine::{Engine, put_face};
use support::faults::{Mount, skipped};
use support::{PATIENCE, Site, eventually};

/// The lines of `doctor --json`, and whether it found nothing that fails.
fn doctor(site: &Site) -> (Vec<Value>, bool) {
    let output = site.command(&["doctor", "--user", "root", "--json"]).output().expect("the binary starts");
    let text = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let lines = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (lines, output.status.success())
}

/// The line of this subject whose finding holds these words.
#[track_caller]
fn line<'a>(lines: &'a [Value], subject: &str, words: &str) -> &'a Value {
    let of = |line: &&Value| {
        line["subject"].as_str().is_some_and(|it| it.starts_with(subject))
            && line["found"].as_str().is_some_and(|it| it.contains(words))
    };
    lines.iter().find(of).unwrap_or_else(|| panic!("no line `{subject}` with `{words}` in {lines:#?}"))
}

#[track_caller]
fn is(lines: &[Value], subject: &str, words: &str, outcome: &str, remedy: &str) {
    let line = line(lines, subject, words);
    assert_eq!(line["outcome"], outcome, "{line:#}");
    assert!(line["remedy"].as_str().is_some_and(|it| it.contains(remedy)), "{line:#}");
}

#[test]
fn on_a_healthy_box_nothing_fails_and_every_step_to_the_engine_is_told() {
    let engine = Engine::with(|options| options.tls = Some(Certificate::SelfSigned));
    let pin = engine.pin().unwrap();
    let site =
        Site::new(&engine.base_url()).engine_keys(&format!("pin_sha256 = [\"{pin}\"]")).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    put_face(&site.drop_dir("Lobby"), 1);
    daemon.idle(PATIENCE);
    let (lines, healthy) = doctor(&site);
    assert!(healthy, "{lines:#?}");
    for (subject, words) in [
        ("configuration", "is valid"),
        ("fs.inotify.max_user_watches", "needed"),
        ("file descriptors", "needed"),
        ("detector Lobby", "with all rights"),
        ("secret", "can be read"),
        ("engine: name", "127.0.0.1"),
        ("engine: connection", "127.0.0.1"),
        ("engine: certificate", &pin),
        ("engine: login", "works; tokens live"),
        ("clock", "agrees"),
        ("daemon", "runs since"),
        ("publishing", "the engine takes frames: 1 so far"),
    ] {
        assert_eq!(line(&lines, subject, words)["outcome"], "ok", "{subject}: {lines:#?}");
    }
    let output = site.command(&["doctor", "--user", "root"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ok    engine: login: works") && text.contains(" 0 fail\n"), "{text}");
    assert!(!text.contains('\x1b'), "colours are for terminals");
    assert!(!text.contains(support::PASSWORD));
}

#[test]
fn five_things_wrong_are_each_found_and_named_with_what_mends_them() {
    let engine = Engine::with(|options| {
        options.tls = Some(Certificate::SelfSigned);
        options.faults.token_ttl = Duration::from_mins(1);
    });
    let site = Site::new(&engine.base_url()).detector("Gone", "UTC", "").detector("File", "UTC", "").detector(
        "Archive",
        "UTC",
        "directory.after_publish = \"archive\"\ndirectory.archive = \"/proc/nowhere\"",
    );
    site.write_config();
    fs::remove_dir(site.drop_dir("Gone")).unwrap();
    fs::remove_dir(site.drop_dir("File")).unwrap();
    fs::write(site.drop_dir("File"), "").unwrap();
    let (lines, healthy) = doctor(&site);
    assert!(!healthy);
    is(&lines, "detector Gone", "does not exist", "fail", "install -d");
    is(&lines, "detector File", "is no directory", "fail", "setfacl");
    is(&lines, "detector Archive", "the archive /proc/nowhere", "warn", "install -d");
    is(&lines, "engine: certificate", "TLS", "fail", &format!("pin_sha256 = [\"{}\"]", engine.pin().unwrap()));
    is(&lines, "daemon", "", "warn", "systemctl start framegate");
}

#[test]
fn a_wrong_password_an_engine_that_is_away_and_a_port_that_is_not_tls_are_told_apart() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    site.write_config();
    let password = site.path().join("engine-password");
    fs::write(&password, "something else").unwrap();
    is(&doctor(&site).0, "engine: login", "credentials", "fail", "engine.username");
    fs::remove_file(&password).unwrap();
    is(&doctor(&site).0, "secret", "engine-password", "fail", "LoadCredential=");
    fs::write(&password, support::PASSWORD).unwrap();
    fs::set_permissions(&password, fs::Permissions::from_mode(0o644)).unwrap();
    is(&doctor(&site).0, "configuration", "run `chmod o= ", "fail", "");

    engine.down();
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    is(&doctor(&site).0, "engine: connection", "refused", "fail", "firewall");
    engine.up();
    let other = Site::new(&engine.base_url().replace("http:", "https:")).detector("Lobby", "UTC", "");
    other.write_config();
    is(&doctor(&other).0, "engine: TLS", "TLS", "fail", "6009");
    let nowhere = Site::new("http://framegate.invalid:6009").detector("Lobby", "UTC", "");
    nowhere.write_config();
    is(&doctor(&nowhere).0, "engine: name", "framegate.invalid", "fail", "DNS");
}

#[test]
fn root_looks_with_the_rights_of_the_user_it_names() {
    if !rustix::process::geteuid().is_root() {
        return support::faults::skipped("root_looks_with_the_rights_of_the_user_it_names", "it needs root");
    }
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    site.write_config();
    for path in [site.path().to_owned(), site.config()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(site.drop_dir("Lobby"), fs::Permissions::from_mode(0o555)).unwrap();
    // A binary that everybody can run: that of the build may lie in somebody's home. A process of its own copies it: a file open
    // for writing here would be inherited by what another test starts meanwhile, and could not be run until that has let go of it.
    let binary = site.path().join("framegate");
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_framegate")).arg(&binary).status().unwrap();
    assert!(copied.success(), "cp: {copied}");
    let mut command = std::process::Command::new(&binary);
    command.args(["doctor", "--user", "nobody", "--json", "--config"]).arg(site.config());
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let lines: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    is(&lines, "detector Lobby", "cannot be taken", "fail", "setfacl");
    is(&lines, "secret", "engine-password", "fail", "LoadCredential=");
}

#[test]
fn what_only_the_running_daemon_knows_is_asked_of_it() {
    let engine = Engine::with(|options| options.faults.answer_all = Some(403));
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "silence_alarm = \"1s\"");
    let _daemon = site.run();
    for n in 0..20 {
        put_face(&site.drop_dir("Lobby"), n);
    }
    eventually("the engine's permission is missed", PATIENCE, || {
        let (lines, _) = doctor(&site);
        lines.iter().any(|line| line["subject"] == "publishing" && line["outcome"] == "fail").then_some(())
    });
    is(&doctor(&site).0, "publishing", "forbidden", "fail", "Face Publishing");
    eventually("and the silence is told", PATIENCE, || {
        let (lines, _) = doctor(&site);
        lines.iter().any(|line| line["found"].as_str().is_some_and(|it| it.contains("silence_alarm"))).then_some(())
    });
}

#[test]
fn brokers_are_reached_with_their_accounts_and_nothing_is_made_there() {
    let test = "brokers_are_reached_with_their_accounts_and_nothing_is_made_there";
    let (Some(redis), Some(nats)) = (Redis::start(), Nats::start()) else {
        return skipped(test, "redis-server or nats-server is missing");
    };
    let entry = |redis: &str, nats: &str| {
        (
            format!("redis = {{ url = \"{redis}\", stream = \"frames\" }}"),
            format!("nats = {{ url = \"{nats}\", stream = \"FRAMES\" }}"),
        )
    };
    let engine = Engine::start();
    let (one, two) = entry(&redis.url(), &nats.url());
    let site = Site::new(&engine.base_url()).fed("Stream", "UTC", &one).fed("Subject", "UTC", &two);
    site.write_config();
    let (lines, _) = doctor(&site);
    is(&lines, "detector Stream", "the stream will be made", "ok", "");
    is(&lines, "detector Subject", "there is no stream FRAMES: create it", "fail", "is nats.url right");
    nats.make_stream();
    redis.add(&["detectorName", "Door"], &support::engine::image(1));
    let (lines, _) = doctor(&site);
    is(&lines, "detector Stream", "the last entry of its stream is", "ok", "");
    is(&lines, "detector Subject", "consumer framegate will be made", "ok", "");
    assert!(nats.consumer().is_none(), "looking makes nothing");
    assert_eq!(redis.cli(&["XINFO", "GROUPS", "frames"]), "", "looking makes nothing");

    let (one, two) = entry("redis://127.0.0.1:1", "nats://127.0.0.1:1");
    let away = Site::new(&engine.base_url()).fed("Stream", "UTC", &one).fed("Subject", "UTC", &two);
    away.write_config();
    let (lines, healthy) = doctor(&away);
    assert!(!healthy);
    is(&lines, "detector Stream", "refused", "fail", "does a firewall stand between");
    is(&lines, "detector Subject", "127.0.0.1:1", "fail", "does a firewall stand between");
}

#[test]
fn a_box_with_a_small_disk_for_its_spool_and_far_too_few_inodes_is_told_so() {
    let place = tempfile::tempdir().unwrap();
    let Some(_disk) = Mount::tmpfs(place.path(), "size=8m,nr_inodes=64") else {
        return skipped(
            "a_box_with_a_small_disk_for_its_spool_and_far_too_few_inodes_is_told_so",
            "a tmpfs cannot be mounted",
        );
    };
    let engine = Engine::start();
    let spool = place.path().join("spool");
    fs::create_dir(&spool).unwrap();
    let sections =
        format!("[push]\nlisten = \"unix:{0}/push.sock\"\n[spool]\ndirectory = \"{0}/spool\"", place.path().display());
    let site = Site::new(&engine.base_url()).section(&sections).fed("Pushed", "UTC", "push = {}");
    site.write_config();
    is(&doctor(&site).0, "spool", "inodes are free", "warn", "df -i");
}

#[test]
fn a_credential_that_only_the_running_service_gets_is_no_failure() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    site.write_config();
    fs::remove_file(site.path().join("engine-password")).unwrap();
    let output = site
        .command(&["doctor", "--user", "root", "--json", "--stored", "engine-password"])
        .output()
        .expect("the binary starts");
    let lines: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    is(&lines, "secret", "the service gets it when it starts", "ok", "");
    is(&lines, "engine: login", "not tried", "warn", "systemctl start framegate");
    assert!(output.status.success(), "{lines:#?}");
}
