//! `[spool]` and `[push]`: whether what is pushed has a place, and whether strangers can push.

use std::path::PathBuf;

use super::Findings;
use crate::config::{Facts, SecretFile, Settings};
use crate::source::push::Listen;
use crate::source::{Config, spool};

/// The spool holds at least so many of the largest frames.
const FRAMES_MIN: u64 = 4;

pub(super) fn check(settings: &Settings, facts: &Facts, found: &mut Findings) {
    found.absolute("spool.directory", &settings.spool.directory);
    if settings.detectors.iter().any(spool::serves) {
        room(settings, found);
    }
    listen(settings, found);
    account(settings, found);
    let push = &settings.push;
    for (key, file) in [
        ("push.password_file", &push.password_file),
        ("push.tls_cert_file", &push.tls_cert_file),
        ("push.tls_key_file", &push.tls_key_file),
    ] {
        match file.as_ref().and_then(|file| facts.secrets.get(file)) {
            None | Some(SecretFile::Usable) => {}
            Some(SecretFile::Away(why)) => found.warning(key, why, "nothing can be pushed until it is there"),
            Some(SecretFile::Unfit(why)) => found.problem(key, why, ""),
        }
    }
}

fn room(settings: &Settings, found: &mut Findings) {
    let (size, frame) = (settings.spool.max_size, settings.encode.max_frame);
    if size.as_u64() < frame.as_u64().saturating_mul(FRAMES_MIN) {
        let least = bytesize::ByteSize(frame.as_u64().saturating_mul(FRAMES_MIN));
        let wrong = format!("{size} is less than {FRAMES_MIN} × {frame} of `encode.max_frame`");
        found.problem("spool.max_size", wrong, format!("write at least {least}, or a smaller `encode.max_frame`"));
    }
}

fn listen(settings: &Settings, found: &mut Findings) {
    let push = &settings.push;
    let entries = settings.detectors.iter().enumerate();
    let mut pushed = entries.filter(|(_, entry)| matches!(entry.source, Config::Push(_))).peekable();
    let Some(text) = &push.listen else {
        if let Some((i, _)) = pushed.peek() {
            found.problem(
                format!("detectors[{i}].push"),
                "needs a place to push to, but `push.listen` is missing",
                "write [push] with listen = \"unix:/run/framegate/push.sock\"",
            );
        }
        return;
    };
    let listen = match Listen::parse(text) {
        Ok(listen) => listen,
        Err(wrong) => {
            let right = "write it like unix:/run/framegate/push.sock, 127.0.0.1:5009 or systemd";
            return found.problem("push.listen", format!("`{text}` {wrong}"), right);
        }
    };
    if pushed.peek().is_none() {
        found.warning("push.listen", "not used: no detector is pushed", "write push = {} in one, or remove this");
    }
    let families: Vec<usize> = pushed.filter(|(_, entry)| entry.name.contains('{')).map(|(i, _)| i).collect();
    if let [_, second, ..] = families[..] {
        found.problem(
            format!("detectors[{second}].name"),
            "a second one with a placeholder: every frame would go to the first",
            "keep one of them, or write plain names",
        );
    }
    if listen.is_local() {
        return;
    }
    let missing: Vec<&str> = [
        ("username", push.username.is_some()),
        ("password_file", push.password_file.is_some()),
        ("tls_cert_file", push.tls_cert_file.is_some()),
        ("tls_key_file", push.tls_key_file.is_some()),
    ]
    .iter()
    .filter_map(|(key, given)| (!given).then_some(*key))
    .collect();
    if !missing.is_empty() {
        let wrong = format!("`{text}` can be reached from the network, but missing: {}", missing.join(", "));
        found.problem("push.listen", wrong, "write them, or listen on unix:/run/framegate/push.sock or 127.0.0.1");
    }
}

fn account(settings: &Settings, found: &mut Findings) {
    let push = &settings.push;
    let set = |file: &Option<PathBuf>| file.is_some();
    match (&push.username, set(&push.password_file)) {
        (Some(name), _) if name.trim().is_empty() => {
            found.problem("push.username", "is empty", "write the name that logs in, or remove it");
        }
        (Some(_), false) => found.problem(
            "push.password_file",
            "missing, but `username` is given",
            "put the password into a file and write password_file = \"push-password\"",
        ),
        (None, true) => {
            found.problem("push.username", "missing, but `password_file` is given", "write the name that logs in");
        }
        (Some(_), true) | (None, false) => {}
    }
    for (key, given, other, missing) in [
        ("push.tls_cert_file", set(&push.tls_key_file), "tls_key_file", !set(&push.tls_cert_file)),
        ("push.tls_key_file", set(&push.tls_cert_file), "tls_cert_file", !set(&push.tls_key_file)),
    ] {
        if given && missing {
            found.problem(key, format!("missing, but `{other}` is given"), "a certificate and its key go together");
        }
    }
}
