//! Conformance and bench rows: one function per operator that draws the inputs of a case and calls both passes.

use crate::contract::{Contract, Param};
use crate::emit_engine::{extra_dims, needs, shape_array};
use crate::emit_kernels::fill;
use crate::names::{dim_locals, mentions};
use std::fmt::Write;

/// One function: every case, forward and backward, calls and outputs named.
pub fn conform(out: &mut String, c: &Contract) {
    let name = &c.name;
    let _ = writeln!(
        out,
        "\nfn {name}_conform(run: &mut Conform<'_>) -> Result<()> {{\n    use kernels::generated::{name}::{{CASES, Dims, INFO, Params, bytes, exps, flops}};\n    for case in CASES {{\n        let row = CaseRow {{ info: &INFO, name: case.name, tier: case.tier, shape: case.shape, bf16: !case.bf16.is_empty(), flops: flops(case.dims), bytes: bytes(case.dims), exps: exps(case.dims) }};\n        run.case(&row, &mut |io| {{"
    );
    let mut body = String::new();
    body += "            let absent = |name: &str| case.absent.contains(&name);\n";
    if !c.param.is_empty() {
        let value = |p: &Param| match p.ty.as_str() {
            "f32" | "bool" => format!("f64::from(params.{})", p.name),
            _ => format!("params.{} as f64", p.name),
        };
        let pairs: Vec<String> = c.param.iter().map(|p| format!("({:?}, {})", p.name, value(p))).collect();
        let _ = writeln!(body, "            io.params(&[{}]);", pairs.join(", "));
    }
    for t in c.input.iter().chain(&c.inout) {
        let method = match t.dtype.as_str() {
            "i32" => "draw_i32",
            "f32" => "draw_f32",
            _ => "draw",
        };
        let mut value = format!("io.{method}(case.name, {:?}, {}, {})?", t.name, shape_array(t), fill(t));
        if t.dtype == "weight" {
            value = format!("{{ let t = {value}; io.stored(t, case.bf16.contains(&{:?}))? }}", t.name);
        }
        if t.optional {
            value = format!("if absent({:?}) {{ None }} else {{ Some({value}) }}", t.name);
        }
        let mutable = if c.inout.iter().any(|i| i.name == t.name) { "mut " } else { "" };
        let _ = writeln!(body, "            let {mutable}{} = {value};", t.name);
    }
    let mut args: Vec<String> = Vec::new();
    if c.input.iter().chain(&c.inout).all(|t| t.optional) {
        body += "            let device = io.device().clone();\n";
        args.push("&device".into());
    }
    args.extend(
        c.input.iter().map(|t| if t.optional { format!("{}.as_ref()", t.name) } else { format!("&{}", t.name) }),
    );
    args.extend(
        c.inout.iter().map(|t| if t.optional { format!("{}.as_mut()", t.name) } else { format!("&mut {}", t.name) }),
    );
    args.extend(c.output.iter().filter(|t| t.optional).map(|t| format!("!absent({:?})", t.name)));
    args.extend(c.given.iter().map(|d| d.to_lowercase()));
    let _ = writeln!(body, "            let out = io.call(\"forward\", || {name}({}, params))?;", args.join(", "));
    for t in &c.output {
        let value = if c.output.len() == 1 { "out".to_string() } else { format!("out.{}", t.name) };
        if t.optional {
            let _ = writeln!(body, "            if let Some(t) = &{value} {{ io.result({:?}, t)?; }}", t.name);
        } else {
            let _ = writeln!(body, "            io.result({:?}, &{value})?;", t.name);
        }
    }
    for t in &c.inout {
        if t.optional {
            let _ = writeln!(body, "            if let Some(t) = &{0} {{ io.result({0:?}, t)?; }}", t.name);
        } else {
            let _ = writeln!(body, "            io.result({0:?}, &{0})?;", t.name);
        }
    }
    if let (Some(gradient), Some(result)) = (&c.gradient, c.result()) {
        let dy = format!("d{}", result.name);
        let _ = writeln!(
            body,
            "            let {dy} = io.draw(case.name, {dy:?}, {}, Fill::Normal)?;",
            shape_array(result)
        );
        let mut args = vec![format!("&{dy}")];
        for t in needs(c, gradient) {
            let base = match (c.output.iter().any(|o| o.name == t.name), c.output.len()) {
                (true, 1) => "out".to_string(),
                (true, _) => format!("out.{}", t.name),
                _ => t.name.clone(),
            };
            args.push(if t.optional { format!("{base}.as_ref()") } else { format!("&{base}") });
        }
        args.extend(c.given.iter().chain(extra_dims(c, gradient)).map(|d| d.to_lowercase()));
        args.extend(
            c.computed_grads().map(|t| if t.optional { format!("!absent({:?})", t.name) } else { "true".into() }),
        );
        let _ = writeln!(
            body,
            "            let grads = io.call(\"backward\", || {name}_backward({}, params))?;",
            args.join(", ")
        );
        let single = c.computed_grads().count() == 1;
        for t in c.computed_grads() {
            let value = if single { "grads".to_string() } else { format!("grads.{}", t.name) };
            let _ = writeln!(body, "            if let Some(t) = &{value} {{ io.result(\"d{}\", t)?; }}", t.name);
        }
    }
    let locals = c.param.iter().map(|p| p.name.as_str()).filter(|p| c.input.iter().any(|t| mentions(&t.fill, p)));
    let locals: Vec<&str> = locals.collect();
    let param_locals = if locals.is_empty() {
        String::new()
    } else {
        format!("            let Params {{ {}, .. }} = params;\n", locals.join(", "))
    };
    let _ = write!(
        out,
        "            let (dims, params) = (case.dims, case.params);\n            {}\n{param_locals}{body}            Ok(())\n        }})?;\n    }}\n    Ok(())\n}}\n",
        dim_locals(c, &body)
    );
}
