//! A steady feed for an hour or a day: memory and CPU time for each frame must stay what they were.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::case::{Against, CASES, Case, Feed};
use crate::measure::{drop_in, ready, sleep_until};
use crate::site::Site;

/// Frames that may be under way when the feed ends.
const PATIENCE: Duration = Duration::from_mins(1);
/// Memory that comes and goes, MiB: growth below it means nothing.
const MEMORY_SLACK_MIB: f64 = 8.0;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// How long each line of the report is about
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Frames/s
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// The last quarter may need so many times what the first one needed: memory, and CPU time for each frame
    #[arg(long, value_name = "FACTOR", default_value_t = 1.3)]
    grow_max: f64,
    /// Make the drop directory below this one
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    directory: PathBuf,
}

/// What one interval needed.
struct Interval {
    resident_mib: f64,
    cpu_micros: f64,
}

pub(crate) fn run(args: &Args) -> ExitCode {
    let runtime = crate::runtime();
    let case = Case { against: Against::Nothing, feed: Feed::Renamed, ..CASES[0] };
    let site = Site::new(&case, &args.directory, &runtime, false);
    let process = ready(&case, &site);
    let per_interval = frames(args.rate, args.interval);
    let intervals = args.duration.as_secs().div_ceil(args.interval.as_secs().max(1));
    println!("{:>10} {:>12} {:>14} {:>10}", "until s", "accepted", "resident MiB", "CPU µs");
    let begun = Instant::now();
    let mut all = Vec::new();
    for interval in 0..intervals {
        let before = process.cpu();
        let accepted_before = site.simulator.counts().accepted;
        for n in interval * per_interval..(interval + 1) * per_interval {
            sleep_until(begun + Duration::from_secs_f64(n as f64 / args.rate));
            drop_in(&site, case.feed, n, &site.image(n));
        }
        let accepted = site.simulator.counts().accepted;
        let cpu = process.cpu().since(before).total();
        let it = Interval {
            resident_mib: process.resident_mib(),
            cpu_micros: cpu.as_secs_f64() * 1e6 / (accepted - accepted_before).max(1) as f64,
        };
        println!(
            "{:>10.0} {accepted:>12} {:>14.1} {:>10.1}",
            begun.elapsed().as_secs_f64(),
            it.resident_mib,
            it.cpu_micros
        );
        all.push(it);
    }
    let fed = intervals * per_interval;
    let ended = Instant::now();
    while site.simulator.counts().accepted < fed && ended.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    verdict(args, &all, fed, site.simulator.counts().accepted)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of frames")]
fn frames(rate: f64, time: Duration) -> u64 {
    (rate * time.as_secs_f64()) as u64
}

fn verdict(args: &Args, all: &[Interval], fed: u64, accepted: u64) -> ExitCode {
    let quarter = (all.len() / 4).max(1);
    // The first interval has the start in it.
    let (first, last) = (&all[(all.len() > 4).into()..][..quarter], &all[all.len() - quarter..]);
    let memory = |of: &[Interval]| median(of.iter().map(|it| it.resident_mib));
    let cpu = |of: &[Interval]| median(of.iter().map(|it| it.cpu_micros));
    let (memory_before, memory_after, cpu_before, cpu_after) = (memory(first), memory(last), cpu(first), cpu(last));
    println!(
        "first quarter: {memory_before:.1} MiB, {cpu_before:.1} µs a frame; last: {memory_after:.1} MiB, {cpu_after:.1} µs"
    );
    let mut good = true;
    for (wrong, what) in [
        (memory_after > args.grow_max * memory_before + MEMORY_SLACK_MIB, "memory grew"),
        (cpu_after > args.grow_max * cpu_before, "frames became dearer"),
        (accepted != fed, "not every frame was accepted once"),
    ] {
        if wrong {
            println!("FAILED: {what} ({accepted} of {fed} frames accepted)");
            good = false;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}
