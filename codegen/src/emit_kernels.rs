//! `kernels-cu/generated.rs`: argument structs, costs, cases and gradient checks of every operator.

use crate::HEADER;
use crate::contract::{Case, Contract, Gradient, Tensor, Tolerance};
use crate::emit_ways;
use crate::names::{camel, dim_locals, len_expr, mentions, rust_expr, shape_doc};
use std::fmt::Write;

/// Renders the file.
pub fn render(contracts: &[Contract]) -> String {
    let mut out = format!(
        "{HEADER}//! Argument structs, costs, cases and gradient checks, one module per operator.\n\
         #![allow(clippy::all, missing_docs, unused)]\n#![cfg_attr(rustfmt, rustfmt::skip)]\n\n\
         use crate::check::{{self, Fill, GradCheck}};\nuse crate::launch::{{ElementType, In, Out}};\nuse crate::ways::{{Way, WayInfo}};\nuse crate::{{Case, Cost, OpInfo, Tier, Weight}};\n\n\
         /// Every operator, by name.\npub const OPS: &[OpInfo] = &[\n"
    );
    for c in contracts {
        let _ = writeln!(out, "    {}::INFO,", c.name);
    }
    out += "];\n\n/// Every gradient check of the tiny cases: (operator, case, row).\n\
            pub fn gradchecks() -> Vec<(&'static str, &'static str, GradCheck)> {\n    let mut rows = Vec::new();\n";
    for name in contracts.iter().filter(|c| c.gradient.is_some()).map(|c| &c.name) {
        let _ = writeln!(
            out,
            "    for case in {name}::CASES.iter().filter(|c| c.gradcheck && c.tier == Tier::Tiny) {{\n        \
             rows.extend({name}::gradcheck(case).into_iter().map(|row| ({name:?}, case.name, row)));\n    }}"
        );
    }
    out += "    rows\n}\n";
    for c in contracts {
        op_module(&mut out, c);
    }
    out
}

fn op_module(out: &mut String, c: &Contract) {
    let _ = write!(out, "\n/// {}\npub mod {} {{\n    use super::*;\n\n", c.summary, c.name);
    structs(out, c);
    if c.cuda.is_some() {
        gpu_structs(out, c);
    }
    emit_ways::ways(out, c);
    costs(out, c);
    cases(out, c);
    if let Some(gradient) = &c.gradient {
        gradcheck(out, c, gradient);
    }
    *out += "}\n";
}

fn structs(out: &mut String, c: &Contract) {
    *out += "    #[derive(Clone, Copy, Debug, PartialEq, Eq)]\n    pub struct Dims {\n";
    for d in &c.dims {
        let _ = writeln!(out, "        pub {}: usize,", d.to_lowercase());
    }
    *out += "    }\n\n    #[derive(Clone, Copy, Debug, PartialEq)]\n    pub struct Params {\n";
    for p in &c.param {
        let _ = writeln!(out, "        /// {}\n        pub {}: {},", p.doc, p.name, p.ty);
    }
    *out += "    }\n\n    pub struct Forward<'a, T> {\n        pub dims: Dims,\n        pub params: Params,\n";
    for t in &c.input {
        field(out, &t.name, &read_type(t), t);
    }
    for t in &c.inout {
        field(out, &t.name, &write_type(t, t.optional), t);
    }
    for t in &c.output {
        field(out, &t.name, &write_type(t, t.optional), t);
    }
    *out += "    }\n\n";
    let Some(gradient) = &c.gradient else { return };
    *out += "    pub struct Backward<'a, T> {\n        pub dims: Dims,\n        pub params: Params,\n";
    if let Some(result) = c.result() {
        field(out, &format!("d{}", result.name), "&'a [T]", result);
    }
    for t in gradient.needs.iter().filter_map(|n| c.tensor(n)) {
        field(out, &t.name, &read_type(t), t);
    }
    for t in c.computed_grads() {
        field(out, &format!("d{}", t.name), &write_type(t, true), t);
    }
    *out += "    }\n\n";
}

