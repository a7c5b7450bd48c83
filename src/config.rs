//! The configuration: reads and layers its files, composes each module's own `Config`, and reports every problem at once.
//!
//! `framegate.toml`, then `conf.d/*.toml` beside it in the order of their names, then the environment
//! (`FRAMEGATE_SECTION__KEY=value`); what comes later wins, key by key. The lists of `[[detectors]]` are joined, never replaced:
//! a file in `conf.d` adds its detectors to those before it.
//!
//! Not here: what the sections mean (each belongs to its module), reading secrets, and acting on a change.

mod changes;
mod check;
mod facts;
mod layer;
mod problem;
mod zones;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use changes::{Changes, diff};
pub use check::check;
pub use facts::{Facts, SecretFile, SecretPlaces};
pub use problem::{Finding, Problem, Problems, Severity};

use crate::{admin, encode, log, publish, settle, source};
use layer::{ENVIRONMENT_PREFIX, Layer};

/// The key of the list that files add to.
const DETECTORS: &str = "detectors";
/// The directory of further files, beside the first.
const FURTHER_FILES: &str = "conf.d";

/// Everything that can be configured. Times are written `500ms`, `10s`, `1m 30s` or `7d`, sizes `8MiB` or `1GiB`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Framegate configuration")]
pub struct Settings {
    /// The engine, and how to reach it.
    #[serde(default)]
    pub engine: publish::engine::Config,
    /// How fast frames are published, how many at once, how often one is tried.
    #[serde(default)]
    pub publish: publish::Config,
    /// How images are read and made into requests.
    #[serde(default)]
    pub encode: encode::Config,
    /// Where frames are kept that the engine will never take, each with the reason.
    #[serde(default)]
    pub dead_letter: settle::dead_letter::Config,
    /// Where frames wait whose senders were told that they are safe, before they are published.
    #[serde(default)]
    pub spool: source::spool::Config,
    /// Where frames are pushed to over HTTP, with the engine's own API.
    #[serde(default)]
    pub push: source::push::Server,
    /// Where the daemon is looked at and told what to do.
    #[serde(default)]
    pub admin: admin::Config,
    /// What is logged, and how.
    #[serde(default)]
    pub log: log::Config,
    /// How the daemon stops.
    #[serde(default)]
    pub shutdown: Shutdown,
    /// Where frames come from: one entry for each detector, or for a family of them. Each has exactly one source.
    #[serde(default)]
    pub detectors: Vec<source::Entry>,
    /// Where relative secret files are looked up; not a key.
    #[serde(skip)]
    pub secret_places: SecretPlaces,
}

impl Settings {
    /// Where a secret (or CA) file is: as it is if absolute, else in `$CREDENTIALS_DIRECTORY`, else beside the configuration.
    /// Looks at the file system; ask again after a reload.
    pub fn secret_path(&self, file: &Path) -> PathBuf {
        self.secret_places.resolve(file)
    }

    /// `[engine]` with its files where they are now.
    pub fn engine(&self) -> publish::engine::Config {
        let ca_file = self.engine.ca_file.as_deref().map(|file| self.secret_path(file));
        publish::engine::Config { ca_file, ..self.engine.clone() }
    }

    /// Where the engine's secrets are now.
    pub fn engine_secrets(&self) -> publish::engine::Secrets {
        let place = |file: &Option<PathBuf>| file.as_deref().map(|file| self.secret_path(file));
        publish::engine::Secrets {
            password_file: place(&self.engine.password_file),
            token_file: place(&self.engine.token_file),
        }
    }
}

/// `[shutdown]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    /// How long frames in hand may take to end after a stop; what is left then goes back to its source.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub deadline: Duration,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(20) }
    }
}

/// A configuration without problems.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What it says.
    pub settings: Settings,
    /// What somebody should know, one line each.
    pub warnings: Vec<String>,
}

/// What of the process's environment matters here; handed in, so that tests need not change their own.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Variables, of which those beginning `FRAMEGATE_` count.
    pub vars: Vec<(String, String)>,
    /// systemd's `$CREDENTIALS_DIRECTORY`.
    pub credentials_directory: Option<PathBuf>,
}

impl Environment {
    /// That of this process.
    pub fn from_process() -> Self {
        let text = |it: OsString| it.to_string_lossy().into_owned();
        let ours =
            |(name, _): &(OsString, OsString)| name.as_encoded_bytes().starts_with(ENVIRONMENT_PREFIX.as_bytes());
        let mut vars: Vec<_> =
            std::env::vars_os().filter(ours).map(|(name, value)| (text(name), text(value))).collect();
        vars.sort();
        Self { vars, credentials_directory: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from) }
    }
}

/// Reads, layers and checks the configuration that begins with the file `path`.
///
/// # Errors
/// Every problem there is, not only the first.
pub fn load(path: &Path, environment: &Environment) -> Result<Loaded, Problems> {
    let mut problems = Vec::new();
    let layers = read_layers(path, environment, &mut problems);
    let Some(layers) = layers else { return Err(Problems(problems)) };
    let mut settings = match merge(&layers) {
        Ok(settings) => settings,
        Err(error) => {
            problems.push(Problem {
                file: path.display().to_string(),
                at: None,
                key: String::new(),
                wrong: format!("cannot be layered: {error:#}"),
                right: String::new(),
            });
            return Err(Problems(problems));
        }
    };
    settings.secret_places = SecretPlaces::new(environment.credentials_directory.clone(), path);

    let mut warnings = Vec::new();
    let known = problems.clone();
    for finding in check(&settings, &Facts::gather(&settings)) {
        let severity = finding.severity;
        let problem = locate(finding, &layers, path);
        match severity {
            Severity::Warning => warnings.push(problem.to_string()),
            Severity::Problem if follows_from(&problem, &known) => {}
            Severity::Problem => problems.push(problem),
        }
    }
    // As somebody reads: file by file, from the top.
    problems.sort_by_key(|it| (layers.iter().position(|layer| layer.file == it.file).unwrap_or(layers.len()), it.at));
    if problems.is_empty() { Ok(Loaded { settings, warnings }) } else { Err(Problems(problems)) }
}

