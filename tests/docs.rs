//! What the documentation says exists, exists.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use framegate::frame::SourceKind;
use framegate::publish::State;
use framegate::settle::Reason;
use framegate::{config, metrics};
use serde_json::Value;

/// In front of the pages that are made here.
const GENERATED: &str =
    "<!-- Made from the code by tests/docs.rs. Change it there, then: BLESS=1 cargo test --test docs -->";

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a file of the repository")
}

#[test]
fn every_metric_in_the_documentation_is_in_the_table() {
    let table = read("src/metrics.rs");
    let mut seen = BTreeSet::new();
    let others = [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "deploy/grafana/framegate.json",
        "deploy/prometheus/alerts.yml",
        "tests/alerts_test.yml",
    ];
    for path in pages().into_iter().chain(others.map(str::to_owned)) {
        let text = read(&path);
        for (at, _) in text.match_indices("framegate_") {
            let name: String = text[at + "framegate_".len()..]
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_')
                .collect();
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let name = of_histogram.unwrap_or(&name).to_owned();
            // `framegate_…deb`
            if name.is_empty() {
                continue;
            }
            assert!(table.contains(&format!("\"{name}\"")), "{path} names framegate_{name}, which does not exist");
            seen.insert(name);
        }
    }
    assert!(seen.len() > 10, "the documentation names hardly a metric: {seen:?}");
}

#[test]
fn every_module_is_on_the_map_once() {
    let page = read("ARCHITECTURE.md");
    let map = page.split("```").nth(1).expect("the map is the first block");
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).expect("src can be listed") {
        let path = entry.expect("src can be listed").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_name().and_then(|name| name.to_str()).expect("our names are UTF-8");
            assert_eq!(map.matches(&format!(" {name}")).count(), 1, "src/{name} on the map");
        }
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut links = 0;
    for page in &pages().into_iter().chain(["README.md", "ARCHITECTURE.md"].map(str::to_owned)).collect::<Vec<_>>() {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(page).parent().expect("a directory").to_owned();
        for target in read(page).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with("http") && !target.starts_with('#') {
                let (file, heading) = target.split_once('#').unwrap_or((target, ""));
                let file = beside.join(file);
                assert!(file.exists(), "{page} links to {target}");
                assert!(heading.is_empty() || headings(&file).contains(heading), "{page} links to {target}");
                links += 1;
            }
        }
    }
    assert!(links > 3, "the pages hold hardly a link");
}

/// The headings of a page, as links name them.
fn headings(page: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(page).expect("a page");
    let titles = text.lines().filter_map(|line| line.strip_prefix('#')).map(|line| line.trim_start_matches('#').trim());
    let letter = |c: char| match c {
        ' ' => Some('-'),
        c => (c.is_alphanumeric() || c == '-').then(|| c.to_ascii_lowercase()),
    };
    titles.map(|title| title.chars().filter_map(letter).collect()).collect()
}

/// The pages in docs/.
fn pages() -> Vec<String> {
    let docs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).expect("docs can be listed");
    let docs = docs.map(|page| format!("docs/{}", page.expect("docs can be listed").file_name().to_string_lossy()));
    docs.filter(|page| Path::new(page).extension().is_some_and(|it| it == "md")).collect()
}

