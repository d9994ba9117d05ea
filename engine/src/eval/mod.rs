//! Quality metrics on features and logits.
