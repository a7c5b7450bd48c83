//! The commands. Each has a file of its own; this one says what there are and how each ends.

mod check;
mod dead_letter;
mod demo;
mod doctor;
mod publish;
mod run;
mod simulate_engine;
mod spool;
mod status;
mod top;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::{self, Environment, Loaded};
use crate::control::{self, Request};
use crate::log;
use crate::publish as engine;

/// Threads that may block at once: scans, settling, the spool, dead letters. With tokio's own 512 as many directories are
/// scanned at once at the start, each on a thread with memory of its own; with few, dead shares would keep all from working.
const BLOCKING_THREADS_MAX: usize = 64;

const EXAMPLES: &str = "\
Examples:
  framegate demo                          see all of it work, without credentials
  framegate check                         read the configuration and say what it means
  framegate run                           the daemon, in the foreground
  framegate status                        how the running daemon is doing
  framegate top                           the same, live
  framegate doctor                        what is wrong on this box, and what mends it
  framegate publish --detector Lobby a.jpg photos/   publish these by hand
  framegate dead-letter list              what the engine would not take, and why";

const RUN_EXAMPLES: &str = "\
Examples:
  framegate run                              on the installed configuration
  framegate run --config framegate.toml
  kill -HUP PID                              as `framegate reload`, without an answer

SIGTERM lets what is in flight settle until shutdown.deadline and gives the rest back; a second one ends at once.
Exit code 0 after a clean stop, 78 if the configuration is wrong, 1 otherwise.";

const CHECK_EXAMPLES: &str = "\
Examples:
  framegate check                            the installed configuration
  framegate check --config framegate.toml

Connects to nothing and touches nothing. Exit code 78 if anything is wrong.";

const RELOAD_EXAMPLES: &str = "\
Examples:
  framegate check && framegate reload        detectors that did not change are not disturbed
  systemctl reload framegate                 the same

The daemon reads the file that it was started with; --config only says where the daemon is found.
Exit code 1 if it is refused; then the old configuration goes on.";

const DEAD_LETTER_EXAMPLES: &str = "\
Examples:
  framegate dead-letter list
  framegate dead-letter list --reason rejected --detector Lobby --json
  framegate dead-letter show ID --image face.jpg
  framegate dead-letter retry --reason forbidden   after the permission was given
  framegate dead-letter purge --older-than 30d

They work with and without a running daemon. Exit code 1 if nothing fits or something failed.";

const SPOOL_EXAMPLES: &str = "\
Examples:
  framegate spool list
  framegate spool purge --detector Lobby --older-than 2h

They work with and without a running daemon; what it has in hand is left. Exit code 1 if something failed.";

const PIN_EXAMPLES: &str = "\
Examples:
  framegate pin https://10.0.0.123:5009      compare the key with the engine's own before you trust it";

const SCHEMA_EXAMPLES: &str = "\
Examples:
  framegate schema > framegate.schema.json   for editors that complete and check TOML
  framegate schema | jq '.[\"$defs\"] | keys'";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  framegate completions bash > /usr/share/bash-completion/completions/framegate
  framegate completions zsh > /usr/share/zsh/vendor-completions/_framegate
  framegate completions fish > /usr/share/fish/vendor_completions.d/framegate.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  framegate man | man -l -
  framegate man --directory /usr/share/man/man1";

/// Publishes face images from drop directories and frame queues to the eConnect Identities engine without losing one.
#[derive(Debug, Parser)]
#[command(name = "framegate", version, about, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the configuration is.
#[derive(Debug, clap::Args)]
struct ConfigArgs {
    /// The configuration file; `conf.d/*.toml` beside it and FRAMEGATE_… variables are read after it
    // Global: also behind `dead-letter list`, where people write it.
    #[arg(long, short, value_name = "FILE", default_value = "/etc/framegate/framegate.toml", global = true)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::doc_markdown, reason = "--help shows these lines as they are")]
enum Command {
    /// Run the daemon in the foreground
    #[command(after_help = RUN_EXAMPLES)]
    Run(ConfigArgs),
    /// Read the configuration and say what it would do
    #[command(after_help = CHECK_EXAMPLES)]
    Check(ConfigArgs),
    /// Make the running daemon take its new configuration, or say why not
    #[command(after_help = RELOAD_EXAMPLES)]
    Reload(ConfigArgs),
    /// Show how the running daemon is doing
    Status(status::Args),
    /// Watch the running daemon live in the terminal
    Top(top::Args),
    /// On site: look at everything that goes wrong there, and say what to do
    Doctor(doctor::Args),
    /// Publish files or directories by hand, and exit
    Publish(publish::Args),
    /// Look at, retry or remove frames that could not be published
    #[command(after_help = DEAD_LETTER_EXAMPLES)]
    DeadLetter(DeadLetterArgs),
    /// Look at or remove pushed and MQTT frames that wait in the spool
    #[command(after_help = SPOOL_EXAMPLES)]
    Spool(SpoolArgs),
    /// Show all of it at work on this machine, without credentials
    Demo(demo::Args),
    /// Run the stand-in engine alone
    SimulateEngine(Box<simulate_engine::Args>),
    /// Print the public-key pin of an engine's certificate, for engine.pin_sha256
    #[command(after_help = PIN_EXAMPLES)]
    Pin {
        /// The engine's address, for example https://10.0.0.123:5009
        url: String,
    },
    /// Print the JSON schema of the configuration
    #[command(after_help = SCHEMA_EXAMPLES)]
    Schema,
    /// Print completions for a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the man page
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// Write a page for each command into this directory instead, which must exist
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct SpoolArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    args: spool::Args,
}

#[derive(Debug, clap::Args)]
struct DeadLetterArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    args: dead_letter::Args,
}

