//! What the benches share: the model cases, and the machine that a row belongs to.

pub mod machine;
pub mod models;
