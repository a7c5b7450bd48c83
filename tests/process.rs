//! The life of the real binary: killed, stopped, reloaded, starved, suspended, gagged. FAULTS.md sections D and E, and A28.

mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::Value;

use support::engine::{Camera, Engine, Hash, hash, image, nothing_lost, put_face};
use support::{Action, Daemon, PASSWORD, PATIENCE, Reply, Samples, Site, USERNAME, eventually, files_below, put};

const MAX_IN_FLIGHT: u64 = 8;
/// Frames that a camera may be ahead of the engine.
const AHEAD: u64 = 60;
/// So that there is something in flight at each moment.
const LATENCY: Duration = Duration::from_millis(10);
/// All that stopping may take beside the answers that are waited for.
const SOON: Duration = Duration::from_secs(3);

// ---- D1, D4: ends

#[test]
fn d1_kill_9_under_load_two_hundred_times_loses_nothing_and_doubles_only_what_was_in_flight() {
    const KILLS: u64 = 200;
    let engine = slow_engine();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let camera = Camera::start(std::slice::from_ref(&engine), vec![site.drop_dir("Lobby")], AHEAD);
    let mut chance = fastrand::Rng::with_seed(9);
    for _ in 0..KILLS {
        let seen = engine.counts().accepted;
        let daemon = site.start();
        engine.until_accepted(seen + chance.u64(1..12));
        daemon.kill();
    }
    let written = camera.finish();
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= KILLS * MAX_IN_FLIGHT, "{doubled} of {} came twice", written.len());
    assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
    assert_eq!(said(&site, &["dead-letter", "list"]), "No dead letters.\n");
    assert!(daemon.stop().success());
    assert_eq!(site.files_left(), Vec::<PathBuf>::new());
}

#[test]
fn d4_sigterm_under_load_ends_in_time_gives_everything_back_and_doubles_nothing() {
    let engine = slow_engine();
    let site = site(&engine)
        .engine_keys("timeout = \"4s\"")
        .section("[shutdown]\ndeadline = \"5s\"")
        .detector("Lobby", "UTC", "");
    let camera = Camera::start(std::slice::from_ref(&engine), vec![site.drop_dir("Lobby")], AHEAD);
    for _ in 0..10 {
        let seen = engine.counts().accepted;
        let daemon = site.start();
        engine.until_accepted(seen + 20);
        let begun = Instant::now();
        let status = daemon.stop();
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(claims(&site), Vec::<PathBuf>::new());
    }
    let written = camera.finish();
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
}

#[test]
fn d4_a_second_sigterm_ends_at_once_and_what_had_no_answer_stays() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    engine.hold();
    let written: Vec<Hash> = (0..40).map(|n| put_face(&site.drop_dir("Lobby"), n)).collect();
    eventually("frames are under way", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    daemon.signal(Signal::TERM);
    eventually("it stops", PATIENCE, || site.log().contains("stopping").then_some(()));
    let begun = Instant::now();
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(claims(&site), Vec::<PathBuf>::new());
    drop(daemon);

    engine.release();
    site.run().idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= MAX_IN_FLIGHT, "{doubled} came twice");
}

#[test]
fn d4_sigterm_while_the_engine_is_away_ends_soon_and_the_next_run_publishes_everything() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    engine.down();
    let daemon = site.run();
    let written: Vec<Hash> = (0..50).map(|n| put_face(&site.drop_dir("Lobby"), n)).collect();
    eventually("the engine is known to be away", PATIENCE, || {
        (status(&site)["engine"]["state"] == "unreachable").then_some(())
    });
    let begun = Instant::now();
    assert_eq!(daemon.stop().code(), Some(0));
    // The deadline is 20 s.
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(claims(&site), Vec::<PathBuf>::new());
    assert_eq!(site.files_left().len(), written.len(), "all are back in their places");

    engine.up();
    site.run().idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
}

// ---- reload

