//! Access to the API: configuration, credentials, and retries of failed requests.

use std::{env, path::Path, time::Duration};

use kube::{
    Client, Config,
    client::{ClientBuilder, retry::RetryPolicy},
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::{buffer::BufferLayer, retry::RetryLayer};

use super::Error;

/// How many requests may wait for the connection.
const REQUESTS: usize = 64;
/// How often a request is repeated that the API rejects as overloaded. The first pause is the shorter time, the longest pause
/// is the longer one, unless the API gives a time. [`super::backoff`] handles what still fails.
const RETRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(5);

/// The configuration from a kubeconfig, from `KUBECONFIG`, or from the cluster that this process is in.
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

/// A client with connections that belong to the current runtime.
pub(super) fn client(mut config: Config) -> Result<Client, Error> {
    // The client's own retries continue for minutes without a log line.
    config.default_retry = false;
    let policy = RetryPolicy::new(RETRY_AFTER, RETRY_AT_MOST, RETRIES, true)
        .map_err(|error| Error::Client(kube::Error::Service(error.into())))?;
    let builder = ClientBuilder::try_from(config).map_err(Error::Client)?;
    Ok(builder.with_layer(&BufferLayer::new(REQUESTS)).with_layer(&RetryLayer::new(policy)).build())
}
