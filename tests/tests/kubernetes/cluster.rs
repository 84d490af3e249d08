//! The same comparison with any cluster: `AFFINITY_TEST_KUBECONFIG=PATH cargo test ... -- --ignored`. It only reads.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::follower::{of_files, of_snapshot, snapshot_as_files, source};

#[tokio::test]
#[ignore = "needs a cluster: set AFFINITY_TEST_KUBECONFIG to a kubeconfig, and run with --ignored"]
async fn a_real_cluster_makes_the_tables_that_its_objects_make_as_files() -> Result<()> {
    let kubeconfig = std::env::var_os("AFFINITY_TEST_KUBECONFIG").map(PathBuf::from);
    let kubeconfig = kubeconfig.context("AFFINITY_TEST_KUBECONFIG is not set")?;
    let source = source(Some(kubeconfig));
    let listed = source.read().await?;
    let mut feed = source.watch().await?;
    let watched = feed.snapshots.recv().await.context("the source has ended")?;
    ensure!(!listed.services.is_empty(), "even an empty cluster has the service of its API");
    // The cluster changes meanwhile; names of services rarely do.
    ensure!(listed.services.keys().eq(watched.services.keys()), "a list and a watch show different services");
    let files = snapshot_as_files(&watched)?;
    let (of_cluster, of_files) = (of_snapshot(&watched)?, of_files(files.path())?);
    ensure!(of_cluster == of_files, "{}\nand not\n{}", of_cluster.join("\n"), of_files.join("\n"));
    Ok(())
}
