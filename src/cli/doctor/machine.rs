//! The box: limits of inotify and of file descriptors, memory, and the directories of dead letters and spool.

use std::path::Path;

use bytesize::ByteSize;
use rustix::fs::statvfs;
use rustix::process::{Resource, getrlimit};

use super::Line;
use super::directories::{Rights, rights};
use crate::config::Settings;
use crate::source::{Entry, spool};

/// Watches that others on the box may need.
const WATCHES_SPARE: u64 = 1024;
/// inotify instances of one user: the daemon's one, and some for others.
const INSTANCES: u64 = 16;
/// Descriptors besides those of connections: a handful for each detector, logs, sockets.
const DESCRIPTORS_SPARE: u64 = 64;
/// Less free than this part of a file system is worth a word.
const FREE_PART_WARN: f64 = 0.05;
/// Fewer free inodes are worth a word: a frame is one.
const FREE_INODES_WARN: u64 = 10_000;

pub(super) fn look(settings: &Settings, lines: &mut Vec<Line>) {
    limit("fs.inotify.max_user_instances", INSTANCES, lines);
    let trees: u64 =
        settings.detectors.iter().filter_map(Entry::directory).map(super::directories::watches_needed).sum();
    limit("fs.inotify.max_user_watches", trees + WATCHES_SPARE, lines);
    descriptors(settings, lines);
    memory(settings, lines);
    kept("dead letters", &settings.dead_letter.directory, settings.dead_letter.max_size, lines);
    if settings.detectors.iter().any(spool::serves) {
        kept("spool", &settings.spool.directory, settings.spool.max_size, lines);
    }
}

fn limit(key: &str, needed: u64, lines: &mut Vec<Line>) {
    let path = format!("/proc/sys/{}", key.replace('.', "/"));
    let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    lines.push(match now {
        Some(now) if now < needed => Line::warn(
            key,
            format!("{now}; about {needed} are needed, else directories are polled"),
            format!(
                "echo '{key} = {}' > /etc/sysctl.d/60-framegate.conf && sysctl --system",
                needed.next_power_of_two()
            ),
        ),
        Some(now) => Line::ok(key, format!("{now}, about {needed} needed")),
        None => Line::warn(key, "cannot be read", "is /proc mounted? directories may have to be polled"),
    });
}

fn descriptors(settings: &Settings, lines: &mut Vec<Line>) {
    let needed = settings.publish.max_in_flight as u64 + 8 * settings.detectors.len() as u64 + DESCRIPTORS_SPARE;
    // The daemon raises its own soft limit.
    lines.push(match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < needed => Line::warn(
            "file descriptors",
            format!("at most {most}; about {needed} are needed"),
            format!("LimitNOFILE={} in the unit, or a smaller publish.max_in_flight", needed.next_power_of_two()),
        ),
        Some(most) => Line::ok("file descriptors", format!("at most {most}, about {needed} needed")),
        None => Line::ok("file descriptors", "without limit"),
    });
}

fn memory(settings: &Settings, lines: &mut Vec<Line>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib * 1024);
    let budget = settings.encode.memory;
    match total {
        Some(total) if budget.as_u64() > total / 2 => lines.push(Line::warn(
            "memory",
            format!("encode.memory = {budget} is more than half of this box's {}", ByteSize(total)),
            "write a smaller encode.memory: frames wait at their source when it is used up",
        )),
        Some(total) => {
            lines.push(Line::ok("memory", format!("{budget} of {} may be used for frames", ByteSize(total))));
        }
        None => {}
    }
}

/// A directory of the service's own: for dead letters, for the spool.
fn kept(subject: &str, directory: &Path, most: ByteSize, lines: &mut Vec<Line>) {
    let show = directory.display();
    match rights(directory) {
        Rights::Missing if directory.parent().is_some_and(|parent| rights(parent) == Rights::All) => {
            lines.push(Line::ok(subject, format!("{show} will be made")));
        }
        Rights::Missing => lines.push(Line::fail(
            subject,
            format!("{show} does not exist and cannot be made"),
            format!("install -d -m 0700 -o framegate -g framegate {show}; with the installed unit, StateDirectory=framegate does it"),
        )),
        Rights::Lacking(what) => lines.push(Line::fail(
            subject,
            format!("{show}: {what}"),
            format!("chown framegate: {show} && chmod 0700 {show}; under systemd also ReadWritePaths={show}"),
        )),
        Rights::All => space(subject, directory, Some(most), lines),
    }
}

/// Free room where `path` is; `wanted`: as much as may be kept there.
pub(super) fn space(subject: &str, path: &Path, wanted: Option<ByteSize>, lines: &mut Vec<Line>) {
    let show = path.display();
    let room = match statvfs(path) {
        Ok(room) => room,
        Err(error) => {
            return lines.push(Line::warn(
                subject,
                format!("{show}: {error}"),
                "is its file system healthy? dmesg | tail",
            ));
        }
    };
    let free = room.f_bavail * room.f_frsize;
    let part = room.f_bavail as f64 / room.f_blocks.max(1) as f64;
    // Some file systems count no inodes.
    let inodes = (room.f_files > 0).then_some(room.f_favail);
    let remedy = format!("make room on it: df -h {show}; df -i {show}; du -x --max-depth=2 {show} | sort -n | tail");
    lines.push(match (wanted, inodes) {
        (_, Some(inodes)) if inodes < FREE_INODES_WARN => {
            Line::warn(subject, format!("{show}: only {inodes} inodes are free"), remedy)
        }
        (Some(wanted), _) if free < wanted.as_u64() => Line::warn(
            subject,
            format!("{show}: {} are free, less than the {wanted} that may be kept there", ByteSize(free)),
            remedy,
        ),
        (_, _) if part < FREE_PART_WARN => {
            Line::warn(subject, format!("{show}: {} ({:.0} %) are free", ByteSize(free), part * 100.0), remedy)
        }
        (_, _) => Line::ok(subject, format!("{show}: {} free", ByteSize(free))),
    });
}
