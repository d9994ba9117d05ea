//! File formats: the only room that touches files.
//!
//! | module | for |
//! |---|---|
//! | [`files`] | reading whole small files, listing folders |
//! | [`map`] | read-only memory maps of large files |
//! | [`atomic`] | all-or-nothing writing, writable-folder check, run-folder lock |
//! | [`dtype`] | element types on disk and their conversion to `f32` and `i64` |
//! | [`safetensors`] | one safetensors file: strict reader, deterministic writer |
//! | [`weights`] | a model folder's weights: one safetensors file or its shards |
//! | [`json`] | JSON as Python writes it |
//! | [`yaml`] | YAML configurations, every node with its line and column |
//! | [`archive`] | uncompressed zip archives as byte ranges of a map |
//! | [`pickle`], [`torch_zip`] | `torch.save` checkpoints, read without executing anything |
//! | [`png`], [`grid`], [`font`] | pictures, labelled contact sheets |
//! | [`datasets`] | Fashion-MNIST, MNIST and CIFAR-10 |
//! | [`inception`] | the raw weights of the metric network |
//! | [`npz`] | arrays of numpy: statistics and sets of samples |
//! | [`captioned`] | pictures with captions |
//! | [`pictures`] | sets of equally large pictures without labels |
//! | [`sentencepiece`] | vocabularies of SentencePiece |
//! | [`hub`] | the local cache of a model hub |
//! | [`hash`] | SHA-256 |
//! | [`cache`] | results kept between runs, files beside the program; the one module that backends may use |
//! | [`jsonl`] | append-only logs, one JSON object per line |
//! | [`system`] | memory of the process, free space of a disk |
//!
//! Every reader treats its bytes as hostile: no length that a file states is believed before it is compared with
//! the bytes that are there, and no input makes a reader panic. Every writer is atomic and deterministic.

pub mod archive;
pub mod atomic;
pub mod cache;
pub mod captioned;
pub mod datasets;
pub mod dtype;
pub mod files;
pub mod font;
pub mod grid;
pub mod hash;
pub mod hub;
pub mod inception;
pub mod json;
pub mod jsonl;
pub mod map;
pub mod npz;
pub mod pickle;
pub mod pictures;
pub mod png;
pub mod safetensors;
pub mod sentencepiece;
pub mod system;
mod tensor_header;
pub mod torch_zip;
mod unpickle;
mod unpickle_globals;
pub mod weights;
pub mod yaml;
