//! What is measured, one kind of rules after the other.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use observer::dataplane::Family;
use observer::dataplane::legacy::Reader;
use observer::facts::BackendStep;

use crate::alternatives::{Monitor, list, thread_cpu, thread_cpu_in_kernel};
use crate::followed::{Followed, Sample};
use crate::memory::{in_use_bytes, take_peak_bytes};
use crate::place::{Cost, LISTING, Place};
use crate::report::{Report, mb, median, ms, p99, spread};
use crate::rules::{self, BACKENDS, iptables};
use crate::{SIZES, say};

/// A removal and an addition each: enough for a 99th percentile that is not the only outlier.
const TURNS: usize = 25;
/// The tool takes more than a second for each commit that writes 10,000 rules anew.
const SYNC_TURNS: usize = 5;
/// `nft monitor`, to compare.
const MONITOR_TURNS: usize = 5;
/// Readings of the legacy table.
const READS: usize = 11;
/// How long nothing changes while nothing may be read.
const IDLE: Duration = Duration::from_secs(3);

/// What the issue allows: after the kernel's delivery, at each size.
const KNOWN_AFTER: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(10)];
const CPU_RATIO: f64 = 1.5;
const START: Duration = Duration::from_secs(2);
const MODEL_BYTES: usize = 60_000_000;
const LEGACY_CPU: Duration = Duration::from_millis(150);

const NFT: [&str; 3] = ["nft", "-f", "-"];
const IPTABLES_NFT: [&str; 3] = ["iptables-nft-restore", "--noflush", "--counters"];
const IPTABLES_LEGACY: [&str; 3] = ["iptables-legacy-restore", "--noflush", "--counters"];

/// One backend of a Service goes, then comes back.
const STEPS: [(BackendStep, usize); 2] = [(BackendStep::Removed, 1), (BackendStep::Added, 0)];

/// Both sizes.
fn both<T>(of_size: impl FnMut(usize) -> Result<T>) -> Result<[T; 2]> {
    let [small, large] = SIZES.map(of_size);
    Ok([small?, large?])
}

fn places(what: &str, write: impl Fn(&Place, usize) -> Result<()>) -> Result<[Place; 2]> {
    both(|services| {
        say(&format!("{what}: writing {services} Services"));
        let place = Place::new()?;
        write(&place, services)?;
        Ok(place)
    })
}

fn follow(places: &[Place; 2]) -> Result<[Followed; 2]> {
    let [small, large] = places;
    Ok([Followed::start(small, SIZES[0])?, Followed::start(large, SIZES[1])?])
}

/// The same change at both sizes in turn; gives the samples of each.
fn turns(
    count: usize,
    mut change: impl FnMut(usize, usize, BackendStep, usize) -> Result<Sample>,
) -> Result<[Vec<Sample>; 2]> {
    let mut samples = [Vec::new(), Vec::new()];
    for turn in 0..count {
        let service = turn * SIZES[0] / count;
        for (step, first) in STEPS {
            for (size, samples) in samples.iter_mut().enumerate() {
                samples.push(change(size, service, step, first)?);
            }
        }
    }
    Ok(samples)
}

/// kube-proxy's nftables mode.
pub(crate) fn nftables(report: &mut Report) -> Result<()> {
    let places =
        places("nftables", |place, services| place.feed(&NFT, &rules::nftables::all(services)))?;
    let change = |place: &Place, service, first| {
        place.feed(&NFT, &rules::nftables::sync(service, first..BACKENDS))
    };
    let mut followed = follow(&places)?;
    start_rows(report, "nftables", &followed);
    say("nftables: commits");
    let samples = turns(TURNS, |size, service, step, first| {
        followed[size].measure(service, step, || change(&places[size], service, first))
    })?;
    commit_rows(report, "nftables", &samples, Some(CPU_RATIO));
    drop(followed);
    say("nftables: nft monitor");
    let [small, large] = &places;
    let mut monitors = [
        Monitor::start(small, || change(small, 0, 0))?,
        Monitor::start(large, || change(large, 0, 0))?,
    ];
    let samples = turns(MONITOR_TURNS, |size, service, _, first| {
        monitors[size].measure(|| change(&places[size], service, first))
    })?;
    alternative_rows(report, "`nft monitor`", &samples);
    drop(monitors);
    let words = ["nft", "-j", "list", "ruleset"];
    list_row(report, &places, &words, "\"dnat\"", 1)
}

