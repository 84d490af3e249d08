//! The way to the API: which one, with what credentials, and how failed requests are repeated.

use std::{env, path::Path, time::Duration};

use kube::{
    Client, Config,
    client::{ClientBuilder, retry::RetryPolicy},
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::{buffer::BufferLayer, retry::RetryLayer};

use super::Error;

/// Requests that may wait for their turn at the connection.
const REQUESTS: usize = 64;
/// A request that the API refuses for being busy is repeated so often, at first after the shorter time and after the
/// longer one at most, or when the API says. What still fails is a matter of [`super::backoff`].
const RETRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(5);

/// The configuration of a kubeconfig, of `KUBECONFIG`, or of the cluster that this process is in.
pub(super) async fn config(kubeconfig: Option<&Path>) -> Result<Config, Error> {
    let variable = env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty());
    let (name, read) = match (kubeconfig, variable) {
        (Some(path), _) => (path.display().to_string(), Kubeconfig::read_from(path)),
        (None, Some(paths)) => {
            let read = Kubeconfig::from_env().and_then(|found| found.ok_or(KubeconfigError::FindPath));
            (format!("KUBECONFIG={}", paths.display()), read)
        }
        (None, None) => return Config::incluster().map_err(Error::NotInCluster),
    };
    let failed = |error| Error::Kubeconfig(name.clone(), error);
    Config::from_custom_kubeconfig(read.map_err(failed)?, &KubeConfigOptions::default()).await.map_err(failed)
}

/// A client whose connections belong to the current runtime.
pub(super) fn client(mut config: Config) -> Result<Client, Error> {
    // Its own repetition goes on for minutes, and says nothing.
    config.default_retry = false;
    let policy = RetryPolicy::new(RETRY_AFTER, RETRY_AT_MOST, RETRIES, true)
        .map_err(|error| Error::Client(kube::Error::Service(error.into())))?;
    let builder = ClientBuilder::try_from(config).map_err(Error::Client)?;
    Ok(builder.with_layer(&BufferLayer::new(REQUESTS)).with_layer(&RetryLayer::new(policy)).build())
}
