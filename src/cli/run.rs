//! `framegate run`: the daemon in the foreground, with its signals.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::daemon::{Daemon, Surroundings};
use crate::log;
use crate::notify::Notify;

/// Runs until SIGTERM or SIGINT; a second one ends at once.
pub(super) fn run(path: &Path) -> anyhow::Result<ExitCode> {
    let loaded = match super::load(path) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let log = log::init(&loaded.settings.log)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    // Absolute, so that a reload means the same file whatever the working directory.
    let config_file = Some(std::path::absolute(path)?);
    let surroundings = Surroundings { config_file, log: Some(log), notify: Arc::new(Notify::from_env()) };
    raise_descriptor_limit();
    let runtime = super::runtime()?;
    let result = runtime.block_on(async move {
        let (stop, hurry, reloads) = signals()?;
        let mut daemon = Daemon::start(loaded.settings, surroundings).await?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %daemon.admin(), "framegate is running");
        let ended = daemon.run(stop, reloads).await;
        if let Err(error) = &ended {
            tracing::error!("a part of the daemon has failed, so it stops, for a new start to mend that: {error:#}");
        }
        daemon.stop(hurry).await;
        Ok(if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    // An encode worker cannot be aborted; what it claims is found at the next start.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(result.unwrap_or_else(|error: anyhow::Error| {
        tracing::error!("cannot run: {error:#}");
        ExitCode::FAILURE
    }))
}

/// As many file descriptors as we may have: the usual soft limit of 1024 is for programs that call select(2), and each
/// detector keeps a handful open.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit of file descriptors stays as it is");
    }
}

/// First SIGTERM or SIGINT: stop. Second: hurry. SIGHUP: reload; one waiting is enough for any number.
fn signals() -> anyhow::Result<(CancellationToken, CancellationToken, mpsc::Receiver<()>)> {
    let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
    let (ask, reloads) = mpsc::channel(1);
    let mut term = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut hup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    let (first, second) = (stop.clone(), hurry.clone());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                _ = hup.recv() => {
                    // Full: a reload is already waiting and will read the newest file.
                    if ask.try_send(()).is_err() {
                        tracing::debug!("a reload is already waiting");
                    }
                    continue;
                }
            }
            if first.is_cancelled() {
                second.cancel();
            }
            first.cancel();
        }
    });
    Ok((stop, hurry, reloads))
}
