//! `kernels-cu/launchers.rs`: a struct for every kernel, whose fields are the arguments of its signature.

use crate::cuda::{Kernel, Type};
use crate::names::camel;
use crate::{HEADER, Source};
use std::fmt::Write;

/// Renders the file; `sources` are those of operators, in order, `probes` the one-tile kernels that no operator calls:
/// file and name.
pub fn render(sources: &[Source], probes: &[(String, String)]) -> String {
    let mut out = format!(
        "{HEADER}//! Typed launchers: what a kernel takes is what its source says.\n\
         #![allow(clippy::all, missing_docs, unused)]\n#![cfg_attr(rustfmt, rustfmt::skip)]\n\n\
         use crate::launch::{{Arg, Element, ElementType, In, Kernel, Launch, Out, Queue, Shape, TensorMap, int, uint}};\n\
         use half::bf16;\nuse std::marker::PhantomData;\n\n\
         /// Every kernel of the operators.\npub const KERNELS: &[&Kernel] = &[\n"
    );
    for source in sources {
        for kernel in &source.kernels {
            let _ = writeln!(out, "    &{}::{},", source.op, constant(kernel));
        }
    }
    out += "];\n\n/// Kernels that show what single instructions do.\npub const PROBES: &[&Kernel] = &[\n";
    for (file, name) in probes {
        let arch = architecture(file);
        let _ = writeln!(out, "    &Kernel {{ op: \"probes\", source: {file:?}, name: {name:?}, arch: {arch} }},");
    }
    out += "];\n";
    let mut ops: Vec<&str> = sources.iter().map(|s| s.op.as_str()).collect();
    ops.dedup();
    for op in ops {
        let _ = write!(out, "\n/// Kernels of `{op}`.\npub mod {op} {{\n    use super::*;\n");
        for source in sources.iter().filter(|s| s.op == op) {
            source.kernels.iter().for_each(|k| launcher(&mut out, source, k));
        }
        out += "}\n";
    }
    out
}

fn constant(kernel: &Kernel) -> String {
    kernel.name.to_uppercase()
}

/// Lowest architecture of a source, by its name.
fn architecture(file: &str) -> u32 {
    if file.ends_with("_sm90.cu") { 90 } else { 80 }
}

fn generic(kernel: &Kernel) -> bool {
    kernel.arguments.iter().any(|a| matches!(a.ty, Type::Pointer { element: "T", .. }))
}

fn launcher(out: &mut String, source: &Source, k: &Kernel) {
    let (name, constant) = (camel(&k.name), constant(k));
    let arch = architecture(&source.file);
    let _ = write!(
        out,
        "\n    pub const {constant}: Kernel = Kernel {{ op: {:?}, source: {:?}, name: {:?}, arch: {arch} }};\n\n    \
         /// Arguments of [`{constant}`].\n    pub struct {name}{} {{\n",
        source.op,
        source.file,
        k.name,
        if generic(k) { "<T>" } else { "" },
    );
    for a in &k.arguments {
        let ty = match &a.ty {
            Type::Pointer { element, read: true } => format!("In<{element}>"),
            Type::Pointer { element, read: false } => format!("Out<{element}>"),
            Type::Int | Type::Uint => "usize".into(),
            Type::Uint64 => "u64".into(),
            Type::Float => "f32".into(),
            Type::Map => "TensorMap".into(),
        };
        let _ = writeln!(out, "        pub {}: {ty},", a.name);
    }
    let (head, element) = if generic(k) {
        (format!("impl<T: Element> {name}<T>"), "T::TYPE")
    } else {
        (format!("impl {name}"), "ElementType::F32")
    };
    // A kernel without an element of its own is the same in every build of its source; the caller says which.
    let (extra, element) = if generic(k) { ("", element) } else { (", element: ElementType", "element") };
    let _ = write!(
        out,
        "    }}\n\n    {head} {{\n        pub fn launch<Q: Queue>(self, queue: &mut Q, shape: Shape{extra}) -> Result<(), Q::Error> {{\n            let args = [\n"
    );
    for a in &k.arguments {
        let n = &a.name;
        let value = match &a.ty {
            Type::Pointer { .. } => format!("Arg::Address(self.{n}.address())"),
            Type::Int => format!("int(queue, &{constant}, {n:?}, self.{n})?"),
            Type::Uint => format!("uint(queue, &{constant}, {n:?}, self.{n})?"),
            Type::Uint64 => format!("Arg::U64(self.{n})"),
            Type::Float => format!("Arg::F32(self.{n})"),
            Type::Map => format!("Arg::Map(self.{n})"),
        };
        let _ = writeln!(out, "                {value},");
    }
    let _ = write!(
        out,
        "            ];\n            queue.launch(&Launch {{ kernel: &{constant}, element: {element}, shape, args: &args }})\n        }}\n    }}\n"
    );
}
