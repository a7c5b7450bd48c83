//! Secrets: masked wherever they could be printed, wiped when dropped, read from files that others cannot read.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

/// The longest secret file that is read, in bytes: a token is a few kilobytes at most.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// A password or token. No `Display`, no `Serialize`; `Debug` is masked.
#[derive(Clone)]
pub struct Secret(SecretString);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(SecretString::from(text.into()))
    }

    /// The secret itself. Call it only where it is put on the wire.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// Reads a secret from a file, without the white space around it.
    ///
    /// # Errors
    /// If it cannot be read, is empty, too large, not UTF-8, or can be read by users other than its owner and group.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let show = path.display();
        let file = File::options()
            .read(true)
            .custom_flags(libc_nonblock())
            .open(path)
            .with_context(|| format!("cannot read the secret file `{show}`"))?;
        let meta = file.metadata().with_context(|| format!("cannot read the secret file `{show}`"))?;
        if !meta.is_file() {
            bail!("the secret file `{show}` is not a regular file");
        }
        if meta.mode() & 0o007 != 0 {
            bail!(
                "the secret file `{show}` can be read or changed by other users (mode {:04o}); run `chmod o= {show}`",
                meta.mode() & 0o7777
            );
        }
        if meta.len() > SECRET_BYTES_MAX {
            bail!("the secret file `{show}` has {} bytes; at most {SECRET_BYTES_MAX} are expected", meta.len());
        }
        let mut text = Zeroizing::new(String::new());
        file.take(SECRET_BYTES_MAX)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read the secret file `{show}` as UTF-8 text"))?;
        let secret = text.trim();
        if secret.is_empty() {
            bail!("the secret file `{show}` is empty");
        }
        Ok(Self::new(secret))
    }
}

/// `O_NONBLOCK`, so that a FIFO in a secret's place cannot hang the daemon.
fn libc_nonblock() -> i32 {
    i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0)
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_secret_is_trimmed_masked_and_refused_when_others_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        std::fs::write(&path, "hunter2\n").unwrap();
        for (mode, ok) in [(0o600, true), (0o640, true), (0o400, true), (0o644, false), (0o602, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let secret = Secret::read(&path);
            assert_eq!(secret.is_ok(), ok, "mode {mode:o}");
            if let Ok(secret) = secret {
                assert_eq!(secret.expose(), "hunter2");
                assert_eq!(format!("{secret:?}"), "***");
            }
        }
    }

    #[test]
    fn an_empty_or_missing_secret_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        assert!(Secret::read(&path).unwrap_err().to_string().contains("password"));
        std::fs::write(&path, " \n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Secret::read(&path).unwrap_err().to_string().contains("empty"));
    }
}
