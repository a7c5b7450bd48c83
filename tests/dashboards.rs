//! What Prometheus and Grafana are given in `deploy/`: held to promtool, to the rules of a good dashboard, and to a real Prometheus
//! that scrapes a real daemon in trouble.
//!
//! Not here: whether the metrics they name exist (`docs`).

mod support;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use framegate::publish::State;
use serde_json::Value;

use support::engine::{Camera, Engine, image};
use support::faults::skipped;
use support::{Daemon, PATIENCE, Site, eventually, http_get, put};

/// For Prometheus to have seen every trouble of a daemon: each query needs two scrapes after its own.
const OBSERVED: Duration = Duration::from_mins(2);
/// What Grafana would make of `$__rate_interval`, with a scrape every second: four of them, and some more for a busy machine.
const RATE_INTERVAL: &str = "10s";

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).expect("a file of the repository")
}

// ---- rules, alerts

#[test]
fn promtool_finds_nothing_in_the_configuration_the_rules_and_their_tests() {
    for arguments in [
        ["check", "config", "deploy/prometheus/scrape.yml"],
        ["check", "rules", "deploy/prometheus/alerts.yml"],
        ["test", "rules", "tests/alerts_test.yml"],
    ] {
        let output = match Command::new("promtool").args(arguments).current_dir(repository("")).output() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return skipped("promtool on deploy/prometheus", "promtool is not installed (Debian: prometheus)");
            }
            output => output.expect("promtool runs"),
        };
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said));
    }
}

#[test]
fn each_alert_has_words_for_an_operator_and_is_tested_to_fire_and_not_to() {
    let rules = read("deploy/prometheus/alerts.yml");
    let tests = read("tests/alerts_test.yml");
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 10, "{} alerts", alerts.len());
    for alert in alerts {
        let name = alert.lines().next().expect("a name");
        for part in ["severity: ", "summary: ", "description: ", "runbook: "] {
            assert_eq!(alert.matches(part).count(), 1, "{name}: {part}");
        }
        let fires = format!("alertname=\"{name}\"");
        let groups: Vec<&str> = tests.split("\n  - name: ").filter(|group| group.contains(&fires)).collect();
        assert!(!groups.is_empty(), "{name} never fires in a test");
        assert!(groups.iter().all(|group| group.contains("exp_samples: []")), "{name} always fires in a test");
    }
}

#[test]
fn each_pause_of_the_engine_has_an_alert_and_a_colour() {
    let (rules, dashboard) = (read("deploy/prometheus/alerts.yml"), read("deploy/grafana/framegate.json"));
    for state in State::ALL {
        let state = state.as_str();
        assert!(dashboard.contains(&format!("\"options\": \"{state}\"")), "{state} has no colour");
        if state != State::Open.as_str() {
            let expression = format!("framegate_engine_state{{state=\"{state}\"}} == 1");
            assert_eq!(rules.matches(&expression).count(), 1, "{expression}");
        }
    }
}

#[test]
fn a_reload_changes_a_detectors_alarm_and_ends_that_of_a_removed_one() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Changes", "UTC", "silence_alarm = \"10m\"").detector(
        "Comes and goes",
        "UTC",
        "",
    );
    let daemon = site.run();
    let alarm = |detector: &str| daemon.metrics().sum("framegate_detector_silence_alarm_seconds", detector);
    let (changes, goes) = ("detector=\"Changes\"", "detector=\"Comes and goes\"");
    assert_eq!((alarm(changes), alarm(goes)), (600.0, f64::INFINITY));

    let config = fs::read_to_string(site.config()).expect("the configuration");
    let (rest, _) = config.split_once("[[detectors]]\nname = \"Comes and goes\"").expect("the second entry");
    fs::write(site.config(), rest.replace("\"10m\"", "\"1h\"")).expect("the configuration can be written");
    daemon.hang_up();
    eventually("the changed detector has its new alarm, the removed one none", PATIENCE, || {
        ((alarm(changes), alarm(goes)) == (3600.0, 0.0)).then_some(())
    });

    fs::write(site.config(), &config).expect("the configuration can be written");
    daemon.hang_up();
    eventually("both are as they were", PATIENCE, || {
        ((alarm(changes), alarm(goes)) == (600.0, f64::INFINITY)).then_some(())
    });
}

