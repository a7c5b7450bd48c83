//! `framegate dead-letter list|show|retry|purge`: works on the directory itself, with or without a daemon.
//!
//! Nothing is published here: `retry` puts dead letters in a line that the daemon empties, now or when it starts.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::Timestamp;

use crate::config::Settings;
use crate::control::{self, Request};
use crate::frame::FrameId;
use crate::settle::Reason;
use crate::settle::dead_letter::{DeadLetter, Filter, Listed, Retried, Store, shown};

/// Looks at, retries or removes frames that could not be published.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do with dead letters.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists them, the oldest first
    List {
        /// Which.
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Shows one as JSON
    Show {
        /// As in the list
        #[arg(value_parser = id)]
        id: FrameId,
        /// Also writes the image to this file, which must not exist
        #[arg(long, value_name = "FILE")]
        image: Option<PathBuf>,
    },
    /// Sends them to be published again by the daemon, now or when it starts
    Retry {
        /// Which.
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(long)]
        all: bool,
    },
    /// Removes them for good
    Purge {
        /// Which.
        #[command(flatten)]
        which: Which,
        /// All of them
        #[arg(long)]
        all: bool,
        /// Does not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Which dead letters: those that fit all that is given.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Which {
    /// As in the list
    #[arg(value_name = "ID", value_parser = id)]
    pub ids: Vec<FrameId>,
    /// Died for this reason
    #[arg(long, value_parser = reason)]
    pub reason: Option<Reason>,
    /// Of exactly this detector
    #[arg(long, value_name = "NAME")]
    pub detector: Option<String>,
    /// Died longer ago than this, such as 2h or 3d
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub older_than: Option<Duration>,
    /// Died less long ago than this
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub newer_than: Option<Duration>,
}

/// Does it with the dead letters in `dead_letter.directory`. A running daemon is told where some have gone, for its metrics.
pub(super) fn run(args: &Args, settings: &Settings) -> anyhow::Result<ExitCode> {
    let directory = &settings.dead_letter.directory;
    let input = io::stdin();
    let asks = input.is_terminal();
    let mut terminal = Terminal { output: &mut io::stdout().lock(), input: asks.then(|| input.lock()) };
    let max_frame = settings.encode.max_frame.as_u64();
    let done = act(&args.command, &Store::at(directory), max_frame, &mut terminal);
    if matches!(args.command, Command::Retry { .. } | Command::Purge { .. })
        && let Err(error) = control::ask(&settings.admin.control, &Request::CountDeadLetters)
    {
        // Nobody's count can be wrong, or it is right again within a minute.
        tracing::debug!("no daemon was told: {error:#}");
    }
    match done {
        // `| head` has seen enough.
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(ExitCode::SUCCESS)
        }
        done => done.with_context(|| format!("dead letters in {}", directory.display())),
    }
}

struct Terminal<'a, W, R> {
    output: &'a mut W,
    /// Somebody who can be asked.
    input: Option<R>,
}

fn act<W: Write, R: io::BufRead>(
    command: &Command,
    store: &Store,
    max_frame: u64,
    terminal: &mut Terminal<'_, W, R>,
) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { which, json } => list(store, which, *json, terminal.output),
        Command::Show { id, image } => show(store, id, image.as_deref(), terminal.output),
        Command::Retry { which, all } => {
            which.chosen(*all)?;
            retry(store, which, max_frame, terminal.output)
        }
        Command::Purge { which, all, yes } => {
            which.chosen(*all)?;
            purge(store, which, *yes, terminal)
        }
    }
}

