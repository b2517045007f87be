//! Pods that are replaced all the time, one change of an EndpointSlice after the other: an endpoint
//! begins to terminate, one is removed, its successor is added, and turns ready.
//!
//! Each change rewrites one slice, as a controller that never batches would: the worst case for who
//! watches.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem::take;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::plan::{self, Plan, Slice};
use crate::lab::api::Api;
use crate::lab::rules::{ServicePort, Sync};
use crate::lab::store::Kind;

/// Endpoints that are terminating at a time: at 12.5 a second each stays for 10 s.
const TERMINATING: usize = 125;

/// The cluster's state beside the API's objects, which it changes.
pub(crate) struct Churn {
    plan: Plan,
    slices: Vec<Slice>,
    /// For each Service, the endpoints that rules send to.
    ready: Vec<BTreeSet<u32>>,
    /// Slice and endpoint.
    terminating: VecDeque<(usize, u32)>,
    /// Slices that lack an endpoint.
    short: VecDeque<usize>,
    starting: VecDeque<(usize, u32)>,
    changes: usize,
    next_endpoint: u32,
    /// What the Services that changed since the last sync were then.
    touched: BTreeMap<u32, BTreeSet<u32>>,
}

impl Churn {
    pub(crate) fn new(plan: Plan, slices: Vec<Slice>) -> Self {
        let mut ready = vec![BTreeSet::new(); plan.services as usize];
        for slice in &slices {
            ready[slice.service as usize].extend(&slice.endpoints);
        }
        Self {
            plan,
            slices,
            ready,
            terminating: VecDeque::new(),
            short: VecDeque::new(),
            starting: VecDeque::new(),
            changes: 0,
            next_endpoint: plan.endpoints,
            touched: BTreeMap::new(),
        }
    }

    /// The rules of all Services, as they are first written.
    pub(crate) fn first_sync(&self) -> Sync {
        let after = (0..).zip(&self.ready).map(|(service, ready)| port(service, ready)).collect();
        sync(Vec::new(), after)
    }

    /// The rules of the Services that changed since the last sync.
    pub(crate) fn next_sync(&mut self) -> Sync {
        let touched = take(&mut self.touched);
        let after = touched.keys().map(|service| port(*service, &self.ready[*service as usize]));
        let after = after.collect();
        sync(touched.iter().map(|(service, ready)| port(*service, ready)).collect(), after)
    }

    /// One change of one slice.
    pub(crate) fn change(&mut self, api: &Api) -> Result<()> {
        self.changes += 1;
        let turn = if self.terminating.len() < TERMINATING { 0 } else { self.changes % 4 };
        match (turn, self.short.front().copied(), self.starting.front().copied()) {
            (1, _, _) => self.remove(api),
            (2, Some(slice), _) => self.add(api, slice),
            (3, _, Some((slice, endpoint))) => self.turn_ready(api, slice, endpoint),
            _ => self.terminate(api),
        }
    }

    fn terminate(&mut self, api: &Api) -> Result<()> {
        let slice = self.next_victim();
        let endpoints = &mut self.slices[slice].endpoints;
        let endpoint = endpoints.remove(0);
        self.now_unready(slice, endpoint);
        self.terminating.push_back((slice, endpoint));
        self.edit(api, slice, |object| {
            let conditions = json!({"ready": false, "serving": true, "terminating": true});
            of_pod(object, endpoint)?["conditions"] = conditions;
            Some(())
        })
    }

    fn remove(&mut self, api: &Api) -> Result<()> {
        let (slice, endpoint) = self.terminating.pop_front().context("none is terminating")?;
        self.short.push_back(slice);
        self.edit(api, slice, |object| {
            let uid = plan::pod_uid(endpoint);
            object["endpoints"].as_array_mut()?.retain(|listed| listed["targetRef"]["uid"] != uid);
            Some(())
        })
    }

    fn add(&mut self, api: &Api, slice: usize) -> Result<()> {
        self.short.pop_front();
        let endpoint = self.next_endpoint;
        self.next_endpoint += 1;
        self.starting.push_back((slice, endpoint));
        let mut new = self.plan.endpoint(self.slices[slice].service, endpoint);
        new["conditions"] = json!({"ready": false, "serving": false, "terminating": false});
        self.edit(api, slice, |object| {
            object["endpoints"].as_array_mut()?.push(new);
            Some(())
        })
    }

    fn turn_ready(&mut self, api: &Api, slice: usize, endpoint: u32) -> Result<()> {
        self.starting.pop_front();
        self.slices[slice].endpoints.push(endpoint);
        let service = self.slices[slice].service;
        self.touch(service);
        self.ready[service as usize].insert(endpoint);
        self.edit(api, slice, |object| {
            let conditions = json!({"ready": true, "serving": true, "terminating": false});
            of_pod(object, endpoint)?["conditions"] = conditions;
            Some(())
        })
    }

    /// A slice that keeps a ready endpoint, the likelier the more it has. Not of the observed node:
    /// its pods have no processes here.
    fn next_victim(&self) -> usize {
        /// Odd and far from any period of the plan: visits the endpoints in no order.
        const STRIDE: usize = 7_919 * 7;
        let mut wanted = self.changes * STRIDE % self.plan.endpoints as usize;
        let usable = |slice: &Slice| {
            slice.endpoints.len() > 1 && !slice.endpoints[0].is_multiple_of(self.plan.nodes)
        };
        loop {
            for (index, slice) in self.slices.iter().enumerate() {
                if wanted < slice.endpoints.len() && usable(slice) {
                    return index;
                }
                wanted = wanted.saturating_sub(slice.endpoints.len());
            }
        }
    }

    fn now_unready(&mut self, slice: usize, endpoint: u32) {
        let service = self.slices[slice].service;
        self.touch(service);
        self.ready[service as usize].remove(&endpoint);
    }

    fn touch(&mut self, service: u32) {
        let ready = &self.ready[service as usize];
        self.touched.entry(service).or_insert_with(|| ready.clone());
    }

    fn edit(
        &self,
        api: &Api,
        slice: usize,
        edit: impl FnOnce(&mut Value) -> Option<()>,
    ) -> Result<()> {
        let uid = plan::slice_uid(self.slices[slice].number);
        let mut edited = None;
        api.change(|store| {
            let object = store.get(Kind::EndpointSlice, &uid).map(|object| (**object).clone());
            edited = object.and_then(|mut object| {
                edit(&mut object)?;
                store.put(Kind::EndpointSlice, object);
                Some(())
            });
        });
        edited.with_context(|| format!("slice {uid} is not as it was made"))
    }
}

fn of_pod(object: &mut Value, endpoint: u32) -> Option<&mut Value> {
    let uid = plan::pod_uid(endpoint);
    let endpoints = object["endpoints"].as_array_mut()?;
    endpoints.iter_mut().find(|listed| listed["targetRef"]["uid"] == uid)
}

fn port(service: u32, ready: &BTreeSet<u32>) -> ServicePort {
    plan::service_port(service, &ready.iter().copied().collect::<Vec<_>>())
}

fn sync(before: Vec<ServicePort>, after: Vec<ServicePort>) -> Sync {
    let touched = after.iter().map(|port| port.service.clone()).collect();
    Sync { before, after, touched }
}
