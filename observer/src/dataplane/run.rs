//! The shell: waits for whatever comes first and lets the [`Follower`] work on it.

use std::future::ready;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::follower::Follower;
use super::{CommitSignal, Settings, Snapshot, Update};

/// How long after a table could not be read it is tried again: what it holds is unknown until
/// then, and the next commit may be hours away.
const RETRY: Duration = Duration::from_secs(1);

/// What the rules of the network namespace this is called in say at this moment.
///
/// # Errors
/// As [`run`].
pub async fn read(settings: &Settings) -> anyhow::Result<Snapshot> {
    // Room for what starting sends: what is present, and the status.
    let (updates, mut sent) = mpsc::channel(2);
    drop(Follower::start(settings, updates).await?);
    let mut snapshot = Snapshot::default();
    while let Some(update) = sent.recv().await {
        match update {
            Update::Present { backends, draining, .. } => {
                (snapshot.backends, snapshot.draining) = (backends, draining);
            }
            Update::Status(status) => snapshot.status = status,
            Update::Change(_) | Update::Blind(_) => {}
        }
    }
    Ok(snapshot)
}

/// Follows the rules of the network namespace this is called in until the receiver of `updates`
/// is gone (`Ok`) or the rules cannot be read any more. `signals` may be closed at any time.
///
/// # Errors
/// When a socket cannot be opened or read: usually `CAP_NET_ADMIN` or `CAP_NET_RAW` is missing.
pub async fn run(
    settings: Settings,
    mut signals: mpsc::Receiver<CommitSignal>,
    updates: mpsc::Sender<Update>,
) -> anyhow::Result<()> {
    let mut follower = Follower::start(&settings, updates.clone()).await?;
    let mut retry = interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !updates.is_closed() {
        tokio::select! {
            arrival = follower.next() => follower.take(arrival?).await?,
            Some(signal) = signals.recv(), if !follower.has_ahead() => follower.note_signal(signal),
            () = ready(()), if follower.has_ahead() => follower.take_ahead(&mut signals).await,
            _ = retry.tick(), if follower.has_unread() => follower.read_unread().await,
            () = updates.closed() => {}
        }
    }
    Ok(())
}