#[test]
fn a_reload_under_load_adds_and_removes_detectors_and_nothing_is_lost_doubled_or_stalled() {
    let engine = slow_engine();
    let site = site(&engine).detector("Stays", "UTC", "").detector("Comes and goes", "UTC", "");
    let mut daemon = site.run();
    let both = fs::read_to_string(site.config()).unwrap();
    let only_one = both.split_once("[[detectors]]\nname = \"Comes and goes\"").expect("the second entry").0.to_owned();
    let directories = vec![site.drop_dir("Stays"), site.drop_dir("Comes and goes")];
    // The camera goes on filling the directory that nobody looks at for a while: it needs more room.
    let camera = Camera::start(std::slice::from_ref(&engine), directories, 400);
    let from = engine.counts().accepted;
    for round in 0..8 {
        fs::write(site.config(), &only_one).unwrap();
        assert_eq!(said(&site, &["reload"]), "1 detector entries unchanged, 0 started, 1 stopped\n");
        engine.until_accepted(from + 10 + round * 40);
        fs::write(site.config(), &both).unwrap();
        assert_eq!(said(&site, &["reload"]), "1 detector entries unchanged, 1 started, 0 stopped\n");
        engine.until_accepted(from + 30 + round * 40);
    }
    let written = camera.finish();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(samples.count("framegate_config_reloads_total", "result=\"success\""), 16);
    assert_eq!(samples.count("framegate_dead_letters", ""), 0);
    let times: Vec<_> = engine.accepted().iter().filter(|it| it.detector == "Stays").map(|it| it.accepted).collect();
    let longest = times.windows(2).map(|two| two[1] - two[0]).max().expect("frames of it");
    assert!(longest < Duration::from_secs(2), "the detector that did not change stood still for {longest:?}");
}

#[test]
fn a_reload_under_load_with_another_engine_moves_the_frames_there() {
    let (old, new) = (slow_engine(), slow_engine());
    let site = site(&old).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let camera = Camera::start(&[old.clone(), new.clone()], vec![site.drop_dir("Lobby")], AHEAD);
    old.until_accepted(50);
    let config = fs::read_to_string(site.config()).unwrap();
    fs::write(site.config(), config.replace(&old.base_url(), &new.base_url())).unwrap();
    said(&site, &["reload"]);
    new.until_accepted(1);
    eventually("what was under way has its answers", PATIENCE, || (old.counts().in_flight == 0).then_some(()));
    let left_behind = old.counts();
    new.until_accepted(100);
    assert_eq!(old.counts().publish, left_behind.publish, "nothing goes to the old one any more");
    let written = camera.finish();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&old, &new], &written), 0, "came twice");
    assert_eq!(new.counts().authenticate, 1);
}

#[test]
fn a_reload_that_moves_away_from_a_dead_engine_frees_the_frames_that_waited_for_it() {
    let (old, new) = (Engine::start(), Engine::start());
    let site = site(&old).detector("Lobby", "UTC", "");
    old.down();
    let mut daemon = site.run();
    let written: Vec<Hash> = (0..40).map(|n| put_face(&site.drop_dir("Lobby"), n)).collect();
    eventually("the engine is known to be away", PATIENCE, || {
        (status(&site)["engine"]["state"] == "unreachable").then_some(())
    });
    let config = fs::read_to_string(site.config()).unwrap();
    fs::write(site.config(), config.replace(&old.base_url(), &new.base_url())).unwrap();
    said(&site, &["reload"]);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&new], &written), 0, "came twice");
}

#[test]
fn d4_a_bad_configuration_is_refused_at_a_reload_loudly_and_the_old_one_goes_on() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let good = fs::read_to_string(site.config()).unwrap();
    let failures = |daemon: &Daemon<'_>| daemon.metrics().count("framegate_config_reloads_total", "result=\"failure\"");
    assert_eq!(failures(&daemon), 0);
    fs::write(site.config(), good.replace("[publish]", "[publish]\nattempts = 0")).unwrap();

    let refused = output(&site, &["reload"]);
    let message = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{message}");
    assert!(message.contains("publish.attempts"), "{message}");
    assert_eq!(failures(&daemon), 1, "the daemon knows");
    assert!(site.log().contains("the new configuration is refused, the old one goes on"));
    assert_eq!(site.log().matches("publish.attempts").count(), 1);

    daemon.hang_up();
    eventually("SIGHUP is refused too", PATIENCE, || (failures(&daemon) == 2).then_some(()));

    // Not even TOML: where the control socket is cannot be read from it.
    fs::write(site.config(), format!("{good}\n[[detectors")).unwrap();
    let refused = output(&site, &["reload"]);
    assert_ne!(refused.status.code(), Some(0));
    assert!(text(&refused.stderr).contains("framegate.toml"), "{}", text(&refused.stderr));
    daemon.hang_up();
    eventually("and so is what is no TOML", PATIENCE, || (failures(&daemon) >= 3).then_some(()));

    let written = vec![put_face(&site.drop_dir("Lobby"), 1)];
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    fs::write(site.config(), good).unwrap();
    assert_eq!(said(&site, &["reload"]), "1 detector entries unchanged, 0 started, 0 stopped\n");
}

