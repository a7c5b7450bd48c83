//! `framegate check`: reads the configuration and says what the daemon would do with it. Starts nothing, sends nothing.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use humantime::format_duration;

use crate::config::{self, Environment, Loaded, Settings};
use crate::source::directory::{self, AfterPublish, DetectTime, Watch};
use crate::source::{Entry, Order, spool};

/// `EX_CONFIG` of sysexits.h: systemd units can tell it from a crash.
pub(super) const EXIT_CONFIG: u8 = 78;

/// Checks the configuration at `path`.
pub(super) fn run(path: &Path) -> ExitCode {
    let loaded = config::load(path, &Environment::from_process());
    let written = match &loaded {
        Ok(loaded) => report(&mut io::stdout().lock(), path, loaded).map(|()| ExitCode::SUCCESS),
        Err(problems) => writeln!(io::stderr().lock(), "{problems}").map(|()| ExitCode::from(EXIT_CONFIG)),
    };
    written.unwrap_or_else(|error| match (&loaded, error.kind()) {
        // Whoever read it has seen enough (`| head`).
        (Ok(_), io::ErrorKind::BrokenPipe) => ExitCode::SUCCESS,
        (Err(_), io::ErrorKind::BrokenPipe) => ExitCode::from(EXIT_CONFIG),
        // Nobody is left to tell.
        (Ok(_) | Err(_), _) => ExitCode::FAILURE,
    })
}

/// Writes what was understood.
pub(super) fn report(out: &mut impl Write, path: &Path, loaded: &Loaded) -> io::Result<()> {
    let Loaded { settings, warnings } = loaded;
    engine(out, settings)?;
    limits(out, settings)?;
    places(out, settings)?;
    for entry in &settings.detectors {
        detector(out, entry)?;
    }
    for warning in warnings {
        writeln!(out, "warning: {warning}")?;
    }
    let (detectors, notes) = (counted(settings.detectors.len(), "detector"), counted(warnings.len(), "warning"));
    writeln!(out, "{} is valid: {detectors}, {notes}", path.display())
}

fn engine(out: &mut impl Write, settings: &Settings) -> io::Result<()> {
    let engine = &settings.engine;
    writeln!(out, "engine {}", engine.base_url)?;
    let tls = if engine.base_url.starts_with("http:") {
        "none: plain http".to_owned()
    } else if engine.danger_accept_invalid_certs {
        "any certificate is accepted (dangerous)".to_owned()
    } else if !engine.pin_sha256.is_empty() {
        format!("only {}", counted(engine.pin_sha256.len(), "pinned public key"))
    } else if let Some(file) = &engine.ca_file {
        format!("certificates of the CA in {}", settings.secret_path(file).display())
    } else {
        "certificates that this system trusts".to_owned()
    };
    writeln!(out, "  tls        {tls}")?;
    match (&engine.username, &engine.password_file, &engine.token_file) {
        (_, _, Some(file)) => writeln!(out, "  account    a ready token in {}", settings.secret_path(file).display())?,
        (Some(name), Some(file), None) => {
            writeln!(out, "  account    {name}, password in {}", settings.secret_path(file).display())?;
        }
        (None, _, None) | (Some(_), None, None) => writeln!(out, "  account    none")?,
    }
    if engine.proxy.is_some() {
        writeln!(out, "  proxy      yes")?;
    }
    let (timeout, connect) = (format_duration(engine.timeout), format_duration(engine.connect_timeout));
    let version = if engine.http2 { "HTTP/2" } else { "HTTP/1.1" };
    writeln!(out, "  attempt    up to {timeout}, {connect} of them to connect, {version}")
}

fn limits(out: &mut impl Write, settings: &Settings) -> io::Result<()> {
    let (publish, encode) = (&settings.publish, &settings.encode);
    writeln!(out, "publishing")?;
    let rate = per_second(publish.rate);
    writeln!(out, "  rate       {rate}, at most {} at a time", publish.max_in_flight)?;
    let (min, max) = (format_duration(publish.backoff_min), format_duration(publish.backoff_max));
    writeln!(
        out,
        "  retries    {min} to {max} apart, up to {} attempts while the engine takes others",
        publish.attempts
    )?;
    let workers =
        if encode.workers == 0 { "one encode thread per CPU".into() } else { counted(encode.workers, "encode thread") };
    writeln!(out, "  memory     {} for images and bodies, frames up to {}, {workers}", encode.memory, encode.max_frame)
}

