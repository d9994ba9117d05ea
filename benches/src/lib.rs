//! What the benches share: the model cases, measurements in turns with peers, and the machine that a row belongs to.

pub mod machine;
pub mod models;
pub mod paired;