#[test]
fn d4_a_reload_that_cannot_be_applied_whole_is_applied_in_no_part() {
    let (old, new) = (Engine::start(), Engine::start());
    let site = site(&old).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let good = fs::read_to_string(site.config()).unwrap();
    let spool = site.path().join("spool");
    let bad = format!(
        "{}\n[spool]\ndirectory = {:?}\n[push]\nlisten = \"systemd\"\n\
         [[detectors]]\nname = \"{{detectorName}}\"\ntime_zone = \"UTC\"\npush = {{}}\n",
        good.replace(&old.base_url(), &new.base_url()),
        spool.to_str().unwrap(),
    );
    fs::write(site.config(), bad).unwrap();
    let refused = output(&site, &["reload"]);
    let message = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{message}");
    assert!(message.contains("systemd"), "{message}");

    let written = vec![put_face(&site.drop_dir("Lobby"), 1)];
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&old], &written), 0);
    assert_eq!(new.counts().authenticate, 0, "nothing of the refused configuration counts");
    assert!(!spool.exists());
}

#[test]
fn d4_who_asks_a_daemon_that_stops_is_told_so_at_once() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let daemon = site.run();
    engine.hold();
    put_face(&site.drop_dir("Lobby"), 1);
    eventually("the frame is under way", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    daemon.signal(Signal::TERM);
    eventually("it stops", PATIENCE, || site.log().contains("stopping").then_some(()));
    for command in ["status", "reload"] {
        let refused = output(&site, &[command]);
        let message = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{message}");
        assert!(message.contains("the daemon is stopping"), "{command}: {message}");
    }
    engine.release();
}

#[test]
fn reload_without_a_daemon_says_so_and_fails() {
    let site = Site::new("http://127.0.0.1:9").detector("Lobby", "UTC", "");
    site.write_config();
    let refused = output(&site, &["reload"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("control.sock"), "{}", text(&refused.stderr));
}

// ---- exit codes

#[test]
fn a_bad_configuration_ends_the_start_with_78_and_every_problem() {
    let site = Site::new("http://127.0.0.1:9").section("[publish]\nattempts = 0\nmax_in_fligt = 3").detector(
        "Lobby",
        "Europe/Berlni",
        "",
    );
    assert_eq!(site.start().wait().code(), Some(78));
    let log = site.log();
    for said in ["max_in_fligt", "max_in_flight", "Europe/Berlin"] {
        assert!(log.contains(said), "{said}: {log}");
    }
}

#[test]
fn a_start_that_fails_says_why_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let site =
        Site::new("http://127.0.0.1:9").detector("Lobby", "UTC", "").environment("FRAMEGATE_ADMIN__LISTEN", &address);
    assert_eq!(site.start().wait().code(), Some(1));
    let log = site.log();
    assert_eq!(log.matches("cannot listen on").count(), 1, "{log}");
    assert!(log.contains("ERROR") && log.contains("cannot run: "), "{log}");
}

#[test]
fn e3_a_secret_that_others_can_read_ends_the_start_with_78_and_says_chmod() {
    let site = Site::new("http://127.0.0.1:9").detector("Lobby", "UTC", "");
    let secret = site.path().join("engine-password");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(site.start().wait().code(), Some(78));
    let log = site.log();
    assert!(log.contains("chmod") && log.contains("engine-password"), "{log}");
    assert!(!log.contains(PASSWORD), "{log}");
}

