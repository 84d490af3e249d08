//! Problems: what is wrong with a configuration, where, and what to do, in one line each.

use std::{fmt, path::PathBuf};

use super::ObjectName;

/// How much a problem matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Nothing is wrong; something was left out on purpose.
    Info,
    /// A value was not understood; a default is used instead.
    Warning,
    /// An object, or a part of it, is not in use.
    Error,
}

impl Severity {
    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The place in a file that an object was read from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// The document in the file, from 1; `None`: the file has only one, or the problem concerns the whole file.
    pub document: Option<u32>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match self.document {
            Some(document) => write!(f, ", document {document}"),
            None => Ok(()),
        }
    }
}

/// The object that a problem is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Object {
    /// Its kind, such as `Service`.
    pub kind: String,
    /// Its name.
    pub name: ObjectName,
}

/// A problem in a configuration.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// Where the object was read.
    pub origin: Option<Origin>,
    /// The object.
    pub object: Option<Object>,
    /// Path of the field in the object, such as `spec.ports[0].protocol`; may be empty.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl Problem {
    /// A problem of the whole source or of a file.
    #[must_use]
    pub fn new(severity: Severity, origin: Option<Origin>, message: impl Into<String>) -> Self {
        Self { severity, origin, object: None, field: String::new(), message: message.into() }
    }

    /// The same, of one object.
    #[must_use]
    pub fn of(mut self, kind: &str, name: &ObjectName) -> Self {
        self.object = Some(Object { kind: kind.to_owned(), name: name.clone() });
        self
    }

    /// The same, of one field.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if let Some(Object { kind, name }) = &self.object {
            write!(f, "{kind} {name}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        // One line, whatever white space a decoder's message or a user's value contains.
        let words: Vec<&str> = self.message.split_whitespace().collect();
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_with_all_it_knows() {
        let origin = Origin { file: "web.yaml".into(), document: Some(2) };
        let problem = Problem::new(Severity::Error, Some(origin), "not handled yet;\n  use TCP or UDP")
            .of("Service", &ObjectName::new("shop", "cart"))
            .field("spec.ports[1].protocol");
        assert_eq!(
            problem.to_string(),
            "web.yaml, document 2: Service shop/cart: spec.ports[1].protocol: not handled yet; use TCP or UDP"
        );
        assert_eq!(Problem::new(Severity::Info, None, "nothing to do").to_string(), "nothing to do");
    }
}
