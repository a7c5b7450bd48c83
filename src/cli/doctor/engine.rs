//! The way to the engine: name, connection, certificate, login, token, clocks; and the files with its secrets.

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};

use super::Line;
use crate::config::{Facts, SecretFile, Settings};
use crate::publish::State;
use crate::publish::examine::{Examined, Login, examine};
use crate::publish::tls::PinReport;

/// A certificate that ends sooner is worth a word.
const EXPIRY_WARN: SignedDuration = SignedDuration::from_hours(24 * 30);
/// Clocks further apart are worth a word: detection times come from ours.
const SKEW_WARN: SignedDuration = SignedDuration::from_secs(5);
/// Tokens that live shorter make a login or renewal every few minutes.
const TOKEN_LIFE_WARN: SignedDuration = SignedDuration::from_mins(5);

/// `stored`: names of credentials that systemd will hand over, and that only root can read.
pub(super) async fn look(settings: &Settings, stored: &[PathBuf], lines: &mut Vec<Line>) {
    let handed_over = secrets(settings, stored, lines);
    let config = settings.engine();
    match examine(&config, settings.engine_secrets()).await {
        Ok(found) => walk(settings, &found, handed_over, lines),
        Err(error) => lines.push(Line::fail("engine", format!("{error:#}"), "correct engine.base_url")),
    }
}

/// Whether the engine's secret is one that the service alone gets.
fn secrets(settings: &Settings, stored: &[PathBuf], lines: &mut Vec<Line>) -> bool {
    let facts = Facts::gather(settings);
    for (file, state) in &facts.secrets {
        let path = settings.secret_path(file);
        let show = path.display();
        lines.push(match state {
            SecretFile::Usable => Line::ok("secret", format!("{show} can be read")),
            SecretFile::Away(_) if stored.contains(file) => {
                Line::ok("secret", format!("{} is in /etc/credstore: the service gets it when it starts", file.display()))
            }
            SecretFile::Away(why) => Line::fail(
                "secret",
                why,
                format!(
                    "for the installed service: install -m 0600 /dev/stdin /etc/credstore/{0} && systemctl restart framegate (another name needs LoadCredential={0} in the unit); else: install -m 0600 -o framegate /dev/stdin {show}",
                    file.display()
                ),
            ),
            SecretFile::Unfit(why) => Line::fail("secret", why, format!("chmod 0600 {show}")),
        });
    }
    let engine = [&settings.engine.password_file, &settings.engine.token_file];
    let is_away = |file: &PathBuf| matches!(facts.secrets.get(file), Some(SecretFile::Away(_)));
    engine.into_iter().flatten().any(|file| is_away(file) && stored.contains(file))
}

fn walk(settings: &Settings, found: &Examined, handed_over: bool, lines: &mut Vec<Line>) {
    let target = &found.target;
    match &found.addresses {
        Ok(addresses) => {
            let list: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
            lines.push(Line::ok("engine: name", format!("{target} is {}", list.join(", "))));
        }
        Err(error) => {
            let remedy = "correct engine.base_url, or DNS (`resolvectl query NAME`), or write the address itself";
            return lines.push(Line::fail("engine: name", format!("{target}: {error}"), remedy));
        }
    }
    match &found.connection {
        Some(Ok((address, time))) => lines.push(Line::ok("engine: connection", format!("{address} in {time:.1?}"))),
        Some(Err(error)) => {
            let remedy = format!(
                "does the engine run, is the port right, does a firewall stand between? nc -vz {}",
                target.replace(':', " ")
            );
            lines.push(Line::fail("engine: connection", error, remedy));
        }
        None => {}
    }
    match (&found.certificate, &found.trust) {
        (Some(Ok(shown)), Some(trust)) => certificate(settings, shown, trust, lines),
        (Some(Err(error)), _) => {
            let remedy = "is it really https on that port? on-premise engines speak it on 5009, plain http on 6009";
            lines.push(Line::fail("engine: TLS", error, remedy));
        }
        (_, _) => {}
    }
    if settings.engine.danger_accept_invalid_certs {
        let remedy = format!("framegate pin {}, and write pin_sha256 instead", settings.engine.base_url);
        lines.push(Line::warn(
            "engine: TLS",
            "any certificate is accepted: whoever is in between reads the faces",
            remedy,
        ));
    }
    match &found.login {
        Some(Ok(login)) => logged_in(login, lines),
        Some(Err((State::Credentials, _))) if handed_over => lines.push(Line::warn(
            "engine: login",
            "not tried: the password is for the running service alone",
            "systemctl start framegate, then look again",
        )),
        Some(Err((state, why))) => {
            let line = format!("{}: {why}", state.as_str());
            lines.push(Line::fail("engine: login", line, remedy(*state)));
        }
        None => {}
    }
}

fn certificate(settings: &Settings, shown: &PinReport, trust: &Result<(), String>, lines: &mut Vec<Line>) {
    let ends = shown.not_after.map_or_else(|| "?".into(), |at| at.strftime("%F").to_string());
    let about = format!(
        "\"{}\", issued by \"{}\", valid until {ends}, key sha256 {}",
        shown.subject, shown.issuer, shown.pin_sha256
    );
    if let Err(error) = trust {
        let remedy = format!(
            "compare that key with the engine's own; if it is the right one, write pin_sha256 = [\"{}\"] in [engine], or the CA's file as ca_file",
            shown.pin_sha256
        );
        return lines.push(Line::fail("engine: certificate", format!("{about}: {error}"), remedy));
    }
    let left = shown.not_after.map(|at| at.duration_since(Timestamp::now()));
    lines.push(match left {
        Some(left) if left < EXPIRY_WARN => {
            let days = left.as_hours() / 24;
            let remedy = if settings.engine.pin_sha256.is_empty() {
                "renew the engine's certificate"
            } else {
                "renew the engine's certificate; with another key, add its pin to pin_sha256 before"
            };
            Line::warn("engine: certificate", format!("{about}: {days} days left"), remedy)
        }
        Some(_) | None => Line::ok("engine: certificate", about),
    });
}

fn logged_in(login: &Login, lines: &mut Vec<Line>) {
    let life = login.life.and_then(|life| SignedDuration::try_from(life).ok());
    lines.push(match life {
        Some(life) if life < TOKEN_LIFE_WARN => Line::warn(
            "engine: login",
            format!("works, but tokens live {life:#} only"),
            "let the engine give tokens of an hour or more",
        ),
        Some(life) => Line::ok("engine: login", format!("works; tokens live {life:#}")),
        None => Line::ok("engine: login", "works; the token does not say how long it lives"),
    });
    match login.skew {
        Some(skew) if skew.abs() > SKEW_WARN => lines.push(Line::warn(
            "clock",
            format!(
                "this box's clock and the engine's are {:#} apart",
                SignedDuration::from_secs(skew.as_secs().abs())
            ),
            "set both by NTP: timedatectl set-ntp true; timedatectl timesync-status",
        )),
        Some(_) => lines.push(Line::ok("clock", "agrees with the engine's")),
        None => {}
    }
}

/// What to do about it, for whoever asked this command already.
pub(super) fn remedy(state: State) -> &'static str {
    match state {
        // Its advice names this command.
        State::Unreachable => "does the engine answer at all? look at its own logs, and at what stands between",
        State::Open
        | State::Credentials
        | State::Forbidden
        | State::Rejecting
        | State::UnexpectedAnswer
        | State::Throttled
        | State::Failing => state.advice(),
    }
}