#[test]
fn an_engine_that_is_away_at_the_start_is_said_everywhere_and_fails_nothing() {
    let engine = Engine::start();
    engine.down();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = vec![put_face(&site.drop_dir("Lobby"), 1)];
    eventually("the status says so", PATIENCE, || {
        said(&site, &["status"]).contains("engine: unreachable").then_some(())
    });
    for path in ["/healthz", "/readyz"] {
        let (code, body) = daemon.get(path).unwrap();
        assert_eq!(code, 200, "{body}");
        assert!(body.contains("unreachable"), "{path}: {body}");
    }
    assert_eq!(daemon.metrics().count("framegate_engine_state", "state=\"unreachable\""), 1);
    engine.up();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn a_silent_member_of_a_family_is_named_in_status_and_log_until_it_is_heard_again() {
    let engine = Engine::start();
    let site = site(&engine).detector("{path.0}", "UTC", "silence_alarm = \"1s\"");
    let mut daemon = site.run();
    let lobby = site.drop_dir("{path.0}").join("Lobby");
    fs::create_dir(&lobby).unwrap();
    let mut written = vec![put_face(&lobby, 1)];
    daemon.idle(PATIENCE);
    eventually("it is told", PATIENCE, || {
        said(&site, &["status"]).contains("silent: Lobby has sent nothing").then_some(())
    });
    eventually("and logged", PATIENCE, || {
        site.log().contains("no frame for longer than its silence_alarm").then_some(())
    });
    written.push(put_face(&lobby, 2));
    eventually("it is heard again", PATIENCE, || site.log().contains("frames come again").then_some(()));
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);

    let told = || site.log().matches("no frame for longer than its silence_alarm").count();
    eventually("it is silent once more", PATIENCE, || (told() > 1).then_some(()));
    fs::rename(site.drop_dir("{path.0}"), site.path().join("away")).unwrap();
    eventually("it is held instead", PATIENCE, || {
        (daemon.metrics().count("framegate_detector_up", "detector=\"Lobby\"") == 0).then_some(())
    });
    daemon.stop();
    assert_eq!(site.log().matches("frames come again").count(), 1, "neither by that nor by the end");
}

// ---- systemd

#[test]
fn the_service_manager_hears_of_ready_reload_stop_and_the_watchdog() {
    let manager = Manager::new();
    let engine = Engine::start();
    let site = manager.environment(site(&engine)).detector("Lobby", "UTC", "");
    let daemon = site.run();
    manager.hears("the start, with a status", |it| it.starts_with("READY=1\nSTATUS=engine "));
    manager.hears("a ping", |it| it == "WATCHDOG=1");
    manager.hears("another", |it| it == "WATCHDOG=1");

    let before = monotonic_micros();
    said(&site, &["reload"]);
    let reloading = manager.hears("a reload", |it| it.starts_with("RELOADING=1"));
    let at: u128 = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("in one datagram").parse().unwrap();
    assert!((before..=monotonic_micros()).contains(&at), "{before} {at}");
    manager.hears("its end", |it| it.starts_with("READY=1\nSTATUS="));

    put_face(&site.drop_dir("Lobby"), 1);
    manager.hears("how it goes", |it| it.starts_with("STATUS=") && it.contains("1 published, 0 pending"));
    assert!(daemon.stop().success());
    manager.hears("the stop", |it| it.starts_with("STOPPING=1"));
}

