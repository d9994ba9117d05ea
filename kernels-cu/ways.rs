//! The choice among the ways in which an operator can run on a GPU.
//!
//! An operator lists its ways in `op.toml`, the one to prefer first; its `launch.rs` says which shapes each takes and
//! asks [`choose`]. Measurements stand in `tuned.csv` (`graft op tune` writes them): running never measures.

use crate::launch::{ElementType, Queue};
use std::cell::Cell;
use std::fmt::Display;
use std::sync::OnceLock;

/// What is known of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayInfo {
    /// Name, unique in its pass.
    pub name: &'static str,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// Lowest compute capability that has its instructions: 10·major + minor.
    pub arch: u32,
    /// Working types that it computes in.
    pub elements: &'static [ElementType],
    /// What it is, in a sentence.
    pub doc: &'static str,
}

/// The ways of a pass, generated from the contract.
pub trait Way: Copy + 'static {
    /// The operator.
    const OP: &'static str;
    /// All of them, the one to prefer first; the last takes everything.
    const ALL: &'static [(Self, WayInfo)];
}

/// A row of `tuned.csv`: the fastest way of a shape on a GPU, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuned<'t> {
    /// Name of the GPU, as the driver tells it.
    pub gpu: &'t str,
    /// Operator.
    pub op: &'t str,
    /// `forward` or `backward`.
    pub pass: &'t str,
    /// Working type.
    pub element: &'t str,
    /// The dims: `B=2 N=256 H=16 E=72`.
    pub shape: &'t str,
    /// The way.
    pub way: &'t str,
    /// Its median time.
    pub ms: f64,
}

/// The columns of `tuned.csv`.
pub const COLUMNS: &str = "gpu,op,pass,element,shape,way,ms";

/// Reads the text of a table of measurements.
///
/// # Errors
/// The line that is no row.
pub fn parse(text: &str) -> Result<Vec<Tuned<'_>>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(COLUMNS) {
        return Err(format!("the first line is not {COLUMNS}"));
    }
    let rows = lines.filter(|line| !line.is_empty()).map(|line| {
        let fields: Option<[&str; 7]> = line.split(',').collect::<Vec<_>>().try_into().ok();
        let measured = fields.and_then(|f| Some((f, f[6].parse::<f64>().ok().filter(|ms| *ms > 0.0)?)));
        let ([gpu, op, pass, element, shape, way, _], ms) = measured.ok_or_else(|| format!("no row: {line}"))?;
        Ok(Tuned { gpu, op, pass, element, shape, way, ms })
    });
    rows.collect()
}

/// The committed measurements. A table that does not parse is empty: a test of this crate refuses it before.
pub fn tuned() -> &'static [Tuned<'static>] {
    static TABLE: OnceLock<Vec<Tuned<'static>>> = OnceLock::new();
    TABLE.get_or_init(|| parse(include_str!("tuned.csv")).unwrap_or_default())
}

thread_local! {
    /// What [`force`] asks for on this thread, and whether a choice has followed it.
    static FORCED: Cell<Option<(&'static str, bool)>> = const { Cell::new(None) };
}

/// Runs `work`, in which every choice that has a way `name` which fits takes it. Gives what the work gives, and whether
/// any choice did so. For tests and measurements.
pub fn force<R>(name: &'static str, work: impl FnOnce() -> R) -> (R, bool) {
    let before = FORCED.replace(Some((name, false)));
    let result = work();
    let met = FORCED.replace(before).is_some_and(|(_, met)| met);
    (result, met)
}

/// The way to run a pass of the shape `dims`: what is forced, else what was measured as the fastest on this GPU, else
/// the first that fits: the device has its instructions, it computes in `element`, and `takes` says yes. The last way
/// is taken where nothing else fits.
pub fn choose<W: Way, Q: Queue>(queue: &Q, element: ElementType, dims: &impl Display, takes: impl Fn(W) -> bool) -> W {
    choose_suited(queue, element, dims, takes, |_| true)
}

/// As [`choose`]; a way that takes the shape and does not suit it (its blocks would not fill a card) is passed over
/// unless it is forced, was measured, or nothing else fits.
pub fn choose_suited<W: Way, Q: Queue>(
    queue: &Q,
    element: ElementType,
    dims: &impl Display,
    takes: impl Fn(W) -> bool,
    suits: impl Fn(W) -> bool,
) -> W {
    let device = queue.properties();
    let fits =
        |(way, info): &&(W, WayInfo)| info.arch <= device.arch && info.elements.contains(&element) && takes(*way);
    let named = |name: &str| W::ALL.iter().filter(|(_, info)| info.name == name).find(fits).map(|(way, _)| *way);
    if let Some((name, _)) = FORCED.get()
        && let Some(way) = named(name)
    {
        FORCED.set(Some((name, true)));
        return way;
    }
    let pass = W::ALL[0].1.pass;
    let mut rows = tuned()
        .iter()
        .filter(|row| row.op == W::OP && row.pass == pass && row.gpu == device.name && row.element == element.name());
    if let Some(first) = rows.next() {
        let shape = dims.to_string();
        let row = std::iter::once(first).chain(rows).find(|row| row.shape == shape);
        if let Some(way) = row.and_then(|row| named(row.way)) {
            return way;
        }
    }
    let suited = W::ALL.iter().filter(|(way, _)| suits(*way)).find(fits);
    suited.or_else(|| W::ALL.iter().find(fits)).unwrap_or(&W::ALL[W::ALL.len() - 1]).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generated::OPS;

    #[test]
    fn the_committed_table_names_ways_that_exist() {
        let rows = parse(include_str!("tuned.csv")).unwrap();
        for row in rows {
            let op = OPS.iter().find(|op| op.name == row.op).unwrap_or_else(|| panic!("{row:?}"));
            assert!(op.ways.iter().any(|w| w.name == row.way && w.pass == row.pass), "{row:?}");
            assert!(ElementType::named(row.element).is_some(), "{row:?}");
        }
    }

    #[test]
    fn a_line_that_is_no_row_is_named() {
        assert!(parse("gpu,op\n").unwrap_err().contains("first line"));
        let text = format!("{COLUMNS}\nNVIDIA H100,gemm,forward,bf16,B=2 N=1,wgmma,0.5\n");
        assert_eq!(parse(&text).unwrap()[0].shape, "B=2 N=1");
        for bad in ["a,b,c", "g,o,p,e,s,w,-1", "g,o,p,e,s,w,NaN", "g,o,p,e,s,w,x,1"] {
            assert!(parse(&format!("{COLUMNS}\n{bad}\n")).unwrap_err().contains(bad));
        }
    }
}
