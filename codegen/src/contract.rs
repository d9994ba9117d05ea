//! Parsing and checking of `op.toml`.

use serde::Deserialize;
use std::collections::BTreeMap;

/// A whole operator contract. Field meanings are those of `op.toml`; `CONTRIBUTING.md` shows one with comments.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// Operator name, equal to its directory.
    pub name: String,
    /// One sentence.
    pub summary: String,
    /// The mathematics, a line each.
    pub formula: Vec<String>,
    /// Dim letters in the order of the generated `Dims` struct.
    pub dims: Vec<String>,
    /// Dims that no input shape holds as a bare letter: the caller gives them.
    #[serde(default)]
    pub given: Vec<String>,
    /// Scalar parameters.
    #[serde(default)]
    pub param: Vec<Param>,
    /// Conditions on dims and parameters, checked by the entry point.
    #[serde(default)]
    pub require: Vec<Require>,
    /// Tensors read.
    #[serde(default)]
    pub input: Vec<Tensor>,
    /// Tensors updated in place.
    #[serde(default)]
    pub inout: Vec<Tensor>,
    /// Tensors written; the first is the result, `saved` ones exist for the backward pass, others are reported and
    /// have no gradient.
    #[serde(default)]
    pub output: Vec<Tensor>,
    /// Present when the operator has a backward pass.
    pub gradient: Option<Gradient>,
    /// Cost formulas in the dims.
    pub cost: Cost,
    /// Bounds that differ from the table of the dtype, with the reason.
    pub tolerance: Option<Tolerance>,
    /// As `tolerance`, where the working type is bf16.
    pub tolerance_bf16: Option<Tolerance>,
    /// Present when the operator has CUDA kernels.
    pub cuda: Option<Cuda>,
    /// Named shapes.
    #[serde(default)]
    pub case: Vec<Case>,
}

/// A scalar parameter.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// Name.
    pub name: String,
    /// `usize`, `u64`, `f32` or `bool`.
    #[serde(rename = "type")]
    pub ty: String,
    /// Meaning and unit.
    pub doc: String,
}

/// A condition of the entry point.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Require {
    /// Boolean expression over dims (upper case), parameters (lower case) and `has(NAME)`: optional input present.
    pub that: String,
    /// What must hold, in words.
    pub must: String,
}

/// A tensor argument.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Dim expressions; `[]` is a scalar.
    pub shape: Vec<String>,
    /// `float` (default): the working type, f32 on the CPU, any of `cuda.elements` on a GPU. `weight`: the same, but
    /// on the CPU it may be stored in bf16 as well. `f32` and `i32`: always that.
    #[serde(default = "float_name")]
    pub dtype: String,
    /// May be absent.
    #[serde(default)]
    pub optional: bool,
    /// Inputs: a gradient exists (`true`), or equals the output's gradient (`alias`).
    #[serde(default)]
    pub grad: Grad,
    /// Outputs: only the backward pass reads it.
    #[serde(default)]
    pub saved: bool,
    /// Optional outputs: when the backward pass reads it, an expression over parameters and `has(NAME)`; the graph
    /// asks for it exactly then. Absent means always.
    pub when: Option<String>,
    /// How test inputs are drawn: `normal` (default), `uniform:LO:HI`, `index:EXPR`, `positive`.
    #[serde(default = "normal_name")]
    pub fill: String,
    /// Meaning.
    pub doc: String,
}

fn float_name() -> String {
    "float".into()
}

impl Tensor {
    /// The dtype in words, as documentation has it.
    pub fn dtype_doc(&self) -> &'static str {
        match self.dtype.as_str() {
            "i32" => "i32",
            "f32" => "f32",
            "weight" => "float (f32 or bf16 on the CPU)",
            _ => "float",
        }
    }

    /// Whether it is of the working type on a GPU.
    pub fn is_float(&self) -> bool {
        ["float", "weight"].contains(&self.dtype.as_str())
    }
}

fn normal_name() -> String {
    "normal".into()
}

/// Whether and how an input has a gradient.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Grad {
    /// No gradient.
    #[default]
    None,
    /// The backward pass computes it.
    Computed,
    /// It is the gradient of the result itself (a residual connection).
    Alias,
}

/// The backward pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gradient {
    /// Forward tensors (inputs, outputs) that it reads.
    pub needs: Vec<String>,
}