#[test]
fn the_watchdog_is_fed_while_a_stop_waits_for_a_slow_engine() {
    let manager = Manager::new();
    let engine = Engine::with(|options| options.faults.latency = Duration::from_secs(7));
    let site = manager.environment(site(&engine)).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = vec![put_face(&site.drop_dir("Lobby"), 1)];
    eventually("it is under way", PATIENCE, || (engine.counts().in_flight > 0).then_some(()));
    daemon.signal(Signal::TERM);
    manager.hears("the stop", |it| it.starts_with("STOPPING=1"));
    // The time-out is 2 s, so this many pings are more than what was under way anyway.
    for n in 1..=4 {
        manager.hears(&format!("ping {n} while it drains"), |it| it == "WATCHDOG=1");
    }
    assert!(daemon.wait().success());
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn d6_d8_a_suspended_daemon_pings_no_watchdog_and_goes_on_afterwards_without_a_storm() {
    let manager = Manager::new();
    let engine = slow_engine();
    let site = manager.environment(site(&engine)).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let directory = site.drop_dir("Lobby");
    let mut written: Vec<Hash> = (0..60).map(|n| put_face(&directory, n)).collect();
    engine.until_accepted(5);
    daemon.signal(Signal::STOP);
    eventually("it is suspended", PATIENCE, || (state_of(&daemon) == 'T').then_some(()));
    manager.forget();
    written.extend((60..120).map(|n| put_face(&directory, n)));
    let (since, asked) = (Instant::now(), engine.counts().publish + MAX_IN_FLIGHT);
    eventually("three watchdog pings would be due", PATIENCE, || {
        (since.elapsed() > Duration::from_secs(3)).then_some(())
    });
    assert_eq!(manager.heard(), None, "nobody pings");
    assert!(engine.counts().publish <= asked);

    daemon.signal(Signal::CONT);
    daemon.idle(PATIENCE);
    manager.hears("pings again", |it| it == "WATCHDOG=1");
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= MAX_IN_FLIGHT, "{doubled} came twice");
    let counts = engine.counts();
    assert!(counts.publish <= written.len() as u64 + MAX_IN_FLIGHT, "{counts:?}");
    assert_eq!((counts.authenticate, counts.renew), (1, 0), "{counts:?}");
}

// ---- E4: secrets

#[test]
fn e4_password_token_and_image_never_appear_in_logs_at_trace_level_metrics_status_or_dead_letters() {
    let marker = "canary-image-5d0c77";
    for (format, level) in [
        ("text", "trace"),
        ("json", "trace"),
        ("text", "trace,hyper=trace,hyper_util=trace,reqwest=trace,rustls=trace,h2=trace"),
    ] {
        let engine = Engine::start();
        let token = token_of(&engine);
        let site = site(&engine)
            .environment("FRAMEGATE_LOG__LEVEL", level)
            .environment("FRAMEGATE_LOG__FORMAT", format)
            .detector("Lobby", "UTC", "directory.partial_timeout = \"1s\"");
        let mut daemon = site.run();
        let directory = site.drop_dir("Lobby");
        let canaries: Vec<Vec<u8>> = (0..30).map(|n| marked(&image(n), marker)).collect();
        let echo = |image: &[u8]| {
            let body = serde_json::json!({ "message": format!("no: {} {token}", base64(image)) }).to_string();
            Action::Answer(Reply { status: 400, headers: Vec::new(), body })
        };
        // Good, refused, cut, failing, a token that is not taken, an answer that says everything back.
        put(&directory, "good.jpg", &canaries[0]);
        engine.until_accepted(1);
        engine.change(|faults| {
            faults.by_image.insert(hex(&hash(&canaries[1])), 400);
        });
        engine.script([Action::CutBefore, Action::CutAfter, Action::status(503)]);
        engine.script([echo(&canaries[2])]);
        for (n, canary) in canaries.iter().enumerate().skip(1) {
            put(&directory, &format!("{n}.jpg"), canary);
        }
        engine.revoke_all_tokens();
        put(&directory, "half.jpg", &canaries[2][..canaries[2].len() / 2]);
        put(&directory, "text.jpg", marker.as_bytes());
        // A refusal counts once another frame has been accepted since.
        let mut more = 1000..;
        eventually("three dead letters", PATIENCE, || {
            put_face(&directory, more.next()?);
            (daemon.metrics().count("framegate_dead_letters", "") == 3).then_some(())
        });
        daemon.idle(PATIENCE);
        let mut shown: Vec<(String, String)> = ["/metrics", "/status", "/healthz", "/readyz"]
            .map(|path| (path.to_owned(), daemon.get(path).expect("it answers").1))
            .into();
        said(&site, &["reload"]);
        assert!(daemon.stop().success());

        // A login that is refused.
        engine.revoke_all_tokens();
        engine.change(|faults| faults.login_status = Some(401));
        let daemon = site.run();
        put(&directory, "late.jpg", &canaries[0]);
        eventually("the login is refused", PATIENCE, || {
            (status(&site)["engine"]["state"] == "credentials").then_some(())
        });
        shown.push(("status while the login is refused".into(), said(&site, &["status"])));
        daemon.kill();

        let records: Vec<PathBuf> = files_below(&site.dead_letters())
            .into_iter()
            .filter(|it| it.extension().is_some_and(|it| it == "json"))
            .collect();
        assert!(records.len() >= 3, "{records:?}");
        shown.extend(records.iter().map(|it| (it.display().to_string(), fs::read_to_string(it).unwrap())));
        shown.push(("dead-letter list".into(), said(&site, &["dead-letter", "list", "--json"])));
        shown.push(("the log".into(), site.log()));
        assert!(
            site.log().to_lowercase().contains("trace") || site.log().to_lowercase().contains("debug"),
            "it is verbose"
        );
        // Every token begins with the same header; its parts are looked for one by one.
        let header = token.split('.').next().expect("a header");
        assert!(header.len() > 10, "{token}");
        let secrets = [PASSWORD, header, marker, &base64(marker.as_bytes())[1..20], &base64(&canaries[0])[..40]];
        for (place, text) in &shown {
            assert!(!text.is_empty(), "{place}");
            for secret in secrets {
                if let Some(at) = text.find(secret) {
                    let line = text[..at].rfind('\n').map_or(0, |it| it + 1);
                    let end = text[at..].find('\n').map_or(text.len(), |it| at + it);
                    panic!("{secret} is in {place}: {}", &text[line..end]);
                }
            }
        }
    }
}

