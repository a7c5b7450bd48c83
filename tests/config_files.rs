//! The configuration files that we ship, and a corpus of right and wrong ones: each wrong one has its exact messages beside it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use framegate::config::{self, Environment, Settings};
use serde_json::Value;

/// Fewer than this, and the corpus was not found.
const INVALID_MIN: usize = 30;

#[test]
fn framegate_toml_holds_the_defaults() {
    let written = fs::read_to_string(root("config/framegate.toml")).unwrap();
    let required = |text: &str| toml::from_str::<Settings>(text).unwrap();
    let minimal = required(&fs::read_to_string(root("config/minimal.toml")).unwrap());
    assert_eq!(required(&written), minimal, "config/framegate.toml on the left, the code's defaults on the right");
}

#[test]
fn framegate_toml_documents_every_key_of_the_schema_and_no_other() {
    let written = fs::read_to_string(root("config/framegate.toml")).unwrap();
    // What is commented out is documented too: take the comment's mark away from what looks like a key.
    let keys: BTreeSet<&str> = written
        .lines()
        .map(|line| line.strip_prefix("# ").unwrap_or(line))
        .filter_map(|line| line.split_once(" = ").map(|(key, _)| key))
        .filter(|key| key.bytes().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || it == b'_'))
        .collect();
    let schema = config::schema();
    let mut known = BTreeSet::new();
    properties(&schema, &mut known);
    // `push` is both a section and the key of an entry.
    let tables = ["engine", "publish", "encode", "dead_letter", "spool", "admin", "log", "shutdown", "detectors"];
    for table in tables {
        assert!(known.remove(table), "{table}");
        assert!(written.contains(&format!("[{table}]")), "{table}");
    }
    for queue in ["redis", "nats", "mqtt"] {
        assert!(known.remove(queue), "{queue}");
        assert!(written.contains(&format!("[detectors.{queue}]")), "{queue}");
    }
    // `directory` is both a table of a detector and a key of [dead_letter]; `format` both of [log] and of detect_time.
    assert!(written.contains("[detectors.directory]") && written.contains("[push]"));
    let known: BTreeSet<&str> = known.iter().map(String::as_str).collect();
    assert!(known.len() > 30, "{known:?}");
    assert_eq!(keys, known, "config/framegate.toml on the left, the schema on the right");
}

#[test]
fn the_shipped_files_and_examples_load() {
    let mut files = vec![root("config/framegate.toml"), root("config/minimal.toml")];
    files.extend(toml_files("config/examples"));
    files.extend(toml_files("tests/config/valid"));
    assert!(files.len() >= 6, "{files:?}");
    for file in files {
        if let Err(problems) = config::load(&file, &Environment::default()) {
            panic!("{problems}");
        }
    }
}