/// The same arguments as addresses in device memory, for the launchers.
fn gpu_structs(out: &mut String, c: &Contract) {
    let mut passes = vec![("Forward", gpu_forward(c))];
    passes.extend(c.gradient.as_ref().map(|gradient| ("Backward", gpu_backward(c, gradient))));
    for (pass, fields) in passes {
        let _ = write!(
            out,
            "    /// [`{pass}`] on a device with its own memory.\n    pub struct Gpu{pass}<T> {{\n        pub dims: Dims,\n        pub params: Params,\n"
        );
        for (name, ty) in fields {
            let _ = writeln!(out, "        pub {name}: {ty},");
        }
        // T has a place even where every tensor is of a fixed type.
        *out += "        pub element: std::marker::PhantomData<T>,\n    }\n\n";
    }
}

fn gpu_type(t: &Tensor, wrapper: &str, optional: bool) -> String {
    let element = match t.dtype.as_str() {
        "i32" => "i32",
        "f32" => "f32",
        _ => "T",
    };
    if optional { format!("Option<{wrapper}<{element}>>") } else { format!("{wrapper}<{element}>") }
}

fn gpu_forward(c: &Contract) -> Vec<(String, String)> {
    let read = c.input.iter().map(|t| (t.name.clone(), gpu_type(t, "In", t.optional)));
    let write = c.inout.iter().chain(&c.output).map(|t| (t.name.clone(), gpu_type(t, "Out", t.optional)));
    read.chain(write).collect()
}

fn gpu_backward(c: &Contract, gradient: &Gradient) -> Vec<(String, String)> {
    let result = c.result().map(|t| (format!("d{}", t.name), gpu_type(t, "In", false)));
    let needs = gradient.needs.iter().filter_map(|n| c.tensor(n));
    let needs = needs.map(|t| (t.name.clone(), gpu_type(t, "In", t.optional)));
    let grads = c.computed_grads().map(|t| (format!("d{}", t.name), gpu_type(t, "Out", true)));
    result.into_iter().chain(needs).chain(grads).collect()
}

fn field(out: &mut String, name: &str, ty: &str, t: &Tensor) {
    let _ = writeln!(out, "        /// `{}` {}: {}\n        pub {name}: {ty},", shape_doc(t), t.dtype_doc(), t.doc);
}

fn read_type(t: &Tensor) -> String {
    let base = match t.dtype.as_str() {
        "i32" => "&'a [i32]",
        "weight" => "Weight<'a, T>",
        _ => "&'a [T]",
    };
    if t.optional { format!("Option<{base}>") } else { base.into() }
}

fn write_type(t: &Tensor, optional: bool) -> String {
    let base = if t.dtype == "i32" { "&'a mut [i32]" } else { "&'a mut [T]" };
    if optional { format!("Option<{base}>") } else { base.into() }
}

fn costs(out: &mut String, c: &Contract) {
    for (name, doc, expr) in [
        ("flops", "Floating-point operations of one forward call.", c.cost.flops.as_str()),
        ("bytes", "Bytes that one forward call must move at the least.", c.cost.bytes.as_str()),
        ("exps", "Exponentials of one forward call, where they are counted.", c.cost.exponentials()),
    ] {
        let expr = rust_expr(expr);
        let locals = dim_locals(c, &expr);
        let argument = if locals.is_empty() { "_" } else { "dims" };
        let _ = write!(
            out,
            "    /// {doc}\n    pub fn {name}({argument}: Dims) -> usize {{\n        {locals}\n        {expr}\n    }}\n\n"
        );
    }
}