// ---- D9, A28: what the box runs out of

#[test]
fn d9_closed_full_or_broken_outputs_do_not_stop_the_daemon() {
    for script in [
        r#"exec "$@" >&- 2>&-"#,
        r#"exec "$@" >/dev/full 2>/dev/full"#,
        r#"mkfifo pipe; exec 3<>pipe; exec "$@" >pipe 2>pipe 3<&-"#,
    ] {
        let engine = Engine::start();
        let site = site(&engine).section("[log]\nlevel = \"trace\"").detector("Lobby", "UTC", "");
        let mut shell = site.shell(script);
        shell.current_dir(site.path());
        let mut daemon = site.start_as(shell).until_ready();
        let written: Vec<Hash> = (0..30).map(|n| put_face(&site.drop_dir("Lobby"), n)).collect();
        daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0, "{script}");
        daemon.hang_up();
        eventually("it reloads", PATIENCE, || {
            (daemon.metrics().count("framegate_config_reloads_total", "result=\"success\"") == 1).then_some(())
        });
        assert_eq!(daemon.stop().code(), Some(0), "{script}");
    }
}

#[test]
fn a28_with_thirty_two_file_descriptors_and_default_settings_everything_is_published() {
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(50));
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "").detector("Door", "UTC", "");
    let mut daemon = site.start_as(site.shell(r#"ulimit -n 32; exec "$@""#)).until_ready();
    let directories = [site.drop_dir("Lobby"), site.drop_dir("Door")];
    let written: Vec<Hash> = (0..200).map(|n| put_face(&directories[usize::from(n % 2 == 0)], n)).collect();
    let mut most = 0;
    let samples = eventually("everything is published", Duration::from_mins(1), || {
        // There is a descriptor for this, too.
        let samples = daemon.metrics();
        most = most.max(samples.count("framegate_concurrency_limit", ""));
        (samples.count("framegate_frames_published_total", "") == 200).then_some(samples)
    });
    assert!((1..=16).contains(&most), "{most} at once are more than there are descriptors for");
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    for nothing in ["framegate_dead_letters", "framegate_frames_dropped_total", "framegate_settle_errors_total"] {
        assert_eq!(samples.count(nothing, ""), 0, "{nothing}");
    }
    // It is said what is wrong, once, and nothing failed for it.
    let log = site.log();
    assert_eq!(log.matches("publish.max_in_flight is 64, but").count(), 1, "{log}");
    assert_eq!(log.to_lowercase().matches("too many open files").count(), 0, "{log}");
    daemon.idle(PATIENCE);
}

#[test]
fn a28_without_any_file_descriptor_nothing_is_lost_and_it_recovers() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let directory = site.drop_dir("Lobby");
    let mut written = vec![put_face(&directory, 0)];
    daemon.idle(PATIENCE);
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    let highest = fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .map(|it| it.unwrap().file_name().to_str().unwrap().parse::<u64>().unwrap())
        .max()
        .expect("descriptors");
    // The daemon's are ours.
    let plenty = rustix::process::getrlimit(Resource::Nofile);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum: plenty.maximum })
        .expect("a limit can be lowered");
    assert!(highest > 3);
    // Connections end, so that none is left to publish on.
    engine.cut_connections();
    written.extend((1..80).map(|n| put_face(&directory, n)));
    eventually("the box's trouble is said", PATIENCE, || {
        site.log().to_lowercase().contains("too many open files").then_some(())
    });
    prlimit(pid, Resource::Nofile, plenty).expect("and raised");
    let samples = daemon.idle(Duration::from_mins(1));
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= MAX_IN_FLIGHT, "{doubled} came twice");
    assert_eq!(samples.count("framegate_dead_letters", ""), 0);
    assert_eq!(samples.count("framegate_frames_dropped_total", ""), 0);
}

