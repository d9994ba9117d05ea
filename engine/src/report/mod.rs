//! Reports for people: one self-contained HTML file each, without scripts and without anything fetched from outside.
//!
//! [`html`] guarantees balanced, escaped markup; [`chart`] draws into it as SVG, [`stack`] bars of parts; [`graft_run`] is the report of a
//! grafting run, [`science`] that of a study, [`mod@bench`] that of measurements; [`ladder`] shows
//! what was tried at an operator, [`heat`] draws a table of numbers as a picture. [`results`] are the tables of committed measurements, in Markdown. Everything is a
//! function of the data given, so the same run gives the same bytes.

pub mod bench;
pub mod chart;
pub mod format;
pub mod graft_run;
pub mod heat;
pub mod html;
pub mod ladder;
mod parts;
pub mod results;
pub mod science;
pub mod stack;
