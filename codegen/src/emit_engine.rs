//! `engine/src/ops/generated.rs`: checked entry points, autograd nodes and conformance rows of every operator.

use crate::HEADER;
use crate::contract::{Contract, Grad, Gradient, Tensor, named_by_has};
use crate::emit_conform::conform;
use crate::emit_dispatch::{self, Access, Field};
use crate::names::{camel, dim_locals, rust_expr, shape_doc};
use std::fmt::Write;

/// Renders the file.
pub fn render(contracts: &[Contract]) -> String {
    let mut out = format!(
        "{HEADER}//! Checked entry points, autograd nodes and conformance rows of every operator.\n\
         //!\n//! An entry point unifies the dims over its arguments, names the argument that does not fit, allocates the\n\
         //! outputs and hands plain slices to the device's path. Nothing runs before every check has passed.\n\
         #![allow(clippy::all, unused)]\n#![cfg_attr(rustfmt, rustfmt::skip)]\n\n\
         use super::cases::{{CaseRow, Conform}};\nuse super::entry::{{DimCheck, check_index, no_element, no_path, require}};\n\
         use crate::autograd::{{Graph, Var}};\nuse crate::backend::{{Device, DeviceKind}};\n\
         use crate::error::{{Error, Result}};\nuse crate::tensor::{{DType, Tensor}};\nuse graft_kernels as kernels;\n\
         use graft_kernels::check::Fill;\nuse graft_kernels::{{Case, Tier}};\nuse half::bf16;\n\n\
         /// Runs every case of every operator; see [`super::check`].\npub(super) const CONFORMANCE: &[(&str, fn(&mut Conform<'_>) -> Result<()>)] = &[\n"
    );
    for c in contracts {
        let _ = writeln!(out, "    ({:?}, {}_conform),", c.name, c.name);
    }
    out += "];\n";
    for c in contracts {
        out_struct(&mut out, c);
        forward(&mut out, c);
        if let Some(gradient) = &c.gradient {
            backward(&mut out, c, gradient);
            graph_method(&mut out, c, gradient);
        }
        conform(&mut out, c);
    }
    out
}

/// A result struct where there is more than one output tensor.
fn out_struct(out: &mut String, c: &Contract) {
    if c.output.len() > 1 {
        let _ = writeln!(out, "\n/// Outputs of [`{}`].\npub struct {}Out {{", c.name, camel(&c.name));
        for t in &c.output {
            let ty = if t.optional { "Option<Tensor>" } else { "Tensor" };
            let _ = writeln!(out, "    /// `{}` {}: {}\n    pub {}: {ty},", shape_doc(t), t.dtype_doc(), t.doc, t.name);
        }
        out.push_str("}\n");
    }
    if c.gradient.is_some() && c.computed_grads().count() > 1 {
        let _ = writeln!(
            out,
            "\n/// Gradients of [`{}`]; absent where not asked for.\npub struct {}Grads {{",
            c.name,
            camel(&c.name)
        );
        for t in c.computed_grads() {
            let _ = writeln!(out, "    /// `{}` float\n    pub {}: Option<Tensor>,", shape_doc(t), t.name);
        }
        out.push_str("}\n");
    }
}

/// Function parameters for tensors read.
fn signature(c: &Contract) -> String {
    let mut parts = Vec::new();
    for t in &c.input {
        parts.push(format!("{}: {}", t.name, if t.optional { "Option<&Tensor>" } else { "&Tensor" }));
    }
    for t in &c.inout {
        parts.push(format!("{}: {}", t.name, if t.optional { "Option<&mut Tensor>" } else { "&mut Tensor" }));
    }
    for t in c.output.iter().filter(|t| t.optional) {
        parts.push(format!("want_{}: bool", t.name));
    }
    for d in &c.given {
        parts.push(format!("{}: usize", d.to_lowercase()));
    }
    parts.join(", ")
}

fn return_type(c: &Contract) -> String {
    match c.output.len() {
        0 => "()".into(),
        1 => "Tensor".into(),
        _ => format!("{}Out", camel(&c.name)),
    }
}

