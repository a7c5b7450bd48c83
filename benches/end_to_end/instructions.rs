//! Instructions for each frame, counted by callgrind: steadier than time on a busy box. The kernel's are not among them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::case::{CASES, Case};
use crate::measure::fill;
use crate::process::Process;
use crate::site::Site;

/// Callgrind is some fifty times slower than the machine.
const RUN_MAX: Duration = Duration::from_mins(5);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A case with a backlog
    #[arg(long = "case", value_name = "NAME", default_value = "http-40k")]
    case: String,
    /// Runs of so many frames and of twice as many are subtracted, so that starting and ending do not count
    #[arg(long, default_value_t = 500)]
    frames: u64,
    /// Make the drop directory below this one
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    directory: PathBuf,
    /// Keep what callgrind wrote of the longer runs in this directory, for `callgrind_annotate`
    #[arg(long, value_name = "DIRECTORY")]
    keep: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) {
    let case = CASES.into_iter().find(|case| case.name == args.case).expect("--list says which cases there are");
    let runtime = crate::runtime();
    let (base, subject) = case.sides();
    let mut counts = Vec::new();
    for side in base.into_iter().chain([subject]) {
        let once = count(&side, args, &runtime, args.frames);
        let twice = count(&side, args, &runtime, 2 * args.frames);
        let each = twice.saturating_sub(once) as f64 / args.frames as f64;
        println!("{:<10} {each:>12.0} instructions a frame", format!("{:?}", side.worker).to_lowercase());
        counts.push(each);
    }
    if let [base, subject] = counts[..] {
        println!("{:<10} {:>12.2}", "ratio", subject / base);
    }
}

fn count(side: &Case, args: &Args, runtime: &Runtime, frames: u64) -> u64 {
    let site = Site::new(side, &args.directory, runtime, false);
    fill(&site, frames);
    let worker = site.command(side.worker);
    let out = match &args.keep {
        Some(directory) => directory.join(format!("callgrind.{:?}.{frames}", side.worker).to_lowercase()),
        None => site.path("callgrind"),
    };
    let mut callgrind = Command::new("valgrind");
    callgrind.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", out.display()));
    let process = Process::start(callgrind.arg(worker.get_program()).args(worker.get_args()));
    let done = site.simulator.wait_for(|counts| counts.accepted >= frames, RUN_MAX);
    runtime.block_on(done).expect("all frames are published in time");
    process.end();
    collected(&out)
}

/// The sum at the end of what callgrind wrote.
fn collected(out: &Path) -> u64 {
    let text = fs::read_to_string(out).expect("callgrind wrote it");
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a sum");
    total.trim().parse().expect("a number")
}
