//! The operators.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use std::collections::HashMap;

/// As in Cargo.toml.
pub const VERSION: &str = "0.11";

/// Those that are written here.
pub const OPERATORS: [&str; 9] = [
    "attention",
    "cross_attention",
    "linear_attention",
    "gemm",
    "ln_modulate",
    "rms_norm",
    "conv2d",
    "group_norm_silu",
    "upsample",
];

/// Inputs and parameters of a case; what a call does not need to do is done in `new`.
pub struct Case {
    op: String,
    t: HashMap<String, Tensor>,
    dims: HashMap<String, f64>,
    params: HashMap<String, f64>,
    /// Images channels first, filters as candle takes them.
    images: HashMap<String, Tensor>,
}

impl Case {
    pub fn new(op: String, t: HashMap<String, Tensor>, dims: HashMap<String, f64>, params: HashMap<String, f64>) -> Case {
        let turned = |t: &Tensor| t.permute((0, 3, 1, 2))?.contiguous();
        let images = t
            .iter()
            .filter(|(_, t)| t.rank() == 4)
            .filter_map(|(name, t)| Some((name.clone(), turned(t).ok()?)))
            .collect();
        Case { op, t, dims, params, images }
    }

    /// The ways of the operator, or why this case has none.
    pub fn ways(&self) -> std::result::Result<Vec<&'static str>, &'static str> {
        let has = |name: &str| self.t.contains_key(name);
        match self.op.as_str() {
            "cross_attention" if has("counts") => Err("keys that do not count are not written"),
            "conv2d" if self.param("pad_h") != self.param("pad_w") => Err("its convolution has one padding for both axes"),
            "group_norm_silu" if has("stats") => Err("given statistics are not written"),
            "gemm" if self.param("act") > 2.0 => Err("sine is not written"),
            _ => Ok(vec!["eager"]),
        }
    }

    fn dim(&self, name: &str) -> usize {
        self.dims.get(name).map_or(0, |v| *v as usize)
    }

    fn param(&self, name: &str) -> f64 {
        self.params.get(name).copied().unwrap_or(0.0)
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.t.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no input {name}")))
    }

    fn image(&self, name: &str) -> Result<&Tensor> {
        self.images.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no image {name}")))
    }

    /// The result in the order of memory that ours has.
    pub fn output(&self, way: &str) -> Result<Tensor> {
        let y = self.run(way)?;
        match self.op.as_str() {
            "conv2d" | "group_norm_silu" | "upsample" => y.permute((0, 2, 3, 1)),
            _ => Ok(y),
        }
    }

    /// One call.
    pub fn run(&self, _way: &str) -> Result<Tensor> {
        match self.op.as_str() {
            "attention" => {
                let [q, k, v] = self.heads(self.get("qkv")?, 3)?.try_into().map_err(|_| wrong())?;
                self.attend(&q, &k, &v)
            }
            "cross_attention" => {
                let q = self.get("q")?.narrow(2, 0, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous()?;
                let [k, v] = self.heads(self.get("kv")?, 2)?.try_into().map_err(|_| wrong())?;
                self.attend(&q, &k, &v)
            }
            "linear_attention" => self.linear_attention(),
            "gemm" => self.gemm(),
            "ln_modulate" => self.ln_modulate(),
            "rms_norm" => {
                let x = self.get("x")?;
                let x = match self.t.get("gate") {
                    None => x.clone(),
                    Some(gate) => {
                        let gate = gate.narrow(D::Minus1, self.param("gate_offset") as usize, self.dim("D"))?;
                        (x * gate.contiguous()?.silu()?)?
                    }
                };
                rms_norm(&x, self.get("weight")?, self.param("eps") as f32)
            }
            "conv2d" => {
                let (padding, stride) = (self.param("pad_h") as usize, self.param("stride") as usize);
                let y = self.image("x")?.conv2d(self.image("filters")?, padding, stride, 1, 1)?;
                let y = match self.t.get("bias") {
                    Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
                    None => y,
                };
                if self.param("relu") > 0.0 { y.relu() } else { Ok(y) }
            }
            "group_norm_silu" => self.group_norm()?.silu(),
            "upsample" => self.image("x")?.upsample_nearest2d(2 * self.dim("H"), 2 * self.dim("W")),
            other => Err(candle_core::Error::Msg(format!("no operator {other}"))),
        }
    }

    /// `[B, N, parts, H, E]` as so many `[B, H, N, E]`.
    fn heads(&self, packed: &Tensor, parts: usize) -> Result<Vec<Tensor>> {
        (0..parts).map(|i| packed.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous()).collect()
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let scores = (q * self.param("scale"))?.matmul(&k.t()?)?;
        softmax_last_dim(&scores)?.matmul(v)?.transpose(1, 2)?.contiguous()
    }

    fn linear_attention(&self) -> Result<Tensor> {
        let [q, k, v] = self.heads(self.get("qkv")?, 3)?.try_into().map_err(|_| wrong())?;
        let phi = |x: &Tensor| if self.param("map") == 0.0 { x.elu(1.0)? + 1.0 } else { x.relu() };
        let (q, k) = (phi(&q)?, phi(&k)?);
        let state = k.t()?.contiguous()?.matmul(&v)?;
        let norm = (q.matmul(&k.sum_keepdim(2)?.t()?.contiguous()?)? + self.param("eps"))?;
        q.matmul(&state)?.broadcast_div(&norm)?.transpose(1, 2)?.contiguous()
    }

    fn gemm(&self) -> Result<Tensor> {
        let (x, w) = (self.get("x")?, self.get("w")?);
        let rows = self.dim("B") * self.dim("N");
        let mut y = x.reshape((rows, self.dim("K")))?.matmul(&w.t()?)?.reshape((self.dim("B"), self.dim("N"), self.dim("F")))?;
        for name in ["bias", "pos"] {
            if let Some(added) = self.t.get(name) {
                y = y.broadcast_add(added)?;
            }
        }
        y = match self.param("act") as usize {
            1 => y.gelu()?,
            2 => y.silu()?,
            _ => y,
        };
        if let Some(gate) = self.t.get("gate") {
            y = y.broadcast_mul(&gate.narrow(1, self.param("gate_row") as usize, 1)?)?;
        }
        match self.t.get("residual") {
            Some(residual) => residual + y,
            None => Ok(y),
        }
    }

    fn ln_modulate(&self) -> Result<Tensor> {
        let (x, table) = (self.get("x")?, self.get("modulation")?);
        let row = |name: &str| table.narrow(1, self.param(name) as usize, 1);
        let ones = Tensor::ones(self.dim("D"), DType::F32, x.device())?;
        let zeros = ones.zeros_like()?;
        let normal = candle_nn::ops::layer_norm(x, &ones, &zeros, self.param("eps") as f32)?;
        normal.broadcast_mul(&(row("scale")? + 1.0)?)?.broadcast_add(&row("shift")?)
    }

    fn group_norm(&self) -> Result<Tensor> {
        use candle_nn::Module;
        let (gamma, beta) = (self.get("gamma")?.clone(), self.get("beta")?.clone());
        candle_nn::GroupNorm::new(gamma, beta, self.dim("C"), self.dim("G"), self.param("eps"))?.forward(self.image("x")?)
    }
}

fn wrong() -> candle_core::Error {
    candle_core::Error::Msg("parts of a projection".into())
}
