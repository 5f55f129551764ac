//! A ServiceAccount's token in a file, which the kubelet renews there.
//!
//! kube reads such a file again only when its copy is a minute old, which is half of an interruption. Here a 401 is
//! enough: where the file holds another token by then, the request is sent once more.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::HeaderValue;
use kube::Config;
use tokio::time::Instant;

use super::Error;

/// The kubelet renews a token when a fifth of its lifetime, at least ten minutes in all, is left.
const FRESH: Duration = Duration::from_secs(60);

pub(super) struct TokenFile {
    path: PathBuf,
    known: Mutex<Known>,
}

struct Known {
    header: HeaderValue,
    read_at: Instant,
}

impl TokenFile {
    /// Takes the token file out of `config`, where the credentials are one and nothing else.
    pub(super) fn take(config: &mut Config) -> Result<Option<Self>, Error> {
        let auth = &mut config.auth_info;
        let other =
            auth.token.is_some() || auth.username.is_some() || auth.exec.is_some() || auth.auth_provider.is_some();
        if other {
            return Ok(None);
        }
        let Some(path) = auth.token_file.take().map(PathBuf::from) else { return Ok(None) };
        let header = read(&path).map_err(|problem| Error::Config(format!("cannot read the token: {problem}")))?;
        let known = Mutex::new(Known { header, read_at: Instant::now() });
        Ok(Some(Self { path, known }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value for `Authorization`. A file that cannot be read now leaves the former token in use.
    pub(super) fn header(&self) -> HeaderValue {
        let mut known = self.known();
        if known.read_at.elapsed() > FRESH {
            self.read_again(&mut known);
        }
        known.header.clone()
    }

    /// The server refused `used`: another token, where the file holds one now.
    pub(super) fn instead_of(&self, used: &HeaderValue) -> Option<HeaderValue> {
        let mut known = self.known();
        if known.header == used {
            self.read_again(&mut known);
        }
        (known.header != used).then(|| known.header.clone())
    }

    fn read_again(&self, known: &mut Known) {
        known.read_at = Instant::now();
        match read(&self.path) {
            Ok(header) => known.header = header,
            Err(problem) => tracing::debug!(problem, "cannot read the token again"),
        }
    }
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenFile").field("path", &self.path).finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<HeaderValue, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let header = HeaderValue::try_from(format!("Bearer {}", text.trim()));
    // The error would not tell the token, and neither do we.
    let mut header = header.map_err(|_| format!("{}: not a token", path.display()))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_token_is_replaced_by_what_the_file_holds_now() {
        let path = std::env::temp_dir().join(format!("spotter-token-{}", std::process::id()));
        std::fs::write(&path, "one\n").unwrap();
        let mut config = Config::new("https://127.0.0.1:1".parse().unwrap());
        config.auth_info.token_file = Some(path.display().to_string());
        let token = TokenFile::take(&mut config).unwrap().unwrap();
        assert!(config.auth_info.token_file.is_none());
        let first = token.header();
        assert_eq!(first, "Bearer one");
        assert!(token.instead_of(&first).is_none(), "the same token would be refused again");
        std::fs::write(&path, "two").unwrap();
        assert_eq!(token.header(), "Bearer one", "the file is not read for each request");
        assert_eq!(token.instead_of(&first).unwrap(), "Bearer two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(token.instead_of(&first).unwrap(), "Bearer two", "another request has read it already");
        let second = token.header();
        assert!(token.instead_of(&second).is_none());
        assert!(!format!("{token:?} {second:?}").contains("two"));
    }
}