/// kube-proxy's iptables mode over `nf_tables`.
pub(crate) fn iptables_nft(report: &mut Report) -> Result<()> {
    let places = places("iptables-nft", |place, services| {
        iptables::all(services).try_for_each(|part| place.feed(&IPTABLES_NFT, &part))
    })?;
    let mut followed = follow(&places)?;
    start_rows(report, "iptables-nft", &followed);
    say("iptables-nft: commits");
    let samples = turns(TURNS, |size, service, step, first| {
        let text = iptables::own_chains(service, first..BACKENDS);
        followed[size].measure(service, step, || places[size].feed(&IPTABLES_NFT, &text))
    })?;
    commit_rows(report, "iptables-nft, one Service's chains", &samples, Some(CPU_RATIO));
    say("iptables-nft: whole syncs");
    let samples = turns(SYNC_TURNS, |size, service, step, first| {
        let text = iptables::sync(SIZES[size], service, first..BACKENDS);
        followed[size].measure(service, step, || places[size].feed(&IPTABLES_NFT, &text))
    })?;
    commit_rows(report, "iptables-nft, whole sync", &samples, None);
    drop(followed);
    list_row(report, &places, &["iptables-nft-save", "-t", "nat"], "-j DNAT", BACKENDS)
}

/// kube-proxy's iptables mode over the legacy tables.
pub(crate) fn iptables_legacy(report: &mut Report) -> Result<()> {
    let places = places("iptables-legacy", |place, services| {
        place.feed(&IPTABLES_LEGACY, &iptables::all(services).collect::<String>())
    })?;
    let [small, large] = [&places[0], &places[1]].map(read_legacy);
    let (small, large) = (small?, large?);
    report.check(
        "iptables-legacy: CPU of reading and evaluating",
        [spread(&small.all), spread(&large.all)],
        format!("{} at 10,000", ms(LEGACY_CPU)),
        median(&large.all) <= LEGACY_CPU,
    );
    report.note(
        "iptables-legacy: of that, in the kernel, which copies the table",
        [spread(&small.in_kernel), spread(&large.in_kernel)],
    );
    report.note(
        "iptables-legacy: peak heap of a reading",
        [mb(small.peak_bytes), mb(large.peak_bytes)],
    );
    say("iptables-legacy: nothing changes");
    let followed = follow(&places)?;
    let reads = || [0, 1].map(|size: usize| followed[size].counters.table_reads.get());
    let before = reads();
    sleep(IDLE);
    let [small, large] = [0, 1].map(|size: usize| reads()[size] - before[size]);
    report.check(
        format!("iptables-legacy: reads in {} s without a commit", IDLE.as_secs()),
        [small.to_string(), large.to_string()],
        "none",
        small + large == 0,
    );
    start_rows(report, "iptables-legacy", &followed);
    drop(followed);
    list_row(report, &places, &["iptables-legacy-save", "-t", "nat"], "-j DNAT", BACKENDS)
}

/// What readings of the legacy table cost.
#[derive(Default)]
struct Readings {
    /// CPU of each.
    all: Vec<Duration>,
    /// The part of it that is the kernel's.
    in_kernel: Vec<Duration>,
    peak_bytes: usize,
}

