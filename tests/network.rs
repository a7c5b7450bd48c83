//! The network between Framegate and the engine, and the box's clock, in every trouble: through the real binary. FAULTS.md, those rows
//! of sections A and C that `delivery` leaves out.
//!
//! What needs packets to vanish, a narrow line, name servers or fixed ports runs in a network of its own: see [`own_network`].

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use support::engine::{Camera, Engine, nothing_lost};
use support::network::{Names, Says, own_network};
use support::{Daemon, PATIENCE, Samples, Site, eventually};

// ---- connections

#[test]
fn c18_a_name_that_moves_is_followed_under_load_and_one_that_is_gone_pauses_without_loss() {
    const OLD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
    const NEW: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
    if !own_network("c18_a_name_that_moves_is_followed_under_load_and_one_that_is_gone_pauses_without_loss") {
        return;
    }
    let old = Engine::with(|options| options.listen = SocketAddr::from((OLD, 0)));
    let port = old.address().port();
    let new = Engine::with(|options| options.listen = SocketAddr::from((NEW, port)));
    let engines = [old.clone(), new.clone()];
    // With one attempt at a time there is one connection, and it is never idle.
    let site = Site::new(&format!("http://engine.test:{port}"))
        .section("[publish]\nmax_in_flight = 1\nbackoff_max = \"1s\"")
        .detector("Lobby", "UTC", "");
    let names = Names::start(Says::Address(OLD), site.path());
    let mut daemon = site.run();
    let camera = Camera::start(&engines, vec![site.drop_dir("Lobby")], 20);
    old.until_accepted(100);

    // The old engine goes on answering: only the connections' age makes them move.
    names.say(Says::Address(NEW));
    eventually("the new engine has everything", 4 * PATIENCE, || {
        (new.counts().accepted > 100 && old.counts().open == 0).then_some(())
    });

    for (says, heals) in [
        (Says::NoSuchName, OLD),
        (Says::ServerFailure, NEW),
        (Says::Nothing, OLD),
        (Says::Late(OLD, Duration::from_secs(5)), NEW),
    ] {
        names.say(says);
        for engine in &engines {
            engine.cut_connections();
        }
        until_state(&daemon, "unreachable");
        let asked = names.asked();
        for_a_while(Duration::from_secs(4));
        let asked = names.asked() - asked;
        assert!(asked <= 60, "{says:?}: {asked} questions in four seconds");
        names.say(Says::Address(heals));
        let accepted = || engines.iter().map(|engine| engine.counts().accepted).sum::<u64>();
        let before = accepted();
        eventually("frames flow again", PATIENCE, || (accepted() > before + 50).then_some(()));
    }
    let written = camera.finish();
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&old, &new], &written);
    assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

// ---- what the tests above say for short

#[track_caller]
fn until_state(daemon: &Daemon<'_>, state: &str) {
    eventually(&format!("the engine's state is {state}"), PATIENCE, || {
        (daemon.metrics().count("framegate_engine_state", &format!("state=\"{state}\"")) == 1).then_some(())
    });
}

fn for_a_while(time: Duration) {
    let begun = Instant::now();
    eventually("a while is over", PATIENCE, || (begun.elapsed() >= time).then_some(()));
}

fn ambiguous(samples: &Samples) -> u64 {
    u64::try_from(samples.count("framegate_publish_ambiguous_total", "")).expect("a count")
}
