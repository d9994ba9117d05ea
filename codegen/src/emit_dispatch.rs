//! The last part of an entry point: the checked arguments handed to the path of their device.

use crate::contract::{Contract, Tensor};
use std::fmt::Write;

/// How an entry point holds a tensor that it hands on.
pub enum Access {
    /// `&Tensor`, or `Option<&Tensor>` where the contract says optional.
    Read,
    /// `&mut Tensor`, or `Option<&mut Tensor>`.
    Update,
    /// A `Tensor` of its own; `true` for an `Option<Tensor>`.
    Write(bool),
}

/// One tensor of an argument struct.
pub struct Field<'c> {
    /// Its contract.
    pub tensor: &'c Tensor,
    /// Name of the field.
    pub name: String,
    /// Name of the variable that holds it.
    pub variable: String,
    /// How it is held.
    pub access: Access,
}

impl<'c> Field<'c> {
    /// A tensor that is read and called by its own name.
    pub fn read(tensor: &'c Tensor) -> Field<'c> {
        Field { tensor, name: tensor.name.clone(), variable: tensor.name.clone(), access: Access::Read }
    }

    /// `name: variable.method()?`, through the option where there is one.
    fn value(&self, method: &str) -> String {
        let (name, variable) = (&self.name, &self.variable);
        let (optional, from) = match self.access {
            Access::Read | Access::Update => (self.tensor.optional, variable.clone()),
            Access::Write(optional) => (optional, format!("&mut {variable}")),
        };
        if optional {
            format!("{name}: match {from} {{ Some(t) => Some(t.{method}()?), None => None }}")
        } else {
            format!("{name}: {variable}.{method}()?")
        }
    }

    fn on_host(&self) -> String {
        let read = matches!(self.access, Access::Read);
        self.value(match (self.tensor.dtype.as_str(), read) {
            ("i32", true) => "i32s",
            ("i32", false) => "i32s_mut",
            ("weight", true) => "weight",
            (_, true) => "f32s",
            (_, false) => "f32s_mut",
        })
    }

    fn on_gpu(&self) -> String {
        self.value(if matches!(self.access, Access::Read) { "input" } else { "output" })
    }
}

/// The statements after the last check: nothing on a dry device, kernels on a GPU, slices on the host; then `result`.
/// `pass` is `forward` or `backward`.
pub fn render(c: &Contract, pass: &str, fields: &[Field<'_>], result: &str) -> String {
    let mut out = format!("    if device.is_dry() {{\n        return Ok({result});\n    }}\n");
    let name = &c.name;
    let structure = if pass == "forward" { "Forward" } else { "Backward" };
    let host: Vec<String> = fields.iter().map(Field::on_host).collect();
    if let Some(cuda) = &c.cuda {
        let _ = write!(
            out,
            "    if device.is_gpu() {{\n        macro_rules! args {{ () => {{ kernels::generated::{name}::Gpu{structure} {{ dims, params, {}, element: std::marker::PhantomData }} }} }}\n        let mut queue = device.queue()?;\n        match element {{\n",
            fields.iter().map(Field::on_gpu).collect::<Vec<_>>().join(", ")
        );
        for element in &cuda.elements {
            let _ = writeln!(
                out,
                "            DType::{} => kernels::{name}::launch::{pass}::<{element}, _>(&mut queue, args!())?,",
                element.to_uppercase()
            );
        }
        let _ = write!(
            out,
            "            other => return Err(no_element({name:?}, other)),\n        }}\n        return Ok({result});\n    }}\n"
        );
    }
    let _ = write!(
        out,
        "    let args = {structure} {{ dims, params, {} }};\n    match device.kind() {{\n        DeviceKind::Cpu => kernels::{name}::cpu::{pass}(args),\n        DeviceKind::Oracle => kernels::{name}::reference::{pass}(args),\n        other => return Err(no_path({name:?}, other)),\n    }}\n    Ok({result})\n",
        host.join(", ")
    );
    out
}
