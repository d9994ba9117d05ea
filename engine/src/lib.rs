//! graft: edit pretrained diffusion transformers by grafting, and run them at full speed.
//!
//! Rooms, from the ground up (an arrow may only point down; `tidy` checks it):
//! `tensor` ◀ `backend` ◀ `autograd` ◀ `ops` ◀ `nn` ◀ `models` ◀ `sample`, `train`, `eval` ◀ `report` ◀ `graft`, `verify` ◀ `cli`.
//! `tensor` ◀ `backend` ◀ `autograd` ◀ `ops` ◀ `nn` ◀ `models` ◀ `sample`, `train`, `eval` ◀ `report` ◀ `graft`, `verify` ◀ `cli`.
//! `io` alone touches files; `cli` alone prints and exits; `error` is used by all.

pub mod autograd;
pub mod backend;
pub mod cli;
pub mod error;
pub mod eval;
pub mod graft;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod report;
pub mod sample;
pub mod tensor;
pub mod train;
pub mod verify;
