//! What the agents asked the API server for, as its audit log has it. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// What a rule of a role allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Right {
    /// The API group; empty for the core's.
    pub(super) group: String,
    /// In the plural; empty for a URL that is no resource.
    pub(super) resource: String,
    pub(super) verb: String,
}

impl Right {
    /// The rights that the rules of a role give, in their order.
    ///
    /// # Errors
    /// When a rule is of another form than groups, resources and verbs.
    pub(super) fn of_rules(rules: &[Value]) -> Result<Vec<Self>> {
        let mut rights = Vec::new();
        for rule in rules {
            let names = |field: &str| -> Result<Vec<&str>> {
                let values =
                    rule[field].as_array().with_context(|| format!("no {field}: {rule}"))?;
                Ok(values.iter().filter_map(Value::as_str).collect())
            };
            let (groups, resources, verbs) =
                (names("apiGroups")?, names("resources")?, names("verbs")?);
            ensure!(rule.as_object().is_some_and(|fields| fields.len() == 3), "more than {rule}");
            for group in groups {
                for resource in &resources {
                    rights.extend(verbs.iter().map(|verb| Self::new(group, resource, verb)));
                }
            }
        }
        Ok(rights)
    }

    fn new(group: &str, resource: &str, verb: &str) -> Self {
        let (group, resource, verb) = (group.to_owned(), resource.to_owned(), verb.to_owned());
        Self { group, resource, verb }
    }

    /// The rule that gives this and nothing else.
    pub(super) fn rule(&self) -> Value {
        json!({"apiGroups": [self.group], "resources": [self.resource], "verbs": [self.verb]})
    }
}

/// One request, whatever came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The right that it takes.
    pub(super) right: Right,
    /// Path and query.
    pub(super) uri: String,
    /// Where it came from.
    pub(super) source: IpAddr,
    /// The answer's HTTP status; `None` before there is one.
    pub(super) status: Option<u64>,
    /// Whether the answer is complete.
    pub(super) is_over: bool,
}

/// The requests of an audit log, by their ids. A line that is still being written is left out.
///
/// # Errors
/// When a line is no audit event.
pub(super) fn requests(log: &str) -> Result<Vec<Request>> {
    let mut requests = BTreeMap::new();
    for line in log.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let event: Value = serde_json::from_str(line).context("a line of the audit log")?;
        let id = event["auditID"].as_str().context("no auditID")?.to_owned();
        let request = request(&event).with_context(|| format!("audit event {event}"))?;
        // Each stage of a request repeats what the earlier ones said.
        requests.insert(id, request);
    }
    Ok(requests.into_values().collect())
}

fn request(event: &Value) -> Result<Request> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let object = &event["objectRef"];
    Ok(Request {
        right: Right::new(
            &text(&object["apiGroup"]),
            &text(&object["resource"]),
            &text(&event["verb"]),
        ),
        uri: text(&event["requestURI"]),
        source: text(&event["sourceIPs"][0]).parse().context("no source address")?,
        status: event["responseStatus"]["code"].as_u64(),
        is_over: event["stage"] == "ResponseComplete" || event["stage"] == "Panic",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_as_many_rights_as_it_has_resources_and_verbs() {
        let rule = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]});
        let rights = Right::of_rules(std::slice::from_ref(&rule)).expect("a rule");
        assert_eq!(rights, [Right::new("", "pods", "list"), Right::new("", "pods", "watch")]);
        assert_eq!(Right::of_rules(&[rights[1].rule()]).expect("a rule"), rights[1..]);
    }

    #[test]
    fn a_rule_that_rights_do_not_cover_is_refused() {
        let named = json!({
            "apiGroups": [""], "resources": ["pods"], "verbs": ["get"], "resourceNames": ["a"],
        });
        assert!(Right::of_rules(&[named]).is_err());
        assert!(Right::of_rules(&[json!({"nonResourceURLs": ["/"], "verbs": ["get"]})]).is_err());
    }

    #[test]
    fn the_stages_of_a_request_are_one() {
        let event = |stage: &str| {
            let event = json!({
                "auditID": "a", "stage": stage, "verb": "watch", "requestURI": "/api/v1/pods?watch",
                "objectRef": {"resource": "pods"}, "sourceIPs": ["10.0.0.1"],
                "responseStatus": {"code": 200},
            });
            format!("{event}\n")
        };
        let open = requests(&event("ResponseStarted")).expect("events");
        assert!(!open[0].is_over);
        let log = event("ResponseStarted") + &event("ResponseComplete") + "{\"auditID\": \"b";
        let closed = requests(&log).expect("events");
        assert_eq!(closed, [Request { is_over: true, ..open[0].clone() }]);
        assert_eq!(closed[0].right, Right::new("", "pods", "watch"));
    }
}
