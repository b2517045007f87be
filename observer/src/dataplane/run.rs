//! The shell: waits for whatever comes first and lets the [`Follower`] work on it.

use tokio::sync::mpsc;

use super::follower::Follower;
use super::{LegacySignal, Settings, Update};

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
    while !updates.is_closed() {
        tokio::select! {
            arrival = follower.next() => follower.take(arrival?).await?,
            Some(signal) = legacy.recv() => follower.read_legacy(signal, &mut legacy).await,
            () = updates.closed() => {}
        }
    }
    Ok(())
}
