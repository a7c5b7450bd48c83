//! What the checks need to know of the file system, gathered beforehand so that they stay pure. Reads secrets only to see
//! whether they can be used, and forgets them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use super::Settings;
use crate::secret::Secret;
use crate::source;

/// Where relative secret files are looked up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretPlaces {
    credentials: Option<PathBuf>,
    beside: PathBuf,
    store: PathBuf,
}

/// Where systemd takes a service's credentials from; for root alone.
const CREDENTIAL_STORE: &str = "/etc/credstore";

impl SecretPlaces {
    /// For the configuration file `config`.
    pub fn new(credentials: Option<PathBuf>, config: &Path) -> Self {
        let config = std::path::absolute(config).unwrap_or_else(|_| config.to_owned());
        let beside = config.parent().map(Path::to_owned).unwrap_or_default();
        Self { credentials, beside, store: CREDENTIAL_STORE.into() }
    }

    /// See [`Settings::secret_path`].
    pub fn resolve(&self, file: &Path) -> PathBuf {
        let beside = self.beside.join(file);
        match &self.credentials {
            // A file that is nowhere is missed where systemd would have put it.
            Some(credentials) if credentials.join(file).exists() || !beside.exists() => credentials.join(file),
            // A command by hand: as the service would have it.
            None if !beside.exists() && self.store.join(file).exists() => self.store.join(file),
            Some(_) | None => beside,
        }
    }
}

/// What the file system says.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The state of each secret or CA file, by its path as it is written.
    pub secrets: BTreeMap<PathBuf, SecretFile>,
    /// Where directories really are, without symbolic links, by their path as it is written.
    pub real: BTreeMap<PathBuf, PathBuf>,
}

/// Whether a secret file can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretFile {
    /// It can.
    Usable,
    /// It is not there, or this user may not read it: perhaps the daemon's may, or it comes later.
    Away(String),
    /// It is there and must not be used: others can read it, it is empty, a directory…
    Unfit(String),
}

impl Facts {
    /// Looks at everything that `settings` name.
    pub fn gather(settings: &Settings) -> Self {
        let mut facts = Self::default();
        let (engine, push) = (&settings.engine, &settings.push);
        let secrets = [&engine.password_file, &engine.token_file, &push.password_file, &push.tls_key_file];
        for file in secrets.into_iter().flatten() {
            let path = settings.secret_path(file);
            let state = Secret::read(&path).map_or_else(|error| unusable(&error), |_| SecretFile::Usable);
            facts.secrets.insert(file.clone(), state);
        }
        for file in [&engine.ca_file, &push.tls_cert_file].into_iter().flatten() {
            facts.secrets.insert(file.clone(), readable(&settings.secret_path(file)));
        }
        for (_, file, secret) in settings.detectors.iter().flat_map(|entry| entry.source.files()) {
            let path = settings.secret_path(file);
            let state = if secret {
                Secret::read(&path).map_or_else(|error| unusable(&error), |_| SecretFile::Usable)
            } else {
                readable(&path)
            };
            facts.secrets.insert(file.to_owned(), state);
        }
        let directories = settings
            .detectors
            .iter()
            .filter_map(source::Entry::directory)
            .flat_map(|it| [Some(&it.path), it.archive.as_ref()]);
        for directory in directories.flatten().chain([&settings.dead_letter.directory, &settings.spool.directory]) {
            facts.real.insert(directory.clone(), real(directory));
        }
        facts
    }

    /// Where `directory` really is, as far as that is known.
    pub fn real(&self, directory: &Path) -> PathBuf {
        self.real.get(directory).cloned().unwrap_or_else(|| plain(directory))
    }
}

fn readable(path: &Path) -> SecretFile {
    let away = |error| SecretFile::Away(format!("cannot read `{}`: {error}", path.display()));
    std::fs::File::open(path).map_or_else(away, |_| SecretFile::Usable)
}

fn unusable(error: &anyhow::Error) -> SecretFile {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    match kind {
        Some(ErrorKind::NotFound | ErrorKind::PermissionDenied) => SecretFile::Away(format!("{error:#}")),
        Some(_) | None => SecretFile::Unfit(format!("{error:#}")),
    }
}

/// Without symbolic links, as far as the path exists.
fn real(path: &Path) -> PathBuf {
    let path = plain(path);
    let known = path.ancestors().find_map(|ancestor| Some((ancestor, std::fs::canonicalize(ancestor).ok()?)));
    match known {
        Some((ancestor, real)) => path.strip_prefix(ancestor).map_or(real.clone(), |rest| real.join(rest)),
        None => path,
    }
}

/// Without `.`, `..` and doubled slashes.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => plain.push(component),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_finds_the_secret_that_the_service_will_be_given() {
        let dir = tempfile::tempdir().unwrap();
        let (store, etc) = (dir.path().join("credstore"), dir.path().join("etc"));
        std::fs::create_dir_all(&store).unwrap();
        std::fs::create_dir_all(&etc).unwrap();
        let places = |credentials: Option<&Path>| SecretPlaces {
            credentials: credentials.map(Path::to_owned),
            beside: etc.clone(),
            store: store.clone(),
        };
        let file = Path::new("pw");
        assert_eq!(places(None).resolve(file), etc.join("pw"), "missing everywhere");
        std::fs::write(store.join("pw"), "x").unwrap();
        assert_eq!(places(None).resolve(file), store.join("pw"));
        assert_eq!(
            places(Some(dir.path())).resolve(file),
            dir.path().join("pw"),
            "the service has only what it is given"
        );
        std::fs::write(etc.join("pw"), "x").unwrap();
        assert_eq!(places(None).resolve(file), etc.join("pw"));
    }

    #[test]
    fn a_relative_secret_is_a_credential_else_beside_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let (credentials, etc) = (dir.path().join("credentials"), dir.path().join("etc"));
        std::fs::create_dir_all(&credentials).unwrap();
        std::fs::create_dir_all(&etc).unwrap();
        let places =
            |credentials: Option<&PathBuf>| SecretPlaces::new(credentials.cloned(), &etc.join("framegate.toml"));
        let file = Path::new("pw");
        assert_eq!(places(None).resolve(file), etc.join("pw"));
        assert_eq!(places(Some(&credentials)).resolve(file), credentials.join("pw"), "missing everywhere");
        std::fs::write(etc.join("pw"), "x").unwrap();
        assert_eq!(places(Some(&credentials)).resolve(file), etc.join("pw"));
        std::fs::write(credentials.join("pw"), "x").unwrap();
        assert_eq!(places(Some(&credentials)).resolve(file), credentials.join("pw"));
        assert_eq!(places(Some(&credentials)).resolve(Path::new("/a/pw")), Path::new("/a/pw"));
    }

    #[test]
    fn a_directory_is_known_through_links_even_below_what_exists() {
        let dir = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir(base.join("a")).unwrap();
        std::os::unix::fs::symlink(base.join("a"), base.join("b")).unwrap();
        assert_eq!(real(&base.join("b/new/./x/..")), base.join("a/new"));
    }
}
