//! Who may do what: one token per component, as RBAC's and the Node authorizer's own names for
//! them, and the kubeconfigs that carry one.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

/// Somebody the API server knows by a token.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The user's name.
    user: String,
    /// The user's group, if any.
    group: &'static str,
    /// What is shown as proof.
    pub(crate) token: String,
}

impl Identity {
    fn new(user: &str, group: &'static str) -> Result<Self> {
        let mut random = [0; 16];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        Ok(Self {
            user: user.to_owned(),
            group,
            token: format!("{:032x}", u128::from_ne_bytes(random)),
        })
    }

    /// May do everything.
    pub(crate) fn admin() -> Result<Self> {
        Self::new("admin", "system:masters")
    }

    /// A component such as `kube-proxy`, with the role that every cluster has for it.
    pub(crate) fn component(name: &str) -> Result<Self> {
        Self::new(&format!("system:{name}"), "")
    }

    /// The kubelet of a node: may change that node and its pods only.
    pub(crate) fn kubelet(node: &str) -> Result<Self> {
        Self::new(&format!("system:node:{node}"), "system:nodes")
    }

    fn line(&self) -> String {
        let Self { user, group, token } = self;
        format!("{token},{user},{user},\"{group}\"\n")
    }
}

/// Writes the file that the API server knows these by.
pub(crate) fn write_tokens(path: &Path, identities: &[&Identity]) -> Result<()> {
    write_secret(path, &identities.iter().map(|identity| identity.line()).collect::<String>())
}

/// Where the API server is, and what proves that it is.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// `https://…`, without a slash at the end.
    pub(crate) url: String,
    /// Certificates in PEM that its own is signed by.
    pub(crate) authority: PathBuf,
}

impl Server {
    /// Writes a kubeconfig for whoever shows `token`.
    pub(crate) fn write_kubeconfig(&self, path: &Path, token: &str) -> Result<()> {
        let cluster = json!({"server": self.url, "certificate-authority": self.authority});
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "e2e",
            "clusters": [{"name": "e2e", "cluster": cluster}],
            "users": [{"name": "e2e", "user": {"token": token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
        });
        write_secret(path, &config.to_string())
    }
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_is_who_the_node_authorizer_expects() {
        let kubelet = Identity::kubelet("node-1").expect("random bytes");
        let line = kubelet.line();
        let (token, rest) = line.split_once(',').expect("columns");
        assert_eq!(rest, "system:node:node-1,system:node:node-1,\"system:nodes\"\n");
        assert_eq!(token.len(), 32);
        assert_ne!(kubelet.token, Identity::kubelet("node-1").expect("random bytes").token);
    }

    #[test]
    fn nobody_else_reads_a_token() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("tokens");
        write_tokens(&path, &[&Identity::admin().expect("random bytes")]).expect("written");
        let mode = path.metadata().expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