/// Statements that unify the dims and check dtypes and devices of `tensors`.
fn checks(c: &Contract, tensors: &[(&Tensor, String)]) -> String {
    let mut s = String::new();
    let _ = writeln!(s, "    let mut check = DimCheck::new({:?}, &{:?});", c.name, c.dims);
    for d in &c.given {
        let _ = writeln!(s, "    check.given({d:?}, {})?;", d.to_lowercase());
    }
    // Bare letters bind first, so that expressions can be evaluated whatever the order of the arguments.
    for pass in ["bind", "match_exprs"] {
        for (t, name) in tensors {
            let shape = format!("&{:?}", t.shape);
            let call = |value: &str| format!("check.{pass}({name:?}, {value}, {shape})?;");
            let line = if t.optional {
                format!("if let Some(t) = {} {{ {} }}", reborrow(t, c, name), call("t"))
            } else {
                call(&plain(t, c, name))
            };
            let _ = writeln!(s, "    {line}");
        }
    }
    for (t, name) in tensors {
        let call = |value: &str| format!("check.{}({name:?}, {value})?;", t.dtype);
        let line = if t.optional {
            format!("if let Some(t) = {} {{ {} }}", reborrow(t, c, name), call("t"))
        } else {
            call(&plain(t, c, name))
        };
        let _ = writeln!(s, "    {line}");
    }
    let fields: Vec<String> = c.dims.iter().map(|d| format!("{}: check.dim({d:?})?", d.to_lowercase())).collect();
    let _ = writeln!(s, "    let dims = Dims {{ {} }};", fields.join(", "));
    index_checks(&mut s, c, tensors);
    s
}

/// Range checks of the indices (`fill = "index:END"`): they are data, so no dim speaks of them.
fn index_checks(s: &mut String, c: &Contract, tensors: &[(&Tensor, String)]) {
    for (t, name) in tensors.iter().filter(|(t, _)| t.dtype == "i32") {
        let Some(end) = t.fill.strip_prefix("index:") else { continue };
        let end = lower_dims(c, &param_fields(c, end));
        let check = |value: &str| format!("check_index({:?}, {name:?}, {value}, {end})?;", c.name);
        let check = if t.optional {
            format!("if let Some(t) = {} {{ {} }}", reborrow(t, c, name), check("t"))
        } else {
            check(&plain(t, c, name))
        };
        let _ = writeln!(s, "    {{\n        {}\n        {check}\n    }}", dim_locals(c, &end));
    }
}

/// `expr` with every parameter read from `params`.
fn param_fields(c: &Contract, expr: &str) -> String {
    c.param.iter().fold(expr.to_string(), |e, p| replace_word(&e, &p.name, &format!("params.{}", p.name)))
}

fn is_inout(t: &Tensor, c: &Contract) -> bool {
    c.inout.iter().any(|i| i.name == t.name)
}

fn plain(t: &Tensor, c: &Contract, name: &str) -> String {
    if is_inout(t, c) { format!("&*{name}") } else { name.to_string() }
}

fn reborrow(t: &Tensor, c: &Contract, name: &str) -> String {
    if is_inout(t, c) { format!("{name}.as_deref()") } else { name.to_string() }
}

/// The checks of the contract's conditions; `in_scope` tells which tensors the function has as arguments, and a
/// condition on another tensor is left out.
fn requires(c: &Contract, in_scope: impl Fn(&str) -> bool) -> String {
    let mut s = String::new();
    let mut conditions = String::new();
    for r in c.require.iter().filter(|r| named_by_has(&r.that).all(&in_scope)) {
        let that = condition(c, &r.that);
        let _ = writeln!(
            conditions,
            "    require({:?}, {that}, {:?}, {:?}, || format!(\"{{dims:?}}, {{params:?}}\"))?;",
            c.name, r.that, r.must
        );
    }
    if !conditions.is_empty() {
        let _ = writeln!(s, "    {}", dim_locals(c, &conditions));
    }
    s + &conditions
}

