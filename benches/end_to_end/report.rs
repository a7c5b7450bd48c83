//! The results: medians, a table for people, JSON with the machine's description.

use std::fs;
use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::case::{Against, Case, Feed};
use crate::measure::Measures;

/// A measure, the head of its column, and its digits behind the point.
type Column = (&'static str, &'static str, usize);

const COMPARED: &[Column] = &[
    ("throughput_ratio", "speed/base", 2),
    ("cpu_ratio", "CPU/base", 2),
    ("frames_per_second", "frames/s", 0),
    ("base_frames_per_second", "base", 0),
    ("cpu_user_micros", "user µs", 1),
    ("cpu_system_micros", "system µs", 1),
    ("base_cpu_user_micros", "base user", 1),
    ("base_cpu_system_micros", "base sys", 1),
    ("peak_mib", "peak MiB", 0),
    ("first_publish_seconds", "first s", 3),
    ("of_theory", "of theory", 3),
    ("reached_seconds", "reached s", 2),
];
const STEADY: &[Column] = &[
    ("p50_ms", "p50 ms", 2),
    ("p99_ms", "p99 ms", 2),
    ("p999_ms", "p99.9 ms", 2),
    ("worst_ms", "worst ms", 2),
    ("frames_per_second", "frames/s", 0),
    ("cpu_user_micros", "user µs", 1),
    ("cpu_system_micros", "system µs", 1),
    ("peak_mib", "peak MiB", 0),
];
const ALONE: &[Column] =
    &[("frames_per_second", "frames/s", 0), ("cpu_user_micros", "user µs", 1), ("cpu_system_micros", "system µs", 1)];
const IDLE: &[Column] =
    &[("ready_ms", "ready ms", 0), ("idle_cpu_percent", "CPU %", 2), ("resident_mib", "resident MiB", 1)];

/// What is wanted of some cases, all that begin so.
const GOALS: &[(&str, &str, Goal)] = &[
    ("http-40k", "throughput_ratio", Goal::AtLeast(0.8)),
    ("http-40k", "cpu_ratio", Goal::AtMost(1.5)),
    ("tls-40k", "throughput_ratio", Goal::AtLeast(0.8)),
    ("tls-40k", "cpu_ratio", Goal::AtMost(1.5)),
    ("", "beyond_budget_mib", Goal::AtMost(64.0)),
    ("steady-renamed", "p50_ms", Goal::AtMost(2.0)),
    ("steady-renamed", "p99_ms", Goal::AtMost(10.0)),
    ("steady-closed", "p50_ms", Goal::AtMost(2.0)),
    ("steady-closed", "p99_ms", Goal::AtMost(10.0)),
    ("latency-50ms", "of_theory", Goal::AtLeast(0.9)),
    ("latency-50ms", "reached_seconds", Goal::AtMost(10.0)),
    ("million", "first_publish_seconds", Goal::AtMost(1.0)),
    ("million", "peak_mib", Goal::AtMost(150.0)),
    ("million", "cpu_ratio", Goal::AtMost(1.3)),
    ("idle", "ready_ms", Goal::AtMost(200.0)),
    ("idle", "idle_cpu_percent", Goal::AtMost(0.5)),
    ("idle", "resident_mib", Goal::AtMost(30.0)),
];

#[derive(Clone, Copy)]
enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Goal::AtLeast(least) => value >= least,
            Goal::AtMost(most) => value <= most,
        }
    }

    fn describe(self) -> String {
        match self {
            Goal::AtLeast(least) => format!("at least {least}"),
            Goal::AtMost(most) => format!("at most {most}"),
        }
    }
}

/// One case's figures.
pub(crate) struct Outcome {
    pub case: Case,
    pub rounds: usize,
    pub medians: Measures,
}

