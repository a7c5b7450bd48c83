//! Imports run one way. Reads the sources as text and holds them to the table of ARCHITECTURE.md; unit tests and
//! comments are exempt.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Each module of the crate, bottom up, and the modules it may import besides its own parts.
const LAYERS: &[(&str, &[&str])] = &[
    ("frame", &[]),
    ("secret", &[]),
    ("notify", &[]),
    ("log", &[]),
    // One rung: the metrics count by settle's reasons, and what settles is counted.
    ("metrics", &["frame", "settle"]),
    ("settle", &["frame", "log", "metrics"]),
    ("history", &["metrics"]),
    ("queue", &["frame", "metrics", "settle"]),
    ("encode", &["frame", "metrics", "settle", "queue"]),
    ("publish", &["frame", "secret", "metrics", "settle"]),
    ("source", &["frame", "secret", "log", "metrics", "settle", "queue", "encode"]),
    ("pipeline", &["frame", "log", "metrics", "settle", "queue", "encode", "publish", "notify"]),
    ("control", &["frame", "metrics", "settle", "publish", "source"]),
    ("admin", &["frame", "metrics", "settle", "history", "publish", "source", "control"]),
    ("config", &["frame", "secret", "settle", "queue", "encode", "publish", "source", "log", "control", "admin"]),
    (
        "daemon",
        &[
            "frame", "secret", "metrics", "settle", "queue", "encode", "publish", "source", "pipeline", "notify",
            "log", "control", "admin", "config", "history",
        ],
    ),
    (
        "cli",
        &[
            "frame",
            "secret",
            "metrics",
            "settle",
            "queue",
            "encode",
            "publish",
            "source",
            "pipeline",
            "notify",
            "log",
            "control",
            "admin",
            "config",
            "daemon",
            "simulator",
        ],
    ),
    // Alone: what the daemon is tested against must not be made of the daemon.
    ("simulator", &[]),
    ("main", &["cli"]),
];

/// Words that only `source` may say. Configuration and the metrics' label come from there too.
const BROKERS: &[&str] = &["mqtt", "rumqtt", "redis", "nats", "jetstream", "mosquitto"];

/// Modules that may name HTTP status codes: the engine's client and its stand-in, and those that are servers themselves.
const SPEAK_HTTP: &[&str] = &["publish", "simulator", "admin", "control", "source"];

#[test]
fn imports_run_one_way() {
    assert_none(files().iter().flat_map(imports_out_of_order));
}

#[test]
fn only_sources_name_brokers() {
    // `frame` has the values of the metrics' label `source`.
    let exempt = ["source", "frame"];
    assert_none(files().iter().filter(|file| !exempt.contains(&file.module())).flat_map(brokers_named));
}

#[test]
fn only_publish_decides_what_an_engines_status_means() {
    assert_none(files().iter().filter(|file| !SPEAK_HTTP.contains(&file.module())).flat_map(statuses_named));
}

#[test]
fn the_table_names_every_module_once_and_each_import_is_a_module() {
    let modules: BTreeSet<&str> = LAYERS.iter().map(|(module, _)| *module).collect();
    assert_eq!(modules.len(), LAYERS.len(), "a module is named twice");
    for file in files() {
        let module = file.module();
        assert!(module == "lib" || modules.contains(module), "{}: module `{module}` is not in LAYERS", file.path);
    }
    for (module, imports) in LAYERS {
        for import in *imports {
            assert!(
                modules.contains(import) && import != module,
                "`{module}` may import `{import}`, which is no other module"
            );
        }
    }
}

#[test]
fn a_violation_is_found_wherever_it_hides() {
    let found = |path: &str, text: &str| imports_out_of_order(&File::new(path, text));
    for (path, text, import) in [
        ("encode.rs", "use crate::publish::Publisher;", "publish"),
        (
            "encode/body.rs",
            "use crate::{\n    frame::Frame,\n    settle::{Reason, Refusal},\n    daemon,\n};",
            "daemon",
        ),
        ("frame.rs", "fn f() -> crate::settle::Reason { todo!() }", "settle"),
        ("source/directory.rs", "use super::super::pipeline;", "pipeline"),
        ("queue.rs", "use super::source::Entry;", "source"),
        ("simulator.rs", "use crate::frame::Frame;", "frame"),
        ("main.rs", "use framegate::{cli, daemon};", "daemon"),
        ("encode.rs", "use crate::*;", "*"),
    ] {
        assert_eq!(found(path, text).len(), 1, "{path}: {text}");
        assert!(found(path, text)[0].contains(&format!("`{import}`")), "{path}: {text}");
    }
    for (path, text) in [
        ("encode.rs", "use crate::frame::Frame; use crate::encode::body; // not crate::publish"),
        ("encode.rs", "//! See [`crate::publish`].\nuse super::settle::Reason;"),
        ("encode.rs", "mod inner { use super::*; use super::Encoder; }"),
        ("source/directory.rs", "use super::Health; use crate::queue::{Intake, source};"),
        ("encode.rs", "fn f() {}\n#[cfg(test)]\nmod tests {\n    use crate::publish::Publisher;\n}"),
        ("encode/tests.rs", "use crate::publish::Publisher;"),
    ] {
        assert_eq!(found(path, text), Vec::<String>::new(), "{path}: {text}");
    }
    assert_eq!(brokers_named(&File::new("queue.rs", "let url = \"redis://h\"; // mqtt")).len(), 1);
    assert_eq!(brokers_named(&File::new("queue.rs", "use async_nats::Client;")).len(), 1);
    assert_eq!(brokers_named(&File::new("queue.rs", "let signature = alternates;")).len(), 0);
    assert_eq!(statuses_named(&File::new("pipeline.rs", "if status == StatusCode::OK {}")).len(), 1);
}

