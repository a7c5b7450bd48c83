//! `framegate simulate-engine`: the stand-in engine alone, until Ctrl-C. Not a part of the daemon.

use std::io::{IsTerminal as _, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use crate::simulator::{Certificate, Counts, Faults, Options, Redirect, Simulator};

/// How often the counts are shown on a terminal.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// A stand-in for the engine, strict and with faults to order.
#[derive(Clone, Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of a command line")]
#[command(after_help = "\
Examples:
  framegate simulate-engine
  framegate simulate-engine --listen 127.0.0.1:5009 --tls --ca-file engine-ca.pem
  framegate simulate-engine --error-rate 0.3 --error-status 500,503 --latency 20ms --jitter 10ms
  framegate simulate-engine --capacity 8 --token-ttl 30s --cut-after 0.01

While it runs (same address; anyone who reaches it may use it):
  curl ADDRESS/__simulator/counts
  curl ADDRESS/__simulator/accepted
  curl -X PUT ADDRESS/__simulator/faults -d '{\"error_rate\":0.5,\"latency\":\"20ms\"}'
  curl -X POST ADDRESS/__simulator/revoke-tokens   (also: cut-connections, hold, release)
  curl -X POST ADDRESS/__simulator/script -d '[\"hang\",\"cut-after\",{\"answer\":{\"status\":429,\"headers\":[[\"Retry-After\",\"7\"]]}}]'")]
pub(super) struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:6009")]
    listen: SocketAddr,
    /// The only user
    #[arg(long, default_value = "framegate")]
    username: String,
    /// Its password
    #[arg(long, default_value = "simulated")]
    password: String,
    /// Serve TLS with a certificate made on the spot
    #[arg(long)]
    tls: bool,
    /// Which certificate to show
    #[arg(long, value_enum, default_value = "good", requires = "tls")]
    certificate: Certificate,
    /// Write the certificate to trust here; otherwise into a temporary file
    #[arg(long, value_name = "FILE", requires = "tls")]
    ca_file: Option<PathBuf>,
    /// HTTP/1.1 only
    #[arg(long)]
    no_http2: bool,
    /// Close HTTP/1.1 connections that have no request for this long
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = humantime::parse_duration)]
    idle: Duration,
    /// Path prefix, as /identities
    #[arg(long, value_name = "PATH", default_value = "", value_parser = prefix)]
    prefix: String,
    /// Share of publish requests answered with an error
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    error_rate: f64,
    /// The statuses of those errors
    #[arg(long, value_name = "STATUS", value_delimiter = ',', default_value = "500,502,503", value_parser = status)]
    error_status: Vec<u16>,
    /// Retry-After of every injected error
    #[arg(long, value_name = "TEXT")]
    retry_after: Option<String>,
    /// Time each publish request takes
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// And up to this much more
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    jitter: Duration,
    /// Publish requests served at once; 503 beyond it
    #[arg(long, value_name = "N")]
    capacity: Option<usize>,
    /// Publish requests per second; 429 beyond it
    #[arg(long, value_name = "N", value_parser = rate)]
    rate: Option<f64>,
    /// Life of a token
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    token_ttl: Duration,
    /// Refuse this detector with 403; may be given several times
    #[arg(long, value_name = "NAME")]
    forbid_detector: Vec<String>,
    /// Share of images always refused with 400
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    refuse_share: f64,
    /// Answer everything with 200 and a page, as a captive portal
    #[arg(long)]
    portal: bool,
    /// Redirect everything there with 302
    #[arg(long, value_name = "URL")]
    redirect: Option<String>,
    /// Share of publish requests cut before they are read
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    cut_before: f64,
    /// Share of frames taken and cut before the answer
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    cut_after: f64,
    /// Share of publish requests never answered
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    hang_share: f64,
    /// Accept anything as an image
    #[arg(long)]
    any_bytes: bool,
    /// Do not remember accepted frames (faster)
    #[arg(long)]
    forget: bool,
    /// Decides what chance does
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs it until Ctrl-C or SIGTERM.
pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let ca_file = args.ca_file.clone();
    let simulator = Simulator::start(options(args)).await.context("starting the simulated engine")?;
    let ca = simulator.ca_pem().map(|pem| CaFile::write(&pem, ca_file)).transpose()?;
    let mut out = std::io::stdout();
    introduce(&mut out.lock(), &simulator, ca.as_ref().map(CaFile::path)).context("writing to standard output")?;
    let live = out.is_terminal();
    let mut ticks = interval(SHOW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut before = Counts::default();
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = ticks.tick(), if live => {
                let now = simulator.counts();
                write!(out, "\r{}\x1b[K", line(&now, &before)).and_then(|()| out.flush()).context("writing the counts")?;
                before = now;
            }
        }
    }
    let counts = simulator.counts();
    simulator.stop().await;
    conclude(&mut out.lock(), &counts, live).context("writing to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: Args) -> Options {
    Options {
        listen: args.listen,
        prefix: args.prefix,
        username: args.username,
        password: args.password,
        tls: args.tls.then_some(args.certificate),
        http2: !args.no_http2,
        idle: args.idle,
        images_only: !args.any_bytes,
        keep: !args.forget,
        control: true,
        seed: args.seed,
        faults: Faults {
            error_rate: args.error_rate,
            error_statuses: args.error_status,
            retry_after: args.retry_after,
            latency: args.latency,
            jitter: args.jitter,
            capacity: args.capacity,
            rate: args.rate,
            token_ttl: args.token_ttl,
            by_detector: args.forbid_detector.into_iter().map(|name| (name, 403)).collect(),
            refuse_share: args.refuse_share,
            portal: args.portal,
            redirect: args.redirect.map(|location| Redirect { status: 302, location }),
            cut_before: args.cut_before,
            cut_after: args.cut_after,
            hang: args.hang_share,
            ..Faults::default()
        },
    }
}