// ---- the dashboard

#[test]
fn the_dashboard_keeps_the_rules_that_operators_rely_on() {
    let dashboard = Dashboard::read();
    let mut ids = BTreeSet::new();
    for panel in dashboard.panels() {
        let title = panel["title"].as_str().expect("a title");
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}: its id is taken");
        if panel["type"] == "row" {
            continue;
        }
        assert!(!panel["description"].as_str().unwrap_or_default().is_empty(), "{title}: no description");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}: no unit");
        assert!(!panel["targets"].as_array().expect("targets").is_empty(), "{title}: no query");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        // The quantile of nothing is NaN, and would be shown as that.
        let of_nothing = panel["type"] == "stat" && panel["targets"].to_string().contains("histogram_quantile(");
        let mappings = panel["fieldConfig"]["defaults"]["mappings"].to_string();
        assert!(!of_nothing || mappings.contains("\"match\":\"null+nan\""), "{title}: no words for NaN");
    }
    for (title, query) in dashboard.queries() {
        assert!(query.contains("job=~\"$job\",instance=~\"$instance\""), "{title}: {query}");
        for window in query.split('[').skip(1) {
            assert!(window.starts_with("$__rate_interval]"), "{title}: {query}");
        }
        for (at, _) in query.match_indices("_total{") {
            let call = query[..at].rfind("framegate_").or_else(|| query[..at].rfind("process_")).map(|at| &query[..at]);
            assert!(call.is_some_and(|call| call.ends_with("rate(")), "{title}: a counter as it is: {query}");
        }
    }
    for name in ["datasource", "job", "instance", "detector"] {
        let variable = dashboard.variable(name);
        if name != "datasource" {
            assert_eq!((&variable["multi"], &variable["includeAll"]), (&true.into(), &true.into()), "{name}");
            assert_eq!((&variable["allValue"], &variable["refresh"]), (&".+".into(), &2.into()), "{name}");
        }
    }
}

/// The dashboard as Grafana reads it.
struct Dashboard(Value);

impl Dashboard {
    fn read() -> Self {
        Self(serde_json::from_str(&read("deploy/grafana/framegate.json")).expect("a dashboard is JSON"))
    }

    fn panels(&self) -> &[Value] {
        self.0["panels"].as_array().expect("panels")
    }

    /// The expressions of panels and annotations, with the titles.
    fn queries(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let targets = self.panels().iter().flat_map(|panel| {
            let targets = panel["targets"].as_array().into_iter().flatten();
            targets.filter_map(move |target| Some((text(&panel["title"])?, text(&target["expr"])?)))
        });
        let annotations = self.0["annotations"]["list"].as_array().into_iter().flatten();
        let annotations = annotations.filter_map(|it| Some((text(&it["name"])?, text(&it["expr"])?)));
        let queries: Vec<_> = targets.chain(annotations).collect();
        assert!(queries.len() > 20, "{} queries", queries.len());
        queries
    }

    fn variable(&self, name: &str) -> &Value {
        let mut variables = self.0["templating"]["list"].as_array().into_iter().flatten();
        variables.find(|variable| variable["name"] == name).expect("the variable")
    }
}

#[test]
fn every_metric_of_ours_is_on_a_panel() {
    let (table, dashboard) = (read("src/metrics.rs"), read("deploy/grafana/framegate.json"));
    let (_, table) = table.split_once("const TABLE").expect("the table");
    let (table, _) = table.split_once("\n];").expect("its end");
    let names = table.split('(').filter_map(|row| row.trim_start().strip_prefix('"')?.split('"').next());
    // How often the disk is asked says nothing but beside what a benchmark asks of it.
    let names: Vec<&str> = names.filter(|name| *name != "spool_syncs_total").collect();
    assert!(names.len() > 40, "{names:?}");
    let missing = names.iter().filter(|name| !dashboard.contains(&format!("framegate_{name}")));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&&str>::new(), "on no panel");
}