fn cases(out: &mut String, c: &Contract) {
    *out += "    /// Named shapes.\n    pub const CASES: &[Case<Dims, Params>] = &[\n";
    for case in &c.case {
        let dims: Vec<String> = c.dims.iter().map(|d| format!("{}: {}", d.to_lowercase(), case.dims[d])).collect();
        let params: Vec<String> =
            c.param.iter().map(|p| format!("{}: {}", p.name, literal(case, &p.name, &p.ty))).collect();
        let _ = writeln!(
            out,
            "        Case {{ name: {:?}, tier: Tier::{}, shape: {:?}, dims: Dims {{ {} }}, params: Params {{ {} }}, absent: &{:?}, bf16: &{:?}, gradcheck: {} }},",
            case.name,
            if case.tier == "tiny" { "Tiny" } else { "Real" },
            c.dims.iter().map(|d| format!("{d}={}", case.dims[d])).collect::<Vec<_>>().join(" "),
            dims.join(", "),
            params.join(", "),
            case.absent,
            case.bf16,
            case.gradcheck && c.gradient.is_some(),
        );
    }
    let names: Vec<&str> = c.case.iter().map(|k| k.name.as_str()).collect();
    let bounds = |t: &Option<Tolerance>| match t {
        Some(t) => format!("Some(check::Tolerance {{ atol: {:e}, rtol: {:e}, rms: {:e} }})", t.atol, t.rtol, t.rms),
        None => "None".into(),
    };
    let elements: Vec<String> =
        c.cuda.iter().flat_map(|cuda| &cuda.elements).map(|e| format!("ElementType::{}", camel(e))).collect();
    let _ = write!(
        out,
        "    ];\n\n    pub const INFO: OpInfo = OpInfo {{ name: {:?}, summary: {:?}, backward: {}, cases: &{names:?}, tolerance: {}, tolerance_bf16: {}, elements: &[{}], ways: &[{}], cost }};\n\n",
        c.name,
        c.summary,
        c.gradient.is_some(),
        bounds(&c.tolerance),
        bounds(&c.tolerance_bf16),
        elements.join(", "),
        c.cuda.iter().flat_map(|cuda| &cuda.way).map(emit_ways::info).collect::<Vec<_>>().join(", "),
    );
    let dims: Vec<String> = c.dims.iter().map(|d| format!("{}: dim({d:?})", d.to_lowercase())).collect();
    let _ = write!(
        out,
        "    /// Cost of one forward call whose dims `dim` knows by name.\n    pub fn cost(dim: &dyn Fn(&str) -> usize) -> Cost {{\n        let dims = Dims {{ {} }};\n        Cost {{ flops: flops(dims), bytes: bytes(dims), exps: exps(dims) }}\n    }}\n\n",
        dims.join(", ")
    );
}

fn literal(case: &Case, name: &str, ty: &str) -> String {
    match (&case.params[name], ty) {
        (toml::Value::Integer(i), "f32") => format!("{i}.0"),
        (toml::Value::Float(f), _) => format!("{f:?}"),
        (value, _) => value.to_string(),
    }
}

