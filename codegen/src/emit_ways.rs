//! The ways of an operator: an enum for each pass, for its launcher to choose from.

use crate::contract::{Contract, Way};
use crate::names::camel;
use std::fmt::Write;

/// A way as `OpInfo` lists it.
pub fn info(way: &Way) -> String {
    let elements: Vec<String> = way.elements.iter().map(|e| format!("ElementType::{}", camel(e))).collect();
    format!(
        "WayInfo {{ name: {:?}, pass: {:?}, arch: {}, elements: &[{}], doc: {:?} }}",
        way.name,
        way.pass,
        way.arch,
        elements.join(", "),
        way.doc
    )
}

/// The ways of each pass as an enum, and the dims as the table of measurements names them.
pub fn ways(out: &mut String, c: &Contract) {
    let Some(cuda) = c.cuda.as_ref().filter(|cuda| !cuda.way.is_empty()) else { return };
    let letters: Vec<String> = c.dims.iter().map(|d| format!("{d}={{}}")).collect();
    let values: Vec<String> = c.dims.iter().map(|d| format!("self.{}", d.to_lowercase())).collect();
    let _ = write!(
        out,
        "    impl std::fmt::Display for Dims {{\n        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {{\n            write!(f, {:?}, {})\n        }}\n    }}\n\n",
        letters.join(" "),
        values.join(", ")
    );
    for (pass, name) in [("forward", "ForwardWay"), ("backward", "BackwardWay")] {
        let list: Vec<&Way> = cuda.ways(pass).collect();
        if list.is_empty() {
            continue;
        }
        let _ = writeln!(
            out,
            "    /// Ways to run the {pass} pass on a GPU.\n    #[derive(Clone, Copy, Debug, PartialEq, Eq)]\n    pub enum {name} {{"
        );
        for way in &list {
            let _ = writeln!(out, "        /// {}\n        {},", way.doc, camel(&way.name));
        }
        let _ = writeln!(
            out,
            "    }}\n\n    impl Way for {name} {{\n        const OP: &'static str = {:?};\n        const ALL: &'static [({name}, WayInfo)] = &[",
            c.name
        );
        for way in &list {
            let _ = writeln!(out, "            ({name}::{}, {}),", camel(&way.name), info(way));
        }
        *out += "        ];\n    }\n\n";
    }
}