/// Where the certificate to trust lies; a temporary one goes with us.
enum CaFile {
    Given(PathBuf),
    Temporary(tempfile::NamedTempFile),
}

impl CaFile {
    fn write(pem: &str, path: Option<PathBuf>) -> anyhow::Result<Self> {
        if let Some(path) = path {
            std::fs::write(&path, pem).with_context(|| format!("writing {}", path.display()))?;
            return Ok(CaFile::Given(path));
        }
        let mut file = tempfile::Builder::new()
            .prefix("framegate-simulator-ca-")
            .suffix(".pem")
            .tempfile()
            .context("making a temporary file for the certificate")?;
        file.write_all(pem.as_bytes()).context("writing the certificate to a temporary file")?;
        Ok(CaFile::Temporary(file))
    }

    fn path(&self) -> &std::path::Path {
        match self {
            CaFile::Given(path) => path,
            CaFile::Temporary(file) => file.path(),
        }
    }
}

fn introduce(out: &mut impl Write, simulator: &Simulator, ca: Option<&std::path::Path>) -> std::io::Result<()> {
    writeln!(out, "listening on {}", simulator.base_url())?;
    if let (Some(path), Some(pin)) = (ca, simulator.pin()) {
        writeln!(out, "certificate to trust: {}", path.display())?;
        writeln!(out, "public-key pin: {pin}")?;
    }
    writeln!(
        out,
        "\n# configuration for it; the password {} goes into the file engine-password",
        simulator.password()
    )?;
    writeln!(out, "[engine]")?;
    writeln!(out, "base_url = {}", toml::Value::from(simulator.base_url()))?;
    writeln!(out, "username = {}", toml::Value::from(simulator.username()))?;
    writeln!(out, "password_file = \"engine-password\"")?;
    if let Some(path) = ca {
        writeln!(out, "ca_file = {}", toml::Value::from(path.to_string_lossy().into_owned()))?;
    }
    writeln!(out)?;
    out.flush()
}

fn line(now: &Counts, before: &Counts) -> String {
    let errors: u64 = now.statuses.iter().filter(|(status, _)| **status >= 300).map(|(_, count)| count).sum();
    format!(
        "accepted {} ({}/s)  requests {}  in flight {}  errors {errors}  cut {}  logins {}  renewals {}  connections {}  violations {}",
        now.accepted,
        now.accepted - before.accepted,
        now.publish,
        now.in_flight,
        now.cut,
        now.authenticate,
        now.renew,
        now.connections,
        now.violations,
    )
}

fn conclude(out: &mut impl Write, counts: &Counts, live: bool) -> std::io::Result<()> {
    if live {
        writeln!(out)?;
    }
    writeln!(
        out,
        "accepted {} of {} publish requests, answers by status {:?}",
        counts.accepted, counts.publish, counts.statuses
    )?;
    for violation in &counts.violation_messages {
        writeln!(out, "violation: {violation}")?;
    }
    out.flush()
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        Ok(_) | Err(_) => Err("a share is a number from 0 to 1".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        Ok(_) | Err(_) => Err("a rate is a number above 0".into()),
    }
}

