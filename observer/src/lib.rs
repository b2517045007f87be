//! The observer's daemon, in the order the data flows.
//!
//! Kernel events, the node's rules and the cluster's objects become facts; facts become one
//! timeline per termination; timelines become metrics, an HTTP API and a report.

pub mod clock;
pub mod facts;
pub mod readiness;
pub mod uid;

pub mod cluster;
pub mod dataplane;
pub mod kernel;

pub mod correlate;

pub mod metrics;
pub mod recommend;

pub mod api;
pub mod backends;
pub mod report;

pub mod agent;
pub mod cli;
pub mod logging;
pub mod memory;

#[doc(hidden)]
pub mod fuzzing;

#[cfg(test)]
mod sample;
