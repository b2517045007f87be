//! `deploy/observer.yaml`, given to the API server as it is.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::api::Api;

const MANIFEST: &str = include_str!("../../../deploy/observer.yaml");
/// The namespace and the name of the account that the manifest makes for the agents.
pub(crate) const ACCOUNT: (&str, &str) = ("observer", "observer");

/// Creates its objects. The DaemonSet is only validated: the agents run as processes of the nodes,
/// and no image of them is there for its pods.
pub(crate) fn apply(admin: &Api) -> Result<()> {
    for text in MANIFEST.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(text).context("deploy/observer.yaml")?;
        let path = collection(&object)?;
        let created = admin.create(&path, &object);
        created.with_context(|| format!("deploy/observer.yaml: the {}", object["kind"]))?;
    }
    Ok(())
}

/// The manifest's `ClusterRole`.
pub(crate) fn cluster_role() -> Result<Value> {
    let mut objects = MANIFEST.split("\n---\n").map(serde_saphyr::from_str::<Value>);
    let role = objects.find(|object| object.as_ref().map_or(true, |o| o["kind"] == "ClusterRole"));
    role.context("deploy/observer.yaml has no ClusterRole")?.context("deploy/observer.yaml")
}

/// Where objects of this kind are created.
fn collection(object: &Value) -> Result<String> {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
    Ok(match object["kind"].as_str().unwrap_or_default() {
        "Namespace" => "/api/v1/namespaces".to_owned(),
        "ServiceAccount" => format!("/api/v1/namespaces/{namespace}/serviceaccounts"),
        "ClusterRole" => "/apis/rbac.authorization.k8s.io/v1/clusterroles".to_owned(),
        "ClusterRoleBinding" => "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings".to_owned(),
        "DaemonSet" => format!("/apis/apps/v1/namespaces/{namespace}/daemonsets?dryRun=All"),
        other => bail!("deploy/observer.yaml has a {other}: say in `manifest` where it goes"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_of_the_manifest_has_a_place() {
        for text in MANIFEST.split("\n---\n") {
            let object: Value = serde_saphyr::from_str(text).expect("YAML");
            assert!(collection(&object).expect("a known kind").starts_with("/api"));
        }
    }

    #[test]
    fn the_role_has_rules() {
        let role = cluster_role().expect("a ClusterRole");
        assert!(role["rules"].as_array().is_some_and(|rules| !rules.is_empty()));
    }
}