/// Where the daemon of this configuration is asked. A wrong configuration has a daemon too, which is to hear of it; `None` if
/// not even the files can be read, and then no other daemon is bothered instead.
pub fn control_socket(path: &Path, environment: &Environment) -> Option<PathBuf> {
    let layers = read_layers(path, environment, &mut Vec::new())?;
    let told = layers.iter().rev().find_map(|layer| layer.sections.get("admin")?.get("control")?.as_str());
    Some(told.map_or_else(|| admin::Config::default().control, PathBuf::from))
}

/// The JSON schema of a configuration file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Settings).to_value()
}

/// `None` if a file could not be read at all: what is missing then would be reported as missing everywhere.
fn read_layers(path: &Path, environment: &Environment, problems: &mut Vec<Problem>) -> Option<Vec<Layer>> {
    let mut files = vec![path.to_owned()];
    files.extend(further_files(path, problems));
    let layers: Vec<_> = files.iter().map(|file| Layer::read(file, problems)).collect();
    let mut layers: Vec<Layer> = layers.into_iter().collect::<Option<_>>().or_else(|| {
        // The variables' problems are told all the same.
        variables(environment, problems).for_each(drop);
        None
    })?;
    layers.extend(variables(environment, problems));
    Some(layers)
}

fn variables(environment: &Environment, problems: &mut Vec<Problem>) -> impl Iterator<Item = Layer> {
    environment
        .vars
        .iter()
        .filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX))
        .filter_map(|(name, value)| Layer::variable(name, value, problems))
}

fn further_files(path: &Path, problems: &mut Vec<Problem>) -> Vec<PathBuf> {
    let directory = path.with_file_name(FURTHER_FILES);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            problems.push(Problem {
                file: directory.display().to_string(),
                at: None,
                key: String::new(),
                wrong: format!("cannot be read: {error}"),
                right: "make it a directory readable for the user framegate runs as, or remove it".into(),
            });
            return Vec::new();
        }
    };
    let mut files: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .filter(|file| file.extension().is_some_and(|it| it == "toml"))
        .collect();
    files.sort();
    files
}

/// Lays the files' sections over each other and joins their detectors. Every layer fits by itself, so this only fails if
/// the layering does.
fn merge(layers: &[Layer]) -> anyhow::Result<Settings> {
    let merged = layers.iter().try_fold(config::Config::builder(), |builder, layer| {
        let text = toml::to_string(&layer.sections)?;
        anyhow::Ok(builder.add_source(config::File::from_str(&text, config::FileFormat::Toml)))
    });
    // By way of a TOML table, whose types are as strict as the files' own.
    let table: Table = merged?.build()?.try_deserialize()?;
    let mut settings: Settings = Value::Table(table).try_into()?;
    settings.detectors = layers.iter().flat_map(|it| it.detectors.iter().map(|(_, entry)| entry.clone())).collect();
    Ok(settings)
}

/// From the merged settings back to the file that said it.
fn locate(finding: Finding, layers: &[Layer], path: &Path) -> Problem {
    let Finding { key, wrong, right, .. } = finding;
    let at_file = |layer: &Layer, key: String, wrong, right| Problem {
        file: layer.file.clone(),
        at: layer.place(&key),
        key,
        wrong,
        right,
    };
    if let Some((index, rest)) = key.strip_prefix("detectors[").and_then(|rest| rest.split_once(']')) {
        let mut origins = layers.iter().flat_map(|layer| layer.detectors.iter().map(move |(i, _)| (layer, *i)));
        if let Some((layer, i)) = index.parse().ok().and_then(|index| origins.nth(index)) {
            return at_file(layer, format!("{DETECTORS}[{i}]{rest}"), wrong, right);
        }
    }
    // The last one that says it is the one that counts; what nobody says belongs where its section is, else to the first file.
    let section = key.split('.').next().unwrap_or_default();
    let says = |key: &str| layers.iter().rev().find(|layer| layer.says(key));
    match says(&key).or_else(|| says(section)) {
        Some(layer) => at_file(layer, key, wrong, right),
        None => Problem { file: path.display().to_string(), at: None, key, wrong, right },
    }
}

/// Whether `problem` only follows from one already told: it concerns a key whose value could not be taken.
fn follows_from(problem: &Problem, known: &[Problem]) -> bool {
    if problem.key == DETECTORS {
        return known.iter().any(|it| it.key.starts_with(DETECTORS));
    }
    let owner = |problem: &Problem| {
        let first = problem.key.split('.').next().unwrap_or_default().to_owned();
        first.starts_with(DETECTORS).then(|| (problem.file.clone(), first))
    };
    known.iter().filter(|it| owner(it) == owner(problem)).any(|it| {
        let meant = it.right.strip_prefix("did you mean `").and_then(|rest| rest.strip_suffix("`?"));
        let last = it.key.rsplit('.').next().unwrap_or_default();
        // An entry without a source is checked as if it were pushed.
        it.key == problem.key
            || it.key.ends_with(']') && problem.key == format!("{}.push", it.key)
            || [Some(last), meant].into_iter().flatten().any(|name| {
                let name = name.split('[').next().unwrap_or(name);
                let mentioned = |text: &str| text.contains(&format!("{name}`"));
                problem.key.rsplit('.').next() == Some(name) || mentioned(&problem.wrong) || mentioned(&problem.right)
            })
    })
}