/// Each measure's median over the rounds that have it.
pub(crate) fn medians(rounds: &[Measures]) -> Measures {
    let names = rounds.iter().flat_map(Measures::keys);
    let median = |name: &String| {
        let mut all: Vec<f64> = rounds.iter().filter_map(|round| round.get(name).copied()).collect();
        all.sort_by(f64::total_cmp);
        (name.clone(), all[all.len() / 2])
    };
    names.map(median).collect()
}

/// Writes one case's row; its heads before it where they are not those of the row before.
#[derive(Default)]
pub(crate) struct Table {
    heads: Option<&'static [Column]>,
}

impl Table {
    pub(crate) fn row(&mut self, outcome: &Outcome) {
        let columns = match (outcome.case.feed, outcome.case.against) {
            (Feed::None, _) => IDLE,
            (Feed::Renamed | Feed::Closed, _) => STEADY,
            (Feed::Backlog(_) | Feed::Thousands, Against::Nothing) => ALONE,
            (Feed::Backlog(_) | Feed::Thousands, Against::Roofline | Against::OneDetector | Against::ThousandFiles) => {
                COMPARED
            }
        };
        if self.heads.is_none_or(|heads| !std::ptr::eq(heads, columns)) {
            self.heads = Some(columns);
            let heads: Vec<String> = columns.iter().map(|(_, head, _)| format!("{head:>10}")).collect();
            println!("\n{:<18}{}", "case", heads.join(" "));
        }
        let cells: Vec<String> = columns
            .iter()
            .map(|(name, _, digits)| match outcome.medians.get(*name) {
                Some(value) => format!("{value:>10.digits$}"),
                None => format!("{:>10}", "-"),
            })
            .collect();
        println!("{:<18}{}", outcome.case.name, cells.join(" "));
    }
}

/// Which goals were met, for people; the same for JSON.
pub(crate) fn goals(outcomes: &[Outcome]) -> Vec<Value> {
    let mut all = Vec::new();
    println!();
    for Outcome { case, medians, .. } in outcomes {
        for (which, name, goal) in GOALS {
            let Some(value) = medians.get(*name).filter(|_| case.name.starts_with(which)) else { continue };
            let met = goal.is_met(*value);
            if !which.is_empty() || !met {
                let said = if met { "met" } else { "MISSED" };
                println!("{said:<7} {:<18} {name} is {value:.3}, wanted {}", case.name, goal.describe());
            }
            all.push(
                json!({ "case": case.name, "measure": name, "value": value, "wanted": goal.describe(), "met": met }),
            );
        }
    }
    all
}

/// Everything, for programs.
pub(crate) fn json(machine: &Value, outcomes: &[Outcome], goals: &[Value]) -> Value {
    let cases: Vec<Value> = outcomes
        .iter()
        .map(|Outcome { case, rounds, medians }| {
            json!({
                "name": case.name, "about": case.about, "tls": case.tls, "kib": case.kib, "detectors": case.detectors,
                "latency_ms": case.latency.as_millis(), "frames": case.frames, "rounds": rounds, "medians": medians,
            })
        })
        .collect();
    json!({ "bench": "end_to_end", "machine": machine, "cases": cases, "goals": goals })
}

/// Where this was measured.
pub(crate) fn machine(directory: &Path) -> Value {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|it| it.1);
    let rustc = Command::new("rustc").arg("--version").output().map(|it| it.stdout).unwrap_or_default();
    json!({
        "cpu": model.unwrap_or("unknown"),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "file_system": file_system(directory, &read("/proc/mounts")),
        "rustc": String::from_utf8_lossy(&rustc).trim(),
        "load_at_start": read("/proc/loadavg").split_whitespace().next(),
        "date": Timestamp::now().to_string(),
    })
}

/// The type of the mount with the longest path that leads to the directory.
fn file_system(directory: &Path, mounts: &str) -> Option<String> {
    let directory = directory.canonicalize().ok()?;
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next().filter(|at| directory.starts_with(at))?.to_owned();
        Some((at.len(), fields.next()?.to_owned()))
    };
    mounts.lines().filter_map(mount).max().map(|(_, kind)| kind)
}