// ---- metrics

#[test]
fn promtool_finds_nothing_wrong_and_every_metric_of_the_design_is_there() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby \"1\"", "UTC", "");
    let mut daemon = site.run();
    let directory = site.drop_dir("Lobby \"1\"");
    engine.script([Action::status(503), Action::CutAfter]);
    // Not one of the first: they meet the script.
    engine.change(|faults| {
        faults.by_image.insert(hex(&hash(&image(20))), 400);
    });
    for n in 0..40 {
        put_face(&directory, n);
    }
    // It is the frame's own fault only when others are accepted after each of its refusals.
    let mut next = 40;
    eventually("the refused frame is a dead letter", PATIENCE, || {
        put_face(&directory, next);
        next += 1;
        (daemon.metrics().count("framegate_dead_letters", "") == 1).then_some(())
    });
    daemon.idle(PATIENCE);
    let (_, text) = daemon.get("/metrics").unwrap();
    for name in [
        "frames_received_total",
        "frames_published_total",
        "frames_dead_lettered_total",
        "frames_dropped_total",
        "frames_returned_total",
        "frames_pending",
        "frames_refused_total",
        "frames_in_flight",
        "published_bytes_total",
        "publish_attempts_total",
        "publish_retries_total",
        "publish_ambiguous_total",
        "publish_duration_seconds_bucket",
        "frame_delivery_seconds_bucket",
        "frame_age_seconds_bucket",
        "encode_duration_seconds_bucket",
        "memory_budget_bytes",
        "memory_in_use_bytes",
        "concurrency_limit",
        "rate_limited_seconds_total",
        "engine_state",
        "token_refreshes_total",
        "token_expiry_timestamp_seconds",
        "clock_skew_seconds",
        "detector_up",
        "detector_last_frame_timestamp_seconds",
        "watch_overflows_total",
        "rescans_total",
        "dead_letters",
        "dead_letter_bytes",
        "config_reloads_total",
        "config_last_reload_success_timestamp_seconds",
        "build_info",
    ] {
        let there = |line: &str| {
            line.strip_prefix("framegate_")
                .and_then(|it| it.strip_prefix(name))
                .is_some_and(|it| it.starts_with(['{', ' ']))
        };
        assert!(text.lines().any(there), "framegate_{name} is missing:\n{text}");
    }
    for name in ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"] {
        assert!(text.contains(&format!("\n{name} ")), "{name} is missing");
    }
    let samples = Samples::parse(&text);
    assert_eq!(samples.count("framegate_publish_ambiguous_total", ""), 1);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"rejected\""), 1);
    assert_eq!(samples.count("framegate_frames_published_total", ""), i64::try_from(next).unwrap() - 1);

    let promtool =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut promtool) = promtool else {
        skipped("promtool is not installed: the metrics were not checked by it");
        return;
    };
    promtool.stdin.take().expect("piped").write_all(text.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert!(checked.status.success(), "{}\n{text}", support_text(&checked));
}

// ---- what the tests above say for short

fn slow_engine() -> Arc<Engine> {
    Engine::with(|options| options.faults.latency = LATENCY)
}

fn site(engine: &Engine) -> Site {
    Site::new(&engine.base_url()).section(&format!("[publish]\nmax_in_flight = {MAX_IN_FLIGHT}"))
}

fn output(site: &Site, arguments: &[&str]) -> Output {
    site.command(arguments).output().expect("the binary starts")
}

