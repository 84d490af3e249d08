//! The container image, if an engine runs.

use std::path::Path;

use anyhow::Result;

use super::VERSION;
use crate::run::{command, output, root, run as run_command};

/// Programs that understand `build`, each with a query that succeeds only if the engine works.
const ENGINES: [(&str, &[&str]); 3] = [("docker", &["info"]), ("podman", &["info"]), ("buildah", &["images"])];

/// Builds the image of a filled stage; if no engine works, prints why.
pub(super) fn build(stage: &Path) -> Result<()> {
    let tag = format!("affinity:{VERSION}");
    let mut refusals = Vec::new();
    for (engine, question) in ENGINES {
        match output(command(engine).args(question)) {
            Ok(_) => {
                run_command(
                    command(engine)
                        .args(["build", "--tag", &tag, "--build-arg"])
                        .arg(format!("VERSION={VERSION}"))
                        .arg("--file")
                        .arg(root().join("deploy/Containerfile"))
                        .arg(stage),
                )?;
                println!("{tag}: built by {engine}");
                return Ok(());
            }
            Err(error) => refusals.push(reason(engine, &error)),
        }
    }
    println!("NOT BUILT: the image {tag}, because no container engine runs: {}", refusals.join("; "));
    Ok(())
}

/// Why an engine does not work, in few words.
fn reason(engine: &str, error: &anyhow::Error) -> String {
    let is_missing = error.root_cause().downcast_ref::<std::io::Error>();
    if is_missing.is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return format!("no {engine}");
    }
    format!("{engine} does not respond")
}
