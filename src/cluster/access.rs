//! Where the API server is, and with which credentials.

use std::{ffi::OsStr, path::Path};

use http::{HeaderName, HeaderValue};
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::error::Error;

/// Mounted into every pod that has a ServiceAccount.
const TOKEN_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Where nothing says which cluster.
const NOTHING: &str =
    "no cluster is given: use --kubeconfig (or KUBECONFIG); this is no pod with a ServiceAccount token";
const IMPERSONATE_USER: HeaderName = HeaderName::from_static("impersonate-user");
const IMPERSONATE_GROUP: HeaderName = HeaderName::from_static("impersonate-group");

/// An explicit kubeconfig first; in a pod its ServiceAccount (an inherited `KUBECONFIG` does not divert it);
/// otherwise what kubectl would use.
pub(super) async fn load(kubeconfig: Option<&Path>, context: Option<String>) -> Result<Config, Error> {
    let (loaded, place) = match kubeconfig {
        Some(path) => read(path, "--kubeconfig ")?,
        None if context.is_none() && Path::new(TOKEN_FILE).exists() => {
            return Config::incluster().map_err(|error| Error::config("the ServiceAccount's credentials", &error));
        }
        None => inherited(std::env::var_os("KUBECONFIG").as_deref())?,
    };
    from_kubeconfig(loaded, context, &place).await
}

/// What kubectl would use: the files of `KUBECONFIG`, or the one in the home directory. And how to call them.
fn inherited(variable: Option<&OsStr>) -> Result<(Kubeconfig, String), Error> {
    let paths: Vec<_> = variable
        .map(|list| std::env::split_paths(list).filter(|path| !path.as_os_str().is_empty()).collect())
        .unwrap_or_default();
    if paths.is_empty() {
        let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
        let home = home.ok_or_else(|| Error::Config(format!("{NOTHING}, and there is no home directory")))?;
        let path = home.join(".kube/config");
        if !path.exists() {
            return Err(Error::Config(format!("{NOTHING}, and there is no {}", path.display())));
        }
        return read(&path, "");
    }
    let mut merged = Kubeconfig::default();
    for path in &paths {
        let (next, place) = read(path, "KUBECONFIG: ")?;
        merged = merged.merge(next).map_err(|error| Error::Config(format!("{place}: {error}")))?;
    }
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    Ok((merged, format!("KUBECONFIG: {}", names.join(", "))))
}

/// One file, and what to call it.
fn read(path: &Path, given_by: &str) -> Result<(Kubeconfig, String), Error> {
    let place = format!("{given_by}{}", path.display());
    match Kubeconfig::read_from(path) {
        Ok(read) => Ok((read, place)),
        Err(KubeconfigError::ReadConfig(error, _)) => Err(Error::Config(format!("{place}: {error}"))),
        // The lines below the first show the file, and there are secrets in it.
        Err(error) => {
            let error = error.to_string();
            Err(Error::Config(format!("{place}: {}", error.lines().next().unwrap_or_default())))
        }
    }
}

/// A context that is not there, in words that say which there are.
fn check_context(kubeconfig: &Kubeconfig, context: Option<&str>, place: &str) -> Result<(), Error> {
    let names: Vec<_> = kubeconfig.contexts.iter().map(|named| named.name.as_str()).collect();
    let has = if names.is_empty() { "it has no contexts".to_owned() } else { format!("it has: {}", names.join(", ")) };
    let file = place.strip_prefix("--kubeconfig ").unwrap_or(place);
    let (name, given_by) = match (context, kubeconfig.current_context.as_deref()) {
        (Some(name), _) => (name, "--context"),
        (None, Some(name)) if !name.is_empty() => (name, "current-context"),
        (None, _) => return Err(Error::Config(format!("{place} has no current-context: use --context; {has}"))),
    };
    if names.contains(&name) {
        return Ok(());
    }
    Err(Error::Config(format!("{given_by} {name}: not in {file}; {has}")))
}

async fn from_kubeconfig(mut kubeconfig: Kubeconfig, context: Option<String>, place: &str) -> Result<Config, Error> {
    check_context(&kubeconfig, context.as_deref(), place)?;
    refuse_proxy(&kubeconfig, context.as_deref())?;
    // kube would read HTTPS_PROXY wherever this field is empty, and fail on one that it cannot parse. The API server
    // is never reached through a proxy: proxies are for AWS.
    for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
        cluster.proxy_url = Some("http://ignored.invalid".to_owned());
    }
    let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let mut config = config.map_err(|error| Error::config(&format!("the Kubernetes client from {place}"), &error))?;
    config.proxy_url = None;
    Ok(config)
}