/// The CUDA kernels of an operator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cuda {
    /// Working types that its sources are compiled for: `f32`, `bf16`.
    pub elements: Vec<String>,
    /// Ways to run a pass, the first that fits is taken where no measurement says otherwise; the last of a pass takes
    /// everything.
    #[serde(default)]
    pub way: Vec<Way>,
}

/// One way to run a pass on a GPU.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Way {
    /// Name, unique in the pass.
    pub name: String,
    /// `forward` or `backward`.
    pub pass: String,
    /// Lowest compute capability that has its instructions, 10·major + minor.
    pub arch: u32,
    /// Working types that it computes in.
    pub elements: Vec<String>,
    /// What it is, in a sentence.
    pub doc: String,
}

impl Cuda {
    /// The ways of a pass, in their order.
    pub fn ways<'c>(&'c self, pass: &'c str) -> impl Iterator<Item = &'c Way> {
        self.way.iter().filter(move |w| w.pass == pass)
    }

    fn check(&self, backward: bool) -> Result<(), String> {
        let known = |elements: &[String]| {
            !elements.is_empty() && elements.iter().all(|e| ["f32", "bf16"].contains(&e.as_str()))
        };
        if !known(&self.elements) {
            return Err(format!("cuda.elements: {:?} is not a list of f32, bf16", self.elements));
        }
        for (i, way) in self.way.iter().enumerate() {
            let context = |e: &str| Err(format!("cuda.way {} ({}): {e}", way.name, way.pass));
            if !(way.pass == "forward" || way.pass == "backward" && backward) {
                return context("pass is not one that the operator has");
            }
            if self.way[..i].iter().any(|w| w.name == way.name && w.pass == way.pass) {
                return context("stands twice");
            }
            if !known(&way.elements) || way.elements.iter().any(|e| !self.elements.contains(e)) {
                return context("elements are not some of cuda.elements");
            }
            if ![80, 90].contains(&way.arch) {
                return context("arch is not 80 or 90");
            }
        }
        for pass in ["forward", "backward"] {
            if let Some(last) = self.ways(pass).last().filter(|w| w.arch != 80 || w.elements != self.elements) {
                return Err(format!("cuda.way {} ({pass}): the last way takes every element on every GPU", last.name));
            }
        }
        Ok(())
    }
}

/// Cost of one forward call.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Floating-point operations (2 per multiply-add), an expression over the dims.
    pub flops: String,
    /// Bytes that must cross memory at the least, all tensors in f32, an expression over the dims.
    pub bytes: String,
    /// Exponentials, where they are part of what takes time: an expression over the dims.
    #[serde(default)]
    pub exps: Option<String>,
}

impl Cost {
    /// The expression of exponentials.
    pub fn exponentials(&self) -> &str {
        self.exps.as_deref().unwrap_or("0")
    }
}

/// Bounds for |got − want| ≤ atol + rtol·|want| and for the relative RMS error.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// Absolute bound.
    pub atol: f64,
    /// Relative bound.
    pub rtol: f64,
    /// Relative RMS bound.
    pub rms: f64,
    /// Why the table of the dtype does not hold.
    pub reason: String,
}

/// A named shape.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Name, unique in the contract.
    pub name: String,
    /// `tiny` (oracle, cpu, emu: always) or `real` (cuda and benches).
    pub tier: String,
    /// Value of every dim.
    pub dims: BTreeMap<String, usize>,
    /// Value of every parameter.
    #[serde(default)]
    pub params: BTreeMap<String, toml::Value>,
    /// Optional tensors that are absent.
    #[serde(default)]
    pub absent: Vec<String>,
    /// Weights stored as bf16.
    #[serde(default)]
    pub bf16: Vec<String>,
    /// `false` where finite differences cannot be taken (kinks, rounding to bf16).
    #[serde(default = "yes")]
    pub gradcheck: bool,
}

fn yes() -> bool {
    true
}

impl Contract {
    /// Parses and checks a contract. `place` names the file in errors.
    ///
    /// # Errors
    /// One line that names the file, the entry, and what is wrong with it.
    pub fn parse(place: &str, text: &str) -> Result<Contract, String> {
        let contract: Contract = toml::from_str(text).map_err(|e| format!("{place}: {e}"))?;
        contract.check().map_err(|e| format!("{place}: {e}"))?;
        Ok(contract)
    }