impl Cli {
    /// Runs the command and says how it ended.
    pub fn run(self) -> ExitCode {
        match self.command.run() {
            Ok(code) => code,
            // Nobody reads any more (`framegate … | head`): not an error worth words.
            Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
            Err(error) => {
                drop(writeln!(io::stderr(), "{}", log::complaint(&format!("framegate: {error:#}"))));
                ExitCode::FAILURE
            }
        }
    }
}

impl Command {
    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Command::Run(args) => run::run(&args.config),
            Command::Check(args) => Ok(check::run(&args.config)),
            Command::Reload(args) => reload(&args),
            Command::Status(args) => status::run(&args),
            Command::Top(args) => top::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Publish(args) => publish::run(&args),
            Command::DeadLetter(DeadLetterArgs { config, args }) => match load(&config.config) {
                Ok(loaded) => dead_letter::run(&args, &loaded.settings),
                Err(code) => Ok(code),
            },
            Command::Spool(SpoolArgs { config, args }) => match load(&config.config) {
                Ok(loaded) => spool::run(&args, &loaded.settings),
                Err(code) => Ok(code),
            },
            Command::Demo(args) => demo::run(&args),
            Command::SimulateEngine(args) => runtime()?.block_on(simulate_engine::run(*args)),
            Command::Pin { url } => pin(&url),
            Command::Schema => print(&format!("{:#}\n", config::schema())),
            Command::Completions { shell } => completions(shell),
            Command::Man { directory: Some(directory) } => man_pages(&directory),
            Command::Man { directory: None } => man(),
        }
    }
}

/// Reads the configuration; problems are printed, all of them, and the exit code is theirs.
fn load(path: &std::path::Path) -> Result<Loaded, ExitCode> {
    config::load(path, &Environment::from_process()).map_err(|problems| {
        drop(writeln!(io::stderr(), "{}", log::complaint(&problems.to_string())));
        ExitCode::from(check::EXIT_CONFIG)
    })
}

/// Whether colours may be added to what words say.
fn colours_wanted() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|it| it.is_empty())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build();
    runtime.context("cannot start the async runtime")
}

fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// The daemon reads the configuration, and refuses it if it is wrong: so its log and its metrics tell of that too.
fn reload(args: &ConfigArgs) -> anyhow::Result<ExitCode> {
    let Some(socket) = config::control_socket(&args.config, &Environment::from_process()) else {
        // Said by whoever cannot read it.
        drop(load(&args.config));
        return Ok(ExitCode::FAILURE);
    };
    let answer = control::ask(&socket, &Request::Reload)?;
    if !answer.ok {
        anyhow::bail!("the new configuration is refused, the old one goes on:\n{}", answer.message);
    }
    print(&format!("{}\n", answer.message))
}

fn pin(url: &str) -> anyhow::Result<ExitCode> {
    let report = runtime()?.block_on(engine::tls::fetch_pin(url))?;
    let ends = report.not_after.map_or_else(|| "?".into(), |at| at.strftime("%F").to_string());
    // Comments in TOML, so that all of it can be pasted.
    let (subject, issuer) = (report.subject.escape_debug(), report.issuer.escape_debug());
    print(&format!(
        "# {url}: \"{subject}\", issued by \"{issuer}\", valid until {ends}\npin_sha256 = [\"{}\"]\n",
        report.pin_sha256
    ))
}

fn completions(shell: Shell) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "framegate", &mut text);
    print(&String::from_utf8_lossy(&text))
}

fn man() -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    let command = Cli::command();
    clap_mangen::Man::new(command.clone()).render(&mut text)?;
    for sub in command.get_subcommands() {
        let name = format!("framegate-{}", sub.get_name());
        clap_mangen::Man::new(sub.clone().name(name.leak() as &'static str)).render(&mut text)?;
    }
    print(&String::from_utf8_lossy(&text))
}

fn man_pages(directory: &std::path::Path) -> anyhow::Result<ExitCode> {
    clap_mangen::generate_to(Cli::command(), directory)
        .with_context(|| format!("cannot write man pages into {}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
