//! A detector's name as an entry writes it: text with placeholders that each frame fills.
//!
//! Not here: where the values come from (each source has its own) and how long a name may be.

use std::borrow::Cow;

/// A detector's name, perhaps with placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// The n-th level of a path or subject, from 0.
    Level(usize),
    /// What the frame itself says.
    Field(String),
}

/// The placeholders that one kind of source knows.
#[derive(Clone, Copy, Debug)]
pub struct Placeholders {
    /// `path` or `subject`: `{path.0}`. `None`: it has no levels.
    pub levels: Option<&'static str>,
    /// Names in braces that stand for what a frame says: `field.detectorName`.
    pub fields: &'static [&'static str],
    /// What is known, for people.
    pub hint: &'static str,
}

impl Template {
    /// Takes a name apart.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow the name.
    pub fn parse(name: &str, known: Placeholders) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = name;
        while let Some(at) = rest.find(['{', '}']) {
            let inner = rest[at..].strip_prefix('{').ok_or("a } without its {")?;
            let (inner, after) = inner.split_once('}').ok_or("a { without its }")?;
            if at > 0 {
                parts.push(Part::Text(rest[..at].to_owned()));
            }
            parts.push(known.part(inner).ok_or_else(|| format!("{{{inner}}} is not known here"))?);
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self(parts))
    }

    /// Whether every frame gets the same name.
    pub fn is_fixed(&self) -> bool {
        self.0.iter().all(|part| matches!(part, Part::Text(_)))
    }

    /// Whether it names a level of a path or subject.
    pub fn names_levels(&self) -> bool {
        self.0.iter().any(|part| matches!(part, Part::Level(_)))
    }

    /// The name for a frame with these levels and fields; `None` if it lacks one of them.
    pub fn fill(&self, levels: &[&[u8]], field: impl Fn(&str) -> Option<String>) -> Option<String> {
        let mut name = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Level(index) => name.push_str(&shown(levels.get(*index)?)),
                Part::Field(key) => name.push_str(&field(key).filter(|value| !value.is_empty())?),
            }
        }
        Some(name)
    }
}

impl Placeholders {
    fn part(&self, inner: &str) -> Option<Part> {
        if let Some(known) = self.fields.iter().find(|field| **field == inner) {
            return Some(Part::Field((*known).to_owned()));
        }
        let index = inner.strip_prefix(self.levels?)?.strip_prefix('.')?;
        // `parse` alone would take a sign, too.
        let digits = !index.is_empty() && index.bytes().all(|it| it.is_ascii_digit());
        index.parse::<u8>().ok().filter(|_| digits).map(|index| Part::Level(index.into()))
    }
}

/// A name is shown in logs and sent as JSON: what is not UTF-8 is escaped, not guessed.
fn shown(level: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(level) {
        Ok(text) => text.into(),
        Err(_) => level.escape_ascii().to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: Placeholders = Placeholders { levels: Some("path"), fields: &[], hint: "" };
    const MIXED: Placeholders = Placeholders { levels: Some("subject"), fields: &["field.detectorName"], hint: "" };

    #[test]
    fn placeholders_are_filled_or_the_frame_has_no_name() {
        for (name, path, filled) in [
            ("Lobby", b"".as_slice(), Some("Lobby")),
            ("{path.0}-{path.1}!", b"a/b", Some("a-b!")),
            ("{path.0}-{path.1}", b"a", None),
            ("{path.0}", b"\xff", Some("\\xff")),
            ("{path.1}{path.0}", b"a/b/c", Some("ba")),
            ("{path.0}", "Ä".as_bytes(), Some("Ä")),
        ] {
            let levels: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
            let template = Template::parse(name, PATH).unwrap();
            assert_eq!(template.fill(&levels, |_| None).as_deref(), filled, "{name}");
        }
        let template = Template::parse("{subject.0}/{field.detectorName}", MIXED).unwrap();
        assert_eq!(template.fill(&[b"s"], |key| Some(key.to_uppercase())).as_deref(), Some("s/FIELD.DETECTORNAME"));
        assert_eq!(template.fill(&[b"s"], |_| Some(String::new())), None, "an empty field is none");
    }

    proptest::proptest! {
        #[test]
        fn no_name_and_no_path_panics(name in "[{}a.0-9pathÄ]{0,30}", path in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60)) {
            let Ok(template) = Template::parse(&name, PATH) else { return Ok(()) };
            let levels: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
            let filled = template.fill(&levels, |_| None);
            proptest::prop_assert!(!template.is_fixed() || filled.as_deref() == Some(&*name));
        }
    }

    #[test]
    fn what_is_not_known_or_not_closed_is_refused() {
        for name in
            ["{topic.0}", "{path.0", "path.0}", "{path.}", "{path.+1}", "{path.256}", "{}", "{field.detectorName}"]
        {
            assert!(Template::parse(name, PATH).is_err(), "{name}");
        }
        assert!(Template::parse("Lobby", PATH).unwrap().is_fixed());
        assert!(Template::parse("{path.0}", PATH).unwrap().names_levels());
    }
}
