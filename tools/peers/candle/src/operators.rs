//! The operators: from a case to the ways in which candle can compute it.

use candle_core::{Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::{GroupNorm, Module, ops};
use serde_json::Value;
use std::collections::HashMap;

/// A way to compute a case.
pub struct Way {
    /// Name in rows.
    pub name: &'static str,
    /// What is timed.
    pub run: Box<dyn Fn() -> Result<Tensor>>,
    /// The result in the layout of the contract, outside of the time.
    pub ours: fn(&Tensor) -> Result<Tensor>,
}

/// Dims, parameters and tensors of a case, under the names of the contract.
pub struct Case {
    request: Value,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    /// Of a request and its tensors.
    pub fn new(request: &Value, tensors: HashMap<String, Tensor>) -> Case {
        Case { request: request.clone(), tensors }
    }

    fn dim(&self, name: &str) -> usize {
        self.request["dims"][name].as_u64().unwrap_or(0) as usize
    }

    fn param(&self, name: &str) -> f64 {
        let value = &self.request["params"][name];
        value.as_f64().or(value.as_bool().map(f64::from)).unwrap_or(0.0)
    }

    fn row(&self, name: &str) -> usize {
        self.param(name) as usize
    }

    fn maybe(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        self.maybe(name).ok_or_else(|| candle_core::Error::Msg(format!("the case has no {name}")))
    }
}

/// Ways of a case, none where it is not written for it.
type Ways = Result<Option<Vec<Way>>>;

/// Every operator, by name.
pub const OPERATORS: [(&str, fn(&Case) -> Ways); 10] = [
    ("gemm", gemm),
    ("attention", attention),
    ("cross_attention", cross_attention),
    ("ln_modulate", ln_modulate),
    ("rms_norm", rms_norm),
    ("gate_residual", gate_residual),
    ("embed", embed),
    ("conv2d", conv2d),
    ("group_norm_silu", group_norm_silu),
    ("upsample", upsample),
];

fn same(y: &Tensor) -> Result<Tensor> {
    Ok(y.clone())
}

fn way(name: &'static str, run: impl Fn() -> Result<Tensor> + 'static) -> Way {
    Way { name, run: Box::new(run), ours: same }
}

/// [B, H, W, C] → [B, C, H, W].
fn first_channels(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()
}

fn last_channels(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 2, 3, 1))
}

fn gemm(c: &Case) -> Ways {
    let (x, w, row) = (c.get("x")?, c.get("w")?.t()?, c.row("gate_row"));
    let (bias, pos, residual) = (c.maybe("bias"), c.maybe("pos"), c.maybe("residual"));
    let gate = c.maybe("gate").map(|g| g.narrow(1, row, 1)?.contiguous()).transpose()?;
    let act = c.row("act");
    let (b, n, k) = x.dims3()?;
    let run = move || {
        let mut y = x.reshape((b * n, k))?.matmul(&w)?.reshape((b, n, ()))?;
        if let Some(bias) = &bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(pos) = &pos {
            y = y.broadcast_add(pos)?;
        }
        y = match act {
            1 => y.gelu()?,
            2 => y.silu()?,
            3 => y.sin()?,
            _ => y,
        };
        if let Some(gate) = &gate {
            y = y.broadcast_mul(gate)?;
        }
        residual.as_ref().map_or(Ok(y.clone()), |r| r + &y)
    };
    Ok(Some(vec![way("matmul", run)]))
}

/// Softmax attention of q `[B, N, H, E]` over k, v `[B, M, H, E]`, by products of heads and by the fused function.
fn attend(q: Tensor, k: Tensor, v: Tensor, scale: f64) -> Vec<Way> {
    let by_heads = {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        move || {
            let heads = |x: &Tensor| x.transpose(1, 2)?.contiguous();
            let (q, k, v) = ((heads(&q)? * scale)?, heads(&k)?, heads(&v)?);
            let weights = ops::softmax_last_dim(&q.matmul(&k.t()?)?)?;
            weights.matmul(&v)?.transpose(1, 2)?.contiguous()
        }
    };
    // [B, H, N, E].
    let fused = move || flash_attn::<f32>(&q, &k, &v, scale as f32, AttnMask::None, None, None);
    vec![
        way("matmul and softmax", by_heads),
        Way { name: "flash_attn", run: Box::new(fused), ours: |y| y.transpose(1, 2)?.contiguous() },
    ]
}

/// Part `i` of a projection `[B, N, parts, H, E]`.
fn part(projection: &Tensor, i: usize) -> Result<Tensor> {
    projection.narrow(2, i, 1)?.squeeze(2)?.contiguous()
}

