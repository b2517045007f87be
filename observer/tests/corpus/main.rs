//! What the fuzz targets do, on stable Rust and for a bounded time: every file of the corpus, cut
//! short and altered in always the same ways, through the same functions. Nothing may panic, hang
//! or take memory without bound.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

use nix::sys::resource::{Resource, setrlimit};

#[expect(unreachable_pub, reason = "the library of the fuzz targets, shared")]
#[path = "../../fuzz/src/lib.rs"]
mod parsers;
mod record;

/// Altered copies of one file, unless it is so large that [`BYTES`] end them first.
const ALTERED: usize = 4000;
/// Bytes fed per file, for altered copies and for cuts: some seconds without optimisation.
const BYTES: usize = 6 << 20;
/// What all of this may map, threads included; the input is some kilobytes at a time.
const MEMORY_BYTES: u64 = 4 << 30;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The files of one parser, by name; at least one.
fn files(parser: &str) -> Vec<(String, Vec<u8>)> {
    let folder = fuzz().join("corpus").join(parser);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("a readable folder").path();
            (path.display().to_string(), fs::read(&path).expect("a readable file"))
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

/// Numbers that are the same in every run (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from(number).expect("32 bits") % bound.max(1)
    }

    /// One to eight edits: a byte that matters to lengths, a bit, a part taken out or repeated.
    fn alter(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len());
            let to = bytes.len().min(at + 1 + self.below(32));
            if bytes.is_empty() {
                return;
            }
            match self.below(6) {
                0 => bytes[at] = [0, 1, 4, 0x7f, 0x80, 0xff][self.below(6)],
                1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes[at] = bytes[at].wrapping_add(1),
                3 => drop(bytes.drain(at..to)),
                4 => {
                    let repeated = bytes[at..to].to_vec();
                    bytes.splice(at..at, repeated);
                }
                _ => {
                    let from = self.below(bytes.len());
                    let moved = bytes[from..bytes.len().min(from + to - at)].to_vec();
                    bytes[at..at + moved.len().min(to - at)]
                        .copy_from_slice(&moved[..moved.len().min(to - at)]);
                }
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "tells which file it was, when the parser fails")]
fn feed(parser: &str) {
    static LIMIT: Once = Once::new();
    LIMIT.call_once(|| {
        setrlimit(Resource::RLIMIT_AS, MEMORY_BYTES, MEMORY_BYTES).expect("limit the memory");
    });
    let (_, parse) = parsers::ALL.into_iter().find(|(name, _)| *name == parser).expect("a parser");
    parse(&[]);
    for (name, whole) in files(parser) {
        println!("{name}");
        parse(&whole);
        // A cut costs half of the whole on average.
        let stride = (whole.len() * whole.len() / 2 / BYTES).max(1);
        for length in (0..whole.len()).step_by(stride) {
            parse(&whole[..length]);
        }
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for _ in 0..ALTERED.min(BYTES / whole.len().max(1)) {
            let mut altered = whole.clone();
            numbers.alter(&mut altered);
            parse(&altered);
        }
    }
}

/// One test per parser, so that one that hangs or fails is named; and their names.
macro_rules! survives {
    ($($parser:ident)*) => {
        pub(super) const FED: &[&str] = &[$(stringify!($parser)),*];
        $(
            #[test]
            fn $parser() {
                feed(stringify!($parser));
            }
        )*
    };
}

mod cut_and_altered_bytes_do_no_harm {
    use super::feed;

    survives! {
        agent_answers cilium_maps ipvs_answers kernel_btf kernel_event legacy_table names nft_dump
        nft_notifications pods slices
    }
}

#[test]
fn every_parser_is_fed_and_has_a_fuzz_target_and_a_corpus() {
    assert_eq!(parsers::ALL.map(|(parser, _)| parser), cut_and_altered_bytes_do_no_harm::FED);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).expect("the fuzz manifest");
    for (parser, _) in parsers::ALL {
        let target = fs::read_to_string(fuzz().join(format!("fuzz_targets/{parser}.rs")));
        let calls = format!("fuzz_target!(|bytes: &[u8]| observer_fuzz::{parser}(bytes));");
        assert!(target.expect("a target").contains(&calls), "{parser}");
        assert!(manifest.contains(&format!("name = \"{parser}\"")), "{parser}");
        assert!(!files(parser).is_empty());
    }
}

#[test]
fn the_corpus_is_read_as_what_it_was_recorded_of() {
    use observer::dataplane::{Counters, reach};
    let counters = Counters::default();
    for (name, answers) in files("nft_dump") {
        let ruleset = observer::fuzzing::dump(&answers, &counters).expect("a whole dump");
        let backends = ruleset.tables().map(|(_, table)| reach::walk(table).backends.len());
        assert!(backends.sum::<usize>() >= 2, "{name}");
    }
    for (name, answers) in files("ipvs_answers") {
        let table = observer::fuzzing::ipvs_table(&answers).expect("whole answers");
        let reached = table.reached;
        let sizes = (reached.backends.len(), reached.draining.len(), reached.unresolved);
        assert_eq!((table.services, sizes), (3, (2, 1, 1)), "{name}");
    }
    assert_eq!((counters.malformed.get(), counters.unknown_expressions.get()), (0, 0));
}