#[test]
fn the_reference_of_the_configuration_is_what_the_schema_says() {
    let sections = sections(&read("config/framegate.toml"));
    let schema = config::schema();
    let mut page = format!(
        "# Configuration reference\n\n{GENERATED}\n\n\
         {}\n\n\
         Sections and keys stand in the order of [`config/framegate.toml`](../config/framegate.toml), a file to copy from with every\n\
         default written out. Unknown keys are errors; `framegate check` names every problem at once.\n\n\
         Read are `/etc/framegate/framegate.toml`, then `/etc/framegate/conf.d/*.toml` in the order of their names, then the\n\
         environment: `FRAMEGATE_PUBLISH__RATE=20` is `rate` in `[publish]`. What comes later wins, key by key; `[[detectors]]` of\n\
         further files are added to those before them. `framegate reload` applies a change; where a key says so, only a restart\n\
         does.\n",
        text(&schema["description"])
    );
    let mut keys = 0;
    for (section, written) in &sections {
        let brackets = if section == "detectors" { "[[detectors]]".to_owned() } else { format!("[{section}]") };
        let (about, node) = section.split('.').fold((&schema, &schema), |(_, node), name| {
            let property = &node["properties"][name];
            (property, target(&schema, property))
        });
        write!(
            page,
            "\n## {brackets}\n\n{}\n\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n",
            text(&about["description"])
        )
        .expect("a string takes everything");
        let properties = node["properties"].as_object().unwrap_or_else(|| panic!("[{section}] is not in the schema"));
        for (key, value) in written {
            let property = &properties.get(key).unwrap_or_else(|| panic!("{section}.{key} is not in the schema"));
            let (kind, meaning) = (kind(&schema, property, value), meaning(&schema, property));
            writeln!(page, "| `{key}` | {kind} | {} | {meaning} |", default(property, value, &meaning))
                .expect("a string takes everything");
            keys += 1;
        }
        let tables = properties.keys().filter(|key| !written.iter().any(|(it, _)| it == *key)).collect::<Vec<_>>();
        assert!(
            tables.iter().all(|key| sections.iter().any(|(it, _)| *it == format!("{section}.{key}"))),
            "config/framegate.toml lacks some of {tables:?} in [{section}]"
        );
    }
    assert!(keys > 60, "only {keys} keys were found");
    is_or_becomes("docs/configuration.md", &page);
}

#[test]
fn the_reference_of_the_metrics_is_what_the_code_says() {
    let mut page = format!(
        "# Metrics reference\n\n{GENERATED}\n\n\
         What `/metrics` on `admin.listen` shows, in the order of the code. The six to look at first, and queries, are in the\n\
         [README](../README.md#is-it-well); what some tell together is in [Tuning](tuning.md#reading-the-figures).\n\n\
         A histogram has `_bucket`, `_sum` and `_count`. Beyond 1000 detectors the label `detector` says `other`. Besides these there\n\
         are `process_*`: CPU time, memory, open files, threads and the start of the process.\n\n\
         | Metric | Type | Labels | Meaning |\n|---|---|---|---|\n"
    );
    let mut buckets = String::new();
    for metric in metrics::described() {
        let name = format!("framegate_{}", metric.name);
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        writeln!(page, "| `{name}` | {} | {} | {} |", metric.kind, labels.join(", "), metric.help)
            .expect("a string takes everything");
        if !metric.buckets.is_empty() {
            let bounds: Vec<String> = metric.buckets.iter().map(f64::to_string).collect();
            writeln!(buckets, "| `{name}` | {} |", bounds.join(", ")).expect("a string takes everything");
        }
    }
    write!(page, "\n## Buckets\n\nUpper bounds in seconds; the last one is `+Inf`.\n\n| Histogram | Bounds |\n|---|---|\n{buckets}")
        .expect("a string takes everything");
    page.push_str("\n## Values of labels\n\n| Label | Of | Values |\n|---|---|---|\n");
    for (label, of, values) in values_of_labels() {
        let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
        writeln!(page, "| `{label}` | `framegate_{of}` | {} |", values.join(", ")).expect("a string takes everything");
    }
    is_or_becomes("docs/metrics.md", &page);
}

/// Those whose values are a closed set.
fn values_of_labels() -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
    vec![
        ("source", "frames_received_total", SourceKind::ALL.map(SourceKind::as_str).into()),
        ("reason", "frames_dead_lettered_total", Reason::ALL.map(Reason::as_str).into()),
        ("reason", "frames_dropped_total", metrics::DROP_REASONS.into()),
        ("reason", "frames_refused_total", metrics::REFUSAL_REASONS.into()),
        ("state", "engine_state", State::ALL.map(State::as_str).into()),
    ]
}