    /// All tensors: inputs, in-out, outputs.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.input.iter().chain(&self.inout).chain(&self.output)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors().find(|t| t.name == name)
    }

    /// The result of the forward pass, where there is one.
    pub fn result(&self) -> Option<&Tensor> {
        self.output.first().filter(|t| !t.saved)
    }

    /// Inputs whose gradient the backward pass computes.
    pub fn computed_grads(&self) -> impl Iterator<Item = &Tensor> {
        self.input.iter().filter(|t| t.grad == Grad::Computed)
    }

    fn check(&self) -> Result<(), String> {
        let known_dim = |expr: &str| -> Result<(), String> {
            for word in expr.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
                if word.parse::<usize>().is_err() && !self.dims.iter().any(|d| d == word) {
                    return Err(format!("dim {word} is not in dims = {:?}", self.dims));
                }
            }
            Ok(())
        };
        for tensor in self.tensors() {
            tensor.shape.iter().try_for_each(|e| known_dim(e)).map_err(|e| format!("tensor {}: {e}", tensor.name))?;
            if !["float", "weight", "f32", "i32"].contains(&tensor.dtype.as_str()) {
                return Err(format!("tensor {}: dtype {} is not float, weight, f32 or i32", tensor.name, tensor.dtype));
            }
        }
        if let Some(cuda) = &self.cuda {
            cuda.check(self.gradient.is_some())?;
        }
        let conditions = self.require.iter().map(|r| &r.that).chain(self.output.iter().filter_map(|t| t.when.as_ref()));
        for condition in conditions {
            for name in named_by_has(condition) {
                if !self.input.iter().any(|t| t.optional && t.name == name) {
                    return Err(format!("condition {condition}: has({name}) names no optional input"));
                }
            }
        }
        let required = self.output.iter().filter(|t| !t.optional);
        if let Some(t) = self.input.iter().chain(&self.inout).chain(required).find(|t| t.when.is_some()) {
            return Err(format!("tensor {}: only an optional output has a when", t.name));
        }
        for dim in &self.dims {
            let bare = self.input.iter().chain(&self.inout).any(|t| !t.optional && t.shape.contains(dim));
            let optional = self.input.iter().any(|t| t.optional && t.shape.contains(dim));
            if !bare && !optional && !self.given.contains(dim) {
                return Err(format!("dim {dim} is in no input shape: list it in given"));
            }
        }
        for param in &self.param {
            if !["usize", "u64", "f32", "bool"].contains(&param.ty.as_str()) {
                return Err(format!("param {}: type {} is not usize, u64, f32 or bool", param.name, param.ty));
            }
        }
        for that in self.require.iter().map(|r| &r.that) {
            for name in that.split("has(").skip(1).filter_map(|rest| rest.split(')').next()) {
                if !self.tensor(name).is_some_and(|t| t.optional) {
                    return Err(format!("require {that}: {name} is no optional tensor of the operator"));
                }
            }
        }
        if let Some(gradient) = &self.gradient {
            if let Some(missing) = gradient.needs.iter().find(|n| self.tensor(n).is_none()) {
                return Err(format!("gradient needs {missing}, which is no tensor of the operator"));
            }
            if self.result().is_none() || self.computed_grads().next().is_none() {
                return Err("gradient: an operator with a backward pass has a result and an input with grad".into());
            }
        }
        for case in &self.case {
            let context = |e: String| format!("case {}: {e}", case.name);
            if !["tiny", "real"].contains(&case.tier.as_str()) {
                return Err(context(format!("tier {} is not tiny or real", case.tier)));
            }
            for dim in &self.dims {
                case.dims.get(dim).ok_or_else(|| context(format!("dim {dim} has no value")))?;
            }
            for param in &self.param {
                case.params.get(&param.name).ok_or_else(|| context(format!("param {} has no value", param.name)))?;
            }
            for name in case.absent.iter().chain(&case.bf16) {
                self.tensor(name).ok_or_else(|| context(format!("{name} is no tensor of the operator")))?;
            }
        }
        if self.case.iter().all(|c| c.tier != "tiny") {
            return Err("no tiny case: nothing would test the operator".into());
        }
        Ok(())
    }
}

/// The names inside every `has(NAME)` of a condition.
pub fn named_by_has(condition: &str) -> impl Iterator<Item = &str> {
    condition.split("has(").skip(1).map(|rest| rest.split(')').next().unwrap_or(rest).trim())
}
