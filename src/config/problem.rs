//! What is wrong with a configuration, in words that say where it is and what would be right.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, or `environment variable NAME`.
    pub file: String,
    /// Line and column, from 1, where they are known.
    pub at: Option<(usize, usize)>,
    /// The key as it stands in that file: `detectors[2].directory.path`; empty for the file as a whole.
    pub key: String,
    /// What is wrong, with the value unless it may be a secret.
    pub wrong: String,
    /// What would be right.
    pub right: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&self.file))?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        f.write_str(": ")?;
        if !self.key.is_empty() {
            write!(f, "{}: ", one_line(&self.key))?;
        }
        f.write_str(&one_line(&self.wrong))?;
        if !self.right.is_empty() {
            write!(f, "; {}", one_line(&self.right))?;
        }
        Ok(())
    }
}

/// Values come from files: no line of theirs may look like one of ours, nothing of theirs may move the cursor.
fn one_line(text: &str) -> String {
    let shown = |it: char| if it.is_control() { it.escape_default().to_string() } else { it.to_string() };
    text.chars().map(shown).collect()
}

/// Everything that is wrong, one line each; never empty where it is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// What a cross-check found: not yet located in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it forbids starting.
    pub severity: Severity,
    /// The key in the merged settings.
    pub key: String,
    /// What is wrong.
    pub wrong: String,
    /// What would be right.
    pub right: String,
}

/// Whether a finding forbids starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It does.
    Problem,
    /// It does not, but somebody should know.
    Warning,
}
