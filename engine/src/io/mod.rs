//! File formats: the only room that touches files.