/// A function that compares the oracle's backward pass with central differences of its forward pass, in f64.
fn gradcheck(out: &mut String, c: &Contract, gradient: &Gradient) {
    let Some(result) = c.result() else { return };
    let mut body = String::new();
    for t in c.input.iter() {
        let draw = if t.dtype == "i32" { "draw_i32" } else { "draw_f64" };
        let _ = writeln!(
            body,
            "        let {} = check::{draw}(case.name, {:?}, {}, {});",
            t.name,
            t.name,
            len_expr(t),
            fill(t)
        );
    }
    let _ = writeln!(
        body,
        "        let cotangent = check::draw_f64(case.name, \"d{}\", {}, Fill::Normal);",
        result.name,
        len_expr(result)
    );
    body += "        let absent = |name: &str| case.absent.contains(&name);\n";
    // One forward call over given inputs; returns the outputs.
    let grads: Vec<&Tensor> = c.computed_grads().collect();
    let arg_list: Vec<String> = grads.iter().map(|t| format!("{}: &[f64]", t.name)).collect();
    let _ = writeln!(body, "        let forward = |{}| {{", arg_list.join(", "));
    for t in &c.output {
        let _ = writeln!(body, "            let mut {} = vec![0.0f64; {}];", t.name, len_expr(t));
    }
    body += "            super::super::";
    let _ = write!(body, "{}::reference::forward(Forward {{ dims, params", c.name);
    for t in &c.input {
        let _ = write!(body, ", {}: {}", t.name, pass_read(t, grads.iter().any(|g| g.name == t.name)));
    }
    for t in &c.output {
        let _ = write!(body, ", {}: {}", t.name, pass_write(t));
    }
    let outs: Vec<&str> = c.output.iter().map(|t| t.name.as_str()).collect();
    let trailing = if outs.len() == 1 { "," } else { "" };
    let _ = writeln!(body, " }});\n            ({}{trailing})\n        }};", outs.join(", "));
    let call: Vec<String> = grads.iter().map(|t| format!("&{}", t.name)).collect();
    let _ = writeln!(body, "        let ({}{trailing}) = forward({});", outs.join(", "), call.join(", "));
    for t in &grads {
        let _ = writeln!(body, "        let mut d{} = vec![0.0f64; {}];", t.name, len_expr(t));
    }
    let _ = write!(
        body,
        "        super::super::{}::reference::backward(Backward {{ dims, params, d{}: &cotangent",
        c.name, result.name
    );
    for t in gradient.needs.iter().filter_map(|n| c.tensor(n)) {
        let _ = write!(body, ", {}: {}", t.name, pass_read(t, false));
    }
    for t in &grads {
        let value = if t.optional {
            format!("(!absent({:?})).then_some(&mut d{}[..])", t.name, t.name)
        } else {
            format!("Some(&mut d{}[..])", t.name)
        };
        let _ = write!(body, ", d{}: {value}", t.name);
    }
    body += " });\n        let mut rows = Vec::new();\n";
    for t in &grads {
        let call: Vec<String> =
            grads.iter().map(|g| if g.name == t.name { "moved".into() } else { format!("&{}", g.name) }).collect();
        let guard = if t.optional { format!("if !absent({:?}) ", t.name) } else { String::new() };
        let _ = writeln!(
            body,
            "        {guard}{{ rows.push(check::directional({:?}, case.name, &{}, &d{}, |moved| check::dot(&forward({}).0, &cotangent))); }}",
            t.name,
            t.name,
            t.name,
            call.join(", ")
        );
    }
    body += "        rows\n";
    let _ = write!(
        out,
        "    /// Directional derivatives of the oracle in f64: analytic against central differences.\n    \
         pub fn gradcheck(case: &Case<Dims, Params>) -> Vec<GradCheck> {{\n        let (dims, params) = (case.dims, case.params);\n        {}\n{}{body}    }}\n",
        dim_locals(c, &body),
        param_locals(c, &body),
    );
}

/// Locals for the parameters that a fill expression names (`index:V`).
fn param_locals(c: &Contract, text: &str) -> String {
    let used: Vec<&str> = c.param.iter().map(|p| p.name.as_str()).filter(|p| mentions(text, p)).collect();
    if used.is_empty() {
        String::new()
    } else {
        format!("        let Params {{ {}, .. }} = params;\n", used.join(", "))
    }
}

/// `Fill` of a tensor as Rust; both generated files import the type.
pub fn fill(t: &Tensor) -> String {
    let mut parts = t.fill.split(':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("uniform"), Some(lo), Some(hi)) => format!("Fill::Uniform({lo}f64, {hi}f64)"),
        (Some("index"), Some(end), _) => format!("Fill::Index({})", rust_expr(end)),
        (Some("positive"), ..) => "Fill::Positive".into(),
        _ => "Fill::Normal".into(),
    }
}

fn pass_read(t: &Tensor, borrowed: bool) -> String {
    let plain = if borrowed { t.name.clone() } else { format!("&{}[..]", t.name) };
    let value = if t.dtype == "weight" { format!("Weight::Native({plain})") } else { plain };
    if t.optional { format!("(!absent({:?})).then_some({value})", t.name) } else { value }
}

fn pass_write(t: &Tensor) -> String {
    if t.optional {
        format!("(!absent({:?})).then_some(&mut {}[..])", t.name, t.name)
    } else {
        format!("&mut {}[..]", t.name)
    }
}