/// What the command prints; it must succeed.
#[track_caller]
fn said(site: &Site, arguments: &[&str]) -> String {
    let output = output(site, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", support_text(&output));
    text(&output.stdout)
}

fn status(site: &Site) -> Value {
    serde_json::from_str(&said(site, &["status", "--json"])).expect("JSON")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn support_text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Frames that an ended daemon did not give back.
fn claims(site: &Site) -> Vec<PathBuf> {
    let hidden = |path: &Path| path.components().any(|part| part.as_os_str() == ".framegate");
    site.files_left().into_iter().filter(|path| hidden(path)).collect()
}

/// As in `/proc/<pid>/stat`: `T` is stopped.
fn state_of(daemon: &Daemon<'_>) -> char {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("it lives");
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).expect("a state")
}

fn monotonic_micros() -> u128 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u128::try_from(now.tv_sec).unwrap() * 1_000_000 + u128::try_from(now.tv_nsec).unwrap() / 1000
}

fn skipped(why: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {why}").expect("stderr");
}

fn hex(hash: &Hash) -> String {
    use std::fmt::Write as _;
    hash.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// `image`, a JPEG, with a comment that says `marker`.
fn marked(image: &[u8], marker: &str) -> Vec<u8> {
    let length = u16::try_from(marker.len() + 2).expect("a short comment").to_be_bytes();
    [&image[..2], &[0xff, 0xfe], &length[..], marker.as_bytes(), &image[2..]].concat()
}

/// A token as the engine makes them.
fn token_of(engine: &Engine) -> String {
    let body = serde_json::json!({ "username": USERNAME, "password": PASSWORD }).to_string();
    let mut stream = TcpStream::connect(engine.address()).unwrap();
    write!(
        stream,
        "POST /api/v1/authenticate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, json) = answer.split_once("\r\n\r\n").expect("a body");
    let json: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {answer}"));
    json["token"].as_str().expect("a token").to_owned()
}

/// A service manager that listens.
struct Manager {
    socket: UnixDatagram,
    dir: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, dir }
    }

    fn environment(&self, site: Site) -> Site {
        let path = self.dir.path().join("notify");
        site.environment("NOTIFY_SOCKET", path.to_str().expect("a plain path")).environment("WATCHDOG_USEC", "2000000")
    }

    fn heard(&self) -> Option<String> {
        let mut datagram = [0; 4096];
        let length = self.socket.recv(&mut datagram).ok()?;
        Some(text(&datagram[..length]))
    }

    fn forget(&self) {
        while self.heard().is_some() {}
    }

    /// Waits for such a message; those before it are forgotten.
    #[track_caller]
    fn hears(&self, what: &str, such: impl Fn(&str) -> bool) -> String {
        eventually(what, PATIENCE, || {
            while let Some(message) = self.heard() {
                if such(&message) {
                    return Some(message);
                }
            }
            None
        })
    }
}

#[test]
fn bad_frames_without_a_place_for_dead_letters_do_not_flood_the_log_and_are_kept_when_there_is_one() {
    const FRAMES: i64 = 100;
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let (place, away) = (site.dead_letters(), site.dead_letters().with_extension("away"));
    fs::rename(&place, &away).unwrap();
    fs::write(&place, "in the way").unwrap();
    let directory = site.drop_dir("Lobby");
    for n in 0..FRAMES {
        put(&directory, &format!("{n}.jpg"), format!("no image {n}").as_bytes());
    }
    eventually("each was tried twice", PATIENCE, || {
        let tried = daemon.metrics().count("framegate_settle_errors_total", "operation=\"dead-letter\"");
        (tried >= 2 * FRAMES).then_some(())
    });
    let warnings: Vec<String> = site.log().lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect();
    assert!((1..=10).contains(&warnings.len()), "{} lines: {warnings:#?}", warnings.len());
    assert!(warnings.iter().any(|line| line.contains("cannot keep a dead letter")), "{warnings:#?}");
    fs::remove_file(&place).unwrap();
    fs::rename(&away, &place).unwrap();
    eventually("all are dead letters", PATIENCE, || {
        (daemon.metrics().count("framegate_dead_letters", "") == FRAMES).then_some(())
    });
    daemon.idle(PATIENCE);
    assert!(daemon.stop().success());
}