#[test]
fn every_invalid_file_says_exactly_what_is_wrong() {
    let files = toml_files("tests/config/invalid");
    assert!(files.len() >= INVALID_MIN, "{} files", files.len());
    let mut wrong = Vec::new();
    for file in &files {
        let said = match config::load(file, &Environment::default()) {
            Ok(_) => "(nothing wrong)".to_owned(),
            Err(problems) => problems.to_string().replace(&format!("{}/", file.parent().unwrap().display()), ""),
        };
        assert!(!said.contains("hunter2"), "a secret is shown: {said}");
        let expected = file.with_extension("expected");
        // BLESS=1 writes what is said; read the difference before committing it.
        if std::env::var_os("BLESS").is_some() {
            fs::write(&expected, format!("{said}\n")).unwrap();
        }
        let expected = fs::read_to_string(&expected).unwrap_or_default();
        if expected.trim_end() != said || said.starts_with('(') {
            wrong.push(format!("--- {}\nexpected:\n{expected}\nsaid:\n{said}\n", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn further_files_and_the_environment_are_layered() {
    let etc = Etc::new(
        "[engine]\nbase_url = 'https://a'\nusername = 'u'\npassword_file = 'pw'\n[publish]\nrate = 1\nattempts = 3\n\
         [[detectors]]\nname = 'A'\ntime_zone = 'UTC'\ndirectory = { path = '/a' }\n",
    );
    etc.further(
        "20-more.toml",
        "[publish]\nrate = 3\n[[detectors]]\nname = 'C'\ntime_zone = 'UTC'\ndirectory = { path = '/c' }\n",
    );
    etc.further(
        "10-more.toml",
        "[publish]\nrate = 2\nburst = 2\n[[detectors]]\nname = 'B'\ntime_zone = 'UTC'\ndirectory = { path = '/b' }\n",
    );
    etc.further("README", "not read");
    etc.further(".20-more.toml.swp.toml", "not read");
    let loaded = etc
        .load(&[("FRAMEGATE_ENGINE__BASE_URL", "https://b"), ("FRAMEGATE_PUBLISH__ATTEMPTS", "5"), ("PATH", "x")])
        .unwrap();
    let settings = &loaded.settings;
    assert_eq!(settings.engine.base_url.as_str().trim_end_matches('/'), "https://b");
    assert_eq!(settings.engine.username.as_deref(), Some("u"));
    assert!((settings.publish.rate - 3.0).abs() < 1e-9);
    assert_eq!((u64::from(settings.publish.attempts), settings.publish.backoff_max.as_secs()), (5, 30));
    assert_eq!(settings.detectors.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["A", "B", "C"]);
}

#[test]
fn problems_of_all_files_and_variables_come_at_once_and_name_their_place() {
    let etc =
        Etc::new("[engine]\nbase_url = 'https://a'\nusername = 'u'\npassword_file = 'pw'\n[publish]\nrate = 'x'\n");
    etc.further("a.toml", "\n[[detectors]]\nname = 'A'\ntime_zone = 'Utc'\ndirectory = { path = '/a' }\n");
    etc.further("b.toml", "[engin]\nx = 1\n");
    let problems = etc
        .load(&[("FRAMEGATE_ENGINE__PASSWORD", "hunter2"), ("FRAMEGATE_LOG__LEVEL", "inof")])
        .unwrap_err()
        .to_string();
    let starts = [
        "framegate.toml:6:1: publish.rate: ",
        "conf.d/a.toml:4:1: detectors[0].time_zone: `Utc` is not an IANA time zone; did you mean UTC?",
        "conf.d/b.toml:1:2: engin: unknown key; did you mean `engine`?",
        "environment variable FRAMEGATE_LOG__LEVEL: log.level: `inof` is not a level; did you mean info?",
        "environment variable FRAMEGATE_ENGINE__PASSWORD: engine.password: unknown key; did you mean `password_file`?",
    ];
    let problems = problems.replace(&format!("{}/", etc.0.path().display()), "");
    let said: Vec<&str> = problems.lines().collect();
    assert_eq!(said.len(), starts.len(), "{problems}");
    for (said, start) in said.iter().zip(starts) {
        assert!(said.starts_with(start), "{said}\n{start}");
    }
    assert!(!problems.contains("hunter2"));
}

#[test]
fn a_secret_that_others_can_read_is_a_problem_and_a_missing_one_a_warning() {
    let etc = Etc::new(
        "[engine]\nbase_url = 'https://a'\nusername = 'u'\npassword_file = 'pw'\n\
         [[detectors]]\nname = 'A'\ntime_zone = 'UTC'\ndirectory = { path = '/a' }\n",
    );
    let pw = etc.0.path().join("pw");
    let warnings = etc.load(&[]).unwrap().warnings;
    assert!(
        warnings.len() == 1 && warnings[0].contains("engine.password_file: cannot read the secret file"),
        "{warnings:?}"
    );

    fs::write(&pw, "hunter2").unwrap();
    fs::set_permissions(&pw, fs::Permissions::from_mode(0o644)).unwrap();
    let problems = etc.load(&[]).unwrap_err().to_string();
    assert!(
        problems.contains(&format!("run `chmod o= {}`", pw.display())) && !problems.contains("hunter2"),
        "{problems}"
    );

    fs::set_permissions(&pw, fs::Permissions::from_mode(0o640)).unwrap();
    let loaded = etc.load(&[]).unwrap();
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!(loaded.settings.secret_path(Path::new("pw")), pw);
}

#[test]
fn a_directory_is_the_same_through_a_symbolic_link() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let etc = Etc::new(&format!(
        "[engine]\nbase_url = 'https://a'\nusername = 'u'\npassword_file = 'pw'\n\
         [[detectors]]\nname = 'A'\ntime_zone = 'UTC'\ndirectory = {{ path = '{}' }}\n\
         [[detectors]]\nname = 'B'\ntime_zone = 'UTC'\ndirectory = {{ path = '{}' }}\n",
        real.display(),
        link.display()
    ));
    let problems = etc.load(&[]).unwrap_err().to_string();
    assert!(problems.contains("is also the drop directory of `A`"), "{problems}");
}

/// A configuration directory of a test.
struct Etc(tempfile::TempDir);

impl Etc {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("framegate.toml"), text).unwrap();
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        Self(dir)
    }

    fn further(&self, name: &str, text: &str) {
        fs::write(self.0.path().join("conf.d").join(name), text).unwrap();
    }

    fn load(&self, vars: &[(&str, &str)]) -> Result<config::Loaded, config::Problems> {
        let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        config::load(&self.0.path().join("framegate.toml"), &Environment { vars, credentials_directory: None })
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn toml_files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root(directory)).unwrap_or_else(|error| panic!("{directory}: {error}"));
    let mut files: Vec<_> =
        entries.map(|it| it.unwrap().path()).filter(|it| it.extension().is_some_and(|it| it == "toml")).collect();
    files.sort();
    files
}

fn properties(schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::Object(properties)) = object.get("properties") {
                names.extend(properties.keys().cloned());
            }
            object.values().for_each(|value| properties(value, names));
        }
        Value::Array(values) => values.iter().for_each(|value| properties(value, names)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