fn attention(c: &Case) -> Ways {
    let qkv = c.get("qkv")?;
    Ok(Some(attend(part(&qkv, 0)?, part(&qkv, 1)?, part(&qkv, 2)?, c.param("scale"))))
}

fn cross_attention(c: &Case) -> Ways {
    if c.maybe("counts").is_some() {
        return Ok(None);
    }
    let (q, kv) = (c.get("q")?, c.get("kv")?);
    Ok(Some(attend(part(&q, 0)?, part(&kv, 0)?, part(&kv, 1)?, c.param("scale"))))
}

fn ln_modulate(c: &Case) -> Ways {
    let (x, table, eps, d) = (c.get("x")?, c.get("modulation")?, c.param("eps") as f32, c.dim("D"));
    let of = |name: &str| table.narrow(1, c.row(name), 1)?.contiguous();
    let (shift, scale) = (of("shift")?, of("scale")?);
    let (one, zero) = (Tensor::ones(d, x.dtype(), &Device::Cpu)?, Tensor::zeros(d, x.dtype(), &Device::Cpu)?);
    let run = move || ops::layer_norm(&x, &one, &zero, eps)?.broadcast_mul(&(&scale + 1.0)?)?.broadcast_add(&shift);
    Ok(Some(vec![way("layer_norm", run)]))
}

fn rms_norm(c: &Case) -> Ways {
    let (x, weight, eps) = (c.get("x")?, c.get("weight")?, c.param("eps") as f32);
    let gate =
        c.maybe("gate").map(|g| g.narrow(candle_core::D::Minus1, c.row("gate_offset"), c.dim("D"))).transpose()?;
    let run = move || {
        let x = gate.as_ref().map_or(Ok(x.clone()), |g| &x * g.contiguous()?.silu()?)?;
        ops::rms_norm(&x, &weight, eps)
    };
    Ok(Some(vec![way("rms_norm", run)]))
}

fn gate_residual(c: &Case) -> Ways {
    let (residual, branch) = (c.get("residual")?, c.get("branch")?);
    let gate = c.get("modulation")?.narrow(1, c.row("gate_row"), 1)?.contiguous()?;
    Ok(Some(vec![way("multiply, add", move || &residual + branch.broadcast_mul(&gate)?)]))
}

fn embed(c: &Case) -> Ways {
    let (table, index, addend, act) = (c.get("table")?, c.get("index")?, c.maybe("addend"), c.row("act"));
    let run = move || {
        let rows = table.embedding(&index)?;
        let rows = addend.as_ref().map_or(Ok(rows.clone()), |a| &rows + a)?;
        if act == 2 { rows.silu() } else { Ok(rows) }
    };
    Ok(Some(vec![way("embedding", run)]))
}

fn conv2d(c: &Case) -> Ways {
    let (stride, rows, columns) = (c.row("stride"), c.row("pad_h"), c.row("pad_w"));
    let (x, filters) = (first_channels(&c.get("x")?)?, first_channels(&c.get("filters")?)?);
    let bias = c.maybe("bias").map(|b| b.reshape((1, (), 1, 1))).transpose()?;
    let relu = c.param("relu") != 0.0;
    let run = move || {
        // Its own padding is the same on every side.
        let y = match rows == columns {
            true => x.conv2d(&filters, rows, stride, 1, 1)?,
            false => {
                let x = x.pad_with_zeros(2, rows, rows)?.pad_with_zeros(3, columns, columns)?;
                x.conv2d(&filters, 0, stride, 1, 1)?
            }
        };
        let y = bias.as_ref().map_or(Ok(y.clone()), |b| y.broadcast_add(b))?;
        if relu { y.relu() } else { Ok(y) }
    };
    Ok(Some(vec![Way { name: "conv2d", run: Box::new(run), ours: last_channels }]))
}

fn group_norm_silu(c: &Case) -> Ways {
    if c.maybe("stats").is_some() || c.param("silu") == 0.0 {
        return Ok(None);
    }
    let x = first_channels(&c.get("x")?)?;
    let channels = x.dim(1)?;
    let norm = GroupNorm::new(c.get("gamma")?, c.get("beta")?, channels, c.dim("G"), c.param("eps"))?;
    let run = move || norm.forward(&x)?.silu();
    Ok(Some(vec![Way { name: "GroupNorm", run: Box::new(run), ours: last_channels }]))
}

fn upsample(c: &Case) -> Ways {
    let x = first_channels(&c.get("x")?)?;
    let (_, _, h, w) = x.dims4()?;
    let run = move || x.upsample_nearest2d(2 * h, 2 * w);
    Ok(Some(vec![Way { name: "upsample_nearest2d", run: Box::new(run), ours: last_channels }]))
}
