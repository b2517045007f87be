//! The shell: waits for whatever comes first and lets the [`Follower`] work on it.

use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::follower::Follower;
use super::{LegacySignal, Settings, Update};
use crate::clock;

/// How old the last proof of an empty socket may get: the uncertainty of what an overrun hides.
const PROOF_INTERVAL: Duration = Duration::from_secs(1);

/// Follows the rules of the network namespace this is called in until the receiver of `updates`
/// is gone (`Ok`) or the rules cannot be read any more. `legacy` may be closed at any time.
///
/// # Errors
/// When a socket cannot be opened or read: usually `CAP_NET_ADMIN` or `CAP_NET_RAW` is missing.
pub async fn run(
    settings: Settings,
    mut legacy: mpsc::Receiver<LegacySignal>,
    updates: mpsc::Sender<Update>,
) -> anyhow::Result<()> {
    let mut follower = Follower::start(&settings, updates.clone()).await?;
    let mut proof = interval(PROOF_INTERVAL);
    proof.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !updates.is_closed() {
        // Whatever waits here came while something else was done.
        follower.drain(None).await?;
        tokio::select! {
            woken = follower.wait() => {
                let woken_at = clock::now();
                woken.context("wait for netfilter messages")?;
                follower.drain(Some(woken_at)).await?;
            }
            Some(signal) = legacy.recv() => follower.read_legacy(signal, &mut legacy).await,
            _ = proof.tick() => {}
            () = updates.closed() => {}
        }
    }
    Ok(())
}
