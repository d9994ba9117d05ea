//! Grafting: operators of a pretrained model are replaced, distilled, and the whole is finetuned (arXiv 2506.05340).
//!
//! | module | for |
//! |---|---|
//! | [`plan`] | the TOML file that says what is replaced and how it is trained |
//! | [`select`] | layer patterns |
//! | [`choose`] | the layers of patterns that depend on what the base model does |
//! | [`locality`] | how near the diagonal the attention of each layer stays |
//! | [`import`] | the authors' YAML configurations as plans |
//! | [`settings`] | the stages' settings and their published defaults |
//! | [`cost`] | parameters and FLOPs of the model that results |
//! | [`gpu`] | the time that GPUs are predicted to need for it |
//! | [`assemble`] | base model + trained sites → grafted model, and its folder |
//! | [`distill`] | stage 1: every site learns to imitate the operator it replaces |
//! | [`cache`], [`parts`] | stage 1 from activations on disk, and by several processes |
//! | [`memory`] | peak memory of the stages, before they run |
//! | [`finetune`] | stage 2: the grafted model is trained on the diffusion loss |
//! | [`source`] | the data of a run, and with it the kind of model that it grafts |
//! | [`synthesize`] | pairs that a model makes for its own graft |
//! | [`text_source`], [`fidelity`] | models that read text: their pairs, and how near a graft stays to its base |
//! | [`run`] | the run folder: stages in order, each resumed where it was left |
//! | `pair` | stage 1 of restructuring: two blocks in parallel learn to give what they gave in sequence |
//! | [`science`] | studies: many grafts of one base in one table |
//! | [`ablate`] | what each of the stages contributes |
//! | [`summary`] | what a run has reached, as one JSON file |

pub mod ablate;
pub mod assemble;
pub mod cache;
pub mod choose;
pub mod cost;
pub mod distill;
pub mod evaluate;
pub mod fidelity;
pub mod finetune;
pub mod gpu;
pub mod import;
pub mod locality;
mod lookup;
pub mod memory;
mod page;
mod pair;
pub mod parts;
pub mod plan;
pub mod run;
pub mod science;
pub mod select;
pub mod settings;
mod show;
pub mod source;
mod student;
pub mod summary;
pub mod synthesize;
mod text;
pub mod text_source;