#[test]
fn the_files_that_compose_mounts_are_there() {
    let compose = read("deploy/compose.yaml");
    let mounts: Vec<&str> = compose.lines().filter_map(|line| line.trim().strip_prefix("- ./")).collect();
    assert_eq!(mounts.len(), 3, "{mounts:?}");
    for mount in mounts {
        let path = mount.split(':').next().expect("a path");
        assert!(repository("deploy").join(path).exists(), "deploy/{path}");
    }
    let provider = read("deploy/grafana/provisioning/dashboards/framegate.yaml");
    let path = provider.split_once("path: ").expect("a path").1.trim();
    assert!(compose.contains(&format!(":{path}/framegate.json:ro")), "the provider looks into {path}");
    let source = read("deploy/grafana/provisioning/datasources/prometheus.yaml");
    let address = source.split_once("url: http://").expect("an address").1.lines().next().expect("a line");
    assert!(compose.contains(&format!("--web.listen-address={address}")), "Grafana asks {address}");
}

// ---- both, on real data

#[test]
fn every_query_and_every_rule_works_in_a_real_prometheus_that_scrapes_a_daemon_in_trouble() {
    let engine = Engine::with(|options| {
        options.faults.error_rate = 0.2;
        options.faults.cut_after = 0.1;
        options.faults.refuse_share = 0.1;
        options.faults.token_ttl = Duration::from_secs(20);
    });
    let site = Site::new(&engine.base_url());
    let (socket, spool) = (site.path().join("push.sock"), site.path().join("spool"));
    let network =
        format!("[push]\nlisten = \"unix:{}\"\n[spool]\ndirectory = \"{}\"", socket.display(), spool.display());
    let site = site
        .section(&format!("[publish]\nmax_in_flight = 4\nbackoff_max = \"400ms\"\n{network}"))
        .fed("Turnstile", "UTC", "push = {}")
        .detector("Lobby", "UTC", "")
        .detector("Say \"A\", twice", "UTC", "")
        .detector("Silent", "UTC", "silence_alarm = \"2s\"");
    let mut daemon = site.run();
    let Some(prometheus) = Prometheus::start(&site, &daemon) else {
        return skipped("the dashboard on a real Prometheus", "prometheus is not installed");
    };
    put(&site.drop_dir("Lobby"), "rubbish.jpg", b"this is not an image");
    symlink("/etc/hostname", site.drop_dir("Lobby").join("link.jpg")).expect("a link can be made");
    engine.down();
    let directories = vec![site.drop_dir("Lobby"), site.drop_dir("Say \"A\", twice")];
    let camera = Camera::start(std::slice::from_ref(&engine), directories, 60);
    eventually("an outage is seen", OBSERVED, || {
        prometheus.answers("framegate_engine_state{state=\"unreachable\"} == 1").then_some(())
    });
    engine.up();

    let mut silent = Dashboard::read().queries();
    // What changes the configuration soon after the start counts as the start; here it must not take that long.
    for (_, query) in &mut silent {
        *query = expanded(query).replace("< 10", "< 2");
    }
    eventually_none_is_silent(&prometheus, &daemon, &socket, &mut silent);

    let alerts = eventually("the silent detector is noticed", OBSERVED, || {
        let alerts = prometheus.get("/api/v1/alerts");
        alerts.to_string().contains("\"alertname\":\"FramegateDetectorSilent\"").then_some(alerts)
    });
    for alert in alerts["data"]["alerts"].as_array().expect("alerts") {
        assert!(!alert["annotations"].to_string().contains("error expanding"), "{alert}");
        assert!(alert["labels"]["alertname"] != "FramegateDetectorSilent" || alert["labels"]["detector"] == "Silent");
    }
    for group in prometheus.get("/api/v1/rules")["data"]["groups"].as_array().expect("groups of rules") {
        for rule in group["rules"].as_array().expect("rules") {
            assert_eq!(rule["health"], "ok", "{rule}");
        }
    }

    camera.finish();
    engine.change(|faults| {
        faults.error_rate = 0.0;
        faults.cut_after = 0.0;
        // A frame that is refused is at fault once another has been accepted after it; there will be no other any more.
        faults.refuse_share = 0.0;
    });
    fs::remove_file(site.drop_dir("Lobby").join("link.jpg")).expect("the link is left alone");
    daemon.idle(PATIENCE);
    eventually("the equation holds in Prometheus too", PATIENCE, || {
        let unaccounted = prometheus.query("framegate:frames_unaccounted");
        let detectors = unaccounted.as_array().expect("a vector");
        (detectors.len() == 4 && detectors.iter().all(|it| it["value"][1] == "0")).then_some(())
    });
}