fn read_legacy(place: &Place) -> Result<Readings> {
    place.enter()?;
    let reader = Reader::open(Family::V4)?.ok_or_else(|| anyhow::anyhow!("no IPv4 here"))?;
    let mut readings = Readings::default();
    take_peak_bytes();
    let held_bytes = in_use_bytes();
    for _ in 0..READS {
        let (before, in_kernel_before) = (thread_cpu()?, thread_cpu_in_kernel()?);
        let reading = reader.read()?;
        readings.all.push(thread_cpu()?.saturating_sub(before));
        readings.in_kernel.push(thread_cpu_in_kernel()?.saturating_sub(in_kernel_before));
        ensure!(
            reading.evaluated.reached.backends.len().is_multiple_of(BACKENDS),
            "all backends were read"
        );
    }
    readings.peak_bytes = take_peak_bytes().saturating_sub(held_bytes);
    Ok(readings)
}

fn start_rows(report: &mut Report, what: &str, followed: &[Followed; 2]) {
    let start = [&followed[0].start, &followed[1].start];
    report.check(
        format!("{what}: start-up, until the backends are known"),
        start.map(|start| format!("{}, CPU {}", ms(start.elapsed), ms(start.cpu))),
        format!("{} at 10,000", ms(START)),
        start[1].elapsed <= START,
    );
    report.check(
        format!("{what}: heap of the model"),
        start.map(|start| format!("{}, peak {}", mb(start.kept_bytes), mb(start.peak_bytes))),
        format!("{} at 10,000", mb(MODEL_BYTES)),
        start[1].kept_bytes <= MODEL_BYTES,
    );
}

/// Latency and CPU of commits; a ratio only where the change is the same at both sizes.
fn commit_rows(report: &mut Report, what: &str, samples: &[Vec<Sample>; 2], ratio: Option<f64>) {
    let known = known_after(samples);
    report.check(
        format!("{what}: delivered → change known"),
        [spread(&known[0]), spread(&known[1])],
        format!("{}, {}", ms(KNOWN_AFTER[0]), ms(KNOWN_AFTER[1])),
        p99(&known[0]) <= KNOWN_AFTER[0] && p99(&known[1]) <= KNOWN_AFTER[1],
    );
    let cpu = cpu(samples);
    report.note(format!("{what}: CPU per commit"), [spread(&cpu[0]), spread(&cpu[1])]);
    if let Some(bound) = ratio {
        let times = median(&cpu[1]).as_secs_f64() / median(&cpu[0]).as_secs_f64();
        report.check(
            format!("{what}: the same change's CPU, 10,000 to 1,000"),
            ["1".to_owned(), format!("{times:.2}")],
            format!("{bound}"),
            times <= bound,
        );
    }
}

fn alternative_rows(report: &mut Report, what: &str, samples: &[Vec<Sample>; 2]) {
    let (known, cpu) = (known_after(samples), cpu(samples));
    report.note(
        format!("instead, {what}: delivered → commit shown"),
        [spread(&known[0]), spread(&known[1])],
    );
    report.note(format!("instead, {what}: CPU per commit"), [spread(&cpu[0]), spread(&cpu[1])]);
}

/// One listing; `marks` is how often each Service's rules show `mark`.
fn list_row(
    report: &mut Report,
    places: &[Place; 2],
    words: &[&str],
    mark: &str,
    marks: usize,
) -> Result<()> {
    let what = words.join(" ");
    say(&format!("instead: {what}"));
    let costs = [
        list(&places[0], words, mark, SIZES[0] * marks)?,
        list(&places[1], words, mark, SIZES[1] * marks)?,
    ];
    let shown = |cost: Option<Cost>| match cost {
        Some(Cost { elapsed, cpu }) => format!("{}, CPU {}", ms(elapsed), ms(cpu)),
        None => format!("not done after {} s", LISTING.as_secs()),
    };
    report.note(format!("instead, `{what}` and a search, once"), costs.map(shown));
    Ok(())
}

fn known_after(samples: &[Vec<Sample>; 2]) -> [Vec<Duration>; 2] {
    [0, 1].map(|size: usize| samples[size].iter().map(|sample| sample.known_after).collect())
}

fn cpu(samples: &[Vec<Sample>; 2]) -> [Vec<Duration>; 2] {
    [0, 1].map(|size: usize| samples[size].iter().map(|sample| sample.cpu).collect())
}
