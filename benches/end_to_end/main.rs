//! From a drop directory to the engine: the daemon against a *roofline*, in turns, on the same files, over a matrix of cases.
//!
//! The daemon and what it is measured against are processes of their own, built alike; their CPU time and peak memory are each
//! one's own. The engine is in this process, a new one for each run. Everything shares the box, so mostly the ratios mean
//! something: medians of the rounds, each of which is one run of both.
#![expect(clippy::print_stdout, reason = "the result")]

mod case;
#[path = "../support/frame.rs"]
mod frame;
mod instructions;
mod measure;
#[path = "../support/process.rs"]
mod process;
mod report;
mod roofline;
mod site;
mod soak;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser as _;

use crate::case::{CASES, Case, Feed, HEADLINE, Worker};
use crate::measure::Place;
use crate::report::{Outcome, Table};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// No round of a case begins later than this.
const BEGIN_UNTIL: Duration = Duration::from_mins(4);

/// Measures the daemon against the least code that does its work. Without a choice of cases: the headline, in about three minutes.
#[derive(clap::Parser)]
#[command(name = "end_to_end", args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
    /// Cargo says so
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(clap::Args)]
struct Run {
    /// A case, or the beginning of several; may be given several times
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Every case but `million`
    #[arg(long)]
    all: bool,
    /// Say which cases there are
    #[arg(long)]
    list: bool,
    /// Rounds of each case; each is a run of both sides
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Frames of each run, instead of the case's own
    #[arg(long)]
    frames: Option<u64>,
    /// Files that wait where more wait than are published: `million`
    #[arg(long)]
    waiting: Option<u64>,
    /// Frames/s of steady feeds
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Make the drop directories below this one
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    directory: PathBuf,
    /// Write everything here, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Publish with the least code: what the daemon is measured against
    #[command(hide = true)]
    Roofline(roofline::Args),
    /// Instructions for each frame, by callgrind (apt-get install valgrind), instead of time
    Instructions(instructions::Args),
    /// A steady feed for long, watched for growth; exits with 1 if there is any
    Soak(soak::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    match &args.command {
        Some(Command::Roofline(args)) => roofline::run(args),
        Some(Command::Instructions(args)) => instructions::run(args),
        Some(Command::Soak(args)) => return soak::run(args),
        None if args.run.list => {
            for case in CASES {
                println!("{:<18} {}", case.name, case.about);
            }
        }
        None => compare(&args.run),
    }
    ExitCode::SUCCESS
}

fn compare(args: &Run) {
    let machine = report::machine(&args.directory);
    println!("{machine:#}");
    let runtime = runtime();
    let place = Place { parent: &args.directory, runtime: &runtime, rate: args.rate };
    let (mut table, mut outcomes) = (Table::default(), Vec::new());
    for case in chosen(args) {
        if case.worker == Worker::Curl && !has_curl() {
            println!("\n{:<18} SKIPPED: no curl", case.name);
            continue;
        }
        let outcome = run(case, &place, args.rounds);
        table.row(&outcome);
        outcomes.push(outcome);
    }
    let goals = report::goals(&outcomes);
    if let Some(file) = &args.json {
        let json = report::json(&machine, &outcomes, &goals);
        fs::write(file, format!("{json:#}\n")).expect("the file can be written");
    }
}

fn run(case: Case, place: &Place<'_>, rounds: u32) -> Outcome {
    let begun = Instant::now();
    let mut all = Vec::new();
    for round in 0..rounds {
        if round == 0 || begun.elapsed() < BEGIN_UNTIL {
            all.push(measure::round(&case, place, round % 2 == 0));
        }
    }
    Outcome { case, rounds: all.len(), medians: report::medians(&all) }
}

fn chosen(args: &Run) -> Vec<Case> {
    let wanted = |case: &Case| match &args.cases[..] {
        [] if args.all => case.name != "million",
        [] => HEADLINE.contains(&case.name),
        names => names.iter().any(|name| case.name.starts_with(name)),
    };
    let mut cases: Vec<Case> = CASES.into_iter().filter(wanted).collect();
    assert!(!cases.is_empty(), "no case is called {:?}; --list says which there are", args.cases);
    for case in &mut cases {
        if let (true, Some(frames)) = (case.feed != Feed::None, args.frames) {
            case.frames = frames;
        }
        if let (Feed::Backlog(Some(waiting)), Some(files)) = (&mut case.feed, args.waiting) {
            *waiting = files;
        }
    }
    cases
}

/// As `framegate simulate-engine` has it.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime")
}

fn has_curl() -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|at| at.join("curl").is_file()))
}
