//! Which IANA time zones there are, from the bundled database: the same on every box. The engine gets a zone's name as it
//! is written, so only the exact spelling counts.

use jiff::tz::TimeZoneDatabase;

/// Names at least so alike are worth suggesting (0 to 1, by letters in common).
const LIKENESS_MIN: f64 = 0.75;

/// Whether `zone` is an IANA name, letter for letter.
pub(super) fn exists(zone: &str) -> bool {
    TimeZoneDatabase::bundled().available().any(|name| name.as_str() == zone)
}

/// The name that `zone` was probably meant to be: other case, the city alone, a space for the underscore, a slip.
pub(super) fn nearest(zone: &str) -> Option<String> {
    let wanted = plain(zone);
    TimeZoneDatabase::bundled()
        .available()
        .map(|name| (likeness(&wanted, &plain(name.as_str())), name.as_str().to_owned()))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|(a, x), (b, y)| a.total_cmp(b).then_with(|| y.cmp(x)))
        .map(|(_, name)| name)
}

fn plain(zone: &str) -> String {
    zone.trim().to_lowercase().replace([' ', '-'], "_")
}

fn likeness(wanted: &str, name: &str) -> f64 {
    let city = name.rsplit('/').next().unwrap_or(name);
    // The whole name alike is worth more than the city alone.
    f64::max(
        strsim::normalized_damerau_levenshtein(wanted, name),
        strsim::normalized_damerau_levenshtein(wanted, city) - 0.01,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_name_exists() {
        for zone in ["UTC", "America/Los_Angeles", "Europe/Berlin", "Asia/Kolkata"] {
            assert!(exists(zone), "{zone}");
        }
        for zone in ["utc", "America/Los Angeles", "PST8", "", "America", "Mars/Olympus", "../etc/passwd"] {
            assert!(!exists(zone), "{zone}");
        }
    }

    #[test]
    fn the_nearest_is_what_was_meant() {
        for (zone, meant) in [
            ("america/los_angeles", "America/Los_Angeles"),
            ("America/Los Angeles", "America/Los_Angeles"),
            ("America/Los_Angelos", "America/Los_Angeles"),
            ("Berlin", "Europe/Berlin"),
            ("utc", "UTC"),
        ] {
            assert_eq!(nearest(zone).as_deref(), Some(meant), "{zone}");
        }
        assert_eq!(nearest("Mars/Olympus Mons"), None);
    }
}
