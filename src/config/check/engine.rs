//! `[engine]`: the address, the account, TLS and the time limits, among each other.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use humantime::format_duration;
use reqwest::Url;

use super::{Findings, WAIT_MAX};
use crate::config::{Facts, SecretFile, Settings};

/// Bytes of a SHA-256 hash.
const PIN_BYTES: usize = 32;

pub(super) fn check(settings: &Settings, facts: &Facts, found: &mut Findings) {
    url(settings, found);
    account(settings, facts, found);
    tls(settings, found);
    times(settings, found);
}

fn url(settings: &Settings, found: &mut Findings) {
    let key = "engine.base_url";
    let text = settings.engine.base_url.as_str();
    let like = "write it like https://10.0.0.123:5009";
    if text.is_empty() {
        return found.problem(key, "missing", like);
    }
    let url = match Url::parse(text) {
        Ok(url) => url,
        // Not shown: what cannot be taken apart may hold a password.
        Err(error) => return found.problem(key, format!("not a URL: {error}"), like),
    };
    if !matches!(url.scheme(), "http" | "https") {
        return found.problem(key, format!("the scheme is `{}`", url.scheme()), like);
    }
    if !url.username().is_empty() || url.password().is_some() {
        let right = "leave out what is before the @; the account goes to `username` and `password_file`";
        return found.problem(key, "holds an account (not shown)", right);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return found.problem(key, "holds a query or fragment (not shown)", "leave out everything from ? or # on");
    }
    if url.path().contains("/api/v1") {
        let base = text.split("/api/v1").next().unwrap_or(text);
        return found.problem(
            key,
            "holds a path of the engine's API",
            format!("write {base}; the API's paths are added to it"),
        );
    }
    if url.scheme() == "http" {
        let engine = &settings.engine;
        for (key, given) in
            [("engine.pin_sha256", !engine.pin_sha256.is_empty()), ("engine.ca_file", engine.ca_file.is_some())]
        {
            if given {
                found.problem(
                    key,
                    "means nothing where `base_url` is plain http",
                    "write https:// in `base_url`, or remove this",
                );
            }
        }
        if !is_loopback(&url) {
            let wrong = "plain http: everybody on the network can read the faces, the password and the token";
            found.warning(key, wrong, "use https, on-premise usually on port 5009");
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn account(settings: &Settings, facts: &Facts, found: &mut Findings) {
    let engine = &settings.engine;
    match (&engine.password_file, &engine.token_file) {
        (Some(_), Some(_)) => {
            found.problem(
                "engine.token_file",
                "given beside `password_file`",
                "keep one of `password_file` and `token_file`",
            );
        }
        (None, None) => found.problem(
            "engine.password_file",
            "missing, and no `token_file` either",
            "put the password of `username` into a file and write password_file = \"engine-password\"",
        ),
        (Some(_), None) if engine.username.as_deref().is_none_or(|name| name.trim().is_empty()) => {
            found.problem(
                "engine.username",
                "missing, but `password_file` is given",
                "write the account that the password belongs to",
            );
        }
        (None, Some(_)) if engine.username.is_some() => {
            found.warning("engine.username", "not used: `token_file` says who we are", "remove it");
        }
        (Some(_), None) | (None, Some(_)) => {}
    }
    let files = [
        ("engine.password_file", &engine.password_file),
        ("engine.token_file", &engine.token_file),
        ("engine.ca_file", &engine.ca_file),
    ];
    for (key, file) in files {
        match file.as_ref().and_then(|file| facts.secrets.get(file)) {
            None | Some(SecretFile::Usable) => {}
            Some(SecretFile::Away(why)) => found.warning(key, why, "nothing is published until it is there"),
            Some(SecretFile::Unfit(why)) => found.problem(key, why, ""),
        }
    }
}

fn tls(settings: &Settings, found: &mut Findings) {
    let engine = &settings.engine;
    for (i, pin) in engine.pin_sha256.iter().enumerate() {
        if !is_pin(pin) {
            let right = "write the SHA-256 of the engine's public key in base64, as `framegate pin URL` shows it";
            found.problem(format!("engine.pin_sha256[{i}]"), format!("`{pin}` is not a pin"), right);
        }
    }
    let key = "engine.danger_accept_invalid_certs";
    if engine.danger_accept_invalid_certs && !engine.pin_sha256.is_empty() {
        found.problem(key, "given beside `pin_sha256`", "remove it: a pin is enough for a self-signed certificate");
    } else if engine.danger_accept_invalid_certs {
        let wrong = "whoever can answer in the engine's place gets the password, the token and the faces";
        found.warning(key, wrong, "give `pin_sha256` (see `framegate pin URL`) or `ca_file` instead");
    }
    if let Some(proxy) = &engine.proxy {
        let url = Url::parse(proxy).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        match url {
            None => found.problem(
                "engine.proxy",
                "not the URL of a proxy (not shown)",
                "write it like http://10.0.0.1:3128",
            ),
            Some(url) if url.password().is_some() => {
                found.problem("engine.proxy", "holds a password (not shown)", "use a proxy that asks for none");
            }
            Some(_) => {}
        }
    }
}

/// Base64 or hexadecimal (colons allowed), with or without `sha256/` before it: what `publish` takes.
fn is_pin(text: &str) -> bool {
    let text = text.trim().trim_start_matches("sha256/").trim_start_matches("sha256:");
    let base64 = base64::engine::general_purpose::STANDARD.decode(text).is_ok_and(|hash| hash.len() == PIN_BYTES);
    let digits = text.replace(':', "");
    base64 || digits.len() == 2 * PIN_BYTES && digits.bytes().all(|it| it.is_ascii_hexdigit())
}

fn times(settings: &Settings, found: &mut Findings) {
    let engine = &settings.engine;
    let show = |it: Duration| format_duration(it).to_string();
    found.not_zero("engine.timeout", engine.timeout, "10s");
    found.not_zero("engine.connect_timeout", engine.connect_timeout, "3s");
    found.at_most("engine.timeout", engine.timeout, WAIT_MAX);
    found.at_most("engine.connect_timeout", engine.connect_timeout, WAIT_MAX);
    if engine.connect_timeout > engine.timeout {
        let wrong =
            format!("{} is longer than the {} of `timeout`", show(engine.connect_timeout), show(engine.timeout));
        found.problem("engine.connect_timeout", wrong, "`timeout` includes connecting: make this shorter");
    }
    let deadline = settings.shutdown.deadline;
    if engine.timeout > deadline {
        let wrong = format!("{} is longer than the {} of `shutdown.deadline`", show(engine.timeout), show(deadline));
        found.problem(
            "engine.timeout",
            wrong,
            "an attempt must be able to end before the daemon does: shorten it, or allow a longer deadline",
        );
    }
}
