//! Debian packages of other releases, without a change to this machine: an apt with separate directories.
//!
//! The mirror is the one that this machine is configured with. It is read from apt's sources, in both formats.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{command, output, run as run_command};

/// The paths of apt's sources.
const SOURCES: [&str; 2] = ["/etc/apt/sources.list", "/etc/apt/sources.list.d"];

/// Debian's own keys, from the package debian-archive-keyring. It has the keys of releases that are newer than this one.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A Debian mirror, and the keys that its releases are signed with.
pub(crate) struct Mirror {
    uri: String,
    keyring: PathBuf,
    /// The release that this machine runs.
    codename: String,
}

impl Mirror {
    /// The mirror that this machine's apt uses for its own release.
    ///
    /// # Errors
    /// If this is not Debian, or apt has no source for this release, or Debian's keys are not here.
    pub(crate) fn of_this_machine() -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
        ensure!(
            os_release(&release, "ID") == Some("debian"),
            "this machine does not run Debian, so apt has no mirror with the kernel packages"
        );
        let codename = os_release(&release, "VERSION_CODENAME").context("/etc/os-release has no VERSION_CODENAME")?;
        let mut sources = Vec::new();
        for path in source_files()? {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let is_deb822 = path.extension().is_some_and(|extension| extension == "sources");
            sources.extend(if is_deb822 { parse_deb822(&text) } else { parse_one_line(&text) });
        }
        let uri = choose(&sources, codename)
            .with_context(|| format!("apt has no source for Debian's `{codename} main` in {}", SOURCES.join(" or ")))?;
        let keyring = PathBuf::from(KEYRING);
        ensure!(keyring.exists(), "{KEYRING} is missing: install debian-archive-keyring");
        Ok(Self { uri: uri.to_owned(), keyring, codename: codename.to_owned() })
    }

    /// The name of the release that this machine runs.
    pub(crate) fn codename(&self) -> &str {
        &self.codename
    }
}

/// A value of /etc/os-release.
fn os_release<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches('"'))
}

/// The files that apt reads: those in the directory by their extension, sorted by name.
fn source_files() -> Result<Vec<PathBuf>> {
    let [file, directory] = SOURCES.map(PathBuf::from);
    let mut files: Vec<_> = Some(file).into_iter().filter(|file| file.exists()).collect();
    if directory.exists() {
        let entries = fs::read_dir(&directory)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let known = |path: &PathBuf| path.extension().is_some_and(|name| name == "list" || name == "sources");
        files.extend(entries.into_iter().filter(known));
    }
    files.sort();
    Ok(files)
}

/// One source of binary packages.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: String,
}

/// Lines of the form `deb [option=value ...] URI SUITE COMPONENT...`.
fn parse_one_line(text: &str) -> Vec<Source> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter_map(|line| parse_line(line.strip_prefix("deb")?)).collect()
}

/// The part after `deb` of such a line.
fn parse_line(rest: &str) -> Option<Source> {
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    Some(Source {
        uris: vec![uri],
        suites: vec![suite],
        components: words.collect(),
        signed_by: signed_by.unwrap_or_default().to_owned(),
    })
}

/// Paragraphs of `Field: values`, separated by empty lines. A line that begins with a space continues the field before.
fn parse_deb822(text: &str) -> Vec<Source> {
    let without_comments: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    without_comments.split(|line| line.trim().is_empty()).filter_map(parse_paragraph).collect()
}

fn parse_paragraph(lines: &[&str]) -> Option<Source> {
    let values = |wanted: &str| -> Vec<String> {
        let mut words = Vec::new();
        let mut inside = false;
        for line in lines {
            let continues = line.starts_with([' ', '\t']);
            let value = match line.split_once(':') {
                _ if continues => line,
                Some((name, value)) => {
                    inside = name.eq_ignore_ascii_case(wanted);
                    value
                }
                None => continue,
            };
            if inside {
                words.extend(value.split_whitespace().map(str::to_owned));
            }
        }
        words
    };
    let is_off = values("Enabled").iter().any(|value| value.eq_ignore_ascii_case("no"));
    if is_off || !values("Types").iter().any(|value| value == "deb") {
        return None;
    }
    Some(Source {
        uris: values("URIs"),
        suites: values("Suites"),
        components: values("Components"),
        signed_by: values("Signed-By").join(" "),
    })
}

/// The mirror of Debian itself. Other mirrors may also have a suite with the release's name. So Debian's keys decide, or the
/// directory's name if a source does not name its keys.
fn choose<'a>(sources: &'a [Source], codename: &str) -> Option<&'a str> {
    let has_release = |source: &&Source| {
        source.suites.iter().any(|suite| suite == codename) && source.components.iter().any(|name| name == "main")
    };
    let is_debian = |source: &Source, uri: &str| {
        source.signed_by.contains("debian-archive-")
            || source.signed_by.is_empty() && uri.trim_end_matches('/').ends_with("/debian")
    };
    sources
        .iter()
        .filter(has_release)
        .find_map(|source| source.uris.iter().find(|uri| is_debian(source, uri)).map(String::as_str))
}

/// A separate apt, for suites of a mirror.
pub(crate) struct Apt {
    configuration: PathBuf,
}

/// The packages that a separate apt treats as installed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Installed {
    /// None: single packages are downloaded.
    Nothing,
    /// Those of this machine: only missing dependencies are downloaded.
    AsHere,
}

