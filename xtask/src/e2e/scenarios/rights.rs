//! The rights that `deploy/` gives the agents: each one is needed, and nothing else is used.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::requests::{Request, Right, requests};
use super::stage::Stage;
use crate::e2e::api::{Api, Patch};
use crate::e2e::manifest::{self, ACCOUNT};
use crate::e2e::network::Node;
use crate::e2e::until;
use crate::lab::agent::Agent;

/// A change of a role is in force within milliseconds, an agent is ready within seconds, and asks
/// again a few seconds after a refusal; a machine that compiles at the same time needs far longer.
const LIMIT: Duration = Duration::from_mins(1);
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";

/// To be played before anything disturbs the agents.
pub(super) fn play(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<()> {
    each_watch_is_asked_for_once(stage, tell)?;
    let role = manifest::cluster_role()?;
    let rules = role["rules"].as_array().context("the ClusterRole has no rules")?;
    let rights = Right::of_rules(rules)?;
    let path = format!("{ROLES}/{}", role["metadata"]["name"].as_str().context("no name")?);
    for (number, right) in rights.iter().enumerate() {
        let mut others = rights.clone();
        others.remove(number);
        give(stage.admin(), &path, &others, right, false)?;
        stage.cluster.restart_agent(0, Agent::stop)?;
        let words = until(LIMIT, "the agent names what it lacks", || says(stage, right))?;
        give(stage.admin(), &path, &rights, right, true)?;
        stage.cluster.agents[0].until_ready(LIMIT).context("with all rights again")?;
        tell(&format!("without {} of {}: {words}", right.verb, right.resource));
    }
    nothing_else_is_used(stage, tell)
}

/// Changes the role, and waits until that is in force for `right`.
fn give(admin: &Api, path: &str, rights: &[Right], right: &Right, allowed: bool) -> Result<()> {
    let rules: Vec<Value> = rights.iter().map(Right::rule).collect();
    admin.patch(path, Patch::Merge, &json!({"rules": rules}))?;
    let (namespace, account) = ACCOUNT;
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:{namespace}:{account}"),
            "resourceAttributes": {
                "group": right.group, "resource": right.resource, "verb": right.verb,
            },
        },
    });
    until(LIMIT, "the changed role is in force", || {
        let answer = admin.create(REVIEWS, &review)?;
        ensure!(answer["status"]["allowed"] == allowed, "it is not yet");
        Ok(())
    })
}

/// The one line of `/readyz`, once it says that this right is lacking and nothing else is.
fn says(stage: &Stage, right: &Right) -> Result<String> {
    let words = stage.cluster.agents[0].unready()?.context("the agent is ready without it")?;
    let lacks = format!("cannot {} resource \"{}\"", right.verb, right.resource);
    let is_said = words.contains(&lacks) && words.contains("ClusterRole");
    ensure!(is_said && words.trim_end().lines().count() == 1, "it says: {words}");
    Ok(words.trim_end().to_owned())
}

/// One list of each resource by each agent, and one watch of it that is open.
fn each_watch_is_asked_for_once(stage: &Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let asked = requests(&stage.cluster.control_plane.audit()?)?;
    for node in &stage.cluster.network.nodes {
        let of_node: Vec<&Request> = asked.iter().filter(|r| is_from(node, r)).collect();
        for resource in ["pods", "endpointslices"] {
            let count = |verb: &str, is_over: bool| {
                let of = of_node.iter().filter(|r| r.right.resource == resource);
                of.filter(|r| r.right.verb == verb && r.is_over == is_over).count()
            };
            let (lists, open, over) =
                (count("list", true), count("watch", false), count("watch", true));
            let name = node.name;
            ensure!(
                lists == 1 && open == 1,
                "{name}: {lists} lists and {open} open watches of {resource}"
            );
            tell(&format!("{name}: 1 list of {resource}, 1 watch open, {over} ended in order"));
        }
        ensure!(of_node.iter().all(|r| r.status.is_none_or(|s| s == 200)), "{of_node:?}");
    }
    Ok(())
}

/// Over the whole run, the agents used the rights of the manifest, asked for no other node's pods,
/// and nobody else was the agents' account.
pub(super) fn nothing_else_is_used(stage: &Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let asked = requests(&stage.cluster.control_plane.audit()?)?;
    let used: BTreeSet<&Right> = asked.iter().map(|request| &request.right).collect();
    let role = manifest::cluster_role()?;
    let rights = Right::of_rules(role["rules"].as_array().context("no rules")?)?;
    ensure!(used == rights.iter().collect(), "used are {used:?}");
    for request in &asked {
        let from = stage.cluster.network.nodes.iter().find(|node| is_from(node, request));
        let node = from.with_context(|| format!("not from a node: {request:?}"))?.name;
        let own = format!("fieldSelector=spec.nodeName%3D{node}");
        let is_own = request.right.resource != "pods" || request.uri.contains(&own);
        ensure!(is_own, "{node} asked for other nodes' pods: {request:?}");
    }
    tell(&format!("in {} requests the agents used their {} rights", asked.len(), used.len()));
    Ok(())
}

fn is_from(node: &Node, request: &Request) -> bool {
    let addresses = node.addresses;
    [addresses.v4.into(), addresses.v6.into()].contains(&request.source)
}