fn refuse_proxy(kubeconfig: &Kubeconfig, context: Option<&str>) -> Result<(), Error> {
    let Some(context) = context.or(kubeconfig.current_context.as_deref()) else { return Ok(()) };
    let context = kubeconfig.contexts.iter().find(|named| named.name == context);
    let Some(name) = context.and_then(|named| named.context.as_ref()).map(|context| &context.cluster) else {
        return Ok(());
    };
    let cluster = kubeconfig.clusters.iter().find(|named| &named.name == name);
    let proxy = cluster.and_then(|named| named.cluster.as_ref()).and_then(|cluster| cluster.proxy_url.as_deref());
    match proxy {
        None | Some("") => Ok(()),
        Some(_) => Err(Error::Config(format!(
            "the kubeconfig sets proxy-url for the cluster {name:?}: spotter reaches the API server directly only; remove proxy-url, or name a context without it"
        ))),
    }
}

/// The header that impersonates a user.
pub(super) fn impersonate(user: &str) -> Result<(HeaderName, HeaderValue), Error> {
    let value = HeaderValue::try_from(user).map_err(|error| Error::config("impersonation", &error))?;
    Ok((IMPERSONATE_USER, value))
}

/// Takes the impersonation of the kubeconfig (`as`, `as-groups`) out of the configuration: it holds only where
/// spotter does not act as its node.
pub(super) fn take_impersonation(config: &mut Config) -> Result<Vec<(HeaderName, HeaderValue)>, Error> {
    let auth = &mut config.auth_info;
    if auth.impersonate_uid.is_some() || auth.impersonate_user_extra.is_some() {
        return Err(Error::Config("as-uid and as-user-extra in the kubeconfig are not supported".to_owned()));
    }
    let mut headers = Vec::new();
    if let Some(user) = auth.impersonate.take() {
        headers.push(impersonate(&user)?);
    }
    for group in auth.impersonate_groups.take().unwrap_or_default() {
        let value = HeaderValue::try_from(group).map_err(|error| Error::config("impersonation", &error))?;
        headers.push((IMPERSONATE_GROUP, value));
    }
    Ok(headers)
}

/// A Node's name is a DNS subdomain; anything else would end up in URLs and headers.
pub(super) fn check_node_name(name: &str) -> Result<(), Error> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    if name.is_empty() || name.len() > 253 || !name.bytes().all(fits) {
        return Err(Error::Config(format!("{name:?} is not the name of a Node (a DNS name in lower case)")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(cluster: &str, user: &str) -> Kubeconfig {
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: k, user: u}}}}],
             clusters: [{{name: k, cluster: {{server: \"http://127.0.0.1:1\"{cluster}}}}}], users: [{{name: u, user: {{{user}}}}}]}}"
        );
        Kubeconfig::from_yaml(&text).unwrap()
    }

    #[tokio::test]
    async fn a_proxy_in_the_kubeconfig_is_refused_by_the_name_of_its_field() {
        let error = from_kubeconfig(kubeconfig(", proxy-url: \"http://p:3128\"", ""), None, "f").await.unwrap_err();
        assert!(error.to_string().contains("proxy-url"), "{error}");
        let config = from_kubeconfig(kubeconfig("", ""), None, "f").await.unwrap();
        assert_eq!(config.proxy_url, None);
    }

    #[tokio::test]
    async fn what_is_wrong_names_the_option_and_the_file_once() {
        let told = |error: Error| error.to_string();
        let missing = Path::new("/nonexistent");
        let error = told(load(Some(missing), None).await.unwrap_err());
        assert_eq!(error, "--kubeconfig /nonexistent: No such file or directory (os error 2)");
        let error = told(inherited(Some(OsStr::new("/nonexistent"))).unwrap_err());
        assert_eq!(error, "KUBECONFIG: /nonexistent: No such file or directory (os error 2)");
        let broken = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(broken.path(), "users: [{name: u, user: {token: [secret-1\n").unwrap();
        let error = told(load(Some(broken.path()), None).await.unwrap_err());
        assert!(error.starts_with(&format!("--kubeconfig {}: failed to parse", broken.path().display())), "{error}");
        assert!(!error.contains("secret-1") && !error.contains('\n'), "{error}");
        let error = from_kubeconfig(kubeconfig("", ""), Some("nope".into()), "--kubeconfig f").await.unwrap_err();
        assert_eq!(told(error), "--context nope: not in f; it has: c");
        let error = from_kubeconfig(Kubeconfig::default(), None, "f").await.unwrap_err();
        assert_eq!(told(error), "f has no current-context: use --context; it has no contexts");
    }

    #[tokio::test]
    async fn impersonation_of_the_kubeconfig_is_taken_out() {
        let mut config = from_kubeconfig(kubeconfig("", "as: jane, as-groups: [dev]"), None, "f").await.unwrap();
        let headers = take_impersonation(&mut config).unwrap();
        assert_eq!(headers.len(), 2);
        assert_eq!(config.auth_info.impersonate, None);
    }

    #[test]
    fn names_that_are_no_nodes() {
        for name in ["", "a/b", "A", "n 1", "n\n"] {
            assert!(check_node_name(name).is_err(), "{name:?}");
        }
        assert!(check_node_name("ip-10-0-0-1.eu-central-1.compute.internal").is_ok());
    }
}