/// Compares a page with what it should be; with `BLESS=1` in the environment it becomes so.
#[track_caller]
fn is_or_becomes(path: &str, expected: &str) {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("BLESS").is_some() {
        fs::write(&place, expected).expect("the page can be written");
    }
    let found = fs::read_to_string(&place).unwrap_or_default();
    let first = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    assert!(found == expected, "{path} is not up to date: BLESS=1 cargo test --test docs\nfirst difference: {first:?}");
}

/// The sections of a configuration file, each with its keys and how their values are written; what is commented out counts.
fn sections(toml: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut sections: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in toml.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        let is_word =
            |text: &str| text.bytes().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || b"_.".contains(&it));
        if let Some(name) =
            line.strip_prefix('[').map(|rest| rest.trim_matches(['[', ']'])).filter(|name| is_word(name))
        {
            sections.push((name.to_owned(), Vec::new()));
        } else if let Some((key, value)) = line.split_once(" = ").filter(|(key, _)| is_word(key)) {
            let keys = &mut sections.last_mut().expect("a key is in a section").1;
            // Written twice where a key has two forms: the last one is the default.
            keys.retain(|(it, _)| it != key);
            keys.push((key.to_owned(), value.to_owned()));
        }
    }
    sections
}

/// What a property of the schema is: behind references, options and lists.
fn target<'a>(schema: &'a Value, property: &'a Value) -> &'a Value {
    if let Some(name) = property["$ref"].as_str() {
        return target(schema, &schema["$defs"][name.trim_start_matches("#/$defs/")]);
    }
    if let [first, other] = property["anyOf"].as_array().map_or(&[][..], Vec::as_slice)
        && other["type"] == "null"
    {
        return target(schema, first);
    }
    if property["items"].is_object() && property["items"]["$ref"].is_string() {
        return target(schema, &property["items"]);
    }
    property
}

/// In words of the file. Times and sizes are strings to the schema; how they are written tells them apart.
fn kind(schema: &Value, property: &Value, value: &str) -> &'static str {
    let target = target(schema, property);
    let is_measure = |units: &[&str]| {
        let text = value.trim_matches('"');
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
        unit.len() < text.len() && units.contains(&unit)
    };
    let name = target["type"].as_str().or_else(|| target["type"][0].as_str());
    match name {
        Some("boolean") => "true or false",
        Some("integer") => "whole number",
        Some("number") => "number",
        Some("array") => "list of strings",
        Some("object") => "table",
        Some("string") if is_measure(&["ms", "s", "m", "h", "d"]) => "time",
        Some("string") if is_measure(&["KiB", "MiB", "GiB"]) => "size",
        Some("string") => "string",
        Some(_) | None => "one of these",
    }
}

/// As the file writes it where it is one; without one, what it may look like.
fn default(property: &Value, value: &str, meaning: &str) -> String {
    let is_set = !property["default"].is_null();
    if meaning.contains("Must be set") {
        format!("none; such as `{value}`")
    } else if property["default"] == "" {
        "`\"\"`".into()
    } else if is_set {
        format!("`{value}`")
    } else if value == "{}" {
        "none".into()
    } else {
        format!("none; such as `{value}`")
    }
}

/// The description, and what each value means where they are given.
fn meaning(schema: &Value, property: &Value) -> String {
    let target = target(schema, property);
    let described = if property["description"].is_string() { property } else { target };
    let mut meaning = text(&described["description"]);
    for choice in target["oneOf"].as_array().into_iter().flatten() {
        let choice = self::target(schema, choice);
        let about = text(&choice["description"]);
        let keys = choice["properties"].as_object().into_iter().flatten();
        let keys: String = keys.map(|(key, it)| format!(" `{key}`: {}", text(&it["description"]))).collect();
        let value = if keys.is_empty() { format!("`{}`", choice["const"]) } else { "A table".into() };
        write!(meaning, " {value}: {about}{keys}").expect("a string takes everything");
    }
    meaning
}

/// A text of the schema, on one line of a table.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}