impl Apt {
    /// Creates one in `dir`, and fetches the lists of packages.
    ///
    /// # Errors
    /// If the mirror cannot be reached, or does not have a suite.
    pub(crate) fn open(dir: &Path, mirror: &Mirror, suites: &[&str], installed: Installed) -> Result<Self> {
        for name in ["lists/partial", "cache/archives/partial", "state"] {
            let dir = dir.join(name);
            fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        // A copy, because apt would lock the original.
        let installed = match installed {
            Installed::Nothing => Vec::new(),
            Installed::AsHere => fs::read("/var/lib/dpkg/status").context("/var/lib/dpkg/status")?,
        };
        fs::write(dir.join("state/status"), installed)?;
        fs::write(dir.join("debian.sources"), sources_text(mirror, suites))?;
        let configuration = dir.join("apt.conf");
        fs::write(&configuration, configuration_text(dir))?;
        let apt = Self { configuration };
        run_command(command("apt-get").arg("-c").arg(&apt.configuration).args(["update", "-qq"]))
            .with_context(|| format!("the lists of Debian's {}", suites.join(" and ")))?;
        Ok(apt)
    }

    /// The dependencies of a package.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let text = output(command("apt-cache").arg("-c").arg(&self.configuration).args(["depends", package]))?;
        let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// Downloads packages and unpacks them into `into`.
    pub(crate) fn unpack(&self, packages: &[String], into: &Path) -> Result<()> {
        let archives = into.with_extension("archives");
        let _ = fs::remove_dir_all(&archives);
        fs::create_dir_all(&archives)?;
        let mut download = command("apt-get");
        download.arg("-c").arg(&self.configuration).args(["download", "-qq"]).args(packages).current_dir(&archives);
        run_command(&mut download)?;
        unpack_archives(&archives, into)?;
        Ok(fs::remove_dir_all(&archives)?)
    }

    /// Downloads a package of a suite, with all dependencies that are not installed here, and unpacks them into `into`.
    pub(crate) fn unpack_with_needs(&self, package: &str, suite: &str, into: &Path) -> Result<()> {
        let mut download = command("apt-get");
        download.arg("-c").arg(&self.configuration).args(["install", "--download-only", "--yes", "-qq"]);
        download.args(["--no-install-recommends", "--target-release", suite, package]);
        run_command(&mut download)?;
        let archives = self.configuration.with_file_name("cache").join("archives");
        unpack_archives(&archives, into)
    }
}

fn unpack_archives(archives: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    let mut count = 0;
    for entry in fs::read_dir(archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run_command(command("dpkg-deb").arg("-x").arg(&path).arg(into))?;
            count += 1;
        }
    }
    if count == 0 {
        bail!("apt has downloaded no package into {}", archives.display());
    }
    Ok(())
}

fn sources_text(mirror: &Mirror, suites: &[&str]) -> String {
    let (uri, keyring) = (&mirror.uri, mirror.keyring.display());
    let suites = suites.join(" ");
    format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nTargets: Packages\nSigned-By: {keyring}\n")
}

/// This machine's network settings apply; its sources, preferences and hooks do not.
fn configuration_text(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"Dir::Etc::sourcelist "{dir}/debian.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{dir}/state";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/state/status";
Dir::Cache "{dir}/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suites: &[&str], components: &[&str], signed_by: &str) -> Source {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Source {
            uris: vec![uri.to_owned()],
            suites: owned(suites),
            components: owned(components),
            signed_by: signed_by.to_owned(),
        }
    }

    #[test]
    fn one_line_sources_are_read() {
        let text = "# a comment\n\
                    deb http://mirror.example/debian bookworm main contrib # the release\n\
                    deb-src http://mirror.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] https://other.example/apt bookworm main\n\
                    deb\n";
        assert_eq!(
            parse_one_line(text),
            [
                source("http://mirror.example/debian", &["bookworm"], &["main", "contrib"], ""),
                source("https://other.example/apt", &["bookworm"], &["main"], "/k.gpg"),
            ]
        );
    }

    #[test]
    fn deb822_sources_are_read() {
        let text = "Types: deb deb-src\n# between fields\nURIs: http://mirror.example/debian\nSuites: bookworm\n  \
                    bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nEnabled: no\nURIs: u\n\
                    Suites: s\n\n\nTypes: deb-src\nURIs: u\nSuites: s\n";
        assert_eq!(
            parse_deb822(text),
            [source("http://mirror.example/debian", &["bookworm", "bookworm-updates"], &["main"], "/k.gpg")]
        );
    }

    #[test]
    fn debian_itself_is_chosen_among_sources_of_the_same_release() {
        let vendor = source("https://vendor.example/apt", &["bookworm"], &["main"], "/vendor.gpg");
        let security = source("http://m.example/debian-security", &["bookworm-security"], &["main"], "");
        let debian = source("http://m.example/debian/", &["bookworm"], &["main"], "");
        let signed = source("http://m.example/mirror", &["bookworm"], &["main"], "/debian-archive-keyring.gpg");
        let all = [vendor.clone(), security, debian, signed.clone()];
        assert_eq!(choose(&all, "bookworm"), Some("http://m.example/debian/"));
        assert_eq!(choose(&[vendor.clone(), signed], "bookworm"), Some("http://m.example/mirror"));
        assert_eq!(choose(&[vendor], "bookworm"), None);
    }

    #[test]
    fn os_release_values_may_be_quoted() {
        let text = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=bookworm\nID=debian\nHOME=\"x\"\n";
        assert_eq!(os_release(text, "VERSION_CODENAME"), Some("bookworm"));
        assert_eq!(os_release(text, "PRETTY_NAME"), Some("Debian"));
        assert_eq!(os_release(text, "VERSION"), None);
    }
}