fn places(out: &mut impl Write, settings: &Settings) -> io::Result<()> {
    let dead = &settings.dead_letter;
    let (directory, age) = (dead.directory.display(), kept(dead.max_age));
    writeln!(out, "dead letters in {directory}, up to {}, {age}", dead.max_size)?;
    if settings.detectors.iter().any(spool::serves) {
        let spool = &settings.spool;
        writeln!(out, "spool in {}, up to {}", spool.directory.display(), spool.max_size)?;
    }
    if let Some(listen) = &settings.push.listen {
        let tls = if settings.push.tls_cert_file.is_some() { "tls" } else { "no tls" };
        let account = settings.push.username.as_deref().map_or("no account".to_owned(), |it| format!("account {it}"));
        writeln!(out, "frames are pushed to {listen}, {tls}, {account}")?;
    }
    writeln!(out, "admin on {}, control socket {}", settings.admin.listen, settings.admin.control.display())?;
    writeln!(out, "stops within {}", format_duration(settings.shutdown.deadline))
}

fn detector(out: &mut impl Write, entry: &Entry) -> io::Result<()> {
    writeln!(out, "detector {}", entry.name)?;
    if let Some(config) = entry.directory() {
        drop_directory(out, config, &entry.time_zone)?;
    } else {
        let mut lines = entry.source.describe().into_iter();
        writeln!(out, "  {:<10} {}", entry.source.key(), lines.next().unwrap_or_else(|| entry.place()))?;
        for line in lines {
            writeln!(out, "  {:<10} {line}", "")?;
        }
        writeln!(out, "  zone       {}, where a frame does not say", entry.time_zone)?;
    }
    let order = match entry.order {
        Order::FreshestFirst => "freshest first",
        Order::OldestFirst => "oldest first",
    };
    let age = if entry.max_age == Duration::ZERO {
        "never too old".to_owned()
    } else {
        format!("dropped when older than {}", format_duration(entry.max_age))
    };
    writeln!(out, "  order      {order}, {age}, {}, weight {}", per_second(entry.rate), entry.weight)?;
    match entry.silence_alarm {
        Some(after) => writeln!(out, "  alarm      after {} without a frame", format_duration(after)),
        None => Ok(()),
    }
}

fn drop_directory(out: &mut impl Write, config: &directory::Config, zone: &str) -> io::Result<()> {
    let depth = if config.recursive { "with sub-directories" } else { "without sub-directories" };
    writeln!(out, "  directory  {} {depth}, files {}", config.path.display(), config.include.join(" "))?;
    writeln!(out, "  zone       {zone}, {}", time_from(&config.detect_time))?;
    writeln!(
        out,
        "  complete   when renamed in, or unchanged for {}; given up after {}",
        format_duration(config.quiet),
        format_duration(config.partial_timeout)
    )?;
    writeln!(out, "  noticed    {}, full scan every {}", watch(config.watch), format_duration(config.rescan))?;
    writeln!(out, "  published  {}", afterwards(config))
}

fn time_from(detect_time: &DetectTime) -> String {
    match detect_time {
        DetectTime::Modified => "detection time from the file's modification".into(),
        DetectTime::Arrival => "detection time is the arrival".into(),
        DetectTime::Exif => "detection time from EXIF".into(),
        DetectTime::Name(by) => format!("detection time from the name by {} as {}", by.name, by.format),
    }
}

fn watch(watch: Watch) -> &'static str {
    match watch {
        Watch::Auto => "by inotify where it works, else by polling",
        Watch::Inotify => "by inotify",
        Watch::Poll => "by polling",
    }
}

fn afterwards(directory: &directory::Config) -> String {
    let file = match (directory.after_publish, &directory.archive) {
        (AfterPublish::Archive, Some(archive)) => {
            format!("files are moved to {}, {}", archive.display(), kept(directory.archive_max_age))
        }
        (AfterPublish::Archive | AfterPublish::Delete, _) => "files are deleted".into(),
    };
    if directory.remove_empty_directories { format!("{file}, empty sub-directories removed") } else { file }
}

fn kept(max_age: Duration) -> String {
    if max_age == Duration::ZERO { "kept for ever".into() } else { format!("kept {}", format_duration(max_age)) }
}

fn per_second(rate: f64) -> String {
    if rate > 0.0 { format!("{rate} attempts per second") } else { "no rate limit".into() }
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_says_what_it_understood() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples/ftp-cameras.toml");
        let loaded = config::load(&file, &Environment::default()).unwrap();
        let mut out = Vec::new();
        report(&mut out, &file, &loaded).unwrap();
        let out = String::from_utf8(out).unwrap();
        for part in [
            "engine https://customer.econnectcloud.com/identities\n",
            "account    edge-07, password in ",
            "rate       50 attempts per second",
            "detector {path.0}\n",
            "directory  /srv/ftp with sub-directories",
            "dropped when older than 1day",
            "is valid: 1 detector, 1 warning\n",
        ] {
            assert!(out.contains(part), "{part}\n{out}");
        }
    }
}
