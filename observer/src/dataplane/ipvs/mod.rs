//! IPVS: the kernel's own list of virtual services and destinations, read whole.
//!
//! `/proc/net/ip_vs` rather than generic netlink, which wants a request for each service. The
//! kernel says nothing of changes; a kernel program reports the calls that make them. Refuses to
//! guess: which Service a virtual service is of, IPVS does not say.

mod text;

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::sync::Arc;

use anyhow::Context as _;

use super::Counters;
pub use text::{Table, parse};

/// Of the calling thread's network namespace. Not /proc/net: that is the main thread's.
const PATH: &str = "/proc/thread-self/net/ip_vs";
/// The kernel writes this many lines before the first service.
const HEADER_LINES: usize = 3;
/// What one read of such a file gives at most: a page.
const PAGE_BYTES: usize = 4096;

/// Whether this thread's network namespace has a virtual service. Reads one page, however many
/// there are.
#[must_use]
pub fn ipvs_in_use() -> bool {
    let Ok(mut file) = File::open(PATH) else { return false };
    let mut page = [0; PAGE_BYTES];
    let read = file.read(&mut page).unwrap_or(0);
    page[..read].iter().filter(|byte| **byte == b'\n').count() > HEADER_LINES
}

/// Reads the table of this thread's network namespace.
#[derive(Debug)]
pub struct Reader {
    counters: Arc<Counters>,
}

impl Reader {
    /// Lines that are not understood are counted in `counters`.
    #[must_use]
    pub fn new(counters: Arc<Counters>) -> Self {
        Self { counters }
    }

    /// The table as it is now; empty while the module is not loaded. The kernel hands it out page
    /// by page: a service that comes or goes meanwhile may make it pass over others.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self) -> anyhow::Result<Table> {
        let text = match read_by_page() {
            Ok(text) => text,
            Err(error) if is_absent(&error) => return Ok(Table::default()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {PATH}")),
        };
        let table = parse(&text);
        self.counters.malformed.add(table.malformed);
        Ok(table)
    }
}

/// The whole text. Asked for less than a page, the kernel would hand it out in smaller pieces.
fn read_by_page() -> io::Result<String> {
    let mut file = File::open(PATH)?;
    let (mut text, mut page) = (Vec::new(), [0; PAGE_BYTES]);
    loop {
        match file.read(&mut page)? {
            0 => return String::from_utf8(text).map_err(io::Error::other),
            read => text.extend_from_slice(&page[..read]),
        }
    }
}

/// The module is not loaded.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
}