fn list(store: &Store, which: &Which, json: bool, output: &mut impl Write) -> anyhow::Result<ExitCode> {
    let mut empty = true;
    for listed in store.list(which.filter())? {
        if !json && empty {
            writeln!(
                output,
                "{:26}  {:20}  {:14}  {:>6}  {:20}  MESSAGE",
                "ID", "DIED", "REASON", "STATUS", "DETECTOR"
            )?;
        }
        empty = false;
        match (json, &listed) {
            (true, Listed::Sound(letter)) => writeln!(output, "{}", serde_json::to_string(letter)?)?,
            (true, Listed::Damaged { id, problem }) => {
                writeln!(output, "{}", serde_json::json!({ "id": id.as_str(), "damaged": problem }))?;
            }
            (false, Listed::Sound(letter)) => row(letter, output)?,
            (false, Listed::Damaged { id, problem }) => {
                writeln!(output, "{id}  {:20}  {:14}  {:>6}  {:20}  {problem}", "-", "damaged", "-", "-")?;
            }
        }
    }
    if empty && !json {
        writeln!(output, "No dead letters{}.", if which.is_all() { "" } else { " that fit" })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(letter: &DeadLetter, output: &mut impl Write) -> io::Result<()> {
    let status = letter.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    writeln!(
        output,
        "{}  {:.0}  {:14}  {status:>6}  {:20}  {}",
        letter.id,
        letter.died_at,
        letter.reason.as_str(),
        shown(letter.detector.as_ref()),
        shown(letter.message.as_ref()),
    )
}

fn show(store: &Store, id: &FrameId, image: Option<&Path>, output: &mut impl Write) -> anyhow::Result<ExitCode> {
    match store.show(id) {
        Some(Listed::Sound(letter)) => writeln!(output, "{}", serde_json::to_string_pretty(&letter)?)?,
        Some(Listed::Damaged { problem, .. }) => writeln!(output, "{id} is damaged: {problem}")?,
        None => bail!("{id}: there is no such dead letter; `framegate dead-letter list` shows those there are"),
    }
    if let Some(path) = image {
        let bytes = store.image(id).with_context(|| format!("{id}: its image cannot be read"))?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(&bytes))
            .with_context(|| format!("{}: cannot be written; name a file that does not exist", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Damaged ones are named and left: there is nothing whole to publish. So are those that `encode.max_frame` keeps out.
fn retry(store: &Store, which: &Which, max_frame: u64, output: &mut impl Write) -> anyhow::Result<ExitCode> {
    let mut code = which.unknown(store, output)?;
    let line = store.retry_line();
    let mut moved = 0u64;
    for listed in store.list(which.filter())? {
        let id = listed.id();
        // One whose image is in the line already looks damaged, but is a retry that was interrupted: it goes on.
        if let Listed::Damaged { problem, .. } = &listed
            && !line.has_image(id)
        {
            code = ExitCode::FAILURE;
            writeln!(output, "{id}: left alone, it is damaged: {problem}")?;
            continue;
        }
        if let Listed::Sound(letter) = &listed
            && letter.image_bytes > max_frame
        {
            code = ExitCode::FAILURE;
            let size = letter.image_bytes;
            writeln!(output, "{id}: left alone, its {size} bytes are more than encode.max_frame ({max_frame})")?;
            continue;
        }
        match store.retry(id).with_context(|| format!("{id}: cannot be retried"))? {
            Retried::Moved => moved += 1,
            // Somebody else was quicker.
            Retried::Unknown => {}
            Retried::Waiting => {
                code = ExitCode::FAILURE;
                writeln!(output, "{id}: is being retried already; try again in a moment")?;
            }
        }
    }
    writeln!(output, "{moved} in line to be published by the daemon, now or when it starts.")?;
    Ok(code)
}

fn purge<W: Write, R: io::BufRead>(
    store: &Store,
    which: &Which,
    yes: bool,
    terminal: &mut Terminal<'_, W, R>,
) -> anyhow::Result<ExitCode> {
    let code = which.unknown(store, terminal.output)?;
    let ids: Vec<FrameId> = store.list(which.filter())?.map(|listed| listed.id().clone()).collect();
    if !yes && !ids.is_empty() {
        let Some(input) = &mut terminal.input else {
            bail!("{} would be removed for good, and nobody can be asked here: say --yes", ids.len());
        };
        write!(terminal.output, "Remove {} for good? [y/N] ", ids.len())?;
        terminal.output.flush()?;
        let mut answer = String::new();
        input.read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            writeln!(terminal.output, "Nothing removed.")?;
            return Ok(ExitCode::FAILURE);
        }
    }
    let mut removed = 0u64;
    for id in &ids {
        removed += u64::from(store.remove(id).with_context(|| format!("{id}: cannot be removed"))?);
    }
    writeln!(terminal.output, "{removed} removed.")?;
    Ok(code)
}

impl Which {
    fn is_all(&self) -> bool {
        self.filter() == Filter::default()
    }

    /// Everything must be asked for in so many words.
    fn chosen(&self, all: bool) -> anyhow::Result<()> {
        match (all, self.is_all()) {
            (false, true) => bail!("say which: ids, --reason, --detector, --older-than, --newer-than, or --all"),
            (true, false) => bail!("--all means all of them: leave out the ids and filters, or --all"),
            (true, true) | (false, false) => Ok(()),
        }
    }

    fn filter(&self) -> Filter {
        // Longer ago than time itself: nothing died before that, and everything after.
        let ago = |age: Duration| Timestamp::now().checked_sub(age).unwrap_or(Timestamp::MIN);
        Filter {
            ids: self.ids.clone(),
            reason: self.reason,
            detector: self.detector.clone(),
            before: self.older_than.map(ago),
            after: self.newer_than.map(ago),
        }
    }

    /// Names the ids that there are not.
    fn unknown(&self, store: &Store, output: &mut impl Write) -> io::Result<ExitCode> {
        let mut code = ExitCode::SUCCESS;
        for id in self.ids.iter().filter(|id| store.show(id).is_none()) {
            code = ExitCode::FAILURE;
            writeln!(output, "{id}: there is no such dead letter")?;
        }
        Ok(code)
    }
}

fn id(text: &str) -> Result<FrameId, String> {
    FrameId::parse(text).ok_or_else(|| "not an id: those are 26 characters of 0-9 and a-z".to_owned())
}

fn reason(text: &str) -> Result<Reason, String> {
    Reason::parse(text).ok_or_else(|| format!("one of {}", Reason::ALL.map(Reason::as_str).join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settle::dead_letter::tests::{frame, open, refusal};
    use clap::Parser as _;

    const MAX_FRAME: u64 = 1000;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    /// What the command prints, and whether it succeeds.
    fn said(directory: &Path, words: &[&str], answer: Option<&str>) -> (String, bool) {
        let cli = match Cli::try_parse_from([&["dead-letter"], words].concat()) {
            Ok(cli) => cli,
            Err(e) => return (e.to_string(), false),
        };
        let mut output = Vec::new();
        let mut terminal = Terminal { output: &mut output, input: answer.map(str::as_bytes) };
        let done = act(&cli.args.command, &Store::at(directory), MAX_FRAME, &mut terminal);
        let text = String::from_utf8(output).unwrap();
        match done {
            Ok(code) => (text, code == ExitCode::SUCCESS),
            Err(e) => (format!("{text}{e:#}"), false),
        }
    }

    fn kept(directory: &Path, reason: Reason) -> String {
        let frame = frame();
        open(directory).0.keep(&frame, b"abc", &refusal(reason)).unwrap();
        frame.id.to_string()
    }

    #[test]
    fn list_and_show_tell_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(said(&dir.path().join("missing"), &["list"], None), ("No dead letters.\n".to_owned(), true));
        let id = kept(dir.path(), Reason::Rejected);
        kept(dir.path(), Reason::Truncated);
        let (text, ok) = said(dir.path(), &["list"], None);
        assert!(ok && text.lines().count() == 3 && text.contains(&id), "{text}");
        assert!(text.contains(r#"Front "Door""#) && text.contains("the engine said no"), "{text}");
        let (text, _) = said(dir.path(), &["list", "--json", "--reason", "rejected", "--newer-than", "1h"], None);
        let letter: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((letter["id"].as_str(), letter["status"].as_u64()), (Some(id.as_str()), Some(400)));
        assert_eq!(said(dir.path(), &["list", "--older-than", "1h"], None).0, "No dead letters that fit.\n");

        let image = dir.path().join("out.jpg");
        let (text, ok) = said(dir.path(), &["show", &id, "--image", image.to_str().unwrap()], None);
        assert!(ok && text.contains("\"reason\": \"rejected\""), "{text}");
        assert_eq!(std::fs::read(&image).unwrap(), b"abc");
        assert!(!said(dir.path(), &["show", &id, "--image", image.to_str().unwrap()], None).1, "never overwritten");
    }

    #[test]
    fn hostile_ids_and_unknown_reasons_are_refused_before_anything_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        for words in
            [["show", "../../../etc/passwd"], ["retry", "/etc/passwd"], ["purge", "0123456789ABCDEFGHJKMNPQRS"]]
        {
            let (text, ok) = said(dir.path(), &words, None);
            assert!(!ok && text.contains("not an id"), "{text}");
        }
        let (text, ok) = said(dir.path(), &["list", "--reason", "because"], None);
        assert!(!ok && text.contains("too-large"), "{text}");
    }

    #[test]
    fn retry_and_purge_want_to_be_told_which() {
        let dir = tempfile::tempdir().unwrap();
        let id = kept(dir.path(), Reason::Rejected);
        for words in [&["retry"][..], &["purge", "--yes"], &["purge", "--yes", "--all", &id]] {
            let (text, ok) = said(dir.path(), words, None);
            assert!(!ok && text.contains("--all"), "{text}");
        }
        let unknown = FrameId::generate().to_string();
        let (text, ok) = said(dir.path(), &["retry", &unknown, &id], None);
        assert!(!ok && text.contains("no such dead letter") && text.contains("1 in line"), "{text}");
        assert_eq!(Store::at(dir.path()).retry_line().ids().unwrap().len(), 1);
    }

    #[test]
    fn one_that_is_too_large_is_not_retried() {
        let dir = tempfile::tempdir().unwrap();
        let frame = frame();
        let image = vec![0; usize::try_from(MAX_FRAME).unwrap() + 1];
        open(dir.path()).0.keep(&frame, &image, &refusal(Reason::TooLarge)).unwrap();
        let (text, ok) = said(dir.path(), &["retry", "--all"], None);
        assert!(!ok && text.contains("encode.max_frame") && text.contains("0 in line"), "{text}");
        assert_eq!(said(dir.path(), &["list"], None).0.lines().count(), 2);
    }

    #[test]
    fn a_damaged_one_is_not_retried() {
        let dir = tempfile::tempdir().unwrap();
        let id = kept(dir.path(), Reason::Rejected);
        std::fs::remove_file(dir.path().join(format!("{id}.image"))).unwrap();
        let (text, ok) = said(dir.path(), &["retry", "--all"], None);
        assert!(!ok && text.contains("damaged"), "{text}");
        assert!(said(dir.path(), &["list"], None).0.contains("damaged"));
    }

    #[test]
    fn purge_asks_and_refuses_where_nobody_can_be_asked() {
        let dir = tempfile::tempdir().unwrap();
        kept(dir.path(), Reason::Rejected);
        let (text, ok) = said(dir.path(), &["purge", "--all"], None);
        assert!(!ok && text.contains("--yes"), "{text}");
        assert!(!said(dir.path(), &["purge", "--all"], Some("\n")).1);
        assert_eq!(Store::at(dir.path()).ids().unwrap().len(), 1);
        assert!(said(dir.path(), &["purge", "--reason", "rejected"], Some("y\n")).1);
        assert_eq!(Store::at(dir.path()).ids().unwrap().len(), 0);
        assert_eq!(said(dir.path(), &["purge", "--all", "--yes"], None), ("0 removed.\n".to_owned(), true));
    }
}