/// A contract's condition in Rust: parameters, dims and `has(NAME)` become what the generated functions call them.
fn condition(c: &Contract, text: &str) -> String {
    let mut rust = text.to_string();
    for name in named_by_has(text) {
        rust = rust.replace(&format!("has({name})"), &format!("{name}.is_some()"));
    }
    for p in &c.param {
        rust = replace_word(&rust, &p.name, &format!("params.{}", p.name));
    }
    lower_dims(c, &rust)
}

/// Lower-cases whole words that are dims and nothing else.
fn lower_dims(c: &Contract, expr: &str) -> String {
    c.dims.iter().fold(expr.to_string(), |e, d| replace_word(&e, d, &d.to_lowercase()))
}

fn replace_word(text: &str, word: &str, with: &str) -> String {
    let mut out = String::new();
    let mut token = String::new();
    for ch in text.chars().chain([' ']) {
        if ch.is_alphanumeric() || ch == '_' {
            token.push(ch);
        } else {
            out += if token == word { with } else { &token };
            token.clear();
            out.push(ch);
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// The statement that settles the working type of a call.
fn element(c: &Contract) -> String {
    format!("    let element = check.element(&device, kernels::generated::{}::INFO.elements)?;\n", c.name)
}

/// An expression for a new tensor of the contract's shape and dtype.
fn empty(t: &Tensor) -> String {
    match t.dtype.as_str() {
        "i32" => format!("device.empty_i32({})", shape_array(t)),
        "f32" => format!("device.empty({})", shape_array(t)),
        _ => format!("device.empty_of({}, element)", shape_array(t)),
    }
}

pub(crate) fn shape_array(t: &Tensor) -> String {
    format!("&[{}]", t.shape.iter().map(|s| rust_expr(s)).collect::<Vec<_>>().join(", "))
}

fn forward(out: &mut String, c: &Contract) {
    let name = &c.name;
    let _ = write!(out, "\n/// {}\n///\n/// ```text\n", c.summary);
    for line in &c.formula {
        let _ = writeln!(out, "/// {line}");
    }
    out.push_str("/// ```\n");
    for t in c.input.iter().chain(&c.inout) {
        let _ = writeln!(
            out,
            "/// - `{}` `{}` {}{}: {}",
            t.name,
            shape_doc(t),
            t.dtype_doc(),
            if t.optional { ", optional" } else { "" },
            t.doc
        );
    }
    for t in &c.output {
        let _ = writeln!(out, "/// - returns `{}` `{}` {}: {}", t.name, shape_doc(t), t.dtype_doc(), t.doc);
    }
    let _ = writeln!(
        out,
        "///\n/// # Errors\n/// Names the argument whose shape, dtype or device does not fit, before anything runs."
    );
    let first = c.input.iter().chain(&c.inout).find(|t| !t.optional);
    let device_arg = if first.is_none() { "device: &Device, " } else { "" };
    let _ = writeln!(
        out,
        "pub fn {name}({device_arg}{}, params: kernels::generated::{name}::Params) -> Result<{}> {{\n    use kernels::generated::{name}::{{Dims, Forward}};",
        signature(c),
        return_type(c)
    );
    let read_list: Vec<(&Tensor, String)> = c.input.iter().chain(&c.inout).map(|t| (t, t.name.clone())).collect();
    out.push_str(&checks(c, &read_list));
    out.push_str(&requires(c, |_| true));
    if let Some(first) = first {
        let _ = writeln!(out, "    let device = {}.device().clone();", first.name);
        let others: Vec<String> = read_list
            .iter()
            .filter(|(t, _)| t.name != first.name)
            .map(|(t, n)| {
                if t.optional {
                    format!("({n:?}, {})", reborrow(t, c, n))
                } else {
                    format!("({n:?}, Some({}))", plain(t, c, n))
                }
            })
            .collect();
        let _ = writeln!(out, "    check.same_device(&device, &[{}])?;", others.join(", "));
    } else {
        out.push_str("    let device = device.clone();\n");
    }
    out.push_str(&element(c));
    let mut body = String::new();
    for t in &c.output {
        let value = if t.optional {
            format!("if want_{} {{ Some({}?) }} else {{ None }}", t.name, empty(t))
        } else {
            format!("{}?", empty(t))
        };
        let _ = writeln!(body, "    let mut {} = {value};", t.name);
    }
    if !body.is_empty() {
        let _ = writeln!(out, "    {}\n{body}", dim_locals(c, &body));
    }
    let mut fields: Vec<Field<'_>> = c.input.iter().map(Field::read).collect();
    fields.extend(c.inout.iter().map(|t| Field { access: Access::Update, ..Field::read(t) }));
    fields.extend(c.output.iter().map(|t| Field { access: Access::Write(t.optional), ..Field::read(t) }));
    let names: Vec<&str> = c.output.iter().map(|t| t.name.as_str()).collect();
    let result = match names.len() {
        0 => "()".into(),
        1 => names[0].to_string(),
        _ => format!("{}Out {{ {} }}", camel(name), names.join(", ")),
    };
    out.push_str(&emit_dispatch::render(c, "forward", &fields, &result));
    out.push_str("}\n");
}

pub(crate) fn needs<'a>(c: &'a Contract, gradient: &'a Gradient) -> Vec<&'a Tensor> {
    gradient.needs.iter().filter_map(|n| c.tensor(n)).collect()
}

fn grads_type(c: &Contract) -> String {
    if c.computed_grads().count() > 1 { format!("{}Grads", camel(&c.name)) } else { "Option<Tensor>".into() }
}

fn backward(out: &mut String, c: &Contract, gradient: &Gradient) {
    let Some(result) = c.result() else { return };
    let name = &c.name;
    let dy = format!("d{}", result.name);
    let needs = needs(c, gradient);
    let mut params = vec![format!("{dy}: &Tensor")];
    params.extend(
        needs.iter().map(|t| format!("{}: {}", t.name, if t.optional { "Option<&Tensor>" } else { "&Tensor" })),
    );
    params.extend(c.given.iter().map(|d| format!("{}: usize", d.to_lowercase())));
    // Dims that only unneeded tensors carry must be given as well.
    let known: Vec<&Tensor> = needs.iter().copied().chain([result]).collect();
    let extra: Vec<&String> = c
        .dims
        .iter()
        .filter(|d| !c.given.contains(d) && !known.iter().any(|t| !t.optional && t.shape.contains(d)))
        .collect();
    params.extend(extra.iter().map(|d| format!("{}: usize", d.to_lowercase())));
    let wants: Vec<String> = c.computed_grads().map(|t| format!("want_{}: bool", t.name)).collect();
    let _ = writeln!(
        out,
        "\n/// Backward pass of [`{name}`]: gradients of the inputs asked for, from `{dy}` and the saved tensors.\n///\n/// # Errors\n/// As the forward pass.\npub fn {name}_backward({}, {}, params: kernels::generated::{name}::Params) -> Result<{}> {{\n    use kernels::generated::{name}::{{Backward, Dims}};",
        params.join(", "),
        wants.join(", "),
        grads_type(c)
    );
    let mut list: Vec<(&Tensor, String)> = vec![(result, dy.clone())];
    list.extend(needs.iter().map(|t| (*t, t.name.clone())));
    let text = checks(c, &list);
    let head = format!("    let mut check = DimCheck::new({:?}, &{:?});\n", c.name, c.dims);
    let mut given = head.clone();
    for d in &extra {
        let _ = writeln!(given, "    check.given({:?}, {})?;", d, d.to_lowercase());
    }
    out.push_str(&text.replacen(&head, &given, 1));
    out.push_str(&requires(c, |name| needs.iter().any(|t| t.name == name)));
    for (t, when) in needs.iter().filter_map(|t| Some((t, t.when.as_ref()?))) {
        let missing = format!("has({}) || !({when})", t.name);
        let _ = writeln!(
            out,
            "    require({name:?}, {}.is_some() || !({}), {missing:?}, \"the forward pass was asked for {}\", || format!(\"{{dims:?}}, {{params:?}}\"))?;",
            t.name,
            condition(c, when),
            t.name
        );
    }
    let others: Vec<String> = needs
        .iter()
        .map(|t| if t.optional { format!("({0:?}, {0})", t.name) } else { format!("({0:?}, Some({0}))", t.name) })
        .collect();
    let _ = writeln!(
        out,
        "    let device = {dy}.device().clone();\n    check.same_device(&device, &[{}])?;",
        others.join(", ")
    );
    out.push_str(&element(c));
    let mut body = String::new();
    for t in c.computed_grads() {
        let _ =
            writeln!(body, "    let mut grad_{0} = if want_{0} {{ Some({1}?) }} else {{ None }};", t.name, empty(t));
    }
    let _ = writeln!(out, "    {}\n{body}", dim_locals(c, &body));
    let mut fields = vec![Field { tensor: result, name: dy.clone(), variable: dy.clone(), access: Access::Read }];
    fields.extend(needs.iter().map(|t| Field::read(t)));
    fields.extend(c.computed_grads().map(|t| Field {
        tensor: t,
        name: format!("d{}", t.name),
        variable: format!("grad_{}", t.name),
        access: Access::Write(true),
    }));
    let grads: Vec<&Tensor> = c.computed_grads().collect();
    let value = if grads.len() > 1 {
        let fields: Vec<String> = grads.iter().map(|t| format!("{0}: grad_{0}", t.name)).collect();
        format!("{}Grads {{ {} }}", camel(name), fields.join(", "))
    } else {
        format!("grad_{}", grads[0].name)
    };
    out.push_str(&emit_dispatch::render(c, "backward", &fields, &value));
    out.push_str("}\n");
}

/// Extra dims of the backward entry point, in its parameter order.
pub(crate) fn extra_dims<'a>(c: &'a Contract, gradient: &'a Gradient) -> Vec<&'a String> {
    let Some(result) = c.result() else { return Vec::new() };
    let known: Vec<&Tensor> = needs(c, gradient).into_iter().chain([result]).collect();
    c.dims
        .iter()
        .filter(|d| !c.given.contains(d) && !known.iter().any(|t| !t.optional && t.shape.contains(d)))
        .collect()
}

/// How to read dim `d` off the forward inputs: off one that is always there, else off the first that is.
fn dim_source(c: &Contract, d: &str) -> String {
    let holders = || c.input.iter().filter_map(|t| Some((t, t.shape.iter().position(|s| s == d)?)));
    if let Some((t, axis)) = holders().find(|(t, _)| !t.optional) {
        return format!("{}.tensor().dim({axis})", t.name);
    }
    let optional = holders().map(|(t, axis)| format!("{}.map(|v| v.tensor().dim({axis}))", t.name));
    match optional.reduce(|first, next| format!("{first}.or({next})")) {
        Some(found) => format!("{found}.unwrap_or(0)"),
        None => d.to_lowercase(),
    }
}

/// The recording method: forward now, backward on the tape.
fn graph_method(out: &mut String, c: &Contract, gradient: &Gradient) {
    let Some(result) = c.result() else { return };
    let name = &c.name;
    let needs = needs(c, gradient);
    let mut params: Vec<String> = c
        .input
        .iter()
        .map(|t| {
            let base = if t.dtype == "i32" { "Tensor" } else { "Var" };
            format!("{}: {}", t.name, if t.optional { format!("Option<&{base}>") } else { format!("&{base}") })
        })
        .collect();
    let optional_outputs: Vec<&Tensor> = c.output.iter().filter(|t| t.optional).collect();
    params.extend(c.given.iter().map(|d| format!("{}: usize", d.to_lowercase())));
    let _ = writeln!(
        out,
        "\nimpl Graph<'_> {{\n    /// [`{name}`], recorded.\n    ///\n    /// # Errors\n    /// As the operator.\n    pub fn {name}(&self, {}, params: kernels::generated::{name}::Params) -> Result<Var> {{",
        params.join(", ")
    );
    let elements = format!("kernels::generated::{name}::INFO.elements");
    for t in c.input.iter().filter(|t| t.is_float()) {
        let _ = match t.optional {
            false => writeln!(out, "        let {0} = &self.fitted({0}, {elements})?;", t.name),
            true => writeln!(
                out,
                "        let {0} = {0}.map(|v| self.fitted(v, {elements})).transpose()?;\n        let {0} = {0}.as_ref();",
                t.name
            ),
        };
    }
    let differentiable: Vec<&Tensor> = c.input.iter().filter(|t| t.grad != Grad::None).collect();
    let sources: Vec<String> = differentiable
        .iter()
        .map(|t| {
            if t.optional {
                format!("{0}.and_then(|v| self.source(v))", t.name)
            } else {
                format!("self.source({})", t.name)
            }
        })
        .collect();
    let _ = writeln!(
        out,
        "        let sources = [{}];\n        let record = sources.iter().any(Option::is_some);",
        sources.join(", ")
    );
    let mut args: Vec<String> = c
        .input
        .iter()
        .map(|t| match (t.dtype.as_str(), t.optional) {
            ("i32", _) => t.name.clone(),
            (_, true) => format!("{}.map(Var::tensor)", t.name),
            _ => format!("{}.tensor()", t.name),
        })
        .collect();
    for t in &optional_outputs {
        args.push(match &t.when {
            Some(when) => format!("record && ({})", condition(c, when)),
            None => "record".into(),
        });
    }
    args.extend(c.given.iter().map(|d| d.to_lowercase()));
    let _ = writeln!(out, "        let out = {name}({}, params)?;", args.join(", "));
    let result_expr = if c.output.len() == 1 { "out".to_string() } else { format!("out.{}", result.name) };
    let _ = writeln!(out, "        if !record {{\n            return Ok(Var::constant({result_expr}));\n        }}");
    // Saved tensors, explicitly.
    let mut saved_list = Vec::new();
    for t in &needs {
        let is_output = c.output.iter().any(|o| o.name == t.name);
        let value = match (is_output, c.output.len(), t.optional, t.dtype.as_str()) {
            (true, 1, ..) => "out.clone()".to_string(),
            (true, ..) => format!("out.{}.clone()", t.name),
            (false, _, true, "i32") => format!("{}.cloned()", t.name),
            (false, _, true, _) => format!("{}.map(|v| v.tensor().clone())", t.name),
            (false, _, false, "i32") => format!("{}.clone()", t.name),
            (false, ..) => format!("{}.tensor().clone()", t.name),
        };
        let _ = writeln!(out, "        let saved_{} = {value};", t.name);
        saved_list.push(if t.optional {
            format!("saved_{}.as_ref()", t.name)
        } else {
            format!("Some(&saved_{})", t.name)
        });
    }
    let extra = extra_dims(c, gradient);
    for d in &extra {
        let _ = writeln!(out, "        let {} = {};", d.to_lowercase(), dim_source(c, d));
    }
    let saved = if saved_list.is_empty() {
        "0".into()
    } else {
        format!("[{}].into_iter().flatten().map(Tensor::bytes).sum()", saved_list.join(", "))
    };
    let _ = writeln!(
        out,
        "        let saved = {saved};\n        Ok(self.record({name:?}, {result_expr}, saved, move |dy, grads| {{"
    );
    let mut call = vec!["dy".to_string()];
    call.extend(
        needs
            .iter()
            .map(|t| if t.optional { format!("saved_{}.as_ref()", t.name) } else { format!("&saved_{}", t.name) }),
    );
    call.extend(c.given.iter().map(|d| d.to_lowercase()));
    call.extend(extra.iter().map(|d| d.to_lowercase()));
    for t in c.computed_grads() {
        let index = differentiable.iter().position(|d| d.name == t.name).unwrap_or(0);
        call.push(format!("sources[{index}].is_some()"));
    }
    let _ = writeln!(out, "            let found = {name}_backward({}, params)?;", call.join(", "));
    let single = c.computed_grads().count() == 1;
    for (index, t) in differentiable.iter().enumerate() {
        let value = match t.grad {
            Grad::Alias => "Some(dy.clone())".to_string(),
            _ if single => "found.clone()".to_string(),
            _ => format!("found.{}", t.name),
        };
        let _ = writeln!(out, "            grads.add(sources[{index}], {value})?;");
    }
    out.push_str("            Ok(())\n        }))\n    }\n}\n");
}