fn status(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(status) if (300..=599).contains(&status) => Ok(status),
        Ok(_) | Err(_) => Err("an error status is a number from 300 to 599".into()),
    }
}

fn prefix(text: &str) -> Result<String, String> {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-_.~".contains(&b));
    let shape = text.is_empty() || (text.starts_with('/') && !text.ends_with('/'));
    if plain && shape { Ok(text.to_owned()) } else { Err("a prefix looks like /identities".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Line::try_parse_from(line.split_whitespace()).map(|line| line.args)
    }

    #[test]
    fn every_fault_has_its_option() {
        let line = "x --listen 127.0.0.1:0 --tls --prefix /identities --error-rate 0.3 --error-status 500,503 \
            --retry-after 7 --latency 20ms --jitter 5ms --capacity 8 --rate 100 --token-ttl 4s --forbid-detector A \
            --forbid-detector B --refuse-share 0.01 --portal --redirect http://x/ --cut-before 0.1 --cut-after 0.2 \
            --hang-share 0.3 --seed 9 --no-http2 --any-bytes --forget --username u --password p --certificate expired";
        let options = options(parse(line).expect("good"));
        let expected = Faults {
            error_rate: 0.3,
            error_statuses: vec![500, 503],
            retry_after: Some("7".into()),
            latency: Duration::from_millis(20),
            jitter: Duration::from_millis(5),
            capacity: Some(8),
            rate: Some(100.0),
            token_ttl: Duration::from_secs(4),
            by_detector: [("A".to_owned(), 403), ("B".to_owned(), 403)].into(),
            refuse_share: 0.01,
            portal: true,
            redirect: Some(Redirect { status: 302, location: "http://x/".into() }),
            cut_before: 0.1,
            cut_after: 0.2,
            hang: 0.3,
            ..Faults::default()
        };
        assert_eq!(options.faults, expected);
        assert_eq!((options.tls, options.http2, options.images_only), (Some(Certificate::Expired), false, false));
        assert_eq!((options.keep, options.control, options.seed), (false, true, 9));
        assert_eq!((&*options.username, &*options.password, &*options.prefix), ("u", "p", "/identities"));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "x --error-rate 1.5",
            "x --error-rate NaN",
            "x --error-status 200",
            "x --rate 0",
            "x --prefix identities",
            "x --prefix /identities/",
            "x --ca-file a.pem",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[tokio::test]
    async fn the_introduction_is_a_working_configuration() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("ca.pem");
        let mut options = options(parse("x --listen 127.0.0.1:0 --tls").expect("good"));
        options.username = "an \"odd\" näme".into();
        let simulator = Simulator::start(options).await.expect("start");
        let ca = CaFile::write(&simulator.ca_pem().expect("TLS"), Some(file.clone())).expect("written");
        let mut out = Vec::new();
        introduce(&mut out, &simulator, Some(ca.path())).expect("introduced");
        let text = String::from_utf8(out).expect("text");
        let snippet: toml::Table = text.split_once("\n\n").expect("a snippet").1.parse().expect("TOML");
        assert_eq!(snippet["engine"]["base_url"].as_str(), Some(&*simulator.base_url()));
        assert_eq!(snippet["engine"]["username"].as_str(), Some(simulator.username()));
        assert_eq!(snippet["engine"]["ca_file"].as_str().map(PathBuf::from), Some(file));
        assert!(std::fs::read_to_string(ca.path()).expect("file").contains("BEGIN CERTIFICATE"));
    }

    #[test]
    fn the_live_line_shows_the_rate_and_the_end_shows_violations() {
        let before = Counts { accepted: 10, ..Counts::default() };
        let now = Counts { accepted: 25, statuses: [(200, 25), (503, 4)].into(), ..Counts::default() };
        assert!(line(&now, &before).starts_with("accepted 25 (15/s)") && line(&now, &before).contains("errors 4"));
        let counts = Counts { violation_messages: vec!["publish: no `authorization`".into()], ..now };
        let mut out = Vec::new();
        conclude(&mut out, &counts, false).expect("written");
        assert!(String::from_utf8(out).expect("text").contains("violation: publish: no `authorization`"));
    }
}