fn assert_none(violations: impl Iterator<Item = String>) {
    let violations: Vec<String> = violations.collect();
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

/// One source file without its comments and its unit tests.
struct File {
    /// Relative to `src`.
    path: String,
    code: String,
}

impl File {
    fn new(path: &str, text: &str) -> Self {
        let is_tests = path.ends_with("/tests.rs") || path.contains("/tests/");
        let text = if is_tests { "" } else { text };
        let mut code = String::new();
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            if line.starts_with("#[cfg(test)]") && lines.peek().is_some_and(|next| next.starts_with("mod ")) {
                break; // unit tests stand last
            }
            code.push_str(line.split("//").next().unwrap_or_default());
            code.push('\n');
        }
        Self { path: path.to_owned(), code }
    }

    /// The module of the crate that this file is, or is part of.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
    }

    /// How many `super::` lead from here to the crate.
    fn depth(&self) -> usize {
        self.path.split('/').count()
    }
}

/// Every file below `src`.
fn files() -> Vec<File> {
    fn collect(src: &Path, dir: &Path, files: &mut Vec<File>) {
        for entry in fs::read_dir(dir).expect("src can be listed") {
            let path = entry.expect("src can be listed").path();
            if path.is_dir() {
                collect(src, &path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(src).expect("below src").to_str().expect("our names are UTF-8");
                files.push(File::new(name, &fs::read_to_string(&path).expect("a source file can be read")));
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &src, &mut files);
    for must in ["lib.rs", "main.rs", "frame.rs", "settle/dead_letter.rs"] {
        assert!(files.iter().any(|file| file.path == must), "the corpus lacks {must}");
    }
    assert!(files.iter().all(|file| file.path == "lib.rs" || file.path.ends_with("tests.rs") || !file.code.is_empty()));
    files
}

/// One line for each import that [`LAYERS`] does not allow this file.
fn imports_out_of_order(file: &File) -> Vec<String> {
    let module = file.module();
    if module == "lib" {
        return Vec::new();
    }
    let allowed = LAYERS.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, allowed)| allowed);
    modules_named(file)
        .into_iter()
        .filter(|named| named != module && !allowed.contains(&named.as_str()))
        .map(|named| format!("src/{}: `{module}` may not import `{named}`", file.path))
        .collect()
}

/// The modules of the crate that this file's paths go through.
fn modules_named(file: &File) -> BTreeSet<String> {
    let up = "super::".repeat(file.depth());
    let mut named = BTreeSet::new();
    // Only the binary sees the crate from outside; elsewhere its name stands in texts, such as log filters.
    let by_name = if file.module() == "main" { "framegate::" } else { "crate::" };
    for root in ["crate::", by_name, up.as_str()] {
        for (at, _) in file.code.match_indices(root) {
            if !file.code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
                let mut heads = heads(&file.code[at + root.len()..]);
                // `super` of a module inside a file is that file, whose items are not modules.
                heads.retain(|head| root != up || LAYERS.iter().any(|(module, _)| module == head));
                named.extend(heads);
            }
        }
    }
    named
}

/// The first names of a path or of a braced list of paths.
fn heads(path: &str) -> Vec<String> {
    let head = |path: &str| -> String {
        path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == '*').collect()
    };
    let Some(list) = path.strip_prefix('{') else { return vec![head(path)] };
    let mut depth = 1;
    let mut heads = vec![head(list)];
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => heads.push(head(&list[at + 1..])),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn brokers_named(file: &File) -> Vec<String> {
    let code = file.code.to_lowercase();
    let words = code.split(|c: char| !c.is_alphanumeric());
    let brokers = words.filter(|word| BROKERS.iter().any(|broker| word.starts_with(broker)));
    brokers.map(|word| format!("src/{}: `{word}`: brokers are named in source/ only", file.path)).collect()
}

fn statuses_named(file: &File) -> Vec<String> {
    let lines = file.code.lines().filter(|line| line.contains("StatusCode"));
    lines.map(|line| format!("src/{}: `{}`: statuses are judged in publish/ only", file.path, line.trim())).collect()
}