/// Reloads and pushes now and then, and asks until each query has given data at least once.
#[track_caller]
fn eventually_none_is_silent(
    prometheus: &Prometheus,
    daemon: &Daemon<'_>,
    socket: &Path,
    silent: &mut Vec<(String, String)>,
) {
    let begun = Instant::now();
    // Faces that the camera has not.
    for face in u64::from(u32::MAX).. {
        if silent.is_empty() {
            break;
        }
        assert!(begun.elapsed() < OBSERVED, "these panels stay empty: {silent:#?}");
        daemon.hang_up();
        push(socket, &image(face));
        silent.retain(|(_, query)| !prometheus.answers(query));
        let scrapes = prometheus.scrapes();
        eventually("another scrape", PATIENCE, || (prometheus.scrapes() > scrapes).then_some(()));
    }
}

#[track_caller]
fn push(socket: &Path, image: &[u8]) {
    let mut stream = UnixStream::connect(socket).expect("the daemon listens");
    let head = format!("POST /frames/Turnstile HTTP/1.0\r\nHost: box\r\nContent-Length: {}\r\n\r\n", image.len());
    stream.write_all(&[head.as_bytes(), image].concat()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

/// The query as Grafana sends it when everything is selected.
fn expanded(query: &str) -> String {
    let mut query = query.replace("$__rate_interval", RATE_INTERVAL);
    for variable in ["job", "instance", "detector"] {
        query = query.replace(&format!("${variable}"), ".+");
    }
    assert!(!query.contains('$'), "a variable that nobody sets: {query}");
    query
}

/// A real one with our rules, scraping one daemon every second. Dropped, it is killed.
struct Prometheus {
    child: Child,
    address: String,
}

impl Prometheus {
    /// `None` where it is not installed.
    fn start(site: &Site, daemon: &Daemon<'_>) -> Option<Self> {
        let dir = site.path().join("prometheus");
        fs::create_dir_all(&dir).expect("a directory can be made");
        fs::copy(repository("deploy/prometheus/alerts.yml"), dir.join("alerts.yml")).expect("the rules can be copied");
        let (config, log) = (dir.join("scrape.yml"), dir.join("log"));
        let ours = read("deploy/prometheus/scrape.yml");
        let theirs =
            ours.replace("127.0.0.1:9464", daemon.admin()).replace("scrape_interval: 15s", "scrape_interval: 1s");
        let mut file = File::create(&config).expect("a file can be made");
        write!(file, "global: {{ evaluation_interval: 1s }}\n{theirs}").expect("it can be written");
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg("--web.listen-address=127.0.0.1:0");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).expect("a file can be made"));
        let child = match command.spawn() {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            child => child.expect("prometheus starts"),
        };
        // It is killed also if it never says where it listens.
        let mut prometheus = Self { child, address: String::new() };
        prometheus.address = eventually("prometheus says where it listens", PATIENCE, || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let line = text.lines().find(|line| line.contains("msg=\"Listening on\""))?;
            Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned())
        });
        eventually("prometheus has scraped", PATIENCE, || (prometheus.scrapes() > 0).then_some(()));
        Some(prometheus)
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        // 503: it listens and is not ready yet.
        let answer = || http_get(&self.address, path).ok().filter(|(status, _)| *status != 503);
        let (_, body) = eventually("prometheus answers", PATIENCE, answer);
        serde_json::from_str(&body).unwrap_or_else(|_| panic!("{path}: {body}"))
    }

    /// What an instant query gives now.
    #[track_caller]
    fn query(&self, query: &str) -> Value {
        let mut encoded = String::new();
        for byte in query.bytes() {
            write!(encoded, "%{byte:02X}").expect("a string takes everything");
        }
        let answer = self.get(&format!("/api/v1/query?query={encoded}"));
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].clone()
    }

    /// Whether it gives at least one number.
    #[track_caller]
    fn answers(&self, query: &str) -> bool {
        self.query(query).as_array().expect("a vector").iter().any(|it| it["value"][1] != "NaN")
    }

    fn scrapes(&self) -> usize {
        let count = self.query("count_over_time(up{job=\"framegate\"}[1h])");
        count[0]["value"][1].as_str().and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}
